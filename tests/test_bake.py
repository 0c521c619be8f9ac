"""`orthoserde.bake_`: plain models with the weights and outputs of evaluation mode."""

from __future__ import annotations

import copy
import io
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

import orthoserde
from orthoserde import Fidelity, UnsupportedModuleError
from orthoserde.walk import take_inventory
from tests.helpers import (
    assert_unchanged,
    bits,
    hook_of_a_subclass,
    lived_in,
    same_bits,
    scramble_,
    slots_of,
    snapshot,
    with_hook,
)

Make = Callable[[], Any]


class Scale(nn.Module):
    """A parametrization of the user's, with dropout and a counter that moves in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)
        self.calls: Tensor
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        scaled: Tensor = self.dropout(2 * x)
        return scaled


class Failing(nn.Module):
    """Fails when it is asked for the second time: torch asks once, to register it."""

    def __init__(self) -> None:
        super().__init__()
        self.registered = False

    def forward(self, x: Tensor) -> Tensor:
        if self.registered:
            raise ZeroDivisionError("no more")
        self.registered = True
        return x


class Given(nn.Module):
    """Whatever a function makes of the original."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Outer(nn.Module):
    """A parametrized, or hooked, layer inside of a parametrization."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.inner(x)
        return result


class Product(nn.Module):
    """Two originals."""

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return left @ right

    def right_inverse(self, value: Tensor) -> tuple[Tensor, Tensor]:
        return value[:, :2].clone(), value[:2].clone()


def parametrized(link: nn.Module, name: str = "weight", *, unsafe: bool = False) -> Any:
    layer = nn.Linear(3, 4)
    parametrize.register_parametrization(layer, name, link, unsafe=unsafe)
    return layer


def chained() -> Any:
    layer = orthogonal(nn.Linear(3, 4))
    parametrize.register_parametrization(layer, "weight", Scale())
    parametrize.register_parametrization(layer, "bias", Scale())
    return layer


def pruned(module: nn.Module) -> Any:
    prune.l1_unstructured(module, "weight", amount=0.5)  # type: ignore[no-untyped-call]
    return module


LAYERS: dict[str, Make] = {
    "orthogonal": lambda: orthogonal(nn.Linear(3, 4)),
    "orthogonal, wide": lambda: orthogonal(nn.Linear(3, 2), orthogonal_map="cayley"),
    "orthogonal, untrivialized": lambda: orthogonal(nn.Linear(3, 40), "weight", "matrix_exp", use_trivialization=False),
    "orthogonal, structured": lambda: orthoserde.orthogonal(nn.Linear(3, 4), "weight", "cayley", structured=True),
    "weight_norm": lambda: weight_norm(nn.Linear(3, 4)),
    "weight_norm, hook": lambda: with_hook("weight_norm", nn.Linear(3, 4)),
    "weight_norm of a bias, hook": lambda: with_hook("weight_norm", nn.Linear(3, 4), "bias"),
    "weight_norm of all, hook": lambda: with_hook("weight_norm", nn.Linear(3, 4), dim=None),
    "spectral_norm": lambda: spectral_norm(nn.Linear(3, 4)),
    "spectral_norm, hook": lambda: with_hook("spectral_norm", nn.Linear(3, 4)),
    "the user's": lambda: parametrized(Scale()),
    "chain": chained,
    "two originals": lambda: parametrized(Product()),
    "nested": lambda: parametrized(Outer(spectral_norm(nn.Linear(3, 3)))),
    "nested hook": lambda: parametrized(Outer(with_hook("spectral_norm", nn.Linear(3, 3)))),
    "pruned": lambda: pruned(nn.Linear(3, 4)),
    "pruned and normalised": lambda: weight_norm(pruned(nn.Linear(3, 4)), "bias"),
    "hook and parametrization": lambda: with_hook("weight_norm", orthogonal(nn.Linear(3, 4), "weight"), "bias"),
}


def outputs(model: Any, x: Tensor) -> Tensor:
    """Outputs in evaluation mode; the modes stay."""
    modes = [(module, module.training) for module in model.modules()]
    with torch.no_grad():
        result: Tensor = model.eval()(x)
    for module, mode in modes:
        module.training = mode
    return result


def used(model: Any, x: Tensor) -> Any:
    """Train for a while, so that nothing is at its initial value."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("rows", [1, 16])
def test_outputs_are_equal_in_every_bit_and_nothing_is_left_of_what_computed_them(name: str, rows: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(rows, 3)
    model = used(nn.Sequential(nn.Linear(3, 3), LAYERS[name](), nn.Tanh()), x)
    expected = outputs(model, x)

    orthoserde.bake_(model)

    assert same_bits(outputs(model, x), expected)
    assert type(model[1]) is nn.Linear
    assert set(model[1].state_dict()) == {"weight", "bias"}
    assert not model[1]._forward_pre_hooks
    assert not model[1]._modules
    assert not take_inventory(model).hooked
    assert vars(model[1]).keys() == vars(nn.Linear(3, 3)).keys()


@pytest.mark.parametrize("name", LAYERS)
def test_a_baked_tensor_has_memory_of_its_own_and_no_more_than_it_needs(name: str) -> None:
    layer = LAYERS[name]()
    state = {
        slot.tensor.untyped_storage().data_ptr()
        for slot in take_inventory(layer).slots.values()
        if slot.tensor is not None and not isinstance(slot.tensor, nn.Parameter)
    }
    orthoserde.bake_(layer)
    for tensor in layer.parameters():
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        assert tensor.untyped_storage().data_ptr() not in state
        assert tensor.is_leaf
        with torch.no_grad():
            tensor.add_(1)  # which fails where elements lie on top of each other


@pytest.mark.parametrize("name", LAYERS)
def test_everything_else_stays_as_it_was(name: str) -> None:
    torch.manual_seed(0)
    model: Any = lived_in(nn.Sequential(nn.Linear(3, 3), LAYERS[name](), nn.BatchNorm1d(4)))
    others = [model[0].state_dict(keep_vars=True), model[2].state_dict(keep_vars=True)]
    before = [{key: (tensor, bits(tensor)) for key, tensor in held.items()} for held in others]
    gradients = [parameter.grad for parameter in (*model[0].parameters(), *model[2].parameters())]
    modes = [child.training for child in (model, *model)]
    hooked = set(model[1].state_dict()) & {"weight", "bias"}
    kept = {key: getattr(model[1], key) for key in hooked}
    random_state = (torch.random.get_rng_state(), random.getstate())

    orthoserde.bake_(model)

    for held, tensors in zip((model[0], model[2]), before, strict=True):
        now = held.state_dict(keep_vars=True)
        assert all(now[key] is tensor and bits(tensor) == elements for key, (tensor, elements) in tensors.items())
    after = [parameter.grad for parameter in (*model[0].parameters(), *model[2].parameters())]
    assert all(one is other for one, other in zip(gradients, after, strict=True))
    assert [child.training for child in (model, *model)] == modes
    assert all(getattr(model[1], key) is tensor for key, tensor in kept.items())
    assert torch.equal(torch.random.get_rng_state(), random_state[0])
    assert random.getstate() == random_state[1]


@pytest.mark.parametrize("make", [LAYERS["spectral_norm"], LAYERS["spectral_norm, hook"], LAYERS["the user's"]])
def test_no_power_iteration_and_no_training_step_of_a_parametrization_is_made(make: Make) -> None:
    layer = make().train()
    layer(torch.ones(1, 3))
    slots = {key: tensor for key, tensor in slots_of(layer).items() if tensor is not None and tensor.ndim < 2}
    before = {key: bits(tensor) for key, tensor in slots.items()}
    assert len(before) > 1
    orthoserde.bake_(layer)
    assert {key: bits(tensor) for key, tensor in slots.items()} == before


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("trained", [True, False])
def test_a_baked_tensor_is_trained_if_its_originals_were(name: str, trained: bool) -> None:
    layer = LAYERS[name]().requires_grad_(trained)
    orthoserde.bake_(layer)
    assert all(parameter.requires_grad == trained for parameter in layer.parameters())


@pytest.mark.parametrize(
    ("name", "original"),
    [
        ("orthogonal", "parametrizations.weight.original"),
        ("orthogonal, structured", "parametrizations.weight.original"),
        ("spectral_norm", "parametrizations.weight.original"),
        ("spectral_norm, hook", "weight_orig"),
        ("the user's", "parametrizations.weight.original"),
        ("pruned", "weight_orig"),
    ],
)
def test_the_only_original_stays_the_same_parameter_and_an_optimizer_goes_on_with_it(name: str, original: str) -> None:
    layer = LAYERS[name]()
    parameter = layer.get_parameter(original)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    layer(torch.ones(1, 3)).sum().backward()
    report = orthoserde.bake_(layer)
    assert layer.weight is parameter
    assert parameter.grad is None or name == "pruned"
    assert report.parameters_replaced == ()
    before = parameter.detach().clone()
    optimizer.zero_grad()
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert torch.equal(parameter, before - 0.5 * torch.ones(before.shape))


@pytest.mark.parametrize("name", ["weight_norm", "weight_norm, hook", "two originals"])
def test_what_had_two_originals_is_a_new_parameter_and_the_report_says_so(name: str) -> None:
    report = orthoserde.bake_(LAYERS[name]())
    assert report.parameters_replaced == ("weight",)
    assert "new parameters: weight; build the optimizer anew" in str(report)


@pytest.mark.parametrize("dtype", [torch.int32, torch.float64, torch.complex64, torch.bool])
def test_a_parametrization_that_changes_the_dtype_leaves_a_parameter_of_that(dtype: torch.dtype) -> None:
    layer = parametrized(Given(lambda x: x.to(dtype)), unsafe=True)
    expected = layer.weight.detach().clone()
    report = orthoserde.bake_(layer)
    assert isinstance(layer.weight, nn.Parameter)
    assert same_bits(layer.weight, expected)
    assert layer.weight.requires_grad == (dtype.is_floating_point or dtype.is_complex)
    assert report.parameters_replaced == ("weight",)


def test_a_buffer_that_was_parametrized_stays_a_buffer() -> None:
    norm: Any = nn.BatchNorm1d(4)
    parametrize.register_parametrization(norm, "running_mean", Scale())
    scramble_(norm)
    expected = norm.eval().running_mean
    norm.train()
    report = orthoserde.bake_(norm)
    assert set(dict(norm.named_buffers())) == {"running_mean", "running_var", "num_batches_tracked"}
    assert same_bits(norm.get_buffer("running_mean"), norm.running_mean)
    assert expected is not None
    assert report.parameters_replaced == ()
    assert set(dict(norm.named_parameters())) == {"weight", "bias"}


#: Torch refuses to copy modules with its old weight_norm, whose weight has a graph.
COPIED = [name for name in LAYERS if not name.startswith("weight_norm") and "prune" not in name and "hook" not in name]


@pytest.mark.parametrize("name", [*COPIED, "weight_norm", "spectral_norm, hook", "nested hook"])
def test_a_copy_is_baked_and_its_original_trains_on(name: str) -> None:
    layer, x = LAYERS[name](), torch.ones(2, 3)
    expected = outputs(layer, x)
    twin = copy.deepcopy(layer)
    before = snapshot(layer)
    orthoserde.bake_(twin)
    assert_unchanged(layer, before)
    assert same_bits(outputs(layer, x), expected)
    assert same_bits(outputs(twin, x), expected)
    assert set(twin.state_dict()) == {"weight", "bias"}
    used(layer, x)
    assert not same_bits(outputs(layer, x), expected)
    assert same_bits(outputs(twin, x), expected)


def test_elements_that_lie_on_top_of_each_other_get_places_of_their_own() -> None:
    layer = parametrized(Given(lambda x: x.sum(0, keepdim=True).expand(4, 3)), unsafe=True)
    expected = layer.weight.detach().clone()
    assert layer.weight.stride() == (0, 1)
    orthoserde.bake_(layer)
    assert same_bits(layer.weight, expected)
    assert layer.weight.stride() == (3, 1)


@pytest.mark.parametrize("name", LAYERS)
def test_a_baked_model_is_copied_pickled_and_saved_as_a_plain_one(name: str, tmp_path: Path) -> None:
    layer = LAYERS[name]()
    orthoserde.bake_(layer)
    memory = io.BytesIO()
    torch.save(layer, memory)
    memory.seek(0)
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(memory, weights_only=False)]
    for other in copies:
        assert {key: bits(value) for key, value in other.state_dict().items()} == {
            key: bits(value) for key, value in layer.state_dict().items()
        }
    orthoserde.save(layer, tmp_path / "plain")
    manifest = orthoserde.inspect(tmp_path / "plain")
    assert manifest.parametrized == ()
    assert set(manifest.tensors) == {"weight", "bias"}
    plain = nn.Linear(3, layer.weight.shape[0])
    assert orthoserde.load(plain, tmp_path / "plain").fidelity is Fidelity.EXACT
    assert same_bits(plain.weight, layer.weight)


# What is shared


@pytest.mark.parametrize("make", [LAYERS["orthogonal"], LAYERS["weight_norm, hook"], LAYERS["pruned"]])
def test_a_shared_module_is_baked_once_and_stays_shared(make: Make) -> None:
    layer = make()
    model = nn.ModuleDict({"a": layer, "b": layer})
    report = orthoserde.bake_(model)
    assert list(report.tensors) == ["a.weight"]
    assert model["a"] is model["b"] is layer
    assert set(model.state_dict()) == {"a.weight", "a.bias", "b.weight", "b.bias"}


def test_one_parametrization_of_two_tensors_leaves_two_tensors() -> None:
    constant = torch.ones(4, 3)
    link = Given(lambda _: constant)
    model: Any = nn.Sequential(parametrized(link), parametrized(link))
    orthoserde.bake_(model)
    pointers = {constant.data_ptr(), *(layer.weight.data_ptr() for layer in model)}
    assert len(pointers) == 3


def tied(make: Make) -> Any:
    """The original of the second layer is the weight of the first."""
    model: Any = nn.Sequential(nn.Linear(3, 4), make())
    key = next(
        key for key in ("parametrizations.weight.original", "weight_orig", "weight_v") if key in slots_of(model[1])
    )
    model[0].weight = model[1].get_parameter(key)
    return model


@pytest.mark.parametrize(
    "make",
    [
        LAYERS["orthogonal"],
        LAYERS["weight_norm, hook"],
        LAYERS["spectral_norm, hook"],
        LAYERS["pruned"],
        LAYERS["the user's"],
    ],
)
def test_an_original_that_is_tied_to_another_tensor_is_refused(make: Make) -> None:
    model = tied(make)
    before = snapshot(lived_in(model))
    with pytest.raises(UnsupportedModuleError, match=r"1\.weight: its original is tied to another tensor"):
        orthoserde.bake_(model)
    assert_unchanged(model, before)


# What cannot be baked


@pytest.mark.parametrize("name", LAYERS)
def test_what_is_on_the_meta_device_is_refused(name: str) -> None:
    model: Any = nn.Sequential(LAYERS["orthogonal"](), LAYERS[name]().to("meta"))
    before = snapshot(model)
    with pytest.raises(UnsupportedModuleError, match=r"1\.(weight|bias): on the meta device"):
        orthoserde.bake_(model)
    assert_unchanged(model, before)


def test_all_errors_of_parametrizations_are_listed_and_nothing_changes() -> None:
    odd = parametrized(Given(lambda x: x))
    parametrize.register_parametrization(odd, "bias", Failing())
    model: Any = nn.Sequential(orthogonal(nn.Linear(3, 3)), parametrized(Failing()), odd, pruned(nn.Linear(4, 4)))
    before = snapshot(lived_in(model))
    with pytest.raises(UnsupportedModuleError) as caught:
        orthoserde.bake_(model)
    assert [problem.where for problem in caught.value.problems] == ["1.weight", "2.bias"]
    assert "cannot bake Sequential, which is as it was" in str(caught.value)
    assert "it cannot be computed: no more" in str(caught.value)
    assert_unchanged(model, before)


def test_a_weight_of_another_layout_is_refused() -> None:
    model = nn.Sequential(orthogonal(nn.Linear(3, 3)), parametrized(Given(lambda x: x.to_sparse()), unsafe=True))
    before = snapshot(model)
    with pytest.raises(UnsupportedModuleError, match=r"1\.weight: .*layout torch\.sparse_coo"):
        orthoserde.bake_(model)
    assert_unchanged(model, before)


class Locked(nn.Linear):
    """Takes no parameters when it is locked."""

    locked = False

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if self.locked:
            raise PermissionError("locked")
        super().register_parameter(name, param)


@pytest.mark.parametrize("last", ["locked", "interrupted"])
def test_an_error_in_the_middle_changes_nothing(last: str, monkeypatch: pytest.MonkeyPatch) -> None:
    locked = weight_norm(Locked(4, 4))
    model: Any = nn.Sequential(
        orthogonal(nn.Linear(4, 4)),
        with_hook("weight_norm", nn.Linear(4, 4)),
        with_hook("spectral_norm", nn.Linear(4, 4)),
        parametrized(Scale()),
        locked,
        pruned(nn.Linear(4, 4)),
    )
    lived_in(model)
    if last == "locked":
        locked.locked = True
    else:

        def interrupted(module: nn.Module, name: str) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(prune, "remove", interrupted)
    before = snapshot(model)
    with pytest.raises(PermissionError if last == "locked" else KeyboardInterrupt):
        orthoserde.bake_(model)
    assert_unchanged(model, before)
    locked.locked = False
    monkeypatch.undo()
    expected = {name: weight_of(model, name) for name in ("0", "3", "4")}
    orthoserde.bake_(model)
    assert all(torch.equal(model[int(name)].weight, weight) for name, weight in expected.items())


def weight_of(model: Any, name: str) -> Tensor:
    """The weight of evaluation mode."""
    layer = copy.deepcopy(model[int(name)]).eval()
    weight: Tensor = layer.weight.detach()
    return weight


def test_a_parametrization_that_gives_no_tensor_is_refused() -> None:
    link = Given(lambda x: x)
    layer = parametrized(link, unsafe=True)
    link.function = lambda _: 3  # type: ignore[assignment,return-value]
    before = snapshot(layer)
    with pytest.raises(UnsupportedModuleError, match="expected a tensor, got a int"):
        orthoserde.bake_(layer)
    assert_unchanged(layer, before)


def complex_hook() -> Any:
    layer = nn.Module()
    layer.weight = nn.Parameter(torch.randn(4, 3, dtype=torch.complex64))
    return with_hook("spectral_norm", layer)


def half_removed() -> Any:
    layer = with_hook("weight_norm", nn.Linear(3, 4))
    del layer.weight_g
    return layer


@pytest.mark.parametrize(
    "make",
    [
        lambda: with_hook("spectral_norm", nn.Linear(3, 4), "bias"),
        complex_hook,
        half_removed,
        lambda: orthogonal(with_hook("weight_norm", nn.Linear(3, 4)), "weight_v"),
        lambda: hook_of_a_subclass(nn.Linear(3, 4)),
    ],
    ids=["vector", "complex", "half removed", "parametrized direction", "subclass"],
)
def test_a_hook_that_is_none_of_the_known_forms_is_refused_and_not_left_behind(make: Make) -> None:
    model: Any = nn.Sequential(orthogonal(nn.Linear(3, 3)), make())
    before = snapshot(model)
    with pytest.raises(UnsupportedModuleError, match=r"1\.(weight|bias): its hook is not whole"):
        orthoserde.bake_(model)
    assert_unchanged(model, before)


def test_an_original_that_is_pruned_is_refused() -> None:
    layer: Any = weight_norm(nn.Linear(3, 4))
    prune.l1_unstructured(layer.parametrizations.weight, "original1", amount=0.5)  # type: ignore[no-untyped-call]
    before = snapshot(layer)
    with pytest.raises(
        UnsupportedModuleError, match="weight: an original is no registered tensor, as when it is pruned"
    ):
        orthoserde.bake_(layer)
    assert_unchanged(layer, before)


def test_pruning_that_was_taken_apart_is_refused() -> None:
    layer = pruned(nn.Linear(3, 4))
    del layer.weight_orig
    before = snapshot(layer)
    with pytest.raises(UnsupportedModuleError, match="weight: its pruning is not whole"):
        orthoserde.bake_(layer)
    assert_unchanged(layer, before)


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(TypeError, match=r"expected an nn\.Module"):
        orthoserde.bake_(torch.ones(2))  # type: ignore[arg-type]


# Around


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm"])
def test_a_weight_that_was_deleted_to_copy_the_layer_is_no_obstacle(kind: str) -> None:
    layer = with_hook(kind, nn.Linear(3, 4))
    expected = outputs(layer, torch.ones(1, 3))
    del layer.weight
    orthoserde.bake_(layer)
    assert same_bits(outputs(layer, torch.ones(1, 3)), expected)


@pytest.mark.parametrize("kind", ["parametrization", "hook"])
def test_recurrent_layers_use_the_baked_tensor_at_once(kind: str) -> None:
    layer: Any = nn.LSTM(3, 4)
    layer = (
        orthogonal(layer, "weight_hh_l0")
        if kind == "parametrization"
        else with_hook("weight_norm", layer, "weight_hh_l0")
    )
    x = torch.randn(5, 2, 3)
    with torch.no_grad():
        expected = layer(x)[0]
        orthoserde.bake_(layer)
        assert same_bits(layer(x)[0], expected)
        layer.weight_hh_l0.zero_()
        assert not same_bits(layer(x)[0], expected)
    assert sorted(layer.state_dict()) == sorted(nn.LSTM(3, 4).state_dict())


@pytest.mark.parametrize("make", [LAYERS["weight_norm"], LAYERS["weight_norm, hook"], LAYERS["pruned"]])
def test_compiled_code_notices(make: Make) -> None:
    layer = make()
    compiled: Any = torch.compile(layer, backend="eager")
    x = torch.ones(2, 3)
    expected = compiled(x)
    orthoserde.bake_(compiled)
    assert same_bits(compiled(x), expected)
    with torch.no_grad():
        layer.weight.zero_()
    assert torch.equal(compiled(x), layer(x))
    torch.compiler.reset()


def test_wrappers_are_looked_through() -> None:
    model = nn.DataParallel(nn.Sequential(LAYERS["weight_norm, hook"](), nn.Tanh()))
    assert list(orthoserde.bake_(model).tensors) == ["0.weight"]


def test_a_cached_weight_is_not_taken_for_the_baked_one() -> None:
    layer: Any = orthogonal(nn.Linear(3, 4))
    with parametrize.cached():
        stale = layer.weight
        with torch.no_grad():
            layer.get_parameter("parametrizations.weight.original").add_(torch.randn(4, 3))
        orthoserde.bake_(layer)
        assert not torch.equal(layer.weight, stale)
        assert isinstance(layer.weight, nn.Parameter)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_does_not_matter_in_which_mode_it_is_called(mode: Callable[[], Any]) -> None:
    layer = chained()
    with mode():
        orthoserde.bake_(layer)
    assert not layer.weight.is_inference()
    layer(torch.ones(1, 3)).sum().backward()
    assert layer.weight.grad is not None


def test_a_model_with_nothing_to_bake_is_left_alone() -> None:
    model: Any = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    before = snapshot(lived_in(model))
    report = orthoserde.bake_(model)
    assert report.tensors == {}
    assert_unchanged(model, before)


def test_the_report_names_kinds_and_classes() -> None:
    model: Any = nn.Sequential(chained(), LAYERS["spectral_norm, hook"](), LAYERS["pruned"]())
    assert orthoserde.bake_(model).tensors == {
        "0.weight": "torch>orthogonal, then Scale",
        "0.bias": "Scale",
        "1.weight": "torch>spectral_norm, a hook",
        "2.weight": "pruning, a hook",
    }


def test_what_is_inside_of_a_parametrization_goes_with_it_and_is_not_taken_apart() -> None:
    outer = Outer(spectral_norm(nn.Linear(3, 3)))
    model: Any = nn.Sequential(parametrized(outer))
    report = orthoserde.bake_(model)
    assert list(report.tensors) == ["0.weight"]
    assert parametrize.is_parametrized(outer.inner)


def test_what_is_inside_of_a_parametrization_and_beside_it_is_baked_too() -> None:
    inner = spectral_norm(nn.Linear(3, 3))
    model: Any = nn.Sequential(parametrized(Outer(inner)), inner)
    orthoserde.bake_(model)
    assert set(model.state_dict()) == {"0.weight", "0.bias", "1.weight", "1.bias"}
