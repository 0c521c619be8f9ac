"""Forwards that continue a generation are left alone, and a prompt can be told in training."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from orthoserde import AdapterError
from orthoserde.integrations.loreft import LoReFT, attach
from tests.integrations.toy import (
    LEFT,
    PATH,
    WIDTH,
    Cache,
    Toy,
    close,
    ids,
    new,
    slow_hook,
    slowly,
)


def manual(model: Toy, loreft: LoReFT, positions: str, words: Tensor, mask: Tensor | None, steps: int) -> Tensor:
    """Generation in which the prompt's cache is filled with the slow reference and the rest runs without it."""
    cache = Cache()
    with torch.no_grad():
        with slowly(model, loreft, positions, mask):
            logits = model(words, mask, cache)
        for _ in range(steps):
            word = logits[:, -1:].argmax(-1)
            words = torch.cat([words, word], 1)
            mask = None if mask is None else torch.cat([mask, torch.ones_like(word)], 1)
            logits = model(word, mask, cache)
    return words


@pytest.mark.parametrize("positions", ["f1+l1", "l3", "all"])
@pytest.mark.parametrize("mask", [None, LEFT])
def test_generation_intervenes_on_the_prompt_only(positions: str, mask: Tensor | None) -> None:
    for seed in range(5):
        torch.manual_seed(seed)
        model, loreft = Toy(), new()
        plain = model.generate(ids(), mask, steps=6)
        expected = manual(model, loreft, positions, ids(), mask, 6)
        adapter = attach(model, {PATH: loreft, "decoder.blocks.2": new()}, positions)
        adapter.detach()
        attach(model, {PATH: loreft}, positions)
        assert torch.equal(model.generate(ids(), mask, steps=6), expected)
        if not torch.equal(plain, expected):
            break
    else:
        pytest.fail("in no case did the intervention change what is generated")


def test_every_layer_of_the_prompt_is_intervened_on_although_the_first_has_filled_the_cache() -> None:
    model = Toy()
    attach(model, {f"decoder.blocks.{index}": new() for index in range(3)}, "f1+l1")
    assert torch.equal(model(ids(), None, Cache()), model(ids()))


class Keeps(nn.Module):
    """Has a cache of its own and hands it to its layers: only these calls show it."""

    def __init__(self, toy: Toy) -> None:
        super().__init__()
        self.blocks = toy.decoder.blocks

    def forward(self, hidden: Tensor) -> Tensor:
        cache = Cache()
        for block in self.blocks:
            (hidden,) = block(hidden, None, cache)
        return hidden


def test_a_cache_that_layers_are_given_and_have_filled_is_no_sign_of_a_generation() -> None:
    model = Keeps(Toy())
    hidden = torch.randn(2, 5, WIDTH)
    lorefts = [new() for _ in range(3)]
    expected = hidden
    for block, loreft in zip(model.blocks, lorefts, strict=True):
        (expected,) = slow_hook(loreft, "f1", None)(block, (), block(expected))
    attach(model, {f"blocks.{index}": loreft for index, loreft in enumerate(lorefts)}, "f1")
    assert close(model(hidden), expected, 1000)


def test_a_step_with_tokens_in_the_cache_is_left_alone() -> None:
    model = Toy()
    cache = Cache()
    with torch.no_grad():
        model(ids(), None, cache)
    other = copy.deepcopy(cache)
    expected = model(ids(length=2, seed=1), None, cache)
    attach(model, {PATH: new()}, "all")
    assert torch.equal(model(ids(length=2, seed=1), None, other), expected)


class Cached(nn.Module):
    """Takes any cache and does nothing with it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(
        self, hidden: Tensor, past_key_values: Any = None, cache_params: Any = None, cache_position: Any = None
    ) -> Any:
        return self.layer(hidden)


class Length:
    def __init__(self, length: Any) -> None:
        self.length = length

    def get_seq_length(self) -> Any:
        return self.length


class State:
    has_previous_state = True


FILLED = torch.ones(1, 1, 3, 2)
EMPTY = torch.ones(1, 1, 0, 2)


@pytest.mark.parametrize(
    ("arguments", "continues"),
    [
        ({}, False),
        ({"past_key_values": None}, False),
        ({"past_key_values": Length(0)}, False),
        ({"past_key_values": Length(torch.tensor(0))}, False),
        ({"past_key_values": Length(3)}, True),
        ({"past_key_values": Length(torch.tensor(3))}, True),
        ({"past_key_values": ()}, False),
        ({"past_key_values": (None, None)}, False),
        ({"past_key_values": ((EMPTY, EMPTY),)}, False),
        ({"past_key_values": ((FILLED, FILLED),)}, True),
        ({"cache_params": State()}, True),
        ({"cache_position": torch.arange(3)}, False),
        ({"cache_position": torch.arange(3, 6)}, True),
        ({"past_key_values": Length(0), "cache_position": torch.arange(3)}, False),
    ],
)
def test_what_continues_a_generation(arguments: dict[str, Any], continues: bool) -> None:
    model = Cached()
    hidden = torch.randn(1, 3, WIDTH)
    plain = model(hidden)
    attach(model, {"layer": new()}, "all")
    assert torch.equal(model(hidden, **arguments), plain) == continues


def test_a_cache_that_does_not_say_is_an_error() -> None:
    model = Cached()
    attach(model, {"layer": new()}, "all")
    with pytest.raises(AdapterError, match="a cache of type object, which does not say whether it holds tokens"):
        model(torch.randn(1, 3, WIDTH), past_key_values=object())


def test_without_a_cache_first_tokens_and_a_prompt_give_what_the_cache_gives() -> None:
    for positions, prompt in (("f2", False), ("f1+l1", True)):
        model = Toy()
        adapter = attach(model, {PATH: new()}, positions)
        expected = model.generate(ids(), LEFT, steps=6)
        if not prompt:
            assert torch.equal(model.generate(ids(), LEFT, steps=6, use_cache=False), expected)
            continue
        words, mask = ids(), LEFT
        for _ in range(6):
            inside = torch.arange(mask.shape[1]) < 5
            with adapter.prompt(inside.expand(mask.shape)), torch.no_grad():
                word = model(words, mask)[:, -1:].argmax(-1)
            words, mask = torch.cat([words, word], 1), torch.cat([mask, torch.ones_like(word)], 1)
        assert torch.equal(words, expected)


# The prompt in training


def test_within_a_prompt_its_tokens_are_the_real_ones() -> None:
    model, loreft = Toy(), new()
    prompt = torch.tensor([[0, 1, 1, 0, 0], [1, 1, 1, 0, 0]])
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 0]])
    with slowly(model, loreft, "f1+l1", prompt):
        expected = model(ids(), mask)
    adapter = attach(model, {PATH: loreft}, "f1+l1")
    without = model(ids(), mask)
    with adapter.prompt(prompt):
        assert close(model(ids(), mask), expected, 1000)
        with adapter.prompt(mask):
            assert torch.equal(model(ids(), mask), without)
        assert close(model(ids(), mask), expected, 1000)
    assert torch.equal(model(ids(), mask), without)


def test_a_prompt_of_another_shape_is_an_error() -> None:
    model = Toy()
    adapter = attach(model, {PATH: new()}, "all")
    with pytest.raises(ValueError, match=r"expected shape \(batch, seq\)"), adapter.prompt(torch.ones(5)):
        pass
    with pytest.raises(AdapterError, match=r"the prompt has shape \(2, 4\)"), adapter.prompt(torch.ones(2, 4)):
        model(ids())
    model(ids())
