"""Bare modules that get their parametrizations back, where that is delicate."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrize, prune
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

import orthoserde
from orthoserde import Fidelity, IncompatibleModelError, Registry, UnsupportedModuleError, _torch, storage
from orthoserde.checkpoint import Checkpoint
from orthoserde.manifest import ParametrizedRecord
from tests.helpers import assert_unchanged, snapshot


def linear(link: nn.Module) -> nn.Linear:
    layer = nn.Linear(4, 4)
    parametrize.register_parametrization(layer, "weight", link, unsafe=True)
    return layer


def rewritten(source: Path, target: Path, change: Callable[[ParametrizedRecord], ParametrizedRecord]) -> None:
    """Write a file whose digests are right and whose records say something else."""
    with storage.read(source) as checkpoint:
        records = tuple(change(record) for record in checkpoint.manifest.parametrized)
        manifest = dataclasses.replace(checkpoint.manifest, parametrized=records)
        storage.write(Checkpoint(manifest, checkpoint.sources, "a test"), target)


def with_config(**changes: Any) -> Callable[[ParametrizedRecord], ParametrizedRecord]:
    def change(record: ParametrizedRecord) -> ParametrizedRecord:
        (link,) = record.chain
        config = {**(link.config or {}), **changes}
        return dataclasses.replace(record, chain=(dataclasses.replace(link, config=config),))

    return change


def test_two_tensors_of_the_file_cannot_go_to_one_shared_module(tmp_path: Path) -> None:
    model = nn.Sequential(orthogonal(nn.Linear(4, 4, bias=False)), orthogonal(nn.Linear(4, 4, bias=False)))
    orthoserde.save(model, tmp_path / "m")
    layer = nn.Linear(4, 4, bias=False)
    target = nn.Sequential(layer, layer)
    before = snapshot(target)
    with pytest.raises(IncompatibleModelError, match=r"1\.weight: separate from 0\.weight in the file"):
        orthoserde.load(target, tmp_path / "m")
    assert_unchanged(target, before)


def test_many_originals_keep_their_order(tmp_path: Path) -> None:
    registry = Registry()

    @registry.register("tests>Many")
    class Many(nn.Module):
        def forward(self, *parts: Tensor) -> Tensor:
            return torch.stack([i * part for i, part in enumerate(parts)]).sum(0)

        def right_inverse(self, value: Tensor) -> tuple[Tensor, ...]:
            return tuple(value + i for i in range(12))

    model = linear(Many())
    orthoserde.save(model, tmp_path / "m", registry=registry)
    bare = nn.Linear(4, 4)
    assert orthoserde.load(bare, tmp_path / "m", registry=registry).fidelity is Fidelity.EXACT
    assert torch.equal(bare.weight, model.weight)
    assert list(bare.state_dict()) == list(model.state_dict())


def test_a_single_original0_stays_one(tmp_path: Path) -> None:
    registry = Registry()

    @registry.register("tests>One")
    class One(nn.Module):
        def forward(self, part: Tensor) -> Tensor:
            return part

        def right_inverse(self, value: Tensor) -> tuple[Tensor]:
            return (value.clone(),)

    model, bare = linear(One()), nn.Linear(4, 4)
    orthoserde.save(model, tmp_path / "m", registry=registry)
    orthoserde.load(bare, tmp_path / "m", registry=registry)
    assert list(bare.state_dict()) == list(model.state_dict()) == ["bias", "parametrizations.weight.original0"]
    assert orthoserde.load(bare, tmp_path / "m", registry=registry).fidelity is Fidelity.EXACT


def test_a_tie_with_new_parameters_is_refused_and_reported(tmp_path: Path) -> None:
    def make() -> nn.ModuleDict:
        return nn.ModuleDict({"embedding": nn.Embedding(4, 4), "layer": nn.Linear(4, 4, bias=False)})

    model = make()
    weight_norm(model.get_submodule("layer"))
    original = model.get_parameter("layer.parametrizations.weight.original1")
    model.get_submodule("embedding").register_parameter("weight", original)
    orthoserde.save(model, tmp_path / "m")
    target = make()
    target.get_submodule("layer").register_parameter("weight", target.get_parameter("embedding.weight"))
    before = snapshot(target)
    with pytest.raises(IncompatibleModelError, match=r"tied to embedding\.weight in the file"):
        orthoserde.load(target, tmp_path / "m")
    assert_unchanged(target, before)
    report = orthoserde.load(target, tmp_path / "m", strict=False)
    assert report.fidelity is Fidelity.UNVERIFIED


def test_memory_that_the_model_shares_is_not_torn_apart(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 5, bias=False), orthogonal(nn.Linear(5, 3, bias=False)))
    orthoserde.save(model, tmp_path / "m")
    first, second = nn.Linear(3, 5, bias=False), nn.Linear(5, 3, bias=False)
    second.weight = nn.Parameter(first.weight.detach().t())
    target = nn.Sequential(first, second)
    before = snapshot(target)
    with pytest.raises(IncompatibleModelError, match=r"1\.weight: other tensors of the model lie in its memory"):
        orthoserde.load(target, tmp_path / "m")
    assert_unchanged(target, before)


def test_new_parameters_are_as_frozen_as_they_were_saved(tmp_path: Path) -> None:
    model = weight_norm(nn.Linear(4, 4))
    model.get_parameter("parametrizations.weight.original0").requires_grad_(False)
    orthoserde.save(model, tmp_path / "m")
    bare = nn.Linear(4, 4)
    orthoserde.load(bare, tmp_path / "m")
    flags = {name: parameter.requires_grad for name, parameter in bare.named_parameters()}
    assert flags == {name: parameter.requires_grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_a_users_tensors_are_built_in_the_dtype_of_the_file(tmp_path: Path, dtype: torch.dtype) -> None:
    registry = Registry()

    @registry.register("tests>Shifted")
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.ones(()), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.shift

    model = linear(Shifted()).to(dtype)
    orthoserde.save(model, tmp_path / "m", registry=registry)
    bare = nn.Linear(4, 4, dtype=dtype)
    assert orthoserde.load(bare, tmp_path / "m", registry=registry).fidelity is Fidelity.EXACT
    shift = bare.get_parameter("parametrizations.weight.0.shift")
    assert (shift.dtype, shift.requires_grad) == (dtype, False)
    assert torch.equal(bare.weight, model.weight)


def test_a_parameter_that_became_a_buffer_is_said(tmp_path: Path) -> None:
    orthoserde.save(orthogonal(nn.Linear(4, 4)), tmp_path / "m")
    bare = nn.Linear(4, 4)
    values = bare.weight.detach()
    del bare.weight
    bare.register_buffer("weight", values)
    report = orthoserde.load(bare, tmp_path / "m")
    assert report.fidelity is Fidelity.UNVERIFIED
    assert "weight: a parameter in the file, a buffer in the model" in str(report)


@pytest.mark.parametrize(
    ("make", "change"),
    [
        pytest.param(lambda: weight_norm(nn.Linear(4, 4)), with_config(dim=7), id="dim"),
        pytest.param(lambda: weight_norm(nn.Linear(4, 4)), with_config(dim=1), id="other dim"),
        pytest.param(lambda: spectral_norm(nn.Linear(4, 4)), with_config(n_power_iterations=2**62), id="iterations"),
        pytest.param(lambda: spectral_norm(nn.Linear(4, 4)), with_config(eps=-1.0), id="eps"),
        pytest.param(lambda: spectral_norm(nn.Linear(4, 3)), with_config(dim=1), id="transposed vectors"),
        pytest.param(lambda: spectral_norm(nn.Linear(4, 4)), with_config(extra=1), id="extra setting"),
        pytest.param(lambda: orthogonal(nn.Linear(4, 4)), with_config(extra=1), id="extra setting of orthogonal"),
        pytest.param(lambda: orthogonal(nn.Linear(4, 4)), with_config(shape=[4, 5]), id="shape"),
        pytest.param(lambda: orthogonal(nn.Linear(4, 4)), with_config(use_trivialization=False), id="base without"),
        pytest.param(lambda: orthogonal(nn.Linear(4, 4)), with_config(orthogonal_map="__class__"), id="map"),
        pytest.param(lambda: orthogonal(nn.Linear(4, 4)), with_config(orthogonal_map=3), id="map of another type"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(
    tmp_path: Path, make: Callable[[], nn.Module], change: Callable[[ParametrizedRecord], ParametrizedRecord]
) -> None:
    model = make()
    orthoserde.save(model, tmp_path / "whole")
    rewritten(tmp_path / "whole", tmp_path / "m", change)
    for target in (nn.Linear(4, model.get_parameter("bias").numel()), make()):
        before = snapshot(target)
        with pytest.raises(IncompatibleModelError, match="weight"):
            orthoserde.load(target, tmp_path / "m")
        assert_unchanged(target, before)


def test_an_empty_registry_is_not_replaced_by_the_global_one(tmp_path: Path) -> None:
    @orthoserde.register("tests.attach>Global")
    class Global(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    model = linear(Global())
    assert orthoserde.save(model, tmp_path / "m", registry=Registry()).opaque == ("weight",)
    assert orthoserde.save(model, tmp_path / "m").opaque == ()
    with pytest.raises(IncompatibleModelError, match="not registered in this process"):
        orthoserde.load(nn.Linear(4, 4), tmp_path / "m", registry=Registry())


def test_a_wrapper_with_state_of_its_own_is_no_wrapper(tmp_path: Path) -> None:
    class Scaled(nn.DataParallel):  # type: ignore[type-arg]
        def __init__(self, module: nn.Module) -> None:
            super().__init__(module)
            self.scale = nn.Parameter(torch.ones(1))

    model, other = Scaled(nn.Linear(2, 2)), Scaled(nn.Linear(2, 2))
    with torch.no_grad():
        model.scale.fill_(7)
    orthoserde.save(model, tmp_path / "m")
    orthoserde.load(other, tmp_path / "m")
    assert torch.equal(other.scale, model.scale)


def test_a_compiled_part_of_a_parametrization_is_saved_and_loaded(tmp_path: Path) -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.compile(nn.Linear(4, 4), backend="eager")

        def forward(self, x: Tensor) -> Tensor:
            return x

    model, other = linear(Inner()), linear(Inner())
    orthoserde.save(model, tmp_path / "m", registry=Registry())
    orthoserde.load(other, tmp_path / "m", registry=Registry())
    ours, theirs = dict(model.named_parameters()), dict(other.named_parameters())
    assert len(ours) == 4
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_wrapper_that_forwards_attributes_is_not_taken_for_a_parametrized_module(tmp_path: Path) -> None:
    class Forwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = orthogonal(nn.Linear(4, 4))

        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(super().__getattr__("inner"), name)

    model, other = Forwards(), Forwards()
    assert [record.name for record in orthoserde.parametrized_tensors(model)] == ["inner.weight"]
    orthoserde.save(model, tmp_path / "m")
    assert orthoserde.load(other, tmp_path / "m").fidelity is Fidelity.EXACT
    name = "inner.parametrizations.weight.original"
    assert torch.equal(other.get_parameter(name), model.get_parameter(name))


def test_a_class_with_a_module_called_parametrizations_keeps_its_kind(tmp_path: Path) -> None:
    registry = Registry()

    @registry.register("tests>Own")
    class Own(nn.Module):
        def __init__(self, size: int) -> None:
            super().__init__()
            self.parametrizations = nn.ModuleDict({"a": nn.Linear(2, 2)})

    orthoserde.save(Own(1), tmp_path / "m", registry=registry)
    assert orthoserde.load(Own(1), tmp_path / "m", registry=registry).fidelity is Fidelity.EXACT
    with pytest.raises(IncompatibleModelError, match="size is 1 in the file, 2 in the model"):
        orthoserde.load(Own(2), tmp_path / "m", registry=registry)


def test_a_base_that_is_none_is_missing_where_no_configuration_says_otherwise(tmp_path: Path) -> None:
    state = {"parametrizations.weight.original": torch.eye(8, 4)}
    safetensors_file(state, tmp_path / "m")
    with torch.device("meta"):
        target = orthogonal(nn.Linear(4, 8, bias=False), orthogonal_map="matrix_exp")
    with pytest.raises(IncompatibleModelError) as caught:
        orthoserde.load(target, tmp_path / "m")
    assert caught.value.missing_keys == ["parametrizations.weight.0.base"]


def safetensors_file(state: dict[str, Tensor], path: Path) -> None:
    safetensors.torch.save_file(state, path)


def test_nothing_is_saved_or_loaded_inside_of_fake_tensors(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    orthoserde.save(model, tmp_path / "m")
    before = snapshot(model)
    with FakeTensorMode():
        with pytest.raises(UnsupportedModuleError, match="FakeTensorMode"):
            orthoserde.save(model, tmp_path / "m")
        with pytest.raises(UnsupportedModuleError, match="FakeTensorMode"):
            orthoserde.load(model, tmp_path / "m")
    assert_unchanged(model, before)


def test_a_configuration_that_draws_random_numbers_moves_no_generator(tmp_path: Path) -> None:
    registry = Registry()

    @registry.register("tests>Draws")
    class Draws(nn.Module):
        def get_config(self) -> dict[str, Any]:
            return {"noise": float(torch.rand(()))}

    state = torch.get_rng_state()
    orthoserde.save(nn.Sequential(Draws()), tmp_path / "m", registry=registry)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("constrain", [orthogonal, spectral_norm, weight_norm, nn.utils.weight_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
def test_a_lazy_module_that_has_not_run_is_refused_with_what_to_do(
    tmp_path: Path, constrain: Callable[[nn.Module], nn.Module]
) -> None:
    orthoserde.save(constrain(nn.Linear(5, 3)), tmp_path / "m")
    model = nn.LazyLinear(3)
    with pytest.raises(
        IncompatibleModelError, match="weight: not initialised yet; run the lazy module once before"
    ) as caught:
        orthoserde.load(model, tmp_path / "m")
    assert [problem.where for problem in caught.value.problems] == ["weight", "bias"]
    model(torch.randn(2, 5))
    assert orthoserde.load(model, tmp_path / "m").fidelity is Fidelity.EXACT


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("file", ["plain", "ours", "torch's"])
@pytest.mark.parametrize(
    ("constrain", "name"), [(orthogonal, "original"), (spectral_norm, "original"), (weight_norm, "original1")]
)
def test_an_original_that_is_pruned_is_refused_once(
    constrain: Callable[[nn.Module], nn.Module], name: str, file: str, strict: bool, tmp_path: Path
) -> None:
    model = constrain(nn.Linear(4, 4))
    if file == "torch's":
        state = {key: each.contiguous() for key, each in model.state_dict().items()}
        safetensors.torch.save_file(state, tmp_path / "m")
    else:
        orthoserde.save(model if file == "ours" else nn.Linear(4, 4), tmp_path / "m")
    chain = _torch.parametrization_lists(model)["weight"]
    prune.l1_unstructured(chain, name, 3)  # type: ignore[no-untyped-call]  # torch has no types for it
    before = snapshot(model)
    with pytest.raises(IncompatibleModelError, match="this original is no registered tensor") as caught:
        orthoserde.load(model, tmp_path / "m", strict=strict)
    assert [problem.where for problem in caught.value.problems] == [f"parametrizations.weight.{name}"]
    assert_unchanged(model, before)
