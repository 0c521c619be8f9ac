"""Distances between tensors: against what the definitions give for tensors whose distance is known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from orthoserde.checkpoint import LiveTensor
from orthoserde.comparison import distances
from orthoserde.comparison.distances import Distance, between, between_sources, on_manifold

DTYPES = [torch.float64, torch.complex128]


def orthonormal(n: int, k: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    q: Tensor = torch.linalg.qr(torch.randn(n, k, dtype=dtype, generator=generator)).Q
    return q


def turned(q: Tensor, angles: list[float]) -> Tensor:
    """A matrix whose column space has these principal angles with that of ``q``, its columns mixed."""
    k = q.size(1)
    whole = torch.linalg.qr(q, mode="complete").Q
    beside = whole[:, k : k + len(angles)]
    cos, sin = (function(torch.tensor(angles, dtype=torch.float64)) for function in (torch.cos, torch.sin))
    moved = q.clone()
    moved[:, : len(angles)] = q[:, : len(angles)] * cos + beside * sin
    return moved @ orthonormal(k, k, q.dtype, seed=7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("angles", [[0.3, 1.2], [1e-10, 1e-3], [math.pi / 2, math.pi / 2 - 1e-9], [0.0, 0.0]])
def test_principal_angles_are_found_small_and_large(dtype: torch.dtype, angles: list[float]) -> None:
    q = orthonormal(9, 4, dtype)
    for one, two in ((q, turned(q, angles)), (q.mT, turned(q, angles).mT)):
        found = on_manifold(one, two)
        assert found is not None
        assert found.measure == "principal angles"
        assert found.largest_angle == pytest.approx(max(angles), abs=1e-13)
        assert found.length == pytest.approx(math.hypot(*angles), abs=1e-13)


def rotation(n: int, angles: list[float]) -> Tensor:
    turn = torch.eye(n, dtype=torch.float64)
    for i, angle in enumerate(angles):
        c, s = math.cos(angle), math.sin(angle)
        turn[2 * i : 2 * i + 2, 2 * i : 2 * i + 2] = torch.tensor([[c, -s], [s, c]], dtype=torch.float64)
    return turn


@pytest.mark.parametrize("angles", [[0.5, 2.0], [math.pi], [1e-9, 3e-9], [1e-4], []])
def test_a_rotation_has_the_angles_it_was_made_with(angles: list[float]) -> None:
    q, p = orthonormal(6, 6), orthonormal(6, 6, seed=3)
    found = on_manifold(q, q @ p @ rotation(6, angles) @ p.mT)
    assert found is not None
    assert found.measure == "rotation"
    assert found.largest_angle == pytest.approx(max(angles, default=0.0), abs=2e-15, rel=1e-6)
    assert found.length == pytest.approx(math.hypot(*angles, *angles), abs=4e-15, rel=1e-6)


def test_real_matrices_of_different_orientation_have_no_path_and_complex_ones_have() -> None:
    q = orthonormal(5, 5)
    mirrored = q.clone()
    mirrored[:, 0] = -mirrored[:, 0]
    found = on_manifold(q, mirrored)
    assert found is not None
    assert math.isinf(found.length)
    complex_one = on_manifold(q.to(torch.complex128), mirrored.to(torch.complex128))
    assert complex_one is not None
    assert complex_one.length == pytest.approx(math.pi)


def test_of_a_stack_all_matrices_count() -> None:
    q = orthonormal(9, 4)
    stack = torch.stack([q, q])
    found = on_manifold(stack, torch.stack([turned(q, [0.3]), turned(q, [0.4])]))
    assert found is not None
    assert found.length == pytest.approx(0.5)
    assert found.largest_angle == pytest.approx(0.4)


def test_what_is_far_off_empty_or_too_large_has_no_distance(monkeypatch: pytest.MonkeyPatch) -> None:
    q = orthonormal(4, 2)
    assert on_manifold(q, q * math.nan) is None
    assert on_manifold(q, q * 1e300) is None
    assert on_manifold(q * 0, q) is None
    assert on_manifold(q, q * 1.1) is not None
    assert on_manifold(q[:, :0], q[:, :0]) is None
    assert on_manifold(q[0], q[0]) is None
    monkeypatch.setattr(distances, "MOST_MULTIPLICATIONS", 15)
    assert on_manifold(q, q) is None


def test_a_distance_has_largest_and_relative() -> None:
    a = torch.tensor([3.0, 4.0, 0.0])
    found = between(a, a + torch.tensor([0.0, 0.0, -0.5]))
    assert found == Distance(identical=False, largest=0.5, relative=0.1)
    assert found.within(0.1)
    assert not found.within(0.09)
    assert between(a, a.clone()) == Distance(identical=True, largest=0.0, relative=0.0)
    assert between(a * 0, a) == Distance(identical=False, largest=4.0, relative=math.inf)


def test_bits_and_values_are_two_things() -> None:
    zeros = torch.tensor([0.0])
    assert between(zeros, -zeros) == Distance(identical=False, largest=0.0, relative=0.0)
    assert between(zeros, zeros.double()) == Distance(identical=False, largest=0.0, relative=0.0)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint64], ids=str)
def test_large_integers_are_compared_as_integers(dtype: torch.dtype) -> None:
    a = torch.tensor([2**60, 0, 1], dtype=dtype)
    found = between(a, torch.tensor([2**60 + 1, 0, 1], dtype=dtype))
    assert found == Distance(identical=False, largest=1.0, relative=2.0**-60)
    assert not found.within(0.0)
    assert found.within(1e-17)
    most = torch.iinfo(torch.int64)
    ends = torch.tensor([most.max]), torch.tensor([most.min])
    assert between(*ends) == Distance(identical=False, largest=2.0**64, relative=2.0)
    top = torch.tensor([-1]).view(torch.uint64)  # 2**64 - 1
    assert between(top, torch.tensor([1]).view(torch.uint64)).largest == 2.0**64


def test_without_a_tolerance_only_what_is_identical_is_within() -> None:
    ones = torch.ones(3)
    assert between(ones, ones.clone()).within(0.0)
    for other in (ones.bfloat16(), ones.double()):
        assert not between(ones, other).within(0.0)
    assert not between(torch.zeros(1), -torch.zeros(1)).within(0.0)
    assert between(torch.zeros(1), -torch.zeros(1)).within(1e-30)


def test_what_is_not_finite_is_counted_and_never_lost() -> None:
    nan, inf = math.nan, math.inf
    a = torch.tensor([nan, inf, 1.0, nan, inf, 2.0])
    assert between(a, a.clone()).identical
    found = between(a, torch.tensor([nan, inf, 1.0, 5.0, -inf, 2.5]))
    assert (found.identical, found.not_comparable, found.largest) == (False, 2, 0.5)
    assert not found.within(math.inf)


def test_large_numbers_do_not_overflow() -> None:
    a = torch.full((4,), 1e200, dtype=torch.float64)
    assert between(a, 2 * a).relative == pytest.approx(1.0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "complex64", "int64", "bool", "float8_e4m3fn"])
def test_stored_tensors_are_compared_in_blocks_of_any_size(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distances, "BLOCK_ELEMENTS", 7)
    a = (torch.arange(60).reshape(6, 10) % 3).to(getattr(torch, dtype))
    b = a.clone()
    assert between_sources(LiveTensor(a.mT), dtype, LiveTensor(b.mT), dtype).identical
    b.view(torch.uint8)[5, -b.element_size() :] = 0  # as bytes: torch 2.3 cannot assign float8
    found = between_sources(LiveTensor(a), dtype, LiveTensor(b), dtype)
    assert not found.identical
    assert found.largest == abs(complex(a[5, 9].to(torch.complex64)))
