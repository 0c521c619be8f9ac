"""The computed tensor of a checkpoint, from its stored state alone, without a model.

Note [Dry run]
A file is a stranger: the shapes of its tensors need not fit each other or their configuration, and a few bytes may
stand for a computation of many gigabytes. So each of torch's parametrizations is first computed on the meta device,
which checks shapes and allocates nothing, and is computed in earnest only if no intermediate result is larger than a
limit. The meta device does not notice everything: torch's weight_norm takes a magnitude that is shorter than its
direction, and on the CPU reads beyond its end. So the shapes of the stored state are also held to those of the state
that the codec itself would make.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from orthoserde import _torch, modes
from orthoserde.checkpoint import Checkpoint
from orthoserde.errors import ConfigError
from orthoserde.json_values import JSON
from orthoserde.manifest import OPAQUE, ParametrizationRecord, ParametrizedRecord
from orthoserde.parametrizations import codec_for_kind, is_built_in
from orthoserde.registry import Registry
from orthoserde.registry.codec import Codec
from orthoserde.registry.registered_class import RegisteredClass
from orthoserde.tensor_bytes import DTYPES
from orthoserde.wording import one_line

#: An intermediate result may have this many bytes, or as many as the file holds if these are more (see Note [Dry run]):
#: a float32 matrix of 4096 rows, whose exponential takes seconds.
SCRATCH_BYTES = 64 << 20


class NotComputable(Exception):  # noqa: N818  # an answer, not an error
    """A tensor cannot be computed from the file alone; the message says why."""


class Misfit(Exception):  # noqa: N818  # an answer, not an error
    """The stored state is not one that the recorded configuration can have; the message says why."""


@dataclass(frozen=True)
class Link:
    """One parametrization, as this process knows it."""

    record: ParametrizationRecord
    codec: Codec
    config: Mapping[str, JSON]


#: Computes a parametrization from its inputs and its own tensors.
_Step = Callable[[Link, Mapping[str, Tensor], Mapping[str, Tensor]], Tensor]


def resolve(record: ParametrizedRecord, registry: Registry, *, registered: bool) -> list[Link]:
    """Find what this process knows of the parametrizations of a tensor.

    Args:
        record: Which tensor.
        registry: The user's codecs.
        registered: Whether classes that were merely registered are known: what they compute, only their own code says.

    Raises:
        NotComputable: One of them, or its configuration, is not known.
    """
    return [_resolve(link, registry, registered) for link in record.chain]


def _resolve(record: ParametrizationRecord, registry: Registry, registered: bool) -> Link:
    kind, version = record.kind, record.version
    codec = codec_for_kind(registry, kind)
    if kind == OPAQUE:
        raise NotComputable(f"{record.class_name} was not registered when it was saved")
    if codec is None:
        raise NotComputable(f"{kind} is not registered in this process")
    if isinstance(codec, RegisteredClass) and not registered:
        raise NotComputable(f"what {kind} computes, and its constraint, are known to its own code alone")
    if record.config is None:
        raise NotComputable(f"the file does not have the configuration of its {kind}")
    if version > codec.version:
        raise NotComputable(f"the file has version {version} of {kind}, this process knows up to {codec.version}")
    if version < codec.version:
        try:
            return Link(record, codec, codec.upgrade(dict(record.config), version))
        except Exception as error:  # whatever a user's codec raises
            raise NotComputable(f"{kind}: upgrade from version {version}: {one_line(error)}") from error
    return Link(record, codec, record.config)


def weight_of(checkpoint: Checkpoint, record: ParametrizedRecord, links: Sequence[Link], limit: int) -> Tensor:
    """Compute a tensor; see Note [Dry run].

    Args:
        checkpoint: Holds its state, its bases whole (:func:`orthoserde.transforms.expand`).
        record: Which tensor.
        links: Its parametrizations.
        limit: Bytes that a stored tensor or an intermediate result may have, as far as torch's parametrizations go.

    Raises:
        NotComputable: It takes more memory, or it cannot be computed here.
        Misfit: Its state and its configuration contradict each other.
    """
    if all(is_built_in(link.codec) for link in links):
        return dry_run(checkpoint, record, links, limit).compute()
    _check_stored(checkpoint, record, limit)
    with modes.generators_kept():
        return _compute(record, links, checkpoint.tensor, functools.partial(_wary_run, limit=limit))


@dataclass(frozen=True)
class DryRun:
    """A tensor that shapes and dtypes say can be computed, and of which nothing has been read; see Note [Dry run].

    Attributes:
        weight: The tensor on the meta device.
        compute: Computes it in earnest.
    """

    weight: Tensor
    compute: Callable[[], Tensor]


def dry_run(checkpoint: Checkpoint, record: ParametrizedRecord, links: Sequence[Link], limit: int) -> DryRun:
    """Compute a tensor whose parametrizations are all torch's on the meta device; errors as for :func:`weight_of`."""
    _check_stored(checkpoint, record, limit)
    weight = _compute(
        record, links, functools.partial(_meta_tensor, checkpoint), functools.partial(_dry_run, limit=limit)
    )
    return DryRun(weight, functools.partial(_compute, record, links, checkpoint.tensor, _run))


def stored_weight(expanded: Checkpoint, record: ParametrizedRecord, registry: Registry) -> Tensor:
    """The tensor that a parametrized one stands for, within the bounds of a verification.

    Args:
        expanded: A checkpoint whose bases are whole (``orthoserde.transforms.expand``).
        record: One of its parametrized tensors.
        registry: The user's codecs; a class that was merely registered is never built.

    Raises:
        NotComputable: It cannot be computed from the checkpoint alone; the message says why.
        Misfit: The stored state is not one that the recorded configuration can have.
    """
    links = resolve(record, registry, registered=False)
    return weight_of(expanded, record, links, max(SCRATCH_BYTES, expanded.manifest.nbytes))


def _check_stored(checkpoint: Checkpoint, record: ParametrizedRecord, limit: int) -> None:
    manifest = checkpoint.manifest
    largest = max(manifest.tensors[manifest.kept_key(key)].nbytes for key in record.tensor_keys())
    if largest > limit:  # a base that is stored as columns
        raise NotComputable(f"its base takes {largest} bytes at once to work out, and the limit here is {limit}")


def _meta_tensor(checkpoint: Checkpoint, key: str) -> Tensor:
    record = checkpoint.manifest.tensors[checkpoint.manifest.kept_key(key)]
    return torch.empty(record.shape, dtype=DTYPES[record.dtype], device="meta")


def _compute(record: ParametrizedRecord, links: Sequence[Link], tensor: Callable[[str], Tensor], step: _Step) -> Tensor:
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


def _wary_run(link: Link, inputs: Mapping[str, Tensor], own: Mapping[str, Tensor], *, limit: int) -> Tensor:
    """Compute a parametrization, one of torch's only after a dry run: what it is given may come from a user's codec."""
    if is_built_in(link.codec):
        _dry_run(link, inputs, own, limit=limit)
    return _run(link, inputs, own)


def _run(link: Link, inputs: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> Tensor:
    """Compute a parametrization."""
    try:
        return link.codec.compute(link.config, {**inputs, **own})
    except Exception as error:  # torch has no such operation for this dtype, or whatever a user's codec raises
        raise NotComputable(f"{link.codec.kind} cannot be computed here: {one_line(error)}") from error


def _dry_run(link: Link, inputs: Mapping[str, Tensor], own: Mapping[str, Tensor], *, limit: int) -> Tensor:
    """Compute one of torch's parametrizations on the meta device; see Note [Dry run]."""
    kind = link.codec.kind
    state = {name: tensor.to("meta") for name, tensor in {**inputs, **own}.items()}
    try:
        expected, optional = _expected_shapes(link, {name: state[name] for name in inputs})
        for name in sorted(state.keys() - expected.keys() - optional):
            raise Misfit(f"{kind} has no tensor {name!r} in this configuration")
        for name in sorted(optional - state.keys()):
            raise NotComputable(f"its {name} is None, as torch left it on the meta device")
        for name, shape in expected.items():
            if name not in state:
                raise Misfit(f"{kind} needs a tensor {name!r}, which is not in the file")
            if state[name].shape != shape:
                raise Misfit(f"{kind}: expected {name} of shape {list(shape)}, got {list(state[name].shape)}")
        with _torch.LargestTensor() as largest:
            weight: Tensor = link.codec.compute(link.config, state)
    except (Misfit, NotComputable):
        raise
    except NotImplementedError as error:
        raise NotComputable(f"{kind} cannot be checked with this torch: {one_line(error)}") from error
    except Exception as error:  # whatever torch makes of shapes and settings that do not go together
        raise Misfit(f"{kind}: its tensors do not fit its configuration: {one_line(error)}") from error
    if largest.nbytes > limit:
        raise NotComputable(f"{kind} takes {largest.nbytes} bytes at once to compute, and the limit here is {limit}")
    return weight


def _expected_shapes(link: Link, inputs: Mapping[str, Tensor]) -> tuple[dict[str, torch.Size], set[str]]:
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
