"""Checkpoints in shards: what is written, read back, replaced and removed."""

from __future__ import annotations

import json
import os
import shutil
import sys
import types
from collections.abc import Mapping
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import orthoserde
from orthoserde import storage
from orthoserde.errors import ConfigError, FileFormatError, MissingPackageError
from orthoserde.json_values import JSON
from orthoserde.manifest import Manifest, as_json
from orthoserde.storage import format
from orthoserde.storage.open_file import ReopenedFile
from orthoserde.storage.shards import reading
from orthoserde.storage.shards.index import decode_index
from orthoserde.storage.shards.splitting import byte_limit
from tests.helpers import assert_unchanged, snapshot
from tests.storage.shard_cases import (
    INDEX,
    LIMIT,
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


def test_a_save_encodes_its_manifest_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[int] = []
    encode = as_json.encode_manifest

    def watched(manifest: Manifest, *digests: Mapping[str, str] | None) -> JSON:
        encoded.append(len(manifest.tensors))
        return encode(manifest, *digests)

    monkeypatch.setattr(format, "encode_manifest", watched)
    orthoserde.save(make(), tmp_path / "folder", max_shard_size=100)
    assert len(shards(tmp_path / "folder")) > 1
    assert len(encoded) == 1


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


def test_prove_takes_a_folder(folder: Path) -> None:
    proof = orthoserde.prove(folder, make, step, steps=1)
    assert proof.grade is orthoserde.Grade.DETERMINISTIC  # there is no reference


def step(model: nn.Module) -> torch.Tensor:
    return sum((parameter.square().sum() for parameter in model.parameters()), torch.zeros(()))


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


def test_a_huggingface_hub_that_is_too_old_is_as_if_there_were_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def as_in_0_23(state_dict: object, *, get_tensor_size: object, max_shard_size: int) -> None:
        raise AssertionError

    old = types.ModuleType("huggingface_hub")
    monkeypatch.setattr(old, "split_state_dict_into_shards_factory", as_in_0_23, raising=False)
    monkeypatch.setitem(sys.modules, "huggingface_hub", old)
    with pytest.raises(MissingPackageError, match=r"0\.24 or newer"):
        orthoserde.save(make(), tmp_path / "new", max_shard_size=LIMIT)


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
