"""What the pages show is what the command line prints."""

from __future__ import annotations

import difflib
import re
import sys
from pathlib import Path

import pytest
import torch

if sys.platform == "win32":
    pytest.skip("there are no pseudo terminals", allow_module_level=True)

from tests.cli.captures import PAGES, captured


def comparable(text: str) -> list[str]:
    """Without what depends on versions of libraries (and so on the length of headers) and on rounding."""
    text = re.sub(r"(size +|written by +|written +\w[\w ]+, |from +[\w.]+, )\d?.*", r"\1...", text)
    # Columns are as wide as their widest number.
    return [re.sub(r" +", " ", re.sub(r"\d[\d.,]*(e-\d+)?(?!\w)", "#", line)) for line in text.splitlines()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_is_current(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng(devices=[]):
        now = captured(page)
    differences = list(difflib.unified_diff(comparable(page.read_text("utf-8")), comparable(now), lineterm=""))
    assert not differences, "\n".join(["run python -m tests.cli.captures", *differences])


def test_a_changed_page_is_noticed() -> None:
    assert comparable("  verdict  ok") != comparable("  verdict  NOT OK")
    assert comparable("0.weight  4.2e-07  x") == comparable("0.weight   5e-08  x")
    assert comparable("  size   1,234 bytes") == comparable("  size   99 bytes")
