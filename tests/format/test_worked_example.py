"""The worked example of docs/reference/file-format.md is the bytes that this package writes.

`python -m tests.format.test_worked_example` writes it into the page.
"""

from __future__ import annotations

import json
import re
import struct
import tempfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import xxhash
from safetensors.torch import load_file

import orthoserde
from orthoserde import storage
from orthoserde.checkpoint import Checkpoint, LiveTensor
from orthoserde.manifest import Manifest, TensorRecord
from tests.format.second_reader import canonical, header_of, read

PAGE = Path(__file__).parent.parent.parent / "docs" / "reference" / "file-format.md"

BEGIN = "<!-- worked example: python -m tests.format.test_worked_example -->\n"
END = "<!-- end of worked example -->\n"

#: Tensors of the example, in storage order: the wider elements first.
VALUES = {"steps": torch.tensor(258), "scale": torch.tensor([1.0, -2.5])}

#: Bytes in a row.
ROW = 16


def write_example(path: Path) -> None:
    """Write a file of two tensors, without the versions that a save would record: its bytes must stay what they are."""
    records = {
        "steps": TensorRecord("int64", (), (), parameter=False),
        "scale": TensorRecord("float32", (2,), (1,), parameter=True, requires_grad=True),
    }
    manifest = Manifest(tensors=records, metadata={"run": "é"})
    storage.write(Checkpoint(manifest, {key: LiveTensor(tensor) for key, tensor in VALUES.items()}, "example"), path)


def parts_of(content: bytes) -> list[tuple[int, str]]:
    """Where each part of the example begins, and what it is."""
    manifest, _, _ = read(content)
    header, _ = header_of(manifest)
    begin = 8 + int.from_bytes(content[:8], "little")
    text = header["__metadata__"]["orthoserde"][56:-1]
    escaped = json.dumps(text, ensure_ascii=False)[1:-1].encode()
    digest, body = content.index(rb"digest\":\"") + len(rb"digest\":\""), content.index(escaped)
    parts = [
        (0, f"the length N = {begin - 8}, little-endian"),
        (8, "the header: format, and the envelope, in which quotes are escaped"),
        (digest, "D, the digest of M"),
        (digest + 32, "the envelope goes on"),
        (body, f"M, the manifest: {len(text.encode())} bytes, {len(escaped)} with the escapes of this string"),
        (body + len(escaped), "the end of the envelope and of the metadata"),
    ]
    keys = sorted(manifest["tensors"], key=lambda key: int(header[key]["data_offsets"][0]))
    for key in keys:
        parts.append((content.index(b',"%s":{' % key.encode(), body + len(escaped)), f"the entry of {key}"))
    end = content.rindex(b"}}", 0, begin) + 1
    parts += [
        (end, "the end of the header"),
        (end + 1, f"{begin - end - 1} spaces, for 8 + N = {begin} = 64 * {begin // 64}"),
    ]
    for key in keys:
        tensor = manifest["tensors"][key]
        what = f"{key}, {tensor['dtype']} of shape {tensor['shape']}: {VALUES[key].tolist()}"
        parts.append((begin + header[key]["data_offsets"][0], what))
    return parts


def rows(content: bytes, start: int, stop: int) -> Iterator[str]:
    """Offset, bytes and characters of a part."""
    for i in range(start, stop, ROW):
        row = content[i : min(i + ROW, stop)]
        shown = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in row)
        yield f"{i:04x}  {row.hex(' '):<{3 * ROW - 1}}  |{shown}|"


def example(content: bytes) -> str:
    """What the page shows."""
    parts = parts_of(content)
    lines = []
    for (start, what), (stop, _) in zip(parts, [*parts[1:], (len(content), "")], strict=True):
        lines += [f"# {what}", *rows(content, start, stop), ""]
    manifest = canonical(read(content)[0])
    unescaped = ["Without the escapes of the string in which it stands, M is", "", "```json", manifest, "```", ""]
    return "\n".join(["```text", *lines[:-1], "```", "", *unescaped])


def shown_on_the_page() -> str:
    return PAGE.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0].strip() + "\n"


@pytest.fixture
def content(tmp_path: Path) -> bytes:
    write_example(tmp_path / "example.safetensors")
    return (tmp_path / "example.safetensors").read_bytes()


def test_the_page_shows_the_bytes_that_are_written(content: bytes) -> None:
    assert shown_on_the_page() == example(content)


def test_the_bytes_on_the_page_are_a_file_that_every_reader_reads(content: bytes, tmp_path: Path) -> None:
    shown = re.findall(r"^([0-9a-f]{4})  ((?:[0-9a-f]{2} )*[0-9a-f]{2}) +\|", shown_on_the_page(), re.MULTILINE)
    joined = b""
    for offset, row in shown:
        assert int(offset, 16) == len(joined)
        joined += bytes.fromhex(row)
    assert joined == content
    path = tmp_path / "page.safetensors"
    path.write_bytes(joined)
    manifest, arrays, _ = read(joined)
    assert orthoserde.verify(path).ok
    assert orthoserde.inspect(path).metadata == manifest["metadata"] == {"run": "é"}
    plain = load_file(path)
    assert {key: tensor.tolist() for key, tensor in VALUES.items()} == {key: plain[key].tolist() for key in plain}
    assert {key: tensor.tolist() for key, tensor in VALUES.items()} == {key: arrays[key].tolist() for key in arrays}


def test_each_part_of_the_example_is_what_the_page_says(content: bytes) -> None:
    starts = [start for start, _ in parts_of(content)] + [len(content)]
    pieces = [content[start:stop] for start, stop in pairwise(starts)]
    length, opening, digest, between, manifest, closing, steps, scale, end, spaces, first, last = pieces
    header = opening + digest + between + manifest + closing + steps + scale + end
    assert struct.unpack("<Q", length) == (len(header + spaces),)
    text = json.loads(b'"' + manifest + b'"')
    assert digest.decode() == xxhash.xxh3_128_hexdigest(text.encode())
    assert json.loads(header)["__metadata__"]["orthoserde"] == f'{{"digest":"{digest.decode()}","manifest":{text}}}'
    assert set(spaces) == {0x20}
    assert len(length + header + spaces) % 64 == 0
    assert len(spaces) < 64
    tensors = json.loads(text)["tensors"]
    assert tensors["steps"]["digest"] == xxhash.xxh3_128_hexdigest(first)
    assert tensors["scale"]["digest"] == xxhash.xxh3_128_hexdigest(last)
    assert struct.unpack("<q", first) == (258,)
    assert struct.unpack("<2f", last) == (1.0, -2.5)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        write_example(Path(folder) / "example.safetensors")
        block = example((Path(folder) / "example.safetensors").read_bytes())
    head, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    PAGE.write_text(f"{head}{BEGIN}\n{block}\n{END}{rest.split(END)[1]}", encoding="utf-8")
