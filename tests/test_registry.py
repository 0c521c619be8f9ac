"""Names of classes in files, and the configuration that goes with them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import orthogonal

import orthoserde
from orthoserde import (
    Codec,
    ConfigError,
    Fidelity,
    IncompatibleModelError,
    RegistrationError,
    Registry,
)
from orthoserde.parametrizations import BUILT_IN_CODECS, codec_for_type
from orthoserde.registry.registered_class import RegisteredClass


def config_of(registry: Registry, module: nn.Module) -> Mapping[str, Any] | None:
    codec = registry.for_type(type(module))
    assert codec is not None
    return codec.config(module)


def linear(parametrization: nn.Module) -> nn.Linear:
    layer = nn.Linear(3, 3)
    parametrize.register_parametrization(layer, "weight", parametrization)
    return layer


class Importable(nn.Module):
    """At the top of a module, so that it can be pickled."""

    def __init__(self, gain: float = 1.5) -> None:
        super().__init__()
        self.gain = gain


IMPORTABLE_REGISTRY = Registry()
DECORATED = IMPORTABLE_REGISTRY.register("tests>Importable")(Importable)


# Registering


def test_the_decorator_returns_the_class_itself() -> None:
    assert DECORATED is Importable
    module = pickle.loads(pickle.dumps(Importable(2.5)))
    assert isinstance(module, Importable)
    assert config_of(IMPORTABLE_REGISTRY, module) == {"gain": 2.5}
    assert config_of(IMPORTABLE_REGISTRY, copy.deepcopy(module)) == {"gain": 2.5}


@pytest.mark.parametrize("kind", ["", "Name", "a>b>c", "a b>c", ">c", "a>", "torch>mine", 3])
def test_a_malformed_kind_is_refused(kind: str) -> None:
    registry = Registry()
    with pytest.raises(RegistrationError):
        registry.register(kind)(type("Fresh", (nn.Module,), {}))
    assert len(registry) == 0


@pytest.mark.parametrize("version", [0, -1, True, "1", 1.0])
def test_a_malformed_version_is_refused(version: Any) -> None:
    with pytest.raises(RegistrationError, match="version"):
        Registry().register("tests>Fresh", version)(type("Fresh", (nn.Module,), {}))


def test_the_decorator_without_a_kind_says_how_to_use_it() -> None:
    with pytest.raises(RegistrationError, match=r"as in register\('mylab>Symmetric'\)"):
        Registry().register(nn.Linear)  # type: ignore[arg-type]


def test_only_modules_can_be_registered() -> None:
    with pytest.raises(RegistrationError, match=r"subclass of nn\.Module"):
        Registry().register("tests>int")(int)  # type: ignore[type-var]


@pytest.mark.parametrize(("given", "hint"), [(object(), ""), (nn.Linear, "; a class is registered with register()")])
def test_what_is_no_codec_is_refused(given: Any, hint: str) -> None:
    registry = Registry()
    with pytest.raises(RegistrationError, match=r"^expected a Codec, got .*, which lacks .*from_weight") as caught:
        registry.add(given)
    assert str(caught.value).endswith(hint or "upgrade")
    assert len(registry) == 0


def test_two_classes_under_one_kind_are_refused() -> None:
    registry = Registry()
    registry.register("tests>A")(type("A", (nn.Module,), {}))
    with pytest.raises(RegistrationError, match="choose another name"):
        registry.register("tests>A")(type("B", (nn.Module,), {}))
    assert list(registry) == ["tests>A"]


def test_one_class_under_two_kinds_is_refused() -> None:
    registry = Registry()
    cls = type("A", (nn.Module,), {})
    registry.register("tests>A")(cls)
    with pytest.raises(RegistrationError, match="already registered as 'tests>A'"):
        registry.register("tests>B")(cls)


def test_the_same_class_defined_again_replaces_the_earlier_one() -> None:
    registry = Registry()

    def define(gain: float) -> type[nn.Module]:
        @registry.register("tests>Cell")
        class Cell(nn.Module):
            default = gain

        return Cell

    first, second = define(1.0), define(2.0)
    codec = registry.for_kind("tests>Cell")
    assert codec is not None
    assert codec.type is second
    assert registry.for_type(first) is None
    assert len(registry) == 1


def test_registering_twice_wraps_once() -> None:
    registry = Registry()

    class Module(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()

    registry.register("tests>Module")(Module)
    init = Module.__init__
    registry.register("tests>Module", version=2)(Module)
    assert Module.__init__ is init
    codec = registry.for_kind("tests>Module")
    assert codec is not None
    assert codec.version == 2


def test_a_registry_counts_and_lists_its_kinds() -> None:
    registry = Registry()
    for name in "BA":
        registry.register(f"tests>{name}")(type(name, (nn.Module,), {}))
    assert list(registry) == ["tests>A", "tests>B"]
    assert "tests>A" in registry
    assert "tests>C" not in registry
    assert repr(registry) == "<Registry: 2 kinds>"


def test_torch_kinds_are_known_to_every_registry() -> None:
    for codec in BUILT_IN_CODECS:
        assert codec_for_type(Registry(), codec.type) is codec
        assert isinstance(codec, Codec)
    assert isinstance(RegisteredClass(nn.Linear, "tests>Linear", 1), Codec)


# Capturing arguments


def test_arguments_are_captured_with_defaults() -> None:
    registry = Registry()

    @registry.register("tests>Module")
    class Module(nn.Module):
        def __init__(self, width: int, /, scale: float = 0.5, *rest: int, name: str = "x", **more: Any) -> None:
            super().__init__()
            self.seen = (width, scale, rest, name, more)

    assert config_of(registry, Module(3)) == {"width": 3, "scale": 0.5, "name": "x"}
    full = Module(3, 0.25, 7, 8, name="y", extra=[1, {"a": None}])
    config = config_of(registry, full)
    assert config == {"width": 3, "scale": 0.25, "rest": [7, 8], "name": "y", "more": {"extra": [1, {"a": None}]}}
    codec = registry.for_type(Module)
    assert codec is not None
    assert config is not None
    built = codec.build(config, None)
    assert built.seen == full.seen
    assert codec.config(built) == config


def test_arguments_are_recorded_as_passed_although_the_constructor_changes_them() -> None:
    registry = Registry()

    @registry.register("tests>Module")
    class Module(nn.Module):
        def __init__(self, widths: list[int]) -> None:
            super().__init__()
            widths.append(99)

    assert config_of(registry, Module([1, 2])) == {"widths": [1, 2]}


def test_a_class_without_constructor_has_an_empty_configuration() -> None:
    registry = Registry()

    @registry.register("tests>Module")
    class Module(nn.Module):
        pass

    assert config_of(registry, Module()) == {}


@pytest.mark.parametrize("value", [object(), torch.float32, float("nan"), 2**63, {1: 2}, {1, 2}, "\ud800"])
def test_arguments_that_are_not_json_make_the_configuration_unknown(value: Any) -> None:
    registry = Registry()

    @registry.register("tests>Module")
    class Module(nn.Module):
        def __init__(self, value: Any) -> None:
            super().__init__()

    assert config_of(registry, Module(value)) is None


def test_an_unregistered_subclass_does_not_get_its_parents_configuration() -> None:
    registry = Registry()

    @registry.register("tests>Parent")
    class Parent(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()

    class Child(Parent):
        def __init__(self) -> None:
            super().__init__(3)

    assert registry.for_type(Child) is None
    parent = registry.for_type(Parent)
    assert parent is not None
    assert parent.config(Child()) is None


def test_a_registered_subclass_has_its_own_arguments() -> None:
    registry = Registry()

    @registry.register("tests>Parent")
    class Parent(nn.Module):
        def __init__(self, width: int = 1) -> None:
            super().__init__()

    @registry.register("tests>Child")
    class Child(Parent):
        def __init__(self, depth: int) -> None:
            super().__init__(depth * 2)

    @registry.register("tests>Heir")
    class Heir(Parent):
        pass

    assert config_of(registry, Child(4)) == {"depth": 4}
    assert config_of(registry, Heir(5)) == {"width": 5}
    assert config_of(registry, Parent(6)) == {"width": 6}


def test_a_wrong_call_raises_what_the_constructor_raises() -> None:
    registry = Registry()

    @registry.register("tests>Module")
    class Module(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()

    with pytest.raises(TypeError, match="missing 1 required positional argument: 'width'"):
        Module()  # type: ignore[call-arg]


def test_get_config_and_from_config_take_the_place_of_arguments() -> None:
    registry = Registry()

    @registry.register("tests>Module")
    class Module(nn.Module):
        def __init__(self, dtype: torch.dtype) -> None:
            super().__init__()
            self.dtype = dtype

        def get_config(self) -> dict[str, Any]:
            return {"dtype": str(self.dtype)}

        @classmethod
        def from_config(cls, config: dict[str, Any]) -> Module:
            return cls(getattr(torch, config["dtype"].removeprefix("torch.")))

    codec = registry.for_type(Module)
    assert codec is not None
    config = codec.config(Module(torch.float64))
    assert config == {"dtype": "torch.float64"}
    assert vars(codec.build(config, None))["dtype"] is torch.float64


@pytest.mark.parametrize("returned", [{"a": object()}, ["a"], "a"])
def test_a_get_config_that_is_not_json_is_an_error(returned: Any) -> None:
    registry = Registry()

    @registry.register("tests>Module")
    class Module(nn.Module):
        def get_config(self) -> Any:
            return returned

    with pytest.raises(ConfigError, match="get_config"):
        config_of(registry, Module())


def test_a_get_config_may_say_that_it_is_not_known(tmp_path: Path) -> None:
    registry = Registry()

    @registry.register("tests>Module")
    class Module(nn.Module):
        def get_config(self) -> None:
            return None

    assert config_of(registry, Module()) is None
    report = orthoserde.save(Module(), tmp_path / "m", registry=registry)
    assert report.unconfigured == ("(model)",)
    with pytest.raises(ConfigError, match="does not have the arguments"):
        orthoserde.build(tmp_path / "m", registry=registry)


def test_building_from_a_configuration_that_does_not_fit_is_one_error() -> None:
    registry = Registry()

    @registry.register("tests>Module")
    class Module(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            if width < 0:
                raise ArithmeticError("negative width")

    codec = registry.for_type(Module)
    assert codec is not None
    with pytest.raises(ConfigError, match="has no argument depth"):
        codec.build({"width": 1, "depth": 1}, None)
    with pytest.raises(ConfigError, match="ArithmeticError: negative width"):
        codec.build({"width": -1}, None)
    with pytest.raises(ConfigError, match="TypeError"):
        codec.build({}, None)


# In files


class Scaled(nn.Module):
    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        self.gain = gain
        self.shift = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * x + self.shift


def scaled_registry(version: int = 1, cls: type[nn.Module] | None = None) -> Registry:
    registry = Registry()
    registry.register("tests>Scaled", version)(cls or Scaled)
    return registry


def test_a_registered_parametrization_is_exact_and_checked(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    registry = scaled_registry()
    model = linear(Scaled(2.0))
    assert orthoserde.save(model, path, registry=registry).opaque == ()
    same = linear(Scaled(2.0))
    assert orthoserde.load(same, path, registry=registry).fidelity is Fidelity.EXACT
    assert torch.equal(same.weight, model.weight)
    other = linear(Scaled(3.0))
    before = other.weight.clone()
    with pytest.raises(IncompatibleModelError, match=r"gain is 2\.0 in the file, 3\.0 in the model"):
        orthoserde.load(other, path, registry=registry)
    assert torch.equal(other.weight, before)


def test_a_kind_of_the_file_that_this_process_does_not_know_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    model = linear(Scaled(2.0))
    orthoserde.save(model, path, registry=scaled_registry())
    with pytest.raises(IncompatibleModelError, match="tests>Scaled, the model the unregistered Scaled; register it"):
        orthoserde.load(model, path, registry=Registry())
    with pytest.raises(IncompatibleModelError, match="tests>Scaled in the file, which is not registered"):
        orthoserde.load(nn.Linear(3, 3), path, registry=Registry())


def test_an_unregistered_class_is_opaque_and_unverified(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    model = linear(Scaled(2.0))
    report = orthoserde.save(model, path, registry=Registry())
    assert report.opaque == ("weight",)
    assert "not registered" in str(report)
    other = linear(Scaled(3.0))
    assert orthoserde.load(other, path, registry=Registry()).fidelity is Fidelity.UNVERIFIED
    # Registered since: the class is the same, its configuration at the time of saving is still unknown.
    assert orthoserde.load(other, path, registry=scaled_registry()).fidelity is Fidelity.UNVERIFIED


def test_a_newer_version_in_the_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    model = linear(Scaled(2.0))
    orthoserde.save(model, path, registry=scaled_registry(version=2))
    with pytest.raises(IncompatibleModelError, match="version 2 of tests>Scaled, this process version 1"):
        orthoserde.load(model, path, registry=scaled_registry(version=1))
    with pytest.raises(IncompatibleModelError, match="version 2 of tests>Scaled, this process version 1"):
        orthoserde.load(nn.Linear(3, 3), path, registry=scaled_registry(version=1))


def test_an_older_version_is_upgraded_by_the_class_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    model = linear(Scaled(2.0))
    orthoserde.save(model, path, registry=scaled_registry(version=1))
    with pytest.raises(IncompatibleModelError, match=r"upgrade\(config, from_version\)"):
        orthoserde.load(model, path, registry=scaled_registry(version=2))

    class Renamed(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.factor = factor
            self.shift = nn.Parameter(torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            return self.factor * x + self.shift

        @staticmethod
        def upgrade(config: dict[str, Any], from_version: int) -> dict[str, Any]:
            assert from_version == 1
            return {"factor": config["gain"]}

    registry = scaled_registry(2, Renamed)
    target = linear(Renamed(2.0))
    assert orthoserde.load(target, path, registry=registry).fidelity is Fidelity.EXACT
    assert torch.equal(target.weight, model.weight)
    bare = nn.Linear(3, 3)
    assert orthoserde.load(bare, path, registry=registry).fidelity is Fidelity.EXACT
    assert torch.equal(bare.weight, model.weight)


def test_a_registered_module_is_checked_too(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    registry = Registry()

    @registry.register("tests>Block")
    class Block(nn.Module):
        def __init__(self, width: int, dropout: float = 0.0) -> None:
            super().__init__()
            self.linear = orthogonal(nn.Linear(width, width))
            self.dropout = nn.Dropout(dropout)

    orthoserde.save(nn.Sequential(Block(3, dropout=0.5)), path, registry=registry)
    assert orthoserde.load(nn.Sequential(Block(3, 0.5)), path, registry=registry).fidelity is Fidelity.EXACT
    with pytest.raises(IncompatibleModelError, match=r"0: tests>Block: dropout is 0\.5 in the file, 0\.0 in the model"):
        orthoserde.load(nn.Sequential(Block(3)), path, registry=registry)


def test_a_registered_module_that_the_file_does_not_know_of_is_unverified(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    orthoserde.save(nn.Sequential(Importable()), path, registry=Registry())
    report = orthoserde.load(nn.Sequential(Importable()), path, registry=IMPORTABLE_REGISTRY)
    assert report.fidelity is Fidelity.UNVERIFIED


def test_a_registered_module_with_a_parametrized_weight_of_its_own_keeps_its_kind(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    registry = Registry()

    @registry.register("tests>MyLinear")
    class MyLinear(nn.Linear):
        def __init__(self, width: int) -> None:
            super().__init__(width, width)

    model = orthogonal(MyLinear(3))
    assert type(model).__name__ == "ParametrizedMyLinear"
    orthoserde.save(model, path, registry=registry)
    assert orthoserde.load(orthogonal(MyLinear(3)), path, registry=registry).fidelity is Fidelity.EXACT
    with pytest.raises(IncompatibleModelError, match="tests>MyLinear, the model the unregistered Linear"):
        orthoserde.load(orthogonal(nn.Linear(3, 3)), path, registry=registry)


def test_a_parametrization_built_for_a_bare_module_uses_no_random_numbers(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    registry = Registry()

    @registry.register("tests>Noisy")
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.noise = nn.Parameter(torch.randn(3))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.noise

    model = linear(Noisy())
    orthoserde.save(model, path, registry=registry)
    bare = nn.Linear(3, 3)
    state = torch.get_rng_state()
    assert orthoserde.load(bare, path, registry=registry).fidelity is Fidelity.EXACT
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(bare.weight, model.weight)


def test_an_argument_that_has_no_truth_value_makes_the_configuration_unknown() -> None:
    registry = Registry()

    @registry.register("tests>Mask")
    class Mask(nn.Module):
        def __init__(self, mask: Tensor) -> None:
            super().__init__()
            self.register_buffer("mask", mask)

    assert config_of(registry, Mask(torch.ones(2, 2))) is None


def test_the_reports_say_what_is_not_known_of_a_registered_class(tmp_path: Path) -> None:
    registry = Registry()

    @registry.register("tests>Function")
    class Function(nn.Module):
        def __init__(self, function: Any) -> None:
            super().__init__()
            self.function = function

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.function(x)
            return result

    saved = orthoserde.save(linear(Function(torch.tanh)), tmp_path / "m", registry=registry)
    assert saved.unconfigured == ("weight",)
    assert "or made before the class was registered): weight" in str(saved)
    loaded = orthoserde.load(linear(Function(torch.sin)), tmp_path / "m", registry=registry)
    assert loaded.fidelity is Fidelity.UNVERIFIED
    assert "the file does not know the configuration of its tests>Function" in str(loaded)


class Turned(nn.Module):
    """With a parameter, a buffer and a child of its own, all of which take part."""

    shift: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((3,), 1 / 3))
        self.register_buffer("shift", torch.full((3,), 1 / 7))
        self.mix = nn.Linear(3, 3, bias=False)

    def forward(self, X: Tensor) -> Tensor:
        """Use them all."""
        turned: Tensor = X * self.scale + self.mix(X) + self.shift
        return turned


def test_a_registered_parametrization_may_have_parameters_of_integers(tmp_path: Path) -> None:
    registry = Registry()
    registry.register("tests>Turned")(Turned)
    own = Turned()
    own.scale = nn.Parameter(torch.tensor([1, 2, 3]), requires_grad=False)
    layer = linear(own)
    orthoserde.save(layer, tmp_path / "m", registry=registry)
    orthoserde.convert(tmp_path / "m", tmp_path / "baked", form="baked", registry=registry)
    assert torch.equal(safetensors.torch.load_file(tmp_path / "baked")["weight"], layer.weight)


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature:UserWarning")
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.bfloat16, torch.float32], ids=str)
def test_a_registered_parametrization_is_computed_in_the_dtypes_of_its_state(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    registry = Registry()
    registry.register("tests>Turned")(Turned)
    layer = linear(Turned()).to(dtype)
    with torch.no_grad():
        for tensor in [*layer.parameters(), *layer.buffers()]:
            tensor.copy_(torch.randn(tensor.shape, dtype=dtype))
        expected = layer.weight.clone()
    path = tmp_path / "model.safetensors"
    orthoserde.save(layer, path, registry=registry, include_weights=True)
    assert torch.equal(safetensors.torch.load_file(path)["weight"], expected)
    orthoserde.convert(path, tmp_path / "baked.safetensors", form="baked", registry=registry)
    assert torch.equal(safetensors.torch.load_file(tmp_path / "baked.safetensors")["weight"], expected)
    orthoserde.bake_(layer, registry=registry)
    assert torch.equal(layer.weight, expected)
