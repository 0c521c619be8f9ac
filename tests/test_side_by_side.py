"""Work on several threads: what is done where, and how it ends when something fails."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import threading
import time
import weakref
from collections.abc import Iterator

import pytest
import torch

from orthoserde import side_by_side
from orthoserde.side_by_side import BYTES_PER_THREAD, SMALL_BYTES, GoOn, work_through
from tests.helpers import THREADS

#: Seconds after which a test that waits for another thread has failed.
PATIENCE = 30.0

LARGE = BYTES_PER_THREAD

interrupts = pytest.mark.skipif(os.name == "nt", reason="a thread of Windows cannot send another one a signal")


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    before = threading.enumerate()
    yield
    assert threading.enumerate() == before


@pytest.fixture(autouse=True)
def _two_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_by_side, "_threads_at_hand", lambda: 2)


def large(item: object) -> int:
    return LARGE


def wait_for(event: threading.Event) -> None:
    assert event.wait(PATIENCE)


def work_until_stopped(go_on: GoOn, ended: threading.Event) -> None:
    """What a long read does: block after block, until it is told that it is no longer wanted."""
    deadline = time.monotonic() + PATIENCE
    try:
        while time.monotonic() < deadline:
            go_on()
            time.sleep(0.001)
    except BaseException:
        time.sleep(0.02)  # time for a caller that does not wait to go on too early
        ended.set()
        raise


def interrupt_the_caller() -> None:
    """What Ctrl-C does; ``_thread.interrupt_main`` would not wake a thread that waits."""
    caller = threading.main_thread().ident
    assert caller is not None
    signal.pthread_kill(caller, signal.SIGINT)


# What is done where


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("count", [0, 1, 2, 50])
def test_results_come_in_the_order_of_the_items(threads: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_by_side, "_threads_at_hand", lambda: threads)
    sizes = [LARGE * (1 + index * 7 % 5) for index in range(count)]

    def work(index: int, go_on: GoOn) -> int:
        time.sleep(0.0005 * (index % 3))
        return index * index

    assert work_through(range(count), work, sizes.__getitem__) == [index * index for index in range(count)]


def test_large_items_are_worked_on_at_the_same_time() -> None:
    both_there = threading.Barrier(2)

    def work(item: int, go_on: GoOn) -> int:
        both_there.wait(PATIENCE)
        return threading.get_ident()

    assert len(set(work_through([0, 1], work, large))) == 2


def test_the_largest_items_are_begun_first() -> None:
    order: list[int] = []
    others_done = threading.Event()
    sizes = [LARGE + index * 5 % 7 for index in range(7)]

    def work(index: int, go_on: GoOn) -> None:
        if sizes[index] == max(sizes):
            wait_for(others_done)
        order.append(sizes[index] - LARGE)
        if len(order) == 6:
            others_done.set()

    work_through(range(7), work, sizes.__getitem__)
    assert order == [5, 4, 3, 2, 1, 0, 6]


@pytest.mark.parametrize("size", [0, SMALL_BYTES - 1])
def test_items_that_are_small_or_may_not_leave_stay_with_the_caller_in_order(size: int) -> None:
    sizes = [size if index % 2 else LARGE for index in range(20)]
    order: list[int] = []

    def work(index: int, go_on: GoOn) -> int:
        order.append(index)
        return threading.get_ident()

    where = work_through(range(20), work, sizes.__getitem__)
    assert set(where[1::2]) == {threading.get_ident()}
    assert [index for index in order if index % 2] == list(range(1, 20, 2))


@pytest.mark.parametrize(
    "sizes",
    [[], [LARGE * 9], [LARGE // 2, LARGE], [SMALL_BYTES - 1] * 500, [0] * 500],
    ids=["nothing", "one item", "few bytes", "small items", "items that may not leave"],
)
def test_where_there_is_little_to_share_no_thread_is_started(sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading.Thread, "start", lambda thread: pytest.fail("a thread was started"))
    order: list[int] = []
    work_through(range(len(sizes)), lambda index, go_on: order.append(index), sizes.__getitem__)
    assert order == list(range(len(sizes)))


def test_there_are_no_more_threads_than_torch_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        where = work_through(range(9), lambda index, go_on: threading.get_ident(), large)
    finally:
        torch.set_num_threads(threads)
    assert set(where) == {threading.get_ident()}


def test_there_are_never_more_threads_than_help(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1000)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: range(1000), raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 1000)

    def work(index: int, go_on: GoOn) -> int:
        time.sleep(0.001)
        return threading.get_ident()

    where = work_through(range(200), work, large)
    assert 1 < len(set(where)) <= side_by_side.MOST_THREADS


@pytest.mark.parametrize("started", [0, 1])
def test_a_system_without_more_threads_gets_everything_done_by_those_there_are(
    started: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(side_by_side, "_threads_at_hand", lambda: 4)
    start, left = threading.Thread.start, [None] * started

    def start_few(thread: threading.Thread) -> None:
        if not left:
            raise RuntimeError("can't start new thread")
        left.pop()
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_few)
    assert work_through(range(9), lambda index, go_on: -index, large) == [-index for index in range(9)]


def test_threads_that_take_long_to_end_have_ended_too(monkeypatch: pytest.MonkeyPatch) -> None:
    run, ended = threading.Thread.run, list[threading.Thread]()

    def run_long(thread: threading.Thread) -> None:
        run(thread)
        time.sleep(0.05)
        ended.append(thread)

    monkeypatch.setattr(threading.Thread, "run", run_long)
    work_through([0, 1], lambda index, go_on: None, large)
    assert len(ended) == 1


# Failures


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("movable", [0, LARGE])
@pytest.mark.parametrize("error", [OSError("gone"), MemoryError(), KeyboardInterrupt(), SystemExit(3)], ids=repr)
def test_what_fails_is_raised_as_itself(
    error: BaseException, movable: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(side_by_side, "_threads_at_hand", lambda: threads)

    def work(index: int, go_on: GoOn) -> None:
        if index == 3:
            raise error

    with pytest.raises(type(error)) as caught:
        work_through(range(6), work, lambda index: movable if index == 3 else LARGE)
    assert caught.value is error
    assert error.__cause__ is error.__context__ is None


@pytest.mark.parametrize("failing", ["the caller's", "another"])
def test_a_failure_stops_what_runs_and_begins_nothing_more(failing: str) -> None:
    both_there, ended = threading.Barrier(2), threading.Event()
    begun: list[int] = []
    caller = threading.get_ident()

    def work(index: int, go_on: GoOn) -> None:
        begun.append(index)
        both_there.wait(PATIENCE)
        if (threading.get_ident() == caller) == (failing == "the caller's"):
            raise OSError("gone")
        work_until_stopped(go_on, ended)

    with pytest.raises(OSError, match="gone"):
        work_through(range(20), work, large)
    assert ended.is_set()
    assert sorted(begun) == [0, 1]


def test_work_that_takes_exceptions_for_its_own_is_stopped_all_the_same() -> None:
    both_there, ended = threading.Barrier(2), threading.Event()

    def work(index: int, go_on: GoOn) -> None:
        both_there.wait(PATIENCE)
        if index == 1:
            raise OSError("gone")
        try:
            work_until_stopped(go_on, ended)
        except Exception:
            pytest.fail("it was told in an exception that it might handle")

    with pytest.raises(OSError, match="gone"):
        work_through([0, 1], work, large)
    assert ended.is_set()


def test_of_several_failures_the_first_is_raised() -> None:
    both_there, failed = threading.Barrier(2), threading.Event()

    def work(index: int, go_on: GoOn) -> None:
        both_there.wait(PATIENCE)
        if index == 1:
            failed.set()
            raise OSError("the first")
        wait_for(failed)
        time.sleep(0.05)
        raise OSError("the second")

    with pytest.raises(OSError, match="the first"):
        work_through([0, 1], work, large)


def test_a_failure_holds_nothing_once_it_has_been_handled() -> None:
    class Held:
        pass

    held = Held()
    watched = weakref.ref(held)

    def work(item: object, go_on: GoOn) -> None:
        raise OSError("gone")

    gc.collect()
    gc.disable()
    try:
        with contextlib.suppress(OSError):
            work_through([held, held], work, large)
        del held
        assert watched() is None
    finally:
        gc.enable()


# Interrupts


@interrupts
def test_an_interrupt_of_the_caller_at_work_stops_and_ends_the_others() -> None:
    ended = threading.Event()
    caller = threading.get_ident()

    def work(index: int, go_on: GoOn) -> None:
        if threading.get_ident() != caller:
            interrupt_the_caller()
            work_until_stopped(go_on, ended)
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            time.sleep(0.001)

    with pytest.raises(KeyboardInterrupt):
        work_through([0, 1], work, large)
    assert ended.is_set()


@interrupts
def test_an_interrupt_of_the_caller_who_waits_stops_and_ends_the_others() -> None:
    ended, caller_is_done = threading.Event(), threading.Event()
    caller = threading.get_ident()

    def work(index: int, go_on: GoOn) -> None:
        if threading.get_ident() == caller:
            if index == 2:
                caller_is_done.set()
            return
        wait_for(caller_is_done)
        time.sleep(0.02)
        interrupt_the_caller()
        work_until_stopped(go_on, ended)

    # The last item stays with the caller, who has nothing to do once another thread has the first.
    with pytest.raises(KeyboardInterrupt):
        work_through([0, 1, 2], work, lambda index: (2 * LARGE, 0, 0)[index])
    assert ended.is_set()


@interrupts
def test_interrupts_while_a_failure_stops_the_others_neither_leave_them_running_nor_get_lost() -> None:
    both_there, ended = threading.Barrier(2), threading.Event()
    caller = threading.get_ident()

    def work(index: int, go_on: GoOn) -> None:
        both_there.wait(PATIENCE)
        if threading.get_ident() == caller:
            raise OSError("gone")
        try:
            work_until_stopped(go_on, threading.Event())
        finally:
            for _ in range(5):
                interrupt_the_caller()
                time.sleep(0.02)
            ended.set()

    with pytest.raises(KeyboardInterrupt):
        work_through([0, 1], work, large)
    assert ended.is_set()


def test_an_interrupt_while_a_thread_is_being_started_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start
    started: list[threading.Thread] = []

    def interrupted_start(thread: threading.Thread) -> None:
        start(thread)
        started.append(thread)
        raise KeyboardInterrupt

    ended = threading.Event()
    ended.set()

    def work(index: int, go_on: GoOn) -> None:
        ended.clear()
        work_until_stopped(go_on, ended)

    monkeypatch.setattr(threading.Thread, "start", interrupted_start)
    with pytest.raises(KeyboardInterrupt):
        work_through([0, 1], work, large)
    assert ended.is_set()
    assert not started[0].is_alive()
