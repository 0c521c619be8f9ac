"""A place may refuse what a save needs: the save says why, and what stood there is untouched."""

from __future__ import annotations

import os

from tests.reliability.figures_here import found_by, not_linux

pytestmark = not_linux


def test_wherever_a_save_is_refused_the_previous_file_is_intact() -> None:
    (figures,) = found_by("full")
    print("\n".join(figures["notes"]))
    assert figures["violations"] == []
    assert figures["points"] >= 12
    # What cannot be arranged is named; root can arrange all but what its machine lacks.
    assert figures["points"] + len(figures["notes"]) == 26
    assert os.geteuid() == 0 or all(note.endswith("only root can arrange it") for note in figures["notes"])
