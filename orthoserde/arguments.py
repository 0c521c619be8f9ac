"""Arguments that would be taken for something else, or that nothing can be: paths, flags, devices."""

from __future__ import annotations

import errno
import os

import numpy as np
import torch

from orthoserde.errors import ConfigError, FileAccessError
from orthoserde.wording import one_line


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


def folder_of(path: object, what: str = "folder") -> str:
    """The absolute path of a folder, which need not be there yet.

    Raises:
        TypeError: It is no path.
        FileAccessError: It is empty, or no file can have such a name.
    """
    name = os.path.abspath(target_of(path, what))
    try:
        unusable = "embedded null byte" if b"\0" in os.fsencode(name) else ""
    except UnicodeEncodeError as error:
        unusable = str(error)
    if unusable:
        raise FileAccessError(errno.EINVAL, unusable, name)
    return name


def device_of(device: object) -> torch.device:
    """The device that is meant, which is there and has memory; the CPU where nothing was given.

    Raises:
        TypeError: It is neither a device nor the name or number of one.
        ConfigError: torch knows no such device, this machine has none, or it has no memory.
    """
    if device is None:
        return torch.device("cpu")
    if not isinstance(device, (str, int, torch.device)) or isinstance(device, bool):
        raise TypeError(f"device: expected a torch.device or a name such as 'cuda:0', got {type(device).__name__}")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, ValueError, ImportError) as error:  # which of them depends on torch's build
        raise ConfigError(f"device: {device!r} cannot be used here: {one_line(error)}") from error
    if found.type == "meta":
        raise ConfigError("device: expected a device with memory, got 'meta'")
    return found


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
