"""What the caller has switched on (autocast, a default device) has no say in what is saved, loaded or computed."""

from __future__ import annotations

import random
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn, cast

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._device import DeviceContext

import orthoserde
from orthoserde import _torch
from orthoserde.cli import main
from orthoserde.integrations.loreft import LoReFT
from orthoserde.storage.open_file import OpenFile
from tests.helpers import same_bits


def autocast() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


def test_autocast_rounds_nothing_that_is_saved_or_verified(tmp_path: Path) -> None:
    model = orthogonal(nn.Linear(8, 4))
    with autocast():
        orthoserde.save(model, tmp_path / "m", include_weights=True)
        verified = orthoserde.verify(tmp_path / "m")
    assert verified.ok
    assert verified.residuals["weight"] is not None
    assert verified.residuals["weight"] < 1e-5
    orthoserde.save(model, tmp_path / "n", include_weights=True)
    assert (tmp_path / "m").read_bytes() == (tmp_path / "n").read_bytes()


def test_autocast_and_a_default_device_do_not_disturb_registering(tmp_path: Path) -> None:
    weight = torch.nn.init.orthogonal_(torch.empty(4, 8))
    layers = [nn.Linear(8, 4), nn.Linear(8, 4)]
    for layer in layers:
        with torch.no_grad():
            layer.weight.copy_(weight)
    with autocast():
        orthoserde.orthogonal(layers[0])
        loreft = LoReFT(8, 2)
    with torch.device("meta"):
        orthoserde.orthogonal(layers[1])
    for layer in layers:
        assert same_bits(layer.weight, weight)
    orthoserde.save(loreft, tmp_path / "m")
    with autocast():
        built = orthoserde.build(tmp_path / "m")
    assert all(same_bits(built.state_dict()[key], value) for key, value in loreft.state_dict().items())


@pytest.mark.parametrize("around", [autocast(), torch.device("meta")], ids=["autocast", "meta"])
def test_a_computed_weight_is_loaded_whatever_is_switched_on(tmp_path: Path, around: torch.autocast) -> None:
    weight, bias = torch.nn.init.orthogonal_(torch.empty(4, 8)), torch.randn(4)
    torch.save({"weight": weight, "bias": bias}, tmp_path / "m.pt")
    model = orthogonal(nn.Linear(8, 4))
    with around, warnings.catch_warnings():
        warnings.simplefilter("ignore", orthoserde.LegacyCheckpointWarning)
        if tuple(int(number) for number in torch.__version__.split(".")[:2]) < (2, 6):
            with pytest.raises(orthoserde.FileFormatError, match=r"torch 2\.6 or newer"):
                orthoserde.load(model, tmp_path / "m.pt")
            return
        orthoserde.load(model, tmp_path / "m.pt")
    assert same_bits(cast("torch.Tensor", model.weight), weight)


@pytest.fixture
def _default_is_cuda() -> Iterator[None]:
    torch.set_default_device("cuda")
    yield
    torch.set_default_device(None)


@pytest.mark.usefixtures("_default_is_cuda")
def test_a_default_device_is_not_asked_for_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may not be there, and the first tensor on it would begin a context that a model on the CPU has no use for."""

    def allocated() -> NoReturn:
        raise AssertionError("CUDA was asked for")

    model, other = (nn.Linear(8, 4, device="cpu") for _ in range(2))
    monkeypatch.setattr(torch.cuda, "_lazy_init", allocated)
    orthoserde.orthogonal(model)
    orthoserde.orthogonal(other)
    orthoserde.save(model, tmp_path / "m")
    orthoserde.load(other, tmp_path / "m")
    assert orthoserde.verify(tmp_path / "m").ok
    state = other.state_dict()
    assert all(value.device.type == "cpu" and same_bits(value, state[key]) for key, value in model.state_dict().items())
    # The mode says which it is; to make a tensor there would be what must not happen.
    stack: list[object] = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    assert [mode.device for mode in stack if isinstance(mode, DeviceContext)] == [torch.device("cuda")]


def test_the_type_of_the_default_device_is_that_of_a_new_tensor() -> None:
    def agrees() -> bool:
        return _torch.default_device().type == torch.empty(0).device.type

    class Mode(TorchFunctionMode):
        def __torch_function__(
            self, func: Callable[..., object], types: object, args: Any = (), kwargs: Any = None
        ) -> object:
            return func(*args, **(kwargs or {}))

    assert agrees()
    with torch.device("meta"):
        assert agrees()
        with Mode(), torch.device("cpu"):
            assert agrees()
            with torch.device("meta"), Mode():
                assert agrees()
        assert agrees()
    torch.set_default_device("meta")
    try:
        assert agrees()
        with torch.device("cpu"):
            assert agrees()
        torch.set_default_device("cpu")
        assert agrees()
    finally:
        torch.set_default_device(None)
    assert agrees()


def test_no_call_of_torch_takes_a_detour_where_the_cpu_is_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    detours: list[object] = []

    class Counting(torch.utils._device.DeviceContext):
        def __torch_function__(self, func: object, *rest: object) -> object:
            detours.append(func)
            return super().__torch_function__(func, *rest)  # type: ignore[no-untyped-call]

    monkeypatch.setattr(torch.utils._device, "DeviceContext", Counting)
    model = orthogonal(nn.Linear(8, 4))
    orthoserde.save(model, tmp_path / "m")
    orthoserde.load(model, tmp_path / "m")
    assert not detours
    with torch.device("meta"):
        orthoserde.load(model, tmp_path / "m")
    assert detours


READS: dict[str, Callable[[Path], object]] = {
    "verify": orthoserde.verify,
    "load": lambda path: orthoserde.load(drawing_model(), path),
    "load bare": lambda path: orthoserde.load(nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 8), nn.Linear(8, 8)), path),
    "baked": lambda path: orthoserde.convert(path, path.with_name("x"), "baked", force=True),
    "compact": lambda path: orthoserde.convert(path, path.with_name("x"), "compact", force=True),
    "diff": lambda path: main(["diff", str(path), str(path), "--json"]),
}


def drawing_model() -> nn.Module:
    return nn.Sequential(
        orthogonal(nn.Linear(8, 4), orthogonal_map="cayley"),
        weight_norm(nn.Linear(4, 8)),
        spectral_norm(nn.Linear(8, 8)),
    )


@pytest.mark.parametrize("name", READS)
def test_what_another_thread_draws_while_a_file_is_read_is_not_drawn_again(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The generators belong to the process: put back to where they were, they would give the same numbers once more."""
    path = tmp_path / "m"
    orthoserde.save(drawing_model(), path)
    read = OpenFile.read_into
    drawn: list[object] = []

    def draw() -> None:
        drawn.extend((random.random(), float(torch.rand(())), float(np.random.rand())))

    def drawing(self: OpenFile, memory: memoryview, position: int) -> None:
        thread = threading.Thread(target=draw)
        thread.start()
        thread.join()
        read(self, memory, position)

    monkeypatch.setattr(OpenFile, "read_into", drawing)
    READS[name](path)
    during = len(drawn)
    assert during > 9
    draw()
    assert len(set(drawn)) == len(drawn) == during + 3
