"""Traps in what optimizers hold, and in what they do to parametrized tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import SupportsFloat

import torch
from torch import Tensor
from torch.optim import Optimizer

from orthoserde import _torch
from orthoserde.registry import Registry
from orthoserde.reports import Finding, Severity
from orthoserde.traps.state import has_elements, is_finite, is_orthogonal, map_of
from orthoserde.walk import Inventory, ParametrizedTensor
from orthoserde.weights.live import codecs_of
from orthoserde.wording import shorten

#: Per-parameter state of torch's optimizers that has the shape of the parameter.
_MOMENTS = frozenset(
    {"momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "square_avg", "grad_avg", "exp_inf"}
)

#: Settings by which optimizers shrink parameters, whatever the gradient; ASGD of torch has ``lambd``, 1e-4 by default.
_DECAYS = ("weight_decay", "lambd")


@dataclass(frozen=True)
class Held:
    """A parameter in an optimizer.

    Attributes:
        label: What the optimizer is called in texts.
        optimizer: The optimizer.
        group: Its parameter group.
        parameter: The parameter.
    """

    label: str
    optimizer: Optimizer
    group: Mapping[str, object]
    parameter: Tensor

    def number(self, setting: str) -> float:
        """A setting of the group, 0 where there is none that is one number; some optimizers keep tensors."""
        value = self.group.get(setting)
        if isinstance(value, Tensor):
            return float(value) if value.numel() == 1 and not value.is_complex() else 0.0
        return float(value) if isinstance(value, SupportsFloat) and getattr(value, "ndim", 0) == 0 else 0.0


def held_by(optimizers: Mapping[str, Optimizer]) -> dict[int, list[Held]]:
    """Where each parameter is held, by its id."""
    found: dict[int, list[Held]] = {}
    for label, optimizer in optimizers.items():
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                found.setdefault(id(parameter), []).append(Held(label, optimizer, group, parameter))
    return found


def steps_of(where: str, orthogonal_map: str, held: Iterable[Held]) -> Iterator[Finding]:
    """What the steps of optimizers do to the original of an orthogonal weight."""
    for each in held:
        setting = next((name for name in _DECAYS if each.number(name)), "")
        decay, rate = each.number(setting), each.number("lr")
        moved = each.parameter.requires_grad or each.parameter.grad is not None
        if decay and moved and orthogonal_map == "householder":
            yield Finding(
                where,
                Severity.SERIOUS,
                "weight-decay-householder",
                f"{each.label} decays its original ({setting} {decay:g}, lr {rate:g}): that takes the diagonal off "
                "+-1, torch reads the diagonal as integers, and the whole weight is zero after one step",
                f"put its original into a parameter group with {setting}=0; a load of a run that was saved without "
                "that group takes the name of the weight in reset=",
            )
        elif decay and moved:
            yield Finding(
                where,
                Severity.NOTICE,
                "weight-decay-orthogonal",
                f"{each.label} decays its original ({setting} {decay:g}): the weight stays orthogonal, and is drawn "
                "to its base, the value that it was registered with, not to zero",
                f"use {setting}=0 for it, unless that is meant",
            )
        if (
            moved
            and orthogonal_map == "householder"
            and any(c.__name__ == "Muon" for c in type(each.optimizer).__mro__)
        ):
            yield Finding(
                where,
                Severity.SERIOUS,
                "optimizer-turns-householder",
                f"{each.label} orthogonalises the update, which moves the diagonal though it has no gradient: columns "
                "of the weight vanish within a few steps",
                "use an optimizer that treats coordinates one by one (SGD, Adam) for it, or another orthogonal_map",
            )


def householder_and_others(inventory: Inventory, held: Mapping[int, list[Held]]) -> Iterator[Finding]:
    """:func:`steps_of` for all orthogonal weights of a model."""
    for record in inventory.parametrized:
        link = _torch.unwrap(record.parametrizations[0])
        if is_orthogonal(link):
            for original in record.originals.values():
                yield from steps_of(record.name, map_of(link), held.get(id(original), ()))


def outside_of_model(inventory: Inventory, held: Mapping[int, list[Held]], registry: Registry) -> Iterator[Finding]:
    """Parameters that optimizers hold and the model does not have: most often what parametrizing has replaced."""
    known = {id(slot.tensor) for slot in inventory.slots.values()}
    orphans = {each: places for each, places in held.items() if each not in known}
    for record in inventory.parametrized:
        if not record.parameter or any(id(original) in held for original in _trained(record)):
            continue
        shape = _shape(record, registry)
        match = next((each for each, places in orphans.items() if places[0].parameter.shape == shape), None)
        if match is not None and _trained(record):
            (first, *_) = orphans.pop(match)
            yield Finding(
                record.name,
                Severity.SERIOUS,
                "optimizer-predates-parametrization",
                f"{first.label} holds a parameter of its shape {list(shape or ())} that the model does not have, and "
                "not its originals: it was built before the weight was parametrized, and never trains it",
                "build the optimizer after parametrizing",
            )
    labels: dict[str, list[Tensor]] = {}
    for first, *_ in orphans.values():
        labels.setdefault(first.label, []).append(first.parameter)
    for label, parameters in labels.items():
        shapes = shorten([str(list(parameter.shape)) for parameter in parameters])
        yield Finding(
            "",
            Severity.WARNING,
            "optimizer-orphan",
            f"{label} holds {len(parameters)} parameters that the model does not have, of shapes {shapes}: they were "
            "replaced after it was built, or belong elsewhere",
            "build the optimizer from the parameters of the model as it is now",
        )


def _trained(record: ParametrizedTensor) -> list[Tensor]:
    return [original for original in record.originals.values() if original.requires_grad]


def _shape(record: ParametrizedTensor, registry: Registry) -> torch.Size | None:
    codec = codecs_of(record, registry)[0]
    shapes = {name: original.shape for name, original in record.originals.items()}
    if codec is None:
        return shapes.get("original")
    return codec.shape(shapes) if "original" in shapes or "original1" in shapes else None


def out_of_order(inventory: Inventory, optimizers: Mapping[str, Optimizer]) -> Iterator[Finding]:
    """Originals that stand before other parameters of their module, which they did not once they were registered."""
    for label, optimizer in optimizers.items():
        # Only what stands in one group is compared: groups are often chosen by hand.
        places = {
            id(parameter): (number, place)
            for number, group in enumerate(optimizer.param_groups)
            for place, parameter in enumerate(group["params"])
        }
        for record in inventory.parametrized:
            own = [places.get(id(each)) for each in _torch.own_parameters(record.module).values()]
            for original in record.originals.values():
                mine = places.get(id(original))
                if mine and any(other and other[0] == mine[0] and other[1] > mine[1] for other in own):
                    yield Finding(
                        record.name,
                        Severity.WARNING,
                        "optimizer-predates-parametrization",
                        f"{label} has its original before other parameters of its module, as before it was "
                        "parametrized. Its state is kept by position: loaded into an optimizer that is built after "
                        "parametrizing, moments land on other parameters, without an error where shapes agree or "
                        "broadcast",
                        "build the optimizer after parametrizing",
                    )
                    break


def states(inventory: Inventory, held: Mapping[int, list[Held]]) -> Iterator[Finding]:
    """State of optimizers that is not finite, or not of the shape of its parameter."""
    for name, parameter in _parameters(inventory).items():
        for each in held.get(id(parameter), ()):
            state = each.optimizer.state.get(parameter, {})
            tensors = {str(entry): value for entry, value in state.items() if isinstance(value, Tensor)}
            misplaced = [
                entry for entry, value in tensors.items() if entry in _MOMENTS and value.shape != parameter.shape
            ]
            damaged = [entry for entry, value in tensors.items() if has_elements(value) and not is_finite(value)]
            if misplaced:
                yield Finding(
                    name,
                    Severity.SERIOUS,
                    "optimizer-state-shape",
                    f"{each.label} keeps {shorten(misplaced)} of shape {list(tensors[misplaced[0]].shape)} for it, of "
                    f"shape {list(parameter.shape)}: its state was loaded by position, in another order",
                    "load the state into an optimizer that was built as the saved one was, or start it afresh",
                )
            if damaged:
                yield Finding(
                    name,
                    Severity.SERIOUS,
                    "optimizer-state-not-finite",
                    f"{each.label} keeps NaN or infinity for it in {shorten(damaged)}: the next step writes it "
                    "into the parameter",
                    "remove its state from the optimizer, or load a checkpoint from before",
                )


def _parameters(inventory: Inventory) -> dict[str, Tensor]:
    """Parameters of a model by their first name, each once."""
    seen: set[int] = set()
    found: dict[str, Tensor] = {}
    for slot in inventory.slots.values():
        if slot.parameter and slot.tensor is not None and id(slot.tensor) not in seen:
            seen.add(id(slot.tensor))
            found[slot.key] = slot.tensor
    return found


def membership(inventory: Inventory, held: Mapping[int, list[Held]]) -> Iterator[Finding]:
    """Parameters in no optimizer, in two, or frozen in one."""
    parameters = _parameters(inventory)
    free = [name for name, each in parameters.items() if each.requires_grad and id(each) not in held]
    if free:
        yield Finding(
            "",
            Severity.NOTICE,
            "not-in-optimizer",
            f"{len(free)} parameters require a gradient and no optimizer holds them: {shorten(free)}",
            "give them to an optimizer, or freeze them (requires_grad_(False))",
        )
    frozen = [name for name, each in parameters.items() if not each.requires_grad and id(each) in held]
    pulled = [name for name in frozen if parameters[name].grad is not None]
    if pulled:
        yield Finding(
            "",
            Severity.WARNING,
            "frozen-in-optimizer",
            f"{len(pulled)} parameters are frozen and keep a gradient, by which an optimizer goes on moving them: "
            f"{shorten(pulled)}",
            "set their grad to None, as zero_grad() does, or take them out of the optimizer",
        )
    if len(frozen) > len(pulled):
        rest = [name for name in frozen if name not in set(pulled)]
        yield Finding(
            "",
            Severity.NOTICE,
            "frozen-in-optimizer",
            f"{len(rest)} parameters are frozen and held by an optimizer, which leaves them alone: {shorten(rest)}",
            "take them out of the optimizer, unless they are to be trained later",
        )
    for name, each in parameters.items():
        labels = dict.fromkeys(place.label for place in held.get(id(each), ()))
        if len(labels) > 1:
            yield Finding(
                name,
                Severity.WARNING,
                "held-twice",
                f"{shorten(list(labels))} hold it: each of them moves it, by moments that know nothing of the other",
                "leave it to one optimizer",
            )
