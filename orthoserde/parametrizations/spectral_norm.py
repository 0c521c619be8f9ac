"""``torch.nn.utils.parametrizations.spectral_norm``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from orthoserde import _torch
from orthoserde.errors import ConfigError
from orthoserde.json_values import JSON
from orthoserde.registry import own_tensors


class SpectralNormCodec:
    """Codec of torch's spectral normalisation: ``weight = original / sigma``, sigma estimated by the power method.

    Shapes: ``original`` is that of the weight; ``_u`` and ``_v`` are vectors as long as the rows and columns of the
    weight with ``dim`` moved to the front and the rest flattened. A one-dimensional weight has neither. dtypes: any
    floating or complex, preserved. In training mode every evaluation moves ``_u`` and ``_v``: saving makes none.

    Source: torch/nn/utils/parametrizations.py, ``_SpectralNorm`` (torch 2.13); Miyato et al. 2018, arXiv:1802.05957.
    """

    type = _torch.SpectralNormModule
    kind = "torch>spectral_norm"
    version = 1

    def config(self, parametrization: nn.Module) -> dict[str, JSON]:
        """``dim``, ``eps``, and ``n_power_iterations`` (None for a one-dimensional weight: torch needs none)."""
        iterations = getattr(parametrization, "n_power_iterations", None)
        return {
            "dim": int(cast("int", parametrization.dim)),
            "eps": float(cast("float", parametrization.eps)),
            "n_power_iterations": None if iterations is None else int(iterations),
        }

    def build(self, config: Mapping[str, JSON], like: Tensor | None) -> nn.Module:
        """Make the parametrization with ``_u`` and ``_v`` on the meta device: no power iteration, no random numbers.

        Raises:
            ConfigError: The settings are not torch's, or do not go with the tensor.
        """
        dim, eps, iterations = config.get("dim"), config.get("eps"), config.get("n_power_iterations")
        exact = like is not None and like.ndim == 1
        if (
            like is None
            or type(dim) is not int
            or not isinstance(eps, (int, float))
            or isinstance(eps, bool)
            or (iterations is not None if exact else type(iterations) is not int)
        ):
            raise ConfigError(f"{self.kind}: not a configuration of this torch: {dict(config)}")
        try:
            built = self.type(like.detach().to("meta"), 1 if exact else iterations, dim, float(eps))
        except (IndexError, ValueError) as error:
            raise ConfigError(f"{self.kind}: {error}") from error
        return built

    def tensors(self, parametrization: nn.Module) -> dict[str, Tensor]:
        """``_u`` and ``_v``, unless the weight is one-dimensional."""
        return own_tensors(parametrization)

    def compute(self, config: Mapping[str, JSON], tensors: Mapping[str, Tensor]) -> Tensor:
        """The weight as it is in evaluation mode: without a power iteration."""
        original = tensors["original"]
        built = self.build(config, original).eval()
        for role in ("_u", "_v"):
            if role in tensors:
                _torch.set_buffer(built, role, tensors[role])
        with torch.no_grad():
            weight: Tensor = built(original)
        return weight

    def shape(self, originals: Mapping[str, torch.Size]) -> torch.Size | None:
        """That of ``original``."""
        return originals["original"]

    def residual(self, weight: Tensor) -> float | None:
        """The norm is an estimate that training refines: there is no distance to hold it to."""
        return None

    def upgrade(self, config: dict[str, JSON], from_version: int) -> dict[str, JSON]:
        """There is one version."""
        raise ConfigError(f"{self.kind}: no version {from_version} is known")
