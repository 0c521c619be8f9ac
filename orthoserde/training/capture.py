"""Add training state to a captured model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from orthoserde.checkpoint import Checkpoint
from orthoserde.manifest.training import TrainingRecord
from orthoserde.manifest.trees import encode_tree
from orthoserde.training import rng as generators
from orthoserde.training.objects import records_of
from orthoserde.training.optimizers import labelled, record_of
from orthoserde.training.sources import Sources
from orthoserde.walk import Inventory


def with_training(
    checkpoint: Checkpoint, inventory: Inventory, *, optimizer: object, state: Mapping[str, object] | None, rng: bool
) -> Checkpoint:
    """Add what training goes on from; the arguments are those of ``orthoserde.save``.

    Args:
        checkpoint: The captured model.
        inventory: What the model holds.
        optimizer: None, an optimizer, or optimizers by name.
        state: The user's own state by name, or None.
        rng: Whether the random generators are added.

    Raises:
        TypeError: Something is no optimizer, or ``state`` no mapping.
        ConfigError: An optimizer holds a parameter that the model does not have, or something cannot be stored.
    """
    optimizers = labelled(optimizer)
    if not optimizers and state is None and not rng:
        return checkpoint
    sources = Sources()
    slots = reversed(list(inventory.slots.values()))
    names = {id(slot.tensor): slot.key for slot in slots if slot.tensor is not None}
    record = TrainingRecord(
        {label: record_of(label, each, names, sources) for label, each in optimizers.items()},
        records_of(state or {}, sources),
        encode_tree(generators.states(), "rng", sources.put) if rng else None,
    )
    manifest = dataclasses.replace(
        checkpoint.manifest, tensors={**checkpoint.manifest.tensors, **sources.records}, training=record
    )
    return dataclasses.replace(checkpoint, manifest=manifest, sources={**checkpoint.sources, **sources.sources})
