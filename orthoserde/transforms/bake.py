"""Computed weights in the place of the state that they are computed from: what serving needs, and no more."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from orthoserde import modes
from orthoserde.checkpoint import Checkpoint, DerivedTensor, TensorSource
from orthoserde.errors import ConfigError, Problem
from orthoserde.keys import plainly_parametrized
from orthoserde.manifest import (
    DENSE,
    HOOK,
    SPECTRAL_NORM,
    ParametrizationRecord,
    ParametrizedRecord,
    TensorRecord,
    join,
)
from orthoserde.parametrizations import BUILT_IN_CODECS
from orthoserde.parametrizations.hooks import power_method_error
from orthoserde.registry import Registry
from orthoserde.tensor_bytes import contiguous_strides, dtype_name
from orthoserde.transforms.canonical import expand
from orthoserde.transforms.forms import NormedTensor, configs_of, normed_tensors
from orthoserde.transforms.rewriting import keep_aliases
from orthoserde.weights.stored import Misfit, NotComputable, dry_run, resolve, weight_of
from orthoserde.wording import counted

#: Bytes that one stored tensor or intermediate result may have: a float32 base of 32,768 rows.
SCRATCH_BYTES = 4 << 30

#: How far, relative to its length, the first vector may be from what the power method makes of the second.
SETTLED = 0.5


@dataclass(frozen=True)
class _Baked:
    """One computed tensor that takes the place of its state."""

    record: ParametrizedRecord
    stored: TensorRecord
    source: TensorSource


def bake(checkpoint: Checkpoint, registry: Registry, names: Collection[str] | None = None) -> Checkpoint:
    """Let computed tensors stand in the place of what they are computed from, as plain ones.

    They have the values of evaluation mode. Training state goes, because it belongs to what is left out.

    Args:
        checkpoint: Any checkpoint. Of one without configuration, what weight and spectral normalisation have is known
            by its keys (see Note [By its keys] in `orthoserde.transforms.forms`).
        registry: The user's classes.
        names: Names of the tensors; all by default.

    Returns:
        A checkpoint of the same origin. Its computed tensors are worked out when they are asked for.

    Raises:
        ConfigError: What some tensor computes to is not known; all of them are listed.
    """
    checkpoint = checkpoint.without_training()
    expanded = expand(checkpoint)
    baked: list[_Baked] = []
    problems: list[Problem] = []
    records = list(_records(expanded))
    chosen = [record for record in records if names is None or record.name in names]
    outer = {join(record.module, "parametrizations", record.tensor_name) for record in chosen}
    inner = {join(record.module, "parametrizations", record.tensor_name) for record in records} - outer
    with modes.ordinary():
        for record in chosen:
            around = _parents(record.module)
            if not around.isdisjoint(inner):
                problems.append(Problem(record.name, "unsupported", "part of a parametrization that stays"))
            elif around.isdisjoint(outer):  # else it goes with what it is part of
                try:
                    baked.append(_bake(expanded, record, registry))
                except (NotComputable, Misfit) as reason:
                    problems.append(Problem(record.name, "unsupported", str(reason)))
    if names is None:
        problems += _unexplained(checkpoint, {name for record in chosen for name in record.names})
    if problems:
        raise ConfigError(_listed(checkpoint.origin, problems))
    return _replace(expanded, baked)


def _listed(origin: str, problems: Collection[Problem]) -> str:
    lines = "".join(f"\n  - {problem.where}: {problem.text}" for problem in problems)
    tensors = counted(len(problems), "tensor")
    advice = "load it into its model, in float32, and call orthoserde.bake_ on that"
    return f"{origin}: {tensors} cannot be computed from the file alone; {advice}:{lines}"


def _records(checkpoint: Checkpoint) -> Iterator[ParametrizedRecord]:
    """What is computed, with records as a file with configuration would have them."""
    manifest = checkpoint.manifest
    yield from manifest.parametrized
    if not manifest.has_configuration:
        for tensor in normed_tensors(manifest):
            yield _record_of(checkpoint, tensor)


def _parents(path: str) -> set[str]:
    """A path and those of all modules that it is in."""
    parts = path.split(".")
    return {".".join(parts[: i + 1]) for i in range(len(parts))}


def _record_of(checkpoint: Checkpoint, tensor: NormedTensor) -> ParametrizedRecord:
    """The record of a tensor that is known by its keys.

    The shapes of its tensors may allow several configurations. Those of weight normalisation then all compute the same
    but for rounding, for they differ in dimensions of size 1. Of those of spectral normalisation, the vectors fit one.
    """
    manifest = checkpoint.manifest
    keys = tensor.keys(tensor.paths[0], hooked=tensor.hooked)
    last = [part for part in keys if part.startswith("original")][-1]
    weight = manifest.tensors[manifest.kept_key(keys[last])]
    configs = configs_of(manifest, tensor)
    if tensor.kind == SPECTRAL_NORM and len(configs) > 1:
        original, u, v = (checkpoint.tensor(keys[part]) for part in ("original", "_u", "_v"))
        errors = [power_method_error(original, u, v, int(str(config["dim"]))) for config in configs]
        best = min(range(len(errors)), key=errors.__getitem__)
        configs = [configs[best]] if errors[best] < SETTLED else []
    encoding = HOOK if tensor.hooked else DENSE
    originals = {part: encoding for part in keys if part.startswith("original")}
    own = {part: encoding for part in keys if part not in originals}
    link = ParametrizationRecord(tensor.kind, 1, configs[0] if configs else None, None, own)
    return ParametrizedRecord(
        *(tensor.paths[0], tensor.tensor_name, tensor.paths[1:], weight.shape, weight.dtype, True, False),
        originals=originals,
        chain=(link,),
    )


def _bake(checkpoint: Checkpoint, record: ParametrizedRecord, registry: Registry) -> _Baked:
    """One computed tensor.

    Raises:
        NotComputable: What it computes to is not known.
        Misfit: Its state and its configuration contradict each other.
    """
    manifest = checkpoint.manifest
    taken = next((name for name in record.names if name in manifest and name not in manifest.computed_keys), None)
    if taken is not None:
        raise Misfit(f"the file also has a tensor {taken!r}, and does not say that it is the computed one")
    originals = [manifest.tensors[manifest.kept_key(record.original_key(name))] for name in record.originals]
    trained = any(original.requires_grad for original in originals)
    if record.name in manifest.computed_keys:
        stored = manifest.tensors[record.name]
        return _Baked(
            record,
            dataclasses.replace(stored, parameter=record.parameter, requires_grad=trained),
            checkpoint.sources[record.name],
        )
    links = resolve(record, registry, registered=True)
    limit = max(SCRATCH_BYTES, manifest.nbytes)
    compute: Callable[[], Tensor] = functools.partial(weight_of, checkpoint, record, links, limit)
    if all(link.codec in BUILT_IN_CODECS for link in links):
        dry = dry_run(checkpoint, record, links, limit)
        (shape, dtype), compute = _form(dry.weight), dry.compute
    elif record.shape is None or record.dtype is None:
        shape, dtype = _form(compute())
    else:
        shape, dtype = record.shape, record.dtype
    if record.dtype not in (None, dtype):
        raise Misfit(f"recorded with dtype {record.dtype}, its state gives {dtype}")
    stored = TensorRecord(dtype, shape, contiguous_strides(shape), record.parameter, requires_grad=trained)
    return _Baked(record, stored, DerivedTensor(functools.partial(_computed, checkpoint.origin, record, compute)))


def _form(weight: Tensor) -> tuple[tuple[int, ...], str]:
    return tuple(weight.shape), dtype_name(weight.dtype)


def _computed(origin: str, record: ParametrizedRecord, compute: Callable[[], Tensor]) -> Tensor:
    """The computed tensor, row-major.

    Raises:
        ConfigError: It cannot be computed.
    """
    try:
        with modes.ordinary(), torch.no_grad():
            weight = compute()
    except (NotComputable, Misfit) as reason:
        raise ConfigError(_listed(origin, [Problem(record.name, "unsupported", str(reason))])) from reason
    if record.dtype is not None and dtype_name(weight.dtype) != record.dtype:
        text = f"recorded with dtype {record.dtype}, its state gives {dtype_name(weight.dtype)}"
        raise ConfigError(_listed(origin, [Problem(record.name, "unsupported", text)]))
    return weight.detach()


def _unexplained(checkpoint: Checkpoint, known: Collection[str]) -> Iterator[Problem]:
    """Keys of parametrizations of which nothing is known."""
    manifest = checkpoint.manifest
    for name in () if manifest.has_configuration else plainly_parametrized([*manifest.tensors, *manifest.aliases]):
        if name not in known:
            yield Problem(name, "unsupported", "the file does not say what its parametrizations are")


def _replace(checkpoint: Checkpoint, baked: Collection[_Baked]) -> Checkpoint:
    """Put computed tensors in the places of their state."""
    manifest = checkpoint.manifest
    gone: set[str] = set()
    inside: list[str] = []
    tensors: dict[str, TensorRecord] = {}
    first: dict[str, _Baked] = {}
    aliases = dict(manifest.aliases)
    for each in baked:
        record = each.record
        for path in (record.module, *record.aliases):
            gone.update(record.at(path).tensor_keys())
            inside.append(f"{join(path, 'parametrizations', record.tensor_name)}.")
        first[record.original_key(next(iter(record.originals)))] = each
        aliases |= {join(path, record.tensor_name): record.name for path in record.aliases}

    def goes(name: str) -> bool:
        return name in gone or name.startswith(tuple(inside))

    places = {manifest.kept_key(key): each for key, each in first.items()}
    sources: dict[str, TensorSource] = {}
    computed = {each.record.name for each in baked}
    for key, stored in manifest.tensors.items():
        if key in places:
            name = places[key].record.name
            tensors[name], sources[name] = places[key].stored, places[key].source
        if not goes(key) and key not in computed:
            tensors[key], sources[key] = stored, checkpoint.sources[key]
    for each in baked:
        tensors.setdefault(each.record.name, each.stored)
        sources.setdefault(each.record.name, each.source)
    aliases = {alias: kept for alias, kept in aliases.items() if not goes(alias)}
    keep_aliases(checkpoint, tensors, aliases, sources)
    changed = dataclasses.replace(
        manifest,
        tensors=tensors,
        aliases=aliases,
        parametrized=tuple(rec for rec in manifest.parametrized if rec.name not in computed and not goes(rec.name)),
        modules=tuple(record for record in manifest.modules if not goes(record.path)),
        computed=tuple(key for key in manifest.computed if key not in computed and not goes(key)),
    )
    return dataclasses.replace(checkpoint, manifest=changed, sources=sources)
