"""Whatever can be read, by its path: a file, a folder of shards, a folder of pyreft's."""

from __future__ import annotations

import os

from orthoserde import storage
from orthoserde.arguments import path_of
from orthoserde.checkpoint import Checkpoint


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Open what is at a path, without a model.

    Args:
        path: A file of ours, a safetensors file of another library, a state dict of ``torch.save``, a folder that
            :func:`orthoserde.storage.read` takes, or a folder that pyreft wrote.

    Returns:
        A checkpoint that owns what is open; close it, or use it as a context manager.

    Raises:
        TypeError: It is no path.
        CheckpointNotFoundError: There is nothing.
        FileAccessError: The system refuses to open or read it.
        FileFormatError: It is none of these, or it is damaged.
    """
    name = path_of(path)
    if is_pyreft(name):
        from orthoserde.integrations.pyreft import without_model  # noqa: PLC0415

        return without_model.read_folder(name)
    return storage.read(name)


def is_pyreft(path: str) -> bool:
    """Whether a path is a folder that pyreft wrote.

    Raises:
        FileAccessError: The system refuses to look into the folder.
    """
    if not os.path.isdir(path):
        return False
    # Imported when there is a folder: files are most of what is read.
    from orthoserde.integrations import pyreft  # noqa: PLC0415

    return pyreft.is_folder(path)


def rotations_of(path: str | os.PathLike[str], checkpoint: Checkpoint) -> list[str]:
    """Keys of plain tensors that are to have orthonormal columns: rotations in a folder of pyreft's."""
    if not is_pyreft(os.fsdecode(path)):
        return []
    from orthoserde.integrations.pyreft import without_model  # noqa: PLC0415

    return without_model.rotations_in(checkpoint)


def files_of(path: str | os.PathLike[str]) -> list[str]:
    """Paths of the files that a checkpoint is read from: one, an index and its shards, or a folder's of pyreft.

    Whatever else is in a folder is not the checkpoint's. Of nothing there are none.

    Raises:
        FileAccessError: The system refuses to read an index.
        FileFormatError: An index is not sound.
        OSError: The system refuses to look.
    """
    name = os.fsdecode(path)
    if is_pyreft(name):
        from orthoserde.integrations.pyreft import without_model  # noqa: PLC0415

        return without_model.files_of(name)
    return storage.files_of(name)


def stored_bytes(path: str | os.PathLike[str]) -> int:
    """Bytes of the files that a checkpoint is read from; see :func:`files_of`."""
    return sum(os.path.getsize(each) for each in files_of(path) if os.path.isfile(each))
