"""Replace a file as a whole or not at all, durably.

The new bytes go to a temporary file beside the target, are forced to the disk, and take the target's name in one step,
whose own durability is then forced too. Until that step the previous file is untouched.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import stat
from collections.abc import Callable, Iterator

from orthoserde.arguments import target_of
from orthoserde.errors import CommitUncertainError, FileAccessError
from orthoserde.storage.leftovers import remove_leftovers_of, temporary_name, try_lock


@contextlib.contextmanager
def replacing(
    path: str | os.PathLike[str],
    mode: int | None = None,
    what: str = "checkpoint",
    check: Callable[[], None] = lambda: None,
) -> Iterator[io.FileIO]:
    """Open a temporary file that becomes ``path`` when the block ends without an exception.

    A symbolic link is followed: the file it points to is replaced. The mode is that of the replaced file, or what the
    umask leaves of 0666 unless ``mode`` is given. What killed saves to the same path have left is removed first.

    Args:
        path: The file to create or replace.
        mode: Permission bits where no file is replaced.
        what: What the file is, for messages.
        check: Called when the new bytes are on the disk, before they take the name; what it raises keeps the previous
            file.

    Raises:
        FileAccessError: The system refused something; the previous file is untouched and no temporary file is left.
        CommitUncertainError: The new file is in place, but the folder could not be forced to the disk.
    """
    name = target_of(path)
    replaced: int | None = None
    try:
        name = os.path.realpath(name)
        replaced = mode_of(name)
        mode = mode if replaced is None else replaced
        remove_leftovers_of(name)  # first, for they may be what fills the disk
        temporary, descriptor = create_temporary(name)
    except FileAccessError:
        raise
    except OSError as error:
        raise refused(error, f"cannot create the {what}", name, previous=replaced is not None) from error
    except ValueError as error:  # a NUL in the path
        raise FileAccessError(errno.EINVAL, str(error), name) from error
    try:
        with os.fdopen(descriptor, "w+b", buffering=0) as file:
            set_mode(file.fileno(), mode)
            yield file
            os.fsync(file.fileno())
        check()
        os.replace(temporary, name)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, OSError) and not isinstance(error, FileAccessError):
            raise refused(error, f"cannot write the {what}", name, previous=replaced is not None) from error
        raise
    try:
        sync_folder(os.path.dirname(name))
    except OSError as error:
        raise CommitUncertainError(error.errno, f"saved, but perhaps not durably: {error.strerror}", name) from error


def create_temporary(name: str) -> tuple[str, int]:
    """Create a temporary file beside the file that it is to become; raises OSError.

    Returns:
        Its path, and a descriptor for reading and writing.
    """
    folder, base = os.path.split(name)
    temporary = os.path.join(folder, temporary_name(base))
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    descriptor: int | None = None
    try:
        descriptor = os.open(temporary, flags, 0o666)
        try_lock(descriptor)  # without a lock nobody will take the file for a leftover either
    except FileExistsError:  # it is another's
        raise
    except BaseException:  # Ctrl-C, say, which Python delivers when the system has already made the file
        if descriptor is not None:
            with contextlib.suppress(OSError):
                os.close(descriptor)  # first, for Windows removes no open file
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    return temporary, descriptor


def refused(error: OSError, what: str, name: str, *, previous: bool) -> FileAccessError:
    """What a save says of an error of the system.

    Args:
        error: The error, which says no more than the system did.
        what: What could not be done.
        name: The file or folder.
        previous: Whether there was a file before, of which is said that it was not lost.
    """
    kept = ", the previous file is untouched" if previous else ""
    folder = os.path.dirname(name)
    if isinstance(error, FileNotFoundError) and not os.path.isdir(folder):
        kept += f", for there is no folder {folder}; make it first"
    return FileAccessError(error.errno, f"{what}{kept}: {error.strerror}", name)


def set_mode(descriptor: int, mode: int | None) -> None:
    """Give an open file these permission bits; None leaves them, and Windows has none. Raises OSError."""
    if mode is not None and hasattr(os, "fchmod"):
        os.fchmod(descriptor, mode)


def mode_of(name: str) -> int | None:
    """Permission bits of the file that is about to be replaced, None where there is none.

    Links have been followed by now. One that still stands there, because the system would not say where it leads, must
    not be replaced itself.
    """
    try:
        status = os.lstat(name)
    except FileNotFoundError:
        return None
    if stat.S_ISLNK(status.st_mode):
        raise FileAccessError(errno.ELOOP, "a symbolic link that cannot be followed, so it is not replaced", name)
    if not stat.S_ISREG(status.st_mode):
        folder = ", but a folder; max_shard_size saves into one" if stat.S_ISDIR(status.st_mode) else ""
        raise FileAccessError(errno.EINVAL, f"not a regular file{folder}, so it is not replaced by a checkpoint", name)
    return stat.S_IMODE(status.st_mode)


def sync_folder(folder: str) -> None:
    """Force the names in a folder to the disk; raises OSError."""
    if os.name == "nt":  # Windows cannot open folders; its renames are journaled.
        return
    descriptor = os.open(folder, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
