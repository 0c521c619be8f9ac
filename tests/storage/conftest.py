"""What the tests of shards start from."""

from __future__ import annotations

from pathlib import Path

import pytest

import orthoserde
from tests.storage.shard_cases import LIMIT, make


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a checkpoint in shards, of a model of ones."""
    orthoserde.save(make(1.0), tmp_path / "folder", max_shard_size=LIMIT)
    return tmp_path / "folder"
