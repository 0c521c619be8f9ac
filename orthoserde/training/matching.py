"""Pair the parameters, groups and options of an optimizer with those of one in a file."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor
from torch.optim import Optimizer

from orthoserde.errors import FileFormatError, Problem
from orthoserde.manifest import Manifest
from orthoserde.reports import shorten
from orthoserde.state_tree import decode_tree, keys_in
from orthoserde.tensor_bytes import DTYPES
from orthoserde.training.entries import is_of_torch, odd_entry, spans_parameters
from orthoserde.training.optimizers import numbered, options_of, place_of
from orthoserde.training_record import GroupRecord, OptimizerRecord

ALL = "all"

#: Options that schedulers add to groups, which an optimizer without one does not have.
SCHEDULED = frozenset({"initial_lr", "swa_lr", "max_lr", "min_lr", "max_momentum", "base_momentum"})

Undo = Callable[[], None]
GetTensor = Callable[[str], Tensor]


@dataclass
class Wanted:
    """What all optimizers of one load share.

    Attributes:
        manifest: What the file holds.
        parameters: Parameters of the model by key.
        afresh: Names of the parametrized tensors that start in a new chart.
        reset: Names whose state starts afresh, or ``"all"``.
        described: Gives a tensor of the file by key, without its elements.
    """

    manifest: Manifest
    parameters: Mapping[str, Tensor]
    afresh: tuple[str, ...]
    reset: tuple[str, ...]
    described: GetTensor
    _used: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._keys: dict[int, list[str]] = {}
        for key, parameter in self.parameters.items():
            self._keys.setdefault(id(parameter), []).append(key)

    def name_of(self, parameter: Tensor, known: Mapping[str, object]) -> str | None:
        """What the file calls a parameter, or would; None if the model does not have it."""
        keys = [self.manifest.kept_key(key) for key in self._keys.get(id(parameter), ())]
        return next((key for key in keys if key in known), keys[0] if keys else None)

    def is_reset(self, key: str) -> bool:
        """Whether the state of a parameter starts afresh because that was asked for."""
        found = [name for name in self.reset if name == ALL or covers(name, key)]
        self._used.update(found)
        return bool(found)

    def chart_of(self, key: str) -> str | None:
        """The parametrized tensor that starts in a new chart and has this parameter."""
        return next((name for name in self.afresh if covers(name, key)), None)

    def unused_resets(self) -> list[Problem]:
        """Names to reset that name no parameter of an optimizer."""
        unused = [name for name in self.reset if name not in self._used and name != ALL]
        return [
            Problem(f"reset={name!r}", "mismatch", "no optimizer that is loaded has a parameter of this name")
            for name in unused
        ]


@dataclass
class OptimizerPlan:
    """What is loaded into one optimizer.

    Attributes:
        label: Its name.
        optimizer: The optimizer.
        record: What the file has.
        numbers: By name in the file, the number and parameter of this optimizer.
        groups: For each of its groups, that of the file, None where all of it starts afresh.
    """

    label: str
    optimizer: Optimizer
    record: OptimizerRecord
    numbers: dict[str, tuple[int, Tensor]]
    groups: list[GroupRecord | None]
    same_dtype: frozenset[str]
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
        yield from keys_in(self.record.rest, where)

    def decode(self, tensor: GetTensor) -> None:
        """Make the state that its ``load_state_dict`` will be given."""
        where = place_of(self.label)
        own = cast("Mapping[str, Any]", self.optimizer.state_dict())
        groups = []
        for group, stored in zip(own["param_groups"], self.groups, strict=True):
            options = {} if stored is None else _mapping(decode_tree(stored.options, where, tensor), where)
            groups.append({**group, **options, "params": group["params"]})
        state: dict[Any, object] = {
            number: decode_tree(self.record.state[name], f"{where}.{name}", tensor)
            for name, (number, _) in self.numbers.items()
            if name in self.record.state
        }
        rest = _mapping(decode_tree(self.record.rest, where, tensor), where)
        self._loaded = {**_mapping(rest["rest"], where), "state": {**state, **_mapping(rest["shared"], where)}}
        self._loaded["param_groups"] = groups

    def snapshot(self) -> Undo:
        """Remember what the optimizer has; the result gives it back."""
        optimizer = self.optimizer
        if type(optimizer).load_state_dict is not Optimizer.load_state_dict:
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
            for entry, tensor in stored.items():
                now = live.get(entry)
                if isinstance(tensor, Tensor) and isinstance(now, Tensor) and now.dtype != tensor.dtype:
                    live[entry] = tensor.to(now.device)


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

    theirs, ours = record.class_name.partition(":")[2], type(optimizer).__qualname__
    if theirs != ours:
        mismatch(f"a {theirs} in the file, a {ours} here")
    by_name = {name: i for i, group in enumerate(record.groups) for name in group.parameters}
    numbers: dict[str, tuple[int, Tensor]] = {}
    charts: dict[str, None] = {}
    own_groups: list[set[str]] = []
    reverse = {id(parameter): number for number, parameter in numbered(optimizer, optimizer.state_dict()).items()}
    for i, group in enumerate(optimizer.param_groups):
        own_groups.append(set())
        for j, parameter in enumerate(group["params"]):
            name = wanted.name_of(parameter, by_name)
            if name is None:
                mismatch(
                    f"number {j} of group {i}, of shape {list(parameter.shape)}, is no parameter of the model, or no "
                    "longer after this load; make the optimizer from the model's parameters, if need be after the load"
                )
            elif not wanted.is_reset(name):
                chart = wanted.chart_of(name)
                if chart is not None:
                    charts[chart] = None
                    continue
                own_groups[-1].add(name)
                numbers[name] = (reverse[id(parameter)], parameter)
    for chart in charts:
        mismatch(
            f"the file has the computed weight of {chart} alone, so that its state belongs to other coordinates; start "
            f"it afresh with reset=[{chart!r}]"
        )
    left = [
        {name for name in group.parameters if not wanted.is_reset(name) and wanted.chart_of(name) is None}
        for group in record.groups
    ]
    groups = _matched_groups(own_groups, left, record, mismatch)
    plan = OptimizerPlan(label, optimizer, record, numbers, groups, frozenset(_same_dtypes(numbers, wanted.manifest)))
    if theirs == ours:
        _check_options(plan, wanted.described, mismatch)
        _check_state(plan, wanted.described, mismatch)
    return plan


def _matched_groups(
    own: list[set[str]], theirs: list[set[str]], record: OptimizerRecord, mismatch: Callable[[str], None]
) -> list[GroupRecord | None]:
    """For each of our groups, the one of the file with the same parameters."""
    ours_all, theirs_all = set().union(*own), set().union(*theirs)
    if ours_all != theirs_all:
        for text, names in (("not in the file", ours_all - theirs_all), ("not in this one", theirs_all - ours_all)):
            if names:
                mismatch(f"parameters that are {text}: {shorten(sorted(names))}; reset= names those to start afresh")
        return [None] * len(own)
    open_groups = dict(enumerate(theirs))
    found: list[GroupRecord | None] = []
    for i, names in enumerate(own):
        # Where groups are alike (all reset, or empty), the place decides.
        order = sorted(open_groups, key=lambda j, i=i: (j != i, j))  # type: ignore[misc]
        match = next((j for j in order if open_groups[j] == names), None)
        if match is None:
            if names:
                mismatch(f"group {i} has other parameters than any group in the file; group them as they were saved")
            found.append(None)
        else:
            del open_groups[match]
            found.append(record.groups[match])
    if any(open_groups.values()):
        mismatch(f"the file has {len(theirs)} groups, this one {len(own)}; group them as they were saved")
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
            if name not in own and name not in SCHEDULED and not takes_any:
                mismatch(f"group {i} has the option {name!r} in the file, which a {_name(plan)} here does not know")
            elif name in own and not _alike(own[name], value):
                mismatch(
                    f"group {i}: {name} is a {type(value).__name__} in the file, a {type(own[name]).__name__} here"
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
        if theirs != list(plan.numbers):
            mismatch(f"a {_name(plan)} keeps state of all parameters in one, and their order is not that of the file")


def _name(plan: OptimizerPlan) -> str:
    return type(plan.optimizer).__qualname__


def _same_dtypes(numbers: Mapping[str, tuple[int, Tensor]], manifest: Manifest) -> Iterator[str]:
    """Names of the parameters that have the dtype with which they were saved."""
    for name, (_, parameter) in numbers.items():
        stored = manifest.tensors.get(name)
        if stored is None or DTYPES[stored.dtype] == parameter.dtype:
            yield name


def _alike(own: object, value: object) -> bool:
    """Whether an option can have such a value: numbers stay numbers, sequences keep their length."""
    if own is None or value is None:
        return True
    if isinstance(own, bool) or isinstance(value, bool):
        return isinstance(own, bool) and isinstance(value, bool)
    numbers = (int, float, Tensor)
    if isinstance(own, numbers):
        return isinstance(value, numbers) and (not isinstance(value, Tensor) or value.numel() == 1)
    if isinstance(own, (list, tuple)):
        same = isinstance(value, (list, tuple)) and len(own) == len(value)
        return same and all(_alike(one, other) for one, other in zip(own, cast("list[object]", value), strict=True))
    return isinstance(value, type(own))


def covers(name: str, key: str) -> bool:
    """Whether a parameter belongs to the tensor, parameter or module of this name."""
    module, _, tensor = name.rpartition(".")
    prefix = f"{module}." if module else ""
    return key == name or key.startswith((f"{name}.", f"{prefix}parametrizations.{tensor}."))


def _mapping(value: object, where: str) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise FileFormatError(f"{where}: expected a dict, got {type(value).__name__}")
    return value
