"""What the tests share: snapshots that notice every change of a model, and small ways to look at tensors and files."""

from __future__ import annotations

import contextlib
import os
import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.nn.utils.spectral_norm import SpectralNorm

from orthoserde import side_by_side
from orthoserde.json_values import JSON
from orthoserde.parametrizations import BUILT_IN_CODECS
from orthoserde.registry.codec import Codec
from orthoserde.storage.open_file import OpenFile

#: A message shows this many differences.
SHOWN_DIFFERENCES = 20


def bits(tensor: Tensor) -> bytes:
    """The elements of a tensor as row-major bytes; on the meta device there are none."""
    tensor = local_part(tensor)
    if tensor.device.type == "meta":
        return b""
    with torch.no_grad():
        dense = tensor.detach().resolve_conj().resolve_neg().contiguous()
        # Elementwise: numpy knows neither bfloat16 nor the float8 types.
        return dense.reshape(-1).view(torch.uint8).numpy().tobytes() if dense.numel() else b""


def local_part(tensor: Tensor) -> Tensor:
    """The plain tensor in a DTensor, a plain tensor itself."""
    to_local: Callable[[], Tensor] | None = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def is_lazy(tensor: Tensor) -> bool:
    """Whether a tensor waits for its shape; asked of its type, for torch 2.3 takes DTensors for instances."""
    return issubclass(type(tensor), (UninitializedParameter, UninitializedBuffer))


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors have equal dtype, shape and bits; strides are left aside, NaN equals itself."""
    return left.dtype == right.dtype and left.shape == right.shape and bits(left) == bits(right)


@dataclass(frozen=True)
class TensorState:
    """Everything that can change about one tensor object. The object itself is held, so that its id stays taken."""

    tensor: Tensor
    look: tuple[object, ...]
    elements: bytes
    grad: TensorState | None

    def differences(self, where: str, now: TensorState) -> Iterator[str]:
        """Say how ``now`` differs, the identity of the objects included."""
        if self.tensor is not now.tensor:
            yield f"{where}: another tensor object"
        if self.look != now.look:
            yield f"{where}: {self.look} became {now.look}"
        if self.elements != now.elements:
            yield f"{where}: other elements"
        if (self.grad is None) != (now.grad is None):
            yield f"{where}: a gradient came or went"
        elif self.grad is not None and now.grad is not None:
            yield from self.grad.differences(f"{where}.grad", now.grad)


def state_of(tensor: Tensor) -> TensorState:
    """Look at a tensor without touching it."""
    if is_lazy(tensor):  # it has neither shape nor elements
        return TensorState(tensor, (type(tensor), tensor.requires_grad), b"", None)
    inference = tensor.is_inference()
    look = (
        type(tensor),
        tensor.dtype,
        tensor.device,
        tuple(tensor.shape),
        tuple(tensor.stride()),
        0 if tensor.device.type == "meta" else local_part(tensor).data_ptr(),
        tensor.requires_grad,
        inference,
        # Tensors made in inference mode have no version counter.
        None if inference else tensor._version,
        sorted(vars(tensor)),
    )
    grad = tensor.grad if tensor.is_leaf else None
    return TensorState(tensor, look, bits(tensor), None if grad is None else state_of(grad))


@dataclass(frozen=True)
class ModuleState:
    """What is registered on one module, in order, and how the module stands."""

    module: nn.Module
    look: tuple[object, ...]
    attributes: dict[str, object]
    tensors: dict[str, TensorState]


@dataclass(frozen=True)
class Snapshot:
    """A model and everything around it that neither a save nor a refused load may change."""

    modules: dict[str, ModuleState]
    surroundings: dict[str, object]


def snapshot(model: nn.Module) -> Snapshot:
    """Remember a model bit for bit, with the random generators and the modes of torch; evaluates nothing."""
    return Snapshot(dict(_module_states(model, "")), surroundings())


def assert_unchanged(model: nn.Module, before: Snapshot) -> None:
    """Fail unless the model and its surroundings are what they were, and say what is not."""
    after = snapshot(model)
    found: list[str] = []
    if list(before.modules) != list(after.modules):
        found.append(f"modules: {list(before.modules)} became {list(after.modules)}")
    for path in before.modules.keys() & after.modules.keys():
        found += _module_differences(path, before.modules[path], after.modules[path])
    found += [
        f"{name}: {before.surroundings[name]!r:.80} became {value!r:.80}"
        for name, value in after.surroundings.items()
        if value != before.surroundings[name]
    ]
    assert not found, "\n".join(["changed:", *found[:SHOWN_DIFFERENCES]])


def surroundings() -> dict[str, object]:
    """States of the random generators, and the modes of torch that a library could leave changed."""
    name, keys, *rest = np.random.get_state()
    return {
        "torch generator": bits(torch.random.get_rng_state()),
        "random": random.getstate(),
        "numpy.random": (name, np.asarray(keys).tobytes(), *rest),
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.empty(0).device,
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def _module_states(module: nn.Module, path: str) -> Iterator[tuple[str, ModuleState]]:
    tables = (module._parameters, module._buffers, module._modules)
    look = (
        type(module),
        module.training,
        tuple(tuple(table) for table in tables),
        tuple(id(child) for child in module._modules.values()),
        sorted(module._non_persistent_buffers_set),
    )
    held: dict[str, Tensor | None] = {**module._parameters, **module._buffers}
    tensors = {name: state_of(tensor) for name, tensor in held.items() if tensor is not None}
    yield path, ModuleState(module, look, dict(vars(module)), tensors)
    for name, child in module._modules.items():
        if child is not None:
            yield from _module_states(child, f"{path}.{name}".lstrip("."))


def _module_differences(path: str, before: ModuleState, after: ModuleState) -> Iterator[str]:
    where = path or "(model)"
    if before.module is not after.module:
        yield f"{where}: another module object"
    if before.look != after.look:
        yield f"{where}: {before.look} became {after.look}"
    for name in before.attributes.keys() | after.attributes.keys():
        if before.attributes.get(name, before) is not after.attributes.get(name, after):
            yield f"{where}: the attribute {name} is another object"
    if before.tensors.keys() != after.tensors.keys():
        yield f"{where}: tensors {sorted(before.tensors)} became {sorted(after.tensors)}"
    for name in before.tensors.keys() & after.tensors.keys():
        yield from before.tensors[name].differences(f"{where}.{name}", after.tensors[name])


def slots_of(model: nn.Module) -> dict[str, Tensor | None]:
    """Every parameter and persistent buffer by key, those that are None included; asks no overridable method."""
    found: dict[str, Tensor | None] = dict(model._parameters)
    hidden = model._non_persistent_buffers_set
    found |= {name: buffer for name, buffer in model._buffers.items() if name not in hidden}
    for name, child in model._modules.items():
        if child is not None:
            found |= {f"{name}.{key}": tensor for key, tensor in slots_of(child).items()}
    return found


def assert_same_state(left: nn.Module, right: nn.Module, *, strides: bool = True) -> None:
    """Fail unless two models hold the same tensors under the same keys, bit for bit and with equal strides."""
    ours, theirs = slots_of(left), slots_of(right)
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        other = theirs[key]
        if tensor is None or other is None:
            assert tensor is other, f"{key}: one of the two is None"
            continue
        assert same_bits(tensor, other), f"{key}: other elements"
        if strides:
            assert tensor.stride() == other.stride(), f"{key}: strides {tensor.stride()} and {other.stride()}"


def scramble_(model: nn.Module) -> nn.Module:
    """Move every floating tensor of a model to other values, so that nothing is at its initial one."""
    with torch.no_grad():
        for tensor in slots_of(model).values():
            if tensor is not None and tensor.is_floating_point():
                tensor.add_(torch.randn(tensor.shape).to(tensor.dtype), alpha=0.01)
    return model


def lived_in(model: nn.Module) -> nn.Module:
    """Give a model what a model in use has: gradients, moved version counters, mixed modes and ``requires_grad``."""
    parameters = [slot for slot in slots_of(model).values() if isinstance(slot, nn.Parameter) and not is_lazy(slot)]
    for i, parameter in enumerate(parameters):
        if parameter.is_leaf and parameter.requires_grad and parameter.device.type != "meta":
            parameter.grad = torch.full_like(parameter, i + 0.5)
    if parameters:
        parameters[-1].requires_grad_(False)
    for i, module in enumerate(model.modules()):
        module.training = i % 3 != 1
    return model


def raised_by(action: Callable[[], object]) -> Exception | None:
    """The exception that an action raises, None if it succeeds; its warnings are let pass."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            action()
        except Exception as error:
            return error
    return None


def watch_reads(
    monkeypatch: pytest.MonkeyPatch, before: Callable[[int, int], None] = lambda position, count: None
) -> list[tuple[int, int]]:
    """Look at every read of a checkpoint's file from now on, in whatever thread.

    Args:
        monkeypatch: Ends it with the test.
        before: Called before each read, with its position and the bytes that are asked for.

    Returns:
        Position and bytes of every read that has begun so far; it grows.
    """
    read_some = OpenFile._read_some
    reads: list[tuple[int, int]] = []

    def watched(file: OpenFile, memory: memoryview, position: int) -> int:
        reads.append((position, len(memory)))
        before(position, len(memory))
        return read_some(file, memory, position)

    monkeypatch.setattr(OpenFile, "_read_some", watched)
    return reads


def watch_computations(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Look at every weight that a codec which every registry knows computes from now on.

    Returns:
        Kind and type of device of each so far, in order; it grows.
    """
    computed: list[tuple[str, str]] = []

    def watched(codec: Codec) -> Callable[[Any, Mapping[str, JSON], Mapping[str, Tensor]], Tensor]:
        compute = type(codec).compute

        def watch(self: Codec, config: Mapping[str, JSON], tensors: Mapping[str, Tensor]) -> Tensor:
            computed.append((codec.kind, next(iter(tensors.values())).device.type))
            return compute(self, config, tensors)

        return watch

    for codec in BUILT_IN_CODECS:
        monkeypatch.setattr(type(codec), "compute", watched(codec))
    return computed


#: How bytes at a position are read: by one call of the system, or where there is none by seeking first.
WAYS_OF_READING = ("at positions", "by seeking")


def read_in(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let files be read in one of these ways from now on."""
    if way == "by seeking":
        monkeypatch.delattr(os, "preadv", raising=False)


#: Threads of a load: as few as small tensors get, or more than there may be cores, whatever the tensors.
THREADS = (1, 4)


def use_threads(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let tasks that may run in any thread be shared out among so many, however small they are."""
    monkeypatch.setattr(side_by_side, "_threads_at_hand", lambda: count)
    monkeypatch.setattr(side_by_side, "SMALL_BYTES", 1)
    monkeypatch.setattr(side_by_side, "BYTES_PER_THREAD", 1)


def header_bytes(path: Path) -> int:
    """Bytes of a safetensors file before its tensors: the length and the header."""
    with path.open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def flip_bit(path: Path, byte: int, bit: int = 0) -> None:
    """Change one bit of a file."""
    data = bytearray(path.read_bytes())
    data[byte] ^= 1 << bit
    path.write_bytes(data)


def with_hook(kind: str, module: nn.Module, *args: object, **options: object) -> Any:
    """Register torch's older hook ``weight_norm`` or ``spectral_norm`` on a module; return the module."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's weight_norm
        register: Callable[..., Any] = getattr(nn.utils, kind)
        return register(module, *args, **options)


class HalfSpectralNorm(SpectralNorm):
    """A hook of a user's own, which computes something else from the same tensors."""

    def compute_weight(self, module: nn.Module, do_power_iteration: bool) -> Tensor:
        return super().compute_weight(module, do_power_iteration) / 2


def hook_of_a_subclass(layer: nn.Module) -> Any:
    """Let a subclass of torch's hook compute the weight of a layer; return the layer."""
    with_hook("spectral_norm", layer)
    for hook in layer._forward_pre_hooks.values():
        cast("Any", hook).__class__ = HalfSpectralNorm
    return layer


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, shape: Sequence[int], numbers: Iterable[int]
) -> list[float]:
    """Train on batches of a shape, each by its number; return the losses."""
    losses: list[float] = []
    for number in numbers:
        batch = torch.randn(*shape, generator=torch.Generator().manual_seed(number))
        optimizer.zero_grad()
        loss = (model(batch) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make another dtype the default for a while."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def assert_finite(error: BaseException) -> None:
    """Causes and contexts of an error come to an end."""
    seen: list[BaseException] = []
    pending: list[BaseException | None] = [error]
    while pending:
        each = pending.pop()
        if each is not None:
            assert not any(each is other for other in (each.__cause__, each.__context__))
            assert len(seen) < 20
            seen.append(each)
            pending += [each.__cause__, each.__context__]
