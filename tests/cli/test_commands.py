"""The commands: what they print, their exit codes, and one line for what cannot be read or done."""

from __future__ import annotations

import io
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils.parametrizations import orthogonal

import orthoserde
from orthoserde import conversion
from orthoserde.__main__ import main
from orthoserde.cli.app import To
from orthoserde.cli.terminal import is_terminal, wants_ascii
from tests.golden.models import FOLDER, MODELS
from tests.helpers import flip_bit

INSPECT_USERS = """\
users.safetensors
  size         8,648 bytes
  tensors      18 stored, 456 bytes
  written by   orthoserde 0.1.0.dev0, torch 2.13.0+cpu
  metadata     golden: users
               ключ: значение

model                    shape   dtype    bytes
  again
    bias                 ?       float32      0  tied, = chained.bias
    weight               ?       ?            0  tied, = chained.weight
  block
    golden>Block (version 2): names=["a","b"], width=3
    linear
      bias               3       float32     12  parameter
      weight             3 x 3   float32     36  parameter
  buffered
    bias                 4       float32     16  parameter
    num_batches_tracked  scalar  int64        8  buffer
    running_mean         ?       float32     20  buffer
      golden>Scaled (version 3): gain=2.0, note="é"
    running_var          4       float32     16  buffer
    weight               4       float32     16  parameter
  chained
    bias                 ?       float32     16  parameter
      __main__:Doubled, which was not registered
    weight               ?       ?          132  parameter
      torch>orthogonal: orthogonal_map="matrix_exp", shape=[4,4], use_trivialization=true
      golden>Scaled (version 3): gain=0.5, note="chained"
  several
    bias                 4       float32     16  parameter
    weight               ?       ?          168  parameter
      golden>Outer: no settings
    parametrizations
      weight
        0
          inner
            weight       3 x 3   float32     60  parameter
              torch>spectral_norm: dim=0, eps=1e-12, n_power_iterations=1
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

off its constraint
  recurrent.weight_hh_l0
      4 of 4 diagonal entries of its original are not +-1 (0.109375), which torch reads as integers,
      as after weight decay; load it, write the signs of the diagonal back, and give its original
      weight_decay=0
"""


ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(autouse=True)
def no_width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    orthoserde.save(nn.Sequential(orthogonal(nn.Linear(6, 4)), nn.Linear(4, 2)), tmp_path / "sound.safetensors")
    return tmp_path / "sound.safetensors"


@pytest.fixture
def trained(tmp_path: Path) -> tuple[Path, Path]:
    """A model, and the same a step later, with training state and other metadata."""
    torch.manual_seed(0)
    model = nn.Sequential(orthogonal(nn.Linear(16, 8)), nn.Linear(8, 4))
    orthoserde.save(model, tmp_path / "before", metadata={"run": "1"})
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.mul_(1.02 if i == 0 else 1.01)
    optimizer = torch.optim.Adam(model.parameters())
    orthoserde.save(model, tmp_path / "after", optimizer=optimizer, metadata={"run": "2"})
    return tmp_path / "before", tmp_path / "after"


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: str | Path) -> tuple[int, str, str]:
        code = main([str(each) for each in arguments])
        return code, *capsys.readouterr()

    return run


class TestInspect:
    def test_it_shows_what_a_golden_file_holds(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(FOLDER)
        assert run("inspect", "users.safetensors") == (0, INSPECT_USERS, "")

    def test_only_the_header_is_read(self, run: Run, sound: Path) -> None:
        flip_bit(sound, -1)
        assert run("inspect", sound)[0] == 0
        code, out, _ = run("inspect", sound, "--residuals")
        assert code == 0
        assert "residual" in out

    def test_a_file_of_another_library_says_so(self, run: Run, tmp_path: Path) -> None:
        path = tmp_path / "foreign.safetensors"
        save_file({"layers.10.weight": torch.zeros(2), "layers.2.weight": torch.zeros(3)}, path)
        _, out, _ = run("inspect", path)
        assert "another library: names, shapes and values, no configuration, no digests" in out
        assert out.index("  2\n") < out.index("  10\n")
        assert "parameter" not in out

    def test_many_tensors_do_not_flood(self, run: Run, tmp_path: Path) -> None:
        odd = {f"{'abcdefghij'[i % 10]}{i}.{'xyz'[i % 3]}": torch.zeros(i % 7) for i in range(10_000)}
        save_file(odd, tmp_path / "odd")
        save_file({f"l.{i}.w": torch.zeros(1) for i in range(10_000)}, tmp_path / "alike")
        _, out, _ = run("inspect", tmp_path / "odd")
        assert out.count("\n") < 220
        assert "more lines; --all shows them" in out
        _, out, _ = run("inspect", tmp_path / "alike")
        assert out.count("\n") < 15
        assert "0..9999  (10,000 alike)" in out
        _, out, _ = run("inspect", tmp_path / "alike", "--all")
        assert out.count("\n") > 20_000

    def test_training_state_has_a_section_of_its_own(self, run: Run) -> None:
        _, out, _ = run("inspect", FOLDER / "training.safetensors")
        model, _, training = out.partition("training state\n")
        assert "exp_avg" not in model
        assert ".rng" not in model
        assert "  optimizer    plain: Adam, groups: 1, parameters: 2\n" in training
        assert "  optimizer    rotations: SGD, groups: 2, parameters: 3\n" in training
        assert "  state        step: a value\n" in training
        assert "  generators   of torch, Python and NumPy\n" in training

    def test_a_picture_and_residuals(self, run: Run, sound: Path, tmp_path: Path) -> None:
        code, out, err = run("inspect", sound, "--plot", tmp_path / "p.png", "--residuals")
        assert (code, err) == (0, "")
        assert (tmp_path / "p.png").exists()
        assert "1 of 1 tensors" in out
        value = json.loads(run("inspect", sound, "--plot", tmp_path / "p.png", "--residuals", "--json")[1])
        assert value["plot"]["shown"] == ["0.weight"]
        assert value["verification"]["residuals"]["0.weight"] < 1e-5

    def test_a_picture_that_is_refused_is_3(self, run: Run, sound: Path, tmp_path: Path) -> None:
        before = sound.read_bytes()
        (tmp_path / "folder.png").mkdir()
        places = ["", sound, tmp_path, tmp_path / "p.jpg", tmp_path / "folder.png", tmp_path / "none" / "p.png"]
        if sys.platform != "win32":
            os.mkfifo(tmp_path / "fifo.png")
            places.append(tmp_path / "fifo.png")
        for place in places:
            code, out, err = run("inspect", sound, "--plot", place)
            assert (code, out) == (3, "")
            assert err.count("\n") == 1
            assert "checkpoint" not in err
            assert "previous file" not in err
        assert sound.read_bytes() == before

    def test_a_picture_is_refused_before_anything_is_computed(
        self, run: Run, sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("orthoserde.audit.verify", pytest.fail)
        assert run("inspect", sound, "--residuals", "--plot", tmp_path / "p.jpg")[0] == 3

    def test_where_there_is_nothing_to_draw_the_rest_is_shown_with_3(self, run: Run, tmp_path: Path) -> None:
        save_file({"x": torch.ones(2)}, tmp_path / "sd")
        _, shown, _ = run("inspect", tmp_path / "sd")
        code, out, err = run("inspect", tmp_path / "sd", "--plot", tmp_path / "p.png")
        assert (code, out) == (3, shown)
        assert err == f"orthoserde: {tmp_path / 'sd'}: no parametrized tensor to draw\n"
        code, out, _ = run("inspect", tmp_path / "sd", "--plot", tmp_path / "p.png", "--json")
        assert (code, json.loads(out)["plot"]) == (3, None)
        assert not (tmp_path / "p.png").exists()

    def test_residuals_say_what_is_wrong(self, run: Run) -> None:
        _, out, _ = run("inspect", FOLDER / "norms.safetensors", "--residuals")
        assert "OFF THE CONSTRAINT" in out
        assert out.endswith("NOT OK: orthoserde verify says more\n")

    def test_json_has_everything(self, run: Run) -> None:
        value = json.loads(run("inspect", FOLDER / "users.safetensors", "--json")[1])
        assert value["command"] == "inspect"
        assert len(value["tensors"]) == 18
        (block,) = value["modules"]
        assert block == {
            "path": "block",
            "kind": "golden>Block",
            "version": 2,
            "config": {"names": ["a", "b"], "width": 3},
        }
        assert value["metadata"] == {"golden": "users", "ключ": "значение"}
        assert {each["name"] for each in value["parametrized"]} >= {"chained.weight", "buffered.running_mean"}


class TestVerify:
    def test_it_shows_what_is_off_in_a_golden_file(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(FOLDER)
        assert run("verify", "norms.safetensors") == (1, VERIFY_NORMS, "")

    def test_damage_is_1(self, run: Run, sound: Path) -> None:
        assert run("verify", sound)[0] == 0
        flip_bit(sound, -1)
        code, out, err = run("verify", sound)
        assert (code, err) == (1, "")
        assert "NOT OK" in out
        assert "damaged tensors\n" in out
        code, out, _ = run("verify", sound, "--json")
        assert code == 1
        value = json.loads(out)
        assert (value["ok"], len(value["damaged"])) == (False, 1)

    def test_a_number_that_json_lacks_is_a_string(self, run: Run, tmp_path: Path) -> None:
        layer: Any = orthogonal(nn.Linear(4, 4))
        with torch.no_grad():
            layer.parametrizations.weight.original[0, 0] = float("nan")
        orthoserde.save(layer, tmp_path / "m")
        value = json.loads(run("verify", tmp_path / "m", "--json")[1], parse_constant=pytest.fail)
        assert value["residuals"]["weight"] == "nan"

    def test_those_off_their_constraint_are_always_shown(self, run: Run, tmp_path: Path) -> None:
        layers: list[Any] = [orthogonal(nn.Linear(2, 2)) for _ in range(150)]
        with torch.no_grad():
            layers[149].parametrizations.weight[0].base.mul_(2)
        orthoserde.save(nn.ModuleList(layers), tmp_path / "m")
        _, out, _ = run("verify", tmp_path / "m")
        assert "149.weight" in out
        assert "and 50 more; --all shows them" in out
        # Once more, with its cause.
        assert run("verify", tmp_path / "m", "--all")[1].count(".weight") == 151


class TestDiff:
    def test_the_same_is_0_and_different_is_1(self, run: Run, sound: Path, tmp_path: Path) -> None:
        code, out, err = run("diff", sound, sound)
        assert (code, err) == (0, "")
        assert "the same" in out
        torch.manual_seed(1)
        model = nn.Sequential(orthogonal(nn.Linear(6, 4)), nn.Linear(4, 2))
        orthoserde.save(model, tmp_path / "other")
        code, out, err = run("diff", sound, tmp_path / "other")
        assert (code, err) == (1, "")
        assert "on the manifold" in out
        assert "angle" in out
        code, out, _ = run("diff", sound, tmp_path / "other", "--json")
        assert code == 1
        value = json.loads(out)
        assert not value["same"]
        weight = next(each for each in value["tensors"] if each["name"] == "0.weight")
        assert weight["manifold"]["measure"] == "principal angles"
        assert weight["values"]["largest"] > 0

    def test_a_tolerance(self, run: Run, tmp_path: Path) -> None:
        save_file({"x": torch.ones(3)}, tmp_path / "a")
        save_file({"x": torch.ones(3) + 1e-6}, tmp_path / "b")
        assert run("diff", tmp_path / "a", tmp_path / "b")[0] == 1
        code, out, _ = run("diff", tmp_path / "a", tmp_path / "b", "--tolerance", "1e-5")
        assert code == 0
        assert "the same within 1e-05" in out
        assert "0 identical, 1 within the tolerance\n" in out
        assert "tensors within 1e-05 " in out
        assert "differ" not in out
        assert run("diff", tmp_path / "a", tmp_path / "b", "--tolerance", "-1")[0] == 2

    def test_what_differs_is_said_with_the_verdict(self, run: Run, trained: tuple[Path, Path]) -> None:
        code, out, _ = run("diff", *trained, "--tolerance", "10")
        assert code == 1
        assert "  verdict      different: metadata, training state; tensors the same within 10\n" in out
        assert "  tensors      0 identical, 4 within the tolerance\n" in out
        assert "tensors that differ" not in out
        code, out, _ = run("diff", *trained, "--tolerance", "0.012")
        assert code == 1
        assert "  verdict      different: tensors, metadata, training state\n" in out
        assert "tensors that differ" in out
        assert "tensors within 0.012" in out

    def test_the_model_alone(self, run: Run, trained: tuple[Path, Path]) -> None:
        code, out, _ = run("diff", *trained, "--tolerance", "10", "--model-only")
        assert code == 0
        assert "  verdict      the same within 10\n" in out
        assert "metadata and training state were not compared" in out
        assert run("diff", *trained, "--model-only")[0] == 1

    def test_json_says_what_made_the_verdict(self, run: Run, trained: tuple[Path, Path]) -> None:
        value = json.loads(run("diff", *trained, "--tolerance", "0.012", "--json")[1])
        assert (value["same"], value["model_only"]) == (False, False)
        assert value["differs_in"] == ["tensors", "metadata", "training"]
        near = [each["name"] for each in value["tensors"] if each["within_tolerance"]]
        assert value["within_tolerance"] == len(near)
        assert 0 < len(near) < len(value["tensors"]) == 4
        value = json.loads(run("diff", *trained, "--tolerance", "10", "--model-only", "--json")[1])
        assert (value["same"], value["model_only"], value["differs_in"]) == (True, True, [])
        assert (value["metadata"], value["training"]) == ({}, {})

    def test_large_integers_of_training_state_are_shown(self, run: Run, tmp_path: Path) -> None:
        for name, value in (("one", 2**64), ("two", str(2**64))):
            orthoserde.save(nn.Identity(), tmp_path / name, state={"n": value})
        code, out, _ = run("diff", tmp_path / "one", tmp_path / "two")
        assert code == 1
        assert re.search(r'^  n\s+18446744073709551616 \| "18446744073709551616"$', out, re.MULTILINE)
        code, out, _ = run("diff", tmp_path / "one", tmp_path / "two", "--json")
        assert (code, json.loads(out)["training"]) == (1, {"n": [2**64, str(2**64)]})


class TestConvert:
    def test_forms_are_those_of_the_library(self) -> None:
        assert tuple(form.value for form in To) == get_args(conversion.Form)

    def test_it_says_what_was_written(self, run: Run, sound: Path, tmp_path: Path) -> None:
        code, out, err = run("convert", sound, tmp_path / "x.pt", "--to", "torch")
        assert (code, err) == (0, "")
        assert "file of torch.save" in out
        value = json.loads(run("convert", sound, tmp_path / "y", "--to", "compact", "--json")[1])
        assert value["left_dense"] == ["0.weight"]
        assert value["target_bytes"] == (tmp_path / "y").stat().st_size

    @pytest.mark.parametrize("form", ["dense", "torch", "pyreft"])
    def test_a_refusal_is_3_and_one_line(self, form: str, run: Run, sound: Path) -> None:
        before = sound.read_bytes()
        code, out, err = run("convert", sound, sound, "--to", form, "--force")
        assert (code, out) == (3, "")
        assert err.startswith("orthoserde: ")
        assert err.count("\n") == 1
        assert "never written over" in err
        assert sound.read_bytes() == before

    def test_what_is_there_is_3_unless_forced(self, run: Run, sound: Path, tmp_path: Path) -> None:
        (tmp_path / "x").write_bytes(b"x")
        assert run("convert", sound, tmp_path / "x", "--to", "dense")[0] == 3
        assert (tmp_path / "x").read_bytes() == b"x"
        assert run("convert", sound, tmp_path / "x", "--to", "dense", "--force")[0] == 0

    def test_a_list_of_what_is_wrong_is_one_line(self, run: Run, tmp_path: Path) -> None:
        code, _, err = run("convert", FOLDER / "users.safetensors", tmp_path / "x", "--to", "baked")
        assert code == 3
        assert err.count("\n") == 1
        assert "\\n" not in err
        assert "load it into its model, in float32, and call orthoserde.bake_ on that: - " in err

    def test_a_folder_that_is_not_there_is_3(self, run: Run, sound: Path, tmp_path: Path) -> None:
        code, _, err = run("convert", sound, tmp_path / "none" / "x", "--to", "dense")
        assert code == 3
        assert err.count("\n") == 1
        assert err.endswith("/none; make it first: No such file or directory\n")

    def test_a_file_is_not_given_the_name_of_a_folder(self, run: Run, sound: Path, tmp_path: Path) -> None:
        code, _, err = run("convert", sound, f"{tmp_path}/out/", "--to", "dense")
        assert code == 3
        assert err.endswith(
            "out/: ends as the name of a folder does, and one file is written; give the name of a file\n"
        )
        assert not (tmp_path / "out").exists()

    def test_usage_is_said_in_clean_words(self, run: Run, sound: Path, tmp_path: Path) -> None:
        forms = "dense, compact, baked, hooks, torch, pyreft, pyreft-full"
        code, _, err = run("convert", sound, tmp_path / "x")
        assert code == 2
        assert f"Missing option '--to'. Choose from: {forms}. (" in err
        code, _, err = run("convert", sound, tmp_path / "x", "--to", "bogus")
        assert code == 2
        assert "Invalid value for '--to': 'bogus' is not one of 'dense', 'compact'" in err

    def test_a_source_that_cannot_be_read_is_2(self, run: Run, sound: Path, tmp_path: Path) -> None:
        flip_bit(sound, -1)
        code, out, err = run("convert", sound, tmp_path / "x", "--to", "dense")
        assert (code, out) == (2, "")
        assert "use another copy" in err
        assert run("convert", tmp_path / "none", tmp_path / "x", "--to", "dense")[0] == 2
        assert not (tmp_path / "x").exists()


def wrong_files(folder: Path, sound: Path) -> dict[str, Path]:
    """Whatever one may give by mistake or in bad faith."""
    found = {
        name: folder / name
        for name in ("text", "empty", "bytes", "truncated", "folder", "zip", "pickle", "odd\nname\x1b[2J")
    }
    found["text"].write_text("hello\n" * 100)
    found["empty"].write_bytes(b"")
    found["bytes"].write_bytes(b"\xff" * 100)
    found["truncated"].write_bytes(sound.read_bytes()[:-1])
    found["folder"].mkdir()
    found["zip"].write_bytes(b"PK\x03\x04" + b"x" * 50)
    found["pickle"].write_bytes(b"\x80\x04cos\nsystem\n(S'false'\ntR.")
    found["odd\nname\x1b[2J"].write_bytes(b"not a checkpoint")
    found["none"] = folder / "none"
    found["huge header"] = folder / "huge"
    found["huge header"].write_bytes((1 << 40).to_bytes(8, "little") + b"{}")
    found["loop"] = folder / "loop"
    found["loop"].symlink_to(found["loop"])
    found["too long"] = folder / ("x" * 300)
    if sys.platform != "win32":
        os.mkfifo(folder / "fifo")
        found["fifo"] = folder / "fifo"
        found["device"] = Path("/dev/null")
        if os.geteuid():
            found["permission"] = folder / "permission"
            found["permission"].write_bytes(sound.read_bytes())
            found["permission"].chmod(0)
    return found


@pytest.mark.parametrize("command", ["inspect", "verify", "diff", "diff b", "convert"])
def test_what_cannot_be_read_is_2_and_one_line(command: str, run: Run, sound: Path, tmp_path: Path) -> None:
    (tmp_path / "wrong").mkdir()
    for name, path in wrong_files(tmp_path / "wrong", sound).items():
        arguments: dict[str, list[Any]] = {
            "inspect": ["inspect", path],
            "verify": ["verify", path],
            "diff": ["diff", path, sound],
            "diff b": ["diff", sound, path],
            "convert": ["convert", path, tmp_path / "x", "--to", "dense"],
        }
        for options in ([], ["--json"]):
            code, out, err = run(*arguments[command], *options)
            assert (name, code, out) == (name, 2, "")
            assert err.startswith("orthoserde: ")
            assert err.endswith("\n")
            assert err[:-1].isprintable(), err
            assert "Traceback" not in err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["look", "a"],
        ["inspect"],
        ["verify", "a", "b"],
        ["inspect", "-x", "a"],
        ["convert", "a", "b"],
        ["convert", "a", "b", "--to", "\x1b[2Jx"],
        ["diff", "a", "b", "--tolerance", "x"],
        ["\x1b[2J\n"],
    ],
)
def test_wrong_usage_is_2_and_one_line(arguments: list[str], run: Run) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("orthoserde: ")
    assert err.count("\n") == 1
    assert err[:-1].isprintable()


def test_help_and_version_are_0(run: Run) -> None:
    for arguments in (["--help"], ["inspect", "--help"], ["convert", "--help"]):
        code, out, err = run(*arguments)
        assert (code, err) == (0, "")
        assert "Exit codes: 0 fine; 1 the answer is no" in out
    assert run("--version") == (0, f"orthoserde {orthoserde.__version__}\n", "")


@pytest.mark.parametrize("command", ["inspect", "verify", "diff", "convert"])
def test_the_reference_has_every_option(command: str, run: Run) -> None:
    page = (ROOT / "docs" / "reference" / "command-line.md").read_text("utf-8")
    section = page.partition(f"\n## {command}\n")[2].partition("\n## ")[0]
    documented = set(re.findall(r"^\| `(--[a-z-]+)", section, re.MULTILINE))
    _, out, _ = run(command, "--help")
    assert documented | {"--help"} == set(re.findall(r"--[a-z][a-z-]*", out))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("width", [60, 80, 133])
def test_lines_fit(width: int, name: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    for command in ("inspect", "verify"):
        _, out, err = run(command, FOLDER / f"{name}.safetensors")
        assert not err
        assert out.endswith("\n")
        assert not out.endswith("\n\n")
        for line in out.splitlines():
            assert len(line) <= width
            assert line == line.rstrip()


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, False),
        ({"LANG": "de_DE.UTF-8"}, False),
        ({"LANG": "C"}, True),
        ({"LANG": "POSIX", "LC_CTYPE": "C.UTF-8"}, True),  # as Python sets it then
        ({"LANG": "C", "LC_ALL": "C.UTF-8"}, False),
        ({"LANG": "de_DE.UTF-8", "LC_ALL": "C"}, True),
        ({"LANG": "C", "PYTHONIOENCODING": "utf-8"}, False),
    ],
)
def test_the_c_locale_is_known(variables: dict[str, str], expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LC_ALL", "LC_CTYPE", "LANG", "PYTHONIOENCODING"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert wants_ascii(io.TextIOWrapper(io.BytesIO(), "utf-8")) == expected
    assert wants_ascii(io.TextIOWrapper(io.BytesIO(), "latin-1"))


def test_a_dumb_terminal_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    assert is_terminal(Terminal())
    monkeypatch.setenv("TERM", "dumb")
    assert not is_terminal(Terminal())
    assert not is_terminal(None)
