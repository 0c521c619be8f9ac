"""What the tests of folders share."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils.parametrizations import orthogonal

import orthoserde


def small(seed: int = 0) -> nn.Module:
    """A model with a parametrized weight, a tie and a column-major buffer."""
    torch.manual_seed(seed)
    model = nn.Sequential(orthogonal(nn.Linear(6, 3)), nn.Linear(3, 3), nn.Linear(3, 3))
    model[2].weight = model[1].weight
    return model


def overwrite_(model: nn.Module, value: float = 7.0) -> None:
    """Write one value over every parameter and buffer."""
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(value)


def saved(folder: Path, *steps: int, keep: int | None = None, prefix: str = "step") -> orthoserde.Checkpoints:
    """Checkpoints of these steps in a folder."""
    checkpoints = orthoserde.Checkpoints(folder, keep=keep, prefix=prefix)
    for step in steps:
        checkpoints.save(step, small())
    return checkpoints


def names(folder: Path) -> list[str]:
    """What a folder holds."""
    return sorted(os.listdir(folder))
