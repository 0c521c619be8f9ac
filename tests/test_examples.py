"""The scripts under docs/examples/ do what the README says, each in a process of its own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "docs" / "examples" / "resume_digits.py"
STEPS = 40
INTERRUPTION = STEPS // 2


@dataclass(frozen=True)
class Demo:
    """What the script left: its output, and the folder that it ran in."""

    output: str
    folder: Path

    def rows(self) -> dict[int, list[str]]:
        """Return the cells of the table by step: three losses, then three orthogonality errors."""
        cells = [line.split() for line in self.output.splitlines()]
        return {int(row[0]): row[1:] for row in cells if len(row) == 7 and row[0].isdecimal()}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    folder = tmp_path_factory.mktemp("demo")
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--steps", str(STEPS)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return Demo(done.stdout, folder)


def test_the_demo_says_that_the_orthoserde_run_is_bit_identical(demo: Demo) -> None:
    assert "\nbit-identical: yes" in demo.output


def test_the_demo_says_who_kept_the_constraint(demo: Demo) -> None:
    (line,) = (line for line in demo.output.splitlines() if line.startswith("constraint at the end: "))
    assert "uninterrupted kept" in line
    assert "orthoserde kept" in line
    assert "weights-only left" in line


def test_the_demo_prints_the_accuracy_of_each_run(demo: Demo) -> None:
    (line,) = (line for line in demo.output.splitlines() if line.startswith("test accuracy at the end: "))
    assert line.count("%") == 3


def test_the_demo_prints_equal_losses_and_errors_for_the_run_resumed_with_orthoserde(demo: Demo) -> None:
    rows = demo.rows()
    resumed = [step for step in rows if step >= INTERRUPTION]
    assert resumed[0] == INTERRUPTION
    assert resumed[-1] == STEPS - 1
    for step in resumed:
        loss, loss_resumed, _, error, error_resumed, _ = rows[step]
        assert (loss_resumed, error_resumed) == (loss, error), step


def test_the_demo_shows_no_resumed_values_before_the_interruption(demo: Demo) -> None:
    before = [row for step, row in demo.rows().items() if step < INTERRUPTION]
    assert before
    assert all([row[1], row[2], row[4], row[5]] == ["-"] * 4 for row in before)


def test_only_the_run_resumed_from_computed_weights_leaves_the_constraint(demo: Demo) -> None:
    rows = demo.rows()
    *_, at_first = rows[INTERRUPTION]
    assert float(at_first) < 1e-5  # right after the load, nothing is to be seen
    *_, uninterrupted, orthoserde, weights_only = rows[STEPS - 1]
    assert float(uninterrupted) < 1e-5
    assert float(orthoserde) < 1e-5
    assert float(weights_only) > 1e-3


def test_the_demo_leaves_a_png_and_nothing_else(demo: Demo) -> None:
    assert [path.name for path in demo.folder.iterdir()] == ["resume_digits.png"]
    content = (demo.folder / "resume_digits.png").read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert content.endswith(b"IEND\xaeB`\x82")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("resume_digits", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("losses", "errors", "digest", "message"),
    [
        ([2.0, 1.0], [1e-6, 1e-6], "d", None),
        (
            [2.0, 1.5],
            [1e-6, 1e-6],
            "d",
            "at step 3: expected loss and orthogonality error (1.0, 1e-06), got (1.5, 1e-06)",
        ),
        (
            [2.0, 1.0],
            [1e-6, 2e-6],
            "d",
            "at step 3: expected loss and orthogonality error (1.0, 1e-06), got (1.0, 2e-06)",
        ),
        ([2.0, 1.0], [1e-6, 1e-6], "e", "after the last step: the tensors of the model differ"),
    ],
)
def test_the_demo_fails_and_says_where_unless_the_orthoserde_run_is_bit_identical(
    script: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    losses: list[float],
    errors: list[float],
    digest: str,
    message: str | None,
) -> None:
    whole = script.Run([4.0, 3.0, 2.0, 1.0], [1e-6] * 4, 0.5, "d")
    monkeypatch.setattr(script, "run_uninterrupted", lambda folder, steps: whole)
    monkeypatch.setattr(
        script, "resume_in_new_process", lambda name, folder, steps: script.Run(losses, errors, 0.5, digest)
    )

    code = script.compare(tmp_path, 4, tmp_path / "plot.png")

    out, err = capsys.readouterr()
    if message is None:
        assert code == 0
        assert "\nbit-identical: yes" in out
        assert err == ""
    else:
        assert code == 1
        assert "\nbit-identical: no" in out
        assert err == f"error: the run resumed with orthoserde differs {message}\n"
