"""Checkpoints to files: one pass over the tensors, which are digested as they are written."""

from __future__ import annotations

import dataclasses
import errno
import io
import os
from collections.abc import Iterator, Mapping

from orthoserde.checkpoint import Checkpoint
from orthoserde.errors import ConfigError, UnsupportedModuleError
from orthoserde.manifest import TensorRecord
from orthoserde.storage.atomic import replacing
from orthoserde.storage.container import byte_size, container_form
from orthoserde.storage.format import file_header, in_storage_order
from orthoserde.tensor_bytes import Digest

#: Stands for a digest that is not known yet.
NO_DIGEST = "0" * 32


def write(checkpoint: Checkpoint, path: str | os.PathLike[str], mode: int | None = None) -> int:
    """Write a checkpoint to a file, durably and as a whole.

    Args:
        checkpoint: What to write. Its tensors are read once, in storage order.
        path: The file to create or replace.
        mode: Permission bits where no file is replaced; by default what the umask leaves of 0666.

    Returns:
        The size of the file in bytes.

    Raises:
        FileAccessError: The system refused something; the previous file is untouched.
        CommitUncertainError: The file is in place, but perhaps not durably.
        FileFormatError: Too many tensors for one header.
        ConfigError: The checkpoint was read from a file without configuration.
        TornSaveError: A tensor of a live model changed meanwhile.
        UnsupportedModuleError: A tensor changed its size meanwhile.
    """
    check_writable(checkpoint)
    records = in_storage_order(checkpoint.manifest.tensors)
    manifest = dataclasses.replace(checkpoint.manifest, tensors=records)
    # Digests have a fixed width, so the header's size is known before they are: it is written last, in its place.
    header_bytes = len(file_header(manifest, dict.fromkeys(records, NO_DIGEST)))
    with replacing(path, mode, check=checkpoint.check_unchanged) as file:
        size, digests = write_tensors(file, checkpoint, records, header_bytes)
        write_header(file, file_header(manifest, digests), size)
    return size


def check_writable(checkpoint: Checkpoint) -> None:
    """Refuse what cannot be written as a file of ours.

    Raises:
        ConfigError: The checkpoint was read from a file without configuration.
    """
    if not checkpoint.manifest.has_configuration:
        raise ConfigError(
            f"{checkpoint.origin}: it has no configuration, so it cannot be written as a file that has one"
        )


def write_tensors(
    file: io.FileIO, checkpoint: Checkpoint, records: Mapping[str, TensorRecord], start: int
) -> tuple[int, dict[str, str]]:
    """Write tensors one behind the other.

    Args:
        file: A new file.
        checkpoint: What holds them.
        records: Which of them, in this order.
        start: Where the first one begins, in bytes; the header goes before it.

    Returns:
        Where the last one ends, and their digests by key.

    Raises:
        UnsupportedModuleError: A tensor changed its size meanwhile.
    """
    file.seek(start)
    digests: dict[str, str] = {}
    for key, record in records.items():
        digest, stop = Digest(), start + byte_size(*container_form(record.dtype, record.shape))
        for block in checkpoint.sources[key].blocks():
            write_all(file, block)
            digest.add(block)
            start += len(block)
        if start != stop:
            raise UnsupportedModuleError(f"{key}: its size changed while it was being saved")
        digests[key] = str(digest)
    return start, digests


def write_header(file: io.FileIO, header: bytes, size: int) -> None:
    """Write the header of a file whose tensors have been written; ``size`` is that of the whole file, in bytes."""
    file.seek(0)
    write_all(file, memoryview(header))
    # A file without tensors ends at its header; one with tensors was extended by them.
    file.truncate(size)


def write_all(file: io.FileIO, block: memoryview) -> None:
    """Write bytes where the file stands, however many times the system must be asked; raises OSError."""
    for part in _parts(block):
        done = 0
        while done < len(part):
            written = file.write(part[done:])
            if not written:  # no error, and no progress either: to ask again might be to ask for ever
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            done += written


def _parts(block: memoryview, limit: int = 1 << 30) -> Iterator[memoryview]:
    # Linux writes at most 2 GiB at once, macOS refuses more.
    for start in range(0, len(block), limit):
        yield block[start : start + limit]
