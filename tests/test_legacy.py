"""Computed weights alone: outputs are equal, training stays on the constraint, and nothing is said that is not so."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

import orthoserde
from orthoserde import Fidelity, IncompatibleModelError, LegacyCheckpointWarning
from tests.helpers import assert_unchanged, snapshot

Make = Callable[[], nn.Module]


def holder(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> nn.Module:
    module = nn.Module()
    module.weight = nn.Parameter(torch.randn(shape, dtype=dtype))
    return module


#: Kinds whose weight comes back bit for bit.
TRIVIALIZED: dict[str, Make] = {
    f"{orthogonal_map} {shape} {dtype}": (
        lambda orthogonal_map=orthogonal_map, shape=shape, dtype=dtype: orthogonal(  # type: ignore[misc]
            holder(shape, dtype), orthogonal_map=orthogonal_map
        )
    )
    for orthogonal_map in ("householder", "cayley", "matrix_exp")
    for shape in ((7, 3), (3, 7), (5, 5), (2, 6, 3))
    for dtype in (torch.float32, torch.float64, torch.complex64)
    if not (orthogonal_map == "householder" and dtype.is_complex)
}

#: Kinds whose weight comes back within a tolerance, in units of eps.
WITHIN: dict[str, tuple[Make, float]] = {
    "householder untrivialized": (lambda: orthogonal(holder((7, 3)), use_trivialization=False), 70),
    "weight_norm": (lambda: weight_norm(nn.Linear(5, 4)), 4),
    "weight_norm dim=1": (lambda: weight_norm(nn.Conv1d(5, 4, 2), dim=1), 4),
    "weight_norm dim=None": (lambda: weight_norm(nn.Linear(5, 4), dim=cast("int", None)), 4),
    "spectral_norm": (lambda: spectral_norm(nn.Linear(5, 4)), 100),
    "spectral_norm dim=1": (lambda: spectral_norm(nn.ConvTranspose2d(2, 3, 2)), 100),
    "spectral_norm one row": (lambda: spectral_norm(nn.Linear(5, 1)), 100),
    "spectral_norm vector": (lambda: spectral_norm(holder((5,))), 100),
}


def weight_of(module: nn.Module) -> Tensor:
    return cast("Tensor", module.weight).detach()


def save_weight(module: nn.Module, path: Path) -> Tensor:
    """Save what a legacy checkpoint holds of a module: the weight as computed, and its other tensors."""
    weight = weight_of(module.eval()).clone()
    others = {name: value for name, value in module.state_dict().items() if "parametrizations" not in name}
    safetensors.torch.save_file({**others, "weight": weight.contiguous()}, path)
    return weight


def load(model: nn.Module, path: Path, **options: str) -> orthoserde.LoadReport:
    with pytest.warns(LegacyCheckpointWarning, match="only the computed weight of weight"):
        return orthoserde.load(model, path, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", TRIVIALIZED)
def test_a_trivialized_weight_comes_back_bit_for_bit(tmp_path: Path, kind: str) -> None:
    weight = save_weight(TRIVIALIZED[kind](), tmp_path / "m")
    model = TRIVIALIZED[kind]()
    ids = [id(parameter) for parameter in model.parameters()]
    state = torch.get_rng_state()
    report = load(model, tmp_path / "m")
    assert torch.equal(torch.get_rng_state(), state)
    assert report.fidelity is Fidelity.INFERENCE
    assert torch.equal(weight_of(model), weight)
    assert [id(parameter) for parameter in model.parameters()] == ids
    assert report.tensors["weight"].residual is not None
    (record,) = orthoserde.parametrized_tensors(model)
    base = cast("Tensor", record.parametrizations[0].base)
    wide = base.to(torch.complex128)
    assert float((wide.mH @ wide - torch.eye(base.size(-1))).abs().max()) < 1e-5


@pytest.mark.parametrize("kind", WITHIN)
def test_other_weights_come_back_within_what_their_codec_states(tmp_path: Path, kind: str) -> None:
    make, tolerance = WITHIN[kind]
    weight = save_weight(make(), tmp_path / "m")
    model = make().eval()
    assert load(model, tmp_path / "m").fidelity is Fidelity.INFERENCE
    assert float((weight_of(model) - weight).abs().max()) <= tolerance * torch.finfo(weight.dtype).eps


@pytest.mark.parametrize("orthogonal_map", ["householder", "cayley", "matrix_exp"])
@pytest.mark.parametrize("shape", [(12, 3), (3, 12)])
def test_training_stays_on_the_constraint(tmp_path: Path, orthogonal_map: str, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    save_weight(orthogonal(holder(shape), orthogonal_map=orthogonal_map), tmp_path / "m")
    model = orthogonal(holder(shape), orthogonal_map=orthogonal_map)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    report = load(model, tmp_path / "m")
    target = torch.randn(shape)
    for _ in range(50):
        optimizer.zero_grad()
        (cast("Tensor", model.weight) - target).square().sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    residual = report.tensors["weight"].residual
    assert residual is not None
    assert residual < 1e-6


@pytest.mark.parametrize("kind", ["cayley", "matrix_exp"])
def test_a_map_that_cannot_be_inverted_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    def make() -> nn.Module:
        return orthogonal(holder((5, 3)), orthogonal_map=kind, use_trivialization=False)

    save_weight(make(), tmp_path / "m")
    model = make()
    before = snapshot(model)
    with pytest.raises(IncompatibleModelError, match=r"weight: the file has its computed weight alone, from which"):
        orthoserde.load(model, tmp_path / "m")
    assert_unchanged(model, before)


def test_chains_and_unknown_classes_are_refused_by_name(tmp_path: Path) -> None:
    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    alone = parametrize.register_parametrization(nn.Linear(3, 3), "weight", Twice())
    chained = parametrize.register_parametrization(orthogonal(nn.Linear(3, 3)), "weight", Twice())
    save_weight(nn.Linear(3, 3), tmp_path / "m")
    for model, reason in ((alone, "the unregistered .*Twice"), (chained, "2 parametrizations in a row")):
        before = snapshot(model)
        with pytest.raises(IncompatibleModelError, match=reason):
            orthoserde.load(model, tmp_path / "m")
        assert_unchanged(model, before)


@pytest.mark.parametrize("damage", ["moved", "bfloat16", "float16"])
def test_a_damaged_weight_is_refused_with_its_distance_projected_or_kept(tmp_path: Path, damage: str) -> None:
    weight = weight_of(orthogonal(holder((64, 8))))
    damages = {"moved": weight + 0.01, "bfloat16": weight.bfloat16().float(), "float16": weight.half().float()}
    damaged = damages[damage]
    safetensors.torch.save_file({"weight": damaged.contiguous()}, tmp_path / "m")
    model = orthogonal(holder((64, 8)))
    before = snapshot(model)
    for legacy in ("inference", "refuse"):
        with pytest.raises(IncompatibleModelError, match="computed weight") as caught:
            orthoserde.load(model, tmp_path / "m", legacy=legacy)
        assert ("off the constraint by" in str(caught.value)) == (legacy == "inference")
        assert_unchanged(model, before)
    report = load(model, tmp_path / "m", legacy="keep")
    assert "kept" in report.tensors["weight"].action
    assert torch.equal(weight_of(model), damaged)
    report = load(model, tmp_path / "m", legacy="project")
    assert "projected" in report.tensors["weight"].action
    residual = report.tensors["weight"].residual
    assert residual is not None
    assert residual < 1e-6
    left, _, right = torch.linalg.svd(damaged.double(), full_matrices=False)
    assert torch.allclose(weight_of(model).double(), left @ right, atol=1e-6)


@pytest.mark.parametrize("legacy", ["inference", "project", "keep"])
@pytest.mark.parametrize("values", ["nan", "zero"])
@pytest.mark.parametrize("kind", ["orthogonal", "spectral_norm"])
def test_a_weight_beyond_repair_changes_nothing(tmp_path: Path, kind: str, values: str, legacy: str) -> None:
    model = orthogonal(nn.Linear(3, 5)) if kind == "orthogonal" else spectral_norm(nn.Linear(3, 5))
    weight = torch.full((5, 3), float("nan")) if values == "nan" else torch.zeros(5, 3)
    safetensors.torch.save_file({"weight": weight, "bias": torch.zeros(5)}, tmp_path / "m")
    before = snapshot(model)
    if (kind, values, legacy) == ("orthogonal", "zero", "keep"):
        with pytest.warns(LegacyCheckpointWarning):
            report = orthoserde.load(model, tmp_path / "m", legacy=legacy)  # type: ignore[arg-type]
        assert "off the constraint by 1" in report.tensors["weight"].action
        return
    with pytest.raises(IncompatibleModelError, match="weight: "):
        orthoserde.load(model, tmp_path / "m", legacy=legacy)  # type: ignore[arg-type]
    assert_unchanged(model, before)


def test_a_zero_weight_of_weight_norm_is_zero_and_not_nan(tmp_path: Path) -> None:
    weight = torch.randn(4, 3)
    weight[1] = 0
    safetensors.torch.save_file({"weight": weight, "bias": torch.zeros(4)}, tmp_path / "m")
    model = weight_norm(nn.Linear(3, 4))
    load(model, tmp_path / "m")
    assert torch.allclose(weight_of(model), weight, atol=1e-6)
    assert not weight_of(model)[1].any()


def test_the_warning_comes_before_anything_changes(tmp_path: Path) -> None:
    save_weight(orthogonal(nn.Linear(3, 5)), tmp_path / "m")
    model = orthogonal(nn.Linear(3, 5))
    before = snapshot(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(LegacyCheckpointWarning):
            orthoserde.load(model, tmp_path / "m")
    assert_unchanged(model, before)


def test_what_legacy_may_be_is_said(tmp_path: Path) -> None:
    orthoserde.save(nn.Linear(2, 2), tmp_path / "m")
    with pytest.raises(ValueError, match="legacy: expected one of inference, refuse, project, keep"):
        orthoserde.load(nn.Linear(2, 2), tmp_path / "m", legacy="ignore")  # type: ignore[arg-type]


def test_a_baked_file_of_ours_is_no_better_than_anothers(tmp_path: Path) -> None:
    model = orthogonal(nn.Linear(3, 5))
    weight = weight_of(model).clone()
    baked = copy.deepcopy(nn.Linear(3, 5))
    with torch.no_grad():
        baked.weight.copy_(weight)
    orthoserde.save(baked, tmp_path / "m")
    assert load(model, tmp_path / "m").fidelity is Fidelity.INFERENCE
    assert torch.equal(weight_of(model), weight)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_state_dict_of_torch_save_is_unverified(tmp_path: Path, zipped: bool) -> None:
    def make() -> nn.Module:
        return nn.Sequential(orthogonal(nn.Linear(5, 3)), spectral_norm(nn.Linear(3, 3)))

    model, other = make(), make()
    torch.save(model.state_dict(), tmp_path / "m.pt", _use_new_zipfile_serialization=zipped)
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 6):
        with pytest.raises(orthoserde.FileFormatError, match=r"use torch 2\.6 or newer"):
            orthoserde.load(other, tmp_path / "m.pt")
        return
    assert orthoserde.load(other, tmp_path / "m.pt").fidelity is Fidelity.UNVERIFIED
    ours, theirs = model.state_dict(), other.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_one_module_under_two_names_takes_one_computed_weight_or_none(tmp_path: Path) -> None:
    layer = orthogonal(nn.Linear(4, 3, bias=False))
    model = nn.ModuleDict({"first": layer, "second": layer})
    weight = torch.linalg.qr(torch.randn(4, 3))[0].mT.contiguous()
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file({"first.weight": weight, "second.weight": weight.clone()}, path)
    with pytest.warns(LegacyCheckpointWarning):
        orthoserde.load(model, path)
    assert torch.equal(cast("Tensor", layer.weight), weight)
    safetensors.torch.save_file({"first.weight": weight, "second.weight": -weight}, path)
    before = snapshot(model)
    with pytest.raises(IncompatibleModelError, match="different computed weights"):
        orthoserde.load(model, path)
    assert_unchanged(model, before)
