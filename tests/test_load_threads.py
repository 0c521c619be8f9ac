"""Loads that read several tensors at a time: the same model in the end, whatever the threads."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import signal
import threading
import time
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal
from torch.utils._python_dispatch import TorchDispatchMode

import orthoserde
from orthoserde import DamagedFileError, FileAccessError, LoadInterruptedError, side_by_side, storage, tensor_bytes
from orthoserde.checkpoint import LiveTensor
from orthoserde.storage.reader import StoredTensor
from tests.helpers import (
    THREADS,
    assert_same_state,
    assert_unchanged,
    bits,
    default_dtype,
    header_bytes,
    lived_in,
    scramble_,
    snapshot,
    use_threads,
    watch_reads,
)

#: Seconds after which a test that waits for another thread has failed.
PATIENCE = 30.0

#: Length and header.
HEADER_READS = 2


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    before = threading.enumerate()
    yield
    assert threading.enumerate() == before


class Tensors(nn.Module):
    """Parameters p0, p1, ... of these shapes or values."""

    def __init__(self, *tensors: Tensor | tuple[int, ...]) -> None:
        super().__init__()
        for index, tensor in enumerate(tensors):
            value = tensor if isinstance(tensor, Tensor) else torch.randn(tensor)
            self.register_parameter(f"p{index}", nn.Parameter(value))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "many tiny tensors": lambda: nn.Sequential(*(nn.Linear(2, 2) for _ in range(300))),
    "tensors without elements": lambda: Tensors((0,), (3, 0), (5,), (0, 2), (4, 4)),
    "one giant tensor": lambda: Tensors((3 * tensor_bytes.BLOCK_BYTES,)),
    "one giant tensor among tiny ones": lambda: Tensors(*[(3,)] * 20, (tensor_bytes.BLOCK_BYTES,), *[(5,)] * 20),
    "memory in another order": lambda: Tensors(torch.randn(6, 4).T, torch.randn(2, 3, 4).permute(2, 0, 1), (7, 7)),
    "parametrized tensors": lambda: nn.Sequential(orthogonal(nn.Linear(5, 9)), orthogonal(nn.Linear(9, 9))),
    "nothing": nn.Sequential,
}


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("meta", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_every_model_comes_back_with_any_number_of_threads(
    name: str, meta: bool, verify: bool, threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = scramble_(MODELS[name]())
    orthoserde.save(saved, tmp_path / "model")
    model = MODELS[name]().to("meta" if meta else "cpu")
    use_threads(threads, monkeypatch)
    report = orthoserde.load(model, tmp_path / "model", verify=verify)
    assert report.loaded == len(saved.state_dict())
    assert_same_state(saved, model)


@pytest.mark.parametrize("threads", THREADS)
def test_values_of_another_dtype_are_converted_with_any_number_of_threads(
    threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = Tensors(*[(50, 3)] * 6).to(torch.bfloat16)
    orthoserde.save(saved, tmp_path / "model")
    model = Tensors(*[(50, 3)] * 6)
    use_threads(threads, monkeypatch)
    orthoserde.load(model, tmp_path / "model")
    assert_same_state(saved.to(torch.float32), model)


class Watching(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A mode that is left in peace."""

    def __torch_dispatch__(
        self, func: Callable[..., object], types: object, args: tuple[object, ...] = (), kwargs: object = None
    ) -> object:
        return func(*args, **(kwargs if isinstance(kwargs, dict) else {}))


MODES: dict[str, Callable[[], contextlib.AbstractContextManager[object]]] = {
    "no gradients": torch.no_grad,
    "gradients": torch.enable_grad,
    "inference mode": torch.inference_mode,
    "default device": lambda: torch.device("meta"),
    "default dtype": lambda: default_dtype(torch.float64),
    "dispatch mode": Watching,
}


@pytest.mark.parametrize("meta", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_modes_of_the_calling_thread_make_no_difference(
    mode: str, meta: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved, model = Tensors(*[(40, 3)] * 6), Tensors(*[(40, 3)] * 6).to("meta" if meta else "cpu")
    orthoserde.save(saved, tmp_path / "model")
    use_threads(4, monkeypatch)
    versions = [parameter._version for parameter in model.parameters()]
    with MODES[mode]():
        orthoserde.load(model, tmp_path / "model")
    assert_same_state(saved, model)
    for parameter, version in zip(model.parameters(), versions, strict=True):
        assert parameter.is_leaf
        assert parameter.requires_grad
        assert not parameter.is_inference()
        assert meta or parameter._version > version


def test_tensors_made_in_inference_mode_are_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = Tensors(*[(40, 3)] * 6)
    orthoserde.save(saved, tmp_path / "model")
    with torch.inference_mode():
        model = Tensors(*[(40, 3)] * 6)
    use_threads(4, monkeypatch)
    orthoserde.load(model, tmp_path / "model")
    assert_same_state(saved, model)


# Which thread


class Odd(Tensor):
    """A subclass, which may have functions of its own."""


def filled_by(monkeypatch: pytest.MonkeyPatch, kind: type[LiveTensor] | type[StoredTensor]) -> list[tuple[Tensor, int]]:
    """Every tensor that sources of this class fill from now on, with the thread."""
    fill, found = kind.fill, list[tuple[Tensor, int]]()

    def watched(source: object, target: Tensor, see: Callable[[memoryview], None] = tensor_bytes.ignore) -> None:
        found.append((target, threading.get_ident()))
        time.sleep(0.005)  # so that others come to theirs
        fill(source, target, see)  # type: ignore[arg-type]

    monkeypatch.setattr(kind, "fill", watched)
    return found


def with_buffers(*tensors: Tensor) -> nn.Module:
    model = nn.Module()
    for index, tensor in enumerate(tensors):
        model.register_buffer(f"b{index}", tensor)
    return model


def overlapping() -> tuple[Tensor, Tensor]:
    whole = torch.zeros(40)
    return whole[:20], whole[10:30]


def transposed_twice() -> tuple[Tensor, Tensor]:
    """The same elements, which are row-major for one of the two."""
    square = torch.zeros(4, 4)
    return square, square.T


#: Targets that are more than a place for bytes.
OTHERS: dict[str, Callable[[], tuple[Tensor, ...]]] = {
    "strides": lambda: (torch.zeros(5, 4).T,),
    "gaps": lambda: (torch.zeros(4, 8)[:, ::2],),
    "another dtype": lambda: (torch.zeros(16, dtype=torch.float64),),
    "conjugated": lambda: (torch.zeros(8, dtype=torch.complex64).conj(),),
    "a subclass": lambda: (torch.zeros(16).as_subclass(Odd),),
    "overlapping": overlapping,
    "transposed twice": transposed_twice,
}


def test_plain_memory_is_filled_by_several_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_buffers(*(torch.zeros(16) for _ in range(8)))
    orthoserde.save(model, tmp_path / "model")
    use_threads(4, monkeypatch)
    filled = filled_by(monkeypatch, StoredTensor)
    orthoserde.load(model, tmp_path / "model")
    assert len({thread for _, thread in filled}) > 1


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_more_than_a_place_for_bytes_is_filled_by_the_calling_thread(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = [torch.zeros(16) for _ in range(8)]
    # So many that not all of them can come to the calling thread by chance.
    others = [other for _ in range(12) for other in OTHERS[name]()]
    saved = with_buffers(*plain, *(other.float() if other.dtype == torch.float64 else other for other in others))
    orthoserde.save(saved, tmp_path / "model")
    use_threads(4, monkeypatch)
    filled = filled_by(monkeypatch, StoredTensor)
    orthoserde.load(with_buffers(*plain, *others), tmp_path / "model")
    where = [thread for target, thread in filled if not any(target is tensor for tensor in plain)]
    assert len(where) >= len(others)
    assert set(where) == {threading.get_ident()}


def test_targets_that_share_memory_are_written_one_after_the_other_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = torch.randn(1000)
    parts = [whole[start : start + 500] for start in range(0, 500, 50)]
    orthoserde.save(with_buffers(*parts), tmp_path / "model")
    wanted = bits(whole)
    whole.zero_()
    use_threads(4, monkeypatch)
    filled = filled_by(monkeypatch, StoredTensor)
    orthoserde.load(with_buffers(*parts), tmp_path / "model")
    assert bits(whole[:950]) == wanted[: 4 * 950]
    # The first round is the check, on scratch memory, that the tensors agree.
    assert [target.data_ptr() for target, _ in filled[len(parts) :]] == [part.data_ptr() for part in parts]


def test_what_is_worked_out_or_in_memory_is_read_by_the_calling_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Sequential(*(orthogonal(nn.Linear(6, 6, bias=False)) for _ in range(6)))
    weights = {f"{index}.weight": getattr(layer, "weight").detach() for index, layer in enumerate(model)}  # noqa: B009
    save_file({key: weight.contiguous() for key, weight in weights.items()}, tmp_path / "model")
    use_threads(4, monkeypatch)
    filled = filled_by(monkeypatch, LiveTensor)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", orthoserde.LegacyCheckpointWarning)
        orthoserde.load(model, tmp_path / "model")
    assert len(filled) >= 6
    assert {thread for _, thread in filled} == {threading.get_ident()}


# Damage and failures


@pytest.mark.parametrize("threads", THREADS)
def test_damaged_tensors_are_named_in_the_order_of_the_file_whichever_is_read_first(
    threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, model = tmp_path / "model", Tensors(*[(64,)] * 12)
    orthoserde.save(model, path)
    data = header_bytes(path)
    with path.open("r+b") as file:
        for index in (1, 4, 5, 10):
            file.seek(data + 256 * index)
            file.write(bytes(256))
    with storage.read(path) as checkpoint:
        keys = list(checkpoint.manifest.tensors)
    expected = tuple(keys[index] for index in (1, 4, 5, 10))
    use_threads(threads, monkeypatch)
    watch_reads(monkeypatch, lambda position, count: time.sleep(0.02 if position == data + 256 else 0))
    before = snapshot(model)
    with pytest.raises(DamagedFileError, match=re.escape(f"({', '.join(expected)})")):
        orthoserde.load(model, path)
    assert_unchanged(model, before)
    assert orthoserde.verify(path).damaged == expected


BLOCKS = 12


@pytest.fixture
def two_large(tmp_path: Path) -> Path:
    """A file of two tensors of some blocks each."""
    orthoserde.save(make_two_large(), tmp_path / "model")
    return tmp_path / "model"


def make_two_large() -> nn.Module:
    return Tensors(*[(BLOCKS * tensor_bytes.BLOCK_BYTES // 4,)] * 2)


class FirstBlocks:
    """Lets the first reads of two tensors meet, then acts before the one and lets the other go on a little later."""

    def __init__(self, path: Path, round_: int, act: Callable[[], None], *, in_caller: bool) -> None:
        start = header_bytes(path)
        self.starts = (start, start + BLOCKS * tensor_bytes.BLOCK_BYTES)
        self.meeting = threading.Barrier(2)
        self.rounds = dict.fromkeys(self.starts, -round_)
        self.act, self.caller, self.in_caller = act, threading.get_ident(), in_caller

    def __call__(self, position: int, count: int) -> None:
        if position not in self.starts:
            return
        self.rounds[position] += 1
        if self.rounds[position] == 1:
            self.meeting.wait(PATIENCE)
            if (threading.get_ident() == self.caller) == self.in_caller:
                self.act()
                # A signal may be delivered here, and is acted upon by the caller's thread, when it is awake.
                time.sleep(0.5)
            time.sleep(0.05)


def fail() -> None:
    raise OSError(errno.EIO, "Input/output error")


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("in_caller", [True, False])
def test_a_read_error_in_any_thread_before_the_first_write_stops_all_and_changes_nothing(
    in_caller: bool, two_large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = lived_in(make_two_large())
    before = snapshot(model)
    use_threads(2, monkeypatch)
    reads = watch_reads(monkeypatch, FirstBlocks(two_large, 0, fail, in_caller=in_caller))
    with pytest.raises(FileAccessError) as caught:
        orthoserde.load(model, two_large)
    assert caught.value.errno == errno.EIO
    assert_unchanged(model, before)
    assert 2 <= len(reads) - HEADER_READS < BLOCKS  # both first blocks, and of the other tensor not all


@pytest.mark.parametrize("in_caller", [True, False])
def test_a_read_error_in_any_thread_while_tensors_are_written_stops_all_and_says_so(
    in_caller: bool, two_large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_two_large()
    use_threads(2, monkeypatch)
    reads = watch_reads(monkeypatch, FirstBlocks(two_large, 1, fail, in_caller=in_caller))
    with pytest.raises(LoadInterruptedError, match="partly written") as caught:
        orthoserde.load(model, two_large)
    assert isinstance(caught.value.__cause__, FileAccessError)
    assert 2 <= len(reads) - HEADER_READS - 2 * BLOCKS < BLOCKS
    after = snapshot(model)
    time.sleep(0.05)
    assert_unchanged(model, after)  # nobody writes any more


@pytest.mark.parametrize("in_caller", [True, False])
def test_a_read_error_in_any_thread_while_new_tensors_are_filled_changes_nothing(
    in_caller: bool, two_large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.device("meta"):
        model = make_two_large()
    before = snapshot(model)
    use_threads(2, monkeypatch)
    watch_reads(monkeypatch, FirstBlocks(two_large, 1, fail, in_caller=in_caller))
    with pytest.raises(FileAccessError):
        orthoserde.load(model, two_large)
    assert_unchanged(model, before)


@pytest.mark.skipif(os.name == "nt", reason="about POSIX signals")
@pytest.mark.parametrize("in_caller", [True, False])
def test_an_interrupt_before_the_first_write_stops_all_and_changes_nothing(
    in_caller: bool, two_large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = lived_in(make_two_large())
    before = snapshot(model)
    use_threads(2, monkeypatch)
    reads = watch_reads(monkeypatch, FirstBlocks(two_large, 0, interrupt, in_caller=in_caller))
    with pytest.raises(KeyboardInterrupt):
        orthoserde.load(model, two_large)
    assert_unchanged(model, before)
    assert len(reads) - HEADER_READS < BLOCKS


@pytest.mark.skipif(os.name == "nt", reason="about POSIX signals")
@pytest.mark.parametrize("in_caller", [True, False])
def test_an_interrupt_while_tensors_are_written_stops_all_and_says_so(
    in_caller: bool, two_large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_two_large()
    use_threads(2, monkeypatch)
    watch_reads(monkeypatch, FirstBlocks(two_large, 1, interrupt, in_caller=in_caller))
    with pytest.raises(LoadInterruptedError, match="KeyboardInterrupt") as caught:
        orthoserde.load(model, two_large)
    assert isinstance(caught.value.__cause__, KeyboardInterrupt)
    monkeypatch.undo()
    orthoserde.load(model, two_large)


def test_a_load_of_few_bytes_starts_no_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(50)))
    orthoserde.save(model, tmp_path / "model")
    monkeypatch.setattr(side_by_side, "_threads_at_hand", lambda: 4)
    monkeypatch.setattr(threading.Thread, "start", lambda thread: pytest.fail("a thread was started"))
    orthoserde.load(model, tmp_path / "model")


def test_each_thread_takes_no_more_memory_than_a_block(two_large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_threads(2, monkeypatch)
    model = make_two_large()
    reads = watch_reads(monkeypatch)
    tracemalloc.start()
    try:
        orthoserde.load(model, two_large)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(reads) == HEADER_READS + 4 * BLOCKS
    assert peak < 2 * tensor_bytes.BLOCK_BYTES + (1 << 20)
