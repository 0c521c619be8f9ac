"""64 LoReFT interventions of 4096 x 4: bytes in each form, and what saves, loads and registrations take.

Run it on a machine that does nothing else: ``python -m tests.benchmarks.bench_interventions``. With 64 interventions it
needs 6 GiB of memory, for their bases alone are 4 GiB, and 9 GiB of disk; ``--layers 8`` an eighth of that.

Everything runs in child processes, and the parent holds no model: the peak memory of a child begins with that of the
process it was forked from.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import gc
import json
import os
import platform
import resource
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import orthoserde
from orthoserde.integrations.loreft import LoReFT
from tests.benchmarks.bench_speed import MIB, Action, file_system, interleaved, output_of, row, seconds
from tests.benchmarks.bench_structured import resident

HIDDEN_SIZE, RANK = 4096, 4

#: Registrations by torch that are timed, each beside one by orthoserde: one takes seconds, and all are alike.
REGISTERED = 4

LEGACY = "computed weights, one torch.save for each, as pyreft 0.1.0"
LEGACY_SAFETENSORS = "computed weights, one safetensors file"
FULL = "with original and base, one torch.save for each, as pyreft pull request 179"
STATE_DICT = "torch.save of the state dict"
DENSE = "orthoserde, base dense"
COMPACT = "orthoserde, base compact"

STRUCTURED = "orthoserde, structured form"

#: Tasks of a child that only builds the model.
NOTHING, NOTHING_STRUCTURED = "nothing", "nothing, structured"

SAVE_DENSE, SAVE_COMPACT = 'save(base="dense")', 'save(base="compact")'
LOAD_DENSE, LOAD_COMPACT = "load of dense bases", "load of compact bases"
SAVE_STRUCTURED, LOAD_STRUCTURED = "save, structured form", "load, structured form"

REGISTRATIONS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "torch": parametrizations.orthogonal,
    "orthoserde": orthoserde.orthogonal,
    "structured": functools.partial(orthoserde.orthogonal, structured=True),
}


@dataclass(frozen=True)
class Settings:
    """What a child is told: interventions, repetitions, and the folder for its files."""

    layers: int
    repeat: int
    folder: Path

    @property
    def dense(self) -> Path:
        """The file with dense bases."""
        return self.folder / "dense.safetensors"

    @property
    def compact(self) -> Path:
        """The file with compact bases."""
        return self.folder / "compact.safetensors"

    @property
    def structured(self) -> Path:
        """The file of the structured form."""
        return self.folder / "structured.safetensors"


def build(settings: Settings, *, structured: bool = False) -> nn.ModuleList:
    """The interventions: rotations in float32, sources in bfloat16."""
    torch.manual_seed(0)
    each = functools.partial(LoReFT, HIDDEN_SIZE, RANK, dtype=torch.bfloat16, structured=structured)
    return nn.ModuleList(each() for _ in range(settings.layers))


def interventions(model: nn.Module) -> Iterator[LoReFT]:
    """The interventions of a model."""
    return (module for module in model.modules() if isinstance(module, LoReFT))


# Bytes


def legacy(module: LoReFT) -> dict[str, Tensor]:
    """What pyreft 0.1.0 saves of an intervention: R^T as computed (n x k, float32), W and b."""
    source = {name: value.detach() for name, value in module.learned_source.named_parameters()}
    with torch.no_grad():
        return {"rotate_layer": module.rotate_layer.weight.contiguous(), **source}


def full(module: LoReFT) -> dict[str, Tensor]:
    """What pyreft's pull request 179 saves of it: beside that, original (n x k) and base (n x n)."""
    state = module.rotate_layer.state_dict()
    more = {
        "rotate_layer_original": state["parametrizations.weight.original"],
        "rotate_layer_base": state["parametrizations.weight.0.base"],
    }
    return legacy(module) | more


def bytes_of(path: Path, write: Callable[[Path], object]) -> int:
    """The size of a file that is written, and removed again."""
    write(path)
    size = path.stat().st_size
    path.unlink()
    return size


def sizes(settings: Settings, model: nn.Module) -> dict[str, int]:
    """Bytes in each form; leaves the two files of orthoserde."""
    path = settings.folder / "form"

    def one_by_one(states: Iterable[dict[str, Tensor]]) -> int:
        return sum(bytes_of(path, functools.partial(torch.save, state)) for state in states)

    together = {
        f"{index}.{name}": value
        for index, module in enumerate(interventions(model))
        for name, value in legacy(module).items()
    }
    return {
        LEGACY: one_by_one(legacy(module) for module in interventions(model)),
        LEGACY_SAFETENSORS: bytes_of(path, lambda path: safetensors.torch.save_file(together, path)),
        FULL: one_by_one(full(module) for module in interventions(model)),
        STATE_DICT: bytes_of(path, lambda path: torch.save(model.state_dict(), path)),
        DENSE: orthoserde.save(model, settings.dense, base="dense").file_bytes,
        COMPACT: orthoserde.save(model, settings.compact, base="compact").file_bytes,
        STRUCTURED: orthoserde.save(build(settings, structured=True), settings.structured).file_bytes,
    }


# Children


def saving(settings: Settings, model: nn.Module) -> dict[str, Action]:
    """The saves, each to a new file."""
    path = settings.folder / "saved.safetensors"
    return {
        SAVE_DENSE: lambda: orthoserde.save(model, path, base="dense"),
        SAVE_COMPACT: lambda: orthoserde.save(model, path, base="compact"),
    }


def loading(settings: Settings, model: nn.Module) -> dict[str, Action]:
    """The loads into a model whose memory is there already."""
    return {
        LOAD_DENSE: lambda: orthoserde.load(model, settings.dense),
        LOAD_COMPACT: lambda: orthoserde.load(model, settings.compact),
    }


def structured_actions(settings: Settings, model: nn.Module) -> dict[str, Action]:
    """A save of the structured form to a new file, and a load of it."""
    return {
        SAVE_STRUCTURED: lambda: orthoserde.save(model, settings.folder / "saved.safetensors"),
        LOAD_STRUCTURED: lambda: orthoserde.load(model, settings.structured),
    }


def checksums(model: nn.Module) -> list[int]:
    """The sum of the bits of each tensor's elements, as integers."""
    integers = {2: torch.int16, 4: torch.int32}
    return [int(tensor.view(integers[tensor.element_size()]).sum()) for tensor in model.state_dict().values()]


def child_forms(settings: Settings) -> dict[str, Any]:
    """Sizes of all forms, and times of the saves and loads."""
    model = build(settings)
    found: dict[str, Any] = {"bytes": sizes(settings, model)}
    target, before = settings.folder / "saved.safetensors", checksums(model)

    def nothing_to_replace() -> None:
        target.unlink(missing_ok=True)
        os.sync()

    thin = structured_actions(settings, build(settings, structured=True))
    saves = saving(settings, model) | {SAVE_STRUCTURED: thin[SAVE_STRUCTURED]}
    taken = interleaved(saves, settings.repeat, nothing_to_replace)
    nothing_to_replace()

    def nothing_left() -> None:
        with torch.no_grad():
            for tensor in model.state_dict(keep_vars=True).values():
                tensor.zero_()

    for name, action in loading(settings, model).items():
        nothing_left()
        action()
        if checksums(model) != before:
            raise AssertionError(f"{name}: other values than were saved")
    loads = loading(settings, model) | {LOAD_STRUCTURED: thin[LOAD_STRUCTURED]}
    taken |= interleaved(loads, settings.repeat, nothing_left)
    return found | {"times": taken}


def rotation(size: int | None = None) -> nn.Linear:
    """A layer whose weight is orthonormal, and not yet registered."""
    made = nn.Linear(RANK, HIDDEN_SIZE if size is None else size, bias=False)
    nn.init.orthogonal_(made.weight)
    return made


def child_registration_peak(name: str) -> int:
    """By how many bytes one registration raises the resident memory of a process that has registered a small one.

    The peak is that of Linux, set back before: that of ``getrusage`` begins with what the parent held at the fork.
    """
    register = REGISTRATIONS[name]
    register(rotation(16))
    layer = rotation()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", "utf-8")
    before = resident("VmRSS")
    register(layer)
    return resident("VmHWM") - before


def peak_bytes() -> int:
    """Peak resident bytes of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def child_registrations(settings: Settings) -> dict[str, list[float]]:
    """Seconds of single registrations, in turn, and of all interventions by orthoserde, one after another."""
    layers = [rotation() for _ in range(3 * (REGISTERED + 1))]
    single: dict[str, Action] = {
        name: functools.partial(lambda register: register(layers.pop()), register)
        for name, register in REGISTRATIONS.items()
    }
    taken = interleaved(single, REGISTERED, lambda: None)
    together = [rotation() for _ in range(settings.layers)]
    return taken | {"together": [seconds(lambda: [orthoserde.orthogonal(each) for each in together])]}


def child_peak(settings: Settings, operation: str) -> int:
    """Peak resident bytes of a process that builds the interventions and does one thing."""
    structured = operation in (SAVE_STRUCTURED, LOAD_STRUCTURED, NOTHING_STRUCTURED)
    model = build(settings, structured=structured)
    actions = structured_actions(settings, model) if structured else saving(settings, model) | loading(settings, model)
    kept = actions.get(operation, lambda: None)()
    del kept
    return peak_bytes()


def in_child(settings: Settings, *task: str) -> Any:
    """Run a task in a new process; return what it prints."""
    arguments = ["--layers", str(settings.layers)]
    arguments += ["--repeat", str(settings.repeat), "--folder", str(settings.folder)]
    return json.loads(output_of("-m", "tests.benchmarks.bench_interventions", *arguments, "--child", *task))


# Report


def report(settings: Settings) -> None:
    """Measure everything and print it."""
    print(f"date: {datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}")
    print(f"torch: {torch.__version__}, safetensors: {safetensors.__version__}, orthoserde: {orthoserde.__version__}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    print(f"Python: {platform.python_version()}, {platform.system()} {platform.machine()}, {cores} cores")
    print(f"file system: {file_system(settings.folder)}")
    print(f"load of the machine before: {os.getloadavg()[0]:.2f}")
    shape = f"{HIDDEN_SIZE} x {RANK}"
    print(f"{settings.layers} interventions of {shape}; repetitions: {settings.repeat}\n", flush=True)

    forms = in_child(settings, "forms")
    report_bytes(cast("dict[str, int]", forms["bytes"]))
    beside = {name: int(in_child(settings, "peak", name)) for name in (NOTHING, NOTHING_STRUCTURED)}
    row("form of the model", "peak memory of a process that builds it, MiB")
    row(*["---"] * 2)
    for name, peak in (("torch's", beside[NOTHING]), ("structured", beside[NOTHING_STRUCTURED])):
        row(name, f"{peak / MIB:.0f}")
    print()
    row("operation", "median, s", "range, s", "peak memory beyond the model, MiB")
    row(*["---"] * 4)
    for name, times in forms["times"].items():
        nothing = beside[NOTHING_STRUCTURED if name in (SAVE_STRUCTURED, LOAD_STRUCTURED) else NOTHING]
        peak = round((int(in_child(settings, "peak", name)) - nothing) / MIB)
        row(name, f"{statistics.median(times):.2f}", f"{min(times):.2f} to {max(times):.2f}", str(peak))
    pairs = ((SAVE_DENSE, SAVE_COMPACT), (LOAD_DENSE, LOAD_COMPACT))
    for dense, compact in (*pairs, (SAVE_DENSE, SAVE_STRUCTURED), (LOAD_DENSE, LOAD_STRUCTURED)):
        ratio = statistics.median(forms["times"][compact]) / statistics.median(forms["times"][dense])
        print(f"{compact} / {dense}: {ratio:.2f}")
    print()
    report_registrations(settings, in_child(settings, "registrations"))
    print(f"load of the machine after: {os.getloadavg()[0]:.2f}")


def report_bytes(found: dict[str, int]) -> None:
    """Print the sizes of the forms."""
    row("form", "bytes", "against computed weights", "compact against it")
    row(*["---"] * 4)
    for name, size in found.items():
        row(name, f"{size:,}", f"{size / found[LEGACY]:.2f}", f"{found[COMPACT] / size:.4f}")
    print()


def report_registrations(settings: Settings, taken: dict[str, list[float]]) -> None:
    """Print what registrations took."""
    row("registration of one rotation", "median, s", "range, s", "timed", "peak memory, MiB")
    row(*["---"] * 5)
    for name in REGISTRATIONS:
        times = taken[name]
        peak = int(in_child(settings, "registration peak", name)) / MIB
        row(
            *(name, f"{statistics.median(times):.3f}", f"{min(times):.3f} to {max(times):.3f}", str(len(times))),
            f"{peak:.0f}",
        )
    print(f"torch / orthoserde: {statistics.median(taken['torch']) / statistics.median(taken['orthoserde']):.1f}")
    print(f"all {settings.layers} by orthoserde: {taken['together'][0]:.1f} s\n")


def main() -> None:
    """Read the arguments; report, or do one task of the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=64, help="interventions")
    parser.add_argument("--repeat", type=int, default=3, help="repetitions of each save and load")
    parser.add_argument("--folder", type=Path, default=None, help="where files are written; a temporary folder inside")
    parser.add_argument("--child", nargs="+", default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is None:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            report(Settings(arguments.layers, arguments.repeat, Path(folder)))
        return
    settings = Settings(arguments.layers, arguments.repeat, arguments.folder)
    task, *rest = arguments.child
    if task == "peak":
        print(json.dumps(child_peak(settings, *rest)))
    elif task == "registration peak":
        print(json.dumps(child_registration_peak(*rest)))
    else:
        print(json.dumps({"forms": child_forms, "registrations": child_registrations}[task](settings)))


if __name__ == "__main__":
    main()
