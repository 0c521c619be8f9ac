"""Folders between pyreft and this library: what the real ones hold goes in, and what is written they load."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyreft
import pytest
import pyvene
import torch
from torch import Tensor, nn

import orthoserde
from orthoserde import (
    ConfigError,
    DamagedFileError,
    Fidelity,
    FileFormatError,
    IncompatibleModelError,
    LegacyCheckpointWarning,
)
from orthoserde.integrations.pyreft import write
from tests.helpers import assert_same_state, assert_unchanged, slots_of, snapshot
from tests.pyreft import cases, interventions
from tests.pyreft.cases import CASES, FULL, Case, build, each, interventions_of, real_save, together

LOREFT = CASES["loreft"]


def _dotted(key: str) -> str:
    """The key of 0.0.8 to 0.1.6; underscores within a component are its own."""
    head, component, tail = re.split(r"_?comp_|_unit_", key)
    if not head:
        return f"comp.{component.replace('transformer_h[', 'transformer.h[').replace(']_', '].')}.unit.{_dots(tail)}"
    return f"{_dots(head)}.comp.{component}.unit.{_dots(tail)}"


def _dots(text: str) -> str:
    return text.replace("_", ".")


#: Keys of pyvene's naming scheme from 0.1.7 on, as the versions before had them.
SCHEMES: dict[str, Callable[[str], str]] = {
    "0.1.7": lambda key: key,
    "0.0.8": _dotted,
    "0.0.1": lambda key: _dotted(key).replace(".comp.", ".repr."),
}


def trained(case: Case, steps: int = 5) -> nn.Module:
    model = build(case)
    cases.train(case, model, cases.optimizer_of(case, model), range(steps))
    return model


def rename(folder: Path, scheme: str) -> Path:
    """Rename the files of a real folder, and what its ``config.json`` calls them, as an older pyvene did."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    for key in config["sorted_keys"]:
        (folder / f"intkey_{key}.bin").rename(folder / f"intkey_{SCHEMES[scheme](key)}.bin")
    config["sorted_keys"] = [SCHEMES[scheme](key) for key in config["sorted_keys"]]
    if scheme == "0.0.1":
        config["intervenable_representations"] = config.pop("representations")
        config["intervenable_interventions_type"] = config.pop("intervention_types")
        config["intervenable_model_type"] = "GPT2LMHeadModel"
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    return folder


def complete(folder: Path, model: nn.Module) -> Path:
    """Add what pull request 179 adds."""
    for key, intervention in interventions_of(model).items():
        (path,) = (p for p in folder.glob("*.bin") if p.name in {f"intkey_{s(key)}.bin" for s in SCHEMES.values()})
        state = torch.load(path, weights_only=True)
        state["rotate_layer_original"] = intervention.rotate_layer.parametrizations.weight.original.data
        state["rotate_layer_base"] = intervention.rotate_layer.parametrizations.weight[0].base
        torch.save(state, path)
    return folder


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {key: each.rotate_layer.weight.detach().clone() for key, each in interventions_of(model).items()}


def residual(matrix: Tensor) -> float:
    wide = matrix.detach().double()
    return float((wide.mT @ wide - torch.eye(wide.size(-1), dtype=wide.dtype)).abs().max())


def refused(model: nn.Module, path: Path, error: type[Exception], text: str, **options: Any) -> None:
    before = snapshot(model)
    with pytest.raises(error, match=text):
        orthoserde.load(model, path, **options)
    assert_unchanged(model, before)


# Reading what pyreft writes


@pytest.mark.parametrize("form", ["legacy", "full"])
@pytest.mark.parametrize("config", [True, False])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["loreft", "loreft-first-and-last", "loreft-linked", "loreft-string"])
def test_folders_of_every_version_are_read(tmp_path: Path, name: str, scheme: str, config: bool, form: str) -> None:
    if name == "loreft-string" and scheme == "0.0.1":
        scheme = "0.0.8"  # components that are paths came with it
    model = trained(CASES[name])
    folder = rename(real_save(model, tmp_path / "f"), scheme)
    if form == "full":
        complete(folder, model)
    if not config:
        (folder / "config.json").unlink()
    other = build(CASES[name], cases.SECOND_SEED)
    if form == "full":
        report = orthoserde.load(other, folder)
        assert_same_state(model, other)
        assert report.fidelity is Fidelity.EXACT
        return
    with pytest.warns(LegacyCheckpointWarning) as caught:
        report = orthoserde.load(other, folder)
    assert len([each for each in caught if each.category is LegacyCheckpointWarning]) == 1
    assert report.fidelity is Fidelity.INFERENCE
    for key, weight in weights(model).items():
        assert torch.equal(weights(other)[key], weight)


@pytest.mark.parametrize("name", ["loreft", "loreft-square", "loreft-llama", "loreft-bfloat16", "loreft-linked"])
def test_training_from_computed_weights_stays_on_the_constraint(tmp_path: Path, name: str) -> None:
    model = trained(CASES[name])
    folder = real_save(model, tmp_path / "f")
    other = build(CASES[name], cases.SECOND_SEED)
    optimizer = cases.optimizer_of(CASES[name], other)
    with pytest.warns(LegacyCheckpointWarning):
        orthoserde.load(other, folder)
    before = weights(other)
    cases.train(CASES[name], other, optimizer, range(50))
    for key, weight in weights(other).items():
        assert not torch.equal(weight, before[key])
        assert residual(weight) < (1e-6 if name != "loreft-square" else 2e-6)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.real])
def test_the_state_that_pyreft_saves_of_other_classes_is_restored_bit_for_bit(tmp_path: Path, name: str) -> None:
    model = trained(CASES[name])
    folder = real_save(model, tmp_path / "f")
    other = build(CASES[name], cases.SECOND_SEED)
    fidelity = orthoserde.load(other, folder).fidelity
    assert fidelity is (Fidelity.EXACT if CASES[name].exact else Fidelity.UNVERIFIED)
    assert_same_state(model, other)


def test_a_checkpoint_of_the_trainer_is_read(tmp_path: Path) -> None:
    case = CASES["loreft-base"]
    model = trained(case)
    checkpoint = tmp_path / "checkpoint-5"
    checkpoint.mkdir()
    cases.reft_of(model).save_intervention(str(checkpoint / "intervenable_model"), include_model=True)
    assert not (checkpoint / "intervenable_model" / "config.json").exists()
    torch.save(cases.optimizer_of(case, model).state_dict(), checkpoint / "optimizer.pt")
    for name in ("rng_state.pth", "scheduler.pt", "trainer_state.json", "training_args.bin", "model.safetensors"):
        (checkpoint / name).write_bytes(b"\x80")
    other = build(case, cases.SECOND_SEED)
    with pytest.warns(LegacyCheckpointWarning):
        orthoserde.load(other, checkpoint)
    complete(checkpoint / "intervenable_model", model)
    assert orthoserde.load(other, checkpoint).fidelity is Fidelity.EXACT
    assert_same_state(model, other)


def test_trained_tensors_of_the_base_model_are_read_and_asked_for(tmp_path: Path) -> None:
    case = CASES["loreft-base"]
    model = trained(case)
    folder = complete(real_save(model, tmp_path / "with", include_model=True), model)
    other = build(case, cases.SECOND_SEED)
    assert orthoserde.load(other, folder).fidelity is Fidelity.EXACT
    assert_same_state(model, other)
    without = complete(real_save(model, tmp_path / "without"), model)
    text = r"model\.transformer\.h\.1\.ln_1\.weight: in the model, not in the file"
    refused(build(case, cases.SECOND_SEED), without, IncompatibleModelError, text)
    # A model that has frozen them since takes them, too.
    frozen = build(LOREFT, cases.SECOND_SEED)
    assert orthoserde.load(frozen, folder).fidelity is Fidelity.EXACT
    assert torch.equal(
        frozen.get_parameter("model.transformer.h.1.ln_1.weight"),
        model.get_parameter("model.transformer.h.1.ln_1.weight"),
    )


def test_what_pyreft_drops_of_a_subclass_is_asked_for(tmp_path: Path) -> None:
    model = build(CASES["subclass"])
    folder = real_save(model, tmp_path / "f")
    refused(
        build(CASES["subclass"], cases.SECOND_SEED),
        folder,
        IncompatibleModelError,
        "gate: in the model, not in the file",
    )


def test_interventions_of_other_classes_or_places_are_refused(tmp_path: Path) -> None:
    consreft = real_save(build(CASES["consreft"]), tmp_path / "consreft")
    loreft = real_save(build(LOREFT), tmp_path / "loreft")
    text = "a ConsreftIntervention in the folder, a LobireftIntervention in the model"
    refused(build(CASES["lobireft"]), consreft, IncompatibleModelError, text)
    refused(build(CASES["consreft"]), loreft, IncompatibleModelError, "a LoreftIntervention in the folder")
    elsewhere = Case("elsewhere", each(pyreft.LoreftIntervention, layers=(0, 1), **FULL))
    refused(build(elsewhere), loreft, IncompatibleModelError, "layer_2_comp_.*in the file, not in the model")
    thinner = Case("thinner", each(pyreft.LoreftIntervention, rank=2, **FULL))
    refused(build(thinner), loreft, IncompatibleModelError, r"of shape \[8, 3\], the model has \[8, 2\]")
    (loreft / "config.json").unlink()
    refused(build(CASES["consreft"]), loreft, IncompatibleModelError, "a LoreftIntervention in the folder")


def test_computed_weights_are_refused_on_request(tmp_path: Path) -> None:
    model = build(LOREFT)
    folder = real_save(model, tmp_path / "f")
    other = build(LOREFT, cases.SECOND_SEED)
    refused(other, folder, IncompatibleModelError, "which legacy='refuse' does not take", legacy="refuse")
    assert orthoserde.load(other, complete(folder, model), legacy="refuse").fidelity is Fidelity.EXACT


# Damage by a real resume


PLAIN = Case("plain", each(pyreft.LoreftIntervention, dtype=torch.float32))


@pytest.fixture
def damaged(tmp_path: Path) -> nn.Module:
    """A model that pyreft loaded itself and that was trained on."""
    folder = real_save(trained(PLAIN), tmp_path / "sound")
    torch.manual_seed(3)
    model: nn.Module = pyreft.ReftModel.load(str(folder), cases.gpt2())
    for intervention in interventions_of(model).values():
        intervention.learned_source.float()
    cases.train(PLAIN, model, cases.optimizer_of(PLAIN, model), range(5))
    return model


@pytest.mark.parametrize("form", ["legacy", "full"])
@pytest.mark.parametrize("writer", ["pyreft", "ours"])
def test_a_real_damaged_resume_is_recognised_in_every_form(
    tmp_path: Path, damaged: nn.Module, form: Any, writer: str
) -> None:
    if writer == "ours":
        write(damaged, tmp_path / "f", form)
    else:
        folder = real_save(damaged, tmp_path / "f")
        if form == "full":
            complete(folder, damaged)
    error, text = {
        "legacy": (IncompatibleModelError, r"off the constraint by 0\.\d+"),
        "full": (DamagedFileError, r"damaged by a resume .* its base is off orthogonality by \d"),
    }[form]
    refused(build(PLAIN, cases.SECOND_SEED), tmp_path / "f", error, text)


@pytest.mark.parametrize("form", ["legacy", "full"])
def test_a_real_damaged_resume_can_be_projected_or_kept(tmp_path: Path, damaged: nn.Module, form: Any) -> None:
    write(damaged, tmp_path / "f", form)
    model = build(PLAIN, cases.SECOND_SEED)
    with pytest.warns(LegacyCheckpointWarning):
        report = orthoserde.load(model, tmp_path / "f", legacy="keep")
    assert report.fidelity is Fidelity.INFERENCE
    for key, weight in weights(damaged).items():
        assert torch.equal(weights(model)[key], weight)
        assert "kept" in report.tensors[f"interventions.{key}.rotate_layer.weight"].action
    optimizer = cases.optimizer_of(PLAIN, model)
    with pytest.warns(LegacyCheckpointWarning):
        report = orthoserde.load(model, tmp_path / "f", legacy="project")
    for key, weight in weights(damaged).items():
        left, _, right = torch.linalg.svd(weight.double(), full_matrices=False)
        assert torch.allclose(weights(model)[key].double(), left @ right, atol=1e-6)
        assert "projected" in report.tensors[f"interventions.{key}.rotate_layer.weight"].action
    cases.train(PLAIN, model, optimizer, range(50))
    for weight in weights(model).values():
        assert residual(weight) < 2e-6


def test_a_damaged_model_can_be_saved_as_it_is_and_verify_says_what_it_is(tmp_path: Path, damaged: nn.Module) -> None:
    orthoserde.save(damaged, tmp_path / "file")
    report = orthoserde.verify(tmp_path / "file")
    assert not report.ok
    residuals = [value for name, value in report.residuals.items() if value is not None]
    assert len(residuals) == 2
    assert min(residuals) > 1e-3


# Writing what pyreft loads


def source_of_its_own() -> cases.Representations:
    return [
        {
            "layer": 0,
            "component": "block_output",
            "intervention_type": pyvene.VanillaIntervention,
            "source_representation": torch.ones(cases.WIDTH),
        }
    ]


WRITTEN: dict[str, Case] = {
    **CASES,
    "source": Case("source", source_of_its_own),
    "jump-relu": Case("jump-relu", cases.of_type(pyvene.JumpReLUAutoencoderIntervention, low_rank_dimension=3)),
    "autoencoder": Case("autoencoder", cases.of_type(pyvene.AutoencoderIntervention, latent_dim=4)),
    "mask": Case("mask", cases.of_type(pyvene.SigmoidMaskIntervention)),
    "nothing trained": Case("nothing", cases.of_type(pyvene.ZeroIntervention)),
}

#: What the real loader cannot load, whoever wrote it; a trainable base needs ``include_model``.
NOT_LOADED = {
    "loreft-string": TypeError,
    "noreft": KeyError,
    "nodireft": KeyError,
}


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text("utf-8"))
    config.pop("transformers_version", None)
    return config


@pytest.mark.parametrize("name", [name for name in WRITTEN if name != "loreft-holder"])
def test_a_folder_of_ours_is_the_one_that_pyreft_writes(tmp_path: Path, name: str) -> None:
    model = trained(WRITTEN[name], 2) if name in CASES else build(WRITTEN[name])
    theirs = real_save(model, tmp_path / "real", include_model=name == "loreft-base")
    sizes = write(model, tmp_path / "ours")
    assert config_of(tmp_path / "ours") == config_of(theirs)
    assert sorted(sizes) == sorted(path.name for path in theirs.iterdir())
    for path in theirs.glob("*.bin"):
        ours = torch.load(tmp_path / "ours" / path.name, weights_only=True)
        expected = torch.load(path, weights_only=True)
        assert expected.keys() <= ours.keys()
        assert name.startswith("subclass") or expected.keys() == ours.keys()
        for key, tensor in expected.items():
            assert tensor.dtype == ours[key].dtype, key
            assert torch.equal(tensor, ours[key]), key


@pytest.mark.parametrize("form", ["legacy", "full"])
@pytest.mark.parametrize("name", [name for name in WRITTEN if name != "loreft-holder"])
def test_pyreft_loads_what_was_written_with_equal_weights(tmp_path: Path, name: str, form: Any) -> None:
    case = WRITTEN[name]
    model = trained(case, 2) if name in CASES else build(case)
    write(model, tmp_path / "f", form)
    load = pyreft.ReftModel.load
    if name in NOT_LOADED:
        with pytest.raises(NOT_LOADED[name]):
            load(str(tmp_path / "f"), case.base())
        with pytest.raises(NOT_LOADED[name]):
            load(str(real_save(model, tmp_path / "real")), case.base())
        return
    loaded = load(str(tmp_path / "f"), case.base(), include_model=name == "loreft-base")
    ours, theirs = interventions_of(model), interventions_of(loaded)
    assert ours.keys() == theirs.keys()
    for key, intervention in ours.items():
        assert type(theirs[key]) is type(intervention)
        if isinstance(intervention, pyreft.LoreftIntervention):
            assert torch.equal(theirs[key].rotate_layer.weight, intervention.rotate_layer.weight)
            assert torch.equal(theirs[key].learned_source.weight, intervention.learned_source.weight.to(torch.bfloat16))
        else:
            for other, tensor in slots_of(intervention).items():
                mine = slots_of(theirs[key]).get(other)
                assert (mine is None) == (tensor is None), other
                assert mine is None or tensor is None or torch.equal(mine, tensor.to(mine.dtype)), other
    if name == "loreft-base":
        assert torch.equal(
            loaded.get_parameter("model.transformer.wte.weight"), model.get_parameter("model.transformer.wte.weight")
        )


@pytest.mark.parametrize("form", ["legacy", "full"])
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if name not in ("subclass-elsewhere",)])
def test_a_model_and_its_file_give_equal_folders(tmp_path: Path, name: str, form: Any) -> None:
    model = trained(CASES[name], 2)
    orthoserde.save(model, tmp_path / "file")
    write(model, tmp_path / "ours", form)
    if name.startswith("subclass") or name == "mixed":
        with pytest.raises(ConfigError, match=r"none of pyreft's own classes.*pass the model instead of the file"):
            write(tmp_path / "file", tmp_path / "from-file", form)
        assert not (tmp_path / "from-file").exists()
        return
    write(tmp_path / "file", tmp_path / "from-file", form)
    for path in (tmp_path / "ours").iterdir():
        assert (tmp_path / "from-file" / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.holder])
def test_the_full_form_is_read_back(tmp_path: Path, name: str) -> None:
    model = trained(CASES[name], 2)
    write(model, tmp_path / "f", "full")
    other = build(CASES[name], cases.FIRST_SEED + 10)
    report = orthoserde.load(other, tmp_path / "f")
    assert report.fidelity is (Fidelity.EXACT if CASES[name].exact else Fidelity.UNVERIFIED)
    assert_same_state(model, other)


def test_a_real_folder_is_not_written_over(tmp_path: Path) -> None:
    folder = real_save(build(LOREFT), tmp_path / "f")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(orthoserde.FileAccessError, match="is there already"):
        write(build(LOREFT, cases.SECOND_SEED), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_an_intervention_that_is_a_plain_function_is_refused(tmp_path: Path) -> None:
    def double(base: Tensor, source: Tensor) -> Tensor:
        return base * 2

    functions = [{"layer": 0, "component": "block_output", "intervention": double}]
    model = pyvene.IntervenableModel(pyvene.IntervenableConfig(functions), cases.gpt2())
    with pytest.raises(ConfigError, match="does not say where its 0 interventions act"):
        write(model, tmp_path / "f")
    assert list(tmp_path.iterdir()) == []


def test_the_state_of_untrained_interventions_is_read_from_a_mixed_folder(tmp_path: Path) -> None:
    case = Case("both", together(each(pyreft.LoreftIntervention, layers=(0,), **FULL), source_of_its_own), sources=True)
    mixed = Case("mixed", together(each(pyreft.ConsreftIntervention), each(interventions.Shift, layers=(1,))))
    for chosen in (case, mixed):
        model = build(chosen)
        folder = real_save(model, tmp_path / chosen.name)
        if chosen is case:
            with pytest.warns(LegacyCheckpointWarning):
                orthoserde.load(build(chosen, cases.SECOND_SEED), folder)
        else:
            other = build(chosen, cases.SECOND_SEED)
            assert orthoserde.load(other, folder).fidelity is Fidelity.EXACT
            assert_same_state(model, other)


# Not sound, as real folders may be


def test_a_real_folder_with_a_file_missing_truncated_or_too_many_is_refused(tmp_path: Path) -> None:
    folder = real_save(build(LOREFT), tmp_path / "f")
    first, last = sorted(folder.glob("*.bin"))
    model = build(LOREFT, cases.SECOND_SEED)
    last.rename(tmp_path / "last")
    refused(model, folder, FileFormatError, r"config\.json names files that are missing: layer_2")
    last.write_bytes((tmp_path / "last").read_bytes()[:-100])
    refused(model, folder, FileFormatError, r"layer_2.*\.bin: a damaged archive")
    shutil.copy(tmp_path / "last", last)
    shutil.copy(first, first.with_name(first.name.replace("#0", "#1")))
    refused(model, folder, FileFormatError, r"holds files that config\.json does not name: layer_0\S*#1")
