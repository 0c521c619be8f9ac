"""A run in this process, which starts in no time: for what does not depend on the process being new."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from orthoserde.proof import child
from orthoserde.proof.process import Run, encoded


class Listener:
    """Takes the place of the connection to the parent."""

    def __init__(self) -> None:
        self.messages: list[Any] = []

    def send(self, message: object) -> None:
        """Keep it."""
        self.messages.append(message)


def told(task: child.Task, make: Callable[..., object], step: Callable[..., object]) -> list[Any]:
    """What a new process would tell."""
    listener = Listener()
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        child.main(listener, task, encoded(make, step))
    random.setstate(python)
    np.random.set_state(numpy)
    return listener.messages


def run_here(task: child.Task, make: Callable[..., object], step: Callable[..., object]) -> Run:
    """Takes the place of `orthoserde.proof.process.run`."""
    messages = told(task, make, step)
    assert isinstance(messages[-1], child.Finished), messages[-1]
    (loaded,) = (message for message in messages if isinstance(message, child.Loaded))
    return Run(loaded, tuple(message for message in messages if isinstance(message, child.Stepped)))
