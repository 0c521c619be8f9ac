"""State trees come back as what they were, and nothing else is taken."""

from __future__ import annotations

import collections
import enum
import math
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from orthoserde import json_values
from orthoserde.errors import ConfigError, FileFormatError
from orthoserde.json_values import JSON
from orthoserde.manifest.trees import MAX_LEVELS, decode_tree, encode_tree, keys_in

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec="utf-8"))
TREES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(
            SCALARS.filter(lambda key: not (isinstance(key, float) and math.isnan(key))), inner, max_size=3
        )
        | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=3).map(collections.OrderedDict)
        | st.dictionaries(st.integers(0, 9), st.integers(0, 5) | st.floats(), max_size=3).map(collections.Counter)
    ),
    max_leaves=12,
)


def there_and_back(tree: object) -> object:
    tensors: dict[str, Tensor] = {}

    def put(where: str, tensor: Tensor) -> str:
        tensors[where] = tensor
        return where

    encoded = encode_tree(tree, "here", put)
    text = json_values.encode(encoded)
    decoded = json_values.decode(text, "text")
    assert list(keys_in(decoded, "here")) == list(tensors)
    return decode_tree(decoded, "here", tensors.__getitem__)


def same(left: object, right: object) -> bool:
    """Equal in value, type, order and sign of zero."""
    if type(left) is not type(right):
        return False
    if isinstance(left, Tensor):
        return left is right
    if isinstance(left, float) and isinstance(right, float):
        both_nan = math.isnan(left) and math.isnan(right)
        return both_nan or (left == right and math.copysign(1, left) == math.copysign(1, right))
    if isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, dict) and isinstance(right, dict):
        return same(list(left), list(right)) and same(list(left.values()), list(right.values()))
    return left == right


@settings(deadline=None)
@given(TREES)
def test_a_tree_comes_back_as_it_was(tree: object) -> None:
    assert same(there_and_back(tree), tree)


def test_tensors_are_put_aside_under_their_places() -> None:
    tree = {"a": [torch.ones(2), (torch.zeros(()), 3)], 4: {"b": torch.arange(3)}}
    assert same(there_and_back(tree), tree)


class Level(enum.IntEnum):
    LOW = 1


@pytest.mark.parametrize(
    ("tree", "where"),
    [
        ({"a": [1, {2: object()}]}, r"here\.a\.1\.2: .*builtins\.object"),
        ({"f": len}, r"here\.f: .*builtin_function"),
        ([np.ones(2)], r"here\.0: .*numpy\.ndarray"),
        ({"s": {1, 2}}, r"here\.s: .*builtins\.set"),
        ({"d": collections.defaultdict(int)}, r"here\.d: .*defaultdict"),
        ({"l": Level.LOW}, r"here\.l: .*Level"),
        ({"z": 1j}, r"here\.z: .*complex"),
        ({"t": torch.float32}, r"here\.t: .*dtype"),
        ({"u": "\ud800"}, r"here\.u: .*Unicode"),
        ({(1, 2): 3}, "here: .*for keys, got a tuple"),
        ({float("nan"): 1}, "here: nan cannot be a key"),
        ({"n": np.int64(3)}, r"here\.n: .*numpy\.int64; convert it with \.item\(\)"),
        ({"b": b"bytes"}, r"here\.b: .*builtins\.bytes"),
        ({"g": np.random.default_rng()}, r"here\.g: .*Generator; its state is \.bit_generator\.state"),
        ({"r": random.Random()}, r"here\.r: .*random\.Random; its state is \.getstate\(\)"),
    ],
    ids=str,
)
def test_what_is_no_tree_is_refused_with_its_place(tree: object, where: str) -> None:
    with pytest.raises(ConfigError, match=where):
        there_and_back(tree)


def test_cycles_end() -> None:
    cycle: list[Any] = []
    cycle.append(cycle)
    with pytest.raises(ConfigError, match="nested deeper"):
        there_and_back(cycle)


def test_the_deepest_tree_can_be_read_from_a_file() -> None:
    deep: Any = 1
    for _ in range(MAX_LEVELS):
        deep = {"a": deep}
    assert same(there_and_back(deep), deep)
    with pytest.raises(ConfigError, match="nested deeper"):
        there_and_back({"a": deep})


def test_integers_of_up_to_640_digits_come_back() -> None:
    for value in (2**63 - 1, 2**63, -(2**63), -(2**63) - 1, 10**640 - 1, 1 - 10**640):
        assert same(there_and_back({"a": [value, (value,)], value: 1}), {"a": [value, (value,)], value: 1})
    for value in (10**640, -(10**5000)):
        with pytest.raises(ConfigError, match=r"here\.i: expected an integer of at most 640 digits"):
            there_and_back({"i": value})


FEWEST_DIGITS = """
import sys
import pytest
import torch
import orthoserde
from orthoserde.json_values import decode
from orthoserde.manifest.trees import decode_tree

assert sys.get_int_max_str_digits() == 640
model, path, largest = torch.nn.Identity(), sys.argv[1], 10**640 - 1
state = {"n": {largest: -largest}}
orthoserde.save(model, path, state=state)
assert orthoserde.load(model, path, state={"n": {}}).state == state
for larger in (largest + 1, {largest + 1: 1}, [-largest - 1]):
    with pytest.raises(orthoserde.OrthoserdeError, match="at most 640 digits"):
        orthoserde.save(model, path, state={"n": larger})
for digits in ("9" * 641, "-" + "9" * 641):
    with pytest.raises(orthoserde.OrthoserdeError, match="is no sort of value"):
        decode_tree({"integer": digits}, "here", dict.__getitem__)
    with pytest.raises(orthoserde.OrthoserdeError):
        decode(f"[{digits}]", "here")
"""


def test_integers_come_back_where_python_is_set_to_convert_the_fewest_digits(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FEWEST_DIGITS, str(tmp_path / "file")],
        env={**os.environ, "PYTHONINTMAXSTRDIGITS": "640"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_the_state_of_a_generator_of_numpy_is_a_tree() -> None:
    """It has integers of 128 bits."""
    generator, other = np.random.default_rng(1), np.random.default_rng(2)
    other.bit_generator.state = there_and_back(generator.bit_generator.state)  # type: ignore[assignment]
    assert (generator.random(3) == other.random(3)).all()


def test_the_state_of_a_generator_of_python_is_a_tree() -> None:
    generator, other = random.Random(1), random.Random(2)
    generator.gauss(0, 1)
    other.setstate(there_and_back(generator.getstate()))  # type: ignore[arg-type]
    assert generator.gauss(0, 1) == other.gauss(0, 1)


def test_a_float_of_numpy_becomes_a_float() -> None:
    assert same(there_and_back([np.float64(0.5)]), [0.5])


@pytest.mark.parametrize(
    "text",
    [
        '{"tensor": 1}',
        '{"tensor": "a", "float": "nan"}',
        "{}",
        '{"float": "1.0"}',
        '{"float": 1}',
        '{"integer": "1"}',
        '{"integer": "9223372036854775807"}',
        '{"integer": "-9223372036854775808"}',
        '{"integer": "09223372036854775808"}',
        '{"integer": "+9223372036854775808"}',
        '{"integer": "9223372036854775808 "}',
        '{"integer": "9_223_372_036_854_775_808"}',
        '{"integer": 9}',
        '{"integer": "' + "9" * 641 + '"}',
        '{"integer": "' + "9" * 10_000 + '"}',
        '{"tuple": {}}',
        '{"set": []}',
        '{"dict": [[1]]}',
        '{"dict": [1]}',
        '{"dict": {}}',
        '{"dict": [[[], 1]]}',
        '{"dict": [[{"tensor": "a"}, 1]]}',
        '{"dict": [["a", 1], ["a", 2]]}',
        '{"counter": [[{"float": "x"}, 1]]}',
        "[" * (MAX_LEVELS + 2) + "]" * (MAX_LEVELS + 2),
    ],
)
def test_what_no_tree_writes_is_refused(text: str) -> None:
    value: JSON = json_values.decode(text, "text")
    with pytest.raises(FileFormatError, match=r"^here"):
        decode_tree(value, "here", lambda key: torch.ones(()))
    with pytest.raises(FileFormatError, match=r"^here"):
        list(keys_in(value, "here"))
