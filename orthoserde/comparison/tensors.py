"""One tensor of two checkpoints, whatever form each of them has it in."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from orthoserde.checkpoint import Checkpoint
from orthoserde.comparison import distances
from orthoserde.comparison.distances import Distance
from orthoserde.comparison.report import PLAIN, Pair, TensorDifference
from orthoserde.json_values import JSON, differences
from orthoserde.manifest import ORTHOGONAL, STRUCTURED, ParametrizedRecord, TensorRecord
from orthoserde.registry import Registry
from orthoserde.transforms import expand, hook_keys, to_parametrizations, unstructure
from orthoserde.weights.stored import Misfit, NotComputable, stored_weight

_ORTHONORMAL = frozenset({ORTHOGONAL, STRUCTURED})


class Side:
    """One of the two checkpoints, its tensors by the names that modules have for them."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        renamed = to_parametrizations(checkpoint)
        self._keys_in_file = {
            key: old for key, old in hook_keys(checkpoint.manifest).items() if key in renamed.manifest
        }
        self.given = unstructure(renamed)
        self.whole = expand(self.given)
        self.compact = {record.name: record for record in self.given.manifest.parametrized if record.columns()}
        manifest = self.whole.manifest
        self.has_configuration = manifest.has_configuration
        self.records = {record.name: record for record in manifest.parametrized}
        inside: set[str] = {key for record in manifest.parametrized for key in record.tensor_keys()}
        inside |= {key for record in manifest.parametrized for key in _under_aliases(record)}
        inside.update(manifest.training_keys)
        plain = [key for key in manifest.tensors if key not in inside and key not in manifest.computed_keys]
        plain += [key for key in manifest.aliases if key not in inside]
        self.names: dict[str, None] = dict.fromkeys([*self.records, *plain])
        self.ties = {key: kept for key, kept in manifest.aliases.items() if key not in inside}

    def borrow(self, other: Side) -> None:
        """Take records of the other for tensors of which this checkpoint has no configuration, but all the state."""
        for name, record in other.records.items():
            keys = record.tensor_keys()
            if name not in self.names and all(key in self.whole.manifest for key in keys):
                self.records[name] = record
                inside = {*keys, *_under_aliases(record)}
                self.names = dict.fromkeys([name, *(each for each in self.names if each not in inside)])

    def in_file(self, name: str) -> str:
        """A name as it stands in the file: its tensors may have the keys of a hook there."""
        return self._keys_in_file.get(name, name)

    def kinds(self, name: str) -> str:
        """Kinds of its parametrizations, in order."""
        record = self.records.get(name)
        return PLAIN if record is None else ", then ".join(link.kind for link in record.chain)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Its shape, None where only running it would tell."""
        return self.records[name].shape if name in self.records else self.stored(name).shape

    def dtype(self, name: str) -> str | None:
        """Its dtype, None likewise."""
        return self.records[name].dtype if name in self.records else self.stored(name).dtype

    def stored(self, key: str) -> TensorRecord:
        """The record of a stored tensor, given its key or an alias."""
        return self.whole.manifest.tensors[self.whole.manifest.kept_key(key)]

    def value(self, name: str, registry: Registry) -> Tensor:
        """The tensor that a name stands for; raises as ``stored_weight`` does."""
        record = self.records.get(name)
        if record is None:
            return self.whole.tensor(name)
        return stored_weight(self.whole, record, registry)


def _under_aliases(record: ParametrizedRecord) -> set[str]:
    return {key for path in record.aliases for key in record.at(path).tensor_keys()}


def compare(one: Side, two: Side, name: str, registry: Registry) -> TensorDifference | None:
    """How one tensor differs; None if it is identical."""
    kinds, dtypes = (one.kinds(name), two.kinds(name)), (one.dtype(name), two.dtype(name))
    shapes = (one.shape(name), two.shape(name))
    settings: Mapping[str, Pair] = {}
    state: Mapping[str, Distance] = {}
    comparable = shapes[0] == shapes[1]
    if kinds == (PLAIN, PLAIN):
        values = _stored_distance(one.whole, name, two.whole, name) if comparable else None
        settings = _sorts(one, two, name)
        if values is not None and values.identical and not settings:
            return None
        text = _shapes_differ(comparable)
        return TensorDifference(one.in_file(name), kinds, shapes, dtypes, settings, values=values, not_compared=text)
    if kinds[0] == kinds[1]:
        settings = _settings(one.records[name], two.records[name])
        state, complete = _state(one, two, name)
        if complete and not settings and not state and dtypes[0] == dtypes[1]:
            return None
    if not comparable:
        text = _shapes_differ(comparable)
        return TensorDifference(name, kinds, shapes, dtypes, settings, state, not_compared=text)
    try:
        left, right = one.value(name, registry), two.value(name, registry)
    except (NotComputable, Misfit) as reason:
        return TensorDifference(name, kinds, shapes, dtypes, settings, state, not_compared=str(reason))
    if left.shape != right.shape:
        return TensorDifference(name, kinds, shapes, dtypes, settings, state, not_compared=_shapes_differ(False))
    manifold = distances.on_manifold(left, right) if _is_orthonormal(one, two, name) else None
    return TensorDifference(
        name, kinds, shapes, dtypes, settings, state, distances.between(left, right), manifold=manifold
    )


def _sorts(one: Side, two: Side, name: str) -> dict[str, Pair]:
    """What differs in a plain tensor beside its elements: whether it is a parameter, and requires a gradient."""
    if not (one.has_configuration and two.has_configuration):
        return {}  # other libraries do not say
    left, right = one.stored(name), two.stored(name)
    pairs = {
        "parameter": (left.parameter, right.parameter),
        "requires_grad": (left.requires_grad, right.requires_grad),
    }
    return {place: pair for place, pair in pairs.items() if pair[0] != pair[1]}


def _shapes_differ(comparable: bool) -> str:
    return "" if comparable else "the shapes differ"


def _is_orthonormal(one: Side, two: Side, name: str) -> bool:
    """Whether either of the two has orthonormal columns by its last parametrization."""
    records = [side.records[name] for side in (one, two) if name in side.records]
    return any(record.chain[-1].kind in _ORTHONORMAL for record in records)


def _stored_distance(a: Checkpoint, ours: str, b: Checkpoint, theirs: str) -> Distance:
    left, right = a.manifest.kept_key(ours), b.manifest.kept_key(theirs)
    return distances.between_sources(
        a.sources[left], a.manifest.tensors[left].dtype, b.sources[right], b.manifest.tensors[right].dtype
    )


def _state(one: Side, two: Side, name: str) -> tuple[dict[str, Distance], bool]:
    """Stored tensors of a parametrized tensor that are not identical, and whether all could be compared."""
    if name in one.compact and name in two.compact:
        # The columns stand for their bases, which may be n x n numbers for n.
        return _roles_apart(one.given, one.compact[name], two.given, two.compact[name])
    return _roles_apart(one.whole, one.records[name], two.whole, two.records[name])


def _roles_apart(
    a: Checkpoint, one: ParametrizedRecord, b: Checkpoint, two: ParametrizedRecord
) -> tuple[dict[str, Distance], bool]:
    ours, theirs = _roles(one), _roles(two)
    found: dict[str, Distance] = {}
    complete = ours.keys() == theirs.keys()
    for role in sorted(ours.keys() & theirs.keys()):
        left, right = a.manifest.kept_key(ours[role]), b.manifest.kept_key(theirs[role])
        if a.manifest.tensors[left].shape != b.manifest.tensors[right].shape:
            complete = False
            continue
        distance = _stored_distance(a, left, b, right)
        if not distance.identical:
            found[role] = distance
    return found, complete


def _roles(record: ParametrizedRecord) -> dict[str, str]:
    """Keys of the tensors of a parametrized tensor by what they are in it."""
    found = {name: record.original_key(name) for name in record.originals}
    return found | {
        f"{i}.{role}": record.link_key(i, role) for i, link in enumerate(record.chain) for role in link.tensors
    }


def _settings(one: ParametrizedRecord, two: ParametrizedRecord) -> dict[str, Pair]:
    """What differs in the configuration of two chains of the same kinds."""
    found: dict[str, Pair] = {}
    if one.unsafe != two.unsafe:
        found["unsafe"] = (one.unsafe, two.unsafe)
    if one.parameter != two.parameter:
        found["parameter"] = (one.parameter, two.parameter)
    for i, (left, right) in enumerate(zip(one.chain, two.chain, strict=True)):
        if left.class_name != right.class_name:
            found[f"{i}.class"] = (left.class_name, right.class_name)
        if left.version != right.version:
            found[f"{i}.version"] = (left.version, right.version)
        found |= {f"{i}.{where}": (a, b) for where, a, b in json_differences(left.config, right.config)}
    return found


def json_differences(one: Mapping[str, JSON] | None, two: Mapping[str, JSON] | None) -> list[tuple[str, JSON, JSON]]:
    """The places at which two configurations differ, with what each has there."""
    left: JSON = None if one is None else dict(one)
    right: JSON = None if two is None else dict(two)
    return [(where or "config", a, b) for where, a, b in differences(left, right)]
