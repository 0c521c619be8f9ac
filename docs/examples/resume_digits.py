"""Train on handwritten digits, stop halfway, resume in a new process, and compare the runs step by step.

The network has three orthogonal layers (one for each of torch's maps) and one with spectral norm; the data are the
digits that come with scikit-learn. Three runs see the same batches:

- *uninterrupted*: trains from the first step to the last;
- *orthoserde*: a new process loads what ``orthoserde.save`` wrote halfway;
- *weights only*: a new process loads the computed weights halfway, as pyreft's loader does.

Run it with ``python docs/examples/resume_digits.py``: it takes a few seconds on a CPU and needs no network.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import orthogonal, spectral_norm

import orthoserde

RUNS = ("uninterrupted", "orthoserde", "weights only")
ORTHOGONAL = ("householder", "cayley", "matrix_exp")  # layers of the network, each named after its map
BATCH_SIZE = 128
LEARNING_RATE = 3e-3


class Network(nn.Module):
    """A classifier of 8 x 8 images; none of its orthogonal weights is square, so each base has a random part."""

    def __init__(self) -> None:
        super().__init__()
        self.householder = orthogonal(nn.Linear(64, 128), orthogonal_map="householder")
        self.cayley = orthogonal(nn.Linear(128, 48), orthogonal_map="cayley")
        self.matrix_exp = orthogonal(nn.Linear(48, 32), orthogonal_map="matrix_exp")
        self.spectral = spectral_norm(nn.Linear(32, 32))
        self.head = nn.Linear(32, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits, (batch, 10), of images, (batch, 64)."""
        for layer in (self.householder, self.cayley, self.matrix_exp, self.spectral):
            images = F.relu(layer(images))
        return self.head(images)


@dataclass(frozen=True)
class Data:
    """Images, (samples, 64), and the digits that they show, (samples,)."""

    images: Tensor
    digits: Tensor


@dataclass
class Run:
    """What one run measured, step by step from ``first_step``, and what it ended with."""

    first_step: int
    losses: list[float]
    errors: list[float]
    accuracy: float  # on the test images
    digest: str  # of every tensor of the model


def load_data() -> tuple[Data, Data]:
    """Return training and test data; every fifth sample is a test sample."""
    bunch = load_digits()
    images = torch.tensor(bunch.data, dtype=torch.float32) / 16
    digits = torch.tensor(bunch.target)
    test = torch.arange(len(digits)) % 5 == 0
    return Data(images[~test], digits[~test]), Data(images[test], digits[test])


def make_model(seed: int) -> tuple[Network, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = Network()
    return model, torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)


def orthogonal_weights(model: Network) -> dict[str, Tensor]:
    """Return the weights of the orthogonal layers, the longer side first: (n, k) with n > k."""
    # Only theirs: reading the weight of the layer with spectral norm would step its power iteration.
    layers = {name: layer for name, layer in model.named_children() if name in ORTHOGONAL and isinstance(layer, nn.Linear)}
    return {name: layer.weight if layer.out_features > layer.in_features else layer.weight.mT for name, layer in layers.items()}


@torch.no_grad()
def orthogonality_error(model: Network) -> float:
    """Return max |Q^T Q - I| over the orthogonal layers."""
    weights = orthogonal_weights(model).values()
    return max(float((Q.mT @ Q - torch.eye(Q.shape[1])).abs().max()) for Q in weights)


def train(model: Network, optimizer: torch.optim.Optimizer, data: Data, steps: range) -> tuple[list[float], list[float]]:
    """Train in place; return the loss and the orthogonality error of the weights that each step starts from."""
    losses, errors = [], []
    for step in steps:
        # The batch depends on the step alone, so that every run sees the same ones.
        batch = torch.randint(len(data.digits), (BATCH_SIZE,), generator=torch.Generator().manual_seed(step))
        loss = F.cross_entropy(model(data.images[batch]), data.digits[batch])
        losses.append(loss.item())
        errors.append(orthogonality_error(model))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses, errors
