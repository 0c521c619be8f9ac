"""Children that save: each is forked, waits until it is told to go, and is killed or refused something on its way.

Two layers decide where. By strace: at the n-th call of a name to the system, whoever makes it. In Python: at the n-th
call that ``orthoserde.storage`` makes to a function that touches the disk; for machines that have no strace.
"""

from __future__ import annotations

import json
import mmap
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from orthoserde import storage

#: Seconds after which a child is taken to hang.
PATIENCE = 60.0

#: Functions that touch the disk, by the names that Python gives them.
DISK_CALLS = frozenset(
    [
        "open",
        "fdopen",
        "stat",
        "lstat",
        "fstat",
        "listdir",
        "flock",
        "fchmod",
        "seek",
        "write",
        "truncate",
        "fsync",
        "replace",
        "unlink",
        "mkdir",
        "rmdir",
        "close",
        "__exit__",
    ]
)


@dataclass(frozen=True)
class Report:
    """What a child says of its save; of one that was killed, nothing.

    Attributes:
        error: The class of the exception; "" if the save returned.
        message: Of the exception.
        descriptors: How many files it had open afterwards, less those before; None where it was not asked.
        value: What the work returned, if that is JSON.
        errno: Of the exception, if it has one.
    """

    error: str = ""
    message: str = ""
    descriptors: int | None = None
    value: Any = None
    errno: int | None = None


@dataclass(frozen=True)
class Ended:
    """How a child ended.

    Attributes:
        report: What it said; None if it was killed before it could.
        killed: Whether by a signal, and not for its hanging.
        log: What strace wrote.
    """

    report: Report | None
    killed: bool
    log: str = ""


class Child:
    """A forked process that waits to be told to go.

    It reports through memory that it shares with its parent, so that it makes no calls but those of the save.
    """

    def __init__(self, work: Callable[[], object], *, count_descriptors: bool = False) -> None:
        self._memory = mmap.mmap(-1, 1 << 14)
        waiting, self._go = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of forking where threads run; none of them is needed
            self.pid = os.fork()
        if self.pid == 0:
            try:
                self._be_child(work, waiting, count_descriptors)
            finally:
                os._exit(0)
        os.close(waiting)

    def _be_child(self, work: Callable[[], object], waiting: int, count_descriptors: bool) -> None:
        # A file whose close() was made to fail is closed with a warning, later; what stays open is counted.
        warnings.simplefilter("ignore", ResourceWarning)
        before = len(os.listdir("/proc/self/fd")) if count_descriptors else 0
        os.read(waiting, 1)
        error, message, code, value = "", "", None, None
        try:
            value = work()
        except Exception as raised:  # of whatever class: that is the question
            error, message, code = type(raised).__name__, str(raised), getattr(raised, "errno", None)
        sys.setprofile(None)
        after = len(os.listdir("/proc/self/fd")) - before if count_descriptors else None
        text = json.dumps([error, message, after, value, code]).encode()
        self._memory.write(len(text).to_bytes(4, "little") + text)

    def go(self) -> None:
        """Tell it to go."""
        os.write(self._go, b"x")

    def kill(self) -> None:
        """Kill it."""
        os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> Ended:
        """Wait until it has ended, for a while; then end it."""
        deadline, hung, pause = time.monotonic() + PATIENCE, False, 0.0005
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                break
            if time.monotonic() > deadline and not hung:
                hung = True
                self.kill()
            time.sleep(pause)
        os.close(self._go)
        size = int.from_bytes(self._memory.read(4), "little")
        report = Report(*json.loads(self._memory.read(size))) if size else None
        self._memory.close()
        if hung:
            report = Report("Hang", f"no end after {PATIENCE} seconds")
        by_signal = os.WIFSIGNALED(status) and not hung
        assert not by_signal or os.WTERMSIG(status) in (signal.SIGKILL, signal.SIGXFSZ), status
        return Ended(report, by_signal)


def run(work: Callable[[], object], *, count_descriptors: bool = False) -> Ended:
    """Let a child do something, undisturbed or as the work itself has it."""
    child = Child(work, count_descriptors=count_descriptors)
    child.go()
    return child.wait()


def patch(owner: object, name: str, value: object) -> None:
    """Put something else in a module's place for a name: for good, since a child does not live long."""
    setattr(owner, name, value)


# By strace


def strace() -> str | None:
    """Where strace is, if it is installed and this process may use it on its children."""
    found = shutil.which("strace")
    if found is None:
        return None
    child = Child(lambda: None)
    tracing = subprocess.Popen([found, "-p", str(child.pid)], stderr=subprocess.PIPE, text=True)
    assert tracing.stderr is not None
    attached = "attached" in tracing.stderr.readline()
    child.go()
    child.wait()
    tracing.communicate()
    return found if attached else None


def traced(work: Callable[[], object], log: Path, *inject: str) -> Ended:
    """Let a child do something under strace.

    Args:
        work: What it does.
        log: A file for what strace writes; it is removed.
        inject: What is to go wrong, as ``-e inject=`` takes it.
    """
    child = Child(work)
    command = ["strace", "-f", "-y", "-s", "0", "-o", str(log), "-p", str(child.pid)]
    command += [f"--inject={each}" for each in inject]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as tracing:
        assert tracing.stderr is not None
        said = tracing.stderr.readline()
        assert "attached" in said, said
        child.go()
        ended = child.wait()
    text = log.read_text("utf-8", "replace")
    log.unlink()
    return Ended(ended.report, ended.killed, text)


_CALL = re.compile(r"^\d+ +(?:\[pid +\d+\] )?([a-z0-9_]+)\(", re.MULTILINE)


#: Calls that a child makes to wait and to end. A save makes none of these: what it reads, it reads at positions.
_NOT_OF_A_SAVE = frozenset({"exit", "exit_group", "read", "restart_syscall"})


def calls_in(log: str) -> list[str]:
    """The names of the calls to the system that a save made, in order, in what strace wrote."""
    return [name for name in _CALL.findall(log) if name not in _NOT_OF_A_SAVE]


# In Python


def at_call(count: int, action: Callable[[str], None]) -> Callable[[], int]:
    """Have something happen just before the n-th call that ``orthoserde.storage`` makes to the disk.

    An exception in the action stands in place of the call.

    Returns:
        A function that says how many calls are left until then; 0 if it has happened.
    """
    here = os.path.dirname(storage.__file__)
    left = count

    def watch(frame: FrameType, what: str, called: Any) -> None:
        nonlocal left
        if what == "c_call" and called.__name__ in DISK_CALLS and frame.f_code.co_filename.startswith(here):
            left -= 1
            if left == 0:
                action(called.__name__)

    sys.setprofile(watch)
    return lambda: max(left, 0)
