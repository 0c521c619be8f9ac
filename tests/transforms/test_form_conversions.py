"""`to_hooks`, `to_parametrizations` and `bake`: checkpoints in another form."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file, save_model
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

import orthoserde
from orthoserde import ConfigError, Fidelity, storage
from orthoserde.capture import capture
from orthoserde.checkpoint import Checkpoint
from orthoserde.manifest import DENSE, HOOK, SPECTRAL_NORM, WEIGHT_NORM
from orthoserde.parametrizations.hooks import power_method_error
from orthoserde.transforms import bake, compact
from orthoserde.transforms.forms import normed_tensors, to_hooks, to_parametrizations
from tests.helpers import same_bits, scramble_, train, with_hook

REGISTRY = orthoserde.Registry()

#: Registers one form of a norm on a module, given the name of the tensor and dim.
Register = Callable[..., Any]


@REGISTRY.register("forms>Outer")
class Outer(nn.Module):
    """A registered parametrization with a normalised layer inside."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = spectral_norm(nn.Linear(3, 3, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.inner(x)
        return result


@REGISTRY.register("forms>Product")
class Product(nn.Module):
    """Two originals."""

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return left @ right

    def right_inverse(self, value: Tensor) -> tuple[Tensor, Tensor]:
        return value[:, :2].clone(), value[:2].clone()


class Opaque(nn.Module):
    """Not registered."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def save_state(state: Mapping[str, Tensor], path: Path) -> None:
    """Write a state dict without configuration; tied tensors stand under each of their names."""
    save_file({key: value.clone().contiguous() for key, value in state.items()}, path)


def old_weight_norm(module: nn.Module, name: str = "weight", dim: int | None = 0) -> Any:
    return with_hook("weight_norm", module, name, dim)


def old_spectral_norm(module: nn.Module, name: str = "weight", dim: int | None = None) -> Any:
    return with_hook("spectral_norm", module, name, dim=dim)


#: By kind, the hook and the parametrization.
FORMS: dict[str, tuple[Register, Register]] = {
    WEIGHT_NORM: (old_weight_norm, weight_norm),
    SPECTRAL_NORM: (old_spectral_norm, spectral_norm),
}


def layer_of(tensor: Tensor, name: str = "weight") -> Any:
    layer = nn.Module()
    layer.register_parameter(name, nn.Parameter(tensor))
    return layer


#: Makes of a bare module, its tensor and further arguments, for each kind.
PLACES: dict[str, tuple[Callable[[], Any], str, dict[str, object]]] = {
    "linear": (lambda: nn.Linear(3, 4), "weight", {}),
    "convolution": (lambda: nn.Conv2d(3, 4, 2), "weight", {"dim": 0}),
    "transposed": (lambda: nn.ConvTranspose1d(3, 4, 2), "weight", {"dim": 1}),
    "recurrent": (lambda: nn.LSTM(3, 4), "weight_hh_l0", {}),
    "attention": (lambda: nn.MultiheadAttention(4, 2), "in_proj_weight", {}),
    "square": (lambda: nn.Linear(4, 4), "weight", {"dim": 1}),
    "sizes of 1": (lambda: layer_of(torch.randn(1, 1, 5)), "weight", {"dim": 1}),
    "double": (lambda: nn.Linear(3, 4, dtype=torch.float64), "weight", {}),
    "bfloat16": (lambda: nn.Linear(3, 4, dtype=torch.bfloat16), "weight", {}),
    "no path at all": (lambda: layer_of(torch.randn(3, 2), "parametrizations_g"), "parametrizations_g", {}),
}
WEIGHT_NORM_ALONE: dict[str, tuple[Callable[[], Any], str, dict[str, object]]] = {
    "bias": (lambda: nn.Linear(3, 4), "bias", {}),
    "all": (lambda: nn.Conv1d(3, 4, 2), "weight", {"dim": None}),
    "from the last": (lambda: nn.Conv1d(3, 4, 2), "weight", {"dim": -2}),
}
CASES = [pytest.param(kind, place, id=f"{kind}-{place}") for kind in FORMS for place in PLACES]
CASES += [pytest.param(WEIGHT_NORM, place, id=f"{WEIGHT_NORM}-{place}") for place in WEIGHT_NORM_ALONE]


def make(kind: str, place: str, *, hooked: bool, seed: int = 0) -> Any:
    """A module below `a.b`, scrambled; equal seeds give equal state in both forms."""
    torch.manual_seed(seed)
    module, name, options = (PLACES | WEIGHT_NORM_ALONE)[place]
    register = FORMS[kind][0 if hooked else 1]
    model: Any = nn.Module()
    model.a = nn.Module()
    model.a.b = register(module(), name, **options)
    return scramble_(model)


def both(kind: str, place: str) -> tuple[nn.Module, nn.Module]:
    """Models with the same state, with a hook and with a parametrization."""
    hooked, parametrized = make(kind, place, hooked=True), make(kind, place, hooked=False)
    slots = dict(zip(keys_of(kind, place, hooked=True), keys_of(kind, place, hooked=False), strict=True))
    state = {slots.get(key, key): value for key, value in hooked.state_dict().items()}
    parametrized.load_state_dict(state)
    return hooked, parametrized


def keys_of(kind: str, place: str, *, hooked: bool) -> list[str]:
    name = (PLACES | WEIGHT_NORM_ALONE)[place][1]
    if kind == WEIGHT_NORM:
        parts = ["_g", "_v"] if hooked else ["original0", "original1"]
    else:
        parts = ["_orig", "_u", "_v"] if hooked else ["original", "0._u", "0._v"]
    return [f"a.b.{name}{part}" if hooked else f"a.b.parametrizations.{name}.{part}" for part in parts]


def file_of(checkpoint: Checkpoint, path: Path) -> bytes:
    storage.write(checkpoint, path)
    return path.read_bytes()


@pytest.mark.parametrize(("kind", "place"), CASES)
@pytest.mark.parametrize("captured", [True, False])
def test_there_and_back_gives_the_same_bytes(kind: str, place: str, captured: bool, tmp_path: Path) -> None:
    for hooked in (True, False):
        there, back = (to_parametrizations, to_hooks) if hooked else (to_hooks, to_parametrizations)
        checkpoint = capture(make(kind, place, hooked=hooked), REGISTRY)
        expected = file_of(checkpoint, tmp_path / "before")
        if not captured:
            checkpoint = storage.read(tmp_path / "before")
        with checkpoint:
            changed = there(checkpoint)
            assert set(keys_of(kind, place, hooked=not hooked)) <= set(changed.manifest.tensors)
            assert set(keys_of(kind, place, hooked=hooked)).isdisjoint(changed.manifest.tensors)
            assert file_of(back(changed), tmp_path / "after") == expected
            # What is of that form already is let be.
            assert back(checkpoint) is checkpoint


@pytest.mark.parametrize(("kind", "place"), CASES)
def test_a_converted_file_says_what_one_of_a_model_in_that_form_says(kind: str, place: str, tmp_path: Path) -> None:
    hooked, parametrized = both(kind, place)
    for saved, wanted, change in ((hooked, parametrized, to_parametrizations), (parametrized, hooked, to_hooks)):
        file_of(change(capture(saved, REGISTRY)), tmp_path / "converted")
        file_of(capture(wanted, REGISTRY), tmp_path / "wanted")
        ours, theirs = orthoserde.inspect(tmp_path / "converted"), orthoserde.inspect(tmp_path / "wanted")
        assert ours.parametrized == theirs.parametrized
        assert dict(ours.tensors) == dict(theirs.tensors)
        assert (tmp_path / "converted").read_bytes() == (tmp_path / "wanted").read_bytes()
        (record,) = ours.parametrized
        encodings = {*record.originals.values(), *record.chain[0].tensors.values()}
        assert encodings == {HOOK if change is to_hooks else DENSE}


@pytest.mark.parametrize(("kind", "place"), CASES)
@pytest.mark.parametrize("hooked", [True, False])
def test_a_state_dict_is_converted_by_its_keys(kind: str, place: str, hooked: bool, tmp_path: Path) -> None:
    model = make(kind, place, hooked=hooked)
    save_state(dict(model.state_dict()), tmp_path / "state")
    with storage.read(tmp_path / "state") as checkpoint:
        change, back = (to_parametrizations, to_hooks) if hooked else (to_hooks, to_parametrizations)
        if place == "from the last":
            assert len(list(normed_tensors(checkpoint.manifest))) == 1
        changed = change(checkpoint)
        ours, theirs = keys_of(kind, place, hooked=hooked), keys_of(kind, place, hooked=not hooked)
        assert set(changed.manifest.tensors) == set(model.state_dict()) - set(ours) | set(theirs)
        for key, target in zip(ours, theirs, strict=True):
            assert same_bits(changed.tensor(target), model.state_dict()[key])
        again = back(changed)
        assert list(again.manifest.tensors) == list(checkpoint.manifest.tensors)
        assert change(changed) is changed


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_shape_dimension_and_dtype_comes_back(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    kind = data.draw(st.sampled_from([WEIGHT_NORM, SPECTRAL_NORM]))
    shape = data.draw(st.lists(st.integers(1, 4), min_size=1 if kind == WEIGHT_NORM else 2, max_size=4))
    dims = [*range(len(shape)), *([None] if kind == WEIGHT_NORM else [])]
    dim = data.draw(st.sampled_from(dims))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    torch.manual_seed(data.draw(st.integers(0, 3)))
    model = FORMS[kind][0](layer_of(torch.randn(shape, dtype=dtype)), "weight", dim=dim)
    folder = tmp_path_factory.mktemp("any")
    expected = file_of(capture(model, REGISTRY), folder / "hooks")
    with storage.read(folder / "hooks") as checkpoint:
        parametrized = to_parametrizations(checkpoint)
        assert file_of(to_hooks(parametrized), folder / "again") == expected
        storage.write(parametrized, folder / "parametrized")
    bare = layer_of(torch.zeros(shape, dtype=dtype))
    orthoserde.load(bare.eval(), folder / "parametrized")
    with storage.read(folder / "hooks") as checkpoint:
        assert same_bits(bake(checkpoint, REGISTRY).tensor("weight"), bare.weight)
    by_keys = dict(model.state_dict())
    save_state(by_keys, folder / "state")
    with storage.read(folder / "state") as checkpoint:
        assert set(to_hooks(to_parametrizations(checkpoint)).manifest.tensors) == set(by_keys)


# Which tensors


def test_names_choose() -> None:
    model = nn.Sequential(weight_norm(nn.Linear(3, 4)), weight_norm(nn.Linear(4, 2)))
    changed = to_hooks(capture(model, REGISTRY), ["1.weight"])
    assert [record.hooked for record in changed.manifest.parametrized] == [False, True]
    back = to_parametrizations(changed, ["0.weight"])
    assert back is changed
    baked = bake(changed, REGISTRY, ["0.weight"])
    assert "0.weight" in baked.manifest
    assert [record.name for record in baked.manifest.parametrized] == ["1.weight"]


def test_what_has_no_form_with_hooks_stays_as_it_is() -> None:
    vector = spectral_norm(layer_of(torch.randn(5)))
    imaginary = spectral_norm(layer_of(torch.randn(3, 4, dtype=torch.complex64)))
    chain = weight_norm(nn.Linear(3, 4))
    parametrize.register_parametrization(chain, "weight", Opaque())
    model = nn.ModuleDict({"v": vector, "c": imaginary, "chain": chain, "o": orthogonal(nn.Linear(3, 4))})
    checkpoint = capture(model, REGISTRY)
    assert to_hooks(checkpoint) is checkpoint


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_hooks_of_vectors_and_complex_tensors_stay_as_they_are(dtype: torch.dtype, tmp_path: Path) -> None:
    shape = (5,) if dtype == torch.float32 else (3, 4)
    model = old_spectral_norm(layer_of(torch.randn(shape, dtype=dtype)))
    save_state(dict(model.state_dict()), tmp_path / "state")
    with storage.read(tmp_path / "state") as stored:
        for checkpoint in (capture(model, REGISTRY), stored):
            assert to_parametrizations(checkpoint) is checkpoint
            assert set(bake(checkpoint, REGISTRY).manifest.tensors) == {"weight_orig", "weight_u", "weight_v"}


def test_a_complex_parametrization_in_a_state_dict_is_no_hook(tmp_path: Path) -> None:
    model = spectral_norm(layer_of(torch.randn(3, 4, dtype=torch.complex64)))
    save_state(dict(model.state_dict()), tmp_path / "state")
    with storage.read(tmp_path / "state") as checkpoint:
        assert to_hooks(checkpoint) is checkpoint
        with pytest.raises(ConfigError, match="weight: the file does not say what its parametrizations are"):
            bake(checkpoint, REGISTRY)


def test_names_that_are_taken_are_left_alone(tmp_path: Path) -> None:
    layer = weight_norm(nn.Linear(3, 4))
    layer.register_buffer("weight_g", torch.zeros(2))
    checkpoint = capture(layer, REGISTRY)
    assert to_hooks(checkpoint) is checkpoint
    save_state(dict(layer.state_dict()), tmp_path / "state")
    with storage.read(tmp_path / "state") as saved:
        assert to_hooks(saved) is saved


@pytest.mark.parametrize(
    "state",
    [
        {"weight_g": (4, 1), "weight_v": (3, 4)},
        {"weight_g": (4, 1)},
        {"weight_v": (4, 3)},
        {"_g": (4, 1), "_v": (4, 3)},
        {"weight_orig": (4, 3), "weight_u": (4,)},
        {"weight_orig": (4, 3), "weight_u": (3,), "weight_v": (3,)},
        {"weight_orig": (4, 3), "weight_mask": (4, 2)},
        {"parametrizations.weight.original0": (4, 1)},
        {"parametrizations.weight.original0": (4, 2), "parametrizations.weight.original1": (4, 3)},
        {
            "parametrizations.weight.original0": (4, 1),
            "parametrizations.weight.original1": (4, 3),
            "parametrizations.weight.0.more": (1,),
        },
        {"parametrizations.weight.original": (4, 3), "parametrizations.weight.0.base": (4, 4)},
        {"original0": (4, 1), "original1": (4, 3)},
    ],
    ids=" ".join,
)
def test_keys_that_only_look_like_these_are_left_alone(state: dict[str, tuple[int, ...]], tmp_path: Path) -> None:
    save_state({key: torch.zeros(shape) for key, shape in state.items()}, tmp_path / "state")
    with storage.read(tmp_path / "state") as checkpoint:
        assert list(normed_tensors(checkpoint.manifest)) == []
        assert to_hooks(checkpoint) is checkpoint
        assert to_parametrizations(checkpoint) is checkpoint


# What is shared, nested, and stored beside


def shared(register: Register) -> Any:
    model: Any = nn.Module()
    model.a = register(nn.Linear(3, 4))
    model.b = model.a
    return model


@pytest.mark.parametrize("kind", FORMS)
def test_a_shared_module_is_converted_under_all_its_paths(kind: str, tmp_path: Path) -> None:
    hook, parametrization = FORMS[kind]
    for register, change, back in (
        (hook, to_parametrizations, to_hooks),
        (parametrization, to_hooks, to_parametrizations),
    ):
        model = shared(register)
        other = shared(parametrization if register is hook else hook)
        expected = file_of(capture(model, REGISTRY), tmp_path / "before")
        save_state(dict(model.state_dict()), tmp_path / "copies")
        save_model(model, str(tmp_path / "aliases"))
        for path in (tmp_path / "before", tmp_path / "aliases", tmp_path / "copies"):
            with storage.read(path) as checkpoint:
                changed = change(checkpoint)
                keys = {*changed.manifest.tensors, *changed.manifest.aliases}
                assert keys == set(other.state_dict())
                if path.name != "copies":
                    assert set(changed.manifest.aliases) == {key for key in keys if key.startswith("b.")}
                if path.name == "before":
                    assert file_of(back(changed), tmp_path / "after") == expected


@pytest.mark.parametrize("kind", FORMS)
@pytest.mark.parametrize("ours", [True, False])
def test_a_shared_module_is_baked_once(kind: str, ours: bool, tmp_path: Path) -> None:
    model = shared(FORMS[kind][1]).eval()
    path = tmp_path / "m"
    orthoserde.save(model, path) if ours else save_model(model, str(path))
    with storage.read(path) as checkpoint:
        baked = bake(checkpoint, REGISTRY)
        assert set(baked.manifest.tensors) == {"a.weight", "a.bias"}
        assert dict(baked.manifest.aliases) == {"b.weight": "a.weight", "b.bias": "a.bias"}
        assert same_bits(baked.tensor("a.weight"), model.a.weight)


@pytest.mark.parametrize("hooked", [True, False])
def test_a_tied_original_keeps_its_tie(hooked: bool, tmp_path: Path) -> None:
    model: Any = nn.Module()
    model.first = nn.Linear(3, 4, bias=False)
    model.last = FORMS[WEIGHT_NORM][0 if hooked else 1](nn.Linear(3, 4, bias=False))
    direction = "last.weight_v" if hooked else "last.parametrizations.weight.original1"
    model.first.weight = model.get_parameter(direction)
    change, back = (to_parametrizations, to_hooks) if hooked else (to_hooks, to_parametrizations)
    checkpoint = capture(model, REGISTRY)
    expected = file_of(checkpoint, tmp_path / "before")
    changed = change(checkpoint)
    other = "last.parametrizations.weight.original1" if hooked else "last.weight_v"
    assert dict(changed.manifest.aliases) == {other: "first.weight"}
    assert file_of(back(changed), tmp_path / "after") == expected
    baked = bake(checkpoint, REGISTRY)
    assert set(baked.manifest.tensors) == {"first.weight", "last.weight"}
    assert baked.manifest.aliases == {}
    assert same_bits(baked.tensor("last.weight"), model.last.weight)
    assert same_bits(baked.tensor("first.weight"), model.first.weight)


def test_a_tensor_that_goes_stays_under_the_names_that_it_is_tied_to() -> None:
    model: Any = nn.Module()
    model.norm = weight_norm(nn.Linear(3, 4, bias=False))
    model.one = nn.Linear(3, 4, bias=False)
    model.one.weight = model.norm.get_parameter("parametrizations.weight.original1")
    model.two = model.one
    baked = bake(capture(model, REGISTRY), REGISTRY)
    assert set(baked.manifest.tensors) == {"norm.weight", "one.weight"}
    assert dict(baked.manifest.aliases) == {"two.weight": "one.weight"}
    assert same_bits(baked.tensor("one.weight"), model.one.weight)


def nested() -> Any:
    layer = nn.Linear(3, 4)
    parametrize.register_parametrization(layer, "weight", Outer())
    return layer.eval()


def test_what_is_inside_of_a_parametrization_is_converted_in_its_record_too(tmp_path: Path) -> None:
    checkpoint = capture(nested(), REGISTRY)
    expected = file_of(checkpoint, tmp_path / "before")
    changed = to_hooks(checkpoint)
    storage.write(changed, tmp_path / "hooks")
    outer, inner = orthoserde.inspect(tmp_path / "hooks").parametrized
    assert dict(outer.chain[0].tensors) == dict.fromkeys(
        ["inner.weight_orig", "inner.weight_u", "inner.weight_v"], DENSE
    )
    assert inner.hooked
    assert file_of(to_parametrizations(changed), tmp_path / "after") == expected


def test_what_is_inside_of_a_parametrization_goes_with_it() -> None:
    model = nested()
    for include in (False, True):
        baked = bake(capture(model, REGISTRY, include_weights=include), REGISTRY)
        assert set(baked.manifest.tensors) == {"weight", "bias"}
        assert set(baked.sources) == {"weight", "bias"}
        manifest = baked.manifest
        assert not [*manifest.parametrized, *manifest.modules, *manifest.computed]
        assert same_bits(baked.tensor("weight"), model.weight)


def test_what_is_inside_of_a_parametrization_is_not_baked_without_it() -> None:
    with pytest.raises(ConfigError, match="part of a parametrization that stays"):
        bake(capture(nested(), REGISTRY), REGISTRY, ["parametrizations.weight.0.inner.weight"])


@pytest.mark.parametrize("hooked", [True, False])
def test_computed_weights_stay_where_they_are_and_are_taken_by_baking(hooked: bool, tmp_path: Path) -> None:
    model = make(WEIGHT_NORM, "linear", hooked=hooked)
    checkpoint = capture(model, REGISTRY, include_weights=True)
    change = to_parametrizations if hooked else to_hooks
    changed = change(checkpoint)
    storage.write(changed, tmp_path / "m")
    assert orthoserde.inspect(tmp_path / "m").computed == ("a.b.weight",)
    with storage.read(tmp_path / "m") as saved:
        baked = bake(saved, REGISTRY)
        assert baked.manifest.computed == ()
        record = baked.manifest.tensors["a.b.weight"]
        assert record.parameter
        assert record.requires_grad
        assert record.digest == saved.manifest.tensors["a.b.weight"].digest


@pytest.mark.parametrize("hooked", [True, False])
def test_what_was_left_out_is_renamed_when_a_model_of_the_other_form_asks(hooked: bool, tmp_path: Path) -> None:
    def model(form: int) -> Any:
        frozen = FORMS[WEIGHT_NORM][form](nn.Linear(3, 4)).requires_grad_(False)
        return nn.Sequential(frozen, FORMS[SPECTRAL_NORM][form](nn.Linear(4, 2)))

    orthoserde.save(model(0 if hooked else 1), tmp_path / "m", select="trainable")
    report = orthoserde.load(model(1 if hooked else 0), tmp_path / "m")
    assert list(report.tensors) == ["1.weight"]
    assert any("3 tensors were left out" in note for note in report.notes)


# Baking


def with_link(layer: Any, link: nn.Module, name: str = "weight") -> Any:
    parametrize.register_parametrization(layer, name, link)
    return layer


def with_buffer() -> Any:
    layer = nn.Linear(3, 4)
    layer.register_buffer("scale", torch.randn(4, 3))
    return with_link(layer, Outer(), "scale")


BAKED: dict[str, Callable[[], Any]] = {
    "orthogonal": lambda: orthogonal(nn.Linear(3, 4)),
    "structured": lambda: orthoserde.orthogonal(nn.Linear(3, 4), "weight", "cayley", structured=True),
    "registered": lambda: with_link(nn.Linear(3, 3), Outer()),
    "two originals": lambda: with_link(nn.Linear(3, 4), Product()),
    "chain": lambda: with_link(orthogonal(nn.Linear(3, 4)), Outer()),
    "buffer": with_buffer,
    "bias": lambda: weight_norm(nn.Linear(3, 4), "bias"),
}


@pytest.mark.parametrize("name", BAKED)
@pytest.mark.parametrize("from_file", [True, False])
@pytest.mark.parametrize("trained", [True, False])
def test_a_baked_checkpoint_is_that_of_the_baked_model(
    name: str, from_file: bool, trained: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = scramble_(BAKED[name]()).requires_grad_(trained).eval()
    checkpoint = capture(model, REGISTRY)
    if from_file:
        storage.write(checkpoint, tmp_path / "m")
        checkpoint = storage.read(tmp_path / "m")
    with checkpoint:
        storage.write(bake(checkpoint, REGISTRY), tmp_path / "baked")
    orthoserde.bake_(model, registry=REGISTRY)
    orthoserde.save(model, tmp_path / "plain", registry=REGISTRY)
    ours, theirs = orthoserde.inspect(tmp_path / "baked"), orthoserde.inspect(tmp_path / "plain")
    assert ours.parametrized == ()
    assert dict(ours.digests) == dict(theirs.digests)
    for key, record in ours.tensors.items():
        assert (record.parameter, record.requires_grad) == (
            theirs.tensors[key].parameter,
            theirs.tensors[key].requires_grad,
        )
    assert orthoserde.load(model, tmp_path / "baked", registry=REGISTRY).fidelity is Fidelity.EXACT


def test_compact_bases_are_completed_for_it() -> None:
    model: Any = orthoserde.orthogonal(nn.Linear(3, 8))
    packed = compact(capture(model, REGISTRY))
    assert packed.manifest.compact == ("weight",)
    assert same_bits(bake(packed, REGISTRY).tensor("weight"), model.weight)


def test_a_weight_is_that_of_evaluation_mode_and_no_vector_moves() -> None:
    model = old_spectral_norm(nn.Linear(3, 4)).train()
    vectors = [model.weight_u.clone(), model.weight_v.clone()]
    weight = bake(capture(model, REGISTRY), REGISTRY).tensor("weight")
    assert torch.equal(model.weight_u, vectors[0])
    assert torch.equal(model.weight_v, vectors[1])
    model.eval()(torch.ones(1, 3))
    assert same_bits(weight, model.weight)


def test_everything_that_cannot_be_computed_is_listed() -> None:
    model = nn.Sequential(
        with_link(nn.Linear(3, 4), Opaque()), orthogonal(nn.Linear(4, 4)), with_link(nn.Linear(4, 2), Opaque(), "bias")
    )
    with pytest.raises(ConfigError) as caught:
        bake(capture(model, REGISTRY), REGISTRY)
    text = str(caught.value)
    assert "2 tensors cannot be computed" in text
    for name in ("0.weight", "2.bias"):
        assert f"- {name}: " in text
    assert "Opaque was not registered when it was saved" in text
    assert list(bake(capture(model, REGISTRY), REGISTRY, ["1.weight"]).manifest.tensors)[:2]


def test_a_class_that_is_not_registered_here_is_baked_where_the_file_has_the_weight(tmp_path: Path) -> None:
    model = with_link(nn.Linear(3, 4), Product())
    elsewhere = orthoserde.Registry()
    orthoserde.save(model, tmp_path / "without", registry=REGISTRY)
    orthoserde.save(model, tmp_path / "with", registry=REGISTRY, include_weights=True)
    with (
        storage.read(tmp_path / "without") as checkpoint,
        pytest.raises(ConfigError, match="forms>Product is not registered in this process"),
    ):
        bake(checkpoint, elsewhere)
    with storage.read(tmp_path / "with") as checkpoint:
        assert same_bits(bake(checkpoint, elsewhere).tensor("weight"), model.weight)


def test_training_state_goes(tmp_path: Path) -> None:
    model = weight_norm(nn.Linear(3, 4))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    orthoserde.save(model, tmp_path / "m", optimizer=optimizer, state={"step": 3})
    with storage.read(tmp_path / "m") as checkpoint:
        baked = bake(checkpoint, REGISTRY)
        assert baked.manifest.training is None
        assert set(baked.manifest.tensors) == {"weight", "bias"}


@pytest.mark.parametrize("hooked", [True, False])
def test_a_tensor_of_the_name_of_the_baked_one_is_not_overwritten(hooked: bool, tmp_path: Path) -> None:
    state = dict(make(WEIGHT_NORM, "linear", hooked=hooked).state_dict()) | {"a.b.weight": torch.zeros(4, 3)}
    save_state(state, tmp_path / "state")
    with (
        storage.read(tmp_path / "state") as checkpoint,
        pytest.raises(ConfigError, match=r"the file also has a tensor 'a\.b\.weight'"),
    ):
        bake(checkpoint, REGISTRY)


def test_state_that_contradicts_its_configuration_is_refused_before_anything_is_read() -> None:
    checkpoint = capture(weight_norm(nn.Linear(3, 4)), REGISTRY)
    (record,) = checkpoint.manifest.parametrized
    link = dataclasses.replace(record.chain[0], config={"dim": 1})
    manifest = dataclasses.replace(checkpoint.manifest, parametrized=(dataclasses.replace(record, chain=(link,)),))
    with pytest.raises(ConfigError, match=r"expected original0 of shape \[1, 3\], got \[4, 1\]"):
        bake(dataclasses.replace(checkpoint, manifest=manifest), REGISTRY)


def test_state_of_two_dtypes_in_a_state_dict_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    state = old_weight_norm(nn.Linear(3, 4)).state_dict()
    save_state(dict(state) | {"weight_v": state["weight_v"].bfloat16()}, tmp_path / "state")
    with (
        storage.read(tmp_path / "state") as checkpoint,
        pytest.raises(ConfigError, match="recorded with dtype bfloat16, its state gives float32"),
    ):
        bake(checkpoint, REGISTRY)


# Note [By its keys]: square weights


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("hooked", [True, False])
@pytest.mark.parametrize("size", [3, 16])
def test_vectors_say_which_dimension_of_a_square_weight_is_normalised(
    dim: int, hooked: bool, size: int, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = FORMS[SPECTRAL_NORM][0 if hooked else 1](nn.Linear(size, size), dim=dim)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.randn(4, size)).square().sum().backward()
        optimizer.step()
    model.eval()(torch.ones(1, size))
    save_state(dict(model.state_dict()), tmp_path / "state")
    with storage.read(tmp_path / "state") as checkpoint:
        assert same_bits(bake(checkpoint, REGISTRY).tensor("weight"), model.weight)


def test_vectors_that_are_of_neither_dimension_are_refused(tmp_path: Path) -> None:
    state = {"weight_orig": torch.eye(4).roll(1, 0), "weight_u": torch.eye(4)[0], "weight_v": torch.eye(4)[2]}
    save_state(state, tmp_path / "state")
    with (
        storage.read(tmp_path / "state") as checkpoint,
        pytest.raises(ConfigError, match="the file does not have the configuration of its torch>spectral_norm"),
    ):
        bake(checkpoint, REGISTRY)


def test_the_power_method_error_is_zero_for_what_an_iteration_leaves_and_not_for_the_other_dimension() -> None:
    torch.manual_seed(0)
    weight, start = torch.randn(5, 5), nn.functional.normalize(torch.randn(5), dim=0)
    for dim in (0, 1):
        matrix = weight if dim == 0 else weight.mT
        v = nn.functional.normalize(matrix.mT @ start, dim=0)
        u = nn.functional.normalize(matrix @ v, dim=0)
        assert power_method_error(weight, u, v, dim) < 1e-6
        assert power_method_error(weight, u, v, 1 - dim) > 0.1
    assert power_method_error(torch.zeros(2, 2), torch.ones(2), torch.ones(2), 0) > 0.5
    assert power_method_error(torch.full((2, 2), torch.nan), torch.ones(2), torch.ones(2), 0) == torch.inf


# Training goes on


def steps(model: Any, optimizer: torch.optim.Optimizer, first: int) -> list[float]:
    return train(model, optimizer, (5, 3), range(first, first + 3))


@pytest.mark.parametrize("hooked", [True, False])
def test_adam_goes_on_with_weight_norm_in_the_other_form_bit_for_bit(hooked: bool, tmp_path: Path) -> None:
    def start(form: bool, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(seed)
        register = FORMS[WEIGHT_NORM][0 if form else 1]
        model = nn.Sequential(register(nn.Linear(3, 4)), nn.Tanh(), register(nn.Linear(4, 2), "bias"))
        return model, torch.optim.Adam(model.parameters(), lr=0.01)

    model, optimizer = start(hooked, 0)
    steps(model, optimizer, 0)
    orthoserde.save(model, tmp_path / "one", optimizer=optimizer)
    other, others = start(not hooked, 1)
    report = orthoserde.load(other, tmp_path / "one", optimizer=others)
    assert report.fidelity is Fidelity.EXACT
    expected = steps(model, optimizer, 3)
    assert steps(other, others, 3) == expected
    # And back.
    orthoserde.save(other, tmp_path / "two", optimizer=others)
    third, thirds = start(hooked, 2)
    orthoserde.load(third, tmp_path / "two", optimizer=thirds)
    assert steps(third, thirds, 6) == steps(model, optimizer, 6)


@pytest.mark.parametrize("hooked", [True, False])
def test_training_state_of_spectral_norm_is_renamed_too(hooked: bool, tmp_path: Path) -> None:
    def start(form: bool) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = FORMS[SPECTRAL_NORM][0 if form else 1](nn.Linear(3, 4))
        return model, torch.optim.Adam(model.parameters(), lr=0.01)

    model, optimizer = start(hooked)
    steps(model, optimizer, 0)
    orthoserde.save(model, tmp_path / "m", optimizer=optimizer)
    other, others = start(not hooked)
    assert orthoserde.load(other, tmp_path / "m", optimizer=others).fidelity is Fidelity.UNVERIFIED
    ours = "weight_orig" if hooked else "parametrizations.weight.original"
    theirs = "parametrizations.weight.original" if hooked else "weight_orig"
    one, two = optimizer.state[model.get_parameter(ours)], others.state[other.get_parameter(theirs)]
    assert one.keys() == two.keys()
    assert all(same_bits(one[key], two[key]) for key in one)
