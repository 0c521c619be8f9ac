"""``torch.nn.utils.parametrizations.orthogonal``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import cast

import torch
from torch import Tensor, nn

from orthoserde import _torch
from orthoserde.errors import ConfigError
from orthoserde.json_values import JSON
from orthoserde.manifest import ORTHOGONAL
from orthoserde.orthonormal.completion import complete
from orthoserde.orthonormal.rounding import LARGEST_ROUNDING, MEAN_ROUNDING, gram_error, tall
from orthoserde.registry.codec import OneVersion, own_tensors

CONFIG = frozenset({"orthogonal_map", "shape", "use_trivialization"})


class OrthogonalCodec(OneVersion):
    """Codec of torch's orthogonal parametrization: ``weight = base @ map(original)``.

    Shapes: ``weight`` and ``original`` are ``(..., n, k)``; ``base``, present with trivialization, is ``(..., m, m)``
    with ``m = max(n, k)``. dtypes: as torch, float32, float64, complex64 and complex128 (not householder).

    Source: torch/nn/utils/parametrizations.py, ``_Orthogonal`` (torch 2.13); Lezcano-Casado and Martinez-Rubio 2019,
    arXiv:1901.08428 (exponential map), Lezcano-Casado 2019, arXiv:1909.09501 (trivializations).
    """

    type = _torch.OrthogonalModule
    kind = ORTHOGONAL
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
        if set(config) != CONFIG or orthogonal_map is None or not isinstance(trivialized, bool) or like is None:
            raise ConfigError(f"{self.kind}: not a configuration of this torch: {dict(config)}")
        if config.get("shape") != list(like.shape):
            raise ConfigError(
                f"{self.kind}: configured for shape {config.get('shape')}, the tensor has {list(like.shape)}"
            )
        try:
            return self.type(like.detach().to("meta"), orthogonal_map, use_trivialization=trivialized)
        except (ValueError, RuntimeError) as error:
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

    def check(
        self, config: Mapping[str, JSON], originals: Mapping[str, Sequence[int]], roles: Mapping[str, Sequence[int]]
    ) -> str | None:
        """One original of two dimensions or more, as configured, and a square base for its longer side, if any."""
        shape = list(originals.get("original", ()))
        if set(originals) != {"original"} or len(shape) < 2 or config.get("shape") != shape:
            return f"expected one original of the shape {config.get('shape')}, got {dict(originals)}"
        side = max(shape[-2:])
        base = list(roles.get("base", [*shape[:-2], side, side]))
        if not set(roles) <= {"base"} or base != [*shape[:-2], side, side]:
            return f"expected a base of the shape {[*shape[:-2], side, side]}, got {dict(roles)}"
        if "base" in roles and config.get("use_trivialization") is not True:
            return "a base without trivialization"
        return None

    def residual(self, weight: Tensor) -> float | None:
        """``max |Q^H Q - I|`` in double precision, Q the weight with its longer side first; 0 for an empty one."""
        error = gram_error(weight)
        return float(error.abs().max()) if error.numel() else 0.0

    def admits(self, weight: Tensor, config: Mapping[str, JSON]) -> bool:
        """Whether ``Q^H Q - I`` is rounding, in its largest entry and in the mean; see Note [Rounding or damage]."""
        error = gram_error(weight)
        if error.numel() == 0:
            return True
        eps = torch.finfo(torch.float64 if weight.dtype in (torch.float64, torch.complex128) else torch.float32).eps
        largest, mean = float(error.abs().max()), float(error.abs().square().mean().sqrt())
        return largest <= LARGEST_ROUNDING * eps and mean <= MEAN_ROUNDING * eps

    def project(self, weight: Tensor, config: Mapping[str, JSON]) -> Tensor:
        """The nearest orthogonal (unitary) matrix in Frobenius norm: the polar factor, computed in double precision.

        Raises:
            ConfigError: A singular value is zero to float32 rounding, so no matrix is nearest.
        """
        wide = weight.detach().to(torch.complex128 if weight.is_complex() else torch.float64)
        left, sigma, right = torch.linalg.svd(wide, full_matrices=False)
        if sigma.numel() and float(sigma.min()) <= torch.finfo(torch.float32).eps:
            raise ConfigError(f"{self.kind}: a weight of lower rank has no nearest orthogonal one")
        nearest: Tensor = left @ right
        return nearest.to(weight.dtype)

    def recovers(self, config: Mapping[str, JSON]) -> bool:
        """Whether it is trivialized or householder: torch's cayley and matrix_exp alone cannot be inverted."""
        return bool(config["use_trivialization"]) or config["orthogonal_map"] == "householder"

    def from_weight(self, weight: Tensor, config: Mapping[str, JSON]) -> dict[str, Tensor]:
        """State of which ``weight`` is the computed tensor.

        With trivialization the weight comes back bit for bit: it is the first columns of ``base``, which is completed
        canonically, and ``original`` has its initial value -I. Without it, householder comes back within
        ``10 n eps`` by a QR factorisation.

        Raises:
            ConfigError: cayley or matrix_exp without trivialization, whose maps torch cannot invert.
        """
        if config["use_trivialization"]:
            return {"original": initial_original(weight.contiguous()), "base": complete(tall(weight))}
        if not self.recovers(config):
            raise ConfigError(
                f"{self.kind}: {config['orthogonal_map']} without trivialization cannot be recovered from the weight"
            )
        with torch.no_grad():
            inverse = cast("Callable[[Tensor], Tensor]", self.build(config, weight).right_inverse)
            return {"original": inverse(weight)}


def default_map(weight: Tensor) -> str:
    """The map that torch's ``orthogonal`` chooses for a tensor when it is told none."""
    square = weight.size(-2) == weight.size(-1)
    return "matrix_exp" if square or weight.is_complex() else "householder"


def initial_original(weight: Tensor) -> Tensor:
    """The value of ``original`` at which the map is I: -1 on the diagonal, in memory as the weight is."""
    original = torch.zeros_like(weight)
    original.diagonal(dim1=-2, dim2=-1).fill_(-1.0)
    return original
