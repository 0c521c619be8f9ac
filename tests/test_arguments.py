"""What is given for a path and is none is named, before anything is opened or written."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import orthoserde
from orthoserde import FileAccessError
from orthoserde.integrations import pyreft
from orthoserde.integrations.loreft import LoReFT, attach
from tests.helpers import assert_unchanged, snapshot


def untyped(given: object) -> Any:
    """An argument of a type that a type checker would not let through."""
    return given


READERS: dict[str, Callable[[Any], object]] = {
    "load": lambda path: orthoserde.load(nn.Linear(2, 2), path),
    "build": orthoserde.build,
    "inspect": orthoserde.inspect,
    "verify": orthoserde.verify,
    "prove": lambda path: orthoserde.prove(path, nn.Identity, len),
}
WRITERS: dict[str, Callable[[Any], object]] = {
    "save": lambda path: orthoserde.save(nn.Linear(2, 2), path),
    "save in shards": lambda path: orthoserde.save(nn.Linear(2, 2), path, max_shard_size="1GB"),
}


@pytest.mark.parametrize("name", READERS)
def test_an_empty_path_is_no_checkpoint(name: str) -> None:
    """Made absolute it would be the folder where the process is."""
    with pytest.raises(orthoserde.CheckpointNotFoundError, match="no such checkpoint: ''"):
        READERS[name]("")


@pytest.mark.parametrize("given", [None, 3, nn.Linear(2, 2)], ids=lambda given: type(given).__name__)
@pytest.mark.parametrize("name", [*READERS, *WRITERS])
def test_what_is_no_path_is_a_type_error(name: str, given: object) -> None:
    expected = rf"^path: expected a str or an os\.PathLike, got {type(given).__name__}(;|$)"
    with pytest.raises(TypeError, match=expected):
        {**READERS, **WRITERS}[name](given)


def test_other_arguments_that_are_paths_are_named(tmp_path: Path) -> None:
    orthoserde.save(nn.Linear(2, 2), tmp_path / "m")
    places: Any = (None, tmp_path / "m"), (tmp_path / "m", None)
    for argument, (source, target) in zip(("source", "target"), places, strict=True):
        with pytest.raises(TypeError, match=f"^{argument}: expected a str or an os"):
            orthoserde.convert(source, target, "baked")
    with pytest.raises(TypeError, match=r"^folder: expected a str or an os\.PathLike, got int$"):
        orthoserde.Checkpoints(untyped(3))
    with pytest.raises(TypeError, match=r"^folder: expected a str or an os\.PathLike, got NoneType$"):
        pyreft.write(tmp_path / "m", untyped(None))


def test_the_latest_of_an_empty_folder_is_explained(tmp_path: Path) -> None:
    latest: Any = orthoserde.Checkpoints(tmp_path).latest()
    with pytest.raises(
        TypeError, match=r"got NoneType; Checkpoints\.latest\(\) and best are None where a folder has no "
    ):
        orthoserde.load(nn.Linear(2, 2), latest)


@pytest.mark.parametrize("size", [None, "1GB"])
def test_a_folder_that_is_not_there_is_named(tmp_path: Path, size: str | None) -> None:
    with pytest.raises(FileAccessError, match="checkpoint, for there is no folder ") as caught:
        orthoserde.save(nn.Linear(2, 2), tmp_path / "missing" / "m", max_shard_size=size)
    assert f"no folder {os.path.realpath(tmp_path / 'missing')}; make it first: " in str(caught.value)
    assert not (tmp_path / "missing").exists()


@pytest.mark.parametrize("name", ["ckpt/", "ckpt/.", "ckpt/..", ".", "there/"])
def test_one_file_is_not_saved_under_the_name_of_a_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system would drop the end of the name, and the report would give a path that cannot be opened."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    model = nn.Linear(2, 2)
    with pytest.raises(
        orthoserde.ConfigError, match=r"ends as the name of a folder does.*; max_shard_size saves into a folder$"
    ):
        orthoserde.save(model, name)
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]
    report = orthoserde.save(model, "ckpt/", max_shard_size="1GB")
    assert orthoserde.load(model, report.path).fidelity is orthoserde.Fidelity.EXACT


def test_a_state_dict_is_no_model(tmp_path: Path) -> None:
    state: Any = nn.Linear(2, 2).state_dict()
    with pytest.raises(
        TypeError, match=r"expected an nn\.Module, got OrderedDict; give the model itself, not its state "
    ):
        orthoserde.save(state, tmp_path / "m")


def test_arguments_in_another_order_are_pointed_out(tmp_path: Path) -> None:
    model: Any = nn.Linear(2, 2)
    for action in (orthoserde.save, orthoserde.load):
        with pytest.raises(
            TypeError, match=r"^model: expected an nn\.Module, got str; the model comes first, then the "
        ):
            action(untyped(str(tmp_path / "m")), model)
    with pytest.raises(TypeError, match=r"^model: expected an nn\.Module, got SGD$"):
        orthoserde.diagnose(untyped(torch.optim.SGD(model.parameters(), lr=0.1)), model)


FLAGS: dict[str, Callable[[Path, Any], object]] = {
    "rng of a save": lambda path, given: orthoserde.save(nn.Linear(2, 2), path, rng=given),
    "rng of a load": lambda path, given: orthoserde.load(nn.Linear(2, 2), path, rng=given),
    "strict": lambda path, given: orthoserde.load(nn.Linear(2, 2), path, strict=given),
    "verify": lambda path, given: orthoserde.load(nn.Linear(2, 2), path, verify=given),
    "reparametrize": lambda path, given: orthoserde.load(nn.Linear(2, 2), path, reparametrize=given),
    "include_weights": lambda path, given: orthoserde.save(nn.Linear(2, 2), path, include_weights=given),
    "force": lambda path, given: orthoserde.convert(path, path.with_name("x"), "dense", force=given),
    "freeze": lambda path, given: attach(nn.Sequential(nn.Linear(2, 2)), {"0": LoReFT(2, 1)}, freeze=given),
    "structured": lambda path, given: orthoserde.orthogonal(nn.Linear(2, 2), structured=given),
    "reset_state": lambda path, given: orthoserde.canonicalize_(nn.Linear(2, 2), reset_state=given),
    "wait": lambda path, given: orthoserde.Checkpoints(path.parent).save(1, nn.Linear(2, 2), wait=given),
}


@pytest.mark.parametrize("given", ["no", 1, None, torch.Generator()], ids=lambda given: type(given).__name__)
@pytest.mark.parametrize("name", FLAGS)
def test_what_is_neither_true_nor_false_is_a_type_error(name: str, given: object, tmp_path: Path) -> None:
    """A generator that is given as ``rng`` would be read as True, and would not be saved."""
    orthoserde.save(nn.Linear(2, 2), tmp_path / "m")
    before = (tmp_path / "m").read_bytes()
    flag = name.partition(" ")[0]
    expected = rf"^{flag}: expected True or False, got {type(given).__name__}" + (
        "; a generator of your own goes into state=$" if isinstance(given, torch.Generator) else "$"
    )
    with pytest.raises(TypeError, match=expected):
        FLAGS[name](tmp_path / "m", given)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    assert (tmp_path / "m").read_bytes() == before


def test_a_bool_of_numpy_is_true_or_false(tmp_path: Path) -> None:
    model, true = nn.Linear(2, 2), untyped(np.True_)
    orthoserde.save(model, tmp_path / "m", rng=true)
    orthoserde.load(model, tmp_path / "m", strict=true, rng=true, verify=true)


def test_other_arguments_say_what_they_got(tmp_path: Path) -> None:
    model, path = nn.Linear(2, 2), tmp_path / "m"
    orthoserde.save(model, path)
    metadata: Any
    for metadata, text in (
        ("hello", "metadata: expected a mapping of strings to strings, got str"),
        ({"lr": 0.1}, r"metadata: expected strings, got str to float under 'lr'; str\(\.\.\.\) makes one"),
    ):
        with pytest.raises(orthoserde.ConfigError, match=text):
            orthoserde.save(model, path, metadata=metadata)
    with pytest.raises(
        orthoserde.ConfigError, match="legacy: expected one of inference, refuse, project, keep, got 'x'"
    ):
        orthoserde.load(model, path, legacy=untyped("x"))
    with pytest.raises(orthoserde.ConfigError, match="device: expected a device with memory, got 'meta'"):
        orthoserde.load(model, path, device="meta")
    scheduler: Any = torch.optim.lr_scheduler.StepLR(torch.optim.SGD(model.parameters(), lr=0.1), 1)
    with pytest.raises(TypeError, match=r"expected a torch\.optim\.Optimizer, got StepLR; it goes into state="):
        orthoserde.save(model, path, optimizer=scheduler)
    with pytest.raises(TypeError, match=r"expected a torch\.optim\.Optimizer, got list; several go in by names"):
        orthoserde.save(model, path, optimizer=untyped([scheduler.optimizer]))


@pytest.mark.parametrize("given", ["x", {"a": 1}, orthoserde.Registry], ids=str)
def test_what_is_no_registry_is_a_type_error(tmp_path: Path, given: object) -> None:
    model, path = nn.Linear(2, 2), tmp_path / "m"
    orthoserde.save(model, path)
    expected = rf"^registry: expected an orthoserde\.Registry, got {type(given).__name__}$"
    for call in (
        lambda registry: orthoserde.save(model, path, registry=registry),
        lambda registry: orthoserde.load(model, path, registry=registry),
        lambda registry: orthoserde.build(path, registry=registry),
        lambda registry: orthoserde.verify(path, registry=registry),
        lambda registry: orthoserde.convert(path, tmp_path / "x", "baked", registry=registry),
        lambda registry: orthoserde.bake_(model, registry=registry),
    ):
        with pytest.raises(TypeError, match=expected):
            call(untyped(given))


def test_one_file_is_not_saved_under_the_name_of_an_index(tmp_path: Path) -> None:
    model, path = nn.Linear(2, 2), tmp_path / "m.safetensors.index.json"
    with pytest.raises(orthoserde.ConfigError, match="would be read as the index of shards; give a name that ends in"):
        orthoserde.save(model, path)
    orthoserde.save(model, tmp_path / "m")
    with pytest.raises(orthoserde.ConfigError, match="would be read as the index of shards; give a name that ends in"):
        orthoserde.convert(tmp_path / "m", path, "dense")
    assert [each.name for each in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("device", ["gpu", "", "cpu:x", "cuda:9999", "meta", 2**70, "hpu"])
def test_a_device_that_cannot_be_used_is_refused_before_anything_changes(tmp_path: Path, device: Any) -> None:
    registry = orthoserde.Registry()
    registered = registry.register("tests.arguments>Layer")(Layer)
    orthoserde.save(registered(), tmp_path / "m", registry=registry)
    model = registered()
    before = snapshot(model)
    with pytest.raises(orthoserde.ConfigError, match=r"^device: "):
        orthoserde.load(model, tmp_path / "m", registry=registry, device=device)
    with pytest.raises(orthoserde.ConfigError, match=r"^device: "):
        orthoserde.build(tmp_path / "m", registry=registry, device=device)
    assert_unchanged(model, before)


class Layer(nn.Linear):
    """Can be built from nothing."""

    def __init__(self) -> None:
        super().__init__(2, 2)


@pytest.mark.parametrize("device", [object(), True, 1.5], ids=str)
def test_what_is_no_device_is_a_type_error(tmp_path: Path, device: object) -> None:
    orthoserde.save(nn.Linear(2, 2), tmp_path / "m")
    with pytest.raises(TypeError, match=r"^device: expected a torch\.device or a name such as 'cuda:0', got "):
        orthoserde.load(nn.Linear(2, 2), tmp_path / "m", device=untyped(device))


@pytest.mark.parametrize("folder", ["a\0b", "a\ud800b"], ids=ascii)
def test_a_folder_of_checkpoints_that_no_file_system_can_have_is_refused(tmp_path: Path, folder: str) -> None:
    with pytest.raises(FileAccessError, match=r"null|surrogate"):
        orthoserde.Checkpoints(f"{tmp_path}/{folder}")


def test_torchscript_is_refused(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer torches say that TorchScript is deprecated
        script = torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2))  # type: ignore[no-untyped-call]
    for model, where in ((script, r"\(model\)"), (nn.Sequential(script), "0")):
        with pytest.raises(
            orthoserde.UnsupportedModuleError, match=f"{where}: TorchScript holds its tensors; use the "
        ):
            orthoserde.save(model, tmp_path / "m")
        assert list(tmp_path.iterdir()) == []


def test_a_folder_of_checkpoints_is_read_by_its_latest(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    checkpoints = orthoserde.Checkpoints(tmp_path / "run")
    checkpoints.save(7, model)
    text = "give the path of one, such as orthoserde.Checkpoints(folder).latest(); looked for model.safetensors, "
    with pytest.raises(orthoserde.FileFormatError, match=re.escape(text)):
        orthoserde.load(model, tmp_path / "run")
    (tmp_path / "other").mkdir()
    orthoserde.save(model, tmp_path / "other" / "of-mine.safetensors")
    with pytest.raises(
        orthoserde.FileFormatError, match=r"it holds of-mine\.safetensors: give the path of one; looked "
    ):
        orthoserde.load(model, tmp_path / "other")


@pytest.mark.skipif(torch.__version__ < "2.6", reason="refused with an older torch, whatever it is")
@pytest.mark.parametrize("before", [{}, {"epoch": 3}, {"config": {"lr": 0.1}}, {"optimizer": {"state": {}}}], ids=str)
def test_a_state_dict_within_others_is_taken_out_as_the_refusal_says(tmp_path: Path, before: dict[str, Any]) -> None:
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    path, other_path = tmp_path / "m.pt", tmp_path / "other.pt"
    torch.save({**before, "model": model.state_dict(), "epoch": 3}, path)
    advice = "torch.save(torch.load(path, map_location='cpu')['model'], other_path)"
    with pytest.raises(orthoserde.FileFormatError, match=re.escape(f"save it by itself: {advice}")):
        orthoserde.load(other, path)
    exec(advice, {"torch": torch, "path": path, "other_path": other_path})  # noqa: S102 - the advice is run as it is read
    orthoserde.load(other, other_path)
    assert torch.equal(model.weight, other.weight)
    torch.save({**model.state_dict(), "epoch": 3}, path)
    with pytest.raises(orthoserde.FileFormatError, match="got int under 'epoch'; save the state dict of the model by "):
        orthoserde.load(other, path)
