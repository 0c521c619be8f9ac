"""Places where a save cannot do all that it wants: what it says, and what becomes of what stood there.

Each row arranges one such place and saves there. Rows that this machine cannot arrange say why.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import os
import resource
import shutil
import signal
import socket
import stat
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.reliability.disk import FILE, NEW, NOTHING, OLD, FileCase, temporaries
from tests.reliability.disk_broken import Build, sound
from tests.reliability.disk_children import patch, run
from tests.reliability.disk_figures import Figures
from tests.reliability.disk_mounts import CannotBeArrangedError, make_ext4, mounted, no_new_mounts_elsewhere, set_flags

#: What is saved: 20 KB, several pages.
CASE = FileCase("20 KB, overwrite", width=48)

#: Somebody who is not root.
NOBODY = 65534

RETURNED, KILLED, UNCERTAIN = "returned", "killed", "CommitUncertainError"


@dataclass
class Place:
    """Where a save goes, and under which limits.

    Attributes:
        folder: Where the previous file is, as ``model.safetensors``, in the beginning.
        path: What the save is told.
        limit: What the saving process is to do before.
    """

    folder: Path
    path: Path
    limit: Callable[[], object] = lambda: None


Arrange = Callable[[Place], contextlib.AbstractContextManager[object]]


@dataclass(frozen=True)
class Row:
    """A place.

    Attributes:
        name: What it is.
        said: What the save is to say: the name of an errno, or one of the three words above.
        arrange: Makes it so, and undoes what must be undone.
        stands: What stands at ``model.safetensors`` afterwards.
        temporaries: How many temporary files may be left: 0, unless the system forbids to remove them.
        needs_root: Whether only root can arrange it.
    """

    name: str
    said: str
    arrange: Arrange
    stands: str = OLD
    temporaries: int = 0
    needs_root: bool = False


ROWS: list[Row] = []


def row(
    name: str, said: str, *, stands: str = OLD, temporaries: int = 0, needs_root: bool = False
) -> Callable[[Callable[[Place], Iterator[None]]], Callable[[Place], Iterator[None]]]:
    """Make a row of a function that arranges it."""

    def decorate(arrange: Callable[[Place], Iterator[None]]) -> Callable[[Place], Iterator[None]]:
        ROWS.append(Row(name, said, contextlib.contextmanager(arrange), stands, temporaries, needs_root))
        return arrange

    return decorate


def _fill(folder: Path, room: int) -> None:
    """Fill a disk until nothing but this many bytes is left."""
    with open(folder / "filler", "wb", buffering=0) as filler, contextlib.suppress(OSError):
        while True:
            filler.write(bytes(4096))
    os.truncate(folder / "filler", max((folder / "filler").stat().st_size - room, 0))


def _as_nobody() -> None:
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)


# Disks


@row("the disk is full (tmpfs)", "ENOSPC", needs_root=True)
def _full(place: Place) -> Iterator[None]:
    with mounted(place.folder, "tmpfs", "size=64k"):
        _fill(place.folder, 0)
        yield


@row("the disk has room for half of the file (tmpfs)", "ENOSPC", needs_root=True)
def _half_full(place: Place) -> Iterator[None]:
    with mounted(place.folder, "tmpfs", "size=64k"):
        _fill(place.folder, 8192)
        yield


@row("the disk is full (ext4)", "ENOSPC", needs_root=True)
def _full_ext4(place: Place) -> Iterator[None]:
    image = place.folder.with_name("image")
    make_ext4(image)
    with mounted(place.folder, "ext4", "loop", source=str(image)):
        _fill(place.folder, 4096)
        yield


@row("no inode is left (tmpfs)", "ENOSPC", needs_root=True)
def _no_inodes(place: Place) -> Iterator[None]:
    with mounted(place.folder, "tmpfs", "size=1m,nr_inodes=8"):
        with contextlib.suppress(OSError):
            for number in range(100):
                (place.folder / str(number)).touch()
        yield


@row("the disk is mounted read-only (tmpfs)", "EROFS", needs_root=True)
def _read_only(place: Place) -> Iterator[None]:
    with mounted(place.folder, "tmpfs", "size=1m"):
        subprocess.run(["mount", "-o", "remount,ro", str(place.folder)], check=True)
        yield


class _OverQuota(io.FileIO):
    """A file of a user whose quota is used up, as local disks say it (at a write) or as NFS does (at close)."""

    at_close = False

    def write(self, block: Any) -> int:
        if not self.at_close:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
        return super().write(block)

    def close(self) -> None:
        was_open = not self.closed
        super().close()
        if self.at_close and was_open:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))


class _OverQuotaAtClose(_OverQuota):
    at_close = True


def _open_as(kind: type[io.FileIO]) -> None:
    patch(os, "fdopen", lambda descriptor, mode, buffering: kind(descriptor, mode.replace("b", "")))


@row("a quota of the user is used up (a stand-in for a disk that says so at a write)", "EDQUOT")
def _quota_at_write(place: Place) -> Iterator[None]:
    place.limit = lambda: _open_as(_OverQuota)
    yield


@row("a quota of the user is used up (a stand-in for NFS, which says so at close)", "EDQUOT")
def _quota_at_close(place: Place) -> Iterator[None]:
    place.limit = lambda: _open_as(_OverQuotaAtClose)
    yield


# Limits of the process


@row("RLIMIT_FSIZE, SIGXFSZ ignored (as Python does)", "EFBIG")
def _file_size(place: Place) -> Iterator[None]:
    place.limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    yield


@row("RLIMIT_FSIZE, SIGXFSZ kills", KILLED, temporaries=1)
def _file_size_kills(place: Place) -> Iterator[None]:
    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))

    place.limit = limit
    yield


@row("no more files may be open (RLIMIT_NOFILE)", "EMFILE")
def _open_files(place: Place) -> Iterator[None]:
    def limit() -> None:
        lowest = os.open(os.devnull, os.O_RDONLY)
        os.close(lowest)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, lowest))

    place.limit = limit
    yield


# Permissions


@row("the folder may not be written", "EACCES")
def _read_only_folder(place: Place) -> Iterator[None]:
    place.folder.chmod(0o555)
    place.limit = _as_nobody
    yield


@row("the folder may not be searched", "EACCES")
def _closed_folder(place: Place) -> Iterator[None]:
    place.folder.chmod(0o666)
    place.limit = _as_nobody
    yield


@row("the folder may be written but not read, so not be made durable", UNCERTAIN, stands=NEW)
def _unreadable_folder(place: Place) -> Iterator[None]:
    place.folder.chmod(0o333)
    (place.folder / FILE).chmod(0o644)
    place.limit = _as_nobody
    yield


@row("the file is another user's, in a sticky folder", "EPERM", needs_root=True)
def _sticky(place: Place) -> Iterator[None]:
    place.folder.chmod(0o1777)
    place.limit = _as_nobody
    yield


@row("the file is immutable (chattr +i)", "EPERM", needs_root=True)
def _immutable(place: Place) -> Iterator[None]:
    with set_flags(place.folder / FILE, "i"):
        yield


@row("the folder is immutable (chattr +i)", "EPERM", needs_root=True)
def _immutable_folder(place: Place) -> Iterator[None]:
    with set_flags(place.folder, "i"):
        yield


@row("the folder only takes more (chattr +a)", "EPERM", needs_root=True, temporaries=1)
def _append_only_folder(place: Place) -> Iterator[None]:
    with set_flags(place.folder, "a"):
        yield


# Paths


@row("the name is too long", "ENAMETOOLONG")
def _long_name(place: Place) -> Iterator[None]:
    place.path = place.folder / ("n" * 256)
    yield


@row("there is no such folder", "ENOENT")
def _no_folder(place: Place) -> Iterator[None]:
    place.path = place.folder / "nowhere" / FILE
    yield


@row("a file stands in place of the folder", "ENOTDIR")
def _file_as_folder(place: Place) -> Iterator[None]:
    place.path = place.folder / FILE / FILE
    yield


@row("the link points to nothing: followed", RETURNED, stands=NEW)
def _dangling(place: Place) -> Iterator[None]:
    place.path = place.folder / "link"
    (place.folder / FILE).unlink()
    place.path.symlink_to(FILE)
    yield
    assert place.path.is_symlink()


@row("the links go round in a circle", "ELOOP")
def _circle(place: Place) -> Iterator[None]:
    place.path = place.folder / "one"
    place.path.symlink_to("other")
    (place.folder / "other").symlink_to("one")
    yield
    assert place.path.is_symlink()


@contextlib.contextmanager
def _special(place: Place, make: Callable[[str], object]) -> Iterator[None]:
    """Save onto something that is no file; it must be the same thing afterwards."""
    place.path = place.folder / "special"
    make(str(place.path))
    before = place.path.lstat()
    yield
    after = place.path.lstat()
    assert (after.st_ino, after.st_mode, after.st_rdev) == (before.st_ino, before.st_mode, before.st_rdev)


@row("a FIFO stands there", "EINVAL")
def _fifo(place: Place) -> Iterator[None]:
    with _special(place, os.mkfifo):
        yield


@row("a folder stands there", "EINVAL")
def _folder(place: Place) -> Iterator[None]:
    with _special(place, os.mkdir):
        yield


@row("a socket stands there", "EINVAL")
def _socket(place: Place) -> Iterator[None]:
    with socket.socket(socket.AF_UNIX) as made, _special(place, made.bind):
        yield


@row("a device stands there", "EINVAL", needs_root=True)
def _device(place: Place) -> Iterator[None]:
    with _special(place, lambda path: os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 3))):
        yield


# The table

#: What a row came to: what the save said, and what stood there afterwards.
Line = dict[str, str]


def table(root: Path, figures: Figures, build: Build = sound) -> list[Line]:
    """Try all rows; return a line for each."""
    assert CASE.content  # made here once, and not in each child
    root.chmod(0o755)  # for those who are not root
    lines = []
    for number, each in enumerate(ROWS):
        folder = root / str(number)
        folder.mkdir()
        line: Line = {"place": each.name}
        lines.append(line)
        if each.needs_root and os.geteuid() != 0:
            line["not here"] = "only root can arrange it"
        else:
            # In a child, for what is mounted is to be gone with it, whatever happens.
            report = run(functools.partial(_try, each, folder, build)).report
            assert report is not None, each.name
            if report.error == CannotBeArrangedError.__name__:
                line["not here"] = report.message
            elif report.error:
                raise AssertionError(f"{each.name}: {report.error}: {report.message}")
            else:
                line |= report.value
        if "not here" in line:
            figures.notes.append(f"{each.name}: {line['not here']}")
        else:
            figures.point(line["said"], *violations_of(each, line))
        shutil.rmtree(folder)
    return lines


def violations_of(row: Row, line: Line) -> list[str]:
    """What is wrong with a line of the table."""
    violations = []
    if line["said"] != row.said:
        violations.append(f"{row.name}: it said {line['said']}, not {row.said}")
    if line["stands"] != row.stands:
        violations.append(f"{row.name}: there is {line['stands']}, not {row.stands}")
    if int(line["temporary files"]) > row.temporaries:
        violations.append(f"{row.name}: {line['temporary files']} temporary files are left")
    return violations


def _try(row: Row, root: Path, build: Build) -> Line:
    no_new_mounts_elsewhere()
    case = CASE
    folder = root / "folder"
    folder.mkdir()
    place = Place(folder, folder / FILE)
    (folder / FILE).write_bytes(case.content[OLD])
    with row.arrange(place):

        def work() -> None:
            build()
            place.limit()
            case.save_to(place.path)

        ended = run(work)
        if ended.report is None:
            said = KILLED if ended.killed else "it ended by itself"
        elif ended.report.error == "FileAccessError":
            said = errno.errorcode.get(ended.report.errno or 0, "FileAccessError without errno")
        else:
            said = ended.report.error or RETURNED
        return {"said": said, "stands": _stands(case, folder), "temporary files": str(len(temporaries(folder)))}


def _stands(case: FileCase, folder: Path) -> str:
    path = folder / FILE
    if not path.exists():
        return NOTHING
    content = path.read_bytes()
    return next((which for which, each in case.content.items() if each == content), f"{len(content)} other bytes")
