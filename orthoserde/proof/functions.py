"""Functions that another process can find by their names."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Mapping
from pathlib import PurePath
from types import ModuleType

from orthoserde.errors import ProofError

_VALUES = (type(None), bool, int, float, complex, str, bytes, PurePath)


def check_importable(value: object, argument: str) -> None:
    """Refuse what a new process could not find by its name.

    Args:
        value: Should be a function or class at the top level of a module, or a ``functools.partial`` of one whose
            arguments are plain values.
        argument: What it is called in messages.

    Raises:
        ProofError: It is something else; the error says what to do.
        TypeError: It cannot be called.
    """
    if not callable(value):
        raise TypeError(f"{argument}: expected a function, got {type(value).__name__}")
    if isinstance(value, functools.partial):
        check_importable(value.func, argument)
        for given in (*value.args, *value.keywords.values()):
            _check_value(given, argument)
        return
    name = getattr(value, "__qualname__", None)
    module = sys.modules.get(getattr(value, "__module__", None) or "")
    if name is None or module is None or _named(module, name) is not value:
        raise ProofError(
            f"{argument}: a new process cannot find {name or type(value).__qualname__!r} by its name; expected a "
            "function at the top level of a module, or a functools.partial of one; lambdas, functions within functions "
            "and bound methods are not: move it to the top level of a .py file"
        )
    if not _has_file(module):
        raise ProofError(
            f"{argument}: {name} is in {module.__name__}, which has no file that a new process could import, as in a "
            "notebook or at a prompt; write it to a .py file and import it from there"
        )


def _named(module: ModuleType, name: str) -> object:
    found: object = module
    for part in name.split("."):
        found = getattr(found, part, None)
    return found


def _has_file(module: ModuleType) -> bool:
    if getattr(module, "__spec__", None) is not None:
        return True
    file = getattr(module, "__file__", None)
    return file is not None and os.path.isfile(file)


def _check_value(value: object, argument: str) -> None:
    if isinstance(value, _VALUES):
        return
    if isinstance(value, Mapping):
        for item in (*value, *value.values()):
            _check_value(item, argument)
    elif isinstance(value, (list, tuple, set, frozenset)):
        for item in value:
            _check_value(item, argument)
    elif callable(value):
        check_importable(value, f"{argument}: an argument of the partial")
    else:
        raise ProofError(
            f"{argument}: a partial may hold numbers, strings, paths, and lists, tuples, sets and dicts of them, and "
            f"functions that a new process can import, got a {type(value).__qualname__}; make it within the function"
        )
