"""``torch.nn.utils.parametrizations.spectral_norm``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from orthoserde import _torch
from orthoserde.errors import ConfigError
from orthoserde.json_values import JSON
from orthoserde.manifest import SPECTRAL_NORM
from orthoserde.registry.codec import OneVersion, own_tensors

#: More power iterations than anybody wants; a file that asks for more would only make training hang.
MOST_ITERATIONS = 1_000_000

#: How far from 1 rounding may take the largest singular value of a float32 weight: 100 eps.
SIGMA_ROUNDING = 100 * torch.finfo(torch.float32).eps


class SpectralNormCodec(OneVersion):
    """Codec of torch's spectral normalisation: ``weight = original / sigma``, sigma estimated by the power method.

    Shapes: ``original`` is that of the weight; ``_u`` and ``_v`` are vectors as long as the rows and columns of the
    weight with ``dim`` moved to the front and the rest flattened. A one-dimensional weight has neither. dtypes: any
    floating or complex, preserved. In training mode every evaluation moves ``_u`` and ``_v``: saving makes none.

    Source: torch/nn/utils/parametrizations.py, ``_SpectralNorm`` (torch 2.13); Miyato et al. 2018, arXiv:1802.05957.
    """

    type = _torch.SpectralNormModule
    kind = SPECTRAL_NORM
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
        if not 0 <= dim < like.ndim or (type(iterations) is int and iterations < 1):
            raise ConfigError(
                f"{self.kind}: {dict(config)} is out of range for a tensor of the shape {list(like.shape)}"
            )
        # torch's constructor runs 15 power iterations on anything that is not a vector, so it is given one.
        built = self.type(torch.empty(1, dtype=like.dtype, device="meta"), 1, 0, float(eps))
        vars(built)["dim"] = dim
        if not exact:
            vars(built)["n_power_iterations"] = iterations
            rest = math.prod(size for i, size in enumerate(like.shape) if i != dim)
            built.register_buffer("_u", torch.empty(like.shape[dim], dtype=like.dtype, device="meta"))
            built.register_buffer("_v", torch.empty(rest, dtype=like.dtype, device="meta"))
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

    def check(
        self, config: Mapping[str, JSON], originals: Mapping[str, Sequence[int]], roles: Mapping[str, Sequence[int]]
    ) -> str | None:
        """One original, and vectors as long as its ``dim`` and the rest of it."""
        shape, dim, eps = list(originals.get("original", ())), config.get("dim"), config.get("eps")
        iterations = config.get("n_power_iterations")
        if set(originals) != {"original"} or set(config) != {"dim", "eps", "n_power_iterations"}:
            return f"expected one original, dim, eps and n_power_iterations, got {sorted(originals)}, {sorted(config)}"
        if type(dim) is not int or not 0 <= dim < len(shape):
            return f"dim {dim} is not one of a tensor of the shape {shape}"
        if isinstance(eps, bool) or not isinstance(eps, (int, float)) or eps < 0:
            return f"expected an eps from 0, got {eps}"
        if len(shape) == 1:
            return None if not roles and iterations is None else "a vector has no power method"
        if type(iterations) is not int or not 0 < iterations <= MOST_ITERATIONS:
            return f"expected from 1 to {MOST_ITERATIONS} power iterations, got {iterations}"
        lengths = {"_u": [shape[dim]], "_v": [math.prod(shape[:dim] + shape[dim + 1 :])]}
        if {role: list(size) for role, size in roles.items()} != lengths:
            return f"expected vectors of the shapes {lengths}, got {dict(roles)}"
        return None

    def residual(self, weight: Tensor) -> float | None:
        """The norm is an estimate that training refines: there is no distance to hold it to."""
        return None

    def admits(self, weight: Tensor, config: Mapping[str, JSON]) -> bool:
        """Whether the largest singular value is at least 1, as dividing by an estimate from below makes it, but not 2.

        Estimates that training keeps are within a few percent; a weight of 2 and more was never normalised.
        """
        return 1 - SIGMA_ROUNDING <= self._top(weight, config)[1] < 2

    def project(self, weight: Tensor, config: Mapping[str, JSON]) -> Tensor:
        """The weight divided by its largest singular value, in double precision; a zero weight has no projection.

        Raises:
            ConfigError: The weight is zero.
        """
        sigma = self._top(weight, config)[1]
        if sigma == 0:
            raise ConfigError(f"{self.kind}: a zero weight cannot be normalised")
        return (weight.to(torch.complex128 if weight.is_complex() else torch.float64) / sigma).to(weight.dtype)

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
        if sigma < 1 - SIGMA_ROUNDING:
            raise ConfigError(
                f"{self.kind}: the weight's largest singular value is {sigma:.6g}, below 1; legacy='project' makes it 1"
            )
        # W v = sigma u for the leading vectors: turning one of them away by the angle whose cosine is 1 / sigma gives
        # u^H W v = 1. A vector of one entry cannot be turned.
        cosine = min(1.0, 1.0 / sigma)
        if len(left) > 1:
            left = _turned(left, cosine)
        elif len(right) > 1:
            right = _turned(right, cosine)
        elif sigma > 1 + SIGMA_ROUNDING:
            raise ConfigError(f"{self.kind}: a single number of magnitude {sigma:.6g} is not normalised")
        return {"original": weight, "_u": left.to(weight.dtype), "_v": right.to(weight.dtype)}

    def _top(self, weight: Tensor, config: Mapping[str, JSON]) -> tuple[Tensor, float, Tensor]:
        """Leading singular vectors and value of the weight as torch reshapes it, in double precision."""
        wide = weight.detach().to(torch.complex128 if weight.is_complex() else torch.float64)
        if wide.ndim == 1:
            return wide, float(torch.linalg.vector_norm(wide)), wide
        matrix = wide.movedim(int(cast("int", config["dim"])), 0).flatten(1)
        left, sigma, right = torch.linalg.svd(matrix, full_matrices=False)
        return left[:, 0], float(sigma[0]), right[0].conj()


def _turned(vector: Tensor, cosine: float) -> Tensor:
    """A unit vector at an angle of this cosine to another one of two entries or more."""
    away = torch.zeros_like(vector)
    away[int(vector.abs().argmin())] = 1.0
    away = away - torch.vdot(vector, away) * vector
    away = away / torch.linalg.vector_norm(away)
    turned: Tensor = cosine * vector + max(0.0, 1.0 - cosine * cosine) ** 0.5 * away
    return turned
