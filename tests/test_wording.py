"""Numbers of things in words."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

import orthoserde
from orthoserde.wording import counted


def test_one_is_not_several() -> None:
    assert [counted(count, "tensor") for count in (0, 1, 2)] == ["0 tensors", "1 tensor", "2 tensors"]


def test_reports_of_one_tensor(tmp_path: Path) -> None:
    model = nn.Linear(2, 2, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    text = str(orthoserde.save(model, tmp_path / "m", optimizer=optimizer))
    assert ": 1 tensor, 0 weights parametrized, " in text
    assert "optimizer (1 parameter)" in text
    assert ": EXACT, 1 tensor, 0 weights parametrized" in str(orthoserde.load(model, tmp_path / "m"))
