"""Traps in the state of one parametrized tensor.

The first three look at k numbers and at dtypes, so that every save and load can afford them. The others read all of the
state, or compute the weight.

Note [Diagonal of householder]
A column whose entry of the diagonal is read as 0 vanishes from the weight, see ``MovedDiagonal``. No gradient reaches
the diagonal, so nothing brings it back.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from orthoserde import _torch
from orthoserde.keys import prefixes_in, prefixes_of
from orthoserde.orthonormal.probe import moved_diagonal, off_orthonormal
from orthoserde.parametrizations.structured import Orthogonal
from orthoserde.registry import Registry
from orthoserde.registry.codec import residual_of
from orthoserde.registry.registered_class import RegisteredClass
from orthoserde.reports import Finding, Severity
from orthoserde.tensor_bytes import DTYPES, ORTHONORMAL_DTYPES, row_blocks
from orthoserde.walk import Inventory, ParametrizedTensor, computed_originals
from orthoserde.weights.live import codecs_of, computed
from orthoserde.wording import one_line

#: The dtypes in which torch makes matrices with orthonormal columns.
_FINE = frozenset(DTYPES[name] for name in ORTHONORMAL_DTYPES)

_RELOAD = "load a checkpoint from before"


def at_a_glance(where: str, links: list[nn.Module], original: Tensor | None) -> Iterator[Finding]:
    """Traps that cost next to nothing to find.

    Args:
        where: Name of the tensor.
        links: Its parametrizations, unwrapped.
        original: What the first one computes from; None if it is not one tensor.
    """
    readable = original is None or has_elements(original)
    for index, link in enumerate(links):
        if is_orthogonal(link):
            source = original if index == 0 else None
            base = base_of(link)
            if base is None and readable and wants_base(link):
                yield _no_base(where)
            parts = {"original": source, "base": base}
            coarse = [name for name, part in parts.items() if part is not None and part.dtype not in _FINE]
            if coarse:
                yield _half_precision(where, coarse[0])
            elif source is not None and readable and map_of(link) == "householder":
                yield from _diagonal(where, source)


def is_orthogonal(link: nn.Module) -> bool:
    """Whether it is torch's orthogonal parametrization, or the structured form of it."""
    return isinstance(link, (_torch.OrthogonalModule, Orthogonal))


def map_of(link: nn.Module) -> str:
    """Name of the map of an orthogonal parametrization."""
    return str(getattr(link.orthogonal_map, "name", link.orthogonal_map))


def base_of(link: nn.Module) -> Tensor | None:
    """What an orthogonal parametrization keeps of its base: n x n, or its columns; None where there is none."""
    kept = _torch.own_buffers(link)
    return kept.get("columns") if isinstance(link, Orthogonal) else kept.get("base")


def has_elements(tensor: Tensor) -> bool:
    """Whether there are numbers to look at, in this process and in the ordinary way."""
    if is_lazy(tensor) or _torch.overrides_dispatch(tensor):
        return False
    return tensor.device.type != "meta" and tensor.layout is torch.strided and not tensor.is_quantized


def wants_base(link: nn.Module) -> bool:
    """Whether an orthogonal parametrization cannot compute without a base."""
    return isinstance(link, Orthogonal) or "base" in _torch.own_buffers(link)


def _no_base(where: str) -> Finding:
    return Finding(
        where,
        Severity.SERIOUS,
        "base-missing",
        "its base is None, so that reading the weight raises: torch leaves it so, without a word, when it parametrizes "
        "a tensor in half precision, on the meta device, or for the second time",
        "load a checkpoint, or register the parametrization in float32, once, on a real device",
    )


def _half_precision(where: str, part: str) -> Finding:
    return Finding(
        where,
        Severity.SERIOUS,
        "half-precision-orthogonal",
        f"its {part} is in a dtype below float32, and torch's maps need float32 or better: reading the weight "
        "raises, or gives one that is off the constraint by the rounding of that dtype, which a cast back keeps",
        f"keep the module in float32 and use autocast; {_RELOAD} the cast, whose rounding stays",
    )


def _diagonal(where: str, original: Tensor) -> Iterator[Finding]:
    """See Note [Diagonal of householder]."""
    found = moved_diagonal(original)
    if found is None:
        return
    if found.wrong:
        yield Finding(
            where,
            Severity.SERIOUS,
            "householder-diagonal",
            f"{found}, and torch reads them as integers: {found.vanished} columns of the weight (rows, if wide) are "
            "zero",
            "take its original out of whatever decays or averages it, and write the signs of the diagonal back; where "
            f"a sign is lost, {_RELOAD}",
        )
    else:
        yield Finding(
            where,
            Severity.WARNING,
            "householder-diagonal",
            f"{found}; torch still reads them as +-1, but something is moving them",
            "find what moves it (weight decay, averaging, an optimizer that mixes coordinates), and write the signs "
            "of the diagonal back",
        )


def not_finite(inventory: Inventory) -> Iterator[Finding]:
    """NaN and infinity in parameters and in the state of parametrizations, NaN in other buffers.

    Infinity has its place in buffers: attention masks hold it.
    """
    prefixes = {prefix for record in inventory.parametrized for prefix in prefixes_of(record)}
    seen: set[int] = set()
    for slot in inventory.slots.values():
        tensor = slot.tensor
        if tensor is None or id(tensor) in seen or not has_elements(tensor):
            continue
        seen.add(id(tensor))
        strict = slot.parameter or not prefixes.isdisjoint(prefixes_in(slot.key))
        if not is_finite(tensor, infinity=not strict):
            yield Finding(
                slot.key,
                Severity.SERIOUS,
                "not-finite",
                f"it holds {'NaN or infinity' if strict else 'NaN'}, and so will all that is computed from it",
                f"{_RELOAD}; clip gradients or lower the learning rate",
            )


def is_finite(tensor: Tensor, *, infinity: bool = False) -> bool:
    """Whether there is no NaN, and no infinity either unless that is admitted; a block at a time."""
    if not tensor.is_floating_point() and not tensor.is_complex():
        return True
    for block in row_blocks(tensor.detach()):
        # torch has no such tests for the float8 types
        wide = block.float() if block.element_size() == 1 else block
        if bool(torch.isnan(wide).any()) if infinity else not bool(torch.isfinite(wide).all()):
            return False
    return True


def measured(tensor: ParametrizedTensor, registry: Registry) -> Iterator[Finding]:
    """Traps that are seen in the base or in the computed weight; its state is finite, of good dtypes and complete."""
    links = [_torch.unwrap(link) for link in tensor.parametrizations]
    state = [
        *tensor.originals.values(),
        *(b for link in links for b in _torch.own_buffers(link).values() if b is not None),
    ]
    if not all(map(has_elements, state)):
        yield Finding(
            tensor.name,
            Severity.NOTICE,
            "not-measured",
            "it is on the meta device, sharded, or otherwise no ordinary tensor, so that its values were not looked at",
            "diagnose again when it has been loaded, or gathered",
        )
        return
    bases = [found for link in links if is_orthogonal(link) for found in _base(tensor.name, link)]
    yield from bases or _weight(tensor, registry)


def _base(where: str, link: nn.Module) -> Iterator[Finding]:
    base = base_of(link)
    mean = None if base is None else off_orthonormal(base)
    if mean is not None:
        yield Finding(
            where,
            Severity.SERIOUS,
            "base-off-constraint",
            f"its base is not orthogonal (an entry of Q^H Q - I is {mean:.2g} in the mean), so no weight that training "
            "reaches from here is: averaging over runs, a cast to half precision and back, and pyreft's own loader do "
            "that",
            f"{_RELOAD}, or load the computed weight with legacy='project'",
        )


def _weight(tensor: ParametrizedTensor, registry: Registry) -> Iterator[Finding]:
    originals = computed_originals(tensor)
    if originals:
        yield Finding(
            tensor.name,
            Severity.NOTICE,
            "not-measured",
            f"its {' and '.join(originals)} is no registered tensor, being parametrized or pruned itself, so the "
            "weight was not looked at, and a save or load refuses the model",
            "make that permanent: torch.nn.utils.prune.remove or parametrize.remove_parametrizations, of its "
            "ParametrizationList",
        )
        return
    # What a class that was merely registered computes is known to its own code alone, which is not run here.
    codecs = [codec for codec in codecs_of(tensor, registry) if codec and not isinstance(codec, RegisteredClass)]
    if len(codecs) < len(tensor.parametrizations):
        return
    try:
        weight = computed(tensor, registry)
        if weight is None or not weight.numel():
            return
        finite = is_finite(weight)
        codec, config = codecs[-1], codecs[-1].config(_torch.unwrap(tensor.parametrizations[-1]))
        residual = residual_of(codec, weight, config) if finite else None
        admitted = not finite or config is None or codec.admits(weight, config)
    except Exception as error:  # whatever a user's codec raises, or torch for a dtype that an operation lacks
        kind, said = type(error).__name__, one_line(error)  # which is its class where it has no text
        text = f"its weight cannot be computed here: {kind if said == kind else f'{kind}: {said}'}"
        yield Finding(tensor.name, Severity.NOTICE, "not-measured", text, "read the weight yourself to see why")
        return
    if not finite:
        yield Finding(
            tensor.name,
            Severity.SERIOUS,
            "weight-not-finite",
            "its weight is NaN or infinite though its state is finite: weight_norm and spectral_norm divide by the "
            "norm of a tensor or row that is zero",
            "give the zero rows other values before the parametrization is registered",
        )
    elif not admitted:
        distance = "" if residual is None else f" (by {residual:.2g})"
        yield Finding(
            tensor.name,
            Severity.SERIOUS,
            "weight-off-constraint",
            f"its computed weight is farther from its constraint than rounding takes it{distance}",
            f"{_RELOAD}, or load the computed weight with legacy='project'",
        )
