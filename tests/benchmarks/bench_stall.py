"""How long a training step waits for a checkpoint: a save with ``wait=False`` against one that waits.

Run it on a machine that does nothing else: ``python -m tests.benchmarks.bench_stall``. It needs three times ``--bytes``
of memory, and four times that of disk.

A loop of steps (matrix products of a size of their own) goes on while the file is written, so that it can be seen
what the writing takes from them. The two ways to save take turns, in one process and to folders of their own.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import torch
from torch import nn

import orthoserde
from tests.benchmarks.bench_speed import LAYER_BYTES, MIB, build, file_system, row

#: Rows of the matrices that a step multiplies; a step takes some milliseconds.
STEP_WIDTH = 768

#: Steps between two saves, without which the disk would still be busy with the last one.
STEPS_BETWEEN = 50

BLOCKING = "save"
NEW_MEMORY = "save(wait=False), the first: new memory"
BACKGROUND = "save(wait=False), those after it"


@dataclass
class Times:
    """Seconds of what was measured, once for each repetition."""

    stall: list[float] = field(default_factory=list)
    until_durable: list[float] = field(default_factory=list)
    slow_down: list[float] = field(default_factory=list)
    lost: list[float] = field(default_factory=list)


class Steps:
    """Work that stands for training."""

    def __init__(self) -> None:
        self._matrix = torch.full((STEP_WIDTH, STEP_WIDTH), 1 / STEP_WIDTH)

    def one(self) -> float:
        """Do one step; return its seconds."""
        start = time.perf_counter()
        self._matrix = self._matrix @ self._matrix
        return time.perf_counter() - start

    def some(self, count: int) -> float:
        """Do so many steps; return the mean of their seconds."""
        return statistics.fmean(self.one() for _ in range(count))


def measure(checkpoints: orthoserde.Checkpoints, step: int, model: nn.Module, wait: bool, times: Times) -> None:
    """Save once, and go on with steps until the file is durable."""
    steps = Steps()
    os.sync()
    usual = steps.some(STEPS_BETWEEN)
    start = time.perf_counter()
    checkpoints.save(step, model, wait=wait)
    stall = time.perf_counter() - start
    path, meanwhile = checkpoints.path(step), []
    while not path.exists():
        meanwhile.append(steps.one())
    times.until_durable.append(time.perf_counter() - start)
    checkpoints.wait()
    times.stall.append(stall)
    times.slow_down.append(statistics.fmean(meanwhile) / usual if meanwhile else 1.0)
    # Beyond the stall, steps took longer by so much in all while the file was written.
    times.lost.append(stall + sum(meanwhile) - usual * len(meanwhile))


def measure_all(size: int, repeat: int, folder: Path) -> dict[str, Times]:
    """Save in both ways, in turn; a first round is counted for new memory alone."""
    model = build(size)
    waiting = orthoserde.Checkpoints(folder / "waiting", keep=1)
    background = orthoserde.Checkpoints(folder / "background", keep=1)
    times = {name: Times() for name in (BLOCKING, NEW_MEMORY, BACKGROUND)}
    measure(waiting, 0, model, True, Times())
    for turn in range(1, repeat + 1):
        measure(waiting, turn, model, True, times[BLOCKING])
        background.close()  # gives the memory back
        measure(background, 2 * turn, model, False, times[NEW_MEMORY])
        measure(background, 2 * turn + 1, model, False, times[BACKGROUND])
    check(model, waiting, background)
    return times


def check(model: nn.Module, *folders: orthoserde.Checkpoints) -> None:
    """Load what was saved last, from each folder, and compare."""
    for checkpoints in folders:
        path = checkpoints.latest()
        if path is None:
            raise AssertionError("nothing was saved")
        other = build(sum(p.numel() * p.element_size() for p in model.parameters()), seed=1)
        orthoserde.load(other, path)
        for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
            if not torch.equal(ours, theirs):
                raise AssertionError("a load gave other values than were saved")


def spread(seconds: list[float]) -> str:
    """Median and range."""
    return f"{statistics.median(seconds):.3f} ({min(seconds):.3f} to {max(seconds):.3f})"


def report(size: int, repeat: int, folder: Path) -> None:
    """Measure everything and print it."""
    print(f"date: {datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}")
    print(f"torch: {metadata.version('torch')}")
    print(f"orthoserde: {orthoserde.__version__}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    print(f"Python: {platform.python_version()}, {platform.system()} {platform.machine()}, {cores} cores")
    print(f"threads of torch: {torch.get_num_threads()}")
    print(f"file system: {file_system(folder)}")
    print(f"load of the machine before: {os.getloadavg()[0]:.2f}")
    print(f"model: {size // LAYER_BYTES} float32 layers of {LAYER_BYTES // MIB} MiB; repetitions: {repeat}", flush=True)
    times = measure_all(size, repeat, folder)
    print(f"load of the machine after: {os.getloadavg()[0]:.2f}\n")
    row("operation", "stall, s", "until durable, s", "steps meanwhile, times as long", "lost in all, s")
    row("---", "---", "---", "---", "---")
    for name, each in times.items():
        slow_down = "-" if name == BLOCKING else spread(each.slow_down)
        row(name, spread(each.stall), spread(each.until_durable), slow_down, spread(each.lost))
    print()
    blocking = statistics.median(times[BLOCKING].stall)
    for name in (NEW_MEMORY, BACKGROUND):
        print(f"stall of {name}: {statistics.median(times[name].stall) / blocking:.2f} of that of {BLOCKING}")


def main() -> None:
    """Read the arguments and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", type=int, default=1 << 30, help="size of the model, in steps of 64 MiB")
    parser.add_argument("--repeat", type=int, default=9, help="repetitions of each operation")
    parser.add_argument("--folder", type=Path, default=None, help="where files are written; a temporary folder inside")
    arguments = parser.parse_args()
    if arguments.bytes < LAYER_BYTES:
        parser.error(f"--bytes: expected at least {LAYER_BYTES}")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        report(arguments.bytes, arguments.repeat, Path(folder))


if __name__ == "__main__":
    main()
