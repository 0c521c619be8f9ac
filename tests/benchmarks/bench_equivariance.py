"""How far apart two runs go that differ in the completion of the base alone.

Both begin with the same weight, one in torch's random base, the other in the canonical one, and take the same steps of
the same optimizer. ``python -m tests.benchmarks.bench_equivariance`` prints the largest difference between their
weights after the last step, and takes two minutes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.optim import SGD, Adam, Optimizer

import orthoserde
from orthoserde import _torch
from tests.benchmarks.bench_sizes import row

STEPS = 50
SHAPES = ((40, 5), (256, 4), (300, 30))

#: By what a table calls them. Weight decay takes the diagonal of householder's original off -1, which torch cuts to 0.
OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter], str], Optimizer]] = {
    "SGD, momentum": lambda parameters, _: SGD(parameters, lr=0.02, momentum=0.9),
    "SGD, momentum, Nesterov, weight decay": lambda parameters, name: SGD(
        parameters, lr=0.02, momentum=0.9, nesterov=True, weight_decay=0.0 if name == "householder" else 0.01
    ),
    "Adam": lambda parameters, _: Adam(parameters, lr=0.01),
}


def apart(shape: tuple[int, int], orthogonal_map: str, dtype: torch.dtype, optimizer: str) -> float:
    """Train two models that differ in the chart, and compare their weights.

    Args:
        shape: Of the weight, ``(n, k)``.
        orthogonal_map: By torch's name.
        dtype: Of both models.
        optimizer: A key of ``OPTIMIZERS``.
    """
    torch.manual_seed(0)
    layer = nn.Linear(shape[1], shape[0], bias=False, dtype=dtype)
    parametrizations.orthogonal(layer, orthogonal_map=orthogonal_map)
    other = copy.deepcopy(layer)
    orthoserde.canonicalize_(other)
    target = torch.randn(shape, dtype=dtype) / shape[0] ** 0.5
    for model in (layer, other):
        moving = OPTIMIZERS[optimizer](model.parameters(), orthogonal_map)
        for _ in range(STEPS):
            moving.zero_grad()
            (model.weight - target).square().sum().backward()
            moving.step()
    return float((layer.weight - other.weight).detach().abs().max())


def main() -> None:
    """Print a table."""
    torch.set_num_threads(1)
    print(f"torch: {torch.__version__}, orthoserde: {orthoserde.__version__}; {STEPS} steps\n")
    row("map, dtype", *(f"{name}: {n} x {k}" for name in OPTIMIZERS for n, k in SHAPES))
    row(*["---"] * (1 + len(OPTIMIZERS) * len(SHAPES)))
    for dtype in (torch.float32, torch.float64):
        for name in _torch.ORTHOGONAL_MAPS:
            found = (apart(shape, name, dtype, optimizer) for optimizer in OPTIMIZERS for shape in SHAPES)
            row(f"{name}, {str(dtype).removeprefix('torch.')}", *(f"{number:.1e}" for number in found))


if __name__ == "__main__":
    main()
