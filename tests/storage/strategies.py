"""Tensors, manifests and checkpoints of every sort, for the tests of what is stored."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from orthoserde.checkpoint import Checkpoint, LiveTensor
from orthoserde.json_values import JSON
from orthoserde.manifest import (
    DENSE,
    OPAQUE,
    Manifest,
    ModuleRecord,
    ParametrizationRecord,
    ParametrizedRecord,
    TensorRecord,
)
from orthoserde.manifest.training import GroupRecord, OptimizerRecord, StateRecord, TrainingRecord

DTYPE_NAMES = [
    *("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"),
    *("float8_e4m3fn", "float8_e5m2", "float16", "bfloat16", "float32", "float64", "complex64", "complex128"),
]
DTYPES: list[torch.dtype] = [getattr(torch, name) for name in DTYPE_NAMES]

#: The container has no complex128: we store it as pairs of float64.
CONTAINER_DTYPES = [dtype for dtype in DTYPES if dtype != torch.complex128]


def bits(tensor: Tensor) -> bytes:
    """The row-major bytes of a tensor, found without the code under test."""
    plain = tensor.detach().clone(memory_format=torch.contiguous_format).resolve_conj().resolve_neg()
    return plain.reshape(-1).view(torch.uint8).numpy().tobytes()


def random_tensor(dtype: torch.dtype, shape: Sequence[int], seed: int = 0) -> Tensor:
    """A row-major tensor of random bits, so also of NaNs, infinities and subnormal numbers."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(256, (math.prod(shape) * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    return (raw % 2 if dtype == torch.bool else raw).view(dtype).view(tuple(shape))


@st.composite
def tensors(draw: st.DrawFn, dtypes: Sequence[torch.dtype] = DTYPES) -> Tensor:
    """A tensor of random bits, of any number of dimensions and any memory layout."""
    dtype = draw(st.sampled_from(dtypes))
    shape = draw(st.lists(st.integers(0, 3), max_size=6))
    seed = draw(st.integers(0, 2**32))
    layout = draw(st.sampled_from(["row-major", "permuted", "sliced", "expanded", "offset", "conjugated", "negated"]))
    if layout == "permuted":
        return random_tensor(dtype, shape, seed).permute(draw(st.permutations(range(len(shape)))))
    if layout == "sliced":
        big = random_tensor(dtype, [2 * size + 1 for size in shape], seed)
        return big[tuple(slice(1, 2 * size + 1, 2) for size in shape)]
    if layout == "expanded":
        at = draw(st.integers(0, len(shape)))
        return random_tensor(dtype, shape, seed).unsqueeze(at).expand(*shape[:at], 3, *shape[at:])
    if layout == "offset":
        return random_tensor(dtype, [math.prod(shape) + 1], seed)[1:].view(shape)
    if layout == "conjugated" and dtype.is_complex:
        return random_tensor(dtype, shape, seed).conj()
    if layout == "negated" and dtype in (torch.float32, torch.float64):
        pair = torch.complex64 if dtype == torch.float32 else torch.complex128
        return random_tensor(pair, shape, seed).conj().imag
    return random_tensor(dtype, shape, seed)


#: What a tensor may be called; only the container's own key is taken.
tensor_names = st.text(max_size=8).filter(lambda name: name != "__metadata__" and not name.startswith("."))


def json_values(leaves: int = 12) -> st.SearchStrategy[JSON]:
    """Any value that can be stored."""
    scalars: st.SearchStrategy[JSON] = (
        st.none()
        | st.booleans()
        | st.integers(-(2**63), 2**63 - 1)
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(max_size=6)
    )

    def containers(items: st.SearchStrategy[JSON]) -> st.SearchStrategy[JSON]:
        return st.lists(items, max_size=4) | st.dictionaries(st.text(max_size=6), items, max_size=4)

    return st.recursive(scalars, containers, max_leaves=leaves)


configs = st.none() | st.dictionaries(st.text(max_size=6), json_values(4), max_size=3)
versions = st.integers(1, 2**40)
sizes = st.integers(0, 2**63 - 1)
digests = st.text("0123456789abcdef", min_size=32, max_size=32)


@st.composite
def tensor_records(draw: st.DrawFn) -> TensorRecord:
    """A record of a stored tensor."""
    shape = draw(st.lists(st.integers(0, 2**12), max_size=5))
    stride = draw(st.lists(sizes, min_size=len(shape), max_size=len(shape)))
    return TensorRecord(
        draw(st.sampled_from(DTYPE_NAMES)),
        tuple(shape),
        tuple(stride),
        draw(st.booleans()),
        draw(digests),
        draw(st.booleans()),
    )


@st.composite
def link_records(draw: st.DrawFn) -> ParametrizationRecord:
    """A record of one parametrization, of a known or an opaque class."""
    opaque = draw(st.booleans())
    return ParametrizationRecord(
        kind=OPAQUE if opaque else draw(st.text(min_size=1, max_size=8).filter(lambda kind: kind != OPAQUE)),
        version=draw(versions),
        config=draw(configs),
        class_name=draw(st.text(max_size=8)) if opaque else None,
        tensors=dict.fromkeys(draw(st.lists(st.text(min_size=1, max_size=4), max_size=2, unique=True)), DENSE),
    )


@st.composite
def parametrized_records(draw: st.DrawFn) -> ParametrizedRecord:
    """A record of one parametrized tensor."""
    several = [f"original{i}" for i in range(draw(st.integers(1, 3)))]
    return ParametrizedRecord(
        module=draw(st.text(max_size=6).filter(lambda path: not path.startswith("."))),
        tensor_name=draw(st.text(min_size=1, max_size=6)),
        aliases=tuple(draw(st.lists(st.text(max_size=6), max_size=2))),
        shape=draw(st.none() | st.lists(sizes, max_size=4).map(tuple)),
        dtype=draw(st.none() | st.sampled_from(DTYPE_NAMES)),
        parameter=draw(st.booleans()),
        unsafe=draw(st.booleans()),
        originals=dict.fromkeys(draw(st.sampled_from([["original"], several])), DENSE),
        chain=tuple(draw(st.lists(link_records(), min_size=1, max_size=3))),
    )


module_records = st.builds(
    ModuleRecord, path=st.text(max_size=6), kind=st.text(max_size=6), version=versions, config=configs
)
texts = st.dictionaries(st.text(max_size=8), st.text(max_size=8), max_size=3)


TREES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.lists(inner, max_size=2).map(lambda items: {"tuple": items})
        | st.dictionaries(st.text(max_size=4), inner, max_size=2).map(
            lambda items: {"dict": [[key, value] for key, value in items.items()]}
        )
    ),
    max_leaves=4,
)


@st.composite
def training_records(draw: st.DrawFn, keys: list[str]) -> TrainingRecord:
    """Training state that has these tensors."""
    names = draw(st.lists(st.text(max_size=4), max_size=3, unique=True))
    parts = names[:1], names[1:]
    state: dict[str, JSON] = {name: draw(TREES) for name in names[:2]}
    rest: JSON = [{"tensor": key} for key in keys]
    optimizer = OptimizerRecord(
        draw(st.text(max_size=4)), tuple(GroupRecord(tuple(part), draw(TREES)) for part in parts), state, rest
    )
    entries = st.builds(StateRecord, class_name=st.none() | st.text(max_size=4), value=TREES)
    return TrainingRecord(
        {draw(st.text(max_size=4)): optimizer},
        draw(st.dictionaries(st.text(max_size=4), entries, max_size=2)),
        draw(TREES),
    )


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    """A manifest whose fields agree with each other."""
    parametrized = draw(st.lists(parametrized_records(), max_size=2, unique_by=lambda record: record.name))
    keys = [key for record in parametrized for key in record.tensor_keys()]
    keys += draw(st.lists(tensor_names, max_size=3))
    stored = {key: draw(tensor_records()) for key in keys}
    aliases: dict[str, str] = {}
    if stored:
        names = tensor_names.filter(lambda name: name not in stored)
        aliases = draw(st.dictionaries(names, st.sampled_from(sorted(stored)), max_size=2))
    own: dict[str, TensorRecord] = {}
    training: TrainingRecord | None = None
    if draw(st.booleans()):
        own = {f".{name}": draw(tensor_records()) for name in draw(st.lists(st.text(max_size=6), max_size=2))}
        training = draw(training_records(list(own)))
    return Manifest(
        tensors={**stored, **own},
        training=training,
        aliases=aliases,
        parametrized=tuple(parametrized),
        modules=tuple(draw(st.lists(module_records, max_size=2, unique_by=lambda record: record.path))),
        computed=tuple(sorted(set(stored) - {key for record in parametrized for key in record.tensor_keys()})[:1]),
        left_out=tuple(draw(st.lists(tensor_names.filter(lambda n: n not in stored and n not in aliases), max_size=2))),
        metadata=draw(texts),
        writer=draw(texts),
    )


def checkpoint_of(stored: Mapping[str, Tensor], manifest: Manifest | None = None) -> Checkpoint:
    """A checkpoint of live tensors, with the other fields of ``manifest``."""
    records = {
        key: TensorRecord(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), tensor.stride(), False)
        for key, tensor in stored.items()
    }
    manifest = dataclasses.replace(manifest or Manifest({}), tensors=records)
    return Checkpoint(manifest, {key: LiveTensor(tensor) for key, tensor in stored.items()}, "a test")
