"""Load a damaged file, and say what came of it."""

from __future__ import annotations

import os
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from orthoserde.errors import OrthoserdeError
from tests.reliability import mutations
from tests.reliability.specimen import Specimen, contradicts, descriptors, make

#: No file of some kilobytes may take longer than this, in seconds; a hundred times what one takes here.
LONGEST = 5.0


@dataclass
class Tally:
    """What came of a number of files.

    Attributes:
        refused: By the class of the error.
        accepted: Files that were loaded, and rightly: they say the same, or are legal.
        wrong: What must not be, each with what is needed to see it again.
    """

    refused: Counter[str] = field(default_factory=Counter)
    accepted: int = 0
    wrong: list[str] = field(default_factory=list)

    @property
    def files(self) -> int:
        """How many there were."""
        return sum(self.refused.values()) + self.accepted + len(self.wrong)


class Bench:
    """Two saved specimens, one to load into, and a file that is overwritten with what is to be loaded."""

    def __init__(self, folder: Path) -> None:
        self.saved, other = make(1), make(2)
        self.saved.save(folder / "saved")
        other.save(folder / "other")
        self.raw, self.other = (folder / "saved").read_bytes(), (folder / "other").read_bytes()
        self.target: Specimen = make(3)
        self.path = folder / "damaged"
        self.path.touch()
        self._descriptor = os.open(self.path, os.O_RDWR)
        self.before = self.target.look()
        self.open = descriptors()

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def write(self, content: bytes) -> None:
        """Let the file hold this; opening it again and again would take longer than loading it."""
        os.ftruncate(self._descriptor, len(content))
        os.pwrite(self._descriptor, content, 0)

    def try_to_load(self, content: bytes, what: str, tally: Tally, *, legal: bool = False) -> None:
        """Load a file that is damaged, or legal and of another content, and count what came of it."""
        self.write(content)
        start = time.perf_counter()
        try:
            report = self.target.load(self.path)
        except OrthoserdeError as error:
            tally.refused[type(error).__name__] += 1
            if self.target.look() != self.before:
                tally.wrong.append(f"{what}: refused ({error}), and the model is another one")
                self._renew()
        except Exception as error:  # what a test of one exception family is about
            tally.wrong.append(f"{what}: {type(error).__name__}: {error}")
            self._renew()
        else:
            odd = contradicts(self.target, self.path, report) if legal else self._silently_different(content)
            if odd:
                tally.wrong.append(f"{what}: loaded, and {odd}")
            else:
                tally.accepted += 1
            self._renew()
        if time.perf_counter() - start > LONGEST:
            tally.wrong.append(f"{what}: took longer than {LONGEST} s")
        if descriptors() != self.open:
            tally.wrong.append(f"{what}: left a file open")
            self.open = descriptors()

    def _silently_different(self, content: bytes) -> str:
        """A damaged file that loads must be the one that was saved; two are, for splices may give either whole."""
        return "" if content in (self.raw, self.other) else "it is not what was saved"

    def _renew(self) -> None:
        self.target = make(3)
        self.before = self.target.look()


def every_flip(bench: Bench, tally: Tally, start: int, step: int) -> None:
    """Load the file with each bit flipped once, beginning with bit ``start`` and going on by ``step``."""
    for bit in range(start, 8 * len(bench.raw), step):
        flipped = bytearray(bench.raw)
        flipped[bit // 8] ^= 1 << bit % 8
        bench.try_to_load(bytes(flipped), f"bit {bit}", tally)


def every_truncation(bench: Bench, tally: Tally) -> None:
    """Load each beginning of the file that is not the whole of it."""
    for length in range(len(bench.raw)):
        bench.try_to_load(bench.raw[:length], f"{length} bytes", tally)


def mutants(bench: Bench, tally: Tally, numbers: range) -> None:
    """Load the mutants of these numbers."""
    for number in numbers:
        mutation, content = mutations.mutant(number, bench.raw, bench.other)
        what = f"mutant {number} ({mutation.__name__})"
        bench.try_to_load(content, what, tally, legal=mutation in mutations.LEGAL)


def in_memory() -> tempfile.TemporaryDirectory[str]:
    """A folder that is kept in memory where the system has such a place."""
    return tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None)  # noqa: S108
