"""What happens when reading fails: before the first write nothing has changed, after it the error says so, loudly."""

from __future__ import annotations

import errno
import itertools
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

import orthoserde
from orthoserde import DamagedFileError, FileAccessError, FileFormatError, LoadInterruptedError
from tests.helpers import (
    THREADS,
    WAYS_OF_READING,
    assert_same_state,
    assert_unchanged,
    flip_bit,
    header_bytes,
    lived_in,
    read_in,
    scramble_,
    snapshot,
    use_threads,
    watch_reads,
)

Act = Callable[[], object]
Make = Callable[[], nn.Module]


class Interference:
    """Does something before one of the reads of all files, while no other read begins.

    Attributes:
        reads: Those that there have been.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._acting = threading.Lock()
        self._act_at(-1, nothing)
        self.reads = watch_reads(monkeypatch, self._before)

    def __call__(self, at: int, act: Act) -> None:
        """Act before the read of this number, counted from now on and from 0."""
        self.reads.clear()
        self._act_at(at, act)

    def _act_at(self, at: int, act: Act) -> None:
        self._numbers, self._at, self._act = itertools.count(), at, act

    def _before(self, position: int, count: int) -> None:
        with self._acting:
            if next(self._numbers) == self._at:
                self._act()


@pytest.fixture(params=itertools.product(WAYS_OF_READING, THREADS), ids=lambda param: f"{param[0]}, {param[1]} threads")
def interfere(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Interference]:
    """What interferes with reads, however they are done; no thread outlives a test."""
    way, threads = request.param
    read_in(way, monkeypatch)
    use_threads(threads, monkeypatch)
    before = threading.enumerate()
    yield Interference(monkeypatch)
    assert threading.enumerate() == before


def fail() -> None:
    raise OSError(errno.EIO, "Input/output error")


def interrupt() -> None:
    raise KeyboardInterrupt


def nothing() -> None:
    return


def make_model() -> nn.Module:
    return nn.Sequential(orthogonal(nn.Linear(3, 6)), spectral_norm(nn.Linear(6, 4)), weight_norm(nn.Linear(4, 2)))


def make_bare() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 6), nn.Linear(6, 4), nn.Linear(4, 2))


def make_meta() -> nn.Module:
    with torch.device("meta"):
        return make_bare()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    torch.manual_seed(3)
    orthoserde.save(scramble_(make_model()), tmp_path / "model")
    return tmp_path / "model"


def reads_of(path: Path, interfere: Interference, *, verify: bool, make: Make) -> int:
    """How often a load reads."""
    interfere(-1, nothing)
    orthoserde.load(make(), path, verify=verify)
    return len(interfere.reads)


#: Length and header are two reads; the model of these tests has ten tensors, each smaller than a block.
HEADER, TENSORS = 2, 10


def test_a_verified_load_reads_each_tensor_twice_and_an_unverified_one_once(
    path: Path, interfere: Interference
) -> None:
    assert reads_of(path, interfere, verify=True, make=make_model) == HEADER + 2 * TENSORS
    assert reads_of(path, interfere, verify=False, make=make_model) == HEADER + TENSORS


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("make", [make_model, make_bare, make_meta])
def test_a_read_error_anywhere_changes_nothing_or_says_that_the_model_is_partly_written(
    path: Path, interfere: Interference, make: Make, verify: bool
) -> None:
    reference = make_model()
    outcomes: list[type[Exception]] = []
    orthoserde.load(reference, path)
    for at in range(reads_of(path, interfere, verify=verify, make=make)):
        interfere(at, fail)
        model = lived_in(make())
        before = snapshot(model)
        with pytest.raises((FileAccessError, LoadInterruptedError)) as caught:
            orthoserde.load(model, path, verify=verify)
        error: Exception = caught.value
        outcomes.append(type(error))
        if isinstance(error, LoadInterruptedError):
            assert isinstance(error.__cause__, FileAccessError)
            assert error.__cause__.errno == errno.EIO
            assert "partly written" in str(error)
            assert not isinstance(error, OSError)
        else:
            assert isinstance(error, FileAccessError)
            assert error.errno == errno.EIO
            assert_unchanged(model, before)
        del before
        interfere(-1, nothing)
        orthoserde.load(model, path, verify=verify)
        assert_same_state(reference, model)
    whole = outcomes.count(FileAccessError)
    assert outcomes == [FileAccessError] * whole + [LoadInterruptedError] * (len(outcomes) - whole)
    # Everything but the reads into tensors that the model already has.
    existing = {make_model: TENSORS, make_bare: 5, make_meta: 0}[make]
    assert len(outcomes) - whole == existing


def test_an_interrupt_after_the_first_write_says_that_the_model_is_partly_written(
    path: Path, interfere: Interference
) -> None:
    reads = reads_of(path, interfere, verify=True, make=make_model)
    interfere(reads - 1, interrupt)
    with pytest.raises(LoadInterruptedError, match="KeyboardInterrupt") as caught:
        orthoserde.load(make_model(), path)
    assert isinstance(caught.value.__cause__, KeyboardInterrupt)


def test_an_interrupt_before_the_first_write_stays_an_interrupt_and_changes_nothing(
    path: Path, interfere: Interference
) -> None:
    model = lived_in(make_model())
    before = snapshot(model)
    interfere(HEADER + TENSORS - 1, interrupt)
    with pytest.raises(KeyboardInterrupt):
        orthoserde.load(model, path)
    assert_unchanged(model, before)


@pytest.mark.parametrize("tensor", range(TENSORS))
def test_a_file_that_changes_between_the_digests_and_the_reading_is_found(
    path: Path, interfere: Interference, tensor: int
) -> None:
    start = header_bytes(path)
    where = start + (path.stat().st_size - start) * tensor // TENSORS
    interfere(HEADER + TENSORS, lambda: flip_bit(path, where))
    with pytest.raises(LoadInterruptedError) as caught:
        orthoserde.load(make_model(), path)
    assert isinstance(caught.value.__cause__, DamagedFileError)
    assert "changed while it was read" in str(caught.value.__cause__)


def test_a_file_that_shrinks_between_the_digests_and_the_reading_is_found(path: Path, interfere: Interference) -> None:
    whole = path.read_bytes()
    interfere(HEADER + TENSORS, lambda: truncate(path, len(whole) - 8))
    with pytest.raises(LoadInterruptedError) as caught:
        orthoserde.load(make_model(), path)
    assert isinstance(caught.value.__cause__, FileFormatError)
    assert "changed while it was read" in str(caught.value.__cause__)


def truncate(path: Path, length: int) -> None:
    with path.open("r+b") as file:
        file.truncate(length)


def test_a_file_that_changes_before_anything_existing_is_written_changes_nothing(
    path: Path, interfere: Interference
) -> None:
    model = make_meta()
    before = snapshot(model)
    interfere(HEADER + TENSORS, lambda: flip_bit(path, path.stat().st_size - 1))
    with pytest.raises(DamagedFileError, match="changed while it was read"):
        orthoserde.load(model, path)
    assert_unchanged(model, before)


def test_a_file_that_is_replaced_while_it_is_read_is_read_to_its_end(path: Path, interfere: Interference) -> None:
    """`save` replaces the name, not the bytes: a reader goes on with the file that it opened."""
    reference, model = make_model(), make_model()
    orthoserde.load(reference, path)
    interfere(HEADER + TENSORS + 3, lambda: orthoserde.save(make_model(), path))
    orthoserde.load(model, path)
    assert_same_state(reference, model)


@pytest.mark.parametrize("make", [make_model, make_bare, make_meta])
def test_damage_is_found_before_the_first_write_and_only_by_a_load_that_verifies(path: Path, make: Make) -> None:
    reference = make_model()
    orthoserde.load(reference, path)
    flip_bit(path, path.stat().st_size - 1)
    model = lived_in(make())
    before = snapshot(model)
    with pytest.raises(DamagedFileError, match="not those that were saved"):
        orthoserde.load(model, path)
    assert_unchanged(model, before)
    del before
    orthoserde.load(model, path, verify=False)
    with pytest.raises(AssertionError, match="other elements"):
        assert_same_state(reference, model)


def test_a_meta_parameter_that_a_graph_still_holds_does_not_leave_the_model_half_made(tmp_path: Path) -> None:
    saved = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    orthoserde.save(saved, tmp_path / "model")
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
        output = model(torch.empty(1, 3))
    before = snapshot(model)
    try:
        orthoserde.load(model, tmp_path / "model")
    except RuntimeError:  # torch will not swap a parameter that an autograd graph holds
        assert_unchanged(model, before)
    else:
        assert_same_state(saved, model)
    assert output.device.type == "meta"
