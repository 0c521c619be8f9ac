"""Training goes on bit for bit from files that hold n x k columns of each base, whoever parametrized the model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from orthoserde import storage
from orthoserde.manifest import COLUMNS
from tests.continuation import compact_cases
from tests.continuation.cases import STEPS_AFTER, Outcome
from tests.continuation.compact_cases import PARAMETRIZERS, SHAPES, THREADS

ROOT = Path(__file__).resolve().parents[2]
NAMES = list(compact_cases.table("orthoserde"))
BASE = "parametrizations.weight.0.base"

#: By the number of threads, and for the second process also by what its models are parametrized with.
First = dict[int, dict[str, Outcome]]
Second = dict[tuple[int, str], dict[str, Outcome]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compact")


@pytest.fixture(scope="module")
def uninterrupted(folder: Path) -> First:
    """Every case trained on in this process, after it was saved."""
    for threads in THREADS:
        compact_cases.folder_of(folder, threads).mkdir()
    with torch.random.fork_rng(devices=[]):
        return {threads: compact_cases.run_first(folder, threads) for threads in THREADS}


@pytest.fixture(scope="module")
def resumed(folder: Path, uninterrupted: First) -> Second:
    """Every case restored and trained on in another process, one for all of them."""
    command = [sys.executable, "-m", "tests.continuation.compact_cases", str(folder)]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200, check=False)
    assert child.returncode == 0, child.stderr
    return {
        (threads, parametrizer): torch.load(compact_cases.results_of(folder, threads, parametrizer), weights_only=True)
        for threads in THREADS
        for parametrizer in PARAMETRIZERS
    }


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("name", NAMES)
def test_the_file_holds_columns_and_no_square_matrix(
    name: str, threads: int, folder: Path, uninterrupted: First
) -> None:
    assert uninterrupted[threads][name]["error"] == ""
    *batch, rows, columns = SHAPES[name.split("-")[1]]
    n, k = max(rows, columns), min(rows, columns)
    with storage.read(compact_cases.folder_of(folder, threads) / f"{name}.safetensors") as checkpoint:
        assert [link.tensors for record in checkpoint.manifest.parametrized for link in record.chain] == [
            {"base": COLUMNS}
        ]
        stored = {key: checkpoint.tensor(key) for key in checkpoint.sources}
    assert BASE not in stored
    assert stored[f"{BASE}.columns"].shape == (*batch, n, k)
    assert all(tensor.shape[-2:] != (n, n) for tensor in stored.values())


@pytest.mark.parametrize("parametrizer", PARAMETRIZERS)
@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("name", NAMES)
def test_training_goes_on_bit_for_bit_from_columns(
    name: str, threads: int, parametrizer: str, uninterrupted: First, resumed: Second
) -> None:
    expected, got = uninterrupted[threads][name], resumed[threads, parametrizer][name]
    assert expected["error"] == ""
    assert got["error"] == ""
    assert got["fidelity"] == "EXACT"
    assert got["disturbed"] == []
    assert got["differed_before"]
    assert len(expected["losses"]) == STEPS_AFTER
    assert got["losses"] == expected["losses"]
    assert got["strides"] == expected["strides"]
    assert got["tensors"].keys() == expected["tensors"].keys()
    assert f"registered {BASE}" in got["tensors"]
    for key, tensor in expected["tensors"].items():
        assert got["tensors"][key].dtype == tensor.dtype, key
        assert torch.equal(got["tensors"][key], tensor), key
