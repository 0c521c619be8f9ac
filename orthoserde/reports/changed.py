"""What a change of a live model tells its caller: one of charts, or to plain tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from orthoserde.wording import SHOWN, counted, shorten


@dataclass(frozen=True)
class ChartReport:
    """What became of the chart of one orthogonal tensor.

    Attributes:
        name: Dotted name, such as ``"layers.0.weight"``.
        action: What was done, in words.
        canonicalized: Whether its base is another than before.
        weight_change: Largest change of an entry of the weight, as the parametrization computes it in its own dtype.
            Exactly 0 where ``original`` has its initial value.
        rotated: What was rotated along: ``original``, its gradient, momentum of an optimizer.
        reset: Optimizer states that were removed, and start afresh.

    Example:
        >>> import torch, orthoserde
        >>> from torch.nn.utils.parametrizations import orthogonal
        >>> report = orthoserde.canonicalize_(orthogonal(torch.nn.Linear(8, 4))).tensors["weight"]
        >>> report.canonicalized, report.weight_change
        (True, 0.0)
    """

    name: str
    action: str
    canonicalized: bool = False
    weight_change: float = 0.0
    rotated: tuple[str, ...] = ()
    reset: tuple[str, ...] = ()


@dataclass(frozen=True)
class CanonicalizeReport:
    """What ``canonicalize_`` did.

    Attributes:
        tensors: What became of each tensor with torch's orthogonal parametrization, by name.

    Example:
        >>> import torch, orthoserde
        >>> from torch.nn.utils.parametrizations import orthogonal
        >>> model = torch.nn.Sequential(orthogonal(torch.nn.Linear(8, 4)), torch.nn.Linear(4, 2))
        >>> orthoserde.canonicalize_(model).canonicalized
        ('0.weight',)
    """

    tensors: Mapping[str, ChartReport]

    @property
    def canonicalized(self) -> tuple[str, ...]:
        """Names of the tensors whose base is another than before."""
        return tuple(name for name, report in self.tensors.items() if report.canonicalized)

    @property
    def weight_change(self) -> float:
        """Largest change of an entry of any weight."""
        return max((report.weight_change for report in self.tensors.values()), default=0.0)

    def __str__(self) -> str:
        done = self.canonicalized
        lines = [f"canonicalized {len(done)} of {len(self.tensors)} orthogonal weights"]
        if done:
            lines[0] += f", largest change of a weight {self.weight_change:.2g}"
        for report in list(self.tensors.values())[:SHOWN]:
            lines.append(f"  {report.name}: {report.action}")
            lines += [f"    rotated along: {shorten(report.rotated)}"] if report.rotated else []
            lines += [f"    reset: {shorten(report.reset)}"] if report.reset else []
        if len(self.tensors) > SHOWN:
            lines.append(f"  ... and {len(self.tensors) - SHOWN} more (see the tensors attribute)")
        return "\n".join(lines)


@dataclass(frozen=True)
class BakeReport:
    """What ``bake_`` did.

    Attributes:
        tensors: What each plain tensor was computed by, in words, by name.
        parameters_replaced: Names of those that are new Parameter objects, which an earlier optimizer does not hold.

    Example:
        >>> import torch, orthoserde
        >>> print(orthoserde.bake_(orthoserde.orthogonal(torch.nn.Linear(8, 4))))
        baked 1 tensor: plain now
          weight: torch>orthogonal
    """

    tensors: Mapping[str, str]
    parameters_replaced: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"baked {counted(len(self.tensors), 'tensor')}: plain now"]
        lines += [f"  {name}: {what}" for name, what in list(self.tensors.items())[:SHOWN]]
        if len(self.tensors) > SHOWN:
            lines.append(f"  ... and {len(self.tensors) - SHOWN} more (see the tensors attribute)")
        if self.parameters_replaced:
            lines.append(f"  new parameters: {shorten(self.parameters_replaced)}; build the optimizer anew")
        return "\n".join(lines)
