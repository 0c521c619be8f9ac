"""What runs in the new process: make, load, train, and tell what was found."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from typing import Protocol

import numpy as np
from torch import Tensor, nn

from orthoserde import api, storage
from orthoserde.errors import LegacyCheckpointWarning
from orthoserde.manifest.training import TrainingRecord
from orthoserde.proof.compare import Seen, from_file, seen
from orthoserde.proof.held import Made, live, saved
from orthoserde.proof.report import Difference
from orthoserde.proof.settings import Settings, seed_generators
from orthoserde.reports import Fidelity
from orthoserde.training.optimizers import labelled


@dataclass(frozen=True)
class Task:
    """What a process is to do.

    Attributes:
        path: The checkpoint.
        steps: How many steps to take.
        references: Files to compare with, by step.
        observe: Whether digests of all tensors are told after each step.
        seed: Where the random generators start.
        settings: Settings of the process.
    """

    path: str
    steps: int
    references: Mapping[int, str]
    observe: bool
    seed: int
    settings: Settings


@dataclass(frozen=True)
class Doing:
    """What is done next: words for an error."""

    what: str


@dataclass(frozen=True)
class Loaded:
    """The checkpoint is loaded.

    Attributes:
        fidelity: As the report of the load says.
        notes: What the caller should know.
    """

    fidelity: Fidelity
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Stepped:
    """A step was taken.

    Attributes:
        loss: What it returned.
        seen: What it left behind, if that was asked for.
        differences: How that differs from the reference, if there is one for this step.
        compared: Names of what was compared.
    """

    loss: float | None
    seen: Seen | None
    differences: tuple[Difference, ...]
    compared: tuple[str, ...]


@dataclass(frozen=True)
class Failed:
    """Something was raised.

    Attributes:
        error: Its class and message.
        traceback: All of it.
    """

    error: str
    traceback: str


@dataclass(frozen=True)
class Finished:
    """All steps were taken."""


class Parent(Protocol):
    """Who is told: the end of a pipe."""

    def send(self, message: object, /) -> None:
        """Tell something that can be pickled."""


def main(parent: Parent, task: Task, functions: bytes) -> None:
    """Do a task and tell of it.

    Args:
        parent: Who is told.
        task: The task.
        functions: The user's ``make`` and ``step``, by name; not unpickled before here, so that an import that fails
            can be told.
    """
    try:
        for message in _work(task, functions):
            parent.send(message)
    except Exception as error:  # whatever the user's functions raise is to be told, not printed
        parent.send(Failed("".join(traceback.format_exception_only(error)).strip(), traceback.format_exc()))


def _work(task: Task, functions: bytes) -> Iterator[object]:
    yield Doing("importing make and step")
    task.settings.apply()
    seed_generators(task.seed)
    make, step = ForkingPickler.loads(functions)
    yield Doing("make()")
    made = _made(make())
    yield Doing(f"loading {task.path}")
    yield _load(made, task.path)
    for number in range(1, task.steps + 1):
        yield Doing(f"step {number}")
        loss = _loss(step(*made.arguments))
        yield Doing(f"comparing after step {number}")
        if task.observe:
            yield Stepped(loss, seen(loss, live(made)), (), made.parts)
        else:
            yield Stepped(loss, None, *_against(number, made, task.references.get(number)))
    yield Finished()


def _made(returned: object) -> Made:
    """What ``make`` returned.

    Raises:
        TypeError: It is not what ``make`` may return.
    """
    parts = returned if isinstance(returned, tuple) else (returned,)
    model, optimizer, state = (*parts, None, None)[:3] if parts else (None, None, None)
    if len(parts) > 3 or not isinstance(model, nn.Module):
        got = ", ".join(type(part).__name__ for part in parts)
        raise TypeError(f"make: expected a model, (model, optimizer) or (model, optimizer, state), got ({got})")
    labelled(optimizer)
    if state is not None and not isinstance(state, Mapping):
        raise TypeError(f"make: expected a mapping of names for the state, got {type(state).__name__}")
    return Made(model, optimizer, state, parts)


def _load(made: Made, path: str) -> Loaded:
    """Load all that the file holds of what was made."""
    training = api.inspect(path).training
    optimizers = training is not None and bool(training.optimizers)
    state = training is not None and bool(training.state)
    rng = training is not None and training.rng is not None
    notes = []
    if labelled(made.optimizer) and not optimizers:
        notes.append("the file holds no optimizer: the one that make returned started afresh")
    if made.state and not state:
        notes.append("the file holds no state of yours: what make returned started afresh")
    if not labelled(made.optimizer) and optimizers:
        notes.append("the file holds an optimizer, but make returned none")
    if not rng:
        notes.append("the file holds no random generators: what is drawn from them is another thing than it was")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LegacyCheckpointWarning)  # the fidelity says the same
        report = api.load(
            made.model,
            path,
            optimizer=made.optimizer if optimizers else None,
            state=made.state if state else None,
            rng=rng,
        )
    return Loaded(report.fidelity, (*notes, *report.notes))


def _loss(returned: object) -> float | None:
    """What a step returned.

    Raises:
        TypeError: It is no number.
    """
    if returned is None:
        return None
    if isinstance(returned, Tensor) and returned.numel() == 1 and not returned.is_complex():
        return float(returned.detach())
    number = returned.item() if isinstance(returned, (np.generic, np.ndarray)) and returned.ndim == 0 else returned
    if isinstance(number, (int, float)):
        return float(number)
    raise TypeError(f"step: expected the loss (a number, or a tensor of one element) or None, got {returned!r:.200}")


def _against(step: int, made: Made, path: str | None) -> tuple[tuple[Difference, ...], tuple[str, ...]]:
    """How what a run holds differs from a file, and names of what was compared; nothing without a file."""
    if path is None:
        return (), ()
    with storage.read(path) as checkpoint:
        training = checkpoint.manifest.training or TrainingRecord()
        both = made.only(frozenset(training.optimizers), frozenset(training.state))
        held = live(both)
        reference = saved(checkpoint, frozenset(labelled(both.optimizer)), frozenset(both.state or {}))
        return tuple(from_file(step, held, reference)), both.parts
