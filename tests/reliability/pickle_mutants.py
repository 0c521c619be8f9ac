"""Damage to files of ``torch.save``: they have checksums in the archive form, and none in the older one."""

from __future__ import annotations

import io
import random
import tempfile
import zipfile
from collections import Counter
from pathlib import Path

import torch

from orthoserde import storage
from orthoserde.errors import OrthoserdeError
from tests.reliability.corruption import Tally, in_memory
from tests.reliability.mutations import havoc, set_bytes, splice
from tests.reliability.specimen import descriptors

STATE = {"weight": torch.arange(6.0).view(2, 3), "bias": torch.ones(2, dtype=torch.bfloat16), "steps": torch.tensor(7)}


def saved(*, zipped: bool) -> bytes:
    """A small state dict in either form."""
    with tempfile.TemporaryDirectory() as folder:
        torch.save(STATE, Path(folder) / "saved", _use_new_zipfile_serialization=zipped)
        return (Path(folder) / "saved").read_bytes()


def with_pickle(raw: bytes, draw: random.Random) -> bytes:
    """The archive with a damaged pickle, and the checksum of that."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(raw)) as old, zipfile.ZipFile(file, "w") as new:
        for member in old.infolist():
            data = old.read(member)
            if member.filename.endswith("data.pkl"):
                data = draw.choice((set_bytes, havoc, splice))(data, data, draw)
            new.writestr(member.filename, data)
    return file.getvalue()


def _read(path: Path, content: bytes, what: str, tally: Tally) -> bool:
    """Whether a file was read as something else than was saved; what came of it is counted."""
    path.write_bytes(content)
    before = descriptors()
    same = True
    try:
        with storage.read(path) as checkpoint:
            tensors = {key: checkpoint.tensor(key) for key in checkpoint.manifest.tensors}
    except OrthoserdeError as error:
        tally.refused[type(error).__name__] += 1
    except Exception as error:  # what a test of one exception family is about
        tally.wrong.append(f"{what}: {type(error).__name__}: {error}")
    else:
        same = tensors.keys() == STATE.keys() and all(torch.equal(tensors[key], STATE[key]) for key in STATE)
        tally.accepted += 1
    if descriptors() != before:
        tally.wrong.append(f"{what}: left a file open")
    return not same


def run(numbers: range) -> tuple[Tally, Counter[str]]:
    """Read the mutants of these numbers.

    Returns:
        What came of them, and how many were accepted with another content, by sort.
    """
    tally, different = Tally(), Counter[str]()
    forms = {"archive": saved(zipped=True), "bare": saved(zipped=False)}
    with in_memory() as folder:
        for number in numbers:
            draw = random.Random(number)
            sort = draw.choice(("archive", "bare", "pickle"))
            raw = forms["bare" if sort == "bare" else "archive"]
            other = forms["archive" if sort == "bare" else "bare"]
            damage = draw.choice((set_bytes, havoc, splice))
            content = with_pickle(raw, draw) if sort == "pickle" else damage(raw, other, draw)
            different[sort] += _read(Path(folder) / "mutant", content, f"mutant {number} ({sort})", tally)
    return tally, different


def every_flip() -> Tally:
    """Read an archive with each of its bits flipped once; it has a checksum for all that is read of it."""
    tally, raw = Tally(), saved(zipped=True)
    with in_memory() as folder:
        for bit in range(8 * len(raw)):
            flipped = bytearray(raw)
            flipped[bit // 8] ^= 1 << bit % 8
            if _read(Path(folder) / "flipped", bytes(flipped), f"bit {bit}", tally):
                tally.accepted -= 1
                tally.wrong.append(f"bit {bit}: another content than its checksums say")
    return tally
