"""The intervention itself: ``h + R^T (W h + b - R h)``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orthoserde import _torch, modes
from orthoserde.charts.registering import orthogonal
from orthoserde.json_values import JSON
from orthoserde.registry import register
from orthoserde.tensor_bytes import DTYPES, dtype_name

#: What may be applied to ``W h + b``, by name.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "elu": F.elu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "leaky_relu": F.leaky_relu,
    "mish": F.mish,
    "relu": F.relu,
    "relu6": F.relu6,
    "selu": F.selu,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "softplus": F.softplus,
    "tanh": torch.tanh,
}


class Rotation(_torch.AtLeastFloat32):
    """The rows of R, as the columns of one orthogonal weight; at least float32 whatever the model is cast to.

    A cast to bfloat16 and back would leave the orthogonal base off its constraint for good.

    Args:
        hidden_size: Rows of the weight.
        rank: Columns of the weight, at most ``hidden_size``.
        dtype: float32 or float64.
    """

    def __init__(self, hidden_size: int, rank: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size, rank, dtype=dtype))
        nn.init.orthogonal_(self.weight)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """``R h``: from ``(..., hidden_size)`` to ``(..., rank)``, in the dtype of the weight."""
        return hidden_states.to(self.weight.dtype) @ self.weight


@register("orthoserde>LoReFT", adapter=True)
class LoReFT(nn.Module):
    """One LoReFT intervention: ``h + R^T (W h + b - R h)``, where R has ``rank`` orthonormal rows.

    The submodules have the names of pyreft's: ``rotate_layer`` (its ``weight`` is R^T, parametrized by
    ``orthoserde.orthogonal``) and ``learned_source`` (W and b, an ``nn.Linear``).

    The rotation is computed in float32 (float64 if ``dtype`` is), also under autocast and for hidden states of lower
    precision, and stays in it when the model is cast lower. ``W h + b`` is computed in ``dtype``, or as autocast
    says. The result has the dtype of the hidden states.

    Dropout applies to the whole result, the hidden state included, as in the reference implementation of the paper.

    Args:
        hidden_size: Width of the hidden states, at least 1.
        rank: Rows of R, from 1 to ``hidden_size``.
        dropout: Probability in [0, 1) with which an element of the result is zeroed in training.
        activation: Name of a function for ``W h + b``, one of ``ACTIVATIONS``; None for none, as in the paper.
        dtype: Floating dtype of W and b; ``torch.get_default_dtype()`` by default.
        orthogonal_map: ``"householder"``, ``"cayley"``, ``"matrix_exp"``, or torch's choice by default.
        structured: Whether R is kept in the structured form. With False it is in torch's form as in pyreft, whose base
            of ``hidden_size x hidden_size`` takes 64 MiB at 4096 in float32, so that pyreft's own tensors fit in.

    Raises:
        ValueError: An argument is outside of its range.

    Source: Wu et al. 2024, arXiv 2404.03592, equation 1; ``LoreftIntervention`` in pyreft/interventions.py, 0.1.0.

    Example:
        >>> import torch
        >>> from orthoserde.integrations.loreft import LoReFT
        >>> intervention = LoReFT(8, rank=2, dropout=0.1)
        >>> intervention(torch.zeros(1, 3, 8)).shape  # (..., hidden_size)
        torch.Size([1, 3, 8])
    """

    #: Entries of the configuration that say in which form its state is kept; files of either form load into the other.
    config_forms: ClassVar = frozenset({"structured"})

    def __init__(
        self,
        hidden_size: int,
        rank: int,
        *,
        dropout: float = 0.0,
        activation: str | None = None,
        dtype: torch.dtype | None = None,
        orthogonal_map: str | None = None,
        structured: bool = True,
    ) -> None:
        dtype = torch.get_default_dtype() if dtype is None else dtype
        _check_arguments(hidden_size, rank, dropout, activation, dtype)
        _check_form(orthogonal_map, structured)
        super().__init__()
        self.hidden_size = hidden_size
        self.rank = rank
        self.activation = activation
        self.orthogonal_map = orthogonal_map
        self.structured = structured
        rotation = Rotation(hidden_size, rank, torch.promote_types(dtype, torch.float32))
        parametrized = orthogonal(rotation, orthogonal_map=orthogonal_map, structured=structured)
        self.rotate_layer = cast("Rotation", parametrized)
        self.learned_source = nn.Linear(hidden_size, rank, dtype=dtype)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Intervene on every hidden state.

        Args:
            hidden_states: Floating, of shape ``(..., hidden_size)``.

        Returns:
            New hidden states of the same shape and dtype.

        Raises:
            ValueError: The last dimension is not ``hidden_size``, or the dtype is not floating.
        """
        if hidden_states.dim() == 0 or hidden_states.shape[-1] != self.hidden_size:
            raise ValueError(
                f"hidden_states: expected (..., {self.hidden_size}), as LoReFT was made for hidden_size="
                f"{self.hidden_size}, got {tuple(hidden_states.shape)}"
            )
        if not hidden_states.is_floating_point():
            raise ValueError(f"hidden_states: expected a floating dtype, got {hidden_states.dtype}")
        source = self.learned_source(hidden_states.to(self.learned_source.weight.dtype))
        if self.activation is not None:
            source = ACTIVATIONS[self.activation](source)
        with modes.without_autocast(hidden_states.device.type):
            columns = self.rotate_layer.weight
            rotated = hidden_states.to(columns.dtype) @ columns
            moved = hidden_states + (source.to(columns.dtype) - rotated) @ columns.mT
        return cast("Tensor", self.dropout(moved.to(hidden_states.dtype)))

    def get_config(self) -> dict[str, JSON]:
        """The arguments of the constructor, ``dtype`` by name and as it is now."""
        return {
            "hidden_size": self.hidden_size,
            "rank": self.rank,
            "dropout": float(self.dropout.p),
            "activation": self.activation,
            "dtype": dtype_name(self.learned_source.weight.dtype),
            "orthogonal_map": self.orthogonal_map,
            "structured": self.structured,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> LoReFT:
        """Make one from what :meth:`get_config` returned.

        Raises:
            ValueError: A value is outside of its range.
            TypeError: An argument is missing, or is none of the constructor's.
        """
        arguments = dict(config)
        name = arguments.pop("dtype", None)
        if name not in DTYPES:
            raise ValueError(f"dtype: expected the name of a dtype, got {name!r}")
        return cls(**arguments, dtype=DTYPES[name])

    def extra_repr(self) -> str:
        """Sizes and activation, for ``repr``."""
        activation = "" if self.activation is None else f", activation={self.activation!r}"
        return f"hidden_size={self.hidden_size}, rank={self.rank}{activation}"


def _check_arguments(hidden_size: object, rank: object, dropout: object, activation: object, dtype: object) -> None:
    if type(hidden_size) is not int or hidden_size < 1:
        raise ValueError(f"hidden_size: expected an integer from 1, got {hidden_size!r}")
    if type(rank) is not int or not 1 <= rank <= hidden_size:
        raise ValueError(f"rank: expected an integer from 1 to hidden_size={hidden_size}, got {rank!r}")
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise ValueError(f"dropout: expected a number in [0, 1), got {dropout!r}")
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected None or one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize < 2:
        raise ValueError(f"dtype: expected float16, bfloat16, float32 or float64, got {dtype!r}")


def _check_form(orthogonal_map: object, structured: object) -> None:
    if orthogonal_map is not None and orthogonal_map not in _torch.ORTHOGONAL_MAPS:
        names = ", ".join(_torch.ORTHOGONAL_MAPS)
        raise ValueError(f"orthogonal_map: expected None or one of {names}, got {orthogonal_map!r}")
    if not isinstance(structured, bool):
        raise ValueError(f"structured: expected True or False, got {structured!r}")  # noqa: TRY004  # as for the others
