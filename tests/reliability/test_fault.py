"""Any call of a save may fail, or do only a part of what it was asked for: the save tells the truth about it."""

from __future__ import annotations

import pytest

from tests.reliability.figures import STRACE
from tests.reliability.figures_here import found_by, not_linux

pytestmark = not_linux


def test_whatever_call_fails_a_save_tells_the_truth() -> None:
    found = found_by("faults")
    for figures in found:
        assert figures["violations"] == []
        assert figures["outcomes"]["FileAccessError"] > 20
        assert figures["outcomes"]["returned"] > 8
        assert set(figures["outcomes"]) <= {"CommitUncertainError", "FileAccessError", "returned"}
    assert sum(figures["points"] for figures in found) >= 300
    at_calls = [figures for figures in found if figures["suite"] == "faults"]
    assert all(figures["outcomes"]["CommitUncertainError"] > 4 for figures in at_calls)
    assert all(figures["points"] >= 300 for figures in at_calls if figures["layer"] == STRACE)


@pytest.mark.soak
def test_the_same_with_many_more_points() -> None:
    for figures in found_by("faults", soak=True):
        assert figures["violations"] == []
