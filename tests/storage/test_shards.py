"""Checkpoints in shards: what is written, read back, replaced and removed."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import orthoserde
from orthoserde import storage
from orthoserde.errors import ConfigError, FileAccessError, FileFormatError, MissingPackageError
from orthoserde.storage.open_file import ReopenedFile
from orthoserde.storage.shards import reading
from orthoserde.storage.shards.index import decode_index
from orthoserde.storage.shards.splitting import byte_limit
from tests.helpers import assert_unchanged, snapshot
from tests.storage.shard_cases import (
    INDEX,
    LIMIT,
    SINGLE,
    as_transformers_reads,
    equal,
    loaded,
    make,
    names,
    shards,
    state,
)
from tests.storage.strategies import checkpoint_of

posix = pytest.mark.skipif(os.name == "nt", reason="about POSIX files")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a checkpoint in shards, of a model of ones."""
    orthoserde.save(make(1.0), tmp_path / "folder", max_shard_size=LIMIT)
    return tmp_path / "folder"


# Round trips


def test_what_is_saved_in_shards_is_loaded_bit_for_bit_by_folder_and_by_index(tmp_path: Path) -> None:
    model = make(1.0)
    before = snapshot(model)
    report = orthoserde.save(model, tmp_path / "folder", max_shard_size=LIMIT)
    assert_unchanged(model, before)
    usual = [f"model-0000{number}-of-00004.safetensors" for number in (1, 2, 3, 4)]
    assert names(tmp_path / "folder") == [*usual, INDEX]
    assert report.path == str(tmp_path / "folder")
    assert report.file_bytes == sum(path.stat().st_size for path in (tmp_path / "folder").iterdir())
    for path in (tmp_path / "folder", tmp_path / "folder" / INDEX):
        assert equal(loaded(path), state(model))


def test_the_fidelity_is_that_of_a_single_file(folder: Path) -> None:
    model = make()
    report = orthoserde.load(model, folder)
    assert report.fidelity is orthoserde.Fidelity.EXACT
    assert model[1].weight is model[2].weight


def test_a_parametrized_tensor_may_lie_in_several_shards(tmp_path: Path) -> None:
    orthoserde.save(make(1.0), tmp_path / "folder", max_shard_size=1)
    weight_map = json.loads((tmp_path / "folder" / INDEX).read_text())["weight_map"]
    assert len(set(weight_map.values())) == len(weight_map)  # each tensor by itself
    assert equal(loaded(tmp_path / "folder"), state(make(1.0)))


def test_each_shard_is_within_the_limit_unless_it_is_one_tensor(tmp_path: Path) -> None:
    orthoserde.save(make(), tmp_path / "folder", max_shard_size=200)
    for name in shards(tmp_path / "folder"):
        tensors = safetensors.torch.load_file(tmp_path / "folder" / name)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 200 or len(tensors) == 1


def test_inspect_reads_headers_alone_and_says_what_a_single_file_says(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    orthoserde.save(make(1.0), tmp_path / "single")
    assert orthoserde.inspect(folder) == orthoserde.inspect(tmp_path / "single")
    monkeypatch.setattr(reading, "StoredTensor", lambda *arguments: None)  # nothing to read elements with
    assert str(orthoserde.inspect(folder)) == str(orthoserde.inspect(tmp_path / "single"))


def test_verify_digests_every_shard(folder: Path) -> None:
    report = orthoserde.verify(folder)
    assert report.ok
    for name in shards(folder):
        content = bytearray((folder / name).read_bytes())
        content[-1] ^= 1
        (folder / name).write_bytes(content)
        assert not orthoserde.verify(folder).ok
        content[-1] ^= 1
        (folder / name).write_bytes(content)
    assert orthoserde.verify(folder).ok


def test_training_state_goes_along(tmp_path: Path) -> None:
    def of(value: float) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = make(value)
        optimizer = torch.optim.Adam(model.parameters())
        return model, optimizer

    model, optimizer = of(1.0)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    orthoserde.save(model, tmp_path / "folder", optimizer=optimizer, rng=True, state={"step": 7}, max_shard_size=LIMIT)
    other, its = of(0.0)
    report = orthoserde.load(other, tmp_path / "folder", optimizer=its, rng=True, state={"step": 0})
    assert report.state["step"] == 7
    assert equal(state(other), state(model))
    for left, right in zip(optimizer.state.values(), its.state.values(), strict=True):
        assert equal(left, right)


@pytest.mark.parametrize("base", ["auto", "compact", "dense"])
def test_bases_may_be_stored_as_columns(tmp_path: Path, base: orthoserde.api.Base) -> None:
    model = orthoserde.orthogonal(nn.Linear(32, 2))
    report = orthoserde.save(model, tmp_path / "folder", base=base, max_shard_size=100)
    assert report.compact == (() if base == "dense" else ("weight",))
    other = orthoserde.orthogonal(nn.Linear(32, 2))
    orthoserde.load(other, tmp_path / "folder")
    assert equal(state(other), state(model))


def test_build_makes_the_model_from_the_folder(tmp_path: Path) -> None:
    from orthoserde.integrations import loreft  # noqa: PLC0415

    model = loreft.LoReFT(16, rank=4)
    orthoserde.save(model, tmp_path / "folder", max_shard_size=64)
    assert equal(state(orthoserde.build(tmp_path / "folder")), state(model))


def test_the_same_state_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "other"):
        orthoserde.save(make(1.0), tmp_path / name, max_shard_size=LIMIT)
    for name in names(tmp_path / "one"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()


def test_a_folder_can_be_copied_into_a_single_file_and_back(folder: Path, tmp_path: Path) -> None:
    with storage.read(folder) as checkpoint:
        storage.write(checkpoint, tmp_path / "single")
    orthoserde.save(make(1.0), tmp_path / "direct")
    assert (tmp_path / "single").read_bytes() == (tmp_path / "direct").read_bytes()
    with storage.read(tmp_path / "single") as checkpoint:
        storage.write_shards(checkpoint, tmp_path / "again", LIMIT)
    assert equal(loaded(tmp_path / "again"), state(make(1.0)))


def test_other_readers_of_safetensors_find_the_tensors(folder: Path) -> None:
    expected = {key: tensor for key, tensor in state(make(1.0)).items() if key != "2.weight"}
    assert equal(as_transformers_reads(folder), expected)


# One file, shards, and what stood there before


def test_what_fits_into_one_shard_is_one_file(tmp_path: Path) -> None:
    report = orthoserde.save(make(1.0), tmp_path / "folder", max_shard_size="1GB")
    assert names(tmp_path / "folder") == [SINGLE]
    assert report.file_bytes == (tmp_path / "folder" / SINGLE).stat().st_size
    assert equal(loaded(tmp_path / "folder"), state(make(1.0)))


def test_a_model_without_tensors_is_one_file(tmp_path: Path) -> None:
    orthoserde.save(nn.ReLU(), tmp_path / "folder", max_shard_size=1)
    assert names(tmp_path / "folder") == [SINGLE]


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


def test_a_folder_that_was_made_for_a_save_that_fails_goes_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(FileAccessError, match="No space left"):
        orthoserde.save(make(), tmp_path / "new", max_shard_size=LIMIT)
    assert names(tmp_path) == []


# Sizes and the splitter


@pytest.mark.parametrize(
    ("text", "expected"),
    [("5GB", 5 * 10**9), (" 1.5 mb", 1_500_000), ("2TB", 2 * 10**12), ("1KB", 1000), (1, 1), (2**70, 2**70)],
)
def test_sizes_are_read_as_hugging_face_reads_them(text: int | str, expected: int) -> None:
    assert byte_limit(text) == expected


@pytest.mark.parametrize("size", [0, -1, True, 1.5, "", "5", "5GiB", "GB", "-5GB", "nanGB", "infGB", "1e3KB", "0KB"])
def test_what_is_no_size_is_refused_before_anything_is_written(tmp_path: Path, size: object) -> None:
    with pytest.raises(ConfigError, match="max_shard_size: expected a number of bytes"):
        orthoserde.save(make(), tmp_path / "folder", max_shard_size=size)  # type: ignore[arg-type]
    assert names(tmp_path) == []


def test_without_huggingface_hub_a_save_says_what_to_install_and_a_load_does_not_need_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingPackageError, match=r'pip install "orthoserde\[hub\]"'):
        orthoserde.save(make(), tmp_path / "new", max_shard_size=LIMIT)
    assert not (tmp_path / "new").exists()
    assert equal(loaded(folder), state(make(1.0)))


def test_shards_are_those_of_huggingface_hub(tmp_path: Path) -> None:
    from huggingface_hub import split_torch_state_dict_into_shards  # noqa: PLC0415

    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(width, width + 1) for width in (3, 50, 8, 9, 30, 2)))
    orthoserde.save(model, tmp_path / "folder", max_shard_size="1KB")
    expected = split_torch_state_dict_into_shards(
        model.state_dict(), filename_pattern="model{suffix}.safetensors", max_shard_size="1KB"
    )
    index = json.loads((tmp_path / "folder" / INDEX).read_text())
    assert index["weight_map"] == expected.tensor_to_filename
    assert index["metadata"]["total_size"] == expected.metadata["total_size"]


# Open files


def test_a_checkpoint_owns_its_files_and_closes_them(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[int] = []
    open_ = os.open

    def recording(*arguments: object) -> int:
        opened.append(open_(*arguments))  # type: ignore[arg-type]
        return opened[-1]

    monkeypatch.setattr(os, "open", recording)
    checkpoint = storage.read(folder)
    assert len(opened) == 1 + 4
    for name in names(folder):
        (folder / name).unlink()
    checkpoint.read(checkpoint.sources, verify=True)  # whatever becomes of the names
    checkpoint.close()
    checkpoint.close()
    for descriptor in opened:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)


@pytest.mark.parametrize("damage", ["the last shard is missing", "the last shard is damaged"])
def test_no_descriptor_stays_open_where_a_shard_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    last = folder / shards(folder)[-1]
    last.unlink() if "missing" in damage else last.write_bytes(b"damaged")
    opened: list[int] = []
    open_ = os.open

    def recording(*arguments: object) -> int:
        opened.append(open_(*arguments))  # type: ignore[arg-type]
        return opened[-1]

    monkeypatch.setattr(os, "open", recording)
    with pytest.raises(FileFormatError):
        storage.read(folder)
    assert len(opened) >= 4
    for descriptor in opened:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)


def test_of_many_shards_some_are_opened_when_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "folder"
    storage.write_shards(checkpoint_of({f"{i:03d}": torch.full((4,), i) for i in range(300)}), folder, 1)
    with storage.read(folder) as checkpoint:
        reopened = [key for key, source in checkpoint.sources.items() if type(source.file) is ReopenedFile]  # type: ignore[attr-defined]
        assert len(reopened) == 300 - reading.KEPT_OPEN
        monkeypatch.chdir(tmp_path)
        for i, tensor in enumerate(checkpoint.read(sorted(checkpoint.sources), verify=True).values()):
            assert tensor.tolist() == [i] * 4


def test_a_shard_that_is_opened_again_has_to_be_the_same_file(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "KEPT_OPEN", 0)
    with storage.read(folder) as checkpoint:
        for name in shards(folder):
            shutil.copy2(folder / name, tmp_path / "copy")
            (tmp_path / "copy").replace(folder / name)
        with pytest.raises(FileFormatError, match="the file changed while it was read"):
            checkpoint.read(checkpoint.sources, verify=False)


@posix
def test_a_relative_path_is_that_of_the_folder_where_the_load_began(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "KEPT_OPEN", 0)
    monkeypatch.chdir(folder)
    for path in (".", INDEX):
        with storage.read(path) as checkpoint:
            monkeypatch.chdir(tmp_path)
            checkpoint.read(checkpoint.sources, verify=True)
        monkeypatch.chdir(folder)


# A save and a load at the same time


def test_a_load_goes_on_with_the_new_checkpoint_where_one_replaces_the_other_meanwhile(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    later = [lambda: orthoserde.save(make(2.0), folder, max_shard_size=LIMIT)]

    def interrupted(*arguments: object) -> object:
        found = decode_index(*arguments)  # type: ignore[arg-type]
        if later:
            later.pop()()
        return found

    monkeypatch.setattr(reading, "decode_index", interrupted)
    assert equal(loaded(folder), state(make(2.0)))


def test_a_load_goes_on_where_one_form_replaces_the_other_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "folder"
    orthoserde.save(make(1.0), folder, max_shard_size="1GB")
    later = [lambda: orthoserde.save(make(2.0), folder, max_shard_size=LIMIT)]

    def interrupted(path: str) -> object:
        if later:
            later.pop()()
        return storage.read_file(path)

    monkeypatch.setattr(reading, "read_file", interrupted)
    assert equal(loaded(folder), state(make(2.0)))
