"""What a proof says."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NoReturn

from orthoserde.reports import Fidelity
from orthoserde.wording import printable


class Grade(enum.IntEnum):
    """How well a run that was loaded agrees with what it is held to; a larger value is better.

    ``BIT_EXACT``: every number that was compared with the reference is the same to the last bit.

    ``WITHIN``: some differ by no more than rounding accounts for; see Note [Rounding].

    ``DETERMINISTIC``: there was no reference. Two fresh loads went the same way, bit for bit; whether that is the way
    of the run that was saved is not known.

    ``DIVERGES``: something differs by more.

    Example:
        >>> import orthoserde
        >>> orthoserde.Grade.BIT_EXACT > orthoserde.Grade.WITHIN > orthoserde.Grade.DETERMINISTIC
        True
    """

    DIVERGES = 0
    DETERMINISTIC = 1
    WITHIN = 2
    BIT_EXACT = 3

    def __str__(self) -> str:
        return self.name.lower().replace("_", "-")


@dataclass(frozen=True)
class Difference:
    """Something that is not the same on both sides.

    Attributes:
        step: After which step, from 1.
        name: ``"loss"``, the key of a tensor of the model, or the place of something in training state, such as
            ``"optimizer.0.weight.exp_avg"``.
        text: What differs, in words.
        absolute: Largest difference of an element; None where that was not measured.
        relative: The same in units of the largest finite value of the reference; infinite where the two cannot be
            subtracted; None where it was not measured.
        within: Whether rounding accounts for it.

    Example:
        >>> import orthoserde
        >>> print(orthoserde.Difference(1, "loss", "0.5, expected 0.25", absolute=0.25, relative=1.0, within=False))
        step 1, loss: 0.5, expected 0.25
    """

    step: int
    name: str
    text: str
    absolute: float | None
    relative: float | None
    within: bool

    def __str__(self) -> str:
        return f"step {self.step}, {printable(self.name)}: {printable(self.text)}"


@dataclass(frozen=True)
class Proof:
    """What a run that was loaded in a new process did.

    It has no truth value: compare :attr:`grade`, or use ``orthoserde.testing.assert_continues``.

    Attributes:
        path: The checkpoint, as a whole path.
        grade: The outcome.
        steps: Number of training steps that were taken.
        compared: What was compared: ``"losses"``, ``"model"``, ``"optimizer"``, names of the user's own state.
        fidelity: How faithfully the checkpoint was loaded.
        max_difference: The largest :attr:`Difference.relative` of all, 0 where all is equal; None without a reference.
        first: The first difference that rounding does not account for, or else the first difference; None where all is
            equal. Within a step the loss comes first, then the tensors of the model in the order of the model.
        differences: Number of things that differed, each step counted.
        losses: What ``step`` returned, step by step.
        environment: Under which settings this was found, by name.
        notes: What else the caller should know, one sentence each.

    Example:
        >>> import orthoserde
        >>> proof = orthoserde.Proof(
        ...     path="/run/step-7", grade=orthoserde.Grade.BIT_EXACT, steps=3, compared=("losses",),
        ...     fidelity=orthoserde.Fidelity.EXACT, max_difference=0.0, environment={"threads": "2"},
        ... )
        >>> print(proof)
        /run/step-7: bit-exact, 3 steps against the reference
          compared: losses; loaded EXACT; threads 2
    """

    path: str
    grade: Grade
    steps: int
    compared: tuple[str, ...]
    fidelity: Fidelity
    max_difference: float | None = None
    first: Difference | None = None
    differences: int = 0
    losses: tuple[float | None, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __bool__(self) -> NoReturn:
        raise TypeError("a Proof is neither true nor false: compare its grade, or use orthoserde.testing")

    def __str__(self) -> str:
        outcome = f"{self.grade}"
        if self.grade is Grade.WITHIN:
            outcome += f" {self.max_difference:.2g} of the largest value"
        held_to = "two fresh loads" if self.max_difference is None else "the reference"
        lines = [
            f"{printable(self.path)}: {outcome}, {self.steps} steps against {held_to}",
            f"  compared: {printable(', '.join(self.compared))}; loaded {self.fidelity}; "
            + ", ".join(f"{name} {value}" for name, value in self.environment.items()),
        ]
        if self.first is not None:
            more = f" ({self.differences} differences in all)" if self.differences > 1 else ""
            lines.insert(1, f"  first: {self.first}{more}")
        return "\n".join([*lines, *(f"  {printable(note)}" for note in self.notes)])
