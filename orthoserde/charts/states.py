"""What optimizers hold for an ``original``, and what becomes of it in another chart.

Note [Equivariant optimizers]
A step of SGD, whatever its momentum, dampening, Nesterov's variant or weight decay, takes sums and multiples of
``original``, its gradient and its momentum: all of them turn alike, and so does the step. Adam and its kin keep numbers
for each coordinate by itself, squares of gradients above all, which have no image in other coordinates. A subclass of
SGD may compute anything, so only torch's own class counts as such.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from orthoserde import _torch
from orthoserde.charts.turn import Turn
from orthoserde.errors import Problem
from orthoserde.optimizers import optimizers_of
from orthoserde.tensor_bytes import may_overlap
from orthoserde.wording import shorten

MOMENTUM = "momentum_buffer"


@dataclass(frozen=True)
class Reset:
    """State of one tensor that is to be removed.

    Attributes:
        optimizer: Whose it is.
        parameter: The tensor.
        label: What it is called in reports.
    """

    optimizer: Optimizer
    parameter: Tensor
    label: str


@dataclass
class States:
    """What is to be done with the optimizer states of one tensor.

    Attributes:
        turning: By label, tensors that turn as ``original`` does.
        resets: States that are removed.
        problems: States for which there is nothing to be done.
    """

    turning: dict[str, Tensor]
    resets: list[Reset]
    problems: list[Problem]


def given_optimizers(argument: object) -> tuple[Optimizer, ...] | None:
    """The optimizers that a caller gave: one, several, none (``False``), or nothing said (None).

    Raises:
        TypeError: It is something else.
    """
    if argument is None:
        return None
    if argument is False:
        return ()
    try:
        found = tuple(optimizers_of(argument).values())
    except TypeError as error:
        raise TypeError(f"{error}; if there is none, give optimizer=False") from error
    for each in found:
        given: object = each
        if not isinstance(given, Optimizer):  # what it holds may be elsewhere, and would stay in the old coordinates
            got = f"got {type(given).__name__}; give the optimizer that is inside of it"
            raise TypeError(f"optimizer: expected a torch.optim.Optimizer, {got}")
    return found


def holds(optimizer: Optimizer, parameter: Tensor) -> bool:
    """Whether an optimizer trains a tensor."""
    return any(each is parameter for group in optimizer.param_groups for each in group["params"])


def states_of(name: str, original: Tensor, turn: Turn, optimizers: Iterable[Optimizer], *, reset: bool) -> States:
    """Find the states of one tensor that another chart changes.

    Args:
        name: Name of the tensor, for problems.
        original: The tensor.
        turn: Its change of chart.
        optimizers: All that may train it.
        reset: Whether states that do not turn are removed instead of being in the way.
    """
    found = States({}, [], [])
    for optimizer in optimizers:
        cls = type(optimizer).__name__
        if isinstance(optimizer, torch.optim.LBFGS) and holds(optimizer, original) and any(optimizer.state.values()):
            text = f"{cls} keeps one history of all its parameters together; make a new one, or clear its state first"
            found.problems.append(Problem(name, "unsupported", text))
            continue
        state: Mapping[object, object] = optimizer.state.get(original, {})
        if _is_at_rest(state):
            continue
        obstacle = _not_turning(optimizer, original, state)
        if not obstacle:
            momentum = state[MOMENTUM]
            if isinstance(momentum, Tensor) and turn.turned(momentum) is not None:
                label, number = f"{MOMENTUM} of {cls}", 2
                while label in found.turning:
                    label, number = f"{MOMENTUM} of {cls} ({number})", number + 1
                found.turning[label] = momentum
        elif reset:
            found.resets.append(Reset(optimizer, original, f"{_entries(state)} of {cls}"))
        else:
            text = (
                f"{cls} holds {_entries(state)} for its original, and {obstacle}: in another chart the run would go "
                "another way. With reset_state=True the optimizer starts afresh for it; or leave the base as it is"
            )
            found.problems.append(Problem(name, "unsupported", text))
    return found


def _not_turning(optimizer: Optimizer, original: Tensor, state: Mapping[object, object]) -> str:
    """Why a state has no image in another chart; empty if it has one. See Note [Equivariant optimizers]."""
    if type(optimizer) is not torch.optim.SGD:
        return "only what torch.optim.SGD holds turns with it"
    momentum = state.get(MOMENTUM)
    if set(state) != {MOMENTUM} or not isinstance(momentum, Tensor):
        return f"only a {MOMENTUM} is known to turn with it"
    if _torch.overrides_dispatch(momentum) or momentum.layout is not torch.strided or momentum.device.type == "meta":
        return f"its {MOMENTUM} is not an ordinary tensor"
    if momentum.shape != original.shape or momentum.is_complex() != original.is_complex():
        return f"its {MOMENTUM} is {momentum.dtype} of shape {list(momentum.shape)}"
    if not momentum.is_floating_point() and not momentum.is_complex():
        return f"its {MOMENTUM} is {momentum.dtype}"
    if momentum.requires_grad or may_overlap(momentum):
        return f"its {MOMENTUM} cannot be overwritten in place"
    if not torch.isfinite(momentum).all():
        return f"its {MOMENTUM} holds NaN or infinity"
    return ""


def _is_at_rest(state: Mapping[object, object]) -> bool:
    """Whether a state holds no more than counters and zeros, which are the same in all charts."""
    return all(_is_counter_or_zero(entry) for entry in state.values())


def _is_counter_or_zero(entry: object) -> bool:
    if entry is None or isinstance(entry, (bool, int, float)):
        return True
    if not isinstance(entry, Tensor) or _torch.overrides_dispatch(entry) or entry.layout is not torch.strided:
        return False
    return entry.dim() == 0 or (entry.device.type != "meta" and not _torch.has_nonzero(entry))


def _entries(state: Mapping[object, object]) -> str:
    return shorten(sorted(str(key) for key in state), 8)
