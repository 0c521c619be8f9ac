"""Runs that new processes make and take up again, by the names of these functions."""

from __future__ import annotations

import functools
import os
import random
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.optim import Optimizer

import orthoserde

WIDTH = 12

Run = tuple[nn.Module, dict[str, Optimizer], dict[str, Any]]

LAYERS: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "plain": lambda layer: layer,
    "orthogonal": parametrizations.orthogonal,
    "canonical": orthoserde.orthogonal,
    "structured": functools.partial(orthoserde.orthogonal, orthogonal_map="cayley", structured=True),
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
}


class Layers(nn.Module):
    """A layer of every sort beside each other, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({name: sort(nn.Linear(WIDTH, 5)) for name, sort in LAYERS.items()})
        self.dropout = nn.Dropout(0.3)

    def forward(self, batch: Tensor) -> Tensor:
        """Sum over the layers."""
        return torch.stack([self.dropout(layer(batch)) for layer in self.layers.values()]).sum(0)


def make_all() -> Run:
    """Every parametrization, half of each layer under SGD and half under Adam, a scheduler, and shuffled data."""
    model = Layers()
    parameters = list(model.parameters())
    sgd = torch.optim.SGD(parameters[::2], lr=1e-2, momentum=0.9)
    adam = torch.optim.Adam(parameters[1::2], lr=1e-2)
    state = {
        "scheduler": torch.optim.lr_scheduler.StepLR(adam, 2, gamma=0.7),
        "shuffle": torch.Generator().manual_seed(random.randrange(1000)),
        "count": 0,
    }
    return model, {"sgd": sgd, "adam": adam}, state


def step_all(model: nn.Module, optimizers: Mapping[str, Optimizer], state: dict[str, Any]) -> Tensor:
    """Draw from every generator."""
    samples = torch.randn(48, WIDTH, generator=torch.Generator().manual_seed(0))
    batch = samples[torch.randperm(48, generator=state["shuffle"])[:16]]
    batch = batch * (1 + 0.1 * random.random() + 0.1 * float(np.random.rand()))
    loss: Tensor = (model(batch) - batch[:, :5]).square().mean()
    loss.backward()  # type: ignore[no-untyped-call]
    for optimizer in optimizers.values():
        optimizer.step()
        optimizer.zero_grad()
    state["scheduler"].step()
    state["count"] += 1
    return loss


def make_small(optimizer: str = "Adam", width: int = WIDTH) -> tuple[nn.Module, Optimizer]:
    """One orthogonal layer."""
    model = nn.Sequential(parametrizations.orthogonal(nn.Linear(width, 5)), nn.Tanh(), nn.Linear(5, 2))
    classes: dict[str, Any] = {"Adam": torch.optim.Adam, "SGD": torch.optim.SGD}
    return model, classes[optimizer](model.parameters(), lr=1e-2)


def step_small(model: nn.Module, optimizer: Optimizer) -> float:
    """Without dropout, on the same batch each time."""
    batch = torch.linspace(-1, 1, 4 * WIDTH).view(4, WIDTH)
    optimizer.zero_grad()
    loss: Tensor = (model(batch) - batch[:, :2]).square().mean()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return loss.item()


def make_model_alone() -> nn.Module:
    """No optimizer."""
    return make_small()[0]


def step_by_hand(model: nn.Module) -> None:
    """A step that returns nothing."""
    loss = model(torch.ones(2, WIDTH)).square().mean()
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.sub_(parameter.grad, alpha=1e-3)  # type: ignore[arg-type]
            parameter.grad = None


def make_sums() -> nn.Module:
    """A place for sums."""
    model = nn.Module()
    model.register_buffer("sums", torch.zeros(64, dtype=torch.float32))
    return model


def step_sums(model: nn.Module) -> float:
    """Sums so long that threads share them, and so round them otherwise."""
    terms = torch.arange(100_000, dtype=torch.float32)
    sums = [(terms * number).sin().square().sum() for number in range(1, 65)]
    model.sums.copy_(torch.stack(sums))  # type: ignore[operator]
    return float(sums[0])


def step_from_outside(model: nn.Module) -> float:
    """Draws what no checkpoint holds."""
    with torch.no_grad():
        model[0].bias.add_(int.from_bytes(os.urandom(4), "little") / 2**36)  # type: ignore[index]
    return 0.0


def settings() -> list[object]:
    """What has to be the same in the new process."""
    return [
        torch.get_num_threads(),
        torch.get_num_interop_threads(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cudnn.benchmark,
        torch.backends.cudnn.deterministic,
        torch.get_float32_matmul_precision(),
        str(torch.get_default_dtype()),
        str(torch.get_default_device()),
        os.getcwd(),
        os.environ.get("ORTHOSERDE_TEST"),
    ]


def make_with_settings(expected: tuple[object, ...]) -> nn.Module:
    """Fails where the settings are others."""
    if settings() != list(expected):
        raise AssertionError(f"{settings()} != {expected}")
    return make_sums()


def step_nothing(*made: object) -> float:
    """Changes nothing."""
    return 1.0


def step_raises(model: nn.Module) -> float:
    """The second step fails."""
    if not model.training:
        raise LookupError("no more data")
    model.eval()
    return 0.0


def step_is_killed(model: nn.Module) -> None:
    """As the system does when memory runs out."""
    os.kill(os.getpid(), signal.SIGKILL)


def step_waits(model: nn.Module, pid_file: str) -> None:
    """Takes for ever."""
    Path(pid_file).write_text(str(os.getpid()), encoding="utf-8")
    signal.pause()


def returned(value: object) -> object:
    """What it is given."""
    return value


def returned_by_step(value: object, *made: object) -> object:
    """What it is given, as the loss."""
    return value


def save_and_go_on(folder: Path, run: Any, step: Callable[..., Any], steps: int = 3) -> list[float]:
    """Save a run as ``start``, then train on and save each step as its number; return the losses."""
    model, optimizer, *state = run
    kept = {"optimizer": optimizer, "state": state[0] if state else None, "rng": True}
    orthoserde.save(model, folder / "start", **kept)
    losses = []
    for number in range(1, steps + 1):
        loss = step(*run)
        losses.append(float(loss.detach() if isinstance(loss, Tensor) else loss))
        orthoserde.save(model, folder / str(number), **kept)
    return losses
