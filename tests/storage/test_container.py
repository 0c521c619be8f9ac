"""The container against the safetensors library, which is the oracle of what such a file means."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from orthoserde import storage, tensor_bytes
from orthoserde.errors import DamagedFileError, FileFormatError
from orthoserde.json_values import JSON
from orthoserde.manifest import Manifest
from orthoserde.storage import container
from tests.storage.strategies import (
    CONTAINER_DTYPES,
    DTYPE_NAMES,
    bits,
    checkpoint_of,
    random_tensor,
    tensor_names,
    tensors,
    texts,
)

named_tensors = st.dictionaries(tensor_names, tensors(CONTAINER_DTYPES), max_size=5)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("container") / "file.safetensors"


def raw_file(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def split(raw: bytes) -> tuple[bytes, bytes]:
    (length,) = struct.unpack("<Q", raw[:8])
    return raw[8 : 8 + length], raw[8 + length :]


def by_oracle(raw: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]] | None:
    """The tensors that safetensors finds in a file, None where it refuses the file."""
    try:
        found = safetensors.deserialize(raw)  # type: ignore[no-untyped-call]
    except safetensors.SafetensorError:
        return None
    return {name: (item["dtype"], tuple(item["shape"]), bytes(item["data"])) for name, item in found}


def by_us(raw: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]] | None:
    """The tensors that our parser finds, None where it refuses the file; any other exception is passed on."""
    length = int.from_bytes(raw[:8], "little")
    if len(raw) < 8 + length:
        return None
    text, data = raw[8 : 8 + length], raw[8 + length :]
    try:
        header = container.decode_header(text, len(data), "f")
    except FileFormatError:
        return None
    return {
        key: (container.CODES[entry.dtype], entry.shape, data[entry.start : entry.stop])
        for key, entry in header.entries.items()
    }


# What we write


@settings(deadline=None, max_examples=60)
@given(stored=named_tensors, metadata=texts, data=st.data())
def test_what_we_write_safetensors_reads_to_equal_bits(
    path: Path, stored: dict[str, Tensor], metadata: dict[str, str], data: st.DataObject
) -> None:
    aliases: dict[str, str] = {}
    if stored:
        aliases = data.draw(st.dictionaries(tensor_names, st.sampled_from(sorted(stored)), max_size=2))
        aliases = {key: kept for key, kept in aliases.items() if key not in stored}
    size = storage.write(checkpoint_of(stored, Manifest({}, aliases=aliases, metadata=metadata)), path)
    assert size == path.stat().st_size
    with safetensors.safe_open(path, framework="pt") as file:
        assert set(file.keys()) == set(stored)
        found = file.metadata()
        for key, tensor in stored.items():
            read = file.get_tensor(key)
            assert (read.dtype, read.shape, bits(read)) == (tensor.dtype, tensor.shape, bits(tensor))
    assert found.pop("format") == "pt"
    assert json.loads(found.pop("orthoserde"))["manifest"]["metadata"] == metadata
    assert found == {key: kept for key, kept in aliases.items() if key not in ("format", "orthoserde")}


@settings(deadline=None, max_examples=60)
@given(stored=named_tensors)
def test_the_data_begin_and_lie_aligned_and_without_gaps(path: Path, stored: dict[str, Tensor]) -> None:
    storage.write(checkpoint_of(stored), path)
    raw = path.read_bytes()
    text, data = split(raw)
    assert (8 + len(text)) % 64 == 0
    assert text.rstrip(b" ").endswith(b"}")
    assert len(text) - len(text.rstrip(b" ")) < 64
    entries = json.loads(text)
    assert next(iter(entries)) == "__metadata__"
    del entries["__metadata__"]
    position = 0
    for key, entry in entries.items():
        start, stop = entry["data_offsets"]
        assert start == position
        assert start % stored[key].element_size() == 0
        assert stop - start == stored[key].nbytes
        position = stop
    assert position == len(data)


def test_an_alias_with_a_reserved_name_stands_in_the_manifest_alone(path: Path) -> None:
    aliases = {"format": "a", "orthoserde": "a", "b": "a"}
    storage.write(checkpoint_of({"a": torch.ones(1)}, Manifest({}, aliases=aliases)), path)
    with safetensors.safe_open(path, framework="pt") as file:
        found = file.metadata()
    assert (set(found), found["format"], found["b"]) == ({"format", "orthoserde", "b"}, "pt", "a")
    with storage.read(path) as checkpoint:
        assert checkpoint.manifest.aliases == aliases
        assert bits(checkpoint.tensor("format")) == bits(checkpoint.tensor("orthoserde")) == bits(torch.ones(1))


@settings(deadline=None, max_examples=40)
@given(tensor=tensors([torch.complex128]))
def test_complex128_stands_as_pairs_of_float64(path: Path, tensor: Tensor) -> None:
    storage.write(checkpoint_of({"z": tensor}), path)
    found = safetensors.torch.load_file(path)["z"]
    assert (found.dtype, tuple(found.shape)) == (torch.float64, (*tensor.shape, 2))
    assert bits(found) == bits(tensor)
    with storage.read(path) as checkpoint:
        again = checkpoint.tensor("z")
    assert (again.dtype, again.shape, bits(again)) == (torch.complex128, tensor.shape, bits(tensor))


@pytest.mark.parametrize("name", [name for name in DTYPE_NAMES if name != "complex128"])
def test_a_dtype_has_the_name_that_safetensors_gives_it(name: str) -> None:
    raw = safetensors.torch.save({"t": random_tensor(getattr(torch, name), (2, 3))})
    assert json.loads(split(raw)[0])["t"]["dtype"] == container.CODES[name]


def test_the_bytes_stand_by_width_and_then_by_key() -> None:
    forms: dict[str, tuple[str, tuple[int, ...]]] = {
        "b": ("float32", (1,)),
        "a": ("float32", (1,)),
        "c": ("uint8", (3,)),
        "d": ("float64", (1,)),
        "e": ("complex64", (1,)),
        "B": ("float16", (1,)),
        "\U0001f600": ("bool", ()),
        "\ufb33": ("bool", ()),
        "zero": ("int64", (0,)),
    }
    order = ["d", "e", "zero", "a", "b", "B", "c", "\ufb33", "\U0001f600"]
    assert container.storage_order(forms) == order
    assert container.storage_order(dict(reversed(forms.items()))) == order


def test_a_header_of_more_than_100_mb_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    assert container.MAX_HEADER_BYTES == 100_000_000
    tensor: Mapping[str, tuple[str, tuple[int, ...]]] = {"t": ("uint8", (1,))}
    size = len(container.encode_header(tensor, {})) - 8
    monkeypatch.setattr(container, "MAX_HEADER_BYTES", size)
    container.encode_header(tensor, {})
    monkeypatch.setattr(container, "MAX_HEADER_BYTES", size - 1)
    with pytest.raises(FileFormatError, match=f"header of {size} bytes: readers accept .* and {size - 1} bytes"):
        container.encode_header(tensor, {})


def test_more_tensors_than_readers_take_are_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(container, "MAX_TENSORS", 3)
    entries: dict[str, tuple[str, tuple[int, ...]]] = {f"t{i}": ("uint8", (0,)) for i in range(3)}
    assert container.decode_header(container.encode_header(entries, {})[8:], 0, "file").entries.keys() == entries.keys()
    with pytest.raises(FileFormatError, match=r"^4 tensors .* readers accept 3 tensors"):
        container.encode_header({**entries, "more": ("uint8", (0,))}, {})


@pytest.mark.parametrize("key", ["data_offsets", "d\\u0061ta_offsets"])
def test_a_header_of_a_million_empty_tensors_is_refused_before_they_are_looked_at(
    monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    entry = f'{{"dtype":"U8","shape":[0],"{key}":[0,0]}}'
    text = ("{" + ",".join(f'"{i:x}":{entry}' for i in range(container.MAX_TENSORS + 2)) + "}").encode()
    looked_at: list[object] = []
    monkeypatch.setattr(container, "_decode_entry", lambda value, _: looked_at.append(value))
    with pytest.raises(FileFormatError, match="speaks of more than 131072 tensors"):
        container.decode_header(text, 0, "file")
    assert not looked_at


def test_a_header_without_tensors_is_a_whole_file() -> None:
    raw = container.encode_header({}, {"b": "1", "a": "2"})
    assert raw[8:].rstrip(b" ") == b'{"__metadata__":{"a":"2","b":"1"}}'
    assert by_oracle(raw) == by_us(raw) == {}


# What safetensors writes


@settings(deadline=None, max_examples=60)
@given(stored=named_tensors, metadata=st.none() | texts)
def test_what_safetensors_writes_we_read_to_equal_bits(
    path: Path, stored: dict[str, Tensor], metadata: dict[str, str] | None
) -> None:
    assume(metadata is None or "orthoserde" not in metadata)
    # safetensors 0.8.0 writes broken JSON for no tensors and no metadata.
    assume(stored or metadata != {})
    safetensors.torch.save_file({key: tensor.clone().contiguous() for key, tensor in stored.items()}, path, metadata)
    with storage.read(path) as checkpoint:
        manifest = checkpoint.manifest
        assert set(checkpoint.sources) == set(manifest.tensors) == set(stored)
        for key, tensor in stored.items():
            read = checkpoint.tensor(key)
            assert (read.dtype, read.shape, bits(read)) == (tensor.dtype, tensor.shape, bits(tensor))
            assert read.stride() == torch.empty(tensor.shape).stride()
            assert manifest.tensors[key].digest is None
    assert not manifest.has_configuration
    assert (manifest.parametrized, manifest.modules, manifest.left_out, manifest.writer) == ((), (), (), {})


def test_the_aliases_of_save_model_are_read(path: Path) -> None:
    model = torch.nn.ModuleDict({"one": torch.nn.Linear(2, 2), "other": torch.nn.Linear(2, 2)})
    model["other"].weight = model["one"].weight
    safetensors.torch.save_model(model, str(path))
    with storage.read(path) as checkpoint:
        assert checkpoint.manifest.aliases == {"other.weight": "one.weight"}
        assert set(checkpoint.manifest.tensors) == {"one.weight", "one.bias", "other.bias"}
        assert bits(checkpoint.tensor("other.weight")) == bits(checkpoint.tensor("one.weight"))


def test_metadata_that_only_looks_like_an_alias_is_none(path: Path) -> None:
    metadata = {"format": "a", "note": "nothing", "b": "a", "c": "a"}
    safetensors.torch.save_file({"a": torch.ones(1), "b": torch.ones(2)}, path, metadata)
    with storage.read(path) as checkpoint:
        assert checkpoint.manifest.aliases == {"c": "a"}


# Malformed headers


SEEDS: list[bytes] = [
    safetensors.torch.save({"a": random_tensor(torch.float32, (2, 1)), "b.c": random_tensor(torch.uint8, (3,))}),
    safetensors.torch.save(
        {"é": random_tensor(torch.float16, (0, 4)), "x": torch.tensor(True)}, {"k": "v", "l": '"\\'}
    ),
    safetensors.torch.save({}, {"format": "pt"}),
    container.encode_header({"w": ("float64", (1,)), "a": ("uint8", (2, 1))}, {"format": "pt"}) + bytes(10),
]


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A valid file, some bytes of which were flipped, put in or taken out; sometimes the length follows."""
    raw = bytearray(draw(st.sampled_from(SEEDS)))
    header_stop = 8 + int.from_bytes(raw[:8], "little")
    tail = len(raw) - header_stop
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(raw) - 1))
        what = draw(st.sampled_from(["flip", "replace", "insert", "delete"]))
        if what == "flip":
            raw[at] ^= 1 << draw(st.integers(0, 7))
        elif what == "replace":
            raw[at] = draw(st.integers(0, 255))
        elif what == "insert":
            raw[at:at] = draw(
                st.sampled_from([b" ", b"0", b"-", b"1", b",", b'"', b"[", b"}", b"\0", b"\xff", b"e", b"."])
            )
        else:
            del raw[at]
    if draw(st.booleans()) and len(raw) > 8 + tail:
        raw[:8] = struct.pack("<Q", len(raw) - 8 - tail)
    return bytes(raw)


TOKENS = re.compile(rb'-?\d+|"(?:[^"\\]|\\.)*"|[\[\]{}:,]')
SNIPPETS = [
    *[b"-0", b"0", b"00", b"1", b"-1", b"1.0", b"0.0", b"1e0", b"+1", b"0x1", b"2", b"3", b"4", b"8", b"null", b"true"],
    *[b"9223372036854775807", b"9223372036854775808", b"18446744073709551615", b"18446744073709551616", b"1" * 5000],
    *[b'"U8"', b'"u8"', b'"BOOL"', b'"F4"', b'"F8_E8M0"', b'"I64"', b'"C64"', b'"C128"', b'"\\ud800"', b'"\\u0061"'],
    *[b'"dtype"', b'"shape"', b'"data_offsets"', b'"__metadata__"', b'"a"', b'""', b"[]", b"{}", b"[0]", b"[1,1]"],
    *[
        b"NaN",
        b"Infinity",
        b"/**/",
        b"\t\r\n",
        b"\x0b",
        b"\xef\xbb\xbf",
        b'"\x00"',
        b"[" * 200,
        b"4611686018427387904,4",
    ],
    *[b'"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},', b'"a":{"dtype":"U8","shape":[0],"data_offsets":[8,8]},'],
]


@st.composite
def rewritten(draw: st.DrawFn) -> bytes:
    """A valid file, some tokens of whose header are others; the length follows."""
    text, data = split(draw(st.sampled_from(SEEDS)))
    for _ in range(draw(st.integers(1, 2))):
        token = draw(st.sampled_from(list(TOKENS.finditer(text))))
        stop = draw(st.sampled_from([token.start(), token.end()]))
        text = text[: token.start()] + draw(st.sampled_from(SNIPPETS)) + text[stop:]
        if not TOKENS.search(text):
            break
    return raw_file(text, data)


@settings(deadline=None, max_examples=600)
@given(raw=mutated() | rewritten())
def test_a_file_that_safetensors_refuses_we_refuse_and_what_we_accept_means_the_same(path: Path, raw: bytes) -> None:
    ours, theirs = by_us(raw), by_oracle(raw)
    assert ours is None or ours == theirs
    path.write_bytes(raw)
    try:
        with storage.read(path) as checkpoint:
            read = {key: b"".join(source.blocks()) for key, source in checkpoint.sources.items()}
    except FileFormatError:
        return
    assert theirs is not None
    assert read == {key: data for key, (_, _, data) in theirs.items()}


@pytest.mark.parametrize("seed", SEEDS)
def test_the_files_that_are_mutated_above_are_valid(seed: bytes) -> None:
    assert by_us(seed) == by_oracle(seed)
    assert by_oracle(seed) is not None


def entry(dtype: object = "U8", shape: object = (1,), offsets: object = (0, 1), **fields: object) -> str:
    return json.dumps({"dtype": dtype, "shape": shape, "data_offsets": offsets, **fields})


MALFORMED: dict[str, tuple[str, bytes]] = {
    "no header": ("", b""),
    "not an object": ("[]", b""),
    "a space in front": (" {}", b""),
    "a byte order mark": ("\ufeff{}", b""),
    "cut off": ('{"a":', b""),
    "something behind": ("{}{}", b""),
    "a zero behind": ("{}\0", b""),
    "data without tensors": ("{}", b"x"),
    "metadata that is a list": ('{"__metadata__":[]}', b""),
    "metadata with a number": ('{"__metadata__":{"a":1}}', b""),
    "metadata with an object": ('{"__metadata__":{"a":{}}}', b""),
    "metadata of null": ('{"__metadata__":null}', b""),
    "a tensor that is null": ('{"a":null}', b""),
    "a tensor that is a list": ('{"a":["U8",[1],[0,1]]}', b"x"),
    "a missing field": ('{"a":{"dtype":"U8","shape":[1]}}', b"x"),
    "an unknown field": (f'{{"a":{entry(surprise=1)}}}', b"x"),
    "an unknown dtype": (f'{{"a":{entry("F128", [1], [0, 16])}}}', bytes(16)),
    "a dtype of half a byte": (f'{{"a":{entry("F4", [2], [0, 1])}}}', b"x"),
    "a dtype that is no string": (f'{{"a":{entry(1)}}}', b"x"),
    "a dtype that is a list": (f'{{"a":{entry(["U8"])}}}', b"x"),
    "a shape that is no list": (f'{{"a":{entry(shape=1)}}}', b"x"),
    "a negative size": (f'{{"a":{entry(shape=[-1])}}}', b"x"),
    "two negative sizes": (f'{{"a":{entry(shape=[-1, -1])}}}', b"x"),
    "a size of 1.0": (f'{{"a":{entry(shape=[1.0])}}}', b"x"),
    "a size that is true": (f'{{"a":{entry(shape=[True])}}}', b"x"),
    "a size of -0": ('{"a":{"dtype":"U8","shape":[-0],"data_offsets":[0,0]}}', b""),
    "an offset of -0": ('{"a":{"dtype":"U8","shape":[1],"data_offsets":[-0,1]}}', b"x"),
    "a size of 2**63": (f'{{"a":{entry(shape=[2**63, 0], offsets=[0, 0])}}}', b""),
    "a size of 5000 digits": ('{"a":{"dtype":"U8","shape":[' + "1" * 5000 + '],"data_offsets":[0,1]}}', b"x"),
    "more elements than 63 bits count": (f'{{"a":{entry(shape=[2**32, 2**31])}}}', b"x"),
    "elements that wrap around to one": (f'{{"a":{entry(shape=[2**62, 4, 1])}}}', b"x"),
    "elements whose number has 5000 digits": (f'{{"a":{entry(shape=[2**62] * 300)}}}', b"x"),
    "as many sizes, one of them zero": (f'{{"a":{entry(shape=[2**62] * 300 + [0], offsets=[0, 0])}}}', b""),
    "one offset": (f'{{"a":{entry(offsets=[1])}}}', b"x"),
    "three offsets": (f'{{"a":{entry(offsets=[0, 1, 1])}}}', b"x"),
    "offsets in reverse": (f'{{"a":{entry(offsets=[1, 0])}}}', b"x"),
    "too short a span": (f'{{"a":{entry(shape=[2])}}}', b"x"),
    "too long a span": (f'{{"a":{entry(offsets=[0, 2])}}}', b"xy"),
    "a gap in front": (f'{{"a":{entry(offsets=[1, 2])}}}', b"xy"),
    "a gap between": (f'{{"a":{entry()},"b":{entry(offsets=[2, 3])}}}', b"xyz"),
    "shared bytes": (f'{{"a":{entry()},"b":{entry()}}}', b"x"),
    "overlapping bytes": (f'{{"a":{entry(shape=[2], offsets=[0, 2])},"b":{entry(offsets=[1, 2])}}}', b"xy"),
    "bytes beyond the end": (f'{{"a":{entry(offsets=[0, 2], shape=[2])}}}', b"x"),
    "bytes left over": (f'{{"a":{entry()}}}', b"xy"),
    "an empty tensor beyond the end": (f'{{"a":{entry()},"b":{entry(shape=[0], offsets=[2, 2])}}}', b"x"),
    "a key twice": (f'{{"a":{entry()},"a":{entry()}}}', b"x"),
    "a key twice, once escaped": (f'{{"a":{entry()},"\\u0061":{entry(offsets=[1, 2])}}}', b"xy"),
    "a field twice": ('{"a":{"dtype":"U8","dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"x"),
    "a lone surrogate": (f'{{"\\ud800":{entry()}}}', b"x"),
    "depth": ("{" + '"a":{' * 100_000, b""),
}


@pytest.mark.parametrize("what", MALFORMED)
def test_a_malformed_header_is_refused(path: Path, what: str) -> None:
    text, data = MALFORMED[what]
    path.write_bytes(raw_file(text.encode(), data))
    with pytest.raises(FileFormatError) as caught:
        storage.read(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < len(str(path)) + 300


#: Where our reading is stricter on purpose: each may mean two things, or something that we do not know.
STRICTER = {
    *[
        "a space in front",
        "metadata of null",
        "a tensor that is a list",
        "an unknown field",
        "a dtype of half a byte",
        "a key twice",
    ],
    *["a key twice, once escaped", "as many sizes, one of them zero", "a size of 2**63"],
}


@pytest.mark.parametrize("what", MALFORMED)
def test_safetensors_refuses_the_same_headers_but_those_listed(what: str) -> None:
    text, data = MALFORMED[what]
    if what not in STRICTER:
        assert by_oracle(raw_file(text.encode(), data)) is None


def test_a_hostile_shape_costs_no_time(path: Path) -> None:
    # Multiplied out, this shape would have two million digits, and take minutes.
    path.write_bytes(raw_file(f'{{"a":{entry(shape=[2**62] * 100_000)}}}'.encode(), b"x"))
    with pytest.raises(FileFormatError, match="the shape is too large"):
        storage.read(path)


# The canonical header of our own files


OURS = {"w": random_tensor(torch.float32, (2, 2)).T, "n": torch.tensor(3)}


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_no_other_header_passes_for_that_of_a_file_of_ours(path: Path, data: st.DataObject) -> None:
    storage.write(checkpoint_of(OURS, Manifest({}, aliases={"m": "n"}, metadata={"a": "b"})), path)
    raw = path.read_bytes()
    text, tail = split(raw)
    at = data.draw(st.integers(0, len(text)))
    kind = data.draw(st.sampled_from(["insert", "delete", "replace"]))
    put = (
        b"" if kind == "delete" else data.draw(st.sampled_from([b" ", b"\n", b"0", b"1", b"a", b",", b'"', b"\\u0061"]))
    )
    other = text[:at] + put + text[at if kind == "insert" else at + 1 :]
    assume(other != text)
    path.write_bytes(raw_file(other, tail))
    with pytest.raises(FileFormatError):
        storage.read(path)


def _rewrite(text: str, change: str) -> str:
    header: dict[str, JSON] = json.loads(text)
    if change == "other spaces":
        return json.dumps(header, ensure_ascii=False)
    if change == "escapes":
        return json.dumps({**header, "__metadata__": header["__metadata__"]}, separators=(",", ":")).replace(
            "pt", "p\\u0074"
        )
    if change == "other order of tensors":
        header["n"] = header.pop("n")
    if change == "other order of metadata":
        metadata = header["__metadata__"]
        assert isinstance(metadata, dict)
        header["__metadata__"] = dict(reversed(metadata.items()))
    if change == "metadata at the end":
        header["__metadata__"] = header.pop("__metadata__")
    if change == "more metadata":
        header["__metadata__"] = {**header["__metadata__"], "x": "y"}  # type: ignore[dict-item]
    if change == "no alias":
        metadata = header["__metadata__"]
        assert isinstance(metadata, dict)
        del metadata["m"]
    if change == "another tensor":
        header["zero"] = {"dtype": "U8", "shape": [0], "data_offsets": [24, 24]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":"))
    return text + " " * (-(8 + len(text.encode())) % 64)


CHANGES = ["other spaces", "escapes", "other order of tensors", "other order of metadata", "metadata at the end"]
CHANGES += ["more metadata", "no alias", "another tensor", "no padding", "more padding"]


@pytest.mark.parametrize("change", CHANGES)
def test_a_header_of_ours_that_was_written_again_by_another_tool_is_refused(path: Path, change: str) -> None:
    storage.write(checkpoint_of(OURS, Manifest({}, aliases={"m": "n"}, metadata={"a": "bcdefg"})), path)
    text, tail = split(path.read_bytes())
    if change.endswith("padding"):
        assert change == "more padding" or text != text.rstrip(b" ")
        other = text.rstrip(b" ") if change == "no padding" else text + b" " * 64
    else:
        assert _rewrite(text.decode(), "nothing").encode() == text
        other = _rewrite(text.decode(), change).encode()
    path.write_bytes(raw_file(other, tail))
    assert by_oracle(path.read_bytes()) is not None
    with pytest.raises(DamagedFileError, match="the header does not match the manifest"):
        storage.read(path)


def test_a_tensor_exchanged_for_one_of_equal_form_is_found_by_its_digest(path: Path) -> None:
    storage.write(checkpoint_of({"a": torch.zeros(2), "b": torch.ones(2)}), path)
    text, tail = split(path.read_bytes())
    path.write_bytes(raw_file(text, tail[8:] + tail[:8]))
    with storage.read(path) as checkpoint:
        records = checkpoint.manifest.tensors
        assert bits(checkpoint.tensor("a")) == bits(torch.ones(2))
        found = tensor_bytes.digest_of(checkpoint.sources["a"].blocks())
        assert found == records["b"].digest != records["a"].digest


@pytest.mark.parametrize(
    ("value", "error"),
    [
        *[("", FileFormatError), ("{}", FileFormatError), ("null", FileFormatError), ("pt", FileFormatError)],
        ('{"digest":"' + "0" * 32 + '","manifest":{}}', DamagedFileError),
        ('{"digest":"' + "0" * 31 + '","manifest":{}}', FileFormatError),
        ('{"manifest":{},"digest":"' + "0" * 32 + '"}', FileFormatError),
        ('{"digest":"' + "0" * 32 + '","manifest":{}}\n', FileFormatError),
    ],
)
def test_metadata_under_our_key_that_holds_no_manifest_is_refused(
    path: Path, value: str, error: type[FileFormatError]
) -> None:
    safetensors.torch.save_file({"a": torch.ones(1)}, path, {"orthoserde": value})
    with pytest.raises(error) as caught:
        storage.read(path)
    assert type(caught.value) is error


def test_a_manifest_under_a_damaged_key_does_not_make_the_file_another_librarys(path: Path) -> None:
    storage.write(checkpoint_of(OURS), path)
    path.write_bytes(path.read_bytes().replace(b'"orthoserde":', b'"orthoserdf":'))
    assert by_oracle(path.read_bytes()) is not None
    with pytest.raises(DamagedFileError, match="another key than 'orthoserde'"):
        storage.read(path)
