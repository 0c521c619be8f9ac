"""From the coordinates of one base into those of the canonical one, in double precision.

Note [Change of chart]
Torch computes ``weight = base @ map(X)``, X being ``original`` with its longer side first. With ``base = [W | B]`` and
the canonical ``[W | U]``, ``M = U^H B`` is unitary, and all three maps commute with ``diag(I, M)``: they build X into
skew-Hermitian matrices or reflectors, which it conjugates. So the same weight has X's first k rows, and ``M X[k:]``
below. A gradient turns as X does, and so do weighted sums of gradients and X: the momentum of SGD. M is never formed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from orthoserde.completion import Completion, matrices
from orthoserde.parametrizations.orthogonal import MEAN_ROUNDING, tall
from orthoserde.tensor_bytes import BLOCK_BYTES
from orthoserde.transforms.columns import admitted

#: Random vectors by which a base is measured: enough for its mean error within a factor of two.
PROBES = 8

#: A normal number is larger than this many standard deviations once in a thousand million times.
FAR_OUT = 6.0


class Turn:
    """The change of chart of one tensor, see Note [Change of chart].

    Args:
        base: Shape ``(..., n, n)``, orthonormal; it is read as long as tensors are turned.
        k: Number of its first columns, ``0 < k < n``.
    """

    def __init__(self, base: Tensor, k: int) -> None:
        self._base, self._k = base.detach(), k
        self.completions = {index: Completion(self._base[index][:, :k]) for index in matrices(base.shape[:-2])}

    def turned(self, tensor: Tensor) -> Tensor | None:
        """The part of a tensor that turns (see :func:`turning`), in the canonical chart.

        Args:
            tensor: Of the shape of ``original``.

        Returns:
            A new tensor of its dtype on the CPU; None where nothing changes, because that part is zero.
        """
        rows = turning(tensor, self._k).cpu()
        if not rows.any():
            return None
        result = rows.resolve_conj().resolve_neg().clone()
        for index, completion in self.completions.items():
            if rows[index].any():
                result[index] = completion.coordinates(_times(self._base[index][:, self._k :], rows[index]))
        return result


def turning(tensor: Tensor, k: int) -> Tensor:
    """The part of ``original``, or of a tensor like it, that another chart changes: a view ``(..., n - k, k)``."""
    return tall(tensor.detach())[..., k:, :]


def misfit(base: Tensor, k: int) -> str | None:
    """What keeps a base from being one: it is not finite, or farther from orthonormal than rounding takes it.

    The first k columns are held to what a load admits. Of the whole, ``base^H base`` would take n n n multiplications.
    It is measured by vectors z of random signs, from a generator of its own, which take n n: ``base^H base z - z`` has
    the norm of ``base^H base - I`` in the mean (Hutchinson 1989).

    Args:
        base: Shape ``(..., n, n)``.
        k: Number of its first columns.
    """
    if not admitted(base[..., :k]):
        return "the first columns of its base are not finite, or farther from orthonormal than rounding takes them"
    n = base.size(-1)
    eps = torch.finfo(base.dtype).eps
    signs = torch.randint(2, (n, PROBES), generator=torch.Generator("cpu").manual_seed(0), device="cpu") * 2.0 - 1.0
    for index in matrices(base.shape[:-2]):
        error = (_adjoint_times(base[index], _times(base[index], signs)) - signs).abs()
        mean = math.sqrt(float(error.square().sum()) / PROBES) / n
        # In this form a NaN is refused too.
        if not (mean <= MEAN_ROUNDING * eps and float(error.max()) <= FAR_OUT * MEAN_ROUNDING * eps * math.sqrt(n)):
            return f"its base is not orthonormal (an entry of Q^H Q - I is {mean:.2g} in the mean)"
    return None


def _times(matrix: Tensor, right: Tensor) -> Tensor:
    """``matrix @ right`` in double precision on the CPU, a block of columns of the matrix at a time."""
    dtype = _double(matrix)
    result = torch.zeros(matrix.size(0), right.size(1), dtype=dtype, device="cpu")
    for part in _column_parts(matrix):
        result += matrix[:, part].detach().to("cpu", dtype) @ right[part].to("cpu", dtype)
    return result


def _adjoint_times(matrix: Tensor, right: Tensor) -> Tensor:
    """``matrix^H @ right`` likewise."""
    dtype = _double(matrix)
    wide = right.to("cpu", dtype)
    return torch.cat([matrix[:, part].detach().to("cpu", dtype).mH @ wide for part in _column_parts(matrix)])


def _double(tensor: Tensor) -> torch.dtype:
    return torch.complex128 if tensor.is_complex() else torch.float64


def _column_parts(matrix: Tensor) -> Iterator[slice]:
    step = max(1, BLOCK_BYTES // (16 * max(1, matrix.size(0))))
    for start in range(0, matrix.size(1), step):
        yield slice(start, min(start + step, matrix.size(1)))
