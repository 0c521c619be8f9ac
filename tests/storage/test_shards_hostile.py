"""Indices and shards that nobody should trust: each is refused, nothing outside of the folder is opened."""

from __future__ import annotations

import json
import os
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
from hypothesis import given, settings
from hypothesis import strategies as st

import orthoserde
from orthoserde import storage
from orthoserde.errors import CheckpointNotFoundError, DamagedFileError, FileFormatError, OrthoserdeError
from orthoserde.storage.shards import index as indices
from orthoserde.storage.shards import reading
from orthoserde.storage.shards.names import checked_basename
from tests.helpers import assert_unchanged, snapshot
from tests.storage.shard_cases import INDEX, LIMIT, SINGLE, equal, loaded, make, shards, state

posix = pytest.mark.skipif(os.name == "nt", reason="about POSIX files")

Change = Callable[[Path], object]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folders with checkpoints of the same shapes, of ones and of twos, and a safetensors file beside them."""
    root = tmp_path_factory.mktemp("hostile")
    orthoserde.save(make(1.0), root / "ours", max_shard_size=LIMIT)
    orthoserde.save(make(2.0), root / "other", max_shard_size=LIMIT)
    shutil.copy(root / "ours" / shards(root / "ours")[0], root / "outside.safetensors")
    return root


@pytest.fixture
def root(template: Path, tmp_path: Path) -> Path:
    shutil.copytree(template, tmp_path / "root")
    return tmp_path / "root"


def write_index(root: Path, content: Any) -> None:
    (root / "ours" / INDEX).write_text(json.dumps(content, sort_keys=True, separators=(",", ":")))


def edited(change: Callable[[dict[str, Any]], object]) -> Change:
    """Change the index as parsed; written again it has the canonical text."""

    def apply(root: Path) -> None:
        content = json.loads((root / "ours" / INDEX).read_text())
        change(content)
        write_index(root, content)

    return apply


def named(name: object) -> Change:
    """Have all tensors of the first shard in a file of another name."""

    def change(content: dict[str, Any]) -> None:
        first = min(content["weight_map"].values())
        content["weight_map"] = {k: name if v == first else v for k, v in content["weight_map"].items()}

    return edited(change)


def text(content: bytes) -> Change:
    return lambda root: (root / "ours" / INDEX).write_bytes(content)


def replaced(old: str, new: str) -> Change:
    """Replace text in the index, once."""

    def apply(root: Path) -> None:
        before = (root / "ours" / INDEX).read_text()
        assert old in before
        (root / "ours" / INDEX).write_text(before.replace(old, new, 1))

    return apply


def in_shard(change: Callable[[bytes], bytes]) -> Change:
    def apply(root: Path) -> None:
        path = root / "ours" / shards(root / "ours")[0]
        path.write_bytes(change(path.read_bytes()))

    return apply


def swapped(number: int) -> Change:
    """Put a shard of the other save, of the same name and shapes, into the folder."""

    def apply(root: Path) -> None:
        name = shards(root / "ours")[number]
        shutil.copy(root / "other" / name, root / "ours" / name)

    return apply


def instead(path: str, make_it: Callable[[Path], object]) -> Change:
    def apply(root: Path) -> None:
        name = shards(root / "ours")[0] if path == "shard" else path
        (root / "ours" / name).unlink()
        make_it(root / "ours" / name)

    return apply


def rewritten(path: Path) -> None:
    """Write a shard as another tool would: same tensors and metadata, other bytes of the header."""
    with safetensors.safe_open(path, "pt") as file:
        metadata = {**file.metadata(), "note": "rewritten"}
    safetensors.torch.save_file(safetensors.torch.load_file(path), path, metadata)


def move_key(content: dict[str, Any]) -> None:
    names = sorted(set(content["weight_map"].values()))
    key = next(key for key, name in content["weight_map"].items() if name == names[0])
    content["weight_map"][key] = names[1]


def forget_the_manifest(content: dict[str, Any]) -> None:
    del content["metadata"]["orthoserde"]


def exchange_files(root: Path) -> None:
    one, other, *_ = (root / "ours" / name for name in shards(root / "ours"))
    one.rename(root / "aside")
    other.rename(one)
    (root / "aside").rename(other)


BASENAME = "expected the name of a .safetensors file in the same folder"

HOSTILE: dict[str, tuple[Change, str]] = {
    "a name in the folder above": (named("../outside.safetensors"), BASENAME),
    "a name in the folder above on Windows": (named("..\\outside.safetensors"), BASENAME),
    "a name through the folder itself": (named("./model-00001-of-00004.safetensors"), BASENAME),
    "a name in a folder below": (named("below/x.safetensors"), BASENAME),
    "an absolute name": (named("/etc/x.safetensors"), BASENAME),
    "a name on a drive": (named("C:x.safetensors"), BASENAME),
    "a name on a share": (named("\\\\host\\share\\x.safetensors"), BASENAME),
    "a second stream of a file": (named("x:y.safetensors"), BASENAME),
    "a name with NUL": (named("x\0.safetensors"), BASENAME),
    "a name with a line break": (named("x\n.safetensors"), BASENAME),
    "a name that a terminal would obey": (named("\x1b[2Jx.safetensors"), BASENAME),
    "a name that reads backwards": (named("x\u202e.safetensors"), BASENAME),
    "a hidden name": (named(".safetensors"), BASENAME),
    "dots for a name": (named(".."), BASENAME),
    "no name": (named(""), BASENAME),
    "a name of 300 bytes": (named("x" * 300 + ".safetensors"), BASENAME),
    "a pickle for a name": (named("pytorch_model.bin"), BASENAME),
    "the index for a name": (named(INDEX), BASENAME),
    "a lone surrogate in a name": (named("\ud800.safetensors"), "not valid JSON"),
    "a number for a name": (named(1), "expected the name of a file, got something that is no string"),
    "null for a name": (named(None), "expected the name of a file"),
    "a list for a name": (named(["x.safetensors"]), "expected the name of a file"),
    "a shard that is not there": (named("missing.safetensors"), "missing.safetensors: this shard is missing"),
    "a shard that was removed": (instead("shard", lambda path: None), "this shard is missing"),
    "a shard that is a folder": (instead("shard", os.mkdir), "not a regular file"),
    "a shard that is a FIFO": (instead("shard", os.mkfifo), "not a regular file"),
    "a shard that is a device": (instead("shard", lambda path: path.symlink_to("/dev/zero")), "not a regular file"),
    "a shard that links to nothing": (instead("shard", lambda path: path.symlink_to("x")), "this shard is missing"),
    "a shard cut short": (in_shard(lambda raw: raw[:-1]), "truncated or damaged"),
    "a shard cut in its header": (in_shard(lambda raw: raw[:50]), "no safetensors header"),
    "an empty shard": (in_shard(lambda raw: b""), "no safetensors header"),
    "a shard with a byte more": (in_shard(lambda raw: raw + b"\0"), "truncated or damaged"),
    "a shard with a pickle in it": (in_shard(lambda raw: b"PK\x03\x04" + raw), "no safetensors header"),
    "a shard of another save": (swapped(0), "of another save than the index"),
    "the last shard of another save": (swapped(3), "of another save than the index"),
    "a shard that another tool wrote anew": (
        lambda root: rewritten(root / "ours" / shards(root / "ours")[0]),
        "its header is not the one that the index gives it",
    ),
    "a shard without its mark": (
        lambda root: safetensors.torch.save_file(
            safetensors.torch.load_file(root / "outside.safetensors"),
            root / "ours" / shards(root / "ours")[0],
            {"format": "pt"},
        ),
        "its header is not the one that the index gives it",
    ),
    "a whole checkpoint for a shard": (
        lambda root: orthoserde.save(make(), root / "ours" / shards(root / "ours")[0]),
        "its header is not the one that the index gives it",
    ),
    "two shards exchanged": (exchange_files, "its header is not the one that the index gives it"),
    "the index of another save": (
        lambda root: shutil.copy(root / "other" / INDEX, root / "ours" / INDEX),
        "of another save than the index",
    ),
    "a tensor in another shard": (edited(move_key), "its header is not the one that the index gives it"),
    "a tensor too few": (
        edited(lambda content: content["weight_map"].popitem()),
        "only one of weight_map and manifest",
    ),
    "a tensor too many": (
        edited(lambda content: content["weight_map"].update(x="model-00001-of-00004.safetensors")),
        "only one of weight_map and manifest has 'x'",
    ),
    "no tensors": (edited(lambda content: content["weight_map"].clear()), "only one of weight_map and manifest"),
    "no weight_map": (edited(lambda content: content.pop("weight_map")), "expected an object weight_map"),
    "a weight_map that is a list": (edited(lambda content: content.update(weight_map=[])), "expected an object"),
    "metadata that are a list": (edited(lambda content: content.update(metadata=[])), "expected an object weight_map"),
    "a field more": (edited(lambda content: content.update(x=1)), "does not match its manifest"),
    "an entry more in the metadata": (
        edited(lambda content: content["metadata"].update(x="y")),
        "does not match its manifest",
    ),
    "another total size": (
        edited(lambda content: content["metadata"].update(total_size=1)),
        "does not match its manifest",
    ),
    "a total size that is true": (
        edited(lambda content: content["metadata"].update(total_size=True)),
        "does not match its manifest",
    ),
    "another alias": (
        edited(lambda content: content["metadata"].update({"2.weight": "2.bias"})),
        "does not match its manifest",
    ),
    "the text in another order": (
        lambda root: (root / "ours" / INDEX).write_text(
            json.dumps(dict(reversed(list(json.loads((root / "ours" / INDEX).read_text()).items()))))
        ),
        "does not match its manifest",
    ),
    "a manifest that is a number": (
        edited(lambda content: content["metadata"].update(orthoserde=1)),
        "expected a manifest and its digest",
    ),
    "the mark of a shard for a manifest": (
        edited(lambda content: content["metadata"].update(orthoserde='{"digest":"' + "0" * 32 + '"}')),
        "expected a manifest and its digest",
    ),
    "a manifest of another digest": (replaced("xxh3-128", "xxh3_128"), "does not match its digest"),
    "a manifest under another key": (replaced('"orthoserde":"{', '"orthoserdf":"{'), "stands under another key"),
    "no manifest": (edited(forget_the_manifest), "lacks the manifest"),
    "no metadata": (edited(lambda content: content.pop("metadata")), "lacks the manifest"),
    "a key twice": (replaced('"weight_map":{', '"weight_map":{"1.bias":"x.safetensors",'), "a key stands twice"),
    "weight_map twice": (replaced('{"metadata"', '{"weight_map":{},"metadata"'), "a key stands twice"),
    "an index that is a list": (text(b"[]"), "expected an object"),
    "an empty index": (text(b""), "not valid JSON"),
    "an index that is not UTF-8": (text(b'{"\xff": 1}'), "not valid JSON"),
    "an index with NaN": (text(b'{"weight_map": NaN}'), "NaN is not JSON"),
    "a deep index": (text(b"[" * 10**6), "not valid JSON"),
    "a deep index that ends": (text(b'{"metadata":' + b"[" * 200 + b"]" * 200 + b"}"), "nested deeper"),
    "a safetensors file for an index": (
        lambda root: shutil.copy(root / "outside.safetensors", root / "ours" / INDEX),
        "not valid JSON",
    ),
    "an index of a million tensors": (
        lambda root: write_index(root, {"weight_map": {f"{i:x}": "x.safetensors" for i in range(1 << 20)}}),
        "speaks of more than 524288 tensors",
    ),
    "an index of a million tensors, written otherwise": (
        lambda root: (root / "ours" / INDEX).write_text(
            '{"weight_map":{' + ",".join(f'"{i}":"\\u0078"' for i in range((1 << 19) + 1)) + "}}"
        ),
        "speaks of more than 524288 tensors",
    ),
    "an index of 100 MB": (lambda root: os.truncate(root / "ours" / INDEX, 100_000_001), "at most 100000000 are read"),
    "an index that is a folder": (instead(INDEX, os.mkdir), ""),
    "an index that is a FIFO": (instead(INDEX, os.mkfifo), "not a regular file"),
    "an index that is a device": (instead(INDEX, lambda path: path.symlink_to("/dev/zero")), "not a regular file"),
}


#: What this process opens, while it is watched.
OPENED: list[str] = []
WATCHING: list[bool] = []


def watch_opens(event: str, arguments: tuple[Any, ...]) -> None:
    if WATCHING and event in ("open", "os.open") and isinstance(arguments[0], (str, bytes)):
        OPENED.append(os.path.realpath(os.fsdecode(os.path.dirname(os.path.abspath(arguments[0])))))


sys.addaudithook(watch_opens)


@posix
@pytest.mark.parametrize("case", HOSTILE)
def test_what_is_not_sound_is_refused_and_nothing_outside_is_opened(root: Path, case: str) -> None:
    change, message = HOSTILE[case]
    loaded(root / "other")  # imports whatever a load imports
    change(root)
    model = make()
    before = snapshot(model)
    OPENED.clear()
    WATCHING.append(True)
    try:
        for path in (root / "ours", root / "ours" / INDEX):
            with pytest.raises(FileFormatError) as caught:
                orthoserde.load(model, path, verify=False)
            assert message in str(caught.value), str(caught.value)
    finally:
        WATCHING.clear()
    assert_unchanged(model, before)
    # Opening the device or the FIFO itself is all that a link may do; it stands in the folder.
    assert set(OPENED) == {os.path.realpath(root / "ours")}
    for look in (orthoserde.inspect, orthoserde.verify, orthoserde.build):
        with pytest.raises(FileFormatError):
            look(root / "ours")


def test_each_of_these_is_sound_before_it_is_changed(root: Path) -> None:
    assert equal(loaded(root / "ours", verify=False), state(make(1.0)))
    assert equal(loaded(root / "other", verify=False), state(make(2.0)))


def test_a_bit_of_any_byte_of_the_index_is_noticed(root: Path) -> None:
    path = root / "ours" / INDEX
    content = path.read_bytes()
    for position in range(0, len(content), 7):
        for bit in (1, 32):
            damaged = bytearray(content)
            damaged[position] ^= bit
            path.write_bytes(damaged)
            with pytest.raises(FileFormatError):
                storage.read(root / "ours")


def test_a_bit_of_any_byte_of_the_header_of_a_shard_is_noticed(root: Path) -> None:
    path = root / "ours" / shards(root / "ours")[1]
    content = path.read_bytes()
    for position in range(8 + struct.unpack("<Q", content[:8])[0]):
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        with pytest.raises(FileFormatError):
            storage.read(root / "ours")


def test_damaged_elements_are_found_before_the_model_is_changed(root: Path) -> None:
    path = root / "ours" / shards(root / "ours")[-1]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    model = make()
    before = snapshot(model)
    with pytest.raises(DamagedFileError):
        orthoserde.load(model, root / "ours")
    assert_unchanged(model, before)


@given(st.text(max_size=40))
@settings(max_examples=300, deadline=None)
def test_a_name_that_is_taken_is_that_of_a_file_in_the_folder(name: str) -> None:
    for whole in (name, f"{name}.safetensors"):
        try:
            checked = checked_basename(whole, ".safetensors", "test")
        except FileFormatError:
            continue
        assert checked == whole == os.path.basename(whole)
        assert not set(whole) & set("/\\:\0\n\r\t")
        assert os.path.dirname(os.path.normpath(os.path.join("folder", whole))) == "folder"


def test_one_shard_by_itself_is_refused(root: Path) -> None:
    with pytest.raises(FileFormatError, match=r"one shard of a checkpoint.*give the path of the folder"):
        orthoserde.load(make(), root / "outside.safetensors")


def test_a_shard_with_a_damaged_mark_is_not_taken_for_another_librarys(root: Path) -> None:
    path = root / "outside.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"orthoserde"', b'"orthoserdf"'))
    with pytest.raises(DamagedFileError, match="stands under another key"):
        storage.read(path)


def test_nothing_at_the_path_is_said_to_be_missing(tmp_path: Path) -> None:
    for name in ("nothing", INDEX):
        with pytest.raises(CheckpointNotFoundError):
            orthoserde.load(make(), tmp_path / name)
    (tmp_path / SINGLE).symlink_to("nowhere")
    with pytest.raises(CheckpointNotFoundError):
        orthoserde.load(make(), tmp_path)


def test_an_index_too_large_for_readers_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    orthoserde.save(make(1.0), tmp_path / "folder", max_shard_size="1GB")
    monkeypatch.setattr(indices, "MAX_INDEX_BYTES", 1000)
    with pytest.raises(FileFormatError, match="readers accept 524288 tensors and 1000 bytes"):
        orthoserde.save(make(2.0), tmp_path / "folder", max_shard_size=LIMIT)
    monkeypatch.undo()
    assert equal(loaded(tmp_path / "folder"), state(make(1.0)))
    assert os.listdir(tmp_path / "folder") == [SINGLE]


@posix
def test_links_are_followed_as_in_the_cache_of_hugging_face(root: Path) -> None:
    cache = root / "cache" / "snapshots" / "main"
    cache.mkdir(parents=True)
    (root / "cache" / "blobs").mkdir()
    for number, name in enumerate(sorted(os.listdir(root / "ours"))):
        shutil.copy(root / "ours" / name, root / "cache" / "blobs" / str(number))
        (cache / name).symlink_to(f"../../blobs/{number}")
    assert equal(loaded(cache), state(make(1.0)))
    assert equal(loaded(cache / INDEX), state(make(1.0)))


def test_a_folder_that_is_saved_into_all_the_time_is_given_up_in_the_end(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "ours" / shards(root / "ours")[0]).unlink()
    texts = [(root / name / INDEX).read_bytes() for name in ("ours", "other")] * reading.ATTEMPTS * 2
    monkeypatch.setattr(reading, "read_text", lambda path: texts.pop())
    with pytest.raises(OrthoserdeError, match="this shard is missing"):
        storage.read(root / "ours")
