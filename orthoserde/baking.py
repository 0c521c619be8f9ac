"""Live models to plain ones: parametrizations and hooks removed, the weights left as plain tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import prune, remove_spectral_norm, remove_weight_norm

from orthoserde import _torch
from orthoserde.errors import Problem, UnsupportedModuleError
from orthoserde.evaluate import computed
from orthoserde.integrations import in_process
from orthoserde.manifest import join
from orthoserde.parametrizations import codec_for_type
from orthoserde.registration import unregister
from orthoserde.registry import Registry
from orthoserde.reports import BakeReport
from orthoserde.walk import Inventory, ParametrizedTensor, take_inventory


def bake_(model: nn.Module, *, registry: Registry | None = None) -> BakeReport:
    """Make a model plain for serving, in place: what parametrizations and hooks compute becomes a plain tensor.

    Weights are those of evaluation mode, bit for bit, and so are the outputs of the model; what constrains them in
    training is gone. Removed are all parametrizations (``torch.nn.utils.parametrize``), torch's older hooks
    (``torch.nn.utils.weight_norm`` and ``spectral_norm``) and pruning (``torch.nn.utils.prune``). Buffers, training
    mode and random state are kept. A tensor that had one original keeps its Parameter object.

    Args:
        model: Any module.
        registry: Codecs of your own; those of ``orthoserde.default_registry`` by default. What has none is computed by
            its own code, in evaluation mode.

    Returns:
        What was baked.

    Raises:
        UnsupportedModuleError: Something cannot be computed (on the meta device, an error in a parametrization), or an
            original is tied to another tensor. All such are listed, and nothing has changed.
        TypeError: ``model`` is no module.

    Example:
        >>> import torch, orthoserde
        >>> layer = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(4, 3))
        >>> print(orthoserde.bake_(layer))
        baked 1 tensors: they are plain now
          weight: torch>weight_norm
          new parameters: weight; build the optimizer anew
        >>> sorted(layer.state_dict())
        ['bias', 'weight']
    """
    registry = in_process(registry)
    with _torch.undisturbed(), torch.no_grad():
        inventory = take_inventory(model)
        tensors = (*inventory.parametrized, *inventory.hooked)
        problems = list(_in_the_way(inventory))
        weights: list[Tensor] = []
        for tensor in () if problems else tensors:
            try:
                weights.append(_weight_of(tensor, registry))
            except Exception as error:  # whatever a user's parametrization raises
                problems.append(Problem(tensor.name, "unsupported", f"it cannot be computed: {error}"))
        if problems:
            raise UnsupportedModuleError(f"cannot bake {type(model).__qualname__}, which is as it was", problems)
        for tensor, weight in zip(tensors, weights, strict=True):
            if tensor.hook_names:
                _unhook(tensor, weight)
            else:
                unregister(tensor.module, tensor.tensor_name, weight)
        done = {tensor.name: _kinds_of(tensor, registry) for tensor in tensors} | _unprune(inventory)
    replaced = [tensor.name for tensor in tensors if len(tensor.originals) > 1 or tensor.hook_names]
    return BakeReport(done, tuple(replaced))


def _in_the_way(inventory: Inventory) -> Iterator[Problem]:
    """What has no values, and originals that other tensors are tied to, which would become the weight as well."""
    places = Counter(id(slot.tensor) for slot in inventory.slots.values())
    for tensor in (*inventory.parametrized, *inventory.hooked):
        for original in tensor.originals.values():
            if original.device.type == "meta":
                yield Problem(tensor.name, "unsupported", "on the meta device, where it has no values; load it first")
                break
            if places[id(original)] > 1 + len(tensor.aliases):
                yield Problem(tensor.name, "unsupported", "its original is tied to another tensor; untie it")
                break


def _weight_of(tensor: ParametrizedTensor, registry: Registry) -> Tensor:
    """The weight as it is in evaluation mode, in memory of its own."""
    weight = computed(tensor, registry)
    if weight is None:
        weight = _evaluated(tensor)
    buffers = [buffer for link in tensor.parametrizations for buffer in _torch.unwrap(link).buffers()]
    state = {each.untyped_storage().data_ptr() for each in (*tensor.originals.values(), *buffers)}
    return weight.clone() if weight.untyped_storage().data_ptr() in state else weight


def _evaluated(tensor: ParametrizedTensor) -> Tensor:
    """The weight by the parametrizations' own code, in evaluation mode.

    Raises:
        TypeError: What they compute is no tensor.
    """
    parts = [part for link in tensor.parametrizations for part in _torch.unwrap(link).modules()]
    modes = [part.training for part in parts]
    try:
        for part in parts:
            part.training = False
        weight: object = _torch.parametrization_lists(tensor.module)[tensor.tensor_name]()
    finally:
        for part, mode in zip(parts, modes, strict=True):
            part.training = mode
    if not isinstance(weight, Tensor):
        raise TypeError(f"expected a tensor, got a {type(weight).__name__}")
    return weight.detach()


def _kinds_of(tensor: ParametrizedTensor, registry: Registry) -> str:
    names: list[str] = []
    for link in tensor.parametrizations:
        cls = _torch.class_before_parametrizations(_torch.unwrap(link))
        codec = codec_for_type(registry, cls)
        names.append(cls.__qualname__ if codec is None else codec.kind)
    return ", then ".join(names) + (", a hook" if tensor.hook_names else "")


def _unhook(tensor: ParametrizedTensor, weight: Tensor) -> None:
    """Let torch remove its hook, and put in the weight of evaluation mode."""
    trained = any(original.requires_grad for original in tensor.originals.values())
    module, name = tensor.module, tensor.tensor_name
    if isinstance(tensor.parametrizations[0], _torch.WeightNormModule):
        remove_weight_norm(module, name)
    else:
        remove_spectral_norm(module, name)
    plain = _torch.own_parameters(module)[name]
    plain.data = weight
    plain.requires_grad_(trained)


def _unprune(inventory: Inventory) -> dict[str, str]:
    """Let torch make pruning permanent."""
    done: dict[str, str] = {}
    seen: set[int] = set()
    for path, module in inventory.modules.items():
        if id(module) not in seen:
            seen.add(id(module))
            for name in _torch.pruned_names(module):
                prune.remove(module, name)  # type: ignore[no-untyped-call]
                done[join(path, name)] = "pruning, a hook"
    return done
