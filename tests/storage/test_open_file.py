"""Reading at positions: by one call of the system, and by seeking where there is none."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from orthoserde.errors import FileAccessError, FileFormatError
from orthoserde.storage.open_file import OpenFile, identity_of, open_file
from tests.helpers import WAYS_OF_READING, read_in

CONTENT = random.Random(0).randbytes(100_000)


@pytest.fixture(params=WAYS_OF_READING)
def file(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[OpenFile]:
    read_in(request.param, monkeypatch)
    (tmp_path / "file").write_bytes(CONTENT)
    opened = open_file(str(tmp_path / "file"))
    yield opened
    opened.close()


def test_bytes_come_from_where_they_are_asked_for_in_any_order(file: OpenFile) -> None:
    assert file.size() == len(CONTENT)
    for start, stop in [(50, 60), (0, 100), (99_990, 100_000), (7, 7), (0, 100_000)]:
        assert file.read(stop - start, start) == CONTENT[start:stop]


def test_threads_that_read_at_the_same_time_do_not_disturb_each_other(file: OpenFile) -> None:
    wrong: list[int] = []

    def read(seed: int) -> None:
        generator = random.Random(seed)
        for _ in range(300):
            start = generator.randrange(99_000)
            if file.read(1000, start) != CONTENT[start : start + 1000]:
                wrong.append(start)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_system_that_gives_few_bytes_at_a_time_is_asked_again(
    file: OpenFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_some = OpenFile._read_some
    monkeypatch.setattr(OpenFile, "_read_some", lambda file, memory, position: read_some(file, memory[:77], position))
    assert file.read(1000, 500) == CONTENT[500:1500]


def test_reading_past_the_end_is_an_error_of_the_file(file: OpenFile) -> None:
    with pytest.raises(FileFormatError, match="file: the file ends too early; it changed while it was read"):
        file.read(11, len(CONTENT) - 10)


def test_an_error_of_the_system_has_errno_and_filename(file: OpenFile) -> None:
    # A descriptor that is open for writing alone: every read of it is refused.
    descriptor = os.open(file.name, os.O_WRONLY)
    os.dup2(descriptor, file.raw.fileno())
    os.close(descriptor)
    with pytest.raises(FileAccessError, match="cannot read the checkpoint: ") as caught:
        file.read(1, 0)
    assert (caught.value.errno, caught.value.filename) == (errno.EBADF, file.name)


# What the system may do to a single call


def _refuse(*arguments: object) -> None:
    raise OSError(errno.EIO, "Input/output error")


@pytest.mark.skipif(os.name == "nt", reason="about POSIX descriptors")
def test_a_file_that_the_system_says_nothing_of_is_refused_and_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"content")
    opened: list[int] = []
    open_ = os.open

    def recording(name: str, flags: int) -> int:
        opened.append(open_(name, flags))
        return opened[-1]

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", recording)
        patch.setattr(os, "fstat", _refuse)
        with pytest.raises(FileAccessError, match="cannot open the checkpoint: Input/output error") as caught:
            open_file(str(path))
    assert (caught.value.errno, caught.value.filename) == (errno.EIO, str(path))
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(opened[0])


def test_an_error_of_asking_for_the_size_is_one_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"content")
    with contextlib.closing(open_file(str(path))) as file:
        with monkeypatch.context() as patch:
            patch.setattr(os, "fstat", _refuse)
            for ask in (file.size, lambda: identity_of(file)):
                with pytest.raises(FileAccessError, match="cannot read the checkpoint") as caught:
                    ask()
                assert (caught.value.errno, caught.value.filename) == (errno.EIO, str(path))
        assert file.size() == 7


@pytest.mark.skipif(os.name == "nt", reason="about POSIX descriptors")
def test_an_error_of_close_is_one_of_ours(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"content")
    file = open_file(str(path))
    os.close(file.raw.fileno())
    with pytest.raises(FileAccessError, match="cannot close the checkpoint") as caught:
        file.close()
    assert (caught.value.errno, caught.value.filename) == (errno.EBADF, str(path))
