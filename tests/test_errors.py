from __future__ import annotations

import copy
import errno
import inspect
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import orthoserde
from orthoserde import errors
from orthoserde.errors import LegacyCheckpointWarning, OrthoserdeError, Problem, TrainingTrapWarning
from orthoserde.wording import SHOWN_CHARACTERS

PROBLEMS = [
    Problem("layer.weight", "missing", "not in the file"),
    Problem("head.bias", "unexpected", "not in the model"),
    Problem("", "mismatch", "another class"),
    Problem("head.weight", "missing", "not in the file"),
]

#: One of each class, with the builtin that its users already catch.
EXAMPLES: list[tuple[OrthoserdeError, type[Exception]]] = [
    (errors.OrthoserdeError("what"), Exception),
    (errors.RegistrationError("what"), ValueError),
    (errors.ConfigError("what"), ValueError),
    (errors.AdapterError("what"), RuntimeError),
    (errors.UnsupportedModuleError("what", PROBLEMS), RuntimeError),
    (errors.CanonicalizeError("what", PROBLEMS), RuntimeError),
    (errors.TornSaveError("what"), RuntimeError),
    (errors.IncompatibleModelError("what", PROBLEMS), RuntimeError),
    (errors.FileFormatError("what"), ValueError),
    (errors.DamagedFileError("what"), ValueError),
    (errors.FormatVersionError("what", 3, 1), ValueError),
    (errors.FileAccessError(errno.EACCES, "what", "some/file"), OSError),
    (errors.CheckpointNotFoundError(errno.ENOENT, "what", "some/file"), FileNotFoundError),
    (errors.CommitUncertainError(errno.EIO, "what", "some/file"), OSError),
    (errors.BackgroundSaveError("what"), RuntimeError),
    (errors.LoadInterruptedError("what"), RuntimeError),
    (errors.MissingPackageError("what"), ImportError),
    (errors.ProofError("what"), RuntimeError),
]


def of_each(example: object) -> str:
    return type(example).__name__ if isinstance(example, Exception) else ""


def test_there_is_an_example_of_every_error() -> None:
    classes = {cls for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, OrthoserdeError)}
    assert {type(error) for error, _ in EXAMPLES} == classes


def test_every_error_is_public() -> None:
    assert {type(error) for error, _ in EXAMPLES} == {
        value
        for value in (getattr(orthoserde, name) for name in orthoserde.__all__)
        if inspect.isclass(value) and issubclass(value, OrthoserdeError)
    }


@pytest.mark.parametrize(("error", "builtin"), EXAMPLES, ids=of_each)
def test_an_error_is_of_the_family_and_the_builtin_it_promises(error: OrthoserdeError, builtin: type) -> None:
    assert isinstance(error, builtin)
    assert isinstance(error, OrthoserdeError)
    # And no other: who catches bad values must not catch a model that does not fit, or a disk that fails.
    for other in (RuntimeError, ValueError, OSError, LookupError, TypeError):
        assert issubclass(type(error), other) == issubclass(builtin, other)


@pytest.mark.parametrize("again", [*range(pickle.HIGHEST_PROTOCOL + 1), "copy", "deepcopy"])
@pytest.mark.parametrize(("error", "builtin"), EXAMPLES, ids=of_each)
def test_an_error_comes_through_a_pickle_with_its_attributes_and_text(
    error: OrthoserdeError, builtin: type, again: int | str
) -> None:
    if again == "copy":
        other = copy.copy(error)
    elif again == "deepcopy":
        other = copy.deepcopy(error)
    else:
        other = pickle.loads(pickle.dumps(error, protocol=int(again)))
    assert type(other) is type(error)
    assert str(other) == str(error)
    assert other.args == error.args
    assert vars(other) == vars(error)
    if isinstance(error, OSError):
        assert isinstance(other, OSError)
        assert (other.errno, other.strerror, other.filename) == (error.errno, error.strerror, error.filename)


def test_the_attributes_say_what_does_not_fit() -> None:
    error = errors.IncompatibleModelError("does not fit", PROBLEMS)
    assert error.problems == tuple(PROBLEMS)
    assert error.missing_keys == ["layer.weight", "head.weight"]
    assert error.unexpected_keys == ["head.bias"]
    assert errors.UnsupportedModuleError("cannot be saved", PROBLEMS).problems == tuple(PROBLEMS)
    version = errors.FormatVersionError("newer", 3, 1)
    assert (version.found, version.supported, str(version)) == (3, 1, "newer")


def test_the_attributes_of_a_file_error_are_those_of_an_oserror() -> None:
    error = errors.FileAccessError(errno.EACCES, "cannot open", "some/file")
    assert (error.errno, error.strerror, error.filename) == (errno.EACCES, "cannot open", "some/file")
    assert str(error) == f"[Errno {errno.EACCES}] cannot open: 'some/file'"


@pytest.mark.parametrize("cls", [errors.UnsupportedModuleError, errors.IncompatibleModelError])
def test_a_message_has_a_line_for_each_problem(
    cls: type[errors.UnsupportedModuleError] | type[errors.IncompatibleModelError],
) -> None:
    assert str(cls("does not fit", PROBLEMS)) == (
        "does not fit\n"
        "  - (model): another class\n"
        "  - head.bias: not in the model\n"
        "  - layer.weight: not in the file\n"
        "  - head.weight: not in the file"
    )
    assert str(cls("does not fit")) == "does not fit"
    assert cls("does not fit").problems == ()


@pytest.mark.parametrize("more", [0, 1, 60])
def test_a_message_shows_40_mismatches_and_the_attribute_holds_all(more: int) -> None:
    problems = [Problem(f"t{i}", "mismatch", "other") for i in range(40 + more)]
    error = errors.IncompatibleModelError("does not fit", problems)
    lines = str(error).splitlines()
    assert lines[:41] == ["does not fit", *(f"  - t{i}: other" for i in range(40))]
    assert lines[41:] == ([f"  - ... and {more} more mismatches (see the problems attribute)"] if more else [])
    assert len(error.problems) == 40 + more


@pytest.mark.parametrize("more", [0, 1, 60])
def test_a_message_counts_keys_that_are_on_one_side_only_and_the_attribute_holds_all(more: int) -> None:
    problems = [Problem(f"t{i}", "missing", "gone") for i in range(12 + more)]
    problems += [Problem(f"u{i}", "unexpected", "odd") for i in range(12 + more)]
    error = errors.IncompatibleModelError("does not fit", [*problems, Problem("w", "mismatch", "other")])
    odd, gone = ([f"  - {letter}{i}: {text}" for i in range(12)] for letter, text in (("u", "odd"), ("t", "gone")))
    rest = [
        [f"  - {more} more keys {where}"] if more else []
        for where in ("in the file, not in the model", "in the model, not in the file")
    ]
    assert str(error).splitlines() == ["does not fit", "  - w: other", *odd, *rest[0], *gone, *rest[1]]
    assert len(error.missing_keys) == len(error.unexpected_keys) == 12 + more


def test_a_problem_is_a_value() -> None:
    assert Problem("a", "missing", "b") == Problem("a", "missing", "b")
    assert len({Problem("a", "missing", "b"), Problem("a", "missing", "b"), Problem("a", "mismatch", "b")}) == 2
    assert pickle.loads(pickle.dumps(PROBLEMS)) == PROBLEMS


@pytest.mark.parametrize(("error", "_"), EXAMPLES)
def test_no_name_in_a_message_is_obeyed_by_a_terminal(error: OrthoserdeError, _: type[Exception]) -> None:
    evil = "a\x1b[2J\u202e\udcff"
    if isinstance(error, OSError):
        made: OrthoserdeError = type(error)(errno.EIO, evil, evil)
    elif isinstance(error, errors.FormatVersionError):
        made = errors.FormatVersionError(evil, 2, 1)
    else:
        made = type(error)(evil)
    assert str(made).replace("\n", "").isprintable()
    assert r"a\x1b[2J\u202e\udcff" in str(made)


def test_a_name_of_several_lines_makes_no_line_of_its_own() -> None:
    problem = Problem("a\n  - all is well", "mismatch", "another shape")
    assert str(problem) == r"a\n  - all is well: another shape"


def test_names_and_lines_that_nobody_reads_to_the_end_are_cut() -> None:
    problems = [Problem("n" * 10**6, "mismatch", "t" * 10**6)]
    shown = str(errors.IncompatibleModelError("m" * 10**6, problems))
    assert len(shown) < 3 * SHOWN_CHARACTERS
    assert "... (1000000 characters)" in shown
    assert errors.IncompatibleModelError("m", problems).problems[0].where == "n" * 10**6


def cayley() -> nn.Module:
    return orthoserde.orthogonal(nn.Linear(8, 4), "weight", "cayley")


def baked() -> nn.Module:
    model = cayley()
    orthoserde.bake_(model)
    return model


#: What the file holds, what it is loaded into, and what is warned of.
LOADS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], type[Warning]]] = {
    "a base in half precision": (lambda: cayley().half(), cayley, TrainingTrapWarning),
    "a model in half precision": (lambda: cayley().half(), lambda: cayley().half(), TrainingTrapWarning),
    "a computed weight": (baked, cayley, LegacyCheckpointWarning),
    "a plain tensor": (lambda: weight_norm(nn.Linear(8, 4)), lambda: nn.Linear(8, 4), LegacyCheckpointWarning),
}


@pytest.mark.parametrize(("saved", "loaded", "expected"), LOADS.values(), ids=LOADS)
def test_a_warning_is_of_the_line_that_called_load(
    saved: Callable[[], nn.Module], loaded: Callable[[], nn.Module], expected: type[Warning], tmp_path: Path
) -> None:
    state = {key: value.contiguous() for key, value in saved().state_dict().items()}
    safetensors.torch.save_file(state, tmp_path / "m")
    model = loaded()
    load: Any = lambda: orthoserde.load(model, tmp_path / "m")  # noqa: E731 - it stands on one line
    with pytest.warns(expected) as caught:
        load()
    assert {(each.filename, each.lineno) for each in caught} == {(__file__, load.__code__.co_firstlineno)}


@pytest.mark.parametrize("way", ["save", "Checkpoints", "Checkpoints without waiting"])
def test_a_warning_is_of_the_line_that_called_save(way: str, tmp_path: Path) -> None:
    model = cayley().half()
    checkpoints = orthoserde.Checkpoints(tmp_path / "folder")
    save: Any = {
        "save": lambda: orthoserde.save(model, tmp_path / "m"),
        "Checkpoints": lambda: checkpoints.save(1, model),
        "Checkpoints without waiting": lambda: checkpoints.save(1, model, wait=False),
    }[way]
    with pytest.warns(TrainingTrapWarning) as caught:
        save()
    checkpoints.close()
    assert {(each.filename, each.lineno) for each in caught} == {(__file__, save.__code__.co_firstlineno)}
