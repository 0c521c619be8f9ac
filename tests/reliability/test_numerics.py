"""The table of docs/reference/numerics.md: every fault of an orthogonal weight, and who speaks of it.

`python -m tests.reliability.test_numerics` writes the table into the page.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.reliability import numerics
from tests.reliability.broken_builds import BUILDS, noticed_by
from tests.reliability.numerics import (
    DTYPES,
    FAULTS,
    HARMLESS,
    MAPS,
    SHAPES,
    WEIGHTS,
    layer,
    of_fault,
    of_weight,
    state_of,
)

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "numerics.md"
BEGIN, END = "<!-- table: python -m tests.reliability.test_numerics -->", "<!-- end of table -->"


def page() -> str:
    return PAGE.read_text("utf-8").split(BEGIN)[1].split(END)[0].strip()


def test_the_page_says_what_happens() -> None:
    assert page() == numerics.table()


def test_no_fault_is_silent() -> None:
    for fault, maps, which, found in numerics.rows():
        assert not found.silent or fault in HARMLESS, f"{fault}, {maps}, {which}"


@pytest.mark.parametrize("map_", MAPS)
@pytest.mark.parametrize("fault", HARMLESS)
def test_what_is_called_harmless_leaves_the_weight_orthogonal(fault: str, map_: str) -> None:
    for shape in SHAPES:
        for dtype in DTYPES:
            made = layer(shape, map_, dtype)
            found = of_fault(fault, map_, shape, dtype) if fault in FAULTS else of_weight(fault, map_, shape, dtype)
            if not found.silent:
                continue
            with torch.no_grad():
                if fault in FAULTS:
                    FAULTS[fault](made, *state_of(made))
                weight = torch.as_tensor(made.weight)
            tall = weight if weight.size(-2) >= weight.size(-1) else weight.mT
            gram = tall.mT @ tall - torch.eye(tall.size(-1), dtype=dtype)
            assert float(gram.abs().max()) < 200 * torch.finfo(dtype).eps


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_changes_the_state(fault: str) -> None:
    torch.manual_seed(2)
    made = layer((6, 4), "householder", torch.float32)
    before = [tensor.clone() for tensor in state_of(made)]
    with torch.no_grad():
        FAULTS[fault](made, *state_of(made))
    same = all(map(torch.equal, before, state_of(made)))
    assert same == (fault in ("none", "two weights that share their original"))


@pytest.mark.parametrize("build", noticed_by("numerics"))
def test_a_build_without_a_check_is_noticed(build: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sound = [of_weight(fault, "cayley", (6, 4), torch.float32) for fault in WEIGHTS]
    BUILDS[build][0](monkeypatch)
    assert [of_weight(fault, "cayley", (6, 4), torch.float32) for fault in WEIGHTS] != sound


if __name__ == "__main__":
    head, rest = PAGE.read_text("utf-8").split(BEGIN)
    PAGE.write_text(f"{head}{BEGIN}\n\n{numerics.table()}\n\n{END}{rest.split(END)[1]}", "utf-8")
