"""Whether large matrices are orthonormal, and what makes them so is whole, without the products that would say it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from orthoserde.orthonormal.completion import matrices
from orthoserde.orthonormal.rounding import MEAN_ROUNDING
from orthoserde.tensor_bytes import BLOCK_BYTES

#: Random vectors by which a matrix is measured: enough for its mean error within a factor of two.
PROBES = 8

#: A normal number is larger than this many standard deviations once in a thousand million times.
FAR_OUT = 6.0


def off_orthonormal(batch: Tensor) -> float | None:
    """The mean entry of ``Q^H Q - I`` of the first matrix that is farther from orthonormal than rounding takes it.

    ``Q^H Q`` would take n k k multiplications. It is measured by vectors z of random signs, from a generator of its
    own, which take n k: ``Q^H Q z - z`` has the norm of ``Q^H Q - I`` in the mean (Hutchinson 1989). Memory holds a
    block of columns in double precision at a time.

    Args:
        batch: Shape ``(..., n, k)`` with ``k <= n``; float32, float64, complex64 or complex128.

    Returns:
        The root of the mean square, NaN where the matrix is not finite; None if all matrices are orthonormal.
    """
    side = batch.size(-1)
    eps = torch.finfo(batch.dtype).eps
    signs = torch.randint(2, (side, PROBES), generator=torch.Generator("cpu").manual_seed(0), device="cpu") * 2.0 - 1.0
    for index in matrices(batch.shape[:-2]):
        error = (adjoint_times(batch[index], times(batch[index], signs)) - signs).abs()
        mean = math.sqrt(float(error.square().sum()) / PROBES) / max(1, side)
        largest = float(error.max()) if side else 0.0
        # In this form a NaN is refused too.
        if not (mean <= MEAN_ROUNDING * eps and largest <= FAR_OUT * MEAN_ROUNDING * eps * math.sqrt(side)):
            return mean
    return None


@dataclass(frozen=True)
class MovedDiagonal:
    """What of the diagonal of a householder original is not +-1.

    Torch multiplies the columns of its householder product by it, read as integers (``.int()``): -0.99999 is read as 0.

    Attributes:
        entries: Entries in all.
        moved: Those that are not +-1.
        wrong: Those of them that torch does not read as +-1, so that the weight is off its constraint.
        vanished: Those of them that are below 1 in size.
        lost: Those of them that have no sign left, 0 and NaN.
        example: The first wrong one, or the first moved one where none is wrong.
    """

    entries: int
    moved: int
    wrong: int
    vanished: int
    lost: int
    example: float

    def __str__(self) -> str:
        return f"{self.moved} of {self.entries} diagonal entries of its original are not +-1 ({self.example:.9g})"


def moved_diagonal(original: Tensor) -> MovedDiagonal | None:
    """Look at the diagonal of a householder original, of shape ``(..., n, k)``; None where all of it is +-1."""
    diagonal = original.detach().diagonal(dim1=-2, dim2=-1).flatten()
    # Up to some hundred entries in a third of the time of tensor operations.
    if diagonal.numel() <= 1024 and {1.0, -1.0}.issuperset(diagonal.tolist()):
        return None
    sizes = diagonal.abs()
    moved = sizes != 1
    if not bool(moved.any()):
        return None
    wrong = ~((sizes >= 1) & (sizes < 2))  # in this form NaN is wrong too
    odd = diagonal[wrong if bool(wrong.any()) else moved]
    return MovedDiagonal(
        entries=diagonal.numel(),
        moved=int(moved.sum()),
        wrong=int(wrong.sum()),
        vanished=int((sizes < 1).sum()),
        lost=int(((sizes == 0) | sizes.isnan()).sum()),
        example=float(odd[0].real),
    )


def times(matrix: Tensor, right: Tensor) -> Tensor:
    """``matrix @ right`` in double precision on the CPU, a block of columns of the matrix at a time."""
    dtype = _double(matrix)
    result = torch.zeros(matrix.size(0), right.size(1), dtype=dtype, device="cpu")
    for part in _column_parts(matrix):
        result += matrix[:, part].detach().to("cpu", dtype) @ right[part].to("cpu", dtype)
    return result


def adjoint_times(matrix: Tensor, right: Tensor) -> Tensor:
    """``matrix^H @ right`` likewise."""
    dtype = _double(matrix)
    wide = right.to("cpu", dtype)
    parts = [matrix[:, part].detach().to("cpu", dtype).mH @ wide for part in _column_parts(matrix)]
    return torch.cat(parts) if parts else wide[:0]


def _double(tensor: Tensor) -> torch.dtype:
    return torch.complex128 if tensor.is_complex() else torch.float64


def _column_parts(matrix: Tensor) -> Iterator[slice]:
    step = max(1, BLOCK_BYTES // (16 * max(1, matrix.size(0))))
    for start in range(0, matrix.size(1), step):
        yield slice(start, min(start + step, matrix.size(1)))
