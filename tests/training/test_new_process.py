"""Every optimizer goes on bit for bit in a new process, with its scheduler, dropout and shuffled data."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.training.cases import CASES, Case, Run, run_first

ROOT = Path(__file__).resolve().parents[2]

Outcomes = dict[str, dict[str, object]]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcomes, Outcomes]:
    """What became of the runs that went on here, and of those that were loaded in another process."""
    folder = tmp_path_factory.mktemp("training")
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        expected = json.loads(json.dumps(run_first(folder)))
    random.setstate(python)
    np.random.set_state(numpy)
    command = [sys.executable, "-m", "tests.training.cases", str(folder), str(torch.get_num_threads())]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200, check=False)
    assert child.returncode == 0, child.stderr
    return expected, json.loads((folder / "child.json").read_text("utf-8"))


@pytest.mark.parametrize("name", CASES)
def test_a_run_goes_on_bit_for_bit_in_a_new_process(name: str, both: tuple[Outcomes, Outcomes]) -> None:
    expected, got = both
    for part, value in expected[name].items():
        assert got[name][part] == value, part


def test_a_run_with_another_seed_is_another_run() -> None:
    """Or the test above could not fail."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        runs = [Run(Case("adam", "structured"), seed) for seed in (1, 2)]
        for run in runs:
            run.train(3)
    random.setstate(python)
    np.random.set_state(numpy)
    for part in ("losses", "tensors", "next"):
        assert runs[0].outcome()[part] != runs[1].outcome()[part]
