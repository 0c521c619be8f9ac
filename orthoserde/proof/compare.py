"""Two sides of a comparison, and how far they are apart.

Note [Rounding]
The same sums in another order, as with another number of threads, differ in the last bits, and training carries that
on. A floating-point tensor is said to agree *within* rounding if no element is farther from the reference than the
largest value of the reference times 1e-5 in float32, 1e-12 in float64, 5e-3 in float16, 2e-2 in bfloat16: about
eps**0.75, more than a short run loses and far less than an optimizer that was not restored changes. Losses, and floats
in training state, are held to the tolerance of float32, from which they come as a rule. Integers have to be equal.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from orthoserde.comparison.distances import true_gaps
from orthoserde.proof.held import Held, Stored
from orthoserde.proof.report import Difference
from orthoserde.tensor_bytes import DTYPES, contiguous_strides, digest_of, empty_like_recorded

#: Largest difference that is put down to rounding, in units of the largest value, by dtype; see Note [Rounding].
TOLERANCES: Mapping[str, float] = {
    "float16": 5e-3,
    "bfloat16": 2e-2,
    "float32": 1e-5,
    "float64": 1e-12,
    "complex64": 1e-5,
    "complex128": 1e-12,
}

#: What holds of losses and other numbers that are no tensors.
_OF_NUMBERS = TOLERANCES["float32"]

#: Elements that are compared at a time.
_ELEMENTS = 1 << 20

LOSS = "loss"


@dataclass(frozen=True)
class Seen:
    """What one step left behind, small enough to be sent.

    Attributes:
        loss: What the step returned.
        digests: dtype, shape and digest of every tensor, by name.
        values: Everything else in training state, by place.
    """

    loss: float | None
    digests: Mapping[str, tuple[str, tuple[int, ...], str]]
    values: Mapping[str, object]


def seen(loss: float | None, held: Held) -> Seen:
    """Note what a run holds."""
    digests = {
        name: (each.record.dtype, each.record.shape, digest_of(each.source.blocks()))
        for name, each in held.tensors.items()
    }
    return Seen(loss, digests, held.values)


def between_loads(step: int, first: Seen, second: Seen) -> Iterator[Difference]:
    """How two fresh loads differ after a step. Nothing is within: the same program has to compute the same bits."""
    if not _same(first.loss, second.loss):
        yield _unmeasured(step, LOSS, f"{first.loss!r} and {second.loss!r}")
    for name in dict.fromkeys((*first.digests, *second.digests)):
        if first.digests.get(name) != second.digests.get(name):
            yield _unmeasured(step, name, "not the same in two fresh loads")
    for name in dict.fromkeys((*first.values, *second.values)):
        if not _same(first.values.get(name), second.values.get(name)):
            yield _unmeasured(step, name, f"{first.values.get(name)!r} and {second.values.get(name)!r}")


def loss_difference(step: int, got: float | None, expected: float, scale: float) -> Iterator[Difference]:
    """How a loss differs from that of the reference, if it does.

    Args:
        step: The step.
        got: What the step returned.
        expected: The loss of the reference.
        scale: The largest loss of the reference.
    """
    if got is None:
        yield _other(step, LOSS, f"expected {expected!r}, but step returned None; return the loss")
    elif not _same(got, expected):
        yield _numbers(step, LOSS, got, expected, scale)


def from_file(step: int, got: Held, reference: Held) -> Iterator[Difference]:
    """How what a run holds differs from what was saved of the one that never stopped."""
    for name, own in got.tensors.items():
        theirs = reference.tensors.get(name)
        if theirs is None and name not in reference.left_out:
            yield _other(step, name, "not in the reference")
        elif theirs is not None:
            yield from _tensors(step, name, own, theirs)
    missing = (name for name in reference.tensors if name not in got.tensors)
    yield from (_other(step, name, "in the reference alone") for name in missing)
    for name in dict.fromkeys((*got.values, *reference.values)):
        one, other = (side.values.get(name, "nothing") for side in (got, reference))
        if _same(one, other):
            continue
        if isinstance(one, float) and isinstance(other, float):
            yield _numbers(step, name, one, other, abs(other))
        else:
            yield _other(step, name, f"{one!r}, in the reference {other!r}")


def _unmeasured(step: int, name: str, text: str) -> Difference:
    return Difference(step, name, text, None, None, within=False)


def _other(step: int, name: str, text: str) -> Difference:
    return Difference(step, name, text, None, math.inf, within=False)


def _same(one: object, other: object) -> bool:
    """Whether two values are equal in type and, for floats, in every bit but those of NaN."""
    if type(one) is not type(other):
        return False
    if isinstance(one, float) and isinstance(other, float):
        return one.hex() == other.hex()
    return one == other


def _numbers(step: int, name: str, got: float, expected: float, scale: float) -> Difference:
    absolute = math.inf if math.isnan(got - expected) else abs(got - expected)
    relative = _relative(absolute, scale)
    return Difference(step, name, f"{got!r}, expected {expected!r}", absolute, relative, relative <= _OF_NUMBERS)


def _tensors(step: int, name: str, got: Stored, reference: Stored) -> Iterator[Difference]:
    own, theirs = got.record, reference.record
    if (own.dtype, own.shape) != (theirs.dtype, theirs.shape):
        expected = f"{theirs.dtype} of shape {list(theirs.shape)}"
        yield _other(step, name, f"{own.dtype} of shape {list(own.shape)}, expected {expected}")
        return
    if digest_of(got.source.blocks()) == (theirs.digest or digest_of(reference.source.blocks())):
        return
    absolute, scale = _apart(_flat(got), _flat(reference))
    relative = _relative(absolute, scale)
    text = f"{absolute:.3g} apart, {relative:.2g} of the largest value"
    yield Difference(step, name, text, absolute, relative, relative <= TOLERANCES.get(own.dtype, 0.0))


def _relative(absolute: float, scale: float) -> float:
    """A difference in units of a scale; 0 for differences of bits that are none of value, such as the sign of zero."""
    if absolute == 0 or not math.isfinite(absolute):
        return absolute
    return absolute / scale if scale else math.inf


def _flat(stored: Stored) -> Tensor:
    """The elements as a flat tensor on the CPU, complex ones as pairs."""
    record = stored.record
    tensor = empty_like_recorded(record.shape, contiguous_strides(record.shape), DTYPES[record.dtype], "cpu")
    stored.source.fill(tensor)
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).view(-1)


def _apart(got: Tensor, expected: Tensor) -> tuple[float, float]:
    """Largest difference of an element, infinite where one is not finite; the largest finite value expected."""
    absolute = scale = 0.0
    for one, other in zip(torch.split(got, _ELEMENTS), torch.split(expected, _ELEMENTS), strict=True):
        left, right = one.to(torch.float64), other.to(torch.float64)
        agree = ((left == right) & left.isinf()) | (left.isnan() & right.isnan())
        gaps = true_gaps((left - right).abs(), one, other)
        difference = torch.where(agree, 0.0, gaps).nan_to_num(nan=math.inf, posinf=math.inf)
        absolute = max(absolute, float(difference.max()))
        scale = max(scale, float(right.abs().nan_to_num(nan=0.0, posinf=0.0).max()))
    return absolute, scale
