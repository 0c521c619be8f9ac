"""The command line in a real pseudo terminal and in pipes: colours, widths, bars, interrupts, readers that go away."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn
from torch.nn.utils.parametrizations import orthogonal

import orthoserde as library

if sys.platform == "win32":
    pytest.skip("there are no pseudo terminals", allow_module_level=True)

from tests.cli.pseudo_terminal import COLOURS, ROOT, orthoserde, see


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("files") / "m.safetensors"
    layers = [nn.Sequential(orthogonal(nn.Linear(8, 4), orthogonal_map="cayley"), nn.Linear(4, 8)) for _ in range(12)]
    library.save(nn.ModuleDict({"layers": nn.ModuleList(layers), "ключ": nn.Linear(2, 2)}), path)
    return path


def piped(*arguments: str | Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[bytes]:
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **(env or {})}
    variables.pop("COLUMNS", None)
    return subprocess.run(orthoserde(*arguments), capture_output=True, env=variables, check=False)


class TestColours:
    def test_a_terminal_gets_colours_and_a_tree(self, path: Path) -> None:
        seen = see(orthoserde("inspect", path))
        assert seen.code == 0
        assert COLOURS.search(seen.raw)
        assert "├── " in seen.text
        assert "0..11  (12 alike)" in seen.text
        assert "\x1b" not in seen.text  # nothing but colours

    def test_a_pipe_gets_plain_text(self, path: Path) -> None:
        done = piped("inspect", path)
        assert done.returncode == 0
        assert b"\x1b" not in done.stdout
        assert "├" not in done.stdout.decode()
        assert "  layers\n    0..11  (12 alike)" in done.stdout.decode()

    def test_no_color_is_honoured(self, path: Path) -> None:
        seen = see(orthoserde("verify", path), env={"NO_COLOR": "1"})
        assert set(COLOURS.findall(seen.raw)) <= {f"\x1b[{code}m" for code in ("0", "1", "2")}  # bold and faint

    def test_the_c_locale_gets_ascii(self, path: Path) -> None:
        seen = see(orthoserde("inspect", path), env={"LANG": "C"})
        assert seen.code == 0
        assert seen.raw.isascii()
        assert "|-- layers" in seen.text
        assert r"\u043a\u043b\u044e\u0447" in seen.text

    def test_an_encoding_that_lacks_a_letter_gets_its_escape(self, path: Path) -> None:
        done = piped("inspect", path, env={"PYTHONIOENCODING": "ascii"})
        assert rb"\u043a\u043b\u044e\u0447" in done.stdout


def test_lines_fit_the_terminal(path: Path) -> None:
    lines = see(orthoserde("verify", path), columns=60).text.splitlines()
    assert 50 < max(map(len, lines)) <= 60


class TestEnds:
    def test_a_reader_that_goes_away_is_no_error(self, path: Path) -> None:
        line = " ".join(f"'{each}'" for each in orthoserde("inspect", path))
        script = f"{line} | true; echo ${{PIPESTATUS[0]}}"
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
        assert (done.stdout, done.stderr) == ("0\n", "")

    def test_a_full_disk_is_one_line(self, path: Path) -> None:
        if not os.path.exists("/dev/full"):  # only Linux has it
            return
        with open("/dev/full", "w") as full:
            done = subprocess.run(
                orthoserde("inspect", path), stdout=full, stderr=subprocess.PIPE, cwd=ROOT, check=False
            )
        expected = b"orthoserde: the standard output cannot be written: No space left on device\n"
        assert (done.returncode, done.stderr) == (4, expected)

    def test_a_closed_output_is_no_traceback(self, path: Path) -> None:
        line = " ".join(f"'{each}'" for each in orthoserde("verify", path))
        done = subprocess.run(["bash", "-c", f"{line} >&-"], capture_output=True, text=True, cwd=ROOT, check=False)
        assert (done.returncode, done.stderr) == (0, "")


#: Slows every read of a file down, so that a second passes.
SLOW = """
import sys, time
from orthoserde.storage.open_file import OpenFile
plain = OpenFile._read_some
def slow(self, memory, position):
    if position:
        time.sleep(float(sys.argv[1]))
    return plain(self, memory[: 1 << 10], position)
OpenFile._read_some = slow
from orthoserde.__main__ import main
sys.exit(main(sys.argv[2:]))
"""


#: Imports a module after another for some seconds, in the middle of what is done.
IMPORTING = """
import sys, time, types
from orthoserde import audit
from orthoserde.__main__ import main
plain = audit.verify
def importing(*arguments):
    for i in range(20):
        sys.modules[f"module{i}"] = types.ModuleType(f"module{i}")
        time.sleep(0.15)
    return plain(*arguments)
audit.verify = importing
sys.exit(main(sys.argv[1:]))
"""


def slowly(seconds: float, *arguments: str | Path) -> list[str]:
    return [sys.executable, "-c", SLOW, str(seconds), *map(str, arguments)]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("large") / "m.safetensors"
    library.save(nn.Linear(64, 64), path)  # 17 reads
    return path


class TestProgress:
    @pytest.mark.parametrize("command", ["verify", "diff", "convert"])
    def test_a_bar_is_shown_after_a_second_and_taken_away(self, command: str, large: Path, tmp_path: Path) -> None:
        arguments: dict[str, list[str | Path]] = {
            "verify": [large],
            "diff": [large, large],
            "convert": [large, tmp_path / "x", "--to", "dense"],
        }
        seen = see(slowly(0.25, command, *arguments[command]))
        assert seen.code == 0
        label = {"verify": "verifying", "diff": "comparing", "convert": "converting"}[command]
        assert label in seen.raw
        assert label not in seen.text
        last = seen.raw.rpartition(label)[2]
        assert "\x1b[2K" in last  # the line is cleared
        assert "\x1b[?25h" in last  # and the cursor is back

    def test_imports_show_none(self, path: Path) -> None:
        seen = see([sys.executable, "-c", IMPORTING, "verify", str(path)])
        assert seen.code == 0
        assert "verifying" not in seen.raw

    def test_a_pipe_shows_none(self, large: Path) -> None:
        done = subprocess.run(slowly(0.1, "verify", large), capture_output=True, cwd=ROOT, check=True)
        assert not done.stderr
        assert b"verifying" not in done.stdout

    def test_ctrl_c_ends_with_130_and_no_half_file(self, large: Path, tmp_path: Path) -> None:
        seen = see(slowly(0.3, "convert", large, tmp_path / "x", "--to", "dense"), interrupt_at="converting")
        assert seen.code == 130
        assert "Traceback" not in seen.raw
        assert seen.raw.endswith("orthoserde: interrupted\r\n")
        assert "\x1b[?25h" in seen.raw
        assert not list(tmp_path.iterdir())


class TestWithoutThePackages:
    @pytest.mark.parametrize("missing", ["typer", "rich"])
    def test_one_line_says_what_to_install(self, missing: str, path: Path) -> None:
        code = f"import sys; sys.modules[{missing!r}] = None; from orthoserde.__main__ import main; sys.exit(main())"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
        assert done.returncode == 2
        assert done.stderr == 'orthoserde: the command line needs typer and rich: pip install "orthoserde[cli]"\n'
        assert not done.stdout

    def test_the_library_imports_neither(self) -> None:
        code = (
            "import sys, orthoserde, orthoserde.conversion, orthoserde.comparison, orthoserde.plots; "
            "sys.exit(bool({'typer', 'rich', 'matplotlib'} & set(sys.modules)))"
        )
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
