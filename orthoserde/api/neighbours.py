"""What this library knows of classes of its own and of other libraries, added to the user's registry for one call."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from orthoserde.registry import Registry, default_registry
from orthoserde.walk import module_types


def with_neighbours(registry: Registry, model: nn.Module) -> Registry:
    """The registry, extended by what this library knows of classes of its own and of other libraries in a model.

    Which they are stands here; each integration is imported when a model first holds a class that it speaks for.
    """
    types = module_types(model)
    packages = {base.__module__.partition(".")[0] for cls in types for base in cls.__mro__}
    if "pyvene" in packages:
        from orthoserde.integrations import pyreft  # noqa: PLC0415

        registry = pyreft.extend(registry, types)
    return with_own(registry, types) if "orthoserde" in packages else registry


def with_own(registry: Registry, types: Iterable[type[nn.Module]]) -> Registry:
    """The registry, extended by this library's own classes among these."""
    if registry is default_registry:
        return registry
    own = [
        codec
        for cls in types
        if cls.__module__.startswith("orthoserde.") and (codec := default_registry.for_type(cls)) is not None
    ]
    return registry.extended(own, [codec.type for codec in own if default_registry.is_adapter(codec.type)])
