"""How far two tensors are apart: element by element, and along the manifold of orthonormal columns.

Note [Angles]
Between the column spaces of two n x k matrices with orthonormal columns there are k principal angles. Their cosines are
the singular values of ``Q1^H Q2``, which say nothing of angles below 1e-8; their sines, those of
``Q2 - Q1 (Q1^H Q2)``, which say nothing near a right angle. So an angle is taken from both. The length of the geodesic
on the Grassmann manifold is the root of the sum of their squares.

Source: Bjorck and Golub 1973, "Numerical methods for computing angles between linear subspaces", Math. Comp. 27,
theorem 1 and section 3; Edelman, Arias and Smith 1998, arXiv:physics/9806030, section 4.3 (arc length).

Note [Rotations]
Between two square matrices the geodesic on the orthogonal or unitary group, in the metric ``tr(X^H Y)``, has the length
``|log(Q1^H Q2)|_F``: the root of the sum of the squared angles of the eigenvalues of ``Q1^H Q2``, which lie on the unit
circle. Two real matrices whose determinants have different signs have no path between them.

Source: Edelman, Arias and Smith 1998, section 2.2.2 (geodesics of the orthogonal group).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from orthoserde.checkpoint import TensorSource
from orthoserde.orthonormal.rounding import gram_error, tall
from orthoserde.tensor_bytes import BLOCK_BYTES, DTYPES

#: Elements that are compared at a time, in double precision.
BLOCK_ELEMENTS = BLOCK_BYTES // 8

#: Multiplications (n k k, or 10 n n n for the eigenvalues of square ones) that a distance on the manifold may take.
MOST_MULTIPLICATIONS = 1 << 36

#: How far an entry of ``Q^H Q - I`` may be from 0 for Q to have a place near the manifold.
FARTHEST = 0.5


@dataclass(frozen=True)
class Distance:
    """How far two tensors of one shape are apart.

    Attributes:
        identical: Whether they have the same dtype and the same bits.
        largest: The largest ``|a - b|``, over elements that are finite in both.
        relative: ``|a - b| / |a|`` in Frobenius norms, likewise; infinite if a is zero and b is not.
        not_comparable: Elements that are NaN or infinite in one of them and not the same in the other.
    """

    identical: bool
    largest: float
    relative: float
    not_comparable: int = 0

    def within(self, tolerance: float) -> bool:
        """Whether they are identical, or apart by no more than this in relation to the first.

        Without a tolerance (0) only what is identical counts: values may be equal in another dtype, or but for a sign
        of zero.
        """
        return self.identical or (tolerance > 0 and not self.not_comparable and self.relative <= tolerance)


@dataclass(frozen=True)
class OnManifold:
    """How far two tensors with orthonormal columns (or rows) are apart along their manifold.

    Attributes:
        measure: ``"principal angles"`` between column spaces, see Note [Angles], or ``"rotation"`` for square ones, see
            Note [Rotations].
        largest_angle: The largest angle in radians.
        length: Length of the geodesic; of several matrices the root of the sum of squares. Infinite where two real
            square matrices have determinants of different signs.
    """

    measure: str
    largest_angle: float
    length: float


def between_sources(a: TensorSource, a_dtype: str, b: TensorSource, b_dtype: str) -> Distance:
    """Compare two stored tensors with equally many elements, a block at a time.

    Args:
        a: The first.
        a_dtype: Name of its dtype.
        b: The second.
        b_dtype: Name of its dtype.
    """
    sums = _Sums(a_dtype == b_dtype)
    for left, right in zip(_elements(a, DTYPES[a_dtype]), _elements(b, DTYPES[b_dtype]), strict=True):
        sums.add(left, right)
    return sums.distance()


def between(a: Tensor, b: Tensor) -> Distance:
    """Compare two tensors of one shape in memory, a block at a time."""
    sums = _Sums(a.dtype == b.dtype)
    left, right = a.detach().reshape(-1), b.detach().reshape(-1)
    for start in range(0, left.numel(), BLOCK_ELEMENTS):
        sums.add(left[start : start + BLOCK_ELEMENTS], right[start : start + BLOCK_ELEMENTS])
    return sums.distance()


def on_manifold(a: Tensor, b: Tensor) -> OnManifold | None:
    """How far two matrices, or stacks of them, are apart along the manifold of orthonormal columns.

    Args:
        a: Shape ``(..., n, k)``, with orthonormal columns, or rows where ``n < k``.
        b: Of the same shape.

    Returns:
        None where they are far from orthonormal or not finite, so that there is no such distance, have no columns, or
        would take more than ``MOST_MULTIPLICATIONS``.
    """
    if a.dim() < 2:
        return None
    n, k = max(a.shape[-2:]), min(a.shape[-2:])
    work = math.prod(a.shape[:-2]) * (10 * n**3 if n == k else n * k * k)
    if not work or work > MOST_MULTIPLICATIONS:
        return None
    dtype = torch.complex128 if a.is_complex() or b.is_complex() else torch.float64
    one, two = (tall(each.detach().to(dtype)).reshape(-1, n, k) for each in (a, b))
    if not (_is_near(one) and _is_near(two)):
        return None
    angles: list[Tensor] = []
    for left, right in zip(one, two, strict=True):
        found = _rotation_angles(left, right) if n == k else _principal_angles(left, right)
        angles.append(found)
    every = torch.cat(angles)
    measure = "rotation" if n == k else "principal angles"
    return OnManifold(measure, float(every.max()), float(every.square().sum().sqrt()))


def _is_near(batch: Tensor) -> bool:
    """Whether all matrices are orthonormal but for damage; in this form what is not finite is not."""
    return float(gram_error(batch).abs().max()) <= FARTHEST


def _principal_angles(one: Tensor, two: Tensor) -> Tensor:
    """K angles, ascending; see Note [Angles]."""
    # Orthonormal but for rounding, or damaged: the spaces are what is compared.
    one, two = torch.linalg.qr(one).Q, torch.linalg.qr(two).Q
    overlap = one.mH @ two
    cosines = torch.linalg.svdvals(overlap)
    sines = torch.linalg.svdvals(two - one @ overlap).flip(0)
    angles: Tensor = torch.atan2(sines, cosines)
    return angles


def _rotation_angles(one: Tensor, two: Tensor) -> Tensor:
    """Angles of the eigenvalues of ``one^H two``, infinite where there is no path; see Note [Rotations]."""
    turn: Tensor = one.mH @ two
    if not turn.is_complex() and float(torch.linalg.slogdet(turn).sign) < 0:
        return torch.full((one.size(0),), math.inf, dtype=torch.float64)
    angles: Tensor = torch.linalg.eigvals(turn).angle().abs()
    return angles


def true_gaps(gaps: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``|a - b|`` by element, where double precision does not hold the elements themselves.

    Args:
        gaps: What double precision makes of ``|a - b|``, float64.
        a: Of any dtype.
        b: Of the same shape as ``a`` and ``gaps``.

    Returns:
        float64: of two int64 or two uint64 less than 2**62 apart their true distance, rounded once, else ``gaps``.
    """
    if a.dtype != b.dtype or a.dtype not in (torch.int64, torch.uint64):
        return gaps
    # float64 has 53 bits. A difference in int64 wraps around, so it is right, of unsigned ones too, if it is not large.
    near = (a.view(torch.int64) - b.view(torch.int64)).abs().to(torch.float64)
    return torch.where(gaps < 2.0**62, near, gaps)


class _Sums:
    """Collects what a distance is made of, block by block."""

    def __init__(self, one_dtype: bool) -> None:
        self._identical = one_dtype
        self._largest = self._apart = self._norm = 0.0
        self._not_comparable = 0

    def add(self, left: Tensor, right: Tensor) -> None:
        """Go on with two blocks of equally many elements, of one dimension."""
        if self._identical:
            self._identical = torch.equal(_bits(left), _bits(right))
        wide = torch.complex128 if left.is_complex() or right.is_complex() else torch.float64
        one, two = left.to(wide), right.to(wide)
        same = (one == two) | (one.isnan() & two.isnan())
        finite = one.isfinite() & two.isfinite()
        self._not_comparable += int((~finite & ~same).sum())
        none = torch.zeros((), dtype=torch.float64, device="cpu")
        apart = torch.where(finite, true_gaps((one - two).abs(), left, right), none)
        self._largest = max(self._largest, float(apart.max()) if apart.numel() else 0.0)
        self._apart = math.hypot(self._apart, _norm(apart))
        self._norm = math.hypot(self._norm, _norm(torch.where(finite, one.abs(), none)))

    def distance(self) -> Distance:
        """What all blocks together say."""
        relative = self._apart / self._norm if self._norm else math.inf if self._apart else 0.0
        return Distance(self._identical, self._largest, relative, self._not_comparable)


def _norm(values: Tensor) -> float:
    """Euclidean norm of numbers from 0, whose squares may not be representable."""
    largest = float(values.max()) if values.numel() else 0.0
    return largest * float(torch.linalg.vector_norm(values / largest)) if largest else 0.0


def _bits(tensor: Tensor) -> Tensor:
    flat = tensor.resolve_conj().resolve_neg().contiguous()
    return flat.view(torch.uint8) if flat.numel() else flat.new_empty(0, dtype=torch.uint8)


def _elements(source: TensorSource, dtype: torch.dtype) -> Iterator[Tensor]:
    """The elements of a stored tensor in blocks of ``BLOCK_ELEMENTS``, however its source cuts them."""
    size = BLOCK_ELEMENTS * dtype.itemsize
    pending = bytearray()
    for block in source.blocks():
        pending += block
        while len(pending) >= size:
            yield _as_tensor(pending[:size], dtype)
            del pending[:size]
    if pending:
        yield _as_tensor(pending, dtype)


def _as_tensor(content: bytearray, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(content, dtype=torch.uint8).view(dtype)
