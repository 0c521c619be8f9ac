"""Computed weights for a model that wants originals: a checkpoint whose missing state is worked out when asked for.

What `restore` then sees is a checkpoint like any other, so nothing else knows of such files.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from orthoserde import _torch, modes
from orthoserde.checkpoint import Checkpoint, DerivedTensor, TensorSource
from orthoserde.errors import ConfigError, DamagedFileError, Problem
from orthoserde.json_values import JSON
from orthoserde.keys import hook_prefixes, names_of, parts_by_prefix, prefixes_of
from orthoserde.manifest import TensorRecord
from orthoserde.registry import Registry
from orthoserde.registry.codec import Codec, residual_of
from orthoserde.tensor_bytes import DTYPES, Digest, digest_of, dtype_name, is_lossless
from orthoserde.transforms.rewriting import keep_aliases
from orthoserde.walk import Inventory, ParametrizedTensor, computed_originals, take_inventory
from orthoserde.weights.live import codecs_of

#: What to do with computed weights: take them, refuse them, or take damaged ones too, projected or as they are.
Legacy = Literal["inference", "refuse", "project", "keep"]


@dataclass
class ComputedWeight:
    """A parametrized tensor of the model of which the file has the computed weight alone.

    Attributes:
        name: Name of the tensor.
        key: Key of its weight in the file.
        source: The weight in the file.
        record: What the file says of it.
        codec: Codec of its one parametrization.
        config: Configuration of that parametrization in the model.
        dtype: dtype of its state in the model.
        twins: The weight under other names in the file, where the module of the model has several.
        action: What is done, in words.
        projected: Whether the weight is moved to the constraint first.
        kept: Whether the weight is off the constraint and taken as it is.
    """

    name: str
    key: str
    source: TensorSource
    record: TensorRecord
    codec: Codec
    config: Mapping[str, JSON]
    dtype: torch.dtype
    twins: tuple[TensorSource, ...] = ()
    action: str = "started afresh at the computed weight"
    projected: bool = False
    kept: bool = False
    _state: dict[str, Tensor] = field(default_factory=dict)

    def weight(self) -> Tensor:
        """The weight, on the CPU, in the file's precision."""
        weight = torch.empty(self.record.shape, dtype=DTYPES[self.record.dtype], device="cpu")
        # float8 and half precision hardly compute on the CPU; all of their values are float32's too.
        digest = Digest()
        self.source.fill(weight, digest.add)
        if self.record.digest not in (None, str(digest)):
            raise DamagedFileError(f"{self.key}: it changed while it was read")
        return weight.to(torch.float32) if weight.is_floating_point() and weight.element_size() < 4 else weight

    def take(self, role: str) -> Tensor:
        """One tensor of the state; it is worked out for all roles at once, and each is handed out and forgotten."""
        if role not in self._state:
            weight = self.weight()
            with modes.generators_kept():  # the codec may be the user's
                weight = self.codec.project(weight, self.config) if self.projected else weight
                self._state = self.codec.from_weight(weight.to(self.dtype), self.config)
        return self._state.pop(role)

    def check(self, legacy: Legacy) -> Problem | None:
        """Whether the weight is on the constraint, or what is to be done if it is not."""
        if self.twins and len({digest_of(source.blocks()) for source in (self.source, *self.twins)}) > 1:
            text = "one module in the model, with different computed weights under its names in the file"
            return Problem(self.name, "mismatch", f"{text}; untie the model to load both")
        weight = self.weight()
        if not bool(torch.isfinite(weight.abs()).all()):
            return Problem(
                self.name, "mismatch", "its computed weight in the file is not finite; use another checkpoint"
            )
        with modes.generators_kept():  # the codec may be the user's
            return self._judged(weight, legacy)

    def _judged(self, weight: Tensor, legacy: Legacy) -> Problem | None:
        """What is wrong with a weight, or is to be done with it."""
        if self.codec.admits(weight, self.config):
            return None
        residual = residual_of(self.codec, weight, self.config)
        distance = "" if residual is None else f" by {residual:.3g}"
        if legacy == "project":
            try:
                projected = self.codec.project(weight, self.config)
            except ConfigError as error:
                return Problem(self.name, "mismatch", str(error))
            if not self.codec.admits(projected, self.config):
                return Problem(
                    self.name, "mismatch", f"its computed weight is off the constraint{distance}, beyond repair"
                )
            self.projected = True
            self.action = f"{self.action}, which was off the constraint{distance} and was projected onto it"
            return None
        if legacy == "keep":
            try:
                self.codec.from_weight(weight.to(self.dtype), self.config)
            except ConfigError as error:
                return Problem(self.name, "mismatch", str(error))
            self.kept = True
            self.action = f"{self.action}, which is off the constraint{distance} and was kept so"
            return None
        return Problem(
            self.name,
            "mismatch",
            f"its computed weight in the file is off the constraint{distance}. Either it was saved from a model that "
            "never had the constraint, or training or rounding has taken it off. Use another checkpoint; or load it "
            "with legacy='project', which moves it to the constraint, or 'keep', where it can be kept as it is",
        )


@dataclass(frozen=True)
class Completed:
    """A checkpoint in which computed weights stand for state, and what could not be made of one."""

    checkpoint: Checkpoint
    weights: Mapping[str, ComputedWeight]
    problems: tuple[Problem, ...]


def complete_checkpoint(checkpoint: Checkpoint, inventory: Inventory, registry: Registry, legacy: Legacy) -> Completed:
    """Give a checkpoint the state that the model wants and that computed weights stand for.

    Args:
        checkpoint: Any checkpoint; where it has the state itself, nothing is done.
        inventory: What the model holds.
        registry: The user's classes.
        legacy: Whether computed weights are taken at all.
    """
    manifest = checkpoint.manifest
    recorded: set[str] = set()
    for stored in manifest.parametrized:
        recorded.update(stored.names)
    present = parts_by_prefix([*manifest.tensors, *manifest.aliases], hook_prefixes(inventory.hooked)).keys()
    tensors, aliases = dict(manifest.tensors), dict(manifest.aliases)
    sources = dict(checkpoint.sources)
    weights: dict[str, ComputedWeight] = {}
    problems: list[Problem] = []
    told = {problem.where: problem for problem in inventory.problems}
    for tensor in (*inventory.parametrized, *inventory.hooked):
        names = names_of(tensor)
        keys = [name for name in names if name in manifest and name not in inventory.slots]
        if not keys or recorded.intersection(names) or not present.isdisjoint(prefixes_of(tensor)):
            continue
        # Nothing can be made of it for what the walk has told, be it of an original or of what computes that.
        places = [tensor.name, *map(tensor.key, computed_originals(tensor))]
        known = next((told[place] for place in places if place in told), None)
        found = known or _computed_weight(checkpoint, tensor, keys[0], registry, legacy)
        if isinstance(found, Problem):
            problems.append(found)
            continue
        found.twins = tuple(
            checkpoint.sources[kept] for kept in dict.fromkeys(map(manifest.kept_key, keys[1:])) if kept != found.key
        )
        weights[tensor.name] = found
        for wanted, role, record in _wanted(tensor, found):
            tensors[wanted], sources[wanted] = record, DerivedTensor(functools.partial(found.take, role))
        for key in keys:
            tensors.pop(key, None)
            aliases.pop(key, None)
    if not weights:
        return Completed(checkpoint, weights, tuple(problems))
    keep_aliases(checkpoint, tensors, aliases, sources)
    completed = dataclasses.replace(manifest, tensors=tensors, aliases=aliases)
    return Completed(dataclasses.replace(checkpoint, manifest=completed, sources=sources), weights, tuple(problems))


def _computed_weight(
    checkpoint: Checkpoint, tensor: ParametrizedTensor, key: str, registry: Registry, legacy: Legacy
) -> ComputedWeight | Problem:
    def refused(text: str) -> Problem:
        return Problem(tensor.name, "mismatch", f"the file has its computed weight alone, {text}")

    if legacy == "refuse":
        return refused("which legacy='refuse' does not take")
    links = [_torch.unwrap(link) for link in tensor.parametrizations]
    codec = codecs_of(tensor, registry)[0]
    if len(links) != 1:
        return refused(f"which does not determine the state of {len(links)} parametrizations in a row")
    name = _torch.class_before_parametrizations(links[0]).__qualname__
    if codec is None:
        return refused(f"which does not determine the state of the unregistered {name}")
    config = codec.config(links[0])
    if config is None or not codec.recovers(config):
        return refused(f"from which the state of {codec.kind} cannot be recovered in this configuration")
    kept = checkpoint.manifest.kept_key(key)
    record = checkpoint.manifest.tensors[kept]
    shape = codec.shape({name: original.shape for name, original in tensor.originals.items()})
    if shape is not None and record.shape != tuple(shape):
        return refused(f"of shape {list(record.shape)}, the model has {list(shape)}")
    dtype = next(iter(tensor.originals.values())).dtype
    if not is_lossless(record.dtype, dtype_name(dtype)):
        return refused(f"in {record.dtype}, which the model's {dtype_name(dtype)} cannot hold exactly")
    return ComputedWeight(tensor.name, key, checkpoint.sources[kept], record, codec, config, dtype)


def _wanted(tensor: ParametrizedTensor, found: ComputedWeight) -> Iterator[tuple[str, str, TensorRecord]]:
    """Key, role and record of every tensor that the model has, or has None in the place of."""
    for role, original in tensor.originals.items():
        yield tensor.key(role), role, _record(original, found, parameter=tensor.parameter)
    for role, slot in take_inventory(tensor.parametrizations[0]).slots.items():
        like = slot.tensor
        if like is None:
            meta = torch.empty(found.record.shape, dtype=found.dtype, device="meta")
            like = found.codec.from_weight(meta, found.config).get(role)
        if like is not None:
            yield tensor.key(f"0.{role}"), role, _record(like, found, parameter=slot.parameter)


def _record(like: Tensor, found: ComputedWeight, parameter: bool) -> TensorRecord:
    return TensorRecord(dtype_name(found.dtype), tuple(like.shape), tuple(like.stride()), parameter)
