"""What can be said of a checkpoint without a model: whether its bytes are those that were saved, and make sense."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from orthoserde import modes
from orthoserde.checkpoint import Checkpoint
from orthoserde.keys import plainly_parametrized
from orthoserde.manifest import DENSE, ORTHOGONAL, STRUCTURED, Manifest, ParametrizedRecord
from orthoserde.orthonormal.probe import moved_diagonal, off_orthonormal
from orthoserde.parametrizations import is_built_in
from orthoserde.parametrizations.orthogonal import OrthogonalCodec
from orthoserde.registry import Registry
from orthoserde.registry.codec import residual_of
from orthoserde.reports import VerifyReport
from orthoserde.tensor_bytes import ORTHONORMAL_DTYPES, dtype_name
from orthoserde.transforms import expand
from orthoserde.weights.stored import SCRATCH_BYTES, Link, Misfit, NotComputable, dry_run, resolve, weight_of
from orthoserde.wording import one_line

_ORTHOGONAL = OrthogonalCodec()

_TOO_COARSE = "{} is too coarse to be held to a constraint, and a load in float32 keeps its rounding, which is off it"

_NOT_FINITE = "it is not finite, or was computed from what is not; use a checkpoint from before"

#: A cast to bfloat16 takes the entries of ``Q^H Q - I`` to some 0.002; a base that is farther may have lost its rank.
_ROUNDED = 0.01


def verify(checkpoint: Checkpoint, registry: Registry, orthonormal: Collection[str] = ()) -> VerifyReport:
    """Check the digest of every tensor, and how far every computed tensor is from its constraint.

    Digests are read in blocks. Then one parametrized tensor at a time is read and computed; see Note [Dry run].

    Args:
        checkpoint: What a file holds. That it could be read says that its schema is sound.
        registry: The user's codecs. A class that was merely registered has no constraint that is known, so it is never
            built.
        orthonormal: Keys of plain tensors that are computed weights with orthonormal columns, as a rotation of pyreft's
            is; they are held to that too.

    Returns:
        What was found. A damaged or senseless tensor is an entry of the report, not an exception.

    Raises:
        FileAccessError: The system refuses to read the file.
        FileFormatError: The file changed meanwhile.
    """
    manifest, expanded = checkpoint.manifest, expand(checkpoint)
    damaged = dict.fromkeys(checkpoint.damaged())
    residuals: dict[str, float | None] = {}
    off_constraint: dict[str, str] = {}
    misfits: dict[str, str] = {}
    not_measured = _unrecorded(manifest)
    limit = max(SCRATCH_BYTES, manifest.nbytes)
    with modes.ordinary():
        for stored, record in zip(manifest.parametrized, expanded.manifest.parametrized, strict=True):
            try:
                if any(manifest.kept_key(key) in damaged for key in stored.tensor_keys()):
                    raise NotComputable("its state is damaged")
                links = resolve(record, registry, registered=False)
                residual, admitted = _measure(expanded, record, links, limit)
            except NotComputable as reason:
                not_measured[record.name] = str(reason)
            except Misfit as reason:
                misfits[record.name] = str(reason)
            else:
                residuals[record.name] = residual
                if not admitted:
                    off_constraint[record.name] = _cause(stored, checkpoint, residual)
                elif (far := _base_error(stored, checkpoint)) is not None:
                    misfits[record.name] = (
                        f"the weight is on its constraint, but its base is off orthogonality by {far:.2g}, so that "
                        "training leaves the constraint with the next step"
                    )
        for key in orthonormal:
            if manifest.tensors[key].dtype not in ORTHONORMAL_DTYPES:
                not_measured[key] = _TOO_COARSE.format(manifest.tensors[key].dtype)
                continue
            weight = checkpoint.tensor(key)
            residual = _ORTHOGONAL.residual(weight)
            residuals[key] = residual
            if not _ORTHOGONAL.admits(weight, {}):
                off_constraint[key] = (
                    _NOT_FINITE
                    if residual is not None and math.isnan(residual)
                    else "its columns are not orthonormal; load the folder with legacy='project', or one from before"
                )
    return VerifyReport(
        path=checkpoint.origin,
        has_configuration=manifest.has_configuration,
        digests=manifest.has_configuration,
        tensors=len(manifest.tensors),
        damaged=tuple(damaged),
        residuals=residuals,
        off_constraint=tuple(off_constraint),
        causes=off_constraint,
        misfits=misfits,
        not_measured=not_measured,
    )


def _cause(record: ParametrizedRecord, checkpoint: Checkpoint, residual: float | None) -> str:
    """Why a computed tensor is off its constraint, as far as the file tells, and what to do."""
    if residual is not None and math.isnan(residual):
        return _NOT_FINITE
    first = record.chain[0]
    if first.kind in (ORTHOGONAL, STRUCTURED) and (first.config or {}).get("orthogonal_map") == "householder":
        moved = moved_diagonal(checkpoint.tensor(record.original_key(next(iter(record.originals)))))
        if moved is not None and moved.wrong:
            advice = "load it, write the signs of the diagonal back, and give its original weight_decay=0"
            if moved.lost:
                advice = "use a checkpoint from before, for signs are lost, and give its original weight_decay=0"
            return f"{moved}, which torch reads as integers, as after weight decay; {advice}"
    far = _base_error(record, checkpoint)
    if far is None:
        return "its state does not come to a weight on the constraint; use a checkpoint from before"
    found, otherwise = f"its base is off orthogonality by {far:.2g}", ""
    if far <= _ROUNDED and len(record.chain) == 1:
        found += ", as a cast to half precision leaves it"
        otherwise = ", or convert this one to baked, and load that with legacy='project'"
    return f"{found}; use a checkpoint from before{otherwise}"


def _base_error(record: ParametrizedRecord, checkpoint: Checkpoint) -> float | None:
    """How far the whole base of an orthogonal tensor is from orthogonal; None if it is, or if there is none.

    A weight that was put into the first columns of another rotation's base looks right; see `orthonormal/probe.py`.
    """
    for index, link in enumerate(record.chain):
        if link.kind == ORTHOGONAL and link.tensors.get("base") == DENSE:
            base = checkpoint.tensor(record.link_key(index, "base"))
            if dtype_name(base.dtype) in ORTHONORMAL_DTYPES:
                return off_orthonormal(base)
    return None


def _unrecorded(manifest: Manifest) -> dict[str, str]:
    """Parametrized tensors of a file without configuration: torch's keys give them away."""
    if manifest.has_configuration:
        return {}
    recorded = {record.name for record in manifest.parametrized}
    names = plainly_parametrized([*manifest.tensors, *manifest.aliases])
    return {name: "the file has no configuration" for name in names if name not in recorded}


def _measure(
    checkpoint: Checkpoint, record: ParametrizedRecord, links: Sequence[Link], limit: int
) -> tuple[float | None, bool]:
    """Residual of a parametrized tensor, and whether it is on its constraint."""
    if not all(is_built_in(link.codec) for link in links):
        weight = weight_of(checkpoint, record, links, limit)
        with modes.generators_kept():  # a codec of the user's measures it
            return _judge(links[-1], weight)
    dry = dry_run(checkpoint, record, links, limit)
    if links[-1].codec.residual(torch.empty(0, 0)) is None:
        return None, True
    # What is coarser is off its constraint by its own rounding.
    if dtype_name(dry.weight.dtype) not in ORTHONORMAL_DTYPES:
        raise NotComputable(_TOO_COARSE.format(dtype_name(dry.weight.dtype)))
    return _judge(links[-1], dry.compute())


def _judge(link: Link, weight: Tensor) -> tuple[float | None, bool]:
    """Residual of a computed tensor, and whether it is on the constraint."""
    try:
        residual = residual_of(link.codec, weight, link.config)
        return residual, residual is None or link.codec.admits(weight, link.config)
    except Exception as error:  # whatever a user's codec raises
        raise NotComputable(f"{link.codec.kind} cannot be measured here: {one_line(error)}") from error
