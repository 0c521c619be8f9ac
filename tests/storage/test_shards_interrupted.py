"""A save into a folder may end at any moment, by a kill or by an error: what is found is one checkpoint, whole."""

from __future__ import annotations

import builtins
import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import orthoserde
from orthoserde.errors import CommitUncertainError, FileAccessError, TornSaveError
from orthoserde.storage import writer
from orthoserde.storage.leftovers import TEMPORARY_MARK
from orthoserde.storage.shards import writing
from tests.storage.shard_cases import INDEX, SINGLE, as_transformers_reads, equal, loaded, make, names, shards, state

ROOT = Path(__file__).resolve().parents[2]

LIMIT = 500

posix = pytest.mark.skipif(os.name == "nt", reason="forks")


@posix
def test_whenever_a_process_is_killed_one_checkpoint_is_whole(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-m", "tests.storage.killed_shards", str(tmp_path)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert ended.returncode == 0, ended.stderr
    counts = [int(line.rpartition(" ")[2]) for line in ended.stdout.splitlines()]
    assert len(counts) == 5
    assert all(count > 20 for count in counts), ended.stdout


class _At:
    """Raises an exception in place of the n-th of the calls that it stands for, or just after it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, count: int, error: BaseException, *, after: bool) -> None:
        self.left = count
        self.error = error
        self.after = after
        for where, name in (
            *((os, name) for name in ("open", "fsync", "replace", "unlink", "mkdir", "listdir")),
            (builtins, "open"),
            (writer, "write_all"),
            (writing, "write_all"),
        ):
            monkeypatch.setattr(where, name, self.wrapped(getattr(where, name)))

    def wrapped(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **named: Any) -> Any:
            self.left -= 1
            if self.left == 0 and not self.after:
                raise self.error
            result = call(*arguments, **named)
            if self.left == 0:
                if call is os_open:
                    os.close(result)
                raise self.error
            return result

        return wrapper


os_open = os.open

STARTS: dict[str, Callable[[Path], object]] = {
    "nothing": lambda folder: None,
    "shards": lambda folder: orthoserde.save(make(1.0), folder, max_shard_size=LIMIT),
    "one file": lambda folder: orthoserde.save(make(1.0), folder, max_shard_size="1GB"),
}


@pytest.mark.parametrize("size", [LIMIT, "1GB"])
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize(
    ("error", "after"),
    [(OSError(28, "No space left on device"), False), (KeyboardInterrupt(), True)],
    ids=["an error in place of a call", "^C after a call"],
)
def test_wherever_an_error_comes_up_one_checkpoint_is_whole(
    tmp_path: Path, error: BaseException, after: bool, start: str, size: int | str
) -> None:
    stood = False
    for count in range(1, 1000):
        folder = tmp_path / str(count)
        STARTS[start](folder)
        model, raised = make(2.0), None
        with pytest.MonkeyPatch.context() as monkeypatch:
            at = _At(monkeypatch, count, error, after=after)
            try:
                orthoserde.save(model, folder, max_shard_size=size)
            except (FileAccessError, KeyboardInterrupt) as caught:
                raised = caught
        if at.left > 0:
            assert raised is None
            assert stood
            return
        check(folder, start)
        stands = has_checkpoint(folder) and equal(loaded(folder), state(make(2.0)))
        if raised is None:  # what killed saves have left could not be looked for, which fails no save
            assert stands, count
        else:
            assert stands or not stood, count
            stood = stands
        if isinstance(raised, FileAccessError) and not after:
            saved = isinstance(raised, CommitUncertainError) or "the new checkpoint is saved" in str(raised)
            assert saved == (stands or "is read before it" in str(raised))
            # What failed leaves nothing of itself.
            assert saved or (names(folder) == files_of(start) if folder.exists() else start == "nothing")
        orthoserde.save(make(3.0), folder, max_shard_size=size)
        assert equal(loaded(folder), state(make(3.0)))
    raise AssertionError("no end of the calls")


def has_checkpoint(folder: Path) -> bool:
    return (folder / SINGLE).exists() or (folder / INDEX).exists()


def check(folder: Path, start: str) -> None:
    """What is read is the old state or the new one; there is none only where there was none."""
    if not has_checkpoint(folder):
        assert start == "nothing"
        return
    found = loaded(folder)
    assert equal(found, state(make(1.0))) or equal(found, state(make(2.0)))
    kept = {key: tensor for key, tensor in found.items() if key != "2.weight"}
    assert equal(as_transformers_reads(folder), kept)


def files_of(start: str) -> list[str]:
    usual = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", INDEX]
    return {"nothing": [], "shards": usual, "one file": [SINGLE]}[start]


def test_an_old_file_that_is_read_first_and_cannot_be_removed_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    orthoserde.save(make(1.0), tmp_path, max_shard_size="1GB")

    def refuse(path: str) -> None:
        raise OSError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", refuse)
        with pytest.raises(
            FileAccessError, match="the older one in one file, which is read before it, cannot be removed"
        ):
            orthoserde.save(make(2.0), tmp_path, max_shard_size=LIMIT)
    assert equal(loaded(tmp_path), state(make(1.0)))
    assert equal(loaded(tmp_path / INDEX), state(make(2.0)))


def test_a_model_that_changes_meanwhile_is_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    orthoserde.save(make(1.0), tmp_path, max_shard_size=LIMIT)
    model, write_tensors = make(2.0), writer.write_tensors

    def meanwhile(*arguments: Any) -> Any:
        with torch.no_grad():
            model.get_parameter("3.bias").add_(1)
        return write_tensors(*arguments)

    monkeypatch.setattr(writing, "write_tensors", meanwhile)
    with pytest.raises(TornSaveError, match=r"3\.bias changed while it was being saved"):
        orthoserde.save(model, tmp_path, max_shard_size=LIMIT)
    assert names(tmp_path) == files_of("shards")
    assert equal(loaded(tmp_path), state(make(1.0)))


def test_temporary_files_of_killed_saves_are_removed_when_they_are_old(tmp_path: Path) -> None:
    for name in ("model-00001-of-00002.safetensors", INDEX, SINGLE, "other.safetensors"):
        path = tmp_path / f".{name}{TEMPORARY_MARK}{'0' * 16}"
        path.write_bytes(b"half")
        os.utime(path, (0, 0))
    orthoserde.save(make(), tmp_path, max_shard_size=LIMIT)
    assert names(tmp_path) == [f".other.safetensors{TEMPORARY_MARK}{'0' * 16}", *shards(tmp_path), INDEX]


@posix
@pytest.mark.parametrize("count", range(1, 9))
def test_what_the_system_would_not_say_of_the_previous_checkpoint_is_an_error_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    STARTS["shards"](tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}
    lstat, left = os.lstat, count

    def refuse(path: str, **named: Any) -> os.stat_result:
        nonlocal left
        left -= os.path.basename(path) == INDEX
        if left == 0:
            raise OSError(errno.EIO, "Input/output error")
        return lstat(path, **named)

    with monkeypatch.context() as patch:
        patch.setattr(os, "lstat", refuse)
        raised: FileAccessError | None = None
        try:
            orthoserde.save(make(2.0), tmp_path, max_shard_size=LIMIT)
        except FileAccessError as error:
            raised = error
    assert raised is None or raised.errno == errno.EIO
    if raised is None or "the new checkpoint is saved" in str(raised):
        assert equal(loaded(tmp_path), state(make(2.0)))
    else:
        assert {name: (tmp_path / name).read_bytes() for name in names(tmp_path)} == before
