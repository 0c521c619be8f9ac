"""Register torch's orthogonal parametrization, or its structured form, with a canonical base."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from orthoserde import _torch, modes
from orthoserde.arguments import check_flags
from orthoserde.orthonormal.completion import complete
from orthoserde.orthonormal.rounding import tall
from orthoserde.parametrizations.orthogonal import default_map, initial_original
from orthoserde.parametrizations.structured import Orthogonal, orthonormal
from orthoserde.parametrizing import register_given
from orthoserde.tensor_bytes import ORTHONORMAL_DTYPES, dtype_name


def orthogonal(
    module: nn.Module,
    name: str = "weight",
    orthogonal_map: str | None = None,
    *,
    use_trivialization: bool = True,
    structured: bool = False,
) -> nn.Module:
    """Register torch's orthogonal parametrization, with a canonical base.

    A drop-in for ``torch.nn.utils.parametrizations.orthogonal``: the same parametrization is registered, under the same
    names. What differs is the base of a matrix that is not square, whose completion is canonical here and random there:
    no random generator is used, no n x n matrix is factorised, and the base need not be stored to be known again.

    Args:
        module: Module that holds the tensor.
        name: Name of the tensor, of shape ``(..., n, k)``; float32, float64, complex64 or complex128. A weight that is
            orthonormal already (its shorter side, within ``10 n eps`` as torch has it) is kept bit for bit; any other
            is replaced by its Q factor, as torch does. On the meta device there is nothing to keep.
        orthogonal_map: ``"matrix_exp"``, ``"cayley"`` or ``"householder"``; by default ``"matrix_exp"`` for square and
            complex tensors and ``"householder"`` for others.
        use_trivialization: Whether there is a base. Without one this is torch's function.
        structured: Register :class:`orthoserde.parametrizations.structured.Orthogonal` instead of torch's module: the
            same weight but for rounding, from the same ``original``, and no n x n matrix in memory. Files of either
            form load into the other.

    Returns:
        The module.

    Raises:
        TypeError: ``use_trivialization`` or ``structured`` is neither True nor False.
        ValueError: The module has no such tensor, or one that cannot be parametrized so (fewer than two dimensions,
            half precision, complex with householder, parametrized already), or there is no such map, or it is to be
            structured without a base. Nothing has changed.

    Example:
        >>> import torch, orthoserde
        >>> layer = torch.nn.Linear(8, 4)
        >>> weight = torch.nn.init.orthogonal_(layer.weight).clone()
        >>> torch.equal(orthoserde.orthogonal(layer).weight, weight)
        True

    Source: torch/nn/utils/parametrizations.py, ``orthogonal`` and ``_Orthogonal`` (torch 2.13); see Note [Charts].
    """
    check_flags(use_trivialization=use_trivialization, structured=structured)
    weight = _checked_weight(module, name)
    chosen = default_map(weight) if orthogonal_map is None else orthogonal_map
    if chosen not in _torch.ORTHOGONAL_MAPS:
        raise ValueError(f"orthogonal_map: expected one of {', '.join(_torch.ORTHOGONAL_MAPS)}, got {chosen!r}")
    if chosen == "householder" and weight.is_complex():
        raise ValueError("orthogonal_map: householder does not support complex tensors; use matrix_exp or cayley")
    if structured and not use_trivialization:
        raise ValueError("structured: it is the base that is not made then, and use_trivialization=False has none")
    square = weight.size(-2) == weight.size(-1)
    if not structured and (not use_trivialization or (square and weight.device.type != "meta")):
        with modes.plain_arithmetic():
            return parametrizations.orthogonal(module, name, chosen, use_trivialization=use_trivialization)
    with torch.no_grad(), modes.plain_arithmetic():
        if structured:
            link: nn.Module = Orthogonal(weight.shape, chosen)
            original = cast("Orthogonal", link).right_inverse(weight)
        else:
            link = _torch.OrthogonalModule(weight, _torch.ORTHOGONAL_MAPS[chosen], use_trivialization=True)
            _torch.set_buffer(link, "base", complete(orthonormal(tall(weight))))
            original = initial_original(weight)
    register_given(module, name, [link], [original], single=True, unsafe=True)
    return module


def _checked_weight(module: nn.Module, name: str) -> Tensor:
    weight = getattr(module, name, None)
    if not isinstance(weight, Tensor):
        text = f"{type(module).__qualname__} has no parameter or buffer named {name!r}"
        raise ValueError(text)  # noqa: TRY004  # as torch does
    if name in _torch.parametrization_lists(module):
        raise ValueError(f"{name!r} is parametrized already, and torch would leave a second base empty")
    if weight.dim() < 2:
        raise ValueError(f"{name!r}: expected a matrix or a batch of matrices, got {weight.dim()} dimensions")
    # In half precision torch's own function leaves the parametrization unusable.
    if dtype_name(weight.dtype) not in ORTHONORMAL_DTYPES:
        raise ValueError(f"{name!r}: expected float32 or better, got {weight.dtype}; convert the module first")
    return weight
