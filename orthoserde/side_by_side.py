"""The same work for many items, on a few threads that have all ended when the call returns or raises.

Threads beside the caller's know nothing of its modes: gradients are on there, inference mode, default devices and
dispatch modes are off, and CUDA has another current stream. So the caller says which items may leave its thread.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch

#: More threads than this do not read faster: the memory is busy by then. Each may hold a block of its own.
MOST_THREADS = 8

#: Bytes that are worth another thread. Measured on two cores: with half of them for each there was nothing to gain.
BYTES_PER_THREAD = 16 << 20

#: Items below this many bytes stay in the caller's thread: they are mostly Python, which runs one thread at a time.
#: Measured on two cores: with tensors half as large there was nothing to gain.
SMALL_BYTES = 512 << 10

Item = TypeVar("Item")
Result = TypeVar("Result")

#: What work calls between steps of some milliseconds. It raises if the work is no longer wanted.
GoOn = Callable[[], None]


class _Abandoned(BaseException):
    """Work for another item failed. No Exception, so that no work takes it for a failure of its own."""


def work_through(
    items: Sequence[Item], work: Callable[[Item, GoOn], Result], movable: Callable[[Item], int]
) -> list[Result]:
    """Do the same work for each of the items.

    Small items and those that may not leave the caller's thread are worked on there, in the order given. Large ones are
    taken by all threads, the largest first. Where there is little to do, the caller's thread does everything.

    Args:
        items: What to work on.
        work: Called with each item, and with what it is to call between its steps.
        movable: Bytes of an item that may be worked on in any thread, at the same time as any other; 0 for one that
            may not.

    Returns:
        What the work returned, in the order of the items.

    Raises:
        BaseException: What the work raised that failed first, or an interrupt of the caller. No work was begun since,
            and what had begun has ended.
    """
    sizes = {index: size for index, item in enumerate(items) if (size := movable(item)) >= SMALL_BYTES}
    pieces = len(sizes) + (len(sizes) < len(items))
    worth = min(pieces, sum(sizes.values()) // BYTES_PER_THREAD)
    helpers = min(worth, _threads_at_hand()) - 1 if worth > 1 else 0
    if helpers < 1:
        return [work(item, _always) for item in items]
    return _Crew(items, work, sorted(sizes, key=lambda index: -sizes[index])).run(helpers)


def _always() -> None:
    return


def _threads_at_hand() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, torch.get_num_threads(), MOST_THREADS)


class _Crew(Generic[Item, Result]):
    """What the threads share. Whatever changes is a list, deque or dict, and changes in one step: no lock is needed."""

    def __init__(
        self, items: Sequence[Item], work: Callable[[Item, GoOn], Result], shared_indices: Sequence[int]
    ) -> None:
        self._items = items
        self._work = work
        self._kept = sorted(set(range(len(items))).difference(shared_indices))
        self._shared = deque(shared_indices)
        self._results: dict[int, Result] = {}
        # In the order of time. When there is one, nothing is begun any more.
        self._failures: list[BaseException] = []

    def run(self, helpers: int) -> list[Result]:
        """Do all the work with this many threads beside the caller's."""
        gates = [threading.Lock() for _ in range(helpers)]
        threads = [threading.Thread(target=self._help, args=(gate,), daemon=False) for gate in gates]
        try:
            _start(threads)
            for index in self._kept:
                self._do(index)
            self._take_shared()
        except BaseException as error:  # an interrupt between two items
            self._failures.append(error)
        self._wait(gates, threads)
        if self._failures:
            try:
                # An interrupt of the caller is not lost behind a failure that came first.
                interrupts = (error for error in self._failures if not isinstance(error, Exception))
                raise next(interrupts, self._failures[0])
            finally:
                self._failures.clear()  # the traceback holds this frame, which would hold the error
        return [self._results[index] for index in range(len(self._items))]

    def _wait(self, gates: Sequence[threading.Lock], threads: Sequence[threading.Thread]) -> None:
        """Return when every thread has ended, whatever interrupts the wait; interrupts are noted as failures."""
        for gate, thread in zip(gates, threads, strict=True):
            ended = False
            while not ended:
                try:
                    # Not join alone: when interrupted, it takes a thread that still runs for one that has ended
                    # (CPython 3.10 to 3.12). A thread that begins only now finds nothing to do.
                    with gate:
                        pass
                    if thread.is_alive():
                        thread.join()
                    ended = True
                except BaseException as error:
                    self._failures.append(error)

    def _help(self, gate: threading.Lock) -> None:
        with gate:
            self._take_shared()

    def _take_shared(self) -> None:
        while True:
            try:
                index = self._shared.popleft()
            except IndexError:
                return
            self._do(index)

    def _do(self, index: int) -> None:
        try:
            self._go_on()
            self._results[index] = self._work(self._items[index], self._go_on)
        except _Abandoned:
            return
        except BaseException as error:
            self._failures.append(error)

    def _go_on(self) -> None:
        if self._failures:
            raise _Abandoned


def _start(threads: Sequence[threading.Thread]) -> None:
    for thread in threads:
        try:
            thread.start()
        except RuntimeError:  # the system has no more threads to give, or Python is about to end
            return
