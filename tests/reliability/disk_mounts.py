"""File systems that a test mounts for itself, and flags of files; Linux, mostly as root."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

_CLONE_NEWNS = 0x20000
_MS_REC, _MS_PRIVATE = 0x4000, 1 << 18


class CannotBeArrangedError(Exception):
    """This machine cannot do what a test needs; the message says why."""


def no_new_mounts_elsewhere() -> None:
    """Have what this process mounts be seen by it and its children alone, and go with them; root only."""
    if os.geteuid() != 0:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS) or libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None):
        raise CannotBeArrangedError(f"no mounts of its own: {os.strerror(ctypes.get_errno())}")


def make_ext4(image: Path, *options: str, size: int = 16 << 20) -> None:
    """Make an image of an empty ext4 file system."""
    make_image(image, ["mkfs.ext4", "-q", "-F", "-m", "0", *options], size)


def make_image(image: Path, command: list[str], size: int) -> None:
    """Make an image of a file system with a command of its own."""
    if shutil.which(command[0]) is None:
        raise CannotBeArrangedError(f"{command[0]} is not installed")
    with open(image, "wb") as file:
        file.truncate(size)
    subprocess.run([*command, str(image)], check=True, capture_output=True)


@contextlib.contextmanager
def mounted(folder: Path, kind: str, options: str, source: str = "none") -> Iterator[None]:
    """Mount a file system over a folder, which keeps the files that it had, as copies."""
    kept = {path.name: path.read_bytes() for path in folder.iterdir()}
    ended = subprocess.run(
        ["mount", "-t", kind, "-o", options, source, str(folder)], capture_output=True, text=True, check=False
    )
    if ended.returncode:
        raise CannotBeArrangedError(f"mount -t {kind} -o {options}: {' '.join(ended.stderr.split())}")
    try:
        for name, content in kept.items():
            (folder / name).write_bytes(content)
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@contextlib.contextmanager
def set_flags(path: Path, flags: str) -> Iterator[None]:
    """Set flags of a file or folder as chattr does, for a while."""
    if shutil.which("chattr") is None:
        raise CannotBeArrangedError("chattr is not installed")
    ended = subprocess.run(["chattr", f"+{flags}", str(path)], capture_output=True, text=True, check=False)
    if ended.returncode:
        raise CannotBeArrangedError(ended.stderr.strip())
    try:
        yield
    finally:
        subprocess.run(["chattr", f"-{flags}", str(path)], check=True)
