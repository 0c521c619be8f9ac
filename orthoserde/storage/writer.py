"""Checkpoints to files: one pass over the tensors, which are digested as they are written."""

from __future__ import annotations

import dataclasses
import io
import os
from collections.abc import Iterator

from orthoserde.checkpoint import Checkpoint
from orthoserde.errors import ConfigError, UnsupportedModuleError
from orthoserde.manifest import Manifest
from orthoserde.storage.atomic import replacing
from orthoserde.storage.container import byte_size, container_form
from orthoserde.storage.format import file_header, in_storage_order
from orthoserde.tensor_bytes import Digest

_NO_DIGEST = "0" * 32


def write(checkpoint: Checkpoint, path: str | os.PathLike[str]) -> int:
    """Write a checkpoint to a file, durably and as a whole.

    Args:
        checkpoint: What to write. Its tensors are read once, in storage order.
        path: The file to create or replace.

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
    if not checkpoint.manifest.has_configuration:
        raise ConfigError(
            f"{checkpoint.origin}: it has no configuration, so it cannot be written as a file that has one"
        )
    records = in_storage_order(checkpoint.manifest.tensors)
    manifest = dataclasses.replace(checkpoint.manifest, tensors=records)
    # Digests have a fixed width, so the header's size is known before they are: it is written last, in its place.
    digests = dict.fromkeys(records, _NO_DIGEST)
    header_bytes = len(file_header(_with_digests(manifest, digests)))
    with replacing(path) as file:
        file.seek(header_bytes)
        size = header_bytes
        for key in records:
            digest, start = Digest(), size
            for block in checkpoint.sources[key].blocks():
                write_all(file, block)
                digest.add(block)
                size += len(block)
            if size - start != byte_size(*container_form(records[key].dtype, records[key].shape)):
                raise UnsupportedModuleError(f"{key}: its size changed while it was being saved")
            digests[key] = str(digest)
        checkpoint.check_unchanged()
        file.seek(0)
        write_all(file, memoryview(file_header(_with_digests(manifest, digests))))
        # A file without tensors ends at its header; one with tensors was extended by the writes above.
        file.truncate(size)
    return size


def _with_digests(manifest: Manifest, digests: dict[str, str]) -> Manifest:
    tensors = {key: dataclasses.replace(record, digest=digests[key]) for key, record in manifest.tensors.items()}
    return dataclasses.replace(manifest, tensors=tensors)


def write_all(file: io.FileIO, block: memoryview) -> None:
    """Write all of a block, which the system may take in parts."""
    for part in _parts(block):
        done = 0
        while done < len(part):
            done += file.write(part[done:])


def _parts(block: memoryview, limit: int = 1 << 30) -> Iterator[memoryview]:
    # Linux writes at most 2 GiB at once, macOS refuses more.
    for start in range(0, len(block), limit):
        yield block[start : start + limit]
