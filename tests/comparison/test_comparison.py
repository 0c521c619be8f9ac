"""What differs between two checkpoints, and what does not though it is stored in another way."""

from __future__ import annotations

import copy
import math
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

import orthoserde
from orthoserde import Registry, comparison
from orthoserde.comparison import DiffReport
from orthoserde.comparison.distances import Distance
from orthoserde.opening import open_checkpoint
from orthoserde.transforms.columns import ColumnsOfBase
from tests.helpers import scramble_


def compare(a: Path, b: Path, tolerance: float = 0.0) -> DiffReport:
    with open_checkpoint(a) as one, open_checkpoint(b) as two:
        return comparison.diff(one, two, Registry(), tolerance=tolerance)


def make() -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(
        orthogonal(nn.Linear(6, 4), orthogonal_map="cayley"),
        weight_norm(nn.Linear(4, 4)),
        spectral_norm(nn.Linear(4, 3)),
        nn.BatchNorm1d(3),
    )
    return model


@pytest.fixture
def a(tmp_path: Path) -> Path:
    orthoserde.save(make(), tmp_path / "a", metadata={"run": "1"})
    return tmp_path / "a"


def test_a_file_is_the_same_as_itself_and_as_another_save(a: Path, tmp_path: Path) -> None:
    orthoserde.save(make(), tmp_path / "b", metadata={"run": "1"})
    report = compare(a, tmp_path / "b")
    assert report.same
    assert report.identical == 11
    assert not report.tensors
    assert not report.notes


def test_distances_are_those_of_the_computed_tensors(a: Path, tmp_path: Path) -> None:
    model, before = make(), make()
    with torch.no_grad():
        model[0].parametrizations.weight.original.add_(0.1)
        model[3].weight[0] = 3.0
    orthoserde.save(model, tmp_path / "b", metadata={"run": "1"})
    report = compare(a, tmp_path / "b")
    assert not report.same
    assert set(report.tensors) == {"0.weight", "3.weight"}
    weight, plain = report.tensors["0.weight"], report.tensors["3.weight"]
    assert set(weight.state) == {"original"}
    expected = (model[0].weight - before[0].weight).detach()
    assert weight.values is not None
    assert weight.values.largest == pytest.approx(float(expected.abs().max()), rel=1e-5)
    assert weight.values.relative == pytest.approx(float(expected.norm()) / 2, rel=1e-5)
    assert weight.manifold is not None
    assert weight.manifold.measure == "principal angles"
    assert 0 < weight.manifold.length < 2
    assert plain.values == Distance(identical=False, largest=2.0, relative=2 / math.sqrt(3))
    assert plain.manifold is None


def test_another_base_for_the_same_weight_differs_in_state_alone(a: Path, tmp_path: Path) -> None:
    model = make()
    orthoserde.canonicalize_(model, optimizer=False)
    orthoserde.save(model, tmp_path / "b", base="dense", metadata={"run": "1"})
    difference = compare(a, tmp_path / "b").tensors["0.weight"]
    assert set(difference.state) == {"0.base"}
    assert difference.values is not None
    assert difference.values.identical
    assert not difference.within(0.0)


def test_configuration_differs_by_setting(tmp_path: Path) -> None:
    for name, dim in (("a", 0), ("b", 1)):
        torch.manual_seed(0)
        orthoserde.save(spectral_norm(nn.Linear(4, 4), dim=dim), tmp_path / name)
    difference = compare(tmp_path / "a", tmp_path / "b").tensors["weight"]
    assert difference.settings == {"0.dim": (0, 1)}


def test_a_base_as_columns_and_a_whole_one_are_the_same(tmp_path: Path) -> None:
    model = orthoserde.orthogonal(nn.Linear(9, 3))
    orthoserde.save(model, tmp_path / "a", base="compact")
    orthoserde.save(model, tmp_path / "b", base="dense")
    report = compare(tmp_path / "a", tmp_path / "b")
    assert report.same
    assert "stored as columns" in report.notes[0]


def test_torchs_form_and_the_structured_one_are_the_same_state(tmp_path: Path) -> None:
    structured = orthoserde.orthogonal(nn.Linear(9, 3), structured=True)
    orthoserde.save(structured, tmp_path / "a")
    torchs = orthogonal(nn.Linear(9, 3))
    orthoserde.load(torchs, tmp_path / "a")
    orthoserde.save(torchs, tmp_path / "b")
    report = compare(tmp_path / "a", tmp_path / "b")
    assert report.same
    assert any("other kinds" in note for note in report.notes)


def test_a_parametrized_tensor_is_compared_with_a_plain_one(a: Path, tmp_path: Path) -> None:
    baked = make()
    orthoserde.bake_(baked)
    orthoserde.save(baked, tmp_path / "b", metadata={"run": "1"})
    report = compare(a, tmp_path / "b")
    assert not report.same
    assert {name: each.kinds for name, each in report.tensors.items()} == {
        "0.weight": ("torch>orthogonal", "plain"),
        "1.weight": ("torch>weight_norm", "plain"),
        "2.weight": ("torch>spectral_norm", "plain"),
    }
    assert all(each.values is not None and each.values.identical for each in report.tensors.values())
    manifold = report.tensors["0.weight"].manifold
    assert manifold is not None
    assert manifold.length < 1e-6


def test_a_state_dict_borrows_the_configuration(a: Path, tmp_path: Path) -> None:
    model = make()
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, tmp_path / "b.safetensors")
    report = compare(a, tmp_path / "b.safetensors")
    assert report.same
    assert report.notes[0].startswith("b does not say how its tensors are parametrized; those that have the names of")
    scramble_(model)
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, tmp_path / "b.safetensors")
    for report in (compare(a, tmp_path / "b.safetensors"), compare(tmp_path / "b.safetensors", a)):
        assert set(report.tensors["1.weight"].state) == {"original0", "original1"}
        assert report.tensors["1.weight"].values is not None


def test_keys_are_named_as_they_stand_in_the_file(a: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    old: Any = nn.ModuleDict({"0": nn.utils.weight_norm(nn.Linear(6, 4)), "x": nn.utils.weight_norm(nn.Linear(4, 4))})
    save_file(old.state_dict(), tmp_path / "old")
    report = compare(a, tmp_path / "old")
    assert set(report.only[1]) == {"x.bias", "0.weight_g", "0.weight_v", "x.weight_g", "x.weight_v"}
    with torch.no_grad():
        old["x"].weight_g.add_(1)
    save_file(old.state_dict(), tmp_path / "older")
    assert list(compare(tmp_path / "old", tmp_path / "older").tensors) == ["x.weight_g"]


def test_the_model_alone_is_compared(a: Path, tmp_path: Path) -> None:
    other = trained(tmp_path / "b")
    orthoserde.save(make(), tmp_path / "c", metadata={"run": "2"}, state={"step": 1})
    assert compare(a, tmp_path / "c").differs_in == ("metadata", "training")
    assert compare(a, tmp_path / "c").verdict == "different: metadata, training state; tensors the same"
    with open_checkpoint(a) as one, open_checkpoint(tmp_path / "c") as two, open_checkpoint(other) as three:
        report = comparison.diff(one, two, Registry(), model_only=True)
        assert (report.same, report.verdict) == (True, "the same")
        report = comparison.diff(one, three, Registry(), model_only=True)
        assert (report.same, report.verdict) == (False, "different: tensors")


def test_shapes_dtypes_and_what_one_alone_has(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(2), "y": torch.zeros(3), "z": torch.zeros(1)}, tmp_path / "a")
    save_file({"x": torch.zeros(2).bfloat16(), "y": torch.zeros(4), "w": torch.zeros(1)}, tmp_path / "b")
    report = compare(tmp_path / "a", tmp_path / "b", tolerance=1.0)
    assert report.only == (("z",), ("w",))
    assert report.tensors["x"].dtypes == ("float32", "bfloat16")
    assert report.tensors["y"].not_compared == "the shapes differ"
    assert not report.same


def test_a_tolerance_is_for_values_alone(tmp_path: Path) -> None:
    save_file({"x": torch.ones(4)}, tmp_path / "a")
    save_file({"x": torch.ones(4) * 1.01}, tmp_path / "b")
    assert not compare(tmp_path / "a", tmp_path / "b").same
    assert not compare(tmp_path / "a", tmp_path / "b", tolerance=0.009).same
    assert compare(tmp_path / "a", tmp_path / "b", tolerance=0.011).same
    save_file({"x": torch.full((4,), math.nan)}, tmp_path / "b")
    assert not compare(tmp_path / "a", tmp_path / "b", tolerance=math.inf).same


def test_a_buffer_and_a_frozen_parameter_are_not_the_same_as_a_parameter(tmp_path: Path) -> None:
    parts = {"a": nn.Linear(2, 2), "frozen": nn.Linear(2, 2), "buffer": nn.Linear(2, 2)}
    for part in parts.values():
        part.load_state_dict(parts["a"].state_dict())
    parts["frozen"].bias.requires_grad_(False)
    bias = parts["buffer"].bias.detach()
    del parts["buffer"].bias
    parts["buffer"].register_buffer("bias", bias)
    for name, part in parts.items():
        orthoserde.save(part, tmp_path / name)
    expected = {
        "frozen": {"requires_grad": (True, False)},
        "buffer": {"parameter": (True, False), "requires_grad": (True, False)},
    }
    for name, settings in expected.items():
        report = compare(tmp_path / "a", tmp_path / name, tolerance=1.0)
        assert report.differs_in == ("tensors",)
        assert {key: each.settings for key, each in report.tensors.items()} == {"bias": settings}
    save_file(dict(parts["a"].state_dict()), tmp_path / "plain")
    assert compare(tmp_path / "a", tmp_path / "plain").same


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint64], ids=str)
def test_integers_that_double_precision_takes_for_one_are_not_the_same(dtype: torch.dtype, tmp_path: Path) -> None:
    for name, number in (("a", 2**60), ("b", 2**60 + 1)):
        count = torch.tensor([number], dtype=dtype)
        orthoserde.save(Counting(count), tmp_path / name, state={"count": count})
    report = compare(tmp_path / "a", tmp_path / "b")
    assert report.differs_in == ("tensors", "training")
    assert compare(tmp_path / "a", tmp_path / "b", tolerance=1e-12).same


class Counting(nn.Module):
    """A buffer, and nothing else."""

    def __init__(self, count: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("count", count)


def test_training_state_of_another_dtype_is_not_the_same(tmp_path: Path) -> None:
    for name, dtype in (("a", torch.float32), ("b", torch.bfloat16)):
        orthoserde.save(nn.Identity(), tmp_path / name, state={"average": torch.ones(2, dtype=dtype)})
    report = compare(tmp_path / "a", tmp_path / "b", tolerance=1.0)
    assert report.training == {"average": ("float32 of shape [2]", "bfloat16 of shape [2]")}
    assert not report.same


def trained(path: Path, change: Callable[[torch.optim.Optimizer], None] = lambda optimizer: None) -> Path:
    model = make()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    model(torch.ones(5, 6)).square().sum().backward()
    optimizer.step()
    change(optimizer)
    orthoserde.save(model, path, optimizer=optimizer, state={"step": 1}, metadata={"run": "1"})
    return path


def test_training_state_is_compared_value_by_value(a: Path, tmp_path: Path) -> None:
    def change(optimizer: torch.optim.Optimizer) -> None:
        optimizer.param_groups[0]["lr"] = 0.5
        state = next(iter(optimizer.state.values()))
        state["exp_avg"].add_(1)

    one, two, other = trained(tmp_path / "one"), trained(tmp_path / "two"), trained(tmp_path / "other", change)
    assert compare(one, two).same
    report = compare(one, other)
    assert not report.tensors
    places = dict(report.training)
    assert places.pop("optimizer: groups[0].lr") == (0.01, 0.5)
    ((place, distance),) = places.items()
    assert place.endswith(".exp_avg")
    assert isinstance(distance, Distance)
    assert distance.largest == pytest.approx(1.0)
    assert list(compare(a, one).training) == [""]


def test_ties_modules_and_metadata(tmp_path: Path) -> None:
    tied: Any = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    loose = copy.deepcopy(tied)
    tied[1].weight = tied[0].weight
    with torch.no_grad():
        loose[0].weight.copy_(tied[0].weight)
        loose[1].weight.copy_(tied[0].weight)
    orthoserde.save(tied, tmp_path / "a", metadata={"run": "1"})
    orthoserde.save(loose, tmp_path / "b", metadata={"run": "2"})
    report = compare(tmp_path / "a", tmp_path / "b")
    assert report.ties == {"1.weight": ("0.weight", None)}
    assert report.metadata == {"run": ("1", "2")}
    assert not report.tensors
    assert not report.same


def test_modules_of_registered_classes_are_compared(tmp_path: Path) -> None:
    registry = Registry()

    @registry.register("tests.comparison>Net")
    class Net(nn.Linear):
        def __init__(self, width: int, note: str) -> None:
            super().__init__(width, 2)

    for name in ("a", "b"):
        torch.manual_seed(0)
        orthoserde.save(Net(3, name), tmp_path / name, registry=registry)
    report = compare(tmp_path / "a", tmp_path / "b")
    assert report.modules == {"(model): note": ("a", "b")}
    assert not report.same


def test_what_cannot_be_computed_is_said(tmp_path: Path) -> None:
    class Twice(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * x

    for name, value in (("a", 1.0), ("b", 2.0)):
        layer = nn.Linear(2, 2)
        nn.init.constant_(layer.weight, value)
        nn.init.zeros_(layer.bias)
        nn.utils.parametrize.register_parametrization(layer, "weight", Twice())
        orthoserde.save(layer, tmp_path / name)
    difference = compare(tmp_path / "a", tmp_path / "b").tensors["weight"]
    assert difference.values is None
    assert "was not registered" in difference.not_compared
    assert difference.state["original"].largest == 1.0


def test_columns_are_compared_instead_of_their_bases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        orthoserde.save(orthoserde.orthogonal(nn.Linear(50, 2)), tmp_path / name, base="compact")

    def refuse(source: ColumnsOfBase) -> None:
        raise AssertionError("a base was worked out")

    monkeypatch.setattr(ColumnsOfBase, "blocks", refuse)
    difference = compare(tmp_path / "a", tmp_path / "b").tensors["weight"]
    assert set(difference.state) == {"0.base"}
    assert difference.values is not None


@pytest.mark.parametrize(
    ("one", "two", "place"),
    [
        (2**63, str(2**63), "n"),
        (math.nan, "nan", "n"),
        ([1, 2], (1, 2), "n: type"),
        ({"a": 1}, OrderedDict(a=1), "n: type"),
        ({"a": 1}, Counter(a=1), "n: type"),
        ({1.0: 1}, {"1.0": 1}, "n.1.0"),
        ({None: 1}, {"None": 1}, "n.None"),
        ({math.inf: 1}, {"inf": 1}, "n.inf"),
        ({2**63: 1}, {str(2**63): 1}, f"n.{2**63}"),
        ({"a.b": 1}, {"a": {"b": 1}}, "n.'a.b'"),
        ({"1": 1}, {"'1'": 1}, "n.'1'"),
        ({}, None, "n: type"),
        ({}, [], "n: type"),
        ({"a": None}, {}, "n.a"),
        (torch.zeros(2), "float32 of shape [2]", "n"),
    ],
    ids=str,
)
def test_training_state_of_other_types_is_not_the_same(one: object, two: object, place: str, tmp_path: Path) -> None:
    model = nn.Identity()
    orthoserde.save(model, tmp_path / "one", state={"n": one})
    orthoserde.save(model, tmp_path / "two", state={"n": two})
    for left, right in (("one", "two"), ("two", "one")):
        report = compare(tmp_path / left, tmp_path / right)
        assert report.differs_in == ("training",)
        assert place in report.training
        for name in (left, right):
            assert compare(tmp_path / name, tmp_path / name).same


def test_large_integers_and_nan_of_training_state_read_well(tmp_path: Path) -> None:
    model = nn.Identity()
    orthoserde.save(model, tmp_path / "one", state={"n": {2**63: 2**64, "x": math.nan, "None": 1}})
    orthoserde.save(model, tmp_path / "two", state={"n": {2**63: 2**65, "x": 1.5}})
    assert compare(tmp_path / "one", tmp_path / "two").training == {
        "n.9223372036854775808": (2**64, 2**65),
        "n.x": ({"float": "nan"}, 1.5),
        "n.'None'": (1, None),
    }
