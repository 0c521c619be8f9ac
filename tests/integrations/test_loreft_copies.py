"""Adapters on models that are copied, compiled or wrapped."""

from __future__ import annotations

import copy
import gc
from typing import cast

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.parallel import distributed

from orthoserde import AdapterError
from orthoserde.integrations.loreft import Adapter, attach, detach, trainable_parameters
from tests.integrations.toy import HOOKS, PATH, WIDTH, Toy, close, ids, new, same, slow_hook, state

# Copies


def test_a_copied_model_has_an_adapter_of_its_own() -> None:
    model = Toy()
    adapter = attach(model, {PATH: new()})
    plain = model(ids())
    copied = copy.deepcopy(model)
    other = copied.get_submodule("loreft")
    assert isinstance(other, Adapter)
    assert other is not adapter
    assert other.root is copied
    assert torch.equal(copied(ids()), plain)
    with torch.no_grad():
        adapter.layers[PATH].learned_source.bias.add_(1)
    assert torch.equal(copied(ids()), plain), "the copy must not see the first adapter"
    assert not torch.equal(model(ids()), plain)
    with torch.no_grad():
        other.layers[PATH].learned_source.bias.add_(1)
    assert torch.equal(copied(ids()), model(ids()))
    other.detach()
    assert all(parameter.requires_grad for parameter in copied.parameters())
    assert not torch.equal(copied(ids()), model(ids()))
    assert same(state(copied), state(copied))
    assert not any(getattr(module, table) for module in copied.modules() for table in HOOKS)
    assert adapter.root is model


def test_a_copy_during_a_forward_has_no_calls_under_way() -> None:
    model = Toy()
    attach(model, {PATH: new()})
    copies: list[nn.Module] = []
    handle = model.decoder.register_forward_pre_hook(lambda module, args: copies.append(copy.deepcopy(model)))
    expected = model(ids())
    handle.remove()
    (copied,) = copies
    assert torch.equal(copied(ids()), expected)


def test_a_copied_adapter_is_not_attached() -> None:
    model = Toy()
    adapter = attach(model, {PATH: new()})
    expected = model(ids())
    copied = copy.deepcopy(adapter)
    assert copied.root is None
    adapter.detach()
    copied.attach(model)
    assert torch.equal(model(ids()), expected)


def test_a_part_of_the_model_cannot_be_copied_alone() -> None:
    model = Toy()
    adapter = attach(model, {PATH: new()})
    with pytest.raises(AdapterError, match=r"decoder.* cannot be copied without its model"):
        copy.deepcopy(model.decoder)
    with pytest.raises(AdapterError, match=r"decoder\.blocks\.1 cannot be copied without its model"):
        copy.deepcopy(model.decoder.blocks[1])
    copy.deepcopy(model.decoder.blocks[0])
    adapter.detach()
    copy.deepcopy(model.decoder)


def test_a_part_that_outlives_its_model_keeps_its_adapter_and_cannot_be_copied() -> None:
    model = Toy()
    attach(model, {PATH: new()})
    expected, decoder = model.decoder(ids()), model.decoder
    del model
    gc.collect()
    assert torch.equal(decoder(ids()), expected)
    with pytest.raises(AdapterError, match="cannot be copied without its model"):
        copy.deepcopy(decoder)


def test_a_layer_that_has_left_the_model_is_on_its_own_after_detaching() -> None:
    model = Toy()
    adapter = attach(model, {PATH: new()})
    block = model.decoder.blocks[1]
    plain = copy.deepcopy(model.decoder.blocks[0])
    plain.load_state_dict(block.state_dict())
    model.decoder.blocks[1] = nn.Identity()
    adapter.detach()
    hidden = torch.randn(2, 3, WIDTH)
    assert torch.equal(block(hidden)[0], plain(hidden)[0])


def test_a_model_inside_of_another_is_copied_with_it() -> None:
    model = Toy()
    attach(model, {PATH: new()})
    outer = copy.deepcopy(nn.Sequential(model))
    assert torch.equal(outer(ids()), model(ids()))
    inner = outer[0].get_submodule("loreft")
    assert isinstance(inner, Adapter)
    assert inner.root is outer[0]


# Wrappers


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of torch.compile's own
@pytest.mark.parametrize("freeze", [True, False])
def test_a_compiled_model_is_adapted_although_it_has_run_before(freeze: bool) -> None:
    model = Toy()
    compiled = cast("nn.Module", torch.compile(model, backend="eager"))
    plain = compiled(ids())
    adapter = attach(compiled, {PATH: new()}, freeze=freeze)
    assert adapter.root is model
    expected = model(ids())
    assert not torch.equal(expected, plain)
    assert torch.equal(compiled(ids()), expected)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    assert torch.equal(compiled(ids(), mask), model(ids(), mask))
    assert trainable_parameters(compiled) == trainable_parameters(model if not freeze else adapter)
    detach(compiled)
    assert torch.equal(compiled(ids()), plain)


def test_wrappers_inside_of_the_model_leave_no_prefix() -> None:
    model, loreft = Toy(), new()
    model.decoder.blocks[1].register_forward_hook(slow_hook(loreft, "f1", None))
    expected = model(ids())
    other = Toy()
    other.load_state_dict(model.state_dict())
    other.decoder.blocks[1] = checkpoint_wrapper(other.decoder.blocks[1])
    attach(other, {PATH: loreft}, "f1")
    assert close(other(ids()), expected, 1000)


def test_data_parallel_wrapped_models_are_looked_through() -> None:
    model = Toy()
    adapter = attach(nn.DataParallel(model), {PATH: new()})
    assert adapter.root is model


def test_a_model_that_ddp_wraps_already_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    monkeypatch.setattr(distributed, "DistributedDataParallel", Wrapper)
    model = Toy()
    wrapped = Wrapper(model)
    before = state(model)
    with pytest.raises(AdapterError, match="DistributedDataParallel synchronises"):
        attach(wrapped, {PATH: new()})
    assert same(state(model), before)
    adapter = Adapter({PATH: new()}).requires_grad_(False)
    assert adapter.attach(wrapped).root is model, "nothing of it is to be synchronised"
