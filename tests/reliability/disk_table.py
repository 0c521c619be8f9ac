"""Which suite catches which deliberately broken build."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from tests.reliability import disk_faults, disk_full, disk_kills, disk_order, disk_writers, power_cuts
from tests.reliability.disk import FileCase
from tests.reliability.disk_broken import BUILDS, Build, sound
from tests.reliability.disk_figures import Figures
from tests.reliability.disk_mounts import CannotBeArrangedError

CASE = FileCase("small, overwrite")


def _kill(root: Path, figures: Figures, build: Build) -> None:
    disk_kills.in_python(CASE, root, figures, build)


def _order(root: Path, figures: Figures, build: Build) -> None:
    figures.point("", *disk_order.in_python(CASE, root, build))


def _faults(root: Path, figures: Figures, build: Build) -> None:
    disk_faults.in_python(CASE, root, figures, ("EIO",), build)
    disk_faults.underneath(CASE, root, figures, build)
    disk_faults.short_writes(CASE, root, figures, {"half": disk_faults.SHORT["half"]}, build)


def _full(root: Path, figures: Figures, build: Build) -> None:
    disk_full.table(root, figures, build)


def _writers(root: Path, figures: Figures, build: Build) -> None:
    disk_writers.two_writers(root, figures, 30, build)


def _power(root: Path, figures: Figures, build: Build) -> None:
    for name in ("ext4, noauto_da_alloc", "xfs"):
        for case in power_cuts.CASES:
            power_cuts.cut(power_cuts.DISKS[name], case, root, figures, 3, delays=(0.0,), build=build)


#: The suites, each as small as it can be and still catch what it is there for.
SUITES: dict[str, Callable[[Path, Figures, Build], None]] = {
    "kill": _kill,
    "order of calls": _order,
    "faults": _faults,
    "full disk and its kin": _full,
    "two writers": _writers,
    "power cuts": _power,
}

#: What catches what, at the least. Power cuts are for the soak.
CAUGHT_BY: dict[str, tuple[str, ...]] = {
    "no fsync of the file": ("order of calls",),
    "no fsync of the folder": ("order of calls",),
    "fsync after the rename": ("order of calls",),
    "no rename: written in place": ("kill", "order of calls", "faults", "full disk and its kin", "two writers"),
    "no unlink after an error": ("faults", "full disk and its kin"),
    "errors of close() ignored": ("faults",),
    "errors of fsync() ignored": ("faults",),
    "short writes ignored": ("faults",),
    "errors after the rename told as before it": ("faults", "full disk and its kin"),
    "leftovers kept": ("kill",),
    "leftovers taken without proof": ("two writers",),
    "one name for all temporary files": ("two writers",),
}
#: In place is not among them: the file is forced to the disk so soon that a cut in between is rare; a kill shows it.
POWER_CUTS_CATCH = ("no fsync of the file", "no fsync of the folder")


def catches(suite: str, build: Build) -> list[str]:
    """What a suite says of a build."""
    figures = Figures(suite, "")
    with tempfile.TemporaryDirectory(prefix="orthoserde-") as root:
        SUITES[suite](Path(root), figures, build)
    return figures.violations


def table(root: Path, figures: Figures, *, every: bool) -> list[dict[str, str]]:
    """Try broken builds; a line for each, with the first thing that each suite said of it.

    Args:
        root: A folder.
        figures: Where each pair of a suite and a build is counted.
        every: Whether every suite is tried on every build, and not only those that are there to catch it.
    """
    lines = []
    for name, build in {"the sound build": sound, **BUILDS}.items():
        line = {"build": name}
        expected = CAUGHT_BY.get(name, ()) + (("power cuts",) if name in POWER_CUTS_CATCH else ())
        for suite in SUITES:
            if not every and suite not in CAUGHT_BY.get(name, ()):
                continue
            try:
                said = catches(suite, build)
            except CannotBeArrangedError as error:
                figures.notes.append(f"{suite}: {error}")
                continue
            line[suite] = said[0] if said else ""
            missed = suite in expected and not said
            wrong = build is sound and bool(said)
            figures.point(
                "caught" if said else "not caught",
                *([f"{suite} does not catch: {name}"] if missed else []),
                *([f"{suite}, {name}: {said[0]}"] if wrong else []),
            )
        lines.append(line)
    figures.ended()
    return lines
