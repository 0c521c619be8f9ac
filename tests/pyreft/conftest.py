"""Warnings: those of pyreft, pyvene and transformers are theirs; those of orthoserde stay errors."""

from __future__ import annotations

import importlib.util
import logging
import os
import warnings
from collections.abc import Iterator

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")

if importlib.util.find_spec("pyvene"):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import pyreft  # noqa: F401

THEIRS_IGNORED_OURS_ERRORS = ("ignore", "error:::orthoserde", "error::orthoserde.LegacyCheckpointWarning")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/pyreft" in item.path.as_posix():
            for text in THEIRS_IGNORED_OURS_ERRORS:
                item.add_marker(pytest.mark.filterwarnings(text))


@pytest.fixture(autouse=True)
def _one_thread_and_no_chatter() -> Iterator[None]:
    """Bits depend on the number of threads, and pyvene logs a warning for each model that it loads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)
    torch.set_num_threads(threads)
