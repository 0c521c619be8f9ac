"""A base that is worked out needs no memory beside the model's own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

SIDE = 4096
BASE_BYTES = 4 * SIDE * SIDE

CHILD = """
import json, resource, sys
from torch import nn
import orthoserde
folder, n = sys.argv[1], int(sys.argv[2])

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

small = orthoserde.orthogonal(nn.Linear(4, 64))
orthoserde.save(small, f"{folder}/small")
orthoserde.load(small, f"{folder}/small")
layer = orthoserde.orthogonal(nn.Linear(4, n))
peaks = [peak()]
orthoserde.save(layer, f"{folder}/m", base="compact")
peaks.append(peak())
orthoserde.load(layer, f"{folder}/m")
peaks.append(peak())
print(json.dumps(peaks))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="the peak of a process is asked of Unix")
def test_neither_save_nor_load_holds_a_second_base(tmp_path: Path) -> None:
    command = [sys.executable, "-c", CHILD, str(tmp_path), str(SIDE)]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    built, saved, loaded = json.loads(child.stdout)
    assert saved - built < BASE_BYTES / 2
    assert loaded - built < BASE_BYTES / 2
