"""One state under the keys of torch's older hooks, or under those of its parametrizations.

The tensors are the same, bit for bit; only their names differ. Which names a hook has, the codecs of its kind know
(:data:`orthoserde.manifest.HOOK_SUFFIXES`). What training makes of them may differ, see Note [Power method] in
`orthoserde.parametrizations.hooks`.

Note [By its keys]
A file without configuration does not say what its tensors are of. Keys such as ``weight_g`` and ``weight_v``, or
``original0`` and ``original1``, are taken for those of weight normalisation if their shapes are such as it has, and
those of spectral normalisation likewise: no other parametrization of torch has these keys.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from orthoserde.checkpoint import Checkpoint
from orthoserde.json_values import JSON
from orthoserde.keys import parts_by_prefix
from orthoserde.manifest import (
    DENSE,
    HOOK,
    HOOK_SUFFIXES,
    SPECTRAL_NORM,
    Manifest,
    ParametrizationRecord,
    ParametrizedRecord,
    join,
)
from orthoserde.parametrizations.hooks import configs_by_shapes
from orthoserde.transforms.rewriting import rename


@dataclass(frozen=True)
class NormedTensor:
    """A tensor of a checkpoint that a hook or a parametrization of one of the kinds with hooks computes.

    Attributes:
        paths: Paths of its module.
        tensor_name: Its name.
        kind: The kind.
        hooked: Whether its tensors have the names of a hook.
    """

    paths: tuple[str, ...]
    tensor_name: str
    kind: str
    hooked: bool

    @property
    def name(self) -> str:
        """Dotted name of the tensor, under the first path."""
        return join(self.paths[0], self.tensor_name)

    @property
    def names(self) -> list[str]:
        """Its name under each path."""
        return [join(path, self.tensor_name) for path in self.paths]

    def keys(self, path: str, *, hooked: bool) -> dict[str, str]:
        """Keys of its tensors under one path, by the name of an original or the role in the parametrization."""
        return {
            part: join(path, f"{self.tensor_name}{suffix}" if hooked else self._parametrized(part))
            for part, suffix in HOOK_SUFFIXES[self.kind].items()
        }

    def _parametrized(self, part: str) -> str:
        return join("parametrizations", self.tensor_name, part if part.startswith("original") else f"0.{part}")


def to_hooks(checkpoint: Checkpoint, names: Collection[str] | None = None) -> Checkpoint:
    """Give tensors the keys that torch's older hooks give them, where there is such a hook.

    Args:
        checkpoint: Any checkpoint; of one without configuration, see Note [By its keys].
        names: Names of the tensors that are computed from them; all by default.

    Returns:
        A checkpoint of the same origin. Vectors and complex tensors under spectral normalisation, for which the hook
        and the parametrization are two things, stay as they are, and all of other kinds.
    """
    return convert(checkpoint, _chosen(checkpoint, names, hooked=False), hooked=True)


def to_parametrizations(checkpoint: Checkpoint, names: Collection[str] | None = None) -> Checkpoint:
    """Give tensors the keys that torch's parametrizations give them instead of those of its older hooks.

    Args:
        checkpoint: Any checkpoint; of one without configuration, see Note [By its keys].
        names: Names of the tensors that are computed from them; all by default.

    Returns:
        A checkpoint of the same origin.
    """
    return convert(checkpoint, _chosen(checkpoint, names, hooked=True), hooked=False)


def hook_keys(manifest: Manifest) -> dict[str, str]:
    """Keys of torch's older hooks in a checkpoint, by those that :func:`to_parametrizations` gives the tensors."""
    return {
        after: key
        for tensor in normed_tensors(manifest)
        for path in tensor.paths
        for key, after in zip(
            tensor.keys(path, hooked=True).values(), tensor.keys(path, hooked=False).values(), strict=True
        )
        if tensor.hooked and key in manifest and after not in manifest
    }


def convert(checkpoint: Checkpoint, chosen: Iterable[NormedTensor], *, hooked: bool) -> Checkpoint:
    """Give these tensors the keys of hooks, or of parametrizations."""
    keys: dict[str, str] = {}
    records: dict[str, ParametrizedRecord] = {}
    manifest = checkpoint.manifest
    recorded = {record.name: record for record in manifest.parametrized}
    left_out = set(manifest.left_out)
    for tensor in chosen:
        moves = {
            key: after
            for path in tensor.paths
            for key, after in zip(
                tensor.keys(path, hooked=not hooked).values(), tensor.keys(path, hooked=hooked).values(), strict=True
            )
            if key in manifest or key in left_out
        }
        if any(after in manifest for after in moves.values()):
            continue  # the names are taken: this is something else
        keys |= moves
        if tensor.name in recorded:
            records[tensor.name] = _recoded(recorded[tensor.name], HOOK if hooked else DENSE)
    return rename(checkpoint, keys, records)


def normed_tensors(manifest: Manifest) -> Iterator[NormedTensor]:
    """What has a form with hooks, by its record, or where there is no configuration by its keys."""
    if not manifest.has_configuration:
        yield from _by_keys(manifest)
    for record in manifest.parametrized:
        kind = record.chain[0].kind
        suffixes = HOOK_SUFFIXES.get(kind)
        if suffixes is None or len(record.chain) > 1 or {*record.originals, *record.chain[0].tensors} != set(suffixes):
            continue
        if not (kind == SPECTRAL_NORM and (record.dtype or "").startswith("complex")):
            yield NormedTensor((record.module, *record.aliases), record.tensor_name, kind, record.hooked)


def _chosen(checkpoint: Checkpoint, names: Collection[str] | None, *, hooked: bool) -> list[NormedTensor]:
    found = [tensor for tensor in normed_tensors(checkpoint.manifest) if tensor.hooked == hooked]
    return [tensor for tensor in found if names is None or tensor.name in names]


def _by_keys(manifest: Manifest) -> Iterator[NormedTensor]:
    everything = [*manifest.tensors, *manifest.aliases]
    parts = parts_by_prefix(everything, {})
    found: dict[tuple[object, ...], NormedTensor] = {}
    for key in everything:
        for kind in HOOK_SUFFIXES:
            for hooked in (False, True):
                tensor = _named_after(key, kind, hooked)
                if tensor is None or not configs_of(manifest, tensor):
                    continue
                keys = tensor.keys(tensor.paths[0], hooked=hooked).values()
                if hooked or set(parts[key.rpartition(".")[0]]) == set(keys):
                    # The same tensors under several paths are those of one module.
                    stored = (tensor.tensor_name, kind, hooked, *map(manifest.kept_key, keys))
                    others = found[stored].paths if stored in found else ()
                    found[stored] = dataclasses.replace(tensor, paths=(*others, *tensor.paths))
    yield from found.values()


def _named_after(key: str, kind: str, hooked: bool) -> NormedTensor | None:
    """The tensor that a key would be the first part of."""
    path, _, last = key.rpartition(".")
    part, suffix = next(iter(HOOK_SUFFIXES[kind].items()))
    if hooked:
        name = last.removesuffix(suffix)
        return NormedTensor((path,), name, kind, hooked) if name and name != last else None
    parents = path.split(".")
    if last != part or len(parents) < 2 or parents[-2] != "parametrizations":
        return None
    return NormedTensor((".".join(parents[:-2]),), parents[-1], kind, hooked)


def configs_of(manifest: Manifest, tensor: NormedTensor) -> list[dict[str, JSON]]:
    """Configurations that the shapes of its tensors allow; none if they are not such as its kind has."""
    keys = tensor.keys(tensor.paths[0], hooked=tensor.hooked)
    if not all(key in manifest for key in keys.values()):
        return []
    records = {part: manifest.tensors[manifest.kept_key(key)] for part, key in keys.items()}
    if tensor.kind == SPECTRAL_NORM and any(record.dtype.startswith("complex") for record in records.values()):
        return []
    return configs_by_shapes(tensor.kind, {part: record.shape for part, record in records.items()})


def _recoded(record: ParametrizedRecord, encoding: str) -> ParametrizedRecord:
    link = record.chain[0]
    chain = ParametrizationRecord(
        link.kind, link.version, link.config, link.class_name, dict.fromkeys(link.tensors, encoding)
    )
    return dataclasses.replace(record, originals=dict.fromkeys(record.originals, encoding), chain=(chain,))
