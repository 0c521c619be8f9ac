"""How messages and reports put things: numbers, names that a stranger may have chosen, errors of others."""

from __future__ import annotations

from collections.abc import Sequence

#: A message shows this many characters of a line, and of a name.
SHOWN_CHARACTERS = 2000
SHOWN_OF_A_NAME = 200

#: The text of a report lists this many things of a sort.
SHOWN = 20


def counted(count: int, noun: str) -> str:
    """A number and what it counts: ``1 tensor``, ``2 tensors``."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def printable(text: str) -> str:
    """Escape what a terminal would obey instead of show: names in the files of strangers may hold anything."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def legible(text: str) -> str:
    """A message in which names from the file of a stranger may stand, as it can be shown; lines stay lines."""
    return "\n".join(legible_name(line, SHOWN_CHARACTERS) for line in text.split("\n"))


def legible_name(name: str, most: int = SHOWN_OF_A_NAME) -> str:
    """A name in one line: :func:`printable`, and cut if it is too long to be read."""
    more = f"... ({len(name)} characters)" if len(name) > most else ""
    return printable(name[:most]) + more


def shorten(names: Sequence[str], most: int = 5) -> str:
    """Join names for a message, the first few of them; they may be those of a stranger."""
    shown = ", ".join(map(legible_name, names[:most]))
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown


def one_line(error: BaseException) -> str:
    """The first line of an error, or its class where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
