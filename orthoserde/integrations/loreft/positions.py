"""Which tokens are intervened on, given which tokens are real. Pure functions of tensors."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

#: ``"f{n}"``, ``"l{m}"``, ``"f{n}+l{m}"`` or ``"all"``; or a function from the real tokens, bool of shape
#: ``(batch, seq)``, to the chosen ones: bool of the same shape, or integer indices of shape ``(batch, m)``.
Positions = str | Callable[[Tensor], Tensor]

_FIRST_LAST = re.compile(r"(?:f([1-9][0-9]*))?(\+)?(?:l([1-9][0-9]*))?")


@dataclass(frozen=True)
class FirstLast:
    """The first and the last real tokens of each row; one that is both is chosen once.

    A row that is too short gives all of its real tokens.

    Attributes:
        first: How many at the beginning.
        last: How many at the end.
    """

    first: int
    last: int

    def __call__(self, real: Tensor) -> Tensor:
        """Choose among the real tokens: bool of shape ``(batch, seq)``, in and out."""
        number = real.cumsum(-1)  # 1 for the first real token
        return real & ((number <= self.first) | (number > number[:, -1:] - self.last))


def all_real(real: Tensor) -> Tensor:
    """Choose every real token."""
    return real


def parse(positions: Positions) -> Callable[[Tensor], Tensor]:
    """Turn positions into the function that chooses.

    Raises:
        ValueError: A string of another form.
        TypeError: Neither a string nor callable.
    """
    if not isinstance(positions, str):
        if not callable(positions):
            raise TypeError(f"positions: expected a string or a callable, got {type(positions).__name__}")
        return positions
    if positions == "all":
        return all_real
    match = _FIRST_LAST.fullmatch(positions)
    first, plus, last = match.groups() if match else (None, None, None)
    if (first is None and last is None) or (plus is not None) != (first is not None and last is not None):
        raise ValueError(
            f"positions: expected 'f<n>', 'l<m>', 'f<n>+l<m>' with n and m from 1, or 'all', got {positions!r}"
        )
    return FirstLast(int(first or 0), int(last or 0))


def choose(select: Callable[[Tensor], Tensor], real: Tensor) -> Tensor:
    """Apply a choosing function and check what it returns.

    Args:
        select: As :func:`parse` returns it.
        real: Which tokens are real, bool of shape ``(batch, seq)``.

    Returns:
        Which tokens to intervene on, bool of shape ``(batch, seq)``.

    Raises:
        TypeError: The function returned no tensor, or one of a floating dtype.
        ValueError: It returned another shape, or an index outside of the row.
    """
    # A user's function may write into what it is given.
    chosen: object = select(real.clone() if select is not all_real else real)
    if not isinstance(chosen, Tensor):
        raise TypeError(f"positions: the callable returned {type(chosen).__name__}, not a tensor")
    chosen = chosen.to(real.device)
    if chosen.dtype == torch.bool:
        if chosen.shape != real.shape:
            raise ValueError(
                f"positions: the callable was given shape {tuple(real.shape)} and returned {tuple(chosen.shape)}"
            )
        return chosen
    if chosen.is_floating_point() or chosen.is_complex():
        raise TypeError(f"positions: the callable returned dtype {chosen.dtype}; expected bool or integer indices")
    batch, length = real.shape
    if chosen.dim() != 2 or chosen.shape[0] != batch:
        raise ValueError(
            f"positions: the callable returned indices of shape {tuple(chosen.shape)}, expected ({batch}, m)"
        )
    if chosen.numel() and not bool(((chosen >= 0) & (chosen < length)).all()):
        raise ValueError(f"positions: the callable returned an index outside of 0 to {length - 1}")
    return torch.zeros_like(real).scatter_(1, chosen.long(), True)
