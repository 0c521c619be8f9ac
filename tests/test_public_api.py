"""The public face: its names, its signatures and its examples. `typing/public_api.py` has the type checker's side."""

from __future__ import annotations

import ast
import dataclasses
import doctest
import importlib
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import orthoserde
from orthoserde import errors
from orthoserde.folder import SaveArguments
from orthoserde.integrations import loreft
from tests.public_surface import PINNED, public, surface

ROOT = Path(__file__).parent.parent

ERRORS = {
    "AdapterError": RuntimeError,
    "BackgroundSaveError": RuntimeError,
    "CanonicalizeError": RuntimeError,
    "CheckpointNotFoundError": FileNotFoundError,
    "CommitUncertainError": OSError,
    "ConfigError": ValueError,
    "DamagedFileError": ValueError,
    "FileAccessError": OSError,
    "FileFormatError": ValueError,
    "FormatVersionError": ValueError,
    "IncompatibleModelError": RuntimeError,
    "LoadInterruptedError": RuntimeError,
    "MissingPackageError": ImportError,
    "OrthoserdeError": Exception,
    "ProofError": RuntimeError,
    "RegistrationError": ValueError,
    "TornSaveError": RuntimeError,
    "UnsupportedModuleError": RuntimeError,
}

#: What users call; the rest are what these return, raise or take.
FUNCTIONS = {
    "bake_",
    "build",
    "canonicalize_",
    "convert",
    "diagnose",
    "inspect",
    "load",
    "orthogonal",
    "parametrized_tensors",
    "prove",
    "register",
    "save",
    "verify",
}


def test_the_public_surface_is_the_pinned_one() -> None:
    assert surface() == PINNED.read_text(encoding="utf-8"), "python -m tests.public_surface writes it anew"


def test_every_public_name_is_there_and_pinned() -> None:
    assert len(set(orthoserde.__all__)) == len(orthoserde.__all__)
    assert {f"orthoserde.{name}" for name in orthoserde.__all__} <= {name for name, _ in public()}
    called = {name for name in orthoserde.__all__ if inspect.isroutine(getattr(orthoserde, name))}
    assert called == FUNCTIONS
    assert {
        name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)
    } == {
        *ERRORS,
        "LegacyCheckpointWarning",
        "TrainingTrapWarning",
    }


def test_everything_public_is_annotated() -> None:
    for name, value in public():
        if not inspect.isclass(value) and callable(value):
            signature = inspect.signature(value)
            annotations = [parameter.annotation for parameter in signature.parameters.values()]
            assert inspect.Parameter.empty not in [*annotations, signature.return_annotation], name


@pytest.mark.parametrize("name", sorted(ERRORS))
def test_every_error_is_of_the_family_and_of_the_builtin_users_catch(name: str) -> None:
    error = getattr(orthoserde, name)
    assert issubclass(error, orthoserde.OrthoserdeError)
    assert issubclass(error, ERRORS[name])


def test_fidelities_are_ordered() -> None:
    assert orthoserde.Fidelity.EXACT > orthoserde.Fidelity.UNVERIFIED > orthoserde.Fidelity.INFERENCE
    assert str(orthoserde.Fidelity.EXACT) == "EXACT"


@pytest.mark.parametrize(
    "name", [name for name in orthoserde.__all__ if name not in ("__version__", "default_registry")]
)
def test_everything_public_has_a_docstring(name: str) -> None:
    assert inspect.getdoc(getattr(orthoserde, name))


PUBLIC: dict[str, Any] = dict(public())

#: Public functions, and methods of public classes, by their full names; of a class the constructor.
CALLS = {
    **{name: value for name, value in PUBLIC.items() if callable(value) and not inspect.isclass(value)},
    "orthoserde.Checkpoints": orthoserde.Checkpoints,
    "orthoserde.integrations.loreft.Adapter": loreft.Adapter,
    "orthoserde.integrations.loreft.LoReFT": loreft.LoReFT,
}


@pytest.mark.parametrize("name", CALLS)
def test_a_docstring_names_every_argument(name: str) -> None:
    text = inspect.getdoc(CALLS[name]) or ""
    for parameter in inspect.signature(CALLS[name]).parameters:
        assert f"\n    {parameter}: " in text


@pytest.mark.parametrize("name", [name for name, each in vars(orthoserde.Codec).items() if inspect.isfunction(each)])
def test_whoever_writes_a_codec_is_told_of_every_argument(name: str) -> None:
    method = getattr(orthoserde.Codec, name)
    if not name.startswith("_"):
        text = inspect.getdoc(method) or ""
        assert [each for each in list(inspect.signature(method).parameters)[1:] if f"\n    {each}: " not in text] == []


@pytest.mark.parametrize("name", [name for name, value in PUBLIC.items() if inspect.isclass(value)])
def test_the_docstring_of_a_value_names_every_attribute(name: str) -> None:
    value = PUBLIC[name]
    if dataclasses.is_dataclass(value):
        text = inspect.getdoc(value) or ""
        shown = [each.name for each in dataclasses.fields(value) if each.repr]
        assert [each for each in shown if f"\n    {each}: " not in text] == []


@pytest.mark.parametrize("name", PUBLIC)
def test_everything_public_has_an_example(name: str) -> None:
    value = PUBLIC[name]
    if isinstance(value, type) and issubclass(value, Exception) and value is not orthoserde.OrthoserdeError:
        return  # that of the family shows how one is caught; the reference of errors has what each is about
    if name in ("orthoserde.folder.SaveArguments", "orthoserde.integrations.pyreft.write"):
        return  # the one is the arguments of `save`, of the other docs/how-to has blocks that need pyreft
    if inspect.isclass(value) or callable(value):
        assert "Example:\n    >>> " in (inspect.getdoc(value) or "")


def test_a_checkpoints_save_takes_every_argument_of_a_save_but_that_of_folders() -> None:
    of_save = inspect.signature(orthoserde.save).parameters
    passed_on = {name for name, each in of_save.items() if each.kind is inspect.Parameter.KEYWORD_ONLY} - {
        "max_shard_size"
    }
    assert set(SaveArguments.__annotations__) == passed_on


def _modules() -> list[str]:
    return [info.name for info in pkgutil.walk_packages(orthoserde.__path__, "orthoserde.")]


def test_the_examples_in_docstrings_run() -> None:
    attempted = 0
    for name in _modules():
        if name != "orthoserde.__main__":
            result = doctest.testmod(importlib.import_module(name))
            assert result.failed == 0, name
            attempted += result.attempted
    assert attempted > 0


def test_grades_are_ordered() -> None:
    grades = orthoserde.Grade
    assert grades.BIT_EXACT > grades.WITHIN > grades.DETERMINISTIC > grades.DIVERGES
    assert [str(grade) for grade in grades] == ["diverges", "deterministic", "within", "bit-exact"]


def test_all_that_is_public_imports_nothing_heavy_beside_torch() -> None:
    code = (
        "import torch, sys; before = set(sys.modules); from orthoserde import *; "
        "print(sorted(set(sys.modules) - before))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    brought = {name.split(".")[0] for name in eval(found)}  # noqa: S307  # a list of strings that the line above printed
    assert brought <= {
        "orthoserde",
        "xxhash",
        "secrets",
        "hmac",
        "_hashlib",
        "json",
        "numpy",
        "torch",
        "base64",
        "_hmac",
    }


def test_importing_the_package_imports_none_of_its_rooms() -> None:
    code = (
        "import sys, orthoserde; print(sorted(name for name in sys.modules if name.startswith('orthoserde')), "
        "'torch' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.split("\n")[0] == "['orthoserde', 'orthoserde._version'] False"


def test_importing_the_package_takes_a_moment() -> None:
    code = "import time; before = time.process_time(); import orthoserde; print(time.process_time() - before)"
    taken = [
        float(subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout)
        for _ in range(3)
    ]
    # In seconds of the processor, which other processes do not change: a few milliseconds. Torch alone takes a second.
    assert min(taken) < 0.1


def test_a_type_checker_sees_each_name_where_it_is_found() -> None:
    tree = ast.parse(Path(orthoserde.__file__).read_text("utf-8"))
    seen = {
        alias.name: str(node.module).removeprefix("orthoserde.")
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("orthoserde.")
        for alias in node.names
    }
    assert seen.pop("__version__") == "_version"
    homes: dict[str, tuple[str, ...]] = vars(orthoserde)["_HOMES"]
    assert seen == {name: home for home, names in homes.items() for name in names}
    assert set(orthoserde.__all__) <= {*seen, "__version__"}


def test_rooms_are_found_without_being_imported_by_hand_and_nothing_else_is() -> None:
    code = "import orthoserde; print(orthoserde.transforms.bake.__name__, orthoserde.save.__name__, dir(orthoserde))"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.startswith("bake save [")
    assert "'canonicalize_'" in found.stdout
    with pytest.raises(AttributeError, match="has no attribute 'no_such_thing'"):
        getattr(orthoserde, "no_such_thing")  # noqa: B009
    assert not hasattr(orthoserde, "_no_such_thing")
