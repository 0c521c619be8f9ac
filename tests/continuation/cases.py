"""What is trained, saved and trained on, and how: a table of cases that two processes share.

Run as ``python -m tests.continuation.cases FOLDER`` this is the second process: it restores every case that the first
one left in the folder, trains it on, and leaves what came of it.
"""

from __future__ import annotations

import functools
import random
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypedDict, cast

import numpy
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import orthoserde

STEPS_BEFORE = 3
STEPS_AFTER = 10

#: The first process starts every case from one seed, the second from another.
FIRST_SEED = 1
SECOND_SEED = 2

CHILD_RESULTS = "child.pt"

Batch = tuple[Tensor, ...]
Parametrizer = Callable[..., nn.Module]

OPTIMIZERS: dict[str, Callable[[Iterable[Tensor]], torch.optim.Optimizer]] = {
    "sgd": functools.partial(torch.optim.SGD, lr=5e-2, momentum=0.9),
    "adam": functools.partial(torch.optim.Adam, lr=1e-2),
}

#: With ``dim=None`` for the norm of the whole tensor, which torch's annotation does not mention.
weight_norm: Parametrizer = parametrizations.weight_norm

ORTHOGONAL_MAPS = ("householder", "cayley", "matrix_exp")

SHAPES = {"tall": (12, 5), "wide": (5, 12), "square": (6, 6), "batched": (3, 6, 4)}

REAL_DTYPES = (torch.float32, torch.float64)
ALL_DTYPES = (*REAL_DTYPES, torch.complex64)


class Holder(nn.Module):
    """A plain parameter of any shape and dtype, a trained bias, a frozen scale, and buffers that training moves."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape, dtype=dtype))
        self.bias = nn.Parameter(torch.randn(shape[:-1], dtype=dtype).unsqueeze(-2))
        self.frozen = nn.Parameter(torch.rand((), dtype=dtype) + 0.5, requires_grad=False)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.randn(shape[-2], dtype=dtype))

    def forward(self, batch: Tensor) -> Tensor:
        output = batch @ self.weight.mT * self.frozen + self.bias
        if self.training:
            with torch.no_grad():
                self.get_buffer("seen").add_(1)
                self.get_buffer("mean").lerp_(output.mean(dim=tuple(range(output.ndim - 1))), 0.25)
        return output


@dataclass(frozen=True)
class Case:
    """One training run.

    Attributes:
        name: The test's id.
        build: Makes the parametrized model, from the global seed.
        batch: Makes the model's arguments.
        optimizer: A key of ``OPTIMIZERS``.
        bare: Makes the model of the second process without parametrizations; with None it is built as the first was.
        base: How the file stores bases, as ``orthoserde.save`` has it.
    """

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[torch.Generator], Batch]
    optimizer: str
    bare: Callable[[], nn.Module] | None = None
    base: Literal["auto", "compact"] = "auto"


@dataclass(frozen=True)
class Subject:
    """A module that people parametrize.

    Attributes:
        name: Its name.
        plain: Makes it, without parametrizations.
        tensors: Dotted names of the tensors that are parametrized.
        batch: Makes its arguments.
    """

    name: str
    plain: Callable[[], nn.Module]
    tensors: tuple[str, ...]
    batch: Callable[[torch.Generator], Batch]

    def parametrized(self, parametrizer: Parametrizer) -> nn.Module:
        """Make it with one parametrization on each of its tensors."""
        model = self.plain()
        for name in self.tensors:
            path, _, tensor_name = name.rpartition(".")
            parametrizer(model.get_submodule(path), tensor_name)
        return model


def _normal(*shape: int) -> Callable[[torch.Generator], Batch]:
    return lambda generator: (torch.randn(shape, generator=generator),)


def _same_three_times(*shape: int) -> Callable[[torch.Generator], Batch]:
    return lambda generator: (torch.randn(shape, generator=generator),) * 3


def _indices(generator: torch.Generator) -> Batch:
    return (torch.randint(10, (8,), generator=generator),)


def _two(generator: torch.Generator) -> Batch:
    return torch.randn(7, 5, generator=generator), torch.randn(7, 4, generator=generator)


#: Every matrix here is tall or wide but those of the attention's output, so that torch can parametrize most on meta.
SUBJECTS = (
    Subject("Linear", lambda: nn.Linear(6, 4), ("weight",), _normal(7, 6)),
    Subject("Conv1d", lambda: nn.Conv1d(3, 4, 5), ("weight",), _normal(2, 3, 9)),
    Subject("Conv2d", lambda: nn.Conv2d(3, 4, (3, 2)), ("weight",), _normal(2, 3, 6, 6)),
    Subject("ConvTranspose2d", lambda: nn.ConvTranspose2d(3, 4, (3, 2)), ("weight",), _normal(2, 3, 5, 5)),
    Subject("Embedding", lambda: nn.Embedding(10, 4), ("weight",), _indices),
    Subject("Bilinear", lambda: nn.Bilinear(5, 4, 3), ("weight",), _two),
    Subject("GRUCell", lambda: nn.GRUCell(5, 4), ("weight_hh",), _normal(7, 5)),
    Subject("GRU", lambda: nn.GRU(5, 4, num_layers=2), ("weight_hh_l0",), _normal(6, 3, 5)),
    Subject("LSTM", lambda: nn.LSTM(5, 4, bidirectional=True), ("weight_hh_l0",), _normal(6, 3, 5)),
    Subject(
        "MultiheadAttention",
        lambda: nn.MultiheadAttention(8, 2, batch_first=True),
        ("in_proj_weight", "out_proj.weight"),
        _same_three_times(2, 5, 8),
    ),
    Subject(
        "TransformerEncoderLayer",
        lambda: nn.TransformerEncoderLayer(8, 2, dim_feedforward=12, dropout=0.0, batch_first=True),
        ("self_attn.in_proj_weight", "linear1.weight", "linear2.weight"),
        _normal(2, 5, 8),
    ),
)

PARAMETRIZERS: dict[str, Parametrizer] = {
    "orthogonal": parametrizations.orthogonal,
    "canonical": orthoserde.orthogonal,
    "householder_untrivialized": functools.partial(
        parametrizations.orthogonal, orthogonal_map="householder", use_trivialization=False
    ),
    "weight_norm": weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
}


def _holder_parametrizers() -> dict[str, tuple[Parametrizer, tuple[torch.dtype, ...]]]:
    """Parametrizations by name, with the dtypes for which torch has them (``test_new_process`` asks torch)."""
    found: dict[str, tuple[Parametrizer, tuple[torch.dtype, ...]]] = {}
    for orthogonal_map in ORTHOGONAL_MAPS:
        for trivialized in (True, False):
            parametrizer = functools.partial(
                parametrizations.orthogonal, orthogonal_map=orthogonal_map, use_trivialization=trivialized
            )
            name = f"{orthogonal_map}-{'trivialized' if trivialized else 'untrivialized'}"
            found[name] = (parametrizer, REAL_DTYPES if orthogonal_map == "householder" else ALL_DTYPES)
        canonical = functools.partial(orthoserde.orthogonal, orthogonal_map=orthogonal_map)
        found[f"{orthogonal_map}-canonical"] = (
            canonical,
            REAL_DTYPES if orthogonal_map == "householder" else ALL_DTYPES,
        )
    for dim in (0, 1):
        found[f"weight_norm-dim{dim}"] = (functools.partial(weight_norm, dim=dim), REAL_DTYPES)
    found["weight_norm-whole"] = (functools.partial(weight_norm, dim=None), ALL_DTYPES)
    found["spectral_norm"] = (parametrizations.spectral_norm, ALL_DTYPES)
    found["spectral_norm-dim1"] = (
        functools.partial(parametrizations.spectral_norm, dim=1, n_power_iterations=2, eps=1e-6),
        ALL_DTYPES,
    )
    return found


HOLDER_PARAMETRIZERS = _holder_parametrizers()


def _holder_case(name: str, shape: str, dtype: torch.dtype, optimizer: str) -> Case:
    parametrizer, sizes = HOLDER_PARAMETRIZERS[name][0], SHAPES[shape]

    def batch(generator: torch.Generator) -> Batch:
        return (torch.randn(*sizes[:-2], 7, sizes[-1], dtype=dtype, generator=generator),)

    full_name = f"{name}-{shape}-{str(dtype).removeprefix('torch.')}-{optimizer}"
    return Case(full_name, lambda: parametrizer(Holder(sizes, dtype), "weight"), batch, optimizer)


def _subject_case(subject: Subject, parametrizer: str, *, bare: bool = False) -> Case:
    build = functools.partial(subject.parametrized, PARAMETRIZERS[parametrizer])
    name = f"{subject.name}-{parametrizer}{'-bare' if bare else ''}-adam"
    return Case(name, build, subject.batch, "adam", subject.plain if bare else None)


#: The orthogonal maps in every combination; weight_norm and spectral_norm likewise; every module with every
#: parametrization, for which one optimizer is enough; and two modules that begin the second process as bare ones.
CASES: dict[str, Case] = {
    case.name: case
    for case in (
        *(
            _holder_case(name, shape, dtype, optimizer)
            for name, (_, dtypes) in HOLDER_PARAMETRIZERS.items()
            for shape in SHAPES
            for dtype in dtypes
            for optimizer in OPTIMIZERS
        ),
        *(_subject_case(subject, parametrizer) for subject in SUBJECTS for parametrizer in PARAMETRIZERS),
        *(
            _subject_case(subject, parametrizer, bare=True)
            for subject in SUBJECTS
            for parametrizer in PARAMETRIZERS
            if subject.name in ("GRU", "MultiheadAttention")
        ),
    )
}


class Outcome(TypedDict):
    """What came of a case in one process.

    Attributes:
        error: A traceback, empty where all went well.
        losses: The loss of each step.
        tensors: Everything that training moves, by name.
        strides: Strides of each of these tensors.
        disturbed: What a load should have left alone and did not (second process).
        differed_before: Whether the model held other values before the load (second process).
        fidelity: What the load reported (second process).
    """

    error: str
    losses: list[float]
    tensors: dict[str, Tensor]
    strides: dict[str, tuple[int, ...]]
    disturbed: list[str]
    differed_before: bool
    fidelity: str


def output_of(model: nn.Module, batch: Batch) -> Tensor:
    """Run a model; of several outputs, the first."""
    output = model(*batch)
    return cast("Tensor", output[0] if isinstance(output, tuple) else output)


def batch_of(case: Case | Subject, step: int) -> Batch:
    """The data of a step: the same in every process, and without the global generator."""
    return case.batch(torch.Generator().manual_seed(1000 + step))


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, case: Case | Subject, steps: Iterable[int]
) -> list[float]:
    """Train for some steps; return their losses."""
    losses: list[float] = []
    for step in steps:
        optimizer.zero_grad()
        loss = (output_of(model, batch_of(case, step)) - 0.5).abs().square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    return losses


def registered_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The model's parameters and buffers, under each of their names; torch's walk, not orthoserde's."""
    found: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    return found | dict(model.named_buffers(remove_duplicate=False))


def computed_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The computed tensors of a model. It is in evaluation mode while they are, in which reading one moves nothing."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    found = {
        f"{path}.{name}".lstrip("."): getattr(module, name).detach()
        for path, module in model.named_modules(remove_duplicate=False)
        if parametrize.is_parametrized(module)
        for name in cast("nn.ModuleDict", module.parametrizations)
    }
    for module, mode in modes.items():
        module.training = mode
    return found


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state of an optimizer, flat."""
    states = cast("Mapping[int, Mapping[str, object]]", optimizer.state_dict()["state"])
    return {
        f"{index}.{name}": torch.as_tensor(value) for index, state in states.items() for name, value in state.items()
    }


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Copies of all that training moves, by name, with their strides."""
    found = {f"registered {name}": tensor for name, tensor in registered_tensors(model).items()}
    found |= {f"computed {name}": tensor for name, tensor in computed_tensors(model).items()}
    found |= {f"optimizer {name}": tensor for name, tensor in optimizer_tensors(optimizer).items()}
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def surroundings(model: nn.Module) -> dict[str, object]:
    """All that a load leaves alone, in a form that can be compared."""
    numpy_state = cast("tuple[str, numpy.typing.NDArray[numpy.uint32], int, int, float]", numpy.random.get_state())
    parameters = dict(model.named_parameters(remove_duplicate=False))
    modules = dict(model.named_modules(remove_duplicate=False))
    return {
        "parameter ids": {name: id(parameter) for name, parameter in parameters.items()},
        "requires_grad": {name: parameter.requires_grad for name, parameter in parameters.items()},
        "gradients": {name: id(parameter.grad) for name, parameter in parameters.items()},
        "strides": {name: tensor.stride() for name, tensor in registered_tensors(model).items()},
        "devices": {name: str(tensor.device) for name, tensor in registered_tensors(model).items()},
        "training mode": {path: module.training for path, module in modules.items()},
        "module classes": {path: type(module) for path, module in modules.items()},
        "torch generator": torch.get_rng_state().numpy().tobytes(),
        "python generator": random.getstate(),
        "numpy generator": (numpy_state[0], numpy_state[1].tobytes(), *numpy_state[2:]),
    }


def disturbed(before: Mapping[str, object], after: Mapping[str, object]) -> list[str]:
    """Which of the surroundings changed."""
    return [aspect for aspect in before if before[aspect] != after[aspect]]


def start(case: Case, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Build a model and its optimizer under a seed."""
    torch.manual_seed(seed)
    build = case.bare if case.bare is not None and seed == SECOND_SEED else case.build
    model = build()
    return model, OPTIMIZERS[case.optimizer](model.parameters())


def _finish(model: nn.Module, optimizer: torch.optim.Optimizer, case: Case) -> Outcome:
    losses = train(model, optimizer, case, range(STEPS_BEFORE, STEPS_BEFORE + STEPS_AFTER))
    tensors = everything(model, optimizer)
    strides = {name: tuple(tensor.stride()) for name, tensor in tensors.items()}
    return Outcome(
        error="", losses=losses, tensors=tensors, strides=strides, disturbed=[], differed_before=False, fidelity=""
    )


def run_first(case: Case, folder: Path) -> Outcome:
    """Train, save, and train on without a break."""
    model, optimizer = start(case, FIRST_SEED)
    train(model, optimizer, case, range(STEPS_BEFORE))
    orthoserde.save(model, folder / f"{case.name}.safetensors", base=case.base)
    torch.save(optimizer.state_dict(), folder / f"{case.name}.optimizer")
    return _finish(model, optimizer, case)


def run_second(case: Case, folder: Path) -> Outcome:
    """Start elsewhere, load, and train on."""
    model, optimizer = start(case, SECOND_SEED)
    values = everything(model, optimizer)
    before = surroundings(model)
    report = orthoserde.load(model, folder / f"{case.name}.safetensors")
    after = surroundings(model)
    if case.bare is not None:
        # Parametrizations move their parameters to the end, and the state of an optimizer goes by position.
        optimizer = OPTIMIZERS[case.optimizer](model.parameters())
        before = {aspect: value for aspect, value in before.items() if aspect.endswith("generator")}
    loaded = everything(model, optimizer)
    optimizer.load_state_dict(torch.load(folder / f"{case.name}.optimizer", weights_only=True))
    outcome = _finish(model, optimizer, case)
    outcome["disturbed"] = disturbed(before, after)
    common = values.keys() & loaded.keys()
    outcome["differed_before"] = any(not torch.equal(values[name], loaded[name]) for name in common)
    outcome["fidelity"] = str(report.fidelity)
    return outcome


def run_all(
    run: Callable[[Case, Path], Outcome], folder: Path, table: Mapping[str, Case] = CASES, threads: int = 1
) -> dict[str, Outcome]:
    """Run every case of a table. What a case raises becomes its ``error``, which its own test reports."""
    outcomes: dict[str, Outcome] = {}
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for case in table.values():
            try:
                outcomes[case.name] = run(case, folder)
            except Exception:
                outcomes[case.name] = Outcome(
                    error=traceback.format_exc(),
                    losses=[],
                    tensors={},
                    strides={},
                    disturbed=[],
                    differed_before=False,
                    fidelity="",
                )
    finally:
        torch.set_num_threads(threads_before)
    return outcomes


def main() -> None:
    """Be the second process."""
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is deprecated", DeprecationWarning)
    folder = Path(sys.argv[1])
    torch.save(run_all(run_second, folder), folder / CHILD_RESULTS)


if __name__ == "__main__":
    main()
