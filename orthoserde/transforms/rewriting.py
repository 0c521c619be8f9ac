"""Put other tensors in the places of some that a checkpoint stores, with all that refers to them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from orthoserde.checkpoint import Checkpoint, TensorSource
from orthoserde.manifest import ParametrizedRecord, TensorRecord, join

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


def rename(checkpoint: Checkpoint, keys: Mapping[str, str], records: Mapping[str, ParametrizedRecord]) -> Checkpoint:
    """Give tensors other keys, also where training state speaks of them.

    Args:
        checkpoint: Where they have the old ones.
        keys: New keys by old ones; none of the new ones is taken.
        records: What becomes of the records of parametrized tensors, by name.

    Returns:
        A checkpoint of the same origin; the given one if there is nothing to rename.
    """
    if not keys:
        return checkpoint
    manifest = checkpoint.manifest
    training = manifest.training
    changed = dataclasses.replace(
        manifest,
        tensors={keys.get(key, key): record for key, record in manifest.tensors.items()},
        aliases={keys.get(alias, alias): keys.get(kept, kept) for alias, kept in manifest.aliases.items()},
        parametrized=tuple(
            records.get(record.name) or _with_renamed_parts(record, keys) for record in manifest.parametrized
        ),
        left_out=tuple(keys.get(key, key) for key in manifest.left_out),
        training=None if training is None else training.renamed(keys),
    )
    sources = {keys.get(key, key): source for key, source in checkpoint.sources.items()}
    return dataclasses.replace(checkpoint, manifest=changed, sources=sources)


def keep_aliases(
    checkpoint: Checkpoint,
    tensors: dict[str, TensorRecord],
    aliases: dict[str, str],
    sources: dict[str, TensorSource],
) -> None:
    """Let tensors whose key has been taken off stay under their other keys, the first of which is theirs then.

    Args:
        checkpoint: What was before.
        tensors: What is left; completed in place.
        aliases: The other keys that are left; mended in place.
        sources: Of what is left; completed in place.
    """
    moved: dict[str, str] = {}
    for alias, kept in list(aliases.items()):
        if kept in moved:
            aliases[alias] = moved[kept]
        elif kept not in tensors:
            del aliases[alias]
            moved[kept] = alias
            tensors.setdefault(alias, checkpoint.manifest.tensors[kept])
            sources.setdefault(alias, checkpoint.sources[kept])


def _with_renamed_parts(record: ParametrizedRecord, keys: Mapping[str, str]) -> ParametrizedRecord:
    """What becomes of the record of a tensor whose parametrizations hold tensors that are renamed."""

    def renamed(index: int, role: str) -> str:
        key = record.link_key(index, role)
        prefix = f"{join(record.module, 'parametrizations', record.tensor_name, str(index))}."
        return keys[key].removeprefix(prefix) if key in keys else role

    chain = tuple(
        dataclasses.replace(link, tensors={renamed(i, role): how for role, how in link.tensors.items()})
        for i, link in enumerate(record.chain)
    )
    return record if chain == record.chain else dataclasses.replace(record, chain=chain)


def _keys(record: ParametrizedRecord, path: str) -> list[str]:
    """Keys of the tensors of its first parametrization, under one path of its module."""
    return [record.at(path).link_key(0, role) for role in record.chain[0].tensors]
