"""The figures of a suite, from a process of its own: it forks, which a process with threads must not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]

not_linux = pytest.mark.skipif(sys.platform != "linux", reason="forks, and looks into /proc")


def found_by(suite: str, *, soak: bool = False) -> list[dict[str, Any]]:
    """Run a suite; return what it found, by the layers that it has here."""
    command = [sys.executable, "-W", "error", "-m", "tests.reliability.figures", suite, *(["--soak"] if soak else [])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert ended.stdout, ended.stderr
    assert "Error" not in ended.stderr, ended.stderr
    results: list[dict[str, Any]] = json.loads(ended.stdout)["suites"]
    for figures in results:
        print(json.dumps(figures))
    return results
