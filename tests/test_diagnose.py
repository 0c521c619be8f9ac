"""Traps in live models: each is sprung, shown to cost what its finding says, and found; healthy models have none."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm
from torch.optim import ASGD, SGD, Adam, AdamW, Optimizer, RMSprop
from torch.optim.swa_utils import AveragedModel

import orthoserde
from orthoserde import Finding, Severity, TrainingTrapWarning, diagnose
from orthoserde.integrations import loreft
from orthoserde.orthonormal.probe import off_orthonormal
from orthoserde.reports import Code
from orthoserde.traps import warn_of_traps
from tests.helpers import assert_unchanged, lived_in, scramble_, snapshot
from tests.integrations.toy import PATH, WIDTH, Toy, ids

pytestmark = pytest.mark.filterwarnings("error::orthoserde.TrainingTrapWarning")

MAPS = ("householder", "cayley", "matrix_exp")
PAGE = Path(__file__).parent.parent / "docs" / "how-to" / "find-traps.md"


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def codes(found: list[Finding]) -> list[tuple[str, str, Severity]]:
    return [(finding.where, finding.code, finding.severity) for finding in found]


def original_of(layer: nn.Module) -> nn.Parameter:
    return cast("nn.Parameter", cast("Any", layer).parametrizations.weight.original)


def link_of(layer: nn.Module, index: int = 0) -> Any:
    return cast("Any", layer).parametrizations.weight[index]


def weight_of(layer: nn.Module) -> Tensor:
    return cast("Tensor", layer.weight).detach()


def train(model: nn.Module, optimizer: Optimizer, steps: int = 20, width: int = 8) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(5, width)).pow(3).sum().tanh().backward()
        optimizer.step()


def off(weight: Tensor) -> float:
    wide = weight.double()
    wide = wide if wide.size(0) <= wide.size(1) else wide.mT
    return float((wide @ wide.mT - torch.eye(wide.size(0), dtype=torch.float64)).abs().max())


def householder(outputs: int = 4, **arguments: Any) -> nn.Module:
    return orthoserde.orthogonal(nn.Linear(8, outputs), orthogonal_map="householder", **arguments)


HEALTHY: dict[str, Callable[[], nn.Module]] = {
    **{
        f"torch's {name} {outputs} x 8, trivialization {base}": (
            lambda name=name, outputs=outputs, base=base: orthogonal(  # type: ignore[misc]
                nn.Linear(8, outputs), orthogonal_map=name, use_trivialization=base
            )
        )
        for name in MAPS
        for outputs in (3, 8, 20)
        for base in (True, False)
    },
    **{
        f"{form} {name} {outputs} x 8": (
            lambda name=name, outputs=outputs, form=form: orthoserde.orthogonal(  # type: ignore[misc]
                nn.Linear(8, outputs), orthogonal_map=name, structured=form == "structured"
            )
        )
        for name in MAPS
        for outputs in (3, 8, 20)
        for form in ("canonical", "structured")
    },
    "weight_norm": lambda: weight_norm(nn.Linear(8, 5)),
    "weight_norm of all": lambda: weight_norm(nn.Linear(8, 5), dim=cast("int", None)),
    "spectral_norm": lambda: spectral_norm(nn.Linear(8, 5)),
    "spectral_norm of a chain": lambda: spectral_norm(orthogonal(nn.Linear(8, 5))),
    "plain": lambda: nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU()),
    "used twice": lambda: nn.Sequential(layer := orthogonal(nn.Linear(8, 8)), nn.Tanh(), layer),
}


@pytest.mark.parametrize("optimizer", [SGD, Adam, None])
@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_model_has_no_findings(name: str, optimizer: type[SGD | Adam] | None, tmp_path: Path) -> None:
    model = HEALTHY[name]()
    made = None if optimizer is None else optimizer(model.parameters(), lr=0.05)
    assert diagnose(model, made) == []
    if made is not None:
        train(model, made)
        assert diagnose(model, made) == []
    orthoserde.save(model, tmp_path / "model")
    orthoserde.load(model, tmp_path / "model")


@pytest.mark.parametrize("structured", [True, False])
def test_a_healthy_adapter_has_no_findings(structured: bool, tmp_path: Path) -> None:
    model = Toy()
    adapter = loreft.attach(model, {PATH: loreft.LoReFT(WIDTH, 2, structured=structured)}, "f1+l1")
    optimizer = Adam(adapter.parameters(), lr=0.05)
    assert diagnose(model, optimizer) == []
    for _ in range(20):
        optimizer.zero_grad()
        model(ids()).pow(2).sum().backward()
        optimizer.step()
    assert diagnose(model, optimizer) == []
    orthoserde.save(model, tmp_path / "adapter")
    orthoserde.load(model, tmp_path / "adapter")


def test_larger_weights_in_double_and_complex_have_no_findings() -> None:
    for dtype in (torch.float64, torch.complex64, torch.complex128):
        assert diagnose(orthogonal(nn.Linear(300, 40, dtype=dtype), orthogonal_map="cayley")) == []


# --- the state of a tensor


@pytest.mark.parametrize("structured", [False, True])
@pytest.mark.parametrize(
    ("optimizer", "arguments"),
    [
        (SGD, {"lr": 0.1, "weight_decay": 1e-4}),
        (Adam, {"weight_decay": 1e-2}),
        (AdamW, {}),
        (RMSprop, {"weight_decay": 1e-2}),
        (ASGD, {"lr": 0.01}),
    ],
)
def test_weight_decay_zeroes_a_householder_weight_in_one_step(
    optimizer: Callable[..., Optimizer], arguments: dict[str, float], structured: bool
) -> None:
    model = householder(structured=structured)
    made = optimizer(model.parameters(), **arguments)
    assert codes(diagnose(model, made)) == [("weight", "weight-decay-householder", Severity.SERIOUS)]
    train(model, made, steps=1)
    assert float(weight_of(model).norm()) == 0.0
    found = diagnose(model)
    assert codes(found) == [("weight", "householder-diagonal", Severity.SERIOUS)]
    assert "4 columns of the weight" in found[0].text


def test_a_group_without_decay_is_no_trap() -> None:
    model = householder()
    groups: list[dict[str, Any]] = [
        {"params": [original_of(model)], "weight_decay": 0.0},
        {"params": [cast("Any", model).bias]},
    ]
    made = AdamW(groups)
    assert diagnose(model, made) == []
    train(model, made)
    assert off(weight_of(model)) < 1e-5


def test_weight_decay_leaves_a_frozen_weight_alone() -> None:
    model = householder()
    original_of(model).requires_grad_(False)
    made = AdamW(model.parameters())
    assert codes(diagnose(model, made)) == [("", "frozen-in-optimizer", Severity.NOTICE)]
    train(model, made)
    assert off(weight_of(model)) < 1e-5


@pytest.mark.parametrize("name", ["cayley", "matrix_exp"])
def test_weight_decay_on_other_maps_draws_the_weight_to_its_base_and_is_a_notice(name: str) -> None:
    model = orthogonal(nn.Linear(8, 4), orthogonal_map=name)
    start = weight_of(model)
    train(model, SGD(model.parameters(), lr=0.1))
    moved = float((weight_of(model) - start).norm())
    assert moved > 0.1
    made = AdamW(model.parameters(), lr=0.1, weight_decay=1.0)
    assert codes(diagnose(model, made)) == [("weight", "weight-decay-orthogonal", Severity.NOTICE)]
    for _ in range(200):
        made.zero_grad()
        torch.autograd.backward(cast("Tensor", model.weight).sum() * 0)
        made.step()
    assert float((weight_of(model) - start).norm()) < 1e-5
    assert off(weight_of(model)) < 1e-5


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_muon_loses_columns_of_a_householder_weight() -> None:
    model = orthogonal(nn.Linear(8, 4, bias=False))
    made = torch.optim.Muon(model.parameters(), lr=0.02, weight_decay=0.0)
    assert codes(diagnose(model, made)) == [("weight", "optimizer-turns-householder", Severity.SERIOUS)]
    train(model, made)
    assert off(weight_of(model)) > 0.9
    assert ("weight", "householder-diagonal", Severity.SERIOUS) in codes(diagnose(model))


def test_an_average_of_copies_loses_the_diagonal() -> None:
    model = householder()
    mean = sum(original_of(model).detach() / 12 for _ in range(12))
    with torch.no_grad():
        original_of(model).copy_(cast("Tensor", mean))
    assert float(weight_of(model).norm()) == 0.0
    assert codes(diagnose(model)) == [("weight", "householder-diagonal", Severity.SERIOUS)]


def test_a_diagonal_that_torch_still_reads_is_a_warning_alone(tmp_path: Path) -> None:
    model = householder()
    with torch.no_grad():
        original_of(model)[1, 1] = -1.25
    assert off(weight_of(model)) < 1e-5
    found = diagnose(model)
    assert codes(found) == [("weight", "householder-diagonal", Severity.WARNING)]
    assert "1 of 4 diagonal entries of its original are not +-1 (-1.25)" in found[0].text
    orthoserde.save(model, tmp_path / "model")  # which warns of the serious ones alone


@pytest.mark.parametrize("structured", [False, True])
@pytest.mark.parametrize("outputs", [3, 8, 20])
@pytest.mark.parametrize("name", MAPS)
def test_a_base_off_the_constraint_is_found(name: str, outputs: int, structured: bool) -> None:
    model = orthoserde.orthogonal(nn.Linear(8, outputs), orthogonal_map=name, structured=structured)
    kept = "columns" if structured else "base"
    setattr(link_of(model), kept, getattr(link_of(model), kept).bfloat16().float())
    if structured:
        link_of(model).settle()
    assert off(weight_of(model)) > 1e-4
    assert codes(diagnose(model)) == [("weight", "base-off-constraint", Severity.SERIOUS)]


def test_the_base_that_pyrefts_loader_leaves_is_found_though_the_weight_looks_right() -> None:
    model, other = (orthogonal(nn.Linear(8, 20)) for _ in range(2))
    link_of(model).base[:, :8] = link_of(other).base[:, :8]
    assert off(weight_of(model)) < 1e-5
    assert codes(diagnose(model)) == [("weight", "base-off-constraint", Severity.SERIOUS)]
    train(model, SGD(model.parameters(), lr=0.1), steps=3)
    assert off(weight_of(model)) > 1e-3


def test_an_average_over_runs_is_off_the_constraint() -> None:
    models = [orthogonal(nn.Linear(8, 20)) for _ in range(2)]
    link_of(models[0]).base = (link_of(models[0]).base + link_of(models[1]).base) / 2
    assert off(weight_of(models[0])) > 0.1
    assert codes(diagnose(models[0])) == [("weight", "base-off-constraint", Severity.SERIOUS)]


@pytest.mark.parametrize("use_buffers", [False, True])
def test_an_averaged_model_of_one_run_is_on_the_constraint(use_buffers: bool) -> None:
    model = householder()
    made, averaged = Adam(model.parameters(), lr=0.1), AveragedModel(model, use_buffers=use_buffers)
    for _ in range(20):
        train(model, made, steps=1)
        averaged.update_parameters(model)
    assert off(weight_of(averaged.module)) < 1e-5
    assert codes(diagnose(averaged)) == [("module.weight", "cached-copy", Severity.NOTICE)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_base_that_torch_left_out_is_found(dtype: torch.dtype) -> None:
    try:
        model = orthogonal(nn.Linear(8, 4, dtype=dtype))
    except RuntimeError:  # torch 2.3 says so at once; what it would leave is made by hand
        model = orthogonal(nn.Linear(8, 4)).to(dtype)
        vars(model.get_submodule("parametrizations.weight.0"))["_buffers"]["base"] = None
    with pytest.raises(Exception, match=r"."):
        _ = model.weight
    assert codes(diagnose(model)) == [
        ("weight", "base-missing", Severity.SERIOUS),
        ("weight", "half-precision-orthogonal", Severity.SERIOUS),
    ]


def test_a_second_orthogonal_on_one_weight_has_no_base() -> None:
    model = orthogonal(orthogonal(nn.Linear(8, 4)))
    with pytest.raises(TypeError):
        _ = model.weight
    assert codes(diagnose(model)) == [("weight", "base-missing", Severity.SERIOUS)]


def test_structured_columns_that_are_missing_are_found() -> None:
    model = householder(structured=True)
    link_of(model).columns = None
    with pytest.raises(RuntimeError):
        _ = model.weight
    assert codes(diagnose(model)) == [("weight", "base-missing", Severity.SERIOUS)]


@pytest.mark.parametrize("structured", [False, True])
@pytest.mark.parametrize("name", MAPS)
def test_half_precision_is_found_and_a_cast_back_leaves_its_rounding(name: str, structured: bool) -> None:
    model = orthoserde.orthogonal(nn.Linear(8, 4), orthogonal_map=name, structured=structured).bfloat16()
    assert codes(diagnose(model)) == [("weight", "half-precision-orthogonal", Severity.SERIOUS)]
    model.float()
    assert off(weight_of(model)) > 1e-4
    assert codes(diagnose(model)) == [("weight", "base-off-constraint", Severity.SERIOUS)]


def test_nan_is_found_where_it_is() -> None:
    model = nn.Sequential(nn.Linear(8, 8), orthogonal(nn.Linear(8, 4)), nn.BatchNorm1d(4))
    with torch.no_grad():
        cast("Any", model[0]).bias[1] = float("nan")
        original_of(model[1])[0, 5] = float("inf")
        cast("Any", model[2]).running_mean[0] = float("nan")
    assert codes(diagnose(model)) == [
        ("0.bias", "not-finite", Severity.SERIOUS),
        ("1.parametrizations.weight.original", "not-finite", Severity.SERIOUS),
        ("2.running_mean", "not-finite", Severity.SERIOUS),
    ]


def test_infinity_has_its_place_in_a_mask() -> None:
    model = nn.Linear(8, 4)
    model.register_buffer("mask", torch.full((4, 4), float("-inf")).triu(1))
    assert diagnose(model) == []


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.bool])
def test_every_dtype_is_looked_at(dtype: torch.dtype) -> None:
    model = nn.Module()
    model.register_buffer("kept", torch.zeros(3).to(dtype))
    assert diagnose(model) == []
    if dtype.is_floating_point:
        model.register_buffer("kept", torch.full((3,), float("nan")).to(dtype))
        assert codes(diagnose(model)) == [("kept", "not-finite", Severity.SERIOUS)]


@pytest.mark.parametrize("normalize", [weight_norm, spectral_norm])
def test_a_zero_weight_under_a_norm_is_nan(normalize: Callable[[nn.Module], nn.Module]) -> None:
    layer = nn.Linear(8, 4)
    nn.init.zeros_(layer.weight)
    model = normalize(layer).eval()
    assert weight_of(model).isnan().any()
    assert codes(diagnose(model)) == [("weight", "weight-not-finite", Severity.SERIOUS)]


def test_a_spectral_norm_whose_vectors_belong_to_another_weight_is_found() -> None:
    model, other = (spectral_norm(nn.Linear(64, 64)).eval() for _ in range(2))
    link_of(model)._u, link_of(model)._v = link_of(other)._u, link_of(other)._v
    assert float(torch.linalg.matrix_norm(weight_of(model), 2)) > 2
    assert codes(diagnose(model)) == [("weight", "weight-off-constraint", Severity.SERIOUS)]


def test_an_overflowing_original_is_found_in_the_weight() -> None:
    model = orthogonal(nn.Linear(8, 4), orthogonal_map="matrix_exp")
    with torch.no_grad():
        original_of(model).mul_(1e30).add_(1e30)
    assert not off(weight_of(model)) < 1e-3
    assert {finding.severity for finding in diagnose(model)} == {Severity.SERIOUS}


# --- what is shared


def test_an_original_that_is_tied_to_a_plain_weight_is_found() -> None:
    embedding, head = nn.Embedding(8, 4), nn.Linear(4, 8)
    head.weight = embedding.weight
    model = nn.ModuleDict({"embedding": embedding, "head": orthogonal(head)})
    assert torch.equal(embedding.weight[:4], -torch.eye(4))
    (found,) = diagnose(model)
    assert codes([found]) == [("head.weight", "tied-original", Severity.SERIOUS)]
    assert "embedding.weight" in found.text


def test_a_tied_original_of_spectral_norm_is_a_warning() -> None:
    embedding, head = nn.Embedding(8, 4), nn.Linear(4, 8)
    head.weight = embedding.weight
    model = nn.ModuleDict({"embedding": embedding, "head": spectral_norm(head)})
    assert codes(diagnose(model)) == [("head.weight", "tied-original", Severity.WARNING)]


def test_a_copy_hands_out_the_weight_of_another_inside_of_cached() -> None:
    student = householder()
    teacher = copy.deepcopy(student)
    with torch.no_grad():
        original_of(teacher)[:, 5] += 1.0
    assert not torch.equal(weight_of(student), weight_of(teacher))
    model = nn.ModuleDict({"student": student, "teacher": teacher})
    assert codes(diagnose(model)) == [("teacher.weight", "cached-copy", Severity.NOTICE)]
    with parametrize.cached():
        assert torch.equal(weight_of(student), weight_of(teacher))
        assert codes(diagnose(model)) == [("teacher.weight", "cached-copy", Severity.SERIOUS)]


@pytest.mark.parametrize("name", MAPS)
def test_autocast_takes_torchs_form_off_the_constraint_and_not_ours(name: str) -> None:
    for structured in (False, True):
        model = orthoserde.orthogonal(nn.Linear(64, 16), orthogonal_map=name, structured=structured)
        train(model, SGD(model.parameters(), lr=0.1), width=64)
        with torch.autocast("cpu", torch.bfloat16):
            weight, found = weight_of(model), diagnose(model)
        expected = [] if structured else [("weight", "autocast-orthogonal", Severity.WARNING)]
        assert codes(found) == expected
        assert (off(weight) > 1e-4) is not structured
        assert diagnose(model) == []


# --- optimizers


def test_an_optimizer_built_before_weight_norm_never_trains_the_weight() -> None:
    layer = nn.Linear(8, 4)
    made = SGD(layer.parameters(), lr=0.1)
    model = weight_norm(layer)
    found = diagnose(model, made)
    assert codes(found) == [
        ("weight", "optimizer-predates-parametrization", Severity.SERIOUS),
        ("", "not-in-optimizer", Severity.NOTICE),
    ]
    before = weight_of(model)
    train(model, made)
    assert torch.equal(weight_of(model), before)


def test_an_optimizer_built_before_orthogonal_saves_in_another_order() -> None:
    layer = nn.Linear(4, 4)
    early = Adam(layer.parameters())
    model = orthogonal(layer)
    assert codes(diagnose(model, early)) == [("weight", "optimizer-predates-parametrization", Severity.WARNING)]
    train(model, early, width=4)
    late = Adam(model.parameters())
    assert diagnose(model, late) == []
    late.load_state_dict(early.state_dict())
    assert late.state[cast("Any", model).bias]["exp_avg"].shape == (4, 4)
    assert [code for _, code, _ in codes(diagnose(model, late))] == ["optimizer-state-shape"] * 2


def test_parameters_of_elsewhere_are_orphans() -> None:
    model = householder()
    made = SGD([*model.parameters(), nn.Parameter(torch.zeros(3, 7))], lr=0.1)
    (found,) = diagnose(model, made)
    assert codes([found]) == [("", "optimizer-orphan", Severity.WARNING)]
    assert "[3, 7]" in found.text


def test_parameters_that_nobody_trains_are_noticed() -> None:
    model = householder()
    assert codes(diagnose(model, SGD([original_of(model)], lr=0.1))) == [("", "not-in-optimizer", Severity.NOTICE)]
    cast("Any", model).bias.requires_grad_(False)
    assert diagnose(model, SGD([original_of(model)], lr=0.1)) == []


def test_a_frozen_original_with_a_gradient_goes_on_moving() -> None:
    model = orthogonal(nn.Linear(8, 4))
    made = SGD(model.parameters(), lr=0.1)
    model(torch.randn(5, 8)).square().sum().backward()
    original = original_of(model).requires_grad_(False)
    before = original.clone()
    assert codes(diagnose(model, made)) == [("", "frozen-in-optimizer", Severity.WARNING)]
    made.step()
    assert not torch.equal(original, before)
    made.zero_grad()
    assert codes(diagnose(model, made)) == [("", "frozen-in-optimizer", Severity.NOTICE)]
    before = original.clone()
    made.step()
    assert torch.equal(original, before)


def test_a_parameter_in_two_optimizers_is_found_under_their_names() -> None:
    model = householder()
    first, second = SGD(model.parameters(), lr=0.1), SGD([original_of(model)], lr=0.1)
    (found,) = diagnose(model, {"all": first, "rotations": second})
    assert found.code == "held-twice"
    assert found.where == "parametrizations.weight.original"
    assert "'all'" in found.text
    assert "'rotations'" in found.text
    assert diagnose(model, [first, first]) == []


def test_moments_that_are_not_finite_are_found() -> None:
    model = householder()
    made = Adam(model.parameters())
    train(model, made)
    made.state[original_of(model)]["exp_avg"][0, 0] = float("nan")
    assert codes(diagnose(model, made)) == [
        ("parametrizations.weight.original", "optimizer-state-not-finite", Severity.SERIOUS)
    ]
    train(model, made, steps=1)
    assert original_of(model).isnan().any()


class Duck:
    """An optimizer that derives from nothing of torch, as those of some libraries do."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    def __getattr__(self, name: str) -> Any:
        if name in ("param_groups", "state", "state_dict", "load_state_dict", "step", "zero_grad"):
            return getattr(self.optimizer, name)
        raise AttributeError(name)


def accelerated(optimizer: Optimizer) -> Any:
    """In a class that is called as accelerate's wrapper is."""
    names = {"__module__": "accelerate.optimizer", "__qualname__": "AcceleratedOptimizer"}
    return type("AcceleratedOptimizer", (Duck,), names)(optimizer)


@pytest.mark.parametrize(
    "decay", [np.float32(0.01), np.float64(0.01), torch.tensor(0.01), torch.tensor([0.01])], ids=repr
)
def test_a_decay_is_found_whatever_number_it_is(decay: Any) -> None:
    layer = orthogonal(nn.Linear(4, 4), orthogonal_map="householder")
    optimizer = torch.optim.AdamW(layer.parameters(), weight_decay=0.01)
    optimizer.param_groups[0]["weight_decay"] = decay
    assert "weight-decay-householder" in [finding.code for finding in diagnose(layer, optimizer)]
    for nothing in (torch.zeros(3), np.array([0.1, 0.2])):  # no number, and no decay that torch would take
        optimizer.param_groups[0]["weight_decay"] = nothing
        assert diagnose(layer, optimizer) == []


@pytest.mark.parametrize(("wrap", "name"), [(Duck, "Duck"), (accelerated, "AdamW")])
def test_what_a_save_takes_for_an_optimizer_a_diagnosis_takes_too(
    wrap: Callable[[Optimizer], Any], name: str, tmp_path: Path
) -> None:
    model = householder()
    made = wrap(AdamW(model.parameters()))
    for given, label in ((made, name), ([made], f"optimizer 0 ({name})"), ({"all": made}, "optimizer 'all'")):
        (found,) = diagnose(model, given)
        assert found.code == "weight-decay-householder"
        assert found.text.startswith(f"{label} decays its original (weight_decay 0.01")
    with pytest.warns(TrainingTrapWarning, match=f"SERIOUS weight: {name} decays its original"):
        orthoserde.save(model, tmp_path / "model", optimizer=made)
    with pytest.warns(TrainingTrapWarning, match=f"SERIOUS weight: {name} decays its original"):
        orthoserde.load(model, tmp_path / "model", optimizer=made)


def test_a_wrapper_of_what_is_no_trap_is_saved_loaded_and_not_warned_of(tmp_path: Path) -> None:
    model = householder()
    made: Any = Duck(Adam(model.parameters()))
    train(model, made)
    assert diagnose(model, made) == []
    orthoserde.save(model, tmp_path / "model", optimizer=made)
    again: Any = Duck(Adam(model.parameters()))
    orthoserde.load(model, tmp_path / "model", optimizer=again)
    original = original_of(model)
    assert torch.equal(again.state[original]["exp_avg"], made.state[original]["exp_avg"])


def test_muon_in_a_wrapper_of_accelerate_is_still_muon() -> None:
    model = orthogonal(nn.Linear(8, 4, bias=False))
    muon = type("Muon", (SGD,), {})(model.parameters(), lr=0.02)
    assert codes(diagnose(model, accelerated(muon))) == [("weight", "optimizer-turns-householder", Severity.SERIOUS)]


@pytest.mark.parametrize("wrong", [3, "adam", [1], {"a": None}, True])
def test_what_is_no_optimizer_is_refused(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"expected a torch\.optim\.Optimizer"):
        diagnose(householder(), wrong)


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(TypeError, match=r"expected an nn\.Module"):
        diagnose(cast("nn.Module", 3))


# --- the whole


def test_meta_tensors_are_named_and_not_looked_into() -> None:
    with torch.device("meta"):
        model = nn.Sequential(orthogonal(nn.Linear(8, 4)), weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4))
    assert link_of(model[0]).base is None  # which a load makes
    assert codes(diagnose(model)) == [
        ("0.weight", "not-measured", Severity.NOTICE),
        ("1.weight", "not-measured", Severity.NOTICE),
    ]


@pytest.mark.parametrize(("text", "said"), [("", "here: RuntimeError"), ("no", "here: RuntimeError: no")])
def test_an_error_is_named_once(text: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError(text)

    monkeypatch.setattr("orthoserde.traps.state.computed", fail)
    (finding,) = diagnose(orthogonal(nn.Linear(8, 4)))
    assert finding.text == f"its weight cannot be computed {said}"


class Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


@pytest.mark.parametrize("how", ["pruned", "parametrized"])
@pytest.mark.parametrize(
    ("constrain", "name"), [(orthogonal, "original"), (spectral_norm, "original"), (weight_norm, "original1")]
)
def test_of_an_original_that_is_computed_itself_it_says_so_and_what_a_save_and_a_load_do(
    constrain: Callable[[nn.Module], nn.Module], name: str, how: str, tmp_path: Path
) -> None:
    model = nn.Sequential(constrain(nn.Linear(8, 8)))
    orthoserde.save(model, tmp_path / "whole")
    chain = model.get_submodule("0.parametrizations.weight")
    if how == "pruned":
        prune.random_unstructured(chain, name, 1)  # type: ignore[no-untyped-call]  # torch has no types for it
    else:
        parametrize.register_parametrization(chain, name, Twice())
    assert weight_of(model[0]).isfinite().all()
    (finding,) = diagnose(model)
    assert codes([finding]) == [("0.weight", "not-measured", Severity.NOTICE)]
    assert finding.text == (
        f"its {name} is no registered tensor, being parametrized or pruned itself, so the weight was not looked at, "
        "and a save or load refuses the model"
    )
    for refused in (orthoserde.save, orthoserde.load):
        with pytest.raises(orthoserde.OrthoserdeError, match=f"{name}: this original is no registered tensor"):
            refused(model, tmp_path / "whole")
    assert "prune.remove" in finding.remedy
    assert "remove_parametrizations" in finding.remedy
    if how == "pruned":
        prune.remove(chain, name)  # type: ignore[no-untyped-call]  # torch has no types for it
    else:
        parametrize.remove_parametrizations(chain, name)
    assert diagnose(model) == []
    orthoserde.save(model, tmp_path / "again")


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_tensors_of_every_sort_are_let_be() -> None:
    lazy = nn.LazyLinear(3)
    model = nn.Sequential(lazy, orthogonal(nn.Linear(8, 4)))
    model.register_buffer("sparse", torch.eye(3).to_sparse())
    model.register_buffer("none", None)
    assert diagnose(model, SGD(model.parameters(), lr=0.1)) == []
    assert codes(diagnose(model, SGD([*lazy.parameters()], lr=0.1))) == [("", "not-in-optimizer", Severity.NOTICE)]


def test_nothing_is_disturbed(tmp_path: Path) -> None:
    model = lived_in(
        scramble_(
            nn.Sequential(
                spectral_norm(nn.Linear(8, 8)), orthogonal(nn.Linear(8, 4)), householder(structured=True), nn.Dropout()
            )
        )
    )
    made = AdamW(model.parameters())
    before = snapshot(model)
    assert diagnose(model, made)
    with pytest.warns(TrainingTrapWarning):
        warn_of_traps(model, made)
    assert_unchanged(model, before)
    assert not parametrize._cache
    assert not made.state


def test_findings_come_worst_first_and_read_well() -> None:
    model = nn.Sequential(orthogonal(nn.Linear(8, 8), orthogonal_map="cayley"), householder())
    found = diagnose(model, AdamW(model.parameters()))
    assert codes(found) == [
        ("1.weight", "weight-decay-householder", Severity.SERIOUS),
        ("0.weight", "weight-decay-orthogonal", Severity.NOTICE),
    ]
    assert str(found[0]).startswith("SERIOUS 1.weight: AdamW decays its original (weight_decay 0.01, lr 0.001)")
    assert str(found[0]).endswith(
        "Remedy: put its original into a parameter group with weight_decay=0; a load of a run that was saved without "
        "that group takes the name of the weight in reset="
    )
    assert "\n" not in str(found[0])


def test_a_name_cannot_write_to_the_terminal() -> None:
    assert "\x1b" not in str(Finding("a\x1b[2J", Severity.NOTICE, "not-measured", "text", "remedy"))


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise AssertionError("a class of the user's is not run")


def test_classes_of_the_user_are_not_run() -> None:
    model = nn.Linear(8, 4)
    parametrize.register_parametrization(model, "weight", Noisy(), unsafe=True)
    assert diagnose(model) == []


@pytest.mark.parametrize("n", [1, 2, 7, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
def test_a_probe_tells_rounding_from_damage(n: int, dtype: torch.dtype) -> None:
    for k in {1, n}:
        matrix = torch.linalg.qr(torch.randn(2, n, k, dtype=dtype)).Q
        assert off_orthonormal(matrix) is None
        matrix[1] *= 1.001
        found = off_orthonormal(matrix)
        assert found is not None
        assert 1e-4 / n < found < 1e-2
        matrix[0, 0, 0] = float("nan")
        assert str(off_orthonormal(matrix)) == "nan"
    assert off_orthonormal(torch.zeros(0, 0)) is None


def test_a_probe_finds_a_small_damage_that_is_everywhere() -> None:
    matrix = torch.linalg.qr(torch.randn(300, 300)).Q
    assert off_orthonormal(matrix * (1 + 5 * 300**0.5 * torch.finfo(torch.float32).eps)) is None
    assert off_orthonormal(matrix * (1 + 25 * 300**0.5 * torch.finfo(torch.float32).eps)) is not None


# --- what a save and a load say


def trapped() -> dict[str, nn.Module]:
    decayed = householder()
    with torch.no_grad():
        original_of(decayed).mul_(0.999)
    poisoned = householder()
    with torch.no_grad():
        original_of(poisoned)[2, 2] = float("nan")
    return {
        "decayed": decayed,
        "poisoned": poisoned,
        "half": householder(structured=True).bfloat16(),
        "second": orthogonal(orthogonal(nn.Linear(8, 4))),
    }


@pytest.mark.parametrize("name", ["decayed", "poisoned", "half", "second"])
def test_a_save_and_a_load_warn_of_serious_traps_at_the_line_of_the_caller(name: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 8), trapped()[name])
    with pytest.warns(TrainingTrapWarning, match=r"(?s)will not train as it should:.*SERIOUS 1\.weight: ") as caught:
        orthoserde.save(model, tmp_path / "model")
    assert [Path(each.filename).name for each in caught] == ["test_diagnose.py"]
    with pytest.warns(TrainingTrapWarning) as caught:
        orthoserde.load(model, tmp_path / "model")
    assert [Path(each.filename).name for each in caught] == ["test_diagnose.py"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TrainingTrapWarning)
        orthoserde.save(model, tmp_path / "model")


def test_a_load_warns_of_what_was_loaded(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TrainingTrapWarning)
        orthoserde.save(trapped()["decayed"], tmp_path / "decayed")
    orthoserde.save(householder(), tmp_path / "sound")
    model = householder()
    with pytest.warns(TrainingTrapWarning):
        orthoserde.load(model, tmp_path / "decayed")
    orthoserde.load(model, tmp_path / "sound")


def test_a_warning_knows_the_optimizer_and_says_what_is_serious_alone() -> None:
    model = nn.Sequential(householder(), orthogonal(nn.Linear(8, 4), orthogonal_map="cayley"))
    warn_of_traps(model, SGD(model.parameters(), lr=0.1))
    with pytest.warns(TrainingTrapWarning, match="weight-decay-householder") as caught:
        warn_of_traps(model, {"all": AdamW(model.parameters())})
    assert "weight-decay-orthogonal" not in str(caught[0].message)


def test_a_save_under_an_error_filter_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(TrainingTrapWarning):
        orthoserde.save(trapped()["decayed"], tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_warning_names_twenty_and_counts_the_others(tmp_path: Path) -> None:
    model = nn.Sequential(*(trapped()["decayed"] for _ in range(23)))
    with pytest.warns(TrainingTrapWarning, match="and 3 more"):
        orthoserde.save(model, tmp_path / "model")


def test_a_glance_evaluates_nothing_and_looks_at_no_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> Any:
        raise AssertionError("too expensive for a save")

    monkeypatch.setattr("orthoserde.traps.state.off_orthonormal", refuse)
    monkeypatch.setattr("orthoserde.traps.state.computed", refuse)
    model = nn.Sequential(orthogonal(nn.Linear(8, 20)), householder(structured=True))
    orthoserde.save(model, tmp_path / "model")
    with pytest.raises(AssertionError, match="too expensive"):
        diagnose(model)


# --- the page


def test_the_page_explains_every_code() -> None:
    rows = [line.split("|")[1:-1] for line in PAGE.read_text("utf-8").splitlines() if line.startswith("| `")]
    assert sorted(row[0].strip(" `") for row in rows) == sorted(get_args(Code))
    assert all(len(row) == 4 and all(cell.strip() for cell in row) for row in rows)


@pytest.mark.parametrize("wait", [None, True, False])
def test_a_save_with_its_optimizer_warns_of_what_that_will_do(wait: bool | None, tmp_path: Path) -> None:
    model = householder()
    decaying = AdamW(model.parameters())
    checkpoints = orthoserde.Checkpoints(tmp_path / "folder")
    save = functools.partial(orthoserde.save, model, tmp_path / "m")
    if wait is not None:
        save = functools.partial(checkpoints.save, 1, model, wait=wait)
    said = r"SERIOUS weight: AdamW decays its original \(weight_decay 0.01"
    with pytest.warns(TrainingTrapWarning, match=said) as caught:
        save(optimizer=decaying)
    assert [Path(each.filename).name for each in caught] == ["test_diagnose.py"]
    if wait is None:
        with pytest.warns(TrainingTrapWarning, match=said):
            orthoserde.load(model, tmp_path / "m", optimizer=decaying)
    checkpoints.close()


@pytest.mark.parametrize("theirs", [True, False])
@pytest.mark.parametrize("structured", [False, True])
def test_a_load_warns_of_a_base_that_a_file_has_in_half_precision(
    tmp_path: Path, theirs: bool, structured: bool
) -> None:
    model = orthoserde.orthogonal(nn.Linear(16, 8), "weight", "cayley", structured=structured)
    half = {key: value.contiguous().half() for key, value in model.state_dict().items()}
    if theirs:
        save_file(half, tmp_path / "m")
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", orthoserde.TrainingTrapWarning)
            orthoserde.save(copy.deepcopy(model).half(), tmp_path / "m")
    name = "columns" if structured else "base"
    other = orthoserde.orthogonal(nn.Linear(16, 8), "weight", "cayley", structured=structured)
    with pytest.warns(
        orthoserde.TrainingTrapWarning, match=rf"weight\.0\.{name}.* in float16, which has rounded it off"
    ):
        orthoserde.load(other, tmp_path / "m")
    assert "base-off-constraint" in {finding.code for finding in diagnose(other)} or structured
    if not structured:  # what the warning advises
        orthoserde.save(other, tmp_path / "other")
        orthoserde.convert(tmp_path / "other", tmp_path / "baked", "baked")
        with pytest.warns(orthoserde.LegacyCheckpointWarning):
            orthoserde.load(other, tmp_path / "baked", legacy="project")
        assert diagnose(other) == []
