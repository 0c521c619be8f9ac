"""Tensors as row-major bytes: names of dtypes, blocks of bytes in and out, digests.

Nothing here knows of modules or files. A tensor of any device, stride or size is walked in blocks, so that no copy
larger than one block is ever made.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
import xxhash
from torch import Tensor

if sys.byteorder != "little":
    raise ImportError("orthoserde writes the bytes of tensors as they are in memory, which files want little-endian")

#: Name of the digest, as it stands in files.
DIGEST = "xxh3-128"

#: Bytes handled at a time; small enough for the cache of a core to matter little, large enough for the disk.
BLOCK_BYTES = 4 << 20

_DTYPE_NAMES = (
    "bool uint8 int8 uint16 int16 uint32 int32 uint64 int64 float8_e4m3fn float8_e5m2 "
    "float16 bfloat16 float32 float64 complex64 complex128"
)

#: dtypes that can be stored, by the name that stands in the manifest.
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in _DTYPE_NAMES.split()}

#: Names of the dtypes in which torch makes matrices with orthonormal columns.
ORTHONORMAL_DTYPES = frozenset({"float32", "float64", "complex64", "complex128"})

_LOSSLESS: dict[str, frozenset[str]] = {
    "float16": frozenset({"float32", "float64"}),
    "bfloat16": frozenset({"float32", "float64"}),
    "float32": frozenset({"float64"}),
    "float8_e4m3fn": frozenset({"float16", "bfloat16", "float32", "float64"}),
    "float8_e5m2": frozenset({"float16", "bfloat16", "float32", "float64"}),
    "complex64": frozenset({"complex128"}),
    "uint8": frozenset({"int16", "int32", "int64"}),
    "int8": frozenset({"int16", "int32", "int64"}),
    "int16": frozenset({"int32", "int64"}),
    "int32": frozenset({"int64"}),
}


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype as it stands in files, ``"float32"`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def is_lossless(source: str, target: str) -> bool:
    """Whether each value of dtype ``source`` is one of ``target``, both of one sort (float, complex, integer)."""
    return source == target or target in _LOSSLESS.get(source, frozenset())


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides, in elements, of a row-major tensor as torch writes them."""
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def column_major_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides, in elements, of matrices that lie column by column, one matrix behind the other; 2 dimensions or more.

    As of a row-major tensor whose last two dimensions were swapped.
    """
    *batch, last, first = contiguous_strides([*shape[:-2], shape[-1], shape[-2]])
    return (*batch, first, last)


def is_countable(shape: Sequence[int]) -> bool:
    """Whether 63 bits count the elements, zero sizes left out; in the files of strangers a shape may be any list."""
    count = 1
    for size in shape:
        count *= max(size, 1)
        if count >= 2**63:
            return False
    return True


def is_dense(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether these strides visit each of ``numel`` adjacent elements exactly once (some order of row-major)."""
    if 0 in shape:
        return True
    step = 1
    for dim_stride, size in sorted((st, size) for st, size in zip(stride, shape, strict=True) if size != 1):
        if dim_stride != step:
            return False
        step *= size
    return True


def may_overlap(tensor: Tensor) -> bool:
    """Whether two elements of the tensor may share memory, as in an expanded tensor."""
    if tensor.numel() == 0:
        return False
    reach = 0
    dims = sorted((st, size) for st, size in zip(tensor.stride(), tensor.shape, strict=True) if size != 1)
    for dim_stride, size in dims:
        if dim_stride <= reach:
            return True
        reach += dim_stride * (size - 1)
    return False


def span(tensor: Tensor) -> tuple[int, int]:
    """First byte and one past the last byte of a tensor in memory; it is strided and has elements."""
    reach = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (reach + 1) * tensor.element_size()


def storage_of(tensor: Tensor) -> int:
    """A number that tensors have in common only if they lie in the same allocation; 0 for those without memory."""
    has_memory = tensor.device.type != "meta" and tensor.layout is torch.strided
    return tensor.untyped_storage().data_ptr() if has_memory else 0


def overlap(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors reach over common memory, even if they have no element in common."""
    if one.device != other.device or one.device.type == "meta" or not one.numel() or not other.numel():
        return False
    (start, stop), (first, last) = span(one), span(other)
    return start < last and first < stop


def empty_like_recorded(
    shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype, device: torch.device | str
) -> Tensor:
    """Allocate a tensor with recorded strides; strides that leave gaps or overlap are replaced by row-major ones."""
    if not is_dense(shape, stride):
        stride = contiguous_strides(shape)
    return torch.empty_strided(tuple(shape), tuple(stride), dtype=dtype, device=device)


def row_blocks(tensor: Tensor, limit: int = BLOCK_BYTES) -> Iterator[Tensor]:
    """Cut a tensor into views that follow each other in row-major order, each of at most ``limit`` bytes.

    Args:
        tensor: Any strided tensor, of any device.
        limit: Bytes; a block holds at least one element.
    """
    if tensor.numel() == 0:
        return
    itemsize = tensor.element_size()
    if tensor.numel() * itemsize <= limit or tensor.dim() == 0:
        yield tensor
    elif tensor.is_contiguous():
        yield from torch.split(tensor.view(-1), max(1, limit // itemsize))
    else:
        row_bytes = math.prod(tensor.shape[1:]) * itemsize
        if row_bytes <= limit:
            yield from torch.split(tensor, max(1, limit // row_bytes))
        else:
            for row in tensor:
                yield from row_blocks(row, limit)


def as_bytes(tensor: Tensor) -> memoryview:
    """View the memory of a row-major CPU tensor as bytes, without a copy."""
    # A single element is row-major whatever its strides, and view(-1) would keep those.
    flat = tensor.as_strided((tensor.numel(),), (1,))
    return flat.view(torch.uint8).numpy().data


def is_row_major_memory(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether the bytes of a tensor's memory are its elements as row-major values of ``dtype``."""
    plain = tensor.device.type == "cpu" and not tensor.is_conj() and not tensor.is_neg()
    return plain and tensor.dtype == dtype and tensor.is_contiguous()


def iter_bytes(tensor: Tensor) -> Iterator[memoryview]:
    """Yield the elements of a tensor as row-major bytes, block by block.

    Row-major CPU memory is handed out without a copy; anything else is copied one block at a time. The autograd graph,
    version counter and gradient of the tensor are not touched.
    """
    # No torch.no_grad() here: it would be held, or left behind, in the code that takes the blocks. Detached will do.
    for block in row_blocks(tensor.detach()):
        if not is_row_major_memory(block, block.dtype):
            block = block.resolve_conj().resolve_neg().cpu().contiguous()
        yield as_bytes(block)


def ignore(block: memoryview) -> None:
    """Do nothing with a block of bytes."""


def fill(target: Tensor, dtype: torch.dtype, read_into: Callable[[memoryview], None]) -> None:
    """Overwrite a tensor, block by block, with row-major bytes of ``dtype``.

    Args:
        target: Tensor to overwrite in place; any device, stride and dtype.
        dtype: dtype of the bytes; where it is not the target's, values are converted.
        read_into: Called with writable memory, in row-major order; fills all of it.
    """
    # Views of a tensor made in inference mode can only be written there.
    with torch.inference_mode(target.is_inference()), torch.no_grad():
        for block in row_blocks(target.detach()):
            direct = is_row_major_memory(block, dtype)
            staged = block if direct else torch.empty(block.shape, dtype=dtype, device="cpu")
            memory = as_bytes(staged)
            read_into(memory)
            if not direct:
                block.copy_(staged)
    if target.numel() and not target.is_inference():
        # The bytes above were written behind autograd's back: it must see them as an in-place change.
        torch.autograd.graph.increment_version(target)


class Digest:
    """The digest of bytes that come in blocks; their sizes do not matter."""

    def __init__(self) -> None:
        self._hasher = xxhash.xxh3_128()

    def add(self, block: memoryview) -> None:
        """Go on with the next block."""
        self._hasher.update(block)

    def __str__(self) -> str:
        """32 hexadecimal digits of XXH3-128, as they stand in files."""
        return self._hasher.hexdigest()


def digest_of(blocks: Iterable[memoryview]) -> str:
    """The digest of a sequence of blocks, as it stands in files."""
    digest = Digest()
    for block in blocks:
        digest.add(block)
    return str(digest)
