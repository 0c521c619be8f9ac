"""Each file of the hostile collection is refused as it says there, or does nothing; `hostile.py` has the collection."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.reliability.broken_builds import BUILDS, noticed_by
from tests.reliability.hostile import CALLS, CONSTANT, FACTOR, FILES, in_a_child, outcomes, written
from tests.reliability.hostile_pickles import IS_TRUSTED
from tests.reliability.vanishing import CHANGES

pytestmark = pytest.mark.skipif(os.name == "nt", reason="about POSIX files and processes")

LIGHT = [name for name, hostile in FILES.items() if not hostile.heavy]
HEAVY = [name for name, hostile in FILES.items() if hostile.heavy]

#: The broken builds, each with files by which it is known.
KNOWN_BY = {
    "digests of tensors": ["manifests: other bytes than were saved"],
    "comparison of the header with the manifest": ["manifests: a header of another dtype"],
    "digest of the manifest": ["manifests: a manifest of another digest"],
    "size of the file": ["containers: a byte too many"],
    "format version": ["manifests: a newer version"],
    "restricted unpickler": ["pickles: builtins.getattr, archive"],
    "orthogonality": ["manifests: columns of rank 1"],
}


def test_there_are_many_of_them() -> None:
    assert len(FILES) >= 300
    assert len(HEAVY) >= 20


@pytest.mark.parametrize("name", LIGHT)
def test_a_hostile_file_comes_to_what_is_said_of_it(name: str) -> None:
    with written(FILES[name]) as path:
        assert list(outcomes(FILES[name], path)) == []


@pytest.fixture(scope="module")
def measured() -> dict[str, dict[str, Any]]:
    """What came of the heavy ones, each in a process of its own."""
    found: dict[str, dict[str, Any]] = in_a_child("heavy")
    return found


@pytest.mark.parametrize("name", HEAVY)
def test_a_heavy_file_takes_neither_the_process_nor_its_memory(name: str, measured: dict[str, dict[str, Any]]) -> None:
    found = measured[name]
    assert found["signal"] == 0
    assert found["wrong"] == []
    assert found["caused"] == []  # as in test_audit.py
    assert found["events"] > len(CALLS)
    assert found["memory"] <= FACTOR * found["bytes"] + CONSTANT


def test_every_file_is_made_anew_and_is_the_same(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    for name in LIGHT[:80]:
        if name.startswith("containers"):
            paths = [FILES[name].write(tmp_path / each) for each in ("one", "two")]
            assert Path(paths[0]).read_bytes() == Path(paths[1]).read_bytes()


def test_every_broken_build_has_files_that_it_is_known_by() -> None:
    assert sorted(KNOWN_BY) == sorted(noticed_by("hostile"))


@pytest.mark.parametrize("build", KNOWN_BY)
def test_a_build_without_a_check_is_noticed(build: str, monkeypatch: pytest.MonkeyPatch) -> None:
    BUILDS[build][0](monkeypatch)
    for name in KNOWN_BY[build]:
        with written(FILES[name]) as path:
            assert list(outcomes(FILES[name], path)), f"{name} says nothing, on {sys.platform}"


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changes_while_it_is_read_ends_no_process(change: str) -> None:
    """A file that is mapped into memory and cut off ends the process with SIGBUS; ours are read."""
    found = in_a_child("vanishing", change)
    assert found["wrong"] == []
    refused = {name for name in found["outcomes"] if name != "loaded"}
    # What is replaced under its name stays what it was for whoever has it open; an older torch refuses every pickle.
    assert bool(refused) == (change != "replaced" or not IS_TRUSTED)
