"""One state in two forms: torch's orthogonal parametrization, and the structured one.

Torch's has an n x n base; where that is the canonical completion of its first columns, a file may hold these alone. The
structured parametrization has the columns in memory too. So the tensors are the same, under other names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection

from orthoserde.checkpoint import Checkpoint
from orthoserde.manifest import (
    COLUMNS,
    DENSE,
    ORTHOGONAL,
    STRUCTURED,
    ParametrizationRecord,
    ParametrizedRecord,
    TensorRecord,
    is_shared,
)
from orthoserde.tensor_bytes import ORTHONORMAL_DTYPES, contiguous_strides
from orthoserde.transforms.canonical import compact_named
from orthoserde.transforms.rewriting import Replacement, rewrite


def structure(checkpoint: Checkpoint, names: Collection[str] | None = None) -> Checkpoint:
    """Let parametrized tensors of torch's kind be of the structured kind, where no bit of their state is lost by it.

    Dense bases are read to find out, whatever it takes.

    Args:
        checkpoint: Any checkpoint.
        names: Names of the parametrized tensors; all by default.

    Returns:
        A checkpoint of the same origin. Tensors whose base is not the canonical completion, or that are not alone, are
        as they were.
    """
    chosen = _chosen(checkpoint, ORTHOGONAL, names)
    return _convert(compact_named(checkpoint, {record.name for record in chosen}), chosen, _structured)


def unstructure(checkpoint: Checkpoint, names: Collection[str] | None = None) -> Checkpoint:
    """Let parametrized tensors of the structured kind be of torch's kind, their bases stored as columns.

    Args:
        checkpoint: Any checkpoint.
        names: Names of the parametrized tensors; all by default.

    Returns:
        A checkpoint of the same origin, for :func:`orthoserde.transforms.expand` to make dense.
    """
    return _convert(checkpoint, _chosen(checkpoint, STRUCTURED, names), _of_torch)


def _chosen(checkpoint: Checkpoint, kind: str, names: Collection[str] | None) -> list[ParametrizedRecord]:
    return [
        record
        for record in checkpoint.manifest.parametrized
        if (names is None or record.name in names) and len(record.chain) == 1 and record.chain[0].kind == kind
    ]


def _convert(
    checkpoint: Checkpoint,
    chosen: Collection[ParametrizedRecord],
    convert: Callable[[ParametrizedRecord, TensorRecord], ParametrizationRecord | None],
) -> Checkpoint:
    manifest = checkpoint.manifest
    names = {record.name for record in chosen}
    replacements: dict[str, Replacement] = {}
    converted: dict[str, ParametrizedRecord] = {}
    for record in manifest.parametrized:
        if record.name not in names or len(record.chain[0].tensors) != 1:
            continue
        role = next(iter(record.chain[0].tensors))
        key = record.link_key(0, role)
        stored = manifest.tensors.get(key)
        if stored is None or is_shared(manifest, record, 0, role):
            continue  # tied to another tensor, which would then have two names
        link = convert(record, stored)
        if link is None:
            continue
        after = dataclasses.replace(record, chain=(link,))
        role = next(iter(link.tensors))
        if any(name in manifest for name in {after.link_key(0, role), *after.alias_keys(0, role)}):
            continue
        replacements[key] = (after.link_key(0, role), stored, checkpoint.sources[key])
        converted[record.name] = after
    return rewrite(checkpoint, replacements, lambda record: converted.get(record.name, record))


def _structured(record: ParametrizedRecord, stored: TensorRecord) -> ParametrizationRecord | None:
    """The structured form of torch's parametrization; None where there is none."""
    link = record.chain[0]
    config = dict(link.config or {})
    if config.pop("use_trivialization", None) is not True or not _is_plain(record, stored):
        return None
    if link.tensors != {"base": COLUMNS} and not (link.tensors == {"base": DENSE} and _is_square(record)):
        return None
    return ParametrizationRecord(STRUCTURED, 1, config, None, {"columns": DENSE})


def _of_torch(record: ParametrizedRecord, stored: TensorRecord) -> ParametrizationRecord | None:
    """Torch's form of a structured parametrization; None where there is none."""
    link = record.chain[0]
    square = _is_square(record)
    if link.config is None or link.tensors != {"columns": DENSE} or not _is_plain(record, stored):
        return None
    if not square and stored.stride != contiguous_strides(stored.shape):
        return None
    config = {**link.config, "use_trivialization": True}
    return ParametrizationRecord(ORTHOGONAL, 1, config, None, {"base": DENSE if square else COLUMNS})


def _is_plain(record: ParametrizedRecord, stored: TensorRecord) -> bool:
    """Whether what is stored is a buffer of the weight's dtype, as both forms have it."""
    same = stored.dtype == record.dtype and stored.dtype in ORTHONORMAL_DTYPES
    return same and not stored.parameter and not stored.requires_grad


def _is_square(record: ParametrizedRecord) -> bool:
    shape = record.shape or ()
    return len(shape) >= 2 and shape[-1] == shape[-2]
