"""Which tokens of a forward are real."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from orthoserde import AdapterError
from orthoserde.integrations.loreft import attach
from orthoserde.integrations.loreft.tokens import full_mask
from tests.integrations.toy import (
    HOLES,
    LEFT,
    PATH,
    RIGHT,
    SHORT,
    WIDTH,
    Toy,
    close,
    ids,
    new,
    slow_hook,
    slow_positions,
    slowly,
)


@pytest.mark.parametrize("positions", ["f1+l1", "f2", "l2", "all"])
@pytest.mark.parametrize(
    "mask", [LEFT, RIGHT, HOLES, SHORT, torch.ones(2, 5)], ids=["left", "right", "holes", "short", "full"]
)
@pytest.mark.parametrize("dtype", [torch.long, torch.bool, torch.float32])
def test_positions_are_those_of_the_real_tokens(mask: Tensor, positions: str, dtype: torch.dtype) -> None:
    model, loreft = Toy(), new()
    with slowly(model, loreft, positions, mask):
        expected = model(ids(), mask.to(dtype))
    attach(model, {PATH: loreft}, positions)
    assert close(model(ids(), attention_mask=mask.to(dtype)), expected, 1000)
    assert torch.equal(model(ids(), mask.to(dtype)), model(ids(), attention_mask=mask.to(dtype)))


def test_left_padding_changes_nothing_for_the_real_tokens() -> None:
    model = Toy()
    attach(model, {PATH: new()}, "f1+l1")
    row = ids(1, 3)
    padded = torch.cat([torch.zeros(1, 2, dtype=torch.long), row], 1)
    assert close(model(padded, LEFT[:1])[:, 2:], model(row), 1000)


def test_a_mask_is_not_remembered_for_the_next_forward() -> None:
    model = Toy()
    attach(model, {PATH: new()}, "f1+l1")
    without = model(ids())
    assert not torch.equal(model(ids(), RIGHT), without)
    assert torch.equal(model(ids()), without)
    model(ids(), LEFT)
    assert torch.equal(model(ids(seed=0)), without)


class Failing(nn.Module):
    def __init__(self, error: type[BaseException]) -> None:
        super().__init__()
        self.error = error
        self.fails = True

    def forward(self, logits: Tensor) -> Tensor:
        if self.fails:
            raise self.error
        return logits


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["words", "blocks.1", "blocks.2"])
def test_an_exception_leaves_nothing_behind(error: type[BaseException], where: str) -> None:
    model = Toy()
    adapter = attach(model, {PATH: new()}, "f1+l1")
    expected, part = model.decoder(ids()), Failing(error)
    handle = model.decoder.get_submodule(where).register_forward_pre_hook(lambda module, args: part(None))
    with pytest.raises(error):
        model(ids(), RIGHT)
    part.fails = False
    handle.remove()
    assert adapter.calls.current is None
    # The decoder alone, as generation calls encoders: nothing encloses it now.
    assert torch.equal(model.decoder(ids()), expected)


def test_an_exception_keeps_no_tensor_alive() -> None:
    model = nn.Sequential(nn.Linear(4, WIDTH), nn.Linear(WIDTH, 3))
    attach(model, {"0": new()}, "all")
    hidden = torch.randn(2, 5)  # too wide, so the first layer raises
    alive = weakref.ref(hidden)
    with pytest.raises(RuntimeError):
        model(hidden)
    del hidden
    gc.collect()
    assert alive() is None


def test_what_the_users_own_hooks_make_of_the_arguments_counts() -> None:
    model, loreft = Toy(), new()
    model.register_forward_pre_hook(lambda module, args: (args[0], RIGHT))
    attach(model, {PATH: loreft}, "l1")
    found = model(ids())
    plain = Toy()
    plain.load_state_dict(model.state_dict(), strict=False)
    attach(plain, {PATH: loreft}, "l1")
    assert torch.equal(found, plain(ids(), RIGHT))
    assert not torch.equal(found, plain(ids()))


class Nested(nn.Module):
    """Runs the model again while it runs."""

    def __init__(self, model: Toy, inner: Tensor | None) -> None:
        super().__init__()
        self.inner, self.seen = inner, torch.empty(0)
        self.models = [model]
        self.depth = 0

    def __call__(self, module: nn.Module, args: object) -> None:
        if self.depth == 0:
            self.depth = 1
            self.seen = self.models[0](ids(seed=1), self.inner)
            self.depth = 0


@pytest.mark.parametrize("outer", [None, RIGHT])
@pytest.mark.parametrize("inner", [None, LEFT])
def test_a_forward_within_a_forward_has_a_mask_of_its_own(outer: Tensor | None, inner: Tensor | None) -> None:
    model = Toy()
    attach(model, {PATH: new()}, "f1+l1")
    alone, inside = model(ids(), outer), model(ids(seed=1), inner)
    nested = Nested(model, inner)
    handle = model.decoder.blocks[1].register_forward_pre_hook(nested)
    assert torch.equal(model(ids(), outer), alone)
    assert torch.equal(nested.seen, inside)
    handle.remove()


def test_threads_do_not_see_each_others_calls() -> None:
    model = Toy()
    attach(model, {PATH: new()}, "f1+l1")
    masks = [None, LEFT, RIGHT, HOLES]
    expected = [model(ids(), mask) for mask in masks]
    barrier = threading.Barrier(len(masks))

    def meet(module: nn.Module, args: object) -> None:
        barrier.wait(20)

    model.decoder.blocks[0].register_forward_pre_hook(meet)
    found: dict[int, Tensor] = {}

    def run(index: int) -> None:
        found[index] = model(ids(), masks[index])

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(masks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[index], expected[index]) for index in range(len(masks)))


def test_a_mask_of_another_shape_is_an_error() -> None:
    class Shorter(Toy):
        def forward(
            self, input_ids: Tensor, attention_mask: Tensor | None = None, past_key_values: Any = None
        ) -> Tensor:
            return super().forward(input_ids[:, 1:])

    model = Shorter()
    attach(model, {PATH: new()})
    with pytest.raises(AdapterError, match=r"\(2, 4, 6\), but the attention mask has shape \(2, 5\)"):
        nn.Module.__call__(model, ids(), LEFT)


class Outer(nn.Module):
    """Hands a mask of its own on as a mask of queries and keys, or under another name."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: Tensor, attention_mask: Any = None, **rest: Any) -> Any:
        return self.inner(hidden, **rest)


def encoder(**arguments: Any) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 8, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, **arguments)


@pytest.mark.parametrize("mask", [LEFT, RIGHT])
def test_the_nearest_mask_wins(mask: Tensor) -> None:
    model = Outer(encoder(enable_nested_tensor=False))
    attach(model, {"inner.layers.0": new()}, "f1")
    hidden = torch.randn(2, 5, WIDTH)
    inner = model(hidden, src_key_padding_mask=mask == 0)
    assert torch.equal(model(hidden, HOLES, src_key_padding_mask=mask == 0), inner)
    assert not torch.equal(model(hidden, HOLES), inner)


# Masks of queries and keys


def causal(mask: Tensor, total: int | None = None, window: int | None = None) -> Tensor:
    batch, length = mask.shape
    total = length if total is None else total
    attends = torch.zeros(batch, 1, length, total, dtype=torch.bool)
    for b in range(batch):
        for q in range(length):
            for k in range(q + 1):
                attends[b, 0, q, k] = bool(mask[b, k]) and (window is None or q - k < window)
    return attends


@pytest.mark.parametrize("mask", [LEFT, RIGHT, torch.ones(2, 5, dtype=torch.long)])
def test_a_causal_mask_of_queries_and_keys_tells_the_real_tokens(mask: Tensor) -> None:
    expected = mask != 0
    attends = causal(mask)
    assert torch.equal(full_mask(attends), expected)
    assert torch.equal(full_mask(attends[:, 0]), expected)
    assert torch.equal(full_mask(causal(mask, total=9)), expected), "a static cache has room for more"
    additive = torch.zeros(attends.shape).masked_fill(~attends, torch.finfo(torch.float32).min)
    assert torch.equal(full_mask(additive), expected)
    assert torch.equal(full_mask({"sliding_attention": causal(mask, window=2), "full_attention": attends}), expected)
    both_ways = (mask[:, None, None, :] != 0).expand(2, 1, 5, 5)
    assert torch.equal(full_mask(both_ways), expected)


@pytest.mark.parametrize(
    "mask", [causal(LEFT, window=2), {"sliding_attention": 1}, torch.ones(5), "mask", torch.ones(2, 1, 5, 4)]
)
def test_a_mask_that_does_not_tell_the_real_tokens_is_an_error(mask: Any) -> None:
    with pytest.raises(ValueError, match="attention_mask of"):
        full_mask(mask)
    model = Outer(encoder(enable_nested_tensor=False))
    plain = copy.deepcopy(model)
    attach(model, {"inner.layers.0": new()}, "f1")
    hidden = torch.randn(2, 5, WIDTH)
    with pytest.raises(AdapterError, match="not known where to intervene"):
        model(hidden, mask)
    assert plain(hidden, mask).shape == hidden.shape


def test_a_mask_of_queries_and_keys_counts_where_no_other_is_given() -> None:
    model = Outer(encoder(enable_nested_tensor=False))
    attach(model, {"inner.layers.0": new()}, "f1")
    hidden = torch.randn(2, 5, WIDTH)
    assert torch.equal(model(hidden, causal(LEFT)), model(hidden, LEFT))
    assert not torch.equal(model(hidden, causal(LEFT)), model(hidden))


# torch.nn


@pytest.mark.parametrize("positions", ["f1", "l2", "all"])
@pytest.mark.parametrize("mode", ["train", "eval", "inference"])
@pytest.mark.parametrize("mask", [None, RIGHT, LEFT])
def test_torchs_encoder_says_what_is_padding(positions: str, mode: str, mask: Tensor | None) -> None:
    model, loreft = encoder(enable_nested_tensor=False).train(mode == "train"), new()
    padding = None if mask is None else mask == 0
    hidden = torch.randn(2, 5, WIDTH)
    real = torch.ones(2, 5, dtype=torch.long) if mask is None else mask
    with torch.set_grad_enabled(mode != "inference"):
        first = model.layers[0](hidden, src_key_padding_mask=padding)
        for i in range(2):
            for j in slow_positions(positions, (real[i] != 0).tolist()):
                first[i, j] = loreft(first[i, j])
        expected = model.layers[1](first, src_key_padding_mask=padding)
        attach(model, {"layers.0": loreft}, positions)
        assert close(model(hidden, src_key_padding_mask=padding), expected, 1000)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("positions", ["f1", "l2", "all"])
def test_torchs_encoder_may_make_nested_tensors_of_padded_ones(positions: str) -> None:
    model, plain, loreft = encoder().eval(), encoder(enable_nested_tensor=False).eval(), new()
    plain.load_state_dict(model.state_dict())
    attach(plain, {"layers.0": loreft}, positions)
    adapter = attach(model, {"layers.0": loreft}, positions)
    hidden = torch.randn(2, 5, WIDTH)
    expected = plain(hidden, src_key_padding_mask=RIGHT == 0)
    seen: list[bool] = []
    model.layers[0].register_forward_hook(lambda module, args, output: seen.append(output.is_nested))
    with torch.no_grad():
        found = model(hidden, src_key_padding_mask=RIGHT == 0)
    assert seen == [True]
    # Torch takes a frozen model in eval mode for one without gradients, and cannot differentiate what it then does.
    with pytest.raises(AdapterError, match=r"enable_nested_tensor=False"):
        model(hidden, src_key_padding_mask=RIGHT == 0)
    assert adapter.calls.current is None
    assert close(found[RIGHT != 0], expected[RIGHT != 0], 1000)


@pytest.mark.parametrize("tgt", [None, LEFT.flip(0)])
@pytest.mark.parametrize("src", [None, LEFT])
def test_encoder_and_decoder_of_torchs_transformer_have_a_mask_each(src: Tensor | None, tgt: Tensor | None) -> None:
    model = nn.Transformer(WIDTH, 2, 1, 1, 8, dropout=0.0, batch_first=True)
    left, right = torch.randn(2, 5, WIDTH), torch.randn(2, 5, WIDTH)
    masks = {
        "src_key_padding_mask": None if src is None else src == 0,
        "tgt_key_padding_mask": None if tgt is None else tgt == 0,
        "memory_key_padding_mask": None if src is None else src == 0,
    }
    lorefts = {"encoder.layers.0": (new(), src), "decoder.layers.0": (new(), tgt)}
    handles = []
    for path, (loreft, mask) in lorefts.items():
        slow = slow_hook(loreft, "f1", mask)
        handles.append(model.get_submodule(path).register_forward_hook(lambda m, a, o, slow=slow: slow(m, a, (o,))[0]))
    expected = model(left, right, **masks)
    for handle in handles:
        handle.remove()
    attach(model, {path: loreft for path, (loreft, _) in lorefts.items()}, "f1")
    assert close(model(left, right, **masks), expected, 1000)


class TwoStacks(nn.Module):
    """An encoder and a decoder; the root's attention_mask is that of the encoder's tokens, as in transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Stack()
        self.decoder = Stack()

    def forward(
        self, hidden: Tensor, attention_mask: Tensor | None = None, other: Tensor | None = None, other_mask: Any = None
    ) -> Any:
        encoded = self.encoder(hidden, attention_mask)
        return encoded, self.decoder(other, other_mask, encoder_hidden_states=encoded)


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(
        self, hidden: Tensor, attention_mask: Tensor | None = None, encoder_hidden_states: Tensor | None = None
    ) -> Any:
        return self.layer(hidden)


@pytest.mark.parametrize("other_mask", [None, LEFT])
def test_a_decoder_does_not_take_the_encoders_mask(other_mask: Tensor | None) -> None:
    model, loreft = TwoStacks(), new()
    left, right = torch.randn(2, 5, WIDTH), torch.randn(2, 5, WIDTH)
    plain = model.decoder.layer(right)
    (expected,) = slow_hook(loreft, "f1", other_mask)(model, (), (plain,))
    adapter = attach(model, {"encoder.layer": loreft, "decoder.layer": loreft}, "f1")
    encoded, decoded = model(left, LEFT.flip(0), right, other_mask)
    assert close(decoded, expected, 1000)
    # Generation calls the encoder directly, without the root.
    assert torch.equal(model.encoder(left, LEFT.flip(0)), encoded)
    assert adapter.calls.current is None
