"""Pair everything in the model with what the file has."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from orthoserde import _torch
from orthoserde.evaluate import spoken_for
from orthoserde.manifest import Manifest, ParametrizedRecord, TensorRecord, join
from orthoserde.names import hook_prefixes, local_names, parts_by_prefix, prefixes_in, prefixes_of, tensor_names
from orthoserde.parametrizations.structured import Orthogonal
from orthoserde.registry import Registry
from orthoserde.reports import RESTORED, Fidelity
from orthoserde.restore.attach import Attachment, build_links
from orthoserde.restore.compare import compare_chain, compare_module, contradiction, kinds_of
from orthoserde.restore.places import Owner, Place, same_layout
from orthoserde.restore.plan import Make, Outcome, Plan, Tie, Write
from orthoserde.tensor_bytes import (
    DTYPES,
    ORTHONORMAL_DTYPES,
    dtype_name,
    is_lossless,
    may_overlap,
    overlap,
    storage_of,
)
from orthoserde.walk import Inventory, ParametrizedTensor, Slot, identity, take_inventory
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
    planner = _Planner(manifest, inventory, registry, device)
    planner.match_parametrized(reparametrize, computed)
    planner.match_modules(strict)
    if not strict:
        planner.match_wholes()
    planner.match_tensors()
    planner.check_swaps()
    planner.match_ties(strict)
    planner.collect_leftovers()
    return planner.plan


class _Planner:
    """Holds what the steps share. Each step takes what it can explain off the table; what is left does not fit."""

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
        self.hook_prefixes = hook_prefixes(inventory.hooked)
        self.file_parts = parts_by_prefix([*manifest.tensors, *manifest.aliases], self.hook_prefixes)
        self.model_parts = parts_by_prefix(inventory.slots, self.hook_prefixes)
        self.owners: dict[str, Owner] = {}
        self.fresh: set[int] = set()
        self.attached: dict[tuple[int, str], str] = {}
        self.made: set[str] = set()
        self.memory: dict[int, list[Tensor]] = {}
        self.swaps: list[tuple[str, Tensor]] = []
        self.widened: dict[tuple[str, str], list[str]] = {}
        #: Keys that need no further word: a step has matched them, or said what is wrong with them.
        self.settled: set[str] = set(manifest.computed)
        self.left_out = set(manifest.left_out)
        self.stored_below = _with_parents([*manifest.tensors, *manifest.aliases])
        self.left_out_below = _with_parents(manifest.left_out)
        self._take(inventory)

    def _take(self, inventory: Inventory) -> None:
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
            if problem.where in self.stored_below or problem.where not in self.left_out_below:
                self.plan.problems.append(problem)
                self.settled.add(problem.where)

    def _stored(self, key: str) -> TensorRecord:
        return self.manifest.tensors[self.manifest.kept_key(key)]

    def _settle(self, prefixes: Iterable[str]) -> None:
        for prefix in prefixes:
            self.settled.add(prefix)
            self.settled.update(self.file_parts.get(prefix, ()))
            self.settled.update(self.model_parts.get(prefix, ()))

    # Parametrized tensors

    def match_parametrized(self, reparametrize: bool, computed: Mapping[str, str]) -> None:
        recorded: set[int] = set()
        # Modules come before their parts: what is attached to one is on the table when its own parts are looked up.
        for record in self.manifest.parametrized:
            module = next(
                (self.modules[path] for path in (record.module, *record.aliases) if path in self.modules), None
            )
            if module is None:
                continue  # its keys are unexpected
            tensor = self.live.get((id(module), record.tensor_name))
            if tensor is None:
                self._match_bare(record, module, reparametrize)
            else:
                recorded.add(id(tensor))
                self._match_live(record, tensor)
        for tensor in self.live.values():
            if tensor.name in computed:
                self._own_live(tensor, Fidelity.INFERENCE, computed[tensor.name])
            elif id(tensor) not in recorded:
                self._match_unrecorded(tensor)

    def _match_live(self, record: ParametrizedRecord, tensor: ParametrizedTensor) -> None:
        verdict = compare_chain(record, tensor, self.registry)
        self.plan.problems += verdict.problems
        self._own_live(tensor, verdict.fidelity, "; ".join([RESTORED, *verdict.reasons]))
        # A tensor of the model says which shape fits; what the manifest says of the weight is held to that too.
        parts = [self.slots[key] for prefix in prefixes_of(tensor) for key in self.model_parts.get(prefix, ())]
        open_question = record.shape is not None or any(slot.tensor is None for slot in parts)
        asked = open_question and not verdict.problems
        problem = contradiction(record, self.manifest, self.registry) if asked else None
        if problem is not None:
            self.plan.mismatch(tensor.name, problem)
        if verdict.problems or problem is not None:
            self._settle(prefixes_of(tensor))

    def _match_bare(self, record: ParametrizedRecord, module: nn.Module, reparametrize: bool) -> None:
        name = record.tensor_name
        bare = {**_torch.own_buffers(module), **_torch.own_parameters(module)}.get(name)
        if bare is None:  # the model has no such tensor: its keys are unexpected, or name other tensors here
            if any(key in self.slots for key in record.tensor_keys()):
                self.plan.lower(Fidelity.UNVERIFIED)
                text = f"{kinds_of(record)} computes it in the file, nothing that is known of in the model"
                self.plan.notes.append(f"{record.name}: {text}; its tensors were loaded all the same")
            return
        paths = self.paths[id(module)]
        plain_keys = [join(path, name) for path in paths]
        prefixes = [join(path, "parametrizations", name) for path in paths]
        prefix = join(record.module, "parametrizations", name)
        other = self.attached.setdefault((id(module), name), record.name)
        if other != record.name:
            self.plan.mismatch(record.name, f"separate from {other} in the file, the same module in the model")
            self._settle([prefix])
            return
        if not reparametrize:
            self.plan.mismatch(
                record.name,
                f"parametrized in the file ({kinds_of(record)}), plain in the model; parametrize it, let load "
                "do it, or bake the file",
            )
            self._settle([*plain_keys, *prefixes])
            return
        links = build_links(
            record, bare, {key: self._stored(key) for key in record.tensor_keys()}, self.registry, self.device
        )
        if isinstance(links, list):
            self.plan.problems += links
            self._settle([*plain_keys, *prefixes])
            return
        problem = contradiction(record, self.manifest, self.registry)
        if problem is not None:
            self.plan.mismatch(record.name, problem)
        frozen = {each for each in record.originals if not self._stored(record.original_key(each)).requires_grad}
        attachment = Attachment(record, module, bare, links, frozenset(frozen))
        self.plan.attachments.append(attachment)
        first = self._stored(record.original_key(next(iter(record.originals))))
        outcome = Outcome(record.name, module, name, Fidelity.EXACT, "parametrization attached")
        self.plan.outcomes.append(outcome)
        self.owners[prefix] = Owner(outcome, bare.device, bare.dtype, first.dtype)
        for key in plain_keys:
            self.slots.pop(key, None)
        for i, link in enumerate(links):
            self._adopt(link, join(prefix, str(i)))
        if set(record.originals) == {"original"} and same_layout(first, bare):
            key = record.original_key("original")
            self.slots[key] = Slot(key, module, name, bare, isinstance(bare, nn.Parameter))
        else:
            if self._shares_memory(bare):
                text = "other tensors of the model lie in its memory, so it cannot be replaced by new ones"
                self.plan.mismatch(record.name, f"{text}; parametrize it before loading")
            for original in record.originals:
                self._make_original(attachment, original, self.owners[prefix])
        if record.parameter != isinstance(bare, nn.Parameter):
            self._note_sort(record.name, record.parameter, outcome)
        if not attachment.keeps_parameter:
            outcome.action += ", as new parameters"
            self.plan.notes.append(f"{record.name}: its parameters are new; build the optimizer after the load")
        # The same module object under other paths: its file keys are aliases of those that were matched.
        self._settle(each for each in prefixes if each != prefix)

    def _adopt(self, link: nn.Module, prefix: str) -> None:
        """Take a parametrization that is about to be attached into the plan."""
        inventory = take_inventory(link, prefix)
        self._take(inventory)
        self.fresh |= {id(module) for module in inventory.modules.values()}

    def _make_original(self, attachment: Attachment, name: str, owner: Owner) -> None:
        key = attachment.record.original_key(name)
        dtype = self._target_dtype(key, owner)

        def place(tensor: Tensor) -> Callable[[], None]:
            attachment.originals[name] = tensor
            return attachment.originals.clear

        if dtype is not None:
            self.plan.makes.append(Make(key, self.manifest.kept_key(key), dtype, self._place_for(owner), place))
        self.settled.add(key)
        self.made.add(key)

    def _shares_memory(self, bare: Tensor) -> bool:
        """Whether another tensor of the model lies in the memory of this one."""
        if not self.memory:
            for slot in self.slots.values():
                if slot.tensor is not None:
                    self.memory.setdefault(storage_of(slot.tensor), []).append(slot.tensor)
        others = self.memory.get(storage_of(bare), [])
        return any(other is not bare and overlap(bare, other) for other in others)

    def _note_sort(self, name: str, parameter: bool, outcome: Outcome | None) -> None:
        sorts = ("a parameter", "a buffer") if parameter else ("a buffer", "a parameter")
        self.plan.notes.append(f"{name}: {sorts[0]} in the file, {sorts[1]} in the model")
        self.plan.lower(Fidelity.UNVERIFIED)
        if outcome is not None:
            outcome.fidelity = min(outcome.fidelity, Fidelity.UNVERIFIED)

    def _match_unrecorded(self, tensor: ParametrizedTensor) -> None:
        """A tensor that is parametrized in the model, and of whose parametrization the file says nothing."""
        prefixes = prefixes_of(tensor)
        plain = tensor_names(tensor.module_path, tensor.aliases, tensor.tensor_name)
        if any(prefix in self.file_parts for prefix in prefixes):
            if self.manifest.has_configuration and not tensor.hook_names:
                self.plan.mismatch(tensor.name, "the file has its tensors, but no record of its parametrization")
                self._settle(prefixes)
            else:
                self._own_live(tensor, Fidelity.UNVERIFIED, f"{RESTORED}; the file has no configuration to check")
        elif any(name in self.manifest for name in plain):
            self._settle([*prefixes, *plain])  # a computed weight of which nothing could be made; that has been said

    def _own_live(self, tensor: ParametrizedTensor, fidelity: Fidelity, action: str) -> None:
        outcome = Outcome(tensor.name, tensor.module, tensor.tensor_name, fidelity, action)
        self.plan.outcomes.append(outcome)
        first = next(iter(tensor.originals.values()), None)
        if first is not None:
            key = tensor.key(next(iter(tensor.originals)))
            stored = self._stored(key).dtype if key in self.manifest else None
            for prefix in prefixes_of(tensor):
                self.owners[prefix] = Owner(outcome, first.device, first.dtype, stored)

    def match_wholes(self) -> None:
        """Refuse half of a parametrized tensor, however lenient the load: its parts belong together."""
        covered = {id(slot.tensor) for slot in self.slots.values() if slot.key in self.manifest}
        for tensor in self.live.values():
            prefixes = prefixes_of(tensor)
            theirs = local_names(self.file_parts, prefixes)
            ours = {part: self.slots[key].tensor for part, key in local_names(self.model_parts, prefixes).items()}
            required = {part for part, value in ours.items() if value is not None}
            # A part may also come in under the name of a tensor that it is tied to.
            present = {part for part in required if id(ours[part]) in covered}
            if (theirs or present) and not self.settled.issuperset(prefixes):
                odd = (required - present) | (theirs.keys() - ours.keys())
                if odd:
                    text = (
                        f"only part of its state is on both sides ({', '.join(sorted(odd))} is not), which is refused"
                    )
                    self.plan.mismatch(tensor.name, text)
                    self._settle(prefixes)

    # Modules

    def match_modules(self, strict: bool) -> None:
        recorded: set[int] = set()
        for record in self.manifest.modules:
            module = self.modules.get(record.path)
            if module is not None:
                recorded.add(id(module))
                verdict = compare_module(record, module, self.registry)
                self.plan.problems += verdict.problems
                self.plan.notes += [f"{record.path or '(model)'}: {reason}" for reason in verdict.reasons]
                self.plan.lower(verdict.fidelity)
            elif strict and self._owner_of(f"{record.path}.") is None:
                self.plan.mismatch(record.path, f"the file has a {record.kind} here, the model no module")
        known = recorded | spoken_for(self.live.values(), self.registry) | self.fresh
        for path, module in self.modules.items():
            codec = self.registry.for_type(_torch.class_before_parametrizations(module))
            if codec is not None:
                self.plan.kinds[path] = codec.kind
                if id(module) not in known:
                    self.plan.lower(Fidelity.UNVERIFIED)

    # Tensors

    def match_tensors(self) -> None:
        groups: dict[object, list[Slot]] = {}
        for slot in self.slots.values():
            place = (id(slot.module), slot.name) if slot.tensor is None else id(slot.tensor)
            groups.setdefault(place, []).append(slot)
        for slots in groups.values():
            open_slots = [slot for slot in slots if slot.key not in self.settled]
            found = [slot for slot in open_slots if slot.key in self.manifest]
            if found:
                self._match_tensor(found, slots)
            elif slots[0].tensor is not None or self._wants(slots[0]):
                self.plan.missing += [slot.key for slot in open_slots if slot.key not in self.left_out]

    def _wants(self, slot: Slot) -> bool:
        """Whether a buffer is None that should not be: no configuration says that it was None when it was saved."""
        return not self.manifest.has_configuration and self._owner_of(slot.key) is not None

    def _match_tensor(self, found: list[Slot], slots: list[Slot]) -> None:
        slot, tensor = found[0], found[0].tensor
        owner = self._owner_of(slot.key)
        if tensor is None and owner is None:
            return  # None by intention (a BatchNorm without running statistics): the key is unexpected
        self.settled.update(each.key for each in slots)
        stored = list(dict.fromkeys(self.manifest.kept_key(each.key) for each in found))
        if len(stored) > 1:
            self.plan.ties.append(Tie(slot.key, tuple(stored)))
        record = self._stored(slot.key)
        if tensor is not None and record.shape != tuple(tensor.shape):
            text = f"shape {list(record.shape)} in the file, {list(tensor.shape)} in the model"
            self.plan.mismatch(slot.key, text)
            return
        if self.manifest.has_configuration and tensor is not None and record.parameter != slot.parameter:
            self._note_sort(slot.key, record.parameter, None if owner is None else owner.outcome)
        fresh = id(slot.module) in self.fresh
        if owner is not None and (tensor is None or fresh):
            dtype = self._target_dtype(slot.key, owner)
        else:
            dtype = None if tensor is None else self._checked_dtype(slot.key, tensor.dtype, owner)
        if dtype is None:
            return
        coarse = record.dtype not in ORTHONORMAL_DTYPES and record.dtype != dtype_name(dtype)
        if coarse and isinstance(slot.module, (_torch.OrthogonalModule, Orthogonal)):
            self.plan.rounded[slot.key] = record.dtype
        if tensor is not None and not fresh and tensor.device.type != "meta":
            if may_overlap(tensor):
                self.plan.mismatch(slot.key, "its elements share memory (an expanded tensor), so it cannot be written")
            self.plan.writes.append(Write(slot.key, stored[0], tensor))
            return
        device = self.device if owner is None else self._place_for(owner)
        place = Place(tuple(slots), record.requires_grad if fresh else None)
        self.plan.makes.append(Make(slot.key, stored[0], dtype, device, place))
        if isinstance(tensor, nn.Parameter) and not fresh:
            self.swaps.append((slot.key, tensor))

    def check_swaps(self) -> None:
        """Find meta parameters whose objects cannot be kept, because something else holds on to what is in them."""
        if self.swaps:
            self.plan.holders = list(self.modules.values())
        of_hooks = self._weights_of_hooks()
        with _torch.without_weak_references(self.plan.holders):
            for key, tensor in self.swaps:
                if not _torch.can_swap(tensor) and id(tensor) not in of_hooks:
                    self.plan.mismatch(
                        key, "on the meta device, and a weak reference or a graph holds on to it; drop that"
                    )

    def _weights_of_hooks(self) -> set[int]:
        """Ids of the meta parameters that hooks compute a weight from; its graph is dropped when the load is sure."""
        swapped = {id(tensor) for _, tensor in self.swaps}
        found: set[int] = set()
        for tensor in self.live.values():
            weight = vars(tensor.module).get(tensor.tensor_name) if tensor.hook_names else None
            own = swapped.intersection(map(id, tensor.originals.values()))
            if own and isinstance(weight, Tensor) and weight.grad_fn is not None:
                self.plan.graphs.append(weight)
                found |= own
        return found

    def _owner_of(self, key: str) -> Owner | None:
        prefixes = [*prefixes_in(key), self.hook_prefixes.get(key, "")]
        return next((self.owners[prefix] for prefix in reversed(prefixes) if prefix in self.owners), None)

    def _place_for(self, owner: Owner) -> torch.device:
        return self.device if owner.device.type == "meta" else owner.device

    def _target_dtype(self, key: str, owner: Owner) -> torch.dtype | None:
        """Dtype of a tensor that is made: that of the file, or where the model's originals have another one, theirs."""
        record = self._stored(key)
        same = record.dtype == owner.stored_dtype
        return self._checked_dtype(key, owner.dtype if same else DTYPES[record.dtype], owner)

    def _checked_dtype(self, key: str, dtype: torch.dtype, owner: Owner | None) -> torch.dtype | None:
        record, target = self._stored(key), dtype_name(dtype)
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

    # Ties and the rest

    def match_ties(self, strict: bool) -> None:
        """A parameter that is one in the file and two in the model would train as two."""
        if not self.manifest.has_configuration:
            return
        for alias, kept in self.manifest.aliases.items():
            if self._lost_tie(alias, kept):
                text = f"tied to {kept} in the file, a separate parameter in the model"
                if strict:
                    self.plan.mismatch(
                        alias, f"{text}; tie them before loading, or load equal copies with strict=False"
                    )
                else:
                    self.plan.lower(Fidelity.UNVERIFIED)
                    self.plan.notes.append(f"{alias}: {text}; both have its values now")

    def _lost_tie(self, alias: str, kept: str) -> bool:
        if alias in self.made or kept in self.made:
            both = (alias in self.made or alias in self.slots) and (kept in self.made or kept in self.slots)
            return both and self.manifest.tensors[kept].parameter
        ours, theirs = self.slots.get(alias), self.slots.get(kept)
        if ours is None or theirs is None or ours.tensor is None or theirs.tensor is None:
            return False
        parameters = ours.parameter and theirs.parameter
        return parameters and ours.tensor is not theirs.tensor and identity(ours.tensor) != identity(theirs.tensor)

    def collect_leftovers(self) -> None:
        self.plan.parameters = {
            key: slot.tensor for key, slot in self.slots.items() if slot.parameter and slot.tensor is not None
        }
        # What looks like an alias in another library's metadata may be anything.
        aliases = self.manifest.aliases if self.manifest.has_configuration else ()
        everything = [*self.manifest.tensors, *aliases]
        self.plan.unexpected = [key for key in everything if key not in self.settled]
        if self.plan.missing:
            self.plan.lower(Fidelity.UNVERIFIED)
        for (theirs, ours), keys in self.widened.items():
            self.plan.notes.append(f"{theirs} restored as {ours}: {shorten(keys)}")
        unplaced = [key for key in self.manifest.left_out if self._is_meta(key)]
        if unplaced:
            self.plan.notes.append(f"still on the meta device, because the file leaves them out: {shorten(unplaced)}")
        stranded = [key for key, buffer in self.transient.items() if buffer.device.type == "meta"]
        if stranded:
            self.plan.notes.append(
                f"still on the meta device, because non-persistent buffers are in no checkpoint: {shorten(stranded)}"
            )

    def _is_meta(self, key: str) -> bool:
        slot = self.slots.get(key)
        return slot is not None and slot.tensor is not None and slot.tensor.device.type == "meta"


def _with_parents(keys: Iterable[str]) -> set[str]:
    """Keys and the paths of all modules that they are in."""
    found: set[str] = set()
    for key in keys:
        while key not in found:
            found.add(key)
            key = key.rpartition(".")[0]
    return found
