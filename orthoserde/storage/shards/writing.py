"""Checkpoints to folders of shards; see Note [Commit]."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from orthoserde.arguments import target_of
from orthoserde.checkpoint import Checkpoint
from orthoserde.errors import CommitUncertainError, FileAccessError, FileFormatError
from orthoserde.manifest import TensorRecord
from orthoserde.storage.atomic import create_temporary, refused, replacing, set_mode, sync_folder
from orthoserde.storage.format import digest_in, envelope, in_storage_order, shard_header
from orthoserde.storage.open_file import open_file
from orthoserde.storage.shards.index import encode_index
from orthoserde.storage.shards.names import INDEX, SINGLE, shard_names
from orthoserde.storage.shards.splitting import byte_limit, split
from orthoserde.storage.shards.standing import Standing
from orthoserde.storage.writer import (
    NO_DIGEST,
    check_writable,
    write,
    write_all,
    write_header,
    write_tensors,
)

#: How much of the digest is in the names of shards, where the usual names are taken: the first that is free.
MARK_DIGITS = (0, 8, 16, 32)


def write_shards(checkpoint: Checkpoint, folder: str | os.PathLike[str], max_shard_size: int | str) -> int:
    """Write a checkpoint into a folder, durably and as a whole: as one file if it fits, else as shards and an index.

    The files of the previous checkpoint there are removed when the new one stands, if they are proven to be ours. Until
    then both need room on the disk.

    Args:
        checkpoint: What to write. Its tensors are read once.
        folder: The folder, which is made if there is none; its parent must exist. One process at a time may save there.
        max_shard_size: The most bytes of tensors in one shard, as a number or as a string such as ``"5GB"``.

    Returns:
        The size of its files in bytes.

    Raises:
        ConfigError: ``max_shard_size`` is something else, or the checkpoint was read from a file without configuration.
        MissingPackageError: huggingface_hub is not installed.
        FileAccessError: The system refused something, or a checkpoint of another library stands in the folder; the
            previous checkpoint is untouched, unless the message says that the new one is saved.
        CommitUncertainError: The checkpoint is in place, but perhaps not durably.
        FileFormatError: Too many tensors for one header or index.
        TornSaveError: A tensor of a live model changed meanwhile.
        UnsupportedModuleError: A tensor changed its size meanwhile.
    """
    check_writable(checkpoint)
    groups = [in_storage_order(group) for group in split(checkpoint.manifest.tensors, byte_limit(max_shard_size))]
    place = os.path.abspath(target_of(folder))
    with _made(place):
        standing = Standing.of(place)
        if len(groups) < 2:
            size, kept = write(checkpoint, os.path.join(place, SINGLE), standing.mode), [SINGLE]
        else:
            size, kept = _write(checkpoint, groups, standing)
    standing.remove_others(kept)
    return size


@contextlib.contextmanager
def _made(folder: str) -> Iterator[None]:
    """Have a folder; one that was made goes again if nothing comes of the block."""
    made = not os.path.isdir(folder)
    try:
        if made:
            os.mkdir(folder)
            sync_folder(os.path.dirname(folder))
    except OSError as error:
        text = "max_shard_size saves into a folder: cannot make the folder of the checkpoint"
        raise refused(error, text, folder, previous=False) from error
    except ValueError as error:  # a NUL in the path
        raise FileAccessError(errno.EINVAL, str(error), folder) from error
    try:
        yield
    except BaseException:
        if made:
            with contextlib.suppress(OSError):  # it may hold what was not to be removed
                os.rmdir(folder)
        raise


@dataclass(frozen=True)
class _Staged:
    """A shard under a temporary name, whose header is not known yet.

    Attributes:
        path: Where it is.
        size: Of the whole file, in bytes.
        digests: Of its tensors, by key.
    """

    path: str
    size: int
    digests: Mapping[str, str]


def _write(
    checkpoint: Checkpoint, groups: Sequence[Mapping[str, TensorRecord]], standing: Standing
) -> tuple[int, list[str]]:
    """Write shards and their index; return the bytes of all, and the names of the files."""
    index_path = os.path.join(standing.folder, INDEX)
    staged: list[str] = []
    placed: list[str] = []
    text = b""
    try:
        targets = [os.path.join(standing.folder, name) for name in shard_names(len(groups), "")]
        shards = [_stage(checkpoint, *pair, standing.mode, staged) for pair in zip(groups, targets, strict=True)]
        digests = {key: digest for shard in shards for key, digest in shard.digests.items()}
        manifest = dataclasses.replace(checkpoint.manifest, tensors=in_storage_order(checkpoint.manifest.tensors))
        sealed = envelope(manifest, digests)
        digest = digest_in(sealed)
        headers = [shard_header(group, digest) for group in groups]
        names = _free_names(headers, digest, standing)
        weight_map = {key: name for name, group in zip(names, groups, strict=True) for key in group}
        text = encode_index(manifest, sealed, weight_map)
        for shard, header in zip(shards, headers, strict=True):
            _finish(shard, header)
        checkpoint.check_unchanged()
        for name, shard in zip(names, shards, strict=True):
            target = os.path.join(standing.folder, name)
            fresh = not os.path.lexists(target)
            os.replace(shard.path, target)
            placed += [target] if fresh else []
        sync_folder(standing.folder)
        _place_index(index_path, text, standing)
    except BaseException as error:
        _discard(staged, placed, index_path, text)
        if isinstance(error, OSError) and not isinstance(error, FileAccessError):
            raise refused(error, "cannot write the checkpoint", standing.folder, previous=standing.has_any) from error
        raise
    return sum(shard.size for shard in shards) + len(text), [*names, INDEX]


def _place_index(path: str, text: bytes, standing: Standing) -> None:
    try:
        with replacing(path, standing.mode) as file:
            write_all(file, memoryview(text))
    except CommitUncertainError as error:
        if not standing.has_single:
            raise
        raise FileAccessError(
            error.errno,
            "the new checkpoint is saved, but perhaps not durably, so the older one in one file, which is read before "
            f"it, was not removed: {error.strerror}",
            standing.folder,
        ) from error


def _stage(
    checkpoint: Checkpoint, records: Mapping[str, TensorRecord], target: str, mode: int | None, staged: list[str]
) -> _Staged:
    """Write the tensors of a shard behind the room for its header, into a temporary file called after ``target``.

    The file is closed meanwhile, for there may be more shards than the system lets a process have open.
    """
    header_bytes = len(shard_header(records, NO_DIGEST))
    temporary, descriptor = create_temporary(target)
    staged.append(temporary)
    with os.fdopen(descriptor, "w+b", buffering=0) as file:
        set_mode(descriptor, mode)
        size, digests = write_tensors(file, checkpoint, records, header_bytes)
    return _Staged(temporary, size, digests)


def _finish(shard: _Staged, header: bytes) -> None:
    with open(shard.path, "r+b", buffering=0) as file:
        write_header(file, header, shard.size)
        os.fsync(file.fileno())


def _free_names(headers: Sequence[bytes], digest: str, standing: Standing) -> list[str]:
    """The names of shards with these headers: the usual ones, or else with the beginning of the digest in them.

    Raises:
        FileAccessError: All are taken.
    """
    for digits in MARK_DIGITS:
        names = shard_names(len(headers), digest[:digits])
        if all(standing.may_take(name, header) for name, header in zip(names, headers, strict=True)):
            return names
    raise FileAccessError(
        errno.EEXIST, "other files stand under all names for shards; save to another folder", standing.folder
    )


def _discard(staged: Sequence[str], placed: Sequence[str], index: str, text: bytes) -> None:
    """Remove what a failed save has written, unless its index stands after all: then it did not fail to commit."""
    for path in staged:
        with contextlib.suppress(OSError):
            os.unlink(path)
    with contextlib.suppress(FileAccessError, FileFormatError):
        if os.path.lexists(index):
            with contextlib.closing(open_file(index)) as file:
                if file.read(min(file.size(), len(text) + 1), 0) == text:
                    return
    for path in placed:
        with contextlib.suppress(OSError):
            os.unlink(path)
