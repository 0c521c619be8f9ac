"""``python -m orthoserde``: arguments in, tables out."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import TextIO

from orthoserde import api
from orthoserde._version import __version__
from orthoserde.describe import describe, describe_verification
from orthoserde.errors import OrthoserdeError
from orthoserde.reports import printable

#: Exit codes: all is well; the file does not verify; wrong usage, or a file that cannot be read.
OK, NOT_OK, UNREADABLE = 0, 1, 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: The arguments, those of the process by default.

    Returns:
        The exit code: 0, 1 if the file does not verify, 2 if it cannot be read; that is then said in one line on the
        standard error.

    Raises:
        SystemExit: The usage is wrong (code 2), or help or the version was asked for (code 0).
    """
    arguments = _parser().parse_args(argv)
    try:
        if arguments.command == "inspect":
            manifest = api.inspect(arguments.file)
            _write(sys.stdout, describe(manifest, arguments.file, os.path.getsize(arguments.file)))
            return OK
        report = api.verify(arguments.file)
        _write(sys.stdout, describe_verification(report))
        return OK if report.ok else NOT_OK
    except (OrthoserdeError, OSError) as error:
        _write(sys.stderr, f"orthoserde: {printable(str(error))}")
        return UNREADABLE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="orthoserde", description="Look into checkpoints, without a model.")
    parser.add_argument("--version", action="version", version=f"orthoserde {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    what = "say what a file holds; only its header is read"
    commands.add_parser("inspect", help=what, description=what).add_argument("file", metavar="FILE")
    what = "check every byte of a file, and how far its computed tensors are from their constraints"
    commands.add_parser("verify", help=what, description=what).add_argument("file", metavar="FILE")
    return parser


def _write(stream: TextIO, text: str) -> None:
    encoding = stream.encoding or "utf-8"
    try:
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")
        stream.flush()
    except BrokenPipeError:
        # Whoever read has gone (`| head`). Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
