"""Training goes on bit for bit in another process, from another seed, with an optimizer built before the load."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import orthoserde
from tests.continuation import cases
from tests.continuation.cases import CASES, HOLDER_PARAMETRIZERS, SHAPES, STEPS_AFTER, Holder, Outcome

ROOT = Path(__file__).resolve().parents[2]

Outcomes = dict[str, Outcome]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("continuation")


@pytest.fixture(scope="module")
def uninterrupted(folder: Path) -> Outcomes:
    """Every case trained on in this process, after it was saved."""
    with torch.random.fork_rng(devices=[]):
        return cases.run_all(cases.run_first, folder)


@pytest.fixture(scope="module")
def resumed(folder: Path, uninterrupted: Outcomes) -> Outcomes:
    """Every case restored and trained on in another process, one for all of them."""
    command = [sys.executable, "-m", "tests.continuation.cases", str(folder)]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert child.returncode == 0, child.stderr
    outcomes: Outcomes = torch.load(folder / cases.CHILD_RESULTS, weights_only=True)
    assert outcomes.keys() == uninterrupted.keys()
    return outcomes


@pytest.mark.parametrize("name", CASES)
def test_training_goes_on_bit_for_bit_in_a_new_process(name: str, uninterrupted: Outcomes, resumed: Outcomes) -> None:
    expected, got = uninterrupted[name], resumed[name]
    assert expected["error"] == ""
    assert got["error"] == ""
    assert len(expected["losses"]) == STEPS_AFTER
    assert got["losses"] == expected["losses"]
    assert got["strides"] == expected["strides"]
    assert got["tensors"].keys() == expected["tensors"].keys()
    for key, tensor in expected["tensors"].items():
        assert got["tensors"][key].dtype == tensor.dtype, key
        assert torch.equal(got["tensors"][key], tensor), key


@pytest.mark.parametrize("name", CASES)
def test_a_load_in_a_new_process_is_exact_and_disturbs_nothing(name: str, resumed: Outcomes) -> None:
    outcome = resumed[name]
    assert outcome["error"] == ""
    assert outcome["fidelity"] == "EXACT"
    assert outcome["disturbed"] == []


@pytest.mark.parametrize("name", [name for name in CASES if "canonical" in name and "square" not in name])
def test_a_canonical_base_is_compact_after_training(name: str, folder: Path, uninterrupted: Outcomes) -> None:
    assert uninterrupted[name]["error"] == ""
    manifest = orthoserde.inspect(folder / f"{name}.safetensors")
    square = {record.name for record in manifest.parametrized if len(set((record.shape or ())[-2:])) == 1}
    assert set(manifest.compact) == {record.name for record in manifest.parametrized} - square


@pytest.mark.parametrize("name", CASES)
def test_the_new_process_starts_from_other_values(name: str, resumed: Outcomes) -> None:
    # Otherwise the tests above would pass without a load.
    assert resumed[name]["differed_before"]


@pytest.mark.parametrize(
    ("name", "error", "text"),
    [
        ("householder-trivialized", ValueError, "does not support complex"),
        ("householder-untrivialized", ValueError, "does not support complex"),
        ("householder-canonical", ValueError, "does not support complex"),
        ("weight_norm-dim0", RuntimeError, "not implemented for 'ComplexFloat'"),
        ("weight_norm-dim1", RuntimeError, "not implemented for 'ComplexFloat'"),
    ],
)
def test_what_the_table_leaves_out_is_refused_by_torch(name: str, error: type[Exception], text: str) -> None:
    parametrizer, dtypes = HOLDER_PARAMETRIZERS[name]
    assert torch.complex64 not in dtypes
    with torch.random.fork_rng(devices=[]), pytest.raises(error, match=text):
        _ = parametrizer(Holder(SHAPES["tall"], torch.complex64), "weight").weight


def test_only_what_torch_refuses_is_left_out_of_the_table() -> None:
    left_out = {name for name, (_, dtypes) in HOLDER_PARAMETRIZERS.items() if dtypes != cases.ALL_DTYPES}
    assert left_out == {
        "householder-trivialized",
        "householder-untrivialized",
        "householder-canonical",
        "weight_norm-dim0",
        "weight_norm-dim1",
    }
