"""What goes into a file beside the model, and comes back: by name, in place, and all or nothing."""

from __future__ import annotations

import copy
import dataclasses
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.optim import SGD, Adam, Optimizer
from torch.optim import lr_scheduler as schedulers
from torch.optim.swa_utils import AveragedModel

import orthoserde
from orthoserde import ConfigError, IncompatibleModelError, storage
from orthoserde.checkpoint import Checkpoint, LiveTensor
from orthoserde.manifest import TensorRecord
from orthoserde.manifest.training import GroupRecord, OptimizerRecord, StateRecord
from orthoserde.training.entries import ENTRIES, odd_entry
from tests.helpers import assert_unchanged, flip_bit, same_bits, snapshot
from tests.training.cases import Lion


@pytest.fixture(autouse=True)
def _generators() -> Iterator[None]:
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
    random.setstate(python)
    np.random.set_state(numpy)


def net() -> nn.Sequential:
    return nn.Sequential(orthoserde.orthogonal(nn.Linear(6, 4)), nn.Linear(4, 3))


def trained(model: nn.Module, optimizer: Optimizer, steps: int = 3) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(5, 6)).square().mean().backward()
        optimizer.step()


def saved(path: Path, make: Callable[[Any], Optimizer] = Adam, **others: Any) -> tuple[nn.Module, Optimizer]:
    model = net()
    optimizer = make(model.parameters())
    trained(model, optimizer)
    orthoserde.save(model, path, optimizer=optimizer, **others)
    return model, optimizer


def state_of(model: nn.Module, optimizer: Optimizer, entry: str) -> dict[str, Tensor]:
    return {name: optimizer.state[parameter][entry] for name, parameter in model.named_parameters()}


def assert_optimizer_unchanged(optimizer: Optimizer, before: dict[str, Any]) -> None:
    now = optimizer.state_dict()
    assert now["param_groups"] == before["param_groups"]
    assert now["state"].keys() == before["state"].keys()
    for number, entries in before["state"].items():
        for name, value in entries.items():
            assert torch.equal(now["state"][number][name], value)


def refused(path: Path, model: nn.Module, match: str, **arguments: Any) -> None:
    """A load that is refused, and changes nothing."""
    optimizer = arguments.get("optimizer")
    before = snapshot(model)
    optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list((optimizer or {}).values())
    states = [copy.deepcopy(each.state_dict()) for each in optimizers]
    generators = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy())  # type: ignore[index]
    with pytest.raises(orthoserde.OrthoserdeError, match=match):
        orthoserde.load(model, path, **arguments)
    assert_unchanged(model, before)
    for each, state in zip(optimizers, states, strict=True):
        assert_optimizer_unchanged(each, state)
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert random.getstate() == generators[1]
    assert (np.random.get_state()[1] == generators[2]).all()  # type: ignore[index]


# By name


def test_a_report_calls_optimizers_by_their_names(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    optimizers = {"net.g": torch.optim.SGD(model.parameters(), lr=0.1)}
    orthoserde.save(model, tmp_path / "m", optimizer=optimizers)
    assert "optimizer net.g (2 parameters)" in str(orthoserde.load(model, tmp_path / "m", optimizer=optimizers))


def test_state_goes_to_the_parameters_of_the_same_names_in_any_order(tmp_path: Path) -> None:
    model, optimizer = saved(tmp_path / "m")
    other = net()
    backwards = Adam(reversed(list(other.parameters())))
    orthoserde.load(other, tmp_path / "m", optimizer=backwards)
    expected = state_of(model, optimizer, "exp_avg")
    for name, average in state_of(other, backwards, "exp_avg").items():
        assert same_bits(average, expected[name])


def test_a_model_that_is_parametrized_in_another_order_gets_its_own(tmp_path: Path) -> None:
    """Registering one more parametrization moves its parameter to the end: by number the state would be swapped."""

    def make(first: bool) -> nn.Module:
        layer = nn.Bilinear(4, 4, 4)
        module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        for index in (0, 1) if first else (1, 0):
            orthoserde.orthogonal(module[index])
        return nn.ModuleDict({"a": module, "b": layer} if first else {"b": layer, "a": module})

    model, other = make(True), make(False)
    optimizer, again = Adam(model.parameters()), Adam(other.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    orthoserde.save(model, tmp_path / "m", optimizer=optimizer)
    orthoserde.load(other, tmp_path / "m", optimizer=again)
    expected, got = state_of(model, optimizer, "exp_avg"), state_of(other, again, "exp_avg")
    assert list(expected) != list(got)
    assert all(same_bits(got[name], expected[name]) for name in expected)


def test_groups_are_found_by_their_parameters(tmp_path: Path) -> None:
    model = net()
    groups: list[dict[str, Any]] = [{"params": model[0].parameters(), "lr": 0.5}, {"params": model[1].parameters()}]
    optimizer = SGD(groups, lr=0.1)
    orthoserde.save(model, tmp_path / "m", optimizer=optimizer)
    other = net()
    swapped = SGD([{"params": other[1].parameters()}], lr=1.0)
    swapped.add_param_group({"params": list(other[0].parameters())})
    orthoserde.load(other, tmp_path / "m", optimizer=swapped)
    assert [group["lr"] for group in swapped.param_groups] == [0.1, 0.5]


def test_several_optimizers_have_names(tmp_path: Path) -> None:
    model = net()
    pair = {"first": Adam(model[0].parameters(), lr=0.1), "second": SGD(model[1].parameters(), lr=0.2, momentum=0.9)}
    for optimizer in pair.values():
        trained(model, optimizer)
    report = orthoserde.save(model, tmp_path / "m", optimizer=pair)
    assert "optimizer first (2 parameters), optimizer second (2 parameters)" in str(report)
    other = net()
    again = {"second": SGD(other[1].parameters(), lr=1.0), "first": Adam(other[0].parameters())}
    loaded = orthoserde.load(other, tmp_path / "m", optimizer=again)
    assert "training state: optimizer second (2 parameters), optimizer first (2 parameters)" in str(loaded)
    assert again["second"].param_groups[0]["momentum"] == 0.9
    for name, optimizer in pair.items():
        assert len(again[name].state_dict()["state"]) == len(optimizer.state_dict()["state"]) == 2
    refused(tmp_path / "m", other, r"optimizer: the file holds 'first', 'second'", optimizer=Adam(other.parameters()))
    refused(tmp_path / "m", other, r"optimizer\.third", optimizer={"third": Adam(other.parameters())})


def test_tied_parameters_and_wrapped_models_have_the_same_names(tmp_path: Path) -> None:
    def make() -> nn.Module:
        model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
        model[1].weight = model[0].weight
        return model

    model = make()
    optimizer = Adam(model.parameters())
    trained(model, optimizer)
    orthoserde.save(torch.nn.DataParallel(model), tmp_path / "m", optimizer=optimizer)
    other = make()
    again = Adam(other.parameters())
    orthoserde.load(other, tmp_path / "m", optimizer=again)
    assert same_bits(again.state[other[0].weight]["exp_avg"], optimizer.state[model[0].weight]["exp_avg"])  # type: ignore[index]


def test_parameters_that_share_memory_and_are_several_objects_have_a_state_each(tmp_path: Path) -> None:
    def make() -> tuple[nn.Sequential, Optimizer]:
        first, second = nn.Linear(6, 6), nn.Linear(6, 6)
        second.weight = nn.Parameter(first.weight.detach())
        model = nn.Sequential(first, nn.Tanh(), second)
        return model, Adam(model.parameters(), lr=1e-2)

    model, optimizer = make()
    trained(model, optimizer)
    orthoserde.save(model, tmp_path / "m", optimizer=optimizer)
    other, again = make()
    orthoserde.load(other, tmp_path / "m", optimizer=again)
    expected, restored = state_of(model, optimizer, "exp_avg"), state_of(other, again, "exp_avg")
    assert {"0.weight", "2.weight"} < expected.keys() == restored.keys()
    assert all(same_bits(restored[name], expected[name]) for name in expected)
    for left, right in ((model, optimizer), (other, again)):
        torch.manual_seed(3)
        trained(left, right)
    assert all(map(same_bits, other.parameters(), model.parameters()))


def test_on_the_meta_device_state_follows_the_parameters(tmp_path: Path) -> None:
    model, optimizer = saved(tmp_path / "m")
    with torch.device("meta"):
        other = net()
    again = Adam(other.parameters())
    orthoserde.load(other, tmp_path / "m", optimizer=again)
    trained(model, optimizer, 0)
    for name, average in state_of(other, again, "exp_avg").items():
        assert same_bits(average, state_of(model, optimizer, "exp_avg")[name])


def test_a_bare_model_gets_its_parametrization_and_the_optimizer_goes_on(tmp_path: Path) -> None:
    model, optimizer = saved(tmp_path / "m")
    bare = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3))
    again = Adam(bare.parameters())
    orthoserde.load(bare, tmp_path / "m", optimizer=again)
    expected = state_of(model, optimizer, "exp_avg")
    assert all(same_bits(value, expected[name]) for name, value in state_of(bare, again, "exp_avg").items())


def test_an_optimizer_that_would_be_left_behind_is_refused(tmp_path: Path) -> None:
    """Where torch replaces the parameter: attaching weight_norm to a bare layer makes two of one."""
    model = parametrizations.weight_norm(nn.Linear(6, 4))
    orthoserde.save(model, tmp_path / "m", optimizer=Adam(model.parameters()))
    bare = nn.Linear(6, 4)
    refused(
        tmp_path / "m",
        bare,
        "no parameter of the model, or no longer after this load",
        optimizer=Adam(bare.parameters()),
    )


# Orphans and other mismatches


def test_parameters_that_the_model_does_not_have_are_refused(tmp_path: Path) -> None:
    model = net()
    stranger = nn.Parameter(torch.ones(7))
    optimizer = Adam([{"params": list(model.parameters())}, {"params": [stranger]}])
    with pytest.raises(ConfigError, match=r"number 0 of group 1, of shape \[7\]; they were replaced"):
        orthoserde.save(model, tmp_path / "m", optimizer=optimizer)
    assert not (tmp_path / "m").exists()
    orthoserde.save(model, tmp_path / "m", optimizer=Adam(model.parameters()))
    refused(
        tmp_path / "m", model, r"number 0 of group 1, of shape \[7\], is no parameter of the model", optimizer=optimizer
    )


def test_everything_that_does_not_match_is_listed(tmp_path: Path) -> None:
    saved(tmp_path / "m")
    model = net()
    refused(tmp_path / "m", model, "Adam in the file, SGD here", optimizer=SGD(model.parameters(), lr=0.1))
    part = Adam(model[0].parameters())
    refused(tmp_path / "m", model, r"not in this one: 1\.bias, 1\.weight", optimizer=part)
    groups = Adam([{"params": model[0].parameters()}, {"params": model[1].parameters()}])
    refused(
        tmp_path / "m",
        model,
        r"group 0 has other parameters than any group in the file \(2 groups here, 1 in the file\)",
        optimizer=groups,
    )
    orthoserde.save(model, tmp_path / "none")
    refused(tmp_path / "none", model, "holds no optimizer; save it with optimizer=", optimizer=Adam(model.parameters()))
    refused(tmp_path / "none", model, "no states of random generators", rng=True)
    refused(tmp_path / "none", model, r"state\.step: the file holds none of this name", state={"step": 0})


def test_lbfgs_wants_its_parameters_in_the_same_order(tmp_path: Path) -> None:
    model = net()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = model(torch.ones(5, 6)).square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    orthoserde.save(model, tmp_path / "m", optimizer=optimizer)
    other = net()
    backwards = torch.optim.LBFGS(reversed(list(other.parameters())))
    refused(tmp_path / "m", other, "their order is not that of the file", optimizer=backwards)
    orthoserde.load(other, tmp_path / "m", optimizer=torch.optim.LBFGS(other.parameters(), max_iter=3))


class Counting(SGD):
    """It keeps count in an option that it does not have before its first step, as schedulefree's wrapper does."""

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1
        super().step(closure)


def test_an_optimizer_of_the_users_own_may_add_options_as_it_goes(tmp_path: Path) -> None:
    def make(parameters: Any) -> Optimizer:
        return Counting(parameters, lr=0.1)

    saved(tmp_path / "m", make)
    other = net()
    optimizer = make(other.parameters())
    orthoserde.load(other, tmp_path / "m", optimizer=optimizer)
    assert optimizer.param_groups[0]["k"] == 3


def test_state_of_another_precision_is_kept(tmp_path: Path) -> None:
    """Torch casts floating state to the dtype of the parameter, which rounds float32 averages of a bfloat16 model."""
    model = nn.Linear(6, 3).bfloat16()
    optimizer = Adam(model.parameters())
    for parameter in model.parameters():
        optimizer.state[parameter] = {
            "step": torch.tensor(3.0),
            "exp_avg": torch.randn(parameter.shape),
            "exp_avg_sq": torch.rand(parameter.shape),
        }
    orthoserde.save(model, tmp_path / "m", optimizer=optimizer)
    other = nn.Linear(6, 3).bfloat16()
    again = Adam(other.parameters())
    orthoserde.load(other, tmp_path / "m", optimizer=again)
    for name, average in state_of(other, again, "exp_avg").items():
        assert same_bits(average, state_of(model, optimizer, "exp_avg")[name])


def channels_last() -> nn.Conv2d:
    layer = nn.Conv2d(3, 4, 3)
    layer.weight = nn.Parameter(layer.weight.detach().contiguous(memory_format=torch.channels_last))
    return layer


def test_state_keeps_its_memory_format(tmp_path: Path) -> None:
    model = channels_last()
    optimizer = Adam(model.parameters())
    model(torch.randn(1, 3, 5, 5)).sum().backward()
    optimizer.step()
    orthoserde.save(model, tmp_path / "m", optimizer=optimizer)
    other = channels_last()
    again = Adam(other.parameters())
    orthoserde.load(other, tmp_path / "m", optimizer=again)
    assert again.state[other.weight]["exp_avg"].stride() == optimizer.state[model.weight]["exp_avg"].stride()


def test_a_capturable_step_that_is_compiled_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """Capturable optimizers step on the CPU where they are compiled; the rate is a tensor there, and the steps are."""

    def run(seed: int) -> tuple[nn.Module, Optimizer, Callable[[], object]]:
        torch.manual_seed(seed)
        model = net()
        rate = torch.tensor(1e-2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0, amsgrad=True, capturable=True)
        return model, optimizer, torch.compile(optimizer.step, backend="eager")

    def step(model: nn.Module, optimizer: Optimizer, compiled: Callable[[], object], steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.randn(5, 6)).square().mean().backward()
            compiled()

    first, second = run(1), run(2)
    step(*first, 3)
    orthoserde.save(first[0], tmp_path / "m", optimizer=first[1], rng=True)
    step(*first, 3)
    step(*second, 1)
    orthoserde.load(second[0], tmp_path / "m", optimizer=second[1], rng=True)
    step(*second, 3)
    assert second[1].param_groups[0]["capturable"] is True
    for entry in ("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        expected = state_of(*first[:2], entry)
        assert all(same_bits(value, expected[name]) for name, value in state_of(*second[:2], entry).items())
    assert all(same_bits(*pair) for pair in zip(first[0].parameters(), second[0].parameters(), strict=True))


# Afresh


def test_a_computed_weight_alone_asks_for_a_reset(tmp_path: Path) -> None:
    plain = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3))
    nn.init.orthogonal_(plain[0].weight)  # type: ignore[arg-type]
    optimizer = Adam(plain.parameters())
    trained(plain, optimizer, 1)
    nn.init.orthogonal_(plain[0].weight)  # type: ignore[arg-type]
    orthoserde.save(plain, tmp_path / "m", optimizer=optimizer)
    model = nn.Sequential(orthoserde.orthogonal(nn.Linear(6, 6)), nn.Linear(6, 3))
    again = Adam(model.parameters())
    refused(tmp_path / "m", model, r"computed weight of 0\.weight alone.*reset=\['0\.weight'\]", optimizer=again)
    with pytest.raises(IncompatibleModelError) as caught:
        orthoserde.load(model, tmp_path / "m", optimizer=again)
    assert len(caught.value.problems) == 1  # nor are its parameters said to be missing on either side
    with pytest.warns(orthoserde.LegacyCheckpointWarning):
        orthoserde.load(model, tmp_path / "m", optimizer=again, reset=["0.weight"])
    assert model.get_parameter("0.parametrizations.weight.original") not in again.state
    for key in ("0.bias", "1.weight", "1.bias"):
        name = model.get_parameter(key)
        assert same_bits(again.state[name]["exp_avg"], optimizer.state[plain.get_parameter(key)]["exp_avg"])


@pytest.mark.parametrize(("reset", "left"), [("all", 0), (["1"], 2), (["1.weight"], 3), ("0.weight", 3)])
def test_what_is_reset_starts_afresh(reset: Any, left: int, tmp_path: Path) -> None:
    saved(tmp_path / "m")
    model = net()
    optimizer = Adam(model.parameters(), lr=0.5)
    trained(model, optimizer)
    orthoserde.load(model, tmp_path / "m", optimizer=optimizer, reset=reset)
    assert len(optimizer.state) == left


def test_what_only_the_file_has_an_optimizer_for_can_be_reset(tmp_path: Path) -> None:
    saved(tmp_path / "m")
    model = net()
    optimizer = Adam(model[0].parameters())
    refused(tmp_path / "m", model, r"not in this one: 1\.bias, 1\.weight", optimizer=optimizer)
    orthoserde.load(model, tmp_path / "m", optimizer=optimizer, reset=["1"])
    assert len(optimizer.state) == 2


def test_a_name_that_resets_nothing_is_refused(tmp_path: Path) -> None:
    saved(tmp_path / "m")
    model = net()
    refused(
        tmp_path / "m",
        model,
        r"reset='2\.weight': no optimizer that optimizer= loads has a parameter of this name",
        optimizer=Adam(model.parameters()),
        reset=["2.weight"],
    )


# The user's own


SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "step": lambda optimizer: schedulers.StepLR(optimizer, 2),
    "multistep": lambda optimizer: schedulers.MultiStepLR(optimizer, [2, 4]),
    "constant": lambda optimizer: schedulers.ConstantLR(optimizer, 0.5, 3),
    "linear": lambda optimizer: schedulers.LinearLR(optimizer, total_iters=7),
    "exponential": lambda optimizer: schedulers.ExponentialLR(optimizer, 0.9),
    "polynomial": lambda optimizer: schedulers.PolynomialLR(optimizer, 9),
    "cosine": lambda optimizer: schedulers.CosineAnnealingLR(optimizer, 9),
    "restarts": lambda optimizer: schedulers.CosineAnnealingWarmRestarts(optimizer, 3),
    "cyclic": lambda optimizer: schedulers.CyclicLR(optimizer, 0.01, 0.1, 3),
    "onecycle": lambda optimizer: schedulers.OneCycleLR(optimizer, 0.1, total_steps=20),
    "lambda": lambda optimizer: schedulers.LambdaLR(optimizer, lambda epoch: 0.9**epoch),
    "multiplicative": lambda optimizer: schedulers.MultiplicativeLR(optimizer, lambda epoch: 0.9),
    "plateau": lambda optimizer: schedulers.ReduceLROnPlateau(optimizer, patience=1),
    "sequential": lambda optimizer: schedulers.SequentialLR(
        optimizer,
        [schedulers.ConstantLR(optimizer, 0.5, 2), schedulers.MultiStepLR(optimizer, [1, 3])],
        [3],
    ),
    "chained": lambda optimizer: schedulers.ChainedScheduler(
        [schedulers.ConstantLR(optimizer, 0.5, 2), schedulers.ExponentialLR(optimizer, 0.9)]
    ),
}


@pytest.mark.filterwarnings("ignore:The epoch parameter in")  # torch 2.3's SequentialLR uses it itself
@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_of_torch_goes_on(name: str, tmp_path: Path) -> None:
    def run() -> tuple[nn.Module, Optimizer, Any]:
        model = net()
        optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
        return model, optimizer, SCHEDULERS[name](optimizer)

    def rates(model: nn.Module, optimizer: Optimizer, scheduler: Any, steps: int) -> list[tuple[float, float]]:
        found = []
        for _ in range(steps):
            trained(model, optimizer, 1)
            scheduler.step(*([1.0] if name == "plateau" else []))
            found.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]))
        return found

    model, optimizer, scheduler = run()
    rates(model, optimizer, scheduler, 4)
    orthoserde.save(model, tmp_path / "m", optimizer=optimizer, state={"scheduler": scheduler})
    expected = rates(model, optimizer, scheduler, 8)
    other, again, second = run()
    orthoserde.load(other, tmp_path / "m", optimizer=again, state={"scheduler": second})
    assert rates(other, again, second, 8) == expected


class Annealed:
    """As OneCycleLR is in torch 2.3: its state has a function of its class."""

    def __init__(self, kind: str) -> None:
        self.function = getattr(self, kind)
        self.step = 0

    @staticmethod
    def linear(x: float) -> float:
        return x

    @staticmethod
    def square(x: float) -> float:
        return x * x

    def state_dict(self) -> dict[str, Any]:
        return vars(self).copy()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


def test_a_function_of_the_class_of_an_object_is_compared_by_name(tmp_path: Path) -> None:
    model, saved, same, other = net(), Annealed("square"), Annealed("square"), Annealed("linear")
    saved.step = 3
    orthoserde.save(model, tmp_path / "m", state={"annealed": saved})
    orthoserde.load(model, tmp_path / "m", state={"annealed": same})
    assert (same.step, same.function) == (3, Annealed.square)
    text = "ValueError: function is 'square' in the file, linear here; make it as it was saved"
    refused(tmp_path / "m", model, text, state={"annealed": other})
    assert (other.step, other.function) == (0, Annealed.linear)
    saved.function = lambda x: x
    with pytest.raises(ConfigError, match=r"state\.annealed\.function: .* got a builtins\.function"):
        orthoserde.save(model, tmp_path / "m", state={"annealed": saved})


def test_plain_values_come_back_in_place_and_in_the_report(tmp_path: Path) -> None:
    values = {
        "step": 120,
        "best": float("-inf"),
        "seen": Counter({3: 2}),
        "curve": [0.5, (1, None)],
        "t": torch.ones(2),
    }
    model = net()
    orthoserde.save(model, tmp_path / "m", state=values)
    state: dict[str, Any] = {"step": None, "curve": None}
    report = orthoserde.load(net(), tmp_path / "m", state=state)
    assert state == {"step": 120, "curve": [0.5, (1, None)]}
    assert set(report.state) == set(values)
    assert report.state["best"] == float("-inf")
    assert type(report.state["seen"]) is Counter
    assert isinstance(report.state["t"], Tensor)
    state["curve"].append(1)
    assert report.state["curve"] == [0.5, (1, None)]


def test_scalers_and_generators_and_averages_are_objects(tmp_path: Path) -> None:
    model = net()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    generator = torch.Generator().manual_seed(3)
    torch.rand(3, generator=generator)
    average = torch.optim.swa_utils.AveragedModel(nn.Linear(2, 2))
    orthoserde.save(model, tmp_path / "m", state={"scaler": scaler, "generator": generator, "average": average})
    again: dict[str, Any] = {
        "scaler": torch.amp.GradScaler("cpu"),
        "generator": torch.Generator(),
        "average": torch.optim.swa_utils.AveragedModel(nn.Linear(2, 2)),
    }
    orthoserde.load(net(), tmp_path / "m", state=again)
    assert again["scaler"].get_scale() == 8.0
    assert torch.equal(torch.rand(3, generator=again["generator"]), torch.rand(3, generator=generator))
    assert same_bits(again["average"].module.weight, average.get_parameter("module.weight"))


@pytest.mark.parametrize(
    ("state", "match"),
    [
        ({"a": {"b": [lambda: 1]}}, r"state\.a\.b\.0: .*function"),
        (
            {"schedulers": [schedulers.StepLR(SGD(nn.Linear(1, 1).parameters(), lr=1.0), 1)]},
            r"state\.schedulers\.0: .*StepLR",
        ),
        ({"set": {1}}, r"state\.set"),
    ],
    ids=["function", "nested object", "set"],
)
def test_what_is_no_state_is_refused_with_its_place(state: dict[str, object], match: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=match):
        orthoserde.save(net(), tmp_path / "m", state=state)
    assert not (tmp_path / "m").exists()


def test_an_object_of_another_class_is_refused(tmp_path: Path) -> None:
    model, optimizer = net(), None
    optimizer = SGD(model.parameters(), lr=0.1)
    orthoserde.save(model, tmp_path / "m", state={"s": schedulers.StepLR(optimizer, 2), "n": 1})
    refused(
        tmp_path / "m",
        model,
        "a StepLR in the file, a ExponentialLR here",
        state={"s": schedulers.ExponentialLR(optimizer, 0.9)},
    )
    refused(tmp_path / "m", model, "give the object to load it into", state={"s": 3})
    refused(
        tmp_path / "m", model, "a plain value in the file, a StepLR here", state={"n": schedulers.StepLR(optimizer, 2)}
    )


class Stubborn:
    """An object that does not take a state."""

    def __init__(self) -> None:
        self.value = 1

    def state_dict(self) -> dict[str, int]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, int]) -> None:
        if state["value"] == 3:
            raise KeyError("not me")
        self.value = state["value"]


def test_when_one_object_refuses_everything_is_as_it_was(tmp_path: Path) -> None:
    stubborn, other = Stubborn(), Stubborn()
    stubborn.value, other.value = 3, 5
    model = net()
    optimizer = Adam(model.parameters())
    trained(model, optimizer)
    orthoserde.save(model, tmp_path / "m", optimizer=optimizer, state={"a": other, "b": stubborn}, rng=True)
    state = {"a": Stubborn(), "b": Stubborn()}
    again = net()
    twin = Adam(again.parameters())
    trained(again, twin, 2)
    refused(
        tmp_path / "m", again, r"state\.b: its load_state_dict refused: KeyError", optimizer=twin, state=state, rng=True
    )
    assert state["a"].value == 1
    bare = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3))
    values = {key: value.clone() for key, value in bare.state_dict().items()}
    with pytest.raises(IncompatibleModelError, match=r"state\.b: its load_state_dict refused"):
        orthoserde.load(bare, tmp_path / "m", state=state)
    assert type(bare[0]) is nn.Linear  # the parametrization that had been attached is gone
    assert all(same_bits(bare.state_dict()[key], value) for key, value in values.items())


def test_a_module_in_the_state_is_said_to_be_compared_by_nobody(tmp_path: Path) -> None:
    """The average of another map would take the state and compute another weight."""
    model, plain = nn.Sequential(parametrizations.orthogonal(nn.Linear(4, 4))), nn.Linear(2, 2)
    orthoserde.save(plain, tmp_path / "m", state={"average": AveragedModel(model), "second": plain})
    report = orthoserde.load(plain, tmp_path / "m", state={"average": AveragedModel(model), "second": plain})
    (note,) = report.notes
    assert note.startswith("state.average: a module with parametrized tensors, whose configuration was not compared; ")
    other = nn.Sequential(parametrizations.orthogonal(nn.Linear(4, 4), orthogonal_map="cayley"))
    orthoserde.save(nn.ModuleDict({"model": plain, "average": model}), tmp_path / "both")
    with pytest.raises(
        IncompatibleModelError, match="orthogonal_map is 'matrix_exp' in the file, 'cayley' in the model"
    ):
        orthoserde.load(nn.ModuleDict({"model": plain, "average": other}), tmp_path / "both")


def test_a_group_that_is_new_is_named_in_reset(tmp_path: Path) -> None:
    """As for a run that was saved with the decay that zeroes a householder weight."""
    model, _ = saved(tmp_path / "m")
    names = ("0.parametrizations.weight.original", "1.weight", "1.bias", "0.bias")
    original, *rest = map(model.get_parameter, names)
    groups: list[Any] = [{"params": [original], "lr": 0.5}, {"params": rest}]
    optimizer = Adam(groups)
    refused(tmp_path / "m", model, "name in reset= those whose group is new", optimizer=optimizer)
    orthoserde.load(model, tmp_path / "m", optimizer=optimizer, reset=["0.weight"])
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 1e-3]
    assert list(optimizer.state) == rest


def test_arguments_of_other_types_are_type_errors(tmp_path: Path) -> None:
    model = net()
    orthoserde.save(model, tmp_path / "m")
    for action in (orthoserde.save, orthoserde.load):
        for arguments in ({"optimizer": model}, {"optimizer": {1: SGD(model.parameters(), lr=1.0)}}, {"state": [1]}):
            with pytest.raises(TypeError):
                action(model, tmp_path / "m", **arguments)
        odd: list[tuple[Any, str]] = [
            ([1], "state: expected a mapping of names to objects and values, such as {'step': 7}, got list"),
            ({3: 1}, "state: expected names that are strings, got 3, of type int"),
        ]
        for state, text in odd:
            with pytest.raises(TypeError, match=text):
                action(model, tmp_path / "m", state=state)


@pytest.mark.parametrize("reset", [3, None, True, ["0.weight", 3]], ids=str)
def test_a_reset_of_what_is_no_name_is_a_type_error(reset: Any, tmp_path: Path) -> None:
    model, optimizer = saved(tmp_path / "m")
    with pytest.raises(TypeError, match="reset: expected names of tensors, or 'all'"):
        orthoserde.load(model, tmp_path / "m", optimizer=optimizer, reset=reset)


def test_gradients_are_not_in_a_file_and_are_left_alone_by_a_load(tmp_path: Path) -> None:
    """As the tutorial says: half of an accumulation is in no checkpoint."""
    model, optimizer = saved(tmp_path / "m")
    assert not any("grad" in key for key in load_file(tmp_path / "m"))
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    before = {name: None if gradient is None else gradient.clone() for name, gradient in gradients.items()}
    orthoserde.load(model, tmp_path / "m", optimizer=optimizer)
    for name, parameter in model.named_parameters():
        gradient, expected = parameter.grad, before[name]
        assert gradient is gradients[name]
        assert gradient is not None
        assert expected is not None
        assert same_bits(gradient, expected)


# Random generators


def test_generators_go_on_where_they_were(tmp_path: Path) -> None:
    np.random.standard_normal()  # leaves half of a pair behind
    random.gauss(0, 1)
    model = net()
    orthoserde.save(model, tmp_path / "m", rng=True)
    expected = (torch.randn(3), random.random(), random.gauss(0, 1), np.random.rand(), np.random.standard_normal())
    torch.manual_seed(9)
    orthoserde.load(model, tmp_path / "m", rng=True)
    got = (torch.randn(3), random.random(), random.gauss(0, 1), np.random.rand(), np.random.standard_normal())
    assert torch.equal(got[0], expected[0])
    assert got[1:] == expected[1:]


def test_without_rng_no_generator_moves(tmp_path: Path) -> None:
    model = net()
    before = torch.get_rng_state()
    orthoserde.save(model, tmp_path / "m", rng=True)
    orthoserde.load(model, tmp_path / "m")
    assert torch.equal(torch.get_rng_state(), before)


# Files


def test_the_model_is_read_without_its_training_state(tmp_path: Path) -> None:
    model, _ = saved(tmp_path / "m", state={"step": 1}, rng=True)
    report = orthoserde.load(other := net(), tmp_path / "m")
    assert not report.unexpected_keys
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in model.state_dict().items())
    tensors = load_file(tmp_path / "m")
    assert {key for key in tensors if key.startswith(".")} >= {".optimizer.1.weight.exp_avg", ".rng.torch"}
    assert "training state: optimizer (4 parameters), step, random generators" in str(
        orthoserde.inspect(tmp_path / "m")
    )
    assert orthoserde.verify(tmp_path / "m").ok


def test_equal_states_give_equal_bytes(tmp_path: Path) -> None:
    model, optimizer = saved(tmp_path / "one", state={"step": 1}, rng=True)
    orthoserde.save(model, tmp_path / "two", optimizer=optimizer, state={"step": 1}, rng=True)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_saving_disturbs_nothing(tmp_path: Path) -> None:
    model = net()
    optimizer = Adam(model.parameters())
    trained(model, optimizer)
    before, state = snapshot(model), copy.deepcopy(optimizer.state_dict())
    orthoserde.save(model, tmp_path / "m", optimizer=optimizer, state={"step": 1}, rng=True)
    assert_unchanged(model, before)
    assert_optimizer_unchanged(optimizer, state)


def test_damaged_training_state_is_found(tmp_path: Path) -> None:
    saved(tmp_path / "m")
    size = (tmp_path / "m").stat().st_size
    for byte in (size - 3, size - 130):
        flip_bit(tmp_path / "m", byte)
        model = net()
        refused(tmp_path / "m", model, "not those that were saved", optimizer=Adam(model.parameters()))
        flip_bit(tmp_path / "m", byte)


Change = Callable[[OptimizerRecord], OptimizerRecord]


def _group(record: OptimizerRecord, **changes: Any) -> OptimizerRecord:
    return dataclasses.replace(record, groups=(dataclasses.replace(record.groups[0], **changes),))


def _options(record: OptimizerRecord, change: Callable[[list[Any]], None]) -> OptimizerRecord:
    options = copy.deepcopy(record.groups[0].options)
    assert isinstance(options, dict)
    change(options["dict"])  # type: ignore[arg-type]
    return _group(record, options=options)


def _entry(record: OptimizerRecord, change: Callable[[list[Any]], object]) -> OptimizerRecord:
    state = copy.deepcopy(dict(record.state))
    change(state["1.weight"]["dict"])  # type: ignore[index,call-overload,arg-type]
    return dataclasses.replace(record, state=state)


HOSTILE: dict[str, tuple[Change, str]] = {
    "no rate": (lambda r: _options(r, lambda o: o.__setitem__(0, ["lr", None])), "lr is of type NoneType in the file"),
    "a rest of other parts": (
        lambda r: dataclasses.replace(r, rest={"dict": [["rest", {"dict": []}]]}),
        "expected rest and shared",
    ),
    "shared state of a parameter": (
        lambda r: dataclasses.replace(
            r, rest={"dict": [["rest", {"dict": []}], ["shared", {"dict": [[0, {"dict": []}]]}]]}
        ),
        "state of no parameter under the number of one",
    ),
    "another class": (
        lambda r: dataclasses.replace(r, class_name="os:system"),
        "optimizer: system in the file, Adam here",
    ),
    "another group": (
        lambda r: _group(r, parameters=(*r.groups[0].parameters, "more")),
        "not in this one: more",
    ),
    "groups without state": (
        lambda r: dataclasses.replace(_group(r, parameters=r.groups[0].parameters[:1]), state={}),
        "not in the file",
    ),
    "two groups": (
        lambda r: dataclasses.replace(
            r,
            groups=(
                GroupRecord(r.groups[0].parameters[:1], r.groups[0].options),
                GroupRecord(r.groups[0].parameters[1:], r.groups[0].options),
            ),
        ),
        "group 0 has other parameters",
    ),
    "an unknown option": (lambda r: _options(r, lambda o: o.append(["evil", 1])), "has the option 'evil'"),
    "an unknown option that is on": (
        lambda r: _options(r, lambda o: o.append(["evil", True])),
        "has the option 'evil'",
    ),
    "an unknown option that is zero": (lambda r: _options(r, lambda o: o.append(["evil", 0])), "has the option 'evil'"),
    "an option of another type": (
        lambda r: _options(r, lambda o: o.__setitem__(0, ["lr", "fast"])),
        "lr is of type str in the file, float here",
    ),
    "options that are none": (lambda r: _group(r, options=[1]), "expected a dict, got list"),
    "an unknown entry": (lambda r: _entry(r, lambda e: e.append(["evil", 1])), "Adam keeps no 'evil'"),
    "a number for a tensor": (
        lambda r: _entry(r, lambda e: [pair.__setitem__(1, 3) for pair in e if pair[0] == "max_exp_avg_sq"]),
        "max_exp_avg_sq: expected a tensor",
    ),
    "another sort of rest": (lambda r: dataclasses.replace(r, rest=3), "expected a dict"),
}


@pytest.mark.parametrize("value", [False, None])
def test_an_option_of_another_torch_that_is_off_is_none_of_ours(value: object, tmp_path: Path) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.5)
    trained(model, optimizer, 1)
    optimizer.param_groups[0]["of_another_torch"] = value
    orthoserde.save(model, tmp_path / "m", optimizer=optimizer)
    other = net()
    resumed = torch.optim.SGD(other.parameters(), momentum=0.5)
    orthoserde.load(other, tmp_path / "m", optimizer=resumed)
    for each, its in ((model, optimizer), (other, resumed)):
        torch.manual_seed(5)
        trained(each, its, 1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_optimizers_are_refused_and_nothing_changes(name: str, tmp_path: Path) -> None:
    saved(tmp_path / "m", lambda parameters: Adam(parameters, amsgrad=True))
    change, match = HOSTILE[name]
    with storage.read(tmp_path / "m") as checkpoint:
        training = checkpoint.manifest.training
        assert training is not None
        changed = dataclasses.replace(training, optimizers={"": change(training.optimizers[""])})
        used = set(changed.keys("the file"))
        tensors = {key: rec for key, rec in checkpoint.manifest.tensors.items() if key[0] != "." or key in used}
        manifest = dataclasses.replace(checkpoint.manifest, training=changed, tensors=tensors)
        sources = {key: checkpoint.sources[key] for key in tensors}
        storage.write(dataclasses.replace(checkpoint, manifest=manifest, sources=sources), tmp_path / "odd")
    model = net()
    optimizer = Adam(model.parameters(), amsgrad=True)
    trained(model, optimizer, 1)
    refused(tmp_path / "odd", model, match, optimizer=optimizer)


@pytest.mark.parametrize("name", sorted(ENTRIES.keys() & vars(torch.optim).keys()))
def test_what_an_optimizer_of_torch_does_not_keep_is_odd(name: str) -> None:
    """Adafactor and Muon say that they are of `torch.optim`, the others name a module in it."""
    assert odd_entry(getattr(torch.optim, name), {"evil": 1}, torch.Size([2])) == f"{name} keeps no 'evil'"


def test_entries_of_another_shape_are_refused(tmp_path: Path) -> None:
    model, optimizer = saved(tmp_path / "m")
    optimizer.state[model.get_parameter("1.weight")]["exp_avg"] = torch.zeros(5, 5)
    orthoserde.save(model, tmp_path / "odd", optimizer=optimizer)
    other = net()
    refused(
        tmp_path / "odd",
        other,
        r"1\.weight: exp_avg: expected the shape \[3, 4\], got \[5, 5\]",
        optimizer=Adam(other.parameters()),
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [("python", torch.zeros(3)), ("torch", torch.zeros(4, dtype=torch.uint8)), ("python", torch.full((625,), -1))],
    ids=["short", "no state", "negative"],
)
def test_states_that_no_generator_takes_are_refused(key: str, value: Tensor, tmp_path: Path) -> None:
    model = net()
    orthoserde.save(model, tmp_path / "m", rng=True)
    stored = ".rng.torch" if key == "torch" else ".rng.python.words"
    with storage.read(tmp_path / "m") as checkpoint:
        whole = checkpoint.snapshot()
    record = TensorRecord(str(value.dtype).removeprefix("torch."), tuple(value.shape), tuple(value.stride()), False)
    manifest = dataclasses.replace(whole.manifest, tensors={**whole.manifest.tensors, stored: record})
    storage.write(
        dataclasses.replace(whole, manifest=manifest, sources={**whole.sources, stored: LiveTensor(value)}),
        tmp_path / "odd",
    )
    refused(tmp_path / "odd", model, "not states of random generators", rng=True)


def test_a_build_leaves_training_state_aside(tmp_path: Path) -> None:
    registry = orthoserde.Registry()

    @registry.register("tests>Net")
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

    model = Net()
    orthoserde.save(model, tmp_path / "m", optimizer=SGD(model.parameters(), lr=0.1), rng=True, registry=registry)
    built = orthoserde.build(tmp_path / "m", registry=registry)
    assert same_bits(built.get_parameter("layer.weight"), model.layer.weight)


def test_a_mismatch_of_the_model_is_listed_with_those_of_the_optimizer(tmp_path: Path) -> None:
    saved(tmp_path / "m")
    model = nn.Sequential(orthoserde.orthogonal(nn.Linear(6, 4)), nn.Linear(4, 2))
    with pytest.raises(IncompatibleModelError) as caught:
        orthoserde.load(model, tmp_path / "m", optimizer=SGD(model.parameters(), lr=1.0))
    places = [problem.where for problem in caught.value.problems]
    assert "1.weight" in places
    assert "optimizer" in places


# What a hostile reader found


def test_counts_of_any_sort_can_be_read_again(tmp_path: Path) -> None:
    orthoserde.save(net(), tmp_path / "m", state={"c": Counter({"loss": 1.5, "ok": True})})
    assert orthoserde.load(net(), tmp_path / "m").state["c"] == Counter({"loss": 1.5, "ok": True})


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        *(("numpy", "position", each) for each in (500_000_000, -5, 625, 1.0, True)),
        ("numpy", "has_gauss", 7),
        ("numpy", "gauss", "x"),
        ("python", "gauss", [1]),
        ("python", "version", 2),
        ("python", "words", None),
    ],
)
def test_numbers_that_generators_do_not_check_are_checked(part: str, name: str, value: Any, tmp_path: Path) -> None:
    """NumPy reads outside of its words for a position beyond them."""
    orthoserde.save(net(), tmp_path / "m", rng=True)
    with storage.read(tmp_path / "m") as checkpoint:
        training = checkpoint.manifest.training
        assert training is not None
        rng = copy.deepcopy(training.rng)
        pairs = dict(rng["dict"])[part]["dict"]  # type: ignore[index,call-overload,arg-type]
        for pair in pairs:
            if pair[0] == name and value is not None:
                pair[1] = value
        if value is None:  # the last word of Python's is a position too
            tensor = checkpoint.tensor(".rng.python.words")
            tensor[-1] = 700
            checkpoint = dataclasses.replace(
                checkpoint, sources={**checkpoint.sources, ".rng.python.words": LiveTensor(tensor)}
            )
        records = {key: dataclasses.replace(rec, digest=None) for key, rec in checkpoint.manifest.tensors.items()}
        manifest = dataclasses.replace(
            checkpoint.manifest, training=dataclasses.replace(training, rng=rng), tensors=records
        )
        storage.write(dataclasses.replace(checkpoint, manifest=manifest), tmp_path / "odd")
    refused(tmp_path / "odd", net(), "not states? of", rng=True)


def test_optimizers_and_global_generators_have_arguments_of_their_own(tmp_path: Path) -> None:
    model = net()
    for value, match in ((Adam(model.parameters()), "goes into optimizer="), (torch.default_generator, "rng=True")):
        with pytest.raises(ConfigError, match=match):
            orthoserde.save(model, tmp_path / "m", state={"x": value})
        orthoserde.save(model, tmp_path / "m", state={"x": torch.Generator()})
        refused(tmp_path / "m", model, match, state={"x": value})


class Dice:
    """An object that keeps the state of the global generator."""

    def state_dict(self) -> dict[str, Tensor]:
        return {"torch": torch.get_rng_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        torch.set_rng_state(state["torch"])


def test_a_load_of_a_model_alone_does_not_compare_generators(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> Any:
        raise AssertionError("nothing is loaded that could move them")

    saved(tmp_path / "m", state={"step": 3}, rng=True)
    monkeypatch.setattr("orthoserde.training.rng.fingerprint", refuse)
    model, state = net(), {"step": 0}
    orthoserde.load(model, tmp_path / "m", state=state, rng=True)
    assert state == {"step": 3}
    with pytest.raises(AssertionError, match="nothing is loaded"):
        orthoserde.load(model, tmp_path / "m", optimizer=Adam(model.parameters()))


def test_a_load_asks_an_optimizer_once_for_its_state(tmp_path: Path) -> None:
    """Some gather it from other devices, or copy it."""
    calls: list[int] = []

    class Asked(Adam):
        def state_dict(self) -> dict[str, Any]:
            calls.append(1)
            return super().state_dict()

    saved(tmp_path / "m", Asked)
    model = net()
    optimizer = Asked(model.parameters(), lr=0.5)
    calls.clear()
    orthoserde.load(model, tmp_path / "m", optimizer=optimizer)
    assert len(calls) == 1
    assert optimizer.param_groups[0]["lr"] == 1e-3


def test_generators_that_an_object_moves_stay_moved(tmp_path: Path) -> None:
    orthoserde.save(net(), tmp_path / "m", state={"dice": Dice()})
    expected = torch.rand(3)
    torch.rand(5)
    orthoserde.load(net(), tmp_path / "m", state={"dice": Dice()})
    assert torch.equal(torch.rand(3), expected)


def test_one_parameter_that_became_two_is_refused(tmp_path: Path) -> None:
    tied = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    tied[1].weight = tied[0].weight
    optimizer = Adam(tied.parameters())
    trained(tied, optimizer)
    orthoserde.save(tied, tmp_path / "m", optimizer=optimizer)
    apart = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    refused(
        tmp_path / "m",
        apart,
        "two parameters here are 0.weight in the file",
        optimizer=Adam(apart.parameters()),
        strict=False,
    )


def test_groups_that_start_afresh_keep_their_own_options(tmp_path: Path) -> None:
    def groups(model: nn.Sequential, *rates: float) -> Optimizer:
        return SGD(
            [{"params": list(model[i].parameters()), "lr": rate} for i, rate in enumerate(rates)], lr=1.0, momentum=0.9
        )

    model = net()
    optimizer = groups(model, 0.25, 0.5)
    trained(model, optimizer)
    optimizer.state["global"] = {"k": 50}  # type: ignore[index]
    orthoserde.save(model, tmp_path / "m", optimizer=optimizer)
    for reset, rates in (("all", [7.0, 9.0]), (["1"], [0.25, 9.0]), (["0"], [7.0, 0.5]), (["1.weight"], [0.25, 0.5])):
        other = net()
        again = groups(other, 7.0, 9.0)
        orthoserde.load(other, tmp_path / "m", optimizer=again, reset=reset)
        assert [group["lr"] for group in again.param_groups] == rates
        assert ("global" in again.state) == (reset != "all")
    swapped = net()
    backwards = SGD([{"params": list(swapped[1].parameters())}, {"params": list(swapped[0].parameters())}], lr=3.0)
    orthoserde.load(swapped, tmp_path / "m", optimizer=backwards, reset="all")
    assert [group["lr"] for group in backwards.param_groups] == [3.0, 3.0]


def test_nested_state_of_another_precision_is_kept(tmp_path: Path) -> None:
    model = nn.Linear(6, 3).bfloat16()
    optimizer = Lion(model.parameters())
    inner = {"list": [torch.full((3,), 1 / 3)], "pair": (torch.full((2,), 1 / 3), {"deep": torch.full((), 1 / 3)})}
    for parameter in model.parameters():
        optimizer.state[parameter] = copy.deepcopy(inner)
    orthoserde.save(model, tmp_path / "m", optimizer=optimizer)
    other = nn.Linear(6, 3).bfloat16()
    again = Lion(other.parameters())
    orthoserde.load(other, tmp_path / "m", optimizer=again)
    state = again.state[other.weight]
    for tensor in (state["list"][0], state["pair"][0], state["pair"][1]["deep"]):
        assert tensor.dtype == torch.float32


def test_values_can_be_used_outside_of_inference_mode(tmp_path: Path) -> None:
    orthoserde.save(net(), tmp_path / "m", state={"t": torch.ones(2)})
    state: dict[str, Any] = {"t": None}
    with torch.inference_mode():
        orthoserde.load(net(), tmp_path / "m", state=state)
    assert not state["t"].is_inference()


def test_values_need_a_place(tmp_path: Path) -> None:
    orthoserde.save(net(), tmp_path / "m", state={"n": 1})
    with pytest.raises(TypeError, match="expected a dict"):
        orthoserde.load(net(), tmp_path / "m", state=MappingProxyType({"n": 0}))


class Never:
    """An object that refuses whatever it is given, its own state too."""

    def state_dict(self) -> dict[str, int]:
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        raise NotImplementedError("never")


def test_an_object_that_refuses_its_own_state_does_not_keep_others_from_theirs(tmp_path: Path) -> None:
    model, never = net(), Never()
    optimizer = Adam(model.parameters(), lr=0.25)
    trained(model, optimizer)
    scheduler = schedulers.StepLR(optimizer, 7)
    orthoserde.save(model, tmp_path / "m", optimizer=optimizer, state={"s": scheduler, "never": never})
    other = net()
    again = Adam(other.parameters(), lr=0.5)
    second = schedulers.StepLR(again, 2)
    second.extra = 1  # type: ignore[attr-defined]
    match = r"state\.never: its load_state_dict refused(.|\n)*state\.never .*could not be given back"
    refused(tmp_path / "m", other, match, optimizer=again, state={"s": second, "never": never})
    assert second.step_size == 2
    assert vars(second)["extra"] == 1
    assert again.param_groups[0]["lr"] == 0.5


def test_a_write_that_fails_gives_back_what_optimizers_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path / "m")
    model = net()
    optimizer = Adam(model.parameters(), lr=0.5)
    trained(model, optimizer, 1)
    before = copy.deepcopy(optimizer.state_dict())
    monkeypatch.setattr(Checkpoint, "fill", _failing_at_the_model())
    with pytest.raises(orthoserde.LoadInterruptedError):
        orthoserde.load(model, tmp_path / "m", optimizer=optimizer)
    assert_optimizer_unchanged(optimizer, before)


def _failing_at_the_model() -> Callable[..., None]:
    fill = Checkpoint.fill

    def failing(self: Checkpoint, targets: Any, *arguments: Any) -> None:
        if any(isinstance(target, nn.Parameter) for _, target in targets):
            raise OSError("the disk is gone")
        fill(self, targets, *arguments)

    return failing


@pytest.mark.parametrize("change", ["twice", "stray", "alias"])
def test_tensors_of_training_state_have_one_place_each(change: str, tmp_path: Path) -> None:
    saved(tmp_path / "m")
    with storage.read(tmp_path / "m") as checkpoint:
        manifest = checkpoint.manifest
        training = manifest.training
        assert training is not None
        key = next(iter(manifest.training_keys))
        if change == "twice":
            entry = StateRecord(None, {"tensor": key})
            manifest = dataclasses.replace(manifest, training=dataclasses.replace(training, state={"again": entry}))
        elif change == "stray":
            manifest = dataclasses.replace(manifest, training=None)
        else:
            manifest = dataclasses.replace(manifest, aliases={"other": key})
        storage.write(dataclasses.replace(checkpoint, manifest=manifest), tmp_path / "odd")
    with pytest.raises(orthoserde.FileFormatError, match="training"):
        orthoserde.inspect(tmp_path / "odd")


def test_names_that_no_file_can_hold_are_refused(tmp_path: Path) -> None:
    model = net()
    for arguments in ({"state": {"\ud800": 1}}, {"optimizer": {"\ud800": Adam(model.parameters())}}):
        with pytest.raises(ConfigError, match="valid Unicode"):
            orthoserde.save(model, tmp_path / "m", **arguments)


def test_a_load_says_what_training_state_it_was_not_asked_for(tmp_path: Path) -> None:
    saved(tmp_path / "m", state={"step": 3, "epoch": 1}, rng=True)
    found = str(orthoserde.load(net(), tmp_path / "m"))
    assert "in the file, and not asked for: optimizer (4 parameters), epoch, step, random generators" in found
    other = net()
    optimizer = Adam(other.parameters())
    found = str(orthoserde.load(other, tmp_path / "m", optimizer=optimizer, state={"step": 0}))
    assert "in the file, and not asked for: epoch, random generators" in found
    found = str(orthoserde.load(other, tmp_path / "m", optimizer=optimizer, state={"step": 0, "epoch": 0}, rng=True))
    assert "not asked for" not in found
