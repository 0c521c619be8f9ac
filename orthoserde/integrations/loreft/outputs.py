"""The hidden states in what a layer returns, and the same thing with others in their place."""

from __future__ import annotations

import copy
from collections.abc import Callable, MutableMapping
from typing import Any

import torch
from torch import Tensor

_FIELD = "last_hidden_state"


def hidden_states(output: object) -> tuple[Tensor, Callable[[Tensor], object]]:
    """Find the hidden states that a layer returned.

    Args:
        output: A tensor; a tuple or list that begins with one; or a mapping or object with ``last_hidden_state``.

    Returns:
        The hidden states, and a function that puts others in their place, in a copy of the output.

    Raises:
        TypeError: The output is something else.
    """
    if isinstance(output, Tensor):
        return output, lambda new: new
    if isinstance(output, MutableMapping) and isinstance(output.get(_FIELD), Tensor):
        return output[_FIELD], lambda new: _with_item(output, new)
    if isinstance(output, list | tuple) and output and isinstance(output[0], Tensor):
        return output[0], lambda new: _with_first(output, new)
    if not isinstance(output, list | tuple | MutableMapping) and isinstance(getattr(output, _FIELD, None), Tensor):
        return getattr(output, _FIELD), lambda new: _with_attribute(output, new)
    raise TypeError(
        f"a {type(output).__name__}, expected a tensor, a tuple or list that begins with one, or {_FIELD} in a mapping"
    )


def _with_item(output: MutableMapping[str, Any], new: Tensor) -> object:
    copied = copy.copy(output)
    copied[_FIELD] = new
    return copied


def _with_first(output: list[Any] | tuple[Any, ...], new: Tensor) -> object:
    items = [new, *output[1:]]
    return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)


def _with_attribute(output: object, new: Tensor) -> object:
    copied = copy.copy(output)
    object.__setattr__(copied, _FIELD, new)  # frozen dataclasses too
    return copied


def padded(nested: Tensor) -> tuple[Tensor, Tensor]:
    """A nested tensor, as torch's encoder makes of a padded one in inference, as a padded one.

    Args:
        nested: Rows of shape ``(length, hidden)``.

    Returns:
        Shape ``(batch, longest, hidden)`` with zeros behind each row, and which tokens are real.
    """
    lengths = torch.tensor([row.shape[0] for row in nested.unbind()], device=nested.device)
    dense = torch.nested.to_padded_tensor(nested, 0.0)
    return dense, torch.arange(dense.shape[1], device=nested.device) < lengths[:, None]


def nested_again(dense: Tensor, real: Tensor) -> Tensor:
    """The inverse of :func:`padded`."""
    return torch.nested.as_nested_tensor([row[chosen] for row, chosen in zip(dense, real, strict=True)])
