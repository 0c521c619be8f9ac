"""What stands in a folder that is saved into, and the removal of that, alone, which is proven to be ours.

A file is removed if it is a regular file, not a link, whose name is one that a save gives or that the index of the
previous save names, and whose own header or manifest says that it is ours. Whatever falls short of that stays.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Collection
from dataclasses import dataclass

from orthoserde.errors import FileAccessError, FileFormatError
from orthoserde.storage.atomic import mode_of, refused, sync_folder
from orthoserde.storage.container import encode_header
from orthoserde.storage.format import is_shard
from orthoserde.storage.leftovers import remove_leftovers
from orthoserde.storage.open_file import open_file
from orthoserde.storage.reader import read_file
from orthoserde.storage.shards.index import decode_index
from orthoserde.storage.shards.names import INDEX, SINGLE, is_own_name, is_shard_name
from orthoserde.storage.shards.reading import parts_of, read_text


@dataclass(frozen=True)
class Standing:
    """What a folder held before a save.

    Attributes:
        folder: The folder.
        has_single: Whether a checkpoint of ours in one file stands there.
        shards: The names of the files that the index there, which is ours, refers to.
        mode: Permission bits of what the folder is read by, None where there is nothing; the new files get them.
    """

    folder: str
    has_single: bool
    shards: frozenset[str]
    mode: int | None

    @classmethod
    def of(cls, folder: str) -> Standing:
        """Look at a folder.

        Raises:
            FileAccessError: A checkpoint that is not proven to be ours stands under a name that the save would use, or
                the system refuses to read one.
        """
        single, index = os.path.join(folder, SINGLE), os.path.join(folder, INDEX)
        has_single = os.path.lexists(single)
        if has_single and not _is_own_single(single):
            raise _not_ours(single)
        shards = _shards_of(index)
        if shards is None and os.path.lexists(index):
            raise _not_ours(index)
        read_by = single if has_single else index
        try:
            return cls(folder, has_single, shards or frozenset(), mode_of(read_by))
        except FileAccessError:
            raise
        except OSError as error:
            raise refused(error, "cannot replace the checkpoint", read_by, previous=True) from error

    @property
    def has_any(self) -> bool:
        """Whether there is a checkpoint."""
        return self.has_single or bool(self.shards)

    def may_take(self, name: str, header: bytes) -> bool:
        """Whether a shard with this header may take a name: nothing stands there, or nothing that anyone needs.

        A shard of the standing index with the same header holds the same bytes, for the header gives their digests.
        """
        path = os.path.join(self.folder, name)
        if not os.path.lexists(path):
            return True
        found = own_shard_header(path)
        return found is not None and (found == header or name not in self.shards)

    def remove_others(self, kept: Collection[str]) -> None:
        """Remove what the previous checkpoint consisted of, when a new one stands, and what interrupted saves left.

        Args:
            kept: The names of the files of the new checkpoint.

        Raises:
            FileAccessError: The system refuses to remove something; the new checkpoint stands.
        """
        single = os.path.join(self.folder, SINGLE)
        try:
            self._remove_others(kept)
        except OSError as error:
            first = SINGLE not in kept and os.path.lexists(single)
            what = "the older one in one file, which is read before it," if first else "files of the old one"
            raise FileAccessError(
                error.errno,
                f"the new checkpoint is saved, but {what} cannot be removed: {error.strerror}",
                error.filename or self.folder,
            ) from error

    def _remove_others(self, kept: Collection[str]) -> None:
        single, index = os.path.join(self.folder, SINGLE), os.path.join(self.folder, INDEX)
        if SINGLE not in kept and _is_own_single(single):
            os.unlink(single)
        if INDEX not in kept and _shards_of(index) is not None:
            os.unlink(index)
        sync_folder(self.folder)  # what refers to shards goes for good before they do
        for name in sorted({*os.listdir(self.folder), *self.shards} - set(kept)):
            path = os.path.join(self.folder, name)
            if (is_shard_name(name) or name in self.shards) and own_shard_header(path) is not None:
                os.unlink(path)
        remove_leftovers(self.folder, is_own_name)


def _not_ours(path: str) -> FileAccessError:
    return FileAccessError(
        errno.EEXIST,
        "this checkpoint cannot be proven to be orthoserde's own (it is another library's, damaged, or a link), so it "
        "is neither replaced nor removed; move it away, or save to another folder. Nothing has been written",
        path,
    )


def _is_regular(path: str) -> bool:
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise FileAccessError(error.errno, f"cannot look at what stands there: {error.strerror}", path) from error


def _is_own_single(path: str) -> bool:
    """Whether a checkpoint of ours in one file stands at a path."""
    if not _is_regular(path):
        return False
    try:
        with read_file(path) as checkpoint:
            return checkpoint.manifest.has_configuration
    except FileFormatError:
        return False


def _shards_of(index: str) -> frozenset[str] | None:
    """The names of the files in an index of ours; None where none stands."""
    if not _is_regular(index):
        return None
    try:
        found = decode_index(read_text(index), ".safetensors", index)
    except FileFormatError:
        return None
    return None if found.manifest is None else frozenset(found.weight_map.values())


def own_shard_header(path: str) -> bytes | None:
    """The length and header of a shard of ours; None where something else stands, or nothing."""
    if not _is_regular(path):
        return None
    try:
        with contextlib.closing(open_file(path)) as file:
            raw, header = parts_of(file)
    except FileFormatError:
        return None
    forms = {key: (entry.dtype, entry.shape) for key, entry in header.entries.items()}
    # Other tools may keep what they do not know of a header, but do not write it byte for byte as we do.
    return raw if is_shard(header.metadata) and encode_header(forms, header.metadata) == raw else None
