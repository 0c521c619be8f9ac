"""What the benchmark of the structured form measures by is right: its exact maps, and its count of bytes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from orthoserde.orthonormal.thin_maps import THIN_MAPS
from tests.benchmarks.bench_structured import Case, allocated, errors_of_weights, make, target_of
from tests.benchmarks.exact_maps import DIGITS, exact


@pytest.mark.parametrize("orthogonal_map", THIN_MAPS)
@pytest.mark.parametrize("size", [0.01, 1.0, 5.0])
def test_the_exact_maps_are_torchs(orthogonal_map: str, size: float) -> None:
    lower = size * torch.randn(20, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).tril(-1)
    original = lower.clone()
    original[range(3), range(3)] = torch.tensor([1.0, -1.0, -1.0], dtype=torch.float64)
    found = exact(orthogonal_map, original.numpy())
    thin = torch.cat(THIN_MAPS[orthogonal_map](original)).numpy()
    assert np.abs(found.T @ found - np.eye(3)).max() < 10.0 ** (3 - DIGITS)
    assert np.abs(found - thin).max() < 1e-14


def test_the_bytes_of_a_step_have_the_matrices_that_it_makes() -> None:
    case = Case("cayley", 300, 3, 1)
    dense, structured = (allocated(make(case, form), target_of(case)) for form in (False, True))
    assert dense > 3 * 300 * 300 * 4
    assert 3 * 300 * 4 < structured < 300 * 300 * 4


def test_errors_are_those_of_rounding() -> None:
    off, residuals = errors_of_weights("cayley", 40, 3, torch.float64)
    assert max(*off, *residuals) < 1e-14
    off, _ = errors_of_weights("cayley", 40, 3, torch.float32)
    assert 1e-9 < min(off) <= max(off) < 1e-6
