"""Have one call of a save fail, then the next one, until none is left; look whether the save told the truth.

After each: it returned, and the new checkpoint is there; or it raised FileAccessError, and the previous one is; or it
raised CommitUncertainError, and the new one is. No temporary file is left after an exception, no file stays open, and
no error of what makes the file durable goes unsaid.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import io
import mmap
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from orthoserde.storage.leftovers import TEMPORARY_MARK
from tests.reliability.disk import LEFTOVER, NEW, Case, temporaries
from tests.reliability.disk_broken import Build, sound
from tests.reliability.disk_children import Report, at_call, calls_in, patch, run, traced
from tests.reliability.disk_figures import Figures
from tests.reliability.disk_kills import working

#: What the system may say. EINTR is no refusal: the call is to be made again, unless it is close or rename.
ERRORS = ("ENOSPC", "EIO", "EINTR", "EDQUOT", "EACCES")

#: Calls for memory, whose errors are no errors of the disk.
NOT_THE_DISK = frozenset(
    ["brk", "mmap", "munmap", "mremap", "mprotect", "madvise", "futex", "rt_sigaction", "rt_sigprocmask"]
)

#: Calls whose errors must not be swallowed where they are about a file that is being written.
MUST_BE_SAID = frozenset(
    [
        "openat",
        "fchmod",
        "lseek",
        "write",
        "ftruncate",
        "fsync",
        "fdatasync",
        "close",
        "rename",
        "renameat",
        "renameat2",
    ]
)

#: What a save says of itself where an exception does not mean that the previous checkpoint still stands.
SAVED_NEVERTHELESS = "the new checkpoint is saved"


def truth_violations(case: Case, folder: Path, report: Report, swallowed: str = "") -> list[str]:
    """What is wrong with what a save said, given what stands there now.

    Args:
        case: What was saved.
        folder: Where.
        report: What the save said.
        swallowed: The call that failed, if a save must not return after that.
    """
    seen, violations = case.seen(folder), []
    if report.error in ("", "CommitUncertainError") or SAVED_NEVERTHELESS in report.message:
        if seen != NEW:
            violations.append(f"{report.error or 'it returned'}, but there is {seen}")
    elif report.error != "FileAccessError":
        violations.append(f"{report.error}: {report.message}")
    elif seen != case.before:
        violations.append(f"FileAccessError, but there is {seen}")
    if not report.error and swallowed:
        violations.append(f"it returned after {swallowed}")
    # A leftover that the system refuses to remove stays.
    if left := [name for name in temporaries(folder) if name != LEFTOVER]:
        violations.append(f"{report.error or 'it returned'}, with the temporary files {left}")
    if report.descriptors:
        violations.append(f"{report.error or 'it returned'}, with {report.descriptors} more files open")
    return violations


def outcome_of(report: Report) -> str:
    """What a save said, in short."""
    return report.error or "returned"


_INJECTED = re.compile(r"^\d+ +(?P<name>\w+)\(.* = -1 (?P<error>E\w+) .*\(INJECTED\)$", re.MULTILINE)


def by_strace(
    case: Case,
    root: Path,
    figures: Figures,
    errors: tuple[str, ...] = ERRORS,
    *,
    for_good: bool = False,
    build: Build = sound,
) -> None:
    """Have the system refuse the n-th call of each name, for each error.

    Args:
        case: What is saved.
        root: A folder for it.
        figures: Where the points are counted.
        errors: What it says.
        for_good: Whether it refuses all that follow, too.
        build: What saves.
    """
    template = root / "template"
    case.prepare(template)
    names = Counter(calls_in(traced(working(case, template, build), root / "log").log)).keys() - NOT_THE_DISK
    shutil.rmtree(template)
    for name in sorted(names):
        for error in errors:
            for number in range(1, 10_000):
                inject = f"{name}:error={error}:when={number}{'+' if for_good else ''}"
                if not _refuse(case, root, inject, figures, build):
                    break


def _refuse(case: Case, root: Path, inject: str, figures: Figures, build: Build) -> bool:
    folder = root / "refused"
    case.prepare(folder)
    ended = traced(working(case, folder, build), root / "log", inject)
    fired = _INJECTED.search(ended.log)
    if fired is not None:
        assert ended.report is not None, inject
        violations = truth_violations(case, folder, ended.report, _to_be_said(fired))
        figures.point(outcome_of(ended.report), *(f"{case.name}, {inject}: {each}" for each in violations))
    shutil.rmtree(folder)
    return fired is not None


def _to_be_said(fired: re.Match[str]) -> str:
    line, name, error = fired[0], fired["name"], fired["error"]
    about_new_file = TEMPORARY_MARK in line and LEFTOVER not in line
    if error != "EINTR" and name in MUST_BE_SAID and (about_new_file or name == "fsync"):
        return f"{error} of {name}"
    return ""


#: What a child says of the fault that was arranged for it; nothing if it did not come to that.
HAPPENED, CLOSING = 1, 2

Arrangement = Callable[[mmap.mmap], object]


def in_python(case: Case, root: Path, figures: Figures, errors: tuple[str, ...], build: Build = sound) -> None:
    """Have the n-th call that ``orthoserde.storage`` makes to the disk raise, for each error."""
    for error in errors:
        for number in range(1, 10_000):

            def arrange(fired: mmap.mmap, number: int = number, error: str = error) -> None:
                def refuse(name: str) -> None:
                    fired[0] = CLOSING if name == "close" else HAPPENED
                    code = getattr(errno, error)
                    raise OSError(code, os.strerror(code))

                at_call(number, refuse)

            if not _arranged(case, root, arrange, f"{error} at call {number}", figures, build):
                break


def underneath(case: Case, root: Path, figures: Figures, build: Build = sound) -> None:
    """Have close() of the new file fail, then its fsync, then that of its folder, below what Python makes of it."""
    fsync = os.fsync

    def failing(fired: mmap.mmap, which: int) -> None:
        count = 0

        def fail(descriptor: int) -> None:
            nonlocal count
            count += 1
            if count == which:
                fired[0] = HAPPENED
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            fsync(descriptor)

        patch(os, "fsync", fail)

    def closing(fired: mmap.mmap) -> None:
        def sync_and_close(descriptor: int) -> None:
            fsync(descriptor)
            if not fired[0]:
                fired[0] = HAPPENED
                os.close(descriptor)  # behind its back, so that its own close() finds nothing to close

        patch(os, "fsync", sync_and_close)

    for where, arrange in {
        "EBADF of close": closing,
        "EIO of fsync": lambda fired: failing(fired, 1),
        "EIO of the folder's fsync": lambda fired: failing(fired, 2),
    }.items():
        if not _arranged(case, root, arrange, where, figures, build, swallowed=where):
            figures.violations.append(f"{case.name}, {where}: there is no such call")


def _arranged(
    case: Case,
    root: Path,
    arrange: Arrangement,
    where: str,
    figures: Figures,
    build: Build,
    swallowed: str = "",
) -> bool:
    """Save in a child where something was arranged, which says through shared memory whether it has happened."""
    folder = root / "refused"
    case.prepare(folder)
    with contextlib.closing(mmap.mmap(-1, 1)) as fired:

        def work() -> None:
            arrange(fired)
            build()
            case.save(folder)

        ended = run(work, count_descriptors=True)
        happened = fired[0]
    if happened:
        assert ended.report is not None
        # What was not closed is open.
        report = dataclasses.replace(ended.report, descriptors=0) if happened == CLOSING else ended.report
        violations = truth_violations(case, folder, report, swallowed)
        figures.point(outcome_of(report), *(f"{case.name}, {where}: {each}" for each in violations))
    shutil.rmtree(folder)
    return bool(happened)


#: How many of ``n`` bytes a write takes: a signal, a full disk or a limit may stop it anywhere.
SHORT: dict[str, Callable[[int], int]] = {
    "one byte": lambda size: min(size, 1),
    "half": lambda size: size // 2,
    "all but one": lambda size: max(size - 1, 0),
    "nothing": lambda size: 0,
}


def short_writes(
    case: Case,
    root: Path,
    figures: Figures,
    how_short: Mapping[str, Callable[[int], int]] = SHORT,
    build: Build = sound,
) -> None:
    """Have the n-th write take only some of its bytes, and truly so, once or for good."""
    for how, taken in how_short.items():
        for for_good in (False, True):
            for number in range(1, 10_000):

                def arrange(
                    fired: mmap.mmap,
                    number: int = number,
                    taken: Callable[[int], int] = taken,
                    for_good: bool = for_good,
                ) -> None:
                    _write_short(fired, number, taken, for_good)

                where = f"{how} of write {number}{' and of all that follow' if for_good else ''}"
                if not _arranged(case, root, arrange, where, figures, build):
                    break


def _write_short(fired: mmap.mmap, number: int, taken: Callable[[int], int], for_good: bool) -> None:
    count = 0

    class Short(io.FileIO):
        def write(self, block: Any) -> int:
            nonlocal count
            count += 1
            if count != number and not (for_good and count > number):
                return super().write(block)
            fired[0] = HAPPENED
            return super().write(memoryview(block)[: taken(len(block))])

    patch(os, "fdopen", lambda descriptor, mode, buffering: Short(descriptor, mode.replace("b", "")))
