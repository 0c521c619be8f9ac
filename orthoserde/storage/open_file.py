"""An open file that is read at positions, by several threads at the same time."""

from __future__ import annotations

import errno
import io
import os
import stat
import threading
from dataclasses import dataclass, field
from typing import Protocol

from orthoserde.errors import CheckpointNotFoundError, FileAccessError, FileFormatError


class Readable(Protocol):
    """What is read at positions, by several threads at the same time."""

    def read_into(self, memory: memoryview, position: int) -> None:
        """Fill writable memory with the bytes from a position on."""

    def close(self) -> None:
        """Release the file. Closing twice is harmless."""


@dataclass(frozen=True, slots=True)
class OpenFile:
    """A regular file, open for reading.

    Attributes:
        raw: The file as Python has it. Its own position means nothing once the file is read at positions.
        name: What it is called in messages.
    """

    raw: io.FileIO
    name: str
    _seeking: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def status(self) -> os.stat_result:
        """What the system knows of it, as it is now; raises FileAccessError."""
        try:
            return os.fstat(self.raw.fileno())
        except OSError as error:
            raise _refused(error, "read", self.name) from error

    def size(self) -> int:
        """Its size in bytes, as it is now; raises FileAccessError."""
        return self.status().st_size

    def read(self, count: int, position: int) -> bytes:
        """Return this many bytes from a position on; raises as ``read_into`` does."""
        buffer = bytearray(count)
        self.read_into(memoryview(buffer), position)
        return bytes(buffer)

    def read_into(self, memory: memoryview, position: int) -> None:
        """Fill writable memory with the bytes from a position on.

        Raises:
            FileAccessError: The system refuses to read.
            FileFormatError: The file ends before the memory is full.
        """
        done = 0
        while done < len(memory):
            try:
                count = self._read_some(memory[done:], position + done)
            except OSError as error:
                raise _refused(error, "read", self.name) from error
            if not count:
                raise FileFormatError(f"{self.name}: the file ends too early; it changed while it was read")
            done += count

    def _read_some(self, memory: memoryview, position: int) -> int:
        """One read of the system; how many bytes it gave."""
        if hasattr(os, "preadv"):
            return os.preadv(self.raw.fileno(), [memory], position)
        # Windows has no such call, so threads read one after the other.
        with self._seeking:
            self.raw.seek(position)
            return self.raw.readinto(memory) or 0

    def close(self) -> None:
        """Release the file. Closing twice is harmless. Raises FileAccessError."""
        try:
            self.raw.close()
        except OSError as error:
            raise _refused(error, "close", self.name) from error


def _refused(error: OSError, what: str, name: str) -> FileAccessError:
    return FileAccessError(error.errno, f"cannot {what} the checkpoint: {error.strerror}", name)


def open_file(name: str) -> OpenFile:
    """Open a regular file.

    Raises:
        CheckpointNotFoundError: There is no such file.
        FileAccessError: The system refuses to open it.
        FileFormatError: It is not a regular file.
    """
    # O_NONBLOCK: opening a FIFO must not wait for a writer; it means nothing for the regular files that pass the check.
    flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(name, flags)
    except FileNotFoundError as error:
        raise CheckpointNotFoundError(error.errno, "no such checkpoint", name) from error
    except OSError as error:
        raise _refused(error, "open", name) from error
    except ValueError as error:
        raise FileAccessError(errno.EINVAL, str(error), name) from error
    try:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            folder = ", but a folder" if stat.S_ISDIR(mode) else ""
            raise FileFormatError(f"{name}: not a regular file{folder}")
        return OpenFile(io.FileIO(descriptor, "rb"), name)
    except BaseException as error:
        os.close(descriptor)
        if isinstance(error, OSError):
            raise _refused(error, "open", name) from error
        raise


#: What tells whether a file is still the one that was opened.
Identity = tuple[int, int, int, int]


def identity_of(file: OpenFile) -> Identity:
    """Which file an open file is, and which state of it; raises FileAccessError."""
    status = file.status()
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


@dataclass(frozen=True, slots=True)
class ReopenedFile:
    """A file that is opened for each read, so that hundreds of them take no descriptors.

    Attributes:
        path: Its absolute path.
        identity: Which file it has to be.
    """

    path: str
    identity: Identity

    def read_into(self, memory: memoryview, position: int) -> None:
        """Fill writable memory with the bytes from a position on.

        Raises:
            CheckpointNotFoundError: The file has gone.
            FileAccessError: The system refuses to open or read it.
            FileFormatError: It is another file by now, or ends before the memory is full.
        """
        file = open_file(self.path)
        try:
            if identity_of(file) != self.identity:
                raise FileFormatError(f"{self.path}: the file changed while it was read")
            file.read_into(memory, position)
        finally:
            file.close()

    def close(self) -> None:
        """Release nothing."""
