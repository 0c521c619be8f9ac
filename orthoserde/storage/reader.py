"""Files to checkpoints. Only the header is read at once; a tensor is read when asked, into the memory that wants it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from orthoserde import tensor_bytes
from orthoserde.checkpoint import Checkpoint
from orthoserde.errors import FileFormatError
from orthoserde.manifest import Manifest
from orthoserde.storage.container import LENGTH_BYTES, MAX_HEADER_BYTES, Entry, decode_header
from orthoserde.storage.format import canonical_parts, manifest_of
from orthoserde.storage.open_file import OpenFile, Readable, open_file
from orthoserde.storage.torch_files import MAGIC_BYTES, is_torch_file, read_torch_file


def read_file(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a file: of ours, a safetensors file of another library, or a state dict of ``torch.save``.

    Args:
        path: The file. Anything but a regular file is refused.

    Returns:
        A checkpoint that owns the open file; close it, or use it as a context manager.

    Raises:
        CheckpointNotFoundError: There is no such file.
        FileAccessError: The system refuses to open or read it.
        FileFormatError: It is none of these, or it is damaged.
    """
    name = os.fspath(path)
    file = open_file(name)
    try:
        size = file.size()
        start = file.read(min(size, MAGIC_BYTES), 0)
        if is_torch_file(start):
            with file.raw:
                return read_torch_file(file.raw, name, start)
        raw = read_header(file, size, start)
        manifest, entries = canonical_parts(raw, size - len(raw), name) or _parsed(raw, size - len(raw), name)
        sources = {
            key: StoredTensor(file, len(raw), entries[key], record.dtype, key)
            for key, record in manifest.tensors.items()
        }
    except BaseException:
        file.close()
        raise
    return Checkpoint(manifest, sources, name, file.close)


def _parsed(raw: bytes, data_bytes: int, name: str) -> tuple[Manifest, Mapping[str, Entry]]:
    header = decode_header(raw[LENGTH_BYTES:], data_bytes, name)
    return manifest_of(header, raw, name), header.entries


def read_header(file: OpenFile, size: int, start: bytes) -> bytes:
    """The length and the header of an open file.

    Args:
        file: The file.
        size: Its size in bytes.
        start: Its first bytes, at least eight if it has as many.

    Raises:
        FileFormatError: There is no header.
    """
    length = int.from_bytes(start[:LENGTH_BYTES], "little")
    if len(start) < LENGTH_BYTES or length > min(MAX_HEADER_BYTES, size - LENGTH_BYTES):
        why = "it is empty" if size == 0 else "truncated, or another sort of file"
        text = f"no safetensors header in its {size} bytes: {why}; use another copy"
        raise FileFormatError(f"{file.name}: {text}")
    whole = LENGTH_BYTES + length
    return start[:whole] + file.read(max(0, whole - len(start)), len(start))


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """The elements of one tensor of a file."""

    file: Readable
    data_start: int
    entry: Entry
    dtype: str
    key: str

    any_thread: ClassVar[bool] = True

    def blocks(self) -> Iterator[memoryview]:
        """Yield the elements as row-major bytes, in one buffer that is used again and again."""
        read_into = self._reader(tensor_bytes.ignore)
        left = self.entry.stop - self.entry.start
        buffer = memoryview(bytearray(min(left, tensor_bytes.BLOCK_BYTES)))
        while left:
            memory = buffer[: min(left, len(buffer))]
            read_into(memory)
            left -= len(memory)
            yield memory

    def fill(self, target: Tensor, see: Callable[[memoryview], None] = tensor_bytes.ignore) -> None:
        """Read the elements into ``target``."""
        dtype: torch.dtype = tensor_bytes.DTYPES[self.dtype]
        tensor_bytes.fill(target, dtype, self._reader(see))

    def _reader(self, see: Callable[[memoryview], None]) -> Callable[[memoryview], None]:
        position = self.data_start + self.entry.start

        def read_into(memory: memoryview) -> None:
            nonlocal position
            self.file.read_into(memory, position)
            position += len(memory)
            see(memory)

        return read_into
