"""Canonical JSON: one text for one value, and a strict way back.

Files are compared and digested as bytes, so the text must not depend on the order of a dict. And a file is a stranger's
text, so reading it refuses what JSON leaves open: duplicate keys, NaN, lone surrogates, integers beyond 64 bits, depth.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from itertools import accumulate
from typing import TypeAlias, TypeGuard, Union

from orthoserde.errors import ConfigError, FileFormatError

# A recursive alias must be a Union of strings on Python 3.10.
JSON: TypeAlias = Union[bool, int, float, str, list["JSON"], dict[str, "JSON"], None]  # noqa: UP007

#: Integers outside of this are not read or written: other readers could not hold them.
INT_LIMIT = 2**63

MAX_DEPTH = 64

#: Levels of a file around a configuration, so that whatever :func:`to_json` accepts can be read again.
SURROUNDING_DEPTH = 16

#: More values than the header of any file of weights holds. Python takes up to thirty bytes of memory for each byte of
#: a text of nothing but small values, and a header has up to 100 MB. Empty lists and objects count twice.
MAX_VALUES = 1 << 22

#: Before each value stands one of these, but for values of objects, whose keys are counted in their stead.
_BEFORE_VALUES = "[{,"

_DECODER = json.JSONDecoder()

#: A string in which there are no escapes.
_STRING = re.compile(r'"[^"]*"')
_NO_BRACKETS = re.compile(r"[^\[\]{}]+")

#: What each bracket does to the depth.
_STEPS = {"[": 1, "{": 1, "]": -1, "}": -1}

_SURROGATE_ESCAPE = re.compile(r"\\u[dD]")


def encode(value: JSON) -> str:
    """Write a JSON value as canonical text: sorted keys, no spaces, no escapes but those that JSON demands.

    Raises:
        ConfigError: It holds more values than are read.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    if _count_values(text) > MAX_VALUES:
        raise ConfigError(f"more than {MAX_VALUES} values in one file; keep long lists of numbers in tensors")
    return text


def encode_in_order(value: JSON) -> str:
    """Write a JSON value as :func:`encode` does, but with the keys of objects in their own order."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def decode(text: str | bytes, where: str) -> JSON:
    """Read strict JSON.

    Args:
        text: The text; bytes are UTF-8.
        where: What is being read, for messages.

    Raises:
        FileFormatError: Not JSON, or not of the strict sort described above.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        if _count_values(text) > MAX_VALUES:
            raise ValueError(f"it holds more than {MAX_VALUES} values")
        _check_depth(text)
        value: JSON = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_constant=_no_constant,
            parse_int=_bounded_int,
            parse_float=_finite_float,
        )
        # Text that was UTF-8 holds lone surrogates only by way of escapes; only then is every string looked at.
        return to_json(value, -SURROUNDING_DEPTH) if _SURROGATE_ESCAPE.search(text) else value
    except (ValueError, ConfigError, RecursionError) as error:
        reason = str(error) or type(error).__name__
        raise FileFormatError(f"{where}: not valid JSON: {reason}") from error


def _count_values(text: str) -> int:
    """How many items and pairs a JSON text holds; more, where there are few: signs within strings are counted too."""
    count = sum(map(text.count, _BEFORE_VALUES))
    if count <= MAX_VALUES:
        return count
    count = position = 0
    find, string_at, counted = text.find, _DECODER.raw_decode, text.count
    while count <= MAX_VALUES:
        start = find('"', position)
        stop = start if start >= 0 else len(text)
        count += counted(",", position, stop) + counted("[", position, stop) + counted("{", position, stop)
        if start < 0:
            break
        position = string_at(text, start)[1]
    return count


def _check_depth(text: str) -> None:
    """Refuse depth before Python's parser recurses into it: where its limit was raised, it ends the process instead."""
    # Escaped quotes end no string. What is no JSON may be miscounted, but only behind what the parser stops at.
    text = text.replace("\\\\", "").replace('\\"', "") if "\\" in text else text
    if text.count('"') > 4 * MAX_VALUES:  # two around each string, of which a pair may have two
        raise ValueError(f"it holds more than {2 * MAX_VALUES} strings")
    brackets = _NO_BRACKETS.sub("", _STRING.sub("", text))[: 2 * MAX_VALUES]
    if max(accumulate(map(_STEPS.__getitem__, brackets)), default=0) > MAX_DEPTH + SURROUNDING_DEPTH:
        raise ValueError(f"nested deeper than {MAX_DEPTH + SURROUNDING_DEPTH} levels")


def to_json(value: object, depth: int = 0) -> JSON:
    """Copy a value made of JSON types; tuples become lists.

    Raises:
        ConfigError: Something in it is not JSON, or cannot be written to a file and read back unchanged.
    """
    if depth > MAX_DEPTH:
        raise ConfigError(f"nested deeper than {MAX_DEPTH} levels")
    if value is None or isinstance(value, bool):
        return value
    # Exact types: a subclass (an IntEnum, a torch.Size) would come back as something else than it was.
    if type(value) is int:
        if not -INT_LIMIT <= value < INT_LIMIT:
            raise ConfigError("an integer needs more than 64 bits")
        return value
    if type(value) is float:
        if not math.isfinite(value):
            raise ConfigError(f"{value} is not a JSON number")
        return value
    if type(value) is str:
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ConfigError("a string is not valid Unicode (lone surrogate)") from error
        return value
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return [to_json(item, depth + 1) for item in value]
    if isinstance(value, Mapping) and all(type(key) is str for key in value):
        return {str(to_json(key)): to_json(item, depth + 1) for key, item in value.items()}
    raise ConfigError(f"a value of type {type(value).__name__!r} is not JSON")


def same(left: JSON, right: JSON) -> bool:
    """Whether two JSON values are equal; 2 and 2.0 are, 1 and true are not."""
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(same, left, right))
    return isinstance(left, bool) == isinstance(right, bool) and left == right


def differences(left: JSON, right: JSON, where: str = "") -> Iterator[tuple[str, JSON, JSON]]:
    """Yield the places at which two values differ, with what each has there; None stands for nothing, too.

    Lists of numbers and strings, and lists of different lengths, differ as a whole.
    """
    if isinstance(left, dict) and isinstance(right, dict):
        for key in sorted(left.keys() | right.keys()):
            inner = f"{where}.{key}" if where else key
            if key not in left or key not in right:
                yield inner, left.get(key), right.get(key)
            else:
                yield from differences(left[key], right[key], inner)
    elif _is_nested(left) and _is_nested(right) and len(left) == len(right):
        for i, (one, other) in enumerate(zip(left, right, strict=True)):
            yield from differences(one, other, f"{where}[{i}]")
    elif not same(left, right):
        yield where, left, right


def _is_nested(value: JSON) -> TypeGuard[list[JSON]]:
    return isinstance(value, list) and any(isinstance(item, (dict, list)) for item in value)


def _unique(pairs: list[tuple[str, JSON]]) -> JSON:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return found


def _no_constant(name: str) -> JSON:
    raise ValueError(f"{name} is not JSON")


def _bounded_int(digits: str) -> int:
    if len(digits) > 20:
        raise ValueError("an integer needs more than 64 bits")
    if digits == "-0":
        raise ValueError("-0 is not an integer")  # to other readers it is a float
    number = int(digits)
    if not -INT_LIMIT <= number < INT_LIMIT:
        raise ValueError("an integer needs more than 64 bits")
    return number


def _finite_float(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError("a number is too large")
    return number
