"""No file has anything imported, run, or opened beside it: Python's audit events over the whole hostile collection."""

from __future__ import annotations

import os
from typing import Any

import pytest

from tests.reliability.hostile import CALLS, FILES, in_a_child

pytestmark = pytest.mark.skipif(os.name == "nt", reason="about POSIX files and processes")


@pytest.fixture(scope="module")
def audited() -> dict[str, Any]:
    """What a process saw that called everything on every file."""
    found: dict[str, Any] = in_a_child("audit")
    return found


def test_no_file_has_anything_imported_or_run_or_opened(audited: dict[str, Any]) -> None:
    assert audited["wrong"] == []


def test_every_file_was_tried_and_the_hook_saw_it(audited: dict[str, Any]) -> None:
    assert audited["files"] == sum(not hostile.heavy for hostile in FILES.values())
    assert audited["calls"] == audited["files"] * len(CALLS)
    # Each call opens what it was given, but for paths that are none.
    assert audited["opened"] > audited["files"]


def test_a_build_that_trusts_pickles_is_noticed() -> None:
    found = in_a_child("audit", "pickles: os.system", "restricted unpickler")
    assert any("os.system" in line for line in found["wrong"])
