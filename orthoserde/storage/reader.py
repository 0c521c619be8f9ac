"""Files to checkpoints. Only the header is read at once; a tensor is read when asked, into the memory that wants it."""

from __future__ import annotations

import errno
import io
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from orthoserde import tensor_bytes
from orthoserde.checkpoint import Checkpoint
from orthoserde.errors import CheckpointNotFoundError, FileAccessError, FileFormatError
from orthoserde.storage.container import LENGTH_BYTES, MAX_HEADER_BYTES, Entry, decode_header
from orthoserde.storage.format import manifest_of
from orthoserde.storage.torch_files import MAGIC_BYTES, is_torch_file, read_torch_file


def read(path: str | os.PathLike[str]) -> Checkpoint:
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
    file = _open(name)
    try:
        size = os.fstat(file.fileno()).st_size
        start = _read_exactly(file, min(size, MAGIC_BYTES), name)
        if is_torch_file(start):
            with file:
                return read_torch_file(file, name, start)
        raw = _read_header(file, size, name, start)
        header = decode_header(raw[LENGTH_BYTES:], size - len(raw), name)
        manifest = manifest_of(header, raw, name)
        sources = {
            key: StoredTensor(file, len(raw), header.entries[key], record.dtype, key, name)
            for key, record in manifest.tensors.items()
        }
    except BaseException:
        file.close()
        raise
    return Checkpoint(manifest, sources, name, file.close)


def _open(name: str) -> io.FileIO:
    # O_NONBLOCK: opening a FIFO must not wait for a writer; it means nothing for the regular files that pass the check.
    flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(name, flags)
    except FileNotFoundError as error:
        raise CheckpointNotFoundError(error.errno, "no such checkpoint", name) from error
    except OSError as error:
        raise FileAccessError(error.errno, f"cannot open the checkpoint: {error.strerror}", name) from error
    except ValueError as error:
        raise FileAccessError(errno.EINVAL, str(error), name) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise FileFormatError(f"{name}: not a regular file")
    return io.FileIO(descriptor, "rb")


def _read_header(file: io.FileIO, size: int, name: str, start: bytes) -> bytes:
    """The length and the header, of which the first bytes have been read."""
    length = int.from_bytes(start[:LENGTH_BYTES], "little")
    if len(start) < LENGTH_BYTES or length > min(MAX_HEADER_BYTES, size - LENGTH_BYTES):
        raise FileFormatError(f"{name}: no safetensors header in its {size} bytes: truncated, or another sort of file")
    whole = LENGTH_BYTES + length
    return start[:whole] + _read_exactly(file, max(0, whole - len(start)), name)


def _read_exactly(file: io.FileIO, count: int, name: str) -> bytes:
    buffer = bytearray(count)
    _read_into(file, memoryview(buffer), name)
    return bytes(buffer)


def _read_into(file: io.FileIO, memory: memoryview, name: str) -> None:
    done = 0
    while done < len(memory):
        try:
            count = file.readinto(memory[done:])
        except OSError as error:
            raise FileAccessError(error.errno, f"cannot read the checkpoint: {error.strerror}", name) from error
        if not count:
            raise FileFormatError(f"{name}: the file ends too early; it changed while it was read")
        done += count


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """The elements of one tensor of an open file."""

    file: io.FileIO
    data_start: int
    entry: Entry
    dtype: str
    key: str
    name: str

    def blocks(self) -> Iterator[memoryview]:
        """Yield the elements as row-major bytes, in one buffer that is used again and again."""
        read_into = self._reader()
        left = self.entry.stop - self.entry.start
        buffer = memoryview(bytearray(min(left, tensor_bytes.BLOCK_BYTES)))
        while left:
            memory = buffer[: min(left, len(buffer))]
            read_into(memory)
            left -= len(memory)
            yield memory

    def fill(self, target: Tensor) -> str:
        """Read the elements into ``target``; return the digest of the bytes that were read."""
        dtype: torch.dtype = tensor_bytes.DTYPES[self.dtype]
        return tensor_bytes.fill(target, dtype, self._reader())

    def _reader(self) -> Callable[[memoryview], None]:
        position = self.data_start + self.entry.start

        def read_into(memory: memoryview) -> None:
            # All tensors share the file: another one may have been read since the last block.
            nonlocal position
            self.file.seek(position)
            _read_into(self.file, memory, self.name)
            position += len(memory)

        return read_into
