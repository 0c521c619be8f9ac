"""What differs between two checkpoints: configuration, elements, and distances on the manifold too.

Note [Forms of a tensor]
A base may be stored whole or as its first columns, and torch's parametrization and the structured one stand for the
same state. So both checkpoints are first brought to whole bases in torch's form. What still is of another kind
(parametrized here and plain there, another map, another class) is compared by the tensor that it stands for.
"""

from __future__ import annotations

from collections.abc import Mapping

from orthoserde import modes
from orthoserde.checkpoint import Checkpoint
from orthoserde.comparison.report import DiffReport, Pair, TensorDifference
from orthoserde.comparison.tensors import Side, compare, json_differences
from orthoserde.comparison.training import compare_training
from orthoserde.manifest import Manifest
from orthoserde.registry import Registry

__all__ = ["DiffReport", "Pair", "TensorDifference", "diff"]


def diff(
    a: Checkpoint, b: Checkpoint, registry: Registry, *, tolerance: float = 0.0, model_only: bool = False
) -> DiffReport:
    """Compare two checkpoints.

    Plain tensors are compared in blocks. Of a parametrized tensor that is not identical both computed tensors are in
    memory at once, one pair at a time. Training state is compared value by value.

    Args:
        a: The first.
        b: The second.
        registry: The user's codecs.
        tolerance: What values may be apart, in Frobenius norms relative to the first, and count as the same.
        model_only: Whether metadata and training state are left aside.

    Returns:
        What differs; see Note [Forms of a tensor].

    Raises:
        FileAccessError: The system refuses to read a file.
        FileFormatError: A file changed meanwhile, or the columns that a base is worked out from are damaged.
    """
    with modes.ordinary():
        one, two = Side(a), Side(b)
        for side, other in ((one, two), (two, one)):
            if not side.has_configuration:
                side.borrow(other)
        names = [name for name in one.names if name in two.names]
        found: dict[str, TensorDifference] = {}
        for name in names:
            difference = compare(one, two, name, registry)
            if difference is not None:
                found[difference.name] = difference
        training = {} if model_only else compare_training(one.whole, two.whole)
    configured = one.has_configuration and two.has_configuration
    return DiffReport(
        paths=(a.origin, b.origin),
        only=(
            tuple(one.in_file(name) for name in one.names if name not in two.names),
            tuple(two.in_file(name) for name in two.names if name not in one.names),
        ),
        tensors=found,
        identical=len(names) - len(found),
        modules=_modules(a.manifest, b.manifest),
        ties=_pairs(one.ties, two.ties) if configured else {},
        training=training,
        metadata=_pairs(a.manifest.metadata, b.manifest.metadata) if configured and not model_only else {},
        notes=tuple(_notes(a, b, model_only=model_only)),
        tolerance=tolerance,
        model_only=model_only,
    )


def _modules(one: Manifest, two: Manifest) -> dict[str, Pair]:
    """Configuration of registered modules that differs; nothing where a file has none."""
    if not one.has_configuration or not two.has_configuration:
        return {}
    sides = [{record.path: record for record in manifest.modules} for manifest in (one, two)]
    found: dict[str, Pair] = {}
    for path in dict.fromkeys([*sides[0], *sides[1]]):
        left, right = sides[0].get(path), sides[1].get(path)
        if left is None or right is None:
            found[f"{path or '(model)'}: kind"] = (left.kind if left else None, right.kind if right else None)
            continue
        if left.kind != right.kind or left.version != right.version:
            found[f"{path or '(model)'}: kind"] = (f"{left.kind} {left.version}", f"{right.kind} {right.version}")
        for where, a, b in json_differences(left.config, right.config):
            found[f"{path or '(model)'}: {where}"] = (a, b)
    return found


def _pairs(one: Mapping[str, str], two: Mapping[str, str]) -> dict[str, Pair]:
    names = dict.fromkeys([*one, *two])
    return {name: (one.get(name), two.get(name)) for name in names if one.get(name) != two.get(name)}


def _notes(a: Checkpoint, b: Checkpoint, *, model_only: bool) -> list[str]:
    one, two = a.manifest, b.manifest
    notes: list[str] = []
    if set(one.compact) != set(two.compact):
        notes.append("bases are stored as columns in one of them and whole in the other, which means the same")
    kinds = [{r.name: [link.kind for link in r.chain] for r in manifest.parametrized} for manifest in (one, two)]
    if any(kinds[0][name] != kinds[1][name] for name in kinds[0].keys() & kinds[1].keys()):
        notes.append("parametrizations are of other kinds; state is compared where one form can be taken for the other")
    if one.has_configuration != two.has_configuration:
        plain, ours = ("b", "a") if one.has_configuration else ("a", "b")
        notes.append(
            f"{plain} does not say how its tensors are parametrized; those that have the names of parametrized ones "
            f"of {ours} are taken to be computed in the same way"
        )
    if any(manifest.computed for manifest in (one, two)):
        notes.append("computed tensors that are stored for other readers are not compared")
    if model_only:
        notes.append("metadata and training state were not compared, as was asked")
    return notes
