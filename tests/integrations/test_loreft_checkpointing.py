"""Layers that run again during backward know which forward they belong to, or say that they do not."""

from __future__ import annotations

import gc
import threading
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from orthoserde import AdapterError
from orthoserde.integrations.loreft import Adapter, LoReFT, attach
from tests.integrations.toy import WIDTH, Toy, close, ids, strong

LEFT = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
RIGHT = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
REENTRANT = pytest.mark.parametrize("reentrant", [True, False])


def make(positions: Any = "f1+l1", dropout: float = 0.0) -> tuple[Toy, Adapter]:
    torch.manual_seed(0)
    model = Toy(dropout=dropout)
    layers = {f"decoder.blocks.{index}": strong(LoReFT(WIDTH, 2, dropout=dropout)) for index in (1, 2)}
    adapter = attach(model, layers, positions)
    # A reentrant checkpoint wants an input that requires a gradient.
    model.decoder.words.weight.requires_grad_(True)
    return model, adapter


def gradients(adapter: Adapter, *losses: Tensor) -> list[Tensor]:
    adapter.zero_grad()
    torch.autograd.backward(losses)
    return [parameter.grad.clone() for parameter in adapter.parameters() if parameter.grad is not None]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected) > 0
    assert all(close(mine, theirs, 1000) for mine, theirs in zip(found, expected, strict=True))


@REENTRANT
@pytest.mark.parametrize("together", [1, 2, 3])
@pytest.mark.parametrize("mask", [None, LEFT, RIGHT])
def test_gradients_are_those_without_checkpointing(mask: Tensor | None, together: int, reentrant: bool) -> None:
    model, adapter = make(dropout=0.3)
    torch.manual_seed(1)
    expected = gradients(adapter, model(ids(), mask).pow(2).sum())
    model.decoder.reentrant, model.decoder.together = reentrant, together
    torch.manual_seed(1)
    assert_same(gradients(adapter, model(ids(), mask).pow(2).sum()), expected)
    assert adapter.calls.current is None


@REENTRANT
@pytest.mark.parametrize("together", [1, 2])
def test_forwards_with_other_masks_may_follow_each_other(together: int, reentrant: bool) -> None:
    model, adapter = make()
    model.decoder.together = together
    for mask in (LEFT, RIGHT, None, LEFT):
        model.decoder.reentrant = None
        expected = gradients(adapter, model(ids(), mask).pow(2).sum())
        model.decoder.reentrant = reentrant
        with torch.no_grad():
            model(ids(), RIGHT)  # an evaluation in between
        loss = model(ids(), mask).pow(2).sum()
        with torch.no_grad():
            model(ids())
        assert_same(gradients(adapter, loss), expected)


@REENTRANT
def test_two_forwards_before_one_backward_each_have_their_mask(reentrant: bool) -> None:
    model, adapter = make()
    expected = gradients(adapter, model(ids(), LEFT).pow(2).sum(), model(ids(seed=1), RIGHT).pow(2).sum())
    model.decoder.reentrant = reentrant
    found = gradients(adapter, model(ids(), LEFT).pow(2).sum(), model(ids(seed=1), RIGHT).pow(2).sum())
    assert_same(found, expected)
    # And backward in the other order.
    first, second = model(ids(), LEFT).pow(2).sum(), model(ids(seed=1), RIGHT).pow(2).sum()
    adapter.zero_grad()
    second.backward()
    first.backward()
    assert_same([p.grad for p in adapter.parameters() if p.grad is not None], expected)


@REENTRANT
def test_two_forwards_that_cannot_be_told_apart_are_an_error_and_never_a_guess(reentrant: bool) -> None:
    model, adapter = make()
    model.decoder.reentrant, model.decoder.together = reentrant, 3
    losses = [model(ids(), mask).pow(2).sum() for mask in (LEFT, RIGHT)]
    with pytest.raises(AdapterError, match="recomputed in backward, and it cannot be told for which"):
        gradients(adapter, *losses)
    del losses
    gc.collect()
    # With equal masks there is nothing to tell apart.
    found = gradients(adapter, *(model(ids(), LEFT.clone()).pow(2).sum() for _ in range(2)))
    model.decoder.reentrant = None
    assert_same(found, gradients(adapter, *(model(ids(), LEFT).pow(2).sum() for _ in range(2))))


@REENTRANT
def test_one_input_of_two_forwards_is_told_apart_or_refused(reentrant: bool) -> None:
    model, adapter = make()
    hidden = torch.randn(2, 5, WIDTH, requires_grad=True)

    class Around(nn.Module):
        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.block = block

        def forward(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
            (result,) = cast("tuple[Tensor]", checkpoint(self.block, hidden, use_reentrant=reentrant))
            return result

    outer = Around(model.decoder.blocks[0])
    adapter.detach()
    adapter = attach(outer, {"block": adapter.layers["decoder.blocks.1"]}, "f1")
    losses = [outer(hidden, mask).pow(2).sum() for mask in (LEFT, RIGHT)]
    with pytest.raises(AdapterError, match="their masks differ"):
        gradients(adapter, *losses)
    del losses
    gc.collect()
    for mask in (LEFT, RIGHT):  # one after the other there is no doubt
        gradients(adapter, outer(hidden, mask).pow(2).sum())


@REENTRANT
def test_random_positions_are_those_of_the_forward(reentrant: bool) -> None:
    asked: list[Tensor] = []

    def positions(real: Tensor) -> Tensor:
        asked.append(torch.rand(real.shape) < 0.5)
        return asked[-1]

    model, adapter = make(positions)
    model.decoder.reentrant, model.decoder.together = reentrant, 3
    loss = model(ids(), LEFT).pow(2).sum()
    found = gradients(adapter, loss)
    (chosen,) = asked
    adapter.detach()
    layers = dict(adapter.layers)
    model.decoder.reentrant = None
    adapter = attach(model, layers, lambda real: chosen)
    assert_same(found, gradients(adapter, model(ids(), LEFT).pow(2).sum()))


@REENTRANT
def test_random_positions_of_two_forwards_are_not_mixed_up(reentrant: bool) -> None:
    torch.manual_seed(4)
    model, adapter = make(lambda real: torch.rand(real.shape) < 0.5)
    model.decoder.reentrant, model.decoder.together = reentrant, 3
    losses = [model(ids(), LEFT).pow(2).sum() for _ in range(2)]
    with pytest.raises(AdapterError, match="cannot be told"):
        gradients(adapter, *losses)


@REENTRANT
def test_a_prompt_is_remembered_until_backward(reentrant: bool) -> None:
    model, adapter = make("l1")
    prompt = torch.tensor([[0, 0, 1, 1, 0], [1, 1, 0, 0, 0]])

    def loss(run: Any) -> Tensor:
        with adapter.prompt(prompt):
            return cast("Tensor", run(ids(), LEFT).pow(2).sum())

    expected = gradients(adapter, loss(model))
    model.decoder.reentrant = reentrant
    assert_same(gradients(adapter, loss(model)), expected)
    model.decoder.reentrant = None

    def whole(words: Tensor, mask: Tensor) -> Tensor:
        dummy = torch.zeros((), requires_grad=True)
        result = checkpoint(lambda w, m, d: model(w, m) + d, words, mask, dummy, use_reentrant=reentrant)
        assert isinstance(result, Tensor)
        return result

    assert_same(gradients(adapter, loss(whole)), expected)


@REENTRANT
def test_two_forwards_with_other_prompts_are_not_mixed_up(reentrant: bool) -> None:
    model, adapter = make("l1")
    model.decoder.reentrant, model.decoder.together = reentrant, 3
    losses = []
    for prompt in (LEFT, RIGHT):
        with adapter.prompt(prompt):
            losses.append(model(ids()).pow(2).sum())
    with pytest.raises(AdapterError, match="cannot be told"):
        gradients(adapter, *losses)


@REENTRANT
def test_one_input_with_other_prompts_is_not_mixed_up_where_the_whole_model_is_repeated(reentrant: bool) -> None:
    model, adapter = make("l1")
    words, anchor = ids(), torch.zeros((), requires_grad=True)
    losses = []
    for prompt in (LEFT, torch.tensor([[0, 0, 1, 1, 0], [1, 1, 0, 0, 0]])):
        with adapter.prompt(prompt):
            result = checkpoint(lambda w, a: model(w) + a, words, anchor, use_reentrant=reentrant)
            losses.append(cast("Tensor", result).pow(2).sum())
    with pytest.raises(AdapterError, match="cannot be told"):
        gradients(adapter, *losses)


@REENTRANT
def test_layers_that_are_called_without_the_model(reentrant: bool) -> None:
    model, adapter = make("f1")
    blocks = [Unpack(block) for block in model.decoder.blocks]
    hidden = torch.randn(2, 5, WIDTH, requires_grad=True)
    expected = gradients(adapter, nn.Sequential(*blocks)(hidden).pow(2).sum())
    together = checkpoint_sequential(blocks, 1, hidden, use_reentrant=reentrant)  # type: ignore[no-untyped-call]
    assert_same(gradients(adapter, together.pow(2).sum()), expected)
    one = checkpoint(lambda h: blocks[2](blocks[1](h)), blocks[0](hidden), use_reentrant=reentrant)
    assert_same(gradients(adapter, one.pow(2).sum()), expected)


class Unpack(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, hidden: Tensor) -> Tensor:
        (result,) = self.block(hidden)
        assert isinstance(result, Tensor)
        return result


@REENTRANT
@pytest.mark.parametrize("together", [1, 2])
def test_backward_may_run_in_another_thread_as_it_does_on_a_gpu(together: int, reentrant: bool) -> None:
    model, adapter = make()
    expected = gradients(adapter, model(ids(), RIGHT).pow(2).sum())
    model.decoder.reentrant, model.decoder.together = reentrant, together
    loss, found = model(ids(), RIGHT).pow(2).sum(), []
    thread = threading.Thread(target=lambda: found.extend(gradients(adapter, loss)))
    thread.start()
    thread.join()
    assert_same(found, expected)


def test_tensors_moved_away_and_back_are_still_of_their_forward() -> None:
    model, adapter = make()
    expected = gradients(adapter, model(ids(), RIGHT).pow(2).sum())
    model.decoder.reentrant = False
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        loss = model(ids(), RIGHT).pow(2).sum()
    assert_same(gradients(adapter, loss), expected)


def test_a_model_whose_output_is_opaque_is_an_error_where_it_would_be_a_guess() -> None:
    class Box:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor

    class Opaque(nn.Module):
        def __init__(self, toy: Toy) -> None:
            super().__init__()
            self.blocks = toy.decoder.blocks
            self.plain = False

        def forward(self, hidden: Tensor, attention_mask: Tensor | None = None) -> Any:
            run = lambda h: self.blocks[1](self.blocks[0](h)[0])[0]  # noqa: E731
            result = cast("Tensor", checkpoint(run, hidden, use_reentrant=True))
            return result if self.plain else Box(result)

    opaque = Opaque(Toy())
    adapter = attach(opaque, {"blocks.1": strong(LoReFT(WIDTH, 2))}, "f1")
    hidden = torch.randn(2, 5, WIDTH, requires_grad=True)
    loss = opaque(hidden, LEFT).tensor.sum()
    opaque.plain = True
    other = opaque(hidden, RIGHT)  # whose graph is alive, and known to be
    with pytest.raises(AdapterError, match="cannot be told"):
        gradients(adapter, loss)
    assert other.grad_fn is not None


def test_a_forward_inside_of_a_backward_is_a_forward_of_its_own() -> None:
    model, adapter = make()
    expected = model(ids(), RIGHT)
    seen: list[Tensor] = []
    loss = model(ids(), LEFT).pow(2).sum()
    loss.register_hook(lambda gradient: seen.append(model(ids(), RIGHT)))
    loss.backward()
    assert torch.equal(seen[0], expected)
    assert adapter.calls.current is None


def test_a_backward_inside_of_a_forward_does_not_take_its_mask() -> None:
    model, adapter = make()
    expected = gradients(adapter, model(ids(), RIGHT).pow(2).sum())
    model.decoder.reentrant = False
    loss = model(ids(), RIGHT).pow(2).sum()
    found: list[list[Tensor]] = []

    def inside(module: nn.Module, args: object) -> None:
        if not found:
            found.append([])
            found[0] = gradients(adapter, loss)

    model.decoder.blocks[0].register_forward_pre_hook(inside)
    model(ids(), LEFT)
    assert_same(found[0], expected)


def test_nothing_is_kept_of_forwards_that_are_gone() -> None:
    model, adapter = make()
    words = ids()
    for _ in range(5):
        gradients(adapter, model(words, LEFT.clone()).pow(2).sum())
        with torch.no_grad():
            model(words, LEFT.clone())
    gc.collect()
    calls = adapter.calls
    assert sum(len(alive) for alive in vars(calls)["_alive"].values()) <= 1
    assert all(len(entries) <= 1 for entries in vars(calls)["_inputs"].values())
