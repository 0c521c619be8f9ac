"""Two processes save to one path, again and again, while a third reads it: whatever is read is one whole file."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import orthoserde
from orthoserde.errors import OrthoserdeError
from tests.reliability.disk import FILE, NEW, OLD, FileCase, temporaries
from tests.reliability.disk_broken import Build, sound
from tests.reliability.disk_children import Child
from tests.reliability.disk_figures import Figures

#: What is saved: 200 KB in some 30 writes.
CASE = FileCase("200 KB, overwrite", layers=16, width=48)


def two_writers(root: Path, figures: Figures, saves: int, build: Build = sound) -> None:
    """Have two children save different models this many times each, and look at the file until both have ended."""
    folder = root / "shared"
    CASE.prepare(folder)

    def saving(which: str) -> None:
        build()
        for _ in range(saves):
            CASE.save(folder, which)

    children = [Child(functools.partial(saving, which)) for which in (OLD, NEW)]
    for child in children:
        child.go()
    running = {child.pid for child in children}
    while running:
        seen = _read(folder)
        figures.point(f"read {seen}", *([] if seen in (OLD, NEW) else [f"a reader sees {seen}"]))
        # Ended, but not yet waited for: that is left to the children's own wait.
        running -= {pid for pid in running if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)}
    for child in children:
        report = child.wait().report
        assert report is not None
        figures.outcomes["saves"] += saves
        if report.error:
            figures.violations.append(f"a save raises {report.error}: {report.message}")
    if left := temporaries(folder):
        figures.violations.append(f"temporary files are left: {left}")


def _read(folder: Path) -> str:
    """What a reader finds: through the library, and then as bytes."""
    try:
        with open(folder / FILE, "rb") as file:
            content = file.read()
        whole = orthoserde.verify(folder / FILE).ok
    except (OrthoserdeError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    found = [which for which in (OLD, NEW) if CASE.content[which] == content]
    return found[0] if found and whole else f"{len(content)} bytes of neither"
