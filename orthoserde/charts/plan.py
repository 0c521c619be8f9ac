"""All that is going to change, and all that is in the way, before anything changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.optim import Optimizer

from orthoserde import _torch
from orthoserde.charts.states import Reset, States, holds, states_of
from orthoserde.charts.survey import Chart, Place, Survey, gradient_obstacle, place_of_original, survey
from orthoserde.charts.turn import Turn
from orthoserde.errors import CanonicalizeError, Problem
from orthoserde.reports import ChartReport


@dataclass(frozen=True)
class Change:
    """What becomes of one tensor.

    Attributes:
        chart: The tensor and its base.
        turn: The change of chart.
        turned: By label, a tensor and the part of it that turns, in the canonical chart.
        resets: Optimizer states that are removed.
    """

    chart: Chart
    turn: Turn
    turned: dict[str, tuple[Tensor, Tensor]]
    resets: tuple[Reset, ...]


def make_plan(
    model: nn.Module, optimizers: Sequence[Optimizer] | None, *, reset: bool
) -> tuple[dict[str, ChartReport], list[Change]]:
    """Plan the change of all charts of a model.

    Args:
        model: Any module.
        optimizers: All that may train it; None where that is not known.
        reset: Whether optimizer states that do not turn are removed.

    Returns:
        Reports by name, those of tensors that change still empty, and the changes.

    Raises:
        CanonicalizeError: Something is in the way; all of it is listed.
    """
    found = survey(model)
    changes = [_plan_one(found, chart, optimizers, reset=reset) for chart in found.charts]
    _check_memory(found, changes)
    if found.problems:
        raise CanonicalizeError(
            f"{type(model).__name__}: its bases cannot be made canonical; nothing was changed",
            found.problems,
        )
    return found.reports, changes


def _plan_one(found: Survey, chart: Chart, optimizers: Sequence[Optimizer] | None, *, reset: bool) -> Change:
    turn = Turn(chart.base, chart.k)
    if chart.relaid:
        return Change(chart, turn, {}, ())
    obstacle = gradient_obstacle(chart) or _optimizer_obstacle(chart, optimizers)
    states = states_of(chart.name, chart.original, turn, optimizers or (), reset=reset)
    found.problems += [Problem(chart.name, "unsupported", obstacle)] if obstacle else []
    found.problems += states.problems
    turned: dict[str, tuple[Tensor, Tensor]] = {}
    if not obstacle:
        for label, tensor in _candidates(chart, states).items():
            rows = turn.turned(tensor)
            if rows is not None:
                turned[label] = (tensor, rows)
    return Change(chart, turn, turned, tuple(states.resets))


def _candidates(chart: Chart, states: States) -> dict[str, Tensor]:
    gradient = chart.gradient
    return {"original": chart.original, **({} if gradient is None else {"its gradient": gradient}), **states.turning}


def _optimizer_obstacle(chart: Chart, optimizers: Sequence[Optimizer] | None) -> str:
    """Whether it cannot be known what an optimizer holds for a tensor that is in training."""
    gradient = chart.gradient
    if chart.at_start and (gradient is None or not _torch.has_nonzero(gradient)):
        return ""
    if optimizers is None:
        return (
            "its original has left its initial value, or has a gradient; pass optimizer=, whose state has to go along, "
            "or optimizer=False if there is none"
        )
    trained = chart.original.requires_grad and bool(optimizers)
    if trained and not any(holds(optimizer, chart.original) for optimizer in optimizers):
        return (
            "its original is in training, and no optimizer that was given holds it; pass all of them, or "
            "requires_grad_(False) for what is not trained"
        )
    return ""


def _check_memory(found: Survey, changes: Sequence[Change]) -> None:
    """Find tensors that are to be overwritten and lie in the memory of others."""
    places: list[tuple[str, Place, str, Tensor]] = []
    for change in changes:
        name = change.chart.name
        places.append((name, place_of_original(change.chart), "original", change.chart.original))
        for number, (label, (tensor, _)) in enumerate(change.turned.items()):
            if tensor is not change.chart.original:
                place: Place = (name, number)
                places.append((name, place, label, tensor))
                found.enter(place, f"{label} ({name})", tensor)
    for name, where, label, tensor in places:
        tied = found.neighbour(where, tensor)
        if tied:
            text = f"{label} lies in the memory of {tied}; untie them first"
            found.problems.append(Problem(name, "unsupported", text))
