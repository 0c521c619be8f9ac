"""From the coordinates of one base into those of the canonical one, in double precision.

Note [Change of chart]
Torch computes ``weight = base @ map(X)``, X being ``original`` with its longer side first. With ``base = [W | B]`` and
the canonical ``[W | U]``, ``M = U^H B`` is unitary, and all three maps commute with ``diag(I, M)``: they build X into
skew-Hermitian matrices or reflectors, which it conjugates. So the same weight has X's first k rows, and ``M X[k:]``
below. A gradient turns as X does, and so do weighted sums of gradients and X: the momentum of SGD. M is never formed.
"""

from __future__ import annotations

from torch import Tensor

from orthoserde import _torch
from orthoserde.orthonormal.completion import Completion, matrices
from orthoserde.orthonormal.probe import off_orthonormal, times
from orthoserde.orthonormal.rounding import tall
from orthoserde.transforms.columns import admitted


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
        if not _torch.has_nonzero(rows):
            return None
        result = rows.resolve_conj().resolve_neg().clone()
        for index, completion in self.completions.items():
            if _torch.has_nonzero(rows[index]):
                result[index] = completion.coordinates(times(self._base[index][:, self._k :], rows[index]))
        return result


def turning(tensor: Tensor, k: int) -> Tensor:
    """The part of ``original``, or of a tensor like it, that another chart changes: a view ``(..., n - k, k)``."""
    return tall(tensor.detach())[..., k:, :]


def misfit(base: Tensor, k: int) -> str | None:
    """What keeps a base from being one: it is not finite, or farther from orthonormal than rounding takes it.

    The first k columns are held to what a load admits. The whole, of which ``base^H base`` would take n n n
    multiplications, is probed.

    Args:
        base: Shape ``(..., n, n)``.
        k: Number of its first columns.
    """
    if not admitted(base[..., :k]):
        return "the first columns of its base are not finite, or farther from orthonormal than rounding takes them"
    mean = off_orthonormal(base)
    return None if mean is None else f"its base is not orthonormal (an entry of Q^H Q - I is {mean:.2g} in the mean)"
