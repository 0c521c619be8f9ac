"""Commands in a pseudo terminal, as a person sees them."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import struct
import sys
import termios
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent

#: What sets colours; whatever else begins with an escape moves the cursor or clears something.
COLOURS = re.compile(r"\x1b\[[0-9;]*m")

#: What moves or clears, and the text between: an escape that is not known is text, and so is seen.
_TOKENS = re.compile(r"\r|\n|\x1b\[2K|\x1b\[1A|\x1b\[\?25[lh]|\x1b?[^\r\n\x1b]+")

#: Seconds after which a command is taken to hang.
PATIENCE = 120.0


@dataclass(frozen=True)
class Seen:
    """What a command left on the screen, and its exit code."""

    code: int
    raw: str

    @property
    def text(self) -> str:
        """The screen in the end, without colours: what was cleared or written over is gone."""
        lines, row, column = [""], 0, 0
        for token in _TOKENS.findall(COLOURS.sub("", self.raw)):
            if token == "\r":
                column = 0
            elif token == "\n":
                row += 1
                lines += [""] * (row + 1 - len(lines))
            elif token == "\x1b[2K":
                lines[row] = ""
            elif token == "\x1b[1A":
                row -= 1
            elif token not in ("\x1b[?25l", "\x1b[?25h"):  # the cursor is hidden and shown
                lines[row] = lines[row][:column].ljust(column) + token + lines[row][column + len(token) :]
                column += len(token)
        return "\n".join(line.rstrip() for line in lines)


def see(
    command: Sequence[str],
    *,
    columns: int = 80,
    cwd: Path = ROOT,
    env: Mapping[str, str] | None = None,
    interrupt_at: str | None = None,
) -> Seen:
    """Run a command in a pseudo terminal of its own.

    Args:
        command: The program and its arguments.
        columns: Width of the terminal.
        cwd: Where it runs.
        env: Variables beside those of this process; the empty string removes one.
        interrupt_at: When this is on the screen, Ctrl-C is typed.
    """
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color", "LANG": "C.UTF-8", **(env or {})}
    for name in ("COLUMNS", "NO_COLOR", "LC_ALL", "LC_CTYPE", "FORCE_COLOR"):
        if name not in (env or {}):
            variables.pop(name, None)
    variables = {name: value for name, value in variables.items() if value}
    main, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            os.close(main)
            os.chdir(cwd)
            os.login_tty(child) if hasattr(os, "login_tty") else _login(child)
            os.execvpe(command[0], list(command), variables)
        os._exit(127)
    os.close(child)
    try:
        seen = _read(main, interrupt_at)
    finally:
        os.close(main)
    return Seen(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), seen)


def _login(child: int) -> None:
    os.setsid()
    fcntl.ioctl(child, termios.TIOCSCTTY, 0)
    for descriptor in range(3):
        os.dup2(child, descriptor)
    if child > 2:
        os.close(child)


def _read(main: int, interrupt_at: str | None) -> str:
    found = b""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if select.select([main], [], [], 1.0)[0]:
            try:
                part = os.read(main, 1 << 16)
            except OSError:  # the other side is closed
                break
            if not part:
                break
            found += part
            if interrupt_at is not None and interrupt_at.encode() in found:
                interrupt_at = None
                os.write(main, b"\x03")
    else:
        raise TimeoutError(f"still running after {PATIENCE} s: {found[-500:]!r}")
    return found.decode("utf-8", "backslashreplace")


def orthoserde(*arguments: str | Path) -> list[str]:
    """The command line of this Python."""
    return [sys.executable, "-m", "orthoserde", *map(str, arguments)]
