"""FACTS, "More, from a review of the design": what saving and loading any module must get right."""

from __future__ import annotations

import importlib
import json
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

import orthoserde
from orthoserde import Fidelity, IncompatibleModelError, Registry, UnsupportedModuleError
from tests.facts.conftest import Trap
from tests.helpers import (
    assert_same_state,
    assert_unchanged,
    header_bytes,
    lived_in,
    raised_by,
    same_bits,
    scramble_,
    snapshot,
    surroundings,
)


def manifest_of(path: Path) -> dict[str, Any]:
    """The manifest of a file, read without orthoserde."""
    header = json.loads(path.read_bytes()[8 : header_bytes(path)])
    manifest = json.loads(header["__metadata__"]["orthoserde"])["manifest"]
    return cast("dict[str, Any]", json.loads(manifest) if isinstance(manifest, str) else manifest)


def link(module: nn.Module, index: int = 0, name: str = "weight") -> nn.Module:
    chain = cast("dict[str, list[nn.Module]]", module.parametrizations)[name]
    return chain[index]


# State that is not in tensors


def quantized_linear() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dynamic: Any = importlib.import_module("torch.ao.nn.quantized.dynamic")
        return cast("nn.Module", dynamic.Linear(2, 2))


class SavesItself(nn.Module):
    """Keeps its state as the quantized Linear does: another torch may be built without that one."""

    def __init__(self) -> None:
        super().__init__()
        self.packed = [1.0, 2.0]

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}packed"] = torch.tensor(self.packed)


class ExtraState(nn.Linear):
    def get_extra_state(self) -> dict[str, int]:
        return {"seen": 3}

    def set_extra_state(self, state: object) -> None:
        raise AssertionError("not asked for")


def test_a_quantized_linear_is_refused_by_name_instead_of_lost(tmp_path: Path, trap: Trap) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Identity())
    orthoserde.save(model, tmp_path / "plain")
    error = raised_by(lambda: model.append(quantized_linear()))
    trap(error is None, "torch builds a quantized Linear")
    if error is None:
        quantized = model[2]
        held = [*quantized.parameters(), *quantized.buffers()]
        trap(not held and len(quantized.state_dict()) == 4, "it has no tensors and four keys in its state dict")
    model.append(SavesItself())
    mine = len(model) - 1
    with pytest.raises(UnsupportedModuleError) as caught:
        orthoserde.save(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()
    named = {problem.where.split(".")[0] for problem in caught.value.problems}
    assert named == {str(i) for i in range(2, len(model))}
    assert "packed" in str(caught.value)
    assert f"{mine}: SavesItself" in str(caught.value)
    before = snapshot(model)
    with pytest.raises(IncompatibleModelError) as refused:
        orthoserde.load(model, tmp_path / "plain")
    assert_unchanged(model, before)
    assert {problem.kind for problem in refused.value.problems} == {"unsupported"}


def test_extra_state_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModuleError, match="0: ExtraState keeps extra state"):
        orthoserde.save(nn.Sequential(ExtraState(2, 2)), tmp_path / "model")
    assert not (tmp_path / "model").exists()


# Saving evaluates nothing


class Dropped(nn.Module):
    """A user's parametrization that draws from every global generator, and counts its evaluations."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("evaluations", torch.zeros((), dtype=torch.int64))

    evaluations: Tensor

    def forward(self, x: Tensor) -> Tensor:
        self.evaluations += 1
        return nn.functional.dropout(x, 0.5) * random.random() * float(np.random.rand())

    def right_inverse(self, x: Tensor) -> Tensor:
        return x


def dropped_linear() -> nn.Module:
    module = nn.Linear(4, 4)
    # unsafe, or torch would compare two evaluations of the weight with each other
    return parametrize.register_parametrization(module, "weight", Dropped(), unsafe=True)


def test_saving_with_dropout_in_a_parametrization_evaluates_nothing_and_draws_nothing(
    tmp_path: Path, trap: Trap
) -> None:
    model, other = dropped_linear(), dropped_linear()
    around = surroundings()
    _ = model.weight
    trap(surroundings() != around, "evaluating a parametrization with dropout moves the random generators")
    evaluations = int(cast("Tensor", link(model).evaluations))
    before, before_other = snapshot(model), surroundings()
    orthoserde.save(model, tmp_path / "model")
    assert_unchanged(model, before)
    report = orthoserde.load(other, tmp_path / "model")
    assert surroundings() == before_other
    assert int(cast("Tensor", link(other).evaluations)) == evaluations
    assert report.tensors["weight"].residual is None
    assert int(cast("Tensor", link(other).evaluations)) == evaluations
    assert surroundings() == before_other
    assert_same_state(model, other)


# Tensors that cannot be written


def expanded_linear() -> nn.Linear:
    module = nn.Linear(3, 4)
    module.weight = nn.Parameter(torch.randn(1, 3).expand(4, 3))
    return module


def test_an_expanded_parameter_is_saved_and_refused_as_a_target(tmp_path: Path, trap: Trap) -> None:
    expanded, plain = expanded_linear(), nn.Linear(3, 4)
    error = raised_by(lambda: expanded.load_state_dict(plain.state_dict()))
    trap(error is not None, "torch cannot copy into an expanded parameter")
    expanded = expanded_linear()
    orthoserde.save(plain, tmp_path / "plain")
    before = snapshot(lived_in(expanded))
    for strict in (True, False):
        with pytest.raises(IncompatibleModelError, match="cannot be written") as caught:
            orthoserde.load(expanded, tmp_path / "plain", strict=strict)
        assert_unchanged(expanded, before)
        assert [(problem.where, problem.kind) for problem in caught.value.problems] == [("weight", "mismatch")]
    orthoserde.save(expanded, tmp_path / "expanded")
    assert orthoserde.load(plain, tmp_path / "expanded").fidelity is Fidelity.EXACT
    assert_same_state(expanded, plain, strides=False)
    with torch.device("meta"):
        skeleton = nn.Linear(3, 4)
    orthoserde.load(skeleton, tmp_path / "expanded")
    assert_same_state(plain, skeleton)


@pytest.mark.parametrize("parametrized", [False, True])
@pytest.mark.parametrize("within", [False, True])
def test_inference_mode_parameters_are_saved_and_loaded(
    tmp_path: Path, parametrized: bool, within: bool, trap: Trap
) -> None:
    def make() -> nn.Module:
        return orthogonal(nn.Linear(3, 6)) if parametrized else nn.Linear(3, 6)

    model = scramble_(make())
    orthoserde.save(model, tmp_path / "model")
    with torch.inference_mode():
        frozen, copied = make(), make()
    with torch.enable_grad():
        error = raised_by(lambda: copied.get_parameter("bias").mul_(2))
    trap(error is not None, "an inference-mode parameter cannot be changed in place outside of inference mode")
    parameters = dict(frozen.named_parameters())
    with torch.inference_mode(within):
        assert orthoserde.load(frozen, tmp_path / "model").fidelity is Fidelity.EXACT
        orthoserde.save(frozen, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "model").read_bytes()
    assert all(frozen.get_parameter(name) is parameter for name, parameter in parameters.items())
    assert all(parameter.is_inference() for parameter in parameters.values())
    assert_same_state(model, frozen)


def test_what_a_load_in_inference_mode_attaches_can_be_trained(tmp_path: Path) -> None:
    model, bare = (nn.Sequential(nn.Linear(3, 6), nn.Linear(6, 2)) for _ in range(2))
    orthogonal(model[0])
    weight_norm(model[1])
    orthoserde.save(model, tmp_path / "model")
    with torch.inference_mode():
        orthoserde.load(bare, tmp_path / "model")
    assert_same_state(model, bare)
    for module in (model, bare):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        module(torch.ones(2, 3)).square().sum().backward()
        optimizer.step()
    assert_same_state(model, bare)


@pytest.mark.parametrize("parametrize_", [orthogonal, spectral_norm, weight_norm])
def test_a_bare_module_of_inference_mode_is_attached_or_refused_but_never_half_loaded(
    tmp_path: Path, parametrize_: Callable[[nn.Module], nn.Module]
) -> None:
    model = parametrize_(nn.Linear(3, 6))
    orthoserde.save(model, tmp_path / "model")
    with torch.inference_mode():
        bare = nn.Linear(3, 6)
    before = snapshot(bare)
    try:
        orthoserde.load(bare, tmp_path / "model")
    except IncompatibleModelError:
        assert_unchanged(bare, before)
    else:
        assert_same_state(model, bare)


# Meta tensors


class Remembered(nn.Parameter):
    """A subclass of Parameter with an attribute."""


def test_meta_parameters_keep_their_identity_class_and_attributes(tmp_path: Path, trap: Trap) -> None:
    def make() -> nn.Module:
        module = nn.Linear(3, 4)
        module.weight = Remembered(module.weight.detach())
        module.bias.requires_grad_(False)
        module.register_buffer("seen", torch.zeros(2).t())
        return nn.Sequential(module, nn.BatchNorm1d(4), nn.GRU(4, 2))

    model = scramble_(make())
    orthoserde.save(model, tmp_path / "model")
    with torch.device("meta"):
        skeleton = make()
    weight = skeleton.get_parameter("0.weight")
    weight.tag = "mine"  # type: ignore[attr-defined]

    def assign() -> None:
        weight.data = torch.zeros(4, 3)

    trap(raised_by(assign) is not None, "a meta parameter refuses .data")
    parameters = dict(skeleton.named_parameters())
    optimizer = torch.optim.SGD(skeleton.parameters(), lr=0.1)
    assert orthoserde.load(skeleton, tmp_path / "model").fidelity is Fidelity.EXACT
    assert_same_state(model, skeleton)
    for name, parameter in parameters.items():
        assert skeleton.get_parameter(name) is parameter
        assert parameter.device.type == "cpu"
    assert [*optimizer.param_groups[0]["params"]] == [*skeleton.parameters()]
    assert type(weight) is Remembered
    assert weight.tag == "mine"  # type: ignore[attr-defined]
    assert weight.requires_grad
    assert not skeleton.get_parameter("0.bias").requires_grad
    assert_same_output(model, skeleton)


def assert_same_output(model: nn.Module, other: nn.Module) -> None:
    x = torch.linspace(-1, 1, 15).reshape(5, 3)
    assert torch.equal(model.eval()(x)[0], other.eval()(x)[0])


def test_tied_meta_parameters_stay_tied(tmp_path: Path) -> None:
    def make() -> nn.Sequential:
        first, second = nn.Linear(3, 3), nn.Linear(3, 3)
        second.weight = first.weight
        return nn.Sequential(first, second)

    model = make()
    orthoserde.save(model, tmp_path / "model")
    with torch.device("meta"):
        skeleton = make()
    weight = skeleton.get_parameter("0.weight")
    orthoserde.load(skeleton, tmp_path / "model")
    assert skeleton.get_parameter("0.weight") is weight
    assert skeleton.get_parameter("1.weight") is weight
    assert_same_state(model, skeleton)


# Identity on a bare module


def test_weight_norm_on_a_bare_linear_makes_new_parameters_and_the_report_says_so(tmp_path: Path, trap: Trap) -> None:
    registered = nn.Linear(3, 4)
    held = registered.weight
    weight_norm(registered)
    trap(all(parameter is not held for parameter in registered.parameters()), "weight_norm drops the Parameter")
    orthoserde.save(scramble_(registered), tmp_path / "model")
    bare = nn.Linear(3, 4)
    weight, bias = bare.weight, bare.bias
    report = orthoserde.load(bare, tmp_path / "model")
    assert report.fidelity is Fidelity.EXACT
    assert "new" in report.tensors["weight"].action
    assert any("weight" in note and "optimizer" in note for note in report.notes)
    assert "optimizer" in str(report)
    assert all(parameter is not weight for parameter in bare.parameters())
    assert bare.bias is bias
    assert_same_state(registered, bare)
    live = weight_norm(nn.Linear(3, 4))
    parameters = dict(live.named_parameters())
    assert orthoserde.load(live, tmp_path / "model").notes == ()
    assert all(live.get_parameter(name) is parameter for name, parameter in parameters.items())


# Names


@pytest.mark.parametrize("first", ["format", "other"])
def test_a_root_parameter_named_format_that_is_tied_makes_a_round_trip(tmp_path: Path, first: str, trap: Trap) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            second = "other" if first == "format" else "format"
            self.register_parameter(first, nn.Parameter(torch.randn(3)))
            self.register_parameter(second, getattr(self, first))

    model, other = Named(), Named()
    import_save_model = importlib.import_module("safetensors.torch").save_model
    import_save_model(model, str(tmp_path / "theirs"), {"format": "pt"})
    theirs = json.loads((tmp_path / "theirs").read_bytes()[8 : header_bytes(tmp_path / "theirs")])["__metadata__"]
    trap(theirs.get("format") != "pt" or "other" in theirs, "save_model writes aliases over the metadata")
    report = orthoserde.save(model, tmp_path / "model")
    assert len(report.aliases) == 1
    header = json.loads((tmp_path / "model").read_bytes()[8 : header_bytes(tmp_path / "model")])
    assert header["__metadata__"]["format"] == "pt"
    assert orthoserde.load(other, tmp_path / "model").fidelity is Fidelity.EXACT
    assert_same_state(model, other)
    assert other.get_parameter("format") is other.get_parameter("other")


# Registered classes


class My(nn.Module):
    """A registered module with a weight of its own."""

    def __init__(self, width: int, scale: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width))
        self.scale = scale


class Child(My):
    """An unregistered subclass with other arguments."""

    def __init__(self, depth: int) -> None:
        super().__init__(width=depth + 1, scale=7.0)
        self.depth = depth


class Grandchild(My):
    """A registered subclass with an argument that is not JSON."""

    def __init__(self, width: Tensor) -> None:
        super().__init__(width=int(width))


class Drawing(nn.Module):
    """A parametrization whose constructor draws from every global generator."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("start", torch.rand(size, size) * random.random() * float(np.random.rand()))

    start: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return x + self.start.sum()


class Mutating(nn.Module):
    """Changes the list that it is given, before and after."""

    def __init__(self, sizes: list[int], options: dict[str, int]) -> None:
        super().__init__()
        sizes.append(99)
        options["added"] = 1
        self.sizes = sizes


@pytest.fixture
def registry() -> Registry:
    found = Registry()
    found.register("lab>My")(My)
    found.register("lab>Mutating")(Mutating)
    found.register("lab>Grandchild")(Grandchild)
    found.register("lab>Drawing")(Drawing)
    return found


def test_a_registered_module_with_a_parametrized_weight_of_its_own_is_known(
    tmp_path: Path, registry: Registry, trap: Trap
) -> None:
    model, other, wrong = (orthogonal(My(4, scale=scale)) for scale in (2.0, 2.0, 3.0))
    trap(type(model) is not My and type(model).__name__ == "ParametrizedMy", "its type is now ParametrizedMy")
    orthoserde.save(scramble_(model), tmp_path / "model", registry=registry)
    [record] = manifest_of(tmp_path / "model")["modules"]
    assert (record["kind"], record["path"], record["config"]) == ("lab>My", "", {"scale": 2.0, "width": 4})
    for target in (other, My(4, scale=2.0)):
        assert orthoserde.load(target, tmp_path / "model", registry=registry).fidelity is Fidelity.EXACT
        assert_same_state(model, target)
    before = snapshot(lived_in(wrong))
    with pytest.raises(IncompatibleModelError, match=r"scale is 2\.0 in the file, 3\.0 in the model"):
        orthoserde.load(wrong, tmp_path / "model", registry=registry)
    assert_unchanged(wrong, before)


def test_an_unregistered_subclass_does_not_get_the_configuration_of_its_parent(
    tmp_path: Path, registry: Registry
) -> None:
    model = nn.Sequential(Child(2), My(3))
    orthoserde.save(model, tmp_path / "model", registry=registry)
    [record] = manifest_of(tmp_path / "model")["modules"]
    assert (record["path"], record["config"]) == ("1", {"scale": 1.0, "width": 3})
    other = nn.Sequential(Child(2), My(3))
    assert orthoserde.load(other, tmp_path / "model", registry=registry).fidelity is Fidelity.EXACT
    swapped = nn.Sequential(My(3), My(3))
    assert orthoserde.load(swapped, tmp_path / "model", registry=registry).fidelity is Fidelity.UNVERIFIED
    own = Registry()
    own.register("lab>Child")(Child)
    own.register("lab>My")(My)
    orthoserde.save(nn.Sequential(Child(2)), tmp_path / "model", registry=own)
    [record] = manifest_of(tmp_path / "model")["modules"]
    assert (record["kind"], record["config"]) == ("lab>Child", {"depth": 2})


def test_a_registered_subclass_whose_arguments_are_not_json_does_not_get_those_of_its_parent(
    tmp_path: Path, registry: Registry
) -> None:
    model, other = Grandchild(torch.tensor(3)), Grandchild(torch.tensor(3))
    orthoserde.save(model, tmp_path / "model", registry=registry)
    [record] = manifest_of(tmp_path / "model")["modules"]
    assert (record["kind"], record["config"]) == ("lab>Grandchild", None)
    assert orthoserde.load(other, tmp_path / "model", registry=registry).fidelity is Fidelity.UNVERIFIED
    assert_same_state(model, other)


@pytest.mark.parametrize("unsafe", [True, False])
def test_an_attached_class_that_draws_in_its_constructor_moves_no_generator(
    tmp_path: Path, registry: Registry, unsafe: bool
) -> None:
    model, bare = nn.Linear(3, 3), nn.Linear(3, 3).eval()
    parametrize.register_parametrization(model, "weight", Drawing(3), unsafe=unsafe)
    orthoserde.save(model, tmp_path / "model", registry=registry)
    around = surroundings()
    assert orthoserde.load(bare, tmp_path / "model", registry=registry).fidelity is Fidelity.EXACT
    assert surroundings() == around
    assert_same_state(model, bare)
    [record] = orthoserde.parametrized_tensors(bare)
    assert record.unsafe is unsafe
    assert not any(module.training for module in record.parametrizations)


def test_a_file_whose_parent_class_stands_where_the_model_has_the_subclass_is_refused(
    tmp_path: Path, registry: Registry
) -> None:
    orthoserde.save(My(3), tmp_path / "model", registry=registry)
    other = Child(2)
    before = snapshot(lived_in(other))
    with pytest.raises(IncompatibleModelError, match=r"lab>My.*Child"):
        orthoserde.load(other, tmp_path / "model", registry=registry)
    assert_unchanged(other, before)


def test_arguments_that_a_constructor_changes_are_recorded_as_they_were_passed(
    tmp_path: Path, registry: Registry
) -> None:
    sizes, options = [1, 2], {"given": 0}
    model = Mutating(sizes, options)
    assert sizes == [1, 2, 99]
    sizes.append(100)
    orthoserde.save(model, tmp_path / "model", registry=registry)
    [record] = manifest_of(tmp_path / "model")["modules"]
    assert record["config"] == {"options": {"given": 0}, "sizes": [1, 2]}
    assert orthoserde.load(Mutating([1, 2], {"given": 0}), tmp_path / "model", registry=registry)
    other = Mutating([1, 2, 99], {"given": 0})
    with pytest.raises(IncompatibleModelError, match="sizes"):
        orthoserde.load(other, tmp_path / "model", registry=registry)


# Recurrent networks


@pytest.mark.parametrize("target", ["live", "bare", "meta"])
@pytest.mark.parametrize("make", [nn.GRU, nn.LSTM, nn.RNN])
def test_a_recurrent_network_uses_the_restored_orthogonal_weight_with_gradients(
    tmp_path: Path, make: Callable[[int, int], nn.RNNBase], target: str, trap: Trap
) -> None:
    name = "weight_hh_l0"

    def parametrized() -> nn.Module:
        return orthogonal(make(3, 4), name, orthogonal_map="cayley")

    def run(module: nn.Module) -> Tensor:
        return cast("Tensor", module(torch.linspace(-1, 1, 18).reshape(6, 1, 3))[0])

    model = scramble_(parametrized())
    plain = make(3, 4)
    with torch.no_grad():
        for key, parameter in plain.named_parameters():
            parameter.copy_(getattr(model, key))
    trap(torch.allclose(run(plain), run(model), atol=1e-6), "the network uses the computed weight")
    orthoserde.save(model, tmp_path / "model")
    if target == "live":
        other = parametrized()
    else:
        with torch.device("meta" if target == "meta" else "cpu"):
            other = make(3, 4)
    assert orthoserde.load(other, tmp_path / "model").fidelity is Fidelity.EXACT
    assert_same_state(model, other)
    assert torch.equal(run(model), run(other))
    for module in (model, other):
        run(module).square().sum().backward()  # type: ignore[no-untyped-call]
    original = f"parametrizations.{name}.original"
    ours, theirs = (module.get_parameter(original).grad for module in (model, other))
    assert ours is not None
    assert theirs is not None
    assert ours.abs().max() > 0
    assert same_bits(ours, theirs)


# Evaluation is slow, so none happens unasked


def test_a_residual_is_measured_only_when_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, other = (nn.Sequential(orthogonal(nn.Linear(3, 6)), spectral_norm(nn.Linear(6, 2))) for _ in range(2))
    evaluations: list[str] = []
    chain = link(model[0])
    forward = type(chain).forward

    def counting(self: nn.Module, x: Tensor) -> Tensor:
        evaluations.append("orthogonal")
        return cast("Tensor", forward(self, x))

    orthoserde.save(model, tmp_path / "model")
    monkeypatch.setattr(type(chain), "forward", counting)
    report = orthoserde.load(other, tmp_path / "model")
    _ = str(report), repr(report)
    assert evaluations == []
    before = snapshot(other)
    residual = report.tensors["0.weight"].residual
    assert residual is not None
    assert 0 < residual < 1e-5
    assert evaluations == ["orthogonal"]
    assert report.tensors["1.weight"].residual is None
    assert_unchanged(other, before)


def test_a_large_column_major_tensor_of_inference_mode_is_overwritten(tmp_path: Path) -> None:
    values = torch.arange(1100 * 1100, dtype=torch.float32).view(1100, 1100).mT  # more than one block

    def make(tensor: torch.Tensor) -> nn.Module:
        module = nn.Module()
        module.register_buffer("values", tensor)
        return module

    orthoserde.save(make(values), tmp_path / "model")
    with torch.inference_mode():
        other = make(torch.zeros(1100, 1100).mT)
    orthoserde.load(other, tmp_path / "model")
    assert torch.equal(other.get_buffer("values"), values)
