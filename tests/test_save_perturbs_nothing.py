"""Saving looks and does not touch: buffers, gradients, modes, version counters, generators and arguments stay."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

import orthoserde
from orthoserde import Fidelity, UnsupportedModuleError
from tests.helpers import (
    assert_same_state,
    assert_unchanged,
    default_dtype,
    lived_in,
    scramble_,
    slots_of,
    snapshot,
    surroundings,
)


class Noisy(nn.Module):
    """A parametrization that does, when it is evaluated, everything that it should not."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("last", torch.zeros(4, 4), persistent=False)

    count: Tensor
    last: Tensor

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        with torch.no_grad():
            self.last.copy_(x)
        return x * torch.rand(()) * random.random() * float(np.random.rand())


class Everything(nn.Module):
    """One of each sort of tensor that a model may hold."""

    def __init__(self) -> None:
        super().__init__()
        self.spectral = spectral_norm(nn.Linear(5, 4), n_power_iterations=2)
        self.spectral_conv = spectral_norm(nn.ConvTranspose1d(2, 3, 2))
        self.turn = orthogonal(nn.Linear(4, 6))
        self.normed = weight_norm(nn.Linear(4, 4), dim=1)
        self.noisy = parametrize.register_parametrization(nn.Linear(4, 4), "weight", Noisy(), unsafe=True)
        self.recurrent = orthogonal(nn.GRU(3, 4), "weight_hh_l0")
        self.batch = nn.BatchNorm1d(4)
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.batch_tied = nn.Parameter(torch.randn(4, 4))
        self.dropout = nn.Dropout(0.5)
        self.register_buffer("halved", torch.randn(3, 2).bfloat16().t())
        self.register_buffer("none", None)
        self.register_buffer("scratch", torch.zeros(2), persistent=False)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(5)
    return lived_in(scramble_(Everything()))


def compare(model: nn.Module, path: Path) -> None:
    """Load the file into another model, and hold the two together."""
    other = Everything()
    report = orthoserde.load(other, path)
    assert report.fidelity is Fidelity.UNVERIFIED  # for the unregistered Noisy
    assert all(
        tensor.fidelity is (Fidelity.UNVERIFIED if name == "noisy.weight" else Fidelity.EXACT)
        for name, tensor in report.tensors.items()
    )
    assert len(report.tensors) == 6
    assert_same_state(model, other)


def test_saving_changes_nothing_at_all(tmp_path: Path, model: nn.Module) -> None:
    before = snapshot(model)
    report = orthoserde.save(model, tmp_path / "model")
    assert_unchanged(model, before)
    _ = str(report), repr(report)
    orthoserde.save(model, tmp_path / "again")
    assert_unchanged(model, before)
    assert (tmp_path / "model").read_bytes() == (tmp_path / "again").read_bytes()
    compare(model, tmp_path / "model")


@pytest.mark.parametrize("training", [True, False])
def test_saving_moves_no_power_iteration_in_either_mode(tmp_path: Path, training: bool) -> None:
    model = spectral_norm(nn.Linear(5, 4), n_power_iterations=3).train(training)
    before = snapshot(model)
    orthoserde.save(model, tmp_path / "model")
    assert_unchanged(model, before)


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_a_refused_save_changes_nothing_and_writes_nothing(tmp_path: Path, model: nn.Module) -> None:
    model.add_module("lazy", nn.LazyLinear(3))
    model.register_parameter("meta", nn.Parameter(torch.empty(2, device="meta")))
    before = surroundings()
    kept = snapshot(model.get_submodule("spectral"))
    with pytest.raises(UnsupportedModuleError) as caught:
        orthoserde.save(model, tmp_path / "model")
    assert_unchanged(model.get_submodule("spectral"), kept)
    assert surroundings() == before
    assert list(tmp_path.iterdir()) == []
    assert {problem.where for problem in caught.value.problems} >= {"lazy.weight", "lazy.bias", "meta"}


class Asked(nn.Linear):
    """A layer that says itself what its state is, and draws a random number for it."""

    times = 0

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self.times += 1
        torch.rand(())
        super()._save_to_state_dict(destination, prefix, keep_vars)


@pytest.mark.parametrize("training", [False, True])
def test_a_module_that_says_its_state_is_asked_once_and_moves_no_generator(training: bool, tmp_path: Path) -> None:
    model = Asked(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1) if training else None
    before = surroundings()
    orthoserde.save(model, tmp_path / "model", optimizer=optimizer, rng=training)
    assert surroundings() == before
    assert model.times == 1


def test_a_module_that_draws_when_it_is_asked_moves_no_generator_in_a_load_or_a_diagnosis(tmp_path: Path) -> None:
    model = nn.utils.parametrizations.weight_norm(Asked(3, 2))
    orthoserde.save(model, tmp_path / "model")
    before = surroundings()
    orthoserde.load(model, tmp_path / "model")
    orthoserde.diagnose(model)
    assert surroundings() == before


def test_the_metadata_of_the_caller_is_neither_changed_nor_kept(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    strings = {"b": "2", "a": "1"}
    orthoserde.save(model, tmp_path / "model", metadata=strings)
    assert list(strings.items()) == [("b", "2"), ("a", "1")]


def test_saving_leaves_an_autograd_graph_usable(tmp_path: Path) -> None:
    model = orthogonal(nn.Linear(4, 4))
    loss = model(torch.ones(1, 4)).square().sum()
    orthoserde.save(model, tmp_path / "model")
    loss.backward()
    assert model.get_parameter("parametrizations.weight.original").grad is not None


def test_a_load_is_seen_by_an_autograd_graph_built_before(tmp_path: Path) -> None:
    """The elements change behind autograd's back; it must notice, as it does for every in-place change."""
    model = nn.Linear(4, 4)
    orthoserde.save(nn.Linear(4, 4), tmp_path / "model")
    loss = model(torch.ones(1, 4, requires_grad=True)).square().sum()
    version = model.weight._version
    orthoserde.load(model, tmp_path / "model")
    assert model.weight._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_load_keeps_modes_gradients_and_what_is_trainable(tmp_path: Path, model: nn.Module) -> None:
    orthoserde.save(Everything().eval().requires_grad_(False), tmp_path / "model")

    def kept() -> list[object]:
        parameters = [tensor for tensor in slots_of(model).values() if isinstance(tensor, nn.Parameter)]
        return [
            [module.training for module in model.modules()],
            [parameter.requires_grad for parameter in parameters],
            [id(parameter) for parameter in parameters],
            [None if parameter.grad is None else parameter.grad.sum().item() for parameter in parameters],
            surroundings(),
        ]

    before = kept()
    orthoserde.load(model, tmp_path / "model")
    assert kept() == before


# Modes of torch, around the call


@contextlib.contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


MODES: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "cached": parametrize.cached,
    "device meta": lambda: torch.device("meta"),
    "default device meta": lambda: default_device("meta"),
    "default dtype float64": lambda: default_dtype(torch.float64),
    "default dtype bfloat16": lambda: default_dtype(torch.bfloat16),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "deterministic": deterministic,
    "anomaly detection": lambda: torch.autograd.set_detect_anomaly(True),
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
@pytest.mark.parametrize("mode", MODES)
def test_saving_works_within_the_mode_and_changes_nothing(tmp_path: Path, model: nn.Module, mode: str) -> None:
    orthoserde.save(model, tmp_path / "outside")
    with MODES[mode]():
        before = snapshot(model)
        orthoserde.save(model, tmp_path / "within")
        assert_unchanged(model, before)
    assert (tmp_path / "within").read_bytes() == (tmp_path / "outside").read_bytes()


def bare() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 6), nn.Linear(6, 4), nn.Linear(4, 2))


def parametrized() -> nn.Module:
    model = cast("nn.Sequential", bare())
    return nn.Sequential(orthogonal(model[0]), spectral_norm(model[1]), weight_norm(model[2]))


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
@pytest.mark.parametrize("where", ["live", "bare", "meta"])
@pytest.mark.parametrize("mode", MODES)
def test_loading_works_within_the_mode(tmp_path: Path, mode: str, where: str) -> None:
    saved = scramble_(parametrized())
    orthoserde.save(saved, tmp_path / "model")
    if where == "live":
        model = parametrized()
    else:
        with torch.device("cpu" if where == "bare" else "meta"):
            model = bare()
    with MODES[mode]():
        around = surroundings()
        report = orthoserde.load(model, tmp_path / "model")
        assert surroundings() == around
    assert report.fidelity is Fidelity.EXACT
    assert_same_state(saved, model)
    x = torch.linspace(-1, 1, 12).reshape(4, 3)
    assert torch.equal(saved(x), model(x))
    for module in (saved, model):
        module(x).sum().backward()
    for name, parameter in saved.named_parameters():
        ours = model.get_parameter(name).grad
        assert parameter.grad is not None
        assert ours is not None
        assert torch.equal(parameter.grad, ours)
