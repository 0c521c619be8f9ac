"""What a comparison of two checkpoints found, told to the caller."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from orthoserde.comparison.distances import Distance, OnManifold
from orthoserde.json_values import JSON

#: Two values of one thing, of the first checkpoint and of the second; None for what one of them does not have.
Pair = tuple[JSON, JSON]

#: What can differ, in words, by the name of the field that says how.
SORTS: Mapping[str, str] = {
    "tensors": "tensors",
    "modules": "configuration of modules",
    "ties": "tied tensors",
    "metadata": "metadata",
    "training": "training state",
}

#: What a tensor that is not parametrized is called where the kinds of two are named.
PLAIN = "plain"


@dataclass(frozen=True)
class TensorDifference:
    """How a tensor of one checkpoint differs from the one of the same name in the other.

    Attributes:
        name: Dotted name, as a module has it: ``"layers.0.weight"``.
        kinds: Kinds of its parametrizations, ``"plain"`` for none.
        shapes: Shapes, None where they are not recorded.
        dtypes: dtypes, None where they are not recorded.
        settings: What differs in its configuration, by place.
        state: Stored tensors of a parametrized one that are not identical, by role.
        values: How far the tensors themselves are apart, the computed ones of parametrized ones; None where that is not
            known.
        manifold: The same along the manifold, for tensors with orthonormal columns.
        not_compared: Why ``values`` is None; empty if it is not.
    """

    name: str
    kinds: tuple[str, str]
    shapes: tuple[tuple[int, ...] | None, tuple[int, ...] | None]
    dtypes: tuple[str | None, str | None]
    settings: Mapping[str, Pair] = field(default_factory=dict)
    state: Mapping[str, Distance] = field(default_factory=dict)
    values: Distance | None = None
    manifold: OnManifold | None = None
    not_compared: str = ""

    def within(self, tolerance: float) -> bool:
        """Whether it is the same but for values that are apart by no more than this, relative to the first.

        Without a tolerance (0) nothing at all differs, the stored state included.
        """
        if self.kinds[0] != self.kinds[1] or self.shapes[0] != self.shapes[1] or self.dtypes[0] != self.dtypes[1]:
            return False
        if self.settings or self.not_compared or any(not each.within(tolerance) for each in self.state.values()):
            return False
        return self.values is None or self.values.within(tolerance)


@dataclass(frozen=True)
class DiffReport:
    """What differs between two checkpoints.

    Attributes:
        paths: The two.
        only: Names of tensors that one of them alone has.
        tensors: Tensors of both that are not identical, by name.
        identical: Number of tensors that are.
        modules: Configuration of modules of registered classes that differs, by path.
        ties: Names that are tied to another name in one of them alone, or to another one, with that.
        training: Training state that differs, by place: two values, or how far two tensors are apart.
        metadata: The user's strings that differ, by name.
        notes: What is stored another way and means the same, and what could not be compared; one sentence each.
        tolerance: Values that are apart by no more than this, relative to the first, do not count.
        model_only: Whether metadata and training state were not looked at.
    """

    paths: tuple[str, str]
    only: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    tensors: Mapping[str, TensorDifference] = field(default_factory=dict)
    identical: int = 0
    modules: Mapping[str, Pair] = field(default_factory=dict)
    ties: Mapping[str, Pair] = field(default_factory=dict)
    training: Mapping[str, Pair | Distance] = field(default_factory=dict)
    metadata: Mapping[str, Pair] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    tolerance: float = 0.0
    model_only: bool = False

    @property
    def same(self) -> bool:
        """Whether nothing differs, but for values within the tolerance."""
        return not self.differs_in

    @property
    def within(self) -> tuple[str, ...]:
        """Names of the tensors of both that are not identical, but within the tolerance."""
        return tuple(name for name, tensor in self.tensors.items() if tensor.within(self.tolerance))

    @property
    def differs_in(self) -> tuple[str, ...]:
        """What makes the two different: keys of :data:`SORTS`, in that order; empty if they are the same."""
        far = any(not (isinstance(v, Distance) and v.within(self.tolerance)) for v in self.training.values())
        found = {
            "tensors": any(self.only) or len(self.within) < len(self.tensors),
            "modules": bool(self.modules),
            "ties": bool(self.ties),
            "metadata": bool(self.metadata),
            "training": far,
        }
        return tuple(sort for sort in SORTS if found[sort])

    @property
    def verdict(self) -> str:
        """:attr:`same` in words, and what makes them different."""
        within = f" within {self.tolerance:g}"
        if self.same:
            return f"the same{within if self.tensors or self.training else ''}"
        text = f"different: {', '.join(SORTS[sort] for sort in self.differs_in)}"
        if "tensors" in self.differs_in:
            return text
        return f"{text}; tensors the same{within if self.tensors else ''}"
