"""Models made from a file alone, and files that carry the computed weights too."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

import orthoserde
from orthoserde import ConfigError, Fidelity, IncompatibleModelError, Registry
from tests.helpers import assert_unchanged, snapshot

REGISTRY = Registry()


@REGISTRY.register("tests.build>Net")
class Net(nn.Module):
    def __init__(self, width: int, *, orthogonal_map: str = "cayley", extra: Any = None) -> None:
        super().__init__()
        self.first = orthogonal(nn.Linear(width, 3), orthogonal_map=orthogonal_map)
        self.second = spectral_norm(nn.Linear(3, width))


def test_a_model_is_made_from_the_file_alone(tmp_path: Path) -> None:
    model = Net(5, orthogonal_map="matrix_exp")
    orthoserde.save(model, tmp_path / "m", registry=REGISTRY)
    state = torch.get_rng_state()
    built = orthoserde.build(tmp_path / "m", registry=REGISTRY)
    assert torch.equal(torch.get_rng_state(), state)
    assert type(built) is Net
    ours, theirs = model.state_dict(), built.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) and ours[key].stride() == theirs[key].stride() for key in ours)


def test_a_root_that_was_not_registered_is_not_built(tmp_path: Path) -> None:
    orthoserde.save(Net(5), tmp_path / "m", registry=Registry())
    with pytest.raises(ConfigError, match="class was not registered when it was saved"):
        orthoserde.build(tmp_path / "m", registry=REGISTRY)


def test_a_kind_that_this_process_does_not_know_is_not_built(tmp_path: Path) -> None:
    orthoserde.save(Net(5), tmp_path / "m", registry=REGISTRY)
    with pytest.raises(ConfigError, match=r"tests\.build>Net is not registered in this process"):
        orthoserde.build(tmp_path / "m", registry=Registry())


def test_arguments_that_were_not_json_are_not_guessed(tmp_path: Path) -> None:
    orthoserde.save(Net(5, extra=object()), tmp_path / "m", registry=REGISTRY)
    with pytest.raises(ConfigError, match="were not JSON"):
        orthoserde.build(tmp_path / "m", registry=REGISTRY)


def test_a_class_that_has_changed_since_is_said(tmp_path: Path) -> None:
    orthoserde.save(Net(5), tmp_path / "m", registry=REGISTRY)
    registry = Registry()

    @registry.register("tests.build>Net")
    class Other(nn.Module):
        def __init__(self, width: int, orthogonal_map: str, extra: None) -> None:
            super().__init__()
            self.first = nn.Linear(width, 4)

    with pytest.raises(IncompatibleModelError, match=r"first\.weight"):
        orthoserde.build(tmp_path / "m", registry=registry)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {
        record.name: cast("Tensor", getattr(record.module, record.tensor_name)).detach()
        for record in orthoserde.parametrized_tensors(model)
    }


def test_computed_weights_are_added_for_other_readers_and_ignored_by_a_load(tmp_path: Path) -> None:
    def make() -> nn.Module:
        # With 4 columns, torch's random completion would be one column, which is the canonical one half of the time.
        return nn.Sequential(
            orthogonal(nn.Linear(5, 3)), weight_norm(nn.Linear(3, 3)), spectral_norm(nn.Conv1d(3, 2, 2))
        )

    model = make()
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    report = orthoserde.save(model, tmp_path / "m", include_weights=True)
    assert all(torch.equal(buffers[name], buffer) for name, buffer in model.named_buffers())
    assert "computed tensors" in report.needs_orthoserde[0]
    plain = safetensors.torch.load_file(tmp_path / "m")
    computed = weights(model.eval())
    assert set(plain) == set(model.state_dict()) | set(computed)
    assert all(torch.equal(plain[name], weight) for name, weight in computed.items())
    other = make()
    loaded = orthoserde.load(other, tmp_path / "m")
    assert (loaded.fidelity, *loaded) == (Fidelity.EXACT, [], [])
    assert all(torch.equal(weight, computed[name]) for name, weight in weights(other.eval()).items())
    bare = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 3), nn.Conv1d(3, 2, 2))
    assert orthoserde.load(bare, tmp_path / "m").fidelity is Fidelity.EXACT
    assert all(torch.equal(weight, computed[name]) for name, weight in weights(bare.eval()).items())


def test_the_computed_weight_of_a_shared_module_is_added_once_and_found_under_all_its_names(tmp_path: Path) -> None:
    shared, plain = orthogonal(nn.Linear(3, 3)), nn.Linear(3, 3)
    orthoserde.save(nn.Sequential(shared, shared), tmp_path / "m", include_weights=True)
    assert {"0.weight", "1.weight"} & safetensors.torch.load_file(tmp_path / "m").keys() == {"0.weight"}
    elsewhere = nn.Sequential(plain, plain)
    missing, _ = safetensors.torch.load_model(elsewhere, tmp_path / "m", strict=False)
    assert not missing
    assert torch.equal(plain.weight, cast("Tensor", shared.weight))


def test_the_weight_of_a_registered_class_is_the_one_that_the_model_has(tmp_path: Path) -> None:
    """It may compute with what is no state: a buffer that is not saved, an attribute that was set later."""
    registry = Registry()

    @registry.register("tests.build>Masked")
    class Masked(nn.Module):
        mask: Tensor
        original: Tensor
        seen: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.scale = 1.0
            self.register_buffer("mask", torch.ones(3, 3), persistent=False)
            self.register_buffer("original", torch.full((3, 3), 2.0))
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.seen += 1
            self.kept = (x * self.mask + self.original) @ self.mask * self.scale
            return self.kept

    model = nn.Linear(3, 3)
    parametrize.register_parametrization(model, "weight", Masked())
    own: Any = cast("Any", model.parametrizations).weight[0]
    own.mask.copy_(torch.eye(3))
    own.scale = 5.0
    model.double()
    expected = model.weight.detach().clone()
    before, kept = snapshot(model), own.kept
    orthoserde.save(model, tmp_path / "m", include_weights=True, registry=registry)
    assert_unchanged(model, before)
    assert own.kept is kept
    assert torch.equal(safetensors.torch.load_file(tmp_path / "m")["weight"], expected)
    orthoserde.bake_(model, registry=registry)
    assert torch.equal(model.weight, expected)


def test_a_weight_that_its_class_fails_to_compute_is_not_added(tmp_path: Path) -> None:
    registry = Registry()

    @registry.register("tests.build>Failing")
    class Failing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if not self.training:
                raise ZeroDivisionError("no more")
            return x

    model = nn.Linear(3, 3)
    parametrize.register_parametrization(model, "weight", Failing())
    with pytest.raises(
        ConfigError, match=r"weight: include_weights: it cannot be computed.*: no more; save without include_weights"
    ):
        orthoserde.save(model, tmp_path / "m", include_weights=True, registry=registry)
    assert not (tmp_path / "m").exists()
    orthoserde.save(model, tmp_path / "m", registry=registry)


def test_a_residual_that_cannot_be_computed_is_none_and_fails_nothing(tmp_path: Path) -> None:
    model = orthogonal(nn.Linear(8, 4)).bfloat16()
    seen: list[Mapping[str, object]] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", orthoserde.TrainingTrapWarning)
        orthoserde.save(model, tmp_path / "m", debug=seen.append)
        report = orthoserde.load(model, tmp_path / "m")
    assert [(each["tensor"], each["residual"]) for each in seen] == [("weight", None)]
    assert report.tensors["weight"].residual is None


def test_state_without_tensors_leaves_a_file_that_a_strict_load_state_dict_takes(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    assert orthoserde.save(model, tmp_path / "m", state={"step": 7}).needs_orthoserde == ()
    model.load_state_dict(safetensors.torch.load_file(tmp_path / "m"))
    assert orthoserde.save(model, tmp_path / "m", state={"average": torch.zeros(2)}).needs_orthoserde


def test_a_weight_that_only_unknown_code_could_compute_is_not_added(tmp_path: Path) -> None:
    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    model = nn.Linear(3, 3)
    parametrize.register_parametrization(model, "weight", Twice())
    with pytest.raises(ConfigError, match="weight: include_weights needs"):
        orthoserde.save(model, tmp_path / "m", include_weights=True, registry=Registry())
    assert not (tmp_path / "m").exists()
    registry = Registry()
    registry.register("tests.build>Twice")(Twice)
    known = nn.Linear(3, 3)
    parametrize.register_parametrization(known, "weight", Twice())
    orthoserde.save(known, tmp_path / "m", include_weights=True, registry=registry)
    assert torch.equal(safetensors.torch.load_file(tmp_path / "m")["weight"], known.weight)


@pytest.mark.parametrize("file", ["half", "baked"])
def test_a_warning_is_of_the_line_that_called_build(file: str, tmp_path: Path) -> None:
    model = Net(5)
    if file == "half":
        with pytest.warns(orthoserde.TrainingTrapWarning):
            orthoserde.save(model.half(), tmp_path / "m", registry=REGISTRY)
    else:
        orthoserde.save(model, tmp_path / "whole", registry=REGISTRY)
        orthoserde.convert(tmp_path / "whole", tmp_path / "m", "baked")
    expected = orthoserde.TrainingTrapWarning if file == "half" else orthoserde.LegacyCheckpointWarning
    build: Any = lambda: orthoserde.build(tmp_path / "m", registry=REGISTRY)  # noqa: E731 - it stands on one line
    with pytest.warns(expected) as caught:
        build()
    assert {(each.filename, each.lineno) for each in caught} == {(__file__, build.__code__.co_firstlineno)}
