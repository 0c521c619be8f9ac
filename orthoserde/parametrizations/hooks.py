"""Older hooks of torch, seen as the parametrizations that they are.

``torch.nn.utils.weight_norm`` and ``torch.nn.utils.spectral_norm`` keep the unconstrained tensors in the module itself,
under names of their own, and compute the weight before each forward.

Note [Power method]
Both forms of spectral normalisation have the same state and the same weight in evaluation mode. In training mode each
runs the power method in another order: the hook refines ``v`` first, and so goes on from ``u`` alone; the
parametrization refines ``u`` first, and so goes on from ``v`` alone. Training continues, with estimates that differ by
half an iteration.

Source: torch/nn/utils/weight_norm.py, torch/nn/utils/spectral_norm.py and torch/nn/utils/parametrizations.py
(torch 2.13).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from orthoserde import _torch
from orthoserde.codec import Codec
from orthoserde.json_values import JSON
from orthoserde.manifest import HOOK_SUFFIXES, SPECTRAL_NORM, WEIGHT_NORM
from orthoserde.parametrizations.spectral_norm import SpectralNormCodec
from orthoserde.parametrizations.weight_norm import WeightNormCodec


@dataclass(frozen=True, slots=True)
class HookedWeight:
    """A tensor of a module that a hook computes.

    Attributes:
        tensor_name: Its name.
        parametrization: What computes the same, holding the tensors of the hook itself.
        originals: The unconstrained tensors, by the names that a parametrization would give them.
        names: Names of its tensors in the module, by ``original...`` and ``0.role``.
    """

    tensor_name: str
    parametrization: nn.Module
    originals: Mapping[str, Tensor]
    names: Mapping[str, str]


def hooked_weights(module: nn.Module) -> Iterator[HookedWeight]:
    """Tensors of this very module that an older hook of torch computes, where the hook has all that it had at first."""
    for hook in _torch.forward_pre_hooks(module):
        if isinstance(hook, WeightNorm):
            found = _weight_normed(module, hook.name, hook.dim)
        elif isinstance(hook, SpectralNorm):
            found = _spectral_normed(module, hook)
        else:
            continue
        if found is not None:
            yield found


def hook_names(kind: str, tensor_name: str) -> dict[str, str]:
    """Names in the module of the tensors of a hook, by ``original...`` and ``0.role``; none of a kind without hooks."""
    return {
        part if part.startswith("original") else f"0.{part}": f"{tensor_name}{suffix}"
        for part, suffix in HOOK_SUFFIXES.get(kind, {}).items()
    }


def configs_by_shapes(kind: str, shapes: Mapping[str, Sequence[int]]) -> list[dict[str, JSON]]:
    """Configurations that the shapes of tensors allow.

    Args:
        kind: Weight or spectral normalisation.
        shapes: By the name of an original, or the role in the parametrization.

    Returns:
        Those that differ in ``dim`` alone, ``eps`` and ``n_power_iterations`` being torch's defaults; none if the
        shapes are not such as this kind has.
    """
    weight_norm = kind == WEIGHT_NORM
    originals = {part: size for part, size in shapes.items() if part.startswith("original")}
    roles = {part: size for part, size in shapes.items() if part not in originals}
    codec: Codec = WeightNormCodec() if weight_norm else SpectralNormCodec()
    dims = range(-1 if weight_norm else 0, len(shapes["original1" if weight_norm else "original"]))
    more: dict[str, JSON] = {} if weight_norm else {"eps": 1e-12, "n_power_iterations": 1}
    configs: list[dict[str, JSON]] = [{"dim": dim, **more} for dim in dims]
    return [config for config in configs if codec.check(config, originals, roles) is None]


def power_method_error(original: Tensor, u: Tensor, v: Tensor, dim: int) -> float:
    """How far one of two vectors is from what the power method makes of the other, whichever is nearer.

    After each step of training it is 0 for one of them, up to what the optimizer then does to the weight.

    Args:
        original: The unconstrained weight, of any shape and floating dtype.
        u: A unit vector as long as its dimension ``dim``.
        v: A unit vector as long as the product of the others.
        dim: The dimension.

    Returns:
        A distance from 0 to 2, infinite where it cannot be told.
    """
    matrix = original.detach().to(torch.float64).movedim(dim, 0).flatten(1)
    left, right = u.detach().to(torch.float64), v.detach().to(torch.float64)
    images = ((matrix @ right, left), (matrix.mT @ left, right))
    errors = [float(torch.linalg.vector_norm(functional.normalize(image, dim=0) - each)) for image, each in images]
    return min((error for error in errors if not math.isnan(error)), default=math.inf)


def _weight_normed(module: nn.Module, tensor_name: str, dim: int) -> HookedWeight | None:
    names, parameters = hook_names(WEIGHT_NORM, tensor_name), _torch.own_parameters(module)
    if not parameters.keys() >= set(names.values()):
        return None
    originals = {part: parameters[name] for part, name in names.items()}
    return HookedWeight(tensor_name, WeightNormCodec.type(dim), originals, names)


def _spectral_normed(module: nn.Module, hook: SpectralNorm) -> HookedWeight | None:
    names = hook_names(SPECTRAL_NORM, hook.name)
    original = _torch.own_parameters(module).get(names["original"])
    own = {name: _torch.own_buffers(module).get(name) for name in (names["0._u"], names["0._v"])}
    # A vector has no power method as a parametrization, so the hook has no such form there, nor for complex weights.
    if original is None or None in own.values() or original.ndim < 2 or original.is_complex():
        return None
    config = {"dim": hook.dim % original.ndim, "eps": hook.eps, "n_power_iterations": hook.n_power_iterations}
    parametrization = SpectralNormCodec().build(config, original)
    for role in ("_u", "_v"):
        _torch.set_buffer(parametrization, role, own[names[f"0.{role}"]])
    return HookedWeight(hook.name, parametrization, {"original": original}, names)
