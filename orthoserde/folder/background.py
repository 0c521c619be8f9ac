"""One piece of work at a time in a thread of its own, whose failure is raised when something is asked of it next.

Note [Ends]
- The thread is no daemon: when the interpreter ends, it waits for the work to be done.
- A failure that nobody asked for, because the program ended or dropped the object, is logged as an error.
- A process that was forked meanwhile has a copy of the object, but not the thread: it has nothing to wait for.
- The work holds the object, so it is not collected before that is done; but what failed does not hold it, nor the copy
  of a model that the work was about.
"""

from __future__ import annotations

import logging
import os
import threading
import traceback
import weakref
from collections.abc import Callable
from typing import Generic, TypeVar

from orthoserde.errors import BackgroundSaveError

logger = logging.getLogger("orthoserde")

Result = TypeVar("Result")


class _Job(Generic[Result]):
    """A piece of work, and what became of it."""

    def __init__(self, work: Callable[[], Result], what: str) -> None:
        self.work = [work]
        self.what = what
        self.process = os.getpid()
        self.ended = threading.Event()
        self.result: Result | None = None
        self.error: BackgroundSaveError | None = None
        self._claim = threading.Lock()

    def claim(self) -> bool:
        """Whether the caller is the first to ask, and is to do the work."""
        return self._claim.acquire(blocking=False)


class Background(Generic[Result]):
    """At most one piece of work, begun and not yet asked for."""

    def __init__(self) -> None:
        self._job: _Job[Result] | None = None
        self._unseen: list[BackgroundSaveError] = []
        # Holds the list and not the object, which would never be collected; runs at the end of the interpreter too,
        # after it has waited for the thread.
        weakref.finalize(self, _tell, self._unseen)

    def start(self, work: Callable[[], Result], what: str) -> None:
        """Begin the work in a thread.

        Args:
            work: What to do. If the system gives no thread, it is done at once, and fails as it would there.
            what: What it does, for messages.

        Raises:
            BackgroundSaveError: Work begun before, which is waited for, has failed. The new one was not begun.
        """
        self.settle()
        job = self._job = _Job(work, what)
        thread = threading.Thread(target=_do, args=(job, self._unseen), name="orthoserde-save", daemon=False)
        try:
            thread.start()
        except RuntimeError:  # no more threads, or the interpreter is about to end
            _do(job, self._unseen)
        except BaseException:  # an interrupt, before or after the thread took the work
            if job.claim():
                self._job = None
            raise

    def settle(self) -> Result | None:
        """Wait for the work that was begun.

        Returns:
            What it returned, None if none was begun since this was last asked.

        Raises:
            BackgroundSaveError: It failed; what it raised is the cause. It is raised once.
        """
        job = self._job
        if job is None or job.process != os.getpid():
            self._job = None
            return None
        job.ended.wait()
        self._job = None
        if job.error is not None:
            self._unseen.clear()
            raise job.error
        return job.result

    def leave(self) -> None:
        """Wait for the work; log a failure instead of raising it, because another exception is on its way."""
        job = self._job
        if job is not None and job.process == os.getpid():
            job.ended.wait()
        _tell(self._unseen)
        self._job = None


def _do(job: _Job[Result], unseen: list[BackgroundSaveError]) -> None:
    if not job.claim():
        return
    try:
        job.result = job.work[0]()
    except BaseException as error:  # whatever it is, the thread has nobody else to tell
        for each in _chain(error):
            traceback.clear_frames(each.__traceback__)  # see Note [Ends]: what failed holds nothing
        job.error = BackgroundSaveError(f"{job.what} failed in the background: {str(error) or type(error).__name__}")
        job.error.__cause__ = error
        unseen.append(job.error)
    finally:
        job.work.clear()
        job.ended.set()


def _chain(error: BaseException) -> list[BaseException]:
    """An error and all that it came from, each once."""
    found: dict[int, BaseException] = {}
    pending: list[BaseException | None] = [error]
    while pending:
        each = pending.pop()
        if each is not None and id(each) not in found:
            found[id(each)] = each
            pending += [each.__cause__, each.__context__]
    return list(found.values())


def _tell(unseen: list[BackgroundSaveError]) -> None:
    for error in unseen:
        logger.error("%s", error, exc_info=error)
    unseen.clear()
