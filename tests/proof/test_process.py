"""What goes wrong in the new process is told here, and no process is left."""

from __future__ import annotations

import functools
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import orthoserde
from orthoserde import ProofError
from orthoserde.proof import child
from orthoserde.proof.settings import current
from tests.proof import cases, here

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Path]:
    """A checkpoint; afterwards, no process is left but those that were there (an older torch.compile keeps some)."""
    before = set(multiprocessing.active_children())
    with torch.random.fork_rng(devices=[]):
        orthoserde.save(cases.make_model_alone(), tmp_path / "start")
    yield tmp_path / "start"
    assert set(multiprocessing.active_children()) <= before


def test_what_a_step_raises_is_told_with_its_traceback(start: Path) -> None:
    with pytest.raises(ProofError, match="step 2 failed in the new process: LookupError: no more data") as caught:
        orthoserde.prove(start, cases.make_model_alone, cases.step_raises, reference=[0.0, 0.0, 0.0])
    assert "in step_raises" in str(caught.value)


@pytest.mark.skipif(os.name != "posix", reason="there are no such signals")
def test_a_process_that_is_killed_is_an_error(start: Path) -> None:
    with pytest.raises(ProofError, match="ended by SIGKILL in step 1; the system may have run out of memory"):
        orthoserde.prove(start, cases.make_model_alone, cases.step_is_killed)


@pytest.mark.skipif(os.name != "posix", reason="there are no such signals")
def test_an_interrupt_here_ends_the_process_there(start: Path, tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"

    def interrupt() -> None:
        while not pid_file.exists() or not pid_file.read_text("utf-8"):
            time.sleep(0.05)
        import _thread  # noqa: PLC0415

        _thread.interrupt_main()

    watcher = threading.Thread(target=interrupt)
    watcher.start()
    began = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            orthoserde.prove(start, cases.make_model_alone, functools.partial(cases.step_waits, pid_file=str(pid_file)))
    finally:
        pid_file.write_text(pid_file.read_text("utf-8") if pid_file.exists() else "0", encoding="utf-8")
        watcher.join()
    assert time.monotonic() - began < 60
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text("utf-8")), 0)


def test_a_script_without_a_guard_is_told_what_it_lacks(start: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import orthoserde\n"
        "from tests.proof import cases\n"
        f"orthoserde.prove({str(start)!r}, cases.make_model_alone, cases.step_by_hand)\n",
        encoding="utf-8",
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert 'under `if __name__ == "__main__":`' in done.stderr.splitlines()[-1]


def told(path: Path, make: Callable[..., object], step: Callable[..., object] = cases.step_nothing) -> list[Any]:
    """What a new process would tell of one step."""
    return here.told(child.Task(str(path), 1, {}, False, 5, current()), make, step)


@pytest.mark.parametrize(
    ("value", "got"), [(None, "NoneType"), ((), ""), ((1, 2), "int, int"), ((nn.ReLU, None, None, 4), "type, ")]
)
def test_what_make_may_not_return_is_told(start: Path, value: object, got: str) -> None:
    *_, last = told(start, functools.partial(cases.returned, value))
    assert isinstance(last, child.Failed)
    assert last.error.startswith(
        f"TypeError: make: expected a model, (model, optimizer) or (model, optimizer, state), got ({got}"
    )


@pytest.mark.parametrize("value", ["high", (1.0, 2.0), 1j])
def test_what_step_may_not_return_is_told(start: Path, value: object) -> None:
    *_, last = told(start, cases.make_small, functools.partial(cases.returned_by_step, value))
    assert isinstance(last, child.Failed)
    assert last.error.startswith("TypeError: step: expected the loss (a number, or a tensor of one element) or None")


@pytest.mark.parametrize("value", [2, 2.0, torch.tensor([2.0]), np.float32(2), np.int64(2), np.array(2.0)], ids=repr)
def test_a_loss_is_any_number(start: Path, value: object) -> None:
    messages = told(start, cases.make_small, functools.partial(cases.returned_by_step, value))
    (stepped,) = (each for each in messages if isinstance(each, child.Stepped))
    assert (type(stepped.loss), stepped.loss) == (float, 2.0)


def test_a_file_that_does_not_fit_is_told(start: Path) -> None:
    *_, doing, last = told(start, functools.partial(cases.make_small, width=7))
    assert doing.what == f"loading {start}"
    assert "IncompatibleModelError" in last.error


def test_a_child_tells_all_it_did(start: Path) -> None:
    messages = told(start, cases.make_small, cases.step_small)
    assert isinstance(messages[-1], child.Finished)
    assert [type(message).__name__ for message in messages if not isinstance(message, child.Doing)] == [
        "Loaded",
        "Stepped",
        "Finished",
    ]


def test_a_file_that_is_not_there_is_an_error_before_anything_starts(
    tmp_path: Path, start: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(multiprocessing, "get_context", None)
    with pytest.raises(orthoserde.CheckpointNotFoundError):
        orthoserde.prove(tmp_path / "nothing", cases.make_small, cases.step_small)
    with pytest.raises(orthoserde.CheckpointNotFoundError):
        orthoserde.prove(start, cases.make_small, cases.step_small, reference=tmp_path / "nothing")


@pytest.mark.parametrize("steps", [0, -1, 1.0, True, None])
def test_steps_are_counted_from_one(start: Path, steps: Any) -> None:
    with pytest.raises(orthoserde.ConfigError, match="steps: expected a number of steps from 1 on"):
        orthoserde.prove(start, cases.make_small, cases.step_small, steps=steps)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ([1.0, 2.0], "one entry for each of 3 steps, got 2"),
        ({1: 2.0}, "expected losses, files or one file, got dict"),
        (3.0, "expected losses, files or one file, got float"),
        ([1.0, "a", 2.0], r"expected losses \(numbers\) or files \(paths\), and not both, got a str"),
        ([torch.zeros(2)] * 3, "not both, got a Tensor"),
        ([1.0, 2.0, 10**400], "not both, got a int"),
        (torch.tensor(1.0), "expected losses, files or one file, got Tensor"),
        (np.array(1.0), "expected losses, files or one file, got ndarray"),
    ],
)
def test_a_reference_is_losses_or_files(start: Path, reference: Any, message: str) -> None:
    with pytest.raises(orthoserde.ConfigError, match=message):
        orthoserde.prove(start, cases.make_small, cases.step_small, reference=reference)


def local() -> Callable[..., object]:
    """A function within a function."""

    def make() -> nn.Module:
        return nn.Linear(2, 2)

    return make


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Linear(2, 2),
        local(),
        nn.Linear(2, 2).cpu,
        nn.Linear(2, 2),
        functools.partial(cases.returned, nn.Linear(2, 2)),
        functools.partial(local(), 1),
    ],
    ids=["lambda", "closure", "method", "instance", "argument", "partial"],
)
def test_what_cannot_be_found_by_its_name_is_refused(start: Path, make: Any) -> None:
    with pytest.raises(ProofError, match=r"^make: .*top level of a \.py file|^make: a partial may hold"):
        orthoserde.prove(start, make, cases.step_small)
    with pytest.raises(ProofError, match=r"^step: .*top level of a \.py file|^step: a partial may hold"):
        orthoserde.prove(start, cases.make_small, make)


def test_what_is_no_function_is_refused(start: Path) -> None:
    with pytest.raises(TypeError, match="make: expected a function, got int"):
        orthoserde.prove(start, 3, cases.step_small)  # type: ignore[arg-type]


def test_a_function_of_a_notebook_is_refused(start: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("notebook")
    monkeypatch.setitem(sys.modules, "notebook", module)
    exec("def make(): pass", vars(module))  # noqa: S102 - as a notebook does
    with pytest.raises(ProofError, match=r"make is in notebook, which has no file .* write it to a \.py file"):
        orthoserde.prove(start, vars(module)["make"], cases.step_small)


def test_functions_with_plain_arguments_are_taken() -> None:
    from orthoserde.proof.functions import check_importable  # noqa: PLC0415

    check_importable(functools.partial(cases.returned, ["a", {"b": (1, 2.0, None, Path("c"))}]), "make")
    check_importable(functools.partial(cases.returned, value=cases.make_small), "make")
    check_importable(nn.Identity, "make")
