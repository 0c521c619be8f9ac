"""A collection of files that nobody should trust, made when the tests run, with what is to come of each.

Here are the safetensors files of other writers, and what is no safetensors file at all; `hostile_manifests`,
`hostile_pickles` and `hostile_paths` have the others.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orthoserde.errors import DamagedFileError, FileFormatError, IncompatibleModelError, OrthoserdeError

#: Writes what is hostile into an empty folder, and returns what path is to be opened.
Write = Callable[[Path], "Path | str"]


@dataclass(frozen=True)
class Outcome:
    """What is to come of one call.

    Attributes:
        error: What it raises, exactly; None where it returns.
        words: What stands in the message, or in ``str`` of what is returned.
    """

    error: type[OrthoserdeError] | None
    words: str


@dataclass(frozen=True)
class Hostile:
    """One file, or folder, or path.

    Attributes:
        write: Makes it.
        load: What comes of loading it into the model that it is for.
        inspect: What comes of inspecting it.
        verify: What comes of verifying it.
        build: What comes of building from it.
        plain: Whether it is loaded into a plain layer instead of the specimen.
        heavy: Whether it is large, or wants to be: it is tried in a process of its own, whose memory is measured.
    """

    write: Write
    load: Outcome
    inspect: Outcome
    verify: Outcome
    build: Outcome
    plain: bool = False
    heavy: bool = False


UNREADABLE = "no safetensors header"


def refused(write: Write, words: str, error: type[OrthoserdeError] = FileFormatError, **more: Any) -> Hostile:
    """What cannot be opened, whoever opens it."""
    outcome = Outcome(error, words)
    return Hostile(write, outcome, outcome, outcome, outcome, **more)


def readable(
    write: Write,
    words: str,
    error: type[OrthoserdeError] | None = IncompatibleModelError,
    *,
    inspect: str = "",
    verify: str = "",
    build: str = "does not say how its model was made",
    **more: Any,
) -> Hostile:
    """What can be opened, and is refused, or not, by whoever wants something of it."""
    from orthoserde.errors import ConfigError  # noqa: PLC0415

    return Hostile(
        write,
        Outcome(error, words),
        Outcome(None, inspect),
        Outcome(None, verify),
        Outcome(ConfigError, build),
        **more,
    )


def content(data: bytes) -> Write:
    """A file that holds this."""

    def write(folder: Path) -> Path:
        path = folder / "model.safetensors"
        path.write_bytes(data)
        return path

    return write


def container(header: object, data: bytes = b"", length: int | None = None) -> Write:
    """A safetensors file with this header, as text, bytes or JSON."""
    if not isinstance(header, (str, bytes)):
        header = json.dumps(header, separators=(",", ":"), ensure_ascii=False)
    text = header.encode("utf-8", "surrogatepass") if isinstance(header, str) else header
    return content(struct.pack("<Q", len(text) if length is None else length) + text + data)


def tensor(**changes: Any) -> dict[str, Any]:
    """What a header says of a tensor of four bytes."""
    return {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], **changes}


def one(name: str = "weight", **changes: Any) -> Write:
    """A file with one tensor of four bytes."""
    return container({name: tensor(**changes)}, bytes(4))


#: What is no safetensors file.
OTHER_SORTS: dict[str, Hostile] = {
    "empty": refused(content(b""), UNREADABLE),
    "one byte": refused(content(b"\x01"), UNREADABLE),
    "seven bytes": refused(content(bytes(7)), UNREADABLE),
    "eight zeros": refused(content(bytes(8)), "does not begin with '{'"),
    "a length of 1": refused(content(struct.pack("<Q", 1) + b"{"), "not valid JSON"),
    "a length beyond the file": refused(container("{}", length=3), UNREADABLE),
    "a length of 100 MB on a short file": refused(container("{}", length=100_000_000), UNREADABLE),
    "a length above 100 MB": refused(container("{}", length=100_000_001), UNREADABLE),
    "a length of 2**63": refused(container("{}", length=2**63), UNREADABLE),
    "a length of 2**64 - 1": refused(container("{}", length=2**64 - 1), UNREADABLE),
    "a length of 2**64 - 8": refused(container("{}", length=2**64 - 8), UNREADABLE),
    "a pointer of Git LFS": refused(
        content(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n"), UNREADABLE
    ),
    "a page of HTML": refused(content(b"<!doctype html><title>404</title>" * 9), UNREADABLE),
    "gzip": refused(content(gzip.compress(bytes(99))), UNREADABLE),
    "an ELF program": refused(content(b"\x7fELF\x02\x01\x01" + bytes(99)), UNREADABLE),
    "GGUF": refused(content(b"GGUF\x03\0\0\0" + bytes(99)), UNREADABLE),
    "HDF5": refused(content(b"\x89HDF\r\n\x1a\n" + bytes(99)), UNREADABLE),
    "a script": refused(content(b"#!/bin/sh\nrm -rf /tmp/x\n" * 9), UNREADABLE),
}

DEEP = 200_000

#: Headers that are not strict JSON.
TEXTS: dict[str, Hostile] = {
    "no JSON": refused(container("{nonsense}"), "not valid JSON"),
    "a comma at the end": refused(container('{"a":{},}'), "not valid JSON"),
    "a NUL at the end": refused(container("{}\0"), "not valid JSON"),
    "a byte order mark": refused(container(b"\xef\xbb\xbf{}"), "does not begin with '{'"),
    "a space at the beginning": refused(container(" {}"), "does not begin with '{'"),
    "a list": refused(container("[]"), "does not begin with '{'"),
    "null": refused(container("null"), "does not begin with '{'"),
    "a string": refused(container('"weight"'), "does not begin with '{'"),
    "not UTF-8": refused(container(b'{"\xff":{}}'), "not valid JSON"),
    "UTF-16": refused(container('{"a":{}}'.encode("utf-16-le")), "not valid JSON"),
    "an overlong form of UTF-8": refused(container(b'{"\xc0\x80":{}}'), "not valid JSON"),
    "a surrogate in UTF-8": refused(container(b'{"\xed\xa0\x80":{}}'), "not valid JSON"),
    "an escaped lone surrogate": refused(container('{"\\ud800":{}}'), "lone surrogate"),
    "a control character": refused(container('{"\x01":{}}'), "not valid JSON"),
    "a comment": refused(container("{/**/}"), "not valid JSON"),
    "NaN": refused(container('{"a":NaN}'), "NaN is not JSON"),
    "Infinity": refused(container('{"a":-Infinity}'), "Infinity is not JSON"),
    "a number that is too large": refused(container('{"a":1e999}'), "too large"),
    "an integer of 5,000 digits": refused(container('{"a":' + "9" * 5000 + "}"), "more than 64 bits"),
    "an integer of 65 bits": refused(container('{"a":18446744073709551616}'), "more than 64 bits"),
    "lists within each other": refused(container('{"a":' + "[" * DEEP), "not valid JSON"),
    "objects within each other": refused(container('{"a":' * DEEP), "not valid JSON"),
    "lists deeper than ours": refused(container('{"a":' + "[" * 90 + "]" * 90 + "}"), "nested deeper"),
    "a key twice": refused(container('{"a":1,"a":1}'), "stands twice"),
    "a key twice, once escaped": refused(container('{"a":1,"\\u0061":1}'), "stands twice"),
    "a tensor twice, of another dtype": refused(
        container(f'{{"weight":{json.dumps(tensor())},"weight":{json.dumps(tensor(dtype="I32"))}}}', bytes(4)),
        "stands twice",
    ),
    "metadata twice": refused(container('{"__metadata__":{},"__metadata__":{}}'), "stands twice"),
    "a key of the metadata twice": refused(container('{"__metadata__":{"a":"1","a":"2"}}'), "stands twice"),
}

#: Headers that are JSON, and no headers.
HEADERS: dict[str, Hostile] = {
    "metadata that are a list": refused(container({"__metadata__": []}), "__metadata__ must hold strings"),
    "metadata that are null": refused(container({"__metadata__": None}), "__metadata__ must hold strings"),
    "metadata with a number": refused(container({"__metadata__": {"a": 1}}), "__metadata__ must hold strings"),
    "metadata with an object": refused(container({"__metadata__": {"a": {}}}), "__metadata__ must hold strings"),
    "a tensor that is a number": refused(container({"a": 1}), "expected dtype, shape and data_offsets"),
    "a tensor without a shape": refused(container({"a": {"dtype": "F32", "data_offsets": [0, 4]}}), "expected dtype"),
    "a tensor with more than that": refused(one(requires_grad=True), "expected dtype, shape and data_offsets"),
    "an unknown dtype": refused(one(dtype="X32"), "unknown dtype 'X32'"),
    "a dtype that is a path": refused(one(dtype="os.system"), "unknown dtype"),
    "a dtype that is a list": refused(one(dtype=["F32"]), "unknown dtype"),
    "a dtype of half a byte": refused(one(dtype="F4"), "unknown dtype"),
    "a dtype of a megabyte": refused(one(dtype="F" * 2**20), "unknown dtype"),
    "a negative size": refused(one(shape=[-1]), "lists of integers"),
    "a size that is no integer": refused(one(shape=[1.0]), "lists of integers"),
    "a size that is true": refused(one(shape=[True]), "lists of integers"),
    "a shape that is an object": refused(one(shape={}), "lists of integers"),
    "a shape of more elements than 63 bits count": refused(one(shape=[2**62, 4]), "too large"),
    "no elements of more than 63 bits": refused(one(shape=[0, 2**62, 4], data_offsets=[0, 0]), "too large"),
    "2**40 elements in four bytes": refused(one(shape=[2**40]), "do not span"),
    "offsets of one number": refused(one(data_offsets=[0]), "do not span"),
    "offsets in reverse": refused(one(data_offsets=[4, 0]), "do not span"),
    "offsets that do not begin at 0": refused(one(data_offsets=[4, 8]), "begins at byte 4, expected 0"),
    "offsets of 2**62": refused(one(data_offsets=[2**62, 2**62 + 4]), "begins at byte"),
    "two tensors in the same bytes": refused(
        container({"a": tensor(), "b": tensor()}, bytes(4)), "begins at byte 0, expected 4"
    ),
    "a hole between tensors": refused(
        container({"a": tensor(), "b": tensor(data_offsets=[5, 9])}, bytes(9)), "expected 4"
    ),
    "a byte too few": refused(container({"weight": tensor()}, bytes(3)), "truncated or damaged", DamagedFileError),
    "a byte too many": refused(container({"weight": tensor()}, bytes(5)), "truncated or damaged", DamagedFileError),
    "an archive behind it": refused(
        container({"weight": tensor()}, bytes(4) + b"PK\5\6" + bytes(18)), "truncated or damaged", DamagedFileError
    ),
    "data without tensors": refused(container({}, bytes(9)), "truncated or damaged", DamagedFileError),
}

ONE_TENSOR = "1 tensors, 4 bytes"


def _named(name: str, shown: str) -> Hostile:
    return readable(one(name), shown, inspect=ONE_TENSOR, plain=True)


#: Files of other writers that are sound, with names that mean something elsewhere. A name is only ever compared.
NAMES: dict[str, Hostile] = {
    "a name that leads out of a folder": _named("../../etc/passwd", "in the file, not in the model"),
    "an absolute name": _named("/etc/passwd", "in the file, not in the model"),
    "no name": _named("", "in the file, not in the model"),
    "a name with a NUL": _named("weight\0", r"weight\x00"),
    "a name that a terminal obeys": _named("\x1b]0;owned\x07\x1b[2J", r"\x1b]0;owned\x07\x1b[2J"),
    "a name of several lines": _named("a\nok, all tensors loaded", r"a\nok"),
    "a name that is written backwards": _named("\u202eabc", r"\u202eabc"),
    "a name of a megabyte": _named("n" * 2**20, "n" * 64),
    "__class__": _named("__class__", "__class__"),
    "__dict__": _named("__dict__", "__dict__"),
    "a name that is an attribute": _named("training", "training"),
    "a name that is a method": _named("requires_grad_", "requires_grad_"),
    "a name of dots": _named("...", "in the file"),
    "a name that looks like a base": _named("parametrizations.weight.0.base", "in the file"),
    "a tensor called __metadata__": refused(container({"__metadata__": tensor()}), "__metadata__ must hold strings"),
    "an alias of itself": readable(
        container({"weight": tensor(), "__metadata__": {"weight": "weight"}}, bytes(4)), "shape [1]", plain=True
    ),
    "NaN and infinity": readable(
        container({"weight": tensor(shape=[1, 1])}, b"\0\0\xc0\x7f"), "bias", inspect=ONE_TENSOR, plain=True
    ),
    "no elements, 2**62 columns": readable(
        one(shape=[0, 2**62], data_offsets=[0, 0]), "truncated or damaged", DamagedFileError, plain=True
    ),
    "100,000 dimensions": readable(one(shape=[1] * 100_000), "in the model", inspect=ONE_TENSOR, plain=True),
}
NAMES["no elements, 2**62 columns"] = readable(
    container({"weight": tensor(shape=[0, 2**62], data_offsets=[0, 0])}), "in the model", plain=True
)


def _million(folder: Path) -> Path:
    """A header of 58 MB; every one of its tensors is empty."""
    text = ",".join(f'"{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for i in range(10**6))
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(text) + 2) + b"{" + text.encode() + b"}")
    return path


def _filled(start: str, item: str, stop: str, size: int = 99_000_000) -> Write:
    """A header that consists of one thing again and again."""

    def write(folder: Path) -> Path:
        count = (size - len(start) - len(stop)) // len(item.encode())
        text = (start + item * count + stop).encode()
        path = folder / "model.safetensors"
        path.write_bytes(struct.pack("<Q", len(text)) + text)
        return path

    return write


MANY = "holds more than"

#: Headers that want more time or memory than they are worth.
LARGE: dict[str, Hostile] = {
    "a million empty tensors": refused(_million, "more than 131072 tensors", heavy=True),
    "33 million lists": refused(_filled('{"a":[', "[],", "0]}"), MANY, heavy=True),
    "ten million objects": refused(_filled('{"a":[', "{},", "0]}", 30_000_000), MANY, heavy=True),
    "15 million numbers": refused(_filled('{"a":[', "7,", "0]}", 30_000_000), MANY, heavy=True),
    "five million keys": refused(_filled('{"a":{', '"":0,', '"":0}}', 25_000_000), MANY, heavy=True),
    "99 MB of brackets": refused(_filled('{"a":', "[", ""), MANY, heavy=True),
    "a name of 99 MB": refused(_filled('{"', "n", '":0}'), "header: 'nnnn", heavy=True),
    "two million objects": refused(
        _filled('{"a":[', "{},", "0]}", 3 * 2_090_000), "expected dtype, shape and data_offsets", heavy=True
    ),
    "metadata of 99 MB": readable(
        _filled('{"__metadata__":{"a":"', "é", '"}}'), "in the model", inspect="0 tensors", plain=True, heavy=True
    ),
    "a text of 99 MB that is no manifest": refused(
        _filled('{"__metadata__":{"orthoserde":"', "{", '"}}'), "expected a manifest and its digest", heavy=True
    ),
    "99 MB of escapes": refused(_filled('{"', r"\ud800", '":0}'), "lone surrogate", heavy=True),
}

FILES: dict[str, Hostile] = {**OTHER_SORTS, **TEXTS, **HEADERS, **NAMES, **LARGE}


def renamed(collection: dict[str, Hostile], prefix: str) -> dict[str, Hostile]:
    """The same under other names, so that several collections can be one."""
    return {f"{prefix}: {name}": dataclasses.replace(hostile) for name, hostile in collection.items()}
