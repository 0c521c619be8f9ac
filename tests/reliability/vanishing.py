"""Files that are cut off, overwritten or replaced while they are read: before each read of a load in turn."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import orthoserde
from orthoserde.errors import DamagedFileError, OrthoserdeError
from orthoserde.storage.open_file import OpenFile

#: Elements of the large tensor: several blocks of four megabytes, each of which is read by itself.
WIDE = 3 << 20


def _cut(path: Path) -> None:
    os.truncate(path, 100)


def _overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"\xff" * path.stat().st_size)


def _replace(path: Path) -> None:
    (path.parent / "new").write_bytes(b"something else")
    os.replace(path.parent / "new", path)


CHANGES: dict[str, Callable[[Path], None]] = {"cut": _cut, "overwritten": _overwrite, "replaced": _replace}


def _verified(path: Path) -> None:
    if not orthoserde.verify(path).ok:
        raise DamagedFileError("not sound")


LOADS: dict[str, Callable[[nn.Module, Path], object]] = {
    "load": orthoserde.load,
    "load without verifying": lambda model, path: orthoserde.load(model, path, verify=False),
    "verify": lambda model, path: _verified(path),
    "inspect": lambda model, path: orthoserde.inspect(path),
}


def model() -> nn.Module:
    """Several tensors, one of them read in blocks."""
    made = nn.Module()
    made.wide = nn.Parameter(torch.arange(WIDE, dtype=torch.float32))
    made.small = nn.Parameter(torch.ones(3))
    return made


def run(change: str) -> dict[str, Any]:
    """Change a file before the first read, the second, and so on, until a load ends without.

    Returns:
        What came of it, by error, and what must not be.
    """
    outcomes: Counter[str] = Counter()
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        saved = model()
        for what, call in LOADS.items():
            for when in range(1, 1000):
                orthoserde.save(saved, path)
                target = model()
                for tensor in target.parameters():
                    tensor.data.zero_()
                result, happened = _one(call, target, path, CHANGES[change], when)
                outcomes[result] += 1
                if not result.isidentifier():
                    wrong.append(f"{what}, read {when}: {result}")
                equal = all(map(torch.equal, target.parameters(), saved.parameters()))
                if result == "loaded" and what == "load" and not equal:
                    wrong.append(f"{what}, read {when}: loaded something else")
                if not happened:
                    break
    outcomes.update(_archives(CHANGES[change], wrong))
    return {"outcomes": outcomes, "wrong": wrong}


def _one(
    call: Callable[[nn.Module, Path], object], target: nn.Module, path: Path, change: Callable[[Path], None], when: int
) -> tuple[str, bool]:
    reads = 0
    read = OpenFile._read_some

    def changing(self: OpenFile, memory: memoryview, position: int) -> int:
        nonlocal reads
        reads += 1
        if reads == when:
            change(path)
        return read(self, memory, position)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OpenFile, "_read_some", changing)
        try:
            call(target, path)
        except OrthoserdeError as error:
            return type(error).__name__, reads >= when
        except Exception as error:  # what this is about
            return f"{type(error).__name__}: {error}", reads >= when
    return "loaded", reads >= when


def _archives(change: Callable[[Path], None], wrong: list[str]) -> Counter[str]:
    """The same of files of ``torch.save``, between the look at them and torch's own."""
    outcomes: Counter[str] = Counter()
    for zipped in (True, False):
        with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
            path = Path(folder) / "weights.bin"
            torch.save(model().state_dict(), path, _use_new_zipfile_serialization=zipped)
            load = torch.load

            def changing(*arguments: Any, **options: Any) -> Any:
                change(path)  # noqa: B023
                return load(*arguments, **options)  # noqa: B023

            patch.setattr(torch, "load", changing)
            try:
                orthoserde.load(model(), path)
                outcomes["loaded"] += 1
            except OrthoserdeError as error:
                outcomes[type(error).__name__] += 1
            except Exception as error:  # what this is about
                wrong.append(f"archive {zipped}: {type(error).__name__}: {error}")
    return outcomes
