"""What a suite has found: how many points, what stood after each, and what should not have been."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Figures:
    """The figures of one suite.

    Attributes:
        suite: Its name.
        layer: What the points were made with.
        points: How often something went wrong for a save, or was tried.
        outcomes: How often each thing was found afterwards.
        violations: What was found and must not be, in words.
        notes: What could not be done here, and why.
        seconds: How long it took.
    """

    suite: str
    layer: str
    points: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    _begun: float = field(default_factory=time.monotonic, repr=False)

    def point(self, outcome: str, *violations: str) -> None:
        """Count a point, what came of it, and what was wrong with that."""
        self.points += 1
        self.outcomes[outcome] += 1
        self.violations += violations

    def ended(self) -> Figures:
        """The same, with the time it took."""
        self.seconds = round(time.monotonic() - self._begun, 1)
        return self

    def as_json(self) -> dict[str, object]:
        """All of it as plain values."""
        return {
            "suite": self.suite,
            "layer": self.layer,
            "points": self.points,
            "outcomes": dict(sorted(self.outcomes.items())),
            "violations": self.violations,
            "notes": self.notes,
            "seconds": self.seconds,
        }
