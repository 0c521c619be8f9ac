"""FACTS, ``torch.nn.utils.parametrize``: what plain torch gets wrong is what orthoserde must get right.

A test shows the trap first, in plain torch (see ``trap`` in conftest), and then what orthoserde makes of that state.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.ao.pruning.sparsifier.utils import FakeSparsity
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode

import orthoserde
from orthoserde import Fidelity, IncompatibleModelError, UnsupportedModuleError
from tests.facts.conftest import Trap
from tests.helpers import (
    assert_same_state,
    assert_unchanged,
    bits,
    lived_in,
    raised_by,
    same_bits,
    scramble_,
    snapshot,
    surroundings,
)

MAPS = ("matrix_exp", "cayley", "householder")

#: Rows and columns of a weight: square, tall, wide.
SHAPES = ((4, 4), (6, 3), (3, 6))


def ortho(rows: int, columns: int, orthogonal_map: str = "matrix_exp", *, trivialized: bool = True) -> nn.Module:
    return orthogonal(nn.Linear(columns, rows), orthogonal_map=orthogonal_map, use_trivialization=trivialized)


def link(module: nn.Module, index: int = 0, name: str = "weight") -> nn.Module:
    """The parametrization at an index of a parametrized tensor."""
    chain = cast("dict[str, list[nn.Module]]", module.parametrizations)[name]
    return chain[index]


def original(module: nn.Module, name: str = "original") -> nn.Parameter:
    """An unconstrained tensor of a parametrized weight."""
    found = module.get_parameter(f"parametrizations.weight.{name}")
    assert isinstance(found, nn.Parameter)
    return found


def base_of(module: nn.Module, index: int = 0) -> Tensor | None:
    return cast("Tensor | None", link(module, index).base)


def needed(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


def weight_of(module: nn.Module) -> Tensor:
    """The computed weight, in evaluation mode so that spectral_norm does not move."""
    with torch.no_grad():
        return cast("Tensor", copy.deepcopy(module).eval().weight).clone()


def train(module: nn.Module, steps: int = 3, lr: float = 0.05) -> nn.Module:
    """Train with plain SGD on fixed data."""
    optimizer = torch.optim.SGD(module.parameters(), lr=lr)
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(module, step).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return module


def loss_of(module: nn.Module, step: int = 0) -> Tensor:
    size = int(cast("int", module.in_features))
    x = torch.linspace(-1, 1, 5 * size).reshape(5, size) + 0.1 * step
    return cast("Tensor", module(x)).tanh().square().sum()


class Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the names of the operators that run inside of it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, func: object, types: object, args: tuple[object, ...] = (), kwargs: dict[str, object] | None = None
    ) -> object:
        self.names.add(str(func).split(".")[1])
        return cast("Callable[..., object]", func)(*args, **(kwargs or {}))


# Orthogonal: what it is made of


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("trivialized", [True, False])
@pytest.mark.parametrize("orthogonal_map", MAPS)
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_a_trained_orthogonal_weight_comes_back_bit_for_bit(
    tmp_path: Path, rows: int, columns: int, orthogonal_map: str, trivialized: bool, trap: Trap
) -> None:
    model = ortho(rows, columns, orthogonal_map, trivialized=trivialized)
    if trivialized:
        n = max(rows, columns)
        base = needed(base_of(model))
        trap(tuple(base.shape) == (n, n), "the base is square, as long as the longer side")
        trap(tuple(original(model).shape) == (rows, columns), "original has the shape of the weight")
        at_start = bits(base)
        initial = -torch.eye(rows, columns)
        trap(torch.equal(original(model), initial), "original begins at the negative identity")
    train(model)
    if trivialized:
        trap(bits(needed(base_of(model))) == at_start, "training does not change the base")
    orthoserde.save(model, tmp_path / "model")
    live = ortho(rows, columns, orthogonal_map, trivialized=trivialized)
    bare = nn.Linear(columns, rows)
    for other in (live, bare):
        assert orthoserde.load(other, tmp_path / "model").fidelity is Fidelity.EXACT
        assert_same_state(model, other)
        assert same_bits(weight_of(model), weight_of(other))
    for module in (model, live, bare):
        train(module)
    assert_same_state(model, live)
    assert_same_state(model, bare)


def test_loading_draws_no_random_numbers_where_registering_and_assigning_do(tmp_path: Path, trap: Trap) -> None:
    model = ortho(6, 3)
    before = torch.get_rng_state()
    other = ortho(6, 3)
    trap(not torch.equal(before, torch.get_rng_state()), "registering orthogonal consumes the random generator")
    before = torch.get_rng_state()
    other.weight = weight_of(model)
    trap(not torch.equal(before, torch.get_rng_state()), "assigning to an orthogonal weight consumes it too")
    orthoserde.save(model, tmp_path / "model")
    for target in (other, nn.Linear(3, 6)):
        around = surroundings()
        orthoserde.load(target, tmp_path / "model")
        assert surroundings() == around


def test_attaching_runs_no_factorisation_and_evaluates_no_map(tmp_path: Path, trap: Trap) -> None:
    forbidden = {"geqrf", "linalg_qr", "orgqr", "linalg_householder_product", "matrix_exp", "linalg_matrix_exp"}
    forbidden |= {"linalg_solve", "linalg_solve_ex", "_linalg_solve_ex", "normal_", "randn", "mm", "bmm", "matmul"}
    with Operators() as registering:
        model = ortho(6, 3)
        weight_of(model)
    trap("geqrf" in registering.names, "registering orthogonal factorises")
    trap("linalg_matrix_exp" in registering.names, "evaluating it exponentiates")
    bare = nn.Linear(3, 6)
    with Operators() as ours:
        orthoserde.save(model, tmp_path / "model")
        orthoserde.load(bare, tmp_path / "model")
    assert parametrize.is_parametrized(bare, "weight")
    assert "copy_" in ours.names or "detach" in ours.names
    assert not ours.names & forbidden


def test_neither_save_nor_load_evaluates_a_torch_parametrization(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make() -> nn.Module:
        return nn.Sequential(ortho(4, 4), spectral_norm(nn.Linear(4, 4)), weight_norm(nn.Linear(4, 4)))

    def refuse(*args: object) -> Tensor:
        raise AssertionError("a parametrization was evaluated")

    model, live = make(), make()
    for module in model.children():
        for name in ("forward", "right_inverse"):
            monkeypatch.setattr(type(link(module)), name, refuse)
    bare = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    orthoserde.save(model, tmp_path / "model")
    for target in (live, bare):
        orthoserde.load(target, tmp_path / "model")
        assert_same_state(model, target)


# Orthogonal: strides


@pytest.mark.parametrize("orthogonal_map", MAPS)
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_a_column_major_base_is_saved_and_made_again_column_major(
    tmp_path: Path, rows: int, columns: int, orthogonal_map: str, trap: Trap
) -> None:
    model = ortho(rows, columns, orthogonal_map)
    base = needed(base_of(model))
    trap(base.stride() == (1, max(rows, columns)), "the base is column-major")
    error = raised_by(lambda: safetensors.torch.save_file(model.state_dict(), tmp_path / "plain"))
    trap("contiguous" in str(error), "safetensors refuses to save a column-major base")
    orthoserde.save(model, tmp_path / "model")
    with torch.device("meta"):
        bare = nn.Linear(columns, rows)
    orthoserde.load(bare, tmp_path / "model")
    made = needed(base_of(bare))
    assert made.stride() == base.stride()
    assert same_bits(made, base)


def test_a_load_into_existing_tensors_keeps_the_strides_they_have(tmp_path: Path) -> None:
    model, other = ortho(6, 3), ortho(6, 3)
    contiguous = needed(base_of(other)).contiguous()
    link(other)._buffers["base"] = contiguous
    orthoserde.save(model, tmp_path / "model")
    orthoserde.load(other, tmp_path / "model")
    assert base_of(other) is contiguous
    assert contiguous.stride() == (6, 1)
    assert_same_state(model, other, strides=False)


@pytest.mark.usefixtures("one_thread")
def test_adam_goes_on_bit_for_bit_after_a_load_in_place(tmp_path: Path, trap: Trap) -> None:
    size, warm, steps = 48, 5, 40

    def run(module: nn.Module, optimizer: torch.optim.Optimizer, first: int, count: int) -> list[float]:
        losses: list[float] = []
        for step in range(first, first + count):
            optimizer.zero_grad()
            loss = loss_of(module, step % 7)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses.append(float(loss.detach()))
        return losses

    def adam(module: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.Adam(module.parameters(), lr=1e-2)

    model = ortho(size, size // 2, "cayley")
    optimizer = adam(model)
    run(model, optimizer, 0, warm)
    orthoserde.save(model, tmp_path / "model")
    saved, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    expected = run(model, optimizer, warm, steps)

    def resume(load: Callable[[nn.Module], object]) -> list[float]:
        other = ortho(size, size // 2, "cayley")
        its_optimizer = adam(other)
        load(other)
        its_optimizer.load_state_dict(copy.deepcopy(state))
        return run(other, its_optimizer, warm, steps)

    def assign(other: nn.Module) -> None:
        other.load_state_dict({key: tensor.contiguous() for key, tensor in saved.items()}, assign=True)

    def through_right_inverse(other: nn.Module) -> None:
        reference = ortho(size, size // 2, "cayley")
        reference.load_state_dict(saved)
        with torch.no_grad():
            other.weight = weight_of(reference)
            other.get_parameter("bias").copy_(saved["bias"])

    projected = resume(through_right_inverse)
    trap(abs(projected[0] - expected[0]) < 1e-4, "through right_inverse the first loss is the same")
    trap(max(abs(a - b) for a, b in zip(projected, expected, strict=True)) > 1e-4, "and the later ones are not")
    contiguous = resume(assign)
    trap(contiguous != expected, "with assign=True and a contiguous base they are not either")
    assert resume(lambda other: orthoserde.load(other, tmp_path / "model")) == expected


# Configuration


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2


class Tripled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 3


def with_link(parametrization: nn.Module) -> nn.Module:
    module = nn.Linear(4, 4)
    parametrize.register_parametrization(module, "weight", parametrization)
    return module


Make = Callable[[], nn.Module]

CONFIGURATIONS: dict[str, tuple[Make, Make, tuple[str, ...]]] = {
    "cayley into matrix_exp": (
        lambda: ortho(4, 4, "cayley"),
        lambda: ortho(4, 4, "matrix_exp"),
        ("orthogonal_map", "'cayley'", "'matrix_exp'"),
    ),
    "householder into cayley": (
        lambda: ortho(6, 3, "householder"),
        lambda: ortho(6, 3, "cayley"),
        ("orthogonal_map", "'householder'", "'cayley'"),
    ),
    "spectral_norm with another dim": (
        lambda: spectral_norm(nn.Linear(4, 4), dim=0),
        lambda: spectral_norm(nn.Linear(4, 4), dim=1),
        ("dim is 0 in the file, 1 in the model",),
    ),
    "spectral_norm with other iterations": (
        lambda: spectral_norm(nn.Linear(4, 4), n_power_iterations=1),
        lambda: spectral_norm(nn.Linear(4, 4), n_power_iterations=5),
        ("n_power_iterations is 1 in the file, 5 in the model",),
    ),
    "spectral_norm with another eps": (
        lambda: spectral_norm(nn.Linear(4, 4), eps=1e-12),
        lambda: spectral_norm(nn.Linear(4, 4), eps=50.0),
        ("eps is 1e-12 in the file, 50.0 in the model",),
    ),
    "one user class into another": (
        lambda: with_link(Doubled()),
        lambda: with_link(Tripled()),
        ("Doubled", "Tripled"),
    ),
}


@pytest.mark.parametrize("case", CONFIGURATIONS)
def test_a_configuration_that_the_state_dict_leaves_out_is_checked(tmp_path: Path, case: str, trap: Trap) -> None:
    make, make_other, words = CONFIGURATIONS[case]
    model, other = train(make()), make_other()
    deceived = copy.deepcopy(other)
    matched = raised_by(lambda: deceived.load_state_dict(model.state_dict())) is None
    trap(matched, "torch says that all keys matched")
    for module in (model, deceived):  # in training mode, so that the number of power iterations shows
        loss_of(module)
    differs = [
        not torch.equal(weight_of(model), weight_of(deceived)),
        not torch.equal(cast("Tensor", model.weight), cast("Tensor", deceived.weight)),
    ]
    trap(any(differs), "and the weight is another one")
    orthoserde.save(model, tmp_path / "model")
    before = snapshot(lived_in(other))
    with pytest.raises(IncompatibleModelError) as caught:
        orthoserde.load(other, tmp_path / "model")
    assert_unchanged(other, before)
    assert [(problem.where, problem.kind) for problem in caught.value.problems] == [("weight", "mismatch")]
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: ortho(4, 4), id="orthogonal"),
        pytest.param(lambda: ortho(6, 3, "householder", trivialized=False), id="householder without trivialization"),
        pytest.param(lambda: ortho(6, 3, "cayley", trivialized=False), id="cayley without trivialization"),
        pytest.param(lambda: spectral_norm(nn.Linear(3, 6)), id="spectral_norm"),
        pytest.param(lambda: weight_norm(nn.Linear(3, 6)), id="weight_norm"),
    ],
)
def test_a_plain_weight_is_refused_by_name_instead_of_projected(tmp_path: Path, make: Make, trap: Trap) -> None:
    model = make()
    # This weight is on the constraint of any norm, so there it is refused only to whoever wants no computed weights.
    (record,) = orthoserde.parametrized_tensors(model)
    free = type(record.parametrizations[0]).__name__ != "_Orthogonal"
    rows, columns = cast("Tensor", model.weight).shape
    plain = nn.Linear(columns, rows)
    projected = copy.deepcopy(model)

    def assign() -> None:
        projected.weight = plain.weight.detach()

    error = raised_by(assign)
    outcome = isinstance(error, NotImplementedError) or not torch.equal(weight_of(projected), plain.weight.detach())
    trap(outcome, "assigning projects in silence, or is not implemented")
    orthoserde.save(plain, tmp_path / "ours")
    safetensors.torch.save_file(plain.state_dict(), tmp_path / "foreign")
    before = snapshot(lived_in(model))
    for name in ("ours", "foreign"):
        for strict in (True, False):
            with pytest.raises(IncompatibleModelError, match="computed weight") as caught:
                orthoserde.load(model, tmp_path / name, strict=strict, legacy="refuse" if free else "inference")
            assert_unchanged(model, before)
            assert [(problem.where, problem.kind) for problem in caught.value.problems] == [("weight", "mismatch")]


# Bases that torch leaves out


@pytest.mark.parametrize(("rows", "columns"), [(6, 3), (3, 6)])
def test_a_base_that_torch_left_out_on_the_meta_device_is_made(
    tmp_path: Path, rows: int, columns: int, trap: Trap
) -> None:
    model = train(ortho(rows, columns))
    with torch.device("meta"):
        skeleton = ortho(rows, columns)
    trap(base_of(skeleton) is None, "on the meta device a tall or wide orthogonal registers without its base")
    error = raised_by(lambda: skeleton.load_state_dict(model.state_dict(), assign=True))
    trap("Unexpected key" in str(error) and "base" in str(error), "and then torch cannot load it")
    with torch.device("meta"):
        skeleton = ortho(rows, columns)
    parameters = dict(skeleton.named_parameters())
    orthoserde.save(model, tmp_path / "model")
    assert orthoserde.load(skeleton, tmp_path / "model").fidelity is Fidelity.EXACT
    assert_same_state(model, skeleton)
    assert all(skeleton.get_parameter(name) is parameter for name, parameter in parameters.items())
    assert_same_state(train(model), train(skeleton))


def test_a_square_orthogonal_that_torch_cannot_register_on_the_meta_device_is_attached(
    tmp_path: Path, trap: Trap
) -> None:
    model = train(ortho(4, 4))

    def register() -> None:
        with torch.device("meta"):
            ortho(4, 4)

    trap(raised_by(register) is not None, "on the meta device a square orthogonal raises")
    with torch.device("meta"):
        bare = nn.Linear(4, 4)
    weight, bias = bare.weight, bare.bias
    orthoserde.save(model, tmp_path / "model")
    assert orthoserde.load(bare, tmp_path / "model").fidelity is Fidelity.EXACT
    assert_same_state(model, bare)
    assert original(bare) is weight
    assert bare.bias is bias


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_base_that_torch_left_out_in_half_precision_is_made(tmp_path: Path, dtype: torch.dtype, trap: Trap) -> None:
    model = ortho(6, 3, "householder").to(dtype)  # the map that torch chooses for a tall weight
    half = nn.Linear(3, 6, dtype=dtype)
    error = raised_by(lambda: orthogonal(half))
    registered = error is None and parametrize.is_parametrized(half)
    trap(registered and base_of(half) is None, "in half precision orthogonal registers without its base")
    orthoserde.save(model, tmp_path / "model")
    # Where torch raises instead, the module is still bare, and the load attaches.
    target = half if registered else nn.Linear(3, 6, dtype=dtype)
    assert orthoserde.load(target, tmp_path / "model").fidelity is Fidelity.EXACT
    assert_same_state(model, target)


def test_stacked_orthogonal_whose_second_base_torch_leaves_out_makes_a_round_trip(tmp_path: Path, trap: Trap) -> None:
    def make() -> nn.Module:
        return orthogonal(ortho(6, 3, "cayley"), orthogonal_map="cayley")

    model = scramble_(make())
    trap(base_of(model, 0) is not None and base_of(model, 1) is None, "the second of two orthogonals has no base")
    trap(raised_by(lambda: model.weight) is not None, "and cannot be evaluated")
    orthoserde.save(model, tmp_path / "model")
    other = make()
    assert orthoserde.load(other, tmp_path / "model").fidelity is Fidelity.EXACT
    assert_same_state(model, other)
    bare = nn.Linear(3, 6)
    assert orthoserde.load(bare, tmp_path / "model").fidelity is Fidelity.EXACT
    assert_same_state(model, bare)


def test_weight_norm_over_orthogonal_which_torch_builds_and_cannot_evaluate_makes_a_round_trip(
    tmp_path: Path, trap: Trap
) -> None:
    def make() -> nn.Module:
        module: nn.Module = weight_norm(orthogonal(nn.Linear(3, 6)))
        return module

    model, other = make(), make()
    trap(isinstance(raised_by(lambda: model.weight), TypeError), "weight_norm gets one tensor where it needs two")
    orthoserde.save(scramble_(model), tmp_path / "model")
    assert orthoserde.load(other, tmp_path / "model").fidelity is Fidelity.EXACT
    assert_same_state(model, other)


# Originals and dtypes


@pytest.mark.parametrize("orthogonal_map", MAPS)
def test_an_original_that_weight_decay_has_moved_is_restored_as_it_is(
    tmp_path: Path, orthogonal_map: str, trap: Trap
) -> None:
    model = ortho(6, 3, orthogonal_map)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loss_of(model).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    diagonal = original(model).detach().diagonal()
    assert 0 < float((diagonal + 1).abs().max()) < 0.01
    if orthogonal_map == "householder":
        trap(float(weight_of(model).norm()) == 0.0, "one step of AdamW with its default weight decay zeroes the weight")
    orthoserde.save(model, tmp_path / "model")
    for other in (ortho(6, 3, orthogonal_map), nn.Linear(3, 6)):
        assert orthoserde.load(other, tmp_path / "model").fidelity is Fidelity.EXACT
        assert_same_state(model, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_householder_is_saved_and_loaded_though_torch_cannot_evaluate_it(
    tmp_path: Path, dtype: torch.dtype, trap: Trap
) -> None:
    model = ortho(6, 3, "householder").to(dtype)
    trap(raised_by(lambda: model.weight) is not None, "householder in half precision raises on access")
    orthoserde.save(model, tmp_path / "model")
    for other in (ortho(6, 3, "householder").to(dtype), nn.Linear(3, 6, dtype=dtype)):
        assert orthoserde.load(other, tmp_path / "model").fidelity is Fidelity.EXACT
        assert_same_state(model, other)


def test_a_bfloat16_file_in_a_float32_model_is_unverified_and_off_the_constraint(tmp_path: Path, trap: Trap) -> None:
    model = ortho(128, 4)
    rounded = copy.deepcopy(model).bfloat16()
    base = needed(base_of(copy.deepcopy(rounded).float()))
    error = float((base.T @ base - torch.eye(128)).abs().max())
    trap(error > 1e-3, "a round trip through bfloat16 leaves the base far off the constraint")
    orthoserde.save(rounded, tmp_path / "model")
    report = orthoserde.load(model, tmp_path / "model")
    assert_same_state(rounded.float(), model)
    assert report.fidelity is Fidelity.UNVERIFIED
    assert report.tensors["weight"].fidelity is Fidelity.UNVERIFIED
    residual = report.tensors["weight"].residual
    assert residual is not None
    assert residual > 1e-4


def test_a_float32_file_in_a_bfloat16_model_is_refused(tmp_path: Path) -> None:
    orthoserde.save(ortho(6, 3), tmp_path / "model")
    model = ortho(6, 3).bfloat16()
    before = snapshot(lived_in(model))
    with pytest.raises(IncompatibleModelError, match="cannot hold it exactly") as caught:
        orthoserde.load(model, tmp_path / "model")
    assert_unchanged(model, before)
    keys = ["bias", "parametrizations.weight.original", "parametrizations.weight.0.base"]
    assert sorted(problem.where for problem in caught.value.problems) == sorted(keys)


# Saving, copying


def test_saving_leaves_the_power_iteration_where_it_is_where_reading_the_weight_moves_it(
    tmp_path: Path, trap: Trap
) -> None:
    model = spectral_norm(nn.Linear(5, 4)).train()
    moved = copy.deepcopy(model)
    _ = moved.weight
    vectors = [cast("Tensor", link(module)._u) for module in (model, moved)]
    trap(not torch.equal(*vectors), "reading a spectral_norm weight in training mode moves _u")
    before = snapshot(model)
    orthoserde.save(model, tmp_path / "model")
    assert_unchanged(model, before)
    other = spectral_norm(nn.Linear(5, 4)).train()
    orthoserde.load(other, tmp_path / "model")
    assert_same_state(model, other)
    assert_same_state(train(model), train(other))


def test_a_deep_copy_saves_to_the_same_bytes_where_pickle_raises(tmp_path: Path, trap: Trap) -> None:
    model = nn.Sequential(train(ortho(6, 3)), spectral_norm(nn.Linear(3, 3)), weight_norm(nn.Linear(3, 3)))
    error = raised_by(lambda: torch.save(model, tmp_path / "pickle"))
    trap(error is not None, "torch.save of a whole parametrized model raises")
    orthoserde.save(model, tmp_path / "model")
    orthoserde.save(copy.deepcopy(model), tmp_path / "copy")
    assert (tmp_path / "model").read_bytes() == (tmp_path / "copy").read_bytes()


# Old hooks


def old_hook(name: str) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        make: Callable[[nn.Module], nn.Module] = getattr(torch.nn.utils, name)
        return make(nn.Linear(3, 4))


@pytest.mark.parametrize("name", ["weight_norm", "spectral_norm"])
def test_old_hooks_make_a_round_trip_of_their_own(tmp_path: Path, name: str) -> None:
    model, other = old_hook(name), old_hook(name)
    x = torch.ones(2, 3)
    model(x)
    orthoserde.save(model, tmp_path / "model")
    assert orthoserde.load(other, tmp_path / "model").fidelity is Fidelity.EXACT
    assert_same_state(model, other)
    assert same_bits(model.eval()(x), other.eval()(x))


@pytest.mark.parametrize(
    ("saved", "target", "fidelity"),
    [
        pytest.param("old weight_norm", "new weight_norm", Fidelity.EXACT, id="weight_norm"),
        pytest.param("new weight_norm", "old weight_norm", Fidelity.EXACT, id="weight_norm backwards"),
        pytest.param("old spectral_norm", "new spectral_norm", Fidelity.UNVERIFIED, id="spectral_norm"),
        pytest.param("new spectral_norm", "old spectral_norm", Fidelity.UNVERIFIED, id="spectral_norm backwards"),
        pytest.param("plain", "old weight_norm", Fidelity.INFERENCE, id="plain into weight_norm"),
    ],
)
def test_keys_of_old_hooks_are_refused_by_torch_and_bridged_here(
    tmp_path: Path, saved: str, target: str, fidelity: Fidelity, trap: Trap
) -> None:
    def make(what: str) -> nn.Module:
        if what == "plain":
            return nn.Linear(3, 4)
        age, name = what.split()
        if age == "old":
            return old_hook(name)
        return weight_norm(nn.Linear(3, 4)) if name == "weight_norm" else spectral_norm(nn.Linear(3, 4))

    model, other = make(saved), make(target)
    error = raised_by(lambda: make(target).load_state_dict(model.state_dict()))
    bridged = saved == "old weight_norm" and target == "new weight_norm"
    trap((error is None) == bridged, "torch bridges weight_norm's old keys to its new ones, and nothing else")
    orthoserde.save(model, tmp_path / "model")
    with contextlib.nullcontext() if saved != "plain" else pytest.warns(orthoserde.LegacyCheckpointWarning):
        report = orthoserde.load(other, tmp_path / "model")
    assert report.fidelity is fidelity
    x = torch.ones(2, 3)
    ours, theirs = model.eval()(x), other.eval()(x)
    assert same_bits(ours, theirs) if saved != "plain" else torch.allclose(ours, theirs, rtol=1e-5)


# State dicts that leave something out


def test_the_mask_of_fake_sparsity_is_kept_although_its_state_dict_is_empty(tmp_path: Path, trap: Trap) -> None:
    mask = torch.tensor([[1.0, 0.0, 1.0, 0.0]] * 4)
    model, other = (with_link(FakeSparsity(m)) for m in (mask, torch.ones(4, 4)))  # type: ignore[no-untyped-call]
    trap(not any("mask" in key for key in model.state_dict()), "FakeSparsity leaves its mask out of the state dict")
    orthoserde.save(model, tmp_path / "model")
    report = orthoserde.load(other, tmp_path / "model")
    assert report.fidelity is Fidelity.EXACT
    assert torch.equal(cast("Tensor", link(other).mask), mask)
    assert same_bits(weight_of(model), weight_of(other))


def test_an_ema_model_makes_a_round_trip_with_its_buffers(tmp_path: Path) -> None:
    def make() -> nn.Sequential:
        return nn.Sequential(ortho(4, 3), spectral_norm(nn.Linear(4, 4)), weight_norm(nn.Linear(4, 2)))

    keep = get_ema_avg_fn(0.9)  # type: ignore[no-untyped-call]
    average = AveragedModel(make(), avg_fn=keep, use_buffers=True)
    for _ in range(3):
        average.update_parameters(make())
    orthoserde.save(average, tmp_path / "model")
    other = AveragedModel(make(), avg_fn=keep, use_buffers=True)
    report = orthoserde.load(other, tmp_path / "model")
    assert report.fidelity is Fidelity.EXACT
    assert set(report.tensors) == {"module.0.weight", "module.1.weight", "module.2.weight"}
    assert int(other.n_averaged) == 3
    assert_same_state(average, other)


# Parameters and their identity


def test_attaching_orthogonal_keeps_the_parameters_that_an_optimizer_holds(tmp_path: Path, trap: Trap) -> None:
    model = train(ortho(4, 4))
    plain = nn.Linear(4, 4)
    optimizer = torch.optim.Adam(plain.parameters())
    loss_of(plain).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    moved = torch.optim.Adam(model.parameters())
    error = raised_by(lambda: moved.load_state_dict(optimizer.state_dict()))
    state = moved.state.get(model.get_parameter("bias"), {})
    shape = tuple(state["exp_avg"].shape) if error is None and "exp_avg" in state else None
    trap(shape == (4, 4), "the state of the weight lands on the bias in silence: parametrizing reorders the parameters")
    held = [*optimizer.param_groups[0]["params"]]
    orthoserde.save(model, tmp_path / "model")
    report = orthoserde.load(plain, tmp_path / "model")
    assert not report.notes
    assert original(plain) is held[0]
    assert plain.bias is held[1]
    averages = [optimizer.state[parameter]["exp_avg"].shape for parameter in (original(plain), plain.bias)]
    assert averages == [original(plain).shape, plain.bias.shape]


def test_an_alias_that_named_modules_leaves_out_is_recorded_and_loaded(tmp_path: Path, trap: Trap) -> None:
    def make() -> nn.Sequential:
        shared = ortho(4, 4)
        return nn.Sequential(shared, nn.Tanh(), shared)

    model = make()
    names = [name for name, module in model.named_modules() if module is model[0]]
    trap(names == ["0"], "named_modules() names a shared module once")
    [record] = orthoserde.parametrized_tensors(model)
    assert (record.module_path, record.aliases) == ("0", ("2",))
    scramble_(model[0])
    report = orthoserde.save(model, tmp_path / "model")
    assert (report.tensors, report.parametrized) == (3, 1)
    assert set(report.aliases) == {key for key in model.state_dict() if key.startswith("2.")}
    other, separate = make(), nn.Sequential(ortho(4, 4), nn.Tanh(), ortho(4, 4))
    assert orthoserde.load(other, tmp_path / "model").fidelity is Fidelity.EXACT
    assert_same_state(model, other)
    before = snapshot(separate)
    with pytest.raises(IncompatibleModelError, match="tied to"):
        orthoserde.load(separate, tmp_path / "model")
    assert_unchanged(separate, before)


# Distributed


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A process group of one process on gloo."""
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("torch.distributed is built without gloo")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dist.init_process_group("gloo", init_method=(tmp_path / "store").as_uri(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def public_or_private(public: str, private: str, name: str) -> Any:
    """A function of torch.distributed that an older torch has under a private module."""
    with contextlib.suppress(ImportError):
        module = importlib.import_module(public)
        if hasattr(module, name):
            return getattr(module, name)
    return getattr(importlib.import_module(private), name)


def distribute(module: nn.Module) -> None:
    """Make DTensors of all parameters, as tensor parallelism does."""
    homes = ("torch.distributed.tensor", "torch.distributed._tensor")
    distribute_tensor, shard = (public_or_private(*homes, name) for name in ("distribute_tensor", "Shard"))
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    for name, parameter in module._parameters.items():
        if parameter is not None:
            sharded = distribute_tensor(parameter.detach(), mesh, [shard(0)])
            module._parameters[name] = nn.Parameter(sharded)
    for child in module.children():
        distribute(child)


def fully_shard(module: nn.Module) -> None:
    """FSDP2, under the private name that it had before torch 2.6."""
    shard = public_or_private("torch.distributed.fsdp", "torch.distributed._composable.fsdp", "fully_shard")
    shard(module, mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("shard", [distribute, fully_shard])
def test_sharded_parameters_are_refused_by_name_while_the_base_stays_a_plain_tensor(
    tmp_path: Path, shard: Callable[[nn.Module], None], trap: Trap
) -> None:
    model = nn.Sequential(ortho(4, 4))
    orthoserde.save(model, tmp_path / "whole")
    error = raised_by(lambda: shard(model))
    trap(error is None, "the parameters of orthogonal can be sharded")
    if error is not None:
        distribute(model)
    layer = model[0]
    trap(type(base_of(layer)) is Tensor, "the base stays a plain tensor on every rank")
    trap(type(original(layer)) is not nn.Parameter, "original becomes a DTensor")
    keys = ["0.bias", "0.parametrizations.weight.original"]
    with pytest.raises(UnsupportedModuleError, match="DTensor") as refused:
        orthoserde.save(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()
    assert sorted(problem.where for problem in refused.value.problems) == keys
    before = snapshot(model)
    with pytest.raises(IncompatibleModelError, match="DTensor") as caught:
        orthoserde.load(model, tmp_path / "whole")
    assert_unchanged(model, before)
    assert sorted(problem.where for problem in caught.value.problems) == keys
    assert {problem.kind for problem in caught.value.problems} == {"unsupported"}
