"""Paths to checkpoints: whether a file, an index or a folder stands there."""

from __future__ import annotations

import os

from orthoserde.arguments import path_of
from orthoserde.checkpoint import Checkpoint
from orthoserde.errors import ConfigError
from orthoserde.storage.reader import read_file
from orthoserde.storage.shards import files_of_index, found_in, is_index_name, read_folder, read_index


def read(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a checkpoint of ours, of another safetensors writer, or of ``torch.save``.

    Args:
        path: A file, the index of shards, or a folder that holds either under a name that Hugging Face's libraries use.

    Returns:
        A checkpoint that owns what files it has open; close it, or use it as a context manager.

    Raises:
        TypeError: It is no path.
        CheckpointNotFoundError: There is nothing at that path.
        FileAccessError: The system refuses to open or read something.
        FileFormatError: It is none of these, or it is damaged.
    """
    name = path_of(path)
    if os.path.isdir(name):
        return read_folder(name)
    return read_index(name) if is_index_name(name) else read_file(name)


def check_name(path: str, otherwise: str = "") -> None:
    """Refuse a path to write one file to that would not be read as that file.

    Args:
        path: The path.
        otherwise: What the caller can do to write a folder; nothing by default.

    Raises:
        ConfigError: It ends as the name of a folder does, which end the system would drop, or as that of an index.
    """
    if os.path.basename(path) in ("", os.curdir, os.pardir):
        raise ConfigError(
            f"{path}: ends as the name of a folder does, and one file is written; give the name of a file{otherwise}"
        )
    if is_index_name(path):
        raise ConfigError(f"{path}: would be read as the index of shards; give a name that ends in .safetensors")


def files_of(path: str) -> list[str]:
    """The paths of the files that :func:`read` reads at a path: one, or an index and its shards; none of nothing.

    Raises:
        FileAccessError: The system refuses to read the index.
        FileFormatError: The index is not sound.
    """
    found = found_in(path) if os.path.isdir(path) else path
    if found is None or not os.path.isfile(found):
        return []
    return files_of_index(found) if is_index_name(found) else [found]
