"""Torch's orthogonal maps for tall matrices, without any matrix of n x n: pure functions of tensors.

Note [Thin maps]
Of ``map(X)``, an n x n orthogonal matrix for X of n x k, a weight needs the first k columns. They are in the span of X
and of E, the first k columns of I. With X strictly lower triangular (its diagonal imaginary, where X is complex) torch
maps the skew matrix ``A = X E^H - E X^H``, and for any ``s > 0`` and ``S = [E, X / s]``

    A S = S N    with    N = [[-X1^H, -X^H X / s], [s I, X1]]    (2k x 2k, X1 the first k rows of X),

so that ``f(A) E = S f(N) [I; 0]`` for the exponential and for the Cayley map. The s that balances N is the largest norm
of a column of X; the result does not depend on it, so it has no gradient. Householder reflectors with the vectors of
``V = E + X``, each of the length that its vector has, multiply to ``I - V T V^H``, T triangular with
``T^-1 = triu(V^H V, 1) + diag(V^H V) / 2``.

Note [Thin bases]
The canonical base ``[W | U(W)]`` has U(W) from the reflectors of W, ``I - V T V^H``, so that

    [W | U(W)] @ [top; bottom] = W top + [0; bottom] - V T V2^H bottom,

V2 being V without its first k rows. V and T are kept beside W. (They follow from W by a k x k system too: with the
signs s of the product's first columns, ``W s - E = -V T V1^H``. Every pivot of that system is at least 1, and yet it
can be as badly conditioned as one likes, which would magnify the rounding of W.)

Note [Double where it is small]
Matrices of k x k and 2k x 2k are computed in double precision, sums over n rows among them: they cost little beside
those of n x k, and they are where rounding would be amplified.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Halves = tuple[Tensor, Tensor]


def householder(original: Tensor) -> Halves:
    """The first k columns of the product of k reflectors, their signs those on the diagonal of ``original``.

    Args:
        original: X, shape ``(..., n, k)`` with ``n >= k``; float32 or float64. Its strictly lower triangle holds the
            vectors, its diagonal 1 and -1; the rest is not looked at.

    Returns:
        The first k rows, ``(..., k, k)``, and the others, ``(..., n - k, k)``.

    Source: torch/nn/utils/parametrizations.py, ``_Orthogonal.forward`` (torch 2.13); Joffrain et al. 2006, ACM TOMS
    32(2), for T.
    """
    head, tail = _split(original.tril(-1))
    head = _wide(head) + torch.eye(head.size(-1), dtype=_wide(head).dtype, device=head.device)
    gram = head.mT @ head + _gram(tail)
    inverse = gram.triu(1) + torch.diag_embed(gram.diagonal(dim1=-2, dim2=-1) / 2)
    factor = torch.linalg.solve_triangular(inverse, head.mT, upper=True)
    # As torch has it: no gradient goes through the signs, and what is not a whole number is cut off.
    signs = original.diagonal(dim1=-2, dim2=-1).int().unsqueeze(-2)
    identity = torch.eye(head.size(-1), dtype=head.dtype, device=head.device)
    top = ((identity - head @ factor) * signs).to(original.dtype)
    return top, -(tail @ factor.to(original.dtype)) * signs


def cayley(original: Tensor) -> Halves:
    """The first k columns of ``(I - A / 2)^-1 (I + A / 2)``, A the skew matrix of ``original``.

    Args:
        original: X, shape ``(..., n, k)`` with ``n >= k``; float32, float64 or complex. Its lower triangle counts.

    Returns:
        The first k rows, ``(..., k, k)``, and the others, ``(..., n - k, k)``.

    Source: torch/nn/utils/parametrizations.py, ``_Orthogonal.forward`` (torch 2.13); Wen and Yin 2013 for low rank.
    """

    def columns(skew: Tensor, k: int) -> Tensor:
        identity = torch.eye(skew.size(-1), dtype=skew.dtype, device=skew.device)
        solved: Tensor = torch.linalg.solve(identity - skew / 2, (identity + skew / 2)[..., :k])
        return solved

    return _of_skew(original, columns)


def matrix_exp(original: Tensor) -> Halves:
    """The first k columns of the exponential of the skew matrix of ``original``.

    Args:
        original: X, shape ``(..., n, k)`` with ``n >= k``; float32, float64 or complex. Its lower triangle counts.

    Returns:
        The first k rows, ``(..., k, k)``, and the others, ``(..., n - k, k)``.

    Source: torch/nn/utils/parametrizations.py, ``_Orthogonal.forward`` (torch 2.13); see Note [Thin maps].
    """
    return _of_skew(original, lambda skew, k: torch.matrix_exp(skew)[..., :k])


#: By torch's names.
THIN_MAPS: Mapping[str, Callable[[Tensor], Halves]] = {
    "matrix_exp": matrix_exp,
    "cayley": cayley,
    "householder": householder,
}


def in_base(columns: Tensor, vectors: Tensor, factor: Tensor, top: Tensor, bottom: Tensor) -> Tensor:
    """``[W | U(W)] @ [top; bottom]``, the canonical base times a matrix; see Note [Thin bases].

    Args:
        columns: W, shape ``(..., n, k)`` with ``n >= k``, without gradient.
        vectors: V of ``orthoserde.orthonormal.completion.reflectors(columns)``, shape ``(..., n, k)``.
        factor: T, shape ``(..., k, k)``.
        top: Shape ``(..., k, k)``.
        bottom: Shape ``(..., n - k, k)``.

    Returns:
        Shape ``(..., n, k)``.
    """
    overlap = factor @ (_split(vectors)[1].mH @ bottom)
    below: Tensor = torch.cat([torch.zeros_like(top), bottom], dim=-2)
    return columns @ top + (below - vectors @ overlap)


def _of_skew(original: Tensor, columns: Callable[[Tensor, int], Tensor]) -> Halves:
    """The first k columns of a function of the skew matrix; ``columns`` gives those of a square matrix."""
    n, k = original.shape[-2:]
    head, tail = _split(original.tril(-1))
    if original.is_complex():  # the real part of the diagonal has no say, and must not have rounding for a gradient
        imaginary = original.diagonal(dim1=-2, dim2=-1).imag
        head = head + torch.diag_embed(torch.complex(torch.zeros_like(imaginary), imaginary))
    if n <= 2 * k or k == 0:
        lower = torch.cat([head, tail], dim=-2)
        square = torch.cat([lower, lower.new_zeros(*lower.shape[:-1], n - k)], dim=-1)
        return _split(columns(square - square.mH, k))
    wide = _wide(head)
    gram = wide.mH @ wide + _gram(tail)
    with torch.no_grad():
        scale = gram.diagonal(dim1=-2, dim2=-1).real.amax(-1).sqrt().clamp(min=1.0)[..., None, None]
    identity = torch.eye(k, dtype=wide.dtype, device=wide.device)
    upper = torch.cat([-wide.mH, -gram / scale], dim=-1)
    reduced = torch.cat([upper, torch.cat([scale * identity, wide], dim=-1)], dim=-2)
    first, second = _split(columns(reduced, k))
    second = second / scale
    return (first + wide @ second).to(original.dtype), tail @ second.to(original.dtype)


def _split(matrix: Tensor) -> Halves:
    """The square at the top, and what is below."""
    k = matrix.size(-1)
    return matrix[..., :k, :], matrix[..., k:, :]


def _gram(matrix: Tensor) -> Tensor:
    wide = _wide(matrix)
    return wide.mH @ wide


def _wide(matrix: Tensor) -> Tensor:
    """In double precision, where the device has it; see Note [Double where it is small]."""
    if matrix.device.type == "mps":
        return matrix
    return matrix.to(torch.complex128 if matrix.is_complex() else torch.float64)
