"""What a load says when it refuses: everything that does not fit, and what to do about it."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from torch import nn

from orthoserde import _torch
from orthoserde.checkpoint import Checkpoint
from orthoserde.errors import IncompatibleModelError, Problem
from orthoserde.manifest import Manifest
from orthoserde.restore.plan import Plan
from orthoserde.wording import counted

_AS_SAVED = "make the model as it was when it was saved"

#: Wrappers in wrappers that are looked through.
_DEPTH = 4

#: What AveragedModel has beside its module.
_AVERAGED = "n_averaged"


@dataclass(frozen=True)
class Refusal:
    """Refuses a load.

    Attributes:
        checkpoint: What is loaded.
        model: What it is loaded into.
        keys: All keys of the model.
        strict: Whether keys of one side are problems.
    """

    checkpoint: Checkpoint
    model: nn.Module
    keys: Collection[str]
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
        if plan.problems or not (plan.writes or plan.makes):  # strict=False would not do, or do nothing
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
        theirs = _keys_of(self.checkpoint.manifest)
        averaged = _AVERAGED in theirs and _AVERAGED not in self.keys
        wrapped = _prefix(theirs - {_AVERAGED} if averaged else theirs, self.keys)
        if wrapped:
            # A registered wrapper is one by its class, and in a ModuleDict not every name can stand.
            around = {".".join(wrapped[:i]) for i in range(len(wrapped))}
            known = any(record.path in around for record in self.checkpoint.manifest.modules)
            if known or any(hasattr(nn.ModuleDict, name) for name in wrapped):
                return ""
            if averaged:
                target = "torch.optim.swa_utils.AveragedModel(model)"
                return f"its keys are those of an averaged model: load into {target}; " if wrapped == ["module"] else ""
            target = "model"
            for name in reversed(wrapped):
                target = f"nn.ModuleDict({{{name!r}: {target}}})"
            return f"all keys of the file begin with {'.'.join(wrapped) + '.'!r}: load into {target}; "
        within = _prefix(self.keys, theirs)
        if within:
            path = ".".join(within)
            return f"all keys of the model begin with {path + '.'!r}: load into model.get_submodule({path!r}); "
        return ""


def _keys_of(manifest: Manifest) -> set[str]:
    """Keys of the model that was saved."""
    inside = {*manifest.tensors, *manifest.aliases, *manifest.left_out}
    return inside.difference(manifest.computed, manifest.training_keys)


def _prefix(longer: Collection[str], shorter: Collection[str]) -> list[str]:
    """Names that all of some keys begin with, and behind which they are the other keys; empty if there are none."""
    if not longer or not shorter:
        return []
    first, *others = [key.split(".")[:-1] for key in longer]
    wanted = _tensors_of(shorter)
    for depth in range(1, min(len(first), _DEPTH) + 1):
        names = first[:depth]
        if any(other[:depth] != names for other in others):
            break
        if _tensors_of(key.split(".", depth)[depth] for key in longer) == wanted:
            return names
    return []


def _tensors_of(keys: Iterable[str]) -> set[str]:
    """Names of tensors, those of parametrized ones for the keys that they are made of."""
    return {_tensor_of(key) for key in keys}


def _tensor_of(key: str) -> str:
    parts = key.split(".")
    if "parametrizations" not in parts[:-1]:
        return key
    i = parts.index("parametrizations")
    return ".".join([*parts[:i], parts[i + 1]])


__all__ = ["Refusal"]
