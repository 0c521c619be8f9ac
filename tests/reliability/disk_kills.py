"""Kill a process that saves, at every call and at random moments; look at what each kill left.

After each: the checkpoint at the path is the previous one or the new one, whole; one temporary file at most for each
file that was being written; and the next save succeeds and removes it, be it an hour later.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from tests.reliability.disk import NEW, Case, FileCase, make_old, temporaries
from tests.reliability.disk_broken import Build, sound
from tests.reliability.disk_children import Child, Ended, at_call, calls_in, run, traced
from tests.reliability.disk_figures import Figures

#: Files that a save may be writing at the same time, under temporary names: the shards.
SHARDS = 4


def look(case: Case, folder: Path, where: str, figures: Figures, build: Build) -> None:
    """Count what a kill has left and say what is wrong with it; then save again, as if it were an hour later."""
    seen, left = case.seen(folder), temporaries(folder)
    violations = [] if seen in (case.before, NEW) else [f"{where}: {seen}"]
    if len(left) > (1 if isinstance(case, FileCase) else SHARDS):
        violations.append(f"{where}: {len(left)} temporary files")
    if left:
        make_old(folder)
        if build is sound:
            case.save(folder)  # here, for a child takes its time
        else:
            run(working(case, folder, build))
        if case.seen(folder) != NEW:
            violations.append(f"{where}: the next save leaves {case.seen(folder)}")
        if temporaries(folder):
            violations.append(f"{where}: the next save leaves the temporary files {temporaries(folder)}")
    figures.outcomes["with a temporary file"] += bool(left)
    figures.point(seen, *violations)


def working(case: Case, folder: Path, build: Build) -> Callable[[], None]:
    """What a child does: a save by some build."""

    def work() -> None:
        build()
        case.save(folder)

    return work


def by_strace(case: Case, root: Path, figures: Figures, build: Build = sound) -> None:
    """Kill a save at each of its calls to the system."""
    template = root / "template"
    case.prepare(template)
    calls = Counter(calls_in(traced(working(case, template, build), root / "log").log))
    assert calls["openat"], calls
    for name, count in calls.items():
        for number in range(1, count + 1):
            inject = f"{name}:signal=SIGKILL:when={number}"

            def ran(work: Callable[[], None], inject: str = inject) -> Ended:
                return traced(work, root / "log", inject)

            _kill(case, root, ran, inject, figures, build)
    shutil.rmtree(template)


def in_python(case: Case, root: Path, figures: Figures, build: Build = sound) -> None:
    """Kill a save at each call that ``orthoserde.storage`` makes to the disk."""

    def die(name: str) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    for number in range(1, 10_000):

        def ran(work: Callable[[], None], number: int = number) -> Ended:
            def to_die() -> None:
                at_call(number, die)
                work()

            return run(to_die)

        if not _kill(case, root, ran, f"call {number}", figures, build):
            return
    raise AssertionError("no end of the calls")


def _kill(
    case: Case,
    root: Path,
    ran: Callable[[Callable[[], None]], Ended],
    where: str,
    figures: Figures,
    build: Build,
) -> bool:
    folder = root / "killed"
    case.prepare(folder)
    ended = ran(working(case, folder, build))
    if ended.killed:
        look(case, folder, f"{case.name}, {where}", figures, build)
    else:
        assert ended.report is not None
        if ended.report.error:
            figures.violations.append(f"{case.name}, {where}: {ended.report.error}: {ended.report.message}")
    shutil.rmtree(folder)
    return ended.killed


def at_random(case: Case, root: Path, figures: Figures, kills: int, seed: int, build: Build = sound) -> None:
    """Kill a save at random moments, of which nearly all are between its beginning and its end."""
    generator = random.Random(seed)
    folder = root / "random"
    # How long a save takes differs from moment to moment on a busy machine: one in five may return before its kill.
    span = 0.02
    for number in range(kills):
        case.prepare(folder)
        child = Child(working(case, folder, build))
        child.go()
        time.sleep(generator.uniform(0, span))
        child.kill()
        returned = child.wait().report is not None
        span *= 0.9 if returned else 1.03
        look(case, folder, f"{case.name}, kill {number}", figures, build)
        figures.outcomes["after the save had returned"] += returned
        shutil.rmtree(folder)
