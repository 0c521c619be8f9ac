"""Nested Python state, as `state_dict` methods return it, to JSON and tensors, and back to the same types.

Note [Trees]
A tree is made of None, booleans, integers, floats, strings, tensors, and of lists, tuples and dicts of these. In JSON
the first five are themselves, but for floats that JSON lacks and integers of more than 64 bits, and a list is a list.
Everything else is an object with one key, which says what it is: ``{"float": "nan"}``, ``{"integer": "18446..."}``,
``{"tensor": key}``, ``{"tuple": [...]}``, ``{"dict": [[key, value], ...]}``, and ``"counter"`` and ``"ordered_dict"``
like ``"dict"``. So dicts keep their order and keys that are
numbers, and nothing that a file says names a class. What is anything else is an error, never a pickle. A tensor comes
back as a plain tensor without gradient, and one that stands in two places as two.
"""

from __future__ import annotations

import math
import random
import re
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import cast

import numpy as np
from torch import Tensor

from orthoserde.errors import ConfigError, FileFormatError
from orthoserde.json_values import INT_LIMIT, JSON

#: Levels of lists, tuples and dicts within each other.
MAX_LEVELS = 16

#: Digits of the largest integer: what Python converts however PYTHONINTMAXSTRDIGITS is set. NumPy's generators have 39.
MAX_DIGITS = 640
_LARGEST = 10**MAX_DIGITS - 1
_DIGITS = re.compile(rf"-?[1-9][0-9]{{18,{MAX_DIGITS - 1}}}", re.ASCII)

_MAPPINGS: Mapping[str, Callable[[list[tuple[object, object]]], object]] = {
    "dict": dict,
    "counter": lambda items: Counter(cast("dict[object, int]", dict(items))),
    "ordered_dict": OrderedDict,
}
_MAPPING_NAMES: Mapping[type, str] = {dict: "dict", Counter: "counter", OrderedDict: "ordered_dict"}
_ODD_FLOATS: Mapping[str, float] = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def encode_tree(value: object, where: str, put: Callable[[str, Tensor], str], level: int = 0) -> JSON:
    """Turn a tree into JSON; see Note [Trees].

    Args:
        value: The tree.
        where: Where it stands, for messages and for the names of its tensors.
        put: Takes the place and value of a tensor, and returns the key under which it is stored.
        level: How deep in it we are.

    Raises:
        ConfigError: Something in it is of another type, or cannot be written and read back unchanged.
    """
    if level > MAX_LEVELS:
        raise ConfigError(f"{where}: nested deeper than {MAX_LEVELS} levels")
    if value is None or isinstance(value, bool):
        return value
    if type(value) is int:
        if not -_LARGEST <= value <= _LARGEST:
            raise ConfigError(f"{where}: expected an integer of at most {MAX_DIGITS} digits, got a larger one")
        return value if -INT_LIMIT <= value < INT_LIMIT else {"integer": str(value)}
    if isinstance(value, float):  # a numpy.float64 is one
        return float(value) if math.isfinite(value) else {"float": str(float(value))}
    if type(value) is str:
        return check_text(value, where)
    if isinstance(value, Tensor):
        return {"tensor": put(where, value)}
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        items = [encode_tree(item, f"{where}.{i}", put, level + 1) for i, item in enumerate(value)]
        return items if type(value) is list else {"tuple": items}
    if isinstance(value, dict) and type(value) in _MAPPING_NAMES:
        pairs: list[JSON] = [
            [_encode_key(key, where), encode_tree(item, f"{where}.{key}", put, level + 1)]
            for key, item in value.items()
        ]
        return {_MAPPING_NAMES[type(value)]: pairs}
    cls = type(value)
    raise ConfigError(
        f"{where}: expected tensors, numbers, strings, None, and lists, tuples and dicts of them, "
        f"got a {cls.__module__}.{cls.__qualname__}{_advice(value)}"
    )


def _advice(value: object) -> str:
    """What to do about a value that is no tree."""
    if isinstance(value, np.random.Generator):
        return "; its state is .bit_generator.state, a dict"
    if isinstance(value, random.Random):
        return "; its state is .getstate(), which .setstate() takes"
    if isinstance(value, np.generic):
        return "; convert it with .item()"
    if isinstance(value, np.ndarray):
        return "; convert it with torch.from_numpy"
    return ""


def decode_tree(value: JSON, where: str, tensor: Callable[[str], Tensor]) -> object:
    """Turn JSON into the tree that it was made of.

    Args:
        value: As :func:`encode_tree` returned it; whatever a file holds will do.
        where: Where it stands, for messages.
        tensor: Gives a tensor by its key.

    Raises:
        FileFormatError: It is not what :func:`encode_tree` writes.
    """
    return _decode(value, where, tensor, 0)


def keys_in(value: JSON, where: str) -> Iterator[str]:
    """Check that a tree can be decoded, and yield the keys of its tensors, in order.

    Raises:
        FileFormatError: It is not what :func:`encode_tree` writes.
    """
    found: list[str] = []

    def note(key: str) -> Tensor:
        found.append(key)
        return cast("Tensor", None)

    _decode(value, where, note, 0)
    yield from found


def _decode(value: JSON, where: str, tensor: Callable[[str], Tensor], level: int) -> object:
    if level > MAX_LEVELS:
        raise FileFormatError(f"{where}: nested deeper than {MAX_LEVELS} levels")
    if not isinstance(value, (list, dict)):
        return value
    if isinstance(value, list):
        return [_decode(item, f"{where}.{i}", tensor, level + 1) for i, item in enumerate(value)]
    if len(value) != 1:
        raise FileFormatError(f"{where}: expected an object with one key, got {len(value)}")
    ((sort, inner),) = value.items()
    if sort == "tensor" and isinstance(inner, str):
        return tensor(inner)
    if sort == "float" and isinstance(inner, str) and inner in _ODD_FLOATS:
        return _ODD_FLOATS[inner]
    if sort == "integer" and isinstance(inner, str) and _DIGITS.fullmatch(inner):
        number = int(inner)
        if not -INT_LIMIT <= number < INT_LIMIT:  # others are themselves
            return number
    if sort == "tuple" and isinstance(inner, list):
        return tuple(_decode(item, f"{where}.{i}", tensor, level + 1) for i, item in enumerate(inner))
    if sort in _MAPPINGS and isinstance(inner, list):
        return _decode_mapping(sort, inner, where, tensor, level)
    raise FileFormatError(f"{where}: {sort[:64]!r} is no sort of value, or does not go with what it holds")


def _decode_mapping(sort: str, pairs: list[JSON], where: str, tensor: Callable[[str], Tensor], level: int) -> object:
    items: list[tuple[object, object]] = []
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2:
            raise FileFormatError(f"{where}: expected pairs of a key and a value")
        # Before it is decoded: a key is one value, and no tensor.
        odd = pair[0].keys() not in ({"float"}, {"integer"}) if isinstance(pair[0], dict) else isinstance(pair[0], list)
        if odd:
            raise FileFormatError(f"{where}: expected strings and numbers for keys")
        key = _decode(pair[0], where, tensor, level + 1)
        items.append((key, _decode(pair[1], f"{where}.{key}", tensor, level + 1)))
    if len(dict(items)) != len(items):
        raise FileFormatError(f"{where}: a key stands twice")
    return _MAPPINGS[sort](items)


def _encode_key(key: object, where: str) -> JSON:
    if key is None or isinstance(key, (bool, float)) or type(key) in (int, str):
        if isinstance(key, float) and math.isnan(key):
            raise ConfigError(f"{where}: nan cannot be a key, for no key equals it")
        return encode_tree(key, where, _no_tensor)
    raise ConfigError(f"{where}: expected strings and numbers for keys, got a {type(key).__qualname__}")


def _no_tensor(where: str, tensor: Tensor) -> str:
    raise ConfigError(f"{where}: a tensor cannot be a key")


def check_text(value: str, where: str) -> str:
    """A string that a file can hold.

    Raises:
        ConfigError: It is no valid Unicode.
    """
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConfigError(f"{where}: a string is not valid Unicode (lone surrogate)") from error
    return value
