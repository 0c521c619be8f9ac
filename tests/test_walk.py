"""What the walk sees."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import FileStore  # type: ignore[attr-defined]
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

import orthoserde
from orthoserde import ParametrizedTensor, UnsupportedModuleError, parametrized_tensors
from orthoserde.walk import take_inventory


class Double(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class LowRank(nn.Module):
    """Several originals: a matrix from two factors."""

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return left @ right

    def right_inverse(self, value: Tensor) -> tuple[Tensor, Tensor]:
        u, s, v = torch.linalg.svd(value, full_matrices=False)
        return u * s, v


def names(model: nn.Module) -> list[str]:
    return [record.name for record in parametrized_tensors(model)]


def test_records_say_what_is_registered() -> None:
    layer = orthogonal(nn.Linear(5, 3), orthogonal_map="cayley")
    (record,) = parametrized_tensors(nn.Sequential(nn.ReLU(), layer))
    assert (record.module_path, record.tensor_name, record.name) == ("1", "weight", "1.weight")
    assert record.module is layer
    (link,) = record.parametrizations
    assert isinstance(layer.parametrizations, nn.ModuleDict)
    assert link is layer.parametrizations["weight"][0]  # type: ignore[index]
    assert list(record.originals) == ["original"]
    assert record.originals["original"].shape == (3, 5)
    assert record.parameter
    assert record.unsafe  # torch registers its orthogonal that way
    assert record.aliases == ()
    assert repr(record) == "<ParametrizedTensor '1.weight': _Orthogonal>"


def test_records_are_frozen() -> None:
    (record,) = parametrized_tensors(orthogonal(nn.Linear(3, 3)))
    with pytest.raises(AttributeError):
        record.tensor_name = "bias"  # type: ignore[misc]


def test_the_root_has_an_empty_path() -> None:
    (record,) = parametrized_tensors(weight_norm(nn.Linear(3, 3)))
    assert (record.module_path, record.name, record.prefix) == ("", "weight", "parametrizations.weight")


def test_several_originals_are_named_in_order() -> None:
    (norm,) = parametrized_tensors(weight_norm(nn.Linear(3, 3)))
    assert list(norm.originals) == ["original0", "original1"]
    layer = parametrize.register_parametrization(nn.Linear(4, 6), "weight", LowRank())
    (low,) = parametrized_tensors(layer)
    assert [tuple(t.shape) for t in low.originals.values()] == [(6, 4), (4, 4)]


def test_a_chain_stands_in_the_order_of_application() -> None:
    layer = orthogonal(nn.Linear(4, 4))
    parametrize.register_parametrization(layer, "weight", Double())
    parametrize.register_parametrization(layer, "bias", Double())
    weight, bias = parametrized_tensors(layer)
    assert [type(link).__name__ for link in weight.parametrizations] == ["_Orthogonal", "Double"]
    assert [type(link).__name__ for link in bias.parametrizations] == ["Double"]


def test_a_parametrized_buffer_is_told_from_a_parameter() -> None:
    layer = nn.BatchNorm1d(3)
    parametrize.register_parametrization(layer, "running_mean", Double())
    (record,) = parametrized_tensors(layer)
    assert not record.parameter
    assert record.name == "running_mean"


def test_a_batch_of_matrices_is_one_tensor() -> None:
    module = nn.Module()
    module.weight = nn.Parameter(torch.randn(2, 3, 6, 4))
    orthogonal(module, "weight")
    (record,) = parametrized_tensors(module)
    assert record.originals["original"].shape == (2, 3, 6, 4)


def test_a_parametrization_that_is_itself_parametrized_is_walked() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = spectral_norm(nn.Linear(3, 3))

        def forward(self, x: Tensor) -> Tensor:
            inner: Tensor = self.inner(x)
            return inner

    layer = parametrize.register_parametrization(nn.Linear(3, 3), "weight", Outer())
    assert names(layer) == ["weight", "parametrizations.weight.0.inner.weight"]


def test_a_shared_module_is_one_record_with_aliases() -> None:
    layer = orthogonal(nn.Linear(3, 3))
    model = nn.ModuleDict({"b": layer, "a": nn.Sequential(layer)})
    (record,) = parametrized_tensors(model)
    assert record.module_path == "b"
    assert record.aliases == ("a.0",)


def test_children_that_override_state_dict_and_the_iterators_are_walked_all_the_same() -> None:
    class Hides(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = orthogonal(nn.Linear(3, 3))

        def state_dict(self, *args: Any, **kwargs: Any) -> Any:
            return {}

        def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
            return iter(())

        def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
            return iter(())

        def named_buffers(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Tensor]]:
            return iter(())

    model = nn.Sequential(Hides())
    assert names(model) == ["0.layer.weight"]
    prefix = "0.layer.parametrizations.weight"
    assert set(take_inventory(model).slots) == {"0.layer.bias", f"{prefix}.original", f"{prefix}.0.base"}


def test_nothing_is_evaluated() -> None:
    class Counts(nn.Module):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            Counts.calls += 1
            return x

    layer = parametrize.register_parametrization(nn.Linear(3, 3), "weight", Counts())
    before = Counts.calls
    assert names(layer) == ["weight"]
    assert Counts.calls == before


@pytest.mark.parametrize("wrapper", ["compile", "data_parallel", "checkpoint", "nested"])
def test_wrappers_leave_no_prefix(wrapper: str) -> None:
    layer = orthogonal(nn.Linear(3, 3))
    wrapped: dict[str, Any] = {
        "compile": lambda: torch.compile(nn.Sequential(layer)),
        "data_parallel": lambda: nn.DataParallel(nn.Sequential(layer)),
        "checkpoint": lambda: nn.Sequential(checkpoint_wrapper(layer)),
        "nested": lambda: torch.compile(nn.Sequential(checkpoint_wrapper(layer))),
    }
    assert names(wrapped[wrapper]()) == ["0.weight"]


def test_ddp_leaves_no_prefix_and_its_file_loads_into_the_bare_model(tmp_path: Path) -> None:
    store = FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        layer = nn.Linear(3, 3)
        model = nn.Sequential(orthogonal(layer))
        target = copy.deepcopy(layer)
        wrapped = nn.parallel.DistributedDataParallel(model)
        assert names(wrapped) == ["0.weight"]
        orthoserde.save(wrapped, tmp_path / "ddp.safetensors")
        with torch.no_grad():
            target.bias.zero_()
        assert (
            orthoserde.load(nn.Sequential(target), tmp_path / "ddp.safetensors").fidelity is orthoserde.Fidelity.EXACT
        )
        assert torch.equal(target.bias, layer.bias)
    finally:
        torch.distributed.destroy_process_group()


def test_a_cycle_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].add_module("back", model)
    with pytest.raises(UnsupportedModuleError, match=r"'0\.back' contains itself"):
        names(model)


def test_a_deep_model_needs_no_recursion() -> None:
    model: nn.Module = orthogonal(nn.Linear(2, 2))
    for _ in range(2000):
        model = nn.Sequential(model)
    (record,) = parametrized_tensors(model)
    assert record.module_path == ".".join(["0"] * 2000)


def test_a_transient_buffer_is_not_state() -> None:
    module = nn.Module()
    module.register_buffer("kept", torch.zeros(2))
    module.register_buffer("transient", torch.zeros(2), persistent=False)
    inventory = take_inventory(module)
    assert set(inventory.slots) == {"kept"}
    assert set(inventory.transient) == {"transient"}


def test_what_is_not_a_module_is_refused() -> None:
    with pytest.raises(TypeError, match=r"expected an nn\.Module, got OrderedDict"):
        list(parametrized_tensors(nn.Linear(2, 2).state_dict()))  # type: ignore[arg-type]


def test_the_iterator_yields_the_public_type() -> None:
    assert all(isinstance(record, ParametrizedTensor) for record in parametrized_tensors(orthogonal(nn.Linear(2, 2))))
