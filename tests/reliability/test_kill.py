"""A process may be killed at any call and at any moment of a save: one whole checkpoint is there, old or new."""

from __future__ import annotations

import os

import pytest

from tests.reliability.figures import PYTHON, STRACE
from tests.reliability.figures_here import found_by, not_linux

pytestmark = not_linux


def test_killed_at_any_call_a_save_has_left_one_whole_checkpoint() -> None:
    found = found_by("kill")
    for figures in found:
        assert figures["violations"] == []
        assert figures["outcomes"]["old"] > 50
        assert figures["outcomes"]["new"] > 8
        assert figures["outcomes"]["with a temporary file"] > 40
    points = {figures["layer"]: figures["points"] for figures in found}
    assert points[PYTHON] > (70 if STRACE in points else 300)
    assert points.get(STRACE, 500) >= 500


def test_killed_at_any_moment_a_save_has_left_one_whole_checkpoint() -> None:
    (figures,) = found_by("random")
    assert figures["violations"] == []
    assert figures["points"] == 500
    assert figures["outcomes"]["old"] > 20
    assert figures["outcomes"]["new"] > 20


def test_two_processes_that_save_to_one_path_leave_one_whole_file_at_any_time() -> None:
    (figures,) = found_by("writers")
    assert figures["violations"] == []
    assert figures["outcomes"]["saves"] == 200
    assert figures["points"] > 10


def test_every_broken_build_is_caught_by_the_suites_that_are_there_for_it() -> None:
    (figures,) = found_by("broken")
    assert figures["violations"] == []
    assert figures["outcomes"] == {"caught": figures["points"]}
    assert figures["points"] == 18


@pytest.mark.soak
@pytest.mark.parametrize("suite", ["kill", "random", "writers"])
def test_the_same_with_many_more_points(suite: str) -> None:
    for figures in found_by(suite, soak=True):
        assert figures["violations"] == []


@pytest.mark.soak
@pytest.mark.skipif(os.name == "nt" or os.geteuid() != 0, reason="only root can cut the power of a disk")
def test_every_suite_is_tried_on_every_broken_build() -> None:
    (figures,) = found_by("broken", soak=True)
    assert figures["violations"] == []
