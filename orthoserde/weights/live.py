"""The computed tensor of a live model and its distance from the constraint, without disturbing the model.

Parametrizations that a codec speaks for are not run: spectral_norm's would move its buffers. A class that was merely
registered may compute with what is no state, so it is run itself, in evaluation mode, on copies of its tensors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from orthoserde import _torch, modes
from orthoserde.parametrizations import codec_for_type
from orthoserde.registry import Registry
from orthoserde.registry.codec import Codec, residual_of
from orthoserde.registry.registered_class import RegisteredClass
from orthoserde.walk import ParametrizedTensor, computed_originals


def codecs_of(tensor: ParametrizedTensor, registry: Registry) -> list[Codec | None]:
    """The codec of each of its parametrizations, None for an unregistered class."""
    return [
        codec_for_type(registry, _torch.class_before_parametrizations(_torch.unwrap(parametrization)))
        for parametrization in tensor.parametrizations
    ]


def spoken_for(tensors: Iterable[ParametrizedTensor], registry: Registry) -> set[int]:
    """Ids of all modules that the records of parametrized tensors say all of.

    These are their parametrizations, and what is inside of one whose codec says all of it. A class that was merely
    registered may have been given its parts.
    """
    found: set[int] = set()
    for tensor in tensors:
        for link, codec in zip(tensor.parametrizations, codecs_of(tensor, registry), strict=True):
            inside = _torch.unwrap(link)
            whole = codec is not None and not isinstance(codec, RegisteredClass)
            found |= {id(part) for part in inside.modules()} if whole else {id(inside)}
    return found


def computed(tensor: ParametrizedTensor, registry: Registry) -> Tensor | None:
    """The computed tensor, without a graph; None where a class, its configuration or an original is not known."""
    if computed_originals(tensor):
        return None
    current = {name: original.detach() for name, original in tensor.originals.items()}
    weight: Tensor | None = None
    with modes.undisturbed():
        for wrapped, codec in zip(tensor.parametrizations, codecs_of(tensor, registry), strict=True):
            parametrization = _torch.unwrap(wrapped)
            config = None if codec is None else codec.config(parametrization)
            if codec is None or config is None:
                return None
            if isinstance(codec, RegisteredClass):
                weight = _run(parametrization, list(current.values()))
            else:
                own = {role: value.detach() for role, value in codec.tensors(parametrization).items()}
                weight = codec.compute(config, {**current, **own})
            current = {"original": weight}
    return weight


@contextlib.contextmanager
def evaluating(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Have modules in evaluation mode; then modes and attributes are what they were, for they may keep results."""
    parts = list(modules)
    undo = [_torch.remember_module(part) for part in parts]
    try:
        for part in parts:
            part.training = False
        yield
    finally:
        for put_back in undo:
            put_back()


def _run(parametrization: nn.Module, inputs: list[Tensor]) -> Tensor:
    """What a parametrization makes of tensors in evaluation mode; tensors, modes and attributes stay as they are."""
    copies = {name: tensor.detach().clone() for name, tensor in parametrization.named_parameters()}
    copies |= {name: tensor.detach().clone() for name, tensor in parametrization.named_buffers()}
    with evaluating(parametrization.modules()), torch.no_grad():
        weight = torch.func.functional_call(parametrization, copies, tuple(inputs))
    if not isinstance(weight, Tensor):
        raise TypeError(f"expected a tensor, got a {type(weight).__name__}")
    return weight.detach()


def residual(tensor: ParametrizedTensor, registry: Registry) -> float | None:
    """Distance of the computed tensor from its last constraint; None where there is none to measure, or no way to."""
    last = codecs_of(tensor, registry)[-1]
    try:
        weight = computed(tensor, registry)
        if last is None or weight is None:
            return None
        return residual_of(last, weight, last.config(_torch.unwrap(tensor.parametrizations[-1])))
    except Exception:  # torch has no such operation for this dtype, or whatever a user's class raises: it is no state
        return None
