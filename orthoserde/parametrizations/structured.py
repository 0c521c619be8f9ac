"""The structured orthogonal parametrization: torch's, with a canonical base that is never made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from orthoserde import _torch, modes
from orthoserde.errors import ConfigError
from orthoserde.json_values import JSON
from orthoserde.manifest import STRUCTURED
from orthoserde.orthonormal.completion import reflectors
from orthoserde.orthonormal.rounding import tall
from orthoserde.orthonormal.thin_maps import THIN_MAPS, in_base
from orthoserde.parametrizations.orthogonal import OrthogonalCodec, initial_original
from orthoserde.tensor_bytes import ORTHONORMAL_DTYPES, dtype_name


class Orthogonal(_torch.NoticesCasts):
    """Orthogonal and unitary matrices as torch's ``orthogonal`` has them, without an n x n matrix.

    Torch computes ``weight = base @ map(original)``, the base being n x n for the longer side n of the weight. Here the
    base is the canonical completion of its first columns, and these are all that is kept: the weight is the same, but
    for rounding, in ``O(n k k)`` time and ``O(n k)`` memory for the shorter side k. It stays in the dtype of
    ``original`` under autocast: half precision would take it off the constraint.

    What follows from the columns, their Householder reflectors, is worked out when columns come by registration,
    assignment to the weight, ``orthoserde.load`` or ``load_state_dict``, and before a forward that finds others.
    Compiled code does not look: whoever writes ``columns`` of a compiled module by other means calls :meth:`settle`.

    Args:
        shape: Shape of the weight, ``(..., n, k)``; the longer of the last two sides counts as n.
        orthogonal_map: ``"matrix_exp"``, ``"cayley"`` or ``"householder"``.

    Attributes:
        columns: Buffer of shape ``(..., n, k)``, the first columns of the base; None until they are known.
        vectors: Buffer of shape ``(..., n, k)``, of the reflectors of the columns; in no checkpoint.
        factor: Buffer of shape ``(..., k, k)``, likewise.

    Raises:
        ValueError: The shape has fewer than two dimensions, or there is no such map.

    Source: torch/nn/utils/parametrizations.py, ``_Orthogonal`` (torch 2.13); Note [Thin maps] and Note [Thin bases].
    """

    columns: Tensor | None
    vectors: Tensor | None
    factor: Tensor | None

    def __init__(self, shape: Sequence[int], orthogonal_map: str) -> None:
        super().__init__()
        if len(shape) < 2:
            raise ValueError(f"expected the shape of a matrix or a batch of matrices, got {list(shape)}")
        if orthogonal_map not in THIN_MAPS:
            raise ValueError(f"orthogonal_map: expected one of {', '.join(THIN_MAPS)}, got {orthogonal_map!r}")
        self.shape = torch.Size(shape)
        self.orthogonal_map = orthogonal_map
        self.register_buffer("columns", None)
        self.register_buffer("vectors", None, persistent=False)
        self.register_buffer("factor", None, persistent=False)
        #: The columns of which the reflectors are known, and how often these had been changed then.
        self._settled: tuple[Tensor, int | None] | None = None
        self.register_load_state_dict_post_hook(_settle)  # type: ignore[no-untyped-call]

    @property
    def _is_square(self) -> bool:
        """Whether the base is its columns, so that there is nothing to work out."""
        return self.shape[-1] == self.shape[-2]

    def settle(self) -> None:
        """Work out what follows from ``columns``, after these have been written: some ``n k k`` single operations."""
        columns = self.columns
        self._settled = self.vectors = self.factor = None
        if columns is not None and columns.device.type != "meta":
            if not self._is_square:
                self.vectors, self.factor = reflectors(columns)
            self._settled = (columns, _torch.version_of(columns))

    @property
    def _is_settled(self) -> bool:
        known = self._settled
        return known is not None and known[0] is self.columns and known[1] == _torch.version_of(known[0])

    def after_cast(self) -> None:
        """Work them out anew for columns that a cast or move has made; a module without any yet waits for them."""
        if self._settled is not None and not self._is_settled:
            self.settle()

    def forward(self, original: Tensor) -> Tensor:
        """The weight.

        Args:
            original: Shape ``(..., n, k)`` or ``(..., k, n)``, of the columns' dtype.

        Returns:
            Of the same shape and dtype.

        Raises:
            RuntimeError: There are no columns yet, or ``original`` has another dtype.
        """
        columns = self.columns
        if columns is None:
            raise RuntimeError("an orthogonal parametrization without columns; load its state first")
        if dtype_name(original.dtype) not in ORTHONORMAL_DTYPES:
            raise RuntimeError(
                f"original: expected float32 or better, got {original.dtype}; keep the module in full precision and "
                "use autocast"
            )
        if original.dtype != columns.dtype:
            raise RuntimeError(
                f"original: expected {columns.dtype} as its columns are, got {original.dtype}; change the dtype of the "
                "module, not of one of its tensors"
            )
        # Nor is there anything to see in tensors that a compiler traces with.
        traced = torch.compiler.is_compiling() or _torch.overrides_dispatch(columns)
        if not traced and not self._is_settled:
            self.settle()
        with modes.without_autocast(original.device.type):
            top, bottom = THIN_MAPS[self.orthogonal_map](tall(original))
            if self._is_square:
                weight = columns @ top
            else:
                # On the meta device there are none, and shapes will do.
                known = None if self.vectors is None or self.factor is None else (self.vectors, self.factor)
                weight = in_base(columns, *(known or reflectors(columns)), top, bottom)
        return weight.mT if original.size(-2) < original.size(-1) else weight

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Start a new chart at a weight: it becomes the columns, bit for bit if it is orthonormal, else its Q factor.

        Args:
            weight: Of the parametrization's shape.

        Returns:
            The initial value of ``original``, -I.

        Raises:
            ValueError: The weight has another shape, or another dtype than the columns.
        """
        dtype = weight.dtype if self.columns is None else self.columns.dtype
        if weight.shape != self.shape or weight.dtype != dtype:
            raise ValueError(
                f"weight: expected {dtype} of shape {tuple(self.shape)}, got {weight.dtype} of {tuple(weight.shape)}"
            )
        with torch.no_grad(), modes.plain_arithmetic():
            self.columns = orthonormal(tall(weight.detach())).clone(memory_format=torch.contiguous_format)
            self.settle()
        return initial_original(weight)

    def extra_repr(self) -> str:
        """The map and the shape of the weight, for ``repr``."""
        return f"{self.orthogonal_map}, {list(self.shape)}"


def _settle(module: nn.Module, incompatible_keys: object) -> None:
    """Of ``load_state_dict``; a function of the module, so that copies of it have it too."""
    cast("Orthogonal", module).settle()


def orthonormal(matrix: Tensor) -> Tensor:
    """A tall matrix with orthonormal columns: the given one, if it is one, else its Q factor."""
    if matrix.device.type == "meta" or _torch.is_orthogonal(matrix):
        return matrix
    return _torch.make_orthogonal(matrix)


class StructuredCodec(OrthogonalCodec):
    """Codec of :class:`Orthogonal`. Shapes: ``original`` is ``(..., n, k)`` or ``(..., k, n)``, ``columns`` tall."""

    type: type[nn.Module] = Orthogonal
    kind = STRUCTURED
    version = 1

    def config(self, parametrization: nn.Module) -> dict[str, JSON]:
        """``orthogonal_map`` by name and ``shape`` of the weight."""
        own = cast("Orthogonal", parametrization)
        return {"orthogonal_map": own.orthogonal_map, "shape": [int(size) for size in own.shape]}

    def build(self, config: Mapping[str, JSON], like: Tensor | None) -> nn.Module:
        """Make the parametrization with ``columns`` still None.

        Raises:
            ConfigError: The map is none of torch's, or does not go with the tensor.
        """
        shape, orthogonal_map = config.get("shape"), config.get("orthogonal_map")
        if set(config) != {"orthogonal_map", "shape"} or like is None:
            raise ConfigError(f"{self.kind}: not a configuration of this version: {dict(config)}")
        if shape != list(like.shape):
            raise ConfigError(f"{self.kind}: configured for shape {shape}, the tensor has {list(like.shape)}")
        if orthogonal_map == "householder" and like.is_complex():
            raise ConfigError(f"{self.kind}: the householder parametrization does not support complex tensors")
        try:
            return Orthogonal(like.shape, str(orthogonal_map))
        except ValueError as error:
            raise ConfigError(f"{self.kind}: {error}") from error

    def compute(self, config: Mapping[str, JSON], tensors: Mapping[str, Tensor]) -> Tensor:
        """``[columns | completion] @ map(original)``, with the operations of the module's own forward."""
        built = self.build(config, tensors["original"])
        _torch.set_buffer(built, "columns", tensors["columns"])
        with torch.no_grad():
            weight: Tensor = built(tensors["original"])
        return weight

    def check(
        self, config: Mapping[str, JSON], originals: Mapping[str, Sequence[int]], roles: Mapping[str, Sequence[int]]
    ) -> str | None:
        """One original of two dimensions or more, as configured, and columns of its shape, the longer side first."""
        shape = list(originals.get("original", ()))
        if set(originals) != {"original"} or len(shape) < 2 or config.get("shape") != shape:
            return f"expected one original of the shape {config.get('shape')}, got {dict(originals)}"
        expected = [*shape[:-2], max(shape[-2:]), min(shape[-2:])]
        if not set(roles) <= {"columns"} or list(roles.get("columns", expected)) != expected:
            return f"expected columns of the shape {expected}, got {dict(roles)}"
        return None

    def recovers(self, config: Mapping[str, JSON]) -> bool:
        """Always: the weight is its columns."""
        return True

    def from_weight(self, weight: Tensor, config: Mapping[str, JSON]) -> dict[str, Tensor]:
        """State of which ``weight`` is the computed tensor, bit for bit: its columns, ``original`` at -I."""
        columns = tall(weight).clone(memory_format=torch.contiguous_format)
        return {"original": initial_original(weight.contiguous()), "columns": columns}
