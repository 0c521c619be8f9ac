"""Damage of every sort to one small file: refused, or nothing has changed; never a difference without a word.

`python -m tests.reliability.figures_reading` counts; a failure names the number of its mutant, and
`mutations.mutant` makes the same one again.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from orthoserde.errors import OrthoserdeError
from tests.reliability import mutations, pickle_mutants
from tests.reliability.broken_builds import BUILDS, noticed_by
from tests.reliability.corruption import Bench, Tally, every_flip, every_truncation, in_memory, mutants
from tests.reliability.hostile_pickles import IS_TRUSTED
from tests.reliability.specimen import contradicts

#: Mutants of a default run, and of a soak.
MUTANTS, SOAKED = 50_000, 1_000_000

#: Mutants of files of ``torch.save``.
PICKLES = 10_000

#: They come in parts, so that a failure is seen before all have run.
PARTS = 10


@pytest.fixture
def bench() -> Iterator[Bench]:
    with in_memory() as folder:
        made = Bench(Path(folder))
        yield made
        made.close()


def assert_nothing_wrong(tally: Tally, files: int) -> None:
    assert not tally.wrong, "\n".join(tally.wrong[:20])
    assert tally.files == files


@pytest.mark.parametrize("part", range(8))
def test_every_single_bit_flip_is_refused_and_changes_nothing(bench: Bench, part: int) -> None:
    tally = Tally()
    every_flip(bench, tally, part, 8)
    assert_nothing_wrong(tally, len(bench.raw))
    assert not tally.accepted


def test_every_truncation_is_refused_and_changes_nothing(bench: Bench) -> None:
    tally = Tally()
    every_truncation(bench, tally)
    assert_nothing_wrong(tally, len(bench.raw))
    assert not tally.accepted


@pytest.mark.parametrize("part", range(PARTS))
def test_no_mutant_is_loaded_as_what_it_is_not(bench: Bench, part: int) -> None:
    tally, count = Tally(), MUTANTS // PARTS
    mutants(bench, tally, range(part * count, (part + 1) * count))
    assert_nothing_wrong(tally, count)
    # Legal files of another content are among them, so that there is something to be consistent with.
    assert tally.accepted > count // 100


@pytest.mark.soak
@pytest.mark.parametrize("part", range(100))
def test_no_mutant_of_a_million_is_loaded_as_what_it_is_not(bench: Bench, part: int) -> None:
    tally, count = Tally(), SOAKED // 100
    mutants(bench, tally, range(MUTANTS + part * count, MUTANTS + (part + 1) * count))
    assert_nothing_wrong(tally, count)


def test_no_mutant_of_a_file_of_torch_save_raises_anything_else_or_passes_for_another() -> None:
    """Those with a recomputed checksum, and those of the older form, which has none, may be of another content."""
    tally, different = pickle_mutants.run(range(PICKLES))
    assert_nothing_wrong(tally, PICKLES)
    assert not different["archive"]
    if IS_TRUSTED:
        assert tally.accepted > PICKLES // 100


def test_every_single_bit_flip_of_an_archive_of_torch_save_is_refused_or_changes_nothing() -> None:
    tally = pickle_mutants.every_flip()
    assert_nothing_wrong(tally, 8 * len(pickle_mutants.saved(zipped=True)))


def test_the_specimen_loads_and_says_what_its_file_says(bench: Bench) -> None:
    bench.write(bench.raw)
    report = bench.target.load(bench.path)
    assert contradicts(bench.target, bench.path, report) == ""
    assert bench.target.look() != bench.before


def test_another_content_than_the_manifest_says_is_noticed(bench: Bench) -> None:
    bench.write(bench.raw)
    report = bench.target.load(bench.path)
    bench.target.state["epoch"] = 9
    assert contradicts(bench.target, bench.path, report) == "training"
    bench.target.model.head.weight.data[0, 0] += 1
    assert contradicts(bench.target, bench.path, report) == "tensors, training"


@pytest.mark.parametrize("mutation", mutations.ALL)
def test_a_mutation_makes_other_files_and_always_the_same(bench: Bench, mutation: mutations.Mutation) -> None:
    made = [mutation(bench.raw, bench.other, random.Random(seed)) for seed in range(20)]
    assert made == [mutation(bench.raw, bench.other, random.Random(seed)) for seed in range(20)]
    assert sum(content != bench.raw for content in made) > 10


@pytest.mark.parametrize("mutation", mutations.LEGAL)
def test_what_is_called_legal_is_read_as_a_manifest_with_its_digest(bench: Bench, mutation: mutations.Mutation) -> None:
    """Else every one of them would be refused for its digest, and nothing behind it would be looked at."""
    told: list[str] = []
    for seed in range(50):
        bench.write(mutation(bench.raw, bench.other, random.Random(seed)))
        try:
            bench.target.load(bench.path)
        except OrthoserdeError as error:
            told.append(str(error))
    assert not any("the manifest does not match its digest" in text for text in told)


@pytest.mark.parametrize("build", noticed_by("corruption"))
def test_a_build_without_a_check_is_noticed(bench: Bench, build: str, monkeypatch: pytest.MonkeyPatch) -> None:
    BUILDS[build][0](monkeypatch)
    tally = Tally()
    every_flip(bench, tally, 5, 211)
    mutants(bench, tally, range(300))
    assert tally.wrong
