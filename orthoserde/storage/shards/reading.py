"""Folders and indices to checkpoints. Only the index and the headers are read at once."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping, Set
from dataclasses import dataclass

from orthoserde.checkpoint import Checkpoint, LiveTensor, TensorSource
from orthoserde.errors import CheckpointNotFoundError, DamagedFileError, FileFormatError
from orthoserde.manifest import Manifest, TensorRecord
from orthoserde.storage.container import LENGTH_BYTES, Entry, Header, decode_header
from orthoserde.storage.format import MANIFEST_KEY, foreign_manifest, holds_envelope, is_shard, shard_mark
from orthoserde.storage.open_file import OpenFile, Readable, ReopenedFile, identity_of, open_file
from orthoserde.storage.reader import StoredTensor, read_file, read_header
from orthoserde.storage.shards.index import MAX_INDEX_BYTES, Index, decode_index, headers_of, in_file_order
from orthoserde.storage.shards.names import READ_IN_ORDER, is_index_name, shard_ending
from orthoserde.storage.torch_files import MAGIC_BYTES
from orthoserde.wording import shorten

#: Shards that are kept open; more are opened whenever something of them is read. Systems allow a few hundred files.
KEPT_OPEN = 64

#: How often a checkpoint is opened that is replaced by another one while it is opened.
ATTEMPTS = 5


def read_folder(folder: str) -> Checkpoint:
    """Open the checkpoint in a folder: by the first of ``READ_IN_ORDER`` that there is.

    Raises:
        CheckpointNotFoundError: What there is is a link to nothing.
        FileAccessError: The system refuses to open or read something.
        FileFormatError: There is none, or it is not sound.
    """
    for _ in range(ATTEMPTS - 1):
        # A save that goes on may replace one form by the other between two looks.
        with contextlib.suppress(CheckpointNotFoundError):
            return _read_found(folder)
    return _read_found(folder)


def found_in(folder: str) -> str | None:
    """The path of what a folder is read by, the first of ``READ_IN_ORDER`` that there is; None where none is."""
    paths = (os.path.join(folder, name) for name in READ_IN_ORDER)
    return next((path for path in paths if os.path.lexists(path)), None)


def files_of_index(path: str) -> list[str]:
    """The paths of an index and of the shards that it names; raises as :func:`read_index` where it is not sound."""
    shards = decode_index(read_text(path), shard_ending(path), path).keys_by_file
    return [path, *(os.path.join(os.path.dirname(path), shard) for shard in shards)]


def _read_found(folder: str) -> Checkpoint:
    path = found_in(folder)
    if path is not None:
        return read_index(path) if is_index_name(path) else read_file(path)
    others: list[str] = []
    with contextlib.suppress(OSError):  # this is for a hint alone
        others = sorted(name for name in os.listdir(folder) if name.endswith(".safetensors"))
    hint = f"; it holds {shorten(others[::-1])}: give the path of one" if others else ""
    if any(re.fullmatch(r".+-\d{8,}\.safetensors", name) for name in others):
        hint += ", such as orthoserde.Checkpoints(folder).latest()"
    raise FileFormatError(f"{folder}: a folder without a checkpoint{hint}; looked for {', '.join(READ_IN_ORDER)}")


def read_index(path: str) -> Checkpoint:
    """Open the checkpoint that an index describes: of ours, or of another library.

    The shards are looked for beside the index, and nowhere else. Links are followed, for Hugging Face's cache is made
    of them.

    Args:
        path: The index. Where it is a link, its shards are beside the link.

    Returns:
        A checkpoint that owns what files it has open; close it, or use it as a context manager.

    Raises:
        CheckpointNotFoundError: There is no such file.
        DamagedFileError: The index and its shards are not of one save, or not whole.
        FileAccessError: The system refuses to open or read something.
        FileFormatError: It is not an index, or not sound.
    """
    for _ in range(ATTEMPTS - 1):
        text = read_text(path)
        try:
            return _open_shards(path, text)
        except DamagedFileError:
            # Unless another save has replaced it meanwhile, and removed what it named.
            if read_text(path) == text:
                raise
    return _open_shards(path, read_text(path))


def read_text(path: str) -> bytes:
    """The text of an index; raises as :func:`read_index`."""
    with contextlib.closing(open_file(path)) as file:
        size = file.size()
        if size > MAX_INDEX_BYTES:
            raise FileFormatError(f"{path}: an index of {size} bytes; at most {MAX_INDEX_BYTES} are read")
        return file.read(size, 0)


def _open_shards(path: str, text: bytes) -> Checkpoint:
    ending = shard_ending(path)
    index = decode_index(text, ending, path)
    shards = {name: os.path.join(os.path.dirname(path), name) for name in index.keys_by_file}
    if ending == ".bin":
        return _join_torch_files(index, shards, path)
    kept: list[OpenFile] = []

    def close() -> None:
        for file in kept:
            file.close()

    try:
        opened = {name: _open_shard(shard, path, kept) for name, shard in shards.items()}
        manifest = _foreign(index, opened, path) if index.manifest is None else _own(index, index.manifest, opened)
    except BaseException:
        close()
        raise
    sources = {
        key: StoredTensor(shard.file, len(shard.raw), shard.header.entries[key], record.dtype, key)
        for key, record in manifest.tensors.items()
        for shard in (opened[index.weight_map[key]],)
    }
    return Checkpoint(manifest, sources, path, close)


@dataclass(frozen=True)
class _Shard:
    """One shard: its header, and what its elements are read from."""

    path: str
    raw: bytes
    header: Header
    file: Readable


def _open_shard(path: str, index: str, kept: list[OpenFile]) -> _Shard:
    """Read the header of a shard; the file stays open, among those kept, as long as they are few."""
    try:
        file = open_file(path)
    except CheckpointNotFoundError as error:
        raise DamagedFileError(f"{path}: this shard is missing, which {index} names") from error
    stays = False
    try:
        raw, header = parts_of(file)
        stays = len(kept) < KEPT_OPEN
        if stays:
            kept.append(file)
            return _Shard(path, raw, header, file)
        return _Shard(path, raw, header, ReopenedFile(os.path.abspath(path), identity_of(file)))
    finally:
        if not stays:
            file.close()


def parts_of(file: OpenFile) -> tuple[bytes, Header]:
    """The length and header of an open safetensors file, and the header parsed.

    Raises:
        FileFormatError: It is another sort of file, or not sound.
        DamagedFileError: It is longer or shorter than its header says.
        FileAccessError: The system refuses to read it.
    """
    size = file.size()
    raw = read_header(file, size, file.read(min(size, MAGIC_BYTES), 0))
    return raw, decode_header(raw[LENGTH_BYTES:], size - len(raw), file.name)


def _own(index: Index, manifest: Manifest, opened: Mapping[str, _Shard]) -> Manifest:
    """The manifest of an index of ours, whose shards are held to it byte for byte."""
    for name, header in headers_of(index, manifest).items():
        shard = opened[name]
        if shard.raw != header:
            own = is_shard(shard.header.metadata) and shard.header.metadata[MANIFEST_KEY] != shard_mark(index.digest)
            what = (
                "it is of another save than the index" if own else "its header is not the one that the index gives it"
            )
            raise DamagedFileError(f"{shard.path}: {what}; the checkpoint is damaged, use another copy")
    return in_file_order(manifest, index.weight_map)


def _foreign(index: Index, opened: Mapping[str, _Shard], where: str) -> Manifest:
    """What can be said of the tensors in shards of another library."""
    entries: dict[str, Entry] = {}
    for name, keys in index.keys_by_file.items():
        shard = opened[name]
        if MANIFEST_KEY in shard.header.metadata or holds_envelope(shard.header.metadata.values()):
            raise DamagedFileError(f"{where}: it names a file of orthoserde's, {name}, and lacks the manifest of one")
        _check_keys(shard.header.entries.keys(), keys, shard.path, where)
        entries |= shard.header.entries
    return foreign_manifest(entries, index.metadata)


def _join_torch_files(index: Index, shards: Mapping[str, str], where: str) -> Checkpoint:
    """Shards of ``torch.save``, which are read whole."""
    records: dict[str, TensorRecord] = {}
    sources: dict[str, TensorSource] = {}
    for name, keys in index.keys_by_file.items():
        try:
            shard = read_file(shards[name])
        except CheckpointNotFoundError as error:
            raise DamagedFileError(f"{shards[name]}: this shard is missing, which {where} names") from error
        with shard:
            if not all(isinstance(source, LiveTensor) for source in shard.sources.values()):
                raise FileFormatError(f"{shards[name]}: expected a file of torch.save; this is a safetensors file")
            _check_keys(shard.manifest.tensors.keys(), keys, shards[name], where)
            records |= shard.manifest.tensors
            sources |= shard.sources
    return Checkpoint(Manifest(records, has_configuration=False), sources, where)


def _check_keys(found: Set[str], expected: Set[str], shard: str, where: str) -> None:
    """Hold the keys of a shard of another library to the index."""
    if found != expected:
        odd = min(found ^ expected)
        side = "the index names a tensor that is not in it" if odd in expected else "it holds a tensor more"
        raise DamagedFileError(f"{shard}: it does not fit {where}: {side}, {odd[:64]!r}")
