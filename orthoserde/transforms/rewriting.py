"""Put other tensors in the places of some that a checkpoint stores, with all that refers to them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from orthoserde.checkpoint import Checkpoint, TensorSource
from orthoserde.manifest import ParametrizedRecord, TensorRecord

#: Key, record and elements of what comes in the place of a stored tensor.
Replacement = tuple[str, TensorRecord, TensorSource]


def rewrite(
    checkpoint: Checkpoint,
    replacements: Mapping[str, Replacement],
    change: Callable[[ParametrizedRecord], ParametrizedRecord],
) -> Checkpoint:
    """Replace stored tensors in their places.

    Args:
        checkpoint: Where they are replaced.
        replacements: By key of what is replaced.
        change: What becomes of the record of a parametrized tensor. The tensors of its first parametrization stay as
            many as they are, in their order.

    Returns:
        A checkpoint of the same origin; the given one if nothing is replaced.
    """
    if not replacements:
        return checkpoint
    manifest = checkpoint.manifest
    tensors: dict[str, TensorRecord] = {}
    sources: dict[str, TensorSource] = {}
    for key, record in manifest.tensors.items():
        target, record_after, source = replacements.get(key, (key, record, checkpoint.sources[key]))
        tensors[target], sources[target] = record_after, source
    parametrized: list[ParametrizedRecord] = []
    renamed: dict[str, str] = {}
    for before in manifest.parametrized:
        after = change(before)
        parametrized.append(after)
        for path in before.aliases if after is not before else ():
            renamed |= dict(zip(_keys(before, path), _keys(after, path), strict=True))
    aliases = {
        renamed.get(alias, alias): replacements[kept][0] if kept in replacements else kept
        for alias, kept in manifest.aliases.items()
    }
    changed = dataclasses.replace(manifest, tensors=tensors, aliases=aliases, parametrized=tuple(parametrized))
    return dataclasses.replace(checkpoint, manifest=changed, sources=sources)


def _keys(record: ParametrizedRecord, path: str) -> list[str]:
    """Keys of the tensors of its first parametrization, under one path of its module."""
    moved = dataclasses.replace(record, module=path)
    return [moved.link_key(0, role) for role in record.chain[0].tensors]
