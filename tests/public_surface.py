"""What of the package is public, as text: names, bases, parameters with their defaults, and annotations.

`python -m tests.public_surface` writes it to tests/public_surface.txt. A change of that file is a change for users, and
goes into the changelog.
"""

from __future__ import annotations

import dataclasses
import enum
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import orthoserde
from orthoserde import api, conversion, errors, folder, reports, restore, testing
from orthoserde.folder import record
from orthoserde.integrations import loreft, pyreft

PINNED = Path(__file__).with_suffix(".txt")

#: Names of annotations that stand for strings.
CHOICES = {
    "Base": api.Base,
    "Code": reports.Code,
    "Form": conversion.Form,
    "Legacy": restore.Legacy,
    "Mode": record.Mode,
    "ProblemKind": errors.ProblemKind,
}


def public() -> Iterator[tuple[str, object]]:
    """Everything that users import, by its full name."""
    for name in orthoserde.__all__:
        yield f"orthoserde.{name}", getattr(orthoserde, name)
    yield "orthoserde.folder.SaveArguments", folder.SaveArguments
    for name in loreft.__all__:
        yield f"orthoserde.integrations.loreft.{name}", getattr(loreft, name)
    yield "orthoserde.integrations.pyreft.write", pyreft.write
    yield "orthoserde.testing.assert_continues", testing.assert_continues


def _annotation(value: object) -> str:
    value = getattr(value, "__forward_arg__", value)
    return value if isinstance(value, str) else inspect.formatannotation(value)


def _signature(function: Any, *, bound: bool = False) -> str:
    signature = inspect.signature(function)
    parts: list[str] = []
    kinds = inspect.Parameter
    starred = False
    parameters = list(signature.parameters.values())[1 if bound else 0 :]
    for i, parameter in enumerate(parameters):
        if parameter.kind is kinds.KEYWORD_ONLY and not starred:
            parts.append("*")
            starred = True
        starred |= parameter.kind is kinds.VAR_POSITIONAL
        stars = "*" if parameter.kind is kinds.VAR_POSITIONAL else "**" if parameter.kind is kinds.VAR_KEYWORD else ""
        text = f"{stars}{parameter.name}"
        if parameter.annotation is not kinds.empty:
            text += f": {_annotation(parameter.annotation)}"
        if parameter.default is not kinds.empty:
            text += f" = {parameter.default!r}"
        parts.append(text)
        last_positional = i + 1 == len(parameters) or parameters[i + 1].kind is not kinds.POSITIONAL_ONLY
        if parameter.kind is kinds.POSITIONAL_ONLY and last_positional:
            parts.append("/")
    result = "" if signature.return_annotation is kinds.empty else f" -> {_annotation(signature.return_annotation)}"
    return f"({', '.join(parts)}){result}"


def _members(cls: type) -> Iterator[str]:
    if issubclass(cls, enum.Enum):
        yield from (f"{member.name} = {member.value!r}" for member in cls)
        return
    annotations = vars(cls).get("__annotations__", {})
    if not dataclasses.is_dataclass(cls):  # those are parameters of its constructor
        yield from (f"{name}: {_annotation(each)}" for name, each in annotations.items() if not name.startswith("_"))
    for name, member in vars(cls).items():
        if name.startswith("_") and name not in ("__init__", "__iter__", "__len__", "__getitem__", "__contains__"):
            continue
        if name == "__init__" and (dataclasses.is_dataclass(cls) or getattr(cls, "_is_protocol", False)):
            continue
        if isinstance(member, property):
            yield f"{name}{_signature(member.fget, bound=True)}  # property"
        elif isinstance(member, (classmethod, staticmethod)):
            sort = type(member).__name__
            yield f"{name}{_signature(member.__func__, bound=sort == 'classmethod')}  # {sort}"
        elif inspect.isfunction(member):
            yield f"{name}{_signature(member, bound=True)}"


def surface() -> str:
    """The text, one line for each thing."""
    lines: list[str] = []
    for name, value in public():
        if inspect.isclass(value):
            bases = ", ".join(base.__name__ for base in value.__bases__ if base is not object)
            lines.append(f"class {name}({bases})" if bases else f"class {name}")
            if dataclasses.is_dataclass(value):
                lines.append(f"    {_signature(value.__init__, bound=True)}")
            lines += [f"    {member}" for member in _members(value)]
        elif callable(value):
            lines.append(f"def {name}{_signature(value)}")
        else:
            lines.append(f"{name}: {'type' if hasattr(value, '__args__') else type(value).__name__}")
    for name, choice in CHOICES.items():
        lines.append(f"{name} = {' | '.join(map(repr, get_args(choice)))}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PINNED.write_text(surface(), encoding="utf-8")
