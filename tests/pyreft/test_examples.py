"""The examples that train LoReFT do what they say, each in processes of its own; here with few steps."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.mark.parametrize(
    ("script", "options", "lines"),
    [
        ("pyreft_resume.py", ["--steps", "8"], ["uninterrupted kept, orthoserde kept, pyreft left"]),
        ("loreft_minilm.py", ["--steps", "4", "--texts", "150"], ["EXACT, 26 tensors", "held-out accuracy: LoReFT"]),
    ],
)
def test_an_interrupted_run_continues_bit_for_bit(
    script: str, options: list[str], lines: list[str], tmp_path: Path
) -> None:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "examples" / script), *options],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "\nbit-identical: yes" in done.stdout
    for line in lines:
        assert line in done.stdout
    assert not list(tmp_path.iterdir())
