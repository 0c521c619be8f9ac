"""What a file says of itself: that it is a checkpoint of such a folder, of which step, with which metric.

It stands among the strings of the file's own metadata, so that it is covered by the digest of the manifest and goes
wherever the file goes. A file is a checkpoint of a folder if its name and its record say the same; a name alone proves
nothing.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, SupportsFloat, SupportsIndex, get_args

from torch import Tensor

from orthoserde import json_values
from orthoserde.errors import ConfigError, FileFormatError, FormatVersionError
from orthoserde.json_values import JSON
from orthoserde.manifest import Manifest

#: The key among the metadata of a file.
RECORD_KEY = "orthoserde.checkpoints"

#: Version of the record.
VERSION = 1

SUFFIX = ".safetensors"

#: Steps are padded with zeros to so many digits, so that names sort as steps do.
DIGITS = 8

#: The first number that is too large for a step: other readers of JSON could not hold it.
STEP_LIMIT = json_values.INT_LIMIT

Mode = Literal["min", "max"]

_PREFIX = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class Record:
    """What a file says of itself.

    Attributes:
        prefix: How the names of the folder's checkpoints begin.
        step: The step after which it was saved.
        metric: What was measured then; may be NaN or infinite.
    """

    prefix: str
    step: int
    metric: float | None

    @property
    def name(self) -> str:
        """The name that the file must have."""
        return name_of(self.prefix, self.step)


def name_of(prefix: str, step: int) -> str:
    """The name of the checkpoint of a step."""
    return f"{prefix}-{step:0{DIGITS}d}{SUFFIX}"


def step_in(name: str, prefix: str) -> int | None:
    """The step of which a file has the name, None if it has another sort of name."""
    match = re.fullmatch(re.escape(prefix) + rf"-([0-9]{{{DIGITS},19}})" + re.escape(SUFFIX), name)
    if match is None:
        return None
    step = int(match[1])
    return step if step < STEP_LIMIT and name == name_of(prefix, step) else None


def with_record(metadata: Mapping[str, str] | None, record: Record) -> dict[str, str]:
    """The user's metadata and the record.

    Raises:
        ConfigError: The metadata is no mapping, or has the key of the record.
    """
    if metadata is not None and not isinstance(metadata, Mapping):
        raise ConfigError(f"metadata: expected a mapping of strings to strings, got {type(metadata).__name__}")
    if metadata is not None and RECORD_KEY in metadata:
        raise ConfigError(f"metadata: the key {RECORD_KEY!r} is written by Checkpoints; take another")
    text: JSON = {
        "metric": None if record.metric is None else repr(record.metric),  # JSON has neither NaN nor infinity
        "prefix": record.prefix,
        "step": record.step,
        "version": VERSION,
    }
    return {**(metadata or {}), RECORD_KEY: json_values.encode(text)}


def record_in(manifest: Manifest, where: str) -> Record | None:
    """What a file says of itself, None if it does not say that it is a checkpoint of a folder.

    Raises:
        FormatVersionError: It says so in a newer version than this one.
        FileFormatError: What it says is malformed.
    """
    if not manifest.has_configuration or RECORD_KEY not in manifest.metadata:
        return None
    where = f"{where}: {RECORD_KEY}"
    value = json_values.decode(manifest.metadata[RECORD_KEY], where)
    version = value.get("version") if isinstance(value, dict) else None
    if not isinstance(value, dict) or not isinstance(version, int):
        raise FileFormatError(f"{where}: expected an object with a version")
    if version > VERSION:
        raise FormatVersionError(f"{where}: version {version}, this orthoserde reads {VERSION}", version, VERSION)
    prefix, step, metric = (value.get(key) for key in ("prefix", "step", "metric"))
    if not isinstance(prefix, str) or not isinstance(step, int) or not isinstance(metric, str | None):
        raise FileFormatError(f"{where}: expected prefix, step and metric")
    try:
        return Record(prefix, step, None if metric is None else float(metric))
    except ValueError as error:
        raise FileFormatError(f"{where}: metric: expected a number, got {metric!r:.32}") from error


def rank(record: Record, mode: Mode) -> tuple[float, int] | None:
    """What is greater for the better of two records, the later of equals; None without a metric, or with NaN."""
    if record.metric is None or math.isnan(record.metric):
        return None
    return (record.metric if mode == "max" else -record.metric, record.step)


def checked_step(step: SupportsIndex) -> int:
    """A step as a plain integer.

    Raises:
        ConfigError: It is none, or out of bounds.
    """
    try:
        number = operator.index(step)
    except TypeError as error:
        raise ConfigError(f"step: expected an integer, got a value of type {type(step).__name__!r}") from error
    if isinstance(step, bool) or not 0 <= number < STEP_LIMIT:
        raise ConfigError(f"step: expected an integer from 0 to 2**63 - 1, got {step!r}")
    return number


def checked_metric(metric: SupportsFloat | None) -> float | None:
    """A metric as a plain number.

    Raises:
        ConfigError: It is none, such as a tensor of several elements.
    """
    if metric is None:
        return None
    if isinstance(metric, bool) or not isinstance(metric, SupportsFloat):
        raise ConfigError(f"metric: expected a number, got a value of type {type(metric).__name__!r}")
    try:
        # Of a loss as it is in training, float would warn that its gradient is lost.
        return float(metric.detach() if isinstance(metric, Tensor) else metric)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ConfigError(f"metric: expected a number: {error}") from error


def checked_prefix(prefix: object) -> str:
    """A prefix, if names of files can begin with it.

    Raises:
        ConfigError: They cannot.
    """
    if not isinstance(prefix, str) or _PREFIX.fullmatch(prefix) is None:
        raise ConfigError(f"prefix: expected at most 100 of A-Z a-z 0-9 _ - . without a leading - or ., got {prefix!r}")
    return prefix


def checked_keep(keep: object) -> int | None:
    """How many checkpoints to keep.

    Raises:
        ConfigError: Not a positive integer and not None.
    """
    if keep is None:
        return None
    if type(keep) is not int or keep < 1:
        raise ConfigError(f"keep: expected how many checkpoints to keep, at least 1, or None for all; got {keep!r}")
    return keep


def checked_mode(mode: Mode) -> Mode:
    """Which metrics are better.

    Raises:
        ConfigError: Neither ``"min"`` nor ``"max"``.
    """
    if mode not in get_args(Mode):
        raise ConfigError(f"mode: expected one of {', '.join(get_args(Mode))}, got {mode!r}")
    return mode
