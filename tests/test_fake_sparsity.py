"""The mask of torch.ao.pruning, which no state dict has, and that of torch.nn.utils.prune, which is a plain tensor."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.ao.pruning.sparsifier import utils
from torch.ao.pruning.sparsifier.weight_norm_sparsifier import WeightNormSparsifier
from torch.nn.utils import parametrize, prune
from torch.nn.utils.parametrizations import orthogonal

import orthoserde
from orthoserde import ConfigError, Fidelity, IncompatibleModelError, Registry, storage
from orthoserde.checkpoint import Checkpoint
from orthoserde.parametrizations import codec_for_kind, codec_for_type
from orthoserde.registry.codec import Codec
from tests.helpers import assert_same_state, assert_unchanged, snapshot

FakeSparsity: Any = utils.FakeSparsity  # torch does not annotate it
weight_pruning: Any = prune


def masked(mask: Tensor | None = None) -> nn.Sequential:
    """A layer of 4 x 6 with a random mask, and one after it."""
    layer = nn.Linear(6, 4)
    link = FakeSparsity((torch.rand(4, 6) > 0.5).float() if mask is None else mask)
    parametrize.register_parametrization(layer, "weight", link)
    return nn.Sequential(layer, nn.ReLU(), nn.Linear(4, 2))


def mask_of(model: nn.Sequential) -> Tensor:
    mask = model.get_buffer("0.parametrizations.weight.0.mask")
    assert isinstance(mask, Tensor)
    return mask


def weight_of(layer: nn.Module) -> Tensor:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight


def train(model: nn.Module, steps: int) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    inputs = torch.linspace(-1, 1, 48).reshape(8, 6)
    losses = []
    for _ in range(steps):
        loss = model(inputs).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_a_state_dict_has_no_mask_and_our_file_has() -> None:
    model = masked()
    assert not any("mask" in key for key in model.state_dict())
    assert "torch>fake_sparsity" not in Registry()
    codec = codec_for_type(Registry(), FakeSparsity)
    assert codec is not None
    assert isinstance(codec, Codec)
    assert codec.kind == "torch>fake_sparsity"


def test_the_mask_is_restored_in_place(tmp_path: Path) -> None:
    model = masked()
    train(model, 2)
    orthoserde.save(model, tmp_path / "m")
    other = masked()
    held = mask_of(other)
    assert not torch.equal(held, mask_of(model))
    report = orthoserde.load(other, tmp_path / "m")
    assert report.fidelity is Fidelity.EXACT
    assert mask_of(other) is held  # a sparsifier holds it
    assert_same_state(other, model)
    assert train(other, 3) == train(model, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.uint8])
def test_a_bare_model_gets_its_mask_back_in_its_own_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    model = masked((torch.rand(4, 6) > 0.5).to(dtype))
    orthoserde.save(model, tmp_path / "m")
    bare = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    weight = bare[0].weight
    assert orthoserde.load(bare, tmp_path / "m").fidelity is Fidelity.EXACT
    assert mask_of(bare).dtype is dtype
    assert bare.get_parameter("0.parametrizations.weight.original") is weight
    assert_same_state(bare, model)


def test_a_bare_model_on_the_meta_device_gets_its_mask(tmp_path: Path) -> None:
    model = masked()
    orthoserde.save(model, tmp_path / "m")
    bare = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)).to("meta")
    assert orthoserde.load(bare, tmp_path / "m").fidelity is Fidelity.EXACT
    assert_same_state(bare, model)


def test_a_sparsifier_goes_on_with_a_restored_model(tmp_path: Path) -> None:
    def prepared() -> tuple[nn.Sequential, Any]:
        model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
        sparsifier: Any = WeightNormSparsifier(sparsity_level=0.5, sparse_block_shape=(1, 2), zeros_per_block=2)
        sparsifier.prepare(model, [{"tensor_fqn": "0.weight"}])
        return model, sparsifier

    model, sparsifier = prepared()
    sparsifier.step()
    assert not mask_of(model).all()
    orthoserde.save(model, tmp_path / "m")
    other, second = prepared()
    assert orthoserde.load(other, tmp_path / "m").fidelity is Fidelity.EXACT
    second.squash_mask()
    sparsifier.squash_mask()
    assert torch.equal(weight_of(other[0]), weight_of(model[0]))


def test_a_file_without_the_mask_is_refused(tmp_path: Path) -> None:
    model = masked()
    safetensors.torch.save_file(model.state_dict(), tmp_path / "m")
    other = masked()
    before = snapshot(other)
    with pytest.raises(IncompatibleModelError, match=r"0\.parametrizations\.weight\.0\.mask"):
        orthoserde.load(other, tmp_path / "m")
    assert_unchanged(other, before)


def test_a_computed_weight_does_not_say_what_is_masked(tmp_path: Path) -> None:
    plain = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    safetensors.torch.save_file(plain.state_dict(), tmp_path / "m")
    other = masked()
    before = snapshot(other)
    with pytest.raises(IncompatibleModelError, match="cannot be recovered"):
        orthoserde.load(other, tmp_path / "m")
    assert_unchanged(other, before)


def test_another_parametrization_is_refused(tmp_path: Path) -> None:
    orthoserde.save(masked(), tmp_path / "m")
    other = nn.Sequential(orthogonal(nn.Linear(6, 4)), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(IncompatibleModelError, match="the file has torch>fake_sparsity"):
        orthoserde.load(other, tmp_path / "m")


def test_it_stands_in_a_chain(tmp_path: Path) -> None:
    def model() -> nn.Module:
        layer = orthogonal(nn.Linear(6, 4))
        return parametrize.register_parametrization(layer, "weight", FakeSparsity((torch.rand(4, 6) > 0.5).float()))

    saved, other = model(), nn.Linear(6, 4)
    orthoserde.save(saved, tmp_path / "m", include_weights=True)
    assert torch.equal(safetensors.torch.load_file(tmp_path / "m")["weight"], weight_of(saved))
    assert orthoserde.load(other, tmp_path / "m").fidelity is Fidelity.EXACT
    assert torch.equal(weight_of(other), weight_of(saved))


def test_verify_computes_it_and_notices_a_mask_of_another_shape(tmp_path: Path) -> None:
    orthoserde.save(masked(), tmp_path / "m")
    verified = orthoserde.verify(tmp_path / "m")
    assert verified.ok
    assert verified.residuals == {"0.weight": None}
    with storage.read(tmp_path / "m") as checkpoint:
        key = "0.parametrizations.weight.0.mask"
        tensors = {**checkpoint.manifest.tensors, key: checkpoint.manifest.tensors["0.bias"]}
        sources = {**checkpoint.sources, key: checkpoint.sources["0.bias"]}
        manifest = dataclasses.replace(checkpoint.manifest, tensors=tensors)
        storage.write(Checkpoint(manifest, sources, "a test"), tmp_path / "odd")
    assert "0.weight" in orthoserde.verify(tmp_path / "odd").misfits
    bare = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    before = snapshot(bare)
    with pytest.raises(IncompatibleModelError):
        orthoserde.load(bare, tmp_path / "odd")
    assert_unchanged(bare, before)


def test_a_baked_model_has_the_masked_weight() -> None:
    model = masked()
    weight = weight_of(model[0]).detach()
    assert not weight.all()
    assert "torch>fake_sparsity" in str(orthoserde.bake_(model))
    assert torch.equal(model.state_dict()["0.weight"], weight)


def test_shapes_and_configurations_that_are_none_are_noticed() -> None:
    codec = codec_for_type(Registry(), FakeSparsity)
    assert codec is not None
    assert codec.check({}, {"original": (4, 6)}, {"mask": (4, 6)}) is None
    assert codec.check({}, {"original": (4, 6)}, {"mask": (6, 4)}) is not None
    assert codec.check({}, {"original": (4, 6)}, {}) is not None
    assert codec.check({}, {"original0": (4, 6)}, {"mask": (4, 6)}) is not None
    for config, like in (({"sparsity": 0.5}, torch.empty(4, 6)), ({}, None)):
        with pytest.raises(ConfigError, match="not a configuration"):
            codec.build(config, like)


def test_torch_ao_pruning_is_imported_only_by_who_asks_for_the_kind() -> None:
    code = (
        "import sys, torch, orthoserde\n"
        "from orthoserde.parametrizations import codec_for_kind, codec_for_type\n"
        "codec_for_type(orthoserde.Registry(), torch.nn.Linear)\n"
        "assert codec_for_kind(orthoserde.Registry(), 'a>b') is None\n"
        "assert 'torch.ao.pruning' not in sys.modules\n"
        "assert codec_for_kind(orthoserde.Registry(), 'torch>fake_sparsity') is not None\n"
        "assert 'torch.ao.pruning' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_torch_without_it_knows_no_such_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.ao.pruning.sparsifier.utils", None)
    assert codec_for_kind(Registry(), "torch>fake_sparsity") is None
    assert codec_for_type(Registry(), FakeSparsity) is None


def test_masks_of_torch_nn_utils_prune_are_plain_tensors(tmp_path: Path) -> None:
    def pruned() -> nn.Sequential:
        model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
        weight_pruning.random_unstructured(model[0], "weight", amount=0.5)
        return model

    model, other = pruned(), pruned()
    train(model, 2)
    orthoserde.save(model, tmp_path / "m")
    assert orthoserde.load(other, tmp_path / "m").fidelity is Fidelity.EXACT
    assert_same_state(other, model)
    assert train(other, 3) == train(model, 3)
    weight_pruning.remove(other[0], "weight")
    weight_pruning.remove(model[0], "weight")
    assert_same_state(other, model)
