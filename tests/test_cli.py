"""`python -m orthoserde`: its tables, its exit codes, and one line for what it cannot read."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils.parametrizations import orthogonal

import orthoserde
from orthoserde.cli import main
from orthoserde.describe import SHOWN, WIDTH, describe, describe_verification, squeeze
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
from orthoserde.reports import VerifyReport
from tests.golden.models import FOLDER, MODELS
from tests.helpers import flip_bit
from tests.test_docs import python_blocks

ROOT = Path(__file__).parent.parent

INSPECT_USERS = """\
users.safetensors
  file         8,648 bytes
  tensors      18 stored, 456 bytes
  written by   orthoserde 0.1.0.dev0, torch 2.13.0+cpu
  metadata     golden: users
               ключ: значение

parametrized tensors  shape  dtype    bytes
  chained = again
    weight            ?      ?          132  parameter
      torch>orthogonal: orthogonal_map="matrix_exp", shape=[4,4], use_trivialization=true
      golden>Scaled (version 3): gain=0.5, note="chained"
    bias              ?      float32     16  parameter
      __main__:Doubled, which was not registered
  buffered
    running_mean      ?      float32     20  buffer
      golden>Scaled (version 3): gain=2.0, note="é"
  several
    weight            ?      ?          168  parameter
      golden>Outer: no settings
  several.parametrizations.weight.0.inner
    weight            3 x 3  float32     60  parameter
      torch>spectral_norm: dim=0, eps=1e-12, n_power_iterations=1

plain tensors                   shape   dtype    bytes
  block.linear.bias             3       float32     12  parameter
  block.linear.weight           3 x 3   float32     36  parameter
  buffered.bias                 4       float32     16  parameter
  buffered.num_batches_tracked  scalar  int64        8  buffer
  buffered.running_var          4       float32     16  buffer
  buffered.weight               4       float32     16  parameter
  several.bias                  4       float32     16  parameter

tied tensors
  again.parametrizations.bias.original = chained.parametrizations.bias.original
  again.parametrizations.weight.0.base = chained.parametrizations.weight.0.base
  again.parametrizations.weight.1.shift = chained.parametrizations.weight.1.shift
  again.parametrizations.weight.original = chained.parametrizations.weight.original

modules of registered classes
  block: golden>Block (version 2): names=["a","b"], width=3
"""

VERIFY_NORMS = """\
norms.safetensors
  verdict      NOT OK
  digests      23 of 23 tensors match their digests
  constraints  0 of 1 measured tensors are on their constraint, largest residual 20

parametrized tensor              residual
weight_norm.weight                      -  no constraint to measure
weight_norm_dim.weight                  -  no constraint to measure
weight_norm_all.weight                  -  no constraint to measure
spectral_norm.weight                    -  no constraint to measure
spectral_norm_transposed.weight         -  no constraint to measure
spectral_norm_vector.weight             -  no constraint to measure
recurrent.weight_hh_l0                 20  OFF THE CONSTRAINT
"""


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    orthoserde.save(nn.Sequential(orthogonal(nn.Linear(6, 4)), nn.Linear(4, 2)), tmp_path / "sound.safetensors")
    return tmp_path / "sound.safetensors"


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "orthoserde", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, encoding="utf-8", check=False)


class TestProcess:
    """What only a process of its own shows; the rest is tested in this one, which is faster."""

    def test_a_sound_file_exits_with_0(self, sound: Path) -> None:
        done = run("verify", sound)
        assert (done.returncode, done.stderr) == (0, "")
        assert "verdict      ok" in done.stdout

    def test_an_unreadable_file_exits_with_2_and_one_line(self, tmp_path: Path) -> None:
        done = run("inspect", tmp_path / "none.safetensors")
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("orthoserde: ")
        assert done.stderr.count("\n") == 1
        assert "no such checkpoint" in done.stderr

    @pytest.mark.skipif(sys.platform == "win32", reason="a shell with pipes")
    def test_a_reader_that_goes_away_is_no_error(self, sound: Path) -> None:
        command = f"'{sys.executable}' -m orthoserde inspect '{sound}' | true; echo ${{PIPESTATUS[0]}}"
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT, check=True)
        assert (done.stdout, done.stderr) == ("0\n", "")


class TestOutput:
    def test_inspect_shows_what_a_golden_file_holds(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(FOLDER)
        assert main(["inspect", "users.safetensors"]) == 0
        assert capsys.readouterr() == (INSPECT_USERS, "")

    def test_verify_shows_what_is_off_in_a_golden_file(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(FOLDER)
        assert main(["verify", "norms.safetensors"]) == 1
        assert capsys.readouterr() == (VERIFY_NORMS, "")

    @pytest.mark.parametrize("name", MODELS)
    @pytest.mark.parametrize("command", ["inspect", "verify"])
    def test_lines_fit_a_terminal(self, command: str, name: str, capsys: pytest.CaptureFixture[str]) -> None:
        main([command, str(FOLDER / f"{name}.safetensors")])
        out, err = capsys.readouterr()
        assert not err
        assert out.endswith("\n")
        assert not out.endswith("\n\n")
        for line in out.splitlines():
            assert len(line) <= WIDTH
            assert line == line.rstrip()

    def test_a_file_of_another_library_says_so(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = tmp_path / "foreign.safetensors"
        save_file({"layers.10.weight": torch.zeros(2), "layers.2.weight": torch.zeros(2)}, path)
        assert main(["inspect", str(path)]) == 0
        out = capsys.readouterr().out
        assert "another library: names, shapes and values, no configuration, no digests" in out
        assert out.index("layers.2.weight") < out.index("layers.10.weight")
        assert "buffer" not in out
        assert main(["verify", str(path)]) == 0
        out = capsys.readouterr().out
        assert "ok, as far as it could be checked" in out
        assert "the file has no digests" in out

    def test_an_encoding_that_lacks_a_letter_gets_its_escape(self) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "orthoserde", "inspect", str(FOLDER / "users.safetensors")],
            capture_output=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONIOENCODING": "ascii"},
            check=True,
        )
        assert rb"\u043a\u043b\u044e\u0447" in done.stdout


def test_the_page_shows_what_the_commands_print(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (ROOT / "docs" / "how-to" / "inspect-a-file.md").read_text("utf-8")
    shown = re.findall(r"```bash\npython -m orthoserde (\w+) (\S+)[^\n]*\n```\n\n```text\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng(devices=[]):
        python_blocks("page", page)[0].execute({})
    assert [command for command, _, _ in shown] == ["inspect", "verify", "verify"]
    for i, (command, path, output) in enumerate(shown):
        if i == 2:
            flip_bit(tmp_path / path, -1)
        assert main([command, path]) == (0 if i < 2 else 1)
        assert _without_versions(capsys.readouterr().out) == _without_versions(output)


def _without_versions(text: str) -> str:
    """What depends neither on the versions of libraries, and so on the length of the header, nor on rounding."""
    text = re.sub(r"(file +|written by +).*", r"\1...", text)
    return re.sub(r"\d\.\de-\d\d", "...", text)


class TestExitCodes:
    def test_damage_is_1(self, sound: Path, capsys: pytest.CaptureFixture[str]) -> None:
        flip_bit(sound, -1)
        assert main(["verify", str(sound)]) == 1
        out, err = capsys.readouterr()
        assert "NOT OK" in out
        assert "damaged tensors\n" in out
        assert not err
        assert main(["inspect", str(sound)]) == 0  # it reads the header alone

    @pytest.mark.parametrize("command", ["inspect", "verify"])
    @pytest.mark.parametrize("content", [None, b"", b"not a checkpoint", b"\xff" * 100, "folder"])
    def test_what_cannot_be_read_is_2(
        self, command: str, content: bytes | str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = tmp_path / "odd\nname"
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content == "folder":
            path.mkdir()
        assert main([command, str(path)]) == 2
        out, err = capsys.readouterr()
        assert not out
        assert err.startswith("orthoserde: ")
        assert err.count("\n") == 1

    @pytest.mark.parametrize(
        "arguments", [[], ["look", "a"], ["inspect"], ["verify", "a", "b"], ["inspect", "-x", "a"]]
    )
    def test_wrong_usage_is_2(self, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2
        assert "usage: orthoserde" in capsys.readouterr().err

    def test_help_and_version_are_0(self, capsys: pytest.CaptureFixture[str]) -> None:
        for arguments in (["--help"], ["inspect", "--help"], ["--version"]):
            with pytest.raises(SystemExit) as stopped:
                main(arguments)
            assert stopped.value.code == 0
        assert orthoserde.__version__ in capsys.readouterr().out


class TestHostileNames:
    """A file may name anything anyhow; a table stays a table."""

    LONG = "blocks." * 60 + "weight"
    EVIL = "\x1b[2Jcleared\r\nline\u202e\udc80"

    def manifest(self) -> Manifest:
        shape = (2**40, *(1,) * 40)
        tensors = {name: TensorRecord("bfloat16", shape, shape, True) for name in (self.LONG, self.EVIL)}
        tensors |= {f"t{i}": TensorRecord("float32", (), (), False) for i in range(2 * SHOWN)}
        config: dict[str, JSON] = {self.EVIL: [self.LONG] * 1000, "n": None}
        links = tuple(
            ParametrizationRecord(kind, 2, config, self.EVIL if kind == OPAQUE else None, {})
            for kind in (OPAQUE, self.EVIL, "torch>orthogonal")
        )
        record = ParametrizedRecord(
            *(self.LONG, self.EVIL, (self.EVIL,), None, None, True, True), {"original": DENSE}, links
        )
        tensors[record.original_key("original")] = TensorRecord("int8", (3,), (1,), True)
        return Manifest(
            tensors=tensors,
            aliases={f"{self.LONG}{i}": self.LONG for i in range(2 * SHOWN)},
            parametrized=(record,),
            modules=tuple(ModuleRecord(f"{self.EVIL}{i}", self.EVIL, 9, config) for i in range(2 * SHOWN)),
            left_out=(self.LONG, self.EVIL),
            metadata={self.EVIL: self.LONG, self.LONG: self.EVIL},
            writer={self.EVIL: self.LONG},
        )

    def test_they_are_shortened_and_escaped(self) -> None:
        text = describe(self.manifest(), self.EVIL, 12)
        self.check(text)
        assert text.count(f"and {SHOWN:,} more") == 2
        assert f"and {SHOWN + 2:,} more" in text

    def test_those_of_a_report_are_too(self) -> None:
        report = VerifyReport(
            path=self.EVIL,
            has_configuration=True,
            digests=True,
            tensors=3,
            damaged=(self.LONG, self.EVIL),
            residuals={self.LONG: 0.5, self.EVIL: None},
            off_constraint=(self.LONG,),
            misfits={self.EVIL: self.LONG},
            not_measured={self.LONG: self.EVIL},
        )
        self.check(describe_verification(report))
        assert str(report).isascii()

    def check(self, text: str) -> None:
        for line in text.split("\n"):
            assert len(line) <= WIDTH
            assert line.isprintable()

    def test_a_shortened_name_keeps_both_ends(self) -> None:
        assert squeeze("abcdefghij", 10) == "abcdefghij"
        assert squeeze("abcdefghij", 8) == "ab...hij"
        assert all(len(squeeze("a" * 50, width)) <= max(width, 3) for width in range(50))


def test_training_state_has_a_section_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(__file__).parent / "golden" / "v1" / "training.safetensors"
    assert main(["inspect", str(path)]) == 0
    shown = capsys.readouterr().out
    plain, _, training = shown.partition("training state\n")
    assert "exp_avg" not in plain
    assert ".rng" not in plain
    assert "  optimizer    plain: Adam, groups: 1, parameters: 2\n" in training
    assert "  optimizer    rotations: SGD, groups: 2, parameters: 3\n" in training
    assert "  step         a value\n" in training
    assert "  generators   of torch, Python and NumPy\n" in training
