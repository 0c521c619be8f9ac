"""What a save, a load, a verification, a diagnosis or a change of charts found or did, told to the caller."""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from orthoserde.errors import SHOWN_CHARACTERS, legible_name
from orthoserde.wording import counted


class Fidelity(enum.IntEnum):
    """How faithfully a tensor was restored; a larger value is more faithful.

    ``EXACT``: the state is restored bit for bit, and the configuration was checked.

    ``UNVERIFIED``: the state is restored bit for bit (or widened without loss); there was no configuration to check.

    ``INFERENCE``: only the computed weight was there. Outputs are equal; training stays on the constraint, but starts
    afresh at that weight.
    """

    INFERENCE = 1
    UNVERIFIED = 2
    EXACT = 3

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class SaveReport:
    """What was saved.

    Attributes:
        path: The file, or the folder of shards.
        file_bytes: Its size in bytes; of shards, that of all of them and of their index.
        tensors: Number of stored tensors.
        parametrized: Number of parametrized tensors among what was saved.
        aliases: Names of tied tensors that were stored under another name, with that name.
        left_out: Keys that the model has and the file was told not to hold.
        opaque: Parametrized tensors with an unregistered class: their state is saved, their configuration is not known.
        unconfigured: Parametrized tensors and modules of a registered class whose arguments are not known: they are not
            JSON, or the object was made before its class was registered.
        needs_orthoserde: Why ``model.load_state_dict(load_file(path))`` would not do without orthoserde; empty if it
            would.
        compact: Parametrized tensors whose base is stored as its first columns.
        untried: Parametrized tensors whose base is stored whole by ``base="auto"``, because it takes more than half a
            second to find out whether columns would do.
        training: What training state was saved, in words; empty if none was.
    """

    path: str
    file_bytes: int
    tensors: int
    parametrized: int
    aliases: Mapping[str, str] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    opaque: tuple[str, ...] = ()
    unconfigured: tuple[str, ...] = ()
    needs_orthoserde: tuple[str, ...] = ()
    compact: tuple[str, ...] = ()
    untried: tuple[str, ...] = ()
    training: str = ""

    def __str__(self) -> str:
        lines = [
            f"saved {self.path}: {counted(self.tensors, 'tensor')}, "
            f"{counted(self.parametrized, 'weight')} parametrized, {self.file_bytes} bytes"
        ]
        if self.training:
            lines.append(f"  training state: {self.training}")
        if self.compact:
            lines.append(f"  bases stored as columns: {len(self.compact)}")
        if self.untried:
            lines.append(f"  bases stored whole, where base='compact' would try columns: {len(self.untried)}")
        if self.aliases:
            lines.append(f"  tied and stored once: {len(self.aliases)}")
        if self.left_out:
            lines.append(f"  left out: {len(self.left_out)}")
        if self.opaque:
            lines.append(f"  not registered, so a load cannot check their configuration: {shorten(self.opaque)}")
        if self.unconfigured:
            lines.append(f"  registered, but made with arguments that are not known: {shorten(self.unconfigured)}")
        lines += [f"  needs orthoserde to load: {reason}" for reason in self.needs_orthoserde]
        return "\n".join(lines)


@dataclass(frozen=True)
class TensorReport:
    """What a load did with one parametrized tensor.

    Attributes:
        name: Dotted name, such as ``"layers.0.weight"``.
        fidelity: How faithfully it was restored.
        action: What was done, in words.
    """

    name: str
    fidelity: Fidelity
    action: str
    measure: Callable[[], float | None] = field(repr=False, compare=False)

    @property
    def residual(self) -> float | None:
        """Distance of the computed tensor from its constraint, None where there is none to measure.

        It is computed when asked, from the state of the model at that moment: evaluating a large parametrization takes
        seconds, so a load does not do it unasked.
        """
        return self.measure()


@dataclass(frozen=True)
class LoadReport:
    """What was loaded. Unpacks as ``missing_keys, unexpected_keys``, as torch's and safetensors' results do.

    Attributes:
        path: The file.
        missing_keys: Keys of the model that the file does not hold (``strict=False`` only).
        unexpected_keys: Keys of the file that the model does not have (``strict=False`` only).
        tensors: What was done with each parametrized tensor, by name.
        fidelity: The worst over all tensors; no better than ``UNVERIFIED`` if any is missing.
        loaded: Number of tensors that were written or made.
        notes: What else the caller should know, one sentence each.
        state: Plain values of the training state in the file, by name, such as a step that was counted.
        training: What training state was loaded, in words; empty if none was.
    """

    path: str
    missing_keys: list[str]
    unexpected_keys: list[str]
    tensors: Mapping[str, TensorReport]
    fidelity: Fidelity
    loaded: int = 0
    notes: tuple[str, ...] = ()
    state: Mapping[str, object] = field(default_factory=dict)
    training: str = ""

    def __iter__(self) -> Iterator[list[str]]:
        yield self.missing_keys
        yield self.unexpected_keys

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> list[str]:
        return (self.missing_keys, self.unexpected_keys)[index]

    def __str__(self) -> str:
        lines = [
            f"loaded {self.path}: {self.fidelity}, {counted(self.loaded, 'tensor')}, "
            f"{counted(len(self.tensors), 'weight')} parametrized"
        ]
        for label, keys in (("missing", self.missing_keys), ("unexpected", self.unexpected_keys)):
            if keys:
                lines.append(f"  {label}: {shorten(keys)}")
        if self.training:
            lines.append(f"  training state: {self.training}")
        notable = _notable(self.tensors)
        lines += [f"  {report.name}: {report.fidelity}, {report.action}" for report in notable[:20]]
        if len(notable) > 20:
            lines.append(f"  ... and {len(notable) - 20} more (see the tensors attribute)")
        lines += [f"  {note}" for note in self.notes]
        return "\n".join(legible_name(line, SHOWN_CHARACTERS) for line in lines)


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
            lines.append(f"  damaged: {printable(shorten(self.damaged))}")
        if self.residuals:
            lines.append(f"  {self.constraints}")
        if self.off_constraint:
            lines.append(f"  off their constraint: {printable(shorten(self.off_constraint))}")
        for label, reasons in (("does not fit", self.misfits), ("not measured", self.not_measured)):
            lines += [f"  {printable(name)}: {label}: {printable(why)}" for name, why in list(reasons.items())[:SHOWN]]
            if len(reasons) > SHOWN:
                lines.append(f"  {label}: {len(reasons) - SHOWN} more")
        return "\n".join(lines)


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


class Severity(enum.IntEnum):
    """How bad a finding is; a larger value is worse.

    ``NOTICE``: it may be meant, and costs nothing if it is.

    ``WARNING``: training, or a resume, goes another way than one expects, or will under the stated condition.

    ``SERIOUS``: a weight is wrong now, or will be within a few steps.
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
    """

    where: str
    severity: Severity
    code: Code
    text: str
    remedy: str

    def __str__(self) -> str:
        where = printable(self.where) or "(model)"
        return f"{self.severity} {where}: {self.text} [{self.code}]. Remedy: {self.remedy}"


def _notable(tensors: Mapping[str, TensorReport]) -> list[TensorReport]:
    """The parametrized tensors of which more is to be said than that they were restored exactly and in place."""
    ranked = sorted(tensors.values(), key=lambda report: report.fidelity)
    return [report for report in ranked if report.fidelity < Fidelity.EXACT or report.action != RESTORED]


#: ``str`` of a report lists this many things of a sort.
SHOWN = 20

#: What is done with a parametrized tensor when nothing out of the ordinary is.
RESTORED = "restored in place"


def printable(text: str) -> str:
    """Escape what a terminal would obey instead of show: names in the files of strangers may hold anything."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def shorten(names: list[str] | tuple[str, ...], most: int = 5) -> str:
    """Join names for a message, the first few of them; they may be those of a stranger."""
    shown = ", ".join(map(legible_name, names[:most]))
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown
