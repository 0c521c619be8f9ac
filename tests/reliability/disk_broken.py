"""Deliberately broken builds: what they lack is what the suites are there to find missing.

Each is a function that a child calls before it saves; it changes that process alone.
"""

from __future__ import annotations

import contextlib
import io
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from typing import Any

from orthoserde.errors import FileAccessError
from orthoserde.storage import atomic, leftovers, writer
from tests.reliability.disk_children import patch

Build = Callable[[], None]


def sound() -> None:
    """The build as it is."""


def _is_folder(descriptor: Any) -> bool:
    return stat.S_ISDIR(os.fstat(descriptor).st_mode)


def without_fsync() -> None:
    """Files are not forced to the disk; the folder is."""
    fsync = os.fsync
    patch(os, "fsync", lambda descriptor: fsync(descriptor) if _is_folder(descriptor) else None)


def without_fsync_of_the_folder() -> None:
    """A name is not forced to the disk."""
    patch(atomic, "sync_folder", lambda folder: None)


def with_fsync_after_the_rename() -> None:
    """The file is forced to the disk when it has its name."""
    replace, without = os.replace, os.fsync
    patch(os, "fsync", lambda descriptor: without(descriptor) if _is_folder(descriptor) else None)

    def late(source: str, target: str) -> None:
        replace(source, target)
        descriptor = os.open(target, os.O_RDONLY)
        without(descriptor)
        os.close(descriptor)

    patch(os, "replace", late)


def in_place() -> None:
    """The previous file is written over."""

    @contextlib.contextmanager
    def replacing(path: Any, mode: int | None = None, check: Any = None) -> Iterator[io.FileIO]:
        try:
            with open(path, "w+b", buffering=0) as file:
                yield file
                os.fsync(file.fileno())
        except OSError as error:
            raise atomic.refused(error, "cannot write the checkpoint", str(path), previous=True) from error

    patch(writer, "replacing", replacing)


def without_unlink() -> None:
    """A save that fails leaves its temporary file."""
    patch(os, "unlink", lambda path: None)


class _Careless(io.FileIO):
    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()


def with_close_errors_ignored() -> None:
    """An error of close() is not reported."""
    patch(os, "fdopen", lambda descriptor, mode, buffering: _Careless(descriptor, mode.replace("b", "")))


def with_fsync_errors_ignored() -> None:
    """An error of fsync() is not reported."""
    fsync = os.fsync

    def careless(descriptor: Any) -> None:
        with contextlib.suppress(OSError):
            fsync(descriptor)

    patch(os, "fsync", careless)


def with_short_writes_ignored() -> None:
    """What a write did not write is not written."""
    patch(writer, "write_all", lambda file, block: file.write(block))


def with_one_exception_for_all() -> None:
    """An error after the rename is told as one before it."""
    patch(atomic, "CommitUncertainError", FileAccessError)


def with_leftovers_kept() -> None:
    """What killed saves have left stays for ever."""
    patch(leftovers, "remove_leftovers", lambda folder, is_target: None)


def with_leftovers_unproven() -> None:
    """Temporary files of others are taken for leftovers, however young they are and whoever writes them."""
    patch(leftovers, "_is_old", lambda status: True)
    patch(leftovers, "try_lock", lambda descriptor: True)


def with_one_temporary_name() -> None:
    """All saves to a path share one temporary file."""

    def create(name: str) -> tuple[str, int]:
        return name + ".tmp", os.open(name + ".tmp", os.O_RDWR | os.O_CREAT, 0o666)

    patch(secrets, "token_hex", lambda count=None: "0" * 16)
    patch(atomic, "create_temporary", create)


BUILDS: dict[str, Build] = {
    "no fsync of the file": without_fsync,
    "no fsync of the folder": without_fsync_of_the_folder,
    "fsync after the rename": with_fsync_after_the_rename,
    "no rename: written in place": in_place,
    "no unlink after an error": without_unlink,
    "errors of close() ignored": with_close_errors_ignored,
    "errors of fsync() ignored": with_fsync_errors_ignored,
    "short writes ignored": with_short_writes_ignored,
    "errors after the rename told as before it": with_one_exception_for_all,
    "leftovers kept": with_leftovers_kept,
    "leftovers taken without proof": with_leftovers_unproven,
    "one name for all temporary files": with_one_temporary_name,
}
