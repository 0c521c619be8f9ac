"""State of parametrizations for a model that has the plain tensor, from a file that does not say what it is of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from orthoserde.checkpoint import Checkpoint
from orthoserde.errors import ConfigError, LegacyCheckpointWarning, Problem, warn
from orthoserde.registry import Registry
from orthoserde.reports import Fidelity
from orthoserde.restore.legacy import Legacy
from orthoserde.restore.plan import Outcome, Plan
from orthoserde.transforms.bake import bake
from orthoserde.transforms.forms import normed_tensors
from orthoserde.walk import Inventory, Slot
from orthoserde.wording import shorten


@dataclass(frozen=True)
class Baked:
    """A checkpoint in which computed tensors stand for state that the model has no place for.

    Attributes:
        checkpoint: The checkpoint.
        kinds: What the computed tensors were in the file, by name.
        problems: What could not be computed.
    """

    checkpoint: Checkpoint
    kinds: Mapping[str, str]
    problems: tuple[Problem, ...]

    def note(self, plan: Plan, slots: Mapping[str, Slot]) -> None:
        """Say in the plan what was computed, and what is lost by it."""
        for name, kind in self.kinds.items():
            action = f"computed from the state of {kind} in the file; the model trains it without"
            slot = slots[name]
            plan.outcomes.append(Outcome(name, slot.module, slot.name, Fidelity.INFERENCE, action))

    def warn(self) -> None:
        """Say so, once."""
        if self.kinds:
            kinds = " and ".join(sorted(set(self.kinds.values())))
            warn(
                f"{self.checkpoint.origin} has {shorten(list(self.kinds))} as {kinds} keeps it, and the model as a "
                "plain tensor: outputs are equal, and training goes on without the constraint; parametrize the model "
                "before loading to keep it",
                LegacyCheckpointWarning,
            )


def bake_bare(checkpoint: Checkpoint, inventory: Inventory, registry: Registry, legacy: Legacy) -> Baked:
    """Compute tensors that are plain in the model, and of which a file without configuration has the state.

    A file with configuration says how to give the model its parametrizations back, so that nothing is lost.

    Args:
        checkpoint: Any checkpoint.
        inventory: What the model holds.
        registry: The user's classes.
        legacy: Whether computed tensors are taken at all.
    """
    manifest = checkpoint.manifest
    if manifest.has_configuration:
        return Baked(checkpoint, {}, ())
    wanted = {
        tensor.name: tensor.kind
        for tensor in normed_tensors(manifest)
        if tensor.name in inventory.slots
        and tensor.name not in manifest
        and inventory.slots.keys().isdisjoint(tensor.keys(tensor.paths[0], hooked=tensor.hooked).values())
    }
    if legacy == "refuse":
        text = (
            "the file has the state of {}, the model a plain tensor: legacy='refuse' does not compute one of the other"
        )
        problems = [Problem(name, "mismatch", text.format(kind)) for name, kind in wanted.items()]
        return Baked(checkpoint, {}, tuple(problems))
    try:
        baked = bake(checkpoint, registry, wanted)
        for name in wanted:
            baked.tensor(name)  # not every dtype computes, which must be known before anything is written
        return Baked(baked, wanted, ())
    except ConfigError as error:
        return Baked(checkpoint, {}, (Problem("", "mismatch", str(error)),))
