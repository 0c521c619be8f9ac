"""``torch.nn.utils.parametrizations.orthogonal``."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import cast

import torch
from torch import Tensor, nn

from orthoserde import _torch
from orthoserde.errors import ConfigError
from orthoserde.json_values import JSON
from orthoserde.registry import own_tensors


class OrthogonalCodec:
    """Codec of torch's orthogonal parametrization: ``weight = base @ map(original)``.

    Shapes: ``weight`` and ``original`` are ``(..., n, k)``; ``base``, present with trivialization, is ``(..., m, m)``
    with ``m = max(n, k)``. dtypes: as torch, float32, float64, complex64 and complex128 (not householder).

    Source: torch/nn/utils/parametrizations.py, ``_Orthogonal`` (torch 2.13); Lezcano-Casado and Martinez-Rubio 2019,
    arXiv:1901.08428 (exponential map), Lezcano-Casado 2019, arXiv:1909.09501 (trivializations).
    """

    type = _torch.OrthogonalModule
    kind = "torch>orthogonal"
    version = 1

    def config(self, parametrization: nn.Module) -> dict[str, JSON]:
        """``orthogonal_map`` by name, ``shape`` of the weight, and ``use_trivialization``."""
        return {
            "orthogonal_map": str(cast("Enum", parametrization.orthogonal_map).name),
            "shape": [int(size) for size in cast("torch.Size", parametrization.shape)],
            "use_trivialization": hasattr(parametrization, "base"),
        }

    def build(self, config: Mapping[str, JSON], like: Tensor | None) -> nn.Module:
        """Make the parametrization with ``base`` still None: no QR factorisation, no random numbers.

        Raises:
            ConfigError: The map is none of torch's, or does not go with the tensor.
        """
        orthogonal_map = _torch.ORTHOGONAL_MAPS.get(str(config.get("orthogonal_map")))
        trivialized = config.get("use_trivialization")
        if orthogonal_map is None or not isinstance(trivialized, bool) or like is None:
            raise ConfigError(f"{self.kind}: not a configuration of this torch: {dict(config)}")
        if config.get("shape") != list(like.shape):
            raise ConfigError(
                f"{self.kind}: configured for shape {config.get('shape')}, the tensor has {list(like.shape)}"
            )
        try:
            return self.type(like.detach().to("meta"), orthogonal_map, use_trivialization=trivialized)
        except ValueError as error:
            raise ConfigError(f"{self.kind}: {error}") from error

    def tensors(self, parametrization: nn.Module) -> dict[str, Tensor]:
        """``base`` where there is one."""
        return own_tensors(parametrization)

    def compute(self, config: Mapping[str, JSON], tensors: Mapping[str, Tensor]) -> Tensor:
        """``base @ map(original)``, with the operations of torch's own forward."""
        original = tensors["original"]
        built = self.build(config, original)
        if "base" in tensors:
            _torch.set_buffer(built, "base", tensors["base"])
        with torch.no_grad():
            weight: Tensor = built(original)
        return weight

    def shape(self, originals: Mapping[str, torch.Size]) -> torch.Size | None:
        """That of ``original``."""
        return originals["original"]

    def residual(self, weight: Tensor) -> float | None:
        """``max |Q^H Q - I|`` in double precision, Q the weight with its longer side first; 0 for an empty one."""
        weight = weight.detach()
        if weight.size(-2) < weight.size(-1):
            weight = weight.mT
        wide = weight.to(torch.complex128 if weight.is_complex() else torch.float64)
        error = wide.mH @ wide - torch.eye(wide.size(-1), dtype=wide.dtype, device=wide.device)
        return float(error.abs().max()) if error.numel() else 0.0

    def upgrade(self, config: dict[str, JSON], from_version: int) -> dict[str, JSON]:
        """There is one version."""
        raise ConfigError(f"{self.kind}: no version {from_version} is known")
