"""What torch, safetensors and pyreft do to a ReftModel without this library: the reasons for all of it."""

from __future__ import annotations

from pathlib import Path

import pyreft
import pytest
import safetensors.torch
import torch

import orthoserde
from tests.pyreft import cases
from tests.pyreft.cases import CASES, build
from tests.pyreft.interventions import Gated

LOREFT = CASES["loreft"]


def residuals(model: torch.nn.Module) -> list[float]:
    """``max |R^T R - I|`` of each rotation, in float64."""
    weights = [i.rotate_layer.weight.detach().double() for i in cases.interventions_of(model).values()]
    return [float((w.mT @ w - torch.eye(w.size(-1), dtype=w.dtype)).abs().max()) for w in weights]


def base_errors(model: torch.nn.Module) -> list[float]:
    bases = [i.rotate_layer.parametrizations.weight[0].base.double() for i in cases.interventions_of(model).values()]
    return [float((b.mT @ b - torch.eye(b.size(-1), dtype=b.dtype)).abs().max()) for b in bases]


def test_the_state_dict_of_a_reft_model_holds_nothing_of_loreft() -> None:
    model = build(LOREFT)
    assert [key for key in model.state_dict() if "interventions" in key] == []


def test_save_model_of_safetensors_drops_the_adapter_and_says_nothing(tmp_path: Path) -> None:
    safetensors.torch.save_model(build(LOREFT), str(tmp_path / "m"))
    stored = safetensors.torch.load_file(tmp_path / "m")
    assert stored
    assert not any("interventions" in key for key in stored)
    with pytest.raises(RuntimeError, match="Missing key"):  # too late
        safetensors.torch.load_model(build(LOREFT, cases.SECOND_SEED), tmp_path / "m")


def test_pyreft_drops_the_parameters_of_a_subclass(tmp_path: Path) -> None:
    folder = cases.real_save(build(CASES["subclass"]), tmp_path / "folder")
    state = torch.load(next(folder.glob("*.bin")), weights_only=True)
    assert sorted(state) == ["bias", "rotate_layer", "weight"]
    assert issubclass(Gated, pyreft.LoreftIntervention)


def test_pyrefts_own_loader_leaves_the_constraint_with_the_next_steps(tmp_path: Path) -> None:
    folder = cases.real_save(build(LOREFT), tmp_path / "folder")
    torch.manual_seed(0)
    model = pyreft.ReftModel.load(str(folder), cases.gpt2())
    for intervention in cases.interventions_of(model).values():
        intervention.learned_source.float()
    assert max(residuals(model)) < 1e-5  # the weight looks right
    assert min(base_errors(model)) > 0.1  # and its base is not
    cases.train(LOREFT, model, cases.optimizer_of(LOREFT, model), range(5))
    assert min(residuals(model)) > 1e-3


def test_pyrefts_own_loader_draws_random_numbers_and_orphans_an_optimizer(tmp_path: Path) -> None:
    model = build(LOREFT)
    first = next(iter(cases.interventions_of(model).values()))
    parameter = first.rotate_layer.parametrizations.weight.original
    state = torch.get_rng_state()
    first.load_state_dict(first.state_dict())
    assert not torch.equal(torch.get_rng_state(), state)
    assert first.rotate_layer.parametrizations.weight.original is not parameter


def test_pyrefts_own_loader_forgets_dropout_and_activation_and_dtype(tmp_path: Path) -> None:
    folder = cases.real_save(build(LOREFT), tmp_path / "folder")
    first = next(iter(cases.interventions_of(pyreft.ReftModel.load(str(folder), cases.gpt2())).values()))
    assert first.dropout.p == 0.0
    assert "ReLU" not in type(first.act_fn).__name__
    assert first.learned_source.weight.dtype is torch.bfloat16


def test_pyrefts_own_loader_fails_on_components_that_are_paths(tmp_path: Path) -> None:
    folder = cases.real_save(build(CASES["loreft-string"]), tmp_path / "folder")
    with pytest.raises(TypeError):
        pyreft.ReftModel.load(str(folder), cases.gpt2())


@pytest.mark.parametrize("name", ["loreft", "loreft-square", "loreft-first-and-last"])
def test_this_library_stays_on_the_constraint_from_the_same_folder(tmp_path: Path, name: str) -> None:
    folder = cases.real_save(build(CASES[name]), tmp_path / "folder")
    model = build(CASES[name], cases.SECOND_SEED)
    with pytest.warns(orthoserde.LegacyCheckpointWarning):
        orthoserde.load(model, folder)
    cases.train(CASES[name], model, cases.optimizer_of(CASES[name], model), range(50))
    assert max(residuals(model)) < 2e-6
    assert max(base_errors(model)) < 2e-6
