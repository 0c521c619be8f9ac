"""What a manifest says of training state: frozen values, whose tensors are stored under keys that begin with a dot."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from orthoserde.json_values import JSON
from orthoserde.manifest.trees import keys_in
from orthoserde.wording import counted

#: What keys of training state begin with. No tensor of a model can have such a key.
PREFIX = "."


@dataclass(frozen=True)
class GroupRecord:
    """One parameter group of an optimizer.

    Attributes:
        parameters: Keys of its parameters, in their order.
        options: All else that the group holds, such as ``lr``: a tree, see Note [Trees].
    """

    parameters: tuple[str, ...]
    options: JSON


@dataclass(frozen=True)
class OptimizerRecord:
    """An optimizer.

    Attributes:
        class_name: ``module:qualname`` of its class, compared but never imported.
        groups: Its parameter groups, in their order.
        state: Trees by the key of the parameter that they belong to.
        rest: A tree of what else its ``state_dict`` holds.
    """

    class_name: str
    groups: tuple[GroupRecord, ...]
    state: Mapping[str, JSON]
    rest: JSON


@dataclass(frozen=True)
class StateRecord:
    """One entry of the user's own state.

    Attributes:
        class_name: ``module:qualname`` of the object whose ``state_dict`` it is; None for a plain value.
        value: A tree.
    """

    class_name: str | None
    value: JSON

    def tensor_keys(self, name: str) -> list[str]:
        """Keys of its tensors."""
        return list(keys_in(self.value, f"manifest.training.state[{name!r}]"))


@dataclass(frozen=True)
class TrainingRecord:
    """All training state.

    Attributes:
        optimizers: By the name that they were given; a single one has the name ``""``.
        state: The user's own state, by name.
        rng: A tree of the states of random generators; None where they were not saved.
    """

    optimizers: Mapping[str, OptimizerRecord] = field(default_factory=dict)
    state: Mapping[str, StateRecord] = field(default_factory=dict)
    rng: JSON = None

    def trees(self) -> Iterator[tuple[str, JSON]]:
        """All trees, with where they stand."""
        for label, optimizer in self.optimizers.items():
            where = f"manifest.training.optimizers[{label!r}]"
            for i, group in enumerate(optimizer.groups):
                yield f"{where}.groups[{i}].options", group.options
            for name, value in optimizer.state.items():
                yield f"{where}.state[{name!r}]", value
            yield f"{where}.rest", optimizer.rest
        for name, entry in self.state.items():
            yield f"manifest.training.state[{name!r}].value", entry.value
        yield "manifest.training.rng", self.rng

    def keys(self, where: str) -> list[str]:
        """Keys of all its tensors.

        Args:
            where: The file, for messages.

        Raises:
            FileFormatError: A tree is not one.
        """
        return [key for place, tree in self.trees() for key in keys_in(tree, f"{where}: {place}")]

    def rng_keys(self) -> list[str]:
        """Keys of the states of the random generators."""
        return list(keys_in(self.rng, "manifest.training.rng"))

    def renamed(self, keys: Mapping[str, str]) -> TrainingRecord:
        """The same of parameters that have other keys.

        Args:
            keys: Their new keys by old ones.
        """
        optimizers = {
            label: dataclasses.replace(
                record,
                groups=tuple(
                    dataclasses.replace(group, parameters=tuple(keys.get(key, key) for key in group.parameters))
                    for group in record.groups
                ),
                state={keys.get(key, key): value for key, value in record.state.items()},
            )
            for label, record in self.optimizers.items()
        }
        return dataclasses.replace(self, optimizers=optimizers)

    def __str__(self) -> str:
        parts = [
            f"{f'optimizer {label}' if label else 'optimizer'} "
            f"({counted(sum(len(group.parameters) for group in record.groups), 'parameter')})"
            for label, record in self.optimizers.items()
        ]
        parts += list(self.state)
        parts += ["random generators"] if self.rng is not None else []
        return ", ".join(parts)
