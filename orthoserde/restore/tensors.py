"""Pair every tensor of a model with what the file has: shapes, dtypes, where new ones go, and what is tied."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor, nn

from orthoserde import _torch
from orthoserde.parametrizations.structured import Orthogonal
from orthoserde.reports import Fidelity
from orthoserde.restore.places import Place
from orthoserde.restore.plan import Make, Tie, Write
from orthoserde.restore.table import Table
from orthoserde.tensor_bytes import ORTHONORMAL_DTYPES, dtype_name, may_overlap
from orthoserde.walk import Slot, identity
from orthoserde.wording import shorten


def match_tensors(table: Table) -> None:
    """Plan what is written and what is made; whatever a model has and a file has not is missing."""
    swaps: list[tuple[str, nn.Parameter]] = []
    groups: dict[object, list[Slot]] = {}
    for slot in table.slots.values():
        place = (id(slot.module), slot.name) if slot.tensor is None else id(slot.tensor)
        groups.setdefault(place, []).append(slot)
    for slots in groups.values():
        open_slots = [slot for slot in slots if slot.key not in table.settled]
        found = [slot for slot in open_slots if slot.key in table.manifest]
        if found:
            swaps += _match_tensor(table, found, slots)
        elif slots[0].tensor is not None or _wants(table, slots[0]):
            table.plan.missing += [slot.key for slot in open_slots if slot.key not in table.left_out]
    _check_swaps(table, swaps)


def _wants(table: Table, slot: Slot) -> bool:
    """Whether a buffer is None that should not be: no configuration says that it was None when it was saved."""
    return not table.manifest.has_configuration and table.owner_of(slot.key) is not None


def _match_tensor(table: Table, found: list[Slot], slots: list[Slot]) -> list[tuple[str, nn.Parameter]]:
    """Pair one tensor.

    Args:
        table: What is left.
        found: Its slots under whose keys the file has something.
        slots: All of its slots.

    Returns:
        Its key and itself, if it is a meta parameter whose object is kept.
    """
    slot, tensor = found[0], found[0].tensor
    owner = table.owner_of(slot.key)
    if tensor is None and owner is None:
        return []  # None by intention (a BatchNorm without running statistics): the key is unexpected
    table.settled.update(each.key for each in slots)
    stored = list(dict.fromkeys(table.manifest.kept_key(each.key) for each in found))
    if len(stored) > 1:
        table.plan.ties.append(Tie(slot.key, tuple(stored)))
        _note_new_tie(table, stored, slot)
    record = table.stored(slot.key)
    if tensor is not None and record.shape != tuple(tensor.shape):
        text = f"shape {list(record.shape)} in the file, {list(tensor.shape)} in the model"
        table.plan.mismatch(slot.key, text)
        table.plan.differs = True
        return []
    if table.manifest.has_configuration and tensor is not None and record.parameter != slot.parameter:
        table.note_sort(slot.key, record.parameter, None if owner is None else owner.outcome)
    fresh = id(slot.module) in table.fresh
    if owner is not None and (tensor is None or fresh):
        dtype = table.target_dtype(slot.key, owner)
    else:
        dtype = None if tensor is None else table.checked_dtype(slot.key, tensor.dtype, owner)
    if dtype is None:
        return []
    coarse = record.dtype not in ORTHONORMAL_DTYPES and record.dtype != dtype_name(dtype)
    if coarse and isinstance(slot.module, (_torch.OrthogonalModule, Orthogonal)):
        table.plan.rounded[slot.key] = record.dtype
    if tensor is not None and not fresh and tensor.device.type != "meta":
        if may_overlap(tensor):
            table.plan.mismatch(slot.key, "its elements share memory (an expanded tensor), so it cannot be written")
        table.plan.writes.append(Write(slot.key, stored[0], tensor))
        return []
    device = table.device if owner is None else table.place_for(owner)
    place = Place(tuple(slots), record.requires_grad if fresh else None)
    table.plan.makes.append(Make(slot.key, stored[0], dtype, device, place))
    return [(slot.key, tensor)] if isinstance(tensor, nn.Parameter) and not fresh else []


def _note_new_tie(table: Table, stored: list[str], slot: Slot) -> None:
    """Note a parameter that is one in the model and several in the file: it goes on as one from here."""
    # A folder of pyreft's holds what is shared as often as it is used, and does not say so.
    if "orthoserde" in table.manifest.writer and slot.parameter:
        table.plan.lower(Fidelity.UNVERIFIED)
        names = shorten([key for key in stored if key != slot.key])
        table.plan.notes.append(f"{slot.key}: tied in the model to what is separate in the file: {names}")


def _check_swaps(table: Table, swaps: Collection[tuple[str, Tensor]]) -> None:
    """Find meta parameters whose objects cannot be kept, because something else holds on to what is in them."""
    if swaps:
        table.plan.holders = list(table.modules.values())
    of_hooks = _weights_of_hooks(table, swaps)
    with _torch.without_weak_references(table.plan.holders):
        for key, tensor in swaps:
            if not _torch.can_swap(tensor) and id(tensor) not in of_hooks:
                table.plan.mismatch(
                    key, "on the meta device, and a weak reference or a graph holds on to it; drop that"
                )


def _weights_of_hooks(table: Table, swaps: Collection[tuple[str, Tensor]]) -> set[int]:
    """Ids of the meta parameters that hooks compute a weight from; its graph is dropped when the load is sure."""
    swapped = {id(tensor) for _, tensor in swaps}
    found: set[int] = set()
    for tensor in table.live.values():
        weight = vars(tensor.module).get(tensor.tensor_name) if tensor.hook_names else None
        own = swapped.intersection(map(id, tensor.originals.values()))
        if own and isinstance(weight, Tensor) and weight.grad_fn is not None:
            table.plan.graphs.append(weight)
            found |= own
    return found


def match_ties(table: Table, strict: bool) -> None:
    """A parameter that is one in the file and two in the model would train as two."""
    if not table.manifest.has_configuration:
        return
    for alias, kept in table.manifest.aliases.items():
        if _lost_tie(table, alias, kept):
            text = f"tied to {kept} in the file, a separate parameter in the model"
            if strict:
                table.plan.mismatch(alias, f"{text}; tie them before loading, or load equal copies with strict=False")
            else:
                table.plan.lower(Fidelity.UNVERIFIED)
                table.plan.notes.append(f"{alias}: {text}; both have its values now")


def _lost_tie(table: Table, alias: str, kept: str) -> bool:
    if alias in table.made or kept in table.made:
        both = (alias in table.made or alias in table.slots) and (kept in table.made or kept in table.slots)
        return both and table.manifest.tensors[kept].parameter
    ours, theirs = table.slots.get(alias), table.slots.get(kept)
    if ours is None or theirs is None or ours.tensor is None or theirs.tensor is None:
        return False
    parameters = ours.parameter and theirs.parameter
    return parameters and ours.tensor is not theirs.tensor and identity(ours.tensor) != identity(theirs.tensor)
