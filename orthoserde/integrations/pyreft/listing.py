"""What a folder of pyreft's holds: its files, by the interventions that they belong to, and what it says of these."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping, Set

from orthoserde import json_values, storage
from orthoserde.checkpoint import Checkpoint, LiveTensor
from orthoserde.errors import FileAccessError, FileFormatError
from orthoserde.integrations.pyreft.classes import NOT_TRAINED
from orthoserde.integrations.pyreft.keys import PREFIX, SUFFIX, key_of_file, normalize
from orthoserde.json_values import JSON
from orthoserde.wording import shorten

#: Where the Hugging Face Trainer keeps a folder of pyreft's.
TRAINER_FOLDER = "intervenable_model"

BASE_MODEL_FILE = "pytorch_model.bin"
CONFIG_FILE = "config.json"

#: ``config.json`` is a few kilobytes for each intervention.
MAX_CONFIG_BYTES = 16 << 20

_CLASS = re.compile(r"<class '(?:[^'.]+\.)*([^'.]+)'>")


def read_state(path: str) -> Checkpoint:
    """Read a state dict of ``torch.save``.

    Raises:
        FileFormatError: It is a file of another sort, or not sound.
        FileAccessError: The system refuses to read it.
    """
    state = storage.read_file(path)
    # The tensors of a safetensors file would still be in the file, which is closed long before they are wanted.
    if not all(isinstance(source, LiveTensor) for source in state.sources.values()):
        state.close()
        raise FileFormatError(f"{path}: expected a file of torch.save, as pyreft writes it; this is a safetensors file")
    return state


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Whether there is a folder with files of interventions at a path, as :func:`folder_of` finds them.

    Raises:
        FileAccessError: The system refuses to read it.
    """
    return bool(_folders_at(os.fsdecode(path)))


def folder_of(path: str) -> str:
    """The folder with the files of interventions: this one, or the one that the Hugging Face Trainer puts into it.

    Raises:
        FileFormatError: Neither has any.
        FileAccessError: The system refuses to read it.
    """
    for folder in _folders_at(path):
        return folder
    raise FileFormatError(
        f"{path}: a folder without files of pyreft ({PREFIX}*{SUFFIX}); give a folder that pyreft wrote, or the "
        "path of a checkpoint file"
    )


def _folders_at(path: str) -> list[str]:
    folders = (path, os.path.join(path, TRAINER_FOLDER))
    return [folder for folder in folders if any(name.startswith(PREFIX) for name in _names_in(folder))]


def _names_in(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise FileAccessError(error.errno, f"cannot read the folder: {error.strerror}", folder) from error


def files_in(folder: str) -> dict[str, str]:
    """Names of the files of interventions, by normalized key.

    Raises:
        FileFormatError: A file has a name that pyreft does not give, or two have names of the same intervention.
    """
    found: dict[str, str] = {}
    for name in _names_in(folder):
        if name.startswith(PREFIX):
            key = key_of_file(name)
            if key is None:
                raise FileFormatError(
                    f"{os.path.join(folder, name)}: not a name that pyreft gives; remove or rename it"
                )
            if key in found:
                raise FileFormatError(
                    f"{folder}: {found[key]} and {name} are names of the same intervention; remove one"
                )
            found[key] = name
    return found


def types_in(folder: str, files: Mapping[str, str], without_file: Set[str]) -> dict[str, str]:
    """Names of the classes of the interventions by normalized key, as far as there is a ``config.json`` that says so.

    Args:
        folder: The folder.
        files: Names of the files of interventions by normalized key.
        without_file: Keys of the model's interventions that may be without a file.

    Raises:
        FileFormatError: It is not sound, or it names other files than there are.
    """
    path = os.path.join(folder, CONFIG_FILE)
    if not os.path.lexists(path):
        return {}
    config = json_values.decode(_read_text(path), path)
    if not isinstance(config, dict):
        raise FileFormatError(f"{path}: expected an object, got a {type(config).__name__}")
    keys, types = _strings(config, "sorted_keys", path), _strings(config, "intervention_types", path)
    if keys is None:
        return {}  # written by hand
    names = [name for key in keys if (name := normalize(key)) is not None]
    if len(names) != len(keys):
        unknown = [key[:100] for key in keys if normalize(key) is None]
        raise FileFormatError(f"{path}: sorted_keys: not names that pyreft gives: {shorten(unknown)}")
    if len(set(names)) != len(names):
        raise FileFormatError(f"{path}: sorted_keys: names an intervention twice")
    if types is not None and len(types) != len(keys):
        raise FileFormatError(f"{path}: intervention_types: expected {len(keys)} of them, got {len(types)}")
    # Before 0.0.8 the classes stood under another name.
    matches = zip(names, map(_CLASS.fullmatch, types or ()), strict=False)
    found = {name: match[1] for name, match in matches if match is not None}
    wanted = {name for name in names if found.get(name) not in NOT_TRAINED}
    missing, extra = sorted(wanted - files.keys() - without_file), sorted(files.keys() - set(names))
    if missing:
        raise FileFormatError(f"{folder}: {CONFIG_FILE} names files that are missing: {shorten(missing)}")
    if extra:
        raise FileFormatError(f"{folder}: holds files that {CONFIG_FILE} does not name: {shorten(extra)}")
    return found


def _strings(config: Mapping[str, JSON], name: str, path: str) -> list[str] | None:
    """A list of strings in a ``config.json``; None where there is none."""
    value = config.get(name)
    strings = [each for each in value if isinstance(each, str)] if isinstance(value, list) else []
    if value is not None and (not isinstance(value, list) or len(strings) != len(value)):
        raise FileFormatError(f"{path}: {name}: expected a list of strings")
    return None if value is None else strings


def _read_text(path: str) -> bytes:
    descriptor = -1
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_CONFIG_BYTES:
            raise FileFormatError(f"{path}: expected a file of at most {MAX_CONFIG_BYTES} bytes")
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            return file.read(MAX_CONFIG_BYTES)
    except OSError as error:
        raise FileAccessError(error.errno, f"cannot read it: {error.strerror}", path) from error
    finally:
        if descriptor >= 0:
            os.close(descriptor)
