"""Models with torch's older hooks, `torch.nn.utils.weight_norm` and `spectral_norm`: saved and loaded as they are."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, remove_weight_norm
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

import orthoserde
from orthoserde import DamagedFileError, Fidelity, IncompatibleModelError, storage
from orthoserde.capture import capture
from orthoserde.walk import take_inventory
from tests.helpers import (
    assert_same_state,
    assert_unchanged,
    bits,
    flip_bit,
    hook_of_a_subclass,
    lived_in,
    same_bits,
    scramble_,
    slots_of,
    snapshot,
    train,
    with_hook,
)

Make = Callable[[], Any]

REGISTRY = orthoserde.Registry()


@REGISTRY.register("hooks>Net")
class Net(nn.Module):
    """A registered model that makes its hooks itself."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.one = with_hook("weight_norm", nn.Linear(3, width))
        self.two = with_hook("spectral_norm", nn.Linear(width, 2))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.two(self.one(x))
        return result


@REGISTRY.register("hooks>Outer")
class Outer(nn.Module):
    """A registered parametrization with a hook inside."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = with_hook("spectral_norm", nn.Linear(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.inner(x)
        return result


def both() -> Any:
    return with_hook("spectral_norm", with_hook("weight_norm", nn.Linear(3, 4), "bias"))


def recurrent() -> Any:
    return with_hook("weight_norm", with_hook("weight_norm", nn.LSTM(3, 4), "weight_hh_l0"), "weight_ih_l0", dim=1)


def with_parametrization() -> Any:
    return with_hook("weight_norm", orthogonal(nn.Linear(3, 4)), "bias")


LAYERS: dict[str, Make] = {
    "weight_norm": lambda: with_hook("weight_norm", nn.Linear(3, 4)),
    "weight_norm of all": lambda: with_hook("weight_norm", nn.Linear(3, 4), dim=None),
    "weight_norm from the last": lambda: with_hook("weight_norm", nn.Linear(3, 4), dim=-2),
    "weight_norm of columns": lambda: with_hook("weight_norm", nn.Linear(3, 4), dim=1),
    "weight_norm of a bias": lambda: with_hook("weight_norm", nn.Linear(3, 4), "bias"),
    "spectral_norm": lambda: with_hook("spectral_norm", nn.Linear(3, 4)),
    "spectral_norm of columns": lambda: with_hook("spectral_norm", nn.Linear(3, 4), dim=1),
    "both": both,
    "recurrent": recurrent,
    "and a parametrization": with_parametrization,
    "double": lambda: with_hook("spectral_norm", nn.Linear(3, 4, dtype=torch.float64)),
}


def make(name: str, seed: int) -> Any:
    torch.manual_seed(seed)
    model: Any = nn.Sequential(LAYERS[name](), nn.Identity())
    scramble_(model)
    first = model[0]
    first(torch.randn(2, 3, dtype=torch.float64 if name == "double" else torch.float32))  # hooks leave the weight
    return model


def hooked_names(layer: nn.Module) -> list[str]:
    return [tensor.tensor_name for tensor in take_inventory(layer).hooked]


def output_of(layer: Any, name: str = "") -> Tensor:
    x = torch.linspace(-1, 1, 6).reshape(2, 3).to(torch.float64 if name == "double" else torch.float32)
    training = layer.training
    with torch.no_grad():
        result = layer.eval()(x)
    layer.train(training)
    found: Tensor = result[0] if isinstance(result, tuple) else result
    return found


@pytest.mark.parametrize("name", LAYERS)
def test_a_round_trip_is_exact_and_the_weight_is_there_before_any_forward(name: str, tmp_path: Path) -> None:
    model, other = make(name, 0), make(name, 1)
    orthoserde.save(model, tmp_path / "m")
    lived_in(other)
    parameters = dict(other.named_parameters())
    before = {key: (id(tensor), tensor.requires_grad, tensor.grad) for key, tensor in parameters.items()}

    report = orthoserde.load(other, tmp_path / "m")

    assert report.fidelity is Fidelity.EXACT
    assert set(report.tensors) == {f"0.{each}" for each in hooked_names(model[0])} | (
        {"0.weight"} if name == "and a parametrization" else set()
    )
    assert_same_state(model, other)
    after = {key: (id(tensor), tensor.requires_grad, tensor.grad) for key, tensor in other.named_parameters()}
    assert after == before
    weights = {each: getattr(other[0], each).detach().clone() for each in hooked_names(other[0])}
    assert same_bits(output_of(model[0], name), output_of(other[0], name))
    for each, weight in weights.items():
        assert same_bits(weight, getattr(model[0], each)), each


@pytest.mark.parametrize("name", LAYERS)
def test_saving_disturbs_nothing(name: str, tmp_path: Path) -> None:
    model = lived_in(make(name, 0))
    before = snapshot(model)
    orthoserde.save(model, tmp_path / "m", include_weights=True)
    assert_unchanged(model, before)


@pytest.mark.parametrize("name", LAYERS)
def test_a_meta_model_is_placed_with_its_weight(name: str, tmp_path: Path) -> None:
    model = make(name, 0)
    orthoserde.save(model, tmp_path / "m")
    with torch.device("meta"):
        other: Any = nn.Sequential(LAYERS[name](), nn.Identity())
    ids = {key: id(parameter) for key, parameter in other.named_parameters()}
    assert orthoserde.load(other, tmp_path / "m", device="cpu").fidelity is Fidelity.EXACT
    assert_same_state(model, other)
    assert {key: id(parameter) for key, parameter in other.named_parameters()} == ids
    for each in hooked_names(other[0]):
        assert getattr(other[0], each).device.type == "cpu"
    assert same_bits(output_of(model[0], name), output_of(other[0], name))


def chained() -> Any:
    return spectral_norm(weight_norm(nn.Linear(3, 4)))


def test_a_meta_model_whose_weight_is_held_by_another_graph_is_left_as_it_is(tmp_path: Path) -> None:
    orthoserde.save(make("weight_norm", 0), tmp_path / "m")
    with torch.device("meta"):
        model: Any = nn.Sequential(LAYERS["weight_norm"](), nn.Identity())
    held = model[0].weight_g * model[0].weight_v
    before = snapshot(model)
    with pytest.raises(orthoserde.UnsupportedModuleError, match="the model could not be changed, nothing was loaded"):
        orthoserde.load(model, tmp_path / "m", device="cpu")
    assert_unchanged(model, before)
    del held
    assert orthoserde.load(model, tmp_path / "m", device="cpu").fidelity is Fidelity.EXACT


CONFIGURATIONS: dict[str, tuple[Make, Make, str]] = {
    "dim": (
        lambda: with_hook("weight_norm", nn.Linear(4, 4)),
        lambda: with_hook("weight_norm", nn.Linear(4, 4), dim=1),
        "dim is 0 in the file, 1 in the model",
    ),
    "dim of a vector": (
        lambda: with_hook("weight_norm", nn.Linear(3, 1), "bias"),
        lambda: with_hook("weight_norm", nn.Linear(3, 1), "bias", dim=None),
        "dim is 0 in the file, -1 in the model",
    ),
    "spectral dim": (
        lambda: with_hook("spectral_norm", nn.Linear(4, 4), dim=1),
        lambda: with_hook("spectral_norm", nn.Linear(4, 4)),
        "dim is 1 in the file, 0 in the model",
    ),
    "eps": (
        lambda: with_hook("spectral_norm", nn.Linear(3, 4)),
        lambda: with_hook("spectral_norm", nn.Linear(3, 4), eps=1e-6),
        "eps is 1e-12 in the file, 1e-06 in the model",
    ),
    "iterations": (
        lambda: with_hook("spectral_norm", nn.Linear(3, 4), n_power_iterations=3),
        lambda: with_hook("spectral_norm", nn.Linear(3, 4)),
        "n_power_iterations is 3 in the file, 1 in the model",
    ),
    "eps of a parametrization": (
        lambda: spectral_norm(nn.Linear(3, 4)),
        lambda: with_hook("spectral_norm", nn.Linear(3, 4), eps=1e-6),
        "eps is 1e-12 in the file, 1e-06 in the model",
    ),
    "dim for a parametrization": (
        lambda: with_hook("weight_norm", nn.Linear(4, 4), dim=1),
        lambda: weight_norm(nn.Linear(4, 4)),
        "dim is 1 in the file, 0 in the model",
    ),
    "another kind": (
        lambda: with_hook("weight_norm", nn.Linear(3, 4)),
        lambda: with_hook("spectral_norm", nn.Linear(3, 4)),
        "the file has torch>weight_norm, the model torch>spectral_norm",
    ),
    "a chain": (
        lambda: with_hook("weight_norm", nn.Linear(3, 4)),
        chained,
        "the file has torch>weight_norm, the model _WeightNorm, then _SpectralNorm",
    ),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
@pytest.mark.parametrize("strict", [True, False])
def test_another_configuration_is_refused_and_nothing_changes(name: str, strict: bool, tmp_path: Path) -> None:
    saved, target, text = CONFIGURATIONS[name]
    orthoserde.save(saved(), tmp_path / "m")
    model = lived_in(target())
    before = snapshot(model)
    with pytest.raises(IncompatibleModelError) as caught:
        orthoserde.load(model, tmp_path / "m", strict=strict)
    assert text in str(caught.value)
    assert_unchanged(model, before)


def test_a_configuration_of_odd_numbers_is_one_of_numbers(tmp_path: Path) -> None:
    layer = with_hook("spectral_norm", nn.Linear(3, 4), n_power_iterations=True, eps=0)
    orthoserde.save(layer, tmp_path / "m")
    (record,) = orthoserde.inspect(tmp_path / "m").parametrized
    assert record.chain[0].config == {"dim": 0, "eps": 0.0, "n_power_iterations": 1}
    assert orthoserde.load(layer, tmp_path / "m").fidelity is Fidelity.EXACT


@pytest.mark.parametrize("dim", [-2, 1, None])
@pytest.mark.parametrize("target", ["parametrization", "plain"])
def test_any_dimension_that_torch_takes_goes_into_the_other_forms(dim: int | None, target: str, tmp_path: Path) -> None:
    model = with_hook("weight_norm", nn.Linear(3, 4), dim=dim)
    orthoserde.save(model, tmp_path / "m")
    other = nn.Linear(3, 4) if target == "plain" else weight_norm(nn.Linear(3, 4), dim=cast("int", dim))
    assert orthoserde.load(other, tmp_path / "m").fidelity is Fidelity.EXACT
    assert same_bits(output_of(model), output_of(other))


# Parts of the state


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm"])
@pytest.mark.parametrize("suffix", ["_g", "_v", "_u", "_orig"])
def test_half_of_the_state_is_refused_however_lenient_the_load(kind: str, suffix: str, tmp_path: Path) -> None:
    state = dict(with_hook(kind, nn.Linear(3, 4)).state_dict())
    if f"weight{suffix}" not in state:
        return
    del state[f"weight{suffix}"]
    safetensors.torch.save_file(state, tmp_path / "m")
    model = lived_in(with_hook(kind, nn.Linear(3, 4)))
    before = snapshot(model)
    for strict in (True, False):
        with pytest.raises(IncompatibleModelError, match=f"weight{suffix}"):
            orthoserde.load(model, tmp_path / "m", strict=strict)
        assert_unchanged(model, before)


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm"])
def test_none_of_the_state_leaves_the_weight_alone(kind: str, tmp_path: Path) -> None:
    safetensors.torch.save_file({"bias": torch.ones(4)}, tmp_path / "m")
    layer = with_hook(kind, nn.Linear(3, 4))
    weight = layer.weight
    parts = {key: bits(tensor) for key, tensor in layer.state_dict().items() if key != "bias"}
    report = orthoserde.load(layer, tmp_path / "m", strict=False)
    assert set(report.missing_keys) == set(parts)
    assert torch.equal(layer.bias, torch.ones(4))
    assert layer.weight is weight
    assert {key: bits(tensor) for key, tensor in layer.state_dict().items() if key != "bias"} == parts


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm"])
def test_a_selection_takes_a_hooked_tensor_whole(kind: str, tmp_path: Path) -> None:
    layer = with_hook(kind, nn.Linear(3, 4))
    orthoserde.save(layer, tmp_path / "m", select=lambda key, _: key == "weight_v")
    manifest = orthoserde.inspect(tmp_path / "m")
    assert manifest.left_out == ("bias",)
    assert set(manifest.tensors) == set(layer.state_dict()) - {"bias"}
    assert [record.name for record in manifest.parametrized] == ["weight"]


def test_a_frozen_original_is_left_out_of_what_is_trained(tmp_path: Path) -> None:
    def model() -> Any:
        frozen = with_hook("weight_norm", nn.Linear(3, 4)).requires_grad_(False)
        return nn.Sequential(frozen, with_hook("weight_norm", nn.Linear(4, 2)))

    one, two = model(), model()
    orthoserde.save(one, tmp_path / "m", select="trainable")
    assert set(orthoserde.inspect(tmp_path / "m").left_out) == {"0.weight_g", "0.weight_v", "0.bias"}
    frozen, weight = snapshot(two[0]), two[0].weight
    report = orthoserde.load(two, tmp_path / "m")
    assert list(report.tensors) == ["1.weight"]
    assert two[0].weight is weight
    assert_unchanged(two[0], frozen)
    assert same_bits(two[1].weight, one[1].weight.detach())


@pytest.mark.parametrize("frozen", [True, False])
def test_the_model_keeps_its_own_requires_grad(frozen: bool, tmp_path: Path) -> None:
    orthoserde.save(make("both", 0).requires_grad_(not frozen), tmp_path / "m")
    model = make("both", 1).requires_grad_(frozen)
    assert orthoserde.load(model, tmp_path / "m").fidelity is Fidelity.EXACT
    assert all(parameter.requires_grad == frozen for parameter in model.parameters())


# What is shared and wrapped


def shared(kind: str) -> Any:
    model = nn.Module()
    model.a = with_hook(kind, nn.Linear(3, 4))
    model.b = model.a
    return model


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm"])
def test_a_shared_module_is_one_record_and_loads_where_it_is_shared(kind: str, tmp_path: Path) -> None:
    model, other = scramble_(shared(kind)), shared(kind)
    orthoserde.save(model, tmp_path / "m")
    (record,) = orthoserde.inspect(tmp_path / "m").parametrized
    assert (record.name, record.aliases) == ("a.weight", ("b",))
    assert orthoserde.load(other, tmp_path / "m").fidelity is Fidelity.EXACT
    assert_same_state(model, other)
    separate = nn.ModuleDict({key: with_hook(kind, nn.Linear(3, 4)) for key in "ab"})
    before = snapshot(separate)
    with pytest.raises(IncompatibleModelError, match="a separate parameter in the model"):
        orthoserde.load(separate, tmp_path / "m")
    assert_unchanged(separate, before)


@pytest.mark.parametrize("file", ["copies", "aliases"])
@pytest.mark.parametrize("target", ["hook", "parametrization", "plain"])
@pytest.mark.parametrize("form", ["hook", "parametrization"])
def test_a_state_dict_with_a_shared_module_loads_into_every_form(
    file: str, target: str, form: str, tmp_path: Path
) -> None:
    def model(form: str) -> Any:
        result = nn.Module()
        layer = nn.Linear(3, 4)
        result.a = (
            with_hook("weight_norm", layer) if form == "hook" else layer if form == "plain" else weight_norm(layer)
        )
        result.b = result.a
        return result

    one, two = scramble_(model(form)), model(target)
    if file == "copies":
        safetensors.torch.save_file({k: v.clone() for k, v in one.state_dict().items()}, tmp_path / "m")
    else:
        safetensors.torch.save_model(one, str(tmp_path / "m"))
    if target == "plain":
        with pytest.warns(orthoserde.LegacyCheckpointWarning):
            orthoserde.load(two, tmp_path / "m")
    else:
        assert orthoserde.load(two, tmp_path / "m").fidelity is Fidelity.UNVERIFIED
    assert same_bits(output_of(one.a), output_of(two.a))


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda model: torch.compile(model, backend="eager")])
def test_wrappers_leave_no_trace(wrap: Callable[[Any], Any], tmp_path: Path) -> None:
    model, other = make("both", 0), make("both", 1)
    orthoserde.save(wrap(model), tmp_path / "wrapped")
    orthoserde.save(model, tmp_path / "bare")
    assert (tmp_path / "wrapped").read_bytes() == (tmp_path / "bare").read_bytes()
    assert orthoserde.load(wrap(other), tmp_path / "bare").fidelity is Fidelity.EXACT
    assert_same_state(model, other)
    assert same_bits(wrap(other).eval()(torch.ones(2, 3)), model.eval()(torch.ones(2, 3)))
    torch.compiler.reset()


def test_a_copy_is_saved_and_loaded_like_its_original(tmp_path: Path) -> None:
    layer = with_hook("spectral_norm", nn.Linear(3, 4))
    twin = copy.deepcopy(layer)
    orthoserde.save(layer, tmp_path / "one")
    orthoserde.save(twin, tmp_path / "two")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    orthoserde.save(scramble_(with_hook("spectral_norm", nn.Linear(3, 4))), tmp_path / "three")
    before = snapshot(layer)
    orthoserde.load(twin, tmp_path / "three")
    assert_unchanged(layer, before)
    assert not torch.equal(twin.weight, layer.weight)


def test_a_loaded_layer_can_be_copied(tmp_path: Path) -> None:
    layer = with_hook("weight_norm", nn.Linear(3, 4))
    orthoserde.save(layer, tmp_path / "m")
    orthoserde.load(layer, tmp_path / "m")
    twin = copy.deepcopy(layer)  # torch refuses before, because the weight has a graph
    assert same_bits(twin.weight, layer.weight)


# Hooks that were taken apart


def test_a_removed_hook_leaves_a_plain_weight(tmp_path: Path) -> None:
    layer = remove_weight_norm(with_hook("weight_norm", nn.Linear(3, 4)))
    orthoserde.save(layer, tmp_path / "m")
    assert set(orthoserde.inspect(tmp_path / "m").tensors) == {"weight", "bias"}
    assert orthoserde.load(nn.Linear(3, 4), tmp_path / "m").fidelity is Fidelity.EXACT


def test_a_half_removed_hook_is_plain_tensors(tmp_path: Path) -> None:
    def half() -> Any:
        layer = with_hook("weight_norm", nn.Linear(3, 4))
        del layer.weight_g
        return layer

    model, other = half(), half()
    orthoserde.save(model, tmp_path / "m")
    manifest = orthoserde.inspect(tmp_path / "m")
    assert manifest.parametrized == ()
    assert set(manifest.tensors) == {"bias", "weight_v"}
    assert orthoserde.load(other, tmp_path / "m").fidelity is Fidelity.EXACT
    assert_same_state(model, other)
    whole = with_hook("weight_norm", nn.Linear(3, 4))
    before = snapshot(whole)
    for strict in (True, False):
        with pytest.raises(IncompatibleModelError, match="weight_g"):
            orthoserde.load(whole, tmp_path / "m", strict=strict)
        assert_unchanged(whole, before)


def test_a_deleted_weight_is_not_put_back(tmp_path: Path) -> None:
    layer = with_hook("weight_norm", nn.Linear(3, 4))
    orthoserde.save(layer, tmp_path / "m")
    del layer.weight
    assert orthoserde.load(layer, tmp_path / "m").fidelity is Fidelity.EXACT
    assert "weight" not in vars(layer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_hooks_of_vectors_and_complex_tensors_are_plain_tensors(dtype: torch.dtype, tmp_path: Path) -> None:
    def layer() -> Any:
        module = nn.Module()
        shape = (4,) if dtype == torch.float32 else (4, 3)
        module.weight = nn.Parameter(torch.randn(shape, dtype=dtype))
        return with_hook("spectral_norm", module)

    model, other = layer(), layer()
    orthoserde.save(model, tmp_path / "m")
    assert orthoserde.inspect(tmp_path / "m").parametrized == ()
    assert orthoserde.load(other, tmp_path / "m").fidelity is Fidelity.EXACT
    assert_same_state(model, other)


def test_a_hook_of_a_subclass_is_plain_tensors(tmp_path: Path) -> None:
    model, other = hook_of_a_subclass(nn.Linear(3, 4)), hook_of_a_subclass(nn.Linear(3, 4))
    orthoserde.save(model, tmp_path / "m")
    assert orthoserde.inspect(tmp_path / "m").parametrized == ()
    assert orthoserde.load(other, tmp_path / "m").fidelity is Fidelity.EXACT
    assert_same_state(model, other)
    assert same_bits(output_of(model), output_of(other))
    known = with_hook("spectral_norm", nn.Linear(3, 4))
    assert orthoserde.load(known, tmp_path / "m").fidelity is Fidelity.UNVERIFIED
    orthoserde.save(known, tmp_path / "known")
    report = orthoserde.load(other, tmp_path / "known")
    assert report.fidelity is Fidelity.UNVERIFIED
    text = "weight: torch>spectral_norm computes it in the file, nothing that is known of in the model"
    assert report.notes == (f"{text}; its tensors were loaded all the same",)


def coarse(*, hooked: bool) -> Any:
    """Of a dtype that computes nothing."""
    layer = with_hook("weight_norm", nn.Linear(3, 4, bias=False)) if hooked else nn.Linear(3, 4, bias=False)
    for name, parameter in list(layer.named_parameters()):
        layer.register_parameter(name, nn.Parameter(parameter.detach().to(torch.float8_e4m3fn), requires_grad=False))
    return layer


def test_state_whose_weight_cannot_be_computed_is_loaded_all_the_same_and_the_report_says_so(tmp_path: Path) -> None:
    model, other = coarse(hooked=True), coarse(hooked=True)
    orthoserde.save(model, tmp_path / "m")
    report = orthoserde.load(other, tmp_path / "m")
    assert report.notes[0].startswith("weight: its state is loaded, and its weight cannot be computed: ")
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert bits(ours) == bits(theirs)


def test_a_weight_that_cannot_be_computed_is_refused_by_a_plain_model(tmp_path: Path) -> None:
    safetensors.torch.save_file(dict(coarse(hooked=True).state_dict()), tmp_path / "m")
    model = coarse(hooked=False)
    before = snapshot(model)
    with pytest.raises(IncompatibleModelError, match="torch>weight_norm cannot be computed here"):
        orthoserde.load(model, tmp_path / "m")
    assert_unchanged(model, before)


# Older files


@pytest.mark.parametrize("name", LAYERS)
def test_a_file_that_has_the_tensors_of_hooks_without_a_record_loads_into_them(name: str, tmp_path: Path) -> None:
    model, other = make(name, 0), make(name, 1)
    checkpoint = capture(model, REGISTRY)
    records = tuple(record for record in checkpoint.manifest.parametrized if not record.hooked)
    assert len(records) < len(checkpoint.manifest.parametrized)
    manifest = dataclasses.replace(checkpoint.manifest, parametrized=records)
    storage.write(dataclasses.replace(checkpoint, manifest=manifest), tmp_path / "m")
    assert orthoserde.load(other, tmp_path / "m").fidelity is Fidelity.UNVERIFIED
    assert_same_state(model, other)
    weights = {each: getattr(other[0], each).detach().clone() for each in hooked_names(other[0])}
    assert same_bits(output_of(model[0], name), output_of(other[0], name))
    for each, weight in weights.items():
        assert same_bits(weight, getattr(model[0], each)), each


def half_finished() -> dict[str, Tensor]:
    """What torch before 1.0 kept of spectral_norm: the computed weight, and no second vector."""
    layer = with_hook("spectral_norm", nn.Linear(3, 4))
    state = dict(layer.state_dict()) | {"weight": layer.weight.detach().clone()}
    del state["weight_v"]
    return state


@pytest.mark.parametrize(
    ("target", "text"),
    [
        (lambda: with_hook("spectral_norm", nn.Linear(3, 4)), "weight_v"),
        (lambda: spectral_norm(nn.Linear(3, 4)), "weight_u"),
        (lambda: nn.Linear(3, 4), "weight_u"),
        (lambda: with_hook("weight_norm", nn.Linear(3, 4)), "weight_u"),
    ],
    ids=["hook", "parametrization", "plain", "weight_norm"],
)
def test_spectral_norm_of_torch_before_1_0_is_refused(target: Make, text: str, tmp_path: Path) -> None:
    safetensors.torch.save_file(half_finished(), tmp_path / "m")
    model = lived_in(target())
    before = snapshot(model)
    with pytest.raises(IncompatibleModelError) as caught:
        orthoserde.load(model, tmp_path / "m")
    assert any(text in problem.where or text in problem.text for problem in caught.value.problems)
    assert_unchanged(model, before)


def test_spectral_norm_of_torch_before_1_0_is_refused_by_a_hook_however_lenient_the_load(tmp_path: Path) -> None:
    safetensors.torch.save_file(half_finished(), tmp_path / "m")
    model = lived_in(with_hook("spectral_norm", nn.Linear(3, 4)))
    before = snapshot(model)
    with pytest.raises(IncompatibleModelError, match=r"weight: only part of its state is on both sides \(.*weight_v"):
        orthoserde.load(model, tmp_path / "m", strict=False)
    assert_unchanged(model, before)


def test_a_damaged_file_changes_nothing(tmp_path: Path) -> None:
    orthoserde.save(make("both", 0), tmp_path / "m")
    flip_bit(tmp_path / "m", (tmp_path / "m").stat().st_size - 1)
    model = make("both", 1)
    before = snapshot(model)
    with pytest.raises(DamagedFileError):
        orthoserde.load(model, tmp_path / "m")
    assert_unchanged(model, before)


# Training


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm"])
def test_training_goes_on_bit_for_bit(kind: str, tmp_path: Path) -> None:
    def start(seed: int) -> tuple[Any, torch.optim.Optimizer]:
        torch.manual_seed(seed)
        model = nn.Sequential(with_hook(kind, nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2))
        return model, torch.optim.Adam(model.parameters(), lr=0.05)

    model, optimizer = start(0)
    train(model, optimizer, (4, 3), range(3))
    orthoserde.save(model, tmp_path / "m", optimizer=optimizer)
    other, others = start(1)
    train(other, others, (4, 3), range(50, 53))
    assert orthoserde.load(other, tmp_path / "m", optimizer=others).fidelity is Fidelity.EXACT
    assert train(other, others, (4, 3), range(3, 6)) == train(model, optimizer, (4, 3), range(3, 6))


# Inside of parametrizations


def nested() -> Any:
    layer = nn.Linear(3, 4)
    parametrize.register_parametrization(layer, "weight", Outer())
    return layer


def test_a_hook_inside_of_a_parametrization_makes_a_round_trip(tmp_path: Path) -> None:
    model, other, bare = scramble_(nested()), nested(), nn.Linear(3, 4)
    orthoserde.save(model, tmp_path / "m", registry=REGISTRY)
    assert {record.name for record in orthoserde.inspect(tmp_path / "m").parametrized} == {
        "weight",
        "parametrizations.weight.0.inner.weight",
    }
    for target in (other, bare):
        assert orthoserde.load(target, tmp_path / "m", registry=REGISTRY).fidelity is Fidelity.EXACT
        assert_same_state(model, target)
        assert same_bits(output_of(target), output_of(model))


def test_a_selection_takes_a_parametrization_with_the_hook_inside(tmp_path: Path) -> None:
    for wanted in ("parametrizations.weight.original", "parametrizations.weight.0.inner.weight_u"):
        orthoserde.save(nested(), tmp_path / "m", registry=REGISTRY, select=functools.partial(_is, wanted))
        assert orthoserde.inspect(tmp_path / "m").left_out == ("bias",)


def _is(wanted: str, key: str, tensor: Tensor) -> bool:
    return key == wanted


@pytest.mark.parametrize("wanted", ["inner.weight", "original"])
def test_half_of_a_parametrization_with_a_hook_inside_is_refused_however_lenient_the_load(
    wanted: str, tmp_path: Path
) -> None:
    state = {key: value for key, value in nested().state_dict().items() if wanted in key}
    safetensors.torch.save_file(state, tmp_path / "m")
    model = lived_in(nested())
    before = snapshot(model)
    with pytest.raises(IncompatibleModelError, match="weight: only part of its state is on both sides"):
        orthoserde.load(model, tmp_path / "m", strict=False, registry=REGISTRY)
    assert_unchanged(model, before)


# Tensors that only look like those of a hook


def test_a_model_with_tensors_of_these_names_and_a_weight_gets_them_as_they_are(tmp_path: Path) -> None:
    state = with_hook("weight_norm", nn.Linear(3, 4)).state_dict()
    safetensors.torch.save_file(dict(state), tmp_path / "m")
    model: Any = nn.Linear(3, 4)
    model.weight_g, model.weight_v = nn.Parameter(torch.zeros(4, 1)), nn.Parameter(torch.zeros(4, 3))
    weight = model.weight.detach().clone()
    report = orthoserde.load(model, tmp_path / "m", strict=False)
    assert report.missing_keys == ["weight"]
    assert same_bits(model.weight, weight)
    assert same_bits(model.weight_g, state["weight_g"])


# Everything else that looks at a model or a file


def test_a_file_of_hooks_is_inspected_and_verified(tmp_path: Path) -> None:
    orthoserde.save(make("both", 0), tmp_path / "m")
    manifest = orthoserde.inspect(tmp_path / "m")
    assert "1 x torch>spectral_norm" in str(manifest)
    assert "1 x torch>weight_norm" in str(manifest)
    report = orthoserde.verify(tmp_path / "m")
    assert dict(report.residuals) == {"0.weight": None, "0.bias": None}
    assert not report.misfits
    assert not report.not_measured
    assert not report.damaged


def test_verification_finds_state_that_contradicts_its_configuration(tmp_path: Path) -> None:
    checkpoint = capture(LAYERS["weight_norm"](), REGISTRY)
    (record,) = checkpoint.manifest.parametrized
    link = dataclasses.replace(record.chain[0], config={"dim": 1})
    changed = dataclasses.replace(record, chain=(link,))
    manifest = dataclasses.replace(checkpoint.manifest, parametrized=(changed,))
    storage.write(dataclasses.replace(checkpoint, manifest=manifest), tmp_path / "m")
    assert "expected original0 of shape [1, 3]" in orthoserde.verify(tmp_path / "m").misfits["weight"]


def test_computed_weights_are_those_of_evaluation_mode(tmp_path: Path) -> None:
    layer = LAYERS["spectral_norm"]()
    orthoserde.save(layer, tmp_path / "m", include_weights=True)
    stored = safetensors.torch.load_file(tmp_path / "m")
    output_of(layer)
    assert same_bits(stored["weight"], layer.weight)
    assert orthoserde.load(LAYERS["spectral_norm"](), tmp_path / "m").fidelity is Fidelity.EXACT


def test_plain_torch_loads_the_file_into_the_same_model(tmp_path: Path) -> None:
    model, other = make("both", 0), make("both", 1)
    orthoserde.save(model, tmp_path / "m")
    other.load_state_dict(safetensors.torch.load_file(tmp_path / "m"))
    assert_same_state(model, other)


def test_a_diagnosis_has_nothing_to_say_of_hooks() -> None:
    model = make("both", 0)
    before = snapshot(model)
    assert orthoserde.diagnose(model, torch.optim.Adam(model.parameters())) == []
    assert_unchanged(model, before)


def test_debug_metrics_are_of_hooked_tensors_too(tmp_path: Path) -> None:
    seen: list[Mapping[str, object]] = []
    orthoserde.save(make("both", 0), tmp_path / "m", debug=seen.append)
    orthoserde.load(make("both", 1), tmp_path / "m", debug=seen.append)
    assert [(entry["event"], entry["tensor"]) for entry in seen] == [
        (event, tensor) for event in ("save", "load") for tensor in ("0.bias", "0.weight")
    ]
    assert seen[1]["bytes"] == 4 * (12 + 4 + 3)


def test_a_registered_model_with_hooks_is_built(tmp_path: Path) -> None:
    model = scramble_(Net(width=5))
    orthoserde.save(model, tmp_path / "m", registry=REGISTRY)
    state = torch.random.get_rng_state()
    built: Any = orthoserde.build(tmp_path / "m", registry=REGISTRY)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert_same_state(model, built)
    assert same_bits(output_of(model), output_of(built))


def test_parametrized_tensors_are_those_of_parametrizations_alone() -> None:
    model = with_parametrization()
    assert [tensor.name for tensor in orthoserde.parametrized_tensors(model)] == ["weight"]
    assert [tensor.name for tensor in take_inventory(model).hooked] == ["bias"]
    assert set(slots_of(model)) == {
        "bias_g",
        "bias_v",
        "parametrizations.weight.original",
        "parametrizations.weight.0.base",
    }
