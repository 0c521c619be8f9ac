"""The user's class under its own name, in another module than in the process that saved."""

from __future__ import annotations

from tests.pyreft import interventions


class Gated(interventions.Gated):
    """As a user has it who has moved it: the same name and the same state."""
