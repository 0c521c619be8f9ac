"""Files of ``torch.save`` to checkpoints, for reading alone.

They are pickles, so they are read by torch's own restricted unpickler and never in any other way, after a look at what
it would be told to do (Note [Pickles]): what either refuses is refused. That unpickler could be made to run code before
torch 2.6 (CVE-2025-32434), so there these files are refused.
"""

from __future__ import annotations

import io
import os
import re
import struct
import warnings
from collections.abc import Mapping
from pickle import PickleError

import torch
from torch import Tensor

from orthoserde import _torch
from orthoserde.checkpoint import Checkpoint, LiveTensor
from orthoserde.errors import FileFormatError
from orthoserde.manifest import Manifest, TensorRecord
from orthoserde.storage.archives import read_archive
from orthoserde.storage.pickles import check_pickle
from orthoserde.tensor_bytes import DTYPES, as_bytes, contiguous_strides, dtype_name

#: How the files of ``torch.save`` begin: a zip archive, or before torch 1.6 a bare pickle.
ZIP_MAGIC = b"PK\x03\x04"
PICKLE_MAGIC = b"\x80"

#: Bytes that :func:`is_torch_file` wants to see.
MAGIC_BYTES = 9

#: The first torch whose ``weights_only=True`` keeps its word.
SAFE_TORCH = (2, 6)

# What the unpickler of torch 2.13 was seen to raise on 200,000 damaged files.
_UNPICKLING = (
    PickleError,
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    AssertionError,
    ImportError,
    EOFError,
    OSError,
    OverflowError,
    MemoryError,
    struct.error,
)

#: Pickles in the form of before torch 1.6: a magic number, a version, the system, the content, names of storages.
_PICKLES = 5

#: What says how many elements a storage has.
_SIZE_BYTES = 8


def is_torch_file(start: bytes) -> bool:
    """Whether a file that begins with these bytes is one of ``torch.save``, and not a safetensors file.

    The header length of a safetensors file may look like a magic number, but then its header follows.
    """
    return start.startswith((ZIP_MAGIC, PICKLE_MAGIC)) and start[8:9] != b"{"


def read_torch_file(file: io.FileIO, name: str, start: bytes) -> Checkpoint:
    """Read a state dict that ``torch.save`` wrote.

    Args:
        file: The open file. It must hold one flat dict of tensors by key.
        name: Its name, for messages; torch would also guess the sort of file from it.
        start: Its first bytes.

    Returns:
        A checkpoint without configuration, whose tensors are in memory.

    Raises:
        FileFormatError: torch is older than 2.6, or the file is damaged, compressed, not restricted to weights, or not
            a flat dict of ordinary tensors.
    """
    found = tuple(int(number) for number in re.findall(r"\d+", torch.__version__)[:2])
    if found < SAFE_TORCH:
        raise FileFormatError(
            f"{name}: a file of torch.save is a pickle, which torch {torch.__version__} cannot read safely "
            "(CVE-2025-32434); use torch 2.6 or newer, or convert the file to safetensors"
        )
    size = os.fstat(file.fileno()).st_size
    tensors = (_read_archive if start.startswith(ZIP_MAGIC) else _read_bare_pickle)(file, size, name)
    records = {
        key: TensorRecord(
            dtype_name(tensor.dtype), tuple(tensor.shape), contiguous_strides(tensor.shape), parameter=False
        )
        for key, tensor in tensors.items()
    }
    manifest = Manifest(tensors=records, has_configuration=False)
    return Checkpoint(manifest, {key: LiveTensor(tensor) for key, tensor in tensors.items()}, name)


class _WithoutDescriptor(io.BufferedReader):
    """A file that torch cannot know to be one: of those it would first ask whether they are tar archives."""

    def fileno(self) -> int:
        raise io.UnsupportedOperation("fileno")


def _read_archive(file: io.FileIO, size: int, name: str) -> dict[str, Tensor]:
    """Read the form that ``torch.save`` writes since torch 1.6."""
    archive = read_archive(file, size, name)
    check_pickle(io.BytesIO(archive.pickle), name)
    tensors = _checked(_unpickled(file, name), name)
    if _storage_bytes(tensors) > size:
        raise FileFormatError(f"{name}: its tensors claim more bytes than the file holds")
    archive.check(
        (as_bytes(torch.empty(0, dtype=torch.uint8, device="cpu").set_(each)) for each in _storages(tensors)), name
    )
    return tensors


def _read_bare_pickle(file: io.FileIO, size: int, name: str) -> dict[str, Tensor]:
    """Read the form of before torch 1.6: five pickles, then each storage behind its size."""
    reader = _WithoutDescriptor(file)
    try:
        reader.seek(0)
        strings = [check_pickle(reader, name) for _ in range(_PICKLES)]
        start = reader.tell()
        tensors = _checked(_unpickled(reader, name), name)
        stop = reader.tell()
    finally:
        reader.detach()
    # Else memory that nothing has filled would be taken for tensors.
    expected = start + _SIZE_BYTES * strings[-1] + _storage_bytes(tensors)
    if not stop == expected == size:
        raise FileFormatError(f"{name}: its storages take {expected} bytes to their end, the file holds {size}")
    return tensors


def _unpickled(file: io.FileIO | io.BufferedReader, name: str) -> object:
    file.seek(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickles that are odd: either they load, or the error says why not
            content: object = torch.load(file, map_location="cpu", weights_only=True, mmap=False)
    except _UNPICKLING as error:
        raise FileFormatError(
            f"{name}: torch's restricted unpickler refuses it ({type(error).__name__}): it is damaged, or holds more "
            "than tensors; save model.state_dict() by itself"
        ) from error
    return content


def _storage_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of the memory in which tensors lie, that of several counted once."""
    return sum(storage.nbytes() for storage in _storages(tensors))


def _storages(tensors: Mapping[str, Tensor]) -> list[torch.UntypedStorage]:
    found = [tensor.untyped_storage() for tensor in tensors.values()]
    return list({storage.data_ptr(): storage for storage in found}.values())


def _checked(content: object, name: str) -> dict[str, Tensor]:
    if not isinstance(content, Mapping):
        raise FileFormatError(f"{name}: expected a state dict, got {type(content).__name__}; save that of the model")
    tensors: dict[str, Tensor] = {}
    for key, value in content.items():
        if not isinstance(key, str):
            raise FileFormatError(f"{name}: expected keys that are strings, got {type(key).__name__}")
        try:
            key.encode("utf-8")
        except UnicodeEncodeError as error:
            text = f"{name}: the key {key[:64]!r} is no valid Unicode; rename it, and save again"
            raise FileFormatError(text) from error
        if not isinstance(value, Tensor):
            raise FileFormatError(
                f"{name}: expected a flat state dict of tensors, got {type(value).__name__} under {key[:64]!r}"
                f"{_advice(content)}"
            )
        tensors[key] = _ordinary(value, key, name)
    return tensors


def _advice(content: Mapping[object, object]) -> str:
    """How to take a state dict out of what it was saved within."""
    within = next((key for key, value in content.items() if _is_state(value)), None)
    if not isinstance(within, str) or len(within) > 64:
        return "; save the state dict of the model by itself, tensors alone"
    read = f"torch.load(path, map_location='cpu')[{within!r}]"
    return f"; what is under {within!r} looks like one, save it by itself: torch.save({read}, other_path)"


def _is_state(value: object) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(isinstance(each, Tensor) for each in value.values())


def _ordinary(tensor: Tensor, key: str, name: str) -> Tensor:
    if (
        _torch.overrides_dispatch(tensor)
        or tensor.layout is not torch.strided
        or tensor.device.type != "cpu"
        or dtype_name(tensor.dtype) not in DTYPES
    ):
        raise FileFormatError(f"{name}: {key[:64]!r} is no ordinary tensor ({tensor.layout}, {tensor.dtype})")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise FileFormatError(f"{name}: {key[:64]!r} claims more elements than the file holds")
    return tensor.detach()
