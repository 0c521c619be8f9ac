"""A file may name anything anyhow; what is shown stays lines of a terminal's width, and obeys nothing."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from rich.cells import cell_len
from rich.text import Text

from orthoserde.cli.layout import SHOWN, Row, squeeze, table, wrapped
from orthoserde.cli.show_contents import show_contents
from orthoserde.cli.show_reports import show_conversion, show_difference, show_picture, show_verification
from orthoserde.cli.terminal import ASCII, INDENT, UNICODE, Guides, Output, complain
from orthoserde.comparison.distances import Distance, OnManifold
from orthoserde.comparison.report import DiffReport, TensorDifference
from orthoserde.conversion import ConversionReport
from orthoserde.json_values import JSON
from orthoserde.manifest import (
    DENSE,
    OPAQUE,
    Manifest,
    ModuleRecord,
    ParametrizationRecord,
    ParametrizedRecord,
    TensorRecord,
)
from orthoserde.plots import PlotReport
from orthoserde.reports import VerifyReport

LONG = "blocks." * 60 + "weight"
EVIL = "\x1b[2Jcleared\r\nline\u202e\udc80\x9b31m\x07"
MARKUP = "[red]x[/] [/nothing] :smile: [link=file:///etc/passwd]"
WIDE = "\u5c42" * 300
NAMES = (LONG, EVIL, MARKUP, WIDE, "", ".", "..a")
WIDTHS = (60, 200)


def manifest() -> Manifest:
    shape = (2**40, *(1,) * 40)
    tensors = {name: TensorRecord("bfloat16", shape, shape, True) for name in NAMES}
    tensors |= {f"t{i}x{'abc'[i % 3]}": TensorRecord("float32", (), (), False) for i in range(2 * SHOWN)}
    config: dict[str, JSON] = {EVIL: [LONG] * 1000, MARKUP: None, WIDE: WIDE}
    links = tuple(
        ParametrizationRecord(kind, 2, config, EVIL if kind == OPAQUE else None, {})
        for kind in (OPAQUE, EVIL, MARKUP, "torch>orthogonal")
    )
    record = ParametrizedRecord(LONG, EVIL, (EVIL,), None, None, True, True, {"original": DENSE}, links)
    tensors[record.original_key("original")] = TensorRecord("int8", (3,), (1,), True)
    return Manifest(
        tensors=tensors,
        aliases={f"{LONG}{'xyz'[i % 3]}{i}": LONG for i in range(2 * SHOWN)},
        parametrized=(record,),
        modules=tuple(ModuleRecord(f"{EVIL}{i}", EVIL, 9, config) for i in range(2 * SHOWN)),
        left_out=NAMES * SHOWN,
        metadata={EVIL: LONG, LONG: EVIL, MARKUP: WIDE},
        writer={EVIL: LONG},
    )


def check(lines: Iterable[Text], width: int) -> str:
    """Every line fits and can be printed, and what is shown is what is in the text: markup is not obeyed."""
    text = "\n".join(line.plain for line in lines)
    for line in text.split("\n"):
        assert cell_len(line) <= width
        assert line.isprintable()
    return text


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("guides", [UNICODE, ASCII, INDENT])
@pytest.mark.parametrize("everything", [True, False])
def test_contents(width: int, guides: Guides, everything: bool) -> None:
    lines = show_contents(manifest(), EVIL, 12, width=width, guides=guides, everything=everything)
    text = check(lines, width)
    assert ("more lines; --all shows them" in text) == (not everything)
    if width == 200:
        assert "[red]x[/] [/nothing] :smile: [link=file:///etc/passwd]" in text
        assert r"\x1b[2Jcleared\r\nline\u202e" in text


@pytest.mark.parametrize("width", WIDTHS)
def test_reports(width: int) -> None:
    report = VerifyReport(
        path=EVIL,
        has_configuration=True,
        digests=True,
        tensors=3,
        damaged=NAMES,
        residuals={LONG: 0.5, EVIL: None, WIDE: float("nan")},
        off_constraint=(LONG,),
        misfits=dict.fromkeys(NAMES, LONG),
        not_measured=dict.fromkeys(NAMES, EVIL),
    )
    check(show_verification(report, width, everything=False), width)
    distance = Distance(False, float("inf"), float("nan"), 10**15)
    pairs: dict[str, tuple[JSON, JSON]] = {name: (EVIL, {WIDE: [LONG]}) for name in NAMES}
    difference = TensorDifference(
        *(EVIL, (LONG, MARKUP), ((2**40,) * 40, None), (EVIL, None), pairs, dict.fromkeys(NAMES, distance), distance),
        manifold=OnManifold("rotation", 1.0, float("inf")),
        not_compared=EVIL,
    )
    diff = DiffReport(
        paths=(EVIL, LONG),
        only=(NAMES * SHOWN, NAMES),
        tensors=dict.fromkeys(NAMES, difference),
        modules=pairs,
        ties=pairs,
        training={**pairs, "x": distance},
        metadata=pairs,
        notes=NAMES,
    )
    check(show_difference(diff, width, everything=True), width)
    check(show_conversion(ConversionReport(EVIL, WIDE, MARKUP, LONG, 1, 2, 3, NAMES, NAMES), width), width)
    check(show_picture(PlotReport(EVIL, NAMES, dict.fromkeys(NAMES, LONG)), width), width)


def test_markup_reaches_the_screen_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    Output().lines([Text(MARKUP), *table([Row((MARKUP, "[bold]"))], 100)])
    out = capsys.readouterr().out
    assert out == f"{MARKUP}\n{MARKUP}  [bold]\n"


def test_a_complaint_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for name in (*NAMES, "x" * 10_000):
        complain(name)
        err = capsys.readouterr().err
        assert err[:-1].isprintable()
        assert err.endswith("\n")
        assert len(err) < 2100


def test_a_shortened_name_keeps_both_ends() -> None:
    assert squeeze("abcdefghij", 10) == "abcdefghij"
    assert squeeze("abcdefghij", 8) == "ab...hij"
    assert all(cell_len(squeeze(text * 50, width)) <= max(width, 3) for width in range(50) for text in ("a", "\u5c42"))


def test_wrapped_text_has_few_lines_and_both_ends() -> None:
    lines = wrapped(f"begin {LONG} end", 40)
    assert 1 < len(lines) <= 4
    assert lines[0].startswith("begin")
    assert lines[-1].endswith("end")
