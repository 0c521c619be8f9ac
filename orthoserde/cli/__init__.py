"""The command line: arguments in, tables out. It needs typer and rich, which the library itself does not."""

from orthoserde.cli.app import main

__all__ = ["main"]
