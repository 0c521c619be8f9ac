"""Arguments that would be taken for something else: what is no path, an empty one, what is neither True nor False."""

from __future__ import annotations

import errno
import os

import numpy as np

from orthoserde.errors import FileAccessError


def path_of(path: object, what: str = "path") -> str:
    """The text of a path to read.

    Args:
        path: What was given.
        what: The argument, for messages.

    Raises:
        TypeError: It is no path.
    """
    hint = "; Checkpoints.latest() and best are None where a folder has no checkpoint yet" if path is None else ""
    return _text(path, what, hint)


def target_of(path: object, what: str = "path") -> str:
    """The text of a path to write to, which is not empty: to Python that is the folder where the process is.

    Raises:
        TypeError: It is no path.
        FileAccessError: It is empty.
    """
    name = _text(path, what, "")
    if not name:
        raise FileAccessError(errno.ENOENT, "expected a path, got an empty one", "")
    return name


def _text(path: object, what: str, hint: str) -> str:
    if not isinstance(path, (str, bytes, os.PathLike)):
        raise TypeError(f"{what}: expected a str or an os.PathLike, got {type(path).__name__}{hint}")
    return os.fsdecode(path)


def check_flags(**flags: object) -> None:
    """Refuse what is neither True nor False, NumPy's included: ``rng=generator`` reads as if that were saved.

    Raises:
        TypeError: Something is not.
    """
    for name, value in flags.items():
        if not isinstance(value, (bool, np.bool_)):
            got = type(value).__name__
            hint = "; a generator of your own goes into state=" if got == "Generator" else ""
            raise TypeError(f"{name}: expected True or False, got {got}{hint}")
