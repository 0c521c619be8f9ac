"""Weights in the structured form, and their twins in torch's."""

from __future__ import annotations

import itertools
from typing import cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import orthoserde
from orthoserde.parametrizations.structured import Orthogonal

ORIGINAL = "parametrizations.weight.original"
BASE = "parametrizations.weight.0.base"
COLUMNS = "parametrizations.weight.0.columns"

MAPS = ["householder", "cayley", "matrix_exp"]
#: Tall, wide, batches, hardly tall (2 k >= n), square, a vector, an empty batch.
SHAPES = [(40, 5), (5, 40), (3, 12, 4), (2, 3, 4, 9), (7, 5), (6, 6), (9, 1), (1, 9), (1, 1), (0, 9, 4)]
REAL = [torch.float32, torch.float64]
COMPLEX = [torch.complex64, torch.complex128]

CASES = [
    pytest.param(name, shape, dtype, id=f"{name}-{'x'.join(map(str, shape))}-{str(dtype).removeprefix('torch.')}")
    for name, shape, dtype in itertools.product(MAPS, SHAPES, REAL + COMPLEX)
    if not (name == "householder" and dtype.is_complex)
]


class Holder(nn.Module):
    """A module with one weight."""

    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


def orthonormal(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """A weight whose shorter side is orthonormal."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = shape[-2:]
    random = torch.randn(*shape[:-2], max(rows, columns), min(rows, columns), dtype=dtype, generator=generator)
    # LAPACK's Q has the signs of its own reflectors; any others must do too.
    tall: Tensor = torch.linalg.qr(random)[0] * random[..., :1, :].real.sign()
    return (tall if rows >= columns else tall.mT).contiguous()


def make(
    shape: tuple[int, ...],
    orthogonal_map: str | None = None,
    dtype: torch.dtype = torch.float32,
    *,
    structured: bool = True,
    moved: float = 0.5,
    seed: int = 0,
) -> nn.Module:
    """A weight that training has moved by so much; the same one in both forms, for one seed."""
    module = orthoserde.orthogonal(
        Holder(orthonormal(shape, dtype, seed)), orthogonal_map=orthogonal_map, structured=structured
    )
    move(module, moved, seed)
    return module


def move(module: nn.Module, by: float, seed: int = 0) -> None:
    """What training would do: every entry that counts, the imaginary ones of the diagonal too."""
    original = module.get_parameter(ORIGINAL)
    generator = torch.Generator().manual_seed(seed + 1)
    step = torch.randn(original.shape, dtype=original.dtype, generator=generator) * by
    wide = original.size(-2) < original.size(-1)
    lower = step.triu(1) if wide else step.tril(-1)
    if step.is_complex():
        lower.diagonal(dim1=-2, dim2=-1).add_(1j * step.diagonal(dim1=-2, dim2=-1).imag)
    with torch.no_grad():
        original.add_(lower)


def link(module: nn.Module) -> Orthogonal:
    """The parametrization of its weight."""
    assert isinstance(module.parametrizations, nn.ModuleDict)
    found = cast("parametrize.ParametrizationList", module.parametrizations["weight"])[0]
    assert isinstance(found, Orthogonal)
    return found


def weight_of(module: nn.Module) -> Tensor:
    """Its computed weight."""
    assert isinstance(module.weight, Tensor)
    return module.weight
