"""Give a tensor its canonical base, with all that goes along, or leave it as it was."""

from __future__ import annotations

import contextlib
from functools import partial

import torch
from torch import Tensor

from orthoserde import _torch
from orthoserde.charts.plan import Change
from orthoserde.charts.states import Reset
from orthoserde.charts.survey import CODEC, Chart
from orthoserde.charts.turn import turning
from orthoserde.orthonormal.completion import row_parts
from orthoserde.reports import ChartReport
from orthoserde.tensor_bytes import column_major_strides


def carry_out(change: Change) -> ChartReport:
    """Change one tensor. If that fails or is interrupted, it is undone."""
    chart = change.chart
    before = None if chart.at_start else _computed(chart, chart.base)
    with contextlib.ExitStack() as undo:
        base = _put_base(change, undo)
        for tensor, rows in change.turned.values():
            _overwrite(turning(tensor, chart.k), rows, undo)
        for reset in change.resets:
            _remove(reset, undo)
        _torch.forget_cached(chart.record.module, chart.record.tensor_name)
        weight_change = 0.0 if before is None else _largest_difference(before, _computed(chart, base))
        undo.pop_all()
    return ChartReport(
        chart.name,
        "its base has another memory layout" if chart.relaid else "its base is canonical now",
        canonicalized=True,
        weight_change=weight_change,
        rotated=tuple(change.turned),
        reset=tuple(reset.label for reset in change.resets),
    )


def _put_base(change: Change, undo: contextlib.ExitStack) -> Tensor:
    """Complete the first columns canonically: in place where the base is column-major, else in a new buffer."""
    chart, old = change.chart, change.chart.base
    if old.stride() == column_major_strides(old.shape):
        kept = old.detach().clone()
        undo.callback(_write, old, kept)
        base = old
    else:
        base = torch.empty_like(old.mT, memory_format=torch.contiguous_format).mT
        base[..., : chart.k] = old.detach()[..., : chart.k]
    n, k = base.size(-1), chart.k
    for index, completion in change.turn.completions.items():
        for part in row_parts(0, n, n - k):
            _write(base.detach()[index][part, k:], completion.rows(part))
    if base is not old:
        undo.callback(_torch.set_buffer, chart.link, "base", old)
        _torch.set_buffer(chart.link, "base", base)
        if not old.is_inference():
            # A graph that was recorded with the old base must not give gradients in its chart.
            torch.autograd.graph.increment_version(old)
    return base


def _overwrite(target: Tensor, rows: Tensor, undo: contextlib.ExitStack) -> None:
    undo.callback(_write, target, target.clone())
    _write(target, rows)


def _write(target: Tensor, values: Tensor) -> None:
    # Tensors made in inference mode can only be written there.
    with torch.inference_mode(target.is_inference()), torch.no_grad():
        target.copy_(values)


def _remove(reset: Reset, undo: contextlib.ExitStack) -> None:
    state = reset.optimizer.state
    undo.callback(partial(state.__setitem__, reset.parameter, state[reset.parameter]))
    del state[reset.parameter]


def _computed(chart: Chart, base: Tensor) -> Tensor:
    return CODEC.compute(chart.config, {"original": chart.original.detach(), "base": base.detach()})


def _largest_difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())
