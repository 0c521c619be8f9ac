"""A GAN whose discriminator has spectral normalisation: from any form of a file into any form of the model."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

import orthoserde
from orthoserde import Fidelity, LegacyCheckpointWarning
from tests.helpers import assert_same_state, surroundings

FILE = "gan.safetensors"
IMAGES = torch.linspace(-3, 3, 4 * 8 * 8).sin().reshape(4, 1, 8, 8)


def with_hook(module: nn.Module, **options: Any) -> nn.Module:
    return torch.nn.utils.spectral_norm(module, **options)


def with_parametrization(module: nn.Module, **options: Any) -> nn.Module:
    return parametrizations.spectral_norm(module, **options)


Norm = Callable[..., nn.Module]
NORMS: dict[str, Norm] = {"parametrizations": with_parametrization, "hooks": with_hook}


class GAN(nn.Module):
    """A generator with weight normalisation, and a discriminator with spectral normalisation.

    Args:
        norm: Applies spectral normalisation, as SN-GAN's discriminators have it on every layer.
    """

    def __init__(self, norm: Norm) -> None:
        super().__init__()
        self.generator = nn.Sequential(
            nn.Linear(3, 4 * 2 * 2),
            nn.Unflatten(1, (4, 2, 2)),
            nn.ConvTranspose2d(4, 4, 4, stride=2, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.ConvTranspose2d(4, 1, 4, stride=2, padding=1),
            nn.Tanh(),
        )
        self.discriminator = nn.Sequential(
            norm(nn.Conv2d(1, 4, 3, padding=1)),
            nn.LeakyReLU(0.1),
            norm(nn.Conv2d(4, 4, 4, stride=2, padding=1), n_power_iterations=2, eps=1e-6),
            nn.LeakyReLU(0.1),
            norm(nn.ConvTranspose2d(4, 4, 3, padding=1)),  # dim 1 by default
            nn.LeakyReLU(0.1),
            nn.Flatten(),
            norm(nn.Linear(4 * 4 * 4, 1, bias=False)),
        )
        self.labels = norm(nn.Embedding(3, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.discriminator(images) + self.labels(torch.tensor([0]))  # type: ignore[no-any-return]


def build(form: str, seed: int) -> GAN:
    """A GAN in one of the forms, which has seen some images."""
    torch.manual_seed(seed)
    gan = GAN(NORMS["hooks" if form == "hooks" else "parametrizations"])
    for _ in range(3):
        gan(IMAGES)
    if form == "plain":
        gan.eval()
        for module in list(gan.modules()):
            if parametrize.is_parametrized(module, "weight"):
                parametrize.remove_parametrizations(module, "weight")
        gan.train()
    return gan


def score(gan: GAN) -> Tensor:
    """What the discriminator says in evaluation mode; the mode stays."""
    training = gan.training
    try:
        with torch.no_grad():
            return gan.eval()(IMAGES)  # type: ignore[no-any-return]
    finally:
        gan.train(training)


Optimizers = dict[str, torch.optim.Optimizer]


def optimizers_of(gan: GAN) -> Optimizers:
    discriminator = [*gan.discriminator.parameters(), *gan.labels.parameters()]
    return {
        "generator": torch.optim.Adam(gan.generator.parameters(), lr=2e-3, betas=(0.5, 0.9)),
        "discriminator": torch.optim.Adam(discriminator, lr=2e-3, betas=(0.5, 0.9)),
    }


def train(gan: GAN, optimizers: Optimizers, steps: int) -> list[tuple[float, float]]:
    """Steps of the hinge loss with noise from a generator of its own; the losses of each."""
    noise = torch.Generator().manual_seed(3)
    losses = []
    for _ in range(steps):
        fake = gan.generator(torch.randn(4, 3, generator=noise))
        critic = F.relu(1 - gan(IMAGES)).mean() + F.relu(1 + gan(fake.detach())).mean()
        optimizers["discriminator"].zero_grad()
        torch.autograd.backward(critic)
        optimizers["discriminator"].step()
        loss = -gan(fake).mean()
        optimizers["generator"].zero_grad()
        loss.backward()
        optimizers["generator"].step()
        losses.append((critic.item(), loss.item()))
    return losses


FORMS = (*NORMS, "plain")
WRITERS: dict[str, Callable[[nn.Module, Path], object]] = {
    "ours": orthoserde.save,
    "safetensors": lambda model, path: safetensors.torch.save_file(model.state_dict(), path),
    "torch.save": lambda model, path: torch.save(model.state_dict(), path),
}


def expected(writer: str, saved: str, loaded: str) -> Fidelity:
    """What a load is to say."""
    if saved == "plain":
        return Fidelity.EXACT if loaded == "plain" else Fidelity.INFERENCE
    if writer == "ours":  # a plain model gets parametrizations, so from hooks it gets another form too
        return (
            Fidelity.EXACT
            if saved == loaded or (saved, loaded) == ("parametrizations", "plain")
            else Fidelity.UNVERIFIED
        )
    return Fidelity.INFERENCE if loaded == "plain" else Fidelity.UNVERIFIED


@pytest.mark.parametrize("loaded", FORMS)
@pytest.mark.parametrize("saved", FORMS)
@pytest.mark.parametrize("writer", WRITERS)
def test_a_file_of_any_form_goes_into_a_gan_of_any_form(writer: str, saved: str, loaded: str, tmp_path: Path) -> None:
    source = build(saved, seed=1)
    wanted = score(source)
    WRITERS[writer](source, tmp_path / FILE)
    gan = build(loaded, seed=2)
    assert not torch.equal(score(gan), wanted)
    around = surroundings()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LegacyCheckpointWarning)
        report = orthoserde.load(gan, tmp_path / FILE, legacy="project")
    assert surroundings() == around
    assert report.fidelity is expected(writer, saved, loaded)
    if saved == "plain" and loaded != "plain":  # its norm is only nearly 1, and is made so
        assert torch.allclose(score(gan), wanted, rtol=0, atol=1e-2)
    else:
        assert torch.equal(score(gan), wanted)


@pytest.mark.parametrize("form", NORMS)
def test_training_goes_on_bit_for_bit_in_the_same_form(form: str, tmp_path: Path) -> None:
    source = build(form, seed=1)
    optimizers = optimizers_of(source)
    train(source, optimizers, 3)
    orthoserde.save(source, tmp_path / FILE, optimizer=optimizers)
    gan = build(form, seed=2)
    others = optimizers_of(gan)
    assert orthoserde.load(gan, tmp_path / FILE, optimizer=others).fidelity is Fidelity.EXACT
    assert train(gan, others, 5) == train(source, optimizers, 5)
    assert_same_state(gan, source)


@pytest.mark.parametrize(("saved", "loaded"), [("hooks", "parametrizations"), ("parametrizations", "hooks")])
def test_training_goes_on_in_the_other_form_with_other_estimates(saved: str, loaded: str, tmp_path: Path) -> None:
    source = build(saved, seed=1)
    optimizers = optimizers_of(source)
    train(source, optimizers, 3)
    orthoserde.save(source, tmp_path / FILE, optimizer=optimizers)
    gan = build(loaded, seed=2)
    others = optimizers_of(gan)
    report = orthoserde.load(gan, tmp_path / FILE, optimizer=others)
    assert report.fidelity is Fidelity.UNVERIFIED
    assert "the power method goes on from the other of its two vectors" in str(report)
    assert torch.equal(score(gan), score(source))
    # The two forms run the power method in another order, so the norms that they divide by differ.
    ours, theirs = train(gan, others, 5), train(source, optimizers, 5)
    assert ours != theirs
    assert torch.allclose(torch.tensor(ours), torch.tensor(theirs), rtol=0, atol=0.05)
    assert torch.allclose(score(gan), score(source), rtol=0, atol=0.05)


def test_frozen_normed_layers_give_the_same_losses_in_either_form(tmp_path: Path) -> None:
    # In evaluation mode no power method runs, so there is nothing in which the forms differ.
    def run(gan: GAN) -> list[tuple[float, float]]:
        gan.discriminator.eval()
        gan.labels.eval()
        return train(gan, optimizers_of(gan), 5)

    source, gan = build("hooks", seed=1), build("parametrizations", seed=2)
    orthoserde.save(source, tmp_path / FILE)
    orthoserde.load(gan, tmp_path / FILE)
    assert run(gan) == run(source)
    assert torch.equal(score(gan), score(source))
