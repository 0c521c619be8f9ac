"""The formula, its dtypes, its arguments."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

import orthoserde
from orthoserde import _torch
from orthoserde.integrations.loreft import LoReFT
from orthoserde.integrations.loreft.module import ACTIVATIONS
from tests.integrations.toy import close, slow_loreft, strong


def chart_error(loreft: LoReFT) -> float:
    """How far what the rotation is computed from is from orthonormal."""
    (matrix,) = cast("Any", loreft.rotate_layer).parametrizations.weight[0].state_dict().values()
    return float((matrix.double().mT @ matrix.double() - torch.eye(matrix.size(1))).abs().max())


@pytest.mark.parametrize("orthogonal_map", [None, "householder", "cayley", "matrix_exp"])
@pytest.mark.parametrize(("hidden_size", "rank"), [(7, 3), (5, 1), (4, 4), (1, 1)])
def test_the_formula_is_that_of_the_paper(hidden_size: int, rank: int, orthogonal_map: str | None) -> None:
    loreft = strong(LoReFT(hidden_size, rank, orthogonal_map=orthogonal_map))
    hidden = torch.randn(2, 3, hidden_size)
    new = loreft(hidden)
    for i in range(2):
        for j in range(3):
            assert close(new[i, j], slow_loreft(loreft, hidden[i, j]))


@pytest.mark.parametrize(("structured", "chart"), [(True, "columns"), (False, "base")])
def test_the_names_are_those_of_pyreft(structured: bool, chart: str) -> None:
    assert set(LoReFT(6, 2, structured=structured).state_dict()) == {
        "rotate_layer.parametrizations.weight.original",
        f"rotate_layer.parametrizations.weight.0.{chart}",
        "learned_source.weight",
        "learned_source.bias",
    }


def test_no_matrix_of_hidden_size_x_hidden_size_is_made() -> None:
    with _torch.LargestTensor() as largest:
        loreft = strong(LoReFT(512, 4))
        loreft(torch.randn(2, 512)).sum().backward()
    assert largest.nbytes <= 2 * 512 * 4 * 8


def test_both_forms_are_the_same_but_for_rounding() -> None:
    ours, dense = (strong(LoReFT(24, 4, structured=structured)) for structured in (True, False))
    state = dense.state_dict()
    key = "rotate_layer.parametrizations.weight.0"
    state[f"{key}.columns"] = state.pop(f"{key}.base")[:, :4]
    ours.load_state_dict(state)
    hidden = torch.randn(3, 24)
    torch.testing.assert_close(ours(hidden), dense(hidden), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 3, 6), (2, 1, 3, 6), (0, 6)])
def test_any_leading_shape_is_taken(shape: tuple[int, ...]) -> None:
    loreft = strong(LoReFT(6, 2))
    hidden = torch.randn(shape)
    new = loreft(hidden)
    assert new.shape == shape
    for vector, after in zip(hidden.reshape(-1, 6), new.reshape(-1, 6), strict=True):
        assert close(after, slow_loreft(loreft, vector))


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_the_activation_is_applied_to_the_learned_source_alone(activation: str) -> None:
    loreft = strong(LoReFT(6, 2, activation=activation))
    hidden = torch.randn(4, 6)
    columns = loreft.rotate_layer.weight
    source = ACTIVATIONS[activation](loreft.learned_source(hidden))
    assert close(loreft(hidden), hidden + (source - hidden @ columns) @ columns.mT)
    assert not close(loreft(hidden), hidden + (loreft.learned_source(hidden) - hidden @ columns) @ columns.mT)


def test_gradients_are_those_of_the_slow_reference() -> None:
    loreft = strong(LoReFT(5, 2))
    other = copy.deepcopy(loreft)
    hidden = torch.randn(3, 5, requires_grad=True)
    same = hidden.detach().clone().requires_grad_()
    loreft(hidden).pow(2).sum().backward()
    torch.stack([slow_loreft(other, vector) for vector in same]).pow(2).sum().backward()  # type: ignore[no-untyped-call]
    assert hidden.grad is not None
    assert same.grad is not None
    assert close(hidden.grad, same.grad)
    for mine, theirs in zip(loreft.parameters(), other.parameters(), strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        assert close(mine.grad, theirs.grad)


@pytest.mark.parametrize("orthogonal_map", ["householder", "cayley", "matrix_exp"])
def test_gradcheck_in_float64(orthogonal_map: str) -> None:
    loreft = strong(LoReFT(4, 2, activation="tanh", dtype=torch.float64, orthogonal_map=orthogonal_map))
    names = [name for name, _ in loreft.named_parameters()]
    hidden = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)

    def run(hidden: Tensor, *parameters: Tensor) -> Tensor:
        return cast("Tensor", torch.func.functional_call(loreft, dict(zip(names, parameters, strict=True)), (hidden,)))

    # The diagonal of `original` is a sign that torch rounds, so its gradient is left out.
    parameters = [p.detach().clone().requires_grad_("original" not in n) for n, p in loreft.named_parameters()]
    assert torch.autograd.gradcheck(run, (hidden, *parameters))


def test_dropout_is_applied_to_the_whole_result_as_the_reference_implementation_does() -> None:
    loreft = strong(LoReFT(6, 2, dropout=0.4))
    hidden = torch.randn(50, 6)
    torch.manual_seed(3)
    dropped = loreft(hidden)
    kept = loreft.eval()(hidden)
    torch.manual_seed(3)
    assert torch.equal(dropped, nn.functional.dropout(kept, 0.4))
    assert 0 < int((dropped == 0).sum()) < dropped.numel()


@pytest.mark.parametrize("hidden_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_rotation_has_float32_or_better_and_the_result_the_dtype_of_the_hidden_states(
    dtype: torch.dtype, hidden_dtype: torch.dtype
) -> None:
    loreft = LoReFT(6, 2, dtype=dtype)
    assert loreft.learned_source.weight.dtype == dtype
    assert loreft.rotate_layer.weight.dtype == torch.promote_types(dtype, torch.float32)
    hidden = torch.randn(3, 6).to(hidden_dtype)
    new = loreft(hidden)
    assert new.dtype == hidden_dtype
    columns = loreft.rotate_layer.weight.double()
    source = loreft.learned_source(hidden.to(dtype)).double()
    exact = hidden.double() + (source - hidden.double() @ columns) @ columns.mT
    coarse = max(torch.finfo(hidden_dtype).eps, torch.finfo(torch.float32).eps)
    assert float((new.double() - exact).detach().abs().max()) <= 60 * coarse


def test_under_autocast_the_rotation_stays_in_float32() -> None:
    loreft = strong(LoReFT(64, 8))
    hidden = torch.randn(10, 64)
    with torch.no_grad():  # what may be lower is W h + b; R h may not
        loreft.learned_source.weight.zero_()
        loreft.learned_source.bias.zero_()
    plain = loreft(hidden)
    with torch.autocast("cpu", torch.bfloat16):
        cast_to_bfloat16 = loreft(hidden)
    assert cast_to_bfloat16.dtype == torch.float32
    assert torch.equal(cast_to_bfloat16, plain)


def test_autocast_is_left_as_it_was_and_bfloat16_goes_in_and_out() -> None:
    loreft = LoReFT(6, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert loreft(torch.randn(2, 6, dtype=torch.bfloat16)).dtype == torch.bfloat16
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16


CASTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "half": lambda module: module.half(),
    "bfloat16": lambda module: module.bfloat16(),
    "to": lambda module: module.to(torch.float16),
    "enclosing": lambda module: nn.Sequential(module).to(torch.bfloat16),
    "type": lambda module: module.type(torch.float16),
}


@pytest.mark.parametrize("structured", [True, False])
@pytest.mark.parametrize("cast_down", CASTS)
def test_a_cast_below_float32_leaves_the_rotation_as_it_is(cast_down: str, structured: bool) -> None:
    loreft = strong(LoReFT(32, 4, structured=structured))
    before = {name: tensor.clone() for name, tensor in loreft.state_dict().items()}
    CASTS[cast_down](loreft)
    for name, tensor in loreft.state_dict().items():
        if name.startswith("rotate_layer"):
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor, before[name])
            assert tensor.stride() == before[name].stride()
        else:
            assert tensor.dtype in (torch.float16, torch.bfloat16)
    loreft.float()
    assert chart_error(loreft) < 1e-5
    assert all(torch.equal(t, before[n]) for n, t in loreft.state_dict().items() if n.startswith("rotate_layer"))


def test_a_cast_from_float64_stops_at_float32() -> None:
    loreft = LoReFT(8, 2, dtype=torch.float64).half()
    assert loreft.rotate_layer.weight.dtype == torch.float32
    assert loreft.learned_source.weight.dtype == torch.float16
    assert loreft.double().rotate_layer.weight.dtype == torch.float64


def test_a_cast_keeps_the_parameters_the_same_objects() -> None:
    loreft = LoReFT(8, 2)
    before = list(loreft.parameters())
    loreft.bfloat16()
    assert all(now is then for now, then in zip(loreft.parameters(), before, strict=True))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"hidden_size": 0}, "hidden_size: expected an integer from 1"),
        ({"hidden_size": 4.0}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"rank": 0}, "rank: expected an integer from 1 to hidden_size=4, got 0"),
        ({"rank": 5}, "rank"),
        ({"rank": "2"}, "rank"),
        ({"dropout": 1.0}, r"dropout: expected a number in \[0, 1\)"),
        ({"dropout": -0.1}, "dropout"),
        ({"dropout": float("nan")}, "dropout"),
        ({"dropout": None}, "dropout"),
        ({"activation": "linear"}, "activation: expected None or one of elu, gelu, .*tanh"),
        ({"dtype": torch.int64}, "dtype"),
        ({"dtype": "float32"}, "dtype"),
        ({"dtype": torch.complex64}, "dtype"),
        ({"structured": 1}, "structured: expected True or False, got 1"),
        ({"orthogonal_map": "cailey"}, "orthogonal_map: expected None or one of .*cayley"),
    ],
)
def test_an_argument_outside_of_its_range_is_refused(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        LoReFT(**{"hidden_size": 4, "rank": 2, **arguments})


@pytest.mark.parametrize("hidden", [torch.randn(2, 5), torch.randn(()), torch.randn(4, 3)])
def test_hidden_states_of_another_width_are_refused(hidden: Tensor) -> None:
    with pytest.raises(ValueError, match=r"expected \(\.\.\., 4\), as LoReFT was made for hidden_size=4"):
        LoReFT(4, 2)(hidden)


def test_hidden_states_that_are_integers_are_refused() -> None:
    with pytest.raises(ValueError, match="expected a floating dtype"):
        LoReFT(4, 2)(torch.ones(2, 4, dtype=torch.long))


def test_the_meta_device_has_no_autocast_to_leave() -> None:
    loreft = LoReFT(4, 2)
    assert loreft.to("meta")(torch.empty(2, 4, device="meta")).shape == (2, 4)


ARGUMENTS: list[dict[str, Any]] = [
    {},
    {"dropout": 0.25, "activation": "gelu_tanh", "orthogonal_map": "cayley"},
    {"dtype": torch.bfloat16},
    {"dtype": torch.float64, "orthogonal_map": "matrix_exp"},
    {"structured": False},
]


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
def test_one_is_made_from_its_file_alone(arguments: dict[str, Any], tmp_path: Path) -> None:
    loreft = strong(LoReFT(6, 2, **arguments))
    orthoserde.save(loreft, tmp_path / "m")
    state = torch.get_rng_state()
    built = orthoserde.build(tmp_path / "m")
    assert torch.equal(torch.get_rng_state(), state)
    assert isinstance(built, LoReFT)
    assert built.get_config() == loreft.get_config()
    assert repr(built) == repr(loreft)
    ours, theirs = loreft.state_dict(), built.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) and ours[key].stride() == theirs[key].stride() for key in ours)
    hidden = torch.randn(3, 6)
    assert torch.equal(loreft.eval()(hidden), built.eval()(hidden))


def test_the_configuration_is_that_of_the_live_module(tmp_path: Path) -> None:
    loreft = LoReFT(6, 2, dropout=0.5).bfloat16()
    loreft.dropout.p = 0.25
    orthoserde.save(loreft, tmp_path / "m")
    built = orthoserde.build(tmp_path / "m")
    assert isinstance(built, LoReFT)
    assert built.dropout.p == 0.25
    assert built.learned_source.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "error"), [({"dtype": "int"}, ValueError), ({"dtype": None}, ValueError), ({"rang": 2}, TypeError)]
)
def test_a_configuration_that_does_not_fit_is_refused(change: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        LoReFT.from_config({**LoReFT(4, 2).get_config(), **change})


def test_a_file_with_another_configuration_is_refused_and_nothing_changes(tmp_path: Path) -> None:
    orthoserde.save(LoReFT(6, 2, activation="relu"), tmp_path / "m")
    other = LoReFT(6, 2)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(orthoserde.IncompatibleModelError, match="activation"):
        orthoserde.load(other, tmp_path / "m")
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())


def test_every_registry_builds_it(tmp_path: Path) -> None:
    loreft = LoReFT(6, 2)
    orthoserde.save(loreft, tmp_path / "m", registry=orthoserde.Registry())
    built = orthoserde.build(tmp_path / "m", registry=orthoserde.Registry())
    assert type(built) is LoReFT
    assert torch.equal(built.rotate_layer.weight, loreft.rotate_layer.weight)
