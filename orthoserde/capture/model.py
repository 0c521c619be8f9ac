"""nn.Module -> Checkpoint: a live view, from which nothing is copied and by which nothing is disturbed."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from orthoserde import _torch, json_values, modes
from orthoserde._version import __version__
from orthoserde.capture.scope import Select, scope_of
from orthoserde.checkpoint import Checkpoint, DerivedTensor, LiveTensor, TensorSource
from orthoserde.errors import ConfigError, Problem, UnsupportedModuleError
from orthoserde.json_values import JSON
from orthoserde.keys import original_keys
from orthoserde.manifest import (
    DENSE,
    HOOK,
    OPAQUE,
    Manifest,
    ModuleRecord,
    ParametrizationRecord,
    ParametrizedRecord,
    TensorRecord,
    check_references,
    class_name,
)
from orthoserde.parametrizations import codec_for_type
from orthoserde.registry import Registry
from orthoserde.registry.codec import Codec, own_tensors
from orthoserde.storage import FORBIDDEN_TENSOR_KEYS
from orthoserde.tensor_bytes import dtype_name
from orthoserde.walk import Inventory, ParametrizedTensor, identity, take_inventory
from orthoserde.weights.live import codecs_of, computed, spoken_for
from orthoserde.wording import one_line


def capture(
    model: nn.Module,
    registry: Registry,
    *,
    include_weights: bool = False,
    select: Select = None,
    metadata: Mapping[str, str] | None = None,
    inventory: Inventory | None = None,
) -> Checkpoint:
    """Describe a model as a checkpoint that follows it until it is read.

    Args:
        model: Any module.
        registry: Names of the user's classes.
        include_weights: Whether to add the computed tensors.
        select: Which tensors to hold; see :func:`orthoserde.capture.scope.scope_of`.
        metadata: The user's own strings.
        inventory: What the model holds, from whoever has walked it already.

    Raises:
        UnsupportedModuleError: The model holds state that would be lost; every such place is listed.
        ConfigError: A registered class gives a configuration that is not JSON, or ``select`` selects nothing.
    """
    with modes.undisturbed():
        if inventory is None:
            inventory = take_inventory(model)
        scope = scope_of(inventory, registry, select)
        problems = [
            *scope.problems,
            *(problem for key, tensor in scope.tensors.items() for problem in _storage_problems(key, tensor)),
        ]
        if problems:
            raise UnsupportedModuleError(
                f"cannot save {type(_torch.unwrap(model)).__qualname__} without losing state", problems
            )
        tensors, aliases = _unique_tensors(scope.tensors)
        left_out = set(scope.left_out)
        parametrized = [
            tensor
            for tensor in (*inventory.parametrized, *inventory.hooked)
            if left_out.isdisjoint(original_keys(tensor))
        ]
        manifest = Manifest(
            tensors={key: _record(tensor, inventory.slots[key].parameter) for key, tensor in tensors.items()},
            aliases=aliases,
            parametrized=tuple(_parametrized_record(tensor, registry) for tensor in parametrized),
            modules=tuple(_module_records(inventory, registry)),
            left_out=scope.left_out,
            metadata=_checked_metadata(metadata or {}),
            writer={"orthoserde": __version__, "torch": str(torch.__version__)},
        )
        check_references(manifest, f"cannot save {type(_torch.unwrap(model)).__qualname__}")
        sources: dict[str, TensorSource] = {key: LiveTensor(tensors[key].detach()) for key in manifest.tensors}
        if include_weights:
            extra = {tensor.name: _computed(tensor, registry) for tensor in parametrized}
            records = {key: _record(weight, parameter=False) for key, (weight, _) in extra.items()}
            manifest = dataclasses.replace(manifest, tensors={**manifest.tensors, **records}, computed=tuple(extra))
            sources |= {key: source for key, (_, source) in extra.items()}
        return Checkpoint(manifest, sources, type(_torch.unwrap(model)).__qualname__)


def _compute(tensor: ParametrizedTensor, registry: Registry) -> Tensor:
    """The computed tensor.

    Raises:
        ConfigError: A class of the chain, or its configuration, is not known, or it raised.
    """
    try:
        weight = computed(tensor, registry)
    except Exception as error:  # whatever a registered class raises, or torch where it has no such operation
        raise ConfigError(
            f"{tensor.name}: include_weights: it cannot be computed: {one_line(error)}; save without include_weights"
        ) from error
    if weight is None:
        raise ConfigError(
            f"{tensor.name}: include_weights needs each parametrization registered, with a known configuration"
        )
    return weight


def _computed(tensor: ParametrizedTensor, registry: Registry) -> tuple[Tensor, TensorSource]:
    """A tensor that says what the computed one looks like, and the computed one."""
    source = DerivedTensor(functools.partial(_compute, tensor, registry))
    shape = weight_shape(tensor, registry)
    if shape is None:
        weight = source.compute()
        return weight, LiveTensor(weight)
    return torch.empty(shape, dtype=list(tensor.originals.values())[-1].dtype, device="meta"), source


def _unique_tensors(named: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by their first key, and the other keys of tensors that are the same memory seen the same way."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple[object, ...], str] = {}
    for key, tensor in named.items():
        kept = first.setdefault(identity(tensor), key)
        if kept == key:
            tensors[key] = tensor
        else:
            aliases[key] = kept
    return tensors, aliases


def _storage_problems(key: str, tensor: Tensor) -> list[Problem]:
    if tensor.device.type == "meta":
        return [Problem(key, "unsupported", "on the meta device, where it has no values; load or initialise it first")]
    if key in FORBIDDEN_TENSOR_KEYS:
        return [Problem(key, "unsupported", "this name has another meaning in safetensors files; rename the tensor")]
    try:
        key.encode("utf-8")
    except UnicodeEncodeError:
        return [Problem(repr(key), "unsupported", "the name is not valid Unicode; rename it")]
    return []


def _record(tensor: Tensor, parameter: bool) -> TensorRecord:
    return TensorRecord(
        dtype_name(tensor.dtype),
        tuple(tensor.shape),
        tuple(tensor.stride()),
        parameter,
        requires_grad=tensor.requires_grad,
    )


def _parametrized_record(tensor: ParametrizedTensor, registry: Registry) -> ParametrizedRecord:
    encoding = HOOK if tensor.hook_names else DENSE
    chain = tuple(link_record(parametrization, registry, encoding) for parametrization in tensor.parametrizations)
    shape = weight_shape(tensor, registry)
    dtype = None if shape is None and tensor.unsafe else dtype_name(list(tensor.originals.values())[-1].dtype)
    return ParametrizedRecord(
        module=tensor.module_path,
        tensor_name=tensor.tensor_name,
        aliases=tensor.aliases,
        shape=None if shape is None else tuple(shape),
        dtype=dtype,
        parameter=tensor.parameter,
        unsafe=tensor.unsafe,
        originals=dict.fromkeys(tensor.originals, encoding),
        chain=chain,
    )


def link_record(parametrization: nn.Module, registry: Registry, encoding: str = DENSE) -> ParametrizationRecord:
    """What the manifest says of one parametrization, whose tensors are stored in this encoding.

    Raises:
        ConfigError: Its codec gives a configuration that is not JSON, or overlooks some of its tensors.
    """
    parametrization = _torch.unwrap(parametrization)
    cls = _torch.class_before_parametrizations(parametrization)
    codec = codec_for_type(registry, cls)
    roles = own_tensors(parametrization)
    if codec is None:
        return ParametrizationRecord(OPAQUE, 1, None, class_name(cls), dict.fromkeys(roles, encoding))
    claimed = codec.tensors(parametrization)
    if claimed.keys() != roles.keys():
        raise ConfigError(
            f"{codec.kind}: its codec names the tensors {sorted(claimed)}, the module has {sorted(roles)}"
        )
    return ParametrizationRecord(
        codec.kind, codec.version, _checked_config(codec, parametrization), None, dict.fromkeys(roles, encoding)
    )


def weight_shape(tensor: ParametrizedTensor, registry: Registry) -> torch.Size | None:
    """Shape of the computed tensor; None where only running it would tell."""
    shapes: dict[str, torch.Size] = {name: original.shape for name, original in tensor.originals.items()}
    shape: torch.Size | None = None
    for codec in codecs_of(tensor, registry):
        shape = None if codec is None else codec.shape(shapes)
        if shape is None:
            return None
        shapes = {"original": shape}
    return shape


def _module_records(inventory: Inventory, registry: Registry) -> list[ModuleRecord]:
    records: list[ModuleRecord] = []
    links = spoken_for(inventory.parametrized, registry)
    for path, module in inventory.modules.items():
        codec = registry.for_type(_torch.class_before_parametrizations(module))
        if codec is not None and id(module) not in links:
            records.append(ModuleRecord(path, codec.kind, codec.version, _checked_config(codec, module)))
    return records


def _checked_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    given: object = metadata
    if not isinstance(given, Mapping):
        raise ConfigError(f"metadata: expected a mapping of strings to strings, got {type(given).__name__}")
    for key, value in given.items():
        if not isinstance(key, str) or not isinstance(value, str):
            got = f"{type(key).__name__} to {type(value).__name__}"
            raise ConfigError(f"metadata: expected strings, got {got} under {key!r:.200}; str(...) makes one")
    try:
        copied = json_values.to_json(dict(metadata))
    except ConfigError as error:
        raise ConfigError(f"metadata: expected strings: {error}") from error
    assert isinstance(copied, dict)
    return {key: str(value) for key, value in copied.items()}


def _checked_config(codec: Codec, module: nn.Module) -> dict[str, JSON] | None:
    try:
        config = json_values.to_json(codec.config(module))
    except ConfigError as error:
        raise ConfigError(f"{codec.kind}: its configuration is not JSON: {error}") from error
    if config is not None and not isinstance(config, dict):
        raise ConfigError(f"{codec.kind}: its configuration is not a dict")
    return config
