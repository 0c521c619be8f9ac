from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from orthoserde import tensor_bytes
from orthoserde.tensor_bytes import BLOCK_BYTES, contiguous_strides, empty_like_recorded, is_dense, may_overlap
from tests.storage.strategies import DTYPE_NAMES, DTYPES, bits, random_tensor, tensors

KB = 1024


def reader_of(data: bytes) -> Callable[[memoryview], None]:
    """What `fill` calls to read ``data`` from its beginning."""
    left = memoryview(data)

    def read_into(memory: memoryview) -> None:
        nonlocal left
        assert len(memory) <= len(left)
        memory[:] = left[: len(memory)]
        left = left[len(memory) :]

    return read_into


def offsets(shape: Sequence[int], stride: Sequence[int]) -> list[int]:
    """Where the elements lie, by visiting each one."""
    places = itertools.product(*(range(size) for size in shape))
    return [sum(i * step for i, step in zip(place, stride, strict=True)) for place in places]


@st.composite
def layouts(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    return shape, draw(st.lists(st.integers(0, 12), min_size=len(shape), max_size=len(shape)))


# Names of dtypes


def test_the_dtypes_by_name_are_these() -> None:
    assert list(tensor_bytes.DTYPES) == DTYPE_NAMES
    assert [tensor_bytes.dtype_name(dtype) for dtype in DTYPES] == DTYPE_NAMES


def _values(dtype: torch.dtype) -> Tensor:
    """All values of a small dtype, the extreme ones of a large one."""
    if dtype == torch.bool:
        return torch.tensor([False, True])
    if dtype.itemsize <= 2:
        count = 256**dtype.itemsize
        width = torch.uint8 if count == 256 else torch.uint16
        raw = torch.arange(count)
        if dtype.is_floating_point:
            raw = raw[~raw.to(width).view(dtype).to(torch.float64).isnan()]
        return raw.to(width).view(dtype)
    if dtype.is_complex:
        part = _values(torch.float32 if dtype == torch.complex64 else torch.float64)
        return torch.complex(part, part.flip(0))
    if dtype.is_floating_point:
        info = torch.finfo(dtype)
        return torch.tensor([0.0, info.tiny, -info.max, 1 + info.eps, info.smallest_normal * info.eps], dtype=dtype)
    integers = torch.iinfo(dtype)
    return torch.tensor([integers.min, integers.max, integers.max - 1, 0], dtype=dtype)


def _sort(dtype: torch.dtype) -> str:
    if dtype == torch.bool:
        return "bool"
    return "complex" if dtype.is_complex else "float" if dtype.is_floating_point else "integer"


@pytest.mark.parametrize(
    ("source", "target"), [pair for pair in itertools.permutations(DTYPE_NAMES, 2) if tensor_bytes.is_lossless(*pair)]
)
def test_a_conversion_called_lossless_gives_every_value_back(source: str, target: str) -> None:
    one, other = getattr(torch, source), getattr(torch, target)
    values = _values(one)
    assert _sort(one) == _sort(other)
    assert bits(values.to(other).to(one)) == bits(values)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        *[("float64", "float32"), ("float16", "bfloat16"), ("bfloat16", "float16"), ("float32", "int64")],
        *[("int64", "float64"), ("bool", "uint8"), ("uint8", "int8"), ("int8", "uint8"), ("uint64", "int64")],
        *[("complex64", "float64"), ("float32", "complex64"), ("float8_e4m3fn", "float8_e5m2")],
    ],
)
def test_a_conversion_that_loses_values_or_changes_the_sort_is_not_lossless(source: str, target: str) -> None:
    assert not tensor_bytes.is_lossless(source, target)


@pytest.mark.parametrize("name", DTYPE_NAMES)
def test_a_dtype_holds_itself(name: str) -> None:
    assert tensor_bytes.is_lossless(name, name)


# Strides


@settings(deadline=None)
@given(st.lists(st.integers(0, 4), max_size=5))
def test_contiguous_strides_are_those_of_torch(shape: list[int]) -> None:
    assert contiguous_strides(shape) == torch.empty(shape).stride()


@settings(deadline=None, max_examples=400)
@given(layouts())
def test_dense_means_that_each_of_numel_adjacent_elements_is_visited_once(layout: tuple[list[int], list[int]]) -> None:
    shape, stride = layout
    assert is_dense(shape, stride) == (sorted(offsets(shape, stride)) == list(range(math.prod(shape))))


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=4), st.data())
def test_a_permuted_row_major_layout_is_dense(shape: list[int], data: st.DataObject) -> None:
    tensor = torch.empty(shape).permute(data.draw(st.permutations(range(len(shape)))))
    assert is_dense(tensor.shape, tensor.stride())
    assert not may_overlap(tensor)


@settings(deadline=None, max_examples=400)
@given(layouts())
def test_elements_that_share_memory_are_never_overlooked(layout: tuple[list[int], list[int]]) -> None:
    shape, stride = layout
    places = offsets(shape, stride)
    tensor = torch.empty(max(places, default=0) + 1).as_strided(shape, stride)
    overlaps = len(set(places)) < len(places)
    assert may_overlap(tensor) or not overlaps
    # The other way round it may be wrong for exotic strides only: not for those of slices and permutations.
    assert not may_overlap(tensor) or overlaps or not is_dense(shape, stride)


@pytest.mark.parametrize(
    ("tensor", "overlaps"),
    [
        (torch.empty(1).expand(3), True),
        (torch.empty(2, 1).expand(2, 3), True),
        (torch.empty(5).as_strided((3, 3), (1, 1)), True),
        (torch.empty(1).expand(1), False),
        (torch.empty(0).expand(3, 0), False),
        (torch.empty(()), False),
        (torch.empty(6, 6)[::2, 1::3], False),
        (torch.empty(2, 3, 4).permute(2, 0, 1), False),
    ],
)
def test_expanded_and_windowed_tensors_overlap_and_slices_do_not(tensor: Tensor, overlaps: bool) -> None:
    assert may_overlap(tensor) is overlaps


@settings(deadline=None)
@given(layouts())
def test_recorded_strides_are_kept_where_they_are_dense_and_row_major_otherwise(
    layout: tuple[list[int], list[int]],
) -> None:
    shape, stride = layout
    tensor = empty_like_recorded(shape, stride, torch.float32, "cpu")
    dense = sorted(offsets(shape, stride)) == list(range(math.prod(shape)))
    assert tensor.shape == torch.Size(shape)
    assert tensor.stride() == (tuple(stride) if dense else torch.empty(shape).stride())
    assert tensor.untyped_storage().nbytes() == 4 * math.prod(shape)


def test_recorded_strides_beyond_all_memory_are_harmless_where_there_is_no_element() -> None:
    tensor = empty_like_recorded((2**62, 0), (2**62, 2**62), torch.float32, "cpu")
    assert (tensor.stride(), tensor.untyped_storage().nbytes()) == ((2**62, 2**62), 0)


# Blocks


@settings(deadline=None, max_examples=200)
@given(tensors(), st.integers(1, 200))
def test_row_blocks_are_the_rows_in_order_and_within_the_limit(tensor: Tensor, limit: int) -> None:
    blocks = list(tensor_bytes.row_blocks(tensor, limit))
    assert b"".join(bits(block) for block in blocks) == bits(tensor)
    assert all(block.numel() for block in blocks)
    assert max((block.nbytes for block in blocks), default=0) <= max(limit, tensor.element_size())
    assert all(block.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr() for block in blocks)


@pytest.mark.parametrize(
    ("tensor", "limit", "shapes"),
    [
        (torch.empty(4, 5), 80, [(4, 5)]),
        (torch.empty(4, 5), 79, [(19,), (1,)]),
        (torch.empty(5, 4).T, 79, [(3, 5), (1, 5)]),
        (torch.empty(5, 4).T, 20, [(1, 5)] * 4),
        (torch.empty(5, 4).T, 19, [(4,), (1,)] * 4),
        (torch.empty(2, 2).T, 1, [()] * 4),
        (torch.empty(()), 1, [()]),
        (torch.empty(3, 0), 1, []),
    ],
)
def test_row_blocks_are_as_large_as_the_limit_allows(tensor: Tensor, limit: int, shapes: list[tuple[int, ...]]) -> None:
    assert [tuple(block.shape) for block in tensor_bytes.row_blocks(tensor, limit)] == shapes


@settings(deadline=None, max_examples=200)
@given(tensors())
def test_the_bytes_of_any_tensor_are_its_row_major_elements(tensor: Tensor) -> None:
    before = (tensor._version, tensor.stride(), tensor.is_conj(), tensor.is_neg())
    assert b"".join(tensor_bytes.iter_bytes(tensor)) == bits(tensor)
    assert (tensor._version, tensor.stride(), tensor.is_conj(), tensor.is_neg()) == before


def test_reading_the_bytes_of_a_parameter_leaves_its_graph_gradient_and_version_alone() -> None:
    parameter = torch.nn.Parameter(torch.randn(3, 4).T)
    torch.autograd.backward((parameter * 2).sum())
    grad = parameter.grad
    assert grad is not None
    saved = grad.clone()
    result = parameter * 3
    state = (parameter._version, grad._version, parameter.stride(), parameter.requires_grad)
    assert b"".join(tensor_bytes.iter_bytes(parameter)) == bits(parameter)
    assert (parameter._version, grad._version, parameter.stride(), parameter.requires_grad) == state
    assert parameter.grad is grad
    assert torch.equal(grad, saved)
    torch.autograd.backward(result.sum())
    assert torch.equal(grad, torch.full((4, 3), 5.0))


@pytest.mark.parametrize("enabled", [True, False])
def test_the_grad_mode_of_the_caller_stays_as_it_is(enabled: bool) -> None:
    with torch.set_grad_enabled(enabled):
        blocks = tensor_bytes.iter_bytes(torch.zeros(3, 2).T)
        with torch.no_grad():
            next(blocks)
        assert torch.is_grad_enabled() is enabled
        blocks.close()  # type: ignore[attr-defined]  # abandoned after its first block
        assert torch.is_grad_enabled() is enabled
        for _ in tensor_bytes.iter_bytes(torch.zeros(3)):
            assert torch.is_grad_enabled() is enabled
        tensor_bytes.fill(torch.zeros(3), torch.float32, reader_of(bytes(12)))
        assert torch.is_grad_enabled() is enabled


def test_row_major_memory_is_handed_out_without_a_copy() -> None:
    tensor = torch.zeros(3, 4)
    (block,) = tensor_bytes.iter_bytes(tensor)
    tensor[0, 0] = 1.0
    assert bytes(block[:4]) == torch.tensor([1.0]).numpy().tobytes()


class Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the bytes of every storage that an operation makes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sizes: list[int] = []

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        known = {arg.untyped_storage().data_ptr() for arg in args if isinstance(arg, Tensor)}
        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(item, Tensor) and item.untyped_storage().data_ptr() not in known:
                self.sizes.append(item.untyped_storage().nbytes())
        return result


LARGE: dict[str, Callable[[], Tensor]] = {
    "transposed": lambda: torch.empty(1200, 1500).T,
    "sliced": lambda: torch.empty(1200, 3000)[:, ::2],
    "expanded": lambda: torch.empty(1500, 1).expand(1500, 1500),
    "conjugated": lambda: torch.empty(1000, 1000, dtype=torch.complex64).conj(),
    "one wide row": lambda: torch.empty(1_500_000, 1).T[:, ::1],
    "few wide rows": lambda: torch.empty(1_500_000, 2).T,
}


@pytest.mark.parametrize("layout", LARGE)
def test_a_large_tensor_that_is_not_row_major_is_never_copied_whole(layout: str) -> None:
    tensor = LARGE[layout]()
    assert tensor.nbytes > BLOCK_BYTES
    with Allocations() as allocations:
        sizes = [len(block) for block in tensor_bytes.iter_bytes(tensor)]
    assert sum(sizes) == tensor.nbytes
    assert max(sizes) <= BLOCK_BYTES
    assert max(allocations.sizes, default=0) <= BLOCK_BYTES


@pytest.mark.parametrize("layout", ["transposed", "sliced", "conjugated", "few wide rows"])
def test_a_large_tensor_that_is_not_row_major_is_filled_block_by_block(layout: str) -> None:
    target = LARGE[layout]()
    data = bytes(range(251)) * (target.nbytes // 251 + 1)
    data = data[: target.nbytes]
    with Allocations() as allocations:
        tensor_bytes.fill(target, target.dtype, reader_of(data))
    assert max(allocations.sizes) <= BLOCK_BYTES
    assert bits(target) == data


# Filling


@settings(deadline=None, max_examples=200)
@given(tensors(), st.integers(0, 2**32))
def test_any_tensor_whose_elements_do_not_overlap_is_filled_with_the_bytes_it_is_given(
    target: Tensor, seed: int
) -> None:
    if may_overlap(target):
        return
    source = random_tensor(target.dtype, target.shape, seed)
    strides, version = target.stride(), target._version
    tensor_bytes.fill(target, target.dtype, reader_of(bits(source)))
    assert bits(target) == bits(source)
    assert target.stride() == strides
    assert target._version > version or not target.numel()


def test_filling_a_slice_leaves_the_elements_between_alone() -> None:
    whole = torch.zeros(4, 6)
    tensor_bytes.fill(whole[1:3, ::2], torch.float32, reader_of(bits(torch.ones(2, 3))))
    expected = torch.zeros(4, 6)
    expected[1:3, ::2] = 1
    assert torch.equal(whole, expected)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        *[("bfloat16", "float32"), ("float16", "float64"), ("float32", "float64"), ("float8_e4m3fn", "bfloat16")],
        *[("float8_e5m2", "float32"), ("complex64", "complex128"), ("uint8", "int64"), ("int8", "int16")],
        *[("int32", "int64"), ("float64", "float32")],
    ],
)
@pytest.mark.parametrize("transposed", [False, True])
def test_filling_a_tensor_of_another_dtype_converts_what_was_read(source: str, target: str, transposed: bool) -> None:
    few = _values(getattr(torch, source))[:6]
    # Repeated as bytes, because torch 2.3 cannot repeat float8.
    raw = few.view(torch.uint8).repeat(6)[: 6 * few.element_size()]
    values = raw.view(few.dtype).view(2, 3)
    out = torch.zeros((3, 2) if transposed else (2, 3), dtype=getattr(torch, target))
    out = out.T if transposed else out
    tensor_bytes.fill(out, values.dtype, reader_of(bits(values)))
    assert bits(out) == bits(values.to(out.dtype))


def test_autograd_sees_a_fill_as_an_in_place_change() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    result = (weight * weight).sum()
    tensor_bytes.fill(weight, torch.float32, reader_of(bits(torch.zeros(3))))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.backward(result)


def test_a_fill_keeps_the_parameter_a_leaf_that_requires_grad() -> None:
    weight = torch.nn.Parameter(torch.ones(2, 3).T)
    tensor_bytes.fill(weight, torch.float64, reader_of(bits(torch.zeros(3, 2, dtype=torch.float64))))
    assert weight.is_leaf
    assert weight.requires_grad
    assert weight.grad is None
    assert torch.equal(weight, torch.zeros(3, 2))


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 2, 0)])
def test_filling_a_tensor_without_elements_reads_nothing(shape: tuple[int, ...]) -> None:
    tensor = torch.empty(shape)

    def refuse(memory: memoryview) -> None:
        raise AssertionError("nothing is there to read")

    tensor_bytes.fill(tensor, torch.float32, refuse)
    assert tensor._version == 0


def test_an_error_while_reading_is_passed_on() -> None:
    tensor = torch.ones(2)

    def fail(memory: memoryview) -> None:
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        tensor_bytes.fill(tensor, torch.float32, fail)


# Digests


@settings(deadline=None)
@given(st.binary(max_size=300), st.lists(st.integers(0, 300), max_size=5))
def test_a_digest_does_not_depend_on_the_blocks(data: bytes, cuts: list[int]) -> None:
    view, edges = memoryview(data), sorted([0, *cuts, len(data)])
    blocks: Iterator[memoryview] = (view[start:stop] for start, stop in itertools.pairwise(edges))
    assert tensor_bytes.digest_of(blocks) == xxhash.xxh3_128_hexdigest(data)


def test_the_digest_of_nothing_is_the_one_that_xxhash_publishes() -> None:
    # xxHash's own test vector: XXH3_128bits of the empty input with seed 0.
    assert tensor_bytes.digest_of([]) == "99aa06d3014798d86001c324468d497f"
