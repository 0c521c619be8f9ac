"""Lines, lists and tables as text of a given width. What is put in may be any name from the file of a stranger."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.text import Text

from orthoserde.wording import printable

#: A list shows this many entries and counts the rest.
SHOWN = 100

#: A text of its own, such as a configuration, takes at most this many lines.
MOST_LINES = 4

GAP = "  "
_LABEL = 13

#: Columns that the first cell of a row has at least, with what a tree draws before it, and without.
_LEAST_FIRST, _LEAST_NAME = 16, 8


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        cells: The first one gives way where a line would be too long; one cell alone has the whole line.
        guide: What a tree draws before the first one.
        style: Style of the first one.
        below: Texts under it that span its columns, each with its guide.
    """

    cells: tuple[str, ...]
    guide: str = ""
    style: str = ""
    below: tuple[tuple[str, str], ...] = ()


def squeeze(text: str, width: int) -> str:
    """Shorten a text in the middle, where names differ least."""
    if cell_len(text) <= width:
        return text
    head = max(0, width - 3) // 2
    return f"{_start(text, head)}...{_start(text[::-1], max(0, width - 3 - head))[::-1]}"


def _cut(text: str, width: int) -> str:
    """A text without the middle of it, where it is so long that only its ends will be seen."""
    return f"{text[:width]}...{text[-width:]}" if len(text) > 3 * width else text


def _start(text: str, width: int) -> str:
    """As much of a text as fits."""
    room = width
    for index, char in enumerate(text):
        room -= cell_len(char)
        if room < 0:
            return text[:index]
    return text


def heading(text: str, width: int) -> Text:
    """A title over a section."""
    return Text(squeeze(printable(_cut(text, width)), width), style="bold")


def pair(label: str, text: str, width: int, style: str = "") -> list[Text]:
    """A label, and a text behind it that may take several lines."""
    first = f"  {label:<{_LABEL}}"
    lines = wrapped(text, width - len(first))
    found: list[Text] = []
    for i, line in enumerate(lines or [""]):
        found.append(Text().append(first if i == 0 else " " * len(first), "dim").append(line, style))
    return found


def wrapped(text: str, width: int) -> list[str]:
    """A text in lines of at most this width, shortened in its middle if it takes too many."""
    room = width * (MOST_LINES - 1)
    whole = squeeze(printable(_cut(text, room)), room)
    lines = textwrap.wrap(whole, width, break_on_hyphens=False)
    # Wide letters take two columns, which textwrap does not know.
    return [squeeze(line, width) for line in lines]


def listed(title: str, names: Sequence[str], width: int, style: str = "") -> list[Text]:
    """A section of names, the first of them; nothing where there are none."""
    if not names:
        return []
    lines = [heading(title, width)]
    lines += [Text(squeeze(f"  {printable(_cut(name, width))}", width), style=style) for name in names[:SHOWN]]
    if len(names) > SHOWN:
        lines.append(Text(f"  and {len(names) - SHOWN:,} more", style="dim"))
    return lines


def reasons(title: str, found: Mapping[str, str], width: int) -> list[Text]:
    """A section of names, each with a text below it."""
    if not found:
        return []
    lines = [heading(title, width)]
    for name, reason in list(found.items())[:SHOWN]:
        lines.append(Text(squeeze(f"  {printable(_cut(name, width))}", width)))
        lines += [Text(f"      {line}", style="dim") for line in wrapped(reason, width - 6)]
    if len(found) > SHOWN:
        lines.append(Text(f"  and {len(found) - SHOWN:,} more", style="dim"))
    return lines


def table(rows: Iterable[Row], width: int, right: frozenset[int] = frozenset()) -> list[Text]:
    """Rows as aligned columns.

    Args:
        rows: All with equally many cells.
        width: Columns of the screen.
        right: Which columns are aligned at their right.
    """
    shown = [dataclasses.replace(row, cells=tuple(printable(_cut(cell, width)) for cell in row.cells)) for row in rows]
    if not shown:
        return []
    # No column may take nearly all: shapes and kinds of strangers may be of any length.
    most = width * 2 // 5
    others = [max(min(most, cell_len(row.cells[i])) for row in shown) for i in range(1, len(shown[0].cells))]
    others = _fitting(others, width - _LEAST_FIRST)
    full = [len(row.guide) + cell_len(row.cells[0]) for row in shown if any(row.cells[1:])]
    first = max(_LEAST_FIRST, min(max(full, default=0), width - _total(others)))
    lines: list[Text] = []
    for row in shown:
        alone = not any(row.cells[1:])
        # A tree of strangers may be deep.
        guide = row.guide[-(first - min(_LEAST_NAME, cell_len(row.cells[0]))) :]
        name = squeeze(row.cells[0], (width if alone else first) - len(guide))
        line = Text().append(guide, "dim").append(name, row.style)
        if not alone:
            line.append(" " * (first - len(guide) - cell_len(name)))
            for i, (cell, size) in enumerate(zip(row.cells[1:], others, strict=True), start=1):
                cell = squeeze(cell, size)
                space = " " * (size - cell_len(cell))
                line.append(GAP + (space + cell if i in right else cell + space))
        lines.append(line)
        for guide, text in row.below:
            guide = guide[-width // 2 :]
            parts = wrapped(text, width - len(guide))
            lines += [Text().append(guide, "dim").append(part, "cyan") for part in parts]
    return lines


def _fitting(widths: list[int], room: int) -> list[int]:
    """The widths of columns, the widest made narrower until all fit."""
    found = list(widths)
    while _total(found) > room and max(found, default=0) > 1:
        found[found.index(max(found))] -= 1
    return found


def _total(widths: list[int]) -> int:
    return sum(len(GAP) + size for size in widths)


def sections(parts: Iterable[Sequence[Text]]) -> list[Text]:
    """Sections with an empty line between them; empty ones are left out."""
    lines: list[Text] = []
    for part in parts:
        if part:
            lines += [Text(), *part] if lines else part
    return lines
