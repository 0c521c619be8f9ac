"""What is left to pair of a model and a file; each step of a plan takes off the table what it can explain."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from orthoserde.keys import hook_prefixes, parts_by_prefix, prefixes_in
from orthoserde.manifest import Manifest, TensorRecord
from orthoserde.registry import Registry
from orthoserde.reports import Fidelity
from orthoserde.restore.places import Owner
from orthoserde.restore.plan import Outcome, Plan
from orthoserde.tensor_bytes import DTYPES, dtype_name, is_lossless
from orthoserde.walk import Inventory, ParametrizedTensor, Slot


class Table:
    """What the steps share, and the plan that they make. What is left at the end does not fit.

    Attributes:
        plan: The plan.
        manifest: What the file holds.
        registry: The user's classes.
        device: Where meta tensors are placed.
        modules: Modules of the model by path, with those of parametrizations that will be attached.
        live: Parametrized tensors of the model by module and name.
        transient: Non-persistent buffers by key.
        slots: Tensor slots of the model by key.
        paths: Paths of each module.
        file_parts: Keys in the file of the parts of parametrized tensors, by prefix.
        model_parts: The same of the model.
        owners: The parametrized tensor that what begins with a prefix is part of.
        fresh: Ids of modules that will be attached.
        made: Keys of originals that are made for parametrizations that will be attached.
        widened: Keys of tensors outside of parametrizations whose dtype changes, by both dtypes.
        settled: Keys that need no further word: a step has matched them, or said what is wrong with them.
        left_out: Keys that the file was told not to hold.
    """

    def __init__(self, manifest: Manifest, inventory: Inventory, registry: Registry, device: torch.device) -> None:
        self.plan = Plan()
        self.manifest = manifest
        self.registry = registry
        self.device = device
        self.modules: dict[str, nn.Module] = {}
        self.live: dict[tuple[int, str], ParametrizedTensor] = {}
        self.transient: dict[str, Tensor] = {}
        self.slots: dict[str, Slot] = {}
        self.paths: dict[int, list[str]] = {}
        self._hook_prefixes = hook_prefixes(inventory.hooked)
        self.file_parts = parts_by_prefix([*manifest.tensors, *manifest.aliases], self._hook_prefixes)
        self.model_parts = parts_by_prefix(inventory.slots, self._hook_prefixes)
        self.owners: dict[str, Owner] = {}
        self.fresh: set[int] = set()
        self.made: set[str] = set()
        self.widened: dict[tuple[str, str], list[str]] = {}
        self.settled: set[str] = set(manifest.computed)
        self.left_out = set(manifest.left_out)
        self._stored_below = _with_parents([*manifest.tensors, *manifest.aliases])
        self._left_out_below = _with_parents(manifest.left_out)
        self.take(inventory)

    def take(self, inventory: Inventory) -> None:
        """Lay what a model, or a part that will be attached to it, holds on the table."""
        self.modules |= inventory.modules
        for tensor in (*inventory.parametrized, *inventory.hooked):
            self.live[id(tensor.module), tensor.tensor_name] = tensor
        self.transient |= inventory.transient
        self.slots |= inventory.slots
        for path, module in inventory.modules.items():
            self.paths.setdefault(id(module), []).append(path)
        for problem in inventory.problems:
            # What the file was told not to hold need not be restorable either.
            if problem.where in self._stored_below or problem.where not in self._left_out_below:
                self.plan.problems.append(problem)
                self.settled.add(problem.where)

    def stored(self, key: str) -> TensorRecord:
        """What the file says of a tensor, given its key or an alias."""
        return self.manifest.tensors[self.manifest.kept_key(key)]

    def settle(self, prefixes: Iterable[str]) -> None:
        """Say no more of what begins with these prefixes."""
        for prefix in prefixes:
            self.settled.add(prefix)
            self.settled.update(self.file_parts.get(prefix, ()))
            self.settled.update(self.model_parts.get(prefix, ()))

    def note_sort(self, name: str, parameter: bool, outcome: Outcome | None) -> None:
        """Note a parameter here that is a buffer there."""
        sorts = ("a parameter", "a buffer") if parameter else ("a buffer", "a parameter")
        self.plan.notes.append(f"{name}: {sorts[0]} in the file, {sorts[1]} in the model")
        self.plan.lower(Fidelity.UNVERIFIED)
        if outcome is not None:
            outcome.fidelity = min(outcome.fidelity, Fidelity.UNVERIFIED)

    def owner_of(self, key: str) -> Owner | None:
        """The parametrized tensor that a tensor is part of; of several the innermost."""
        prefixes = [*prefixes_in(key), self._hook_prefixes.get(key, "")]
        return next((self.owners[prefix] for prefix in reversed(prefixes) if prefix in self.owners), None)

    def place_for(self, owner: Owner) -> torch.device:
        """Where new parts of a parametrized tensor are placed."""
        return self.device if owner.device.type == "meta" else owner.device

    def target_dtype(self, key: str, owner: Owner) -> torch.dtype | None:
        """Dtype of a tensor that is made: that of the file, or where the model's originals have another one, theirs."""
        record = self.stored(key)
        same = record.dtype == owner.stored_dtype
        return self.checked_dtype(key, owner.dtype if same else DTYPES[record.dtype], owner)

    def checked_dtype(self, key: str, dtype: torch.dtype, owner: Owner | None) -> torch.dtype | None:
        """The dtype that a tensor has in the model, None where that cannot hold the values of the file."""
        record, target = self.stored(key), dtype_name(dtype)
        if record.dtype == target:
            return dtype
        if not is_lossless(record.dtype, target):
            text = f"{record.dtype} in the file, {target} in the model, which cannot hold it exactly"
            self.plan.mismatch(key, f"{text}; use a {record.dtype} model")
            return None
        if owner is not None and owner.outcome is not None:
            owner.outcome.fidelity = min(owner.outcome.fidelity, Fidelity.UNVERIFIED)
            owner.outcome.action = f"{record.dtype} restored as {target}"
        else:
            self.widened.setdefault((record.dtype, target), []).append(key)
        self.plan.lower(Fidelity.UNVERIFIED)
        return dtype


def _with_parents(keys: Iterable[str]) -> set[str]:
    """Keys and the paths of all modules that they are in."""
    found: set[str] = set()
    for key in keys:
        while key not in found:
            found.add(key)
            key = key.rpartition(".")[0]
    return found
