"""Paths at which no regular file stands, and indices that point elsewhere."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orthoserde.errors import CheckpointNotFoundError, DamagedFileError, FileAccessError
from tests.reliability.hostile_files import Hostile, Write, container, readable, refused, tensor
from tests.reliability.hostile_manifests import specimen_file

INDEX = "model.safetensors.index.json"


def _fifo(folder: Path) -> Path:
    os.mkfifo(folder / "model")
    return folder / "model"


def _socket(folder: Path) -> Path:
    here = os.open(".", os.O_RDONLY)
    os.chdir(folder)  # the name of a socket has to be short
    try:
        with socket.socket(socket.AF_UNIX) as opened:
            opened.bind("model")
    finally:
        os.fchdir(here)
        os.close(here)
    return folder / "model"


def _link(target: str) -> Write:
    def write(folder: Path) -> Path:
        (folder / "model").symlink_to(target)
        return folder / "model"

    return write


def _loop(folder: Path) -> Path:
    (folder / "one").symlink_to("two")
    (folder / "two").symlink_to("one")
    return folder / "one"


def _folder(folder: Path) -> Path:
    (folder / "model").mkdir()
    return folder / "model"


def _named(name: bytes) -> Write:
    """A file with a name that is no text, in which nothing is wrong."""

    def write(folder: Path) -> str:
        path = os.path.join(os.fsencode(folder), name)
        with open(path, "wb") as file:
            file.write(specimen_file())
        return os.fsdecode(path)

    return write


def _broken_named(folder: Path) -> str:
    path = os.path.join(os.fsencode(folder), b"\xff\x1b[2J")
    with open(path, "wb") as file:
        file.write(b"nothing")
    return os.fsdecode(path)


def _text(path: str) -> Write:
    return lambda folder: path


def _index(content: object, prepare: Callable[[Path], object] = lambda folder: None) -> Write:
    """A folder with an index, and a shard that is sound."""

    def write(folder: Path) -> Path:
        inside = folder / "folder"
        inside.mkdir()
        shard = container({"weight": tensor()}, bytes(4))(inside)
        os.rename(shard, inside / "model-00001-of-00001.safetensors")
        text = content if isinstance(content, str) else json.dumps(content)
        (inside / INDEX).write_text(text)
        prepare(inside)
        return inside

    return write


def _points_at(name: Any) -> Write:
    return _index({"metadata": {}, "weight_map": {"weight": name}})


def _fifo_for_a_shard(folder: Path) -> None:
    (folder / "model-00001-of-00001.safetensors").unlink()
    os.mkfifo(folder / "model-00001-of-00001.safetensors")


FINE = "model-00001-of-00001.safetensors"

#: What stands at a path, and is no checkpoint.
PLACES: dict[str, Hostile] = {
    "a FIFO": refused(_fifo, "not a regular file"),
    "a socket": refused(_socket, "cannot open", FileAccessError),
    "/dev/null": refused(_text("/dev/null"), "not a regular file"),
    "/dev/zero": refused(_text("/dev/zero"), "not a regular file"),
    "/dev/tty by a link": refused(_link("/dev/zero"), "not a regular file"),
    "an empty folder": refused(_folder, "a folder without a checkpoint"),
    "nothing": refused(lambda folder: folder / "model", "no such checkpoint", CheckpointNotFoundError),
    "a link to nothing": refused(_link("nothing"), "no such checkpoint", CheckpointNotFoundError),
    "links in a circle": refused(_loop, "cannot open", FileAccessError),
    "a link to itself": refused(_link("model"), "cannot open", FileAccessError),
    "a path with a NUL": refused(_text("a\0b"), "null", FileAccessError),
    "no path": refused(_text(""), "no such checkpoint", CheckpointNotFoundError),
    "a path that is too long": refused(_text("a" * 5000), "cannot open", FileAccessError),
    "a path with a lone surrogate": refused(_text("\ud800"), r"\ud800", FileAccessError),
    "a file within a file": refused(
        lambda folder: container({})(folder) / "model",  # type: ignore[operator]
        "cannot open",
        FileAccessError,
    ),
    "a file of /proc without a size": refused(_text("/proc/self/maps"), "no safetensors header in its 0 bytes"),
    "a name that is no text": readable(_named(b"\xff\xfe"), "EXACT", None, inspect="12 tensors", verify=": ok"),
    "a name with an escape": readable(_named(b"a\x1b[2Jb"), r"a\x1b[2Jb", None, inspect="12 tensors", verify=": ok"),
    "a bad name of a bad file": refused(_broken_named, r"\xff\x1b[2J".replace(r"\xff", r"\udcff")),
}

#: Indices of shards.
INDICES: dict[str, Hostile] = {
    "a shard above the folder": refused(
        _points_at("../model.safetensors"), "expected the name of a .safetensors file in the same folder"
    ),
    "an absolute shard": refused(
        _points_at("/etc/passwd"), "expected the name of a .safetensors file in the same folder"
    ),
    "a shard with a NUL": refused(
        _points_at("model\0.safetensors"), "expected the name of a .safetensors file in the same folder"
    ),
    "a shard with an escape": refused(
        _points_at("\x1b[2J.safetensors"), "expected the name of a .safetensors file in the same folder"
    ),
    "a shard of another drive": refused(
        _points_at("C:model.safetensors"), "expected the name of a .safetensors file in the same folder"
    ),
    "a shard that is a number": refused(_points_at(7), "something that is no string"),
    "a shard that is not there": refused(_points_at("other.safetensors"), "this shard is missing", DamagedFileError),
    "an index that names itself": refused(_points_at(INDEX), "expected the name of a .safetensors file"),
    "a shard that is a FIFO": refused(
        _index({"metadata": {}, "weight_map": {"weight": FINE}}, _fifo_for_a_shard), "not a regular file"
    ),
    "a tensor that the shard lacks": refused(
        _index({"metadata": {}, "weight_map": {"weight": FINE, "more": FINE}}),
        "names a tensor that is not in it",
        DamagedFileError,
    ),
    "a tensor that the index lacks": readable(
        _index({"metadata": {}, "weight_map": {}}), "in the model", plain=True, inspect="0 tensors"
    ),
    "an index that is a list": refused(_index([]), "expected an object"),
    "an index of nothing": refused(_index(""), "not valid JSON"),
    "an index with a key twice": refused(
        _index(f'{{"weight_map":{{"weight":"{FINE}","weight":"{FINE}"}}}}'), "stands twice"
    ),
    "an index within itself": refused(_index('{"weight_map":' * 10**5), "not valid JSON"),
    "an index of NaN": refused(_index('{"metadata":{"total_size":NaN},"weight_map":{}}'), "NaN is not JSON"),
    "an index with an integer of 5,000 digits": refused(
        _index('{"metadata":{"total_size":' + "9" * 5000 + '},"weight_map":{}}'), "more than 64 bits"
    ),
    "an index of strings for metadata": refused(
        _index({"metadata": "os.system", "weight_map": {"weight": FINE}}), "expected an object weight_map"
    ),
}

FILES: dict[str, Hostile] = {
    **{f"paths: {name}": hostile for name, hostile in PLACES.items()},
    **{f"indices: {name}": hostile for name, hostile in INDICES.items()},
}
