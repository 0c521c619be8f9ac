"""Ten thousand parametrized tensors: time and memory of a save and a load grow as the model does, not as its square."""

from __future__ import annotations

import cProfile
import functools
import gc
import pstats
import statistics
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import orthoserde
from orthoserde import Fidelity
from orthoserde.traps import warn_of_traps

REGISTRY = orthoserde.Registry()

FEW = 2_500
MANY = 10_000

#: Sizes for what is measured with a profiler, which takes several times as long.
FEW_PROFILED = 1_000
MANY_PROFILED = 4_000

SIZES = (FEW_PROFILED, FEW, MANY_PROFILED, MANY)

#: Four times as many tensors may take this many times as long: four and room for noise, but not sixteen.
MOST_TIMES_AS_LONG = 8.0

#: Two and a half times as many tensors (``FEW`` against ``FEW_PROFILED``) may take this many times as much memory.
MOST_TIMES_AS_MUCH_MEMORY = 4.0

#: MiB that a save and a load of ten thousand tensors may take; the manifest alone is some ten of them as text.
MOST_MIB = 300

#: Part of the time of a save that looking for traps may take; 0.035 measured.
MOST_FOR_TRAPS = 0.1

#: Seconds within which the own time of one function says nothing.
NOISE = 0.05

Action = Callable[[], object]
Record = Callable[[str, object], None]


@REGISTRY.register("continuation.scale>Scaled")
class Scaled(nn.Module):
    """A parametrization with a configuration, but without tensors."""

    def __init__(self, factor: float = 2.0) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, weight: Tensor) -> Tensor:
        return self.factor * weight


@REGISTRY.register("continuation.scale>Small")
class Small(nn.Module):
    """Two numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))


class Model(nn.Module):
    """Many small modules, every eighth of which stands in two places."""

    def __init__(self, modules: list[Small]) -> None:
        super().__init__()
        self.all = nn.ModuleList(modules)
        self.again = nn.ModuleList(modules[::8])


def bare(count: int) -> Model:
    return Model([Small() for _ in range(count)])


class Models:
    """Parametrized models by size, which share their modules, and a file of each."""

    def __init__(self, folder: Path, sizes: tuple[int, ...] = SIZES) -> None:
        self.modules = list(bare(MANY).all)
        for index, module in enumerate(self.modules):
            parametrize.register_parametrization(module, "weight", Scaled(), unsafe=True)
            nn.init.constant_(next(module.parameters()), index)
        self.by_size = {count: Model(cast("list[Small]", self.modules[:count])) for count in sizes}
        self.whole = Model(cast("list[Small]", self.modules))
        self.files = {count: folder / f"{count}.safetensors" for count in self.by_size}
        for count, model in self.by_size.items():
            orthoserde.save(model, self.files[count], registry=REGISTRY)

    def save(self, count: int) -> Action:
        path = self.files[count].with_name("saved again")
        return functools.partial(orthoserde.save, self.by_size[count], path, registry=REGISTRY)

    def load(self, count: int) -> Action:
        return functools.partial(orthoserde.load, self.by_size[count], self.files[count], registry=REGISTRY)

    def reattach(self, count: int) -> Action:
        return functools.partial(orthoserde.load, bare(count), self.files[count], registry=REGISTRY)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("scale"))


@contextmanager
def without_collections() -> Iterator[None]:
    """Garbage collections walk everything that this process holds: their time is not that of the action."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def seconds(action: Action) -> float:
    """Processor time, in which neither the disk nor what else the machine is doing counts."""
    with without_collections():
        start = time.process_time()
        action()
        return time.process_time() - start


def own_seconds(action: Action) -> dict[str, float]:
    """Processor time of this thread by function, without that of the functions which it calls."""
    profile = cProfile.Profile(time.thread_time)
    with without_collections():
        profile.runcall(action)
    stats = cast("dict[tuple[str, int, str], tuple[Any, ...]]", cast("Any", pstats.Stats(profile)).stats)
    return {f"{Path(file).name}:{line} {name}": own for (file, line, name), (_, _, own, *_) in stats.items()}


def peak_bytes(action: Action) -> int:
    """The most that Python held at one moment; the tensors themselves are a few kilobytes."""
    gc.collect()
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_ten_thousand_tensors_are_restored(models: Models) -> None:
    parameters = list(models.by_size[MANY].parameters())
    with torch.no_grad():
        for parameter in parameters:
            parameter.fill_(-1)
    report = cast("orthoserde.LoadReport", models.load(MANY)())
    assert report.fidelity is Fidelity.EXACT
    assert len(report.tensors) == MANY
    expected = torch.arange(MANY, dtype=torch.float32).unsqueeze(1).expand(MANY, 2)
    assert torch.equal(torch.stack([parameter.detach() for parameter in parameters]), expected)


def test_thousands_of_parametrizations_are_attached(models: Models) -> None:
    model = bare(FEW)
    report = orthoserde.load(model, models.files[FEW], registry=REGISTRY)
    assert report.fidelity is Fidelity.EXACT
    assert len(report.tensors) == FEW
    names = [name for name, _ in models.by_size[FEW].named_parameters()]
    assert [name for name, _ in model.named_parameters()] == names


@pytest.mark.parametrize("verb", ["save", "load"])
def test_time_is_linear(verb: str, models: Models, record_property: Record) -> None:
    make: Callable[[int], Action] = getattr(models, verb)
    taken = {count: statistics.median(seconds(make(count)) for _ in range(3)) for count in (FEW, MANY)}
    for count, median in taken.items():
        record_property(f"{verb}_seconds_{count}", round(median, 3))
    ratio = taken[MANY] / taken[FEW]
    print(f"{verb}: {taken[FEW]:.2f} s for {FEW} tensors, {taken[MANY]:.2f} s for {MANY}, {ratio:.1f} times")
    assert ratio < MOST_TIMES_AS_LONG


def test_looking_for_traps_is_a_small_part_of_a_save(models: Models, record_property: Record) -> None:
    look = functools.partial(warn_of_traps, models.by_size[MANY])
    looking, saving = (statistics.median(seconds(action) for _ in range(3)) for action in (look, models.save(MANY)))
    record_property("traps_seconds", round(looking, 3))
    print(f"{looking:.3f} s of {saving:.2f} s for a save of {MANY} tensors look for traps")
    assert looking / saving < MOST_FOR_TRAPS


#: Runs in a process of its own, whose peak memory says what a save and a load take beyond the model.
PEAKS = """
import gc, sys
from pathlib import Path
from tests.continuation.test_scale import MANY, Models, REGISTRY
import orthoserde

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) // 1024

def reset():  # what building the model took at its peak is not the question
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")

models = Models(Path(sys.argv[1]), sizes=())
model, path = models.whole, Path(sys.argv[1]) / "many"
reset()
peaks = [peak()]
orthoserde.save(model, path, registry=REGISTRY)
peaks.append(peak())
orthoserde.load(model, path, registry=REGISTRY)
print(*peaks, peak())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_the_memory_for_ten_thousand_tensors_is_recorded(tmp_path: Path, record_property: Record) -> None:
    command = [sys.executable, "-c", PEAKS, str(tmp_path)]
    root = Path(__file__).parents[2]
    found = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root).stdout
    before, saved, loaded = map(int, found.split())
    record_property("save_peak_mib", saved - before)
    record_property("load_peak_mib", loaded - before)
    print(f"beyond a model of {MANY} tensors: save {saved - before} MiB, load {loaded - before} MiB")
    assert loaded - before < MOST_MIB


def superlinear_functions(make: Callable[[int], Action]) -> dict[str, tuple[float, float]]:
    """Functions whose own time grows faster than the model, with that time at both sizes."""
    few, many = own_seconds(make(FEW_PROFILED)), own_seconds(make(MANY_PROFILED))
    return {
        name: (round(few.get(name, 0.0), 3), round(own, 3))
        for name, own in many.items()
        if own > MOST_TIMES_AS_LONG * few.get(name, 0.0) + NOISE
    }


@pytest.mark.parametrize("verb", ["save", "load", "reattach"])
def test_no_function_takes_quadratic_time(verb: str, models: Models) -> None:
    # Sharper than the sum of all times, in which one function that is quadratic may be hidden for long.
    found = superlinear_functions(getattr(models, verb))
    if found:  # a busy machine may have slowed a function down; one that is quadratic is found again
        found = {name: own for name, own in superlinear_functions(getattr(models, verb)).items() if name in found}
    assert found == {}


def test_a_quadratic_function_would_be_found() -> None:
    def make(count: int) -> Action:
        return lambda: [other for each in range(count) for other in range(count) if other < each < 0]

    (found,) = superlinear_functions(make)
    assert "test_scale.py" in found


@pytest.mark.parametrize("verb", ["save", "load"])
def test_memory_is_linear(verb: str, models: Models, record_property: Record) -> None:
    make: Callable[[int], Action] = getattr(models, verb)
    peaks = {count: peak_bytes(make(count)) for count in (FEW_PROFILED, FEW)}
    for count, peak in peaks.items():
        record_property(f"{verb}_peak_bytes_{count}", peak)
    few, many = peaks.values()
    print(f"{verb}: {few / 1e6:.1f} MB for {FEW_PROFILED} tensors, {many / 1e6:.1f} MB for {FEW}")
    assert many / few < MOST_TIMES_AS_MUCH_MEMORY
