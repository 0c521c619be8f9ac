"""The snapshot that every refusal is held to notices each kind of change."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import orthogonal, spectral_norm

from tests.helpers import assert_unchanged, lived_in, snapshot


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = orthogonal(nn.Linear(3, 2))
        self.normed = spectral_norm(nn.Linear(3, 2))
        self.gate = nn.Parameter(torch.tensor([0.0, 1.0]))
        self.register_buffer("seen", torch.zeros(2, 2))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    seen: torch.Tensor
    scratch: torch.Tensor


def replace_parameter(model: Model) -> None:
    model.gate = nn.Parameter(model.gate.detach().clone())


def restride(model: Model) -> None:
    model.seen.t_()


def negate_zero(model: Model) -> None:
    with torch.no_grad():
        model.gate[0] = -0.0


def write_the_same(model: Model) -> None:
    with torch.no_grad():
        model.gate.mul_(1)


def move_gradient(model: Model) -> None:
    assert model.gate.grad is not None
    model.gate.grad[0] += 1


def evaluate_in_training(model: Model) -> None:
    model.normed.train()
    model.normed(torch.ones(1, 3))


CHANGES: list[Callable[[Model], object]] = [
    replace_parameter,
    restride,
    negate_zero,
    write_the_same,
    move_gradient,
    evaluate_in_training,
    lambda model: model.scratch.add_(1),
    lambda model: model.gate.requires_grad_(not model.gate.requires_grad),
    lambda model: setattr(model.gate, "grad", None),
    lambda model: model.linear.train(not model.linear.training),
    lambda model: setattr(model.normed, "__class__", nn.Linear),
    lambda model: model._buffers.update(seen=model._buffers.pop("seen")),
    lambda model: model._modules.update(linear=model._modules.pop("linear")),
    lambda model: setattr(model, "note", 1),
    lambda model: torch.rand(1),
    lambda model: random.random(),
    lambda model: np.random.rand(),
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_snapshot_notices_the_change(change: Callable[[Model], object]) -> None:
    model = Model()
    lived_in(model)
    before = snapshot(model)
    assert_unchanged(model, before)
    change(model)
    with pytest.raises(AssertionError, match="changed:"):
        assert_unchanged(model, before)
