"""The canonical orthonormal completion of a matrix with orthonormal columns: pure functions of tensors.

Note [Canonical completion]
For n > k torch completes the first k columns of ``base``, W, with the Q factor of random columns. Any other completion
is only another chart. The canonical one, U(W), is the last n - k columns of Q = H_1 ... H_k, the Householder reflectors
of W: with their vectors as columns of V, Q = I - V T V^H, so U = E - V (T V[k:]^H), E the last n - k columns of I.

Note [Same bits everywhere]
Library reductions and matrix products sum in an order that depends on threads and machine. Here everything is computed
in float64 on the CPU from elementwise multiplications, additions, divisions and square roots, each rounded once as
IEEE 754 says, and from sums over a fixed binary tree. Complex numbers are pairs of real tensors, because a complex
product may be fused. Square roots are those of the C library: torch's own, from MKL, is one bit off for one number in
a hundred. So the same W gives the same bits on any number of threads and on any conforming machine.

Note [How orthonormal]
For B = [W | U(W)], no entry of ``|B^H B - I|`` exceeds the larger of W's own, ``max |W^H W - I|``, and
``eps + 4 (k + 1) 2**-52``, eps that of W's dtype; those in the columns of U(W) do not exceed the latter. It grows
neither with n nor with W's own error: the reflectors make U(W) orthogonal to W as it is. The first term is the rounding
of U(W) to W's dtype, the second what k reflectors in float64 leave. Measured for n to 512, k to 250, and W random, up
to 0.1 off, next to I or -I, or of unit vectors: 0.74 of it in float32 and complex64, 0.37 in float64 and complex128.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

#: Elements of the result that are computed at a time: they stay in the cache of a core, and torch, which shares out
#: larger elementwise operations, leaves them to one thread. (On busy cores the threads of a team wait for each other.)
BLOCK_ELEMENTS = 32768


def complete(columns: Tensor) -> Tensor:
    """Complete orthonormal columns to a square matrix: ``[W | U(W)]``.

    Args:
        columns: W, shape ``(..., n, k)`` with ``n >= k`` and orthonormal columns; float32, float64 or complex.

    Returns:
        A new tensor of shape ``(..., n, n)``, of W's dtype and device, column-major as torch's ``base`` is. Its first
        k columns are W, bit for bit; the others are computed in float64 and rounded once. No entry of
        ``|base^H base - I|`` exceeds ``max(e, eps + 4 (k + 1) 2**-52)``, e being the largest of ``|W^H W - I|`` and eps
        that of W's dtype. See Note [Canonical completion], Note [Same bits everywhere] and Note [How orthonormal].

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
            for index in matrices(batch):
                completion = Completion(columns[index])
                for part in row_parts(0, n, n - k):
                    base[index][part, k:] = completion.rows(part).to(base.device)
    return base


def reflectors(columns: Tensor) -> tuple[Tensor, Tensor]:
    """The Householder reflectors of orthonormal columns, as ``H_1 ... H_k = I - V T V^H``.

    Of that product U(W) is the last n - k columns, and the first k are those of W with some signs.

    Args:
        columns: W, shape ``(..., n, k)`` with ``n >= k`` and orthonormal columns; float32, float64 or complex.

    Returns:
        V, shape ``(..., n, k)``, lower triangular, and T, shape ``(..., k, k)``, upper triangular; of W's dtype and
        device, computed in float64 in some ``n k k`` single operations. The bits are the same everywhere, see
        Note [Same bits everywhere].
    """
    *batch, n, k = columns.shape
    with torch.inference_mode(False), torch.no_grad():
        vectors = torch.zeros(*batch, n, k, dtype=columns.dtype, device=columns.device)
        factors = torch.zeros(*batch, k, k, dtype=columns.dtype, device=columns.device)
        if columns.device.type != "meta":
            for index in matrices(batch):
                found = _reflectors(_planes(columns[index].detach().cpu()))
                vectors[index] = _tensor(found, columns.dtype).to(columns.device)
                factors[index] = _tensor(_triangular(found), columns.dtype).to(columns.device)
    return vectors, factors


def matrices(batch: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Indices of all matrices in a batch of this shape; one, ``()``, where there is no batch."""
    return product(*(range(size) for size in batch))


class Completion:
    """The canonical completion U(W) of one matrix W, some of its rows at a time.

    It holds ``2 n k`` numbers in float64; rows come out with the same bits whichever are asked for, and in whatever
    order.

    Args:
        columns: W, shape ``(n, k)`` with ``n > k``, of any device; float32, float64 or complex.
    """

    def __init__(self, columns: Tensor) -> None:
        columns = columns.detach().cpu()
        self._dtype = columns.dtype
        self._n, self._k = n, k = columns.size(0), columns.size(1)
        self._vectors = _reflectors(_planes(columns))
        factor = _triangular(self._vectors)
        tail = self._vectors[k:].conj()
        # M = T V[k:]^H, summed in the order of the reflectors.
        self._product = self._vectors.zeros(k, n - k)
        for part in row_parts(0, n - k, k):
            here = self._product[:, part]
            for j in range(k):
                here += factor[:, j, None] * tail[None, part, j]

    def rows(self, part: slice) -> Tensor:
        """Some rows of U(W), shape ``(rows, n - k)``, of W's dtype, on the CPU: a new tensor.

        Args:
            part: A slice with a start and a stop. Scratch memory grows with it; see :func:`row_parts`.
        """
        n, k = self._n, self._k
        result = self._vectors.zeros(part.stop - part.start, n - k)
        ones = torch.arange(min(max(part.start, k), part.stop), part.stop, device="cpu")
        result.real[ones - part.start, ones - k] = 1.0
        for j in range(k):
            result -= self._vectors[part, j, None] * self._product[None, j]
        return _tensor(result, self._dtype)

    def coordinates(self, matrix: Tensor) -> Tensor:
        """``U(W)^H @ matrix``, without the n x (n - k) matrix U(W): the coordinates of its columns in those of U(W).

        Args:
            matrix: Shape ``(n, c)``, real or complex as W is.

        Returns:
            A new tensor of shape ``(n - k, c)`` on the CPU, float64 or complex128. It is computed by matrix products,
            so its last bits may depend on the machine, which those of :meth:`rows` do not.
        """
        dtype = torch.float64 if self._vectors.imag is None else torch.complex128
        wide = matrix.detach().to("cpu", dtype)
        vectors, product = _tensor(self._vectors, dtype), _tensor(self._product, dtype)
        return wide[self._k :] - product.mH @ (vectors.mH @ wide)


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

    def __iadd__(self, other: _Planes) -> _Planes:
        self.real.add_(other.real)
        if self.imag is not None and other.imag is not None:
            self.imag.add_(other.imag)
        return self

    def __isub__(self, other: _Planes) -> _Planes:
        self.real.sub_(other.real)
        if self.imag is not None and other.imag is not None:
            self.imag.sub_(other.imag)
        return self

    def transposed(self) -> _Planes:
        return _Planes(self.real.mT, None if self.imag is None else self.imag.mT)

    def zeros(self, *shape: int) -> _Planes:
        """Zeros of another shape, real or complex as these are."""
        imag = None if self.imag is None else torch.zeros(shape, dtype=self.imag.dtype, device="cpu")
        return _Planes(torch.zeros(shape, dtype=self.real.dtype, device="cpu"), imag)

    def put(self, index: slice | tuple[int | slice, ...], values: _Planes) -> None:
        """Overwrite a part."""
        self.real[index] = values.real
        if self.imag is not None and values.imag is not None:
            self.imag[index] = values.imag

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


def row_parts(start: int, stop: int, length: int) -> Iterator[slice]:
    """Cut a range of rows (or columns) of this length into parts of at most ``BLOCK_ELEMENTS``, or of one row."""
    step = max(1, BLOCK_ELEMENTS // max(1, length))
    for first in range(start, stop, step):
        yield slice(first, min(first + step, stop))


def _reflectors(work: _Planes) -> _Planes:
    """Householder vectors of a matrix.

    Each vector v is scaled to ``v^H v = 2``, so that its reflector is ``I - v v^H``.
    """
    n, k = work.real.shape
    vectors = work.zeros(n, k)
    for j in range(k):
        column = work[j:, j]
        head, norm = column[0], _sqrt(column.squared_norm())
        size = _sqrt(_square(head))
        # Adding the norm with the sign (phase) of the head avoids cancellation; a zero head counts as positive.
        phase = _Planes(torch.ones_like(size), None if head.imag is None else torch.zeros_like(size))
        if float(size) > 0:
            phase = _Planes(head.real / size, None if head.imag is None else head.imag / size)
        vectors.put((slice(j, n), j), column)
        vectors.put((j, j), head + phase.scaled(norm))
        vector = vectors[j:, j, None]
        length = vector.squared_norm()
        if float(length) > 0:
            vector = vector.scaled(_sqrt(2.0 / length))
            vectors.put((slice(j, n), slice(j, j + 1)), vector)
        for part in row_parts(j + 1, k, n - j):
            rest = work[j:, part]
            rest -= vector * (vector.conj() * rest).sum()[None, :]
    return vectors


def _triangular(vectors: _Planes) -> _Planes:
    """T, column by column: ``T[:j, j] = -T[:j, :j] (V[:, :j]^H v_j)``, with ones on the diagonal (``v^H v = 2``)."""
    k = vectors.real.size(1)
    factor = vectors.zeros(k, k)
    for j in range(k):
        overlaps = vectors.zeros(j)
        for part in row_parts(0, j, vectors.real.size(0)):
            overlaps.put(part, (vectors[:, part].conj() * vectors[:, j, None]).sum())
        for part in row_parts(0, j, j):
            entries = (factor[part, :j].transposed() * overlaps[:, None]).sum()
            factor.put((part, j), entries.scaled(torch.tensor(-1.0, dtype=torch.float64, device="cpu")))
        factor.real[j, j] = 1.0
    return factor


def _planes(tensor: Tensor) -> _Planes:
    if tensor.is_complex():
        return _Planes(tensor.real.to(torch.float64, copy=True), tensor.imag.to(torch.float64, copy=True))
    return _Planes(tensor.to(torch.float64, copy=True), None)


def _tensor(planes: _Planes, dtype: torch.dtype) -> Tensor:
    if planes.imag is None:
        return planes.real.to(dtype)
    return torch.complex(planes.real, planes.imag).to(dtype)


def _sqrt(number: Tensor) -> Tensor:
    """The square root of one number, rounded once; see Note [Same bits everywhere]."""
    return torch.tensor(math.sqrt(float(number)), dtype=torch.float64, device="cpu")


def _square(number: _Planes) -> Tensor:
    square = number.real * number.real
    return square if number.imag is None else square + number.imag * number.imag
