"""Checkpoints to files without a manifest: names, shapes and values alone, as any reader takes them."""

from __future__ import annotations

import io
import os
from typing import IO, cast

import torch
from torch import Tensor

from orthoserde.checkpoint import Checkpoint
from orthoserde.errors import ConfigError, UnsupportedModuleError
from orthoserde.storage.atomic import replacing
from orthoserde.storage.container import byte_size, encode_header, storage_order
from orthoserde.storage.format import FORBIDDEN_TENSOR_KEYS
from orthoserde.storage.writer import write_all


def write_plain(checkpoint: Checkpoint, path: str | os.PathLike[str]) -> int:
    """Write the tensors of a checkpoint to an ordinary safetensors file, durably and as a whole.

    A tied tensor is written under each of its names, for that is what ``load_state_dict`` asks for.

    Args:
        checkpoint: What to write. Its tensors are read in storage order, a block at a time.
        path: The file to create or replace.

    Returns:
        The size of the file in bytes.

    Raises:
        ConfigError: It holds a complex128 tensor or a name that safetensors does not have.
        FileAccessError: The system refused something; the previous file is untouched.
        CommitUncertainError: The file is in place, but perhaps not durably.
        FileFormatError: Too many tensors for one header.
        TornSaveError: A tensor of a live model changed meanwhile.
        UnsupportedModuleError: A tensor changed its size meanwhile.
    """
    manifest = checkpoint.manifest
    kept = {key: key for key in manifest.tensors} | dict(manifest.aliases)
    forms = {name: (manifest.tensors[key].dtype, manifest.tensors[key].shape) for name, key in kept.items()}
    wide = [name for name, (dtype, _) in forms.items() if dtype == "complex128"]
    if wide:
        raise ConfigError(
            f"{checkpoint.origin}: {wide[0]} is complex128, which safetensors does not have; give a file name that "
            "ends in .pt, for a file of torch.save"
        )
    taken = FORBIDDEN_TENSOR_KEYS.intersection(forms)
    if taken:
        raise ConfigError(
            f"{checkpoint.origin}: a tensor is called {min(taken)!r}, which has another meaning in safetensors files; "
            "rename it, or give a file name that ends in .pt, for a file of torch.save"
        )
    ordered = {name: forms[name] for name in storage_order(forms)}
    header = encode_header(ordered, {"format": "pt"})
    with replacing(path, check=checkpoint.check_unchanged) as file:
        write_all(file, memoryview(header))
        size = len(header)
        for name, form in ordered.items():
            start = size
            for block in checkpoint.sources[kept[name]].blocks():
                write_all(file, block)
                size += len(block)
            if size - start != byte_size(*form):
                raise UnsupportedModuleError(f"{name}: its size changed while it was being saved")
    return size


def write_torch(checkpoint: Checkpoint, path: str | os.PathLike[str]) -> int:
    """Write the tensors of a checkpoint to a file of ``torch.save``, durably and as a whole.

    All of them are in memory at once, for that is how ``torch.save`` works. Tied tensors stay tied.

    Args:
        checkpoint: What to write.
        path: The file to create or replace.

    Returns:
        The size of the file in bytes.

    Raises:
        FileAccessError: The system refused something; the previous file is untouched.
        CommitUncertainError: The file is in place, but perhaps not durably.
        TornSaveError: A tensor of a live model changed meanwhile.
    """
    state: dict[str, Tensor] = {key: checkpoint.tensor(key) for key in checkpoint.manifest.tensors}
    state |= {alias: state[kept] for alias, kept in checkpoint.manifest.aliases.items()}
    with replacing(path, check=checkpoint.check_unchanged) as file:
        noting = _Noting(file)
        try:
            torch.save(state, cast("IO[bytes]", noting))
        except Exception:
            if noting.error is not None:  # torch turns the error of a full disk into one that does not say so
                raise noting.error from None
            raise
        return file.tell()


class _Noting(io.RawIOBase):
    """Writes to a file, and remembers the error of the system that ended it."""

    def __init__(self, file: io.FileIO) -> None:
        self.error: OSError | None = None
        self._file = file

    def writable(self) -> bool:
        return True

    def write(self, content: object) -> int:
        block = memoryview(content).cast("B")  # type: ignore[arg-type]
        try:
            write_all(self._file, block)
        except OSError as error:
            self.error = error
            raise
        return len(block)
