"""A process may end at any moment, or at the wrong one, and what was saved is still there."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import orthoserde

ROOT = Path(__file__).resolve().parents[2]

posix = pytest.mark.skipif(os.name == "nt", reason="forks")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )


def script(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a script in a new process, with a model and the checkpoints of a folder at hand."""
    start = f"import torch, os, sys, orthoserde; model = torch.nn.Linear(4, 4); folder = {str(folder)!r}\n"
    return run("-c", start + "checkpoints = orthoserde.Checkpoints(folder)\n" + textwrap.dedent(code))


@posix
def test_whenever_a_process_is_killed_what_it_saved_is_whole(tmp_path: Path) -> None:
    ended = run("-W", "ignore::DeprecationWarning", "-m", "tests.folder.killed", str(tmp_path), "20")
    assert ended.returncode == 0, ended.stderr
    newest, reports = map(int, ended.stdout.split())
    assert newest >= reports > 0


def test_the_end_of_the_interpreter_waits_for_a_save(tmp_path: Path) -> None:
    ended = script("checkpoints.save(1, torch.nn.Linear(2000, 2000), wait=False)", tmp_path)
    assert (ended.returncode, ended.stderr) == (0, "")
    path = orthoserde.Checkpoints(tmp_path).latest()
    assert path is not None
    assert orthoserde.verify(path).ok


def test_so_does_the_end_by_an_exception(tmp_path: Path) -> None:
    ended = script("checkpoints.save(1, torch.nn.Linear(2000, 2000), wait=False); 1 / 0", tmp_path)
    assert ended.returncode == 1
    assert orthoserde.Checkpoints(tmp_path).steps() == [1]


def test_a_save_that_nobody_asks_about_any_more_is_reported_at_the_end(tmp_path: Path) -> None:
    code = """
        checkpoints.save(1, model)
        from orthoserde import storage
        def refuse(*arguments): raise OSError(5, "the disk is gone")
        storage.write = refuse
        checkpoints.save(2, model, wait=False)
    """
    ended = script(code, tmp_path)
    assert "the save of step 2 failed in the background: [Errno 5] the disk is gone" in ended.stderr
    assert orthoserde.Checkpoints(tmp_path).steps() == [1]


def test_a_save_at_the_end_of_the_interpreter_is_made(tmp_path: Path) -> None:
    """No thread can be begun there any more, from Python 3.12 on."""
    code = """
        import atexit
        atexit.register(lambda: (checkpoints.save(1, model, wait=False), checkpoints.wait()))
    """
    ended = script(code, tmp_path)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert orthoserde.Checkpoints(tmp_path).steps() == [1]


@posix
def test_a_forked_child_does_not_wait_for_the_save_of_its_parent(tmp_path: Path) -> None:
    code = """
        import threading
        from orthoserde import storage
        write, go = storage.write, threading.Event()
        def slow(*arguments):
            go.wait()
            return write(*arguments)
        storage.write = slow
        checkpoints.save(1, model, wait=False)
        if os.fork() == 0:
            os._exit(0 if checkpoints.wait() is None and checkpoints.steps() == [] else 3)
        _, status = os.wait()
        go.set()
        assert os.WEXITSTATUS(status) == 0, status
        assert checkpoints.wait().path.endswith("step-00000001.safetensors")
    """
    ended = script("import warnings; warnings.simplefilter('ignore')\n" + textwrap.dedent(code), tmp_path)
    assert ended.returncode == 0, ended.stderr


@posix
def test_a_signal_handler_that_saves_in_the_middle_of_a_save_spoils_neither(tmp_path: Path) -> None:
    code = """
        import signal
        big = torch.nn.Linear(2000, 2000)
        def fill(value):
            with torch.no_grad():
                for parameter in big.parameters(): parameter.fill_(value)
        def handler(*ignored):
            fill(2)
            checkpoints.save(2, big, wait=False)
        signal.signal(signal.SIGTERM, handler)
        fill(0)
        checkpoints.save(0, big, wait=False)
        checkpoints.wait()
        from orthoserde.checkpoint import Checkpoint
        snapshot = Checkpoint.snapshot
        def interrupted(self, reuse=None):
            Checkpoint.snapshot = snapshot
            made = snapshot(self, reuse)
            os.kill(os.getpid(), signal.SIGTERM)
            return made
        Checkpoint.snapshot = interrupted
        fill(1)
        checkpoints.save(1, big, wait=False)
        checkpoints.wait()
        for step in (0, 1, 2):
            fill(-1)
            orthoserde.load(big, checkpoints.path(step))
            assert all((parameter == step).all() for parameter in big.parameters()), (step, big.weight)
    """
    ended = script(code, tmp_path)
    assert ended.returncode == 0, ended.stderr
