"""Pair the parameters, groups and options of an optimizer with those of one in a file."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor
from torch.optim import Optimizer

from orthoserde.errors import FileFormatError, Problem
from orthoserde.manifest import Manifest, qualname_of
from orthoserde.manifest.training import GroupRecord, OptimizerRecord
from orthoserde.manifest.trees import decode_tree, keys_in
from orthoserde.tensor_bytes import DTYPES
from orthoserde.training.entries import is_of_torch, odd_entry, spans_parameters
from orthoserde.training.optimizers import numbered, options_of, place_of
from orthoserde.training.undo import Undo
from orthoserde.training.wanted import ALL, GetTensor, Wanted
from orthoserde.wording import counted, shorten

#: Options that schedulers add to groups, which an optimizer without one does not have.
SCHEDULED = frozenset({"initial_lr", "swa_lr", "max_lr", "min_lr", "max_momentum", "base_momentum"})


@dataclass
class OptimizerPlan:
    """What is loaded into one optimizer.

    Attributes:
        label: Its name.
        optimizer: The optimizer.
        record: What the file has.
        numbers: By name in the file, the number and parameter of this optimizer.
        own_groups: Its groups as its ``state_dict`` has them.
        groups: For each of its groups, that of the file, None where all of it starts afresh.
        same_dtype: Names of the parameters that have the dtype with which they were saved.
        whole: Whether state that belongs to no parameter is loaded too, which it is unless all starts afresh.
    """

    label: str
    optimizer: Optimizer
    record: OptimizerRecord
    numbers: dict[str, tuple[int, Tensor]]
    own_groups: list[dict[str, Any]]
    groups: list[GroupRecord | None]
    same_dtype: frozenset[str]
    whole: bool
    _loaded: dict[str, Any] = field(default_factory=dict)

    def tensor_keys(self) -> Iterator[str]:
        """Keys of the tensors that it needs."""
        where = place_of(self.label)
        for group in self.groups:
            if group is not None:
                yield from keys_in(group.options, where)
        for name in self.numbers:
            if name in self.record.state:
                yield from keys_in(self.record.state[name], where)
        if self.whole:
            yield from keys_in(self.record.rest, where)

    def decode(self, tensor: GetTensor) -> None:
        """Make the state that its ``load_state_dict`` will be given."""
        where = place_of(self.label)
        groups = []
        for group, stored in zip(self.own_groups, self.groups, strict=True):
            options = {} if stored is None else _mapping(decode_tree(stored.options, where, tensor), where)
            groups.append({**group, **options, "params": group["params"]})
        state: dict[Any, object] = {
            number: decode_tree(self.record.state[name], f"{where}.{name}", tensor)
            for name, (number, _) in self.numbers.items()
            if name in self.record.state
        }
        more, shared = _parts_of_rest(self.record, where, tensor) if self.whole else ({}, {})
        self._loaded = {**more, "state": {**shared, **state}, "param_groups": groups}

    def snapshot(self) -> Undo:
        """Remember what the optimizer has; the result gives it back."""
        optimizer: Any = self.optimizer
        if not isinstance(optimizer, Optimizer):  # a wrapper, whose inside is not known
            before = copy.deepcopy(optimizer.state_dict())
            return lambda: optimizer.load_state_dict(before)
        attributes = dict(vars(optimizer))
        state = {key: dict(value) if isinstance(value, dict) else value for key, value in optimizer.state.items()}
        groups = [dict(group) for group in optimizer.param_groups]

        def undo() -> None:
            vars(optimizer).clear()
            vars(optimizer).update(attributes)
            optimizer.state.clear()
            optimizer.state.update(state)
            for group, before in zip(optimizer.param_groups, groups, strict=True):
                group.clear()
                group.update(before)

        return undo

    def load(self) -> None:
        """Load the optimizer by its own ``load_state_dict``, and keep dtypes that torch's would round.

        Torch casts floating state to the dtype of the parameter; what was saved in another has its reasons.
        """
        expected = dict(self._loaded["state"])
        self.optimizer.load_state_dict(self._loaded)
        for name in self.same_dtype:
            number, parameter = self.numbers[name]
            live, stored = self.optimizer.state.get(parameter), expected.get(number)
            if not isinstance(live, dict) or not isinstance(stored, dict):
                continue
            for entry in stored.keys() & live.keys():
                live[entry] = _unrounded(live[entry], stored[entry])


def match_optimizer(
    label: str, optimizer: Optimizer, record: OptimizerRecord, wanted: Wanted, problems: list[Problem]
) -> OptimizerPlan:
    """Pair an optimizer with one in the file.

    Args:
        label: Its name.
        optimizer: The optimizer.
        record: What the file has.
        wanted: What all optimizers share.
        problems: Takes what is wrong.

    Raises:
        FileFormatError: The file does not hold what an optimizer's state is made of.
    """
    where = place_of(label)

    def mismatch(text: str) -> None:
        problems.append(Problem(where, "mismatch", text))

    theirs, ours = qualname_of(record.class_name), type(optimizer).__qualname__
    if theirs != ours:
        mismatch(
            f"{theirs} in the file, {ours} here; make the optimizer as it was saved, or load without it, and it starts "
            "afresh"
        )
    state_dict = cast("Mapping[str, Any]", optimizer.state_dict())
    theirs_all = {name for group in record.groups for name in group.parameters}
    paired, own_groups = _paired(optimizer, state_dict, theirs_all, wanted, mismatch)
    afresh = _afresh(paired, theirs_all, wanted, mismatch)
    numbers = {name: pair for name, pair in paired.items() if name not in afresh}
    groups = _matched_groups(own_groups, afresh, record, mismatch)
    plan = OptimizerPlan(
        *(label, optimizer, record, numbers, state_dict["param_groups"], groups),
        frozenset(_same_dtypes(numbers, wanted.manifest)),
        whole=ALL not in wanted.reset,
    )
    taken = {number for number, _ in numbers.values()} & _parts_of_rest(record, where, wanted.described)[1].keys()
    if taken:
        mismatch("the file has state of no parameter under the number of one")
    if theirs == ours:
        _check_options(plan, wanted.described, mismatch)
        _check_state(plan, wanted.described, mismatch)
    return plan


def _paired(
    optimizer: Optimizer,
    state_dict: Mapping[str, Any],
    known: Collection[str],
    wanted: Wanted,
    mismatch: Callable[[str], None],
) -> tuple[dict[str, tuple[int, Tensor]], list[set[str]]]:
    """Numbers and parameters of an optimizer by the names that the file has for them, and the names in each group."""
    number_of = {id(parameter): number for number, parameter in numbered(optimizer, state_dict).items()}
    paired: dict[str, tuple[int, Tensor]] = {}
    groups: list[set[str]] = []
    for i, group in enumerate(optimizer.param_groups):
        groups.append(set())
        for j, parameter in enumerate(group["params"]):
            name = wanted.name_of(parameter, known)
            if name is None:
                mismatch(
                    f"number {j} of group {i}, of shape {list(parameter.shape)}, is no parameter of the model, or no "
                    "longer after this load; make the optimizer from the model's parameters, if need be after the load"
                )
            elif name in paired:
                mismatch(f"two parameters here are {name} in the file, which is one; tie them as they were saved")
            else:
                paired[name] = (number_of[id(parameter)], parameter)
                groups[-1].add(name)
    return paired, groups


def _afresh(
    paired: Collection[str], known: Collection[str], wanted: Wanted, mismatch: Callable[[str], None]
) -> set[str]:
    """Names of the parameters whose state starts afresh: that was asked for, or they start in a new chart."""
    # A name that only the file has is a name to reset too.
    reset = {name for name in (*paired, *known) if wanted.is_reset(name)}
    charts = {
        name: chart for name in (*paired, *known) if name not in reset and (chart := wanted.chart_of(name)) is not None
    }
    for chart in dict.fromkeys(charts[name] for name in paired if name in charts):
        mismatch(
            f"the file has the computed weight of {chart} alone, so that its state belongs to other coordinates; start "
            f"it afresh with reset=[{chart!r}]"
        )
    return reset | charts.keys()


def _matched_groups(
    own: list[set[str]], afresh: set[str], record: OptimizerRecord, mismatch: Callable[[str], None]
) -> list[GroupRecord | None]:
    """For each of our groups, the one of the file with the same parameters; None where all of them start afresh.

    Parameters that start afresh need not be in the same group, nor on both sides.
    """
    theirs = [set(group.parameters) for group in record.groups]
    ours_all, theirs_all = set().union(*own) - afresh, set().union(*theirs) - afresh
    if ours_all != theirs_all:
        for text, names in (("not in the file", ours_all - theirs_all), ("not in this one", theirs_all - ours_all)):
            if names:
                mismatch(f"parameters that are {text}: {shorten(sorted(names))}; reset= names those to start afresh")
        return [None] * len(own)
    open_groups: dict[frozenset[str], list[int]] = {}
    for j, names in enumerate(theirs):
        open_groups.setdefault(frozenset(names - afresh), []).append(j)
    found: list[GroupRecord | None] = []
    for i, names in enumerate(own):
        left = open_groups.get(frozenset(names - afresh), [])
        if names <= afresh and names:
            found.append(None)  # it keeps its own options
        elif not left:
            if names:
                mismatch(
                    f"group {i} has other parameters than any group in the file ({counted(len(own), 'group')} here, "
                    f"{len(theirs)} in the file); group them as they were saved, or name in reset= those whose group "
                    "is new"
                )
            found.append(None)
        else:
            # Only groups without parameters can be alike; then the place decides.
            j = i if i in left else left[0]
            left.remove(j)
            found.append(record.groups[j])
    return found


def _check_options(plan: OptimizerPlan, described: GetTensor, mismatch: Callable[[str], None]) -> None:
    # Optimizers of others may add options as they go: schedulefree's wrapper counts its steps in them.
    takes_any = not any(map(is_of_torch, (plan.record.class_name, type(plan.optimizer).__module__)))
    for i, (group, stored) in enumerate(zip(plan.optimizer.param_groups, plan.groups, strict=True)):
        if stored is None:
            continue
        own = options_of(group)
        options = _mapping(decode_tree(stored.options, f"groups.{i}", described), f"groups.{i}")
        for name, value in options.items():
            # What another torch has and leaves off asks for nothing that this one would have to do.
            if name not in own and name not in SCHEDULED and not takes_any and value is not None and value is not False:
                mismatch(f"group {i} has the option {name!r} in the file, which {_name(plan)} here does not know")
            elif name in own and not _alike(own[name], value):
                mismatch(
                    f"group {i}: {name} is of type {type(value).__name__} in the file, {type(own[name]).__name__} here"
                )


def _check_state(plan: OptimizerPlan, described: GetTensor, mismatch: Callable[[str], None]) -> None:
    spanning = False
    for name, (_, parameter) in plan.numbers.items():
        if name not in plan.record.state:
            continue
        entries = decode_tree(plan.record.state[name], name, described)
        problem = odd_entry(type(plan.optimizer), entries, parameter.shape)
        if problem is not None:
            mismatch(f"{name}: {problem}")
        spanning = spanning or spans_parameters(entries, parameter.numel())
    if spanning:
        theirs = [name for group in plan.record.groups for name in group.parameters]
        if set(theirs) != plan.numbers.keys():
            mismatch(f"{_name(plan)} seems to keep state of several parameters in one; reset='all', or none of it")
        elif theirs != list(plan.numbers):
            mismatch(
                f"{_name(plan)} seems to keep state of several parameters in one, and their order is not that of the "
                "file; make it from the parameters in the same order"
            )


def _name(plan: OptimizerPlan) -> str:
    return type(plan.optimizer).__qualname__


def _same_dtypes(numbers: Mapping[str, tuple[int, Tensor]], manifest: Manifest) -> Iterator[str]:
    """Names of the parameters that have the dtype with which they were saved."""
    for name, (_, parameter) in numbers.items():
        stored = manifest.tensors.get(manifest.kept_key(name))
        if stored is not None and DTYPES[stored.dtype] == parameter.dtype:
            yield name


def _alike(own: object, value: object) -> bool:
    """Whether an option can have such a value: numbers stay numbers, sequences keep their length."""
    numbers = (int, float, Tensor)
    if own is None:
        return True
    if isinstance(own, bool):
        return value is None or isinstance(value, bool)
    if isinstance(own, numbers):
        one = isinstance(value, numbers) and not isinstance(value, bool)
        return one and (not isinstance(value, Tensor) or value.numel() == 1)
    if isinstance(own, (list, tuple)):
        same = isinstance(value, (list, tuple)) and len(own) == len(value)
        return same and all(_alike(one, other) for one, other in zip(own, cast("list[object]", value), strict=True))
    return value is None or isinstance(value, type(own))


def _parts_of_rest(record: OptimizerRecord, where: str, tensor: GetTensor) -> tuple[dict[Any, Any], dict[Any, Any]]:
    """What else a ``state_dict`` had, and what of its state was no parameter's.

    Raises:
        FileFormatError: The file has something else there.
    """
    rest = _mapping(decode_tree(record.rest, f"{where}.rest", tensor), f"{where}.rest")
    if rest.keys() != {"rest", "shared"}:
        raise FileFormatError(f"{where}.rest: expected rest and shared, got {shorten([str(key) for key in rest])}")
    return _mapping(rest["rest"], f"{where}.rest"), _mapping(rest["shared"], f"{where}.rest")


def _unrounded(live: object, stored: object) -> object:
    """State as it was loaded, with the tensors that were cast to another dtype as they were saved."""
    if isinstance(live, Tensor) and isinstance(stored, Tensor):
        return live if live.dtype == stored.dtype else stored.to(live.device)
    if isinstance(live, dict) and isinstance(stored, dict):
        for key in live.keys() & stored.keys():
            live[key] = _unrounded(live[key], stored[key])
    elif isinstance(live, list) and isinstance(stored, list) and len(live) == len(stored):
        live[:] = map(_unrounded, live, stored)
    elif type(live) is tuple and isinstance(stored, tuple) and len(live) == len(stored):
        return tuple(map(_unrounded, live, stored))
    return live


def _mapping(value: object, where: str) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise FileFormatError(f"{where}: expected a dict, got {type(value).__name__}")
    return value
