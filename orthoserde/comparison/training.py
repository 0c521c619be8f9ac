"""Training state of two checkpoints, value by value."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from orthoserde.checkpoint import Checkpoint
from orthoserde.comparison import distances
from orthoserde.comparison.distances import Distance
from orthoserde.comparison.report import Pair
from orthoserde.json_values import JSON, same
from orthoserde.manifest.training import TrainingRecord

#: The place that stands for all training state.
ALL = ""

#: What keys that are no strings are called in a place.
_NO_STRINGS = ("None", "True", "False", "inf", "nan")


@dataclass(frozen=True)
class _Stored:
    """A leaf that is a tensor."""

    key: str


def compare_training(a: Checkpoint, b: Checkpoint) -> dict[str, Pair | Distance]:
    """Training state that differs, by place.

    Returns:
        Two values, or how far two tensors are apart. Where one of them has none at all, the one place :data:`ALL`.
    """
    one, two = a.manifest.training, b.manifest.training
    if one is None or two is None:
        return {} if one is two else {ALL: (None if one is None else str(one), None if two is None else str(two))}
    left, right = dict(_leaves(one)), dict(_leaves(two))
    found: dict[str, Pair | Distance] = {}
    for place in dict.fromkeys([*left, *right]):
        if (place in left) is not (place in right):
            found[place] = _alone(a, left, place), _alone(b, right, place)
            continue
        difference = _difference(a, left[place], b, right[place])
        if difference is not None:
            found[place] = difference
    return found


def _difference(a: Checkpoint, one: JSON | _Stored, b: Checkpoint, two: JSON | _Stored) -> Pair | Distance | None:
    if not isinstance(one, _Stored) or not isinstance(two, _Stored):
        shown = _shown(a, one), _shown(b, two)
        alike = isinstance(one, _Stored) is isinstance(two, _Stored)  # a string may read as a tensor is shown
        return None if alike and same(*shown) else shown
    left, right = a.manifest.tensors[one.key], b.manifest.tensors[two.key]
    if (left.dtype, left.shape) != (right.dtype, right.shape):
        return _shown(a, one), _shown(b, two)
    distance = distances.between_sources(a.sources[one.key], left.dtype, b.sources[two.key], right.dtype)
    return None if distance.identical else distance


def _alone(checkpoint: Checkpoint, leaves: Mapping[str, JSON | _Stored], place: str) -> JSON:
    """What stands in a place that one of them alone has; a None that stands there is text, for None is nothing."""
    if place not in leaves:
        return None
    shown = _shown(checkpoint, leaves[place])
    return "None" if shown is None else shown


def _shown(checkpoint: Checkpoint, leaf: JSON | _Stored) -> JSON:
    if not isinstance(leaf, _Stored):
        return leaf
    record = checkpoint.manifest.tensors[leaf.key]
    return f"{record.dtype} of shape {list(record.shape)}"


def _leaves(record: TrainingRecord) -> Iterator[tuple[str, JSON | _Stored]]:
    """Every value that training state is made of, with where it stands."""
    for label, optimizer in record.optimizers.items():
        where = f"optimizer {label}".rstrip()
        yield f"{where}: class", optimizer.class_name
        for i, group in enumerate(optimizer.groups):
            yield f"{where}: groups[{i}].parameters", list(group.parameters)
            yield from _walk(group.options, f"{where}: groups[{i}]")
        for name, value in optimizer.state.items():
            yield from _walk(value, f"{where}: state of {name}")
        yield from _walk(optimizer.rest, f"{where}: rest")
    for name, entry in record.state.items():
        yield f"{name}: class", entry.class_name
        yield from _walk(entry.value, name)
    yield from _walk(record.rng, "random generators")


def _walk(value: JSON, where: str) -> Iterator[tuple[str, JSON | _Stored]]:
    """The leaves of a tree, see Note [Trees] in ``manifest/trees.py``; reading the file has checked that it is one."""
    if isinstance(value, dict):
        ((sort, inner),) = value.items()
        if sort == "tensor":
            yield where, _Stored(str(inner))
        elif sort == "integer":
            yield where, int(str(inner))
        elif sort == "float":
            yield where, value  # with its mark, for a string may read the same
        else:
            yield f"{where}: type", sort
            if sort == "tuple":
                yield from _walk(inner, where)
            else:
                for key, item in _pairs(inner):
                    yield from _walk(item, f"{where}.{_name(key)}")
    elif isinstance(value, list):
        yield f"{where}: length", len(value)
        for i, item in enumerate(value):
            yield from _walk(item, f"{where}[{i}]")
    else:
        yield where, value


def _pairs(inner: JSON) -> Iterator[tuple[JSON, JSON]]:
    if isinstance(inner, list):
        for pair in inner:
            if isinstance(pair, list):
                yield pair[0], pair[1]


def _name(key: JSON) -> str:
    """The key of a dict in a place: a string that could be nothing else as it is, whatever else as Python writes it."""
    if isinstance(key, str):
        return key if key.isidentifier() and key not in _NO_STRINGS else repr(key)
    if isinstance(key, dict):
        ((sort, text),) = key.items()
        return str(int(str(text)) if sort == "integer" else text)
    return repr(key)
