"""Adapters in files: alone, with their model, built again, and trained on as if nothing had happened."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import orthoserde
from orthoserde import ConfigError, Fidelity, IncompatibleModelError
from orthoserde.integrations.loreft import Adapter, LoReFT, attach, trainable_parameters
from tests.integrations.toy import WIDTH, WORDS, Toy, ids, loss_of, strong

LAYERS = ("decoder.blocks.10", "decoder.blocks.2", "decoder.blocks.0")


def base() -> Toy:
    torch.manual_seed(11)
    return Toy(blocks=11, dropout=0.1)


def interventions(seed: int = 5) -> dict[str, LoReFT]:
    torch.manual_seed(seed)
    first, second = (strong(LoReFT(WIDTH, 2, dropout=0.1, activation=name)) for name in ("tanh", None))
    return {LAYERS[0]: first, LAYERS[1]: second, LAYERS[2]: first}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[Tensor]:
    losses = []
    for step in range(steps):
        mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 0]])
        loss = loss_of(model(ids(seed=step), mask), ids(seed=step + 1))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.detach())
    return losses


def test_the_adapter_alone_is_saved_and_built_in_order_with_what_is_shared(tmp_path: Path) -> None:
    model = base()
    adapter = attach(model, interventions(), "f2+l1")
    expected = model.eval()(ids())
    report = orthoserde.save(adapter, tmp_path / "a")
    assert report.tensors == 8
    assert report.unconfigured == ()
    assert all(key.partition(".")[0] in {path.replace(".", "/") for path in LAYERS} for key in report.aliases)
    state = torch.get_rng_state()
    built = orthoserde.build(tmp_path / "a")
    assert torch.equal(torch.get_rng_state(), state)
    assert isinstance(built, Adapter)
    assert built.root is None
    assert built.positions == "f2+l1"
    assert tuple(built.layers) == LAYERS
    assert built.layers[LAYERS[0]] is built.layers[LAYERS[2]]
    assert [name for name, _ in built.named_parameters()] == [name for name, _ in adapter.named_parameters()]
    adapter.detach()
    built.attach(model)
    assert not built.training
    assert torch.equal(model(ids()), expected)
    orthoserde.save(built, tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_process_that_has_imported_nothing_else_builds_it(tmp_path: Path) -> None:
    adapter = Adapter(interventions(), "l2")
    orthoserde.save(adapter, tmp_path / "a")
    code = (
        "import sys, json, orthoserde; assert 'orthoserde.integrations.loreft' not in sys.modules; "
        "built = orthoserde.build(sys.argv[1]); print(json.dumps([built.positions, list(built.layers)]))"
    )
    run = [sys.executable, "-c", code, str(tmp_path / "a")]
    found = subprocess.run(run, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]).stdout
    assert json.loads(found) == ["l2", list(LAYERS)]


@pytest.mark.parametrize("alone", [True, False])
def test_twenty_resumed_losses_are_bit_identical(alone: bool, tmp_path: Path) -> None:
    model = base()
    adapter = attach(model, interventions(), "f1+l1")
    optimizer = torch.optim.Adam(trainable_parameters(model), lr=0.01)
    train(model, optimizer, 5)
    orthoserde.save(adapter if alone else model, tmp_path / "a")
    torch.save(optimizer.state_dict(), tmp_path / "optimizer")
    generator = torch.get_rng_state()
    expected = train(model, optimizer, 20)

    other = base()
    if alone:
        built = orthoserde.build(tmp_path / "a")
        assert isinstance(built, Adapter)
        built.attach(other)
        other_optimizer = torch.optim.Adam(built.trainable_parameters(), lr=0.01)
    else:
        attach(other, interventions(seed=6), "f1+l1")
        other_optimizer = torch.optim.Adam(trainable_parameters(other), lr=0.01)
        assert orthoserde.load(other, tmp_path / "a").fidelity is Fidelity.EXACT
    other_optimizer.load_state_dict(torch.load(tmp_path / "optimizer", weights_only=True))
    torch.set_rng_state(generator)
    found = train(other, other_optimizer, 20)
    assert [float(loss) for loss in found] == [float(loss) for loss in expected]
    assert len({float(loss) for loss in expected}) == 20, "training moves"


def test_a_model_with_an_adapter_leaves_the_frozen_base_out(tmp_path: Path) -> None:
    model = base()
    adapter = attach(model, interventions(), "f1+l1")
    report = orthoserde.save(model, tmp_path / "m")
    assert report.tensors == 8
    assert set(report.left_out) == {name for name, p in model.named_parameters() if not p.requires_grad}
    adapter.detach()
    orthoserde.save(adapter, tmp_path / "a")
    adapter_tensors = orthoserde.inspect(tmp_path / "a").tensors
    assert {f"loreft.{key}" for key in adapter_tensors} == set(orthoserde.inspect(tmp_path / "m").tensors)


def test_with_callable_positions_it_is_saved_and_loaded_but_not_built(tmp_path: Path) -> None:
    adapter = Adapter(interventions(), lambda real: real)
    assert adapter.get_config() is None
    report = orthoserde.save(adapter, tmp_path / "a")
    assert report.unconfigured == ("(model)",)
    with pytest.raises(ConfigError, match="orthoserde>LoReFTAdapter"):
        orthoserde.build(tmp_path / "a")
    other = Adapter(interventions(seed=6), lambda real: real)
    orthoserde.load(other, tmp_path / "a")
    assert all(torch.equal(a, b) for a, b in zip(adapter.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("structured", [True, False])
def test_either_form_of_the_rotations_loads_into_the_other(structured: bool, tmp_path: Path) -> None:
    def make(structured: bool, seed: int) -> Adapter:
        torch.manual_seed(seed)
        return Adapter({path: strong(LoReFT(WIDTH, 2, structured=structured)) for path in LAYERS[:2]}, "l1")

    adapter, other = make(structured, 1), make(not structured, 2)
    orthoserde.save(adapter, tmp_path / "a")
    report = orthoserde.load(other, tmp_path / "a")
    assert report.fidelity is orthoserde.Fidelity.UNVERIFIED
    for path, loreft in adapter.layers.items():
        torch.testing.assert_close(other.layers[path].rotate_layer.weight, loreft.rotate_layer.weight)
    built = orthoserde.build(tmp_path / "a")
    assert isinstance(built, Adapter)
    assert built.get_config() == adapter.get_config()
    for path, loreft in adapter.layers.items():
        assert torch.equal(built.layers[path].rotate_layer.weight, loreft.rotate_layer.weight)


CHANGES: dict[str, Any] = {
    "positions": lambda: Adapter(interventions(), "l2"),
    "activation": lambda: Adapter(
        {**interventions(), LAYERS[1]: LoReFT(WIDTH, 2, dropout=0.1, activation="relu")}, "l1"
    ),
    "unshared": lambda: Adapter({**interventions(), LAYERS[2]: interventions()[LAYERS[0]]}, "l1"),
    "rank": lambda: Adapter({**interventions(), LAYERS[1]: LoReFT(WIDTH, 3, dropout=0.1)}, "l1"),
    "layers": lambda: Adapter({LAYERS[1]: interventions()[LAYERS[1]]}, "l1"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_adapter_that_differs_is_refused_and_stays_as_it_was(change: str, tmp_path: Path) -> None:
    orthoserde.save(Adapter(interventions(), "l1"), tmp_path / "a")
    other: Adapter = CHANGES[change]()
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(IncompatibleModelError):
        orthoserde.load(other, tmp_path / "a")
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())


def test_attaching_changes_nothing_that_is_saved_of_the_adapter(tmp_path: Path) -> None:
    model = base()
    adapter = Adapter(interventions(), "l1")
    orthoserde.save(adapter, tmp_path / "a")
    adapter.attach(model)
    model(ids())
    orthoserde.save(adapter, tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_the_state_dict_of_the_adapter_is_torchs_own(tmp_path: Path) -> None:
    adapter, other = Adapter(interventions(), "l1"), Adapter(interventions(seed=6), "l1")
    other.load_state_dict(adapter.state_dict(), strict=True)
    logits = []
    for each in (adapter, other):
        model = base().eval()
        each.attach(model)
        logits.append(model(ids()))
    assert torch.equal(*logits)
    assert logits[0].shape[-1] == WORDS
