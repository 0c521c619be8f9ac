"""Live models to canonical bases: survey, plan, check everything, and only then change."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from orthoserde import modes
from orthoserde.arguments import check_flags
from orthoserde.charts.apply import carry_out
from orthoserde.charts.plan import make_plan
from orthoserde.charts.states import given_optimizers
from orthoserde.optimizers import Optimizers
from orthoserde.reports import CanonicalizeReport


def canonicalize_(
    model: nn.Module,
    *,
    optimizer: Optimizers | Literal[False] | None = None,
    reset_state: bool = False,
) -> CanonicalizeReport:
    """Give the orthogonal parametrizations of a live model canonical bases, in place.

    Torch completes the base of a weight that is not square by random columns, so that a file must hold n x n numbers of
    it. With the canonical completion, as ``orthoserde.orthogonal`` registers it, the first k columns are enough, and
    ``save`` stores no more. The weights stay what they are, up to rounding: ``original`` is turned into the coordinates
    of the new base, and with it its gradient and the momentum of ``torch.optim.SGD``, so that training goes on as it
    would have, up to rounding. Parameters, training mode and random state are kept, and so is the first k columns'
    every bit. Where ``original`` has its initial value, nothing but the base changes.

    Args:
        model: Any module. Looked at are tensors with ``torch.nn.utils.parametrizations.orthogonal``, real or complex,
            single matrices ``(n, k)`` and batches ``(..., n, k)``, in float32 or better; others are left as they are.
            Square weights, weights without trivialization and bases that are canonical already stay too.
        optimizer: All optimizers that train the model: one, an iterable, or a mapping of names; ``False`` if there is
            none. It has to be given once training has begun. Its state may only be that of ``torch.optim.SGD`` itself:
            Adam and its kin keep numbers for each coordinate, which mean nothing in others. State that is empty or zero
            is never in the way. What an optimizer keeps elsewhere, or does with coordinates without keeping any, is not
            seen.
        reset_state: Whether state that cannot go along is removed instead, so that the optimizer starts afresh, for
            these tensors alone.

    Returns:
        What became of each tensor, with the largest change of its weight. To measure that, a weight whose ``original``
        has left its initial value is computed twice.

    Raises:
        CanonicalizeError: Something is in the way, all of it is listed, and nothing has changed: optimizer state that
            would mean another run, a base that is damaged (cast to half precision, or of another weight) or not a
            buffer of its own, NaN, tensors tied to others or on the meta device, another parametrization before it.
        TypeError: ``model`` is no module, or ``optimizer`` no optimizer.

    Example:
        >>> import torch, orthoserde
        >>> from torch.nn.utils.parametrizations import orthogonal
        >>> layer = orthogonal(torch.nn.Linear(8, 4))
        >>> print(orthoserde.canonicalize_(layer))
        canonicalized 1 of 1 orthogonal weights, largest change of a weight 0
          weight: its base is canonical now

    Source: torch/nn/utils/parametrizations.py, ``_Orthogonal`` (torch 2.13); Note [Change of chart] in
    orthoserde/charts/turn.py; Note [Equivariant optimizers] in orthoserde/charts/states.py.
    """
    check_flags(reset_state=reset_state)
    optimizers = given_optimizers(optimizer)
    with modes.undisturbed(), torch.no_grad():
        reports, changes = make_plan(model, optimizers, reset=reset_state)
        reports |= {change.chart.name: carry_out(change) for change in changes}
    return CanonicalizeReport(reports)
