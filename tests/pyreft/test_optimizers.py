"""Optimizers and schedulers of transformers, and those that accelerate wraps, go on bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from transformers.optimization import Adafactor, AdafactorSchedule, get_cosine_schedule_with_warmup

import orthoserde
from tests.helpers import bits
from tests.training.cases import PARAMETRIZERS

STEPS_BEFORE, STEPS_AFTER = 4, 6

Parts = tuple[nn.Module, Any, Any]


def cosine(optimizer: Any) -> Any:
    return get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=3, num_training_steps=10)


def relative(model: nn.Module, groups: list[dict[str, Any]]) -> Parts:
    """Adafactor that finds its own rate, which its scheduler reports."""
    optimizer = Adafactor([{"params": group["params"]} for group in groups], warmup_init=True)
    return model, optimizer, AdafactorSchedule(optimizer)


def absolute(model: nn.Module, groups: list[dict[str, Any]]) -> Parts:
    optimizer = Adafactor(groups, lr=1e-2, relative_step=False, scale_parameter=False, beta1=0.9)
    return model, optimizer, cosine(optimizer)


def accelerated(model: nn.Module, groups: list[dict[str, Any]]) -> Parts:
    optimizer = torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.0)
    prepared: Parts = Accelerator(cpu=True).prepare(model, optimizer, cosine(optimizer))
    return prepared


MAKERS: dict[str, Callable[[nn.Module, list[dict[str, Any]]], Parts]] = {
    "relative": relative,
    "absolute": absolute,
    "accelerated": accelerated,
}


class Run:
    """A model with dropout, an optimizer with two groups, and a scheduler."""

    def __init__(self, maker: str, parametrizer: str, seed: int) -> None:
        torch.manual_seed(seed)
        layer = PARAMETRIZERS[parametrizer](nn.Linear(12, 5))
        model = nn.Sequential(layer, nn.Tanh(), nn.Dropout(0.3), nn.Linear(5, 2))
        groups: list[dict[str, Any]] = [
            {"params": list(model[0].parameters()), "lr": 5e-3},
            {"params": list(model[3].parameters())},
        ]
        self.model, self.optimizer, self.scheduler = MAKERS[maker](model, groups)
        self.losses: list[float] = []

    def train(self, steps: int) -> None:
        for _ in range(steps):
            batch = torch.randn(16, 12)
            loss = (self.model(batch) - batch[:, :2]).square().mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.scheduler.step()
            self.losses.append(loss.item())

    def save(self, path: Path) -> None:
        orthoserde.save(self.model, path, optimizer=self.optimizer, state={"scheduler": self.scheduler}, rng=True)

    def load(self, path: Path) -> None:
        orthoserde.load(self.model, path, optimizer=self.optimizer, state={"scheduler": self.scheduler}, rng=True)

    def outcome(self) -> dict[str, object]:
        """All of its bits, and the rates that come next."""
        state = self.optimizer.state_dict()
        entries = [value for entries in state["state"].values() for value in entries.values()]
        return {
            "losses": self.losses[-STEPS_AFTER:],
            "model": {name: bits(tensor) for name, tensor in self.model.state_dict().items()},
            "state": [bits(value) if isinstance(value, torch.Tensor) else value for value in entries],
            "groups": state["param_groups"],
            "rates": self.scheduler.get_last_lr(),
        }


@pytest.fixture(autouse=True)
def _generator() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        yield


@pytest.mark.parametrize("parametrizer", PARAMETRIZERS)
@pytest.mark.parametrize("maker", MAKERS)
def test_a_run_goes_on_bit_for_bit(maker: str, parametrizer: str, tmp_path: Path) -> None:
    run = Run(maker, parametrizer, seed=1)
    run.train(STEPS_BEFORE)
    run.save(tmp_path / "m")
    run.train(STEPS_AFTER)
    resumed = Run(maker, parametrizer, seed=2)
    resumed.load(tmp_path / "m")
    resumed.train(STEPS_AFTER)
    expected = run.outcome()
    for part, value in resumed.outcome().items():
        assert value == expected[part], part


def test_the_moments_of_adafactor_are_in_the_file(tmp_path: Path) -> None:
    run = Run("absolute", "orthogonal", seed=1)
    run.train(1)
    run.save(tmp_path / "m")
    keys = {key.rpartition(".")[2] for key in orthoserde.inspect(tmp_path / "m").tensors}
    assert {"exp_avg", "exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_sq", "RMS"} <= keys


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_run_goes_on_with_accelerate_or_without(wrapped: bool, tmp_path: Path) -> None:
    """What accelerate wraps is what counts: its own class is in no file."""
    run = Run("accelerated", "orthogonal", seed=1)
    run.train(STEPS_BEFORE)
    inner = run.optimizer.optimizer
    orthoserde.save(run.model, tmp_path / "m", optimizer=run.optimizer if wrapped else inner)
    other = Run("accelerated", "orthogonal", seed=2)
    inner = other.optimizer.optimizer
    orthoserde.load(other.model, tmp_path / "m", optimizer=inner if wrapped else other.optimizer)
    assert other.outcome()["state"] == run.outcome()["state"]
    assert other.outcome()["groups"] == run.outcome()["groups"]


def test_another_optimizer_in_accelerates_wrapper_is_refused(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    adam, sgd = (
        Accelerator(cpu=True).prepare(make(model.parameters())) for make in (torch.optim.Adam, torch.optim.SGD)
    )
    orthoserde.save(model, tmp_path / "m", optimizer=adam)
    with pytest.raises(orthoserde.IncompatibleModelError, match="Adam in the file, SGD here"):
        orthoserde.load(model, tmp_path / "m", optimizer=sgd)


@pytest.mark.parametrize("from_torch", [True, False])
def test_the_adafactor_of_torch_is_another_one(from_torch: bool, tmp_path: Path) -> None:
    """They share no more than the name."""
    model = nn.Linear(3, 2)
    both = [torch.optim.Adafactor(model.parameters()), Adafactor(model.parameters())]
    saved, loaded = both if from_torch else reversed(both)
    orthoserde.save(model, tmp_path / "m", optimizer=saved)
    with pytest.raises(orthoserde.IncompatibleModelError, match="which Adafactor here does not know"):
        orthoserde.load(model, tmp_path / "m", optimizer=loaded)
