"""Models of transformers whose weights are normed: from any form of a file into any form of the model."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import orthoserde
from orthoserde import Fidelity, IncompatibleModelError, LegacyCheckpointWarning
from tests.ecosystem.models import CASES, FORMS, build, normed_modules, outputs_of
from tests.helpers import assert_same_state, assert_unchanged, snapshot, surroundings

FILE = "model.file"


def _contiguous(model: nn.Module, path: Path) -> None:
    safetensors.torch.save_file({key: value.contiguous() for key, value in model.state_dict().items()}, path)


#: How a file is written, as the name of a test.
WRITERS: dict[str, Callable[[nn.Module, Path], object]] = {
    "ours": orthoserde.save,
    "safetensors": _contiguous,
    "torch.save": lambda model, path: torch.save(model.state_dict(), path),
}

NORMED = ("parametrizations", "hooks")


def expected(writer: str, saved: str, loaded: str) -> Fidelity:
    """What a load is to say."""
    if saved == "plain":
        return Fidelity.EXACT if loaded == "plain" else Fidelity.INFERENCE
    if writer == "ours":  # a plain model gets its parametrizations back
        return Fidelity.EXACT
    return Fidelity.INFERENCE if loaded == "plain" else Fidelity.UNVERIFIED


@pytest.mark.parametrize("name", CASES)
def test_the_models_are_what_they_are_taken_for(name: str) -> None:
    models = {form: build(name, form, seed=1) for form in FORMS}
    assert normed_modules(models["parametrizations"])
    assert any(key.endswith(".weight_g") for key in models["hooks"].state_dict())
    assert not any("weight_g" in key or "parametrizations" in key for key in models["plain"].state_dict())
    first = outputs_of(name, models["parametrizations"])
    for model in models.values():
        assert all(map(torch.equal, outputs_of(name, model), first))
    assert not all(map(torch.equal, outputs_of(name, build(name, "parametrizations", seed=2)), first))


@pytest.mark.parametrize("loaded", FORMS)
@pytest.mark.parametrize("saved", FORMS)
@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("name", CASES)
def test_a_file_of_any_form_goes_into_a_model_of_any_form(
    name: str, writer: str, saved: str, loaded: str, tmp_path: Path
) -> None:
    source = build(name, saved, seed=1)
    wanted = outputs_of(name, source)
    WRITERS[writer](source, tmp_path / FILE)
    assert all(map(torch.equal, outputs_of(name, source), wanted))
    model = build(name, loaded, seed=2)
    around = surroundings()
    fidelity = expected(writer, saved, loaded)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if fidelity is Fidelity.INFERENCE else "error", LegacyCheckpointWarning)
        report = orthoserde.load(model, tmp_path / FILE)
    assert report.fidelity is fidelity
    assert not report.missing_keys
    assert not report.unexpected_keys
    assert surroundings() == around
    found = outputs_of(name, model)
    if saved == "plain" and loaded != "plain":  # the weight is taken apart and put together again, which rounds
        for ours, theirs in zip(found, wanted, strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-6)
    else:
        assert all(map(torch.equal, found, wanted))


@pytest.mark.parametrize("form", NORMED)
@pytest.mark.parametrize("name", CASES)
def test_a_plain_model_can_be_told_to_stay_plain(name: str, form: str, tmp_path: Path) -> None:
    orthoserde.save(build(name, form, seed=1), tmp_path / FILE)
    model = build(name, "plain", seed=2)
    before = snapshot(model)
    with pytest.raises(IncompatibleModelError, match="plain in the model"):
        orthoserde.load(model, tmp_path / FILE, reparametrize=False)
    assert_unchanged(model, before)


@pytest.mark.parametrize("form", NORMED)
@pytest.mark.parametrize("name", CASES)
def test_a_baked_model_says_the_same_and_is_a_plain_one(name: str, form: str, tmp_path: Path) -> None:
    model = build(name, form, seed=1)
    wanted = outputs_of(name, model)
    orthoserde.bake_(model)
    assert all(map(torch.equal, outputs_of(name, model), wanted))
    torch.save(model.state_dict(), tmp_path / FILE)
    plain = build(name, "plain", seed=2)
    plain.load_state_dict(torch.load(tmp_path / FILE, weights_only=True))
    assert all(map(torch.equal, outputs_of(name, plain), wanted))


@pytest.mark.parametrize("name", CASES)
def test_there_and_back_every_bit_is_the_same(name: str, tmp_path: Path) -> None:
    model = build(name, "parametrizations", seed=1)
    orthoserde.save(model, tmp_path / FILE)
    hooked = build(name, "hooks", seed=2)
    orthoserde.load(hooked, tmp_path / FILE)
    orthoserde.save(hooked, tmp_path / "back")
    again = build(name, "parametrizations", seed=3)
    assert orthoserde.load(again, tmp_path / "back").fidelity is Fidelity.EXACT
    assert_same_state(again, model)


@pytest.mark.parametrize(("saved", "loaded"), list(itertools.product(NORMED, NORMED)))
@pytest.mark.parametrize("name", ["wav2vec2", "speecht5-hifigan", "encodec"])
def test_training_goes_on_in_the_other_form(name: str, saved: str, loaded: str, tmp_path: Path) -> None:
    source = build(name, saved, seed=1)
    optimizer = torch.optim.Adam(source.parameters(), lr=1e-3)
    train(name, source, optimizer, 3)
    orthoserde.save(source, tmp_path / FILE, optimizer=optimizer)
    model = build(name, loaded, seed=2)
    second = torch.optim.Adam(model.parameters(), lr=1e-3)
    assert orthoserde.load(model, tmp_path / FILE, optimizer=second).fidelity is Fidelity.EXACT
    assert train(name, model, second, 4) == train(name, source, optimizer, 4)
    assert all(map(torch.equal, outputs_of(name, model), outputs_of(name, source)))


def train(name: str, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    """Steps on one example, in evaluation mode, so without dropout; the loss of each."""
    losses = []
    for _ in range(steps):
        loss = (CASES[name].outputs(model)[0] - 0.5).square().mean()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", ["wav2vec2", "encodec", "vits"])
def test_what_save_pretrained_wrote_is_loaded(name: str, tmp_path: Path) -> None:
    source = build(name, "parametrizations", seed=1)
    source.save_pretrained(tmp_path)  # type: ignore[operator]
    for form in NORMED:
        model = build(name, form, seed=2)
        assert orthoserde.load(model, tmp_path / "model.safetensors").fidelity is Fidelity.UNVERIFIED
        assert all(map(torch.equal, outputs_of(name, model), outputs_of(name, source)))


def test_transformers_cannot_remove_the_norms_that_it_applies() -> None:
    # Its remove_weight_norm looks for hooks, its apply_weight_norm makes parametrizations.
    model = build("speecht5-hifigan", "parametrizations", seed=1)
    with pytest.raises(ValueError, match="weight_norm of 'weight' not found"):
        model.remove_weight_norm()  # type: ignore[operator]
    build("speecht5-hifigan", "hooks", seed=1).remove_weight_norm()  # type: ignore[operator]
