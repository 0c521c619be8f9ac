"""pyreft's folders without a model: what they hold, whether it is sound, and folders of the other form."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import orthoserde
from orthoserde import ConfigError, DamagedFileError, FileAccessError, FileFormatError, Registry, comparison
from orthoserde.conversion import PLAIN, PYREFT, convert
from orthoserde.opening import is_pyreft, open_checkpoint, stored_bytes
from tests.helpers import bits
from tests.integrations.stand_ins import (
    RANK,
    WIDTH,
    ConsreftIntervention,
    LoreftIntervention,
    Mine,
    ReftModel,
    base_of,
    key_of,
    make,
    original_of,
    weight_of,
)
from tests.integrations.test_pyreft_folders import (
    TOO_OLD,
    UNREADABLE,
    adam,
    complete,
    file_of,
    needs_reader,
    save,
    train,
)

NAME = f"interventions.{key_of(0)}.rotate_layer.weight"


@pytest.fixture
def model() -> ReftModel:
    model = make(LoreftIntervention, ConsreftIntervention)
    train(model, 3, adam(model))
    return model


@pytest.fixture
def legacy(model: ReftModel, tmp_path: Path) -> Path:
    return save(model, tmp_path / "legacy")


@pytest.fixture
def full(model: ReftModel, tmp_path: Path) -> Path:
    folder = save(model, tmp_path / "full")
    first = next(iter(model.interventions))
    kept = {name: each for name, each in model.interventions.items() if name == first}
    return complete(folder, ReftModel(kept, torch.nn.Linear(1, 1)))  # type: ignore[arg-type]


@needs_reader
def test_a_legacy_folder_has_computed_weights(legacy: Path, model: ReftModel) -> None:
    manifest = orthoserde.inspect(legacy)
    assert not manifest.has_configuration
    assert manifest.tensors[NAME].shape == (WIDTH, RANK)
    # The other class saves its state as torch names it.
    (record,) = manifest.parametrized
    assert record.name == NAME.replace(key_of(0), key_of(1))
    report = orthoserde.verify(legacy)
    assert report.ok
    assert report.residuals.keys() == {NAME, record.name}
    assert all(residual is not None and residual < 1e-5 for residual in report.residuals.values())


@needs_reader
def test_a_full_folder_has_the_state_and_its_configuration(full: Path, model: ReftModel) -> None:
    with open_checkpoint(full) as checkpoint:
        assert checkpoint.manifest.parametrized[0].name == NAME
        intervention = model.interventions[key_of(0)]
        prefix = NAME.replace("rotate_layer.weight", "rotate_layer.parametrizations.weight")
        assert bits(checkpoint.tensor(f"{prefix}.original")) == bits(original_of(intervention))
        assert bits(checkpoint.tensor(f"{prefix}.0.base")) == bits(base_of(intervention))
        assert NAME not in checkpoint.manifest
    assert orthoserde.verify(full).ok
    assert stored_bytes(full) == sum(path.stat().st_size for path in full.iterdir())


@needs_reader
def test_damage_by_a_resume_from_a_legacy_folder_is_found(model: ReftModel, tmp_path: Path) -> None:
    other = make(LoreftIntervention, ConsreftIntervention, seed=5)
    intervention = other.interventions[key_of(0)]
    with torch.no_grad():  # as pyreft's loader does
        base_of(intervention)[:, :RANK] = weight_of(model.interventions[key_of(0)])
        original_of(intervention).zero_().fill_diagonal_(-1.0)
    folder = save(other, tmp_path / "folder")
    kept = ReftModel({key_of(0): intervention}, torch.nn.Linear(1, 1))  # type: ignore[dict-item]
    report = orthoserde.verify(complete(folder, kept))
    assert report.residuals[NAME] is not None
    assert "base is off orthogonality" in report.misfits[NAME]
    assert not report.ok
    train(other, 1, adam(other))
    report = orthoserde.verify(save(other, tmp_path / "later"))
    assert report.off_constraint == (NAME,)
    advice = "its columns are not orthonormal; load the folder with legacy='project', or one from before"
    assert report.causes == {NAME: advice}


def test_a_file_of_ours_shows_the_same_damage(tmp_path: Path) -> None:
    layer = torch.nn.utils.parametrizations.orthogonal(torch.nn.Linear(8, 3))
    other = torch.nn.utils.parametrizations.orthogonal(torch.nn.Linear(8, 3))
    base = layer.parametrizations.weight[0].base  # type: ignore[union-attr, index]
    with torch.no_grad():
        base[:, :3] = other.weight.T
    orthoserde.save(layer, tmp_path / "m", base="dense")
    report = orthoserde.verify(tmp_path / "m")
    assert report.residuals["weight"] is not None
    assert report.residuals["weight"] < 1e-5
    assert "leaves the constraint with the next step" in report.misfits["weight"]


@needs_reader
def test_a_folder_of_the_trainer_is_found(legacy: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoint-3").mkdir()
    (legacy / "config.json").unlink()
    legacy.rename(tmp_path / "checkpoint-3" / "intervenable_model")
    assert NAME in orthoserde.inspect(tmp_path / "checkpoint-3").tensors


def test_another_folder_is_none(tmp_path: Path) -> None:
    assert not is_pyreft(str(tmp_path))
    assert not is_pyreft(str(tmp_path / "none"))
    with pytest.raises(FileFormatError):
        orthoserde.inspect(tmp_path)


@pytest.mark.parametrize("look", [orthoserde.inspect, orthoserde.verify, stored_bytes])
def test_a_folder_that_the_system_will_not_read_is_named(
    look: Callable[[Path], object], legacy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(path: object) -> list[str]:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "listdir", forbidden)
    with pytest.raises(FileAccessError, match="cannot read the folder: Permission denied") as caught:
        look(legacy)
    assert caught.value.filename == str(legacy)


@needs_reader
def test_full_to_legacy_and_back(full: Path, legacy: Path, model: ReftModel, tmp_path: Path) -> None:
    report = convert(full, tmp_path / "a", "pyreft")
    assert report.sort == PYREFT
    assert not report.notes
    assert (tmp_path / "a" / "config.json").read_bytes() == (full / "config.json").read_bytes()
    for name in (file_of(0), file_of(1)):
        ours, theirs = (torch.load(folder / name, weights_only=True) for folder in (tmp_path / "a", legacy))
        assert list(ours) == list(theirs)
        assert all(bits(ours[key]) == bits(theirs[key]) for key in ours)
    report = convert(tmp_path / "a", tmp_path / "b", "pyreft-full")
    assert "starts afresh" in report.notes[0]
    state = torch.load(tmp_path / "b" / file_of(0), weights_only=True)
    again = make(LoreftIntervention, ConsreftIntervention, seed=9)
    assert orthoserde.load(again, tmp_path / "b").fidelity is orthoserde.Fidelity.EXACT
    assert bits(weight_of(again.interventions[key_of(0)])) == bits(weight_of(model.interventions[key_of(0)]))
    assert torch.equal(state["rotate_layer_original"].diagonal(), -torch.ones(RANK))


@needs_reader
def test_a_file_of_ours_becomes_a_folder(model: ReftModel, full: Path, tmp_path: Path) -> None:
    orthoserde.save(model, tmp_path / "m.safetensors")
    report = convert(tmp_path / "m.safetensors", tmp_path / "a", "pyreft-full")
    assert report.target_bytes == stored_bytes(tmp_path / "a")
    assert report.tensors == 2
    with open_checkpoint(tmp_path / "a") as one, open_checkpoint(full) as two:
        difference = comparison.diff(one, two, Registry())
    assert not difference.tensors
    assert (
        difference.only[0] == tuple(f"interventions.{key_of(1)}.{name}" for name in ("embed_dim", "interchange_dim"))
        or not difference.only[0]
    )


@needs_reader
def test_a_folder_becomes_a_plain_file(full: Path, tmp_path: Path) -> None:
    report = convert(full, tmp_path / "m.safetensors", "torch")
    assert report.sort == PLAIN
    assert f"interventions.{key_of(0)}.rotate_layer.parametrizations.weight.original" in (
        orthoserde.inspect(tmp_path / "m.safetensors").tensors
    )


@needs_reader
def test_what_is_off_the_constraint_gets_no_state(legacy: Path, tmp_path: Path) -> None:
    state = torch.load(legacy / file_of(0), weights_only=True)
    state["rotate_layer"] += 0.01
    torch.save(state, legacy / file_of(0))
    with pytest.raises(DamagedFileError, match="off the constraint"):
        convert(legacy, tmp_path / "a", "pyreft-full")
    assert not (tmp_path / "a").exists()
    assert not orthoserde.verify(legacy).ok


@pytest.mark.parametrize("name", ["", "inside", "config.json"])
def test_a_folder_is_not_written_into_itself(name: str, legacy: Path) -> None:
    before = sorted(path.name for path in legacy.iterdir())
    for form in ("pyreft", "torch"):
        with pytest.raises((ConfigError, FileAccessError)):
            convert(legacy, legacy / name, form, force=True)
    assert sorted(path.name for path in legacy.iterdir()) == before


def test_odd_rotations_are_refused(legacy: Path) -> None:
    path = legacy / file_of(0)
    state = torch.load(path, weights_only=True)
    torch.save({**state, "rotate_layer_base": torch.eye(WIDTH)}, path)
    with pytest.raises(FileFormatError, match=TOO_OLD if UNREADABLE else "without its 'rotate_layer_original'"):
        orthoserde.inspect(legacy)
    odd = {"rotate_layer_base": torch.eye(3), "rotate_layer_original": torch.ones(WIDTH, RANK)}
    torch.save({**state, **odd}, path)
    with pytest.raises(FileFormatError, match=TOO_OLD if UNREADABLE else "expected a square base"):
        orthoserde.inspect(legacy)


@needs_reader
def test_a_class_of_the_users_has_no_known_configuration(tmp_path: Path) -> None:
    model = make(Mine)
    folder = complete(save(model, tmp_path / "a"), model)
    types = json.loads((folder / "config.json").read_text("utf-8"))["intervention_types"]
    assert "Mine" in types[0]
    (record,) = orthoserde.inspect(folder).parametrized
    assert record.chain[0].config is None
