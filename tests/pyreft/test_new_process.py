"""Training of real pyreft models goes on bit for bit in another process: by a file, and by folders of both makes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.pyreft import cases
from tests.pyreft.cases import CASES, STEPS_AFTER, Outcome

ROOT = Path(__file__).resolve().parents[2]
RUNS = [f"{case.name} {route}" for case in CASES.values() for route in case.routes]

Outcomes = dict[str, Outcome]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pyreft")


@pytest.fixture(scope="module")
def uninterrupted(folder: Path) -> Outcomes:
    """Every case trained on in this process, after it was saved."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        found = {name: cases.guarded(lambda case=case: cases.run_first(case, folder)) for name, case in CASES.items()}  # type: ignore[misc]
    torch.set_num_threads(threads)
    return found


@pytest.fixture(scope="module")
def resumed(folder: Path, uninterrupted: Outcomes) -> Outcomes:
    """Every case loaded and trained on in another process, one for all of them."""
    command = [sys.executable, "-m", "tests.pyreft.cases", str(folder)]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert child.returncode == 0, child.stderr
    outcomes: Outcomes = torch.load(folder / cases.CHILD_RESULTS, weights_only=True)
    assert outcomes.keys() == set(RUNS)
    return outcomes


@pytest.mark.parametrize("name", CASES)
def test_saving_disturbs_nothing(name: str, uninterrupted: Outcomes) -> None:
    assert uninterrupted[name]["error"] == ""
    assert uninterrupted[name]["disturbed"] == []


@pytest.mark.parametrize("run", RUNS)
def test_training_goes_on_bit_for_bit_in_a_new_process(run: str, uninterrupted: Outcomes, resumed: Outcomes) -> None:
    expected, got = uninterrupted[run.partition(" ")[0]], resumed[run]
    assert expected["error"] == ""
    assert got["error"] == ""
    assert len(expected["losses"]) == STEPS_AFTER
    assert got["losses"] == expected["losses"]
    assert got["tensors"].keys() == expected["tensors"].keys()
    for key, tensor in expected["tensors"].items():
        assert got["tensors"][key].dtype == tensor.dtype, key
        assert torch.equal(got["tensors"][key], tensor), key


@pytest.mark.parametrize("run", RUNS)
def test_a_load_in_a_new_process_disturbs_nothing_and_says_what_it_could_check(run: str, resumed: Outcomes) -> None:
    outcome = resumed[run]
    assert outcome["error"] == ""
    assert outcome["disturbed"] == []
    name, _, route = run.partition(" ")
    assert outcome["fidelity"] == ("EXACT" if route == "file" or CASES[name].exact else "UNVERIFIED")


@pytest.mark.parametrize("run", RUNS)
def test_the_new_process_starts_from_other_values(run: str, resumed: Outcomes) -> None:
    # Otherwise the tests above would pass without a load.
    assert resumed[run]["differed_before"]


@pytest.mark.parametrize("name", CASES)
def test_training_moves_the_adapter_and_is_no_fixed_point(name: str, uninterrupted: Outcomes) -> None:
    assert len(set(uninterrupted[name]["losses"])) == STEPS_AFTER
