"""Files of real pyreft models: what they hold, what of a model is compared with them, and what stays as it was."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyreft
import pytest
import pyvene
import torch
from torch import Tensor, nn

import orthoserde
from orthoserde import ConfigError, Fidelity, IncompatibleModelError, Registry, cli
from tests.helpers import assert_same_state, assert_unchanged, slots_of, snapshot
from tests.pyreft import cases, elsewhere, interventions
from tests.pyreft.cases import CASES, FULL, RANK, Case, build, each, together

ROOT = Path(__file__).resolve().parents[2]
KEY = "layer_{}_comp_block_output_unit_pos_nunit_1#{}"


def case(representations: Callable[[], cases.Representations], **options: Any) -> Case:
    return Case("case", representations, **options)


LOREFT = CASES["loreft"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


# What a file holds


@pytest.mark.parametrize("name", CASES)
def test_a_file_holds_the_adapter_and_what_is_trained_and_names_the_rest(path: Path, name: str) -> None:
    model = build(CASES[name])
    report = orthoserde.save(model, path)
    manifest = orthoserde.inspect(path)
    held = {*manifest.tensors, *manifest.aliases}
    slots = {key: tensor for key, tensor in slots_of(model).items() if tensor is not None}
    wanted = {key for key, tensor in slots.items() if "interventions." in key or tensor.requires_grad}
    assert held == wanted
    assert set(report.left_out) == slots.keys() - held
    assert report.left_out == manifest.left_out
    assert report.opaque == report.unconfigured == ()
    verified = orthoserde.verify(path)
    assert verified.ok
    assert verified.residuals.keys() == {record.name for record in manifest.parametrized}
    assert max([0.0, *(residual for residual in verified.residuals.values() if residual is not None)]) < 2e-6


def test_trained_tensors_of_the_base_model_are_saved_and_restored_and_frozen_ones_are_not_touched(path: Path) -> None:
    chosen = CASES["loreft-base"]
    model = build(chosen)
    cases.train(chosen, model, cases.optimizer_of(chosen, model), range(2))
    orthoserde.save(model, path)
    held = orthoserde.inspect(path)
    assert "model.transformer.h.1.attn.c_attn.weight" in held
    assert "model.transformer.h.0.attn.c_attn.weight" in held.left_out
    assert held.kept_key("model.lm_head.weight") == "model.transformer.wte.weight"
    other = build(chosen, cases.SECOND_SEED)
    with torch.no_grad():
        other.get_parameter("model.transformer.h.0.ln_1.weight").fill_(5.0)
    assert orthoserde.load(other, path).fidelity is Fidelity.EXACT
    assert bool((other.get_parameter("model.transformer.h.0.ln_1.weight") == 5.0).all())
    with torch.no_grad():
        other.get_parameter("model.transformer.h.0.ln_1.weight").fill_(1.0)
    assert_same_state(model, other)


def test_a_linked_intervention_is_stored_once(path: Path) -> None:
    orthoserde.save(build(CASES["loreft-linked"]), path)
    manifest = orthoserde.inspect(path)
    assert len(manifest.parametrized) == 1
    assert len(manifest.aliases) == len(manifest.tensors) == 6


@pytest.mark.parametrize("select", ["all", "trainable", lambda key, tensor: "rotate_layer" in key])
def test_a_selection_of_the_users_comes_back(path: Path, select: Any) -> None:
    model = build(LOREFT)
    orthoserde.save(model, path, select=select)
    other = build(LOREFT, cases.SECOND_SEED)
    orthoserde.load(other, path)
    held = orthoserde.inspect(path)
    ours = {key: tensor for key, tensor in slots_of(model).items() if tensor is not None}
    theirs = {key: tensor for key, tensor in slots_of(other).items() if tensor is not None}
    assert len(held.tensors) + len(held.aliases) == {"all": len(ours), "trainable": 12}.get(str(select), 4)
    for key in held.tensors:
        assert torch.equal(ours[key], theirs[key]), key


def test_the_same_state_gives_the_same_bytes_in_either_model_class(tmp_path: Path) -> None:
    for name in ("loreft", "loreft-pyvene", "loreft-linked", "mixed"):
        model = build(CASES[name])
        for file in ("first", "second"):
            orthoserde.save(model, tmp_path / f"{name}-{file}")
        assert (tmp_path / f"{name}-first").read_bytes() == (tmp_path / f"{name}-second").read_bytes()
    assert (tmp_path / "loreft-first").read_bytes() == (tmp_path / "loreft-pyvene-first").read_bytes()


@pytest.mark.parametrize("name", ["loreft", "loreft-linked", "boundless", "loreft-holder", "mixed"])
def test_saving_and_a_refused_load_change_nothing(path: Path, name: str) -> None:
    model = build(CASES[name])
    cases.train(CASES[name], model, cases.optimizer_of(CASES[name], model), range(1))
    before = snapshot(model)
    orthoserde.save(model, path)
    orthoserde.inspect(path)
    orthoserde.verify(path)
    orthoserde.save(build(CASES["lobireft"]), path)
    after_building = cases.surroundings(model)
    with pytest.raises(IncompatibleModelError):
        orthoserde.load(model, path)
    assert cases.surroundings(model) == after_building
    # Building a model has drawn from the global generator; of the model itself everything is as it was.
    now = snapshot(model)
    assert_unchanged(model, type(before)(before.modules, now.surroundings))


def test_a_model_that_cannot_be_printed_is_saved_and_loaded(path: Path) -> None:
    model = build(LOREFT)
    with pytest.raises(AttributeError):
        str(model)
    orthoserde.save(model, path)
    assert "EXACT" in str(orthoserde.load(build(LOREFT, cases.SECOND_SEED), path))


def test_the_command_line_shows_and_verifies_a_file(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    orthoserde.save(build(LOREFT), path)
    assert cli.main(["inspect", "--all", str(path)]) == 0
    shown = capsys.readouterr().out
    assert KEY.format(0, 0) in shown
    assert "rotate_layer" in shown
    assert "pyvene>LoreftIntervention" in shown
    assert cli.main(["verify", str(path)]) == 0


@pytest.mark.parametrize("name", ["loreft", "loreft-one", "loreft-all"])
def test_build_says_what_to_do_instead(path: Path, name: str) -> None:
    chosen = case(each(pyreft.LoreftIntervention, layers=(0,), **FULL)) if name == "loreft-one" else LOREFT
    orthoserde.save(build(chosen), path, select="all" if name == "loreft-all" else None)
    with pytest.raises(ConfigError, match="make the model yourself and use load"):
        orthoserde.build(path)


def test_debug_metrics_name_each_rotation(path: Path) -> None:
    seen: list[str] = []
    model = build(CASES["consreft"])
    orthoserde.save(model, path, debug=lambda metrics: seen.append(str(metrics)))
    orthoserde.load(model, path, debug=lambda metrics: seen.append(str(metrics)))
    assert sum("rotate_layer" in text for text in seen) >= 4


# What is compared


def configured(**changes: Any) -> Case:
    return case(each(pyreft.LoreftIntervention, **{**FULL, **changes}))


def as_cayley(model: nn.Module) -> None:
    for intervention in cases.interventions_of(model).values():
        rotation = intervention.rotate_layer
        torch.nn.utils.parametrize.remove_parametrizations(rotation, "weight")
        torch.nn.utils.parametrizations.orthogonal(rotation, orthogonal_map="cayley")


#: Another model than the one that was saved, and what is said of it; both values are always named.
MISMATCHES: dict[str, tuple[Case, Case, str]] = {
    "dropout": (LOREFT, configured(dropout=0.0), "dropout is 0.1 in the file, 0.0 in the model"),
    "act_fn": (LOREFT, configured(act_fn="tanh"), "act_fn is 'ReLU' in the file, 'Tanh' in the model"),
    "no act_fn": (LOREFT, configured(act_fn=None), "act_fn is 'ReLU' in the file, 'linear' in the model"),
    "dtype": (LOREFT, configured(dtype=torch.bfloat16), "dtype is 'float32' in the file, 'bfloat16' in the model"),
    "wider dtype": (LOREFT, configured(dtype=torch.float64), "dtype is 'float32' in the file, 'float64' in the model"),
    "rank": (LOREFT, configured(rank=RANK - 1), f"rank is {RANK} in the file, {RANK - 1} in the model"),
    "class": (
        CASES["direft"],
        LOREFT,
        "the file has pyvene>DireftIntervention, the model pyvene>LoreftIntervention",
    ),
    "class with the same tensors": (
        CASES["lobireft"],
        CASES["consreft"],
        "the file has pyvene>LobireftIntervention, the model pyvene>ConsreftIntervention",
    ),
    "subclass": (
        CASES["subclass"],
        LOREFT,
        "the file has pyvene>Gated, the model pyvene>LoreftIntervention",
    ),
    "parent of a subclass": (
        LOREFT,
        CASES["subclass"],
        "the file has pyvene>LoreftIntervention, the model pyvene>Gated",
    ),
    "layer": (
        LOREFT,
        case(each(pyreft.LoreftIntervention, layers=(0, 1), **FULL)),
        f"interventions.{KEY.format(2, 0)}: the file has a pyvene>LoreftIntervention here, the model no module",
    ),
    "component": (
        LOREFT,
        case(each(pyreft.LoreftIntervention, component="mlp_output", **FULL)),
        "the file has a pyvene>LoreftIntervention here, the model no module",
    ),
    "one more layer": (
        LOREFT,
        case(each(pyreft.LoreftIntervention, layers=(0, 1, 2), **FULL)),
        f"interventions.{KEY.format(1, 0)}.learned_source.weight: in the model, not in the file",
    ),
    "order of layers": (
        LOREFT,
        case(each(pyreft.LoreftIntervention, layers=(2, 0), **FULL)),
        "representations[0].layer is 0 in the file, 2 in the model",
    ),
    "link": (LOREFT, CASES["loreft-linked"], "intervention_link_key is None in the file, 0 in the model"),
    "link that is gone": (CASES["loreft-linked"], LOREFT, "intervention_link_key is 0 in the file, None in the model"),
    "layer twice": (
        CASES["loreft-first-and-last"],
        case(each(pyreft.LoreftIntervention, layers=(1,), **FULL)),
        f"interventions.{KEY.format(1, 1)}: the file has a pyvene>LoreftIntervention here, the model no module",
    ),
    "orthogonal map": (
        CASES["loreft-square"],
        case(each(pyreft.LoreftIntervention, rank=cases.WIDTH, **FULL), prepare=as_cayley),
        "orthogonal_map is 'matrix_exp' in the file, 'cayley' in the model",
    ),
    "subspaces": (
        case(cases.of_type(pyvene.LowRankRotatedSpaceIntervention, low_rank_dimension=2)),
        case(
            cases.of_type(
                pyvene.LowRankRotatedSpaceIntervention, low_rank_dimension=2, subspace_partition=[[0, 1], [1, 2]]
            )
        ),
        "subspace_partition is None in the file, [[0], [1]] in the model",
    ),
}


@pytest.mark.parametrize("name", MISMATCHES)
def test_another_configuration_is_refused_with_both_values(path: Path, name: str) -> None:
    saved, loaded, text = MISMATCHES[name]
    orthoserde.save(build(saved), path)
    model = build(loaded, cases.SECOND_SEED)
    before = snapshot(model)
    for strict in (True, False):
        if not strict and name in ("layer", "component", "one more layer", "layer twice"):
            text = ": representations"
        with pytest.raises(IncompatibleModelError) as caught:
            orthoserde.load(model, path, strict=strict)
        assert text in str(caught.value)
        assert_unchanged(model, before)


def test_the_mode_is_compared(path: Path) -> None:
    model = build(CASES["rotated"])
    orthoserde.save(model, path)
    reft = pyvene.IntervenableModel(
        pyvene.IntervenableConfig(CASES["rotated"].representations(), mode="serial"), cases.gpt2()
    )
    with pytest.raises(IncompatibleModelError, match="mode is 'parallel' in the file, 'serial' in the model"):
        orthoserde.load(reft, path)


def test_the_manifest_holds_the_arguments(path: Path) -> None:
    orthoserde.save(build(CASES["loreft-bfloat16"]), path)
    model, first, *_ = orthoserde.inspect(path).modules
    assert model.kind == "pyvene>IntervenableModel"
    assert model.config is not None
    assert model.config["mode"] == "parallel"
    assert first.path == f"interventions.{KEY.format(0, 0)}"
    assert first.config == {
        "base": "LoreftIntervention",
        "trained": True,
        "rank": RANK,
        "dtype": "bfloat16",
        "dropout": 0.1,
        "act_fn": "linear",
        "keep_last_dim": True,
        "source_constant": True,
        "subspace_partition": None,
    }


def test_a_subclass_is_known_by_its_name_wherever_it_is_defined(path: Path) -> None:
    chosen = CASES["subclass-elsewhere"]
    orthoserde.save(build(chosen), path)
    model = build(chosen, cases.SECOND_SEED)
    (first, *_) = cases.interventions_of(model).values()
    assert type(first) is elsewhere.Gated
    assert type(first) is not interventions.Gated
    assert orthoserde.load(model, path).fidelity is Fidelity.EXACT
    assert_same_state(model, build(chosen))


def test_a_class_that_its_user_registered_keeps_the_name_it_was_given(path: Path) -> None:
    registry = Registry()

    class Mine(pyreft.LoreftIntervention):  # type: ignore[misc]
        pass

    registry.register("lab>Mine")(Mine)
    chosen = case(each(Mine, **FULL))
    report = orthoserde.save(build(chosen), path, registry=registry)
    kinds = {record.kind for record in orthoserde.inspect(path).modules}
    assert kinds == {"pyvene>IntervenableModel", "lab>Mine"}
    # Its arguments are those of the constructor, of which one is a dtype; so they are not known, and that is said.
    assert report.unconfigured == tuple(f"interventions.{KEY.format(layer, 0)}" for layer in (0, 2))
    other = build(chosen, cases.SECOND_SEED)
    assert orthoserde.load(other, path, registry=registry).fidelity is Fidelity.UNVERIFIED
    with pytest.raises(IncompatibleModelError, match="the file has lab>Mine, the model pyvene>Mine"):
        orthoserde.load(other, path)


def test_two_classes_of_one_name_in_one_model_are_told_apart_by_refusing(path: Path) -> None:
    both = together(
        each(interventions.Gated, layers=(0,), **FULL),
        each(elsewhere.Gated, layers=(1,), **FULL),
    )
    model = build(case(both))
    with pytest.raises(orthoserde.RegistrationError, match="'pyvene>Gated' already stands for"):
        orthoserde.save(model, path)
    assert not path.exists()


def test_what_reft_model_load_makes_can_be_saved_and_loaded(tmp_path: Path) -> None:
    folder = cases.real_save(build(LOREFT), tmp_path / "folder")
    model = pyreft.ReftModel.load(str(folder), cases.gpt2())
    orthoserde.save(model, tmp_path / "file")
    other = build(configured(dropout=0.0, act_fn=None, dtype=torch.bfloat16), cases.SECOND_SEED)
    assert orthoserde.load(other, tmp_path / "file").fidelity is Fidelity.EXACT
    for key, intervention in cases.interventions_of(model).items():
        assert torch.equal(cases.interventions_of(other)[key].rotate_layer.weight, intervention.rotate_layer.weight)


# Imports


CHECKS = """
import sys, types
import torch
import orthoserde
loaded = lambda *names: [name for name in sys.modules if name.startswith(names)]
assert not loaded("pyvene", "pyreft", "transformers", "orthoserde.integrations")
model = torch.nn.utils.parametrizations.orthogonal(torch.nn.Linear(3, 5))
orthoserde.save(model, sys.argv[1])
orthoserde.load(model, sys.argv[1])
orthoserde.inspect(sys.argv[1]); orthoserde.verify(sys.argv[1])
assert not loaded("pyvene", "pyreft", "orthoserde.integrations.pyreft")
import orthoserde.integrations.pyreft
try:
    orthoserde.load(model, sys.argv[2])
except orthoserde.IncompatibleModelError:
    pass
else:
    raise AssertionError("a folder went into a plain model")
assert not loaded("pyvene", "pyreft", "transformers")
from orthoserde.integrations.pyreft import write
write(sys.argv[3], sys.argv[4])
orthoserde.verify(sys.argv[3])
assert not loaded("pyvene", "pyreft", "transformers"), loaded("pyvene", "pyreft", "transformers")
"""


def test_pyvene_is_imported_by_nobody_but_the_user(tmp_path: Path) -> None:
    model = build(LOREFT)
    orthoserde.save(model, tmp_path / "file")
    folder = cases.real_save(model, tmp_path / "folder")
    arguments = [tmp_path / "plain", folder, tmp_path / "file", tmp_path / "written"]
    command = [sys.executable, "-c", CHECKS, *map(str, arguments)]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert child.returncode == 0, child.stderr
    ours = json.loads((tmp_path / "written" / "config.json").read_text("utf-8"))
    theirs = json.loads((folder / "config.json").read_text("utf-8"))
    assert ours == {key: value for key, value in theirs.items() if key != "transformers_version"}


# What training does after a load


def test_a_load_moves_no_generator_although_dropout_is_active(path: Path) -> None:
    model = build(LOREFT)
    orthoserde.save(model, path)
    other = build(LOREFT, cases.SECOND_SEED)
    modules: list[nn.Dropout] = [i.dropout for i in cases.interventions_of(other).values()]
    assert all(module.training and module.p == 0.1 for module in modules)
    before = torch.get_rng_state()
    orthoserde.load(other, path)
    assert torch.equal(torch.get_rng_state(), before)


def test_parameters_keep_their_identity_and_their_gradients(path: Path) -> None:
    orthoserde.save(build(LOREFT), path)
    model = build(LOREFT, cases.SECOND_SEED)
    optimizer = cases.optimizer_of(LOREFT, model)
    cases.train(LOREFT, model, optimizer, range(1))
    gradients: list[Tensor | None] = [p.grad for group in optimizer.param_groups for p in group["params"]]
    orthoserde.load(model, path)
    now = [p.grad for group in optimizer.param_groups for p in group["params"]]
    assert all(a is b for a, b in zip(gradients, now, strict=True))
    first = next(iter(cases.interventions_of(model).values()))
    original = first.rotate_layer.parametrizations.weight.original
    assert any(original is p for group in optimizer.param_groups for p in group["params"])
