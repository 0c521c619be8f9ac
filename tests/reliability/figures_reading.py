"""Figures of the suites of reading, for docs/explanation/security.md.

`python -m tests.reliability.figures_reading [MUTANTS]` prints them as Markdown, with the date and the torch version.
"""

from __future__ import annotations

import datetime
import platform
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from tests.reliability import numerics, pickle_mutants
from tests.reliability.broken_builds import BUILDS
from tests.reliability.corruption import Bench, Tally, every_flip, every_truncation, in_memory, mutants
from tests.reliability.hostile import CALLS, FILES, in_a_child, outcomes, written
from tests.reliability.test_corruption import MUTANTS, PICKLES
from tests.reliability.vanishing import CHANGES


def corruption(count: int) -> list[list[str]]:
    """Rows of the table of damaged files."""
    lines = [["files", "how many", "refused", "rightly loaded", "silently different, or another error", "seconds"]]
    with in_memory() as folder:
        bench = Bench(Path(folder))
        start = time.perf_counter()
        every_flip(bench, flips := Tally(), 0, 1)
        flipped = time.perf_counter()
        every_truncation(bench, truncations := Tally())
        cut = time.perf_counter()
        mutants(bench, mutated := Tally(), range(count))
        lines.append(row(f"every bit flip of a file of {len(bench.raw)} bytes", flips, flipped - start))
        lines.append(row("every truncation of it", truncations, cut - flipped))
        lines.append(row("mutants of it", mutated, time.perf_counter() - cut))
        bench.close()
    start = time.perf_counter()
    lines.append(
        row("every bit flip of an archive of torch.save", pickle_mutants.every_flip(), time.perf_counter() - start)
    )
    start = time.perf_counter()
    tally, _ = pickle_mutants.run(range(PICKLES))
    lines.append(row("mutants of files of torch.save", tally, time.perf_counter() - start))
    return lines


def row(what: str, tally: Tally, seconds: float) -> list[str]:
    """One row of that table."""
    refused = sum(tally.refused.values())
    return [what, str(tally.files), str(refused), str(tally.accepted), str(len(tally.wrong)), f"{seconds:.0f}"]


def hostile(heavy: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Rows of the table of hostile files, by collection; of heavy ones, what was measured."""
    found: dict[str, Counter[str]] = {}
    for name, each in FILES.items():
        counts = found.setdefault(name.partition(":")[0], Counter())
        counts["files"] += 1
        counts["refused"] += each.load.error is not None
        if each.heavy:
            counts["wrong"] += any(bool(heavy[name][what]) for what in ("wrong", "caused", "signal"))
            counts["memory"] = max(counts["memory"], heavy[name]["memory"] >> 20)
        else:
            with written(each) as path:
                counts["wrong"] += len(list(outcomes(each, path)))
    lines = [["collection", "files", "refused by load", "other outcomes than expected", "most memory, MiB"]]
    names = ("files", "refused", "wrong", "memory")
    return lines + [[what, *(str(counts[name]) for name in names)] for what, counts in found.items()]


def table(lines: list[list[str]]) -> str:
    """A table in Markdown."""
    whole = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in whole)


def main(count: int = MUTANTS) -> None:
    """Print all of them."""
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    print(f"{datetime.date.today()}, torch {torch.__version__}, Python {platform.python_version()}\n")
    heavy = in_a_child("heavy")
    print(table(corruption(count)), table(hostile(heavy)), sep="\n\n")
    audited = in_a_child("audit")
    files, events = audited["files"] + len(heavy), audited["events"] + sum(each["events"] for each in heavy.values())
    print(f"\naudit: {files} files, {files * len(CALLS)} calls, {events} events, ", end="")
    wrong = len(audited["wrong"]) + sum(len(each["caused"]) for each in heavy.values())
    print(f"{wrong} imports, runs or opens elsewhere")
    for change in CHANGES:
        found = in_a_child("vanishing", change)
        print(f"{change} while it is read: {found['outcomes']}, {len(found['wrong'])} wrong")
    silent = sum(rows[3].silent and rows[0] not in numerics.HARMLESS for rows in numerics.rows())
    print(f"numerics: {numerics.cases()} combinations, {silent} silent\n")
    print(table([["taken out", "noticed by"], *([name, ", ".join(suites)] for name, (_, suites) in BUILDS.items())]))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
