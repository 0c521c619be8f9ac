"""Orthogonal tensors whose bases are stored as columns, on one thread and on two: cases that two processes share.

Run as ``python -m tests.continuation.compact_cases FOLDER`` this is the second process: it restores every file that the
first one left, into models with torch's own parametrization and into models with orthoserde's, and trains them on.
"""

from __future__ import annotations

import functools
import itertools
import sys
import warnings
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils import parametrizations

import orthoserde
from tests.continuation import cases
from tests.continuation.cases import OPTIMIZERS, ORTHOGONAL_MAPS, REAL_DTYPES, Batch, Case, Holder, Outcome

#: The last one is large enough that torch shares its arithmetic out, so that two threads give other bits than one.
SHAPES = {"tall": (12, 5), "wide": (5, 12), "batched": (3, 6, 4), "large": (128, 32)}

THREADS = (1, 2)

#: What the model of the second process is parametrized with, which gives its base a random or a canonical completion.
PARAMETRIZERS = {"torch": parametrizations.orthogonal, "orthoserde": orthoserde.orthogonal}


def _case(parametrizer: str, orthogonal_map: str, shape: str, dtype: torch.dtype, optimizer: str) -> Case:
    sizes = SHAPES[shape]

    def build() -> nn.Module:
        return PARAMETRIZERS[parametrizer](Holder(sizes, dtype), "weight", orthogonal_map)

    def batch(generator: torch.Generator) -> Batch:
        return (torch.randn(*sizes[:-2], 7, sizes[-1], dtype=dtype, generator=generator),)

    name = f"{orthogonal_map}-{shape}-{str(dtype).removeprefix('torch.')}-{optimizer}"
    return Case(name, build, batch, optimizer, base="compact")


@functools.cache
def table(parametrizer: str) -> dict[str, Case]:
    """The cases by name, with models parametrized in one of two ways; the names are the same."""
    combinations = itertools.product(ORTHOGONAL_MAPS, SHAPES, REAL_DTYPES, OPTIMIZERS)
    return {case.name: case for case in (_case(parametrizer, *combination) for combination in combinations)}


def folder_of(folder: Path, threads: int) -> Path:
    """Where the files of the runs on so many threads lie."""
    return folder / f"threads-{threads}"


def results_of(folder: Path, threads: int, parametrizer: str) -> Path:
    """What came of the second process on so many threads, with models parametrized so."""
    return folder_of(folder, threads) / f"{parametrizer}.pt"


def run_first(folder: Path, threads: int) -> dict[str, Outcome]:
    """Train and save every case, and train on without a break."""
    return cases.run_all(cases.run_first, folder_of(folder, threads), table("orthoserde"), threads)


def main() -> None:
    """Be the second process."""
    warnings.simplefilter("error")
    folder = Path(sys.argv[1])
    for threads, parametrizer in itertools.product(THREADS, PARAMETRIZERS):
        outcomes = cases.run_all(cases.run_second, folder_of(folder, threads), table(parametrizer), threads)
        torch.save(outcomes, results_of(folder, threads, parametrizer))


if __name__ == "__main__":
    main()
