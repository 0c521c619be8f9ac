"""Whether large matrices are orthonormal, and what makes them so is whole, without the products that would say it."""

from __future__ import annotations

import math
from collections.abc import Iterator

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


def moved_diagonal(original: Tensor) -> str | None:
    """What of the diagonal of a householder original is not +-1, in words; None where all of it is.

    Args:
        original: Shape ``(..., n, k)``.
    """
    diagonal = original.detach().diagonal(dim1=-2, dim2=-1)
    if {1.0, -1.0}.issuperset(diagonal.flatten().tolist()):  # in a third of the time of tensor operations
        return None
    moved = diagonal[diagonal.abs() != 1]
    count = f"{moved.numel()} of {diagonal.numel()} diagonal entries"
    return f"{count} of its original are not +-1 ({float(moved[0]):.9g})"


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
