"""What can be said of a checkpoint without a model: whether its bytes are those that were saved, and make sense.

Note [Dry run]
A file is a stranger: the shapes of its tensors need not fit each other or their configuration, and a few bytes may
stand for a computation of many gigabytes. So each of torch's parametrizations is first computed on the meta device,
which checks shapes and allocates nothing, and is computed in earnest only if no intermediate result is larger than all
tensors of the file (or than ``SCRATCH_BYTES``). The meta device does not notice everything: torch's weight_norm takes a
magnitude that is shorter than its direction, and on the CPU reads beyond its end. So the shapes of the stored state are
also held to those of the state that the codec itself would make.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from orthoserde import _torch
from orthoserde.checkpoint import Checkpoint
from orthoserde.codec import Codec
from orthoserde.errors import ConfigError
from orthoserde.json_values import JSON
from orthoserde.manifest import DENSE, OPAQUE, ORTHOGONAL, Manifest, ParametrizationRecord, ParametrizedRecord, join
from orthoserde.parametrizations import BUILT_IN_CODECS, codec_for_kind
from orthoserde.parametrizations.orthogonal import OrthogonalCodec
from orthoserde.probe import off_orthonormal
from orthoserde.registered_class import RegisteredClass
from orthoserde.registry import Registry
from orthoserde.reports import VerifyReport
from orthoserde.tensor_bytes import DTYPES, ORTHONORMAL_DTYPES, dtype_name
from orthoserde.transforms import expand

#: An intermediate result may have this many bytes, or as many as the file holds if these are more: a float32 matrix of
#: 4096 rows, whose exponential takes seconds.
SCRATCH_BYTES = 64 << 20

_ORTHOGONAL = OrthogonalCodec()


class NotMeasured(Exception):  # noqa: N818  # an answer, not an error
    """A tensor cannot be computed from the file alone; the message says why."""


class Misfit(Exception):  # noqa: N818  # an answer, not an error
    """The stored state is not one that the recorded configuration can have; the message says why."""


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
    off_constraint: list[str] = []
    misfits: dict[str, str] = {}
    not_measured = _unrecorded(manifest)
    limit = max(SCRATCH_BYTES, manifest.nbytes)
    with _torch.undisturbed():
        for stored, record in zip(manifest.parametrized, expanded.manifest.parametrized, strict=True):
            try:
                if any(manifest.kept_key(key) in damaged for key in stored.tensor_keys()):
                    raise NotMeasured("its state is damaged")
                links = [_resolve(link, registry) for link in record.chain]
                residual, admitted = _measure(expanded, record, links, limit)
            except NotMeasured as reason:
                not_measured[record.name] = str(reason)
            except Misfit as reason:
                misfits[record.name] = str(reason)
            else:
                residuals[record.name] = residual
                if not admitted:
                    off_constraint.append(record.name)
                elif (far := _base_error(stored, checkpoint)) is not None:
                    misfits[record.name] = (
                        f"the weight is on its constraint, but its base is off orthogonality by {far:.2g}, so that "
                        "training leaves the constraint with the next step"
                    )
        for key in orthonormal:
            if manifest.tensors[key].dtype not in ORTHONORMAL_DTYPES:
                not_measured[key] = f"{manifest.tensors[key].dtype} is too coarse to be held to a constraint"
                continue
            weight = checkpoint.tensor(key)
            residuals[key] = _ORTHOGONAL.residual(weight)
            if not _ORTHOGONAL.admits(weight, {}):
                off_constraint.append(key)
    return VerifyReport(
        path=checkpoint.origin,
        has_configuration=manifest.has_configuration,
        digests=manifest.has_configuration,
        tensors=len(manifest.tensors),
        damaged=tuple(damaged),
        residuals=residuals,
        off_constraint=tuple(off_constraint),
        misfits=misfits,
        not_measured=not_measured,
    )


def computed_weight(expanded: Checkpoint, record: ParametrizedRecord, registry: Registry) -> Tensor:
    """The tensor that a parametrized one stands for, computed from the stored state alone; see Note [Dry run].

    Args:
        expanded: A checkpoint whose bases are whole (``orthoserde.transforms.expand``).
        record: One of its parametrized tensors.
        registry: The user's codecs.

    Returns:
        A new CPU tensor of the recorded shape.

    Raises:
        NotMeasured: It cannot be computed from the checkpoint alone; the message says why.
        Misfit: The stored state is not one that the recorded configuration can have.
    """
    links = [_resolve(link, registry) for link in record.chain]
    limit = max(SCRATCH_BYTES, expanded.manifest.nbytes)
    _check_size(expanded, record, limit)
    return _compute(record, links, expanded.tensor, functools.partial(_wary_run, limit=limit))


def _base_error(record: ParametrizedRecord, checkpoint: Checkpoint) -> float | None:
    """How far the whole base of an orthogonal tensor is from orthogonal; None if it is, or if there is none.

    A weight that was put into the first columns of another rotation's base looks right; see ``orthoserde.probe``.
    """
    for index, link in enumerate(record.chain):
        key = record.link_key(index, "base")
        if link.kind == ORTHOGONAL and link.tensors.get("base") == DENSE:
            base = checkpoint.tensor(key)
            if dtype_name(base.dtype) in ORTHONORMAL_DTYPES:
                return off_orthonormal(base)
    return None


def _unrecorded(manifest: Manifest) -> dict[str, str]:
    """Parametrized tensors of a file without configuration: torch's keys give them away."""
    found: dict[str, str] = {}
    if not manifest.has_configuration:
        recorded = {record.name for record in manifest.parametrized}
        for key in (*manifest.tensors, *manifest.aliases):
            parts = key.split(".")
            if len(parts) > 2 and parts[-3] == "parametrizations" and parts[-1] in ("original", "original0"):
                name = join(*parts[:-3], parts[-2])
                if name not in recorded:
                    found[name] = "the file has no configuration"
    return found


@dataclass(frozen=True)
class _Link:
    """One parametrization, as this process knows it."""

    record: ParametrizationRecord
    codec: Codec
    config: Mapping[str, JSON]


#: Computes a parametrization from its inputs and its own tensors.
_Step = Callable[[_Link, Mapping[str, Tensor], Mapping[str, Tensor]], Tensor]


def _resolve(record: ParametrizationRecord, registry: Registry) -> _Link:
    kind, version = record.kind, record.version
    codec = codec_for_kind(registry, kind)
    if kind == OPAQUE:
        raise NotMeasured(f"{record.class_name} was not registered when it was saved")
    if codec is None:
        raise NotMeasured(f"{kind} is not registered in this process")
    if isinstance(codec, RegisteredClass):
        raise NotMeasured(f"what {kind} computes, and its constraint, are known to its own code alone")
    if record.config is None:
        raise NotMeasured(f"the file does not have the configuration of its {kind}")
    if version > codec.version:
        raise NotMeasured(f"the file has version {version} of {kind}, this process knows up to {codec.version}")
    if version < codec.version:
        try:
            return _Link(record, codec, codec.upgrade(dict(record.config), version))
        except Exception as error:  # whatever a user's codec raises
            raise NotMeasured(f"{kind}: upgrade from version {version}: {_one_line(error)}") from error
    return _Link(record, codec, record.config)


def _measure(
    checkpoint: Checkpoint, record: ParametrizedRecord, links: list[_Link], limit: int
) -> tuple[float | None, bool]:
    """Residual of a parametrized tensor, and whether it is on its constraint."""
    _check_size(checkpoint, record, limit)
    if not all(link.codec in BUILT_IN_CODECS for link in links):
        return _judge(links[-1], _compute(record, links, checkpoint.tensor, functools.partial(_wary_run, limit=limit)))
    # All that shapes and dtypes tell comes before anything is read.
    dry = _compute(record, links, functools.partial(_meta_tensor, checkpoint), functools.partial(_dry_run, limit=limit))
    if links[-1].codec.residual(torch.empty(0, 0)) is None:
        return None, True
    # What is coarser is off its constraint by its own rounding.
    if dtype_name(dry.dtype) not in ORTHONORMAL_DTYPES:
        raise NotMeasured(f"{dtype_name(dry.dtype)} is too coarse to be held to a constraint")
    return _judge(links[-1], _compute(record, links, checkpoint.tensor, _run))


def _check_size(checkpoint: Checkpoint, record: ParametrizedRecord, limit: int) -> None:
    manifest = checkpoint.manifest
    largest = max(manifest.tensors[manifest.kept_key(key)].nbytes for key in record.tensor_keys())
    if largest > limit:  # a base that is stored as columns
        raise NotMeasured(f"its base takes {largest} bytes at once to work out, and the limit here is {limit}")


def _meta_tensor(checkpoint: Checkpoint, key: str) -> Tensor:
    record = checkpoint.manifest.tensors[checkpoint.manifest.kept_key(key)]
    return torch.empty(record.shape, dtype=DTYPES[record.dtype], device="meta")


def _compute(record: ParametrizedRecord, links: list[_Link], tensor: Callable[[str], Tensor], step: _Step) -> Tensor:
    """The computed tensor, from the stored state alone.

    Args:
        record: Which tensor.
        links: Its parametrizations.
        tensor: Gives a stored tensor by key.
        step: Computes one parametrization from its inputs and its own tensors.
    """
    current = {name: tensor(record.original_key(name)) for name in record.originals}
    for index, link in enumerate(links):
        own = {role: tensor(record.link_key(index, role)) for role in link.record.tensors}
        weight = step(link, current, own)
        current = {"original": weight}
    if record.shape is not None and weight.shape != record.shape:
        raise Misfit(f"recorded with shape {list(record.shape)}, its state gives {list(weight.shape)}")
    return weight


def _wary_run(link: _Link, inputs: Mapping[str, Tensor], own: Mapping[str, Tensor], *, limit: int) -> Tensor:
    """Compute a parametrization, one of torch's only after a dry run: what it is given may come from a user's codec."""
    if link.codec in BUILT_IN_CODECS:
        _dry_run(link, inputs, own, limit=limit)
    return _run(link, inputs, own)


def _run(link: _Link, inputs: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> Tensor:
    """Compute a parametrization."""
    try:
        return link.codec.compute(link.config, {**inputs, **own})
    except Exception as error:  # torch has no such operation for this dtype, or whatever a user's codec raises
        raise NotMeasured(f"{link.codec.kind} cannot be computed here: {_one_line(error)}") from error


def _dry_run(link: _Link, inputs: Mapping[str, Tensor], own: Mapping[str, Tensor], *, limit: int) -> Tensor:
    """Compute one of torch's parametrizations on the meta device; see Note [Dry run]."""
    kind = link.codec.kind
    state = {name: tensor.to("meta") for name, tensor in {**inputs, **own}.items()}
    try:
        expected, optional = _expected_shapes(link, {name: state[name] for name in inputs})
        for name in sorted(state.keys() - expected.keys() - optional):
            raise Misfit(f"{kind} has no tensor {name!r} in this configuration")
        for name in sorted(optional - state.keys()):
            raise NotMeasured(f"its {name} is None, as torch left it on the meta device")
        for name, shape in expected.items():
            if name not in state:
                raise Misfit(f"{kind} needs a tensor {name!r}, which is not in the file")
            if state[name].shape != shape:
                raise Misfit(f"{kind}: expected {name} of shape {list(shape)}, got {list(state[name].shape)}")
        with _torch.LargestTensor() as largest:
            weight: Tensor = link.codec.compute(link.config, state)
    except (Misfit, NotMeasured):
        raise
    except NotImplementedError as error:
        raise NotMeasured(f"{kind} cannot be checked with this torch: {_one_line(error)}") from error
    except Exception as error:  # whatever torch makes of shapes and settings that do not go together
        raise Misfit(f"{kind}: its tensors do not fit its configuration: {_one_line(error)}") from error
    if largest.nbytes > limit:
        raise NotMeasured(f"{kind} takes {largest.nbytes} bytes at once to compute, and the limit here is {limit}")
    return weight


def _expected_shapes(link: _Link, inputs: Mapping[str, Tensor]) -> tuple[dict[str, torch.Size], set[str]]:
    """Shapes of the state that a codec would make, on the meta device, and names of buffers that may be None."""
    like = next(iter(inputs.values()))
    buffers = _torch.own_buffers(link.codec.build(link.config, like))
    shape = None
    with contextlib.suppress(KeyError):
        shape = link.codec.shape({name: tensor.shape for name, tensor in inputs.items()})
    if shape is None:
        raise Misfit(f"{link.codec.kind} cannot be computed from {', '.join(sorted(inputs))}")
    fresh = inputs
    # Which state a weight comes from cannot always be told, or not on the meta device; then the computation must do.
    with contextlib.suppress(ConfigError, RuntimeError):
        fresh = link.codec.from_weight(like.new_empty(shape), link.config)
    expected = {name: tensor.shape for name, tensor in fresh.items()}
    expected |= {name: buffer.shape for name, buffer in buffers.items() if buffer is not None}
    return expected, {name for name, buffer in buffers.items() if buffer is None}


def _judge(link: _Link, weight: Tensor) -> tuple[float | None, bool]:
    """Residual of a computed tensor, and whether it is on the constraint."""
    try:
        residual = link.codec.residual(weight)
        return residual, residual is None or link.codec.admits(weight, link.config)
    except Exception as error:  # whatever a user's codec raises
        raise NotMeasured(f"{link.codec.kind} cannot be measured here: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
