"""One state, two forms: one in the file, the other in the model.

Torch's orthogonal parametrization and the structured one; parametrizations of torch and its older hooks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from orthoserde.checkpoint import Checkpoint
from orthoserde.errors import Problem
from orthoserde.keys import names_of
from orthoserde.manifest import HOOK_SUFFIXES, ORTHOGONAL, SPECTRAL_NORM, STRUCTURED
from orthoserde.registry import Registry
from orthoserde.reports import Fidelity
from orthoserde.restore.check import check_digests
from orthoserde.restore.plan import Plan
from orthoserde.transforms import structure, unstructure
from orthoserde.transforms.forms import NormedTensor, convert, normed_tensors
from orthoserde.walk import Inventory
from orthoserde.weights.live import codecs_of

_REASONS = {
    STRUCTURED: "the base in the file is not the canonical completion of its first columns, or tied to another tensor, "
    "and the structured form has no other; load it into torch's form, canonicalize_ that and save it again",
    ORTHOGONAL: "its columns in the file are tied to another tensor, or no row-major buffer of its dtype, which those "
    "of a base have to be; load it into the structured form",
}


@dataclass(frozen=True)
class Converted:
    """What is said of a tensor that has another form in the file.

    Attributes:
        fidelity: The best that can be said of it.
        remark: How it was saved, and what differs: the end of what is said of it.
    """

    fidelity: Fidelity
    remark: str


@dataclass(frozen=True)
class Forms:
    """A checkpoint in the forms that the model has.

    Attributes:
        checkpoint: The checkpoint.
        converted: What has another form in the file, by name of the parametrized tensor.
        problems: What could not be brought into the model's form.
        checked: Whether the file has been held to its digests for it, all of it.
    """

    checkpoint: Checkpoint
    converted: Mapping[str, Converted]
    problems: tuple[Problem, ...]
    checked: bool = False

    def note(self, plan: Plan) -> None:
        """Say in the outcomes what was converted, and what follows from it."""
        for outcome in plan.outcomes:
            converted = self.converted.get(outcome.name)
            if converted is not None:
                outcome.fidelity = min(outcome.fidelity, converted.fidelity)
                outcome.action += converted.remark


def in_forms_of(checkpoint: Checkpoint, inventory: Inventory, registry: Registry, *, verify: bool) -> Forms:
    """Bring a checkpoint into the forms that the model has, where both have the same state.

    Args:
        checkpoint: Any checkpoint; its bases are read where the model has no place for them.
        inventory: What the model holds.
        registry: The user's classes.
        verify: Whether the file is held to its digests before bases are read.

    Raises:
        DamagedFileError: Bytes are not those that were saved.
    """
    hooks = _in_hook_form_of(checkpoint, inventory, registry)
    structured = _in_structured_form_of(hooks.checkpoint, inventory, registry, verify=verify)
    converted = {**hooks.converted, **structured.converted}
    return Forms(structured.checkpoint, converted, (*hooks.problems, *structured.problems), structured.checked)


def _in_structured_form_of(checkpoint: Checkpoint, inventory: Inventory, registry: Registry, *, verify: bool) -> Forms:
    """Bring orthogonal tensors into the form that the model has."""
    records = {name: record for record in checkpoint.manifest.parametrized for name in record.names}
    wanted: dict[str, dict[str, str]] = {ORTHOGONAL: {}, STRUCTURED: {}}
    for tensor in inventory.parametrized:
        names = names_of(tensor)
        record = next((records[name] for name in names if name in records), None)
        codecs = codecs_of(tensor, registry)
        if record is None or len(record.chain) != 1 or len(codecs) != 1 or codecs[0] is None:
            continue
        if {codecs[0].kind, record.chain[0].kind} == {ORTHOGONAL, STRUCTURED}:
            wanted[codecs[0].kind][tensor.name] = record.name
    checked = verify and bool(wanted[STRUCTURED])
    if checked:
        check_digests(checkpoint)  # or damage would be taken for another completion
    changed = structure(checkpoint, set(wanted[STRUCTURED].values()))
    changed = unstructure(changed, set(wanted[ORTHOGONAL].values()))
    kinds = {record.name: record.chain[0].kind for record in changed.manifest.parametrized}
    problems = tuple(
        Problem(name, "mismatch", _REASONS[kind])
        for kind, names_of_kind in wanted.items()
        for name, stored in names_of_kind.items()
        if kinds[stored] != kind
    )
    remark = " from {}: the same state, whose weight rounds differently in this form"
    converted = {
        name: Converted(Fidelity.UNVERIFIED, remark.format(STRUCTURED if kind == ORTHOGONAL else ORTHOGONAL))
        for kind, names_of_kind in wanted.items()
        for name in names_of_kind
    }
    return Forms(changed, converted, problems, checked)


def _in_hook_form_of(checkpoint: Checkpoint, inventory: Inventory, registry: Registry) -> Forms:
    """Give tensors the keys of hooks where the model has hooks, and of parametrizations where it has these or none."""
    saved = {name: tensor for tensor in normed_tensors(checkpoint.manifest) for name in tensor.names}
    to: dict[bool, list[NormedTensor]] = {True: [], False: []}
    converted: dict[str, Converted] = {}
    unclaimed = {tensor.name: tensor for tensor in saved.values()}
    left_out = set(checkpoint.manifest.left_out)
    for live in (*inventory.hooked, *inventory.parametrized):
        names = names_of(live)
        stored = {saved[name].name: saved[name] for name in names if name in saved}
        codec = codecs_of(live, registry)[0]
        for name in stored:
            unclaimed.pop(name, None)
        hooked = bool(live.hook_names)
        if len(live.parametrizations) > 1 or codec is None or codec.kind not in HOOK_SUFFIXES:
            continue
        others = [tensor for tensor in stored.values() if tensor.hooked != hooked and tensor.kind == codec.kind]
        if others:
            to[hooked] += others
            converted[live.name] = _as_converted(others[0])
        # What was left out is only known by its keys.
        other = NormedTensor((live.module_path, *live.aliases), live.tensor_name, codec.kind, not hooked)
        if left_out.issuperset(other.keys(live.module_path, hooked=not hooked).values()):
            to[hooked].append(other)
    # What is bare in the model, of a file that says what it is of, gets its parametrization.
    if checkpoint.manifest.has_configuration:
        bare = [
            tensor
            for tensor in unclaimed.values()
            if tensor.hooked and any(name in inventory.slots for name in tensor.names)
        ]
        to[False] += bare
        converted |= {tensor.name: _as_converted(tensor) for tensor in bare}
    changed = convert(convert(checkpoint, to[True], hooked=True), to[False], hooked=False)
    now_hooked = {record.name: record.hooked for record in changed.manifest.parametrized}
    text = "the file also has tensors under the keys that its own would have in the form that the model has"
    problems = tuple(
        Problem(tensor.name, "mismatch", text)
        for hooked, tensors in to.items()
        for tensor in tensors
        if now_hooked.get(tensor.name, hooked) != hooked
    )
    return Forms(changed, converted, problems)


def _as_converted(tensor: NormedTensor) -> Converted:
    saved_as = "a hook" if tensor.hooked else "a parametrization"
    if tensor.kind == SPECTRAL_NORM:
        # See Note [Power method] in orthoserde.parametrizations.hooks.
        remark = "equal in evaluation; in training the power method goes on from the other of its two vectors"
        return Converted(Fidelity.UNVERIFIED, f"; saved with {saved_as}: {remark}")
    return Converted(Fidelity.EXACT, f"; saved with {saved_as}")
