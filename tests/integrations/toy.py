"""A small transformer with an attention mask, a cache of keys and values and greedy generation; and a slow LoReFT."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle

from orthoserde.integrations.loreft import LoReFT

WIDTH = 6
WORDS = 11
#: The tables of a module in which hooks are.
HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)
#: Which tokens are real, of two rows of five.
LEFT = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
RIGHT = LEFT.flip(1)
HOLES = torch.tensor([[1, 0, 1, 1, 0], [0, 1, 0, 0, 1]])
SHORT = torch.tensor([[0, 0, 0, 0, 1], [0, 0, 0, 0, 0]])
#: The layer that most tests intervene on.
PATH = "decoder.blocks.1"


class Cache:
    """Keys and values of each block, filled as the blocks run, as transformers' DynamicCache is."""

    def __init__(self) -> None:
        self.entries: dict[int, tuple[Tensor, Tensor]] = {}

    def get_seq_length(self) -> int:
        return self.entries[0][0].shape[1] if 0 in self.entries else 0

    def update(self, index: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if index in self.entries:
            key = torch.cat([self.entries[index][0], key], 1)
            value = torch.cat([self.entries[index][1], value], 1)
        self.entries[index] = key, value
        return key, value


class Block(nn.Module):
    def __init__(self, index: int, dropout: float) -> None:
        super().__init__()
        self.index = index
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, hidden: Tensor, attention_mask: Tensor | None = None, past_key_values: Cache | None = None
    ) -> tuple[Tensor]:
        query, key, value = self.qkv(hidden).chunk(3, -1)
        if past_key_values is not None:
            key, value = past_key_values.update(self.index, key, value)
        scores = query @ key.mT / WIDTH**0.5
        if attention_mask is not None:
            scores = scores.masked_fill(~attention_mask[:, 0], -1e4)
        return (hidden + self.dropout(torch.tanh(self.out(scores.softmax(-1) @ value))),)


class Decoder(nn.Module):
    def __init__(self, blocks: int, dropout: float) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.places = nn.Embedding(64, WIDTH)
        self.blocks = nn.ModuleList(Block(i, dropout) for i in range(blocks))
        #: None, or the use_reentrant of a checkpoint around each block.
        self.reentrant: bool | None = None
        #: Blocks to a checkpoint.
        self.together = 1

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
    ) -> Tensor:
        before = 0 if past_key_values is None else past_key_values.get_seq_length()
        batch, length = input_ids.shape
        real = attention_mask
        if real is None:
            real = torch.ones(batch, before + length, dtype=torch.long)
        place = (real.long().cumsum(-1) - 1).clamp(min=0)[:, before:]
        causal = torch.ones(length, before + length, dtype=torch.bool).tril(before)
        mask = (causal[None] & (real[:, None] != 0))[:, None]  # (batch, 1, queries, keys)
        hidden: Tensor = self.words(input_ids) + self.places(place)
        if self.reentrant is None or not torch.is_grad_enabled():
            for block in self.blocks:
                (hidden,) = cast("tuple[Tensor]", block(hidden, mask, past_key_values))
            return hidden
        for start in range(0, len(self.blocks), self.together):

            def run(hidden: Tensor, mask: Tensor, start: int = start) -> Tensor:
                for block in list(self.blocks)[start : start + self.together]:
                    (hidden,) = cast("tuple[Tensor]", block(hidden, mask))
                return hidden

            hidden = cast("Tensor", checkpoint(run, hidden, mask, use_reentrant=self.reentrant))
        return hidden


class Toy(nn.Module):
    """A language model. ``forward`` gives logits."""

    def __init__(self, blocks: int = 3, dropout: float = 0.0) -> None:
        super().__init__()
        self.decoder = Decoder(blocks, dropout)
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, past_key_values: Cache | None = None
    ) -> Tensor:
        logits: Tensor = self.head(self.decoder(input_ids, attention_mask, past_key_values=past_key_values))
        return logits

    @torch.no_grad()
    def generate(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, steps: int = 4, use_cache: bool = True
    ) -> Tensor:
        """Greedy: the ids with those that follow."""
        cache = Cache() if use_cache else None
        given = input_ids
        for _ in range(steps):
            logits = self(given, attention_mask=attention_mask, past_key_values=cache)
            word = logits[:, -1:].argmax(-1)
            input_ids = torch.cat([input_ids, word], 1)
            given = word if use_cache else input_ids
            if attention_mask is not None:
                attention_mask = torch.cat([attention_mask, torch.ones_like(word)], 1)
        return input_ids


def ids(batch: int = 2, length: int = 5, seed: int = 0) -> Tensor:
    return torch.randint(WORDS, (batch, length), generator=torch.Generator().manual_seed(seed))


def strong(loreft: LoReFT) -> LoReFT:
    """Move an intervention far from doing nothing, and from where it was made."""
    with torch.no_grad():
        loreft.learned_source.weight.normal_(0, 2)
        loreft.learned_source.bias.normal_(0, 2)
        parametrized: Any = loreft.rotate_layer.parametrizations
        parametrized.weight.original.add_(0.3 * torch.randn_like(parametrized.weight.original).tril(-1))
    return loreft


def slow_loreft(loreft: LoReFT, vector: Tensor) -> Tensor:
    """``h + R^T (W h + b - R h)`` of one hidden state, one number after the other, without dropout."""
    columns = loreft.rotate_layer.weight
    weight, bias = loreft.learned_source.weight, loreft.learned_source.bias
    new = list(vector.unbind())
    for k in range(loreft.rank):
        source = sum((weight[k, j] * vector[j] for j in range(loreft.hidden_size)), bias[k])
        rotated = sum((columns[j, k] * vector[j] for j in range(loreft.hidden_size)), torch.zeros(()))
        for j in range(loreft.hidden_size):
            new[j] = new[j] + columns[j, k] * (source - rotated)
    return torch.stack(new)


def slow_positions(positions: str, row: Sequence[bool]) -> list[int]:
    """The chosen tokens of one row, by counting."""
    real = [index for index, is_real in enumerate(row) if is_real]
    if positions == "all":
        return real
    chosen: set[int] = set()
    for part in positions.split("+"):
        count = int(part[1:])
        chosen |= set(real[:count] if part[0] == "f" else real[max(len(real) - count, 0) :])
    return sorted(chosen)


def slow_hook(loreft: LoReFT, positions: str, mask: Tensor | None) -> Callable[..., tuple[Tensor]]:
    """A forward hook that intervenes token by token, given the mask from outside; every call is intervened on."""

    def hook(module: nn.Module, args: object, output: tuple[Tensor]) -> tuple[Tensor]:
        (hidden,) = output
        rows = []
        for i, row in enumerate(hidden):
            real = [True] * len(row) if mask is None else (mask[i] != 0).tolist()
            chosen = slow_positions(positions, real)
            rows.append(torch.stack([slow_loreft(loreft, h) if j in chosen else h for j, h in enumerate(row)]))
        return (torch.stack(rows),)

    return hook


def close(left: Tensor, right: Tensor, n: int = 100) -> bool:
    """Whether two tensors are equal but for rounding over about n operations."""
    limit = 10 * n * torch.finfo(left.dtype).eps * max(1.0, float(right.detach().abs().max()))
    return left.shape == right.shape and float((left - right).detach().abs().max()) <= limit


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def state(model: nn.Module) -> list[Any]:
    """Everything about a model that attaching could change: tables, hooks, tensors, modes."""
    return [
        (name, id(module), list(module._modules), [dict(getattr(module, table)) for table in HOOKS], module.training)
        for name, module in model.named_modules()
    ] + [(name, id(p), p.requires_grad, p._version, p.clone()) for name, p in model.named_parameters()]


def same(left: list[Any], right: list[Any]) -> bool:
    return len(left) == len(right) and all(
        len(a) == len(b)
        and all(torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in zip(a, b, strict=True))
        for a, b in zip(left, right, strict=True)
    )


def new(**arguments: Any) -> LoReFT:
    return strong(LoReFT(WIDTH, 2, **arguments))


@contextmanager
def slowly(model: Toy, loreft: LoReFT, positions: str, mask: Tensor | None) -> Iterator[None]:
    handle: RemovableHandle = model.decoder.blocks[1].register_forward_hook(slow_hook(loreft, positions, mask))
    try:
        yield
    finally:
        handle.remove()
