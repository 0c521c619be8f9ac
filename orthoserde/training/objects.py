"""The user's own state: schedulers, scalers, generators, counters."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from types import FunctionType
from typing import Any, cast

import torch
from torch.optim import Optimizer

from orthoserde.errors import ConfigError
from orthoserde.manifest import class_name
from orthoserde.manifest.training import StateRecord
from orthoserde.manifest.trees import check_text, encode_tree
from orthoserde.training.sources import Sources
from orthoserde.training.undo import Undo


def is_object(value: object) -> bool:
    """Whether a value keeps state of its own, as opposed to being state."""
    methods = ("state_dict", "load_state_dict")
    return isinstance(value, torch.Generator) or (
        not isinstance(value, type) and all(callable(getattr(value, method, None)) for method in methods)
    )


def misplaced(value: object) -> str:
    """Why an object has to be given in another way; empty if it has not."""
    if isinstance(value, Optimizer):
        return "an optimizer goes into optimizer=, by the names of its parameters; here it would go by their numbers"
    if value is torch.default_generator or any(value is each for each in torch.cuda.default_generators):
        return "a global random generator; save and load it with rng=True"
    return ""


def state_of(value: Any) -> object:
    """The state of an object, a tree."""
    return value.get_state() if isinstance(value, torch.Generator) else value.state_dict()


def tree_of(value: object) -> object:
    """The state of an object with the names of functions in their places, see :func:`_own_functions`."""
    state = state_of(value)
    functions = _own_functions(value, state)
    return {**cast("dict[Any, Any]", state), **functions} if functions else state


def set_state(value: Any, state: object) -> None:
    """Give an object a state that :func:`state_of` or :func:`tree_of` returned.

    Raises:
        ValueError: It has another function in the place of one.
    """
    if isinstance(value, torch.Generator):
        value.set_state(cast("torch.Tensor", state))
        return
    if isinstance(state, dict) and any(isinstance(each, str) for each in state.values()):
        own = value.state_dict()
        functions = _own_functions(value, own)
        for key in functions.keys() & state.keys():
            if state[key] not in (functions[key], own[key]):
                raise ValueError(
                    f"{key} is {state[key]!r:.200} in the file, {functions[key]} here; make it as it was saved"
                )
        state = {**state, **{key: own[key] for key in functions if key in state}}
    value.load_state_dict(state)


def _own_functions(value: object, state: object) -> dict[Any, str]:
    """Names of the functions in a state that are of the object's own class: torch 2.3 keeps one for OneCycleLR."""
    if not isinstance(state, dict):
        return {}
    functions = {key: each.__name__ for key, each in state.items() if isinstance(each, FunctionType)}
    return {key: name for key, name in functions.items() if getattr(type(value), name, None) is state[key]}


def snapshot_of(value: Any) -> Undo:
    """Remember what an object has; the result gives it back: its state, and what else its attributes were."""
    before = copy.deepcopy(state_of(value))
    attributes = dict(vars(value)) if hasattr(value, "__dict__") else None

    def undo() -> None:
        try:
            set_state(value, before)
        finally:
            if attributes is not None:
                vars(value).clear()
                vars(value).update(attributes)

    return undo


def checked_names(state: object) -> Mapping[str, object]:
    """The user's own state, as it was given, which has to be a mapping from names.

    Raises:
        TypeError: It is none; the error says what it is.
    """
    if not isinstance(state, Mapping):
        got = type(state).__name__
        raise TypeError(f"state: expected a mapping of names to objects and values, such as {{'step': 7}}, got {got}")
    for name in state:
        if not isinstance(name, str):
            raise TypeError(f"state: expected names that are strings, got {name!r:.200}, of type {type(name).__name__}")
    return state


def records_of(state: Mapping[str, object], sources: Sources) -> dict[str, StateRecord]:
    """Describe the user's own state.

    Args:
        state: Objects with ``state_dict`` and ``load_state_dict``, generators, and trees, by name.
        sources: Takes its tensors.

    Raises:
        TypeError: It is no mapping of strings.
        ConfigError: Something in it is no tree; the error says where.
    """
    checked_names(state)
    records: dict[str, StateRecord] = {}
    for name, value in state.items():
        check_text(name, f"state.{name!r}")
        obstacle = misplaced(value)
        if obstacle:
            raise ConfigError(f"state.{name}: {obstacle}")
        name_of_class = class_name(type(value)) if is_object(value) else None
        tree = tree_of(value) if is_object(value) else value
        records[name] = StateRecord(name_of_class, encode_tree(tree, f"state.{name}", sources.put))
    return records
