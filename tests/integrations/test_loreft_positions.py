"""Which tokens are chosen, against counting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from orthoserde.integrations.loreft import LoReFT
from orthoserde.integrations.loreft.adapter import Adapter
from orthoserde.integrations.loreft.positions import choose, parse
from tests.integrations.toy import slow_positions

NAMES = st.one_of(
    st.just("all"),
    st.builds("f{}".format, st.integers(1, 9)),
    st.builds("l{}".format, st.integers(1, 9)),
    st.builds("f{}+l{}".format, st.integers(1, 9), st.integers(1, 9)),
)
MASKS = st.tuples(st.integers(0, 4), st.integers(0, 8)).flatmap(
    lambda size: st.lists(
        st.lists(st.booleans(), min_size=size[1], max_size=size[1]), min_size=size[0], max_size=size[0]
    )
)


@settings(deadline=None, max_examples=300)
@given(positions=NAMES, rows=MASKS)
def test_the_chosen_tokens_are_those_that_counting_gives(positions: str, rows: list[list[bool]]) -> None:
    real = torch.tensor(rows, dtype=torch.bool).reshape(len(rows), len(rows[0]) if rows else 0)
    chosen = choose(parse(positions), real)
    assert chosen.dtype == torch.bool
    assert [row.nonzero().flatten().tolist() for row in chosen] == [slow_positions(positions, row) for row in rows]


def test_a_token_that_is_first_and_last_is_chosen_once() -> None:
    assert choose(parse("f2+l2"), torch.tensor([[False, True, True, True]])).tolist() == [[False, True, True, True]]


@pytest.mark.parametrize(
    "positions",
    ["", "f", "l", "f0", "l0", "f1+", "+l1", "l1+f1", "f1l1", "f1+f1", "f-1", "f01", "f1 + l1", "ALL", "f1+l1+l2", "+"],
)
def test_other_strings_are_refused(positions: str) -> None:
    with pytest.raises(ValueError, match=r"expected 'f<n>', 'l<m>', 'f<n>\+l<m>'"):
        Adapter({"layer": LoReFT(4, 2)}, positions)


@pytest.mark.parametrize("positions", [None, 1, torch.ones(2, 3), ["f1"]])
def test_positions_that_are_neither_a_string_nor_callable_are_refused(positions: Any) -> None:
    with pytest.raises(TypeError, match="positions: expected a string or a callable"):
        Adapter({"layer": LoReFT(4, 2)}, positions)


REAL = torch.tensor([[False, True, True], [True, True, False]])


def test_a_callable_may_return_a_mask_or_indices() -> None:
    assert torch.equal(choose(lambda real: ~real, REAL), ~REAL)
    indices = torch.tensor([[2, 1, 2], [0, 0, 0]])
    expected = torch.tensor([[False, True, True], [True, False, False]])
    assert torch.equal(choose(lambda real: indices, REAL), expected)
    assert torch.equal(choose(lambda real: indices.to(torch.int16), REAL), expected)
    assert not choose(lambda real: indices[:, :0], REAL).any()


def test_a_callable_cannot_change_what_is_real() -> None:
    def greedy(real: Tensor) -> Tensor:
        return real.fill_(True)

    before = REAL.clone()
    assert choose(greedy, REAL).all()
    assert torch.equal(REAL, before)


@pytest.mark.parametrize(
    ("positions", "error", "match"),
    [
        (lambda real: real[:, :2], ValueError, r"given shape \(2, 3\) and returned \(2, 2\)"),
        (lambda real: real.float(), TypeError, "float32"),
        (lambda real: None, TypeError, "returned NoneType"),
        (lambda real: [0], TypeError, "returned list"),
        (lambda real: torch.tensor([0, 1]), ValueError, r"expected \(2, m\)"),
        (lambda real: torch.zeros(1, 3, dtype=torch.long), ValueError, r"expected \(2, m\)"),
        (lambda real: torch.full((2, 1), 3), ValueError, "outside of 0 to 2"),
        (lambda real: torch.full((2, 1), -1), ValueError, "outside of 0 to 2"),
    ],
)
def test_what_a_callable_returns_is_checked(
    positions: Callable[[Tensor], Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        choose(parse(positions), REAL)
