"""Folders that other libraries wrote: read as they are, without configuration."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor, nn

import orthoserde
from orthoserde import storage
from orthoserde.errors import ConfigError, DamagedFileError, FileFormatError
from orthoserde.storage.shards.names import READ_IN_ORDER
from orthoserde.storage.torch_files import SAFE_TORCH
from tests.helpers import assert_unchanged, snapshot
from tests.storage.shard_cases import INDEX, SINGLE, equal, loaded, make, names, state

BIN_INDEX = "pytorch_model.bin.index.json"

Step = Callable[[Path], object]

needs_reader = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < SAFE_TORCH, reason="pickles are refused before torch 2.6"
)


def save_as_hub(model: nn.Module, folder: Path, size: int | str, *, pickles: bool = False) -> Path:
    folder.mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about pickles
        save_torch_state_dict(
            model.state_dict(),
            folder,
            max_shard_size=size,
            safe_serialization=not pickles,
            filename_pattern="pytorch_model{suffix}.bin" if pickles else "model{suffix}.safetensors",
        )
    return folder


@pytest.mark.parametrize("size", [300, "1GB"])
@pytest.mark.parametrize("pickles", [False, pytest.param(True, marks=needs_reader)])
def test_what_huggingface_hub_wrote_is_loaded(tmp_path: Path, size: int | str, pickles: bool) -> None:
    folder = save_as_hub(make(1.0), tmp_path / "folder", size, pickles=pickles)
    assert (len(names(folder)) > 2) == (size == 300)
    assert equal(loaded(folder), state(make(1.0)))
    manifest = orthoserde.inspect(folder)
    assert not manifest.has_configuration
    assert {*manifest.tensors, *manifest.aliases} == set(state(make()))
    report = orthoserde.verify(folder)
    assert not report.digests
    model = make()
    assert orthoserde.load(model, folder).fidelity is orthoserde.Fidelity.UNVERIFIED


def test_aliases_are_found_in_the_index(tmp_path: Path) -> None:
    folder = save_as_hub(make(1.0), tmp_path / "folder", 300)
    assert dict(orthoserde.inspect(folder).aliases) == {"2.weight": "1.weight"}


def test_the_index_by_itself_is_enough(tmp_path: Path) -> None:
    folder = save_as_hub(make(1.0), tmp_path / "folder", 300)
    assert equal(loaded(folder / INDEX), state(make(1.0)))


def test_the_order_is_that_of_transformers_and_then_of_diffusers() -> None:
    assert READ_IN_ORDER == (
        "model.safetensors",
        "model.safetensors.index.json",
        "diffusion_pytorch_model.safetensors",
        "diffusion_pytorch_model.safetensors.index.json",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
    )


@pytest.mark.parametrize("first", range(len(READ_IN_ORDER)))
@needs_reader
def test_of_several_forms_the_first_of_the_order_is_read(tmp_path: Path, first: int) -> None:
    for number, name in list(enumerate(READ_IN_ORDER))[first:]:
        content = {"number": torch.tensor(number)}
        if name.endswith(".index.json"):
            ending = ".bin" if ".bin" in name else ".safetensors"
            shard = f"shard-{number}{ending}"
            (tmp_path / name).write_text(json.dumps({"metadata": {}, "weight_map": {"number": shard}}))
            name = shard
        (torch.save if name.endswith(".bin") else safetensors.torch.save_file)(content, tmp_path / name)
    with storage.read(tmp_path) as checkpoint:
        assert checkpoint.tensor("number").item() == first


def test_a_folder_with_nothing_of_the_kind_says_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    for call in (orthoserde.inspect, orthoserde.verify, orthoserde.build, lambda path: orthoserde.load(make(), path)):
        with pytest.raises(FileFormatError, match="a folder without a checkpoint; looked for") as caught:
            call(tmp_path)
        assert all(name in str(caught.value) for name in READ_IN_ORDER)


def test_what_has_no_configuration_cannot_be_written_as_shards(tmp_path: Path) -> None:
    folder = save_as_hub(make(), tmp_path / "folder", 300)
    with storage.read(folder) as checkpoint, pytest.raises(ConfigError, match="no configuration"):
        storage.write_shards(checkpoint, tmp_path / "new", 300)
    assert not (tmp_path / "new").exists()


# What is not sound


def index(weight_map: dict[str, Any], name: str = INDEX, **rest: Any) -> Step:
    return lambda folder: (folder / name).write_text(json.dumps({"weight_map": weight_map, **rest}))


def shard(name: str, *keys: str) -> Step:
    tensors: dict[str, Tensor] = {key: torch.zeros(2) for key in keys}
    write = torch.save if name.endswith(".bin") else safetensors.torch.save_file
    return lambda folder: write(tensors, folder / name)


def save_ours(folder: Path) -> None:
    orthoserde.save(nn.Linear(2, 2), folder / "a.safetensors")


UNSOUND: dict[str, tuple[list[Step], str]] = {
    "a missing shard": ([index({"a": "a.safetensors"})], "this shard is missing"),
    "a missing pickle": ([index({"a": "a.bin"}, BIN_INDEX)], "this shard is missing"),
    "a tensor that is not there": (
        [index({"a": "a.safetensors", "b": "a.safetensors"}), shard("a.safetensors", "a")],
        "the index names a tensor that is not in it, 'b'",
    ),
    "a tensor more": ([index({"a": "a.safetensors"}), shard("a.safetensors", "a", "b")], "holds a tensor more, 'b'"),
    "a tensor twice": (
        [
            index({"a": "a.safetensors", "b": "b.safetensors"}),
            shard("a.safetensors", "a"),
            shard("b.safetensors", "a", "b"),
        ],
        "it holds a tensor more, 'a'",
    ),
    "a pickle in the index of safetensors": ([index({"a": "a.bin"}), shard("a.bin", "a")], "name of a .safetensors"),
    "a safetensors file in the index of pickles": (
        [index({"a": "a.safetensors"}, BIN_INDEX), shard("a.safetensors", "a")],
        "name of a .bin file",
    ),
    "a safetensors file that is called a pickle": (
        [
            index({"a": "a.bin"}, BIN_INDEX),
            shard("a.safetensors", "a"),
            lambda folder: shutil.move(folder / "a.safetensors", folder / "a.bin"),
        ],
        "expected a file of torch.save",
    ),
    "a pickle that is called a safetensors file": (
        [
            index({"a": "a.safetensors"}),
            shard("a.bin", "a"),
            lambda folder: shutil.move(folder / "a.bin", folder / "a.safetensors"),
        ],
        "no safetensors header",
    ),
    "a path among pickles": ([index({"a": "../a.bin"}, BIN_INDEX)], "name of a .bin file in the same folder"),
    "a checkpoint of ours in the index of another library": (
        [save_ours, index({"weight": "a.safetensors", "bias": "a.safetensors"})],
        "lacks the manifest",
    ),
    "the text of a manifest beside the metadata": (
        [index({"a": "a.safetensors"}, orthoserde='{"digest":"'), shard("a.safetensors", "a")],
        "stands under another key",
    ),
}


@needs_reader
@pytest.mark.parametrize("case", UNSOUND)
def test_what_is_not_sound_is_refused(tmp_path: Path, case: str) -> None:
    steps, message = UNSOUND[case]
    for step in steps:
        step(tmp_path)
    model = make()
    before = snapshot(model)
    with pytest.raises(FileFormatError) as caught:
        orthoserde.load(model, tmp_path)
    assert message in str(caught.value)
    assert_unchanged(model, before)


def test_a_checkpoint_of_ours_under_its_usual_name_is_found_in_its_folder(tmp_path: Path) -> None:
    orthoserde.save(make(1.0), tmp_path / SINGLE)
    model = make()
    assert orthoserde.load(model, tmp_path).fidelity is orthoserde.Fidelity.EXACT
    assert equal(state(model), state(make(1.0)))


def test_a_damaged_shard_of_another_library_is_refused(tmp_path: Path) -> None:
    folder = save_as_hub(make(1.0), tmp_path / "folder", 300)
    path = folder / "model-00001-of-00004.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DamagedFileError, match="truncated"):
        orthoserde.load(make(), folder)
