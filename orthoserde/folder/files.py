"""The files of one folder: which are its checkpoints, and the removal of those, alone, that are proven to be.

Note [Proof]
A file is removed or replaced if it is a regular file, not a link; if its name is that of a checkpoint; if its header,
whose every byte a digest covers, says that it was saved under this name, in this scheme; and if it is the file whose
header was read, by device, inode, size and times. Whatever falls short of that stays.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from orthoserde import storage
from orthoserde.errors import FileAccessError, FileFormatError
from orthoserde.folder.record import Mode, Record, name_of, rank, record_in, step_in

#: What tells whether a file is still the one that was read.
Identity = tuple[int, int, int, int, int]


@dataclass(frozen=True)
class Entry:
    """One checkpoint of the folder, proven by its own header.

    Attributes:
        path: The file.
        record: What it says of itself.
        identity: Which file it was when that was read.
    """

    path: str
    record: Record
    identity: Identity


@dataclass(frozen=True)
class Contents:
    """What a folder holds.

    Attributes:
        entries: Its checkpoints by step, in ascending order.
        unreadable: Why files that have the name of a checkpoint cannot be read, by step, in ascending order.
    """

    entries: Mapping[int, Entry]
    unreadable: Mapping[int, FileAccessError | FileFormatError]


class Files:
    """The files of one folder under one prefix. Headers are read again only where a file is another than before."""

    def __init__(self, folder: str, prefix: str) -> None:
        self.folder = folder
        self.prefix = prefix
        self._known: dict[str, tuple[Identity, Record | None]] = {}

    def path_of(self, step: int) -> str:
        """Where the checkpoint of a step stands, or would stand."""
        return os.path.join(self.folder, name_of(self.prefix, step))

    def contents(self) -> Contents:
        """Look through the folder. Of a folder that does not exist there is nothing to see.

        Raises:
            FileAccessError: The system refuses to list it.
        """
        entries: dict[int, Entry] = {}
        unreadable: dict[int, FileAccessError | FileFormatError] = {}
        known, self._known = self._known, {}
        for step in self._steps_named():
            try:
                entry = self._entry(step, known)
            except (FileAccessError, FileFormatError) as error:
                if os.path.lexists(self.path_of(step)):  # else it was removed meanwhile
                    unreadable[step] = error
                continue
            if entry is not None:
                entries[step] = entry
        return Contents(entries, unreadable)

    def _steps_named(self) -> list[int]:
        try:
            names = os.listdir(self.folder)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise FileAccessError(error.errno, f"cannot list the checkpoints: {error.strerror}", self.folder) from error
        return sorted(step for name in names if (step := step_in(name, self.prefix)) is not None)

    def _entry(self, step: int, known: Mapping[str, tuple[Identity, Record | None]]) -> Entry | None:
        """The checkpoint of a step, None if the file of that name is something else."""
        path = self.path_of(step)
        try:
            status = os.stat(path)
        except OSError as error:
            raise FileAccessError(error.errno, f"cannot look at the checkpoint: {error.strerror}", path) from error
        if not stat.S_ISREG(status.st_mode):
            return None
        identity = _identity(status)
        seen, record = known.get(path, (None, None))
        if seen != identity:
            with storage.read(path) as checkpoint:
                record = record_in(checkpoint.manifest, path)
        self._known[path] = (identity, record)
        if record is None or (record.prefix, record.step) != (self.prefix, step):
            return None
        return Entry(path, record, identity)

    def check_free(self, step: int, contents: Contents) -> None:
        """Refuse to save a step where that would replace what is not the folder's own.

        Raises:
            FileAccessError: What stands under the name is not proven to be a checkpoint of this folder.
        """
        path, entry = self.path_of(step), contents.entries.get(step)
        if os.path.lexists(path) and (entry is None or not _is_still(entry)):
            raise FileAccessError(
                errno.EEXIST,
                "this is not a checkpoint that this folder can be proven to own (it is damaged, a link or another "
                "sort of file), so it is not replaced; move it away",
                path,
            )

    def make_folder(self) -> None:
        """Make the folder, and make its name durable.

        Raises:
            FileAccessError: The system refuses, or there is a file in its place.
        """
        missing: list[str] = []
        path = os.path.abspath(self.folder)
        while not os.path.isdir(path) and os.path.dirname(path) != path:
            missing.append(path)
            path = os.path.dirname(path)
        try:
            for path in reversed(missing):
                os.makedirs(path, exist_ok=True)
                storage.sync_folder(os.path.dirname(path))
        except OSError as error:
            raise FileAccessError(error.errno, f"cannot make the folder: {error.strerror}", self.folder) from error

    def rotate(self, keep: int, mode: Mode) -> None:
        """Remove the checkpoints that are neither among the newest nor the best.

        Raises:
            FileAccessError: The system refuses to list the folder, or to remove one.
        """
        for entry in superfluous(self.contents().entries.values(), keep, mode):
            _remove(entry)

    def remove_leftovers(self) -> None:
        """Remove the temporary files that killed saves of these checkpoints left, where that is certain."""
        storage.remove_leftovers(self.folder, lambda name: step_in(name, self.prefix) is not None)


def best_of(entries: Iterable[Entry], mode: Mode) -> Entry | None:
    """The entry with the best metric, the later one of equals; None where none has a metric."""
    ranks = {ranked: entry for entry in entries if (ranked := rank(entry.record, mode)) is not None}
    return ranks[max(ranks)] if ranks else None


def superfluous(entries: Iterable[Entry], keep: int, mode: Mode) -> list[Entry]:
    """The entries that are neither among the newest ``keep`` nor the best, in ascending order of steps."""
    ascending = sorted(entries, key=lambda entry: entry.record.step)
    best = best_of(ascending, mode)
    return [entry for entry in ascending[:-keep] if entry is not best]


def _identity(status: os.stat_result) -> Identity:
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def _is_still(entry: Entry) -> bool:
    """Whether a regular file stands at the path of an entry, and it is the one whose header was read."""
    try:
        status = os.lstat(entry.path)
    except FileNotFoundError:
        return False
    return stat.S_ISREG(status.st_mode) and _identity(status) == entry.identity


def _remove(entry: Entry) -> None:
    """Remove a checkpoint; see Note [Proof]."""
    try:
        if _is_still(entry):
            os.unlink(entry.path)
    except OSError as error:
        raise FileAccessError(
            error.errno,
            f"the new checkpoint is saved, but this old one cannot be removed: {error.strerror}",
            entry.path,
        ) from error
