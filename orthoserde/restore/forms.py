"""One state, two forms: torch's orthogonal parametrization in the file, structured in the model, or back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from orthoserde.checkpoint import Checkpoint
from orthoserde.errors import Problem
from orthoserde.evaluate import codecs_of
from orthoserde.manifest import ORTHOGONAL, STRUCTURED, ParametrizedRecord
from orthoserde.names import tensor_names
from orthoserde.registry import Registry
from orthoserde.reports import RESTORED, Fidelity
from orthoserde.restore.check import check_digests
from orthoserde.restore.plan import Plan
from orthoserde.transforms import structure, unstructure
from orthoserde.walk import Inventory

_REASONS = {
    STRUCTURED: "the base in the file is not the canonical completion of its first columns, or tied to another tensor, "
    "and the structured form has no other; load it into torch's form, canonicalize_ that and save it again",
    ORTHOGONAL: "its columns in the file are tied to another tensor, or no row-major buffer of its dtype, which those "
    "of a base have to be; load it into the structured form",
}


@dataclass(frozen=True)
class Forms:
    """A checkpoint in the forms that the model has.

    Attributes:
        checkpoint: The checkpoint.
        saved_as: Kind in the file of what has another form in the model, by name of the parametrized tensor.
        problems: What could not be brought into the model's form.
    """

    checkpoint: Checkpoint
    saved_as: Mapping[str, str]
    problems: tuple[Problem, ...]

    def note(self, plan: Plan) -> None:
        """Say in the outcomes that the weights are the same but for rounding, and no more."""
        for outcome in plan.outcomes:
            kind = self.saved_as.get(outcome.name)
            if kind is not None:
                outcome.fidelity = min(outcome.fidelity, Fidelity.UNVERIFIED)
                outcome.action = f"{RESTORED} from {kind}: the same state, whose weight rounds differently in this form"


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
    records = {name: record for record in checkpoint.manifest.parametrized for name in _names(record)}
    wanted: dict[str, dict[str, str]] = {ORTHOGONAL: {}, STRUCTURED: {}}
    for tensor in inventory.parametrized:
        names = tensor_names(tensor.module_path, tensor.aliases, tensor.tensor_name)
        record = next((records[name] for name in names if name in records), None)
        codecs = codecs_of(tensor, registry)
        if record is None or len(record.chain) != 1 or len(codecs) != 1 or codecs[0] is None:
            continue
        if {codecs[0].kind, record.chain[0].kind} == {ORTHOGONAL, STRUCTURED}:
            wanted[codecs[0].kind][tensor.name] = record.name
    if verify and wanted[STRUCTURED]:
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
    saved_as = dict.fromkeys(wanted[STRUCTURED], ORTHOGONAL) | dict.fromkeys(wanted[ORTHOGONAL], STRUCTURED)
    return Forms(changed, saved_as, problems)


def _names(record: ParametrizedRecord) -> list[str]:
    return tensor_names(record.module, record.aliases, record.tensor_name)
