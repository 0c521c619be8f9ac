"""Which tensors go into which shard: as huggingface_hub splits a state dict, for that is what its users expect."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping

from orthoserde.errors import ConfigError, MissingPackageError
from orthoserde.manifest import TensorRecord

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}

_MISSING = (
    "max_shard_size needs huggingface_hub 0.24 or newer, which splits the tensors: "
    'pip install "orthoserde[hub]". Nothing has been written'
)

_SIZE = re.compile(r"(?P<number>[0-9]{1,18}(?:\.[0-9]{1,9})?) ?(?P<unit>KB|MB|GB|TB)")


def byte_limit(max_shard_size: int | str) -> int:
    """The number of bytes that ``max_shard_size`` stands for; units are powers of 1000, as in Hugging Face's libraries.

    Raises:
        ConfigError: It is none, or none from 1.
    """
    limit = 0
    if isinstance(max_shard_size, str):
        match = _SIZE.fullmatch(max_shard_size.strip().upper())
        limit = 0 if match is None else int(float(match["number"]) * _UNITS[match["unit"]])
    elif type(max_shard_size) is int:  # not a bool
        limit = max_shard_size
    if limit < 1:
        raise ConfigError(
            'max_shard_size: expected a number of bytes from 1, or a string such as "5GB" with one of the units '
            f"{', '.join(_UNITS)}, got {max_shard_size!r}"
        )
    return limit


def split(tensors: Mapping[str, TensorRecord], limit: int) -> list[dict[str, TensorRecord]]:
    """Split tensors, in their order, into shards of at most ``limit`` bytes; a larger tensor is a shard by itself.

    Raises:
        MissingPackageError: huggingface_hub is not installed, or too old.
    """
    try:
        from huggingface_hub import split_state_dict_into_shards_factory  # noqa: PLC0415
    except ImportError as error:
        raise MissingPackageError(_MISSING) from error
    if "get_storage_size" not in inspect.signature(split_state_dict_into_shards_factory).parameters:
        raise MissingPackageError(_MISSING)  # 0.23 has the function under the same name, with other arguments
    plan = split_state_dict_into_shards_factory(
        dict(tensors),
        get_storage_size=lambda record: record.nbytes,
        filename_pattern="{suffix}",
        max_shard_size=limit,
    )
    return [{key: tensors[key] for key in keys} for keys in plan.filename_to_tensors.values()]
