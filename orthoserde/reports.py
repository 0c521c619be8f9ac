"""What a save or a load did, told to the caller."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field


class Fidelity(enum.IntEnum):
    """How faithfully a tensor was restored; a larger value is more faithful."""

    #: Only the computed weight was there: outputs are equal, training starts in a new chart.
    INFERENCE = 1
    #: The state is restored bit for bit, but there was no configuration to check it against.
    UNVERIFIED = 2
    #: The state is restored bit for bit and the configuration was checked.
    EXACT = 3

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class SaveReport:
    """What was saved.

    Attributes:
        path: The file.
        file_bytes: Its size in bytes.
        tensors: Number of stored tensors.
        parametrized: Number of parametrized tensors among what was saved.
        aliases: Names of tied tensors that were stored under another name, with that name.
        left_out: Keys that ``select`` left out.
        opaque: Parametrized tensors with an unregistered class: their state is saved, their configuration is not known.
        needs_orthoserde: Why ``model.load_state_dict(load_file(path))`` would not do without orthoserde; empty if it
            would.
    """

    path: str
    file_bytes: int
    tensors: int
    parametrized: int
    aliases: Mapping[str, str] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    opaque: tuple[str, ...] = ()
    needs_orthoserde: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [
            f"saved {self.path}: {self.tensors} tensors, {self.parametrized} of the model's tensors parametrized, "
            f"{self.file_bytes} bytes"
        ]
        if self.aliases:
            lines.append(f"  tied and stored once: {len(self.aliases)}")
        if self.left_out:
            lines.append(f"  left out by select: {len(self.left_out)}")
        if self.opaque:
            lines.append(f"  not registered, so a load cannot check their configuration: {shorten(self.opaque)}")
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
        fidelity: The worst over all tensors.
        notes: What else the caller should know, one sentence each.
    """

    path: str
    missing_keys: list[str]
    unexpected_keys: list[str]
    tensors: Mapping[str, TensorReport]
    fidelity: Fidelity
    notes: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[list[str]]:
        yield self.missing_keys
        yield self.unexpected_keys

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> list[str]:
        return (self.missing_keys, self.unexpected_keys)[index]

    def __str__(self) -> str:
        lines = [f"loaded {self.path}: {self.fidelity}, {len(self.tensors)} parametrized tensors"]
        for label, keys in (("missing", self.missing_keys), ("unexpected", self.unexpected_keys)):
            if keys:
                lines.append(f"  {label}: {shorten(keys)}")
        lines += [f"  {report.name}: {report.fidelity}, {report.action}" for report in _notable(self.tensors)]
        lines += [f"  {note}" for note in self.notes]
        return "\n".join(lines)


def _notable(tensors: Mapping[str, TensorReport], most: int = 20) -> list[TensorReport]:
    """The parametrized tensors of which more is to be said than that they were restored exactly and in place."""
    ranked = sorted(tensors.values(), key=lambda report: report.fidelity)
    return [report for report in ranked if report.fidelity < Fidelity.EXACT or report.action != RESTORED][:most]


#: What is done with a parametrized tensor when nothing out of the ordinary is.
RESTORED = "restored in place"


def shorten(names: list[str] | tuple[str, ...], most: int = 5) -> str:
    """Join names for a message, the first few of them."""
    shown = ", ".join(names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown
