"""The completion written anew from docs/reference/file-format.md, with Python's own doubles: the same bits."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from orthoserde.orthonormal.completion import Completion, complete
from tests.helpers import same_bits

#: A number as its real and imaginary part; of a real one the latter is a zero that nothing depends on.
Number = tuple[float, float]

ZERO, ONE = (0.0, 0.0), (1.0, 0.0)


def product(x: Number, y: Number, real: bool) -> Number:
    if real:
        return x[0] * y[0], 0.0
    return x[0] * y[0] - x[1] * y[1], x[0] * y[1] + x[1] * y[0]


def plus(x: Number, y: Number) -> Number:
    return x[0] + y[0], x[1] + y[1]


def minus(x: Number, y: Number) -> Number:
    return x[0] - y[0], x[1] - y[1]


def conj(x: Number) -> Number:
    return x[0], -x[1]


def square(x: Number, real: bool) -> float:
    return x[0] * x[0] if real else x[0] * x[0] + x[1] * x[1]


def tree(values: Sequence[Number]) -> Number:
    values = list(values)
    while len(values) > 1:
        half = (len(values) + 1) // 2
        values = [plus(values[i], values[half + i]) if half + i < len(values) else values[i] for i in range(half)]
    return values[0] if values else ZERO


def described(W: Tensor) -> Tensor:
    n, k = W.shape
    real = not W.is_complex()
    A: list[list[Number]] = [[(complex(x).real, complex(x).imag) for x in row] for row in W.tolist()]
    V = [[ZERO] * k for _ in range(n)]
    for j in range(k):
        norm = math.sqrt(tree([(square(A[i][j], real), 0.0) for i in range(j, n)])[0])
        head = A[j][j]
        size = math.sqrt(square(head, real))
        phase = (head[0] / size, head[1] / size) if size > 0 else ONE
        v = [A[i][j] for i in range(j, n)]
        v[0] = plus(head, (phase[0] * norm, phase[1] * norm))
        length = tree([(square(x, real), 0.0) for x in v])[0]
        if length > 0:
            scale = math.sqrt(2.0 / length)
            v = [(x[0] * scale, x[1] * scale) for x in v]
        for i in range(j, n):
            V[i][j] = v[i - j]
        for column in range(j + 1, k):
            s = tree([product(conj(v[i - j]), A[i][column], real) for i in range(j, n)])
            for i in range(j, n):
                A[i][column] = minus(A[i][column], product(v[i - j], s, real))
    T = [[ZERO] * k for _ in range(k)]
    for j in range(k):
        o = [tree([product(conj(V[r][i]), V[r][j], real) for r in range(n)]) for i in range(j)]
        for i in range(j):
            total = tree([product(T[i][m], o[m], real) for m in range(j)])
            T[i][j] = -1.0 * total[0], -1.0 * total[1]
        T[j][j] = ONE
    M = [[ZERO] * (n - k) for _ in range(k)]
    U = [[ONE if r == k + c else ZERO for c in range(n - k)] for r in range(n)]
    for j in range(k):
        for i in range(k):
            for c in range(n - k):
                M[i][c] = plus(M[i][c], product(T[i][j], conj(V[k + c][j]), real))
    for j in range(k):
        for r in range(n):
            for c in range(n - k):
                U[r][c] = minus(U[r][c], product(V[r][j], M[j][c], real))
    if real:
        return torch.tensor([[x[0] for x in row] for row in U], dtype=torch.float64).to(W.dtype)
    parts = torch.tensor(U, dtype=torch.float64)
    return torch.complex(parts[..., 0].contiguous(), parts[..., 1].contiguous()).to(W.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128])
@pytest.mark.parametrize("shape", [(2, 1), (5, 2), (9, 4), (12, 11), (17, 3)])
def test_the_description_gives_the_same_bits(shape: tuple[int, int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(sum(shape))
    columns = torch.linalg.qr(torch.randn(shape, dtype=dtype, generator=generator))[0]
    assert same_bits(complete(columns)[:, shape[1] :], described(columns))


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex128])
def test_the_description_gives_the_same_bits_for_zeros_at_the_head(dtype: torch.dtype) -> None:
    columns = torch.eye(7, 3, dtype=dtype).flip(0)
    assert same_bits(complete(columns)[:, 3:], described(columns))
    assert same_bits(complete(torch.eye(7, 3, dtype=dtype))[:, 3:], described(torch.eye(7, 3, dtype=dtype)))


def test_rows_come_out_the_same_in_any_order_and_number() -> None:
    generator = torch.Generator().manual_seed(0)
    columns = torch.linalg.qr(torch.randn(23, 4, generator=generator))[0]
    whole, completion = complete(columns)[:, 4:], Completion(columns)
    for start, stop in ((20, 23), (0, 1), (3, 3), (2, 9), (0, 23)):
        assert same_bits(completion.rows(slice(start, stop)), whole[start:stop])
