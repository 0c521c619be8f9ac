"""Which tensors of a model a file is to hold.

Note [Frozen]
A parameter that requires no gradient is frozen. A buffer is not: running statistics, observers and averages move when a
module runs in training mode, whether or not a gradient is asked for, and nothing says of a buffer that it never moves.
The one exception is the base of an orthogonal parametrization, or its columns, which belongs to its original.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from orthoserde import _torch
from orthoserde.errors import ConfigError, Problem
from orthoserde.keys import hook_prefixes, prefixes_in, prefixes_of
from orthoserde.manifest import join
from orthoserde.parametrizations.structured import Orthogonal
from orthoserde.registry import Registry
from orthoserde.walk import Inventory, Slot, identity

#: What ``save`` takes as ``select``.
Select = Literal["all", "trainable"] | Callable[[str, Tensor], bool] | None


@dataclass(frozen=True)
class Scope:
    """What a selection makes of a model.

    Attributes:
        tensors: The selected tensors by key.
        left_out: Keys of the others, in the order of the walk.
        problems: What keeps the selected ones from being saved.
    """

    tensors: Mapping[str, Tensor]
    left_out: tuple[str, ...]
    problems: tuple[Problem, ...]


def scope_of(inventory: Inventory, registry: Registry, select: Select) -> Scope:
    """Select tensors of a model.

    A parametrized tensor is selected whole if any of its parts is, and a tied one under all of its names.

    Args:
        inventory: What the model holds.
        registry: Which classes are adapters.
        select: As for ``orthoserde.save``.

    Raises:
        ConfigError: ``select`` is none of these, or it selects no tensor of a model that has some.
    """
    tensors = {key: slot.tensor for key, slot in inventory.slots.items() if slot.tensor is not None}
    given: object = select  # whatever it is: an array would answer a comparison with an array
    asked = callable(given) and not isinstance(given, nn.Module)
    if not (given is None or asked or (isinstance(given, str) and given in ("all", "trainable"))):
        raise ConfigError(f"select: expected None, 'all', 'trainable' or a callable, got {select!r}")
    adapters = adapter_paths(inventory, registry)
    if select == "all" or (select is None and not adapters):
        return Scope(tensors, (), inventory.problems)
    if callable(select):
        wanted = {key for key, tensor in tensors.items() if select(key, tensor)}
    else:
        wanted = {key for key in tensors if not is_frozen(inventory.slots[key])}
        if select is None:
            wanted |= {key for key in tensors if is_below(key, adapters)}
    if tensors and not wanted:
        raise ConfigError(f"select: none of the {len(tensors)} tensors of the model is selected, so nothing was saved")
    wanted |= _bound_to(wanted, tensors, inventory)
    skipped = _skipped_modules(inventory, wanted, adapters if select is None else frozenset())
    left_out = [key for key in tensors if key not in wanted]
    left_out += [key for keys in skipped.values() for key in keys if key not in tensors]
    elsewhere = {*left_out, *skipped}
    problems = [problem for problem in inventory.problems if problem.where not in elsewhere]
    return Scope({key: tensors[key] for key in tensors if key in wanted}, tuple(left_out), tuple(problems))


def adapter_paths(inventory: Inventory, registry: Registry) -> frozenset[str]:
    """Paths of the modules whose classes are adapters."""
    return frozenset(
        path
        for path, module in inventory.modules.items()
        if registry.is_adapter(_torch.class_before_parametrizations(module))
    )


def is_frozen(slot: Slot) -> bool:
    """Whether training leaves a tensor as it is; see Note [Frozen]."""
    if slot.parameter:
        return slot.tensor is None or not slot.tensor.requires_grad
    return isinstance(slot.module, (_torch.OrthogonalModule, Orthogonal))


def is_below(key: str, paths: Iterable[str]) -> bool:
    """Whether a key, or the path of a module, is one of these paths or below it."""
    parts = key.split(".")
    known = paths if isinstance(paths, frozenset) else frozenset(paths)
    return "" in known or any(".".join(parts[:i]) in known for i in range(1, len(parts) + 1))


def _is_trainable(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in _torch.own_parameters(module).values())


def _bound_to(wanted: Iterable[str], tensors: Mapping[str, Tensor], inventory: Inventory) -> set[str]:
    """Keys of what goes with the wanted tensors: the other parts of parametrized ones, other names of tied ones."""
    whole = {prefix for tensor in inventory.parametrized for prefix in prefixes_of(tensor)}
    hooked = hook_prefixes(inventory.hooked)
    groups: dict[object, list[str]] = {}
    groups_of: dict[str, list[object]] = {}
    for key, tensor in tensors.items():
        outermost = next((prefix for prefix in prefixes_in(key) if prefix in whole), None) or hooked.get(key)
        groups_of[key] = [identity(tensor)] if outermost is None else [identity(tensor), outermost]
        for group in groups_of[key]:
            groups.setdefault(group, []).append(key)
    found: set[str] = set()
    pending = list(wanted)
    while pending:
        key = pending.pop()
        if key not in found:
            found.add(key)
            pending += [other for group in groups_of[key] for other in groups.pop(group, ())]
    return found


def _skipped_modules(inventory: Inventory, wanted: set[str], adapters: Iterable[str]) -> dict[str, list[str]]:
    """Modules with state of their own making (quantized ones) of which no tensor is wanted, and the keys of that state.

    A base model that is frozen may well be quantized: what an adapter's file leaves out need not be storable.
    """
    kept = {id(inventory.slots[key].module) for key in wanted}
    found: dict[str, list[str]] = {}
    for problem in inventory.problems:
        path, module = problem.where, inventory.modules.get(problem.where)
        if module is None or id(module) in kept or _is_trainable(module) or is_below(path, adapters):
            continue
        keys = [join(path, key) for key in _torch.state_of_its_own(module)]
        if keys:
            found[path] = keys
    return found
