"""What is given for a path and is none is named, before anything is opened or written."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import orthoserde
from orthoserde import FileAccessError
from orthoserde.integrations import pyreft

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
        orthoserde.Checkpoints(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^folder: expected a str or an os\.PathLike, got NoneType$"):
        pyreft.write(tmp_path / "m", None)  # type: ignore[arg-type]


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


def test_a_state_dict_is_no_model(tmp_path: Path) -> None:
    state: Any = nn.Linear(2, 2).state_dict()
    with pytest.raises(
        TypeError, match=r"expected an nn\.Module, got OrderedDict; give the model itself, not its state "
    ):
        orthoserde.save(state, tmp_path / "m")
