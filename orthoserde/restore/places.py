"""Where new tensors go: the slots of a model that hold None, a meta tensor, or one that is about to be replaced."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from orthoserde import _torch
from orthoserde.manifest import TensorRecord
from orthoserde.restore.plan import Outcome
from orthoserde.walk import Slot


@dataclass
class Owner:
    """The parametrized tensor that a tensor is part of: where its parts live, and what becomes of their dtype."""

    outcome: Outcome | None
    device: torch.device
    dtype: torch.dtype
    stored_dtype: str | None


@dataclass(frozen=True)
class Place:
    """Puts a new tensor into slots that hold None, or one tensor that it takes the place of.

    Attributes:
        slots: The slots.
        requires_grad: Whether a new parameter requires a gradient; None to do as the one in its place.
    """

    slots: tuple[Slot, ...]
    requires_grad: bool | None

    def __call__(self, tensor: Tensor) -> Callable[[], None]:
        """Put the tensor there; return what puts back what was there before."""
        old = self.slots[0].tensor
        if isinstance(old, nn.Parameter):
            requires_grad = old.requires_grad if self.requires_grad is None else self.requires_grad
            new = nn.Parameter(tensor, requires_grad=requires_grad)
            new.__class__ = type(old)
            vars(new).update(vars(old))
            # The object stays: an optimizer, a tie or a list that holds it goes on holding the right one.
            _torch.swap(old, new)
            return partial(_torch.swap, old, new)
        for slot in self.slots:
            _torch.set_buffer(slot.module, slot.name, tensor)
        return self._put_back

    def _put_back(self) -> None:
        for slot in self.slots:
            _torch.set_buffer(slot.module, slot.name, slot.tensor)


def same_layout(record: TensorRecord, bare: Tensor) -> bool:
    """Whether a plain tensor can become the original as it is; strides count, because they are state."""
    if record.shape != tuple(bare.shape):
        return False
    pairs = zip(bare.shape, record.stride, bare.stride(), strict=True)
    return bare.device.type == "meta" or all(size < 2 or theirs == ours for size, theirs, ours in pairs)
