"""What a load says when it refuses: everything that does not fit, and what to do about it."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import nn

from orthoserde import _torch
from orthoserde.checkpoint import Checkpoint
from orthoserde.errors import IncompatibleModelError, Problem
from orthoserde.manifest import HOOK_SUFFIXES, Manifest
from orthoserde.restore.plan import Plan
from orthoserde.walk import Slot
from orthoserde.wording import counted

_AS_SAVED = "make the model as it was when it was saved"

#: Wrappers in wrappers that are looked through.
_DEPTH = 4

#: What older hooks add to the name of a tensor.
_HOOKED = frozenset(suffix for suffixes in HOOK_SUFFIXES.values() for suffix in suffixes.values())

#: What AveragedModel has beside its module.
_AVERAGED = "n_averaged"


@dataclass(frozen=True)
class Refusal:
    """Refuses a load.

    Attributes:
        checkpoint: What is loaded.
        model: What it is loaded into.
        slots: All tensors of the model by key.
        strict: Whether keys of one side are problems.
    """

    checkpoint: Checkpoint
    model: nn.Module
    slots: Mapping[str, Slot]
    strict: bool

    def check(self, plan: Plan) -> None:
        """Refuse if anything keeps the load from being done.

        Raises:
            IncompatibleModelError: With all that does.
        """
        problems = list(plan.problems)
        if self.strict:
            problems += [Problem(key, "missing", "in the model, not in the file") for key in plan.missing]
            problems += [Problem(key, "unexpected", "in the file, not in the model") for key in plan.unexpected]
        if problems:
            name = _torch.class_before_parametrizations(_torch.unwrap(self.model)).__qualname__
            advice = self._prefix_advice(plan) or self._kind_advice(plan) or self._advice(plan)
            raise IncompatibleModelError(
                f"{self.checkpoint.origin} does not fit {name}, nothing was loaded; "
                f"{advice}{counted(len(problems), 'problem')}:",
                problems,
            )

    def _advice(self, plan: Plan) -> str:
        """What to do; empty where each problem says so itself."""
        one_sided = self.strict and (plan.missing or plan.unexpected)
        if plan.differs or (plan.missing and plan.unexpected and one_sided):
            return f"{_AS_SAVED}; "
        if not one_sided:
            return ""
        if plan.problems or not (plan.writes or plan.makes):  # strict=False might not do, or load nothing
            return f"{_AS_SAVED}; "
        side = "model" if plan.missing else "file"
        return f"{_AS_SAVED}, or let strict=False leave out what only the {side} has; "

    def _kind_advice(self, plan: Plan) -> str:
        """Say what the file is of, if nothing in it is anything of the model's."""
        manifest = self.checkpoint.manifest
        outermost = min(manifest.modules, key=lambda record: record.path.count(".") + bool(record.path), default=None)
        if outermost is None or not set(manifest.tensors) <= {*plan.unexpected, *manifest.computed}:
            return ""
        here = [path for path, kind in plan.kinds.items() if kind == outermost.kind]
        if not here:
            return f"it holds a {outermost.kind}, and the model none: {_AS_SAVED}; "
        place = "is the model itself" if here[0] == "" else f"is at {here[0]!r}, so load into that part"
        theirs = outermost.path or "the root"
        return f"it holds a {outermost.kind} at {theirs!r}; that of the model {place}; "

    def _prefix_advice(self, plan: Plan) -> str:
        """Say so if the keys of one side are those of the other behind a prefix, as after saving a wrapped model."""
        if not (self.strict and plan.missing and plan.unexpected):
            return ""
        theirs, ours = _tensors_in(self.checkpoint.manifest), _tensors_of(self.slots)
        averaged = _AVERAGED in theirs and _AVERAGED not in ours
        wrapped = _prefix([tensor for key, tensor in theirs.items() if not averaged or key != _AVERAGED], ours.values())
        if wrapped:
            # A registered wrapper is one by its class, and in a ModuleDict not every name can stand.
            around = {".".join(wrapped[:i]) for i in range(len(wrapped))}
            known = any(record.path in around for record in self.checkpoint.manifest.modules)
            if known or any(not name or hasattr(nn.ModuleDict(), name) for name in wrapped):
                return ""
            if averaged:
                kind = "torch.optim.swa_utils.AveragedModel"
                advice = f"load into averaged = {kind}(model), which is a copy, and use averaged.module"
                return f"its keys are those of an averaged model: {advice}; " if wrapped == ["module"] else ""
            target = "model"
            for name in reversed(wrapped):
                target = f"nn.ModuleDict({{{name!r}: {target}}})"
            return f"all keys of the file begin with {'.'.join(wrapped) + '.'!r}: load into {target}; "
        within = _prefix(ours.values(), theirs.values())
        if within:
            path = ".".join(within)
            return f"all keys of the model begin with {path + '.'!r}: load into model.get_submodule({path!r}); "
        return ""


@dataclass(frozen=True, slots=True)
class _Tensor:
    """What is compared of a tensor.

    Attributes:
        key: Its key.
        shape: Its shape; None where it is not known.
        identity: The same for each key of one tensor.
    """

    key: str
    shape: tuple[int, ...] | None
    identity: object


def _tensors_in(manifest: Manifest) -> dict[str, _Tensor]:
    """Tensors of the model that was saved, those too that are left out of the file."""
    keys = {*manifest.tensors, *manifest.aliases, *manifest.left_out}
    found = {}
    for key in keys.difference(manifest.computed, manifest.training_keys):
        record = manifest.tensors.get(manifest.kept_key(key))
        found[key] = _Tensor(key, None if record is None else record.shape, manifest.kept_key(key))
    return found


def _tensors_of(slots: Mapping[str, Slot]) -> dict[str, _Tensor]:
    return {
        key: _Tensor(key, None if slot.tensor is None else tuple(slot.tensor.shape), id(slot.tensor))
        for key, slot in slots.items()
    }


def _prefix(longer: Collection[_Tensor], shorter: Collection[_Tensor]) -> list[str]:
    """Names that all of some keys begin with, and behind which they are the other keys; empty if there are none."""
    if not longer or not shorter:
        return []
    first, *others = [tensor.key.split(".")[:-1] for tensor in longer]
    for depth in range(1, min(len(first), _DEPTH) + 1):
        names = first[:depth]
        if any(other[:depth] != names for other in others):
            break
        stripped = [dataclasses.replace(tensor, key=tensor.key.split(".", depth)[depth]) for tensor in longer]
        if _alike(stripped, shorter):
            return names
    return []


def _alike(some: Collection[_Tensor], others: Collection[_Tensor]) -> bool:
    """Whether tensors are those of one model, in whatever form, tied ones under one of their keys or all."""
    shapes = {tensor.key: tensor.shape for tensor in some}
    for other in others:
        shape = shapes.get(other.key)
        if shape is not None and other.shape is not None and shape != other.shape:
            return False
    here, there = {_name(tensor.key) for tensor in some}, {_name(tensor.key) for tensor in others}
    here, there = {_unhooked(name, there) for name in here}, {_unhooked(name, here) for name in there}
    return not here.isdisjoint(there) and _is_within(some, there) and _is_within(others, here)


def _is_within(tensors: Collection[_Tensor], names: Collection[str]) -> bool:
    """Whether each tensor, under one of its keys at least, is part of one of these names."""
    inside = {tensor.identity for tensor in tensors if _unhooked(_name(tensor.key), names) in names}
    return all(tensor.identity in inside for tensor in tensors)


def _name(key: str) -> str:
    """Name of the tensor that a key is a part of, if that is parametrized; else the key."""
    parts = key.split(".")
    if "parametrizations" not in parts[:-1]:
        return key
    i = parts.index("parametrizations")
    return ".".join([*parts[:i], parts[i + 1]])


def _unhooked(name: str, others: Collection[str]) -> str:
    """Name of the tensor that an older hook computes from what has this name; that itself where there is none."""
    base, mark, suffix = name.rpartition("_")
    return base if mark + suffix in _HOOKED and name not in others and base in others else name


__all__ = ["Refusal"]
