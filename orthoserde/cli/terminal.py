"""Where output goes: to a terminal in colours, to a pipe as plain text, never with anything that a terminal obeys."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TextIO

from rich.console import Console
from rich.text import Text

from orthoserde.wording import printable

#: Columns where there is no terminal to ask, and the fewest that tables are made for.
PIPE_WIDTH, LEAST_WIDTH = 100, 60

#: Characters of an error; names in it may be of any length.
MOST_ERROR = 2000

#: Between the lines of an error that lists what is wrong.
_LISTED = re.compile(r"\n  (?:- )?")


@dataclass(frozen=True)
class Guides:
    """What the lines of a tree begin with: at a branch, at the last one, beside one, and below the last one."""

    fork: str
    end: str
    pipe: str
    blank: str


UNICODE = Guides("├── ", "└── ", "│   ", "    ")
ASCII = Guides("|-- ", "`-- ", "|   ", "    ")
INDENT = Guides("  ", "  ", "  ", "  ")


class UnsaidError(Exception):
    """What a command found cannot be written to the standard output. What it wrote elsewhere stands."""


class Output:
    """The standard output of a command.

    Attributes:
        width: Columns.
        guides: What trees are drawn with: lines in a terminal, spaces in a pipe.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream: TextIO | None = sys.stdout if stream is None else stream
        self._is_terminal = is_terminal(self._stream)
        fallback = 80 if self._is_terminal else PIPE_WIDTH
        self.width = max(LEAST_WIDTH, shutil.get_terminal_size((fallback, 24)).columns)
        self.guides = (ASCII if wants_ascii(self._stream) else UNICODE) if self._is_terminal else INDENT

    def lines(self, lines: Iterable[Text]) -> None:
        """Write lines, in colours if it is a terminal that has some."""
        text = io.StringIO()
        console = Console(
            file=text,
            force_terminal=self._is_terminal,
            color_system="auto" if self._is_terminal else None,
            width=self.width,
            legacy_windows=False,
            highlight=False,
            markup=False,
            emoji=False,
        )
        for line in lines:
            line.rstrip()
            console.print(line, soft_wrap=True)
        self._write(text.getvalue())

    def json(self, value: Mapping[str, object]) -> None:
        """Write one object, and nothing else: what JSON has no number for is a string."""
        self._write(json.dumps(strict(value), indent=2, ensure_ascii=True, allow_nan=False) + "\n")

    def _write(self, text: str) -> None:
        stream = self._stream
        if stream is None:  # closed by whoever started us
            return
        encoding = "ascii" if wants_ascii(stream) else stream.encoding or "utf-8"
        try:
            stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
            stream.flush()
        except BrokenPipeError:  # whoever read has gone (`| head`)
            _silence(stream)
        except OSError as error:
            _silence(stream)
            raise UnsaidError(f"the standard output cannot be written: {error.strerror}") from error


def _silence(stream: TextIO) -> None:
    """Let what is still to be written go nowhere: Python would complain once more when it flushes at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def complain(message: str) -> None:
    """One line on the standard error."""
    text = printable(message)
    if len(text) > MOST_ERROR:
        text = f"{text[: MOST_ERROR // 2]} ... {text[-MOST_ERROR // 2 :]}"
    if sys.stderr is not None:
        with contextlib.suppress(OSError):  # there is nowhere left to say so
            print(f"orthoserde: {text}", file=sys.stderr, flush=True)


def message_of(error: BaseException) -> str:
    """What an error says; of one of the system, without its number. What it lists goes into the line."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    return _LISTED.sub(" - ", str(error))


def is_terminal(stream: TextIO | None) -> bool:
    """Whether somebody looks at it."""
    return stream is not None and stream.isatty() and os.environ.get("TERM") != "dumb"


def wants_ascii(stream: TextIO | None) -> bool:
    """Whether letters beyond ASCII may not be shown: the encoding lacks them, or the locale says C.

    In the C locale Python takes the encoding to be UTF-8 all the same (PEP 538, PEP 540).
    """
    if stream is not None and not (stream.encoding or "utf-8").lower().replace("-", "").startswith("utf"):
        return True
    names = [os.environ.get(name, "") for name in ("LC_ALL", "LC_CTYPE", "LANG")]
    if "PYTHONIOENCODING" in os.environ:
        return False
    if names[1] == "C.UTF-8" and names[2] in ("C", "POSIX") and not names[0]:
        return True  # Python itself has set LC_CTYPE
    return next((name for name in names if name), "") in ("C", "POSIX")


def strict(value: object) -> object:
    """A value without numbers that JSON lacks: these are ``"nan"``, ``"inf"`` and ``"-inf"``."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(item) for item in value]
    return value
