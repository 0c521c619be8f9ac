"""Bytes of an orthogonal layer in each form that a file can have, and the seconds of saves and loads.

Run it on a machine that does nothing else: ``python -m tests.benchmarks.bench_sizes``. It needs 3 GiB of memory and
1 GiB of disk; ``--small`` leaves out the largest layer. Every form is written to safetensors, whatever its authors use,
so that what differs is what is in it. ``tests.benchmarks.plot_sizes`` draws the sizes.
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

#: Forms by what a table calls them.
LEGACY = "computed weight alone"
PR_179 = "and original and base (PR #179)"
STATE_DICT = "torch state dict"
DENSE = "orthoserde, dense"
COMPACT = "orthoserde, compact"
STRUCTURED = "orthoserde, structured"


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


def file_sizes(folder: Path, layer: nn.Module, structured: nn.Module) -> dict[str, int]:
    """Bytes of the file of each form, as the file system has them; the files are left in the folder.

    Args:
        folder: Where they are written.
        layer: An ``nn.Linear`` with torch's parametrization and a canonical base.
        structured: One of the same shape in the structured form.
    """
    path = folder / "state"
    with torch.no_grad():
        state = {name: tensor.contiguous() for name, tensor in layer.state_dict().items()}
        weight = torch.as_tensor(layer.weight)
    sizes: dict[str, int] = {}
    for form, tensors in {
        LEGACY: {"weight": weight, "bias": state["bias"]},
        PR_179: {"weight": weight, **state},
        STATE_DICT: state,
    }.items():
        save_file(tensors, path)
        sizes[form] = path.stat().st_size
    orthoserde.save(layer, folder / "dense", base="dense")
    orthoserde.save(layer, folder / "compact", base="compact")
    orthoserde.save(structured, folder / "structured")
    names = {DENSE: "dense", COMPACT: "compact", STRUCTURED: "structured"}
    return sizes | {form: (folder / name).stat().st_size for form, name in names.items()}


def measure(folder: Path, n: int, k: int) -> tuple[list[str], list[str]]:
    """A row of bytes and one of seconds."""
    layer = orthoserde.orthogonal(nn.Linear(k, n))
    sizes = file_sizes(folder, layer, orthoserde.orthogonal(nn.Linear(k, n), structured=True))
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
    ratio = f"{sizes[DENSE] / sizes[COMPACT]:.0f}"
    return [name, *(f"{size:,}" for size in sizes.values()), ratio], [name, *times]


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
    row("layer", LEGACY, PR_179, STATE_DICT, DENSE, COMPACT, STRUCTURED, "dense / compact")
    row(*["---"] * 8)
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
