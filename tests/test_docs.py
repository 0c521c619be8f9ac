"""The Python blocks of README.md and of the pages under docs/ run as they stand.

The blocks of one page share a namespace and run from top to bottom in an empty folder, warnings being errors.
A block that cannot run here says why in its info string, and is only compiled; one that needs a package of its own
is only compiled where that is not installed. A block may be a file of its own, which later blocks find in that folder;
``run`` also runs it in a new process, by pytest if its name begins with ``test_``::

    ```python no-run needs a GPU
    ```python needs pyreft
    ```python file model.py
    ```python run train.py
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytestmark = pytest.mark.filterwarnings("error::orthoserde.TrainingTrapWarning")

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

FENCE = re.compile(r"(?P<indent> *)(?P<ticks>`{3,})(?P<info>[^`]*)")


@dataclass(frozen=True)
class Block:
    """A fenced Python block.

    Attributes:
        page: The page as messages name it.
        line: Number of the block's first line of code in the page, from 1.
        options: The info string after the language.
        source: The code, its indentation removed.
    """

    page: str
    line: int
    options: str
    source: str

    def execute(self, namespace: dict[str, object]) -> None:
        """Run the block in ``namespace``, or compile it if it is not to be run; fail with page and line."""
        mark, _, reason = self.options.partition(" ")
        if mark not in ("", "no-run", "needs", "file", "run") or (mark and not reason):
            expected = "'python', 'python no-run <reason>', 'python needs <package>', 'python file|run <name>'"
            pytest.fail(f"{self.page}:{self.line}: expected {expected}, got 'python {self.options}'")
        # The lines before the block keep the line numbers of tracebacks equal to those of the page.
        source = "\n" * (self.line - 1) + self.source
        try:
            code = compile(source, str(ROOT / self.page), "exec", dont_inherit=True)
            if mark in ("file", "run"):
                self._write(Path(reason), run=mark == "run")
            elif not mark or (mark == "needs" and importlib.util.find_spec(reason) is not None):
                exec(code, namespace)  # noqa: S102 - running the pages is what this module is for
        except Exception as error:
            line = _line_in_page(error, str(ROOT / self.page)) or self.line
            pytest.fail(f"{self.page}:{line}: {type(error).__name__}: {error}")

    def _write(self, path: Path, *, run: bool) -> None:
        """Make a file of the block, and perhaps run it."""
        path.write_text(self.source, encoding="utf-8")
        if run:
            how = ["-m", "pytest", "-q", "-W", "error"] if path.name.startswith("test_") else ["-W", "error"]
            env = {**os.environ, "PYTHONPATH": str(ROOT)}
            command = [sys.executable, *how, str(path)]
            done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
            if done.returncode:
                raise RuntimeError(f"{path} failed\n{done.stdout}\n{done.stderr}")


def _line_in_page(error: Exception, filename: str) -> int | None:
    """Return the line of the page that ``error`` points at, if it points there at all."""
    if isinstance(error, SyntaxError) and error.filename == filename:
        return error.lineno
    line = None
    traceback = error.__traceback__
    while traceback is not None:
        if traceback.tb_frame.f_code.co_filename == filename:
            line = traceback.tb_lineno
        traceback = traceback.tb_next
    return line


def python_blocks(page: str, text: str) -> list[Block]:
    """Return the fenced Python blocks of a Markdown page, from top to bottom."""
    blocks = []
    opening: re.Match[str] | None = None
    start = 0
    lines = text.splitlines()
    for number, line in enumerate(lines, start=1):
        fence = FENCE.fullmatch(line)
        if fence is None:
            continue
        if opening is None:
            opening, start = fence, number
        elif not fence["info"].strip() and len(fence["ticks"]) >= len(opening["ticks"]):
            language, _, options = opening["info"].strip().partition(" ")
            if language.lower() in ("py", "python", "python3"):
                source = textwrap.dedent("\n".join(lines[start : number - 1]))
                blocks.append(Block(page, start + 1, options.strip(), source + "\n"))
            opening = None
    if opening is not None:
        raise ValueError(f"{page}:{start}: this block is never closed")
    return blocks


BLOCKS = {
    name: blocks
    for name, path in ((path.relative_to(ROOT).as_posix(), path) for path in PAGES)
    if (blocks := python_blocks(name, path.read_text(encoding="utf-8")))
}


@pytest.mark.parametrize("page", BLOCKS)
def test_the_blocks_of_a_page_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A module of its own, so that classes defined in a block have a home, as they have in a user's script.
    module = ModuleType("page_" + re.sub(r"\W", "_", page))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng(devices=[]):
        for block in BLOCKS[page]:
            block.execute(vars(module))


def test_the_readme_has_code_that_runs() -> None:
    assert any(not block.options for block in BLOCKS["README.md"])


def test_a_failing_block_is_reported_with_its_page_and_line() -> None:
    page = "Text.\n\n```python\ndef halve(x):\n    return x / 0\n```\n\n- A\n  ```python\n  halve(1)\n  ```\n"
    first, second = python_blocks("page.md", page)
    namespace: dict[str, object] = {}
    first.execute(namespace)
    with pytest.raises(pytest.fail.Exception, match=r"^page\.md:5: ZeroDivisionError"):
        second.execute(namespace)


def test_a_block_that_is_not_python_is_reported_with_its_page_and_line() -> None:
    (block,) = python_blocks("page.md", "```python no-run needs a GPU\nfine = 1\nnot fine = 1\n```\n")
    with pytest.raises(pytest.fail.Exception, match=r"^page\.md:3: SyntaxError"):
        block.execute({})


def test_a_block_marked_no_run_is_not_run() -> None:
    (block,) = python_blocks("page.md", "```python no-run needs a GPU\n1 / 0\n```\n")
    block.execute({})


def test_a_block_that_needs_a_package_runs_where_it_is_installed() -> None:
    (absent,) = python_blocks("page.md", "```python needs no_such_package\n1 / 0\n```\n")
    absent.execute({})
    (present,) = python_blocks("page.md", "```python needs torch\n1 / 0\n```\n")
    with pytest.raises(pytest.fail.Exception, match=r"^page\.md:2: ZeroDivisionError"):
        present.execute({})


def test_a_block_that_is_a_file_is_written_and_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    halves = "```python file halves.py\ndef halve(x):\n    return x / 2\n```\n"
    runs = "```python run {}\nfrom halves import halve\ndef test_it():\n    assert halve(2) == {}\n{}\n```\n"
    for page in (halves, runs.format("test_it.py", 1, ""), runs.format("it.py", 1, "test_it()")):
        python_blocks("page.md", page)[0].execute({})
    for page in (runs.format("test_it.py", 3, ""), runs.format("it.py", 3, "test_it()")):
        with pytest.raises(pytest.fail.Exception, match=r"^page\.md:2: RuntimeError: (test_)?it\.py failed"):
            python_blocks("page.md", page)[0].execute({})


@pytest.mark.parametrize("options", ["no-run", "needs", "file", "run", "norun because", "title=example"])
def test_a_mark_without_a_reason_or_a_meaning_is_refused(options: str) -> None:
    (block,) = python_blocks("page.md", f"```python {options}\n1\n```\n")
    with pytest.raises(pytest.fail.Exception, match=r"^page\.md:2: expected 'python', "):
        block.execute({})


def test_other_languages_and_nested_fences_are_left_alone() -> None:
    page = "````markdown\n```python\n1 / 0\n```\n````\n\n```bash\nls\n```\n"
    assert python_blocks("page.md", page) == []


def test_a_block_that_is_never_closed_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^page\.md:1: "):
        python_blocks("page.md", "```python\n1\n")
