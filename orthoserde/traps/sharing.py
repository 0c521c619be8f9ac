"""Traps in what a parametrized tensor shares with others, and with the modes of torch."""

from __future__ import annotations

from collections.abc import Iterator

from torch.nn.parameter import is_lazy

from orthoserde import _torch, modes
from orthoserde.reports import Finding, Severity
from orthoserde.traps.state import is_orthogonal
from orthoserde.walk import Inventory, Slot, identity
from orthoserde.wording import shorten


def tied_originals(inventory: Inventory) -> Iterator[Finding]:
    """Originals that are parameters of another place as well."""
    groups: dict[object, dict[tuple[int, str], Slot]] = {}
    for slot in inventory.slots.values():
        if slot.tensor is not None and not is_lazy(slot.tensor):
            # A module in several places is one place: its tensors are not tied to each other.
            groups.setdefault(identity(slot.tensor), {}).setdefault((id(slot.module), slot.name), slot)
    for record in inventory.parametrized:
        orthogonal = any(is_orthogonal(_torch.unwrap(link)) for link in record.parametrizations)
        for name, original in record.originals.items():
            key = f"{record.prefix}.{name}"
            others = [slot.key for slot in groups[identity(original)].values() if slot.key != key]
            if others:
                yield Finding(
                    record.name,
                    Severity.SERIOUS if orthogonal else Severity.WARNING,
                    "tied-original",
                    f"its {name} is the same tensor as {shorten(others)}, which is unconstrained there"
                    + (": registering the parametrization has overwritten it with -I" if orthogonal else ""),
                    "untie them before parametrizing, or parametrize one module and use it in both places",
                )


def cached_copies(inventory: Inventory) -> Iterator[Finding]:
    """Modules made by ``copy.deepcopy`` after they were parametrized.

    Note [Copies under cached]
    The property that torch puts on a module caches under the id of the module that it was made for, and a copy shares
    its class, so inside of ``parametrize.cached()`` whichever is read first decides the weight of both.
    Source: ``_inject_property`` in torch/nn/utils/parametrize.py (torch 2.13).
    """
    caching = _torch.is_caching()
    for record in inventory.parametrized:
        if _torch.caches_for_another(record.module, record.tensor_name):
            yield Finding(
                record.name,
                Severity.SERIOUS if caching else Severity.NOTICE,
                "cached-copy",
                "it belongs to a copy (copy.deepcopy, AveragedModel): inside of parametrize.cached() the copy and the "
                "module that it was made from hand out the weight of whichever is read first",
                "read copies outside of cached(), or build the second model and load the state of the first",
            )


def autocast(inventory: Inventory) -> Iterator[Finding]:
    """Orthogonal weights that are read under autocast; to be asked before autocast is left."""
    for record in inventory.parametrized:
        for link in map(_torch.unwrap, record.parametrizations):
            base = _torch.own_buffers(link).get("base") if isinstance(link, _torch.OrthogonalModule) else None
            if base is not None and modes.autocasts(base.device.type):
                yield Finding(
                    record.name,
                    Severity.WARNING,
                    "autocast-orthogonal",
                    "autocast is on, and torch multiplies by the base in half precision: the weight is off its "
                    "constraint by about 1e-3, in this forward alone",
                    "read the weight before autocast is entered, or use orthoserde.orthogonal(structured=True), which "
                    "stays in the dtype of its original",
                )
