"""Time and memory of a save and a load, against safetensors' ``save_model`` and ``load_model``, and of the import.

Run it on a machine that does nothing else: ``python -m tests.benchmarks.bench_speed``. It needs three times ``--bytes``
of memory and four times that of disk, beside what the page cache takes.

Everything runs in child processes, and the parent holds no model: the peak memory of a child begins with that of the
process it was forked from.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

import orthoserde

ROOT = Path(__file__).resolve().parents[2]

#: Features in and out of one layer: 64 MiB of float32.
WIDTH = 4096
LAYER_BYTES = 4 * WIDTH * WIDTH

MIB = 1 << 20

SAVE = "save"
SAVE_MODEL = "save_model, fsync of the file"
SAVE_MODEL_FOLDER = "save_model, fsync of file and folder"
LOAD = "load(verify=False)"
LOAD_VERIFIED = "load(verify=True)"
LOAD_MODEL = "load_model"
LOAD_META = "load(verify=False), model on meta"
READ_NEW = "bare read into new memory, one thread"
READ_NEW_THREADS = "bare read into new memory, all threads"

SAVES = (SAVE, SAVE_MODEL, SAVE_MODEL_FOLDER)
LOADS = (LOAD, LOAD_VERIFIED, LOAD_MODEL, LOAD_META, READ_NEW, READ_NEW_THREADS)

#: What is compared with what, and the ratio of times that is aimed at.
COMPARISONS = (
    (SAVE, SAVE_MODEL, 1.05),
    (SAVE, SAVE_MODEL_FOLDER, None),
    (LOAD, LOAD_MODEL, 0.95),
    (LOAD_VERIFIED, LOAD_MODEL, 1.3),
    (LOAD_META, READ_NEW, None),
    (LOAD_META, READ_NEW_THREADS, None),
)

#: Rooms are imported when they are first asked for, so the first use has its own time.
IMPORT = (
    "import time, torch; start = time.perf_counter(); import orthoserde; imported = time.perf_counter(); "
    "orthoserde.save; orthoserde.load; print(imported - start, time.perf_counter() - imported)"
)

Action = Callable[[], object]


@dataclass(frozen=True)
class Settings:
    """What a child is told: bytes of the model, repetitions, and the folder for its files."""

    size: int
    repeat: int
    folder: Path

    @property
    def ours(self) -> Path:
        """The file that orthoserde reads."""
        return self.folder / "orthoserde.safetensors"

    @property
    def theirs(self) -> Path:
        """The file that safetensors reads."""
        return self.folder / "safetensors.safetensors"


# What is measured


def build(size: int, device: str = "cpu", seed: int = 0) -> nn.Module:
    """A plain model of float32 layers of 64 MiB; on the CPU, every page of it has been written."""
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False, device="meta") for _ in range(size // LAYER_BYTES)))
    if device == "meta":
        return model
    model.to_empty(device=device)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-1, 1, generator=generator)
    return model


def sync(path: Path) -> None:
    """Force a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_model(model: nn.Module, path: Path, *, folder: bool) -> None:
    """What a user of safetensors does who wants the file to survive a power cut."""
    safetensors.torch.save_model(model, str(path))
    sync(path)
    if folder:
        sync(path.parent)


def read_new(path: Path, count: int, threads: int) -> object:
    """Read the same bytes in the same pieces into memory that is as new as that of a model made from meta tensors."""
    tensors = [torch.empty(LAYER_BYTES, dtype=torch.uint8) for _ in range(count)]
    start = path.stat().st_size - count * LAYER_BYTES

    def read(index: int) -> None:
        with path.open("rb", buffering=0) as file:
            file.seek(start + index * LAYER_BYTES)
            memory = tensors[index].numpy().data
            while memory:
                memory = memory[file.readinto(memory[: 4 * MIB]) :]

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(read, range(count)))
    return tensors


def saving(settings: Settings, model: nn.Module) -> dict[str, Action]:
    """The saves, each to a file of its own."""
    path = settings.folder / "saved.safetensors"
    return {
        SAVE: lambda: orthoserde.save(model, path),
        SAVE_MODEL: lambda: save_model(model, path, folder=False),
        SAVE_MODEL_FOLDER: lambda: save_model(model, path, folder=True),
    }


def loading(settings: Settings, model: nn.Module | None) -> dict[str, Action]:
    """The loads into a model whose memory is there already; those into new memory make it themselves."""

    def load_meta() -> object:
        fresh = build(settings.size, "meta")
        return fresh, orthoserde.load(fresh, settings.ours, verify=False)

    count = settings.size // LAYER_BYTES
    actions: dict[str, Action] = {
        LOAD_META: load_meta,
        READ_NEW: lambda: read_new(settings.ours, count, 1),
        READ_NEW_THREADS: lambda: read_new(settings.ours, count, torch.get_num_threads()),
    }
    if model is not None:
        actions |= {
            LOAD: lambda: orthoserde.load(model, settings.ours, verify=False),
            LOAD_VERIFIED: lambda: orthoserde.load(model, settings.ours),
            LOAD_MODEL: lambda: safetensors.torch.load_model(model, settings.theirs),
        }
    return actions


# Children


def seconds(action: Action) -> float:
    """Wall time of one run."""
    start = time.perf_counter()
    kept = action()
    taken = time.perf_counter() - start
    del kept  # its memory is given back outside the time
    return taken


def interleaved(actions: dict[str, Action], repeat: int, prepare: Action) -> dict[str, list[float]]:
    """Seconds of each action, in an order that turns and turns round; a first round is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in actions}
    names = list(actions)
    for turn in range(repeat + 1):
        order = names[turn % len(names) :] + names[: turn % len(names)]
        for name in order if turn % 2 else reversed(order):
            prepare()
            taken[name].append(seconds(actions[name]))
    return {name: times[1:] for name, times in taken.items()}


def child_times(settings: Settings) -> dict[str, list[float]]:
    """Time every operation; the files of the loads were written just before, so the page cache holds them."""
    saved, model = build(settings.size), build(settings.size, seed=1)
    target = settings.folder / "saved.safetensors"

    def nothing_to_replace() -> None:
        target.unlink(missing_ok=True)
        os.sync()

    taken = interleaved(saving(settings, saved), settings.repeat, nothing_to_replace)
    nothing_to_replace()
    orthoserde.save(saved, settings.ours)
    save_model(saved, settings.theirs, folder=True)

    def memory_is_at_hand() -> None:
        # A virtual machine gives memory that is free for long back to its host: the next to use it waits for the host.
        torch.ones(settings.size, dtype=torch.uint8)

    taken |= interleaved(loading(settings, model), settings.repeat, memory_is_at_hand)
    for ours, theirs in zip(model.parameters(), saved.parameters(), strict=True):
        if not torch.equal(ours, theirs):
            raise AssertionError("a load gave other values than were saved")
    return taken


def child_peak(settings: Settings, operation: str) -> int:
    """Peak resident bytes of a process that builds a model (on meta for the loads that make one) and does one thing."""
    new_memory = operation in (LOAD_META, READ_NEW, READ_NEW_THREADS)
    model = build(settings.size, "meta" if new_memory else "cpu")
    actions = loading(settings, None if new_memory else model) | saving(settings, model)
    kept = actions.get(operation, lambda: None)()
    del kept
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def in_child(settings: Settings, *task: str) -> Any:
    """Run a task in a new process; return what it prints."""
    arguments = ["--bytes", str(settings.size), "--repeat", str(settings.repeat), "--folder", str(settings.folder)]
    return json.loads(output_of("-m", "tests.benchmarks.bench_speed", *arguments, "--child", *task))


def output_of(*arguments: str) -> str:
    """Run Python in the root of the repository; return what it prints."""
    command = [sys.executable, *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout


# Report


def file_system(folder: Path) -> str:
    """Type of the file system that holds a folder, where the system tells."""
    mounts = Path("/proc/mounts")
    if not mounts.exists():
        return "unknown"
    rows = [line.split() for line in mounts.read_text("utf-8").splitlines()]
    return max((len(row[1]), row[2]) for row in rows if folder.resolve().is_relative_to(row[1]))[1]


def row(*cells: str) -> None:
    """Print one line of a table."""
    print("|", " | ".join(cells), "|", flush=True)


def report(settings: Settings) -> None:
    """Measure everything and print it."""
    print(f"date: {datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}")
    for name in ("torch", "safetensors", "xxhash"):
        print(f"{name}: {metadata.version(name)}")
    print(f"orthoserde: {orthoserde.__version__}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    print(f"Python: {platform.python_version()}, {platform.system()} {platform.machine()}, {cores} cores")
    print(f"file system: {file_system(settings.folder)}")
    print(f"load of the machine before: {os.getloadavg()[0]:.2f}")
    count = settings.size // LAYER_BYTES
    print(f"model: {count} float32 layers of {LAYER_BYTES // MIB} MiB; repetitions: {settings.repeat}")
    print("page cache: warm, and the model's memory resident before every load but those into new memory", flush=True)

    taken = in_child(settings, "times")

    @functools.cache
    def peak_of(operation: str) -> int:
        return int(in_child(settings, "peak", operation))

    def peak(operation: str) -> str:
        return str(round((peak_of(operation) - peak_of("nothing")) / MIB))

    print()
    row("operation", "median, s", "range, s", "GB/s", "peak memory beyond the model, MiB")
    row("---", "---", "---", "---", "---")
    for name in (*SAVES, *LOADS):
        median = statistics.median(taken[name])
        spread = f"{min(taken[name]):.3f} to {max(taken[name]):.3f}"
        row(name, f"{median:.3f}", spread, f"{settings.size / median / 1e9:.2f}", peak(name))
    print()
    row("orthoserde", "against", "ratio of times", "aim", "difference, ms")
    row("---", "---", "---", "---", "---")
    for ours, theirs, aim in COMPARISONS:
        one, other = statistics.median(taken[ours]), statistics.median(taken[theirs])
        row(ours, theirs, f"{one / other:.2f}", f"{aim}" if aim else "-", f"{1000 * (one - other):+.0f}")
    # Bytecode is kept, in the folder: a run before compiles everything, as an installation does.
    lines = [output_of("-X", f"pycache_prefix={settings.folder}", "-c", IMPORT) for _ in range(10)][1:]
    imports, firsts = zip(*(map(float, line.split()) for line in lines), strict=True)
    print(f"\nload of the machine after: {os.getloadavg()[0]:.2f}")
    print(f"import orthoserde, after import torch: {1000 * statistics.median(imports):.1f} ms (median of 9)")
    print(f"what save and load need, when first asked for: {1000 * statistics.median(firsts):.0f} ms (median of 9)")


def main() -> None:
    """Read the arguments; report, or do one task of the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", type=int, default=2 << 30, help="size of the model, in steps of 64 MiB")
    parser.add_argument("--repeat", type=int, default=5, help="repetitions of each operation")
    parser.add_argument("--folder", type=Path, default=None, help="where files are written; a temporary folder inside")
    parser.add_argument("--child", nargs="+", default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.bytes < LAYER_BYTES:
        parser.error(f"--bytes: expected at least {LAYER_BYTES}")
    if arguments.child is None:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            report(Settings(arguments.bytes, arguments.repeat, Path(folder)))
        return
    settings = Settings(arguments.bytes, arguments.repeat, arguments.folder)
    task, *rest = arguments.child
    if task == "peak":
        print(json.dumps(child_peak(settings, *rest)))
    else:
        print(json.dumps(child_times(settings)))


if __name__ == "__main__":
    main()
