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

    def admits(self, weight: Tensor, config: Mapping[str, JSON]) -> bool:
        """Whether the largest singular value is at least 1, as dividing by an estimate from below makes it."""
        return self._top(weight, config)[1] >= 1 - 100 * torch.finfo(torch.float32).eps

    def project(self, weight: Tensor, config: Mapping[str, JSON]) -> Tensor:
        """The weight divided by its largest singular value."""
        return weight / self._top(weight, config)[1]

    def recovers(self, config: Mapping[str, JSON]) -> bool:
        """Always."""
        return True

    def from_weight(self, weight: Tensor, config: Mapping[str, JSON]) -> dict[str, Tensor]:
        """The weight as its own ``original``, with unit vectors for which ``u^H W v = 1``.

        In evaluation mode the weight comes back within ``100 eps`` of itself. In training mode the power method then
        moves ``_u`` and ``_v`` to the leading singular vectors, as it would have.

        Raises:
            ConfigError: The largest singular value is below 1, so no such vectors exist.
        """
        if weight.ndim == 1:
            return {"original": weight}
        left, sigma, right = self._top(weight, config)
        if not self.admits(weight, config):
            raise ConfigError(f"{self.kind}: the weight's largest singular value is {sigma:.6g}, not 1 or above")
        # W v = sigma left: turning u away from `left` by the angle whose cosine is 1 / sigma gives u^H W v = 1.
        cosine = min(1.0, 1.0 / sigma)
        away = torch.zeros_like(left)
        away[int(left.abs().argmin())] = 1.0
        away = away - torch.vdot(left, away) * left
        length = float(torch.linalg.vector_norm(away))
        if length > 0:
            left = cosine * left + (max(0.0, 1.0 - cosine * cosine) ** 0.5 / length) * away
        return {"original": weight, "_u": left.to(weight.dtype), "_v": right.to(weight.dtype)}

    def _top(self, weight: Tensor, config: Mapping[str, JSON]) -> tuple[Tensor, float, Tensor]:
        """Leading singular vectors and value of the weight as torch reshapes it, in double precision."""
        wide = weight.detach().to(torch.complex128 if weight.is_complex() else torch.float64)
        if wide.ndim == 1:
            return wide, float(torch.linalg.vector_norm(wide)), wide
        matrix = wide.movedim(int(cast("int", config["dim"])), 0).flatten(1)
        left, sigma, right = torch.linalg.svd(matrix, full_matrices=False)
        return left[:, 0], float(sigma[0]), right[0].conj()

    def upgrade(self, config: dict[str, JSON], from_version: int) -> dict[str, JSON]:
        """There is one version."""
        raise ConfigError(f"{self.kind}: no version {from_version} is known")
