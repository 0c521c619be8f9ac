"""Which differences are found, and which are within rounding."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn

import orthoserde
from orthoserde import Difference, Fidelity, Grade, Proof, storage, testing
from orthoserde.proof.compare import between_loads, from_file, loss_difference, seen
from orthoserde.proof.held import Made, live, saved
from tests.proof import cases


class Parts(nn.Module):
    """Tensors of several dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.single = nn.Parameter(torch.linspace(-1, 1, 6).view(2, 3))
        self.register_buffer("doubles", torch.linspace(-1, 1, 6, dtype=torch.float64))
        self.register_buffer("halves", torch.linspace(-1, 1, 6, dtype=torch.bfloat16))
        self.register_buffer("pairs", torch.full((2, 2), 1 + 2j))
        self.register_buffer("count", torch.tensor(1000000))
        self.register_buffer("large", torch.tensor([2**60]))
        self.register_buffer("nothing", torch.zeros(0, 3))
        self.register_buffer("zero", torch.zeros(2))
        self.register_buffer("odd", torch.tensor([math.nan, math.inf, 1.0]))


def compared(model: nn.Module, path: Path, optimizer: Any = None, state: Any = None) -> list[Difference]:
    """The differences between a model and a file."""
    labels = frozenset([""] if optimizer is not None else [])
    with storage.read(path) as checkpoint:
        return list(
            from_file(1, live(Made(model, optimizer, state)), saved(checkpoint, labels, frozenset(state or {})))
        )


@pytest.fixture
def parts(tmp_path: Path) -> tuple[Parts, Path]:
    """A model, and the file of it."""
    model = Parts()
    orthoserde.save(model, tmp_path / "parts")
    return model, tmp_path / "parts"


def test_what_is_equal_does_not_differ(parts: tuple[Parts, Path]) -> None:
    assert compared(*parts) == []


@pytest.mark.parametrize(
    ("name", "by", "within"),
    [
        ("single", 2e-6, True),
        ("single", 2e-5, False),
        ("doubles", 1e-13, True),
        ("doubles", 1e-11, False),
        ("halves", 1e-2, True),
        ("halves", 1e-1, False),
        ("pairs", 1e-5, True),
        ("pairs", 1e-4j, False),
        ("count", 1, False),
        ("large", 1, False),
        ("zero", 1e-30, False),
        ("zero", -0.0, True),
    ],
)
def test_rounding_is_told_from_more(parts: tuple[Parts, Path], name: str, by: complex, within: bool) -> None:
    model, path = parts
    with torch.no_grad():
        tensor = getattr(model, name).view(-1)
        tensor[-1] = -0.0 if str(by) == "-0.0" else tensor[-1] + by
    (difference,) = compared(model, path)
    assert (difference.step, difference.name, difference.within) == (1, name, within)
    assert difference.absolute == pytest.approx(abs(by), rel=0.5)


@pytest.mark.parametrize("value", [math.nan, -math.inf, 2.0])
def test_what_is_not_finite_is_no_rounding(parts: tuple[Parts, Path], value: float) -> None:
    model, path = parts
    model.odd[1] = value  # type: ignore[operator]
    (difference,) = compared(model, path)
    assert (difference.absolute, difference.relative, difference.within) == (math.inf, math.inf, False)


def test_a_difference_among_millions_is_found(tmp_path: Path) -> None:
    model = nn.Linear(1500, 1500)
    orthoserde.save(model, tmp_path / "large")
    with torch.no_grad():
        model.weight[-1, -1] += 1
    (difference,) = compared(model, tmp_path / "large")
    assert difference.name == "weight"
    assert difference.absolute == pytest.approx(1.0)


def test_other_shapes_and_names_differ(tmp_path: Path) -> None:
    orthoserde.save(nn.Linear(2, 3), tmp_path / "a")
    found = {each.name: each for each in compared(nn.Linear(2, 4, bias=False), tmp_path / "a")}
    assert found["weight"].text == "float32 of shape [4, 2], expected float32 of shape [3, 2]"
    assert found["bias"].text == "in the reference alone"
    assert [each.name for each in compared(nn.BatchNorm1d(3), tmp_path / "a")][-1] == "num_batches_tracked"
    assert not any(each.within for each in found.values())


def test_ties_compact_bases_weights_and_selections_are_looked_through(tmp_path: Path) -> None:
    model = nn.Sequential(orthoserde.orthogonal(nn.Linear(12, 5)), nn.Linear(5, 5), nn.Linear(5, 5))
    model[2].weight = model[1].weight
    assert orthoserde.save(model, tmp_path / "compact", include_weights=True).compact
    assert compared(model, tmp_path / "compact") == []
    model[1].requires_grad_(False)
    assert orthoserde.save(model, tmp_path / "selected", select="trainable").left_out
    assert compared(model, tmp_path / "selected") == []
    with torch.no_grad():
        cast("Any", model[0]).parametrizations.weight[0].base[0, -1] += 0.1
    assert [each.name for each in compared(model, tmp_path / "compact")] == ["0.parametrizations.weight.0.base"]


def test_training_state_is_compared_by_the_names_of_parameters(tmp_path: Path) -> None:
    model, optimizer = cases.make_small()
    cases.step_small(model, optimizer)
    state: dict[str, object] = {"count": 1, "rate": 0.5, "list": [], "words": "a"}
    orthoserde.save(model, tmp_path / "run", optimizer=optimizer, state=state)
    assert compared(model, tmp_path / "run", optimizer, state) == []
    moment = optimizer.state[model[2].weight]  # type: ignore[index]
    moment["exp_avg"][0, 0] += 1
    moment["step"] += 1
    optimizer.param_groups[0]["lr"] = 1e-3
    state |= {"count": 2, "rate": 0.5000001, "list": [1], "words": 1}
    found = compared(model, tmp_path / "run", optimizer, state)
    assert {each.name: each.within for each in found} == {
        "optimizer.2.weight.step": False,
        "optimizer.2.weight.exp_avg": False,
        "optimizer.groups.0.lr": False,
        "state.count": False,
        "state.rate": True,
        "state.list": False,
        "state.list.0": False,
        "state.words": False,
    }


@pytest.mark.parametrize(
    ("got", "expected", "relative"),
    [(1.0, 1.0, None), (1.00001, 1.0, 5e-6), (0.0, -0.0, 0.0), (math.nan, math.nan, None), (math.nan, 1.0, math.inf)],
)
def test_losses_are_held_to_the_largest(got: float, expected: float, relative: float | None) -> None:
    found = list(loss_difference(4, got, expected, 2.0))
    assert [(each.step, each.name) for each in found] == [(4, "loss")] * (relative is not None)
    assert [each.relative for each in found] == ([] if relative is None else [pytest.approx(relative, rel=1e-3)])


def test_a_step_that_returns_no_loss_cannot_be_held_to_one() -> None:
    (difference,) = loss_difference(1, None, 1.0, 1.0)
    assert "step returned None; return the loss" in str(difference)
    assert not difference.within


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (lambda model, optimizer: model[2].bias.data.add_(1e-7), ["2.bias"]),
        (lambda model, optimizer: optimizer.state.clear(), None),
        (lambda model, optimizer: optimizer.param_groups[0].update(lr=1.0), ["optimizer.groups.0.lr"]),
    ],
)
def test_two_loads_have_to_agree_in_every_bit(change: Callable[[Any, Any], object], names: list[str] | None) -> None:
    model, optimizer = cases.make_small()
    cases.step_small(model, optimizer)
    before = seen(1.0, live(Made(model, optimizer)))
    assert list(between_loads(2, before, seen(1.0, live(Made(model, optimizer))))) == []
    (loss,) = between_loads(2, before, seen(2.0, live(Made(model, optimizer))))
    assert (loss.name, loss.text) == ("loss", "1.0 and 2.0")
    change(model, optimizer)
    found = list(between_loads(2, before, seen(1.0, live(Made(model, optimizer)))))
    assert not any(each.within for each in found)
    assert [each.name for each in found] == names if names else all("optimizer" in each.name for each in found)
    assert found


def proof(grade: Grade, max_difference: float | None) -> Proof:
    """A proof with this outcome."""
    first = Difference(2, "layer.we\x1bird", "1 apart", 1.0, 0.5, within=False)
    return Proof("run", grade, 3, ("model",), Fidelity.EXACT, max_difference, first, 4, (), {"threads": "2"}, ("So.",))


def test_a_proof_says_what_it_found_in_a_few_lines() -> None:
    assert str(proof(Grade.WITHIN, 3e-7)) == (
        "run: within 3e-07 of the largest value, 3 steps against the reference\n"
        "  first: step 2, layer.we\\x1bird: 1 apart (4 differences in all)\n"
        "  compared: model; loaded EXACT; threads 2\n"
        "  So."
    )


def test_a_proof_has_no_truth_value() -> None:
    with pytest.raises(TypeError, match="neither true nor false"):
        assert proof(Grade.DIVERGES, 1.0)


@pytest.mark.parametrize(
    ("grade", "largest", "reference", "within", "fine"),
    [
        (Grade.BIT_EXACT, 0.0, 1.0, None, True),
        (Grade.WITHIN, 1e-7, 1.0, None, False),
        (Grade.WITHIN, 1e-7, 1.0, 1e-6, True),
        (Grade.WITHIN, 1e-5, 1.0, 1e-6, False),
        (Grade.DIVERGES, 1e-3, 1.0, 1e-2, True),
        (Grade.DIVERGES, math.inf, 1.0, 1e-2, False),
        (Grade.DETERMINISTIC, None, None, None, True),
        (Grade.DIVERGES, None, None, None, False),
    ],
)
def test_the_assertion_holds_if_the_proof_does(
    monkeypatch: pytest.MonkeyPatch,
    grade: Grade,
    largest: float | None,
    reference: float | None,
    within: float | None,
    fine: bool,
) -> None:
    found = proof(grade, largest)
    monkeypatch.setattr(testing, "prove", lambda *args, **options: found)
    held_to = None if reference is None else [reference]
    if fine:
        assert (
            testing.assert_continues("run", cases.make_small, cases.step_small, reference=held_to, within=within)
            is found
        )
    else:
        with pytest.raises(AssertionError) as caught:
            testing.assert_continues("run", cases.make_small, cases.step_small, reference=held_to, within=within)
        assert str(caught.value) == str(found)


def test_a_tolerance_needs_a_reference() -> None:
    with pytest.raises(orthoserde.ConfigError, match=r"within: .* give a reference"):
        testing.assert_continues("run", cases.make_small, cases.step_small, within=1e-3)
