"""Ways to damage a file of ours, each a function of a random generator, so that a failure can be run again.

A file that comes with recomputed digests is a legal file of another content; the others are damaged ones.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import xxhash

from orthoserde.storage.container import ALIGNMENT, LENGTH_BYTES
from orthoserde.storage.format import MANIFEST_KEY

#: What is put in the place of a value: what other types, limits and odd texts there are.
ODD_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 2**31, 2**53 + 1, 2**63 - 1, 2**63, -(2**63) - 1, 10**30),
    *(0.0, -0.0, 1.5, 1e300, float("nan"), float("inf")),
    *("", "a", ".", "..", "../../etc/passwd", "\0", "\ud800", "\x1b[31m", "é", "🎼", "A" * 300),
    *("__class__", "training", "requires_grad_", "dense", "columns", "hook", "opaque", "float64", "torch>orthogonal"),
    *(
        [],
        {},
        [[]],
        [{}],
        {"": None},
        {"tensor": "x"},
        {"dict": []},
        {"tuple": []},
        {"float": "nan"},
        {"integer": "9" * 20},
    ),
)

#: Bytes that mean something to a parser.
ODD_BYTES = b'\0\xff\x80"\\{}[],:0-9.eE ntu/'


@dataclass(frozen=True)
class Parts:
    """A file of ours, taken apart without the code under test."""

    header: dict[str, Any]
    manifest: dict[str, Any]
    data: bytes

    @classmethod
    def of(cls, raw: bytes) -> Parts:
        """Take a whole file apart."""
        stop = LENGTH_BYTES + int.from_bytes(raw[:LENGTH_BYTES], "little")
        header = json.loads(raw[LENGTH_BYTES:stop])
        return cls(header, json.loads(header["__metadata__"][MANIFEST_KEY])["manifest"], raw[stop:])

    def stored(self, key: str) -> slice:
        """Where the bytes of a tensor are among the data."""
        return slice(*self.header[key]["data_offsets"])


def text_of(value: Any) -> str:
    """The text of a JSON value, which may be one that no writer of ours would write."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def canonical(value: Any) -> str:
    """The text that a manifest has in a file."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def digest(data: bytes) -> str:
    """The digest of the file format."""
    return xxhash.xxh3_128_hexdigest(data)


def file_of(header: str, data: bytes) -> bytes:
    """A file with a header, padded as ours are."""
    text = header.encode("utf-8", "surrogatepass")
    text += b" " * (-(LENGTH_BYTES + len(text)) % ALIGNMENT)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text + data


def sealed(parts: Parts, manifest_text: str) -> bytes:
    """A file whose manifest has this text, and the digest of it; header and tensors are as they were."""
    found = digest(manifest_text.encode("utf-8", "surrogatepass"))
    envelope = f'{{"digest":"{found}","manifest":{manifest_text}}}'
    header = {**parts.header, "__metadata__": {**parts.header["__metadata__"], MANIFEST_KEY: envelope}}
    return file_of(text_of(header), parts.data)


def resealed(parts: Parts, manifest: Mapping[str, Any]) -> bytes:
    """A file of which manifest and header say the same, with the digests of the tensors that it has."""
    names = {
        "float32": ("F32", 4),
        "float64": ("F64", 8),
        "int64": ("I64", 8),
        "int32": ("I32", 4),
        "bool": ("BOOL", 1),
    }
    try:
        forms = {key: (*names[record["dtype"]], record["shape"]) for key, record in manifest["tensors"].items()}
        order = sorted(forms, key=lambda key: (-forms[key][1], key))
        header: dict[str, Any] = {"__metadata__": {**dict(sorted(manifest["aliases"].items())), "format": "pt"}}
        start = 0
        for key in order:
            code, item, shape = forms[key]
            stop = start + item * _product(shape)
            header[key] = {"dtype": code, "shape": shape, "data_offsets": [start, stop]}
            start = stop
        header["__metadata__"] = dict(sorted({**header["__metadata__"], MANIFEST_KEY: ""}.items()))
    except (KeyError, TypeError, AttributeError):  # what was mutated has no header: keep the old one
        return sealed(parts, canonical_or_not(manifest))
    return sealed(Parts(header, dict(manifest), parts.data), canonical_or_not(manifest))


def canonical_or_not(value: Any) -> str:
    """Canonical text, if the value has one."""
    try:
        return canonical(value)
    except TypeError:  # keys that do not sort
        return text_of(value)


def _product(shape: Any) -> int:
    if not all(type(size) is int for size in shape):
        raise TypeError("no shape")
    return math.prod(shape)


# Bytes


def set_bytes(raw: bytes, other: bytes, draw: random.Random) -> bytes:
    """Set one to four bytes."""
    changed = bytearray(raw)
    for _ in range(draw.randint(1, 4)):
        changed[draw.randrange(len(raw))] = draw.choice(ODD_BYTES) if draw.random() < 0.5 else draw.randrange(256)
    return bytes(changed)


def havoc(raw: bytes, other: bytes, draw: random.Random) -> bytes:
    """Insert, delete, repeat and overwrite stretches, several times."""
    changed = bytearray(raw)
    for _ in range(draw.randint(1, 6)):
        at, length = draw.randrange(len(changed) + 1), draw.choice((1, 2, 4, 8, 16, 64, 256))
        piece = bytes(changed[at : at + length])
        sort = draw.randrange(5)
        if sort == 0:
            changed[at:at] = draw.randbytes(length)
        elif sort == 1:
            del changed[at : at + length]
        elif sort == 2:
            changed[at:at] = piece * draw.randint(1, 4)
        elif sort == 3:
            changed[at : at + length] = bytes(len(piece))
        else:
            to = draw.randrange(len(changed) + 1)
            changed[to : to + len(piece)] = piece
    return bytes(changed)


def splice(raw: bytes, other: bytes, draw: random.Random) -> bytes:
    """One file up to a point, and another from a point on."""
    ends = [_data_start(raw), _data_start(other)]
    cut = ends[0] if draw.random() < 0.2 else draw.randrange(len(raw) + 1)
    on = draw.choice((min(cut, len(other)), ends[1], draw.randrange(len(other) + 1)))
    return raw[:cut] + other[on:]


def append(raw: bytes, other: bytes, draw: random.Random) -> bytes:
    """Let something follow the file."""
    return raw + draw.choice((b"\0", draw.randbytes(8), draw.randbytes(600), b"PK\x05\x06" + bytes(18), other))


def _data_start(raw: bytes) -> int:
    return LENGTH_BYTES + int.from_bytes(raw[:LENGTH_BYTES], "little")


# Structure


def mutate_json(value: Any, draw: random.Random, odd: tuple[Any, ...] = ODD_VALUES) -> Any:
    """Change one or two places of a JSON value, in a copy."""
    copy = json.loads(json.dumps(value))
    for _ in range(draw.randint(1, 2)):
        holder = _some_holder(copy, draw)
        if isinstance(holder, dict):
            _mutate_dict(holder, draw, odd)
        else:
            _mutate_list(holder, draw, odd)
    return copy


def _some_holder(value: Any, draw: random.Random) -> Any:
    """An object or a list that is not empty, somewhere in a value."""
    while True:
        inner = [item for item in (value.values() if isinstance(value, dict) else value) if item and _holds(item)]
        if not inner or draw.random() < 0.25:
            return value
        value = draw.choice(inner)


def _holds(value: Any) -> bool:
    return isinstance(value, (dict, list))


def _changed(value: Any, draw: random.Random, odd: tuple[Any, ...]) -> Any:
    if isinstance(value, int) and draw.random() < 0.5:
        return value + draw.choice((-1, 1, 2, 64))
    if isinstance(value, str) and value and draw.random() < 0.5:
        at = draw.randrange(len(value))
        return value[:at] + draw.choice("abz019.>_é") + value[at + draw.randint(0, 1) :]
    return draw.choice(odd)


def _mutate_dict(holder: dict[str, Any], draw: random.Random, odd: tuple[Any, ...]) -> None:
    if not holder:
        holder["new"] = draw.choice(odd)
        return
    key, sort = draw.choice(list(holder)), draw.randrange(5)
    if sort == 0:
        del holder[key]
    elif sort == 1:
        holder[draw.choice(["", "x", "__class__", f"{key}x", key.upper()])] = holder.pop(key)
    elif sort == 2:
        other = draw.choice(list(holder))
        holder[key], holder[other] = holder[other], holder[key]
    else:
        holder[key] = _changed(holder[key], draw, odd)


def _mutate_list(holder: list[Any], draw: random.Random, odd: tuple[Any, ...]) -> None:
    at, sort = draw.randrange(len(holder) + 1), draw.randrange(4)
    if sort == 0 or not holder:
        holder.insert(at, draw.choice(odd))
    elif sort == 1:
        del holder[at - 1]
    elif sort == 2:
        holder.insert(at, holder[at - 1])
    else:
        holder[at - 1] = _changed(holder[at - 1], draw, odd)


def header_structure(raw: bytes, other: bytes, draw: random.Random) -> bytes:
    """Change the header as parsed; the manifest in it is a string."""
    parts = Parts.of(raw)
    return file_of(text_of(mutate_json(parts.header, draw)), parts.data)


def duplicate_keys(raw: bytes, other: bytes, draw: random.Random) -> bytes:
    """Write a pair of the header, or of its metadata, twice, the second time perhaps with another value."""
    parts = Parts.of(raw)
    inside = draw.random() < 0.3
    holder: dict[str, Any] = parts.header["__metadata__"] if inside else parts.header
    key = draw.choice(list(holder))
    value = holder[key] if draw.random() < 0.5 else draw.choice(list(holder.values()))
    text = text_of(holder)
    twice = f"{text[:-1]},{text_of(key)}:{text_of(value)}}}"
    whole = text_of(parts.header).replace(text, twice, 1)
    return file_of(whole, parts.data)


def manifest_structure(raw: bytes, other: bytes, draw: random.Random) -> bytes:
    """Change the manifest as parsed, and leave its digest."""
    parts = Parts.of(raw)
    envelope = json.loads(parts.header["__metadata__"][MANIFEST_KEY])
    envelope["manifest"] = mutate_json(envelope["manifest"], draw)
    metadata = {**parts.header["__metadata__"], MANIFEST_KEY: text_of(envelope)}
    return file_of(text_of({**parts.header, "__metadata__": metadata}), parts.data)


# Legal files


def other_manifest(raw: bytes, other: bytes, draw: random.Random) -> bytes:
    """Change the manifest as parsed, with its digest, and mostly the header with it."""
    parts = Parts.of(raw)
    manifest = mutate_json(parts.manifest, draw)
    return resealed(parts, manifest) if draw.random() < 0.8 else sealed(parts, canonical_or_not(manifest))


def other_elements(raw: bytes, other: bytes, draw: random.Random) -> bytes:
    """Change elements of a tensor, with its digest: another checkpoint of the same form."""
    parts = Parts.of(raw)
    data, manifest = bytearray(parts.data), json.loads(json.dumps(parts.manifest))
    key = draw.choice(list(manifest["tensors"]))
    place = parts.stored(key)
    sort = draw.randrange(3)
    if sort == 0:
        data[place] = draw.randbytes(place.stop - place.start)
    elif sort == 1:
        data[place.start + draw.randrange(place.stop - place.start)] ^= 1 << draw.randrange(8)
    else:
        data[place] = Parts.of(other).data[place]
    manifest["tensors"][key]["digest"] = digest(bytes(data[place]))
    return sealed(Parts(parts.header, manifest, bytes(data)), canonical(manifest))


Mutation = Callable[[bytes, bytes, random.Random], bytes]

#: Ways to damage a file, with how many of a hundred are made in this way.
DAMAGING: Mapping[Mutation, int] = {
    set_bytes: 30,
    havoc: 20,
    splice: 12,
    append: 2,
    header_structure: 12,
    duplicate_keys: 6,
    manifest_structure: 12,
}

#: Ways to make a legal file of another content.
LEGAL: Mapping[Mutation, int] = {other_manifest: 4, other_elements: 2}

ALL: Mapping[Mutation, int] = {**DAMAGING, **LEGAL}


def mutant(seed: int, raw: bytes, other: bytes) -> tuple[Mutation, bytes]:
    """The mutant of a number, always the same one."""
    draw = random.Random(seed)
    (mutation,) = draw.choices(list(ALL), list(ALL.values()))
    return mutation, mutation(raw, other, draw)
