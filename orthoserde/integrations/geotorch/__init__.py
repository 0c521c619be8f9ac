"""geotorch: its constraints by name, with their configuration.

Nothing here imports it. Its classes are known where the process has it already, whatever the model or the file.

Source: geotorch 0.4.0; Lezcano-Casado 2019, arXiv:1909.09501.
"""

from __future__ import annotations

import inspect
import sys

from torch import nn

from orthoserde.integrations.geotorch.codec import GeotorchCodec
from orthoserde.integrations.geotorch.constraints import SORTS
from orthoserde.registry import Registry


def extend(registry: Registry) -> Registry:
    """A registry that also knows geotorch's constraints; the same one where geotorch has not been imported.

    What the registry has registered itself, classes of geotorch or kinds of its names, stays as it is.
    """
    module = sys.modules.get("geotorch")
    classes = {name: getattr(module, name, None) for name in SORTS}
    codecs = [
        GeotorchCodec(cls, name)
        for name, cls in classes.items()
        if inspect.isclass(cls) and issubclass(cls, nn.Module) and f"geotorch>{name}" not in registry
    ]
    return registry.extended(codecs) if codecs else registry


__all__ = ["GeotorchCodec", "extend"]
