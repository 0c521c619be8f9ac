"""A tensor under each of geotorch's constraints, in each sort of shape that it is for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import geotorch
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

MATRICES = {"tall": (5, 3), "wide": (3, 5), "square": (4, 4), "batch": (2, 5, 3), "wide-batch": (2, 3, 5)}
SQUARES = {"square": (4, 4), "batch": (2, 4, 4)}
VECTORS = {"vector": (6,), "vectors": (2, 6)}

Register = Callable[[nn.Module], object]


class Holder(nn.Module):
    """A weight of any shape, beside a plain parameter."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape, dtype=dtype))
        self.shift = nn.Parameter(torch.randn(shape[-1], dtype=dtype))

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs * self.weight + self.shift


@dataclass(frozen=True)
class Constraint:
    """One of geotorch's classes.

    Attributes:
        register: Registers it on the weight of a holder.
        shapes: Shapes by name.
        config: What its configuration says beside the size.
        other: Registers it in another configuration; None if there is none.
    """

    register: Register
    shapes: dict[str, tuple[int, ...]]
    config: dict[str, Any]
    other: Register | None = None


def by(function: Callable[..., object], *arguments: Any, **named: Any) -> Register:
    """A function of geotorch's, with the arguments after the name of the tensor."""
    return lambda module: function(module, "weight", *arguments, **named)


def of(cls: Callable[..., Any], *arguments: Any) -> Register:
    """A class of geotorch's, registered as its own functions do it."""

    def register(module: nn.Module) -> None:
        weight = module.get_parameter("weight")
        link = cls(weight.size(), *arguments).to(weight.dtype)
        with torch.no_grad():
            sample = link.sample() if hasattr(link, "sample") else weight.clone()
            # geotorch 0.4.0's own almost_orthogonal fails on wide tensors: it samples them tall.
            weight.copy_(sample if sample.shape == weight.shape else sample.mT)
        parametrize.register_parametrization(module, "weight", link, unsafe=True)

    return register


CONSTRAINTS: dict[str, Constraint] = {
    "Rn": Constraint(of(geotorch.Rn), VECTORS, {}),
    "Skew": Constraint(by(geotorch.skew), SQUARES, {"lower": True}, by(geotorch.skew, lower=False)),
    "Symmetric": Constraint(
        by(geotorch.symmetric, lower=False), SQUARES, {"lower": False}, by(geotorch.symmetric, lower=True)
    ),
    "SO": Constraint(
        of(geotorch.SO, "cayley", False), SQUARES, {"triv": "cayley", "lower": False}, of(geotorch.SO, "cayley", True)
    ),
    "Stiefel": Constraint(by(geotorch.orthogonal), MATRICES, {"triv": "expm"}, by(geotorch.orthogonal, "cayley")),
    "Grassmannian": Constraint(
        by(geotorch.grassmannian, "cayley"), MATRICES, {"triv": "cayley"}, by(geotorch.grassmannian)
    ),
    "Sphere": Constraint(
        by(geotorch.sphere, 2.5), {**VECTORS, **MATRICES}, {"radius": 2.5}, by(geotorch.sphere, radius=2)
    ),
    "SphereEmbedded": Constraint(
        by(geotorch.sphere, 2, embedded=True), VECTORS, {"radius": 2}, by(geotorch.sphere, 2.5, embedded=True)
    ),
    "LowRank": Constraint(
        by(geotorch.low_rank, 2), MATRICES, {"rank": 2, "triv": "expm"}, by(geotorch.low_rank, 2, "cayley")
    ),
    "FixedRank": Constraint(
        by(geotorch.fixed_rank, 2, triv="cayley"),
        MATRICES,
        {"rank": 2, "f": "softplus", "triv": "cayley"},
        by(geotorch.fixed_rank, 2),
    ),
    "AlmostOrthogonal": Constraint(
        of(geotorch.AlmostOrthogonal, 0.3, "tanh"),
        MATRICES,
        {"lam": 0.3, "f": "tanh", "triv": "expm"},
        of(geotorch.AlmostOrthogonal, 0.3, "scaled_sigmoid"),
    ),
    "GLp": Constraint(
        by(geotorch.invertible), SQUARES, {"f": "softplus", "triv": "expm"}, by(geotorch.invertible, triv="cayley")
    ),
    "SL": Constraint(by(geotorch.sln), SQUARES, {"f": "softplus", "triv": "expm"}, by(geotorch.sln, triv="cayley")),
    "PSD": Constraint(
        by(geotorch.positive_definite),
        SQUARES,
        {"f": "softplus", "triv": "expm"},
        by(geotorch.positive_definite, triv="cayley"),
    ),
    "PSSD": Constraint(
        by(geotorch.positive_semidefinite), SQUARES, {"triv": "expm"}, by(geotorch.positive_semidefinite, "cayley")
    ),
    "PSSDLowRank": Constraint(
        by(geotorch.positive_semidefinite_low_rank, 2),
        SQUARES,
        {"rank": 2, "triv": "expm"},
        by(geotorch.positive_semidefinite_low_rank, 2, "cayley"),
    ),
    "PSSDFixedRank": Constraint(
        by(geotorch.positive_semidefinite_fixed_rank, 2),
        SQUARES,
        {"rank": 2, "f": "softplus", "triv": "expm"},
        by(geotorch.positive_semidefinite_fixed_rank, 2, triv="cayley"),
    ),
    "Hurwitz": Constraint(
        by(geotorch.alpha_stable, 0.5),
        {"square": (4, 4)},
        {"alpha": 0.5, "triv": "expm"},
        by(geotorch.alpha_stable, 0.25),
    ),
}

#: Every constraint with every shape.
CASES = [(name, shape) for name, constraint in CONSTRAINTS.items() for shape in constraint.shapes]


def bare(name: str, shape: str) -> Holder:
    """A plain model of a case."""
    return Holder(CONSTRAINTS[name].shapes[shape])


def constrained(name: str, shape: str) -> Holder:
    """The model of a case, in a new state of its own."""
    model = bare(name, shape)
    CONSTRAINTS[name].register(model)
    return model


def weight_of(model: nn.Module) -> Tensor:
    """The computed weight, without a graph."""
    weight = model.weight
    assert isinstance(weight, Tensor)
    return weight.detach()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    """Some steps towards values off any constraint; the loss of each."""
    shape = weight_of(model).shape
    inputs = torch.linspace(-1, 1, shape.numel()).reshape(shape)
    losses = []
    for _ in range(steps):
        loss = (model(inputs) - inputs.cos()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def adam(model: nn.Module) -> torch.optim.Optimizer:
    """An optimizer with state."""
    return torch.optim.Adam(model.parameters(), lr=0.02)
