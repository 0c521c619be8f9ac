"""What a run holds, by name: of a live one, and of one that was saved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn
from torch.optim import Optimizer

from orthoserde.checkpoint import Checkpoint, LiveTensor, TensorSource
from orthoserde.manifest import Manifest, TensorRecord
from orthoserde.manifest.training import PREFIX, TrainingRecord
from orthoserde.manifest.trees import decode_tree
from orthoserde.tensor_bytes import dtype_name
from orthoserde.training import with_training
from orthoserde.training.optimizers import labelled, place_of
from orthoserde.transforms import expand
from orthoserde.walk import take_inventory


@dataclass(frozen=True)
class Stored:
    """One tensor.

    Attributes:
        record: Its dtype and shape; its digest if that is known.
        source: Its elements.
    """

    record: TensorRecord
    source: TensorSource


@dataclass(frozen=True)
class Held:
    """All that is compared.

    Attributes:
        tensors: By name: keys of the model's, and the places of those in training state.
        values: Everything else in training state, by place: options, counters.
        left_out: Names of tensors of the model that a selection left out of a file.
    """

    tensors: Mapping[str, Stored]
    values: Mapping[str, object]
    left_out: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Made:
    """What the user's ``make`` returned.

    Attributes:
        model: The model.
        optimizer: None, an optimizer, or optimizers by name.
        state: The user's own state, or None.
        arguments: All of it as it was returned, which is what ``step`` is called with.
    """

    model: nn.Module
    optimizer: Optimizer | Mapping[str, Optimizer] | None = None
    state: Mapping[str, object] | None = None
    arguments: tuple[object, ...] = ()

    def only(self, optimizers: frozenset[str], state: frozenset[str]) -> Made:
        """The same with these optimizers and entries of state alone."""
        found = {label: each for label, each in labelled(self.optimizer).items() if label in optimizers}
        entries = {name: value for name, value in (self.state or {}).items() if name in state}
        return Made(self.model, found.get("", found or None), entries or None, self.arguments)

    @property
    def parts(self) -> tuple[str, ...]:
        """What it is made of, in words."""
        return ("model", *map(place_of, labelled(self.optimizer)), *(f"state.{name}" for name in self.state or {}))


def live(made: Made) -> Held:
    """What a run holds now; its tensors are seen as they are when they are read.

    Raises:
        ConfigError: Training state holds something that cannot be stored.
    """
    tensors: dict[str, Stored] = {}
    inventory = take_inventory(made.model)
    for key, slot in inventory.slots.items():
        if slot.tensor is not None:
            own = slot.tensor.detach()
            record = TensorRecord(dtype_name(own.dtype), tuple(own.shape), tuple(own.stride()), slot.parameter)
            tensors[key] = Stored(record, LiveTensor(own))
    empty = Checkpoint(Manifest({}), {}, "the run")
    captured = with_training(empty, inventory, optimizer=made.optimizer, state=made.state, rng=False)
    training, values = _training(captured, frozenset(labelled(made.optimizer)), frozenset(made.state or {}))
    return Held({**tensors, **training}, values)


def saved(checkpoint: Checkpoint, optimizers: frozenset[str], state: frozenset[str]) -> Held:
    """What a file holds of the model, of these optimizers, and of these entries of state."""
    whole = expand(checkpoint)
    manifest = whole.manifest
    skipped = {*manifest.computed, *manifest.training_keys}
    keys = [key for key in (*manifest.tensors, *manifest.aliases) if key not in skipped]
    kept = {key: manifest.kept_key(key) for key in keys}
    tensors = {key: Stored(manifest.tensors[kept[key]], whole.sources[kept[key]]) for key in keys}
    training, values = _training(whole, optimizers, state)
    return Held({**tensors, **training}, values, frozenset(manifest.left_out))


class _Key:
    """Stands for a tensor in a tree."""

    def __init__(self, key: str) -> None:
        self.key = key


def _training(
    checkpoint: Checkpoint, optimizers: frozenset[str], state: frozenset[str]
) -> tuple[dict[str, Stored], dict[str, object]]:
    """Tensors and other values in training state, by place."""
    tensors: dict[str, Stored] = {}
    values: dict[str, object] = {}
    record = checkpoint.manifest.training
    for where, tree in () if record is None else _trees(record, optimizers, state):
        decoded = decode_tree(cast("None", tree), where, lambda key: cast("Tensor", _Key(key)))
        for place, leaf in _leaves(decoded, where):
            if isinstance(leaf, _Key):
                tensors[leaf.key.removeprefix(PREFIX)] = Stored(
                    checkpoint.manifest.tensors[leaf.key], checkpoint.sources[leaf.key]
                )
            else:
                values[place] = leaf
    return tensors, values


def _trees(record: TrainingRecord, optimizers: frozenset[str], state: frozenset[str]) -> Iterator[tuple[str, object]]:
    for label, optimizer in record.optimizers.items():
        if label in optimizers:
            where = place_of(label)
            yield from ((f"{where}.groups.{i}", group.options) for i, group in enumerate(optimizer.groups))
            yield from ((f"{where}.{name}", tree) for name, tree in optimizer.state.items())
            yield where, optimizer.rest
    yield from ((f"state.{name}", entry.value) for name, entry in record.state.items() if name in state)


def _leaves(value: object, where: str) -> Iterator[tuple[str, object]]:
    """Everything in a tree that is no list, tuple or dict, with its place; of empty ones, their type."""
    if isinstance(value, Mapping):
        items = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, (list, tuple)):
        items = [(str(i), item) for i, item in enumerate(value)]
    else:
        yield where, value
        return
    if not items:
        yield where, f"empty {type(value).__name__}"
    for name, item in items:
        yield from _leaves(item, f"{where}.{name}")
