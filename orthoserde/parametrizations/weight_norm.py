"""``torch.nn.utils.parametrizations.weight_norm``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from orthoserde import _torch
from orthoserde.errors import ConfigError
from orthoserde.json_values import JSON
from orthoserde.manifest import WEIGHT_NORM
from orthoserde.registry.codec import OneVersion, Unconstrained


class WeightNormCodec(OneVersion, Unconstrained):
    """Codec of torch's weight normalisation: ``weight = original0 * original1 / norm(original1)``.

    Shapes: ``original1`` (the direction) is that of the weight, ``original0`` (the magnitude) has size 1 in every
    dimension but ``dim``; it is a scalar for ``dim=None``, which torch keeps as -1. dtypes: any floating, preserved.

    Source: torch/nn/utils/parametrizations.py, ``_WeightNorm`` (torch 2.13); Salimans and Kingma 2016,
        arXiv:1602.07868.
    """

    type = _torch.WeightNormModule
    kind = WEIGHT_NORM
    version = 1

    def config(self, parametrization: nn.Module) -> dict[str, JSON]:
        """``dim``."""
        return {"dim": int(cast("int", parametrization.dim))}

    def build(self, config: Mapping[str, JSON], like: Tensor | None) -> nn.Module:
        """Make the parametrization, which holds no tensors.

        Raises:
            ConfigError: ``dim`` is not an integer.
        """
        dim = config.get("dim")
        if type(dim) is not int or set(config) != {"dim"}:
            raise ConfigError(f"{self.kind}: not a configuration of this torch: {dict(config)}")
        return self.type(dim)

    def tensors(self, parametrization: nn.Module) -> dict[str, Tensor]:
        """None of its own."""
        return {}

    def compute(self, config: Mapping[str, JSON], tensors: Mapping[str, Tensor]) -> Tensor:
        """The weight, with torch's own forward."""
        with torch.no_grad():
            weight: Tensor = self.build(config, None)(tensors["original0"], tensors["original1"])
        return weight

    def shape(self, originals: Mapping[str, torch.Size]) -> torch.Size | None:
        """That of ``original1``, the direction; None where it does not come first, which torch cannot evaluate."""
        return originals.get("original1")

    def check(
        self, config: Mapping[str, JSON], originals: Mapping[str, Sequence[int]], roles: Mapping[str, Sequence[int]]
    ) -> str | None:
        """A magnitude and a direction: of size 1 in every dimension but ``dim``, or a scalar for -1.

        Torch counts other negative dimensions from the last.
        """
        dim = config.get("dim")
        if set(originals) != {"original0", "original1"} or roles or type(dim) is not int:
            return f"expected original0, original1 and an integer dim, got {sorted(originals)} and {dim}"
        direction = list(originals["original1"])
        if not (-len(direction) <= dim < len(direction) or dim == -1):
            return f"dim {dim} is not one of a tensor of the shape {direction}"
        kept = dim % len(direction) if direction else dim
        magnitude = [] if dim == -1 else [size if i == kept else 1 for i, size in enumerate(direction)]
        if list(originals["original0"]) != magnitude:
            return f"expected a magnitude of the shape {magnitude}, got {list(originals['original0'])}"
        return None

    def recovers(self, config: Mapping[str, JSON]) -> bool:
        """Always."""
        return True

    def from_weight(self, weight: Tensor, config: Mapping[str, JSON]) -> dict[str, Tensor]:
        """The weight as its own direction, with its norm: it comes back within ``4 eps`` of its largest entry.

        Source: ``_WeightNorm.right_inverse``, torch/nn/utils/parametrizations.py (torch 2.13).
        """
        with torch.no_grad():
            norm = torch.norm_except_dim(weight, 2, int(cast("int", config["dim"])))
            # A direction of norm 0 is none: any other does, because its magnitude is 0.
            direction = torch.where(norm == 0, torch.ones_like(weight), weight)
        return {"original0": norm, "original1": direction}
