"""Time, memory and accuracy of the structured form of an orthogonal weight, beside torch's form of the same weight.

Run it on a machine that does nothing else: ``python -m tests.benchmarks.bench_structured``. It takes some minutes, most
of them for torch's ``matrix_exp`` of 4096 x 4096, which ``--quick`` leaves out; that one needs some GiB of memory.

Both forms are registered by ``orthoserde.orthogonal``, so their bases are the same, and so are their originals, which
have left their initial value. What is measured is a step: one forward and one backward of the weight alone. Times are
medians of steps that are taken in turn, in one process. One thread computes, unless ``--threads`` says otherwise: where
cores are busy with other things, threads wait for each other, and what is fast looks slow. Memory is measured in a
process for each form, in two ways:

- allocated: what torch's allocator hands out, by its profiler; the largest sum at any time in the step. Exact, but
  blind to what the libraries beneath take for themselves.
- process: by how much the step raises the peak of the resident memory (``VmHWM`` of Linux, set back before the step).
  It has everything, and noise of some MiB: code that is loaded, pages that malloc keeps.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

import orthoserde
from orthoserde import _torch
from orthoserde.orthonormal.completion import complete
from orthoserde.orthonormal.thin_maps import THIN_MAPS
from tests.benchmarks.exact_maps import DIGITS, exact

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20

#: How many times less time and memory are aimed at, where n is much larger than k.
TIME_AIM, MEMORY_AIM = 10, 20

#: As the children name them; torch's has the canonical base too.
FORMS = ("torch", "structured")

#: By case and form, what ``child_memory`` has measured.
Memory = dict[int, dict[str, dict[str, Any]]]


@dataclass(frozen=True)
class Case:
    """A map, a weight of n x k, and how many steps are timed; where it is one, torch's form takes that one alone."""

    orthogonal_map: str
    n: int
    k: int
    repeat: int

    @property
    def name(self) -> str:
        """As the tables have it."""
        return f"{self.orthogonal_map}, {self.n} x {self.k}"


CASES = (
    Case("householder", 768, 4, 21),
    Case("householder", 4096, 4, 7),
    Case("householder", 4096, 16, 7),
    Case("householder", 8192, 8, 5),
    Case("cayley", 768, 4, 11),
    Case("cayley", 1024, 8, 11),
    Case("cayley", 4096, 4, 1),
    Case("matrix_exp", 768, 4, 5),
    Case("matrix_exp", 1024, 8, 5),
    Case("matrix_exp", 4096, 4, 1),
)


# What is measured


def make(case: Case, structured: bool, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A layer whose original has columns of about the norm 1 below its diagonal."""
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(case.k, case.n, bias=False, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(torch.linalg.qr(torch.randn(case.n, case.k, dtype=dtype, generator=generator))[0])
        orthoserde.orthogonal(layer, orthogonal_map=case.orthogonal_map, structured=structured)
        original = layer.get_parameter("parametrizations.weight.original")
        original.add_(torch.randn(case.n, case.k, generator=generator).tril(-1) / case.n**0.5)
    return layer


def step(layer: nn.Module, target: Tensor) -> None:
    """One forward and one backward; the gradient before is given back first."""
    layer.zero_grad(set_to_none=True)
    (cast("Tensor", layer.weight) * target).sum().backward()  # type: ignore[no-untyped-call]


def target_of(case: Case) -> Tensor:
    """Of which the weight's scalar product is the loss."""
    return torch.randn(case.n, case.k, generator=torch.Generator().manual_seed(1))


def child_times(case: Case) -> dict[str, float]:
    """Medians of steps that are taken in turn, in seconds; a first round is not counted."""
    layers = {"torch": make(case, False), "structured": make(case, True)}
    target = target_of(case)
    taken: dict[str, list[float]] = {name: [] for name in layers}
    for turn in range(case.repeat + 1):
        for name in list(layers)[:: 1 if turn % 2 else -1]:
            start = time.perf_counter()
            step(layers[name], target)
            taken[name].append(time.perf_counter() - start)
    one, other = (cast("Tensor", layer.weight).detach() for layer in layers.values())
    if not torch.allclose(one, other, rtol=0, atol=1e-4):
        raise AssertionError(f"{case.name}: the two forms have different weights")
    return {name: statistics.median(times[1:]) for name, times in taken.items()}


def child_memory(case: Case, structured: bool) -> dict[str, float | None]:
    """Bytes of the module, and of a step beyond it, in the two ways of measuring; and the seconds of that step."""
    warm = Case(case.orthogonal_map, 64, case.k, 1)
    step(make(warm, structured), target_of(warm))  # code is loaded, and the threads are there
    layer, target = make(case, structured), target_of(case)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", "utf-8")
    before = resident("VmRSS")
    start = time.perf_counter()
    step(layer, target)
    taken = time.perf_counter() - start
    process = resident("VmHWM") - before
    layer.zero_grad(set_to_none=True)
    tensors = [*layer.parameters(), *layer.buffers()]
    module = sum(tensor.untyped_storage().nbytes() for tensor in tensors)
    known = None if case.repeat == 1 and not structured else allocated(layer, target)
    return {"module": module, "process": process, "allocated": known, "seconds": taken}


def resident(field: str) -> int:
    """A figure of this process in bytes, from ``/proc``."""
    found = re.search(rf"{field}:\s*(\d+) kB", Path("/proc/self/status").read_text("utf-8"))
    if found is None:
        raise RuntimeError(f"this system does not tell {field}")
    return 1024 * int(found[1])


def allocated(layer: nn.Module, target: Tensor) -> int:
    """The most that torch's allocator had handed out at any time in a step, in bytes."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        step(layer, target)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text("utf-8"))["traceEvents"]
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak


# Accuracy


def errors_of_weights(orthogonal_map: str, n: int, k: int, dtype: torch.dtype) -> tuple[list[float], list[float]]:
    """Largest errors of torch's and of the structured weight, and how far these are from orthonormal."""
    layers = [make(Case(orthogonal_map, n, k, 1), structured, dtype) for structured in (False, True)]
    first = layers[1].get_buffer("parametrizations.weight.0.columns")
    original = layers[1].get_parameter("parametrizations.weight.original").detach().double().numpy()
    wanted = complete(first.double()).numpy().astype(np.longdouble) @ exact(orthogonal_map, original)
    weights = [cast("Tensor", layer.weight).detach().double() for layer in layers]
    off = [float(np.abs(weight.numpy() - wanted).max()) for weight in weights]
    identity = torch.eye(k, dtype=torch.float64)
    return off, [float((weight.mT @ weight - identity).abs().max()) for weight in weights]


def errors_of_exponentials(norm: float, n: int, k: int) -> list[float]:
    """Largest errors, in double precision, of ``exp(A) E`` by torch's dense function and by the thin map.

    Args:
        norm: 1-norm of A, by which torch chooses a polynomial.
        n: Rows of X.
        k: Columns of X.
    """
    lower = torch.randn(n, k, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).tril(-1)
    square = torch.cat([lower, lower.new_zeros(n, n - k)], dim=1)
    factor = norm / (square - square.mT).abs().sum(dim=0).max()
    dense = torch.matrix_exp(factor * (square - square.mT))[:, :k]
    thin = torch.cat(THIN_MAPS["matrix_exp"](factor * lower))
    wanted = exact("matrix_exp", (factor * lower).numpy())
    return [float(np.abs(found.numpy() - wanted).max()) for found in (dense, thin)]


# Report


def in_child(index: int, *task: str) -> Any:
    """Do one task of one case in a new process, on as many threads as this one; return what it prints."""
    threads = ("--threads", str(torch.get_num_threads()))
    command = [sys.executable, "-m", "tests.benchmarks.bench_structured", *threads, "--child", str(index), *task]
    return json.loads(subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout)


def row(*cells: str) -> None:
    """Print one line of a table."""
    print("|", " | ".join(cells), "|", flush=True)


def header(*cells: str) -> None:
    """Print the head of a table."""
    print()
    row(*cells)
    row(*["---"] * len(cells))


def mib(size: float | None) -> str:
    """Bytes in MiB."""
    return "-" if size is None else f"{size / MIB:.2f}"


def verdict(ratio: float, aim: float) -> str:
    """Whether an aim is met."""
    return "met" if ratio >= aim else "not met"


def report_times(cases: list[int], memory: Memory) -> None:
    """The table of times."""
    header("map and weight", "steps", "torch's form, ms", "structured, ms", "times less", f"aim: {TIME_AIM}")
    for index in cases:
        once = CASES[index].repeat == 1
        taken = {form: memory[index][form]["seconds"] for form in FORMS} if once else in_child(index, "times")
        theirs, ours = (taken[form] for form in FORMS)
        cells = (f"{1000 * theirs:.1f}", f"{1000 * ours:.1f}", f"{theirs / ours:.1f}")
        row(CASES[index].name, str(CASES[index].repeat), *cells, verdict(theirs / ours, TIME_AIM))


def report_memory(memory: Memory) -> None:
    """The tables of memory."""
    kinds = {"module": "module, MiB", "allocated": "step, allocated, MiB", "process": "step, process, MiB"}
    header("map and weight", *(f"{kind}: {form}" for kind in kinds.values() for form in ("torch's form", "structured")))
    for index, forms in memory.items():
        row(CASES[index].name, *(mib(forms[form][kind]) for kind in kinds for form in FORMS))
    header("map and weight", "step alone, times less", "module and step, times less", f"aim: {MEMORY_AIM}")
    for index, forms in memory.items():
        # Where torch's step was not profiled, its process tells: so much that the noise is nothing beside it.
        steps = {form: forms[form]["process" if forms[form]["allocated"] is None else "allocated"] for form in FORMS}
        theirs, ours = (forms[form]["module"] + steps[form] for form in FORMS)
        ratios = (steps["torch"] / steps["structured"], theirs / ours)
        row(CASES[index].name, *(f"{ratio:.0f}" for ratio in ratios), verdict(min(ratios), MEMORY_AIM))


def report_accuracy() -> None:
    """The tables of errors."""
    print(f"\nerrors: largest absolute differences from weights computed with {DIGITS} digits")
    names = (
        "map, weight, dtype",
        "error: torch's form",
        "structured",
        "weight^T weight - I: torch's form",
        "structured",
    )
    header(*names)
    for dtype in (torch.float32, torch.float64):
        for orthogonal_map in _torch.ORTHOGONAL_MAPS:
            for n, k in ((768, 4), (1024, 8)):
                off, residual = errors_of_weights(orthogonal_map, n, k, dtype)
                name = f"{orthogonal_map}, {n} x {k}, {str(dtype).removeprefix('torch.')}"
                row(name, *(f"{number:.1e}" for number in (*off, *residual)))
    shapes = ((3, 1), (12, 4), (256, 4))
    forms = [f"{n} x {k}: {form}" for n, k in shapes for form in ("torch.matrix_exp", "structured")]
    header("errors of exp(A) E in float64, by the 1-norm of A", *forms)
    for norm in (0.001, 0.01, 0.02, 0.03, 0.04, 0.049, 0.05, 0.1, 1.0, 10.0):
        row(f"{norm:g}", *(f"{error:.1e}" for n, k in shapes for error in errors_of_exponentials(norm, n, k)))


def report(quick: bool) -> None:
    """Measure everything and print it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    print(f"date: {datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}")
    print(f"torch: {torch.__version__}, orthoserde: {orthoserde.__version__}, {torch.get_num_threads()} threads")
    print(f"Python: {platform.python_version()}, {platform.system()} {platform.machine()}, {cores} cores")
    print(f"load of the machine before: {os.getloadavg()[0]:.2f}", flush=True)
    cases = [index for index, case in enumerate(CASES) if not (quick and case.repeat == 1)]
    memory = {index: {form: in_child(index, "memory", form) for form in FORMS} for index in cases}
    report_times(cases, memory)
    report_memory(memory)
    report_accuracy()
    print(f"\nload of the machine after: {os.getloadavg()[0]:.2f}")


def main() -> None:
    """Read the arguments; report, or do one task of the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="leave out what takes torch minutes")
    parser.add_argument("--threads", type=int, default=1, help="threads that compute")
    parser.add_argument("--accuracy", action="store_true", help="only the tables of errors")
    parser.add_argument("--child", nargs="+", default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.child is None:
        report_accuracy() if arguments.accuracy else report(arguments.quick)
        return
    index, task, *form = arguments.child
    case = CASES[int(index)]
    print(json.dumps(child_times(case) if task == "times" else child_memory(case, form == ["structured"])))


if __name__ == "__main__":
    main()
