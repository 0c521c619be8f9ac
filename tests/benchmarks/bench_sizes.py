"""Bytes and seconds of an orthogonal layer: its computed weight alone, with a dense base, and with a compact one.

Run it on a machine that does nothing else: ``python -m tests.benchmarks.bench_sizes``. It needs 3 GiB of memory and
1 GiB of disk; ``--small`` leaves out the largest layer.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import parametrizations

import orthoserde

SIZES = ((768, 4), (4096, 4), (4096, 8), (8192, 16))


def seconds(action: Callable[[], object], repeat: int = 3) -> str:
    """The median of some runs."""
    taken: list[float] = []
    for _ in range(repeat):
        start = time.perf_counter()
        action()
        taken.append(time.perf_counter() - start)
    return f"{statistics.median(taken):.2f}"


def row(*cells: str) -> None:
    """Print one line of a table."""
    print("|", " | ".join(cells), "|", flush=True)


def measure(folder: Path, n: int, k: int) -> tuple[list[str], list[str]]:
    """A row of bytes and one of seconds."""
    layer = orthoserde.orthogonal(nn.Linear(k, n))
    with torch.no_grad():
        save_file({"weight": torch.as_tensor(layer.weight), "bias": torch.as_tensor(layer.bias)}, folder / "weight")
    dense = orthoserde.save(layer, folder / "dense", base="dense")
    compact = orthoserde.save(layer, folder / "compact", base="compact")
    sizes = [(folder / "weight").stat().st_size, dense.file_bytes, compact.file_bytes]
    other = orthoserde.orthogonal(nn.Linear(k, n))
    times = [
        seconds(lambda: parametrizations.orthogonal(nn.Linear(k, n)), 1),
        seconds(lambda: orthoserde.orthogonal(nn.Linear(k, n))),
        seconds(lambda: orthoserde.save(layer, folder / "dense", base="dense")),
        seconds(lambda: orthoserde.save(layer, folder / "compact")),
        seconds(lambda: orthoserde.load(other, folder / "dense")),
        seconds(lambda: orthoserde.load(other, folder / "compact")),
    ]
    name = f"{n} x {k}"
    ratio = f"{dense.file_bytes / compact.file_bytes:.0f}"
    return [name, *(f"{size:,}" for size in sizes), ratio], [name, *times]


def main() -> None:
    """Measure everything and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="leave out the largest layer")
    parser.add_argument("--folder", type=Path, default=None, help="where files are written; a temporary folder inside")
    arguments = parser.parse_args()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    print(f"date: {datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}")
    print(f"torch: {torch.__version__}, orthoserde: {orthoserde.__version__}")
    print(f"Python: {platform.python_version()}, {platform.system()} {platform.machine()}, {cores} cores")
    print(f"load of the machine before: {os.getloadavg()[0]:.2f}\n", flush=True)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        rows = [measure(Path(folder), n, k) for n, k in SIZES[: -1 if arguments.small else None]]
    row("layer", "computed weight alone, bytes", "dense base, bytes", "compact base, bytes", "dense / compact")
    row(*["---"] * 5)
    for sizes, _ in rows:
        row(*sizes)
    print()
    row(
        "layer",
        "torch registers, s",
        "orthoserde registers, s",
        "save dense, s",
        "save compact, s",
        "load dense, s",
        "load compact, s",
    )
    row(*["---"] * 7)
    for _, times in rows:
        row(*times)


if __name__ == "__main__":
    main()
