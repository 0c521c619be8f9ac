"""Put parametrizations with a given state on a tensor, and take them off: no ``right_inverse``, no random numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from orthoserde import _torch


def register_given(
    module: nn.Module,
    name: str,
    links: Sequence[nn.Module],
    originals: Sequence[Tensor],
    *,
    single: bool,
    unsafe: bool,
) -> Callable[[], None]:
    """Register a chain of parametrizations on a plain tensor of a module.

    Args:
        module: The module.
        name: Name of the tensor; a single original takes its place in the same Parameter object.
        links: The parametrizations, in order, with their own tensors in place.
        originals: The unconstrained tensors; empty if the plain tensor itself is to be the original.
        single: Whether there is one, called ``original``; else they are ``original0``, ``original1``, ...
        unsafe: As for ``register_parametrization``.

    Returns:
        What undoes it. If it fails, it is undone.
    """
    bare = cast("Tensor", getattr(module, name))
    undo = _snapshot(module, bare)
    try:
        holder = _Given(originals, single=single) if originals else nn.Identity()
        # A tensor made in inference mode can only be handled there; others must not become such.
        with torch.inference_mode(bare.is_inference()):
            parametrize.register_parametrization(module, name, holder, unsafe=True)
        parametrized = _torch.parametrization_lists(module)[name]
        parametrized[0] = links[0]
        for link in links[1:]:
            parametrized.append(link)
        parametrized.unsafe = unsafe
        parametrized.train(module.training)
        cast("nn.ModuleDict", module.parametrizations).training = module.training
    except BaseException:
        undo()
        raise
    return undo


def unregister(module: nn.Module, name: str, weight: Tensor) -> None:
    """Take the parametrizations off a tensor of a module, and leave a plain tensor with these elements.

    A single original becomes the plain tensor: the same Parameter object, so that an optimizer that holds it goes on
    with it. Its gradient, which is one of other coordinates, goes.

    Args:
        module: The module.
        name: Name of the tensor.
        weight: The elements, in memory that nothing else uses.
    """
    parametrized = _torch.parametrization_lists(module)[name]
    held = {**_torch.own_buffers(parametrized), **_torch.own_parameters(parametrized)}
    originals = [tensor for each in _torch.original_names(parametrized) if (tensor := held[each]) is not None]
    parameter = all(isinstance(original, nn.Parameter) for original in originals)
    if len(originals) == 1 and (originals[0].dtype, originals[0].device) == (weight.dtype, weight.device):
        plain = originals[0]
        plain.grad = None
        plain.data = weight
    elif parameter:
        trained = any(original.requires_grad for original in originals)
        can_be = weight.is_floating_point() or weight.is_complex()
        plain = nn.Parameter(weight, requires_grad=trained and can_be)
    else:
        plain = weight
    lists = cast("nn.ModuleDict", _torch.child_modules(module)["parametrizations"])
    del lists[name]
    module.__class__ = _class_without(type(module), name) if len(lists) else type(module).__bases__[0]
    if parameter:
        module.register_parameter(name, cast("nn.Parameter", plain))
    else:
        module.register_buffer(name, plain)
    if not len(lists):
        del module.parametrizations
    _torch.forget_old_weight_norm(module, name)


def _class_without(cls: type, name: str) -> type:
    """A class that torch made for parametrized modules, less one property: copies of a module have that class too."""
    kept = {key: value for key, value in vars(cls).items() if key not in (name, "__dict__", "__weakref__")}
    without: type = type(cls)(cls.__name__, cls.__bases__, kept)
    return without


class _Given(nn.Module):
    """Stands in while torch registers a parametrization, and hands it the originals instead of computing them."""

    def __init__(self, originals: Sequence[Tensor], *, single: bool) -> None:
        super().__init__()
        self._originals = tuple(originals)
        self._single = single

    def forward(self, *originals: Tensor) -> Tensor:
        return originals[0]

    def right_inverse(self, value: Tensor) -> Tensor | tuple[Tensor, ...]:
        return self._originals[0] if self._single else self._originals


def _snapshot(module: nn.Module, bare: Tensor) -> Callable[[], None]:
    """Remember what registering a parametrization changes on a module; the result puts it back."""
    restore_module = _torch.remember_module(module)
    memory = bare.detach()

    def undo() -> None:
        restore_module()
        # In this order: leaving inference mode turns gradients on again.
        with torch.inference_mode(bare.is_inference()), torch.no_grad():
            bare.set_(memory)  # type: ignore[call-overload]

    return undo
