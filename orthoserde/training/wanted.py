"""What the optimizers of one load share: what the file calls a parameter, and which of them start afresh."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from orthoserde.errors import Problem
from orthoserde.manifest import Manifest

ALL = "all"

GetTensor = Callable[[str], Tensor]


@dataclass
class Wanted:
    """What all optimizers of one load share.

    Attributes:
        manifest: What the file holds.
        parameters: Parameters of the model by key.
        afresh: Names of the parametrized tensors that start in a new chart.
        reset: Names whose state starts afresh, or ``"all"``.
        described: Gives a tensor of the file by key, without its elements.
    """

    manifest: Manifest
    parameters: Mapping[str, Tensor]
    afresh: tuple[str, ...]
    reset: tuple[str, ...]
    described: GetTensor
    _used: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._keys: dict[int, list[str]] = {}
        for key, parameter in self.parameters.items():
            self._keys.setdefault(id(parameter), []).append(key)

    def name_of(self, parameter: Tensor, known: Collection[str]) -> str | None:
        """What the file calls a parameter, or would; None if the model does not have it."""
        own = self._keys.get(id(parameter), ())
        # Parameters that share memory, and are several objects, have a name each: those come before that of the memory.
        kept = [self.manifest.kept_key(key) for key in own]
        return next((key for key in (*own, *kept) if key in known), kept[0] if kept else None)

    def is_reset(self, key: str) -> bool:
        """Whether the state of a parameter starts afresh because that was asked for."""
        found = [name for name in self.reset if name == ALL or covers(name, key)]
        self._used.update(found)
        return bool(found)

    def chart_of(self, key: str) -> str | None:
        """The parametrized tensor that starts in a new chart and has this parameter."""
        return next((name for name in self.afresh if covers(name, key)), None)

    def unused_resets(self) -> list[Problem]:
        """Names to reset that name no parameter of an optimizer."""
        unused = [name for name in self.reset if name not in self._used and name != ALL]
        return [
            Problem(f"reset={name!r}", "mismatch", "no optimizer that optimizer= loads has a parameter of this name")
            for name in unused
        ]


def covers(name: str, key: str) -> bool:
    """Whether a parameter belongs to the tensor, parameter or module of this name."""
    module, _, tensor = name.rpartition(".")
    prefix = f"{module}." if module else ""
    return key == name or key.startswith((f"{name}.", f"{prefix}parametrizations.{tensor}."))
