"""Live models to canonical bases: weights stay, SGD goes on as before, Adam is refused, nothing is half-done."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.optim import SGD, Adam, Optimizer

import orthoserde
from orthoserde import CanonicalizeError, CanonicalizeReport, Fidelity
from orthoserde.charts import apply
from orthoserde.orthonormal.completion import Completion, complete
from orthoserde.orthonormal.rounding import tall
from tests.helpers import assert_unchanged, bits, same_bits, snapshot
from tests.test_charts import Holder, link, weight_of

MAPS = ["matrix_exp", "cayley", "householder"]
KINDS = [(name, dtype) for name in MAPS for dtype in (torch.float32, torch.float64)]
KINDS += [(name, dtype) for name in ("matrix_exp", "cayley") for dtype in (torch.complex64, torch.complex128)]
SHAPES = [(9, 4), (4, 9), (3, 9, 4), (2, 3, 4, 9), (7, 1), (1, 7), (40, 5), (6, 5)]
BASE, ORIGINAL = "parametrizations.weight.0.base", "parametrizations.weight.original"

#: How far apart weights may be, of sizes as they are here: what was measured for 40 x 5 to 300 x 30, with some room.
APART = {torch.float32: {"matrix_exp": 8e-6, "cayley": 5e-7, "householder": 5e-7}}
APART[torch.complex64] = APART[torch.float32]
APART[torch.float64] = APART[torch.complex128] = dict.fromkeys(MAPS, 2e-8)


def torch_model(
    shape: tuple[int, ...], orthogonal_map: str, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Holder:
    """A model with torch's random base."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Holder(torch.randn(shape, dtype=dtype))
        parametrizations.orthogonal(model, orthogonal_map=orthogonal_map)
    return model


def original_of(model: nn.Module) -> nn.Parameter:
    return model.get_parameter(ORIGINAL)


def move_(model: nn.Module, seed: int = 1) -> nn.Module:
    """Let ``original`` leave its initial value; householder needs its diagonal as it is."""
    original = original_of(model)
    noise = torch.randn(original.shape, dtype=original.dtype, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        tall(original).add_(tall(noise).tril(-1), alpha=0.3)
    return model


def loss_of(model: nn.Module) -> Tensor:
    weight = weight_of(model)
    target = torch.randn(weight.shape, dtype=weight.dtype, generator=torch.Generator().manual_seed(7))
    loss: Tensor = (weight - target / max(weight.shape[-2:]) ** 0.5).abs().square().sum()
    return loss


def train(model: nn.Module, optimizer: Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model).backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def trained(
    make: Callable[[Iterator[nn.Parameter]], Optimizer], orthogonal_map: str = "householder"
) -> tuple[Holder, Optimizer]:
    """A model of 40 x 5 in the middle of a run."""
    model = torch_model((40, 5), orthogonal_map)
    optimizer = make(model.parameters())
    train(model, optimizer, 5)
    return model, optimizer


def momentum(parameters: Iterator[nn.Parameter]) -> Optimizer:
    return SGD(parameters, lr=0.05, momentum=0.9)


def adam(parameters: Iterator[nn.Parameter]) -> Optimizer:
    return Adam(parameters, lr=0.01)


def state_bits(optimizer: Optimizer) -> dict[tuple[int, str], object]:
    """All that an optimizer keeps, by parameter and name; the identity of its tensors is part of it."""
    return {
        (id(parameter), name): (id(value), bits(value)) if isinstance(value, Tensor) else value
        for parameter, state in optimizer.state.items()
        for name, value in state.items()
    }


def refused(model: nn.Module, optimizer: Optimizer | list[Optimizer] | bool | None = None) -> CanonicalizeError:
    """The error, once it is known that nothing has changed."""
    optimizers = [optimizer] if isinstance(optimizer, Optimizer) else optimizer if isinstance(optimizer, list) else []
    before, states = snapshot(model), [state_bits(each) for each in optimizers]
    given = None if optimizer is None else optimizers
    with pytest.raises(CanonicalizeError) as caught:
        orthoserde.canonicalize_(model, optimizer=given)
    assert_unchanged(model, before)
    assert [state_bits(each) for each in optimizers] == states
    return caught.value


def largest_difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).detach().abs().max())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("orthogonal_map", "dtype"), KINDS, ids=str)
def test_the_weight_stays_and_the_base_becomes_canonical(
    shape: tuple[int, ...], orthogonal_map: str, dtype: torch.dtype
) -> None:
    model = move_(torch_model(shape, orthogonal_map, dtype))
    before, weight, original = snapshot(model), weight_of(model).detach(), original_of(model)
    values, base, k = original.detach().clone(), model.get_buffer(BASE).clone(), min(shape[-2:])
    report = orthoserde.canonicalize_(model, optimizer=False)
    after = model.get_buffer(BASE)
    assert same_bits(after, complete(base[..., :k]))
    assert after.stride() == complete(base[..., :k]).stride()
    assert original_of(model) is original
    assert torch.equal(tall(original)[..., :k, :], tall(values)[..., :k, :])
    assert not torch.allclose(original, values) or max(shape) - k == 1  # a single column may turn by 1
    change = largest_difference(weight_of(model), weight)
    assert change <= APART[dtype][orthogonal_map]
    assert report.weight_change == report.tensors["weight"].weight_change == pytest.approx(change, rel=1e-6)
    assert report.canonicalized == ("weight",)
    assert report.tensors["weight"].rotated == ("original",)
    assert snapshot(model).surroundings == before.surroundings


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("orthogonal_map", MAPS)
def test_at_the_initial_value_nothing_but_the_base_changes(shape: tuple[int, ...], orthogonal_map: str) -> None:
    model = torch_model(shape, orthogonal_map).eval().requires_grad_(False)
    base, weight, kept = model.get_buffer(BASE), weight_of(model).detach(), snapshot(model)
    columns = base[..., : min(shape[-2:])].clone()
    report = orthoserde.canonicalize_(model)
    assert model.get_buffer(BASE) is base
    assert same_bits(base, complete(columns))
    assert same_bits(weight_of(model), weight)
    assert report.weight_change == 0.0
    assert report.tensors["weight"].rotated == ()
    link(model)._buffers["base"] = None
    before = {path: state.tensors for path, state in kept.modules.items()}
    del before["parametrizations.weight.0"]["base"]
    assert all(now.tensors.keys() == before[path].keys() for path, now in snapshot(model).modules.items())
    for path, now in snapshot(model).modules.items():
        for name, tensor in before[path].items():
            assert not list(tensor.differences(name, now.tensors[name]))
    assert snapshot(model).surroundings == kept.surroundings
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("orthogonal_map", MAPS)
@pytest.mark.parametrize(
    "options",
    [
        {"momentum": 0.9},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
        {"momentum": 0.9, "dampening": 0.5, "maximize": True},
        {"momentum": 0.9, "foreach": True},
        {},
    ],
    ids=str,
)
def test_sgd_goes_on_as_if_nothing_had_happened(orthogonal_map: str, options: dict[str, float]) -> None:
    # Weight decay would move the diagonal of householder's original off -1, where torch reads it as 0.
    options = {
        name: value for name, value in options.items() if (name, orthogonal_map) != ("weight_decay", "householder")
    }
    model, optimizer = trained(lambda parameters: SGD(parameters, lr=0.02, **options), orthogonal_map)  # type: ignore[arg-type]
    twin = copy.deepcopy(model)
    other = SGD(twin.parameters(), lr=0.02, **options)  # type: ignore[arg-type]
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    buffer = optimizer.state[original_of(model)].get("momentum_buffer")
    report = orthoserde.canonicalize_(model, optimizer=optimizer)
    turned = {"original", "its gradient"} | ({"momentum_buffer of SGD"} if options else set())
    assert set(report.tensors["weight"].rotated) == turned
    assert optimizer.state[original_of(model)].get("momentum_buffer") is buffer
    # Where it climbs there is no minimum that pulls roundings back.
    apart = APART[torch.float32][orthogonal_map] * (2 if "maximize" in options else 1)
    for _ in range(50):
        train(model, optimizer, 1)
        train(twin, other, 1)
        assert largest_difference(weight_of(model), weight_of(twin)) <= apart
    assert largest_difference(original_of(model), original_of(twin)) > 1e-3


@settings(deadline=None, max_examples=25)
@given(
    n=st.integers(1, 24),
    k=st.integers(1, 24),
    batch=st.sampled_from([(), (2,)]),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 2**16),
)
def test_the_trajectory_of_sgd_does_not_depend_on_the_chart(
    n: int, k: int, batch: tuple[int, ...], kind: tuple[str, torch.dtype], seed: int
) -> None:
    orthogonal_map, dtype = kind
    model = torch_model((*batch, n, k), orthogonal_map, dtype, seed)
    optimizer = momentum(model.parameters())
    train(model, optimizer, 3)
    twin = copy.deepcopy(model)
    other = momentum(twin.parameters())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    orthoserde.canonicalize_(model, optimizer=optimizer)
    for _ in range(50):
        train(model, optimizer, 1)
        train(twin, other, 1)
    # Small matrices are farther from their targets, and turn through large angles: roundings count for more.
    assert largest_difference(weight_of(model), weight_of(twin)) <= 10 * APART[dtype][orthogonal_map]


@pytest.mark.parametrize("orthogonal_map", MAPS)
def test_a_gradient_that_waits_for_a_step_turns_along(orthogonal_map: str) -> None:
    model, optimizer = trained(momentum, orthogonal_map)
    twin = copy.deepcopy(model)
    other = momentum(twin.parameters())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.zero_grad()
    for each in (model, twin):
        loss_of(each).backward()  # type: ignore[no-untyped-call]
    gradient = original_of(model).grad
    orthoserde.canonicalize_(model, optimizer=optimizer)
    assert original_of(model).grad is gradient
    optimizer.step()
    other.step()
    assert largest_difference(weight_of(model), weight_of(twin)) <= APART[torch.float32][orthogonal_map]


def test_adam_is_refused_by_name() -> None:
    model, optimizer = trained(adam)
    error = refused(model, optimizer)
    (problem,) = error.problems
    assert problem.where == "weight"
    for word in ("Adam", "exp_avg, exp_avg_sq, step", "reset_state=True", "another way"):
        assert word in problem.text
    assert "nothing was changed" in str(error)


def test_adam_starts_afresh_for_these_tensors_alone_when_told_to() -> None:
    first, second = parametrizations.orthogonal(nn.Linear(8, 3)), nn.Linear(3, 3)
    model = nn.Sequential(first, second)
    optimizer = Adam(model.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(2, 8)).square().sum().backward()
        optimizer.step()
    original = original_of(first)
    kept = {key: value for key, value in state_bits(optimizer).items() if key[0] != id(original)}
    weight = weight_of(first).detach()
    report = orthoserde.canonicalize_(model, optimizer=optimizer, reset_state=True)
    assert original not in optimizer.state
    assert state_bits(optimizer) == kept
    assert report.tensors["0.weight"].reset == ("exp_avg, exp_avg_sq, step of Adam",)
    assert "reset: exp_avg, exp_avg_sq, step of Adam" in str(report)
    assert largest_difference(weight_of(first), weight) <= 5e-7
    model(torch.ones(2, 8)).square().sum().backward()
    optimizer.step()
    assert float(optimizer.state[original]["step"]) == 1
    assert float(optimizer.state[second.weight]["step"]) == 4


@pytest.mark.parametrize("orthogonal_map", MAPS)
def test_before_training_adam_goes_the_way_of_a_canonical_base(orthogonal_map: str) -> None:
    model = torch_model((40, 5), orthogonal_map)
    optimizer = adam(model.parameters())
    twin = Holder(weight_of(model).detach().clone())
    orthoserde.orthogonal(twin, orthogonal_map=orthogonal_map)
    orthoserde.canonicalize_(model, optimizer=optimizer)
    train(model, optimizer, 10)
    train(twin, adam(twin.parameters()), 10)
    assert same_bits(weight_of(model), weight_of(twin))


def test_state_of_counters_and_zeros_is_not_in_the_way() -> None:
    model = torch_model((9, 4), "cayley")
    optimizer = Adam(model.parameters(), lr=0.01)
    original_of(model).grad = torch.zeros(9, 4)
    optimizer.step()
    states = state_bits(optimizer)
    assert states
    report = orthoserde.canonicalize_(model, optimizer=optimizer)
    assert report.tensors["weight"].reset == ()
    assert state_bits(optimizer) == states


def test_once_training_has_begun_the_optimizer_must_be_given() -> None:
    model = move_(torch_model((9, 4), "householder"))
    assert "optimizer=False" in str(refused(model))
    with_gradient = torch_model((9, 4), "householder")
    loss_of(with_gradient).backward()  # type: ignore[no-untyped-call]
    assert "has a gradient" in str(refused(with_gradient))
    orthoserde.canonicalize_(model, optimizer=False)
    orthoserde.canonicalize_(with_gradient, optimizer=[])
    # Now there is nothing left to ask about.
    before = snapshot(model)
    report = orthoserde.canonicalize_(model)
    assert_unchanged(model, before)
    assert report.tensors["weight"].action == "left as it is: its base is canonical already"
    assert str(report).startswith("canonicalized 0 of 1 orthogonal weights\n")


def test_an_optimizer_of_something_else_is_refused() -> None:
    model = move_(torch_model((9, 4), "householder"))
    other = SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    assert "no optimizer that was given holds it" in str(refused(model, other))
    model.requires_grad_(False)
    orthoserde.canonicalize_(model, optimizer=other)


def test_state_of_every_optimizer_goes_along() -> None:
    model, optimizer = trained(momentum)
    second = momentum(model.parameters())
    second.step()
    twin, copied = copy.deepcopy((model, optimizer))
    orthoserde.canonicalize_(twin, optimizer=copied)
    expected = copied.state[original_of(twin)]["momentum_buffer"]
    assert not torch.allclose(expected, optimizer.state[original_of(model)]["momentum_buffer"])
    report = orthoserde.canonicalize_(model, optimizer=iter([optimizer, second, optimizer]))
    assert report.tensors["weight"].rotated == (
        *("original", "its gradient", "momentum_buffer of SGD", "momentum_buffer of SGD (2)"),
    )
    first, other = (each.state[original_of(model)]["momentum_buffer"] for each in (optimizer, second))
    gradient = original_of(model).grad
    assert gradient is not None
    torch.testing.assert_close(other, gradient)
    assert same_bits(first, expected)


class OwnSGD(SGD):
    """May compute anything."""


@pytest.mark.parametrize(
    ("make", "entry", "message"),
    [
        (lambda p: OwnSGD(p, lr=0.01, momentum=0.9), {}, "OwnSGD holds momentum_buffer"),
        (lambda p: torch.optim.RMSprop(p, lr=0.01), {}, "RMSprop holds square_avg, step"),
        (lambda p: torch.optim.Rprop(p, lr=0.01), {}, "Rprop holds"),
        (lambda p: torch.optim.LBFGS(p, lr=0.01, max_iter=2), {}, "LBFGS keeps one history"),
        (momentum, {"norm": 3.0}, "only a momentum_buffer is known"),
        (momentum, {"momentum_buffer": torch.ones(3, 3)}, r"float32 of shape \[3, 3\]"),
        (momentum, {"momentum_buffer": torch.ones(40, 5, dtype=torch.int64)}, r"torch.int64"),
        (momentum, {"momentum_buffer": torch.full((40, 5), torch.nan)}, "NaN"),
        (momentum, {"momentum_buffer": torch.ones(1, 1).expand(40, 5)}, "cannot be overwritten"),
        (momentum, {"momentum_buffer": torch.ones(40, 5, requires_grad=True)}, "cannot be overwritten"),
        (momentum, {"momentum_buffer": torch.ones(40, 5).to_sparse()}, "not an ordinary tensor"),
        (momentum, {"momentum_buffer": torch.ones(40, 5, device="meta")}, "not an ordinary tensor"),
        (momentum, {"momentum_buffer": "lost"}, "only a momentum_buffer is known"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_state_that_cannot_go_along_is_refused(
    make: Callable[[Iterator[nn.Parameter]], Optimizer], entry: dict[str, object], message: str
) -> None:
    model = torch_model((40, 5), "householder")
    optimizer = make(model.parameters())
    for _ in range(2):

        def closure() -> float:
            optimizer.zero_grad()
            loss = loss_of(model)
            loss.backward()  # type: ignore[no-untyped-call]
            return float(loss.detach())

        optimizer.step(closure)
    optimizer.state[original_of(model)].update(entry)
    before = snapshot(model)
    with pytest.raises(CanonicalizeError, match=message):
        orthoserde.canonicalize_(model, optimizer=optimizer)
    assert_unchanged(model, before)
    if not isinstance(optimizer, torch.optim.LBFGS):
        orthoserde.canonicalize_(model, optimizer=optimizer, reset_state=True)
        assert original_of(model) not in optimizer.state


class AcceleratedOptimizer(Optimizer):
    """As accelerate's wrapper is: an optimizer that hands everything on."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    def __getattribute__(self, name: str) -> Any:
        own = object.__getattribute__(self, "__dict__")
        return own[name] if name in own else getattr(own["optimizer"], name)


AcceleratedOptimizer.__module__ = "accelerate.optimizer"


@pytest.mark.parametrize(
    "give",
    [
        lambda optimizer: {"main": optimizer},
        lambda optimizer: [optimizer, optimizer],
        AcceleratedOptimizer,
        lambda optimizer: {"main": AcceleratedOptimizer(optimizer)},
    ],
    ids=["by name", "twice", "of accelerate", "both"],
)
def test_optimizers_are_taken_as_a_save_takes_them(give: Callable[[Optimizer], Any]) -> None:
    model = torch_model((40, 5), "householder")
    optimizer = momentum(model.parameters())
    train(model, optimizer, 2)
    before = optimizer.state[original_of(model)]["momentum_buffer"].clone()
    report = orthoserde.canonicalize_(model, optimizer=give(optimizer))
    assert report.canonicalized
    assert not torch.equal(optimizer.state[original_of(model)]["momentum_buffer"], before)


def test_a_wrapper_that_keeps_its_state_elsewhere_is_refused() -> None:
    model = torch_model((40, 5), "householder")
    optimizer = adam(model.parameters())
    train(model, optimizer, 1)
    wrapper: Any = SimpleNamespace(
        param_groups=optimizer.param_groups, state={}, state_dict=optimizer.state_dict, load_state_dict=None
    )
    before = snapshot(model)
    with pytest.raises(TypeError, match="got SimpleNamespace; give the optimizer that is inside of it"):
        orthoserde.canonicalize_(model, optimizer=wrapper)
    assert_unchanged(model, before)


@pytest.mark.parametrize("optimizer", [True, 3, [nn.Linear(2, 2)], nn.Linear(2, 2), {"a": None}], ids=str)
def test_what_is_no_optimizer_is_a_type_error(optimizer: object) -> None:
    with pytest.raises(TypeError, match=r"^optimizer.*: expected a torch.optim.Optimizer, got .*; if there is "):
        orthoserde.canonicalize_(nn.Linear(2, 2), optimizer=optimizer)  # type: ignore[arg-type]


def test_what_is_no_module_is_a_type_error() -> None:
    with pytest.raises(TypeError, match=r"expected an nn\.Module"):
        orthoserde.canonicalize_(3)  # type: ignore[arg-type]


def test_a_canonicalized_run_is_saved_compactly_and_loads_exactly(tmp_path: Path) -> None:
    model, optimizer = trained(momentum)
    with pytest.raises(orthoserde.ConfigError, match="canonicalize"):
        orthoserde.save(model, tmp_path / "model", base="compact")
    orthoserde.canonicalize_(model, optimizer=optimizer)
    assert orthoserde.save(model, tmp_path / "model", base="compact").compact == ("weight",)
    other = torch_model((40, 5), "householder", seed=3)
    assert orthoserde.load(other, tmp_path / "model").fidelity is Fidelity.EXACT
    assert same_bits(weight_of(other), weight_of(model))
    assert same_bits(other.get_buffer(BASE), model.get_buffer(BASE))


def damaged_base(change: Callable[[Tensor], object]) -> nn.Module:
    model = torch_model((40, 5), "cayley")
    change(model.get_buffer(BASE))
    return model


def put(model: nn.Module, **buffers: Tensor | None) -> nn.Module:
    link(model)._buffers.update(buffers)
    return model


def tied_originals() -> nn.Module:
    model = nn.Sequential(torch_model((9, 4), "cayley", seed=0), torch_model((9, 4), "cayley", seed=1))
    chain_of(model[1]).original = chain_of(model[0]).original
    return model


def tied_bases() -> nn.Module:
    model = nn.Sequential(torch_model((9, 4), "cayley", seed=0), torch_model((9, 4), "cayley", seed=1))
    put(model[1], base=model[0].get_buffer(BASE))
    return model


def one_link_for_two() -> nn.Module:
    model = nn.Sequential(torch_model((9, 4), "cayley"), torch_model((9, 4), "cayley"))
    chain_of(model[1])[0] = link(model[0])
    return model


def of_another_device() -> nn.Module:
    with torch.device("meta"):
        return orthoserde.orthogonal(nn.Linear(4, 9))


def with_gradient(gradient: Tensor) -> nn.Module:
    model = torch_model((9, 4), "cayley")
    original_of(model).grad = gradient
    return model


def with_original(change: Callable[[nn.Module], object]) -> nn.Module:
    model = torch_model((9, 4), "cayley")
    change(model)
    return model


def chain_of(model: nn.Module) -> parametrize.ParametrizationList:
    found = cast("nn.ModuleDict", model.parametrizations)["weight"]
    assert isinstance(found, parametrize.ParametrizationList)
    return found


class Scale(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def scaled_before() -> nn.Module:
    model = torch_model((9, 4), "cayley")
    chain = [Scale(), link(model)]
    chain_of(model)[0] = chain[0]
    chain_of(model).append(chain[1])
    return model


def one_entry_of_many() -> nn.Module:
    """A base whose error is rounding in the mean of its entries."""
    model = torch_model((400, 4), "householder")
    model.get_buffer(BASE)[3, 30] += 7e-4
    return model


def original_in_a_graph() -> nn.Module:
    model = Holder(torch.randn(9, 4), parameter=False)
    parametrizations.orthogonal(model)
    chain_of(model).original = model.get_buffer(ORIGINAL) * torch.ones(9, 4, requires_grad=True)
    return model


def _expand_original(model: nn.Module) -> None:
    chain_of(model).original = nn.Parameter(torch.full((1, 1), -1.0).expand(9, 4))


@torch.no_grad()
def _fill_nan(model: nn.Module) -> None:
    original_of(model)[8, 0] = torch.nan


REFUSALS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "bfloat16 base": (lambda: damaged_base(lambda base: base.copy_(base.bfloat16())), "farther from orthonormal"),
    "bfloat16 completion": (
        lambda: damaged_base(lambda base: base[:, 5:].copy_(base[:, 5:].bfloat16())),
        "base is not orthonormal",
    ),
    "completion of another weight": (
        lambda: damaged_base(
            lambda base: base[:, 5:].copy_(torch_model((40, 5), "cayley", seed=5).get_buffer(BASE)[:, 5:])
        ),
        "base is not orthonormal",
    ),
    "one entry of the completion": (
        lambda: damaged_base(lambda base: base[3, 30].add_(0.01)),
        "base is not orthonormal",
    ),
    "one entry of many": (one_entry_of_many, "base is not orthonormal"),
    "original in a graph": (original_in_a_graph, "the result of a computation"),
    "an expanded original": (lambda: with_original(_expand_original), "original cannot be overwritten in place"),
    "NaN in the weight": (lambda: damaged_base(lambda base: base[3, 0].fill_(torch.nan)), "not finite"),
    "NaN in the completion": (
        lambda: damaged_base(lambda base: base[3, 30].fill_(torch.nan)),
        "base is not orthonormal",
    ),
    "half": (lambda: torch_model((9, 4), "cayley").bfloat16(), "expected a base in float32 or better"),
    "no base": (lambda: put(torch_model((9, 4), "cayley"), base=None), "its base is empty"),
    "another shape": (lambda: put(torch_model((9, 4), "cayley"), base=torch.eye(8)), r"of shape \[9, 9\]"),
    "another dtype": (lambda: put(torch_model((9, 4), "cayley"), base=torch.eye(9).double()), "move them to one"),
    "a base with a gradient": (
        lambda: put(torch_model((9, 4), "cayley"), base=torch.eye(9).requires_grad_()),
        "requires a gradient",
    ),
    "meta": (of_another_device, "on the meta device"),
    "tied originals": (tied_originals, "original lies in the memory of"),
    "tied bases": (tied_bases, "its base lies in the memory of"),
    "one parametrization for two": (one_link_for_two, "serves several tensors"),
    "another before it": (scaled_before, "another parametrization comes before it"),
    "NaN in the original": (lambda: with_original(_fill_nan), "original holds NaN"),
    "NaN in the gradient": (lambda: with_gradient(torch.full((9, 4), torch.nan)), "gradient of its original holds NaN"),
    "an expanded gradient": (lambda: with_gradient(torch.ones(1, 1).expand(9, 4)), "cannot be overwritten in place"),
    "a configuration of another shape": (
        lambda: with_original(lambda model: setattr(link(model), "shape", torch.Size([2, 9, 4]))),
        "of shape",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_changed_is_refused_and_unchanged(case: str) -> None:
    make, message = REFUSALS[case]
    model = make()
    before = snapshot(model)
    with pytest.raises(CanonicalizeError, match=message):
        orthoserde.canonicalize_(model, optimizer=False)
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: put(torch_model((9, 4), "cayley"), base=torch.eye(9).to_sparse()), "its base is a Tensor of layout"),
        (lambda: with_gradient(torch.ones(9, 4).to_sparse()), "not an ordinary dense tensor"),
    ],
    ids=["base", "gradient"],
)
def test_sparse_tensors_are_refused(make: Callable[[], nn.Module], message: str) -> None:
    # They have no memory that a snapshot could look at.
    model = make()
    original, base = original_of(model), link(model)._buffers["base"]
    values = original.detach().clone()
    with pytest.raises(CanonicalizeError, match=message):
        orthoserde.canonicalize_(model, optimizer=False)
    assert same_bits(original, values)
    assert link(model)._buffers["base"] is base


def test_one_error_lists_everything_and_nothing_is_half_done() -> None:
    model = nn.Sequential(
        torch_model((9, 4), "cayley"), damaged_base(lambda base: base.mul_(2)), torch_model((4, 9), "householder")
    )
    original = model[2].get_parameter(ORIGINAL)
    optimizer = Adam([original], lr=0.01)
    loss_of(model[2]).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    error = refused(model, optimizer)
    assert [problem.where for problem in error.problems] == ["1.weight", "2.weight"]
    assert str(error).startswith("Sequential: its bases cannot be made canonical; nothing was changed\n  - 1.weight: ")


def test_what_has_no_columns_to_choose_is_left_and_reported() -> None:
    model = nn.Sequential(
        torch_model((5, 5), "cayley"),
        parametrizations.orthogonal(Holder(torch.randn(9, 4)), use_trivialization=False),
        orthoserde.orthogonal(Holder(torch.randn(9, 4))),
        parametrizations.weight_norm(nn.Linear(3, 3)),
        parametrizations.orthogonal(Holder(torch.empty(0, 9, 4)), orthogonal_map="cayley"),
        orthoserde.orthogonal(Holder(torch.randn(9, 4)), structured=True),
    )
    before = snapshot(model)
    report = orthoserde.canonicalize_(model)
    assert_unchanged(model, before)
    assert {name: each.action for name, each in report.tensors.items()} == {
        "0.weight": "left as it is: its base has no columns to choose",
        "1.weight": "left as it is: it has no base",
        "2.weight": "left as it is: its base is canonical already",
        "4.weight": "left as it is: its base has no columns to choose",
        "5.weight": "left as it is: the structured form has no other base",
    }
    assert report.canonicalized == ()
    assert report.weight_change == 0.0


def test_a_base_of_another_memory_layout_becomes_column_major(tmp_path: Path) -> None:
    model, optimizer = trained(momentum)
    put(model, base=model.get_buffer(BASE).contiguous())
    orthoserde.canonicalize_(model, optimizer=optimizer)
    assert model.get_buffer(BASE).stride() == (1, 40)
    assert orthoserde.save(model, tmp_path / "model", base="compact").compact == ("weight",)


def test_a_canonical_base_only_needs_its_layout(tmp_path: Path) -> None:
    model = orthoserde.orthogonal(Holder(torch.randn(40, 5)))
    optimizer = adam(model.parameters())
    train(model, optimizer, 3)
    put(model, base=model.get_buffer(BASE).contiguous())
    states, original = state_bits(optimizer), original_of(model).detach().clone()
    report = orthoserde.canonicalize_(model)
    assert report.tensors["weight"].action == "its base has another memory layout"
    assert same_bits(original_of(model), original)
    assert state_bits(optimizer) == states
    assert orthoserde.save(model, tmp_path / "model", base="compact").compact == ("weight",)


@pytest.mark.parametrize("row_major", [False, True])
def test_a_graph_of_the_old_chart_gives_no_gradient(row_major: bool) -> None:
    model = torch_model((9, 4), "cayley")
    if row_major:
        put(model, base=model.get_buffer(BASE).contiguous())
    loss = loss_of(model)
    orthoserde.canonicalize_(model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()  # type: ignore[no-untyped-call]


def test_a_module_in_several_places_is_changed_once() -> None:
    part = move_(torch_model((9, 4), "cayley"))
    weight = weight_of(part).detach()
    report = orthoserde.canonicalize_(nn.ModuleList([part, nn.Sequential(part)]), optimizer=False)
    assert list(report.tensors) == ["0.weight"]
    assert largest_difference(weight_of(part), weight) <= 5e-7


def test_the_first_of_a_chain_is_changed() -> None:
    model = torch_model((9, 4), "householder")
    parametrize.register_parametrization(model, "weight", Scale())
    move_(model)
    weight = weight_of(model).detach()
    report = orthoserde.canonicalize_(model, optimizer=False)
    assert report.canonicalized == ("weight",)
    assert same_bits(model.get_buffer(BASE), complete(model.get_buffer(BASE)[:, :4]))
    assert largest_difference(weight_of(model), weight) <= 1e-6


def test_a_cached_weight_is_forgotten() -> None:
    model = move_(torch_model((9, 4), "cayley"))
    with parametrize.cached():
        stale = model.weight
        orthoserde.canonicalize_(model, optimizer=False)
        assert model.weight is not stale
        assert same_bits(weight_of(model), chain_of(model)())


def test_tensors_of_inference_mode_are_changed_too() -> None:
    with torch.inference_mode():
        model = move_(torch_model((9, 4), "cayley"))
        weight = weight_of(model)
        orthoserde.canonicalize_(model, optimizer=False)
        assert torch.is_inference_mode_enabled()
        assert largest_difference(weight_of(model), weight) <= 5e-7
    assert same_bits(model.get_buffer(BASE), complete(model.get_buffer(BASE)[:, :4]))


def test_a_parametrized_buffer_is_changed_too() -> None:
    model = Holder(torch.randn(9, 4), parameter=False)
    parametrizations.orthogonal(model)
    with torch.no_grad():
        model.get_buffer(ORIGINAL).add_(torch.randn(9, 4).tril(-1), alpha=0.3)
    weight = weight_of(model)
    orthoserde.canonicalize_(model, optimizer=False)
    assert largest_difference(weight_of(model), weight) <= 5e-7


def test_a_compiled_model_goes_on_with_the_new_base() -> None:
    model = parametrizations.orthogonal(nn.Linear(4, 9), orthogonal_map="cayley")
    compiled = torch.compile(model, backend="eager")
    move_(model)
    inputs = torch.ones(2, 4)
    before = compiled(inputs)
    report = orthoserde.canonicalize_(compiled, optimizer=False)  # type: ignore[arg-type]
    assert list(report.tensors) == ["weight"]
    assert largest_difference(compiled(inputs), before) <= 1e-6


@pytest.mark.parametrize("layout", ["column-major", "row-major"])
def test_an_interrupted_change_is_undone(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = trained(momentum)
    if layout == "row-major":
        put(model, base=model.get_buffer(BASE).contiguous())
    second = adam(model.parameters())
    second.step()
    weight, base = weight_of(model).detach(), model.get_buffer(BASE)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    states = [state_bits(each) for each in (optimizer, second)]

    def interrupted(one: Tensor, other: Tensor) -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr(apply, "_largest_difference", interrupted)
    with pytest.raises(KeyboardInterrupt):
        orthoserde.canonicalize_(model, optimizer=[optimizer, second], reset_state=True)
    assert model.get_buffer(BASE) is base
    assert all(same_bits(tensor, tensors[name]) for name, tensor in model.state_dict().items())
    assert [state_bits(each) for each in (optimizer, second)] == states
    assert same_bits(weight_of(model), weight)


def test_the_report_can_be_read() -> None:
    model, optimizer = trained(momentum)
    report = orthoserde.canonicalize_(nn.Sequential(model, torch_model((5, 5), "cayley")), optimizer=optimizer)
    assert isinstance(report, CanonicalizeReport)
    first, *others = str(report).splitlines()
    assert first.startswith("canonicalized 1 of 2 orthogonal weights, largest change of a weight ")
    assert others == [
        "  0.weight: its base is canonical now",
        "    rotated along: original, its gradient, momentum_buffer of SGD",
        "  1.weight: left as it is: its base has no columns to choose",
    ]


def test_a_model_without_orthogonal_tensors_has_an_empty_report() -> None:
    report = orthoserde.canonicalize_(nn.Linear(3, 3))
    assert str(report) == "canonicalized 0 of 0 orthogonal weights"


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex128])
def test_coordinates_are_those_in_the_columns_of_the_completion(dtype: torch.dtype) -> None:
    columns = torch.linalg.qr(torch.randn(9, 4, dtype=dtype))[0]
    matrix = torch.randn(9, 3, dtype=dtype)
    found = Completion(columns).coordinates(matrix)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    assert found.dtype == wide
    expected = complete(columns)[:, 4:].to(wide).mH @ matrix.to(wide)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6 if dtype == torch.float32 else 1e-13)


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")  # torch 2.3 says so
def test_lazy_modules_elsewhere_are_not_in_the_way() -> None:
    model = nn.Sequential(move_(torch_model((9, 4), "householder")), nn.LazyLinear(3))
    assert orthoserde.canonicalize_(model, optimizer=False).canonicalized == ("0.weight",)
