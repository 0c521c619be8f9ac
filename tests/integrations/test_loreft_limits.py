"""Where attaching ends: odd models, threads, several adapters, forwards without gradients."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import orthoserde
from orthoserde import AdapterError
from orthoserde.integrations.loreft import LoReFT, attach


def test_a_model_that_calls_all_of_its_children_is_told_to_be_put_into_another() -> None:
    class Sum(nn.ModuleDict):
        def forward(self, hidden: Tensor) -> Tensor:
            return torch.stack([layer(hidden) for layer in self.values()]).sum(dim=0)

    model = Sum({"x": nn.Identity(), "y": nn.Identity()})
    adapter = attach(model, {"x": LoReFT(8, 1)}, positions="f1")
    hidden = torch.randn(2, 3, 8)
    with pytest.raises(AdapterError, match="attach to a module around it"):
        model(hidden)
    adapter.detach()
    outer = nn.ModuleDict({"model": model})
    attach(outer, {"model.x": LoReFT(8, 1)}, positions="f1")
    assert torch.equal(model(hidden)[:, 1:], 2 * hidden[:, 1:])


def test_a_prompt_is_that_of_the_thread_that_says_so() -> None:
    model = nn.ModuleDict({"x": nn.Identity()})
    adapter = attach(model, {"x": LoReFT(8, 1)}, positions="l1")
    hidden = torch.randn(2, 5, 8)
    alone = model["x"](hidden)
    found: list[Tensor] = []
    with adapter.prompt(torch.ones(2, 3)):
        thread = threading.Thread(target=lambda: found.append(model["x"](hidden)))
        thread.start()
        thread.join()
    assert torch.equal(found[0], alone)


def test_detaching_thaws_nothing_that_another_adapter_keeps_frozen() -> None:
    inner = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    outer = nn.ModuleDict({"inner": inner, "c": nn.Linear(4, 4)})
    first = attach(outer, {"inner.a": LoReFT(4, 1)}, name="first")
    second = attach(inner, {"b": LoReFT(4, 1)}, name="second")
    first.detach()
    assert not any(parameter.requires_grad for key in "ab" for parameter in inner[key].parameters())
    assert all(parameter.requires_grad for parameter in outer["c"].parameters())
    second.detach()
    assert all(parameter.requires_grad for parameter in outer.parameters())


def test_nothing_is_kept_of_forwards_without_gradients() -> None:
    model = nn.ModuleDict({"x": nn.Identity()})
    adapter = attach(model, {"x": LoReFT(8, 1)}, positions="f1")
    long = torch.randn(1, 100, 8)
    with torch.no_grad():
        for start in range(50):
            model["x"](long[:, start : start + 10])
    assert sum(map(len, vars(adapter.calls)["_inputs"].values())) == 0


def test_an_attached_adapter_is_named_by_the_error() -> None:
    model = nn.ModuleDict({"x": nn.Identity()})
    attach(model, {"x": LoReFT(8, 1)})
    with pytest.raises(ValueError, match=r"attached as 'loreft' already; detach\(model\) first"):
        attach(model, {"x": LoReFT(8, 1)})


def test_an_intervention_of_the_users_own_is_not_built_as_something_else(tmp_path: Path) -> None:
    class Twice(LoReFT):
        def forward(self, hidden_states: Tensor) -> Tensor:
            return 2 * super().forward(hidden_states)

    adapter = attach(nn.ModuleDict({"x": nn.Identity()}), {"x": Twice(8, 1)})
    orthoserde.save(adapter, tmp_path / "m")
    with pytest.raises(orthoserde.ConfigError, match="make the model yourself"):
        orthoserde.build(tmp_path / "m")
