"""The names of the files of a checkpoint in a folder."""

from __future__ import annotations

import re

from orthoserde.errors import FileFormatError
from orthoserde.json_values import JSON

#: The names under which checkpoints are written.
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

#: How the name of an index ends, by how the names of its shards end.
INDEX_ENDINGS = {".safetensors": ".safetensors.index.json", ".bin": ".bin.index.json"}

#: What a folder is read by, the first that it has: of transformers in its own order, then of diffusers, then pickles.
READ_IN_ORDER = (
    SINGLE,
    INDEX,
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)

#: File systems allow no more bytes in one name.
MAX_NAME_BYTES = 255

_SHARD = re.compile(r"model(?:-[0-9a-f]{8,32})?-[0-9]{5,}-of-[0-9]{5,}\.safetensors")


def shard_names(count: int, mark: str) -> list[str]:
    """The names of shards.

    Args:
        count: How many there are.
        mark: Something to tell them from those of another save; "" for the names that Hugging Face's libraries give.
    """
    stem = f"model-{mark}" if mark else "model"
    return [f"{stem}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def is_own_name(name: str) -> bool:
    """Whether a file of this name may have been written by :func:`write_shards`."""
    return name in (SINGLE, INDEX) or is_shard_name(name)


def is_shard_name(name: str) -> bool:
    """Whether this is one of the names that :func:`shard_names` gives."""
    return _SHARD.fullmatch(name) is not None


def shard_ending(index_name: str) -> str:
    """How the names of shards end, by the name of their index."""
    return next(ending for ending, whole in INDEX_ENDINGS.items() if index_name.endswith(whole))


def is_index_name(name: str) -> bool:
    """Whether this is the name of an index."""
    return name.endswith(tuple(INDEX_ENDINGS.values()))


def checked_basename(name: JSON, ending: str, where: str) -> str:
    """The name of a shard, if it is the name of a file in the folder of the index, on every system.

    Args:
        name: What stands in the index.
        ending: How it has to end.
        where: The place in the index, for messages.

    Raises:
        FileFormatError: It might lead somewhere else.
    """
    if not isinstance(name, str):
        raise FileFormatError(f"{where}: expected the name of a file, got something that is no string")
    # A colon names a drive or a second stream on Windows; isprintable() leaves out NUL and all control characters.
    if (
        not name.endswith(ending)
        or name.startswith(".")
        or any(character in name for character in "/\\:")
        or not name.isprintable()
        or len(name.encode("utf-8")) > MAX_NAME_BYTES
    ):
        raise FileFormatError(
            f"{where}: expected the name of a {ending} file in the same folder, without any path, got {name[:64]!r}"
        )
    return name
