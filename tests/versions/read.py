"""Read what every torch has written: each bit of the state must be the same, and computed tensors nearly so.

``python -m tests.versions.read FOLDER`` reads each ``FOLDER/torch-<version>`` that :mod:`tests.versions.write` has
written and the golden files of format version 1, adds what it found to ``FOLDER``, and prints the table of all who have
read. It ends with status 1 where anything differs.
"""

from __future__ import annotations

import json
import math
import sys
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy
import torch

import orthoserde
from orthoserde import Fidelity
from tests.golden.models import ALL, FOLDER, REGISTRY, TRAINING, in_training, optimizers_of, values
from tests.versions.write import state_of, weights_of

#: How far computed tensors may be apart, in units of eps of their dtype times their largest entry. Releases of torch
#: sum in other orders; the largest seen is in docs/reference/versions.md.
ROUNDING = 16.0


@dataclass
class Found:
    """What one torch found in the files of another.

    Attributes:
        reader: The version of torch that read.
        writer: The one that wrote.
        files: How many files it read.
        tensors: How many tensors of state were compared: bits and strides.
        differing: Those that are not the same.
        weights: How many computed tensors were compared.
        rounding: How far they are apart at the most, in units of eps of the dtype times the largest entry.
    """

    reader: str
    writer: str
    files: int = 0
    tensors: int = 0
    differing: tuple[str, ...] = ()
    weights: int = 0
    rounding: float = 0.0

    @property
    def good(self) -> bool:
        """Whether all state is the same, and the rest near enough."""
        return bool(self.files) and not self.differing and self.rounding <= ROUNDING


def _loaded(name: str, path: Path) -> tuple[torch.nn.Module, list[str]]:
    """A fresh model with the content of a file, and what is wrong with its training state."""
    model = ALL[name]()
    more: dict[str, Any] = {}
    if name in TRAINING:
        more = {"optimizer": optimizers_of(model), "state": dict.fromkeys(values())}
    report = orthoserde.load(model, path, registry=REGISTRY, **more)
    expected = Fidelity.UNVERIFIED if name == "users" else Fidelity.EXACT
    wrong = [] if report.fidelity is expected else [f"{name}: {report}"]
    if name in TRAINING:
        saved = in_training(ALL[name]())
        for key, optimizer in more["optimizer"].items():
            state = optimizer.state_dict()["state"]
            for number, entries in saved[key].state_dict()["state"].items():
                wrong += [
                    f"{name}: optimizer {key}, {number}, {entry}"
                    for entry, value in entries.items()
                    if not torch.equal(state[number][entry], value)
                ]
        wanted: dict[str, Any] = values()
        same = torch.equal(more["state"].pop("tensor"), wanted.pop("tensor")) and more["state"] == wanted
        wrong += [] if same else [f"{name}: state"]
    return model, wrong


def read(place: Path) -> Found:
    """Read the files of one torch."""
    found = Found(torch.__version__.partition("+")[0], place.name.removeprefix("torch-"))
    differing: list[str] = []
    for name in ALL:
        model, wrong = _loaded(name, place / f"{name}.safetensors")
        differing += wrong
        found.files += 1
        state, wanted = state_of(model), json.loads((place / f"{name}.json").read_text())
        differing += [f"{name}: {key}" for key in sorted(state.keys() | wanted) if state.get(key) != wanted.get(key)]
        found.tensors += len(wanted)
        with numpy.load(place / f"{name}.npz", allow_pickle=False) as stored:
            computed = weights_of(model)
            differing += [f"{name}: {key}" for key in sorted(set(computed) ^ set(stored))]
            for key in sorted(set(computed) & set(stored)):
                found.weights += 1
                found.rounding = max(found.rounding, _rounding(computed[key], stored[key]))
    found.differing = tuple(differing)
    return found


def _rounding(left: numpy.ndarray, right: numpy.ndarray) -> float:
    if left.dtype != right.dtype or left.shape != right.shape:
        return math.inf
    largest = max(float(numpy.abs(right).max(initial=0)), float(numpy.finfo(right.dtype).tiny))
    apart = float(numpy.abs(left - right).max(initial=0))
    ratio = apart / largest / float(numpy.finfo(right.dtype).eps)
    return ratio if math.isfinite(ratio) else math.inf


def read_golden() -> Found:
    """Read the golden files of format version 1, whose values come from a formula: tests/golden holds them to it."""
    found = Found(torch.__version__.partition("+")[0], "golden v1")
    differing: list[str] = []
    for name in ALL:
        model, wrong = _loaded(name, FOLDER / f"{name}.safetensors")
        differing += wrong
        found.files += 1
        digests = orthoserde.inspect(FOLDER / f"{name}.safetensors").digests
        state = state_of(model)
        for key, digest in digests.items():
            if key in state:  # not columns of bases, nor training state
                found.tensors += 1
                differing += [f"{name}: {key}"] if state[key][0] != digest else []
    found.differing = tuple(differing)
    return found


def table(folder: Path) -> str:
    """A row for each torch that has read, a column for each that has written."""
    paths = sorted(folder.glob("read-by-*.json"))
    all_found = [Found(**found) for path in paths for found in json.loads(path.read_text())]
    by_pair = {(found.reader, found.writer): found for found in all_found}
    readers = sorted({found.reader for found in all_found}, key=_as_numbers)
    writers = sorted({found.writer for found in all_found} - {"golden v1"}, key=_as_numbers)
    lines = ["| read by \\ written by | golden v1 | " + " | ".join(f"torch {version}" for version in writers) + " |"]
    lines.append("|---" * (len(writers) + 2) + "|")
    for reader in readers:
        cells = [_cell(by_pair.get((reader, writer))) for writer in ("golden v1", *writers)]
        lines.append(f"| torch {reader} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _as_numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


def _cell(found: Found | None) -> str:
    if found is None:
        return "not read"
    if found.differing:
        return f"{len(found.differing)} differ"
    if not found.good:
        return f"{found.weights} up to {found.rounding:.2g} eps apart"
    weights = f", {found.weights} within {found.rounding:.2g} eps" if found.weights else ""
    return f"{found.tensors} equal{weights}"


def main(folder: Path) -> int:
    """Read everything, note it, print it."""
    all_found = [read_golden(), *(read(place) for place in sorted(folder.glob("torch-*")))]
    path = folder / f"read-by-{all_found[0].reader}.json"
    path.write_text(json.dumps([asdict(found) for found in all_found]))
    print(table(folder))
    for found in all_found:
        for key in found.differing:
            print(f"torch {found.reader} reads another {key} from {found.writer}")
        if found.rounding > ROUNDING:
            print(f"torch {found.reader} computes weights of {found.writer} up to {found.rounding:.3g} eps apart")
    return 0 if len(all_found) > 1 and all(found.good for found in all_found) else 1


if __name__ == "__main__":
    warnings.simplefilter("ignore", orthoserde.TrainingTrapWarning)  # the values come from a formula, not from training
    sys.exit(main(Path(sys.argv[1])))
