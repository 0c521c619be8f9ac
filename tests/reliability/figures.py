"""Run the suites of what is written, and print what they found as JSON.

    python -m tests.reliability.figures [--soak] [SUITE ...]

The suites are kill, random, faults, full, writers and broken, and power, which needs root. ``--soak`` has many more
points. The exit status is 1 if anything was found that must not be.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.reliability import disk_faults, disk_full, disk_kills, disk_order, disk_table, disk_writers, power_cuts
from tests.reliability.disk import CASES, FileCase
from tests.reliability.disk_children import strace
from tests.reliability.disk_figures import Figures
from tests.reliability.disk_mounts import CannotBeArrangedError

STRACE, PYTHON = "calls to the system (strace)", "calls in Python"

SMALL = ("small, new file", "small, overwrite", "small, through a link", "small, after a leftover")

#: How often a process is killed at random in each case.
RANDOM = {"small, new file": 150, "small, overwrite": 200, "with optimizer, overwrite": 100, "2 MB, overwrite": 50}

Result = tuple[list[Figures], dict[str, Any]]


def _files(names: tuple[str, ...] = tuple(CASES)) -> list[FileCase]:
    return [case for name in names if isinstance(case := CASES[name], FileCase)]


def kill(root: Path, soak: bool) -> Result:
    """Kill points at every call."""
    results = []
    if strace():
        results.append(at_system := Figures("kill", STRACE))
        for name, case in CASES.items():
            if soak or name != "shards, new folder":
                disk_kills.by_strace(case, root, at_system)
            if isinstance(case, FileCase):
                at_system.violations += disk_order.by_strace(case, root)
        at_system.ended()
    results.append(in_python := Figures("kill", PYTHON))
    for case in _files() if soak or len(results) == 1 else _files(SMALL):
        disk_kills.in_python(case, root, in_python)
        in_python.violations += disk_order.in_python(case, root)
    in_python.ended()
    return results, {}


def kill_at_random(root: Path, soak: bool) -> Result:
    """Kills at random moments."""
    figures = Figures("random kills", "SIGKILL")
    for name, kills in RANDOM.items():
        disk_kills.at_random(CASES[name], root, figures, kills * (10 if soak else 1), seed=0)
    return [figures.ended()], {}


def faults(root: Path, soak: bool) -> Result:
    """Errors and short writes at every call."""
    results = []
    if strace():
        results.append(at_system := Figures("faults", STRACE))
        for case in _files(SMALL):
            every = soak or case.name in SMALL[:2]
            disk_faults.by_strace(case, root, at_system, disk_faults.ERRORS if every else ("EIO", "EINTR"))
        disk_faults.by_strace(CASES["small, overwrite"], root, at_system, ("ENOSPC",), for_good=True)
        disk_faults.by_strace(CASES["shards, overwrite"], root, at_system, ("EIO",))
        if soak:
            disk_faults.by_strace(CASES["shards, overwrite"], root, at_system, ("ENOSPC", "EINTR"))
            disk_faults.by_strace(CASES["with optimizer, overwrite"], root, at_system)
        at_system.ended()
    results.append(in_python := Figures("faults", PYTHON))
    for case in _files(SMALL):
        disk_faults.in_python(case, root, in_python, ("EIO",) if strace() else ("ENOSPC", "EIO", "EDQUOT", "EACCES"))
        disk_faults.underneath(case, root, in_python)
    in_python.ended()
    results.append(short := Figures("short writes", PYTHON))
    for case in _files() if soak else _files(SMALL[:2]):
        disk_faults.short_writes(case, root, short)
    short.ended()
    return results, {}


def full(root: Path, soak: bool) -> Result:
    """Places where a save cannot do all that it wants."""
    figures = Figures("full disk and its kin", f"uid {os.geteuid()}")
    lines = disk_full.table(root, figures)
    return [figures.ended()], {"full disk and its kin": lines}


def writers(root: Path, soak: bool) -> Result:
    """Two writers and a reader."""
    figures = Figures("two writers", "processes")
    disk_writers.two_writers(root, figures, 2000 if soak else 100)
    return [figures.ended()], {}


def broken(root: Path, soak: bool) -> Result:
    """Which suite catches which broken build."""
    figures = Figures("broken builds", PYTHON)
    return [figures], {"broken builds": disk_table.table(root, figures, every=soak)}


def power(root: Path, soak: bool) -> Result:
    """Power cuts."""
    results = []
    for name, disk in power_cuts.DISKS.items():
        results.append(figures := Figures("power cuts", name))
        try:
            for case in power_cuts.CASES:
                power_cuts.cut(disk, case, root, figures, 40 if soak else 5)
        except CannotBeArrangedError as error:
            figures.notes.append(str(error))
        figures.ended()
    return results, {}


SUITES: dict[str, Callable[[Path, bool], Result]] = {
    "kill": kill,
    "random": kill_at_random,
    "faults": faults,
    "full": full,
    "writers": writers,
    "broken": broken,
    "power": power,
}


def main() -> int:
    """Run what is asked for, by default all but the power cuts."""
    parser = argparse.ArgumentParser(prog="python -m tests.reliability.figures", description=__doc__)
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=", ".join(SUITES))
    parser.add_argument("--soak", action="store_true", help="many more points")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # so that there are no threads to be lost in a fork
    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "command": " ".join(["python -m tests.reliability.figures", *sys.argv[1:]]),
        "suites": [],
        "tables": {},
    }
    for name in arguments.suites or [name for name in SUITES if name != "power"]:
        with tempfile.TemporaryDirectory(prefix="orthoserde-") as root:
            results, tables = SUITES[name](Path(root), arguments.soak)
        found["suites"] += [each.as_json() for each in results]
        found["tables"] |= tables
    print(json.dumps(found, indent=2))
    return int(any(each["violations"] for each in found["suites"]))


if __name__ == "__main__":
    sys.exit(main())
