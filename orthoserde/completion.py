"""The canonical orthonormal completion of a matrix with orthonormal columns: pure functions of tensors.

Note [Canonical completion]
For n > k torch completes the first k columns of ``base``, W, with the Q factor of random columns. Any other completion
is only another chart. The canonical one, U(W), is the last n - k columns of Q = H_1 ... H_k, the Householder reflectors
of W: with their vectors as columns of V, Q = I - V T V^H, so U = E - V (T V[k:]^H), E the last n - k columns of I.

Note [Same bits everywhere]
Library reductions and matrix products sum in an order that depends on threads and machine. Here everything is computed
in float64 on the CPU from elementwise multiplications, additions, divisions and square roots, each rounded once as
IEEE 754 says, and from sums over a fixed binary tree. Complex numbers are pairs of real tensors, because a complex
product may be fused. So the same W gives the same bits on any number of threads and on any conforming machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

#: Rows of the result that are computed at a time, so that they stay in the cache of a core.
ROWS = 64


def complete(columns: Tensor) -> Tensor:
    """Complete orthonormal columns to a square matrix: ``[W | U(W)]``.

    Args:
        columns: W, shape ``(..., n, k)`` with ``n >= k`` and orthonormal columns; float32, float64 or complex.

    Returns:
        A new tensor of shape ``(..., n, n)``, of W's dtype and device, column-major as torch's ``base`` is. Its first
        k columns are W, bit for bit; the others are orthonormal to them as far as W is, in float64 and
        then rounded once. See Note [Canonical completion] and Note [Same bits everywhere].

    Raises:
        ValueError: Fewer rows than columns, or fewer than two dimensions.

    Source: Golub and Van Loan, Matrix Computations, 4th edition, sections 5.1 and 5.2; Schreiber and Van Loan 1989 for
    the form ``I - V T V^H``.
    """
    if columns.dim() < 2 or columns.size(-2) < columns.size(-1):
        raise ValueError(f"expected a shape (..., n, k) with n >= k, got {tuple(columns.shape)}")
    *batch, n, k = columns.shape
    with torch.no_grad():
        base = torch.empty(*batch, n, n, dtype=columns.dtype, device=columns.device).mT
        base[..., :k] = columns
        if n > k:
            if columns.device.type == "meta":
                return base
            for index in product(*(range(size) for size in batch)):
                _complete_matrix(base[index], columns[index].detach().cpu())
    return base


@dataclass(frozen=True)
class _Planes:
    """Real numbers, or complex ones as two real tensors; the imaginary one is None for real numbers."""

    real: Tensor
    imag: Tensor | None

    def __getitem__(self, index: object) -> _Planes:
        return _Planes(self.real[index], None if self.imag is None else self.imag[index])  # type: ignore[index]

    def __mul__(self, other: _Planes) -> _Planes:
        if self.imag is None or other.imag is None:
            return _Planes(self.real * other.real, None)
        real = self.real * other.real - self.imag * other.imag
        return _Planes(real, self.real * other.imag + self.imag * other.real)

    def __add__(self, other: _Planes) -> _Planes:
        imag = None if self.imag is None or other.imag is None else self.imag + other.imag
        return _Planes(self.real + other.real, imag)

    def __sub__(self, other: _Planes) -> _Planes:
        imag = None if self.imag is None or other.imag is None else self.imag - other.imag
        return _Planes(self.real - other.real, imag)

    def conj(self) -> _Planes:
        return _Planes(self.real, None if self.imag is None else -self.imag)

    def scaled(self, factor: Tensor) -> _Planes:
        return _Planes(self.real * factor, None if self.imag is None else self.imag * factor)

    def sum(self) -> _Planes:
        return _Planes(tree_sum(self.real), None if self.imag is None else tree_sum(self.imag))

    def squared_norm(self) -> Tensor:
        return tree_sum(_square(self))


def tree_sum(values: Tensor) -> Tensor:
    """Sum over the first dimension along a fixed binary tree, whatever the number of threads.

    Args:
        values: Shape ``(n, ...)``, any n; n = 0 gives zeros.
    """
    if values.size(0) == 0:
        return torch.zeros_like(values.sum(dim=0))
    while values.size(0) > 1:
        half = (values.size(0) + 1) // 2
        # The second half is the shorter one where n is odd: its missing partner counts as nothing, not as zero.
        paired = values[: values.size(0) - half] + values[half:]
        values = torch.cat([paired, values[values.size(0) - half : half]])
    return values[0]


def _complete_matrix(base: Tensor, columns: Tensor) -> None:
    n, k = columns.shape
    vectors, factor = _reflectors(_planes(columns))
    tail = vectors[k:].conj()
    # M = T V[k:]^H, one row for each reflector.
    rows = [_combination([factor[i, j] for j in range(i, k)], [tail[:, j] for j in range(i, k)]) for i in range(k)]
    for start in range(0, n, ROWS):
        block = vectors[start : start + ROWS]
        height = block.real.size(0)
        result = _planes(torch.zeros(height, n - k, dtype=columns.dtype))
        diagonal = [(row, start + row - k) for row in range(height) if start + row >= k]
        for row, column in diagonal:
            result.real[row, column] = 1.0
        for j in range(k):
            result = result - block[:, j, None] * rows[j][None, :]
        base[start : start + height, k:] = _tensor(result, columns.dtype).to(base.device)


def _combination(factors: Sequence[_Planes], vectors: Sequence[_Planes]) -> _Planes:
    total = factors[0] * vectors[0]
    for factor, vector in zip(factors[1:], vectors[1:], strict=True):
        total = total + factor * vector
    return total


def _reflectors(work: _Planes) -> tuple[_Planes, _Planes]:
    """Householder vectors of a matrix and the triangular T with ``H_1 ... H_k = I - V T V^H``.

    Each vector v is scaled to ``v^H v = 2``, so that its reflector is ``I - v v^H``.
    """
    n, k = work.real.shape
    vectors: list[_Planes] = []
    columns = [work[:, j] for j in range(k)]
    for j in range(k):
        column = columns[j]
        head = column[j]
        norm = torch.sqrt(column[j:].squared_norm())
        size = torch.sqrt(_square(head))
        # Adding the norm with the sign (phase) of the head avoids cancellation; a zero head counts as positive.
        phase = _Planes(torch.ones_like(size), None if head.imag is None else torch.zeros_like(size))
        if float(size) > 0:
            phase = _Planes(head.real / size, None if head.imag is None else head.imag / size)
        vector = _zero_above(column, j)
        pivot = head + phase.scaled(norm)
        vector.real[j] = pivot.real
        if vector.imag is not None and pivot.imag is not None:
            vector.imag[j] = pivot.imag
        length = vector.squared_norm()
        if float(length) > 0:
            vector = vector.scaled(torch.sqrt(2.0 / length))
        vectors.append(vector)
        for i in range(j + 1, k):
            overlap = (vector.conj() * columns[i]).sum()
            columns[i] = columns[i] - vector * overlap
    stacked = _stack(vectors, n)
    return stacked, _triangular(vectors, k)


def _triangular(vectors: list[_Planes], k: int) -> _Planes:
    """T, column by column: ``T[:j, j] = -T[:j, :j] (V[:, :j]^H v_j)``, with ones on the diagonal (``v^H v = 2``)."""
    imag = None if vectors and vectors[0].imag is None else torch.zeros(k, k, dtype=torch.float64)
    factor = _Planes(torch.zeros(k, k, dtype=torch.float64), imag)
    for j in range(k):
        overlaps = [(vectors[i].conj() * vectors[j]).sum() for i in range(j)]
        for i in range(j):
            entry = _combination([factor[i, m] for m in range(i, j)], overlaps[i:])
            factor.real[i, j] = -entry.real
            if factor.imag is not None and entry.imag is not None:
                factor.imag[i, j] = -entry.imag
        factor.real[j, j] = 1.0
    return factor


def _planes(tensor: Tensor) -> _Planes:
    if tensor.is_complex():
        return _Planes(tensor.real.to(torch.float64), tensor.imag.to(torch.float64))
    return _Planes(tensor.to(torch.float64), None)


def _tensor(planes: _Planes, dtype: torch.dtype) -> Tensor:
    if planes.imag is None:
        return planes.real.to(dtype)
    return torch.complex(planes.real, planes.imag).to(dtype)


def _square(number: _Planes) -> Tensor:
    square = number.real * number.real
    return square if number.imag is None else square + number.imag * number.imag


def _zero_above(column: _Planes, j: int) -> _Planes:
    real = column.real.clone()
    real[:j] = 0
    if column.imag is None:
        return _Planes(real, None)
    imag = column.imag.clone()
    imag[:j] = 0
    return _Planes(real, imag)


def _stack(vectors: list[_Planes], n: int) -> _Planes:
    if not vectors:
        return _Planes(torch.zeros(n, 0, dtype=torch.float64), None)
    real = torch.stack([vector.real for vector in vectors], dim=1)
    parts = [vector.imag for vector in vectors if vector.imag is not None]
    return _Planes(real, torch.stack(parts, dim=1) if parts else None)
