"""Debug metrics: free when off, and the same to a logger and to a callable."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import orthogonal, spectral_norm

import orthoserde
from orthoserde.weights import live
from tests.helpers import raised_by

KEYS = {"event", "tensor", "residual_before", "residual", "original_norm", "base_norm", "bytes", "seconds"}


def make() -> nn.Sequential:
    return nn.Sequential(orthogonal(nn.Linear(4, 3)), spectral_norm(nn.Linear(3, 3)), nn.Linear(3, 3))


def test_a_callable_gets_a_mapping_for_each_parametrized_tensor(tmp_path: Path) -> None:
    model, seen = make(), list[Mapping[str, object]]()
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    orthoserde.save(model, tmp_path / "m", debug=seen.append)
    orthoserde.load(model, tmp_path / "m", debug=seen.append)
    assert all(torch.equal(buffers[name], buffer) for name, buffer in model.named_buffers())
    assert [(entry["event"], entry["tensor"]) for entry in seen] == [
        (event, tensor) for event in ("save", "load") for tensor in ("0.weight", "1.weight")
    ]
    for entry in seen:
        assert set(entry) == KEYS
        assert isinstance(entry["seconds"], float)
    first, second = seen[0], seen[1]
    assert isinstance(first["residual"], float)
    assert first["residual"] < 1e-5
    assert first["original_norm"] == pytest.approx(3**0.5)
    assert first["base_norm"] == pytest.approx(2.0)
    assert first["bytes"] == 4 * (3 * 4 + 4 * 4)
    assert second["residual"] is None
    assert second["base_norm"] is None


def test_the_residual_before_a_load_is_that_of_the_model_as_it_was(tmp_path: Path) -> None:
    orthoserde.save(make(), tmp_path / "m")
    model, seen = make(), list[Mapping[str, object]]()
    model.get_buffer("0.parametrizations.weight.0.base").mul_(2)
    orthoserde.load(model, tmp_path / "m", debug=seen.append)
    assert seen[0]["residual_before"] == pytest.approx(3.0, abs=1e-4)
    assert isinstance(seen[0]["residual"], float)
    assert seen[0]["residual"] < 1e-5


def test_a_load_that_attaches_or_makes_tensors_is_measured_too(tmp_path: Path) -> None:
    orthoserde.save(make(), tmp_path / "m")
    bare, seen = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3), nn.Linear(3, 3)), list[Mapping[str, object]]()
    orthoserde.load(bare.to("meta"), tmp_path / "m", debug=seen.append)
    assert [entry["residual_before"] for entry in seen] == [None, None]
    assert isinstance(seen[0]["residual"], float)


@pytest.mark.parametrize(("value", "on"), [("1", True), ("true", True), ("0", False), ("", False), (None, False)])
def test_the_environment_decides_where_the_caller_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, value: str | None, on: bool
) -> None:
    monkeypatch.delenv("ORTHOSERDE_DEBUG", raising=False)
    if value is not None:
        monkeypatch.setenv("ORTHOSERDE_DEBUG", value)
    with caplog.at_level(logging.INFO, logger="orthoserde"):
        orthoserde.save(make(), tmp_path / "m")
    assert len(caplog.records) == (2 if on else 0)
    assert all("residual=" in record.getMessage() for record in caplog.records)
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="orthoserde"):
        orthoserde.save(make(), tmp_path / "m", debug=not on)
    assert len(caplog.records) == (0 if on else 2)


def test_off_nothing_is_evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluated: list[object] = []
    monkeypatch.delenv("ORTHOSERDE_DEBUG", raising=False)
    monkeypatch.setattr(live, "computed", lambda tensor, registry: evaluated.append(tensor))
    model = make()
    orthoserde.save(model, tmp_path / "m")
    orthoserde.load(model, tmp_path / "m")
    assert evaluated == []
    orthoserde.save(model, tmp_path / "m", debug=True)
    assert evaluated


def test_a_model_that_is_refused_is_refused_in_the_same_words_when_it_is_measured(tmp_path: Path) -> None:
    model = make()
    orthoserde.save(model, tmp_path / "m")
    chain = model.get_submodule("0.parametrizations.weight")
    prune.random_unstructured(chain, "original", 1)  # type: ignore[no-untyped-call]  # torch has no types for it
    for refused in (orthoserde.save, orthoserde.load):
        said = raised_by(functools.partial(refused, model, tmp_path / "m"))
        assert isinstance(said, orthoserde.OrthoserdeError)
        assert str(raised_by(functools.partial(refused, model, tmp_path / "m", debug=True))) == str(said)
