"""Temporary files of saves that were killed: known by a lock that ends with the process, not by their age alone.

Note [Leftovers]
Whoever writes a temporary file holds a lock of the system on it (``flock``) for as long as it is open, and the system
lets go of it when the process ends, however it ends. So a temporary file that can be locked is one that nobody writes.
Some network file systems keep such locks to one machine, or have none. Therefore a file must also have been left alone
for an hour, and where locks are refused, nothing is removed. Windows has no ``flock``; there such files stay.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import stat
import sys
import time
from collections.abc import Callable

if sys.platform != "win32":
    import fcntl

#: Between the target's name and a random suffix in the name of a temporary file.
TEMPORARY_MARK = ".orthoserde-"

#: Seconds since the last write to a temporary file that nobody writes any more.
ABANDONED_SECONDS = 3600.0

#: The mark and the suffix must fit beside the name: file names end at 255 bytes.
_STEM_BYTES = 255 - 32

_TEMPORARY = re.compile(rf"\.(?P<stem>.*){re.escape(TEMPORARY_MARK)}[0-9a-f]{{16}}", re.DOTALL)


def try_lock(descriptor: int) -> bool:
    """Lock an open file until it is closed; False if another has it, or if the system has no such locks for it."""
    if sys.platform == "win32":
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def temporary_name(base: str) -> str:
    """A new name for the temporary file of the file with this name."""
    return f".{_stem(base)}{TEMPORARY_MARK}{secrets.token_hex(8)}"


def _stem(base: str) -> str:
    # No character may be cut in two.
    return os.fsencode(base)[:_STEM_BYTES].decode("utf-8", "ignore")


def remove_leftovers_of(path: str) -> None:
    """Remove what killed saves to this very path have left; as :func:`remove_leftovers`."""
    folder, base = os.path.split(path)
    stem = _stem(base)
    # Long names may have a stem in common; but whatever is removed is proven to be nobody's.
    remove_leftovers(folder, lambda found: found == stem)


def remove_leftovers(folder: str, is_target: Callable[[str], bool]) -> None:
    """Remove the temporary files of killed saves from a folder; see Note [Leftovers].

    It is no part of what the caller wants, so it never fails: what the system refuses to remove stays.

    Args:
        folder: The folder.
        is_target: Whether the caller owns the temporary files of the file with this name.
    """
    with contextlib.suppress(OSError):
        for name in os.listdir(folder):
            match = _TEMPORARY.fullmatch(name)
            if match is not None and is_target(match["stem"]):
                with contextlib.suppress(OSError):
                    _remove_abandoned(os.path.join(folder, name))


def _remove_abandoned(path: str) -> None:
    if not _is_old(os.lstat(path)):
        return
    descriptor = os.open(path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0))
    try:
        # Asked again: it may be another file by now.
        if try_lock(descriptor) and _is_old(os.fstat(descriptor)):
            os.unlink(path)
    finally:
        os.close(descriptor)


def _is_old(status: os.stat_result) -> bool:
    return stat.S_ISREG(status.st_mode) and time.time() - status.st_mtime > ABANDONED_SECONDS
