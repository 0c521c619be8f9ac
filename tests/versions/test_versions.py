"""What the sessions matrix and cross run, tried under one torch."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

import orthoserde
from tests.golden.models import ALL, MODELS, REGISTRY, made
from tests.versions import matrix_table, read, write

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write.write(tmp_path_factory.mktemp("cross")).parent


def test_what_a_torch_wrote_it_reads(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert read.main(written) == 0
    (place,) = written.glob("torch-*")
    found = read.read(place)
    assert (found.files, found.differing, found.rounding) == (len(ALL), (), 0.0)
    assert found.weights > 50
    assert found.tensors > 150
    assert f"{found.tensors} equal, {found.weights} within 0 eps" in capsys.readouterr().out


def test_another_bit_another_stride_and_another_weight_are_found(written: Path, tmp_path: Path) -> None:
    (place,) = written.glob("torch-*")
    model, options = made("norms")
    model["weight_norm"].bias.data[0] = 77.0  # type: ignore[index]
    other = tmp_path / place.name
    other.mkdir()
    for path in place.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    orthoserde.save(model, other / "norms.safetensors", **options)
    state = json.loads((other / "plain.json").read_text())
    state["transposed"][1] = [5, 1]
    (other / "plain.json").write_text(json.dumps(state))
    with numpy.load(other / "orthogonals.npz") as stored:
        weights = dict(stored)
    weights["cayley_True_tall.weight"] = weights["cayley_True_tall.weight"] * 1.001
    numpy.savez(other / "orthogonals.npz", allow_pickle=False, **weights)
    found = read.read(other)
    assert found.differing == ("plain: transposed", "norms: weight_norm.bias")
    assert found.rounding > read.ROUNDING
    assert not found.good
    assert read.main(tmp_path) == 1
    weights["cayley_True_tall.weight"] = weights["cayley_True_tall.weight"] * numpy.nan
    numpy.savez(other / "orthogonals.npz", allow_pickle=False, **weights)
    assert read.read(other).rounding == float("inf")


def test_state_that_is_missing_in_a_model_is_found() -> None:
    model = MODELS["plain"]()
    whole = write.state_of(model)
    del model.scalar
    assert whole.keys() - write.state_of(model).keys() == {"scalar"}
    assert REGISTRY is made("plain")[1]["registry"]


def test_a_folder_without_files_has_not_been_read(tmp_path: Path) -> None:
    assert read.main(tmp_path) == 1


def test_a_release_asks_for_every_session() -> None:
    """Of one with parameters, its short name would ask for the first alone."""
    command = [sys.executable, "-m", "nox", "--noxfile", str(ROOT / "noxfile.py"), "--list", "--nocolor"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    names = re.findall(r"^[*-] (.+?)(?: -> .*)?$", listed, re.MULTILINE)
    released = runpy.run_path(str(ROOT / "noxfile.py"))["RELEASED"]
    assert len(released) == len(set(released))
    assert set(names) - {"soak", "demo", "release"} == set(released)


def test_the_table_of_a_matrix(tmp_path: Path) -> None:
    for python, torch, counts in (("3.11", "2.13.0", (10, 1, 1, 3)), ("3.10", "2.3.1", (9, 0, 0, 0))):
        tests, failures, errors, skipped = counts
        suite = f'<testsuite tests="{tests}" failures="{failures}" errors="{errors}" skipped="{skipped}" time="61.6"/>'
        (tmp_path / f"python-{python}-torch-{torch}.xml").write_text(f"<testsuites>{suite}</testsuites>")
    assert matrix_table.table(tmp_path).splitlines()[2:] == [
        "| 2.3.1 | 3.10 | 9 | 0 | 0 | 62 |",
        "| 2.13.0 | 3.11 | 5 | 2 | 3 | 62 |",
    ]
    (tmp_path / "python-3.9-torch-other.xml").write_text("<testsuites/>")
    with pytest.raises(ValueError, match="expected the JUnit file of one run"):
        matrix_table.table(tmp_path)
