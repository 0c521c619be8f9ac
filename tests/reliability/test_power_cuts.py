"""The power may be cut at any moment: there is one whole checkpoint, and the new one once the save has returned."""

from __future__ import annotations

import os

import pytest

from tests.reliability.figures_here import found_by, not_linux

pytestmark = [
    not_linux,
    pytest.mark.soak,
    pytest.mark.skipif(os.name == "nt" or os.geteuid() != 0, reason="only root can cut the power of a disk"),
]


def test_whenever_the_power_is_cut_one_checkpoint_is_whole_and_the_new_one_after_the_return() -> None:
    found = found_by("power", soak=True)
    done = [figures for figures in found if not figures["notes"]]
    assert done, [figures["notes"] for figures in found]
    for figures in done:
        assert figures["violations"] == []
        assert figures["outcomes"]["after: new"] == 4
        assert figures["points"] == 84
