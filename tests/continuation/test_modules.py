"""The modules that people parametrize: restored in place, from the bare module, and from the meta device."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import orthoserde
from orthoserde import Fidelity
from tests.continuation import cases
from tests.continuation.cases import PARAMETRIZERS, SUBJECTS, Subject

#: torch keeps the tensor itself as the only original; weight_norm makes two new ones of it.
SINGLE_ORIGINAL = [name for name in PARAMETRIZERS if name != "weight_norm"]

#: torch refuses to parametrize a square meta tensor with the default ``orthogonal`` (2.4 and later).
SQUARE = {"MultiheadAttention"}


def _combinations(kinds: list[str], *, meta: bool = False) -> list[Any]:
    return [
        pytest.param(subject, kind, id=f"{subject.name}-{kind}")
        for subject in SUBJECTS
        for kind in kinds
        if not (meta and kind == "orthogonal" and subject.name in SQUARE)
    ]


every_combination = pytest.mark.parametrize(("subject", "kind"), _combinations(list(PARAMETRIZERS)))
every_single_original = pytest.mark.parametrize(("subject", "kind"), _combinations(SINGLE_ORIGINAL))
every_meta_combination = pytest.mark.parametrize(("subject", "kind"), _combinations(list(PARAMETRIZERS), meta=True))


@pytest.fixture(autouse=True)
def _own_seed_and_one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def trained(subject: Subject, kind: str) -> nn.Module:
    """A parametrized module whose state training has moved away from where it began."""
    model = subject.parametrized(PARAMETRIZERS[kind])
    cases.train(model, torch.optim.Adam(model.parameters(), lr=1e-2), subject, range(3))
    return model


def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return make()


def evaluated(model: nn.Module, subject: Subject) -> Tensor:
    """The output in evaluation mode, without gradients: where torch takes its fast paths."""
    training = model.training
    model.eval()
    with torch.no_grad():
        output = cases.output_of(model, cases.batch_of(subject, 100))
    model.train(training)
    return output


def strides(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tensor.stride() for name, tensor in model.state_dict().items()}


def assert_same_values(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(got) == list(expected)
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name


def assert_same_model(model: nn.Module, saved: nn.Module, subject: Subject) -> None:
    """Equal now, with the same names, order and strides, and equal after being trained on."""
    assert [type(module).__name__ for module in model.modules()] == [
        type(module).__name__ for module in saved.modules()
    ]
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in saved.named_parameters()]
    assert_same_values(model.state_dict(), saved.state_dict())
    assert strides(model) == strides(saved)
    assert torch.equal(evaluated(model, subject), evaluated(saved, subject))
    ends = []
    for trainee in (model, saved):
        optimizer = torch.optim.Adam(trainee.parameters(), lr=1e-2)
        losses = cases.train(trainee, optimizer, subject, range(3, 6))
        ends.append((losses, cases.everything(trainee, optimizer)))
    assert ends[0][0] == ends[1][0]
    assert_same_values(ends[0][1], ends[1][1])
    assert torch.equal(evaluated(model, subject), evaluated(saved, subject))


class Untouched:
    """Remembers a model and asserts that nothing about it has changed."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.surroundings = cases.surroundings(model)
        self.values = {name: (tensor, copy.deepcopy(tensor.detach())) for name, tensor in self._tensors().items()}

    def _tensors(self) -> dict[str, Tensor]:
        return cases.registered_tensors(self.model)

    def check(self) -> None:
        assert cases.disturbed(self.surroundings, cases.surroundings(self.model)) == []
        now = self._tensors()
        assert list(now) == list(self.values)
        for name, (tensor, value) in self.values.items():
            assert now[name] is tensor, name
            assert tensor.is_meta or torch.equal(tensor, value), name


@pytest.fixture
def traps(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Arm everything that a parametrization needs to be made from a weight, and a load must do without."""

    def trap(name: str) -> Callable[..., Any]:
        def sprung(*_: object, **__: object) -> Any:
            raise AssertionError(f"{name} was called")

        return sprung

    def normal_(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # torch's constructor of spectral_norm fills its vectors at random: on the meta device that draws nothing.
        assert tensor.is_meta, "normal_ was called"
        return tensor

    classes = {
        type(link)
        for parametrizer in PARAMETRIZERS.values()
        for link in _links(parametrizer(nn.Linear(2, 2), "weight"))
    }

    def arm() -> None:
        for module, name in (
            (torch, "geqrf"),
            (torch, "randn"),
            (torch, "rand"),
            (torch.linalg, "qr"),
            (torch.linalg, "svd"),
            (torch.linalg, "householder_product"),
            (torch, "matrix_exp"),
        ):
            monkeypatch.setattr(module, name, trap(name))
        for cls in classes:
            monkeypatch.setattr(cls, "right_inverse", trap("right_inverse"))
        monkeypatch.setattr(torch.Tensor, "normal_", normal_)

    return arm


def _links(model: nn.Module) -> Iterator[nn.Module]:
    for module in model.modules():
        if isinstance(module, parametrize.ParametrizationList):
            yield from module


# In place


@every_combination
def test_a_parametrized_module_is_restored_in_place(subject: Subject, kind: str, path: Path) -> None:
    saved = trained(subject, kind)
    orthoserde.save(saved, path)
    model = subject.parametrized(PARAMETRIZERS[kind])
    before = cases.surroundings(model)
    assert not torch.equal(evaluated(model, subject), evaluated(saved, subject))
    report = orthoserde.load(model, path)
    assert cases.disturbed(before, cases.surroundings(model)) == []
    assert report.fidelity is Fidelity.EXACT
    assert list(report.tensors) == list(subject.tensors)
    assert_same_model(model, saved, subject)


@pytest.mark.parametrize("target", ["parametrized", "bare", "bare on meta"])
@pytest.mark.parametrize("kind", PARAMETRIZERS)
@pytest.mark.parametrize(
    ("subject", "fast_path"),
    [
        pytest.param(subject, fast_path, id=subject.name)
        for subject in SUBJECTS
        for name, fast_path in (
            ("TransformerEncoderLayer", "_transformer_encoder_layer_fwd"),
            ("MultiheadAttention", "_native_multi_head_attention"),
        )
        if subject.name == name
    ],
)
def test_the_inference_fast_path_gives_equal_outputs(
    subject: Subject, fast_path: str, kind: str, target: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = trained(subject, kind)
    orthoserde.save(saved, path)
    targets: dict[str, Callable[[], nn.Module]] = {
        "parametrized": lambda: subject.parametrized(PARAMETRIZERS[kind]),
        "bare": subject.plain,
        "bare on meta": lambda: on_meta(subject.plain),
    }
    model = targets[target]()
    orthoserde.load(model, path)
    calls = []
    torch_fast_path = getattr(torch, fast_path)

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(fast_path)
        return torch_fast_path(*args, **kwargs)

    monkeypatch.setattr(torch, fast_path, counting)
    assert torch.equal(evaluated(model, subject), evaluated(saved, subject))
    assert calls == [fast_path, fast_path]


# From the bare module


@every_combination
def test_a_bare_module_gets_its_parametrizations_back(subject: Subject, kind: str, path: Path) -> None:
    saved = trained(subject, kind)
    orthoserde.save(saved, path)
    bare = subject.plain()
    report = orthoserde.load(bare, path)
    assert report.fidelity is Fidelity.EXACT
    assert list(report) == [[], []]
    assert list(report.tensors) == list(subject.tensors)
    assert all(tensor.action.startswith("parametrization attached") for tensor in report.tensors.values())
    assert_same_model(bare, saved, subject)


@every_combination
def test_reattaching_runs_no_right_inverse_no_factorisation_and_draws_nothing(
    subject: Subject, kind: str, path: Path, traps: Callable[[], None]
) -> None:
    orthoserde.save(trained(subject, kind), path)
    bare = subject.plain()
    before = cases.surroundings(bare)
    traps()
    orthoserde.load(bare, path)
    changed = cases.disturbed(before, cases.surroundings(bare))
    assert {"torch generator", "python generator", "numpy generator"}.isdisjoint(changed)


@pytest.mark.parametrize("kind", PARAMETRIZERS)
def test_parametrizing_by_hand_springs_the_traps(kind: str, traps: Callable[[], None]) -> None:
    linear = nn.Linear(6, 4)
    traps()
    with pytest.raises(AssertionError, match="was called"):
        PARAMETRIZERS[kind](linear, "weight")


@every_single_original
def test_reattaching_one_original_keeps_every_parameter(subject: Subject, kind: str, path: Path) -> None:
    saved = trained(subject, kind)
    orthoserde.save(saved, path)
    bare = subject.plain()
    parameters = dict(bare.named_parameters())
    optimizer = torch.optim.SGD(bare.parameters(), lr=5e-2, momentum=0.9)
    report = orthoserde.load(bare, path)
    assert report.notes == ()
    now = dict(bare.named_parameters())
    for name, parameter in parameters.items():
        module, _, tensor = name.rpartition(".")
        where = f"{module}.parametrizations.{tensor}.original".lstrip(".") if name in subject.tensors else name
        assert now.pop(where) is parameter
    assert now == {}
    # The optimizer was built before the load, and goes on with the parameters it has.
    other = torch.optim.SGD(saved.parameters(), lr=5e-2, momentum=0.9)
    assert cases.train(bare, optimizer, subject, range(3)) == cases.train(saved, other, subject, range(3))
    assert_same_values(bare.state_dict(), saved.state_dict())


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.name)
def test_reattaching_two_originals_says_that_the_parameters_are_new(subject: Subject, path: Path) -> None:
    orthoserde.save(trained(subject, "weight_norm"), path)
    bare = subject.plain()
    plain = {name: parameter for name, parameter in bare.named_parameters() if name not in subject.tensors}
    report = orthoserde.load(bare, path)
    assert len(report.notes) == len(subject.tensors)
    for name, note in zip(subject.tensors, report.notes, strict=True):
        assert note.startswith(f"{name}: its parameters are new")
        assert report.tensors[name].action == "parametrization attached, as new parameters"
    now = dict(bare.named_parameters())
    assert all(now[name] is parameter for name, parameter in plain.items())


@every_combination
@pytest.mark.parametrize("training", [True, False])
def test_reattaching_keeps_training_mode_and_requires_grad_of_the_bare_module(
    subject: Subject, kind: str, training: bool, path: Path
) -> None:
    orthoserde.save(trained(subject, kind), path)
    bare = subject.plain().train(training)
    for name in subject.tensors:
        bare.get_parameter(name).requires_grad_(training)
    orthoserde.load(bare, path)
    assert {module.training for module in bare.modules()} == {training}
    assert all(parameter.requires_grad == training for name, parameter in bare.named_parameters() if "original" in name)
    assert all(parameter.requires_grad for name, parameter in bare.named_parameters() if "original" not in name)


@every_combination
def test_without_reparametrize_a_bare_module_is_refused_and_unchanged(subject: Subject, kind: str, path: Path) -> None:
    orthoserde.save(trained(subject, kind), path)
    bare = subject.plain()
    untouched = Untouched(bare)
    with pytest.raises(orthoserde.IncompatibleModelError, match="parametrized in the file") as caught:
        orthoserde.load(bare, path, reparametrize=False)
    assert [problem.where for problem in caught.value.problems] == list(subject.tensors)
    untouched.check()
    cases.train(bare, torch.optim.SGD(bare.parameters(), lr=1e-2), subject, range(1))


def test_spectral_norm_of_a_transposed_convolution_keeps_its_dim(path: Path) -> None:
    (subject,) = (subject for subject in SUBJECTS if subject.name == "ConvTranspose2d")
    orthoserde.save(trained(subject, "spectral_norm"), path)
    bare = subject.plain()
    orthoserde.load(bare, path)
    (link,) = _links(bare)
    assert link.dim == 1
    # Into a module whose dim is another one, the same file does not go.
    other = parametrizations.spectral_norm(subject.plain(), dim=0)
    untouched = Untouched(other)
    with pytest.raises(orthoserde.IncompatibleModelError, match="dim is 1 in the file, 0 in the model"):
        orthoserde.load(other, path)
    untouched.check()


def test_an_rnn_computes_with_the_reattached_weight(path: Path) -> None:
    (subject,) = (subject for subject in SUBJECTS if subject.name == "GRU")
    orthoserde.save(trained(subject, "orthogonal"), path)
    for model in (subject.plain(), on_meta(subject.plain)):
        orthoserde.load(model, path)
        first = evaluated(model, subject)
        with torch.no_grad():
            next(_links(model)).get_buffer("base").neg_()
        assert not torch.equal(evaluated(model, subject), first)
        cases.output_of(model, cases.batch_of(subject, 0)).sum().backward()  # type: ignore[no-untyped-call]
        original = model.get_parameter("parametrizations.weight_hh_l0.original")
        assert original.grad is not None
        assert original.grad.abs().sum() > 0


# From the meta device


def _parameters_by_key(model: nn.Module) -> dict[str, nn.Parameter]:
    return dict(model.named_parameters(remove_duplicate=False))


@every_combination
def test_a_bare_meta_module_gets_values_and_parametrizations(subject: Subject, kind: str, path: Path) -> None:
    saved = trained(subject, kind)
    orthoserde.save(saved, path)
    bare = on_meta(subject.plain)
    assert all(parameter.is_meta for parameter in bare.parameters())
    before = _parameters_by_key(bare)
    report = orthoserde.load(bare, path)
    assert report.fidelity is Fidelity.EXACT
    now = _parameters_by_key(bare)
    assert all(now[name] is parameter for name, parameter in before.items() if name in now)
    assert_same_model(bare, saved, subject)


@every_meta_combination
def test_a_parametrized_meta_module_gets_values_and_its_missing_base(subject: Subject, kind: str, path: Path) -> None:
    saved = trained(subject, kind)
    orthoserde.save(saved, path)
    model = on_meta(lambda: subject.parametrized(PARAMETRIZERS[kind]))
    if kind == "orthogonal":
        assert {link.base for link in _links(model)} == {None}
    before = _parameters_by_key(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=5e-2, momentum=0.9)
    generator = torch.get_rng_state()
    report = orthoserde.load(model, path)
    assert torch.equal(torch.get_rng_state(), generator)
    assert report.fidelity is Fidelity.EXACT
    assert {name: id(parameter) for name, parameter in _parameters_by_key(model).items()} == {
        name: id(parameter) for name, parameter in before.items()
    }
    assert strides(model) == strides(saved)
    # The optimizer was built while everything was on meta.
    other = torch.optim.SGD(saved.parameters(), lr=5e-2, momentum=0.9)
    assert cases.train(model, optimizer, subject, range(3)) == cases.train(saved, other, subject, range(3))
    assert_same_model(model, saved, subject)


@every_single_original
def test_a_bare_meta_module_keeps_every_parameter_where_there_is_one_original(
    subject: Subject, kind: str, path: Path
) -> None:
    orthoserde.save(trained(subject, kind), path)
    bare = on_meta(subject.plain)
    before = {id(parameter) for parameter in bare.parameters()}
    orthoserde.load(bare, path)
    assert {id(parameter) for parameter in bare.parameters()} == before


@pytest.mark.parametrize("device", [None, "cpu", torch.device("cpu")], ids=str)
@pytest.mark.parametrize("kind", PARAMETRIZERS)
def test_meta_tensors_are_placed_on_the_device_that_was_asked_for(
    kind: str, device: torch.device | str | None, path: Path
) -> None:
    subject = SUBJECTS[0]
    orthoserde.save(trained(subject, kind), path)
    for model in (on_meta(subject.plain), on_meta(lambda: subject.parametrized(PARAMETRIZERS[kind]))):
        orthoserde.load(model, path, device=device)
        assert {tensor.device for tensor in cases.registered_tensors(model).values()} == {torch.device("cpu")}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_meta_tensors_are_placed_on_cuda(path: Path) -> None:
    subject = SUBJECTS[0]
    for kind, parametrizer in PARAMETRIZERS.items():
        saved = trained(subject, kind)
        orthoserde.save(saved, path)
        for model in (on_meta(subject.plain), on_meta(functools.partial(subject.parametrized, parametrizer))):
            orthoserde.load(model, path, device="cuda")
            assert {tensor.device.type for tensor in cases.registered_tensors(model).values()} == {"cuda"}
            assert_same_values({name: tensor.cpu() for name, tensor in model.state_dict().items()}, saved.state_dict())


@pytest.mark.parametrize("kind", PARAMETRIZERS)
@pytest.mark.parametrize("bare", [True, False])
def test_a_device_that_is_not_there_fails_before_the_model_changes(kind: str, bare: bool, path: Path) -> None:
    subject = SUBJECTS[0]
    orthoserde.save(trained(subject, kind), path)
    model = on_meta(subject.plain if bare else lambda: subject.parametrized(PARAMETRIZERS[kind]))
    untouched = Untouched(model)
    # One more than there are: an index that no machine has, with or without CUDA.
    absent = f"cuda:{torch.cuda.device_count()}"
    with pytest.raises(orthoserde.ConfigError, match=r"^device: .*(CUDA|NVIDIA)"):
        orthoserde.load(model, path, device=absent)
    untouched.check()


def test_a_device_without_memory_is_refused(path: Path) -> None:
    subject = SUBJECTS[0]
    orthoserde.save(trained(subject, "orthogonal"), path)
    model = on_meta(subject.plain)
    untouched = Untouched(model)
    with pytest.raises(ValueError, match="expected a device with memory"):
        orthoserde.load(model, path, device="meta")
    untouched.check()


def test_only_meta_tensors_are_placed(path: Path) -> None:
    subject = SUBJECTS[0]

    def two(first: nn.Module, second: nn.Module) -> nn.Sequential:
        return nn.Sequential(first, nn.Linear(4, 6), second)

    saved = two(trained(subject, "orthogonal"), trained(subject, "spectral_norm"))
    orthoserde.save(saved, path)
    model = two(subject.parametrized(parametrizations.orthogonal), on_meta(subject.plain))
    here = {name: tensor for name, tensor in cases.registered_tensors(model).items() if not tensor.is_meta}
    places = {name: tensor.data_ptr() for name, tensor in here.items()}
    orthoserde.load(model, path, device="cpu")
    assert all(cases.registered_tensors(model)[name] is tensor for name, tensor in here.items())
    assert {name: tensor.data_ptr() for name, tensor in here.items()} == places
    assert_same_model(model, saved, subject)
