"""Pair the parametrized tensors of a model with those of a file, and plan which parametrizations bare modules get."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from orthoserde import _torch
from orthoserde.keys import local_names, names_of, prefixes_of
from orthoserde.manifest import ParametrizedRecord, join
from orthoserde.reports import RESTORED, Fidelity
from orthoserde.restore.attach import Attachment, build_links
from orthoserde.restore.compare import compare_chain, contradiction, kinds_of
from orthoserde.restore.places import Owner, same_layout
from orthoserde.restore.plan import Make, Outcome
from orthoserde.restore.table import Table
from orthoserde.tensor_bytes import overlap, storage_of
from orthoserde.walk import ParametrizedTensor, Slot, computed_originals, take_inventory


def match_parametrized(table: Table, reparametrize: bool, computed: Mapping[str, str]) -> None:
    """Pair parametrized tensors.

    Args:
        table: What is left.
        reparametrize: Whether bare tensors get their parametrizations back.
        computed: Those whose state is worked out from a computed weight, with what is done, in words.
    """
    recorded: set[int] = set()
    bare = _Bare(table, reparametrize)
    # Modules come before their parts: what is attached to one is on the table when its own parts are looked up.
    for record in table.manifest.parametrized:
        module = next((table.modules[path] for path in (record.module, *record.aliases) if path in table.modules), None)
        if module is None:
            continue  # its keys are unexpected
        tensor = table.live.get((id(module), record.tensor_name))
        if tensor is None:
            bare.match(record, module)
        else:
            recorded.add(id(tensor))
            _match_live(table, record, tensor)
    for tensor in table.live.values():
        if not table.settled.isdisjoint(map(tensor.key, computed_originals(tensor))):
            table.settle(prefixes_of(tensor))  # the walk has told of an original that is computed itself
        if tensor.name in computed:
            _own_live(table, tensor, Fidelity.INFERENCE, computed[tensor.name])
        elif id(tensor) not in recorded:
            _match_unrecorded(table, tensor)


def _match_live(table: Table, record: ParametrizedRecord, tensor: ParametrizedTensor) -> None:
    verdict = compare_chain(record, tensor, table.registry)
    table.plan.problems += verdict.problems
    table.plan.differs |= verdict.differs
    _own_live(table, tensor, verdict.fidelity, "; ".join([RESTORED, *verdict.reasons]))
    # A tensor of the model says which shape fits; what the manifest says of the weight is held to that too.
    parts = [table.slots[key] for prefix in prefixes_of(tensor) for key in table.model_parts.get(prefix, ())]
    open_question = record.shape is not None or any(slot.tensor is None for slot in parts)
    asked = open_question and not verdict.problems
    problem = contradiction(record, table.manifest, table.registry) if asked else None
    if problem is not None:
        table.plan.mismatch(tensor.name, problem)
    if verdict.problems or problem is not None:
        table.settle(prefixes_of(tensor))


def _match_unrecorded(table: Table, tensor: ParametrizedTensor) -> None:
    """A tensor that is parametrized in the model, and of whose parametrization the file says nothing."""
    prefixes = prefixes_of(tensor)
    plain = names_of(tensor)
    if any(prefix in table.file_parts for prefix in prefixes):
        if table.manifest.has_configuration and not tensor.hook_names:
            table.plan.mismatch(tensor.name, "the file has its tensors, but no record of its parametrization")
            table.settle(prefixes)
        else:
            _own_live(table, tensor, Fidelity.UNVERIFIED, f"{RESTORED}; the file has no configuration to check")
    elif any(name in table.manifest for name in plain):
        table.settle([*prefixes, *plain])  # a computed weight of which nothing could be made; that has been said


def _own_live(table: Table, tensor: ParametrizedTensor, fidelity: Fidelity, action: str) -> None:
    outcome = Outcome(tensor.name, tensor.module, tensor.tensor_name, fidelity, action)
    table.plan.outcomes.append(outcome)
    first = next(iter(tensor.originals.values()), None)
    if first is not None:
        key = tensor.key(next(iter(tensor.originals)))
        stored = table.stored(key).dtype if key in table.manifest else None
        for prefix in prefixes_of(tensor):
            table.owners[prefix] = Owner(outcome, first.device, first.dtype, stored)


class _Bare:
    """Plans what tensors get that are parametrized in the file and plain in the model."""

    def __init__(self, table: Table, reparametrize: bool) -> None:
        self._table = table
        self._reparametrize = reparametrize
        self._attached: dict[tuple[int, str], str] = {}
        self._memory: dict[int, list[Tensor]] = {}

    def match(self, record: ParametrizedRecord, module: nn.Module) -> None:
        """Pair one tensor with the plain one of a module."""
        table, name = self._table, record.tensor_name
        bare = {**_torch.own_buffers(module), **_torch.own_parameters(module)}.get(name)
        if bare is None:  # the model has no such tensor: its keys are unexpected, or name other tensors here
            if any(key in table.slots for key in record.tensor_keys()):
                table.plan.lower(Fidelity.UNVERIFIED)
                text = f"{kinds_of(record)} computes it in the file, nothing that is known of in the model"
                table.plan.notes.append(f"{record.name}: {text}; its tensors were loaded all the same")
            return
        paths = table.paths[id(module)]
        plain_keys = [join(path, name) for path in paths]
        prefixes = [join(path, "parametrizations", name) for path in paths]
        prefix = join(record.module, "parametrizations", name)
        other = self._attached.setdefault((id(module), name), record.name)
        if other != record.name:
            table.plan.mismatch(record.name, f"separate from {other} in the file, the same module in the model")
            table.settle([prefix])
            return
        if not self._reparametrize:
            table.plan.mismatch(
                record.name,
                f"parametrized in the file ({kinds_of(record)}), plain in the model; parametrize it, let load "
                "do it, or bake the file",
            )
            table.settle([*plain_keys, *prefixes])
            return
        if is_lazy(bare):  # which the walk has told as a problem
            table.settle([*plain_keys, *prefixes])
            return
        links = build_links(
            record,
            bare,
            {key: table.stored(key) for key in record.tensor_keys()},
            table.registry,
            table.device,
        )
        if isinstance(links, list):
            table.plan.problems += links
            table.settle([*plain_keys, *prefixes])
            return
        problem = contradiction(record, table.manifest, table.registry)
        if problem is not None:
            table.plan.mismatch(record.name, problem)
        for key in plain_keys:
            table.slots.pop(key, None)
        self._attach(record, module, bare, links)
        # The same module object under other paths: its file keys are aliases of those that were matched.
        table.settle(each for each in prefixes if each != prefix)

    def _attach(
        self, record: ParametrizedRecord, module: nn.Module, bare: Tensor, links: tuple[nn.Module, ...]
    ) -> None:
        """Plan that the parametrizations of a tensor are attached, and lay what they hold on the table."""
        table, name = self._table, record.tensor_name
        prefix = join(record.module, "parametrizations", name)
        frozen = {each for each in record.originals if not table.stored(record.original_key(each)).requires_grad}
        attachment = Attachment(record, module, bare, links, frozenset(frozen))
        table.plan.attachments.append(attachment)
        first = table.stored(record.original_key(next(iter(record.originals))))
        outcome = Outcome(record.name, module, name, Fidelity.EXACT, "parametrization attached")
        table.plan.outcomes.append(outcome)
        table.owners[prefix] = Owner(outcome, bare.device, bare.dtype, first.dtype)
        for i, link in enumerate(links):
            self._adopt(link, join(prefix, str(i)))
        if set(record.originals) == {"original"} and same_layout(first, bare):
            key = record.original_key("original")
            table.slots[key] = Slot(key, module, name, bare, isinstance(bare, nn.Parameter))
        else:
            if self._shares_memory(bare):
                text = "other tensors of the model lie in its memory, so it cannot be replaced by new ones"
                table.plan.mismatch(record.name, f"{text}; parametrize it before loading")
            for original in record.originals:
                self._make_original(attachment, original, table.owners[prefix])
        if record.parameter != isinstance(bare, nn.Parameter):
            table.note_sort(record.name, record.parameter, outcome)
        if not attachment.keeps_parameter:
            outcome.action += ", as new parameters"
            table.plan.notes.append(f"{record.name}: its parameters are new; build the optimizer after the load")

    def _adopt(self, link: nn.Module, prefix: str) -> None:
        """Take a parametrization that is about to be attached into the plan."""
        inventory = take_inventory(link, prefix)
        self._table.take(inventory)
        self._table.fresh |= {id(module) for module in inventory.modules.values()}

    def _make_original(self, attachment: Attachment, name: str, owner: Owner) -> None:
        key = attachment.record.original_key(name)
        dtype = self._table.target_dtype(key, owner)

        def place(tensor: Tensor) -> Callable[[], None]:
            attachment.originals[name] = tensor
            return attachment.originals.clear

        if dtype is not None:
            self._table.plan.makes.append(
                Make(key, self._table.manifest.kept_key(key), dtype, self._table.place_for(owner), place)
            )
        self._table.settled.add(key)
        self._table.made.add(key)

    def _shares_memory(self, bare: Tensor) -> bool:
        """Whether another tensor of the model lies in the memory of this one."""
        if not self._memory:
            for slot in self._table.slots.values():
                if slot.tensor is not None:
                    self._memory.setdefault(storage_of(slot.tensor), []).append(slot.tensor)
        others = self._memory.get(storage_of(bare), [])
        return any(other is not bare and overlap(bare, other) for other in others)


def match_wholes(table: Table) -> None:
    """Refuse half of a parametrized tensor, however lenient the load: its parts belong together."""
    covered = {id(slot.tensor) for slot in table.slots.values() if slot.key in table.manifest}
    for tensor in table.live.values():
        prefixes = prefixes_of(tensor)
        theirs = local_names(table.file_parts, prefixes)
        ours = {part: table.slots[key].tensor for part, key in local_names(table.model_parts, prefixes).items()}
        required = {part for part, value in ours.items() if value is not None}
        # A part may also come in under the name of a tensor that it is tied to.
        present = {part for part in required if id(ours[part]) in covered}
        if (theirs or present) and not table.settled.issuperset(prefixes):
            odd = (required - present) | (theirs.keys() - ours.keys())
            if odd:
                text = f"only part of its state is on both sides ({', '.join(sorted(odd))} is not), which is refused"
                table.plan.mismatch(tensor.name, text)
                table.settle(prefixes)
