"""Warnings: those of transformers and geotorch are theirs; those of orthoserde stay errors."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")

THEIRS_IGNORED_OURS_ERRORS = ("ignore", "error:::orthoserde")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/ecosystem" in item.path.as_posix():
            for text in THEIRS_IGNORED_OURS_ERRORS:
                item.add_marker(pytest.mark.filterwarnings(text))


@pytest.fixture(autouse=True)
def _one_thread_and_one_seed() -> Iterator[None]:
    """Bits depend on the number of threads, and what is random is so in the same way each time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
