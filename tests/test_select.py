"""What a file holds: the whole model, the trainable part, an adapter, or what a callable picks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

import orthoserde
from orthoserde import ConfigError, Fidelity, IncompatibleModelError, Registry, UnsupportedModuleError
from tests.helpers import assert_unchanged, snapshot

registry = Registry()


@registry.register("tests>Adapter", adapter=True)
class Adapter(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.down = orthogonal(nn.Linear(width, 2, bias=False))
        self.scale = nn.Parameter(torch.ones(2), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(x) @ self.down.weight * self.scale.sum()
        return out


class Inherited(Adapter):
    pass


class Base(nn.Module):
    """A frozen base with an adapter in it, and one of every sort of state that is none of a frozen parameter."""

    def __init__(self, adapter: type[Adapter] = Adapter) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = orthogonal(nn.Linear(4, 2))
        self.register_buffer("positions", torch.arange(4))
        self.requires_grad_(False)
        self.adapter = adapter(4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.adapter(self.norm(self.first(x))))
        return out


BUFFERS = ["norm.running_mean", "norm.running_var", "norm.num_batches_tracked", "positions"]
ADAPTER = [
    "adapter.down.parametrizations.weight.original",
    "adapter.down.parametrizations.weight.0.base",
    "adapter.scale",
]


def keys(path: Path) -> set[str]:
    manifest = orthoserde.inspect(path)
    return {*manifest.tensors, *manifest.aliases}


def is_key(wanted: str, key: str, _: Tensor) -> bool:
    return key == wanted


def weight_of(adapter: object) -> Tensor:
    assert isinstance(adapter, Adapter)
    assert isinstance(adapter.down.weight, Tensor)
    return adapter.down.weight


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("adapter", [Adapter, Inherited])
def test_of_a_model_with_an_adapter_the_frozen_tensors_outside_of_it_are_left_out(
    path: Path, adapter: type[Adapter]
) -> None:
    model = Base(adapter)
    report = orthoserde.save(model, path, registry=registry)
    assert keys(path) == {*ADAPTER, *BUFFERS}
    assert {*keys(path), *report.left_out} == set(model.state_dict())
    assert orthoserde.inspect(path).left_out == report.left_out
    assert f"left out: {len(report.left_out)}" in str(report)
    assert any("is not all in it" in reason for reason in report.needs_orthoserde)


def test_a_trainable_tensor_is_never_left_out(path: Path) -> None:
    model = Base()
    model.first.bias.requires_grad_(True)
    orthoserde.save(model, path, registry=registry)
    assert keys(path) == {*ADAPTER, *BUFFERS, "first.bias"}


def test_a_model_without_an_adapter_is_saved_whole(path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).requires_grad_(False)
    model[1].requires_grad_(True)
    assert not orthoserde.save(model, path).left_out
    assert keys(path) == set(model.state_dict())


def test_all_saves_everything_beside_an_adapter(path: Path) -> None:
    model = Base()
    assert not orthoserde.save(model, path, select="all", registry=registry).left_out
    assert keys(path) == set(model.state_dict())


def test_trainable_leaves_out_what_is_frozen_inside_of_an_adapter_too(path: Path) -> None:
    orthoserde.save(Base(), path, select="trainable", registry=registry)
    assert keys(path) == {*ADAPTER[:2], *BUFFERS}


def test_trainable_keeps_buffers(path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    for layer in model:
        layer.register_buffer("mask", torch.ones(2))
    model[0].requires_grad_(False)
    orthoserde.save(model, path, select="trainable")
    assert keys(path) == {"0.mask", "1.weight", "1.bias", "1.mask"}


@pytest.mark.parametrize("parametrize", [orthogonal, weight_norm, spectral_norm])
def test_a_parametrized_tensor_is_saved_whole_if_any_part_of_it_is_selected(
    path: Path, parametrize: Callable[[nn.Module], nn.Module]
) -> None:
    model = nn.Sequential(parametrize(nn.Linear(4, 4, bias=False)), nn.Linear(4, 4, bias=False))
    parts = {key for key in model.state_dict() if key.startswith("0.")}
    for part in parts:
        orthoserde.save(model, path, select=functools.partial(is_key, part))
        assert keys(path) == parts


def test_spectral_norm_of_a_frozen_weight_is_not_frozen(path: Path) -> None:
    model = nn.Sequential(spectral_norm(nn.Linear(4, 4)).requires_grad_(False), nn.Linear(4, 4))
    orthoserde.save(model, path, select="trainable")
    assert {key for key in keys(path) if key.startswith("0.")} == set(model.state_dict()) - {
        "0.bias",
        "1.weight",
        "1.bias",
    }


def test_a_callable_is_asked_once_for_every_tensor_by_its_key(path: Path) -> None:
    model = Base()
    asked: list[tuple[str, int]] = []

    def select(key: str, tensor: Tensor) -> bool:
        asked.append((key, id(tensor)))
        return key.startswith("first.")

    orthoserde.save(model, path, select=select, registry=registry)
    assert [key for key, _ in asked] == list(model.state_dict())
    state = model.state_dict(keep_vars=True)
    assert all(identifier == id(state[key]) for key, identifier in asked)
    assert keys(path) == {"first.weight", "first.bias"}


def test_a_tied_tensor_is_saved_under_all_of_its_names(path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    orthoserde.save(model, path, select=lambda key, _: key == "1.weight")
    assert keys(path) == {"0.weight", "1.weight"}
    assert orthoserde.inspect(path).aliases == {"1.weight": "0.weight"}


def test_an_average_of_a_model_with_an_adapter_goes_on(path: Path) -> None:
    model, other = (torch.optim.swa_utils.AveragedModel(Base()) for _ in range(2))
    model.update_parameters(Base())
    orthoserde.save(model, path, registry=registry)
    orthoserde.load(other, path, registry=registry)
    assert int(other.n_averaged) == 1


def test_the_running_vectors_of_old_spectral_norm_are_kept_and_the_weight_that_they_belong_to(path: Path) -> None:
    model = Base()
    model.old = nn.utils.spectral_norm(nn.Linear(3, 3)).requires_grad_(False)
    orthoserde.save(model, path, registry=registry)
    assert {"old.weight_u", "old.weight_v", "old.weight_orig"} <= keys(path)
    assert "old.bias" not in keys(path)


@pytest.mark.parametrize("select", ["adapter", 3, ["0.weight"], True, torch.ones(2)])
def test_anything_else_is_refused_and_the_previous_file_kept(path: Path, select: object) -> None:
    path.write_bytes(b"before")
    with pytest.raises(ConfigError, match="'trainable' or a callable"):
        orthoserde.save(nn.Linear(2, 2), path, select=select)  # type: ignore[arg-type]
    assert path.read_bytes() == b"before"


def test_a_selection_of_nothing_is_refused(path: Path) -> None:
    with pytest.raises(ConfigError, match="none of the 2 tensors"):
        orthoserde.save(nn.Linear(2, 2).requires_grad_(False), path, select="trainable")
    assert not path.exists()


def test_an_error_of_the_callable_reaches_the_caller(path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        orthoserde.save(nn.Linear(2, 2), path, select=lambda *_: bool(1 // 0))
    assert not path.exists()


def test_a_strict_load_asks_for_exactly_what_was_selected(path: Path) -> None:
    model, other = Base(), Base()
    orthoserde.save(model, path, registry=registry)
    frozen = {key: value.clone() for key, value in other.state_dict().items() if key not in keys(path)}
    report = orthoserde.load(other, path, registry=registry)
    assert report.fidelity is Fidelity.EXACT
    assert any(f"{len(frozen)} tensors were left out" in note for note in report.notes)
    state = other.state_dict()
    assert all(torch.equal(state[key], value) for key, value in frozen.items())
    assert all(torch.equal(state[key], model.state_dict()[key]) for key in keys(path))


def test_what_was_selected_is_asked_for(path: Path) -> None:
    orthoserde.save(Base(), path, registry=registry)
    smaller = Base()
    del smaller.norm
    before = snapshot(smaller)
    with pytest.raises(IncompatibleModelError) as caught:
        orthoserde.load(smaller, path, registry=registry)
    assert set(caught.value.unexpected_keys) == set(BUFFERS[:3])
    assert_unchanged(smaller, before)


def test_what_was_not_there_when_it_was_saved_is_missing(path: Path) -> None:
    orthoserde.save(Base(), path, registry=registry)
    larger = Base()
    larger.more = nn.Linear(2, 2)
    with pytest.raises(IncompatibleModelError) as caught:
        orthoserde.load(larger, path, registry=registry)
    assert caught.value.missing_keys == ["more.weight", "more.bias"]


def test_a_frozen_base_on_the_meta_device_is_left_there_and_that_is_said(path: Path) -> None:
    orthoserde.save(Base(), path, registry=registry)
    with torch.device("meta"):
        model = Base()
    report = orthoserde.load(model, path, registry=registry)
    assert model.first.weight.device.type == "meta"
    assert model.adapter.scale.device.type == "cpu"
    assert any("meta" in note and "first.weight" in note for note in report.notes)


def test_the_adapter_of_a_file_is_built(path: Path) -> None:
    model = Base()
    model.norm = nn.BatchNorm1d(4, track_running_stats=False, affine=False)
    del model.positions
    orthoserde.save(model, path, registry=registry)
    built = orthoserde.build(path, registry=registry)
    assert type(built) is Adapter
    assert torch.equal(weight_of(built), weight_of(model.adapter))


def test_a_selection_that_is_no_adapter_alone_is_not_built(path: Path) -> None:
    orthoserde.save(Base(), path, registry=registry)
    with pytest.raises(ConfigError, match="selection of the tensors"):
        orthoserde.build(path, registry=registry)


class Packed(nn.Module):
    """Like a quantized layer: its state is none of its tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.packed = torch.ones(2)

    def _save_to_state_dict(self, destination: dict[str, object], prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}packed"] = self.packed


class Extra(nn.Module):
    def get_extra_state(self) -> object:
        return {"step": 3}


@pytest.mark.parametrize(("cls", "name"), [(Packed, "packed"), (Extra, "_extra_state")])
def test_a_base_that_cannot_be_stored_can_be_left_out(path: Path, cls: type[nn.Module], name: str) -> None:
    model, other = Base(), Base()
    model.quantized, other.quantized = cls(), cls()
    report = orthoserde.save(model, path, registry=registry)
    assert f"quantized.{name}" in report.left_out
    assert orthoserde.load(other, path, registry=registry).fidelity is Fidelity.EXACT
    assert torch.equal(weight_of(other.adapter), weight_of(model.adapter))


def test_a_callable_leaves_out_what_it_was_not_asked_for(path: Path) -> None:
    model = Base()
    model.quantized = Packed()
    report = orthoserde.save(model, path, select=lambda key, _: key.startswith("adapter."), registry=registry)
    assert "quantized.packed" in report.left_out


@pytest.mark.parametrize("cls", [Packed, Extra])
def test_state_that_cannot_be_stored_is_refused_where_it_is_not_left_out(path: Path, cls: type[nn.Module]) -> None:
    model = Base()
    model.quantized = cls()
    with pytest.raises(UnsupportedModuleError, match="quantized"):
        orthoserde.save(model, path, select="all", registry=registry)
    model = Base()
    model.adapter.quantized = cls()
    with pytest.raises(UnsupportedModuleError, match=r"adapter\.quantized"):
        orthoserde.save(model, path, registry=registry)
    assert not path.exists()


def test_a_file_that_holds_everything_does_not_fit_a_model_with_other_state(path: Path) -> None:
    orthoserde.save(Base(), path, registry=registry)
    model = Base()
    model.adapter.quantized = Packed()
    with pytest.raises(IncompatibleModelError, match=r"adapter\.quantized"):
        orthoserde.load(model, path, registry=registry)


def test_an_error_says_what_the_file_is_of_and_where_the_model_has_that(path: Path) -> None:
    orthoserde.save(Adapter(4), path, registry=registry)
    with pytest.raises(IncompatibleModelError, match=r"holds a tests>Adapter at 'the root'; .* is at 'adapter'"):
        orthoserde.load(Base(), path, registry=registry)
    with pytest.raises(IncompatibleModelError, match="holds a tests>Adapter, and the model none: make the model"):
        orthoserde.load(nn.Linear(2, 2), path, registry=registry)


def test_a_subclass_of_an_adapter_is_one_and_an_extended_registry_knows_more() -> None:
    assert registry.is_adapter(Inherited)
    assert not registry.is_adapter(nn.Linear)
    extended = registry.extended([], adapters=[nn.Linear])
    assert extended.is_adapter(nn.Linear)
    assert extended.is_adapter(Adapter)
    assert extended.for_kind("tests>Adapter") is registry.for_kind("tests>Adapter")
    assert not registry.is_adapter(nn.Linear)
