from __future__ import annotations

import gc
import logging
import os
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import nn

import orthoserde
from orthoserde import storage
from orthoserde.checkpoint import Checkpoint, LiveTensor
from orthoserde.folder.background import Background
from tests.folder.cases import names, overwrite_, saved, small
from tests.helpers import assert_same_state, assert_unchanged, snapshot


class Gate:
    """Holds every write back until it is opened; may let it fail then."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened = threading.Event()
        self.reached = threading.Event()
        self.error: BaseException | None = None
        self.threads: list[threading.Thread] = []
        self._write = storage.write
        monkeypatch.setattr(storage, "write", self.write)

    def write(self, checkpoint: Checkpoint, path: str) -> int:
        self.threads.append(threading.current_thread())
        self.reached.set()
        assert self.opened.wait(30)
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        return self._write(checkpoint, path)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(monkeypatch)


def failing(gate: Gate, folder: Path, error: BaseException) -> orthoserde.Checkpoints:
    """Checkpoints whose step 1 is saved, and whose save of step 2 fails in the background."""
    gate.opened.set()
    checkpoints = saved(folder, 1)
    gate.error = error
    checkpoints.save(2, small(), wait=False)
    return checkpoints


def test_what_becomes_of_the_model_after_the_call_is_not_in_the_file(tmp_path: Path, gate: Gate) -> None:
    model, same = small(), small()
    before = snapshot(model)
    checkpoints = orthoserde.Checkpoints(tmp_path / "background")
    checkpoints.save(1, model, metric=0.5, wait=False)
    assert_unchanged(model, before)
    assert gate.reached.wait(30)
    overwrite_(model)
    gate.opened.set()
    report = checkpoints.wait()
    expected = orthoserde.Checkpoints(tmp_path / "waiting").save(1, same, metric=0.5)
    assert report is not None
    assert vars(report) == {**vars(expected), "path": str(checkpoints.path(1))}
    assert checkpoints.path(1).read_bytes() == Path(expected.path).read_bytes()
    assert checkpoints.wait() is None


ODD: dict[str, Callable[[], nn.Module]] = {
    "no tensors": nn.Module,
    "bfloat16": lambda: small().to(torch.bfloat16),
    "expanded": lambda: _with_buffers(expanded=torch.arange(3.0).expand(2, 3), strided=torch.arange(10.0)[::2]),
    "overlapping": lambda: _with_buffers(**_overlapping()),
    "complex": lambda: _with_buffers(
        conj=torch.tensor([1 + 2j, 3j]).conj(), wide=torch.zeros(2, dtype=torch.complex128)
    ),
    "empty": lambda: _with_buffers(empty=torch.zeros(0, 3), scalar=torch.tensor(2), flags=torch.tensor([True])),
    "canonical base": lambda: orthoserde.orthogonal(nn.Linear(40, 3)),
}


def _with_buffers(**buffers: torch.Tensor) -> nn.Module:
    module = nn.Module()
    for name, buffer in buffers.items():
        module.register_buffer(name, buffer)
    return module


def _overlapping() -> dict[str, torch.Tensor]:
    whole = torch.arange(12.0).view(3, 4)
    return {"whole": whole, "again": whole, "transposed": whole.t(), "part": whole[1:]}


def test_training_state_of_the_moment_of_the_call_is_in_the_file(tmp_path: Path, gate: Gate) -> None:
    model = small()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    values: dict[str, object] = {"losses": [1.0], "average": torch.zeros(3)}

    def step() -> None:
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()

    step()
    expected = tmp_path / "expected"
    gate.opened.set()
    orthoserde.save(model, expected, optimizer=optimizer, state=values, rng=True)
    gate.opened.clear()
    checkpoints = orthoserde.Checkpoints(tmp_path / "folder")
    checkpoints.save(1, model, optimizer=optimizer, state=values, rng=True, wait=False)
    step()
    optimizer.param_groups[0]["lr"] = 0.5
    cast("list[float]", values["losses"]).append(2.0)
    cast("torch.Tensor", values["average"]).fill_(7.0)
    torch.rand(3)
    gate.opened.set()
    latest = checkpoints.latest()
    assert latest is not None
    loads = []
    for path in (expected, latest):
        other = small()
        again = torch.optim.Adam(other.parameters())
        report = orthoserde.load(other, path, optimizer=again, rng=True)
        entries = [value for state in again.state.values() for value in state.values()]
        loads.append((report.state["losses"], again.param_groups[0]["lr"], torch.rand(3).tolist(), entries))
        assert torch.equal(cast("torch.Tensor", report.state["average"]), torch.zeros(3))
    assert loads[0][:3] == loads[1][:3]
    assert all(map(torch.equal, loads[0][3], loads[1][3]))


@pytest.mark.parametrize("case", ODD)
def test_the_bytes_are_those_of_a_save_that_waits_in_new_memory_and_in_old(tmp_path: Path, case: str) -> None:
    model = ODD[case]()
    checkpoints = orthoserde.Checkpoints(tmp_path / "background")
    expected = orthoserde.Checkpoints(tmp_path / "waiting")
    for step in range(3):
        checkpoints.save(step, model, include_weights=case == "canonical base", wait=False)
        expected.save(step, model, include_weights=case == "canonical base")
        checkpoints.wait()
        assert checkpoints.path(step).read_bytes() == expected.path(step).read_bytes()
        with torch.no_grad():
            for tensor in model.state_dict().values():
                if tensor.is_floating_point() and case != "expanded":
                    tensor.add_(1)


def test_the_memory_of_the_copy_is_used_again_where_the_form_is_the_same(tmp_path: Path) -> None:
    checkpoints = orthoserde.Checkpoints(tmp_path)

    def addresses() -> dict[str, int]:
        assert checkpoints._memory is not None
        sources = checkpoints._memory.sources
        return {key: each.tensor.data_ptr() for key, each in sources.items() if isinstance(each, LiveTensor)}

    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    checkpoints.save(1, model, wait=False)
    first = addresses()
    assert len(first) == 4
    checkpoints.save(2, model, wait=False)
    assert addresses() == first
    model[1] = nn.Linear(3, 2).double()
    checkpoints.save(3, model, wait=False)
    assert {key: value for key, value in addresses().items() if key[0] == "0"} == {
        key: value for key, value in first.items() if key[0] == "0"
    }
    assert orthoserde.load(model, checkpoints.latest() or "").fidelity is orthoserde.Fidelity.EXACT
    checkpoints.close()
    assert checkpoints._memory is None


def test_modes_of_the_caller_change_nothing(tmp_path: Path) -> None:
    model = small()
    checkpoints = saved(tmp_path, 0)
    with torch.inference_mode():
        checkpoints.save(1, model, wait=False)
    with torch.device("meta"), torch.autocast("cpu"):
        checkpoints.save(2, model, wait=False)
    with torch.no_grad():
        checkpoints.save(3, model, wait=False)
    checkpoints.close()
    for step in (1, 2, 3):
        other = small(seed=1)
        orthoserde.load(other, checkpoints.path(step))
        assert_same_state(model, other)


def test_the_next_calls_wait_for_it(tmp_path: Path, gate: Gate) -> None:
    checkpoints = orthoserde.Checkpoints(tmp_path)
    actions: dict[Callable[[], object], object] = {
        checkpoints.latest: checkpoints.path(1),
        lambda: checkpoints.best: checkpoints.path(1),
        checkpoints.steps: [1],
        checkpoints.close: None,
    }
    for action, expected in actions.items():
        gate.opened.clear()
        gate.reached.clear()
        checkpoints.save(1, small(), metric=1, wait=False)
        assert gate.reached.wait(30)
        threading.Timer(0.05, gate.opened.set).start()
        assert action() == expected
        assert names(tmp_path) == ["step-00000001.safetensors"]


def test_there_is_one_such_save_at_a_time(tmp_path: Path, gate: Gate) -> None:
    checkpoints = orthoserde.Checkpoints(tmp_path)
    checkpoints.save(1, small(), wait=False)
    assert gate.reached.wait(30)
    assert names(tmp_path) == []
    threading.Timer(0.05, gate.opened.set).start()
    checkpoints.save(2, small(), wait=False)
    assert "step-00000001.safetensors" in names(tmp_path)
    checkpoints.close()
    assert checkpoints.steps() == [1, 2]
    assert threading.main_thread() not in gate.threads
    assert not any(thread.daemon for thread in gate.threads)


@pytest.mark.parametrize("error", [OSError(5, "gone"), RuntimeError("odd"), MemoryError(), SystemExit(3)])
@pytest.mark.parametrize("call", ["save", "save in the background", "latest", "best", "steps", "wait", "close", "with"])
def test_a_failure_is_raised_by_the_next_call_once(tmp_path: Path, gate: Gate, call: str, error: BaseException) -> None:
    checkpoints = failing(gate, tmp_path, error)

    def leave() -> None:
        with checkpoints:
            pass

    actions: dict[str, Callable[[], object]] = {
        "save": lambda: checkpoints.save(3, small()),
        "save in the background": lambda: checkpoints.save(3, small(), wait=False),
        "latest": checkpoints.latest,
        "best": lambda: checkpoints.best,
        "steps": checkpoints.steps,
        "wait": checkpoints.wait,
        "close": checkpoints.close,
        "with": leave,
    }
    with pytest.raises(orthoserde.BackgroundSaveError, match="the save of step 2 failed in the background: ") as caught:
        actions[call]()
    assert caught.value.__cause__ is error
    assert checkpoints._background._unseen == []  # nor is it logged later
    assert names(tmp_path) == ["step-00000001.safetensors"]
    actions[call]()
    assert checkpoints.latest() == checkpoints.path(3 if "save" in call else 1)


def test_a_real_failure_is_raised_with_what_the_system_said(tmp_path: Path, gate: Gate) -> None:
    checkpoints = orthoserde.Checkpoints(tmp_path / "run")
    checkpoints.save(1, small(), wait=False)
    assert gate.reached.wait(30)
    os.rename(tmp_path / "run", tmp_path / "moved")
    (tmp_path / "run").write_text("a file in place of the folder")
    gate.opened.set()
    with pytest.raises(orthoserde.BackgroundSaveError, match="cannot create the checkpoint") as caught:
        checkpoints.wait()
    assert isinstance(caught.value.__cause__, orthoserde.FileAccessError)
    assert caught.value.__cause__.filename == str(checkpoints.path(1))


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit on the size of files")
def test_a_failure_in_the_middle_of_a_file_does_not_hold_the_copy_of_the_model(tmp_path: Path, gate: Gate) -> None:
    import resource  # noqa: PLC0415 - not there on Windows

    checkpoints = orthoserde.Checkpoints(tmp_path)
    checkpoints.save(1, nn.Linear(400, 400), wait=False)
    assert checkpoints._memory is not None
    copied = [weakref.ref(each.tensor) for each in checkpoints._memory.sources.values() if isinstance(each, LiveTensor)]
    assert len(copied) == 2
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        gate.opened.set()
        with pytest.raises(orthoserde.BackgroundSaveError, match="cannot write") as caught:
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    checkpoints.close()
    gc.collect()
    assert isinstance(caught.value.__cause__, orthoserde.FileAccessError)
    assert isinstance(caught.value.__cause__.__cause__, OSError)
    assert [each() for each in copied] == [None, None]


def test_what_can_be_refused_at_once_is(tmp_path: Path, gate: Gate) -> None:
    gate.opened.set()
    checkpoints = saved(tmp_path, 5)
    with pytest.raises(orthoserde.UnsupportedModuleError):
        checkpoints.save(6, nn.Linear(2, 2, device="meta"), wait=False)
    with pytest.raises(orthoserde.ConfigError):
        checkpoints.save(6, small(), metadata={"a": 1}, wait=False)  # type: ignore[dict-item]
    assert checkpoints.wait() is None
    assert checkpoints.steps() == [5]


def test_an_exception_of_the_block_is_not_hidden_behind_a_failure(
    tmp_path: Path, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ZeroDivisionError), failing(gate, tmp_path, OSError(5, "gone")):
        raise ZeroDivisionError
    (record,) = caplog.records
    assert (record.levelno, record.name) == (logging.ERROR, "orthoserde")
    assert "the save of step 2 failed in the background: [Errno 5] gone" in record.message
    gc.collect()
    assert len(caplog.records) == 1


def test_a_block_that_raises_waits_for_the_save(tmp_path: Path, gate: Gate) -> None:
    def train() -> None:
        with orthoserde.Checkpoints(tmp_path) as checkpoints:
            checkpoints.save(1, small(), wait=False)
            threading.Timer(0.05, gate.opened.set).start()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train()
    assert names(tmp_path) == ["step-00000001.safetensors"]


def test_a_failure_that_nobody_asked_for_is_logged_when_the_object_goes(
    tmp_path: Path, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = failing(gate, tmp_path, OSError(5, "gone"))
    for thread in gate.threads[1:]:
        thread.join()
    assert caplog.records == []
    del checkpoints
    gc.collect()
    (record,) = caplog.records
    assert "the save of step 2 failed in the background: [Errno 5] gone" in record.message


def test_an_interrupt_while_waiting_loses_nothing(tmp_path: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = orthoserde.Checkpoints(tmp_path)
    checkpoints.save(1, small(), wait=False)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Event, "wait", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            checkpoints.latest()
    gate.opened.set()
    assert checkpoints.latest() == checkpoints.path(1)


def test_work_waits_for_work_that_a_signal_handler_began_meanwhile() -> None:
    background: Background[None] = Background()
    go, order = threading.Event(), list[str]()

    def slow() -> None:
        assert go.wait(30)
        order.append("handler")

    background.start(slow, "the save of a handler")
    threading.Timer(0.05, go.set).start()
    background.start(lambda: order.append("interrupted"), "the save that it interrupted")
    background.settle()
    assert order == ["handler", "interrupted"]


def _interrupt(*arguments: object) -> bool:
    raise KeyboardInterrupt


@pytest.mark.parametrize("begun", [True, False])
def test_an_interrupt_while_the_thread_begins_leaves_nothing_to_wait_for_in_vain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begun: bool
) -> None:
    checkpoints = orthoserde.Checkpoints(tmp_path)
    start = threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        if begun:
            start(thread)
            thread.join()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            checkpoints.save(1, small(), wait=False)
    assert checkpoints.steps() == ([1] if begun else [])


def test_where_the_system_gives_no_thread_it_is_saved_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = orthoserde.Checkpoints(tmp_path)

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    checkpoints.save(1, small(), wait=False)
    assert names(tmp_path) == ["step-00000001.safetensors"]
    assert checkpoints.wait() is not None
