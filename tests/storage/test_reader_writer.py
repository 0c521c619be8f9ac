from __future__ import annotations

import contextlib
import dataclasses
import errno
import io
import os
import pickle
import re
import struct
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from orthoserde import errors, storage, tensor_bytes
from orthoserde.checkpoint import Checkpoint, LiveTensor
from orthoserde.errors import CheckpointNotFoundError, FileAccessError, FileFormatError, OrthoserdeError
from orthoserde.manifest import (
    DENSE,
    Manifest,
    ModuleRecord,
    ParametrizationRecord,
    ParametrizedRecord,
    TensorRecord,
)
from orthoserde.storage import container, writer
from orthoserde.tensor_bytes import Digest
from tests.helpers import watch_reads
from tests.storage.strategies import (
    bits,
    checkpoint_of,
    manifests,
    random_tensor,
    tensor_names,
    tensors,
)

posix = pytest.mark.skipif(os.name == "nt", reason="about POSIX files")

ORIGINAL = "a.parametrizations.w.original"
BASE = "a.parametrizations.w.0.base"
STORED = {ORIGINAL: random_tensor(torch.float32, (3, 2)).T, BASE: random_tensor(torch.float16, (2, 2)).T}

#: Every sort of thing that a manifest holds, in few bytes.
SMALL = Manifest(
    tensors={},
    aliases={"b": ORIGINAL},
    parametrized=(
        ParametrizedRecord(
            *("a", "w", (), (2, 3), "float32", True, False, {"original": DENSE}),
            (ParametrizationRecord("t>o", 1, {"m": 0.5}, None, {"base": DENSE}),),
        ),
    ),
    modules=(ModuleRecord("", "m>N", 1, None),),
    metadata={"k": "é"},
)


def check(path: Path) -> None:
    """Read a file to its last byte, as a load does before it writes; raise if anything is wrong."""
    with storage.read(path) as checkpoint:
        assert set(checkpoint.sources) == set(checkpoint.manifest.tensors)
        for key, record in checkpoint.manifest.tensors.items():
            if tensor_bytes.digest_of(checkpoint.sources[key].blocks()) != record.digest:
                raise errors.DamagedFileError(key)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files") / "file.safetensors"


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.safetensors"
    storage.write(checkpoint_of(STORED, SMALL), path)
    return path


# Round trips


def test_both_ways_of_opening_a_file_refuse_the_same_shapes(tmp_path: Path) -> None:
    path = tmp_path / "m"
    storage.write(checkpoint_of({"b": torch.empty(0, 2**31, 2**31, dtype=torch.complex128)}), path)
    with pytest.raises(FileFormatError, match="the shape is too large"):
        storage.read(path)


def test_a_header_that_its_manifest_gives_is_not_taken_apart_as_well(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("each tensor was looked at once more")

    monkeypatch.setattr(container, "_decode_entry", refuse)
    check(small)
    storage.write(checkpoint_of({}, dataclasses.replace(SMALL, aliases={}, parametrized=())), small)
    check(small)


@settings(deadline=None, max_examples=100)
@given(stored=st.dictionaries(tensor_names, tensors(), max_size=4))
def test_tensors_come_back_with_their_bits_and_with_their_strides_where_those_are_dense(
    path: Path, stored: dict[str, Tensor]
) -> None:
    assert storage.write(checkpoint_of(stored), path) == path.stat().st_size
    check(path)
    with storage.read(path) as checkpoint:
        assert set(checkpoint.sources) == set(stored)
        for key, tensor in stored.items():
            record = checkpoint.manifest.tensors[key]
            assert (record.shape, record.stride) == (tuple(tensor.shape), tensor.stride())
            assert record.digest == xxhash.xxh3_128_hexdigest(bits(tensor))
            read = checkpoint.tensor(key)
            assert (read.dtype, read.shape, bits(read)) == (tensor.dtype, tensor.shape, bits(tensor))
            dense = tensor_bytes.is_dense(tensor.shape, tensor.stride())
            assert read.stride() == (tensor.stride() if dense else torch.empty(tensor.shape).stride())
            digest = Digest()
            checkpoint.sources[key].fill(torch.empty_like(tensor, memory_format=torch.contiguous_format), digest.add)
            assert str(digest) == record.digest


@settings(deadline=None, max_examples=60)
@given(manifest=manifests())
def test_the_whole_manifest_comes_back(path: Path, manifest: Manifest) -> None:
    stored = {key: torch.full((2,), i, dtype=torch.int16) for i, key in enumerate(manifest.tensors)}
    written = checkpoint_of(stored, manifest)
    storage.write(written, path)
    with storage.read(path) as checkpoint:
        digests = {key: xxhash.xxh3_128_hexdigest(bits(tensor)) for key, tensor in stored.items()}
        records = {key: dataclasses.replace(rec, digest=digests[key]) for key, rec in written.manifest.tensors.items()}
        assert checkpoint.manifest == dataclasses.replace(manifest, tensors=records)
        assert list(checkpoint.manifest.tensors) == list(checkpoint.sources) == sorted(stored)
        assert checkpoint.origin == os.fspath(path)


def test_an_alias_gives_the_tensor_that_is_stored_for_it(small: Path) -> None:
    with storage.read(small) as checkpoint:
        assert bits(checkpoint.tensor("b")) == bits(STORED[ORIGINAL])
        with pytest.raises(KeyError, match="nowhere"):
            checkpoint.tensor("nowhere")


def test_a_file_without_tensors_is_read(path: Path) -> None:
    size = storage.write(checkpoint_of({}), path)
    assert path.stat().st_size == size
    with storage.read(path) as checkpoint:
        assert checkpoint.manifest == Manifest({})


def test_a_shorter_checkpoint_leaves_nothing_of_a_longer_one(path: Path) -> None:
    storage.write(checkpoint_of({"a": torch.zeros(1000)}), path)
    size = storage.write(checkpoint_of({"a": torch.zeros(0)}), path)
    assert path.stat().st_size == size < 1000
    check(path)


def test_tensors_larger_than_a_block_come_back(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_bytes, "BLOCK_BYTES", 1000)
    tensor = random_tensor(torch.float32, (300, 7))
    storage.write(checkpoint_of({"a": tensor, "b": tensor.T, "c": tensor[::2, 1:5]}), path)
    check(path)
    with storage.read(path) as checkpoint:
        sizes = [len(block) for block in checkpoint.sources["a"].blocks()]
        assert sizes == [1000] * 8 + [400]
        assert bits(checkpoint.tensor("a")) == bits(tensor)
        assert bits(checkpoint.tensor("b")) == bits(tensor.T)
        assert bits(checkpoint.tensor("c")) == bits(tensor[::2, 1:5])


def test_a_write_leaves_the_tensors_alone(path: Path) -> None:
    weight = torch.nn.Parameter(torch.randn(3, 4).T)
    before = (weight._version, weight.stride(), weight.data_ptr(), bits(weight))
    storage.write(checkpoint_of({"weight": weight.detach()}), path)
    assert (weight._version, weight.stride(), weight.data_ptr(), bits(weight)) == before
    assert weight.grad is None
    assert weight.requires_grad


def test_one_checkpoint_written_again_and_again_gives_the_same_bytes(tmp_path: Path) -> None:
    items = {f"t{i}": random_tensor(torch.float32, (2, i), i) for i in range(9)} | STORED
    manifest = dataclasses.replace(SMALL, metadata={"x": "1", "a": "2", "m": "3"}, writer={"b": "1", "a": "2"})
    contents = set()
    for i in range(20):
        # Another order each time, as dicts may have.
        order = list(items)[i % len(items) :] + list(items)[: i % len(items)]
        metadata = dict(reversed(list(manifest.metadata.items()))) if i % 2 else manifest.metadata
        again = dataclasses.replace(manifest, metadata=metadata)
        storage.write(checkpoint_of({key: items[key] for key in order}, again), tmp_path / f"{i}")
        contents.add((tmp_path / f"{i}").read_bytes())
    assert len(contents) == 1


def test_the_bytes_do_not_depend_on_memory_but_for_the_recorded_strides(tmp_path: Path) -> None:
    tensor = random_tensor(torch.float32, (4, 3))
    storage.write(checkpoint_of({"a": tensor}), tmp_path / "one")
    sliced = torch.zeros(5, 3)
    sliced[1:] = tensor
    storage.write(checkpoint_of({"a": sliced[1:]}), tmp_path / "other")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()


def test_a_file_that_was_read_writes_to_the_same_bytes_also_over_itself(small: Path, tmp_path: Path) -> None:
    content = small.read_bytes()
    with storage.read(small) as checkpoint:
        storage.write(checkpoint, tmp_path / "copy")
        storage.write(checkpoint, small)
        storage.write(checkpoint.snapshot(), tmp_path / "snapshot")
    assert (tmp_path / "copy").read_bytes() == content
    assert (tmp_path / "snapshot").read_bytes() == content
    assert small.read_bytes() == content


class ReluctantFile:
    """Takes at most seven bytes at a time, as the system may."""

    def __init__(self) -> None:
        self.content = io.BytesIO()

    def write(self, block: memoryview) -> int:
        return self.content.write(block[:7])

    def __getattr__(self, name: str) -> object:
        return getattr(self.content, name)


def test_a_system_that_takes_few_bytes_at_a_time_gets_all_of_them(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = ReluctantFile()

    @contextlib.contextmanager
    def reluctant(path: Path, mode: int | None, check: Callable[[], None]) -> Iterator[ReluctantFile]:
        yield file

    monkeypatch.setattr(writer, "replacing", reluctant)
    storage.write(checkpoint_of(STORED, SMALL), small)
    assert file.content.getvalue() == small.read_bytes()


def test_an_error_while_tensors_are_read_leaves_the_previous_file_alone(small: Path) -> None:
    content = small.read_bytes()

    @dataclasses.dataclass(frozen=True)
    class BrokenTensor(LiveTensor):
        def blocks(self) -> Iterator[memoryview]:
            yield memoryview(b"1234")
            raise FileFormatError("the source is damaged")

    good = checkpoint_of({"a": torch.zeros(2)})
    broken = Checkpoint(good.manifest, {"a": BrokenTensor(torch.zeros(2))}, "a test")
    with pytest.raises(FileFormatError, match="the source is damaged"):
        storage.write(broken, small)
    assert small.read_bytes() == content
    assert os.listdir(small.parent) == [small.name]


# Every bit counts


def test_every_single_bit_flip_is_found(small: Path) -> None:
    content = small.read_bytes()
    assert len(content) < 2048
    check(small)
    accepted, tried = [], 0
    with small.open("r+b", buffering=0) as file:
        for place in range(len(content)):
            for bit in range(8):
                file.seek(place)
                tried += file.write(bytes([content[place] ^ 1 << bit]))
                try:
                    check(small)
                except OrthoserdeError:
                    continue
                accepted.append((place, bit))
            file.seek(place)
            file.write(content[place : place + 1])
    assert (accepted, tried) == ([], 8 * len(content))
    check(small)


def test_every_truncation_and_every_longer_file_is_found(small: Path) -> None:
    content = small.read_bytes()
    for size in range(len(content) - 1, -1, -1):
        os.truncate(small, size)
        with pytest.raises(FileFormatError):
            storage.read(small)
    for more in (b"\0", b" ", bytes(8), content):
        small.write_bytes(content + more)
        with pytest.raises(FileFormatError):
            storage.read(small)


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_no_exchange_of_bytes_is_overlooked(path: Path, data: st.DataObject) -> None:
    storage.write(checkpoint_of(STORED, SMALL), path)
    content = path.read_bytes()
    places = st.integers(0, len(content))
    start, stop = sorted([data.draw(places), data.draw(places)])
    other, end = sorted([data.draw(places), data.draw(places)])
    damaged = content[:start] + content[other:end] + content[stop:]
    path.write_bytes(damaged)
    if damaged == content:
        check(path)
        return
    with pytest.raises(OrthoserdeError):
        check(path)


# What is no checkpoint


def header(length: int, text: bytes = b"", data: bytes = b"") -> bytes:
    return struct.pack("<Q", length) + text + data


def _zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"a": 1}))
    return buffer.getvalue()


def _torch_save() -> bytes:
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(2)}, buffer)
    return buffer.getvalue()


VALID = b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}'
NOT_CHECKPOINTS: dict[str, bytes] = {
    **{f"{size} bytes": bytes(size) for size in range(9)},
    **{f"{size} bytes of a checkpoint": header(len(VALID), VALID)[:size] for size in range(1, 9)},
    "a header longer than the file": header(len(VALID) + 3, VALID, b"xy"),
    "a header that takes the data in": header(len(VALID) + 2, VALID, b"xy"),
    "a header of 2**63 bytes": header(2**63, VALID, b"xy"),
    "a header of 2**64 - 1 bytes": header(2**64 - 1, VALID, b"xy"),
    "truncated data": header(len(VALID), VALID, b"x"),
    "trailing bytes": header(len(VALID), VALID, b"xyz"),
    "a pickle": pickle.dumps({"a": [1.0] * 100}),
    "an old pickle": pickle.dumps({"a": [1.0] * 100}, protocol=0),
    "a zip archive": _zip(),
    "a damaged torch file": _torch_save()[:-100],
    "JSON": b'{"a": 1, "b": [1, 2, 3]}',
    "text": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
    "HTML": b"<!DOCTYPE html><html><head><title>404 Not Found</title></head></html>",
    "GGUF": b"GGUF\x03\0\0\0" + bytes(64),
    "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(64),
    "NumPy": b"\x93NUMPY\x01\0v\0{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }\n" + bytes(8),
}


@pytest.mark.parametrize("what", NOT_CHECKPOINTS)
def test_another_sort_of_file_is_refused_and_named(tmp_path: Path, what: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(NOT_CHECKPOINTS[what])
    with pytest.raises(FileFormatError) as caught:
        storage.read(path)
    assert str(path) in str(caught.value)
    assert isinstance(caught.value, ValueError)


def test_a_file_of_torch_save_is_known_by_its_bytes_whatever_its_name(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(_torch_save())
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6):
        with pytest.raises(FileFormatError, match=r"use torch 2\.6 or newer"):
            storage.read(path)
        return
    with storage.read(path) as checkpoint:
        assert torch.equal(checkpoint.tensor("a"), torch.ones(2))
        assert not checkpoint.manifest.has_configuration


def test_the_header_used_above_is_valid(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(header(len(VALID), VALID, b"xy"))
    with storage.read(path) as checkpoint:
        assert bits(checkpoint.tensor("a")) == b"xy"


def test_a_header_of_more_than_100_mb_is_refused_without_being_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(header(100_000_001))
    os.truncate(path, 100_000_009 + 8)  # sparse
    reads = watch_reads(monkeypatch)
    with pytest.raises(FileFormatError, match="no safetensors header"):
        storage.read(path)
    # The length, and whether what follows looks like a header.
    assert reads == [(0, 9)]


def test_reading_a_header_reads_no_tensor(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.write(checkpoint_of({"a": torch.zeros(100_000)}), path)
    reads = watch_reads(monkeypatch)
    with storage.read(path) as checkpoint:
        assert 8 < sum(count for _, count in reads) < 2000
        reads.clear()
        checkpoint.tensor("a")
        assert sum(count for _, count in reads) == 400_000


def test_a_missing_file_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        storage.read(tmp_path / "nowhere")
    assert type(caught.value) is CheckpointNotFoundError
    assert isinstance(caught.value, FileAccessError)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOENT, str(tmp_path / "nowhere"))


def test_a_broken_link_is_not_found(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(CheckpointNotFoundError):
        storage.read(tmp_path / "link")


def test_a_link_is_followed(small: Path) -> None:
    (small.parent / "link").symlink_to(small.name)
    check(small.parent / "link")


@posix
def test_a_folder_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match=f"{re.escape(str(tmp_path))}: a folder without a checkpoint; looked for"):
        storage.read(tmp_path)


@posix
@pytest.mark.parametrize("device", ["/dev/null", "/dev/zero"])
def test_a_device_is_refused(device: str) -> None:
    with pytest.raises(FileFormatError, match=f"{device}: not a regular file"):
        storage.read(device)


@posix
def test_a_fifo_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    raised: list[BaseException] = []

    def read() -> None:
        try:
            storage.read(fifo)
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(timeout=20)
    assert not thread.is_alive()
    assert [type(error) for error in raised] == [FileFormatError]


@posix
def test_a_file_in_place_of_a_folder_is_refused_by_the_system(small: Path) -> None:
    with pytest.raises(FileAccessError) as caught:
        storage.read(small / "model")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOTDIR, str(small / "model"))


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_refused_by_the_system(small: Path) -> None:
    small.chmod(0)
    with pytest.raises(FileAccessError, match="cannot open the checkpoint") as caught:
        storage.read(small)
    assert (caught.value.errno, caught.value.filename) == (errno.EACCES, str(small))


@pytest.mark.parametrize("path", ["a\0b", "\ud800"])
def test_text_that_is_no_path_is_refused(path: str) -> None:
    with pytest.raises(FileAccessError) as caught:
        storage.read(path)
    assert (caught.value.errno, caught.value.filename) == (errno.EINVAL, path)


# Open files


def test_tensors_may_be_read_in_any_order_and_at_the_same_time(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_bytes, "BLOCK_BYTES", 16)
    one, other = random_tensor(torch.float32, (5, 5), 1), random_tensor(torch.float32, (5, 5), 2)
    storage.write(checkpoint_of({"one": one, "other": other}), path)
    with storage.read(path) as checkpoint:
        both = [checkpoint.sources[key].blocks() for key in ("other", "one")]
        found = [b"", b""]
        for blocks in zip(*both, strict=True):
            assert bits(checkpoint.tensor("one")) == bits(one)
            found = [done + bytes(block) for done, block in zip(found, blocks, strict=True)]
        assert found == [bits(other), bits(one)]


def test_a_file_that_shrinks_while_it_is_read_is_an_error_of_that_file(path: Path) -> None:
    storage.write(checkpoint_of({"a": torch.zeros(1000)}), path)
    with storage.read(path) as checkpoint:
        os.truncate(path, path.stat().st_size - 1)
        with pytest.raises(FileFormatError, match="ends too early; it changed"):
            list(checkpoint.sources["a"].blocks())
        with pytest.raises(FileFormatError, match="ends too early; it changed"):
            checkpoint.tensor("a")


def test_a_file_that_changes_while_it_is_read_is_seen_in_the_digest(path: Path) -> None:
    storage.write(checkpoint_of({"a": torch.zeros(3)}), path)
    with storage.read(path) as checkpoint:
        with path.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\x01")
        target, digest = torch.empty(3), Digest()
        checkpoint.sources["a"].fill(target, digest.add)
        assert str(digest) != checkpoint.manifest.tensors["a"].digest
        assert bits(target)[-1] == 1


@pytest.mark.parametrize("content", ["valid", "malformed", "a folder"])
def test_no_descriptor_stays_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    path = tmp_path / "model"
    if content == "valid":
        storage.write(checkpoint_of({"a": torch.zeros(3)}), path)
    elif content == "malformed":
        path.write_bytes(header(4, b"{}xx"))
    else:
        path.mkdir()
    opened: list[int] = []
    open_ = os.open

    def recording(name: str, flags: int) -> int:
        opened.append(open_(name, flags))
        return opened[-1]

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", recording)
        if content == "valid":
            checkpoint = storage.read(path)
            checkpoint.close()
            checkpoint.close()
        else:
            with pytest.raises(FileFormatError):
                storage.read_file(path)
    (descriptor,) = opened
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_a_snapshot_needs_the_file_no_longer(small: Path) -> None:
    with storage.read(small) as checkpoint:
        snapshot = checkpoint.snapshot()
    small.unlink()
    for key, tensor in STORED.items():
        assert bits(snapshot.tensor(key)) == bits(tensor)
        assert snapshot.tensor(key).stride() == tensor.stride()


def test_a_snapshot_leaves_the_grad_mode_alone(small: Path) -> None:
    with storage.read(small) as checkpoint:
        checkpoint.snapshot().snapshot().tensor(BASE)
    checkpoint_of({"a": torch.zeros(3)}).snapshot()
    assert torch.is_grad_enabled()


def test_a_snapshot_does_not_follow_the_tensors() -> None:
    tensor = torch.zeros(3)
    live = checkpoint_of({"a": tensor})
    snapshot = live.snapshot()
    tensor.fill_(1)
    assert torch.equal(live.tensor("a"), torch.ones(3))
    assert torch.equal(snapshot.tensor("a"), torch.zeros(3))


@settings(deadline=None, max_examples=60)
@given(tensor=tensors(), transposed=st.booleans())
def test_a_live_tensor_fills_as_a_stored_one_does(tensor: Tensor, transposed: bool) -> None:
    shape = tuple(reversed(tensor.shape)) if transposed else tuple(tensor.shape)
    target = torch.empty(shape, dtype=tensor.dtype)
    target = target.permute(tuple(reversed(range(tensor.dim())))) if transposed else target
    seen = bytearray()
    LiveTensor(tensor).fill(target, seen.extend)
    assert seen == bits(tensor)
    assert bits(target) == bits(tensor)


def test_hostile_strides_in_a_manifest_cost_no_memory(path: Path) -> None:
    written = checkpoint_of({"a": torch.zeros(2, 3), "empty": torch.zeros(2, 0)})
    records: dict[str, TensorRecord] = {
        key: dataclasses.replace(record, stride=(2**62, 2**62)) for key, record in written.manifest.tensors.items()
    }
    manifest = dataclasses.replace(written.manifest, tensors=records)
    storage.write(Checkpoint(manifest, written.sources, "a test"), path)
    with storage.read(path) as checkpoint:
        assert checkpoint.tensor("a").stride() == (3, 1)
        assert checkpoint.tensor("empty").untyped_storage().nbytes() == 0


def test_a_write_copies_no_record(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = checkpoint_of({"a": torch.ones(3), "b": torch.ones(2)})
    made: list[str] = []
    make = TensorRecord.__init__

    def watched(self: TensorRecord, dtype: str, *rest: Any, **named: Any) -> None:
        made.append(dtype)
        make(self, dtype, *rest, **named)

    monkeypatch.setattr(TensorRecord, "__init__", watched)
    storage.write(checkpoint, path)
    assert made == []
