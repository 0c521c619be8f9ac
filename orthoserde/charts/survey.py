"""Which tensors of a model have a base that can be another, and what is in the way; nothing is changed."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from orthoserde import _torch
from orthoserde.charts.turn import misfit, turning
from orthoserde.checkpoint import LiveTensor
from orthoserde.errors import ConfigError, Problem
from orthoserde.json_values import JSON
from orthoserde.parametrizations.orthogonal import OrthogonalCodec, initial_original
from orthoserde.parametrizations.structured import Orthogonal
from orthoserde.reports import ChartReport
from orthoserde.tensor_bytes import (
    ORTHONORMAL_DTYPES,
    column_major_strides,
    dtype_name,
    may_overlap,
    overlap,
    storage_of,
)
from orthoserde.transforms.columns import is_completion
from orthoserde.walk import Inventory, ParametrizedTensor, Slot, take_inventory

CODEC = OrthogonalCodec()

#: Where a tensor stands: the id of its module, or a name, and its name there.
Place = tuple[object, object]


@dataclass(frozen=True)
class Chart:
    """A trivialized orthogonal parametrization whose base is not the canonical one, and which can have that.

    Attributes:
        name: Name of the tensor.
        record: The tensor.
        link: Its parametrization.
        config: Configuration of that.
        original: ``(..., n, k)`` or ``(..., k, n)``, n > k.
        base: ``(..., n, n)``.
        k: The shorter side.
        relaid: Whether the base is canonical in all but its memory layout.
    """

    name: str
    record: ParametrizedTensor
    link: nn.Module
    config: dict[str, JSON]
    original: Tensor
    base: Tensor
    k: int
    relaid: bool

    @property
    def at_start(self) -> bool:
        """Whether ``original`` has its initial value, at which all charts are the same."""
        return torch.equal(self.original.detach(), initial_original(self.original.detach()))

    @property
    def gradient(self) -> Tensor | None:
        """The gradient of ``original``, if it has one."""
        return self.original.grad if self.original.is_leaf else None


@dataclass
class Survey:
    """All orthogonal tensors of a model.

    Attributes:
        reports: By name, those that stay as they are, and a place for those that do not.
        charts: What can have another base.
        problems: What would have to, and cannot.
        memory: All tensors of the model by allocation, with their place and name.
    """

    reports: dict[str, ChartReport] = field(default_factory=dict)
    charts: list[Chart] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    memory: dict[int, list[tuple[Place, str, Tensor]]] = field(default_factory=dict)

    def enter(self, place: Place, name: str, tensor: Tensor) -> None:
        """Remember where a tensor lies."""
        if not is_lazy(tensor) and not _torch.overrides_dispatch(tensor):
            self.memory.setdefault(storage_of(tensor), []).append((place, name, tensor))

    def neighbour(self, place: Place, tensor: Tensor) -> str:
        """Name of a tensor of another place that lies in the same memory; empty if there is none."""
        others = self.memory.get(storage_of(tensor), [])
        return next((name for where, name, other in others if where != place and _meet(tensor, other)), "")


def survey(model: nn.Module) -> Survey:
    """Look at all orthogonal parametrizations of a model; see :class:`Survey`."""
    inventory = take_inventory(model)
    found = Survey()
    # A module in several places of the model is one place here: its tensors are not tied to each other.
    for slot in inventory.slots.values():
        if slot.tensor is not None:
            found.enter(_place(slot), slot.key, slot.tensor)
    for key, tensor in inventory.transient.items():
        found.enter(("", key), key, tensor)
    uses = Counter(id(_torch.unwrap(link)) for record in inventory.parametrized for link in record.parametrizations)
    for record in inventory.parametrized:
        for index, wrapped in enumerate(record.parametrizations):
            link = _torch.unwrap(wrapped)
            cls = _torch.class_before_parametrizations(link)
            if cls is _torch.OrthogonalModule:
                _look(found, inventory, record, index, link, shared=uses[id(link)] > 1)
            elif cls is Orthogonal:
                name = _name(record, index)
                found.reports[name] = ChartReport(name, "left as it is: the structured form has no other base")
    return found


def _look(
    found: Survey, inventory: Inventory, record: ParametrizedTensor, index: int, link: nn.Module, *, shared: bool
) -> None:
    """Look at one orthogonal link of the chain of one tensor."""
    name = _name(record, index)
    config = CODEC.config(link)
    sizes = [size for size in config["shape"] if isinstance(size, int)] if isinstance(config["shape"], list) else []
    n, k = max(sizes[-2:]), min(sizes[-2:])
    if not config["use_trivialization"]:
        found.reports[name] = ChartReport(name, "left as it is: it has no base")
        return
    if n == k or 0 in sizes:
        found.reports[name] = ChartReport(name, "left as it is: its base has no columns to choose")
        return
    slot = inventory.slots.get(f"{record.prefix}.{index}.base")
    obstacle = _base_obstacle(slot, (*sizes[:-2], n, n))
    if obstacle or slot is None or slot.tensor is None:
        found.problems.append(Problem(name, "unsupported", obstacle))
        return
    base = slot.tensor
    canonical = is_completion(LiveTensor(base), base.detach()[..., :k], _go_on)
    if canonical and base.stride() == column_major_strides(base.shape):
        found.reports[name] = ChartReport(name, "left as it is: its base is canonical already")
        return
    damage = "" if canonical else misfit(base, k)
    chain = "its parametrization serves several tensors; give each its own" if shared else _chain_obstacle(index)
    tied = found.neighbour(_place(slot), base)
    texts = [
        f"{damage}; load a checkpoint in full precision, or register the weight anew" if damage else "",
        chain or _original_obstacle(record, config, base),
        f"its base lies in the memory of {tied}; untie them first" if tied else "",
    ]
    found.problems += [Problem(name, "unsupported", text) for text in texts if text]
    if not any(texts):
        original = record.originals["original"]
        found.reports[name] = ChartReport(name, "")
        found.charts.append(Chart(name, record, link, config, original, base, k, canonical))


def _name(record: ParametrizedTensor, index: int) -> str:
    return record.name if index == 0 else f"{record.prefix}.{index}"


def _base_obstacle(slot: Slot | None, shape: tuple[int, ...]) -> str:
    """What makes a base unreadable."""
    if slot is None:
        return "its base is no persistent buffer"
    base = slot.tensor
    if base is None:
        return (
            "its base is empty, so it computes nothing; load a checkpoint, or register it in float32 on a real device"
        )
    if slot.parameter or base.requires_grad:
        return "its base is a parameter, or requires a gradient"
    if _torch.overrides_dispatch(base) or base.layout is not torch.strided:
        return f"its base is a {type(base).__qualname__} of layout {base.layout}, not an ordinary tensor"
    if base.device.type == "meta":
        return "it is on the meta device, where there are no numbers; load a checkpoint first"
    if dtype_name(base.dtype) not in ORTHONORMAL_DTYPES or tuple(base.shape) != shape:
        return f"expected a base in float32 or better of shape {list(shape)}, got {base.dtype}, {list(base.shape)}"
    return ""


def _chain_obstacle(index: int) -> str:
    """A parametrization turns its input, which is ``original`` for the first one alone."""
    return "another parametrization comes before it, whose result cannot be turned" if index > 0 else ""


def _original_obstacle(record: ParametrizedTensor, config: dict[str, JSON], base: Tensor) -> str:
    """What keeps ``original`` from being read, turned and overwritten."""
    if set(record.originals) != {"original"}:
        return "expected one original"
    original = record.originals["original"]
    if _torch.overrides_dispatch(original) or original.layout is not torch.strided:
        return f"its original is a {type(original).__qualname__}, not an ordinary tensor; gather it first"
    if (original.dtype, original.device) != (base.dtype, base.device):
        return (
            f"its original is {original.dtype} on {original.device}, its base {base.dtype} on {base.device}; "
            "move them to one"
        )
    try:
        CODEC.build(config, original)
    except ConfigError as error:
        return str(error)
    if original.grad_fn is not None:
        return "its original is the result of a computation in a graph; detach it first"
    if may_overlap(original):
        return "its original cannot be overwritten in place: its elements share memory"
    if not torch.isfinite(original).all():
        return "its original holds NaN or infinity"
    return ""


def gradient_obstacle(chart: Chart) -> str:
    """What keeps the gradient of ``original`` from being turned; empty if nothing does, or there is none."""
    gradient = chart.gradient
    if gradient is None:
        return ""
    if _torch.overrides_dispatch(gradient) or gradient.layout is not torch.strided:
        return "the gradient of its original is not an ordinary dense tensor; step or zero_grad first"
    if not torch.isfinite(gradient).all():
        return "the gradient of its original holds NaN or infinity; call zero_grad first"
    if _torch.has_nonzero(turning(gradient, chart.k)) and (gradient.grad_fn is not None or may_overlap(gradient)):
        return "the gradient of its original cannot be overwritten in place; step or zero_grad first"
    return ""


def place_of_original(chart: Chart) -> Place:
    """Where the original of a chart stands, for :meth:`Survey.neighbour`."""
    holder = _torch.parametrization_lists(chart.record.module)[chart.record.tensor_name]
    return (id(holder), "original")


def _place(slot: Slot) -> Place:
    return (id(slot.module), slot.name)


def _meet(one: Tensor, other: Tensor) -> bool:
    return one is other or overlap(one, other)


def _go_on() -> None:
    """Nothing stops the comparison of a base."""
