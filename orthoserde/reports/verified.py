"""What a verification tells its caller."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from orthoserde.wording import SHOWN, printable, shorten


@dataclass(frozen=True)
class VerifyReport:
    """What can be said of a file from its own bytes, without a model.

    Attributes:
        path: The file.
        has_configuration: Whether this library wrote it; else it is names, shapes and values alone.
        digests: Whether it has digests. Without them it cannot be known whether its bytes are those that were saved.
        tensors: Number of stored tensors.
        damaged: Keys of tensors whose bytes do not match their digest.
        residuals: Distance of each computed tensor from its constraint, by name, NaN where the tensor is not finite;
            None where its kind has no constraint to measure.
        off_constraint: Names of computed tensors that are farther from their constraint than rounding takes them.
        misfits: Names of parametrized tensors whose stored state is not one that their recorded configuration can have,
            with why.
        not_measured: Names of parametrized tensors that cannot be computed from the file alone, with why.
        causes: For each of :attr:`off_constraint`, why, as far as the file tells, and what to do.

    Example:
        >>> import tempfile, torch, orthoserde
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     saved = orthoserde.save(orthoserde.orthogonal(torch.nn.Linear(8, 4)), f"{folder}/model.safetensors")
        ...     report = orthoserde.verify(f"{folder}/model.safetensors")
        >>> report.ok, report.integrity
        (True, '3 of 3 tensors match their digests')
    """

    path: str
    has_configuration: bool
    digests: bool
    tensors: int
    damaged: tuple[str, ...] = ()
    residuals: Mapping[str, float | None] = field(default_factory=dict)
    off_constraint: tuple[str, ...] = ()
    misfits: Mapping[str, str] = field(default_factory=dict)
    not_measured: Mapping[str, str] = field(default_factory=dict)
    causes: Mapping[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong in what was checked; :attr:`digests` and :attr:`not_measured` say what was not."""
        return not (self.damaged or self.off_constraint or self.misfits)

    @property
    def verdict(self) -> str:
        """:attr:`ok` in words."""
        if not self.ok:
            return "NOT OK"
        return "ok" if self.digests else "ok, as far as it could be checked"

    @property
    def integrity(self) -> str:
        """What the digests say, in words."""
        if not self.digests:
            return "the file has no digests, so it cannot be known whether its bytes are those that were saved"
        return f"{self.tensors - len(self.damaged)} of {self.tensors} tensors match their digests"

    @property
    def constraints(self) -> str:
        """What the residuals say, in words."""
        measured = [residual for residual in self.residuals.values() if residual is not None]
        if not measured:
            return "no computed tensor with a constraint could be measured"
        largest = max(measured, key=lambda residual: (math.isnan(residual), residual))
        on = len(measured) - len(self.off_constraint)
        return f"{on} of {len(measured)} measured tensors are on their constraint, largest residual {largest:.2g}"

    def __str__(self) -> str:
        lines = [f"verified {printable(self.path)}: {self.verdict}", f"  {self.integrity}"]
        if self.damaged:
            lines.append(f"  damaged: {shorten(self.damaged)}")
        if self.residuals:
            lines.append(f"  {self.constraints}")
        by_cause: dict[str, list[str]] = {}
        for name in self.off_constraint:
            by_cause.setdefault(self.causes.get(name, "not known why"), []).append(name)
        for why, names in list(by_cause.items())[:SHOWN]:
            lines.append(f"  off their constraint: {shorten(names)}: {printable(why)}")
        if len(by_cause) > SHOWN:
            lines.append(f"  off their constraint: {sum(map(len, list(by_cause.values())[SHOWN:]))} more")
        for label, reasons in (("does not fit", self.misfits), ("not measured", self.not_measured)):
            lines += [f"  {printable(name)}: {label}: {printable(why)}" for name, why in list(reasons.items())[:SHOWN]]
            if len(reasons) > SHOWN:
                lines.append(f"  {label}: {len(reasons) - SHOWN} more")
        return "\n".join(lines)
