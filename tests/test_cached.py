"""Loading inside of ``parametrize.cached()``: no weight computed before the load is handed out after it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

import orthoserde
from orthoserde import IncompatibleModelError, Registry
from tests.helpers import assert_same_state, assert_unchanged, scramble_, snapshot

Parametrize = Callable[[nn.Module], nn.Module]

PARAMETRIZE: dict[str, Parametrize] = {
    "orthogonal": orthogonal,
    "spectral_norm": spectral_norm,
    "weight_norm": weight_norm,
    "chain": lambda module: spectral_norm(orthogonal(module)),
}


class Rotated(nn.Module):
    """A parametrization that is parametrized itself."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.turn = orthogonal(nn.Linear(size, size, bias=False), orthogonal_map="cayley")

    def forward(self, x: Tensor) -> Tensor:
        return x @ cast("Tensor", self.turn.weight)


def weight(module: nn.Module) -> Tensor:
    return cast("Tensor", module.weight)


def fresh(module: nn.Module) -> Tensor:
    """The weight, computed anew."""
    chain = cast("dict[str, nn.Module]", module.parametrizations)["weight"]
    return cast("Tensor", chain())


def nothing_is_cached() -> bool:
    return not parametrize._cache


@pytest.mark.parametrize("kind", PARAMETRIZE)
def test_a_live_parametrization_is_computed_anew_after_a_load(tmp_path: Path, kind: str) -> None:
    saved, model = (scramble_(PARAMETRIZE[kind](nn.Linear(4, 4))).eval() for _ in range(2))
    orthoserde.save(saved, tmp_path / "model")
    with parametrize.cached():
        stale = weight(model)
        assert weight(model) is stale  # the cache works
        orthoserde.load(model, tmp_path / "model")
        assert not torch.equal(weight(model), stale)
        assert torch.equal(weight(model), weight(saved))
        assert weight(model) is weight(model)
    assert torch.equal(weight(model), weight(saved))
    assert nothing_is_cached()


@pytest.mark.parametrize("kind", PARAMETRIZE)
def test_an_attached_parametrization_is_computed_and_cached_anew(tmp_path: Path, kind: str) -> None:
    saved = scramble_(PARAMETRIZE[kind](nn.Linear(4, 4))).eval()
    orthoserde.save(saved, tmp_path / "model")
    model = nn.Linear(4, 4).eval()
    with parametrize.cached():
        plain = model.weight
        orthoserde.load(model, tmp_path / "model")
        assert weight(model) is not plain
        assert torch.equal(weight(model), weight(saved))
        assert weight(model) is weight(model)
    assert nothing_is_cached()


def test_a_weight_cached_before_its_parametrization_was_removed_does_not_come_back(tmp_path: Path) -> None:
    saved, model = (scramble_(orthogonal(nn.Linear(4, 4))) for _ in range(2))
    orthoserde.save(saved, tmp_path / "model")
    with parametrize.cached():
        stale = weight(model)
        parametrize.remove_parametrizations(model, "weight")
        orthoserde.load(model, tmp_path / "model")
        assert weight(model) is not stale
        assert torch.equal(weight(model), weight(saved))


@pytest.mark.parametrize("attached", [False, True])
def test_a_parametrization_within_a_parametrization_is_computed_anew(tmp_path: Path, attached: bool) -> None:
    registry = Registry()
    registry.register("lab>Rotated")(Rotated)

    def make() -> nn.Module:
        module = nn.Linear(4, 4)
        return scramble_(parametrize.register_parametrization(module, "weight", Rotated(4)))

    saved, model = make(), nn.Linear(4, 4) if attached else make()
    orthoserde.save(saved, tmp_path / "model", registry=registry)
    with parametrize.cached():
        if not attached:
            weight(model)
        orthoserde.load(model, tmp_path / "model", registry=registry)
        assert_same_state(saved, model)
        assert torch.equal(weight(model), fresh(saved))
        assert torch.equal(weight(model), fresh(model))
    assert torch.equal(weight(model), weight(saved))


def test_a_weight_that_shares_its_original_with_another_tensor_is_computed_anew(tmp_path: Path) -> None:
    def make() -> nn.Sequential:
        turn, plain = orthogonal(nn.Linear(4, 4)), nn.Linear(4, 4)
        plain.weight = turn.get_parameter("parametrizations.weight.original")
        return nn.Sequential(turn, plain)

    saved, model = scramble_(make()), scramble_(make())
    orthoserde.save(saved, tmp_path / "model")
    with parametrize.cached():
        weight(model.get_submodule("0"))
        orthoserde.load(model, tmp_path / "model")
        assert torch.equal(weight(model.get_submodule("0")), fresh(saved.get_submodule("0")))


def test_one_module_under_two_paths_is_computed_anew(tmp_path: Path) -> None:
    def make() -> nn.Sequential:
        shared = orthogonal(nn.Linear(4, 4))
        return nn.Sequential(shared, shared)

    saved, model = scramble_(make()), scramble_(make())
    orthoserde.save(saved, tmp_path / "model")
    with parametrize.cached():
        stale = weight(model.get_submodule("1"))
        orthoserde.load(model, tmp_path / "model")
        assert weight(model.get_submodule("1")) is not stale
        assert torch.equal(weight(model.get_submodule("1")), fresh(saved.get_submodule("0")))


def test_what_is_not_loaded_stays_cached(tmp_path: Path) -> None:
    saved = nn.Sequential(orthogonal(nn.Linear(4, 4)))
    model = nn.Sequential(orthogonal(nn.Linear(4, 4)), orthogonal(nn.Linear(4, 4)))
    orthoserde.save(saved, tmp_path / "model")
    with parametrize.cached():
        kept = weight(model.get_submodule("1"))
        orthoserde.load(model, tmp_path / "model", strict=False)
        assert weight(model.get_submodule("1")) is kept


def test_a_refused_load_leaves_the_cache_as_it_is(tmp_path: Path) -> None:
    orthoserde.save(orthogonal(nn.Linear(4, 4), orthogonal_map="cayley"), tmp_path / "model")
    model = orthogonal(nn.Linear(4, 4))
    with parametrize.cached():
        kept = weight(model)
        before = snapshot(model)
        with pytest.raises(IncompatibleModelError):
            orthoserde.load(model, tmp_path / "model")
        assert_unchanged(model, before)
        assert weight(model) is kept


def test_saving_within_cached_neither_fills_nor_uses_the_cache(tmp_path: Path) -> None:
    model = orthogonal(nn.Linear(4, 4))
    orthoserde.save(model, tmp_path / "outside")
    with parametrize.cached():
        orthoserde.save(model, tmp_path / "empty")
        assert nothing_is_cached()
        weight(model)
        with torch.no_grad():
            # A cached weight that is out of date: the state is what counts.
            model.get_parameter("parametrizations.weight.original").mul_(1)
        orthoserde.save(model, tmp_path / "filled")
    for name in ("empty", "filled"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "outside").read_bytes()
