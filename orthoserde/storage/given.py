"""A path to write to has to be given."""

from __future__ import annotations

import errno

from orthoserde.errors import FileAccessError


def check_given(path: str) -> None:
    """Refuse an empty path: to Python it is the folder where the process is, and to a load it is nothing.

    Raises:
        FileAccessError: It is empty.
    """
    if not path:
        raise FileAccessError(errno.ENOENT, "expected a path, got an empty one", "")
