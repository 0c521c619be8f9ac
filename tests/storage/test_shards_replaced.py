"""A save into a folder that holds something: what it replaces, what it removes, what it leaves alone."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import orthoserde
from orthoserde.errors import FileAccessError
from orthoserde.storage.shards import standing, writing
from tests.helpers import assert_finite
from tests.storage.shard_cases import (
    INDEX,
    LIMIT,
    SINGLE,
    equal,
    loaded,
    make,
    names,
    shards,
    state,
)

posix = pytest.mark.skipif(os.name == "nt", reason="about POSIX files")


def test_what_fits_into_one_shard_is_one_file(tmp_path: Path) -> None:
    report = orthoserde.save(make(1.0), tmp_path / "folder", max_shard_size="1GB")
    assert names(tmp_path / "folder") == [SINGLE]
    assert report.file_bytes == (tmp_path / "folder" / SINGLE).stat().st_size
    assert equal(loaded(tmp_path / "folder"), state(make(1.0)))


def test_a_model_without_tensors_is_one_file(tmp_path: Path) -> None:
    orthoserde.save(nn.ReLU(), tmp_path / "folder", max_shard_size=1)
    assert names(tmp_path / "folder") == [SINGLE]


def test_an_error_of_ours_in_the_middle_of_a_save_is_not_its_own_cause(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = FileAccessError(28, "no space", "a shard")

    def refuse(*args: object) -> None:
        raise error

    for place, name in ((writing, "_free_names"), (standing, "mode_of")):
        before = names(folder)
        with monkeypatch.context() as patch:
            patch.setattr(place, name, refuse)
            with pytest.raises(FileAccessError) as caught:
                orthoserde.save(make(2.0), folder, max_shard_size=LIMIT)
        assert caught.value is error
        assert_finite(error)
        assert names(folder) == before


SIZES: list[int | str] = [1, LIMIT, LIMIT, 500, "1GB", "1GB", 200, "1GB", LIMIT]


def test_each_save_replaces_the_one_before_and_leaves_nothing_of_it(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    for value, size in enumerate(SIZES):
        orthoserde.save(make(value), folder, max_shard_size=size)
        assert names(folder) == ([SINGLE] if size == "1GB" else [*shards(folder), INDEX])
        assert equal(loaded(folder), state(make(value)))
        assert orthoserde.verify(folder).ok


def test_no_shard_takes_the_name_of_one_that_the_index_still_refers_to(folder: Path) -> None:
    first = shards(folder)
    orthoserde.save(make(2.0), folder, max_shard_size=LIMIT)
    second = shards(folder)
    assert not set(first) & set(second)
    # What transformers takes for a shard when it cleans a folder.
    assert all(name.startswith("model-") and name.endswith("-of-00004.safetensors") for name in second)


def test_the_same_save_again_keeps_the_names(folder: Path) -> None:
    before = {name: (folder / name).read_bytes() for name in names(folder)}
    orthoserde.save(make(1.0), folder, max_shard_size=LIMIT)
    assert {name: (folder / name).read_bytes() for name in names(folder)} == before


def test_files_that_are_not_ours_stay(folder: Path) -> None:
    foreign = {"config.json", "model-00009-of-00009.safetensors", "model-x.safetensors", "notes.txt", "link"}
    for name in foreign - {"link"}:
        (folder / name).write_bytes(b"{}")
    safetensors.torch.save_file({"a": torch.zeros(1)}, folder / "model-00008-of-00009.safetensors")
    (folder / "link").symlink_to("nowhere")
    orthoserde.save(make(2.0), folder, max_shard_size="1GB")
    assert set(names(folder)) == foreign | {"model-00008-of-00009.safetensors", SINGLE}


@posix
def test_what_may_be_a_shard_of_ours_and_is_not_proven_to_be_one_stays(folder: Path, tmp_path: Path) -> None:
    first = folder / shards(folder)[0]
    shutil.copy(first, folder / "kept.safetensors")  # a name that no save gives
    shutil.copy(first, tmp_path / "elsewhere")
    (folder / "model-00008-of-00009.safetensors").symlink_to(tmp_path / "elsewhere")
    with safetensors.safe_open(first, "pt") as file:
        metadata = file.metadata()
    # Another tool has kept our mark in a file that it wrote.
    safetensors.torch.save_file({"a": torch.zeros(3)}, folder / "model-00009-of-00009.safetensors", metadata)
    before = set(names(folder)) - {*shards(folder), INDEX}
    assert len(before) == 3
    orthoserde.save(make(2.0), folder, max_shard_size="1GB")
    assert set(names(folder)) == before | {SINGLE}


@posix
def test_permissions_are_those_of_the_checkpoint_before(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    orthoserde.save(make(), folder, max_shard_size="1GB")
    (folder / SINGLE).chmod(0o600)
    for size in (LIMIT, LIMIT, "1GB"):
        orthoserde.save(make(2.0), folder, max_shard_size=size)
        assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}


def test_what_is_durable_when(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards before their names, these before the index, that before anything is removed."""
    events: list[tuple[str, int | str]] = []
    fsync, replace, unlink = os.fsync, os.replace, os.unlink

    def recording_fsync(descriptor: int) -> None:
        events.append(("fsync", os.fstat(descriptor).st_ino))
        fsync(descriptor)

    def recording_replace(source: str, target: str) -> None:
        events.append(("replace", os.stat(source).st_ino))
        replace(source, target)

    def recording_unlink(path: str) -> None:
        events.append(("unlink", os.path.basename(path)))
        unlink(path)

    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(os, "replace", recording_replace)
    monkeypatch.setattr(os, "unlink", recording_unlink)
    old, here = shards(folder), ("fsync", folder.stat().st_ino)
    orthoserde.save(make(2.0), folder, max_shard_size=LIMIT)
    new = [(folder / name).stat().st_ino for name in shards(folder)]
    index = (folder / INDEX).stat().st_ino
    assert events == [
        *(("fsync", inode) for inode in new),
        *(("replace", inode) for inode in new),
        here,
        ("fsync", index),
        ("replace", index),
        here,
        here,
        *(("unlink", name) for name in old),
    ]


def test_a_save_that_fails_keeps_a_shard_that_it_found_with_the_same_bytes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = shards(folder)[-1]
    (folder / last).rename(folder / "renamed.safetensors")
    (folder / INDEX).write_text((folder / INDEX).read_text().replace(last, "renamed.safetensors"))

    def refuse(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(writing, "_place_index", refuse)
        with pytest.raises(FileAccessError, match="No space left"):
            orthoserde.save(make(1.0), folder, max_shard_size=LIMIT)
    assert not (folder / last).exists()
    assert equal(loaded(folder), state(make(1.0)))


def test_shards_of_another_library_are_not_written_over(tmp_path: Path) -> None:
    tmp_path = tmp_path / "folder"
    tmp_path.mkdir()
    theirs = tmp_path / "model-00001-of-00004.safetensors"
    safetensors.torch.save_file({"a": torch.zeros(1)}, theirs)
    before = theirs.read_bytes()
    orthoserde.save(make(1.0), tmp_path, max_shard_size=LIMIT)
    assert theirs.read_bytes() == before
    assert theirs.name not in shards(tmp_path)
    assert equal(loaded(tmp_path), state(make(1.0)))


def test_stray_shards_of_a_save_that_was_interrupted_are_removed(folder: Path) -> None:
    (folder / INDEX).unlink()
    orthoserde.save(make(2.0), folder, max_shard_size=1)
    assert names(folder) == [*shards(folder), INDEX]


def test_stray_shards_do_not_block_their_names(folder: Path) -> None:
    usual = shards(folder)
    (folder / INDEX).unlink()
    orthoserde.save(make(2.0), folder, max_shard_size=LIMIT)
    assert shards(folder) == usual
    assert equal(loaded(folder), state(make(2.0)))


def test_a_renamed_shard_is_read_and_removed_with_its_index(folder: Path) -> None:
    name = shards(folder)[0]
    (folder / name).rename(folder / "renamed.safetensors")
    (folder / INDEX).write_text((folder / INDEX).read_text().replace(name, "renamed.safetensors"))
    assert equal(loaded(folder), state(make(1.0)))
    orthoserde.save(make(2.0), folder, max_shard_size=LIMIT)
    assert names(folder) == [*shards(folder), INDEX]


def write_foreign_index(folder: Path) -> None:
    safetensors.torch.save_file({"a": torch.zeros(1)}, folder / "model-00001-of-00001.safetensors")
    (folder / INDEX).write_text('{"metadata": {}, "weight_map": {"a": "model-00001-of-00001.safetensors"}}')


def move_behind_a_link(path: Path) -> None:
    path.rename(path.parent / "blob")
    path.symlink_to("blob")


def write_single_behind_a_link(folder: Path) -> None:
    orthoserde.save(make(), folder, max_shard_size="1GB")
    move_behind_a_link(folder / SINGLE)


def write_index_behind_a_link(folder: Path) -> None:
    orthoserde.save(make(), folder, max_shard_size=LIMIT)
    move_behind_a_link(folder / INDEX)


NOT_OURS: dict[str, Callable[[Path], object]] = {
    "another library's file": lambda folder: safetensors.torch.save_file({"a": torch.zeros(1)}, folder / SINGLE),
    "a damaged file": lambda folder: (folder / SINGLE).write_bytes(b"damaged"),
    "a folder": lambda folder: (folder / SINGLE).mkdir(),
    "a link": write_single_behind_a_link,
    "a link to nothing": lambda folder: (folder / SINGLE).symlink_to("nowhere"),
    "another library's index": write_foreign_index,
    "a damaged index": lambda folder: (folder / INDEX).write_text("{"),
    "an index that is a folder": lambda folder: (folder / INDEX).mkdir(),
    "an index that is a link": write_index_behind_a_link,
}


@pytest.mark.parametrize("size", [LIMIT, "1GB"])
@pytest.mark.parametrize("case", NOT_OURS)
def test_a_checkpoint_that_is_not_proven_to_be_ours_is_neither_replaced_nor_removed(
    tmp_path: Path, case: str, size: int | str
) -> None:
    NOT_OURS[case](tmp_path)
    before = {path: path.lstat() for path in tmp_path.iterdir()}
    with pytest.raises(FileAccessError, match="neither replaced nor removed; move it away"):
        orthoserde.save(make(), tmp_path, max_shard_size=size)
    after = {path: path.lstat() for path in tmp_path.iterdir()}
    assert {path: (s.st_ino, s.st_mtime_ns) for path, s in after.items()} == {
        path: (s.st_ino, s.st_mtime_ns) for path, s in before.items()
    }


def test_the_folder_is_made_and_its_parent_is_not(tmp_path: Path) -> None:
    orthoserde.save(make(), tmp_path / "new", max_shard_size=LIMIT)
    with pytest.raises(FileAccessError, match="cannot make the folder"):
        orthoserde.save(make(), tmp_path / "no" / "parent", max_shard_size=LIMIT)
    with pytest.raises(FileAccessError, match="cannot make the folder"):
        orthoserde.save(make(), tmp_path / "new" / INDEX, max_shard_size=LIMIT)
    with pytest.raises(FileAccessError, match="null"):
        orthoserde.save(make(), f"{tmp_path}/a\0b", max_shard_size=LIMIT)
    assert names(tmp_path) == ["new"]


def test_no_path_is_not_the_folder_where_the_process_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for path in ("", b""):
        for limit in (LIMIT, None):
            with pytest.raises(FileAccessError, match=r"^\[Errno 2\] expected a path, got an empty one: ''$"):
                orthoserde.save(make(), path, max_shard_size=limit)  # type: ignore[arg-type]
    with pytest.raises(FileAccessError, match="expected a path, got an empty one"):
        orthoserde.Checkpoints("")
    for read in (orthoserde.inspect, orthoserde.verify, partial(orthoserde.load, make())):
        with pytest.raises(orthoserde.CheckpointNotFoundError):
            read("")
    assert not names(tmp_path)


def test_a_folder_that_was_made_for_a_save_that_fails_goes_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(FileAccessError, match="No space left"):
        orthoserde.save(make(), tmp_path / "new", max_shard_size=LIMIT)
    assert names(tmp_path) == []
