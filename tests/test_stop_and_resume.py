"""The training script of docs/tutorial/stop-and-resume.md ends with the same bits however often it is killed.

The uninterrupted run and the first killed one are processes of their own; most of the kills hit workers that
``tests.kills`` forks, since importing torch takes longer than all of the training.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.helpers import same_bits
from tests.kills import Start, lines_of
from tests.test_docs import python_blocks

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "docs" / "examples" / "stop_and_resume.py"
PAGE = ROOT / "docs" / "tutorial" / "stop-and-resume.md"

STEPS = 4 * 32
KILLS = 24

#: Sums over several threads may round differently.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

posix = pytest.mark.skipif(os.name == "nt", reason="there is no SIGKILL")


@dataclass(frozen=True)
class Run:
    """What a run left in its folder, and what became of each of its starts."""

    folder: Path
    starts: tuple[Start, ...] = ()

    @property
    def checkpoint(self) -> Path:
        """Its last checkpoint."""
        return self.folder / "checkpoint.safetensors"

    def log(self) -> list[tuple[int, str]]:
        """Step and loss of each line of its log."""
        lines = (self.folder / "log.txt").read_text("utf-8").splitlines()
        return [(int(step), loss) for step, loss in (line.split() for line in lines)]

    def log_by_start(self) -> list[tuple[Start, list[int]]]:
        """Each start with the steps that it did."""
        steps = [step for step, _ in self.log()]
        ends = [0, *(start.lines for start in self.starts)]
        return [(start, steps[first : start.lines]) for start, first in zip(self.starts, ends, strict=False)]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run(tmp_path_factory.mktemp("runs") / "uninterrupted")
    subprocess.run([sys.executable, SCRIPT, run.folder], env=ENVIRONMENT, check=True, timeout=300)
    assert [step for step, _ in run.log()] == list(range(1, STEPS + 1))
    return run


@pytest.fixture(scope="module", params=[1, 3])
def save_every(request: pytest.FixtureRequest) -> int:
    """Steps from one save to the next. With one, a run spends most of its time in saves."""
    return int(request.param)


@pytest.fixture(scope="module")
def killed(save_every: int, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that was killed again and again."""
    folder = tmp_path_factory.mktemp("runs") / "killed"
    command = [sys.executable, "-m", "tests.kills", str(folder), str(save_every), str(KILLS), "7"]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    starts = [Start(**json.loads(line)) for line in done.stdout.splitlines() if line.startswith("{")]
    # A start that fails (it could not load the checkpoint, say) has another exit code, and its error is here.
    assert [start.exit_code for start in starts] == [-signal.SIGKILL] * (len(starts) - 1) + [0], done.stderr
    return Run(folder, tuple(starts))


def assert_same_end(run: Run, expected: Run) -> None:
    tensors, others = load_file(run.checkpoint), load_file(expected.checkpoint)
    assert tensors.keys() == others.keys()
    assert any(".exp_avg_sq" in key for key in tensors)
    assert [key for key, tensor in tensors.items() if not same_bits(tensor, others[key])] == []
    # The rest as well: scheduler, counters, Python's generator.
    assert run.checkpoint.read_bytes() == expected.checkpoint.read_bytes()


def assert_same_losses(run: Run, expected: Run) -> None:
    losses = defaultdict(set)
    for step, loss in run.log():
        losses[step].add(loss)
    assert losses == {step: {loss} for step, loss in expected.log()}


@posix
def test_a_run_that_is_killed_again_and_again_ends_with_the_bits_of_the_one_that_never_was(
    killed: Run, uninterrupted: Run
) -> None:
    assert_same_end(killed, uninterrupted)
    assert sorted(path.name for path in killed.folder.iterdir()) == ["checkpoint.safetensors", "log.txt"]


@posix
def test_at_least_20_kills_hit_and_some_of_them_in_the_middle_of_a_save(killed: Run) -> None:
    hit = [start for start in killed.starts if start.exit_code == -signal.SIGKILL]
    assert len(hit) >= 20
    assert sum(start.unfinished for start in hit) >= 5


@posix
def test_no_kill_leaves_a_damaged_checkpoint(killed: Run) -> None:
    assert [start for start in killed.starts if not start.whole] == []


@posix
def test_every_step_is_logged_and_those_that_are_done_again_have_the_same_loss(killed: Run, uninterrupted: Run) -> None:
    assert_same_losses(killed, uninterrupted)


@posix
def test_a_start_goes_on_from_the_last_checkpoint(killed: Run, save_every: int) -> None:
    """It does no step again but those after the last save, and leaves none out."""
    last = 0
    for start, steps in killed.log_by_start():
        if not steps:  # killed before its first step
            continue
        assert steps == list(range(steps[0], steps[0] + len(steps))), start
        # The last save began after the last logged step, so it may or may not have come to its end.
        saved = {step - step % save_every for step in (last, max(last - 1, 0))}
        assert steps[0] - 1 in saved, start
        last = steps[-1]
    assert last == STEPS


@posix
def test_the_script_is_killed_in_a_process_of_its_own_in_the_middle_of_an_epoch(
    uninterrupted: Run, tmp_path: Path
) -> None:
    run = Run(tmp_path / "run")
    command = [sys.executable, str(SCRIPT), str(run.folder)]
    with subprocess.Popen(command, env=ENVIRONMENT) as child:
        while lines_of(run.folder) < STEPS // 3 and child.poll() is None:
            time.sleep(0.001)
        child.kill()
    assert child.returncode == -signal.SIGKILL
    assert lines_of(run.folder) < STEPS
    again = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=True, timeout=300)
    assert "EXACT" in again.stdout
    assert_same_end(run, uninterrupted)
    assert_same_losses(run, uninterrupted)


@posix
def test_the_commands_of_the_page_kill_it_and_end_with_the_same_bits(tmp_path: Path) -> None:
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    commands = "".join(re.findall(r"^```bash\n(.*?)^```$", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL))
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", commands],
        cwd=tmp_path,
        env={**ENVIRONMENT, "PATH": path, "PYTHONUNBUFFERED": "1"},  # as in a terminal
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("the same bits\n")
    # Six are sent. On a machine under load some come late, when the next step that is waited for is in the log too.
    assert done.stdout.count("killed after step ") >= 4, done.stdout
    assert "EXACT" in done.stdout
    whole, killed = Run(tmp_path / "whole"), Run(tmp_path / "killed")
    assert_same_end(killed, whole)
    assert_same_losses(killed, whole)


def test_the_page_shows_the_whole_script() -> None:
    """Block by block, from top to bottom."""
    blocks = python_blocks(PAGE.name, PAGE.read_text("utf-8"))
    shown = itertools.chain.from_iterable(block.source.splitlines() for block in blocks)
    _, _, code = SCRIPT.read_text("utf-8").split('"""', 2)
    assert [line for line in shown if line] == [line for line in code.splitlines() if line]
