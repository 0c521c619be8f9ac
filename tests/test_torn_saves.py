"""A model that changes while it is being saved: no file of two steps; see Note [Torn] in orthoserde/checkpoint.py."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import orthoserde
from orthoserde import TornSaveError
from orthoserde.capture import capture
from orthoserde.checkpoint import Checkpoint
from orthoserde.registry import default_registry
from orthoserde.storage import writer
from orthoserde.tensor_bytes import Digest


def net() -> nn.Module:
    layers = [nn.Linear(8, 8) for _ in range(3)]
    torch.nn.utils.parametrizations.orthogonal(layers[0])
    return nn.Sequential(*layers, nn.BatchNorm1d(8))


def add_one(model: nn.Module, key: str) -> None:
    with torch.no_grad():
        dict(model.state_dict(keep_vars=True))[key].add_(1)


def in_the_middle(monkeypatch: pytest.MonkeyPatch, act: Callable[[], None]) -> None:
    """Act when the elements of the first tensor have been read."""
    acted: list[bool] = []

    class Acting(Digest):
        def add(self, block: memoryview) -> None:
            super().add(block)
            if not acted:
                acted.append(True)
                act()

    monkeypatch.setattr(writer, "Digest", Acting)


@pytest.mark.parametrize("key", sorted(net().state_dict()))
def test_a_tensor_that_changes_while_it_is_saved_is_named_and_the_previous_file_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    path = tmp_path / "model"
    path.write_bytes(b"before")
    model = net()
    in_the_middle(monkeypatch, lambda: add_one(model, key))
    with pytest.raises(TornSaveError, match=f"{key} changed while it was being saved"):
        orthoserde.save(model, path)
    assert path.read_bytes() == b"before"
    assert [file.name for file in tmp_path.iterdir()] == ["model"]
    orthoserde.save(model, path)  # nothing changes this time
    assert not orthoserde.verify(path).damaged


@pytest.mark.parametrize("max_shard_size", [None, 300])
def test_an_operation_that_ends_only_after_its_tensor_was_read_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_shard_size: int | None
) -> None:
    """Torch counts a write when it has ended; until then a reader sees some of it, or all, and nothing is counted."""
    model, sync = net(), os.fsync
    path = tmp_path / "model"
    if max_shard_size is not None:
        path.mkdir()  # a folder that a save makes is forced to the disk before a tensor is read

    def sync_and_end(descriptor: int) -> None:
        sync(descriptor)
        add_one(model, "1.bias")

    monkeypatch.setattr(os, "fsync", sync_and_end)
    with pytest.raises(TornSaveError, match=r"1\.bias changed while it was being saved"):
        orthoserde.save(model, path, max_shard_size=max_shard_size)
    assert not [found for found in tmp_path.rglob("*") if found.is_file()]


def test_an_optimizer_that_steps_while_it_is_saved_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0)

    def step() -> None:
        model(torch.ones(4, 8)).sum().backward()
        optimizer.step()

    step()
    in_the_middle(monkeypatch, step)
    with pytest.raises(TornSaveError, match=r"and \d+ more changed while"):
        orthoserde.save(model, tmp_path / "model", optimizer=optimizer)
    assert not list(tmp_path.iterdir())


def test_state_of_the_optimizer_alone_is_looked_at_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(4, 8)).sum().backward()
    optimizer.step()
    moment = optimizer.state[model[1].weight]["exp_avg"]  # type: ignore[index]
    in_the_middle(monkeypatch, lambda: moment.mul_(2))
    with pytest.raises(TornSaveError, match=r"optimizer.*exp_avg"):
        orthoserde.save(model, tmp_path / "model", optimizer=optimizer)


def test_a_snapshot_that_is_torn_is_no_snapshot(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    captured = capture(model, default_registry)
    captured.snapshot()
    add_one(model, "1.bias")
    with pytest.raises(TornSaveError, match=r"1\.bias changed"):
        captured.snapshot()


def test_inference_tensors_which_torch_does_not_count_are_saved(tmp_path: Path) -> None:
    with torch.inference_mode():
        model = nn.Linear(2, 2)
    orthoserde.save(model, tmp_path / "model")
    assert orthoserde.verify(tmp_path / "model").ok


def test_saves_while_another_thread_trains_are_refused_or_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every step adds one to all tensors, so a file of one step holds one number.

    An operation is counted when it has ended. Each ends before the counts are compared, for on a busy machine one may
    be at work from before its tensor is read until after that, which nobody can see.
    """
    model = nn.ParameterList([nn.Parameter(torch.zeros(1 << 16)) for _ in range(40)])
    stop = threading.Event()
    between, operating = threading.Lock(), threading.Lock()
    compare = Checkpoint.check_unchanged

    def compare_between_operations(checkpoint: Checkpoint) -> None:
        with operating:
            compare(checkpoint)

    monkeypatch.setattr(Checkpoint, "check_unchanged", compare_between_operations)

    def train() -> None:
        with torch.no_grad():
            while not stop.is_set():
                with between:
                    for parameter in model:
                        with operating:
                            parameter.add_(1)

    outcomes: list[str] = []
    thread = threading.Thread(target=train)
    thread.start()
    try:
        while len(outcomes) < 20 or "refused" not in outcomes:
            try:
                with between:
                    captured = capture(model, default_registry)
                writer.write(captured, tmp_path / "model")
            except TornSaveError:
                outcomes.append("refused")
            else:
                values = {
                    float(value) for key in captured.manifest.tensors for value in _values(tmp_path / "model", key)
                }
                outcomes.append("whole")
                assert len(values) == 1
    finally:
        stop.set()
        thread.join()


def test_a_build_without_the_comparison_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tests above refuse is then a file of two steps, which nothing else finds."""
    model = nn.ParameterList([nn.Parameter(torch.zeros(4)) for _ in range(2)])

    def step() -> None:
        for key in model.state_dict():
            add_one(model, key)

    in_the_middle(monkeypatch, step)
    monkeypatch.setattr(Checkpoint, "check_unchanged", lambda checkpoint: None)
    orthoserde.save(model, tmp_path / "model")
    assert {value for key in ("0", "1") for value in _values(tmp_path / "model", key)} == {0, 1}
    assert orthoserde.verify(tmp_path / "model").ok


def _values(path: Path, key: str) -> list[float]:
    with orthoserde.storage.read(path) as checkpoint:
        tensor = checkpoint.tensor(key)
    return [float(tensor.min()), float(tensor.max())]
