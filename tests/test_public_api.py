"""The public face: its names, its signatures and its examples. `typing/public_api.py` has the type checker's side."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import orthoserde
from orthoserde.folder import SaveArguments

ROOT = Path(__file__).parent.parent

SIGNATURES = {
    "build": "(path, *, device=None, registry=None)",
    "save": (
        "(model, path, *, optimizer=None, state=None, rng=False, base='auto', include_weights=False, select=None, "
        "metadata=None, registry=None, max_shard_size=None, debug=None)"
    ),
    "load": (
        "(model, path, *, strict=True, optimizer=None, state=None, rng=False, reset=(), legacy='inference', "
        "reparametrize=True, device=None, verify=True, registry=None, debug=None)"
    ),
    "inspect": "(path)",
    "prove": "(path, make, step, *, reference=None, steps=3)",
    "verify": "(path, *, registry=None)",
    "register": "(kind, version=1, *, adapter=False)",
    "parametrized_tensors": "(model)",
    "diagnose": "(model, optimizer=None)",
    "convert": "(source, target, form, *, force=False, registry=None, progress=None)",
    "bake_": "(model, *, registry=None)",
    "canonicalize_": "(model, *, optimizer=None, reset_state=False)",
    "Checkpoints": "(folder, *, keep=3, mode='min', prefix='step')",
    "orthogonal": "(module, name='weight', orthogonal_map=None, *, use_trivialization=True, structured=False)",
}

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

VALUES = {
    "BakeReport",
    "CanonicalizeReport",
    "ConversionReport",
    "ChartReport",
    "Codec",
    "Difference",
    "Fidelity",
    "Finding",
    "Grade",
    "LegacyCheckpointWarning",
    "LoadReport",
    "Manifest",
    "ParametrizedTensor",
    "Problem",
    "Proof",
    "Registry",
    "SaveReport",
    "Severity",
    "TensorReport",
    "TrainingTrapWarning",
    "VerifyReport",
    "__version__",
    "default_registry",
}


def test_the_names_are_these() -> None:
    assert set(orthoserde.__all__) == SIGNATURES.keys() | ERRORS.keys() | VALUES
    assert all(hasattr(orthoserde, name) for name in orthoserde.__all__)


@pytest.mark.parametrize("name", sorted(SIGNATURES))
def test_the_signatures_are_these(name: str) -> None:
    signature = inspect.signature(getattr(orthoserde, name))
    assert all(parameter.annotation is not inspect.Parameter.empty for parameter in signature.parameters.values())
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()]
    assert str(inspect.Signature(bare)) == SIGNATURES[name]


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


@pytest.mark.parametrize(
    "function", ["save", "load", "inspect", "verify", "orthogonal", "canonicalize_", "Checkpoints", "prove", "diagnose"]
)
def test_a_docstring_names_every_argument(function: str) -> None:
    text = inspect.getdoc(getattr(orthoserde, function)) or ""
    for parameter in inspect.signature(getattr(orthoserde, function)).parameters:
        assert f"    {parameter}: " in text


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
