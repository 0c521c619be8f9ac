"""The canonical completion: exact where it must be, orthonormal, and the same bits everywhere."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator

import numpy
import numpy.typing
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from orthoserde.orthonormal.completion import complete, tree_sum
from orthoserde.tensor_bytes import iter_bytes
from tests.helpers import same_bits

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


def columns_of(kind: str, shape: tuple[int, int], dtype: torch.dtype, seed: int) -> Tensor:
    """Orthonormal columns: any, next to those of I or -I (where a reflector may cancel), units, or some percent off."""
    generator = torch.Generator().manual_seed(seed)
    noise, units = torch.randn(shape, dtype=dtype, generator=generator), torch.eye(*shape, dtype=dtype)
    if kind == "units":
        return units[torch.randperm(shape[0], generator=generator)]
    if kind == "off":
        off: Tensor = 1.02 * orthonormal(shape, dtype, seed) + 0.002 * noise / shape[0] ** 0.5
        return off
    near = {"random": noise, "near I": units + 1e-5 * noise, "near -I": 1e-5 * noise - units}[kind]
    columns: Tensor = torch.linalg.qr(near)[0]
    return columns


def errors_of(matrix: Tensor) -> numpy.typing.NDArray[numpy.float64]:
    """The entries of ``|A^H A - I|``, from integers: double precision has errors as large as those sought."""

    def integers(part: Tensor) -> numpy.typing.NDArray[numpy.object_]:
        exact = [[int(math.ldexp(number, 80)) for number in row] for row in part.double().tolist()]
        return numpy.array(exact, dtype=object).reshape(part.shape)

    planes = torch.view_as_real(matrix) if matrix.is_complex() else torch.stack([matrix, torch.zeros_like(matrix)], -1)
    A, B = integers(planes[..., 0]), integers(planes[..., 1])
    real = A.T @ A + B.T @ B - (1 << 160) * numpy.eye(matrix.size(1), dtype=object)
    imag = A.T @ B - B.T @ A
    errors: numpy.typing.NDArray[numpy.float64] = numpy.hypot(
        *(part.astype(float) * 2.0**-160 for part in (real, imag))
    )
    return errors


@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(1, 40),
    k=st.integers(1, 40),
    kind=st.sampled_from(["random", "near I", "near -I", "units", "off"]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**16),
)
def test_the_columns_stay_and_the_rest_is_orthonormal_within_the_stated_bound(
    n: int, k: int, kind: str, dtype: torch.dtype, seed: int
) -> None:
    n, k = max(n, k), min(n, k)
    columns = columns_of(kind, (n, k), dtype, seed)
    base = complete(columns)
    assert same_bits(base[:, :k], columns)
    assert base.stride() == (1, n)
    errors = errors_of(base)
    own, bound = errors[:k, :k], torch.finfo(dtype).eps + 4 * (k + 1) * 2.0**-52
    assert (own.max() > 1e-3) == (kind == "off")
    assert errors[:, k:].max(initial=0.0) <= bound
    assert errors.max() <= max(own.max(), bound)


@settings(deadline=None, max_examples=40)
@given(
    n=st.integers(2, 500),
    k=st.integers(1, 12),
    batch=st.sampled_from([(), (2,), (0, 3), (2, 1)]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**16),
)
def test_rebuilt_from_its_columns_it_has_the_same_bits_on_any_number_of_threads(
    n: int, k: int, batch: tuple[int, ...], dtype: torch.dtype, seed: int
) -> None:
    columns = orthonormal((*batch, max(n, k), min(n, k)), dtype, seed)
    base = complete(columns)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        assert same_bits(complete(base[..., : columns.size(-1)]), base)


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


@settings(deadline=None)
@given(st.integers(0, 70))
def test_the_tree_sum_is_a_sum(count: int) -> None:
    values = torch.arange(count, dtype=torch.float64)
    assert float(tree_sum(values)) == count * (count - 1) / 2 if count else float(tree_sum(values)) == 0
