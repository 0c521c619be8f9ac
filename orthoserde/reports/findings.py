"""What a diagnosis tells its caller."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Literal

from orthoserde.wording import printable


class Severity(enum.IntEnum):
    """How bad a finding is; a larger value is worse.

    ``NOTICE``: it may be meant, and costs nothing if it is.

    ``WARNING``: training, or a resume, goes another way than one expects, or will under the stated condition.

    ``SERIOUS``: a weight is wrong now, or will be within a few steps.

    Example:
        >>> import orthoserde
        >>> orthoserde.Severity.SERIOUS > orthoserde.Severity.WARNING > orthoserde.Severity.NOTICE
        True
    """

    NOTICE = 1
    WARNING = 2
    SERIOUS = 3

    def __str__(self) -> str:
        return self.name


#: What a finding can be about; docs/how-to/find-traps.md explains each.
Code = Literal[
    "autocast-orthogonal",
    "base-missing",
    "base-off-constraint",
    "cached-copy",
    "frozen-in-optimizer",
    "half-precision-orthogonal",
    "held-twice",
    "householder-diagonal",
    "not-finite",
    "not-in-optimizer",
    "not-measured",
    "optimizer-orphan",
    "optimizer-predates-parametrization",
    "optimizer-state-not-finite",
    "optimizer-state-shape",
    "optimizer-turns-householder",
    "tied-original",
    "weight-decay-householder",
    "weight-decay-orthogonal",
    "weight-not-finite",
    "weight-off-constraint",
]


@dataclass(frozen=True)
class Finding:
    """A trap in a live model.

    Attributes:
        where: Dotted name of the tensor or module, ``""`` for the whole model.
        severity: How bad it is.
        code: A short name of the trap, which stays the same from version to version.
        text: What is so, and what it leads to.
        remedy: What to do.

    Example:
        >>> import torch, orthoserde
        >>> model = orthoserde.orthogonal(torch.nn.Linear(8, 4))
        >>> (finding,) = orthoserde.diagnose(model, torch.optim.AdamW(model.parameters()))
        >>> finding.where, str(finding.severity), finding.code
        ('weight', 'SERIOUS', 'weight-decay-householder')
    """

    where: str
    severity: Severity
    code: Code
    text: str
    remedy: str

    def __str__(self) -> str:
        where = printable(self.where) or "(model)"
        return f"{self.severity} {where}: {self.text} [{self.code}]. Remedy: {self.remedy}"
