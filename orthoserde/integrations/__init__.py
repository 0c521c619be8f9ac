"""Neighbours of this library, a file or folder each; none is imported before a model or a file asks for it."""

from __future__ import annotations

import sys

from orthoserde.registry import Registry, default_registry


def in_process(registry: Registry | None) -> Registry:
    """The registry, the default one for None, extended by libraries whose classes are known where they are imported.

    Raises:
        TypeError: It is no registry.
    """
    given: object = registry
    if given is not None and not isinstance(given, Registry):
        raise TypeError(f"registry: expected an orthoserde.Registry, got {type(given).__name__}")
    registry = default_registry if registry is None else registry
    if "geotorch" not in sys.modules:
        return registry
    from orthoserde.integrations import geotorch  # noqa: PLC0415

    return geotorch.extend(registry)
