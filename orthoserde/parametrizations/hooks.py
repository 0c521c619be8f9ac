"""Older hooks of torch, seen as the parametrizations that they are.

``torch.nn.utils.weight_norm``, ``torch.nn.utils.spectral_norm`` and ``torch.nn.utils.prune`` keep the unconstrained
tensors in the module itself, under names of their own, and compute the weight before each forward. A pruned tensor is
what ``torch.ao.pruning.FakeSparsity`` makes of the same tensors.

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
from orthoserde.json_values import JSON
from orthoserde.manifest import FAKE_SPARSITY, HOOK_SUFFIXES, SPECTRAL_NORM, WEIGHT_NORM
from orthoserde.parametrizations import fake_sparsity
from orthoserde.parametrizations.spectral_norm import SpectralNormCodec
from orthoserde.parametrizations.weight_norm import WeightNormCodec
from orthoserde.registry.codec import Codec


@dataclass(frozen=True, slots=True)
class HookedWeight:
    """A tensor of a module that a hook computes.

    Attributes:
        tensor_name: Its name.
        parametrization: What computes the same, holding the tensors of the hook itself.
        originals: The unconstrained tensors, by the names that a parametrization would give them.
        names: Names of its tensors in the module, by ``original...`` and ``0.role``.
        unsafe: Whether torch registers that parametrization with ``unsafe=True``.
    """

    tensor_name: str
    parametrization: nn.Module
    originals: Mapping[str, Tensor]
    names: Mapping[str, str]
    unsafe: bool


def hooked_weights(module: nn.Module) -> Iterator[HookedWeight]:
    """Tensors of this very module that an older hook of torch computes, where the hook has all that it had at first.

    Subclasses of the hooks' classes may compute something else: what they keep is plain tensors.
    """
    for hook in _torch.forward_pre_hooks(module):
        found: HookedWeight | None
        if type(hook) is WeightNorm:
            found = _weight_normed(module, hook.name, hook.dim)
        elif type(hook) is SpectralNorm:
            found = _spectral_normed(module, hook)
        else:
            continue
        if found is not None:
            yield found
    for name in dict.fromkeys(_torch.pruned_names(module)):
        found = _pruned(module, name)
        if found is not None:
            yield found


def other_hooks(module: nn.Module) -> Iterator[str]:
    """Names of tensors of this very module that hooks of these kinds compute in a way that is no parametrization's.

    Of vectors and complex tensors under spectral normalisation, of subclasses, or with tensors that were taken away.
    """
    known = {weight.tensor_name for weight in hooked_weights(module)}
    for hook in _torch.forward_pre_hooks(module):
        if isinstance(hook, (WeightNorm, SpectralNorm)) and hook.name not in known:
            yield hook.name


def hook_names(kind: str, tensor_name: str) -> dict[str, str]:
    """Names in the module of the tensors of a hook, by ``original...`` and ``0.role``; none of a kind without hooks."""
    return {
        part if part.startswith("original") else f"0.{part}": f"{tensor_name}{suffix}"
        for part, suffix in HOOK_SUFFIXES.get(kind, {}).items()
    }


def configs_by_shapes(kind: str, shapes: Mapping[str, Sequence[int]]) -> list[dict[str, JSON]]:
    """Configurations that the shapes of tensors allow.

    Args:
        kind: A kind with hooks.
        shapes: By the name of an original, or the role in the parametrization.

    Returns:
        Those that differ in ``dim`` alone, ``eps`` and ``n_power_iterations`` being torch's defaults; none if the
        shapes are not such as this kind has.
    """
    if kind == FAKE_SPARSITY:
        return [{}] if shapes["original"] == shapes["mask"] else []
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
    return HookedWeight(tensor_name, WeightNormCodec.type(dim), originals, names, unsafe=True)


def _spectral_normed(module: nn.Module, hook: SpectralNorm) -> HookedWeight | None:
    names = hook_names(SPECTRAL_NORM, hook.name)
    original = _torch.own_parameters(module).get(names["original"])
    own = {name: _torch.own_buffers(module).get(name) for name in (names["0._u"], names["0._v"])}
    # A vector has no power method as a parametrization, so the hook has no such form there, nor for complex weights.
    if original is None or None in own.values() or original.ndim < 2 or original.is_complex():
        return None
    config = {
        "dim": int(hook.dim) % original.ndim,
        "eps": float(hook.eps),
        "n_power_iterations": int(hook.n_power_iterations),
    }
    parametrization = SpectralNormCodec().build(config, original)
    for role in ("_u", "_v"):
        _torch.set_buffer(parametrization, role, own[names[f"0.{role}"]])
    return HookedWeight(hook.name, parametrization, {"original": original}, names, unsafe=False)


def _pruned(module: nn.Module, tensor_name: str) -> HookedWeight | None:
    names = hook_names(FAKE_SPARSITY, tensor_name)
    original = _torch.own_parameters(module).get(names["original"])
    mask = _torch.own_buffers(module).get(names["0.mask"])
    codec = fake_sparsity.for_kind(FAKE_SPARSITY)
    if original is None or mask is None or codec is None or original.shape != mask.shape:
        return None
    parametrization = codec.build({}, original)
    _torch.set_buffer(parametrization, "mask", mask)
    return HookedWeight(tensor_name, parametrization, {"original": original}, names, unsafe=False)
