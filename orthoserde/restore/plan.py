"""The plan of a load: what goes where, and everything that does not fit. Making one changes nothing."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from orthoserde.errors import Problem
from orthoserde.reports import Fidelity
from orthoserde.restore.attach import Attachment
from orthoserde.tensor_bytes import span


@dataclass(frozen=True, slots=True)
class Write:
    """Elements of a stored tensor that go into an existing one, in place.

    Attributes:
        key: Key in the model.
        stored: Key in the file.
        target: The tensor to overwrite.
    """

    key: str
    stored: str
    target: Tensor


@dataclass(frozen=True, slots=True)
class Make:
    """A stored tensor for which a new one is made: the model has None or a meta tensor in its place.

    Attributes:
        key: Key in the model.
        stored: Key in the file.
        dtype: dtype of the new tensor.
        device: Device of the new tensor.
        place: Puts the new tensor into the model, and returns what takes it out again.
    """

    key: str
    stored: str
    dtype: torch.dtype
    device: torch.device
    place: Callable[[Tensor], Callable[[], None]]


@dataclass(frozen=True, slots=True)
class Tie:
    """Tensors of the file that go into the same elements of the model, and so must agree."""

    key: str
    stored: tuple[str, ...]


@dataclass
class Outcome:
    """What will be reported of one parametrized tensor."""

    name: str
    module: nn.Module
    tensor_name: str
    fidelity: Fidelity
    action: str


@dataclass
class Plan:
    """All that a load would do, and all that keeps it from doing it.

    Attributes:
        writes: Tensors to overwrite in place.
        makes: Tensors to make.
        ties: Stored tensors that must agree.
        attachments: Parametrizations to attach to bare modules.
        problems: What keeps the load from being done at all.
        differs: Whether a class, a configuration or a shape is another in the file than in the model.
        missing: Keys that the model has and the file does not.
        unexpected: Keys that the file has and the model does not.
        outcomes: What will be reported of each parametrized tensor.
        fidelity: The worst over everything else.
        notes: What else the caller should know.
        holders: Modules that may hold weak references to meta parameters, as RNNs do.
        graphs: Weights that hooks have left on the meta device, with graphs that hold on to meta parameters.
        kinds: Kinds of the model's registered modules by path.
        parameters: The model's parameters by key, as they will be.
        rounded: Bases, or their columns, that were stored too coarsely to be orthogonal: their dtype in the file.
    """

    writes: list[Write] = field(default_factory=list)
    makes: list[Make] = field(default_factory=list)
    ties: list[Tie] = field(default_factory=list)
    attachments: list[Attachment] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    differs: bool = False
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)
    fidelity: Fidelity = Fidelity.EXACT
    notes: list[str] = field(default_factory=list)
    holders: list[nn.Module] = field(default_factory=list)
    graphs: list[Tensor] = field(default_factory=list)
    kinds: dict[str, str] = field(default_factory=dict)
    parameters: dict[str, Tensor] = field(default_factory=dict)
    rounded: dict[str, str] = field(default_factory=dict)

    @functools.cached_property
    def sharing_memory(self) -> list[list[Write]]:
        """Groups of writes whose targets reach over common memory, two or more in each; found out once, at the end."""
        return list(_overlapping(self.writes))

    def mismatch(self, where: str, text: str) -> None:
        """Record that the file and the model disagree."""
        self.problems.append(Problem(where, "mismatch", text))

    def lower(self, fidelity: Fidelity) -> None:
        """Record that something was restored no more faithfully than this."""
        self.fidelity = min(self.fidelity, fidelity)


def _overlapping(writes: list[Write]) -> Iterator[list[Write]]:
    spans = [
        (str(write.target.device), *span(write.target), write)
        for write in writes
        if write.target.numel() and write.target.data_ptr()
    ]
    cluster: list[Write] = []
    device, end = "", 0
    for where, start, stop, write in sorted(spans, key=lambda item: item[:3]):
        if where == device and start < end:
            cluster.append(write)
            end = max(end, stop)
            continue
        if len(cluster) > 1:
            yield cluster
        cluster, device, end = [write], where, stop
    if len(cluster) > 1:
        yield cluster
