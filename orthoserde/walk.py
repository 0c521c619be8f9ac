"""What a module holds: every tensor slot, every parametrized tensor, and what is shared.

The walk looks at what is registered on each module. It evaluates no parametrization and asks no overridable method
(``state_dict``, ``named_parameters``, ``named_modules``), so it sees what is there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from orthoserde import _torch
from orthoserde.errors import Problem, UnsupportedModuleError
from orthoserde.manifest import join
from orthoserde.parametrizations.hooks import hooked_weights
from orthoserde.tensor_bytes import DTYPES, dtype_name


@dataclass(frozen=True, slots=True)
class ParametrizedTensor:
    """One tensor of a module on which parametrizations are registered.

    Attributes:
        module_path: Dotted path of the module, wrappers left out; ``""`` for the root.
        tensor_name: Name of the tensor, such as ``"weight"``.
        module: The module.
        parametrizations: The parametrizations, in the order in which they are applied.
        originals: The unconstrained tensors by name: ``original``, or ``original0``, ``original1``, ...
        parameter: Whether it is an ``nn.Parameter`` that is parametrized (else a buffer).
        unsafe: Whether it was registered with ``unsafe=True``.
        aliases: Other paths under which the same module object stands in the model.
        hook_names: Where an older hook of torch computes the tensor instead of parametrizations: names in the module of
            its tensors, by ``original...`` and ``0.role``.

    Example:
        >>> import torch, orthoserde
        >>> model = torch.nn.Sequential(orthoserde.orthogonal(torch.nn.Linear(8, 4)))
        >>> (record,) = orthoserde.parametrized_tensors(model)
        >>> record.name, record.key("0.base")
        ('0.weight', '0.parametrizations.weight.0.base')
    """

    module_path: str
    tensor_name: str
    module: nn.Module
    parametrizations: tuple[nn.Module, ...]
    originals: Mapping[str, Tensor]
    parameter: bool
    unsafe: bool
    aliases: tuple[str, ...] = ()
    hook_names: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Dotted name of the tensor, such as ``"layers.0.weight"``."""
        return join(self.module_path, self.tensor_name)

    @property
    def prefix(self) -> str:
        """What the keys of its originals and parametrizations begin with."""
        return join(self.module_path, "parametrizations", self.tensor_name)

    def key(self, part: str) -> str:
        """Key of one of its tensors, ``original...`` or ``0.role``, under the first path of its module."""
        return join(self.module_path, self.hook_names[part]) if self.hook_names else join(self.prefix, part)

    def __repr__(self) -> str:
        classes = ", ".join(type(parametrization).__name__ for parametrization in self.parametrizations)
        return f"<ParametrizedTensor {self.name!r}: {classes}>"


@dataclass(frozen=True, slots=True)
class Slot:
    """One place of a module where a parameter or persistent buffer is registered.

    Attributes:
        key: Its key in torch's ``state_dict``.
        module: The module that holds it.
        name: Its name there.
        tensor: The tensor; None for a buffer that is registered as None.
        parameter: Whether it is registered as a parameter.
    """

    key: str
    module: nn.Module
    name: str
    tensor: Tensor | None
    parameter: bool


@dataclass(frozen=True)
class Inventory:
    """All that a model holds.

    Attributes:
        modules: Every module by path; a shared one stands under each of its paths.
        slots: Every tensor slot by key; a shared one stands under each of its keys.
        parametrized: Every parametrized tensor, once.
        hooked: Every tensor that an older hook of torch computes, once, as if it were parametrized.
        transient: Non-persistent buffers by key; they are in no checkpoint.
        problems: What cannot be saved or restored without losing something.
    """

    modules: Mapping[str, nn.Module]
    slots: Mapping[str, Slot]
    parametrized: tuple[ParametrizedTensor, ...]
    hooked: tuple[ParametrizedTensor, ...]
    transient: Mapping[str, Tensor]
    problems: tuple[Problem, ...]


def parametrized_tensors(model: nn.Module) -> Iterator[ParametrizedTensor]:
    """Yield a record of every parametrized tensor in a model, without evaluating any.

    ``torch.compile``, DDP, DataParallel and activation checkpointing are looked through and leave no prefix. A module
    that stands in several places is yielded once, with its other paths as ``aliases``.

    Args:
        model: Any module.

    Yields:
        Frozen records, in the order of registration.

    Example:
        >>> from torch import nn
        >>> from torch.nn.utils.parametrizations import orthogonal
        >>> model = nn.Sequential(nn.Linear(4, 4), orthogonal(nn.Linear(4, 4)))
        >>> [record.name for record in parametrized_tensors(model)]
        ['1.weight']
    """
    yield from take_inventory(model).parametrized


def take_inventory(model: nn.Module, prefix: str = "") -> Inventory:
    """Walk a model.

    Args:
        model: Any module.
        prefix: Path under which the model itself stands, for a part that is about to be attached there.

    Raises:
        TypeError: Not a module.
        UnsupportedModuleError: The module graph has a cycle, or holds TorchScript, or two tensors would have one key.
    """
    check_model(model)
    modules: dict[str, nn.Module] = {}
    slots: dict[str, Slot] = {}
    transient: dict[str, Tensor] = {}
    paths: dict[int, list[str]] = {}
    for path, module in _walk(model, prefix):
        modules[path] = module
        paths.setdefault(id(module), []).append(path)
        transient |= {join(path, name): buffer for name, buffer in _torch.own_transient_buffers(module).items()}
        for slot in _slots_of(module, path):
            if slot.key in slots:
                raise UnsupportedModuleError(f"two tensors of the model have the key {slot.key!r}; rename one")
            slots[slot.key] = slot
    first = {path: modules[path] for path in (found[0] for found in paths.values())}
    parametrized = tuple(
        record for path, module in first.items() for record in _records_of(module, path, tuple(paths[id(module)][1:]))
    )
    hooked = tuple(
        record for path, module in first.items() for record in _hooked_of(module, path, tuple(paths[id(module)][1:]))
    )
    problems = [problem for path, module in first.items() for problem in _module_problems(path, module)]
    problems += [problem for slot in slots.values() for problem in _tensor_problems(slot)]
    return Inventory(modules, slots, parametrized, hooked, transient, tuple(problems))


def computed_originals(tensor: ParametrizedTensor) -> tuple[str, ...]:
    """Names of its originals that are no registered tensors, being parametrized or pruned themselves."""
    parametrized = _torch.parametrization_lists(tensor.module).get(tensor.tensor_name)
    names = () if parametrized is None else _torch.original_names(parametrized)
    return tuple(name for name in names if name not in tensor.originals)


def _walk(model: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """Every path and module, parents first, shared modules once for each path."""
    # Iterative: a deep model must not end in RecursionError, nor a cyclic one in a hang. None ends a module.
    pending: list[tuple[str, nn.Module] | None] = [(prefix, model)]
    ancestors: list[int] = []
    while pending:
        entry = pending.pop()
        if entry is None:
            ancestors.pop()
            continue
        path, module = entry[0], _torch.unwrap(entry[1])
        if isinstance(module, torch.jit.ScriptModule):
            text = "TorchScript holds its tensors; use the module that it was made from"
            raise UnsupportedModuleError("the model cannot be looked into:", [Problem(path, "unsupported", text)])
        children = _torch.child_modules(module)
        if children and id(module) in ancestors:
            raise UnsupportedModuleError(f"the module {path!r} contains itself")
        yield path, module
        if children:
            ancestors.append(id(module))
            pending.append(None)
            pending.extend(reversed([(join(path, name), child) for name, child in children.items()]))


def check_model(model: object) -> None:
    """Refuse what is no module.

    Raises:
        TypeError: It is none.
    """
    if not isinstance(model, nn.Module):
        hint = "; give the model itself, not its state dict" if isinstance(model, Mapping) else ""
        hint = "; the model comes first, then the path" if isinstance(model, (str, bytes, os.PathLike)) else hint
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}{hint}")


def module_types(model: nn.Module) -> set[type[nn.Module]]:
    """The classes of all modules in a model, without what torch makes of them when it parametrizes them."""
    check_model(model)
    found: set[type[nn.Module]] = set()
    seen: set[int] = set()
    pending = [model]
    while pending:
        module = _torch.unwrap(pending.pop())
        if id(module) not in seen:
            seen.add(id(module))
            found.add(_torch.class_before_parametrizations(module))
            pending.extend(_torch.child_modules(module).values())
    return found


def _slots_of(module: nn.Module, path: str) -> Iterator[Slot]:
    for name, parameter in _torch.own_parameters(module).items():
        yield Slot(join(path, name), module, name, parameter, True)
    for name, buffer in _torch.own_buffers(module).items():
        yield Slot(join(path, name), module, name, buffer, False)


def _records_of(module: nn.Module, path: str, aliases: tuple[str, ...]) -> Iterator[ParametrizedTensor]:
    for tensor_name, parametrized in _torch.parametrization_lists(module).items():
        registered = _torch.own_parameters(parametrized)
        slots = {**_torch.own_buffers(parametrized), **registered}
        names = _torch.original_names(parametrized)
        originals = {name: tensor for name in names if (tensor := slots.get(name)) is not None}
        yield ParametrizedTensor(
            module_path=path,
            tensor_name=tensor_name,
            module=module,
            parametrizations=tuple(_torch.child_modules(parametrized).values()),
            originals=originals,
            parameter=all(name in registered for name in names),
            unsafe=bool(parametrized.unsafe),
            aliases=aliases,
        )


def _hooked_of(module: nn.Module, path: str, aliases: tuple[str, ...]) -> Iterator[ParametrizedTensor]:
    for weight in hooked_weights(module):
        yield ParametrizedTensor(
            module_path=path,
            tensor_name=weight.tensor_name,
            module=module,
            parametrizations=(weight.parametrization,),
            originals=weight.originals,
            parameter=True,
            unsafe=weight.unsafe,
            aliases=aliases,
            hook_names=weight.names,
        )


def _module_problems(path: str, module: nn.Module) -> Iterator[Problem]:
    name = type(module).__qualname__
    if _torch.is_fsdp1(module):
        yield Problem(path, "unsupported", "FullyShardedDataParallel holds shards, not tensors; gather the model first")
        return
    if _torch.has_extra_state(module):
        yield Problem(
            path,
            "unsupported",
            f"{name} keeps extra state (get_extra_state), which a tensor file cannot hold; keep it in buffers",
        )
    for tensor_name, parametrized in _torch.parametrization_lists(module).items():
        held = {**_torch.own_parameters(parametrized), **_torch.own_buffers(parametrized)}
        for original in _torch.original_names(parametrized):
            if held.get(original) is None:
                where = join(path, "parametrizations", tensor_name, original)
                text = "this original is no registered tensor, being parametrized or pruned itself; remove that first"
                yield Problem(where, "unsupported", text)
    if _torch.saves_itself(module):
        own = {slot.name: slot.tensor for slot in _slots_of(module, path) if slot.tensor is not None}
        saved = _torch.saved_by_itself(module)
        if saved.keys() != own.keys() or any(saved[key] is not own[key] for key in own):
            extra = ", ".join(sorted(str(key) for key in saved.keys() ^ own.keys())[:8]) or "other values"
            yield Problem(path, "unsupported", f"{name} saves state of its own making ({extra}) beside its tensors")


def _tensor_problems(slot: Slot) -> Iterator[Problem]:
    tensor = slot.tensor
    if tensor is None:
        return
    if is_lazy(tensor):
        yield Problem(slot.key, "unsupported", "not initialised yet; run the lazy module once before")
    elif _torch.overrides_dispatch(tensor):
        yield Problem(
            slot.key, "unsupported", f"a {type(tensor).__qualname__} is not an ordinary tensor; gather it first"
        )
    elif tensor.layout is not torch.strided or tensor.is_quantized:
        yield Problem(
            slot.key, "unsupported", f"layout {tensor.layout}, dtype {tensor.dtype}: only dense tensors are stored"
        )
    elif dtype_name(tensor.dtype) not in DTYPES:
        yield Problem(slot.key, "unsupported", f"dtype {tensor.dtype} cannot be stored")


def identity(tensor: Tensor) -> tuple[object, ...]:
    """Equal for two tensors exactly if they are the same elements in memory, in the same order and dtype."""
    if _torch.overrides_dispatch(tensor) or tensor.layout is not torch.strided or tensor.device.type == "meta":
        return (id(tensor),)
    if tensor.numel() == 0 or tensor.data_ptr() == 0:
        return (id(tensor),)
    signs = (tensor.is_conj(), tensor.is_neg())
    return (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), signs)
