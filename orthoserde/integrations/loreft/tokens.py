"""What the arguments of a call say of its tokens: which are real, and whether a generation goes on.

The names are those of transformers and of torch.nn.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

#: Masks of (batch, seq) in which a real token is true or 1.
ATTENTION = "attention_mask"

#: Masks of (batch, seq) in which a real token is False, or 0 where torch.nn has put -inf for True.
PADDING = ("src_key_padding_mask", "tgt_key_padding_mask", "key_padding_mask")

#: Keys and values of tokens that were there before this call.
CACHES = ("past_key_values", "cache_params")

#: Only a decoder gets these: what an encoder made of *another* sequence, whose mask is not the decoder's.
FROM_ENCODER = ("encoder_hidden_states", "memory")


@dataclass(frozen=True)
class Arguments:
    """The arguments of one call by name.

    Attributes:
        values: Those that were given.
        names: All that the module takes.
    """

    values: Mapping[str, Any]
    names: frozenset[str]

    def get(self, name: str) -> Any:
        """The value of an argument, None where it was not given."""
        return self.values.get(name)

    def takes(self, name: str) -> bool:
        """Whether there is such an argument."""
        return name in self.names or name in self.values


def arguments_of(module: nn.Module, args: Sequence[object], kwargs: Mapping[str, object]) -> Arguments:
    """Name the arguments with which a module is called."""
    own = vars(module).get("forward")
    try:
        # A forward that was set on the instance may be a closure over anything, so it is not kept.
        names = _signature(type(module).forward)[1:] if own is None else _signature.__wrapped__(own)
    except (TypeError, ValueError):  # TorchScript and others without a signature
        names = ()
    return Arguments({**dict(zip(names, args, strict=False)), **kwargs}, frozenset(names))


@functools.lru_cache(maxsize=512)
def _signature(function: Callable[..., object]) -> tuple[str, ...]:
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    return tuple(parameter.name for parameter in parameters if parameter.kind not in variadic)


def padding_mask(arguments: Arguments) -> Tensor | None:
    """Which tokens are real, bool of shape ``(batch, seq)``; None where no argument is a mask of that shape."""
    mask = arguments.get(ATTENTION)
    # Some models hand down 0 and -inf under the same name, which says the opposite.
    if (
        isinstance(mask, Tensor)
        and mask.dim() == 2
        and (not mask.is_floating_point() or bool(((mask == 0) | (mask == 1)).all()))
    ):
        return mask.detach() != 0
    names = [name for name in PADDING if arguments.takes(name)]
    if len(names) != 1:  # nn.Transformer has one for each of its two sequences, and hands each down
        return None
    mask = arguments.get(names[0])
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return None
    return mask.detach() == 0


def is_other_sequence(arguments: Arguments) -> bool:
    """Whether the call is a decoder's without a mask: an enclosing mask is then that of the encoder's tokens."""
    if all(arguments.get(name) is None for name in FROM_ENCODER):
        return False
    return all(arguments.get(name) is None for name in (ATTENTION, *PADDING))


def full_mask(mask: object) -> Tensor:
    """Which tokens are real, read off a mask of queries and keys, as generation with a static cache prepares it.

    The last query attends to every real token, unless the mask hides more than padding and the future.

    Args:
        mask: ``(batch, heads, queries, keys)`` or ``(batch, queries, keys)``, True or 0 where a query attends; or a
            mapping of such masks, of which the one for full attention counts.

    Returns:
        Bool of shape ``(batch, queries)``.

    Raises:
        ValueError: Not a mask from which that can be told.
    """
    if isinstance(mask, Mapping):
        mask = mask.get("full_attention")
    if not isinstance(mask, Tensor) or mask.dim() not in (3, 4):
        raise ValueError(f"an {ATTENTION} of {_describe(mask)}")
    attends = mask.detach() == 0 if mask.is_floating_point() else mask.detach() != 0
    attends = attends[:, 0] if attends.dim() == 4 else attends
    queries = attends.shape[1]
    if attends.shape[2] < queries or queries == 0:
        raise ValueError(f"an {ATTENTION} of {_describe(mask)}")
    attends = attends[:, :, :queries]
    real = attends[:, -1]
    if bool((attends & real[:, :, None] & ~real[:, None, :]).any()):
        raise ValueError(f"an {ATTENTION} of {_describe(mask)}, which hides more than padding and the future")
    return real


def _describe(mask: object) -> str:
    return f"shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"type {type(mask).__name__}"


def takes_cache(arguments: Arguments) -> bool:
    """Whether the call has a say in whether a generation goes on."""
    return any(arguments.takes(name) for name in CACHES) or arguments.get("cache_position") is not None


def continues(arguments: Arguments) -> bool:
    """Whether there were tokens before this call, so that it continues a generation.

    Raises:
        ValueError: There is a cache of which that cannot be told.
    """
    position = arguments.get("cache_position")
    if isinstance(position, Tensor) and position.numel() and bool(position.reshape(-1)[0] > 0):
        return True
    return any(_holds_tokens(arguments.get(name)) for name in CACHES)


def _holds_tokens(cache: object) -> bool:
    if cache is None:
        return False
    length = getattr(cache, "get_seq_length", None)
    if callable(length):
        return int(length()) > 0
    if isinstance(cache, list | tuple):
        return any(_holds_tokens(entry) for entry in cache)
    if isinstance(cache, Tensor):
        return cache.numel() > 0
    state = getattr(cache, "has_previous_state", None)
    if state is not None:
        return bool(state() if callable(state) else state)
    raise ValueError(f"a cache of type {type(cache).__name__}, which does not say whether it holds tokens")
