"""The order of the calls that make a save durable: what a power cut at any moment needs.

No kill can show it, for a kill leaves the system's memory alone.
"""

from __future__ import annotations

import io
import os
import re
import shutil
from pathlib import Path
from typing import Any

from orthoserde.storage.leftovers import TEMPORARY_MARK
from tests.reliability.disk import FileCase
from tests.reliability.disk_broken import Build, sound
from tests.reliability.disk_children import patch, run, traced
from tests.reliability.disk_kills import working

_PATH = r"\d+<([^>]*)>"
_ON_FILE = re.compile(rf"(write|ftruncate|fsync|fdatasync)\({_PATH}.*\) += \d")
_RENAME = re.compile(r'rename(?:at2?)?\(.*?"([^"]+)".*?"([^"]+)".*\) += 0')

#: Calls on files, in order: their names and the paths.
Calls = list[tuple[str, str]]


def by_strace(case: FileCase, root: Path, build: Build = sound) -> list[str]:
    """What is wrong with the order of the calls that a save makes to the system."""
    folder = root / "order"
    case.prepare(folder)
    log = traced(working(case, folder, build), root / "log").log
    shutil.rmtree(folder)
    calls: Calls = []
    for line in log.splitlines():
        if match := _RENAME.search(line):
            calls.append(("rename", match[1]))
        elif match := _ON_FILE.search(line):
            calls.append((match[1].replace("fdatasync", "fsync"), match[2]))
    return violations_in(calls, str(folder))


def in_python(case: FileCase, root: Path, build: Build = sound) -> list[str]:
    """What is wrong with the order of the calls that a save makes in Python."""
    folder = root / "order"
    case.prepare(folder)

    def work() -> Calls:
        calls: Calls = []
        _record(calls)
        build()
        case.save(folder)
        return calls

    report = run(work).report
    shutil.rmtree(folder)
    assert report is not None
    assert not report.error, report
    return violations_in(report.value, str(folder))


def _record(calls: Calls) -> None:
    """Have this process record what it does."""

    def path_of(descriptor: int) -> str:
        return os.readlink(f"/proc/self/fd/{descriptor}")

    class Recorded(io.FileIO):
        def write(self, block: Any) -> int:
            calls.append(("write", path_of(self.fileno())))
            return super().write(block)

        def truncate(self, size: int | None = None) -> int:
            calls.append(("ftruncate", path_of(self.fileno())))
            return super().truncate(size)

    fsync, replace = os.fsync, os.replace

    def recorded_fsync(descriptor: int) -> None:
        calls.append(("fsync", path_of(descriptor)))
        fsync(descriptor)

    def recorded_replace(source: str, target: str) -> None:
        calls.append(("rename", source))
        replace(source, target)

    patch(os, "fdopen", lambda descriptor, mode, buffering: Recorded(descriptor, mode.replace("b", "")))
    patch(os, "fsync", recorded_fsync)
    patch(os, "replace", recorded_replace)


def violations_in(calls: Calls, folder: str) -> list[str]:
    """What is wrong with the order of these calls.

    Args:
        calls: All that were made.
        folder: Where the file is saved.
    """
    violations = []
    dirty: set[str] = set()
    renamed = durable = False
    for name, path in calls:
        if name in ("write", "ftruncate") and os.path.dirname(path) == folder:
            dirty.add(path)
            if TEMPORARY_MARK not in path:
                violations.append(f"{os.path.basename(path)} is written in place")
        elif name == "fsync":
            dirty.discard(path)
            durable = durable or (renamed and path == folder)
        elif name == "rename":
            renamed, durable = True, False
            if path in dirty:
                violations.append("a file gets its name before it is on the disk")
    if not renamed:
        violations.append("nothing is renamed")
    if not durable:
        violations.append("the save returns before the name is on the disk")
    return violations
