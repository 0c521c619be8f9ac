"""One tree that holds every parametrization of torch, the user's own, and every way in which tensors are shared."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import orthoserde
from orthoserde import Fidelity, IncompatibleModelError
from tests.continuation import cases

REGISTRY = orthoserde.Registry()


@REGISTRY.register("continuation>Symmetric", version=3)
class Symmetric(nn.Module):
    """Configuration, a trained scale and a buffer of its own."""

    def __init__(self, diagonal: float = 0.5, *, upper: bool = True) -> None:
        super().__init__()
        self.diagonal = diagonal
        self.upper = upper
        self.scale = nn.Parameter(torch.rand(()) + 0.5)
        self.register_buffer("shift", torch.rand(1))

    def forward(self, weight: Tensor) -> Tensor:
        half = weight.triu(1) if self.upper else weight.tril(-1).mT
        eye = torch.eye(weight.size(-1))
        return self.scale * (half + half.mT) + self.diagonal * eye + self.get_buffer("shift")


@REGISTRY.register("continuation>Doubled")
class Doubled(nn.Module):
    """No state at all."""

    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight / 2


@REGISTRY.register("continuation>Sum")
class Sum(nn.Module):
    """Two originals, the second of another shape."""

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return first + second

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return weight / 2, weight[:1] / 2


@REGISTRY.register("continuation>Rotated")
class Rotated(nn.Module):
    """A child that is parametrized itself, and a parameter of its own that is."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.rotation = parametrizations.orthogonal(nn.Linear(size, size, bias=False))
        self.gain = nn.Parameter(torch.rand(size) + 0.5)
        parametrize.register_parametrization(self, "gain", Doubled())

    def forward(self, weight: Tensor) -> Tensor:
        return (weight * self.gain) @ cast("Tensor", self.rotation.weight)


@REGISTRY.register("continuation>Masked")
class Masked(nn.Module):
    """A buffer that its constructor computes and that no checkpoint holds."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones(size, size).tril(), persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.get_buffer("mask")


class Unregistered(nn.Module):
    """A class of the user's that nobody registered."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor
        self.offset = nn.Parameter(torch.rand(()))

    def forward(self, weight: Tensor) -> Tensor:
        return self.factor * weight + self.offset


@REGISTRY.register("continuation>Block")
class Block(nn.Module):
    """A registered module, one of whose tensors is parametrized."""

    def __init__(self, size: int, slope: float = 0.1) -> None:
        super().__init__()
        self.slope = slope
        self.weight = nn.Parameter(torch.randn(size, size))

    def forward(self, features: Tensor) -> Tensor:
        return nn.functional.leaky_relu(features @ self.weight, self.slope)


class Vector(nn.Module):
    """A one-dimensional weight, and a parametrized buffer."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size))
        self.register_buffer("mixing", torch.randn(size, size))

    def forward(self, features: Tensor) -> Tensor:
        return features * self.weight + features @ cast("Tensor", self.mixing)


def _chain(module: nn.Module, *links: nn.Module, name: str = "weight") -> nn.Module:
    for link in links:
        parametrize.register_parametrization(module, name, link)
    return module


SIZE = 4


class Tree(nn.Module):
    """Everything at once.

    Args:
        bare: Leave out the parametrizations.
        opaque: With a parametrization of an unregistered class.
        shared: With tied weights, a module that is used twice, and a parametrization that two tensors share.
    """

    def __init__(self, *, bare: bool = False, opaque: bool = True, shared: bool = True) -> None:
        super().__init__()
        torch_maps = nn.ModuleDict()
        for orthogonal_map in cases.ORTHOGONAL_MAPS:
            for trivialized in (True, False):
                for shape in ((SIZE, SIZE), (6, SIZE)):
                    name = f"{orthogonal_map}_{'trivialized' if trivialized else 'untrivialized'}_{shape[0]}"
                    torch_maps[name] = cases.Holder(shape, torch.float32)
                    if not bare:
                        parametrizations.orthogonal(
                            torch_maps[name], "weight", orthogonal_map, use_trivialization=trivialized
                        )
        self.torch_maps = torch_maps
        parametrizers: list[Callable[[nn.Module], nn.Module]] = [
            *(functools.partial(cases.weight_norm, dim=dim) for dim in (0, 1, None)),
            parametrizations.spectral_norm,
            functools.partial(parametrizations.spectral_norm, n_power_iterations=3, eps=1e-5, dim=1),
            lambda module: _chain(module, Symmetric(0.25, upper=False)),
            lambda module: _chain(module, Symmetric(), Doubled()),
            lambda module: parametrizations.spectral_norm(_chain(module, Doubled())),
            lambda module: _chain(parametrizations.weight_norm(module), Symmetric(0.75)),
            lambda module: _chain(module, Sum()),
            lambda module: _chain(module, Rotated(SIZE)),
            lambda module: _chain(module, Masked(SIZE)),
        ]
        if opaque:
            parametrizers.append(lambda module: _chain(module, Unregistered(3.0)))
        self.linears = nn.Sequential(*(nn.Linear(SIZE, SIZE) for _ in parametrizers))
        for linear, parametrizer in zip(self.linears, parametrizers, strict=True):
            if not bare:
                parametrizer(linear)
        self.conv = nn.Conv2d(1, 3, (3, 2), padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.block = Block(SIZE)
        self.vector = Vector(SIZE)
        self.two = nn.Bilinear(SIZE, SIZE, SIZE)
        if not bare:
            parametrizations.spectral_norm(self.conv)
            _chain(self.block, Symmetric(1.5))
            parametrizations.spectral_norm(self.vector)
            _chain(self.vector, Doubled(), name="mixing")
            parametrizations.weight_norm(self.two)
            _chain(self.two, Doubled(), name="bias")
        self.shared = shared
        if shared:
            self.embedding = nn.Embedding(10, SIZE)
            self.decoder = nn.Linear(SIZE, 10)
            self.decoder.weight = self.embedding.weight
            self.twice = nn.ModuleList([nn.Linear(SIZE, SIZE)] * 2)
            self.left = nn.Linear(SIZE, SIZE)
            self.right = nn.Linear(SIZE, SIZE)
            if not bare:
                parametrizations.orthogonal(self.twice[0])
                both = Symmetric(2.0)
                _chain(self.left, both)
                _chain(self.right, both)

    def forward(self, features: Tensor) -> Tensor:
        for holder in self.torch_maps.values():
            features = torch.tanh(holder(features))[..., :SIZE]
        for linear in self.linears:
            features = torch.tanh(linear(features))
        features = features + self.norm(self.conv(features[None, None])).mean((0, 1))[:-1, :SIZE].mean(0)
        features = torch.tanh(self.vector(self.block(features)))
        features = torch.tanh(self.two(features, features))
        if self.shared:
            for module in (*self.twice, self.left, self.right):
                features = torch.tanh(module(features))
            features = torch.tanh(self.decoder(features)) @ self.embedding.weight
        return features


STEPS = 3


@pytest.fixture(autouse=True)
def _own_seed_and_one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        yield
    torch.set_num_threads(threads)


def trained(**options: bool) -> Tree:
    tree = Tree(**options)
    tree.train()
    train(tree, range(STEPS))
    return tree


def train(tree: Tree, steps: range) -> tuple[list[float], dict[str, Tensor]]:
    case = cases.Case("tree", Tree, lambda generator: (torch.randn(7, SIZE, generator=generator),), "adam")
    optimizer = cases.OPTIMIZERS[case.optimizer](tree.parameters())
    return cases.train(tree, optimizer, case, steps), cases.everything(tree, optimizer)


def state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict as torch gives it, copied."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(got) == list(expected)
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype, name
        assert got[name].stride() == tensor.stride(), name
        assert torch.equal(got[name], tensor), name


def test_the_tree_holds_what_it_is_meant_to_hold() -> None:
    tree = Tree()
    records = {record.name: record for record in orthoserde.parametrized_tensors(tree)}
    links = {type(link).__name__ for record in records.values() for link in record.parametrizations}
    assert links == {
        *("_Orthogonal", "_WeightNorm", "_SpectralNorm"),
        *("Symmetric", "Doubled", "Sum", "ParametrizedRotated", "Masked", "Unregistered"),
    }
    assert [name for name, record in records.items() if len(record.parametrizations) == 2] == [
        f"linears.{i}.weight" for i in (6, 7, 8)
    ]
    assert [name for name, record in records.items() if not record.parameter] == ["vector.mixing"]
    assert [name for name, record in records.items() if record.aliases] == ["twice.0.weight"]
    assert {"linears.10.parametrizations.weight.0.gain", "linears.10.parametrizations.weight.0.rotation.weight"} < set(
        records
    )
    assert len(cast("nn.ModuleDict", tree.vector.parametrizations)) == 2
    assert tree.get_buffer("norm.running_mean").shape == (3,)


def test_every_part_of_the_tree_is_trained() -> None:
    # Else equal values after training would say little.
    tree = trained()
    unmoved = [
        name for name, parameter in tree.named_parameters() if parameter.requires_grad and parameter.grad is None
    ]
    assert unmoved == []


@pytest.mark.parametrize("opaque", [True, False])
def test_the_whole_tree_is_restored_bit_for_bit_and_trains_on(opaque: bool, tmp_path: Path) -> None:
    path = tmp_path / "tree.safetensors"
    tree = trained(opaque=opaque)
    expected = state(tree)
    saved = orthoserde.save(tree, path, registry=REGISTRY)
    assert_same(state(tree), expected)

    other = Tree(opaque=opaque)
    assert not torch.equal(other.get_parameter("linears.0.bias"), tree.get_parameter("linears.0.bias"))
    before = cases.surroundings(other)
    report = orthoserde.load(other, path, registry=REGISTRY)
    assert cases.disturbed(before, cases.surroundings(other)) == []
    assert_same(state(other), expected)

    names = [record.name for record in orthoserde.parametrized_tensors(tree)]
    assert saved.parametrized == len(names)
    assert saved.opaque == (("linears.12.weight",) if opaque else ())
    assert saved.left_out == ()
    assert list(report.tensors) == names
    assert list(report) == [[], []]
    assert report.notes == ()
    assert report.fidelity is (Fidelity.UNVERIFIED if opaque else Fidelity.EXACT)
    for name, tensor in report.tensors.items():
        expected_fidelity = Fidelity.UNVERIFIED if name == "linears.12.weight" else Fidelity.EXACT
        assert tensor.fidelity is expected_fidelity, name

    steps = range(STEPS, STEPS + 3)
    losses, ends = train(tree, steps)
    other_losses, other_ends = train(other, steps)
    assert other_losses == losses
    assert_same(other_ends, ends)


def test_the_save_report_names_what_is_shared(tmp_path: Path) -> None:
    report = orthoserde.save(Tree(), tmp_path / "tree.safetensors", registry=REGISTRY)
    prefix = "twice.{}.parametrizations.weight"
    assert report.aliases == {
        "decoder.weight": "embedding.weight",
        "twice.1.bias": "twice.0.bias",
        f"{prefix}.original".format(1): f"{prefix}.original".format(0),
        f"{prefix}.0.base".format(1): f"{prefix}.0.base".format(0),
        "right.parametrizations.weight.0.scale": "left.parametrizations.weight.0.scale",
        "right.parametrizations.weight.0.shift": "left.parametrizations.weight.0.shift",
    }
    assert report.needs_orthoserde == ("tied tensors are stored once",)


def test_shared_tensors_are_still_shared_after_a_load(tmp_path: Path) -> None:
    path = tmp_path / "tree.safetensors"
    orthoserde.save(trained(), path, registry=REGISTRY)
    tree = Tree()
    orthoserde.load(tree, path, registry=REGISTRY)
    assert tree.decoder.weight is tree.embedding.weight
    assert tree.twice[0] is tree.twice[1]
    left, right = (cast("Any", module.parametrizations).weight[0] for module in (tree.left, tree.right))
    assert left is right


@pytest.mark.parametrize("opaque", [True, False])
def test_saving_the_loaded_tree_gives_the_same_bytes(opaque: bool, tmp_path: Path) -> None:
    first, second, third = (tmp_path / f"{name}.safetensors" for name in ("first", "second", "third"))
    tree = trained(opaque=opaque)
    orthoserde.save(tree, first, registry=REGISTRY)
    orthoserde.save(tree, second, registry=REGISTRY)
    other = Tree(opaque=opaque)
    orthoserde.load(other, first, registry=REGISTRY)
    orthoserde.save(other, third, registry=REGISTRY)
    assert second.read_bytes() == first.read_bytes()
    assert third.read_bytes() == first.read_bytes()


@pytest.mark.parametrize("opaque", [True, False])
def test_torch_and_safetensors_alone_load_a_tree_without_ties(opaque: bool, tmp_path: Path) -> None:
    path = tmp_path / "tree.safetensors"
    tree = trained(opaque=opaque, shared=False)
    report = orthoserde.save(tree, path, registry=REGISTRY)
    assert report.needs_orthoserde == ()
    other = Tree(opaque=opaque, shared=False)
    result = other.load_state_dict(safetensors.torch.load_file(path))
    assert result.missing_keys == []
    assert result.unexpected_keys == []
    assert_same(state(other), state(tree))


@pytest.mark.parametrize("where", ["cpu", "meta"])
def test_a_bare_tree_gets_every_parametrization_back(where: str, tmp_path: Path) -> None:
    path = tmp_path / "tree.safetensors"
    tree = trained(opaque=False, shared=False)
    orthoserde.save(tree, path, registry=REGISTRY)
    with torch.device(where):
        other = Tree(bare=True, opaque=False, shared=False)
    generator = torch.get_rng_state()
    report = orthoserde.load(other, path, registry=REGISTRY)
    assert torch.equal(torch.get_rng_state(), generator)
    assert report.fidelity is Fidelity.EXACT
    assert sorted(name for name, tensor in report.tensors.items() if "new parameters" in tensor.action) == sorted(
        f"{name}.weight" for name in ("linears.0", "linears.1", "linears.2", "linears.8", "linears.9", "two")
    )
    assert_same(state(other), state(tree))
    assert [name for name, _ in other.named_parameters()] == [name for name, _ in tree.named_parameters()]
    assert [type(module).__name__ for module in other.modules()] == [type(module).__name__ for module in tree.modules()]
    steps = range(STEPS, STEPS + 3)
    losses, ends = train(tree, steps)
    other_losses, other_ends = train(other, steps)
    assert other_losses == losses
    assert_same(other_ends, ends)


def test_a_bare_module_that_is_used_twice_gets_one_parametrization(tmp_path: Path) -> None:
    path = tmp_path / "twice.safetensors"
    linear = parametrizations.orthogonal(nn.Linear(SIZE, 3))
    orthoserde.save(nn.ModuleList([linear, nn.Linear(3, SIZE), linear]), path)
    bare = nn.Linear(SIZE, 3)
    model = nn.ModuleList([bare, nn.Linear(3, SIZE), bare])
    report = orthoserde.load(model, path)
    assert list(report.tensors) == ["0.weight"]
    assert model[0] is model[2]
    assert torch.equal(bare.weight, cast("Tensor", linear.weight))


def test_a_parametrization_that_two_tensors_share_is_not_split_by_reattaching(tmp_path: Path) -> None:
    path = tmp_path / "shared.safetensors"
    both = Symmetric()
    orthoserde.save(nn.ModuleList(_chain(nn.Linear(SIZE, SIZE), both) for _ in range(2)), path, registry=REGISTRY)
    bare = nn.ModuleList(nn.Linear(SIZE, SIZE) for _ in range(2))
    before, values = cases.surroundings(bare), state(bare)
    with pytest.raises(IncompatibleModelError, match=r"tied to 0\.parametrizations\.weight\.0\.scale"):
        orthoserde.load(bare, path, registry=REGISTRY)
    assert cases.disturbed(before, cases.surroundings(bare)) == []
    assert_same(state(bare), values)


@pytest.mark.parametrize(
    ("change", "where", "text"),
    [
        pytest.param(
            lambda tree: setattr(tree.decoder, "weight", nn.Parameter(torch.zeros(10, SIZE))),
            "decoder.weight",
            "tied to embedding.weight in the file, a separate parameter in the model",
            id="a lost tie",
        ),
        pytest.param(
            lambda tree: _chain(tree.left, Doubled()),
            "left.weight",
            "the file has continuation>Symmetric, the model Symmetric, then Doubled",
            id="one link more",
        ),
        pytest.param(
            lambda tree: setattr(tree, "block", _chain(Block(SIZE), Symmetric(1.25))),
            "block.weight",
            "continuation>Symmetric: diagonal is 1.5 in the file, 1.25 in the model",
            id="another configuration of a parametrization",
        ),
        pytest.param(
            lambda tree: setattr(tree, "block", _chain(Block(SIZE, 0.2), Symmetric(1.5))),
            "block",
            "continuation>Block: slope is 0.1 in the file, 0.2 in the model",
            id="another configuration of a module",
        ),
        pytest.param(
            lambda tree: setattr(tree.linears, "4", parametrizations.spectral_norm(nn.Linear(SIZE, SIZE), dim=1)),
            "linears.4.weight",
            "torch>spectral_norm: eps is 1e-05 in the file, 1e-12 in the model",
            id="another configuration of torch's",
        ),
    ],
)
def test_a_tree_that_differs_in_one_place_is_refused_and_unchanged(
    change: Callable[[Tree], object], where: str, text: str, tmp_path: Path
) -> None:
    path = tmp_path / "tree.safetensors"
    orthoserde.save(trained(), path, registry=REGISTRY)
    other = Tree()
    change(other)
    before, values = cases.surroundings(other), state(other)
    with pytest.raises(IncompatibleModelError) as caught:
        orthoserde.load(other, path, registry=REGISTRY)
    assert {problem.where for problem in caught.value.problems} == {where}
    assert text in str(caught.value)
    assert cases.disturbed(before, cases.surroundings(other)) == []
    assert_same(state(other), values)


def test_a_module_that_lost_one_of_two_parametrizations_gets_it_back(tmp_path: Path) -> None:
    path = tmp_path / "tree.safetensors"
    tree = trained()
    orthoserde.save(tree, path, registry=REGISTRY)
    other = Tree()
    parametrize.remove_parametrizations(other.vector, "weight")
    report = orthoserde.load(other, path, registry=REGISTRY)
    assert {name: tensor.action for name, tensor in report.tensors.items() if tensor.name.startswith("vector")} == {
        "vector.weight": "parametrization attached",
        "vector.mixing": "restored in place",
    }
    got, expected = state(other), state(tree)
    assert_same({name: got[name] for name in sorted(got)}, {name: expected[name] for name in sorted(expected)})
