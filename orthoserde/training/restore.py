"""Training state out of a checkpoint: everything is checked and read before an optimizer or object changes.

Note [Undo]
The model is written last, because that cannot be undone. Optimizers and objects are loaded before, by their own
``load_state_dict``, and given back what they had if one of them, or the structure of the model, refuses after all. So a
hook of an optimizer that looks at its parameters sees those of before the load.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from orthoserde import _torch
from orthoserde.checkpoint import Checkpoint
from orthoserde.errors import FileFormatError, IncompatibleModelError, Problem
from orthoserde.manifest import Manifest, qualname_of
from orthoserde.manifest.training import TrainingRecord
from orthoserde.manifest.trees import decode_tree
from orthoserde.tensor_bytes import DTYPES
from orthoserde.training import rng as generators
from orthoserde.training.matching import OptimizerPlan, match_optimizer
from orthoserde.training.objects import checked_names, is_object, misplaced, set_state, snapshot_of
from orthoserde.training.optimizers import labelled, place_of
from orthoserde.training.rng import States
from orthoserde.training.undo import Undo, undo_all
from orthoserde.training.wanted import Wanted


@dataclass(frozen=True)
class Targets:
    """What training state is to be loaded into; the arguments are those of ``orthoserde.load``.

    Attributes:
        optimizers: By name.
        state: Objects and places of plain values, by name.
        rng: Whether the random generators are set.
        reset: Names of tensors, parameters or modules whose optimizer state starts afresh; ``"all"`` for all.
    """

    optimizers: Mapping[str, Optimizer]
    state: Mapping[str, object]
    rng: bool
    reset: tuple[str, ...]

    @classmethod
    def of(cls, optimizer: object, state: object, rng: bool, reset: str | Iterable[str]) -> Targets:
        """Take the arguments of a load.

        Raises:
            TypeError: Something is no optimizer, or ``state`` no mapping of strings, or ``reset`` no strings.
        """
        named = {} if state is None else checked_names(state)
        if state is not None and not isinstance(state, MutableMapping) and not all(map(is_object, named.values())):
            raise TypeError(f"state: expected a dict, into which plain values can be put, got {type(state).__name__}")
        given: object = reset
        names = (reset,) if isinstance(reset, str) else tuple(reset) if isinstance(given, Iterable) else (given,)
        if not all(isinstance(name, str) for name in names):
            raise TypeError(f"reset: expected names of tensors, or 'all', got {reset!r:.200}")
        return cls(labelled(optimizer), named, rng, cast("tuple[str, ...]", names))


NOTHING = Targets({}, {}, False, ())


@dataclass
class TrainingPlan:
    """All that a load would do with training state.

    Attributes:
        targets: What it is loaded into.
        record: What the file has.
        problems: What keeps it from being done.
        optimizers: What is loaded into each optimizer.
        objects: Names of the objects that are loaded.
        values: Plain values of the file by name; worked out by :meth:`read`.
    """

    targets: Targets
    record: TrainingRecord
    problems: list[Problem] = field(default_factory=list)
    optimizers: list[OptimizerPlan] = field(default_factory=list)
    objects: list[str] = field(default_factory=list)
    values: dict[str, object] = field(default_factory=dict)
    _generators: States | None = None
    _moved: States | None = None
    _filled: dict[str, object] = field(default_factory=dict)
    _trees: dict[str, object] = field(default_factory=dict)

    def read(self, checkpoint: Checkpoint, *, verify: bool) -> None:
        """Read everything that is wanted into memory.

        Raises:
            DamagedFileError: Bytes are not those that were saved.
            IncompatibleModelError: The states of the random generators are none that this process can have.
        """
        tensors = checkpoint.read(self._keys(), verify=verify)
        for plan in self.optimizers:
            plan.decode(tensors.__getitem__)
        for name, entry in self.record.state.items():
            if name in self.objects:
                self._trees[name] = decode_tree(entry.value, f"state.{name}", tensors.__getitem__)
            elif entry.class_name is None:
                self.values[name] = decode_tree(entry.value, f"state.{name}", tensors.__getitem__)
        wanted = [name for name in self.targets.state if name not in self.objects]
        self._filled = {name: copy.deepcopy(self.values[name]) for name in wanted}
        if self.targets.rng:
            try:
                self._generators = States(decode_tree(self.record.rng, "rng", tensors.__getitem__))
            except ValueError as error:
                problem = Problem("rng", "mismatch", str(error))
                raise IncompatibleModelError(f"{checkpoint.origin} does not fit", [problem]) from error

    @property
    def notes(self) -> list[str]:
        """What the caller should know of it, one sentence each."""
        return [
            f"state.{name}: a module with parametrized tensors, whose configuration was not compared; where it matters,"
            " save and load it and the model as one nn.ModuleDict"
            for name in self.objects
            if isinstance(module := self.targets.state[name], nn.Module) and any(_torch.all_parametrizations(module))
        ]

    @property
    def summary(self) -> str:
        """What is loaded, in words; empty if nothing is."""
        parts = [f"{f'optimizer {plan.label}'.rstrip()} ({len(plan.numbers)} parameters)" for plan in self.optimizers]
        parts += list(self.targets.state)
        return ", ".join([*parts, *(["random generators"] if self.targets.rng else [])])

    def _keys(self) -> list[str]:
        wanted = [key for plan in self.optimizers for key in plan.tensor_keys()]
        for name, entry in self.record.state.items():
            if name in self.objects or entry.class_name is None:
                wanted += entry.tensor_keys(name)
        return wanted + (self.record.rng_keys() if self.targets.rng else [])

    def apply(self) -> Undo:
        """Load optimizers and objects.

        Returns:
            What gives them back what they had.

        Raises:
            IncompatibleModelError: One of them refused; all of them are as they were, or the error names those that
                could not be given back what they had.
        """
        if not self.optimizers and not self.objects:
            return lambda: None  # a load of a model alone does not wait for the generators to be compared
        done: list[tuple[str, Undo]] = []
        where, before = "", generators.fingerprint()
        try:
            for plan in self.optimizers:
                where = place_of(plan.label)
                done.append((where, plan.snapshot()))
                plan.load()
            for name in self.objects:
                where = f"state.{name}"
                target = self.targets.state[name]
                done.append((where, snapshot_of(target)))
                set_state(target, self._trees[name])
        except BaseException as error:
            failures = undo_all(done)
            if isinstance(error, Exception):
                text = f"its load_state_dict refused: {type(error).__name__}: {error}"
                problems = [Problem(where, "mismatch", text)]
                problems += [Problem(each, "mismatch", "could not be given back what it had") for each in failures]
                raise IncompatibleModelError("the training state does not fit", problems) from error
            raise
        if generators.fingerprint() != before:
            self._moved = States(generators.states())

        def undo() -> None:
            undo_all(done)

        return undo

    def finish(self) -> None:
        """Put plain values into the caller's mapping, and the generators into their states.

        Generators that an object has moved while it was loaded are where it left them, unless those of the file are
        wanted.
        """
        if isinstance(self.targets.state, MutableMapping):
            self.targets.state.update(self._filled)
        after = self._generators or self._moved
        if after is not None:
            after.set()


def plan_training(
    manifest: Manifest, origin: str, targets: Targets, parameters: Mapping[str, Tensor], afresh: Collection[str]
) -> TrainingPlan:
    """Plan how training state is loaded.

    Args:
        manifest: What the file holds.
        origin: The file, for messages.
        targets: What is to be loaded.
        parameters: Parameters of the model by key, as they will be when the model has been loaded.
        afresh: Names of the parametrized tensors that start in a new chart.
    """
    record = manifest.training or TrainingRecord()
    plan = TrainingPlan(targets, record)

    def described(key: str) -> Tensor:
        stored = manifest.tensors[key]
        return torch.empty(stored.shape, dtype=DTYPES[stored.dtype], device="meta")

    wanted = Wanted(manifest, parameters, tuple(afresh), targets.reset, described)
    for label, optimizer in targets.optimizers.items():
        if label not in record.optimizers:
            plan.problems.append(Problem(place_of(label), "mismatch", _absent(record, origin, label)))
            continue
        try:
            plan.optimizers.append(match_optimizer(label, optimizer, record.optimizers[label], wanted, plan.problems))
        except FileFormatError as error:
            plan.problems.append(Problem(place_of(label), "mismatch", str(error)))
    for name, target in targets.state.items():
        problem = _odd_state(record, name, target)
        if problem:
            plan.problems.append(Problem(f"state.{name}", "mismatch", problem))
        elif is_object(target):
            plan.objects.append(name)
    if targets.rng and record.rng is None:
        text = "the file holds no states of random generators; load with rng=False"
        plan.problems.append(Problem("rng", "mismatch", text))
    plan.problems += wanted.unused_resets()
    return plan


def _absent(record: TrainingRecord, origin: str, label: str) -> str:
    if not record.optimizers:
        return f"{origin} holds no optimizer; save it with optimizer=, or load without"
    names = ", ".join(repr(name) for name in record.optimizers if name) or "a single one without a name"
    return f"the file holds {names}; load with the names that it was saved with"


def _odd_state(record: TrainingRecord, name: str, target: object) -> str:
    if misplaced(target):
        return misplaced(target)
    if name not in record.state:
        return (
            f"the file holds none of this name; it has {', '.join(record.state) or 'no state of yours'}; leave it out"
        )
    stored = record.state[name].class_name
    if stored is None and is_object(target):
        return f"a plain value in the file, a {type(target).__qualname__} here; give None in its place"
    if stored is not None and not is_object(target):
        return f"the state of a {qualname_of(stored)} in the file; give the object to load it into"
    if stored is not None and qualname_of(stored) != type(target).__qualname__:
        here = f"a {type(target).__qualname__} here; give an object of the same class"
        return f"the state of a {qualname_of(stored)} in the file, {here}"
    return ""
