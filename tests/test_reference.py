"""The reference is complete: no public name and no error is missing from its pages."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path

import pytest

from orthoserde import errors

REFERENCE = Path(__file__).resolve().parent.parent / "docs" / "reference"

DOCUMENTED = re.findall(
    r"^\.\. (?:auto\w+|py:\w+):: ([\w.]+)",
    "\n".join(page.read_text(encoding="utf-8") for page in sorted(REFERENCE.rglob("*.md"))),
    flags=re.MULTILINE,
)

#: A row of the table of errors: class, what else it is, when it is raised, what to do.
ROW = re.compile(r"^\| `(\w+)` \(([^)]+)\) \| (.+?) \| (.+?) \|$", flags=re.MULTILINE)


def table_of_errors() -> dict[str, tuple[str, str, str]]:
    rows = ROW.findall((REFERENCE / "errors.md").read_text(encoding="utf-8"))
    return {name: (bases, when, remedy) for name, bases, when, remedy in rows}


def error_classes() -> dict[str, type[Exception]]:
    """Every exception and warning that ``orthoserde/errors.py`` defines."""
    classes = inspect.getmembers(errors, inspect.isclass)
    return {name: cls for name, cls in classes if cls.__module__ == errors.__name__ and issubclass(cls, Exception)}


@pytest.mark.parametrize("module", ["orthoserde", "orthoserde.integrations.loreft"])
def test_every_public_name_is_in_the_reference(module: str) -> None:
    names = {f"{module}.{name}" for name in importlib.import_module(module).__all__ if not name.startswith("__")}
    assert names - set(DOCUMENTED) == set()


def test_the_assertion_for_test_suites_is_in_the_reference() -> None:
    assert "orthoserde.testing.assert_continues" in DOCUMENTED


def test_the_reference_names_nothing_twice_and_nothing_that_is_not_there() -> None:
    assert len(DOCUMENTED) == len(set(DOCUMENTED))
    for name in DOCUMENTED:
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), name


def test_the_table_of_errors_has_every_class_once() -> None:
    rows = ROW.findall((REFERENCE / "errors.md").read_text(encoding="utf-8"))
    assert sorted(name for name, *_ in rows) == sorted(error_classes())


@pytest.mark.parametrize("name", sorted(error_classes()))
def test_the_table_of_errors_names_the_builtin_and_the_parent(name: str) -> None:
    cls = error_classes()[name]
    bases, when, remedy = table_of_errors()[name]
    named = set(re.findall(r"`(\w+)`", bases))
    parents = {base.__name__ for base in cls.__bases__ if base is not errors.OrthoserdeError}
    builtin = next(base.__name__ for base in cls.__mro__ if base.__module__ == "builtins")
    assert named == parents | {builtin}
    assert when.strip()
    assert remedy.strip()
