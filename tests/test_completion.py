"""The canonical completion: exact where it must be, orthonormal, and the same bits everywhere."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from orthoserde.completion import complete, tree_sum
from orthoserde.tensor_bytes import iter_bytes

DTYPES = [torch.float32, torch.float64, torch.complex64, torch.complex128]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def orthonormal(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    orthonormal_columns: Tensor = torch.linalg.qr(torch.randn(shape, dtype=dtype, generator=generator))[0]
    return orthonormal_columns


def error_of(matrix: Tensor) -> float:
    wide = matrix.to(torch.complex128 if matrix.is_complex() else torch.float64)
    error = wide.mH @ wide - torch.eye(wide.size(-1), dtype=wide.dtype)
    return float(error.abs().max()) if error.numel() else 0.0


@settings(deadline=None, max_examples=40)
@given(n=st.integers(1, 40), k=st.integers(1, 40), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 2**16))
def test_the_columns_stay_and_the_rest_is_as_orthonormal_as_they_are(
    n: int, k: int, dtype: torch.dtype, seed: int
) -> None:
    columns = orthonormal((max(n, k), min(n, k)), dtype, seed)
    base = complete(columns)
    assert torch.equal(base[:, : columns.size(1)], columns)
    eps = torch.finfo(dtype).eps
    assert error_of(base) <= 2 * error_of(columns) + 4 * eps
    assert base.stride() == (1, max(n, k))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bits_do_not_depend_on_the_number_of_threads(dtype: torch.dtype) -> None:
    columns = orthonormal((700, 5), dtype, 0)
    found: list[Tensor] = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(complete(columns))
    assert torch.equal(found[0], found[1])


def test_the_bits_are_those_of_every_machine() -> None:
    """From exact binary fractions: a change of these bits would change what a compact file stands for."""
    columns = torch.zeros(9, 2, dtype=torch.float32)
    columns[:4, 0] = torch.tensor([0.5, -0.5, 0.5, 0.5])
    columns[4:8, 1] = torch.tensor([0.5, 0.5, -0.5, 0.5])
    digest = hashlib.sha256(b"".join(bytes(block) for block in iter_bytes(complete(columns)))).hexdigest()
    assert digest == "9f70ef72b7dd31562ec9f3895cdb3e248016a5fa7ada92215ccf9229b79b3838"


def test_batches_are_completed_one_by_one() -> None:
    columns = orthonormal((2, 3, 7, 2), torch.float64, 1)
    base = complete(columns)
    assert base.shape == (2, 3, 7, 7)
    for i in range(2):
        for j in range(3):
            assert torch.equal(base[i, j], complete(columns[i, j]))


@pytest.mark.parametrize("shape", [(0, 0), (3, 0), (0, 4, 2), (1, 1), (5, 5)])
def test_empty_and_square_matrices(shape: tuple[int, ...]) -> None:
    columns = torch.linalg.qr(torch.randn(shape))[0] if 0 not in shape else torch.zeros(shape)
    base = complete(columns)
    assert base.shape == (*shape[:-2], shape[-2], shape[-2])
    assert torch.equal(base[..., : shape[-1]], columns)


@pytest.mark.parametrize("shape", [(3,), (2, 3), (4, 2, 5)])
def test_a_wide_matrix_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected a shape \(\.\.\., n, k\) with n >= k"):
        complete(torch.zeros(shape))


def test_no_random_numbers_are_drawn() -> None:
    state = torch.get_rng_state()
    complete(torch.eye(9, 3))
    assert torch.equal(torch.get_rng_state(), state)


@given(st.integers(0, 70))
def test_the_tree_sum_is_a_sum(count: int) -> None:
    values = torch.arange(count, dtype=torch.float64)
    assert float(tree_sum(values)) == count * (count - 1) / 2 if count else float(tree_sum(values)) == 0
