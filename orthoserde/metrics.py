"""Debug metrics: what a save or load did to each parametrized tensor, for logs and plots. Off, they cost nothing."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from orthoserde import _torch
from orthoserde.registry import Registry
from orthoserde.registry.codec import own_tensors
from orthoserde.walk import ParametrizedTensor, take_inventory
from orthoserde.weights import live

#: Takes one mapping for each parametrized tensor: names of metrics to strings and numbers, None where not measured.
Sink = Callable[[Mapping[str, object]], None]

#: The environment variable that is read where ``debug`` is None.
VARIABLE = "ORTHOSERDE_DEBUG"

_OFF = ("", "0", "false", "no", "off")

logger = logging.getLogger("orthoserde")


def sink_of(debug: bool | Sink | None) -> Sink | None:
    """Where metrics go; None where they are off.

    Args:
        debug: True for the ``orthoserde`` logger, False for nowhere, a callable for itself; None to do as the
            environment variable ``ORTHOSERDE_DEBUG`` says, which is off where it is not set.
    """
    if debug is None:
        debug = os.environ.get(VARIABLE, "").strip().lower() not in _OFF
    if callable(debug):
        return debug
    return _log if debug else None


def _log(metrics: Mapping[str, object]) -> None:
    parts = [
        f"{name}={value:.3g}" if isinstance(value, float) else f"{name}={value}" for name, value in metrics.items()
    ]
    logger.info("%s", " ".join(parts))


class Watch:
    """Measures what parametrizations and hooks compute in a model before something happens to it, and after."""

    def __init__(self, event: str, model: nn.Module, registry: Registry) -> None:
        self._event = event
        self._model = model
        self._registry = registry
        self._before = {tensor.name: _residual(tensor, registry) for tensor in _tensors(model)}
        self._start = time.perf_counter()

    def report(self, sink: Sink) -> None:
        """Measure again, and hand out one mapping for each parametrized tensor.

        Its keys: ``event``; ``tensor``, the name; ``residual_before`` and ``residual``, distances from the constraint;
        ``original_norm`` and ``base_norm``, Frobenius norms; ``bytes`` of its state; ``seconds``, wall time of the
        whole save or load.
        """
        seconds = time.perf_counter() - self._start
        for tensor in _tensors(self._model):
            parts = [value for link in tensor.parametrizations for value in own_tensors(_torch.unwrap(link)).values()]
            base = own_tensors(_torch.unwrap(tensor.parametrizations[0])).get("base")
            sink(
                {
                    "event": self._event,
                    "tensor": tensor.name,
                    "residual_before": self._before.get(tensor.name),
                    "residual": _residual(tensor, self._registry),
                    "original_norm": _norm(*tensor.originals.values()),
                    "base_norm": None if base is None else _norm(base),
                    "bytes": sum(
                        value.numel() * value.element_size() for value in (*tensor.originals.values(), *parts)
                    ),
                    "seconds": seconds,
                }
            )


def _tensors(model: nn.Module) -> tuple[ParametrizedTensor, ...]:
    inventory = take_inventory(model)
    return (*inventory.parametrized, *inventory.hooked)


def _residual(tensor: ParametrizedTensor, registry: Registry) -> float | None:
    on_meta = any(original.device.type == "meta" for original in tensor.originals.values())
    missing = any(None in _torch.own_buffers(_torch.unwrap(link)).values() for link in tensor.parametrizations)
    return None if on_meta or missing else live.residual(tensor, registry)


def _norm(*tensors: Tensor) -> float | None:
    if any(tensor.device.type == "meta" for tensor in tensors):
        return None
    with torch.no_grad():
        return float(sum(float(tensor.detach().abs().to(torch.float64).square().sum()) for tensor in tensors) ** 0.5)
