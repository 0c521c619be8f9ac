"""What a load says when it refuses: everything that does not fit, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from orthoserde import _torch
from orthoserde.checkpoint import Checkpoint
from orthoserde.errors import IncompatibleModelError, Problem
from orthoserde.restore.plan import Plan
from orthoserde.wording import counted

#: Under these names wrappers hold a model: DataParallel and DDP, torch.compile, activation checkpointing.
_WRAPPED = ("module.", "_orig_mod.", "_checkpoint_wrapped_module.")


@dataclass(frozen=True)
class Refusal:
    """Refuses a load.

    Attributes:
        checkpoint: What is loaded.
        model: What it is loaded into.
        strict: Whether keys of one side are problems.
        differs: Whether the model itself is made otherwise than the one that was saved.
    """

    checkpoint: Checkpoint
    model: nn.Module
    strict: bool
    differs: bool

    def if_needed(self, plan: Plan) -> None:
        """Raise if anything keeps the load from being done.

        Raises:
            IncompatibleModelError: With all that does.
        """
        problems = list(plan.problems)
        missing, unexpected = (plan.missing, plan.unexpected) if self.strict else ([], [])
        problems += [Problem(key, "missing", "in the model, not in the file") for key in missing]
        problems += [Problem(key, "unexpected", "in the file, not in the model") for key in unexpected]
        if problems:
            name = _torch.class_before_parametrizations(_torch.unwrap(self.model)).__qualname__
            advice = _prefix_advice(missing, unexpected) or self._kind_advice(plan) or self._advice(plan)
            raise IncompatibleModelError(
                f"{self.checkpoint.origin} does not fit {name}, nothing was loaded; "
                f"{advice}{counted(len(problems), 'problem')}:",
                problems,
            )

    def _advice(self, plan: Plan) -> str:
        if self.differs:
            return "make the model as it was when it was saved; "
        if self.strict and (plan.missing or plan.unexpected):
            return "make the model as it was when it was saved, or let strict=False leave out keys of one side; "
        return ""  # each problem says what to do

    def _kind_advice(self, plan: Plan) -> str:
        """Say what the file is of, if nothing in it is anything of the model's."""
        manifest = self.checkpoint.manifest
        outermost = min(manifest.modules, key=lambda record: record.path.count(".") + bool(record.path), default=None)
        if outermost is None or not set(manifest.tensors) <= {*plan.unexpected, *manifest.computed}:
            return ""
        here = [path for path, kind in plan.kinds.items() if kind == outermost.kind]
        if not here:
            return f"it holds a {outermost.kind}, and the model none: make the model as it was when it was saved; "
        place = "is the model itself" if here[0] == "" else f"is at {here[0]!r}, so load into that part"
        theirs = outermost.path or "the root"
        return f"it holds a {outermost.kind} at {theirs!r}; that of the model {place}; "


def _prefix_advice(missing: list[str], unexpected: list[str]) -> str:
    """Say so if the keys of one side are those of the other behind a prefix, as after saving a wrapped model."""
    for longer, shorter in ((unexpected, missing), (missing, unexpected)):
        first = longer[0].partition(".")[0] if longer else ""
        prefix = f"{first}."
        behind = [key.removeprefix(prefix) for key in longer if key.startswith(prefix)]
        same = set(behind) == set(shorter)
        # A weight that was only computed has another key in a model that parametrizes it.
        wrapped = prefix in _WRAPPED and not any(key.startswith(prefix) for key in shorter)
        if first and shorter and len(behind) == len(longer) and (same or wrapped):
            said = (
                f"all keys of the {'file' if longer is unexpected else 'model'} begin with {prefix!r}, and the others"
            )
            if longer is unexpected:
                return f"{said} do not: load into nn.ModuleDict({{{first!r}: model}}); "
            return f"{said} do not: load into that part of it; "
    return ""


__all__ = ["Refusal"]
