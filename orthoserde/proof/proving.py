"""`prove`: load in a new process, train, compare, grade."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeAlias

from torch import Tensor

from orthoserde import storage
from orthoserde.arguments import path_of
from orthoserde.errors import ConfigError
from orthoserde.opening import open_checkpoint
from orthoserde.proof.child import Task
from orthoserde.proof.compare import between_loads, loss_difference
from orthoserde.proof.functions import check_importable
from orthoserde.proof.process import Run, run
from orthoserde.proof.report import Difference, Grade, Proof
from orthoserde.proof.settings import current, other_seed

Path: TypeAlias = "str | os.PathLike[str]"

#: What a run may be held to: losses, files, or one file.
Reference: TypeAlias = "Path | Iterable[float | Tensor | Path]"


def prove(
    path: Path,
    make: Callable[[], object],
    step: Callable[..., object],
    *,
    reference: Reference | None = None,
    steps: int = 3,
) -> Proof:
    """Load a checkpoint in a new process, train a few steps there, and compare with the run that never stopped.

    The process is spawned, so it knows only what is in the file and in your code. Its random generators start at
    another seed; its number of threads, its settings of determinism and precision, its default dtype and device, its
    environment and folder are those of this one. What the file holds of an optimizer, of your own state and of the
    random generators is loaded too. Nothing changes in this process, and no other is left when it returns or raises,
    but for the resource tracker that Python keeps beside a process that has spawned others.

    There is no limit of time: an interrupt ends the new process too.

    Args:
        path: A file of :func:`orthoserde.save`, or anything else that :func:`orthoserde.load` takes.
        make: Returns what is to be loaded: a model, ``(model, optimizer)``, or ``(model, optimizer, state)``, as they
            are given to :func:`orthoserde.load`.
        step: Called with what ``make`` returned, as positional arguments. Takes one training step and returns the loss,
            a number or a tensor of one element; or None. Its data comes from the function itself, or from ``state``.
            ``make`` and ``step`` are functions at the top level of a module, or ``functools.partial`` of such.
        reference: What the run that never stopped did next:

            - losses, one for each step, as many as ``steps`` or more;
            - files, one for each step: what :func:`orthoserde.save` saved of it after each. Then the model is compared,
              and of the optimizer and of your own state what both have;
            - one file: what was saved of it after ``steps`` steps. Two checkpoints of a run are enough;
            - None: a second process loads afresh, from another seed, and the two are compared.

        steps: Number of training steps.

    Returns:
        The grade, the first difference, and how large differences are.

    Raises:
        ProofError: A function cannot be found by a new process, or raised there, or the process ended.
        ConfigError: ``steps`` or ``reference`` is none of these.
        TypeError: ``make`` or ``step`` is no function.
        CheckpointNotFoundError: There is no such file.
        FileAccessError: The system refuses to open or read it.
        FileFormatError: It is not a checkpoint, or damaged.

    Example:
        >>> import pathlib, sys, tempfile, torch, orthoserde
        >>> code = '''
        ... import torch
        ... def make():
        ...     model = torch.nn.Linear(3, 1)
        ...     return model, torch.optim.SGD(model.parameters(), lr=0.1)
        ... def step(model, optimizer):
        ...     optimizer.zero_grad()
        ...     loss = model(torch.ones(2, 3)).square().mean()
        ...     loss.backward()
        ...     optimizer.step()
        ...     return loss
        ... '''
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = pathlib.Path(folder, "my_run.py").write_text(code)
        ...     sys.path.insert(0, folder)
        ...     import my_run
        ...     model, optimizer = my_run.make()
        ...     saved = orthoserde.save(model, f"{folder}/step-0.safetensors", optimizer=optimizer)
        ...     losses = [my_run.step(model, optimizer) for _ in range(3)]
        ...     proof = orthoserde.prove(f"{folder}/step-0.safetensors", my_run.make, my_run.step, reference=losses)
        ...     sys.path.remove(folder)
        >>> str(proof.grade), proof.max_difference
        ('bit-exact', 0.0)
    """
    if type(steps) is not int or steps < 1:
        raise ConfigError(f"steps: expected a number of steps from 1 on, got {steps!r}")
    check_importable(make, "make")
    check_importable(step, "step")
    held_to = _held_to(reference, steps)
    given = path_of(path)
    open_checkpoint(given).close()
    name = os.path.abspath(given)
    task = Task(name, steps, held_to.files, reference is None, other_seed(0), current())
    first = run(task, make, step)
    if reference is None:
        # One after the other: two models at the same time might not fit.
        second = run(Task(name, steps, {}, True, other_seed(1), task.settings), make, step)
        return _graded(task, first, _between(first, second), None)
    return _graded(task, first, _against(first, held_to), held_to)


@dataclass(frozen=True)
class _HeldTo:
    """The reference: losses and files, by step."""

    losses: dict[int, float] = field(default_factory=dict)
    files: dict[int, str] = field(default_factory=dict)


def _held_to(reference: object, steps: int) -> _HeldTo:
    """Take the argument ``reference``.

    Raises:
        ConfigError: It is none of what it may be.
    """
    if reference is None:
        return _HeldTo()
    if isinstance(reference, (str, os.PathLike)):
        return _HeldTo(files={steps: _file(reference)})
    # A tensor without dimensions says that it is iterable, and is not.
    single = isinstance(reference, (bytes, dict)) or getattr(reference, "ndim", 1) == 0
    items = list(reference) if isinstance(reference, Iterable) and not single else None
    if items is None:
        raise ConfigError(f"reference: expected losses, files or one file, got {type(reference).__name__}")
    if len(items) < steps:
        raise ConfigError(
            f"reference: expected one entry for each of {steps} steps, got {len(items)}; for the state after all of "
            "them give one path"
        )
    by_step = dict(enumerate(items[:steps], start=1))
    if all(isinstance(item, (str, os.PathLike)) for item in by_step.values()):
        return _HeldTo(files={number: _file(item) for number, item in by_step.items()})
    return _HeldTo(losses={number: _number(item) for number, item in by_step.items()})


def _file(path: Path) -> str:
    storage.read(path).close()
    return os.path.abspath(os.fsdecode(path))


def _number(item: object) -> float:
    try:
        return float(item.detach() if isinstance(item, Tensor) else item)  # type: ignore[arg-type]  # tensors and numbers of NumPy say by themselves whether they can
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise ConfigError(
            f"reference: expected losses (numbers) or files (paths), and not both, got a {type(item).__name__}"
        ) from error


def _between(first: Run, second: Run) -> list[Difference]:
    pairs = enumerate(zip(first.steps, second.steps, strict=True), start=1)
    return [
        difference
        for number, (one, other) in pairs
        if one.seen is not None and other.seen is not None
        for difference in between_loads(number, one.seen, other.seen)
    ]


def _against(found: Run, held_to: _HeldTo) -> list[Difference]:
    scale = max((abs(loss) for loss in held_to.losses.values() if math.isfinite(loss)), default=0.0)
    differences: list[Difference] = []
    for number, each in enumerate(found.steps, start=1):
        if number in held_to.losses:
            differences += loss_difference(number, each.loss, held_to.losses[number], scale)
        differences += each.differences
    return differences


def _graded(task: Task, found: Run, differences: list[Difference], held_to: _HeldTo | None) -> Proof:
    beyond = [difference for difference in differences if not difference.within]
    if held_to is None:
        grade = Grade.DIVERGES if differences else Grade.DETERMINISTIC
    else:
        grade = Grade.DIVERGES if beyond else Grade.WITHIN if differences else Grade.BIT_EXACT
    with_losses = held_to is None or held_to.losses
    returned = with_losses and any(each.loss is not None for each in found.steps)
    parts = [part for each in found.steps for part in each.compared]
    largest = max((each.relative for each in differences if each.relative is not None), default=0.0)
    return Proof(
        path=task.path,
        grade=grade,
        steps=task.steps,
        compared=tuple(dict.fromkeys([*(["losses"] if returned else []), *parts])),
        fidelity=found.loaded.fidelity,
        max_difference=None if held_to is None else largest,
        first=next(iter(beyond or differences), None),
        differences=len(differences),
        losses=tuple(each.loss for each in found.steps),
        environment=task.settings.described(),
        notes=found.loaded.notes,
    )
