"""Putting adapters into models and taking them out again."""

from __future__ import annotations

import copy
import gc
import weakref
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import orthoserde
from orthoserde import AdapterError
from orthoserde.integrations import loreft as public
from orthoserde.integrations.loreft import Adapter, LoReFT, attach, detach, trainable_parameters
from tests.helpers import assert_unchanged, snapshot
from tests.integrations.toy import PATH, WIDTH, Toy, close, ids, new, same, slow_hook, slow_loreft, state

# Attaching


@pytest.mark.parametrize("positions", ["f1+l1", "f2", "l3", "all", "f9+l9"])
def test_the_model_computes_what_the_slow_reference_computes(positions: str) -> None:
    model, loreft = Toy(), new()
    model.decoder.blocks[1].register_forward_hook(slow_hook(loreft, positions, None))
    expected = model(ids())
    other = Toy()
    other.load_state_dict(model.state_dict())
    before = other(ids())
    adapter = attach(other, {PATH: loreft}, positions)
    found = other(ids())
    assert close(found, expected, 1000)
    assert not close(found, before, 1000)
    detach(adapter)
    assert torch.equal(other(ids()), before)


def test_gradients_are_those_of_the_slow_reference() -> None:
    model, loreft = Toy(), new()
    adapter = attach(model, {PATH: loreft}, "f2+l1")
    model(ids()).pow(2).sum().backward()
    found = [parameter.grad for parameter in adapter.parameters()]
    adapter.zero_grad()
    adapter.detach()
    model.decoder.blocks[1].register_forward_hook(slow_hook(loreft, "f2+l1", None))
    model(ids()).pow(2).sum().backward()
    for mine, parameter in zip(found, loreft.parameters(), strict=True):
        assert mine is not None
        assert parameter.grad is not None
        assert close(mine, parameter.grad, 1000)


def test_tokens_that_are_not_chosen_keep_their_bits_and_the_layers_own_tensor_is_not_written() -> None:
    model = Toy()
    kept: list[Tensor] = []
    model.decoder.blocks[1].register_forward_hook(lambda module, args, output: kept.append(output[0]))
    attach(model, {PATH: new()}, "f1+l1")
    after: list[Tensor] = []
    model.decoder.blocks[1].register_forward_hook(lambda module, args, output: after.append(output[0]))
    before = model.decoder.blocks[1].register_forward_hook(lambda module, args, output: None)
    model(ids(length=6))
    before.remove()
    assert kept[0] is not after[0]
    assert kept[0]._version == 0
    assert torch.equal(kept[0][:, 1:-1], after[0][:, 1:-1])
    assert not (kept[0][:, [0, -1]] == after[0][:, [0, -1]]).any()


def test_dropout_draws_as_over_the_chosen_tokens_in_order() -> None:
    model, loreft = Toy().eval(), new(dropout=0.5)
    captured: list[Tensor] = []
    model.decoder.blocks[2].register_forward_pre_hook(lambda module, args: captured.append(args[0]))
    plain = model(ids())
    adapter = attach(model, {PATH: loreft}, "f2")
    adapter.train()
    torch.manual_seed(7)
    model(ids())
    torch.manual_seed(7)
    expected = loreft(captured[0][:, :2].reshape(-1, WIDTH)).reshape(2, 2, WIDTH)
    assert torch.equal(captured[1][:, :2], expected)
    assert torch.equal(captured[1][:, 2:], captured[0][:, 2:])
    assert plain.shape == (2, 5, 11)


def test_one_intervention_may_serve_several_layers() -> None:
    model, loreft = Toy(), new()
    for index in (0, 2):
        model.decoder.blocks[index].register_forward_hook(slow_hook(loreft, "l1", None))
    expected = model(ids())
    other = Toy()
    other.load_state_dict(model.state_dict())
    adapter = attach(other, {"decoder.blocks.0": loreft, "decoder.blocks.2": loreft}, "l1")
    assert close(other(ids()), expected, 1000)
    assert len(adapter.trainable_parameters()) == 3


def test_two_adapters_act_one_after_the_other_as_untied_first_and_last() -> None:
    model, first, last = Toy(), new(), new()
    plain = copy.deepcopy(model)
    attach(model, {PATH: first}, "f1", name="first")
    attach(model, {PATH: last}, "l1", name="last")
    plain.decoder.blocks[1].register_forward_hook(slow_hook(first, "f1", None))
    plain.decoder.blocks[1].register_forward_hook(slow_hook(last, "l1", None))
    assert close(model(ids()), plain(ids()), 1000)
    assert len(trainable_parameters(model)) == 6
    detach(model)
    assert trainable_parameters(model) == list(model.parameters())
    assert [name for name, _ in model.named_children()] == ["decoder", "head"]


def test_a_callable_chooses_among_the_real_tokens() -> None:
    model, loreft, seen = Toy(), new(), []

    def second(real: Tensor) -> Tensor:
        seen.append(real.clone())
        return torch.full((len(real), 1), 1)

    adapter = attach(model, {"decoder.blocks.0": loreft, PATH: new()}, second)
    found = model(ids())
    assert len(seen) == 1, "one forward, one question"
    assert seen[0].shape == (2, 5)
    assert seen[0].all()
    adapter.detach()
    attach(model, {"decoder.blocks.0": loreft, PATH: adapter.layers[PATH]}, lambda real: real & (real.cumsum(-1) == 2))
    assert torch.equal(model(ids()), found)


def test_the_adapter_is_a_submodule_that_the_model_takes_along() -> None:
    model = Toy()
    adapter = attach(model, {PATH: new()})
    assert model.get_submodule("loreft") is adapter
    assert set(adapter.state_dict()) == {f"decoder/blocks/1.{key}" for key in new().state_dict()}
    assert "loreft.decoder/blocks/1.learned_source.bias" in model.state_dict()
    model.eval()
    assert not adapter.training
    model.double()
    assert model(ids()).dtype == torch.float64
    assert {id(p) for p in adapter.parameters()} <= {id(p) for p in model.parameters()}


def test_the_adapter_takes_over_the_models_mode() -> None:
    adapter = attach(Toy().eval(), {PATH: new(dropout=0.5)})
    assert not any(module.training for module in adapter.modules())


def test_an_adapter_in_a_sequential_hands_on_what_it_is_given() -> None:
    model = nn.Sequential(nn.Linear(4, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 3))
    hidden = torch.randn(2, 4)
    loreft = new()
    expected = torch.stack([model[2](slow_loreft(loreft, model[1](model[0](row)))) for row in hidden])
    attach(model, {"1": loreft}, "all")
    assert close(model(hidden), expected, 1000)


@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4), (2, 3, 2, 4)])
def test_all_positions_take_hidden_states_of_any_leading_shape(shape: tuple[int, ...]) -> None:
    model = nn.Sequential(nn.Linear(4, WIDTH))
    hidden = torch.randn(shape)
    loreft = new()
    expected = loreft(model(hidden))
    attach(model, {"0": loreft}, "all")
    assert torch.equal(model(hidden), expected)


# Outputs


class Pair(NamedTuple):
    hidden: Tensor
    rest: str


Other = namedtuple("Other", "hidden rest")


@dataclass(frozen=True)
class Output:
    last_hidden_state: Tensor
    rest: str


class Returns(nn.Module):
    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.make = make
        self.made: Any = None

    def forward(self, hidden: Tensor) -> Any:
        self.made = self.make(hidden)
        return self.made


@pytest.mark.parametrize(
    "make",
    [
        lambda hidden: hidden,
        lambda hidden: (hidden, "rest"),
        lambda hidden: [hidden, "rest"],
        lambda hidden: Pair(hidden, "rest"),
        lambda hidden: Other(hidden, "rest"),
        lambda hidden: {"last_hidden_state": hidden, "rest": "rest"},
        lambda hidden: Output(hidden, "rest"),
    ],
)
def test_the_output_keeps_its_type_and_the_rest_of_it(make: Callable[[Tensor], Any]) -> None:
    def hidden_of(output: Any) -> Tensor:
        if isinstance(output, dict):
            output = output["last_hidden_state"]
        elif isinstance(output, Output):
            output = output.last_hidden_state
        elif isinstance(output, tuple | list):
            output = output[0]
        assert isinstance(output, Tensor)
        return output

    inner = Returns(make)
    model = nn.ModuleDict({"inner": inner})
    loreft = new()
    attach(model, {"inner": loreft}, "l1")
    hidden = torch.randn(2, 3, WIDTH)
    output = inner(hidden)
    assert type(output) is type(inner.made)
    assert torch.equal(hidden_of(output)[:, :-1], hidden[:, :-1])
    assert torch.equal(hidden_of(output)[:, -1], loreft(hidden[:, -1]))
    assert torch.equal(hidden_of(inner.made), hidden), "the layer's own output is not written"
    if not isinstance(output, Tensor):
        assert "rest" in (output if isinstance(output, tuple | list) else str(output))


@pytest.mark.parametrize(
    "make", [lambda hidden: None, lambda hidden: (), lambda hidden: ("a", hidden), lambda hidden: {"hidden": hidden}]
)
def test_an_output_without_hidden_states_is_an_error(make: Callable[[Tensor], Any]) -> None:
    model = nn.ModuleDict({"inner": Returns(make)})
    adapter = attach(model, {"inner": new()})
    with pytest.raises(AdapterError, match=r"inner returned a .*, expected a tensor"):
        model["inner"](torch.randn(2, 3, WIDTH))
    assert adapter.calls.current is None


def test_hidden_states_of_another_width_are_an_error_that_names_the_layer() -> None:
    model = Toy()
    attach(model, {PATH: LoReFT(WIDTH + 1, 2)})
    with pytest.raises(AdapterError, match=r"decoder\.blocks\.1 returned .* \(2, 5, 6\).*hidden_size=7"):
        model(ids())


def test_positions_of_hidden_states_without_a_sequence_are_an_error() -> None:
    model = nn.Sequential(nn.Linear(4, WIDTH))
    attach(model, {"0": new()})
    with pytest.raises(AdapterError, match=r"positions are those of \(batch, seq, hidden\)"):
        model(torch.randn(2, 4))


# Freezing


def test_everything_outside_is_frozen_and_thawed_again() -> None:
    model = Toy()
    model.head.weight.requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    adapter = attach(model, {PATH: new()})
    assert {id(p) for p in trainable_parameters(model)} == {id(p) for p in adapter.parameters()}
    adapter.detach()
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
    assert all(parameter.requires_grad for parameter in adapter.parameters())


def test_what_the_user_thawed_or_replaced_meanwhile_is_left_alone() -> None:
    model = Toy()
    adapter = attach(model, {PATH: new()})
    model.head.bias.requires_grad_(True)
    model.head = nn.Linear(WIDTH, 3, bias=False)
    adapter.detach()
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_freeze_false_freezes_nothing_and_detaching_thaws_nothing() -> None:
    model = Toy()
    model.head.weight.requires_grad_(False)
    adapter = attach(model, {PATH: new()}, freeze=False)
    assert sum(not parameter.requires_grad for parameter in model.parameters()) == 1
    adapter.detach()
    assert sum(not parameter.requires_grad for parameter in model.parameters()) == 1


@pytest.mark.parametrize("first_out", ["first", "last"])
def test_the_model_stays_frozen_until_the_last_adapter_is_gone(first_out: str) -> None:
    model = Toy()
    adapters = {name: attach(model, {PATH: new()}, name=name) for name in ("first", "last")}
    adapters.pop(first_out).detach()
    (left,) = adapters.values()
    assert {id(p) for p in trainable_parameters(model)} == {id(p) for p in left.parameters()}
    left.detach()
    assert all(parameter.requires_grad for parameter in model.parameters())


# Detaching


def test_after_detaching_the_model_is_as_before() -> None:
    model = Toy()
    model.decoder.register_forward_hook(lambda module, args, output: None)
    layers = {PATH: new(), "decoder.blocks.0": new()}
    before = state(model)
    held = snapshot(model)
    adapter = attach(model, layers)
    assert not same(state(model), before)
    model(ids())
    adapter.detach()
    assert same(state(model), before)
    assert_unchanged(model, held)
    assert not hasattr(model, "loreft")


def test_an_adapter_can_be_attached_again_and_to_another_model() -> None:
    model = Toy()
    adapter = attach(model, {PATH: new()})
    expected = model(ids())
    adapter.detach()
    assert adapter.attach(model) is adapter
    assert torch.equal(model(ids()), expected)
    adapter.detach()
    other = copy.deepcopy(model)
    adapter.attach(other, name="again")
    assert torch.equal(other(ids()), expected)


def test_detaching_what_is_not_attached_is_an_error() -> None:
    adapter = Adapter({PATH: new()})
    with pytest.raises(AdapterError, match="not attached"):
        adapter.detach()
    with pytest.raises(AdapterError, match="no adapter is attached"):
        detach(Toy())


def test_an_adapter_does_not_keep_its_model() -> None:
    model = Toy()
    adapter = attach(model, {PATH: new()})
    model(ids())
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None
    assert adapter.root is None
    adapter.detach()


# Refusals


def refused(model: nn.Module, *args: Any, error: type[Exception], match: str, **kwargs: Any) -> None:
    before = state(model)
    with pytest.raises(error, match=match):
        attach(model, *args, **kwargs)
    assert same(state(model), before)


def test_a_path_that_leads_nowhere_is_refused_with_near_ones() -> None:
    refused(
        Toy(), {"decoder.block.1": new()}, error=ValueError, match=r"no module 'decoder\.block\.1'.*'decoder\.blocks"
    )
    refused(Toy(), {PATH: new(), "x": new()}, error=ValueError, match="no module 'x'; it has")


@pytest.mark.parametrize("path", ["", ".", "decoder.", ".decoder", "decoder..blocks", 3])
def test_a_malformed_path_is_refused(path: Any) -> None:
    refused(Toy(), {path: new()}, error=ValueError, match="layers: expected the path of a layer")


def test_layers_must_be_a_mapping_of_interventions() -> None:
    refused(Toy(), {}, error=ValueError, match="at least one")
    refused(Toy(), [(PATH, new())], error=TypeError, match="expected a mapping")
    refused(Toy(), {PATH: nn.Linear(WIDTH, WIDTH)}, error=TypeError, match="expected a LoReFT for 'decoder.blocks.1'")


def test_a_container_that_is_never_called_is_refused() -> None:
    refused(Toy(), {"decoder.blocks": new()}, error=ValueError, match="is a ModuleList, which is never called")


def test_one_module_under_two_paths_is_refused() -> None:
    layer = nn.Linear(WIDTH, WIDTH)
    model = nn.Sequential(layer, layer)
    refused(model, {"0": new(), "1": new()}, error=ValueError, match="'1' and '0' are the same module")


def test_paths_whose_names_would_collide_are_refused() -> None:
    model = nn.ModuleDict({"0": nn.Sequential(nn.Linear(4, WIDTH)), "0/0": nn.Linear(4, WIDTH)})
    refused(model, {"0.0": new(), "0/0": new()}, error=ValueError, match="both have the name '0/0'")
    refused(model, {"attach": new()}, error=ValueError, match="'attach' is a name that an adapter has a use")


@pytest.mark.parametrize("name", ["", "a.b", None, "decoder", "forward", "training"])
def test_a_name_that_is_taken_or_malformed_is_refused(name: Any) -> None:
    refused(Toy(), {PATH: new()}, name=name, error=ValueError, match="name: ")


def test_two_adapters_of_one_name_are_refused() -> None:
    model = Toy()
    attach(model, {PATH: new()})
    refused(model, {PATH: new()}, error=ValueError, match="'loreft' already")


def test_attaching_twice_is_refused() -> None:
    model, other = Toy(), Toy()
    adapter = attach(model, {PATH: new()})
    for target in (model, other):
        before = state(target)
        with pytest.raises(AdapterError, match="attached already"):
            adapter.attach(target, name="second")
        assert same(state(target), before)


def test_only_modules_can_be_adapted() -> None:
    with pytest.raises(TypeError, match=r"expected an nn\.Module, got str"):
        attach("model", {PATH: new()})  # type: ignore[arg-type]


def test_torch_layers_with_the_batch_second_are_refused() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, 2), 1, enable_nested_tensor=False)
    refused(model, {"layers.0": new()}, error=AdapterError, match="batch_first=True")


def test_an_error_half_way_leaves_nothing_attached(monkeypatch: pytest.MonkeyPatch) -> None:
    model, adapter = Toy(), Adapter({PATH: new()})
    before = state(model)

    def fail(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(model.decoder.blocks[1], "register_forward_hook", fail)
    with pytest.raises(KeyboardInterrupt):
        adapter.attach(model)
    assert same(state(model), before)
    assert adapter.root is None
    monkeypatch.undo()
    adapter.attach(model)


def test_the_public_names_are_these() -> None:
    assert set(public.__all__) == {"Adapter", "LoReFT", "Positions", "attach", "detach", "trainable_parameters"}
    assert "orthoserde>LoReFT" in orthoserde.default_registry
    assert "orthoserde>LoReFTAdapter" in orthoserde.default_registry
