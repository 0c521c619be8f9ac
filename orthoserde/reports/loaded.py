"""What a load tells its caller: what it did with each tensor, and how faithfully."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from orthoserde.wording import SHOWN, SHOWN_CHARACTERS, counted, legible_name, printable, shorten

#: What is done with a parametrized tensor when nothing out of the ordinary is.
RESTORED = "restored in place"


class Fidelity(enum.IntEnum):
    """How faithfully a tensor was restored; a larger value is more faithful.

    ``EXACT``: the state is restored bit for bit, and the configuration was checked.

    ``UNVERIFIED``: the state is restored bit for bit (or widened without loss); there was no configuration to check,
    or keys were missing in a load with ``strict=False``.

    ``INFERENCE``: only the computed weight was there. Outputs are equal; training stays on the constraint, but starts
    afresh at that weight.

    Example:
        >>> import orthoserde
        >>> orthoserde.Fidelity.EXACT > orthoserde.Fidelity.UNVERIFIED > orthoserde.Fidelity.INFERENCE
        True
    """

    INFERENCE = 1
    UNVERIFIED = 2
    EXACT = 3

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class TensorReport:
    """What a load did with one parametrized tensor.

    Attributes:
        name: Dotted name, such as ``"layers.0.weight"``.
        fidelity: How faithfully it was restored.
        action: What was done, in words.

    Example:
        >>> import tempfile, torch, orthoserde
        >>> model = orthoserde.orthogonal(torch.nn.Linear(8, 4))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     saved = orthoserde.save(model, f"{folder}/model.safetensors")
        ...     report = orthoserde.load(model, f"{folder}/model.safetensors").tensors["weight"]
        >>> str(report.fidelity), report.residual < 1e-5
        ('EXACT', True)
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

    Example:
        >>> import tempfile, torch, orthoserde
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     saved = orthoserde.save(torch.nn.Linear(2, 2, bias=False), f"{folder}/model.safetensors")
        ...     report = orthoserde.load(torch.nn.Linear(2, 2), f"{folder}/model.safetensors", strict=False)
        >>> missing_keys, unexpected_keys = report
        >>> missing_keys, report.loaded
        (['bias'], 1)
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
            f"loaded {printable(self.path)}: {self.fidelity}, {counted(self.loaded, 'tensor')}, "
            f"{counted(len(self.tensors), 'weight')} parametrized"
        ]
        for label, keys in (("missing", self.missing_keys), ("unexpected", self.unexpected_keys)):
            if keys:
                lines.append(f"  {label}: {shorten(keys)}")
        if self.training:
            lines.append(f"  training state: {self.training}")
        notable = _notable(self.tensors)
        lines += [f"  {report.name}: {report.fidelity}, {report.action}" for report in notable[:SHOWN]]
        if len(notable) > SHOWN:
            lines.append(f"  ... and {len(notable) - SHOWN} more (see the tensors attribute)")
        lines += [f"  {note}" for note in self.notes]
        return "\n".join(legible_name(line, SHOWN_CHARACTERS) for line in lines)


def _notable(tensors: Mapping[str, TensorReport]) -> list[TensorReport]:
    """The parametrized tensors of which more is to be said than that they were restored exactly and in place."""
    ranked = sorted(tensors.values(), key=lambda report: report.fidelity)
    return [report for report in ranked if report.fidelity < Fidelity.EXACT or report.action != RESTORED]
