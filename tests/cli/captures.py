"""What the command line prints, in the pages: ``python -m tests.cli.captures`` writes it anew.

In these pages every block of the language ``console`` is run from top to bottom, after the Python blocks before it, in
an empty folder and in a pseudo terminal of 80 columns. A line that begins with ``$ `` is a command for bash; what is
below it, to the next one, is what the terminal showed in the end, without its colours.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from tests.cli.pseudo_terminal import ROOT, see
from tests.test_docs import python_blocks

DOCS = ROOT / "docs"
PAGES = [
    DOCS / "how-to" / "inspect-a-file.md",
    DOCS / "how-to" / "convert-a-file.md",
    DOCS / "reference" / "command-line.md",
]

COLUMNS = 80

_CONSOLE = re.compile(r"^```console\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def captured(page: Path) -> str:
    """The text of a page, its captures made anew in the current folder."""
    text = page.read_text("utf-8")
    pending = [(text.count("\n", 0, match.start()) + 1, match) for match in _CONSOLE.finditer(text)]
    blocks = {block.line: block for block in python_blocks(page.name, text)}
    namespace: dict[str, object] = {}
    found: dict[re.Match[str], str] = {}
    for line in sorted([*blocks, *(line for line, _ in pending)]):
        if line in blocks:
            blocks[line].execute(namespace)
        for at, match in pending:
            if at == line:
                found[match] = f"```console\n{''.join(_run(match[1]))}```"
    return _CONSOLE.sub(lambda match: next(text for each, text in found.items() if each.span() == match.span()), text)


def _run(block: str) -> Iterator[str]:
    for line in block.splitlines():
        if line.startswith("$ "):
            function = f'orthoserde() {{ {shlex.quote(sys.executable)} -m orthoserde "$@"; }}'
            seen = see(["bash", "-c", f"{function}; {line[2:]}"], columns=COLUMNS, cwd=Path.cwd())
            shown = "".join(f"{each.rstrip()}\n" for each in seen.text.splitlines())
            yield f"{line}\n{shown}"


def main() -> None:
    """Write the pages."""
    for page in PAGES:
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            try:
                with torch.random.fork_rng(devices=[]):
                    text = captured(page)
            finally:
                os.chdir(ROOT)
        page.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
