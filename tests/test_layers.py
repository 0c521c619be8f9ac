"""The floors of the house: imports go down, and private names of torch stay in one room."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "orthoserde"

FLOORS = {
    "arguments": 0,
    "errors": 0,
    "modes": 0,
    "_version": 0,
    "_torch": 0,
    "json_values": 0,
    "tensor_bytes": 0,
    "manifest": 0,
    "checkpoint": 0,
    "reports": 0,
    "wording": 0,
    "side_by_side": 0,
    "orthonormal": 1,
    "optimizers": 1,
    "registry": 1,
    "storage": 1,
    "parametrizations": 2,
    "parametrizing": 1,
    "transforms": 2,
    "charts": 3,
    "baking": 3,
    "traps": 3,
    "walk": 2,
    "keys": 2,
    "weights": 2,
    "audit": 3,
    "comparison": 3,
    "conversion": 4,
    "opening": 4,
    "outline": 1,
    "plots": 4,
    "watching": 1,
    "capture": 3,
    "integrations": 3,
    "metrics": 3,
    "restore": 3,
    "training": 3,
    "api": 4,
    "folder": 5,
    "proof": 4,
    "testing": 5,
    "__init__": 5,
    "cli": 6,
    "__main__": 6,
}

#: Arrows between rooms on one floor; each points one way.
SIDEWAYS = {
    ("arguments", "errors"),
    ("arguments", "wording"),
    ("modes", "_torch"),
    ("modes", "errors"),
    ("errors", "wording"),
    ("manifest", "wording"),
    ("json_values", "errors"),
    ("manifest", "errors"),
    ("manifest", "json_values"),
    ("reports", "wording"),
    ("restore", "training"),
    ("manifest", "tensor_bytes"),
    ("checkpoint", "_torch"),
    ("checkpoint", "errors"),
    ("checkpoint", "manifest"),
    ("checkpoint", "side_by_side"),
    ("checkpoint", "tensor_bytes"),
    ("keys", "walk"),
    ("integrations", "capture"),
    ("integrations", "charts"),
    ("integrations", "restore"),
    ("traps", "integrations"),
    ("baking", "integrations"),
    ("transforms", "keys"),
    ("transforms", "parametrizations"),
    ("weights", "parametrizations"),
    ("weights", "walk"),
    ("__init__", "folder"),
    ("proof", "api"),
    ("proof", "opening"),
    ("api", "opening"),
    ("conversion", "opening"),
    ("transforms", "weights"),
    ("walk", "parametrizations"),
    ("__main__", "cli"),
}


def _sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def _room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: a relative import"
            assert node.module is not None
            # `from orthoserde import storage` imports a room, `from orthoserde.walk import Slot` a name of one.
            if node.module == "orthoserde":
                yield from (f"orthoserde.{alias.name}" for alias in node.names)
            else:
                yield node.module


def test_every_room_has_a_floor() -> None:
    assert {_room(path) for path in _sources()} == set(FLOORS)


@pytest.mark.parametrize("path", _sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down_or_along_a_one_way_arrow(path: Path) -> None:
    room = _room(path)
    for name in _imports(path):
        parts = name.split(".")
        if parts[0] != "orthoserde" or parts[1] == room:
            continue
        other = parts[1]
        assert other in FLOORS, f"{path.name} imports {name}"
        assert FLOORS[other] < FLOORS[room] or (room, other) in SIDEWAYS, (
            f"{path.name} imports {name}, which is not below"
        )


def test_arrows_along_a_floor_have_no_way_back() -> None:
    for room, other in SIDEWAYS:
        assert FLOORS[room] == FLOORS[other]
        assert (other, room) not in SIDEWAYS


def test_every_arrow_along_a_floor_is_taken() -> None:
    taken = {(_room(path), name.split(".")[1]) for path in _sources() for name in _imports(path) if "." in name}
    assert taken >= SIDEWAYS


@pytest.mark.parametrize("path", _sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_one_room_uses_private_names_of_others(path: Path) -> None:
    if _room(path) == "_torch":
        return
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            owner = node.value
            assert isinstance(owner, ast.Name), f"{path.name}:{node.lineno}: {node.attr}"
            assert owner.id in {"self", "cls", "fields"}, f"{path.name}:{node.lineno}: {owner.id}.{node.attr}"


@pytest.mark.parametrize("path", _sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_is_imported_by_a_name_from_elsewhere(path: Path) -> None:
    """A file never causes an import: no code of the package can import by a computed name."""
    for name in _imports(path):
        if path == PACKAGE / "__init__.py" and name.split(".")[0] == "importlib":
            continue  # for the rooms of this package, by names that code outside has written down
        if (path.name, name) == ("torch_files.py", "pickle"):
            continue  # for the name of the error that torch's restricted unpickler raises
        assert name.split(".")[0] not in {"importlib", "pickle", "runpy", "pkgutil"}, f"{path.name} imports {name}"
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in {"__import__", "eval", "exec", "compile"}, f"{path.name}:{node.lineno}"
