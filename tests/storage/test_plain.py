"""Plain files: what safetensors and torch read of them, and that they appear whole or not at all."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from orthoserde import ConfigError, DamagedFileError, FileAccessError, Registry, storage
from orthoserde.capture import capture
from orthoserde.checkpoint import Checkpoint, LiveTensor
from orthoserde.manifest import Manifest, TensorRecord
from orthoserde.storage import plain, write_plain, write_torch, writer
from orthoserde.tensor_bytes import contiguous_strides, dtype_name
from orthoserde.watching import no_progress, watched
from tests.helpers import bits, flip_bit


def checkpoint_of(tensors: dict[str, Tensor], aliases: dict[str, str] | None = None) -> Checkpoint:
    records = {
        key: TensorRecord(dtype_name(t.dtype), tuple(t.shape), contiguous_strides(t.shape), False)
        for key, t in tensors.items()
    }
    manifest = Manifest(tensors=records, aliases=aliases or {}, has_configuration=False)
    return Checkpoint(manifest, {key: LiveTensor(t) for key, t in tensors.items()}, "test")


TENSORS = {
    "b.weight": torch.arange(6.0).reshape(2, 3).mT,
    "a": torch.tensor(3, dtype=torch.int64),
    "half": torch.ones(3, dtype=torch.bfloat16),
    "empty": torch.zeros(0, 4),
    "complex": torch.tensor([1 + 2j], dtype=torch.complex64),
    "flags": torch.tensor([True, False]),
}


def test_safetensors_reads_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    size = write_plain(checkpoint_of(TENSORS, {"tied": "a"}), path)
    assert size == path.stat().st_size
    loaded = load_file(path)
    assert loaded.keys() == {*TENSORS, "tied"}
    for key, tensor in TENSORS.items():
        assert loaded[key].dtype == tensor.dtype
        assert bits(loaded[key]) == bits(tensor)
        assert loaded[key].shape == tensor.shape
    assert int(loaded["tied"]) == 3
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_torch_reads_what_was_written_and_ties_stay(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    size = write_torch(checkpoint_of(TENSORS, {"tied": "a"}), path)
    assert size == path.stat().st_size
    loaded = torch.load(path, weights_only=True)
    assert all(bits(loaded[key]) == bits(tensor) for key, tensor in TENSORS.items())
    assert loaded["tied"].data_ptr() == loaded["a"].data_ptr()


def test_the_same_tensors_give_the_same_bytes(tmp_path: Path) -> None:
    write_plain(checkpoint_of(TENSORS), tmp_path / "a")
    write_plain(checkpoint_of(dict(reversed(TENSORS.items()))), tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_complex128_is_refused_with_what_to_do(tmp_path: Path) -> None:
    wide = checkpoint_of({"x": torch.zeros(2, dtype=torch.complex128)})
    with pytest.raises(ConfigError, match=r"x is complex128.*ends in \.pt"):
        write_plain(wide, tmp_path / "m")
    assert not list(tmp_path.iterdir())
    write_torch(wide, tmp_path / "m.pt")


@pytest.mark.parametrize("aliases", [{}, {"__metadata__": "x"}], ids=["itself", "another name"])
def test_a_name_that_means_something_else_in_a_header_is_refused(aliases: dict[str, str], tmp_path: Path) -> None:
    key = "x" if aliases else "__metadata__"
    named = checkpoint_of({key: torch.zeros(2)}, aliases)
    with pytest.raises(ConfigError, match=r"'__metadata__', which has another meaning .*ends in \.pt"):
        write_plain(named, tmp_path / "m")
    assert not list(tmp_path.iterdir())
    write_torch(named, tmp_path / "m.pt")


@pytest.mark.parametrize("write", [write_plain, write_torch])
@pytest.mark.parametrize("writes", [0, 1, 3, 5])
def test_a_full_disk_leaves_the_earlier_file(
    write: Callable[[Checkpoint, Path], int], writes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m"
    path.write_bytes(b"earlier")
    done: list[int] = []
    write_all = writer.write_all

    def refuse(file: io.FileIO, block: memoryview) -> None:
        if len(done) == writes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        done.append(len(block))
        write_all(file, block)

    monkeypatch.setattr(plain, "write_all", refuse)
    # torch makes other errors of it, some of them without a word of the disk.
    with pytest.raises(FileAccessError, match="No space left") as raised:
        write(checkpoint_of(TENSORS), path)
    assert raised.value.errno == errno.ENOSPC
    assert [each.name for each in tmp_path.iterdir()] == ["m"]
    assert path.read_bytes() == b"earlier"


class TestWatched:
    """Sources that are looked at on their way."""

    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        with capture(nn.Linear(300, 300), Registry()) as checkpoint:
            storage.write(checkpoint, tmp_path / "m.safetensors")
        return tmp_path / "m.safetensors"

    def test_every_byte_is_counted_once(self, path: Path) -> None:
        counted: list[int] = []
        with storage.read(path) as found:
            seen = watched(found, counted.append, verify=True)
            for key, record in found.manifest.tensors.items():
                assert bits(seen.tensor(key)) == bits(found.tensor(key))
                assert sum(counted) == record.nbytes
                counted.clear()
                assert b"".join(seen.sources[key].blocks()) == bits(found.tensor(key))
                assert sum(counted) == record.nbytes
                counted.clear()
                assert seen.sources[key].any_thread

    def test_damage_does_not_get_a_new_digest(self, path: Path, tmp_path: Path) -> None:
        flip_bit(path, -1)
        with storage.read(path) as found:
            seen = watched(found, no_progress, verify=True)
            with pytest.raises(DamagedFileError, match="use another copy"):
                storage.write(seen, tmp_path / "copy")
            with pytest.raises(DamagedFileError, match="use another copy"):
                seen.tensor("weight" if found.damaged() == ["weight"] else "bias")
            storage.write(watched(found, no_progress, verify=False), tmp_path / "unchecked")
        assert not (tmp_path / "copy").exists()
