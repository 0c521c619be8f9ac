"""What each of geotorch's constraints is made with, and how far a tensor is from it.

Distances are computed in double precision, over all matrices of a batch: the largest counts.

Note [Rounding of geotorch]
A distance that is rounding is a few eps of its scale; ``ROUNDING`` leaves room for large matrices. The eigenvalues of a
matrix that is not normal may move by the root of a rounding, and a determinant by rounding times the condition number:
these two have scales of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from orthoserde.json_values import JSON
from orthoserde.orthonormal.completion import complete
from orthoserde.orthonormal.rounding import tall
from orthoserde.parametrizations.orthogonal import OrthogonalCodec

Config = Mapping[str, JSON]

#: Distances that are rounding, in units of eps of the dtype times the scale.
ROUNDING = 100.0


def _largest(values: Tensor) -> float:
    return float(values.max()) if values.numel() else 0.0


def _norm(weight: Tensor, vectors: bool) -> float:
    return _largest(torch.linalg.vector_norm(weight, dim=-1 if vectors else (-2, -1)))


@dataclass(frozen=True)
class Sort:
    """One of geotorch's classes.

    Attributes:
        arguments: What its constructor takes beside the size, in the order of its parameters.
        vectors: Whether it constrains vectors (the last dimension) instead of matrices (the last two).
        sized: Whether it is made for a size.
        originals: How many unconstrained tensors it has.
        distance: Distance of a tensor of float64 from the constraint; None where there is none to measure.
        by_config: Whether that depends on the configuration.
        scale: What its rounding is measured in, of a tensor of vectors or matrices; their largest norm by default.
        recover: State, by name and role, of which a tensor is the computed one; None where there is no such way.
        project: The nearest tensor on the constraint, for a tensor of float64, where ``recover`` is given.
    """

    arguments: tuple[str, ...]
    vectors: bool = False
    sized: bool = True
    originals: int = 1
    distance: Callable[[Tensor, Config], float] | None = None
    by_config: bool = False
    scale: Callable[[Tensor, bool], float] = _norm
    recover: Callable[[Tensor, Config], dict[str, Tensor]] | None = None
    project: Callable[[Tensor, Config], Tensor] = lambda weight, config: weight


def _number(config: Config, name: str) -> float:
    return float(cast("float", config[name]))


def _rank(config: Config) -> int:
    return int(cast("int", config["rank"]))


def _asymmetry(weight: Tensor, config: Config) -> float:
    return _largest((weight - weight.mT).abs())


def _symmetry(weight: Tensor, config: Config) -> float:
    return _largest((weight + weight.mT).abs())


def _not_orthogonal(weight: Tensor, config: Config) -> float:
    return cast("float", OrthogonalCodec().residual(weight))


def _off_sphere(weight: Tensor, config: Config) -> float:
    return _largest((torch.linalg.vector_norm(weight, dim=-1) - _number(config, "radius")).abs())


def _beyond_rank(weight: Tensor, config: Config) -> float:
    return _largest(torch.linalg.svdvals(weight)[..., _rank(config) :])


def _not_almost_orthogonal(weight: Tensor, config: Config) -> float:
    return max(0.0, _largest((torch.linalg.svdvals(weight) - 1.0).abs()) - _number(config, "lam"))


def _determinant(weight: Tensor, config: Config) -> float:
    sign, logarithm = torch.linalg.slogdet(weight)
    return math.inf if bool((sign <= 0).any()) else _largest(logarithm.abs())


def _condition(weight: Tensor, vectors: bool) -> float:
    return float(weight.size(-1)) * _largest(torch.linalg.cond(weight))


def _not_semidefinite(weight: Tensor, config: Config) -> float:
    return max(_asymmetry(weight, config), _largest(-torch.linalg.eigvalsh(weight)), 0.0)


def _not_semidefinite_of_rank(weight: Tensor, config: Config) -> float:
    return max(_not_semidefinite(weight, config), _beyond_rank(weight, config))


def _not_stable(weight: Tensor, config: Config) -> float:
    return max(0.0, _largest(torch.linalg.eigvals(weight).real) + _number(config, "alpha"))


def _root_of_rounding(weight: Tensor, vectors: bool) -> float:
    return float(torch.finfo(torch.float32).eps ** -0.5) * _norm(weight, vectors)


def _at_base(weight: Tensor, config: Config) -> dict[str, Tensor]:
    return {"original": torch.zeros_like(weight), "base": complete(tall(weight))}


def _polar(weight: Tensor, config: Config) -> Tensor:
    return OrthogonalCodec().project(weight, {})


def _on_radius(weight: Tensor, config: Config) -> dict[str, Tensor]:
    return {"original": weight / _number(config, "radius")}


def _at_point(weight: Tensor, config: Config) -> dict[str, Tensor]:
    return {"original": torch.zeros_like(weight), "base": weight / _number(config, "radius")}


def _onto_sphere(weight: Tensor, config: Config) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(weight, dim=-1, keepdim=True)
    return weight / norm * _number(config, "radius")


def _triangle(weight: Tensor, config: Config) -> dict[str, Tensor]:
    return {"original": weight.tril() if config["lower"] else weight.triu()}


_ORTHOGONAL = Sort(("triv",), distance=_not_orthogonal, recover=_at_base, project=_polar)
_SPHERE = Sort(
    ("radius",), vectors=True, distance=_off_sphere, by_config=True, recover=_on_radius, project=_onto_sphere
)

#: geotorch's constraints by the names of their classes.
SORTS: dict[str, Sort] = {
    "Rn": Sort((), vectors=True),
    "Skew": Sort(
        ("lower",), distance=_symmetry, recover=_triangle, project=lambda weight, config: (weight - weight.mT) / 2
    ),
    "Symmetric": Sort(
        ("lower",),
        sized=False,
        distance=_asymmetry,
        recover=_triangle,
        project=lambda weight, config: (weight + weight.mT) / 2,
    ),
    "SO": replace(_ORTHOGONAL, arguments=("triv", "lower")),
    "Stiefel": _ORTHOGONAL,
    "Grassmannian": _ORTHOGONAL,
    "Sphere": replace(_SPHERE, recover=_at_point),
    "SphereEmbedded": _SPHERE,
    "LowRank": Sort(("rank", "triv"), distance=_beyond_rank, by_config=True),
    "FixedRank": Sort(("rank", "f", "triv"), distance=_beyond_rank, by_config=True),
    "AlmostOrthogonal": Sort(("lam", "f", "triv"), distance=_not_almost_orthogonal, by_config=True),
    # Almost every matrix is invertible; its sample's determinant is as often negative as positive.
    "GLp": Sort(("f", "triv")),
    "SL": Sort(("f", "triv"), distance=_determinant, scale=_condition),
    "PSD": Sort(("f", "triv"), distance=_not_semidefinite),
    "PSSD": Sort(("triv",), distance=_not_semidefinite),
    "PSSDLowRank": Sort(("rank", "triv"), distance=_not_semidefinite_of_rank, by_config=True),
    "PSSDFixedRank": Sort(("rank", "f", "triv"), distance=_not_semidefinite_of_rank, by_config=True),
    "Hurwitz": Sort(("alpha", "triv"), originals=3, distance=_not_stable, by_config=True, scale=_root_of_rounding),
}
