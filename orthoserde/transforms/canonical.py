"""Bases that follow from their first columns: stored as these, and taken for whole again by whoever reads them.

Note [Exact or dense]
The base of a trivialized orthogonal parametrization is stored as columns only where the canonical completion of these
is the base bit for bit, memory layout included, and where a load would take the columns. So nothing that is loaded can
tell how it was stored. Torch's own base, completed with random columns, is stored whole.

Note [Worth the work]
Whether a base is the canonical completion is known only when n k k multiplications have been done for it, each of them
elementwise for the sake of the same bits everywhere: half a second for 2**26. A model whose bases are torch's would
spend them in every save for nothing. So above that number nothing is tried unless it is asked for.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from orthoserde import modes
from orthoserde.checkpoint import Checkpoint, LiveTensor, TensorSource
from orthoserde.errors import ConfigError
from orthoserde.manifest import (
    COLUMNS,
    DENSE,
    ORTHOGONAL,
    Manifest,
    ParametrizationRecord,
    ParametrizedRecord,
    TensorRecord,
    is_shared,
)
from orthoserde.side_by_side import GoOn, work_through
from orthoserde.tensor_bytes import (
    DTYPES,
    ORTHONORMAL_DTYPES,
    column_major_strides,
    contiguous_strides,
    dtype_name,
    overlap,
    storage_of,
)
from orthoserde.transforms.columns import ColumnsOfBase, admitted, first_columns, is_completion
from orthoserde.transforms.rewriting import Replacement, rewrite

#: Multiplications that are worth finding out whether a base can be stored as columns; see Note [Worth the work].
MOST_MULTIPLICATIONS = 1 << 26


def expand(checkpoint: Checkpoint) -> Checkpoint:
    """Let every base that is stored as columns be a whole tensor, worked out when it is asked for.

    Args:
        checkpoint: Any checkpoint; one without such bases is returned as it is.

    Returns:
        A checkpoint of the same origin in which every tensor is dense. A base in it is column-major and has no digest;
        that of its columns is compared whenever they are read.
    """
    manifest = checkpoint.manifest
    if not manifest.compact:
        return checkpoint
    changes: dict[str, Replacement] = {}
    for record in manifest.parametrized:
        for index, role in record.columns():
            key, whole = record.link_key(index, role), with_encoding(record, DENSE).link_key(index, role)
            stored = manifest.tensors[key]
            shape = (*stored.shape[:-1], stored.shape[-2])
            base = TensorRecord(stored.dtype, shape, column_major_strides(shape), parameter=False)
            changes[key] = (whole, base, ColumnsOfBase(key, checkpoint.sources[key], stored))
    return _encoded(checkpoint, changes, DENSE)


def compact(checkpoint: Checkpoint) -> Checkpoint:
    """Store bases as their first columns, where these determine them; see Note [Exact or dense].

    Bases are read, those in memory several at a time, and nothing else. Those that would take more than
    ``MOST_MULTIPLICATIONS`` stay dense.

    Args:
        checkpoint: Any checkpoint.

    Returns:
        A checkpoint of the same origin.
    """
    return _compact(checkpoint, _bases(checkpoint, MOST_MULTIPLICATIONS))


def untried(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Names of the parametrized tensors whose bases :func:`compact` has left dense for the work it would take alone.

    Args:
        checkpoint: One that it returned.
    """
    large = {
        record.name
        for record in checkpoint.manifest.parametrized
        if any(_multiplications(_sizes(link)) > MOST_MULTIPLICATIONS for link in record.chain)
    }
    bases = _found(checkpoint, large) if large else []
    return tuple(base.name for base in bases if base.multiplications > MOST_MULTIPLICATIONS and not base.obstacle)


def compact_named(checkpoint: Checkpoint, names: Collection[str]) -> Checkpoint:
    """As :func:`compact`, for the parametrized tensors of these names alone and whatever it takes."""
    return _compact(checkpoint, _bases(checkpoint, None, names))


def compact_all(checkpoint: Checkpoint) -> Checkpoint:
    """As :func:`compact` whatever it takes, but refuse to leave a base dense; a square one has nothing to leave out.

    Raises:
        ConfigError: A base is not determined by its first columns; every such tensor is listed.
    """
    bases = _bases(checkpoint, None)
    refused = [f"{base.name}: {base.obstacle}" for base in bases if base.obstacle]
    if refused:
        raise ConfigError("\n  ".join([f"{checkpoint.origin}: bases that cannot be stored as columns:", *refused]))
    return _compact(checkpoint, bases)


@dataclass(frozen=True)
class _Base:
    """A base that has more columns than its weight.

    Attributes:
        name: Name of the parametrized tensor.
        key: Key of the base.
        target: Key of its columns.
        shape: Shape of its columns.
        dtype: dtype of its columns.
        source: The base.
        obstacle: Why it has to stay dense; empty if it need not.
    """

    name: str
    key: str
    target: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    source: TensorSource
    obstacle: str

    @property
    def multiplications(self) -> int:
        """What it takes to find out whether it is the canonical completion; see Note [Worth the work]."""
        return _multiplications(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the base, if any thread may read it."""
        tensor = self.source.tensor if isinstance(self.source, LiveTensor) else None
        plain = type(tensor) is Tensor and tensor.device.type == "cpu" and not self.obstacle
        return tensor.numel() * tensor.element_size() if plain and tensor is not None else 0


def _bases(checkpoint: Checkpoint, limit: int | None, names: Collection[str] | None = None) -> list[_Base]:
    """Bases that have more columns than their weight, with what keeps each from being stored as columns."""

    def read(base: _Base, go_on: GoOn) -> str:
        return base.obstacle or _difference(base, go_on)

    bases = _found(checkpoint, names)
    if limit is not None:
        too_much = f"it would take more than {limit} multiplications to find out"
        bases = [
            dataclasses.replace(base, obstacle=too_much) if base.multiplications > limit and not base.obstacle else base
            for base in bases
        ]
    with modes.ordinary():
        obstacles = work_through(bases, read, lambda base: base.nbytes)
    return [dataclasses.replace(base, obstacle=text) for base, text in zip(bases, obstacles, strict=True)]


def _found(checkpoint: Checkpoint, names: Collection[str] | None = None) -> list[_Base]:
    """Bases that have more columns than their weight, with what is known against each before it is read."""
    manifest = checkpoint.manifest
    memory: dict[int, list[tuple[str, Tensor]]] = {}
    for key, source in checkpoint.sources.items():
        if isinstance(source, LiveTensor):
            memory.setdefault(storage_of(source.tensor), []).append((key, source.tensor))
    bases: list[_Base] = []
    for record in manifest.parametrized:
        if names is not None and record.name not in names:
            continue
        for index, link in enumerate(record.chain):
            sizes = _sizes(link) if link.kind == ORTHOGONAL and link.tensors.get("base") == DENSE else ()
            if not sizes:
                continue
            *batch, n, k = sizes
            key = manifest.kept_key(record.link_key(index, "base"))
            obstacle = _obstacle(record, key, (*batch, n, n), manifest)
            source = checkpoint.sources[key]
            if not obstacle and isinstance(source, LiveTensor):
                neighbours = memory[storage_of(source.tensor)]
                if any(other != key and overlap(source.tensor, tensor) for other, tensor in neighbours):
                    obstacle = "other tensors of the model lie in the memory of its base"
            target = with_encoding(record, COLUMNS).link_key(index, "base")
            shape, dtype = (*batch, n, k), DTYPES[manifest.tensors[key].dtype]
            bases.append(_Base(record.name, key, target, shape, dtype, source, obstacle))
    return bases


def _multiplications(columns: Sequence[int]) -> int:
    """What it takes to complete columns of this shape; nothing where there are none."""
    return math.prod(columns) * columns[-1] if columns else 0


def _sizes(link: ParametrizationRecord) -> tuple[int, ...]:
    """Shape of the columns of an orthogonal link, (..., n, k) with k < n; empty where its base has no others."""
    configured = (link.config or {}).get("shape")
    sizes = [size for size in configured if isinstance(size, int)] if isinstance(configured, list) else []
    if len(sizes) < 2 or not 0 < min(sizes[-2:]) < max(sizes[-2:]):
        return ()
    return (*sizes[:-2], max(sizes[-2:]), min(sizes[-2:]))


def _obstacle(record: ParametrizedRecord, key: str, shape: tuple[int, ...], manifest: Manifest) -> str:
    """What the manifest says against storing a base as columns."""
    base, config = manifest.tensors[key], record.chain[0].config or {}
    compacted = with_encoding(record, COLUMNS)
    if len(record.chain) > 1:
        return "its orthogonal parametrization is one of several"
    if config.get("use_trivialization") is not True or config.get("shape") != list(record.shape or ()):
        return "its configuration is not one of torch's own"
    if base.dtype != record.dtype or base.dtype not in ORTHONORMAL_DTYPES or base.shape != shape:
        return f"its base is {base.dtype} of shape {list(base.shape)}"
    if base.parameter or base.requires_grad:
        return "its base is a parameter, or requires a gradient"
    if key != record.link_key(0, "base") or is_shared(manifest, record, 0, "base"):
        return "its base is tied to another tensor"
    if any(name in manifest for name in {compacted.link_key(0, "base"), *compacted.alias_keys(0, "base")}):
        return "its model has a tensor of the name that the columns would have"
    if base.stride != column_major_strides(base.shape):
        return "its base is not column-major, which a load would make it"
    return ""


def _difference(base: _Base, go_on: GoOn) -> str:
    columns = first_columns(base.source, base.shape, base.dtype)
    if not is_completion(base.source, columns, go_on):
        return "its completion is torch's random one; call orthoserde.canonicalize_, or save with base='auto'"
    if not admitted(columns):
        return "the first columns of its base are not finite, or farther from orthonormal than rounding takes them"
    return ""


def _compact(checkpoint: Checkpoint, bases: list[_Base]) -> Checkpoint:
    changes: dict[str, Replacement] = {}
    for base in bases:
        if not base.obstacle:
            record = TensorRecord(dtype_name(base.dtype), base.shape, contiguous_strides(base.shape), parameter=False)
            changes[base.key] = (base.target, record, LiveTensor(first_columns(base.source, base.shape, base.dtype)))
    return _encoded(checkpoint, changes, COLUMNS)


def _encoded(checkpoint: Checkpoint, changes: Mapping[str, Replacement], encoding: str) -> Checkpoint:
    """Put other tensors in the places of bases, which stand for them in this encoding."""

    def changed(record: ParametrizedRecord) -> ParametrizedRecord:
        affected = any(key in changes for key in record.tensor_keys())
        return with_encoding(record, encoding) if affected else record

    return rewrite(checkpoint, changes, changed)


def with_encoding(record: ParametrizedRecord, encoding: str) -> ParametrizedRecord:
    """The same record with the base of its orthogonal links in another encoding."""
    chain = tuple(
        dataclasses.replace(link, tensors={**link.tensors, "base": encoding})
        if link.kind == ORTHOGONAL and "base" in link.tensors
        else link
        for link in record.chain
    )
    return dataclasses.replace(record, chain=chain)
