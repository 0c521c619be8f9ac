from __future__ import annotations

import contextlib
import errno
import io
import os
import secrets
import socket
import stat
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from orthoserde import storage
from orthoserde.errors import CommitUncertainError, FileAccessError
from orthoserde.storage.atomic import replacing
from orthoserde.storage.leftovers import ABANDONED_SECONDS, TEMPORARY_MARK
from tests.helpers import assert_finite
from tests.storage.strategies import checkpoint_of

if sys.platform != "win32":
    import fcntl

posix = pytest.mark.skipif(os.name == "nt", reason="about POSIX files")


def not_root() -> bool:
    return os.name != "nt" and os.geteuid() != 0


@contextlib.contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def save_to(path: Path, content: bytes = b"new") -> None:
    with replacing(path) as file:
        file.write(content)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """A file that is there already, alone in its folder."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"previous")
    return path


def assert_untouched(target: Path) -> None:
    assert target.read_bytes() == b"previous"
    assert os.listdir(target.parent) == [target.name]


# What is written


def test_the_file_stands_under_its_name_when_the_block_ends_and_not_before(tmp_path: Path) -> None:
    path = tmp_path / "new"
    with replacing(path) as file:
        file.write(b"one")
        file.seek(0)
        file.write(b"two")
        assert not path.exists()
        (temporary,) = os.listdir(tmp_path)
        assert TEMPORARY_MARK in temporary
    assert path.read_bytes() == b"two"
    assert os.listdir(tmp_path) == ["new"]
    assert file.closed


def test_readers_see_the_previous_file_until_the_block_ends(target: Path) -> None:
    with target.open("rb") as opened, replacing(target) as file:
        file.write(b"new")
        assert target.read_bytes() == b"previous"
        assert opened.read() == b"previous"
    assert target.read_bytes() == b"new"


def test_a_relative_path_and_a_path_of_bytes_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_to(Path("relative"))
    with replacing(os.fsencode(tmp_path / "bytes")) as file:  # type: ignore[arg-type]
        file.write(b"new")
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == {
        "relative": b"new",
        "bytes": b"new",
    }


def test_a_relative_path_is_that_of_the_folder_where_the_save_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    with replacing("model") as file:
        file.write(b"new")
        monkeypatch.chdir(tmp_path / "other")
    assert (tmp_path / "model").read_bytes() == b"new"
    assert os.listdir(tmp_path / "other") == []


@pytest.mark.parametrize("name", ["n" * 250, "n" * 255, "é" * 127, "\U0001f600" * 63, "-" + "é" * 127])
def test_long_names_work(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    save_to(path, b"first")
    save_to(path)
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == [name]


def test_the_name_of_the_temporary_file_is_text_that_any_file_system_takes(tmp_path: Path) -> None:
    with replacing(tmp_path / ("é" * 127)):
        (temporary,) = os.listdir(tmp_path)
        temporary.encode("utf-8")
        assert len(os.fsencode(temporary)) <= 255


@pytest.mark.parametrize("name", ["n" * 256, "é" * 128])
def test_a_name_that_is_too_long_for_the_system_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(FileAccessError) as caught:
        save_to(tmp_path / name)
    assert caught.value.errno == errno.ENAMETOOLONG
    assert os.listdir(tmp_path) == []


def test_a_temporary_file_of_another_save_is_not_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secrets, "token_hex", lambda count: "0" * 2 * count)
    path = tmp_path / "model"
    with replacing(path) as file:
        file.write(b"first")
        with pytest.raises(FileAccessError) as caught:
            save_to(path)
    assert caught.value.errno == errno.EEXIST
    assert path.read_bytes() == b"first"
    assert os.listdir(tmp_path) == ["model"]


def test_two_saves_at_once_leave_one_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "model"
    contents = [bytes([i]) * 100_000 for i in range(4)]
    threads = [threading.Thread(target=save_to, args=(path, content)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_bytes() in contents
    assert os.listdir(tmp_path) == ["model"]


# Modes and links


@posix
@pytest.mark.parametrize(("mask", "expected"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_a_new_file_has_the_mode_that_the_umask_leaves(tmp_path: Path, mask: int, expected: int) -> None:
    with umask(mask):
        save_to(tmp_path / "model")
    assert mode(tmp_path / "model") == expected


@posix
@pytest.mark.parametrize("kept", [0o640, 0o600, 0o666, 0o444, 0o755])
def test_a_replaced_file_keeps_its_mode_whatever_the_umask(target: Path, kept: int) -> None:
    target.chmod(kept)
    with umask(0o077):
        save_to(target)
    assert mode(target) == kept
    assert target.read_bytes() == b"new"


@posix
def test_a_private_file_is_never_readable_by_others_on_its_way(target: Path) -> None:
    target.chmod(0o600)
    with umask(0), replacing(target) as file:
        assert stat.S_IMODE(os.fstat(file.fileno()).st_mode) == 0o600


@posix
def test_a_symbolic_link_is_followed_and_stays(target: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("links")
    (elsewhere / "near").symlink_to(target)
    (elsewhere / "far").symlink_to("near")
    save_to(elsewhere / "far")
    assert target.read_bytes() == b"new"
    assert os.readlink(elsewhere / "far") == "near"
    assert sorted(os.listdir(elsewhere)) == ["far", "near"]
    assert os.listdir(target.parent) == [target.name]


@posix
def test_a_symbolic_link_to_nothing_gets_the_file_it_points_to(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "later")
    save_to(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "later").read_bytes() == b"new"


@posix
def test_a_loop_of_symbolic_links_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(FileAccessError) as caught:
        save_to(tmp_path / "a")
    assert caught.value.errno == errno.ELOOP
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


@posix
def test_another_name_of_the_previous_file_keeps_the_previous_content(target: Path) -> None:
    os.link(target, target.parent / "backup")
    save_to(target)
    assert (target.parent / "backup").read_bytes() == b"previous"
    assert target.read_bytes() == b"new"


def _make_directory(path: Path) -> None:
    path.mkdir()


def _make_fifo(path: Path) -> None:
    os.mkfifo(path)


def _make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


def _make_device(path: Path) -> None:
    path.symlink_to(os.devnull)


SPECIAL: dict[str, Callable[[Path], None]] = {
    "directory": _make_directory,
    "fifo": _make_fifo,
    "socket": _make_socket,
    "device": _make_device,
}


@posix
@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("linked", [False, True])
def test_anything_but_a_regular_file_is_refused_and_left_alone(kind: str, linked: bool) -> None:
    # A folder of its own: the path of a socket is limited to about 100 bytes.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "special")
        SPECIAL[kind](path)
        before = path.stat()
        if linked:
            Path(folder, "link").symlink_to(path)
        with pytest.raises(FileAccessError, match="not a regular file") as caught:
            save_to(Path(folder, "link") if linked else path)
        assert caught.value.filename == os.path.realpath(path)
        assert isinstance(caught.value.errno, int)
        after = path.stat()
        assert (after.st_ino, after.st_mode, after.st_rdev) == (before.st_ino, before.st_mode, before.st_rdev)
        assert len(os.listdir(folder)) == 1 + linked


# What fails


class TroubleError(Exception):
    pass


@pytest.mark.parametrize("exception", [TroubleError, KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError])
def test_an_exception_in_the_block_leaves_the_previous_file_alone_and_is_passed_on(
    target: Path, exception: type[BaseException]
) -> None:
    raised = exception("stop")
    with pytest.raises(exception) as caught, replacing(target) as file:  # noqa: PT012 - the block is what is tested
        file.write(b"half")
        raise raised
    assert caught.value is raised
    assert file.closed
    assert_untouched(target)


def test_an_exception_in_the_block_leaves_nothing_where_there_was_nothing(tmp_path: Path) -> None:
    with pytest.raises(TroubleError), replacing(tmp_path / "new"):
        raise TroubleError
    assert os.listdir(tmp_path) == []


@posix
@pytest.mark.parametrize("call", ["open", "flock"])
def test_an_interrupt_when_the_temporary_file_is_just_made_leaves_none(
    target: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """Python raises KeyboardInterrupt when a call of the system has returned, so with the file already there."""
    module: Any = os if call == "open" else fcntl
    real = getattr(module, call)

    def interrupted(*arguments: Any) -> None:
        real(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, call, interrupted)
    with pytest.raises(KeyboardInterrupt), replacing(target):
        raise AssertionError
    monkeypatch.undo()
    assert_untouched(target)


@pytest.mark.skipif(sys.platform != "linux", reason="counts open files in /proc")
def test_an_interrupt_while_the_temporary_file_is_locked_leaves_no_file_open(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    before = os.listdir("/proc/self/fd")
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", interrupted)
        with pytest.raises(KeyboardInterrupt):
            save_to(target)
    assert len(os.listdir("/proc/self/fd")) == len(before)
    assert_untouched(target)


def test_an_error_of_the_system_in_the_block_says_that_the_previous_file_is_untouched(target: Path) -> None:
    with pytest.raises(FileAccessError, match="the previous file is untouched: gone") as caught, replacing(target):
        raise OSError(errno.EIO, "gone")
    assert (caught.value.errno, caught.value.filename) == (errno.EIO, str(target))
    assert isinstance(caught.value.__cause__, OSError)
    assert_untouched(target)


def test_where_there_was_no_file_none_is_spoken_of(tmp_path: Path) -> None:
    with (
        pytest.raises(FileAccessError, match=r"cannot write the checkpoint: gone") as caught,
        replacing(tmp_path / "new"),
    ):
        raise OSError(errno.EIO, "gone")
    assert "previous file" not in str(caught.value)
    with pytest.raises(FileAccessError, match="cannot create the picture, for there is no folder ") as caught:
        replacing(tmp_path / "none" / "new", what="picture").__enter__()
    assert "previous file" not in str(caught.value)


def test_an_error_of_reading_another_checkpoint_in_the_block_keeps_the_name_of_that_file(target: Path) -> None:
    error = FileAccessError(errno.EIO, "cannot read the checkpoint", "the source")
    with pytest.raises(FileAccessError) as caught, replacing(target):
        raise error
    assert caught.value is error
    assert_untouched(target)


def test_an_error_is_not_its_own_cause(target: Path) -> None:
    """Whoever prints a traceback would follow it for ever."""
    error = FileAccessError(errno.EIO, "cannot read the checkpoint", "the source")
    with pytest.raises(FileAccessError) as caught, replacing(target):
        raise error
    assert_finite(caught.value)
    with pytest.raises(FileAccessError, match="but a folder; max_shard_size saves into one") as caught:
        save_to(target.parent)
    assert_finite(caught.value)


def _no_space(*args: object, **kwargs: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("call", ["fsync", "replace", "fchmod"])
def test_a_call_that_fails_leaves_the_previous_file_alone(
    target: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, call, _no_space)
        with pytest.raises(FileAccessError, match="No space left on device") as caught:
            save_to(target)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(target))
    assert not isinstance(caught.value, CommitUncertainError)
    assert_untouched(target)


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit on the size of files")
def test_a_write_that_fails_leaves_the_previous_file_alone(target: Path) -> None:
    import resource  # noqa: PLC0415 - not there on Windows

    checkpoint = checkpoint_of({"large": torch.zeros(100_000)})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        with pytest.raises(FileAccessError, match=r"cannot write .* the previous file is untouched") as caught:
            storage.write(checkpoint, target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(target))
    assert_untouched(target)


def test_a_temporary_file_that_cannot_be_removed_does_not_hide_the_error(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(errno.EPERM, "not allowed")

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", refuse)
        with pytest.raises(TroubleError), replacing(target):
            raise TroubleError
    assert target.read_bytes() == b"previous"


def test_a_missing_folder_is_refused_with_errno_and_filename(tmp_path: Path) -> None:
    path = tmp_path / "nowhere" / "model"
    with pytest.raises(FileAccessError, match="cannot create the checkpoint") as caught:
        save_to(path)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOENT, str(path))
    assert os.listdir(tmp_path) == []


@posix
def test_a_file_in_place_of_a_folder_is_refused_with_errno_and_filename(target: Path) -> None:
    with pytest.raises(FileAccessError) as caught:
        save_to(target / "model")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOTDIR, str(target / "model"))
    assert_untouched(target)


@pytest.mark.skipif(not not_root(), reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_is_refused_with_errno_and_filename(target: Path) -> None:
    target.parent.chmod(0o555)
    try:
        with pytest.raises(FileAccessError) as caught:
            save_to(target)
        assert (caught.value.errno, caught.value.filename) == (errno.EACCES, str(target))
        assert_untouched(target)
    finally:
        target.parent.chmod(0o755)


def test_a_temporary_file_that_may_not_be_made_is_refused_with_errno_and_filename(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        with pytest.raises(FileAccessError, match=r"cannot create .* Permission denied") as caught:
            save_to(target)
    assert (caught.value.errno, caught.value.filename) == (errno.EACCES, str(target))
    assert_untouched(target)


@pytest.mark.parametrize("path", ["a\0b", "\ud800"])
def test_text_that_is_no_path_is_refused(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileAccessError) as caught:
        save_to(Path(path))
    assert (caught.value.errno, caught.value.filename) == (errno.EINVAL, path)
    assert os.listdir(tmp_path) == []


# What is durable, and in which order


class Calls:
    """Records the calls that make a file durable, with what the disk has been told by then."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, target: Path) -> None:
        self.made: list[str] = []
        self.target = target
        self.content_at_sync = b""
        self.fail_folder_sync = False
        self._fsync, self._replace = os.fsync, os.replace
        monkeypatch.setattr(os, "fsync", self.fsync)
        monkeypatch.setattr(os, "replace", self.replace)

    def fsync(self, descriptor: int) -> None:
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            assert os.path.samestat(status, self.target.parent.stat())
            self.made.append("folder")
            if self.fail_folder_sync:
                raise OSError(errno.EIO, "Input/output error")
        else:
            self.made.append("file")
            self.content_at_sync = os.pread(descriptor, status.st_size, 0)
        self._fsync(descriptor)

    def replace(self, source: str, destination: str) -> None:
        assert os.path.dirname(source) == os.path.dirname(destination)
        self.made.append("rename")
        self._replace(source, destination)


@posix
@pytest.mark.parametrize("existing", [False, True])
def test_the_file_is_on_the_disk_before_it_gets_its_name_and_the_name_before_the_save_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: bool
) -> None:
    path = tmp_path / "model"
    if existing:
        path.write_bytes(b"previous")
    calls = Calls(monkeypatch, path)
    storage.write(checkpoint_of({"a": torch.arange(5)}), path)
    assert calls.made == ["file", "rename", "folder"]
    assert calls.content_at_sync == path.read_bytes()


@posix
def test_a_save_through_a_link_makes_the_folder_of_the_file_durable(
    target: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = tmp_path_factory.mktemp("links") / "link"
    link.symlink_to(target)
    calls = Calls(monkeypatch, target)
    save_to(link)
    assert calls.made == ["file", "rename", "folder"]


@posix
def test_a_folder_that_cannot_be_made_durable_is_said_while_the_new_file_is_in_place(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = Calls(monkeypatch, target)
    calls.fail_folder_sync = True
    with pytest.raises(CommitUncertainError, match="saved, but perhaps not durably: Input/output error") as caught:
        save_to(target)
    assert (caught.value.errno, caught.value.filename) == (errno.EIO, str(target))
    assert calls.made == ["file", "rename", "folder"]
    assert target.read_bytes() == b"new"
    assert os.listdir(target.parent) == [target.name]


@posix
def test_no_descriptor_stays_open(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[int] = []
    open_ = os.open

    def recording(*args: object, **kwargs: object) -> int:
        opened.append(open_(*args, **kwargs))  # type: ignore[arg-type]
        return opened[-1]

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", recording)
        save_to(target)
        with pytest.raises(TroubleError), replacing(target):
            raise TroubleError
        calls = Calls(patch, target)
        calls.fail_folder_sync = True
        with pytest.raises(CommitUncertainError):
            save_to(target)
    assert len(opened) == 5
    for descriptor in opened:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)


# What killed saves have left


def leftover(target: Path, age: float = 2 * ABANDONED_SECONDS, suffix: str = "0" * 16) -> Path:
    """The temporary file of a save to this file that was killed some seconds ago."""
    path = target.parent / f".{target.name}{TEMPORARY_MARK}{suffix}"
    path.write_bytes(b"half of it")
    os.utime(path, (time.time() - age, time.time() - age))
    return path


@posix
@pytest.mark.parametrize("linked", [False, True])
def test_a_save_removes_what_a_killed_save_to_the_same_file_has_left(
    target: Path, tmp_path: Path, linked: bool
) -> None:
    leftover(target)
    link = tmp_path / "link"
    if linked:
        link.symlink_to(target)
    save_to(link if linked else target)
    assert target.read_bytes() == b"new"
    assert sorted(os.listdir(target.parent)) == sorted([target.name, *(["link"] if linked else [])])


@posix
def test_it_goes_before_the_save_writes_for_it_may_be_what_fills_the_disk(target: Path) -> None:
    left = leftover(target)
    with replacing(target):
        assert not left.exists()


@posix
@pytest.mark.parametrize("name", ["n" * 255, "é" * 127])
def test_that_of_a_file_with_a_long_name_is_known_as_well(tmp_path: Path, name: str) -> None:
    with replacing(tmp_path / name):
        (temporary,) = os.listdir(tmp_path)
    (tmp_path / temporary).write_bytes(b"half of it")
    os.utime(tmp_path / temporary, (0, 0))
    save_to(tmp_path / name)
    assert os.listdir(tmp_path) == [name]


@posix
def test_temporary_files_that_may_be_in_use_or_are_of_other_files_stay(target: Path) -> None:
    kept = [
        leftover(target, age=60),
        leftover(target.with_name("other")),
        leftover(target.with_name(target.name + "x")),
        leftover(target, suffix="0" * 15),
        leftover(target, suffix="f" * 16),
    ]
    with kept[-1].open("rb") as writing:
        fcntl.flock(writing, fcntl.LOCK_EX)
        save_to(target)
    assert sorted(os.listdir(target.parent)) == sorted(path.name for path in [target, *kept])


@posix
def test_what_cannot_be_looked_for_or_removed_fails_no_save(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = leftover(target)
    for call in ("listdir", "unlink"):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, _no_space)
            save_to(target, call.encode())
        assert target.read_bytes() == call.encode()
        assert left.exists()


# What the system may do to a single call


@posix
def test_a_link_that_the_system_would_not_follow_is_not_replaced(
    target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = tmp_path / "link"
    link.symlink_to(target)
    with monkeypatch.context() as patch:
        # What os.path.realpath gives where the system refuses to say that it is a link, for once.
        patch.setattr(os.path, "realpath", os.path.abspath)
        with pytest.raises(FileAccessError, match="a symbolic link that cannot be followed") as caught:
            save_to(link)
    assert (caught.value.errno, caught.value.filename) == (errno.ELOOP, str(link))
    assert link.is_symlink()
    assert target.read_bytes() == b"previous"
    assert sorted(os.listdir(tmp_path)) == sorted(["link", target.name])


class Lazy(io.FileIO):
    """A file whose writes take nothing from some write on, without an error."""

    takes = 2

    def write(self, block: Any) -> int:
        self.takes -= 1
        return super().write(block) if self.takes >= 0 else 0


def test_a_disk_that_takes_nothing_without_an_error_is_not_asked_for_ever(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fdopen", lambda descriptor, mode, buffering: Lazy(descriptor, "w+"))
    with pytest.raises(FileAccessError, match="cannot write") as caught:
        storage.write(checkpoint_of({"a": torch.arange(5), "b": torch.arange(5), "c": torch.arange(5)}), target)
    assert caught.value.errno == errno.ENOSPC
    assert_untouched(target)
