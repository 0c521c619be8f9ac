"""The orthogonal maps of torch in extended precision: what others are measured by, and nothing that is fast.

They are computed with numpy's ``longdouble``, which has 64 bits of mantissa on x86 and more on some machines. Where it
is no more than a double, :data:`DIGITS` says so.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

#: Decimal digits that the numbers here are good for: 18 on x86.
DIGITS = int(np.finfo(np.longdouble).precision)

Matrix = npt.NDArray[Any]


def exact(orthogonal_map: str, original: Matrix) -> Matrix:
    """The first k columns of a map of X, within a few units of the last place of a longdouble.

    Args:
        orthogonal_map: By torch's name.
        original: X, shape ``(n, k)`` with ``n > k``, real.

    Returns:
        Shape ``(n, k)``, longdouble.
    """
    X = original.astype(np.longdouble)
    lower = np.tril(X, -1)
    if orthogonal_map == "householder":
        return _reflected(lower, np.diagonal(X))
    return {"matrix_exp": _exponential, "cayley": _cayley}[orthogonal_map](lower)


def _reflected(lower: Matrix, signs: Matrix) -> Matrix:
    """``H_1 ... H_k E``, reflector after reflector."""
    vectors = lower + _unit(lower)
    result = _unit(lower)
    for vector in vectors.T[::-1]:
        result -= np.outer(vector, 2 / (vector @ vector) * (vector @ result))
    return result * signs


def _exponential(lower: Matrix) -> Matrix:
    """``exp(A) E`` as ``exp(A / s)`` applied s times, each by its Taylor series; A has at most the norm s."""
    steps = math.ceil(2 * float(np.linalg.norm(lower.astype(np.float64)))) + 1
    result = _unit(lower)
    for _ in range(steps):
        term, order = result, 0
        while np.abs(term).max() > 1e-25:
            order += 1
            term = _times_skew(lower, term) / (steps * order)
            result = result + term
    return result


def _cayley(lower: Matrix) -> Matrix:
    """``(I - A / 2)^-1 (I + A / 2) E``: solved in double precision, and refined by exact residuals."""
    n = lower.shape[0]
    square = np.zeros((n, n))
    square[:, : lower.shape[1]] = lower
    left = np.eye(n) - (square - square.T) / 2
    right = _unit(lower) + _times_skew(lower, _unit(lower)) / 2
    result = np.zeros_like(right)
    for _ in range(4):
        residual = right - result + _times_skew(lower, result) / 2
        result = result + np.linalg.solve(left, residual.astype(np.float64))
    return result


def _times_skew(lower: Matrix, matrix: Matrix) -> Matrix:
    """``A matrix`` for ``A = X E^T - E X^T``."""
    k = lower.shape[1]
    result: Matrix = lower @ matrix[:k]
    result[:k] -= lower.T @ matrix
    return result


def _unit(matrix: Matrix) -> Matrix:
    """E: the first columns of the identity, of a matrix's shape."""
    return np.eye(*matrix.shape, dtype=np.longdouble)
