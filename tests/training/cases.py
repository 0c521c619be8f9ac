"""Training runs with all of their state, which two processes share.

Run as ``python -m tests.training.cases FOLDER`` this is the second process: it loads every case that the first one left
in the folder, into a model, an optimizer and a scheduler of another seed, and trains on.
"""

from __future__ import annotations

import functools
import json
import random
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

import orthoserde
from tests.helpers import bits

STEPS_BEFORE, STEPS_AFTER = 4, 6
SAMPLES, WIDTH = 48, 12

MakeOptimizer = Callable[[Iterable[Any]], Optimizer]


def lbfgs(parameters: Iterable[Any]) -> Optimizer:
    """It takes no groups, and asks for a closure."""
    return torch.optim.LBFGS([p for group in parameters for p in group["params"]], lr=0.1, max_iter=3, history_size=4)


class Lion(Optimizer):
    """An optimizer of the user's own, of which nothing is known."""

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, beta: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "beta": beta})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move by the sign of an average, which is kept in bfloat16."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["average"] = torch.zeros_like(parameter, dtype=torch.bfloat16)
                    state["history"] = []
                state["history"] = [*state["history"][-2:], float(parameter.grad.norm())]
                state["average"].lerp_(parameter.grad.bfloat16(), 1 - group["beta"])
                parameter.sub_(group["lr"] * state["average"].sign())


OPTIMIZERS: dict[str, MakeOptimizer] = {
    "sgd": functools.partial(torch.optim.SGD, lr=1e-2),
    "momentum": functools.partial(torch.optim.SGD, lr=1e-2, momentum=0.9, nesterov=True),
    "adam": functools.partial(torch.optim.Adam, lr=1e-2),
    "amsgrad": functools.partial(torch.optim.Adam, lr=1e-2, amsgrad=True),
    "adamw-foreach": functools.partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.0, foreach=True),
    "adadelta": functools.partial(torch.optim.Adadelta, lr=1.0),
    "adagrad": functools.partial(torch.optim.Adagrad, lr=1e-2),
    "adamax": functools.partial(torch.optim.Adamax, lr=1e-2),
    "asgd": functools.partial(torch.optim.ASGD, lr=1e-2),
    "nadam": functools.partial(torch.optim.NAdam, lr=1e-2),
    "radam": functools.partial(torch.optim.RAdam, lr=1e-2),
    "rmsprop": functools.partial(torch.optim.RMSprop, lr=1e-3, momentum=0.5, centered=True),
    "rprop": functools.partial(torch.optim.Rprop, lr=1e-3),
    "lbfgs": lbfgs,
    "tensor-lr": lambda parameters: torch.optim.Adam(parameters, lr=torch.tensor(1e-2), foreach=False),
    "own": Lion,
}
if torch.__version__ >= "2.4":  # fused on the CPU
    OPTIMIZERS["adamw-fused"] = functools.partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.0, fused=True)
if hasattr(torch.optim, "Adafactor"):  # torch 2.5
    OPTIMIZERS["adafactor"] = functools.partial(torch.optim.Adafactor, lr=1e-2)

PARAMETRIZERS: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "plain": lambda layer: layer,
    "orthogonal": parametrizations.orthogonal,
    "canonical": orthoserde.orthogonal,
    "structured": functools.partial(orthoserde.orthogonal, orthogonal_map="cayley", structured=True),
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
}


@dataclass(frozen=True)
class Case:
    """One training run."""

    optimizer: str
    parametrizer: str

    @property
    def name(self) -> str:
        """The test's id."""
        return f"{self.optimizer}-{self.parametrizer}"


CASES = {case.name: case for case in (Case(optimizer, each) for optimizer in OPTIMIZERS for each in PARAMETRIZERS)}


class Run:
    """A model with dropout, an optimizer with two groups, a scheduler, and a loader that shuffles."""

    def __init__(self, case: Case, seed: int) -> None:
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        layer = PARAMETRIZERS[case.parametrizer](nn.Linear(WIDTH, 5))
        self.model = nn.Sequential(layer, nn.Tanh(), nn.Dropout(0.3), nn.Linear(5, 2))
        groups = [
            {"params": list(self.model[0].parameters()), "lr": 5e-3},
            {"params": list(self.model[3].parameters())},
        ]
        self.optimizer = OPTIMIZERS[case.optimizer](groups)
        self.scheduler = torch.optim.lr_scheduler.MultiStepLR(self.optimizer, [2, 5, 7], gamma=0.7)
        self.shuffle = torch.Generator().manual_seed(seed)
        self.losses: list[float] = []

    @property
    def state(self) -> dict[str, object]:
        """What goes beside the optimizer."""
        return {"scheduler": self.scheduler, "shuffle": self.shuffle, "losses": self.losses}

    def train(self, steps: int) -> None:
        """Train, drawing from every generator."""
        samples = TensorDataset(torch.randn(SAMPLES, WIDTH, generator=torch.Generator().manual_seed(0)))
        loader = DataLoader(samples, batch_size=16, shuffle=True, generator=self.shuffle)
        for _ in range(steps):
            (batch,) = next(iter(loader))
            batch = batch * (1 + 0.1 * random.random() + 0.1 * float(np.random.rand()))
            state = torch.get_rng_state()

            def loss_of(batch: Tensor = batch, state: Tensor = state) -> Tensor:
                torch.set_rng_state(state)  # the same dropout for every evaluation of LBFGS
                self.optimizer.zero_grad()
                loss: Tensor = (self.model(batch) - batch[:, :2]).square().mean()
                loss.backward()  # type: ignore[no-untyped-call]
                return loss

            if isinstance(self.optimizer, torch.optim.LBFGS):
                loss = self.optimizer.step(loss_of)  # type: ignore[no-untyped-call]
            else:
                loss = loss_of()
                self.optimizer.step()
            self.scheduler.step()
            self.losses.append(float(loss.detach() if isinstance(loss, Tensor) else loss))

    def save(self, path: Path) -> None:
        """Save all of it."""
        orthoserde.save(self.model, path, optimizer=self.optimizer, state=self.state, rng=True)

    def load(self, path: Path) -> orthoserde.LoadReport:
        """Load all of it."""
        state = self.state
        report = orthoserde.load(self.model, path, optimizer=self.optimizer, state=state, rng=True)
        self.losses = state["losses"]  # type: ignore[assignment]
        return report

    def outcome(self) -> dict[str, object]:
        """All of its bits, and what the generators draw next."""
        tensors = [*self.model.state_dict().values(), *_tensors(self.optimizer.state_dict()["state"])]
        return {
            "losses": self.losses,
            "tensors": [f"{tensor.dtype}:{bits(tensor).hex()}" for tensor in tensors],
            "options": [
                {name: repr(value) for name, value in group.items() if name != "params"}
                for group in self.optimizer.param_groups
            ],
            "scheduler": repr(sorted(self.scheduler.state_dict().items())),
            "next": [random.random(), float(np.random.rand()), float(torch.rand(()))],
        }


def _tensors(tree: object) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    inner = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (list, tuple)) else ()
    return [tensor for item in inner for tensor in _tensors(item)]


def run_first(folder: Path) -> dict[str, dict[str, object]]:
    """Train every case, save it, and train on."""
    outcomes: dict[str, dict[str, object]] = {}
    for name, case in CASES.items():
        run = Run(case, seed=1)
        run.train(STEPS_BEFORE)
        run.save(folder / name)
        run.train(STEPS_AFTER)
        outcomes[name] = run.outcome()
    return outcomes


def run_again(folder: Path) -> dict[str, dict[str, object]]:
    """Load every case into a run of another seed, and train on."""
    outcomes: dict[str, dict[str, object]] = {}
    for name, case in CASES.items():
        run = Run(case, seed=2)
        run.load(folder / name)
        run.train(STEPS_AFTER)
        outcomes[name] = run.outcome()
    return outcomes


if __name__ == "__main__":
    where = Path(sys.argv[1])
    torch.set_num_threads(int(sys.argv[2]))
    (where / "child.json").write_text(json.dumps(run_again(where)), encoding="utf-8")
