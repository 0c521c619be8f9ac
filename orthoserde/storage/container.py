"""The safetensors container: header bytes to a table of tensors, and back.

Source: the format section of safetensors' README (version 0.8). A file is eight bytes of little-endian header length, a
JSON header padded with spaces (here to 64 bytes in all), and the tensors' row-major bytes without gaps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from orthoserde import json_values
from orthoserde.errors import DamagedFileError, FileFormatError
from orthoserde.json_values import JSON
from orthoserde.tensor_bytes import DTYPES, is_countable

LENGTH_BYTES = 8
#: Tensor data begins at a multiple of this many bytes, so that copies out of the page cache go by whole cache lines.
ALIGNMENT = 64

MAX_HEADER_BYTES = 100_000_000

#: More tensors than any one file of weights has. A header of 100 MB has room for ten times as many, each of them empty,
#: and reading it would take half a minute and a gigabyte.
MAX_TENSORS = 1 << 17

#: Names of dtypes in the container, by torch's.
CODES: dict[str, str] = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "uint16": "U16",
    "int16": "I16",
    "uint32": "U32",
    "int32": "I32",
    "uint64": "U64",
    "int64": "I64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
    "complex64": "C64",
}
_NAMES = {code: name for name, code in CODES.items()}
_ITEM_BYTES = {name: DTYPES[name].itemsize for name in DTYPES}


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of the container.

    Attributes:
        dtype: torch's name of the dtype.
        shape: Shape.
        start: First byte, counted from the end of the header.
        stop: One past the last byte.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Header:
    """A parsed header: the tensors in the order of their bytes, and the string metadata."""

    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]


def container_form(dtype: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    """The dtype and shape under which a tensor stands in the container.

    They are its own, but for complex128, which safetensors does not have: it is written as pairs of float64.
    """
    return ("float64", (*shape, 2)) if dtype == "complex128" else (dtype, shape)


def byte_size(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor of this dtype and shape."""
    return math.prod(shape) * _ITEM_BYTES[dtype]


def storage_order(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> list[str]:
    """The order of the tensors' bytes: wide dtypes first, so that all are aligned, then by key.

    Args:
        tensors: dtype and shape by key, as :func:`container_form` gives them.
    """
    return sorted(tensors, key=lambda key: (-_ITEM_BYTES[tensors[key][0]], key))


def entries_of(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, Entry]:
    """Where tensors lie that follow each other without gaps.

    Args:
        tensors: dtype and shape by key, in the order of their bytes.
    """
    entries: dict[str, Entry] = {}
    start = 0
    for key, (dtype, shape) in tensors.items():
        stop = start + byte_size(dtype, shape)
        entries[key] = Entry(dtype, shape, start, stop)
        start = stop
    return entries


def encode_header(tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """Write the length and the header of a file.

    Args:
        tensors: dtype and shape by key, in the order of their bytes.
        metadata: Strings for ``__metadata__``.

    Raises:
        FileFormatError: The header would be larger than the 100 MB that readers accept.
    """
    header: dict[str, JSON] = {"__metadata__": dict(sorted(metadata.items()))}
    for key, entry in entries_of(tensors).items():
        offsets: list[JSON] = [entry.start, entry.stop]
        header[key] = {"dtype": CODES[entry.dtype], "shape": list(entry.shape), "data_offsets": offsets}
    text = json_values.encode_in_order(header).encode("utf-8")
    text += b" " * (-(LENGTH_BYTES + len(text)) % ALIGNMENT)
    if len(text) > MAX_HEADER_BYTES or len(tensors) > MAX_TENSORS:
        raise FileFormatError(
            f"{len(tensors)} tensors and a header of {len(text)} bytes: readers accept {MAX_TENSORS} tensors and "
            f"{MAX_HEADER_BYTES} bytes in one file; use max_shard_size"
        )
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def decode_header(text: bytes, data_bytes: int, where: str) -> Header:
    """Parse a header strictly.

    Args:
        text: The header, without its length.
        data_bytes: Bytes that follow the header in the file; the tensors must cover them exactly.
        where: The file, for messages.

    Raises:
        FileFormatError: Not a safetensors header, or one that contradicts itself.
        DamagedFileError: The file is longer or shorter than the header says.
    """
    if not text.startswith(b"{"):
        raise FileFormatError(f"{where}: the header does not begin with '{{': not a safetensors file")
    # Before it is parsed: names may be written in other ways, so this is not the last word.
    if text.count(b'"data_offsets"') > MAX_TENSORS:
        raise FileFormatError(f"{where}: the header speaks of more than {MAX_TENSORS} tensors")
    parsed = json_values.decode(text, f"{where}: header")
    if not isinstance(parsed, dict):
        raise FileFormatError(f"{where}: header: expected an object")
    if len(parsed) > MAX_TENSORS + 1:
        raise FileFormatError(f"{where}: the header speaks of more than {MAX_TENSORS} tensors")
    metadata = parsed.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(item, str) for item in metadata.values()):
        raise FileFormatError(f"{where}: header: __metadata__ must hold strings alone")
    entries = {key: _decode_entry(item, f"{where}: header: {key!r}") for key, item in parsed.items()}
    ordered = dict(sorted(entries.items(), key=lambda pair: (pair[1].start, pair[1].stop)))
    position = 0
    for key, entry in ordered.items():
        if entry.start != position:
            raise FileFormatError(f"{where}: header: {key!r} begins at byte {entry.start}, expected {position}")
        position = entry.stop
    if position != data_bytes:
        raise DamagedFileError(
            f"{where}: the header describes {position} bytes of tensors, the file holds {data_bytes}: "
            "truncated or damaged; use another copy of the file"
        )
    return Header(ordered, {key: str(item) for key, item in metadata.items()})


def _decode_entry(value: JSON, where: str) -> Entry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise FileFormatError(f"{where}: expected dtype, shape and data_offsets")
    name = _NAMES.get(value["dtype"]) if isinstance(value["dtype"], str) else None
    if name is None:
        raise FileFormatError(f"{where}: unknown dtype {str(value['dtype'])[:32]!r}")
    shape, offsets = _sizes(value["shape"], where), _sizes(value["data_offsets"], where)
    if not is_countable(shape):
        raise FileFormatError(f"{where}: the shape is too large")
    if len(offsets) != 2 or offsets[1] - offsets[0] != byte_size(name, shape):
        raise FileFormatError(
            f"{where}: data_offsets do not span the {byte_size(name, shape)} bytes of its dtype and shape"
        )
    return Entry(name, shape, offsets[0], offsets[1])


def _sizes(value: JSON, where: str) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise FileFormatError(f"{where}: expected lists of integers")
    sizes: list[int] = []
    for item in value:
        if not isinstance(item, int) or isinstance(item, bool) or item < 0:
            raise FileFormatError(f"{where}: expected lists of integers from 0")
        sizes.append(item)
    return tuple(sizes)
