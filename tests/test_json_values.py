from __future__ import annotations

import collections
import enum
import json
import math
import subprocess
import sys
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orthoserde import json_values
from orthoserde.errors import ConfigError, FileFormatError, OrthoserdeError
from orthoserde.json_values import JSON, differences
from tests.storage.strategies import json_values as any_json


def same(one: object, other: object) -> bool:
    """Equality that tells 1 from 1.0, True and from -0.0."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return one == other and math.copysign(1, one) == math.copysign(1, other)
    return one == other


def reordered(value: JSON) -> JSON:
    """An equal value, every dict of which was filled in the reverse order."""
    if isinstance(value, dict):
        return {key: reordered(item) for key, item in reversed(value.items())}
    return [reordered(item) for item in value] if isinstance(value, list) else value


def nested(depth: int, brackets: str = "[]") -> str:
    opening = "[" if brackets == "[]" else '{"a":'
    return opening * depth + "1" + brackets[1] * depth


@settings(deadline=None, max_examples=200)
@given(any_json())
def test_a_value_comes_back_as_it_was_from_text_and_from_bytes(value: JSON) -> None:
    text = json_values.encode(value)
    assert same(json_values.decode(text, "f"), value)
    assert same(json_values.decode(text.encode("utf-8"), "f"), value)
    assert same(json.loads(text), value)


@settings(deadline=None, max_examples=200)
@given(any_json())
def test_equal_values_have_one_text_whatever_the_order_of_their_dicts(value: JSON) -> None:
    text = json_values.encode(value)
    assert json_values.encode(reordered(value)) == text
    assert json_values.encode(json_values.decode(text, "f")) == text


def test_canonical_text_has_sorted_keys_no_spaces_and_no_needless_escapes() -> None:
    value: JSON = {"é": [1, 2.0, -0.0, 1e16, 1e-5], "b": 'quote" back\\ slash/ \n\x01\x7f', "a": {"z": None, "B": True}}
    expected = '{"a":{"B":true,"z":null},"b":"quote\\" back\\\\ slash/ \\n\\u0001\x7f","é":[1,2.0,-0.0,1e+16,1e-05]}'
    assert json_values.encode(value) == expected


def test_keys_are_sorted_by_code_point() -> None:
    # By UTF-16 code units, as JCS (RFC 8785) would sort, the last two change places.
    assert (
        json_values.encode({"\U0001f600": 1, "\ufb33": 2, "a": 3, "B": 4}) == '{"B":4,"a":3,"\ufb33":2,"\U0001f600":1}'
    )


def test_text_in_order_keeps_the_order_of_keys() -> None:
    assert json_values.encode_in_order({"b": {"d": 1, "c": 2}, "a": 3}) == '{"b":{"d":1,"c":2},"a":3}'


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_json_does_not_have_are_not_written(value: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        json_values.encode(value)
    with pytest.raises(ValueError, match="not JSON compliant"):
        json_values.encode_in_order([value])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        *[("NaN", "NaN is not JSON"), ("[Infinity]", "Infinity is not JSON"), ("-Infinity", "-Infinity is not JSON")],
        *[("1e400", "a number is too large"), ("-1e400", "a number is too large")],
        *[('{"a":1,"a":1}', "twice"), ('{"b":{"a":1,"c":2,"a":3}}', "twice"), ('{"a":1,"\\u0061":2}', "twice")],
        *[('"\\ud800"', "surrogate"), ('{"\\udfff":1}', "surrogate"), ('["x\\ud83d"]', "surrogate")],
        *[("9223372036854775808", "64 bits"), ("-9223372036854775809", "64 bits"), ("1" * 5000, "64 bits")],
        *[("-" + "1" * 5000, "64 bits"), ("-0", "-0 is not an integer")],
        *[("[" * 100_000, "depth|deep"), ('{"a":' * 100_000, "depth|deep")],
        *[(nested(100_000), "depth|deep"), (nested(100_000, "{}"), "depth|deep")],
        *[("", "Expecting value"), ("{", "Expecting"), ("[1,]", ""), ("{'a':1}", ""), ("01", "Extra data")],
        *[("1 2", "Extra data"), ("[1]]", "Extra data"), ('"a\nb"', "control character"), ('"\\x"', "escape")],
        *[("\ufeff1", "BOM"), ("+1", "Expecting value"), (".5", "Expecting value"), ("1.", "Extra data")],
        *[("true false", "Extra data"), ("True", "Expecting value"), ("/**/1", "Expecting value"), ("\x0c1", "")],
    ],
    ids=lambda text: repr(text[:24]),
)
def test_text_that_is_not_strict_json_is_refused_with_its_place_and_reason(text: str, reason: str) -> None:
    with pytest.raises(FileFormatError, match=rf"^the file: not valid JSON: .*({reason})") as caught:
        json_values.decode(text, "the file")
    assert len(str(caught.value)) < 200
    with pytest.raises(FileFormatError, match=r"^the file: not valid JSON: "):
        json_values.decode(text.encode("utf-8", "surrogatepass"), "the file")


@pytest.mark.parametrize(
    "data", [b"\xff", b'"\xc3"', b'"\xed\xa0\x80"', b'"\xc0\xaf"', b"[1\x00]", '"a"'.encode("utf-16")]
)
def test_bytes_that_are_not_utf8_json_are_refused(data: bytes) -> None:
    with pytest.raises(FileFormatError, match=r"^f: not valid JSON: "):
        json_values.decode(data, "f")


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=40) | st.text('[]{}",:0123456789.eE-+\\u truefalsnNaIiy', max_size=40).map(str.encode))
def test_no_bytes_raise_anything_but_a_format_error(data: bytes) -> None:
    try:
        value = json_values.decode(data, "f")
    except FileFormatError:
        return
    assert same(value, json.loads(data.decode("utf-8")))


@pytest.mark.parametrize(
    "text", ["9223372036854775807", "-9223372036854775808", "1.7976931348623157e308", "5e-324", "-0.0", "0"]
)
def test_the_extreme_numbers_are_read(text: str) -> None:
    assert same(json_values.decode(text, "f"), json.loads(text))


@pytest.mark.parametrize("levels", [json_values.MAX_DEPTH, json_values.MAX_DEPTH + json_values.SURROUNDING_DEPTH])
def test_whatever_may_be_written_can_be_read_inside_of_a_manifest(levels: int) -> None:
    text = nested(levels)
    assert json_values.encode(json_values.decode(text, "f")) == text


@pytest.mark.parametrize("brackets", ["[]", "{}"])
def test_depth_is_limited(brackets: str) -> None:
    value = json.loads(nested(json_values.MAX_DEPTH, brackets))
    assert same(json_values.to_json(value), value)
    with pytest.raises(ConfigError, match="nested deeper than 64 levels"):
        json_values.to_json([value])
    too_deep = nested(json_values.MAX_DEPTH + json_values.SURROUNDING_DEPTH + 1, brackets)
    with pytest.raises(FileFormatError, match="nested deeper"):
        json_values.decode(too_deep, "f")


class Colour(enum.IntEnum):
    RED = 1


class Name(str):
    __slots__ = ()


class Point(NamedTuple):
    x: int


loop: list[Any] = []
loop.append(loop)


@pytest.mark.parametrize("brackets", ["[]", "{}"])
def test_depth_ends_no_process_whose_limit_of_recursion_was_raised(brackets: str) -> None:
    code = (
        "import sys; from orthoserde import json_values; from orthoserde.errors import FileFormatError\n"
        "sys.setrecursionlimit(10**7)\n"
        f"text = {nested(1, brackets).partition('1')[0]!r} * 10**6\n"
        "try: json_values.decode(text, 'f')\n"
        "except FileFormatError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "f: not valid JSON: nested deeper than 80 levels\n")


@pytest.mark.parametrize(
    "text",
    [
        *['"' + "[" * 100 + '"', '["' + "[{" * 99 + '"]', '"\\"' + "[" * 100 + '"', '"\\\\\\"' + "[" * 100 + '"'],
        *['{"a\\\\":"[' + "[" * 100 + '"}', '{"' + "\\\\" * 9 + '":["' + "]" * 100 + '"]}', "[" + "[]," * 99 + "[]]"],
    ],
)
def test_brackets_in_strings_and_side_by_side_are_not_deep(text: str) -> None:
    assert same(json_values.decode(text, "f"), json.loads(text))


@pytest.mark.parametrize(
    "value",
    [
        *[math.nan, math.inf, 2**63, -(2**63) - 1, 10**5000, "\ud800", {"\udfff": 1}, {1: 2}, {None: 1}, {True: 1}],
        *[Colour.RED, Name("a"), {Name("a"): 1}, {1, 2}, b"bytes", 1j, object(), int, len, loop],
        *[torch.Size([1]), torch.float32, torch.tensor(1.0), Point(1)],
        *[[1, [math.nan]], {"a": {"b": (1, {2})}}],
    ],
    ids=lambda value: type(value).__name__,
)
def test_values_that_would_not_come_back_as_they_were_are_refused(value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        json_values.to_json(value)
    assert isinstance(caught.value, OrthoserdeError)
    assert len(str(caught.value)) < 200


def test_tuples_become_lists_and_mappings_become_dicts() -> None:
    value = {"a": (1, (2.0,)), "b": collections.OrderedDict(x=None)}
    assert same(json_values.to_json(value), {"a": [1, [2.0]], "b": {"x": None}})


@settings(deadline=None)
@given(any_json())
def test_a_value_is_copied_and_not_shared(value: JSON) -> None:
    before = json_values.encode(value)
    copy = json_values.to_json(value)
    assert same(copy, value)
    _spoil(copy)
    assert json_values.encode(value) == before


def _spoil(value: JSON) -> None:
    if isinstance(value, dict):
        for item in value.values():
            _spoil(item)
        value.clear()
    elif isinstance(value, list):
        for item in value:
            _spoil(item)
        value.clear()


@pytest.mark.parametrize(
    ("left", "right", "found"),
    [
        ({"a": 1}, {"a": 1}, []),
        ({"a": 1}, {"a": True}, [("a", 1, True)]),
        ({"a": 1}, {"b": 1}, [("a", 1, None), ("b", None, 1)]),
        ({"a": [1, 2]}, {"a": [1, 3]}, [("a", [1, 2], [1, 3])]),
        ({"a": [{"b": 1}, {"b": 2}]}, {"a": [{"b": 1}, {"b": 3}]}, [("a[1].b", 2, 3)]),
        ({"a": [{"b": 1}]}, {"a": [{"b": 1}, {"b": 3}]}, [("a", [{"b": 1}], [{"b": 1}, {"b": 3}])]),
        ([[1], [2]], [[1], [3]], [("[1]", [2], [3])]),
        (1, 2, [("", 1, 2)]),
    ],
)
def test_differences_are_found_where_they_are(left: JSON, right: JSON, found: list[tuple[str, JSON, JSON]]) -> None:
    assert list(differences(left, right)) == found


def test_more_values_than_are_read_are_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_values, "MAX_VALUES", 10)
    fitting: JSON = {"a": [1, 2, 3, 4, 5, 6, 7, 8]}
    assert json_values.decode(json_values.encode(fitting), "here") == fitting
    with pytest.raises(ConfigError, match="more than 10 values"):
        json_values.encode({"a": [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]})
    with pytest.raises(FileFormatError, match=r"here: .* more than 10 values"):
        json_values.decode('{"a":[1,2,3,4,5,6,7,8,9,10]}', "here")


def test_what_stands_in_a_string_is_no_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_values, "MAX_VALUES", 10)
    for text in ("[{," * 20, 'a\\"[,' * 20, "\\" * 7 + "," * 20):
        assert json_values.decode(json_values.encode({text: text}), "here") == {text: text}
