"""Pair everything in the model with what the file has, in steps; `table.py` holds what they share."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from orthoserde import _torch
from orthoserde.manifest import Manifest
from orthoserde.registry import Registry
from orthoserde.reports import Fidelity
from orthoserde.restore.compare import compare_module
from orthoserde.restore.parametrized import match_parametrized, match_wholes
from orthoserde.restore.plan import Plan
from orthoserde.restore.table import Table
from orthoserde.restore.tensors import match_tensors, match_ties
from orthoserde.walk import Inventory
from orthoserde.weights.live import spoken_for
from orthoserde.wording import shorten


def make_plan(
    manifest: Manifest,
    inventory: Inventory,
    registry: Registry,
    *,
    strict: bool,
    reparametrize: bool,
    device: torch.device,
    computed: Mapping[str, str],
) -> Plan:
    """Plan a load.

    Args:
        manifest: What the file holds.
        inventory: What the model holds; it is not changed.
        registry: The user's classes.
        strict: Whether a tie of the file that the model does not have is a problem.
        reparametrize: Whether bare tensors get their parametrizations back.
        device: Where meta tensors are placed.
        computed: Parametrized tensors whose state is worked out from a computed weight, with what is done, in words.
    """
    table = Table(manifest, inventory, registry, device)
    match_parametrized(table, reparametrize, computed)
    _match_modules(table, strict)
    if not strict:
        match_wholes(table)
    match_tensors(table)
    match_ties(table, strict)
    _collect_leftovers(table)
    return table.plan


def _match_modules(table: Table, strict: bool) -> None:
    recorded: set[int] = set()
    for record in table.manifest.modules:
        module = table.modules.get(record.path)
        if module is not None:
            recorded.add(id(module))
            verdict = compare_module(record, module, table.registry)
            table.plan.problems += verdict.problems
            table.plan.differs |= verdict.differs
            table.plan.notes += [f"{record.path or '(model)'}: {reason}" for reason in verdict.reasons]
            table.plan.lower(verdict.fidelity)
        elif strict and table.owner_of(f"{record.path}.") is None:
            table.plan.mismatch(record.path, f"the file has a {record.kind} here, the model no module")
    known = recorded | spoken_for(table.live.values(), table.registry) | table.fresh
    for path, module in table.modules.items():
        codec = table.registry.for_type(_torch.class_before_parametrizations(module))
        if codec is not None:
            table.plan.kinds[path] = codec.kind
            if id(module) not in known:
                table.plan.lower(Fidelity.UNVERIFIED)


def _collect_leftovers(table: Table) -> None:
    table.plan.parameters = {
        key: slot.tensor for key, slot in table.slots.items() if slot.parameter and slot.tensor is not None
    }
    # What looks like an alias in another library's metadata may be anything.
    aliases = table.manifest.aliases if table.manifest.has_configuration else ()
    everything = [*table.manifest.tensors, *aliases]
    table.plan.unexpected = [key for key in everything if key not in table.settled]
    if table.plan.missing:
        table.plan.lower(Fidelity.UNVERIFIED)
    for (theirs, ours), keys in table.widened.items():
        table.plan.notes.append(f"{theirs} restored as {ours}: {shorten(keys)}")
    unplaced = [key for key in table.manifest.left_out if _is_meta(table, key)]
    if unplaced:
        table.plan.notes.append(f"still on the meta device, because the file leaves them out: {shorten(unplaced)}")
    stranded = [key for key, buffer in table.transient.items() if buffer.device.type == "meta"]
    if stranded:
        table.plan.notes.append(
            f"still on the meta device, because non-persistent buffers are in no checkpoint: {shorten(stranded)}"
        )


def _is_meta(table: Table, key: str) -> bool:
    slot = table.slots.get(key)
    return slot is not None and slot.tensor is not None and slot.tensor.device.type == "meta"
