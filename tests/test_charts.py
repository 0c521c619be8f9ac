"""Orthogonal parametrizations with a canonical base."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import orthoserde
from orthoserde import Fidelity
from orthoserde.orthonormal.completion import complete
from tests.helpers import assert_unchanged, same_bits, snapshot

MAPS = ["matrix_exp", "cayley", "householder"]
SHAPES = [(9, 4), (4, 9), (6, 6), (3, 9, 4), (2, 3, 4, 9), (5, 5, 5), (7, 1), (1, 7)]


class Holder(nn.Module):
    """A module with one tensor called weight, a parameter or a buffer."""

    weight: Tensor

    def __init__(self, weight: Tensor, parameter: bool = True) -> None:
        super().__init__()
        if parameter:
            self.weight = nn.Parameter(weight)
        else:
            self.register_buffer("weight", weight)


def orthonormal(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """A weight whose shorter side is orthonormal, row-major."""
    rows, columns = shape[-2:]
    tall: Tensor = torch.linalg.qr(torch.randn(*shape[:-2], max(rows, columns), min(rows, columns), dtype=dtype))[0]
    return (tall if rows >= columns else tall.mT).contiguous()


def weight_of(module: nn.Module) -> Tensor:
    assert isinstance(module.weight, Tensor)
    return module.weight


def link(module: nn.Module) -> nn.Module:
    assert isinstance(module.parametrizations, nn.ModuleDict)
    found = module.parametrizations["weight"]
    assert isinstance(found, parametrize.ParametrizationList)
    return found[0]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("orthogonal_map", MAPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_orthonormal_weight_is_kept_bit_for_bit(
    shape: tuple[int, ...], orthogonal_map: str, dtype: torch.dtype
) -> None:
    weight = orthonormal(shape, dtype)
    module = Holder(weight.clone())
    parameter = module.weight
    assert orthoserde.orthogonal(module, orthogonal_map=orthogonal_map) is module
    assert same_bits(module.weight, weight)
    original = module.get_parameter("parametrizations.weight.original")
    assert original is parameter
    assert original.requires_grad


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("orthogonal_map", MAPS)
def test_it_registers_what_torch_registers(shape: tuple[int, ...], orthogonal_map: str) -> None:
    weight = torch.randn(shape)
    ours, theirs = Holder(weight.clone()), Holder(weight.clone())
    orthoserde.orthogonal(ours, orthogonal_map=orthogonal_map)
    parametrizations.orthogonal(theirs, orthogonal_map=orthogonal_map)
    assert type(link(ours)) is type(link(theirs))
    assert vars(link(ours))["orthogonal_map"] is vars(link(theirs))["orthogonal_map"]
    assert vars(link(ours))["shape"] == vars(link(theirs))["shape"]
    mine, other = ours.state_dict(), theirs.state_dict()
    assert mine.keys() == other.keys()
    for key, value in mine.items():
        assert (value.shape, value.dtype, value.stride()) == (other[key].shape, other[key].dtype, other[key].stride())
    assert same_bits(mine["parametrizations.weight.original"], other["parametrizations.weight.original"])
    eps = 10 * max(shape[-2:]) * torch.finfo(torch.float32).eps
    torch.testing.assert_close(ours.weight, theirs.weight, rtol=0, atol=eps)


@pytest.mark.parametrize("shape", [(9, 4), (4, 9), (3, 9, 4)], ids=str)
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize("orthogonal_map", [None, "cayley"])
def test_a_complex_weight_is_completed_too(
    shape: tuple[int, ...], dtype: torch.dtype, orthogonal_map: str | None
) -> None:
    weight = orthonormal(shape, dtype)
    module = orthoserde.orthogonal(Holder(weight.clone()), orthogonal_map=orthogonal_map)
    assert same_bits(torch.view_as_real(weight_of(module)), torch.view_as_real(weight))
    base = module.get_buffer("parametrizations.weight.0.base")
    identity = torch.eye(base.size(-1), dtype=dtype)
    assert (base.mH @ base - identity).abs().max() < 100 * torch.finfo(dtype).eps


@pytest.mark.parametrize("shape", [(9, 4), (4, 9), (3, 9, 4)], ids=str)
def test_the_base_is_the_canonical_completion_of_its_first_columns(shape: tuple[int, ...]) -> None:
    module = orthoserde.orthogonal(Holder(torch.randn(shape)))
    base = module.get_buffer("parametrizations.weight.0.base")
    assert same_bits(base, complete(base[..., : min(shape[-2:])]))
    assert base.stride() == complete(base[..., : min(shape[-2:])]).stride()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("orthogonal_map", MAPS)
def test_no_random_generator_is_used(shape: tuple[int, ...], orthogonal_map: str) -> None:
    module = Holder(torch.randn(shape))
    before = torch.get_rng_state()
    orthoserde.orthogonal(module, orthogonal_map=orthogonal_map)
    assert torch.equal(torch.get_rng_state(), before)


def test_registering_twice_alike_gives_the_same_bits() -> None:
    weight = torch.randn(40, 7)
    one, other = (orthoserde.orthogonal(Holder(weight.clone())).state_dict() for _ in range(2))
    assert all(same_bits(one[key], other[key]) for key in one)


@pytest.mark.parametrize("orthogonal_map", MAPS)
def test_training_stays_on_the_constraint(orthogonal_map: str) -> None:
    module = orthoserde.orthogonal(nn.Linear(12, 5), orthogonal_map=orthogonal_map)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    for _ in range(50):
        loss = (module(torch.randn(8, 12)) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    weight = weight_of(module).detach().double()
    assert (weight @ weight.mT - torch.eye(5)).abs().max() < 1e-5


@pytest.mark.parametrize("orthogonal_map", MAPS)
def test_a_run_continues_from_a_file(orthogonal_map: str, tmp_path: Path) -> None:
    model = orthoserde.orthogonal(nn.Linear(12, 5), orthogonal_map=orthogonal_map)
    with torch.no_grad():
        model.get_parameter("parametrizations.weight.original").add_(torch.randn(5, 12).tril(-1), alpha=0.1)
    orthoserde.save(model, tmp_path / "model.safetensors")
    other = parametrizations.orthogonal(nn.Linear(12, 5), orthogonal_map=orthogonal_map)
    assert orthoserde.load(other, tmp_path / "model.safetensors").fidelity is Fidelity.EXACT
    assert same_bits(weight_of(other), weight_of(model))


def test_without_trivialization_it_is_torch_itself() -> None:
    weight = torch.randn(9, 4)
    ours, theirs = Holder(weight.clone()), Holder(weight.clone())
    orthoserde.orthogonal(ours, use_trivialization=False)
    parametrizations.orthogonal(theirs, use_trivialization=False)
    mine, other = ours.state_dict(), theirs.state_dict()
    assert mine.keys() == other.keys()
    assert all(same_bits(mine[key], other[key]) for key in mine)


def test_a_buffer_and_another_name_are_parametrized_too() -> None:
    module = orthoserde.orthogonal(Holder(orthonormal((9, 4)), parameter=False))
    assert "parametrizations.weight.original" in dict(module.named_buffers())
    recurrent = nn.LSTM(4, 5)
    orthoserde.orthogonal(recurrent, "weight_hh_l0")
    weight = cast("Tensor", recurrent.weight_hh_l0).detach().double()
    assert (weight.mT @ weight - torch.eye(5)).abs().max() < 1e-5


def test_frozen_and_evaluated_modules_stay_so() -> None:
    module = nn.Linear(9, 4).requires_grad_(False).eval()
    orthoserde.orthogonal(module)
    assert not any(parameter.requires_grad for parameter in module.parameters())
    assert not any(each.training for each in module.modules())


@pytest.mark.parametrize("shape", [(9, 4), (4, 9), (6, 6)], ids=str)
def test_on_the_meta_device_a_load_fills_it(shape: tuple[int, int], tmp_path: Path) -> None:
    model = orthoserde.orthogonal(nn.Linear(*shape))
    orthoserde.save(model, tmp_path / "model.safetensors")
    with torch.device("meta"):
        other = orthoserde.orthogonal(nn.Linear(*shape))
    assert other.get_buffer("parametrizations.weight.0.base").device.type == "meta"
    assert orthoserde.load(other, tmp_path / "model.safetensors").fidelity is Fidelity.EXACT
    mine, theirs = other.state_dict(), model.state_dict()
    assert all(same_bits(mine[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize(
    ("module", "name", "orthogonal_map", "message"),
    [
        (nn.Linear(4, 3), "kernel", None, "no parameter or buffer named 'kernel'"),
        (nn.Linear(4, 3), "in_features", None, "no parameter or buffer named"),
        (nn.Linear(4, 3), "bias", None, "1 dimensions"),
        (nn.Linear(4, 3), "weight", "qr", "expected one of matrix_exp, cayley, householder, got 'qr'"),
        (nn.Linear(4, 3).bfloat16(), "weight", None, r"got torch\.bfloat16"),
        (nn.Linear(4, 3).half(), "weight", None, r"got torch\.float16"),
        (nn.Linear(4, 3, dtype=torch.complex64), "weight", "householder", "complex"),
        (nn.Linear(4, 4, dtype=torch.complex64), "weight", "householder", "complex"),
        (parametrizations.orthogonal(nn.Linear(4, 3)), "weight", None, "parametrized already"),
        (parametrizations.weight_norm(nn.Linear(4, 3)), "weight", None, "parametrized already"),
    ],
    ids=str,
)
def test_what_cannot_be_parametrized_is_refused_and_unchanged(
    module: nn.Module, name: str, orthogonal_map: str | None, message: str
) -> None:
    before = snapshot(module)
    with pytest.raises(ValueError, match=message):
        orthoserde.orthogonal(module, name, orthogonal_map)
    assert_unchanged(module, before)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (3, 0, 4)], ids=str)
def test_a_weight_without_elements_is_parametrized_or_refused_as_by_torch(shape: tuple[int, ...]) -> None:
    theirs: object
    try:
        theirs = parametrizations.orthogonal(Holder(torch.empty(shape)), orthogonal_map="cayley").state_dict().keys()
    except (RuntimeError, ValueError) as error:
        theirs = type(error)
    ours: object
    try:
        ours = orthoserde.orthogonal(Holder(torch.empty(shape)), orthogonal_map="cayley").state_dict().keys()
    except (RuntimeError, ValueError) as error:
        ours = type(error)
    assert ours == theirs
