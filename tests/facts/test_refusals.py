"""Everything that a load refuses, refuses by name, and leaves the model, to the last bit, as it was."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

import orthoserde
from orthoserde import (
    CheckpointNotFoundError,
    DamagedFileError,
    Fidelity,
    FileAccessError,
    FileFormatError,
    IncompatibleModelError,
    Registry,
)
from tests.helpers import (
    assert_same_state,
    assert_unchanged,
    bits,
    flip_bit,
    header_bytes,
    lived_in,
    same_bits,
    scramble_,
    slots_of,
    snapshot,
)

Make = Callable[[], nn.Module]


class Scaled(nn.Module):
    """A user's parametrization with a setting and a tensor."""

    def __init__(self, factor: float = 2.0) -> None:
        super().__init__()
        self.factor = factor
        self.shift = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor + self.shift

    def right_inverse(self, x: Tensor) -> Tensor:
        return (x - self.shift) / self.factor


class Shifted(Scaled):
    """Another one, with the same tensors."""


class Split(nn.Module):
    """A user's parametrization with two originals."""

    def forward(self, upper: Tensor, lower: Tensor) -> Tensor:
        return upper + lower

    def right_inverse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x / 2, x / 2


class Parts(nn.Module):
    """Has as many originals as it is told, by an attribute that is in no configuration."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def forward(self, *parts: Tensor) -> Tensor:
        return torch.stack(parts).sum(0)

    def right_inverse(self, x: Tensor) -> list[Tensor]:
        return [x / self.count] * self.count


class Block(nn.Linear):
    """A user's module, registered or not."""

    def __init__(self, width: int, rate: float = 0.5) -> None:
        super().__init__(width, width)
        self.rate = rate


def registry_of(*classes: type[nn.Module], version: int = 1) -> Registry:
    registry = Registry()
    for cls in classes:
        registry.register(f"lab>{cls.__name__}", version)(cls)
    return registry


KNOWN = registry_of(Scaled, Shifted, Split, Block)
NOBODY = Registry()


def linear(size: int = 4, dtype: torch.dtype = torch.float32) -> nn.Module:
    return nn.Linear(size, size, dtype=dtype)


def with_links(*parametrizations: nn.Module) -> nn.Module:
    module = linear()
    for parametrization in parametrizations:
        parametrize.register_parametrization(module, "weight", parametrization)
    return module


def tied(*, together: bool) -> nn.Module:
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    if together:
        second.weight = first.weight
    return nn.Sequential(first, second)


def expanded() -> nn.Module:
    module = nn.Linear(3, 4)
    module.weight = nn.Parameter(torch.randn(4, 1).expand(4, 3))
    return module


def batch_norm(*, running: bool) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, track_running_stats=running))


@dataclass(frozen=True)
class Case:
    """A file and a model that do not fit.

    Attributes:
        saved: Makes the model that is saved.
        target: Makes the model to load into.
        words: What the message must say.
        problems: Where each problem is, and of which kind; all of them.
        reparametrize: An argument of the load.
        writer: Classes that are registered when saving.
        reader: Classes that are registered when loading.
        lenient: Whether strict=False permits it.
    """

    saved: Make
    target: Make
    words: tuple[str, ...]
    problems: tuple[tuple[str, str], ...] = (("weight", "mismatch"),)
    reparametrize: bool = True
    writer: Registry = field(default=KNOWN)
    reader: Registry = field(default=KNOWN)
    lenient: bool = False


ORIGINAL = "parametrizations.weight.original"

CASES: dict[str, Case] = {
    # Configuration
    "wrong map": Case(
        lambda: orthogonal(linear(), orthogonal_map="cayley"),
        lambda: orthogonal(linear(), orthogonal_map="matrix_exp"),
        ("torch>orthogonal", "orthogonal_map is 'cayley' in the file, 'matrix_exp' in the model"),
    ),
    "trivialization against none": Case(
        lambda: orthogonal(linear(), use_trivialization=True),
        lambda: orthogonal(linear(), use_trivialization=False),
        ("use_trivialization is True in the file, False in the model",),
    ),
    "other dim of spectral_norm": Case(
        lambda: spectral_norm(linear(), dim=0),
        lambda: spectral_norm(linear(), dim=1),
        ("torch>spectral_norm", "dim is 0 in the file, 1 in the model"),
    ),
    "other n_power_iterations": Case(
        lambda: spectral_norm(linear(), n_power_iterations=1),
        lambda: spectral_norm(linear(), n_power_iterations=2),
        ("n_power_iterations is 1 in the file, 2 in the model",),
    ),
    "other eps": Case(
        lambda: spectral_norm(linear(), eps=1e-12),
        lambda: spectral_norm(linear(), eps=1e-6),
        ("eps is 1e-12 in the file, 1e-06 in the model",),
    ),
    "other dim of weight_norm": Case(
        lambda: weight_norm(linear(1), dim=0),
        lambda: weight_norm(linear(1), dim=1),
        ("torch>weight_norm", "dim is 0 in the file, 1 in the model"),
    ),
    "every setting of spectral_norm": Case(
        lambda: spectral_norm(linear(), dim=0, eps=1e-12, n_power_iterations=1),
        lambda: spectral_norm(linear(), dim=1, eps=1e-6, n_power_iterations=2),
        ("dim is", "eps is", "n_power_iterations is", "3 problems"),
        (("weight", "mismatch"),) * 3,
    ),
    # Classes
    "another torch parametrization": Case(
        lambda: orthogonal(linear(), use_trivialization=False),
        lambda: with_links(Scaled()),
        ("torch>orthogonal", "lab>Scaled"),
    ),
    "another registered class": Case(
        lambda: with_links(Scaled()), lambda: with_links(Shifted()), ("lab>Scaled", "lab>Shifted")
    ),
    "another setting of a registered class": Case(
        lambda: with_links(Scaled(2.0)), lambda: with_links(Scaled(3.0)), ("factor is 2.0 in the file, 3.0",)
    ),
    "another unregistered class": Case(
        lambda: with_links(Scaled()), lambda: with_links(Shifted()), ("Scaled", "Shifted"), writer=NOBODY, reader=NOBODY
    ),
    "registered in the file, unregistered here": Case(
        lambda: with_links(Scaled()), lambda: with_links(Scaled()), ("lab>Scaled", "unregistered"), reader=NOBODY
    ),
    "another setting of a registered module": Case(
        lambda: nn.Sequential(Block(3, 0.5)),
        lambda: nn.Sequential(Block(3, 0.25)),
        ("lab>Block", "rate is 0.5 in the file, 0.25 in the model"),
        (("0", "mismatch"),),
    ),
    "a registered module against a plain one": Case(
        lambda: nn.Sequential(Block(3)),
        lambda: nn.Sequential(nn.Linear(3, 3)),
        ("lab>Block", "Linear"),
        (("0", "mismatch"),),
    ),
    "a newer version of a registered class": Case(
        lambda: with_links(Scaled()),
        lambda: with_links(Scaled()),
        ("version 3 of lab>Scaled", "version 1"),
        writer=registry_of(Scaled, version=3),
    ),
    "a newer version of a registered class, bare": Case(
        lambda: with_links(Scaled()), linear, ("version 3 of lab>Scaled",), writer=registry_of(Scaled, version=3)
    ),
    "an older version without an upgrade": Case(
        lambda: with_links(Scaled()),
        lambda: with_links(Scaled()),
        ("version 1", "version 2", "upgrade"),
        reader=registry_of(Scaled, version=2),
    ),
    # Chains and originals
    "a longer chain in the file": Case(
        lambda: with_links(Scaled(), Shifted()), lambda: with_links(Scaled()), ("lab>Scaled, then lab>Shifted",)
    ),
    "a longer chain in the model": Case(
        lambda: with_links(Scaled()), lambda: with_links(Scaled(), Shifted()), ("the model Scaled, then Shifted",)
    ),
    "a chain in another order": Case(
        lambda: with_links(Scaled(), Shifted()),
        lambda: with_links(Shifted(), Scaled()),
        ("the file has lab>Scaled, the model lab>Shifted", "the file has lab>Shifted, the model lab>Scaled"),
        (("weight", "mismatch"),) * 2,
    ),
    "more originals in the file": Case(
        lambda: with_links(Split()), lambda: with_links(Scaled()), ("lab>Split", "lab>Scaled")
    ),
    "two originals against one": Case(
        lambda: with_links(Split(), Scaled()),
        lambda: with_links(Scaled(), Scaled()),
        ("the file has lab>Split, the model lab>Scaled",),
    ),
    "another number of originals of one class": Case(
        lambda: with_links(Parts(2)),
        lambda: with_links(Parts(3)),
        ("['original0', 'original1']", "['original0', 'original1', 'original2']"),
        writer=NOBODY,
        reader=NOBODY,
    ),
    "one original against several of one class": Case(
        lambda: with_links(Parts(3)),
        lambda: with_links(Parts(1)),
        ("['original0', 'original1', 'original2']", "['original0']"),
        writer=NOBODY,
        reader=NOBODY,
    ),
    "plain in the file": Case(
        linear,
        lambda: orthogonal(linear(), orthogonal_map="cayley", use_trivialization=False),
        ("computed weight alone", "torch>orthogonal cannot be recovered"),
    ),
    # Bare modules
    "reparametrize=False": Case(
        lambda: orthogonal(linear()),
        linear,
        ("parametrized in the file", "torch>orthogonal", "plain in the model"),
        reparametrize=False,
    ),
    "an opaque class, bare": Case(lambda: with_links(Scaled()), linear, ("Scaled", "register"), writer=NOBODY),
    "an unknown kind, bare": Case(
        lambda: with_links(Scaled()), linear, ("lab>Scaled", "not registered"), reader=NOBODY
    ),
    "an opaque class second in a chain, bare": Case(
        lambda: with_links(Scaled(), Shifted()),
        linear,
        ("Shifted", "not registered"),
        writer=registry_of(Scaled),
        reader=registry_of(Scaled),
    ),
    "another shape, bare": Case(
        lambda: orthogonal(linear(4)),
        lambda: linear(3),
        ("[4, 4]", "[3, 3]"),
        (("bias", "mismatch"), ("weight", "mismatch")),
    ),
    # Keys, shapes, dtypes
    "missing keys": Case(
        lambda: nn.Sequential(linear()),
        lambda: nn.Sequential(linear(), linear()),
        ("1.weight", "in the model, not in the file"),
        (("1.bias", "missing"), ("1.weight", "missing")),
        lenient=True,
    ),
    "unexpected keys": Case(
        lambda: nn.Sequential(linear(), linear()),
        lambda: nn.Sequential(linear()),
        ("1.weight", "in the file, not in the model"),
        (("1.bias", "unexpected"), ("1.weight", "unexpected")),
        lenient=True,
    ),
    "missing parametrized keys": Case(
        lambda: nn.Sequential(linear()),
        lambda: nn.Sequential(linear(), orthogonal(linear())),
        ("1.parametrizations.weight.0.base",),
        (
            ("1.bias", "missing"),
            ("1.parametrizations.weight.0.base", "missing"),
            ("1.parametrizations.weight.original", "missing"),
        ),
        lenient=True,
    ),
    "unexpected parametrized keys": Case(
        lambda: nn.Sequential(linear(), orthogonal(linear())),
        lambda: nn.Sequential(linear()),
        ("1.parametrizations.weight.0.base",),
        (
            ("1.bias", "unexpected"),
            ("1.parametrizations.weight.0.base", "unexpected"),
            ("1.parametrizations.weight.original", "unexpected"),
        ),
        lenient=True,
    ),
    "a buffer that is None by intention": Case(
        lambda: batch_norm(running=True),
        lambda: batch_norm(running=False),
        ("1.running_mean",),
        (
            ("1.num_batches_tracked", "unexpected"),
            ("1.running_mean", "unexpected"),
            ("1.running_var", "unexpected"),
        ),
        lenient=True,
    ),
    "another shape": Case(
        lambda: linear(4),
        lambda: linear(3),
        ("shape [4, 4] in the file, [3, 3] in the model",),
        (("bias", "mismatch"), ("weight", "mismatch")),
    ),
    "a transposed shape": Case(
        lambda: nn.Linear(3, 4, bias=False), lambda: nn.Linear(4, 3, bias=False), ("[4, 3] in the file, [3, 4]",)
    ),
    "float64 into float32": Case(
        lambda: linear(4, torch.float64),
        linear,
        ("float64 in the file, float32 in the model, which cannot hold it exactly",),
        (("bias", "mismatch"), ("weight", "mismatch")),
    ),
    "float32 into bfloat16": Case(
        linear,
        lambda: linear(4, torch.bfloat16),
        ("float32 in the file, bfloat16 in the model",),
        (("bias", "mismatch"), ("weight", "mismatch")),
    ),
    "float16 into bfloat16": Case(
        lambda: linear(4, torch.float16),
        lambda: linear(4, torch.bfloat16),
        ("float16 in the file, bfloat16 in the model",),
        (("bias", "mismatch"), ("weight", "mismatch")),
    ),
    "float64 into float32, parametrized": Case(
        lambda: orthogonal(linear(4, torch.float64)),
        lambda: orthogonal(linear()),
        ("float64 in the file, float32 in the model",),
        (("bias", "mismatch"), ("parametrizations.weight.0.base", "mismatch"), (ORIGINAL, "mismatch")),
    ),
    # Tensors that are no targets
    "a lazy target": Case(
        linear,
        lambda: nn.LazyLinear(4),
        ("not initialised yet",),
        (("bias", "unsupported"), ("weight", "unsupported")),
    ),
    "an expanded target": Case(
        lambda: nn.Linear(3, 4), expanded, ("an expanded tensor", "cannot be written"), (("weight", "mismatch"),)
    ),
    # Ties
    "tied in the model, different in the file": Case(
        lambda: tied(together=False),
        lambda: tied(together=True),
        ("one tensor in the model, different ones in the file: 0.weight, 1.weight",),
        (("0.weight", "mismatch"),),
    ),
    "tied in the file, separate in the model": Case(
        lambda: tied(together=True),
        lambda: tied(together=False),
        ("tied to 0.weight in the file, a separate parameter in the model",),
        (("1.weight", "mismatch"),),
        lenient=True,
    ),
}


# torch 2.3 warns of LazyLinear.
@pytest.mark.filterwarnings("ignore:Lazy modules")
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_a_load_that_does_not_fit_is_refused_and_changes_nothing(tmp_path: Path, name: str, strict: bool) -> None:
    case = CASES[name]
    path = tmp_path / "model"
    orthoserde.save(case.saved(), path, registry=case.writer)
    target = lived_in(case.target())
    before = snapshot(target)

    def load() -> orthoserde.LoadReport:
        return orthoserde.load(target, path, strict=strict, reparametrize=case.reparametrize, registry=case.reader)

    if case.lenient and not strict:
        report = load()
        for kind, keys in (("missing", report.missing_keys), ("unexpected", report.unexpected_keys)):
            assert sorted(keys) == sorted(where for where, what in case.problems if what == kind)
        return
    with pytest.raises(IncompatibleModelError) as caught:
        load()
    assert_unchanged(target, before)
    error = caught.value
    assert sorted((problem.where, problem.kind) for problem in error.problems) == sorted(case.problems)
    assert sorted(error.missing_keys) == sorted(where for where, kind in case.problems if kind == "missing")
    assert sorted(error.unexpected_keys) == sorted(where for where, kind in case.problems if kind == "unexpected")
    for word in case.words:
        assert word in str(error)
    assert isinstance(error, RuntimeError)
    assert "tensor(" not in str(error)


@pytest.mark.filterwarnings("ignore:Lazy modules")
@pytest.mark.parametrize("name", CASES)
def test_the_refused_model_loads_what_does_fit_afterwards(tmp_path: Path, name: str) -> None:
    """What was refused was the file alone: the same model takes one that fits."""
    case = CASES[name]
    orthoserde.save(case.saved(), tmp_path / "wrong", registry=case.writer)
    target = case.target()
    with pytest.raises(IncompatibleModelError):
        orthoserde.load(target, tmp_path / "wrong", reparametrize=case.reparametrize, registry=case.reader)
    if name in ("an expanded target", "a lazy target"):
        return
    right = scramble_(case.target())
    orthoserde.save(right, tmp_path / "right", registry=case.reader)
    orthoserde.load(target, tmp_path / "right", registry=case.reader)
    assert_same_state(right, target)


def many_wrongs() -> tuple[nn.Module, nn.Module]:
    """Two models between which everything that can differ does."""
    saved, target = nn.Module(), nn.Module()
    for name, left, right in (
        ("map", orthogonal(linear(), orthogonal_map="cayley"), orthogonal(linear(), orthogonal_map="matrix_exp")),
        ("spectral", spectral_norm(linear(), eps=1e-12), spectral_norm(linear(), eps=1e-6)),
        ("chain", with_links(Scaled(), Shifted()), with_links(Scaled())),
        ("bare", with_links(Split()), linear()),
        ("plain", linear(), orthogonal(linear(), orthogonal_map="cayley", use_trivialization=False)),
        ("shape", linear(4), linear(3)),
        ("dtype", linear(4, torch.float64), linear()),
        ("block", Block(3, 0.5), Block(3, 0.25)),
        ("expanded", nn.Linear(3, 4), expanded()),
        ("fits", linear(), linear()),
    ):
        saved.add_module(name, left)
        target.add_module(name, right)
    saved.add_module("extra", orthogonal(linear()))
    target.add_module("absent", orthogonal(linear()))
    return saved, lived_in(target)


def test_one_error_lists_everything_that_is_wrong(tmp_path: Path) -> None:
    saved, target = many_wrongs()
    orthoserde.save(saved, tmp_path / "model", registry=registry_of(Scaled, Shifted, Block))
    before = snapshot(target)
    mismatches = {
        "map.weight",
        "spectral.weight",
        "chain.weight",
        "bare.weight",
        "plain.weight",
        "shape.weight",
        "shape.bias",
        "dtype.weight",
        "dtype.bias",
        "block",
        "expanded.weight",
    }
    parts = ("bias", "parametrizations.weight.0.base", "parametrizations.weight.original")
    for strict in (True, False):
        with pytest.raises(IncompatibleModelError) as caught:
            orthoserde.load(target, tmp_path / "model", strict=strict, registry=KNOWN)
        assert_unchanged(target, before)
        error = caught.value
        found = [problem.where for problem in error.problems if problem.kind == "mismatch"]
        assert sorted(found) == sorted(mismatches)
        assert sorted(error.missing_keys) == [f"absent.{part}" for part in parts if strict]
        assert sorted(error.unexpected_keys) == [f"extra.{part}" for part in parts if strict]
        assert {problem.kind for problem in error.problems} <= {"mismatch", "missing", "unexpected"}
        assert f"{len(error.problems)} problems" in str(error)
        for problem in error.problems:
            assert str(problem) in str(error)
        assert "fits" not in str(error)


def test_a_tie_that_differs_is_listed_beside_everything_else(tmp_path: Path) -> None:
    """Whether the values of a tie agree takes reading; it must not wait for the next attempt."""
    saved = nn.Sequential(tied(together=False), orthogonal(linear(), orthogonal_map="cayley"), linear())
    target = lived_in(nn.Sequential(tied(together=True), orthogonal(linear()), nn.Identity()))
    orthoserde.save(saved, tmp_path / "model")
    before = snapshot(target)
    with pytest.raises(IncompatibleModelError) as caught:
        orthoserde.load(target, tmp_path / "model")
    assert_unchanged(target, before)
    wheres = {problem.where for problem in caught.value.problems}
    assert {"1.weight", "2.bias", "2.weight"} <= wheres


# What strict=False permits


def test_a_lenient_load_restores_what_both_have_and_reports_the_rest(tmp_path: Path) -> None:
    saved = scramble_(nn.ModuleDict({"both": orthogonal(linear()), "extra": spectral_norm(linear())}))
    target = scramble_(nn.ModuleDict({"both": orthogonal(linear()), "absent": orthogonal(linear())}))
    orthoserde.save(saved, tmp_path / "model")
    absent = snapshot(target.get_submodule("absent"))
    report = orthoserde.load(target, tmp_path / "model", strict=False)
    missing, unexpected = report
    assert sorted(missing) == sorted(f"absent.{key}" for key in slots_of(target.get_submodule("absent")))
    assert sorted(unexpected) == sorted(f"extra.{key}" for key in slots_of(saved.get_submodule("extra")))
    assert_same_state(saved.get_submodule("both"), target.get_submodule("both"))
    assert_unchanged(target.get_submodule("absent"), absent)
    assert set(report.tensors) == {"both.weight"}
    assert "absent.bias" in str(report)


def test_a_lost_tie_gives_both_parameters_the_values_and_lowers_the_fidelity(tmp_path: Path) -> None:
    saved, target = tied(together=True), tied(together=False)
    orthoserde.save(saved, tmp_path / "model")
    report = orthoserde.load(target, tmp_path / "model", strict=False)
    assert (report.missing_keys, report.unexpected_keys) == ([], [])
    assert report.fidelity is Fidelity.UNVERIFIED
    assert any("1.weight" in note for note in report.notes)
    first, second = target.get_parameter("0.weight"), target.get_parameter("1.weight")
    assert first is not second
    assert same_bits(first, saved.get_parameter("0.weight"))
    assert same_bits(second, saved.get_parameter("0.weight"))


PARTS: dict[str, Make] = {
    "orthogonal": lambda: orthogonal(nn.Linear(3, 6)),
    "spectral_norm": lambda: spectral_norm(nn.Linear(3, 6)),
    "weight_norm": lambda: weight_norm(nn.Linear(3, 6)),
}


@pytest.mark.parametrize("kind", PARTS)
def test_half_of_a_parametrized_tensor_is_refused_even_leniently(tmp_path: Path, kind: str) -> None:
    saved = PARTS[kind]()
    whole = {key: tensor.contiguous() for key, tensor in saved.state_dict().items()}
    parts = [key for key in whole if key.startswith("parametrizations.")]
    assert len(parts) > 1
    for left_out in parts:
        half = {key: tensor for key, tensor in whole.items() if key != left_out}
        safetensors.torch.save_file(half, tmp_path / "half")
        target = lived_in(PARTS[kind]())
        before = snapshot(target)
        for strict in (True, False):
            with pytest.raises(IncompatibleModelError, match=left_out.rsplit(".", 1)[1]):
                orthoserde.load(target, tmp_path / "half", strict=strict)
            assert_unchanged(target, before)
    none = {key: tensor for key, tensor in whole.items() if key not in parts}
    safetensors.torch.save_file(none, tmp_path / "none")
    target = PARTS[kind]()
    report = orthoserde.load(target, tmp_path / "none", strict=False)
    assert sorted(report.missing_keys) == sorted(parts)


def test_half_of_a_parametrized_tensor_cannot_come_in_through_a_tie(tmp_path: Path) -> None:
    def make() -> nn.Sequential:
        turn, plain = orthogonal(linear()), linear()
        plain.weight = turn.get_parameter(ORIGINAL)
        return nn.Sequential(turn, plain)

    target = scramble_(make())
    safetensors.torch.save_file({"1.weight": torch.zeros(4, 4), "1.bias": torch.zeros(4)}, tmp_path / "half")
    before = snapshot(target)
    with pytest.raises(IncompatibleModelError, match=r"0\.weight"):
        orthoserde.load(target, tmp_path / "half", strict=False)
    assert_unchanged(target, before)


# Files


def damaged_model() -> nn.Module:
    return nn.Sequential(orthogonal(nn.Linear(3, 4)), nn.Linear(4, 2))


def test_any_flipped_bit_of_the_data_is_found(tmp_path: Path) -> None:
    path = tmp_path / "model"
    orthoserde.save(damaged_model(), path)
    whole, start = path.read_bytes(), header_bytes(path)
    target = lived_in(damaged_model())
    before = snapshot(target)
    for i in range(start, len(whole), 3):
        flip_bit(path, i, i % 8)
        with pytest.raises(DamagedFileError, match="bytes of 1 tensor are not those that were saved"):
            orthoserde.load(target, path)
        path.write_bytes(whole)
    assert_unchanged(target, before)


def test_any_flipped_bit_of_the_header_is_found(tmp_path: Path) -> None:
    path = tmp_path / "model"
    orthoserde.save(damaged_model(), path, metadata={"run": "7"})
    whole, start = path.read_bytes(), header_bytes(path)
    target = lived_in(damaged_model())
    before = snapshot(target)
    for i in range(0, start):
        flip_bit(path, i, i % 8)
        with pytest.raises(FileFormatError):
            orthoserde.load(target, path, strict=False)
        path.write_bytes(whole)
    assert_unchanged(target, before)
    orthoserde.load(target, path)


def test_a_file_that_ends_early_or_late_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model"
    orthoserde.save(damaged_model(), path)
    whole, start = path.read_bytes(), header_bytes(path)
    target = lived_in(damaged_model())
    before = snapshot(target)
    for length in (0, 1, 7, 8, 9, start // 2, start - 1, start, start + 1, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(FileFormatError):
            orthoserde.load(target, path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(FileFormatError):
        orthoserde.load(target, path)
    assert_unchanged(target, before)


def test_a_file_that_is_not_there_or_not_a_file_is_refused(tmp_path: Path) -> None:
    target = lived_in(damaged_model())
    before = snapshot(target)
    with pytest.raises(CheckpointNotFoundError) as missing:
        orthoserde.load(target, tmp_path / "nowhere")
    assert isinstance(missing.value, FileNotFoundError)
    with pytest.raises((FileFormatError, FileAccessError)):
        orthoserde.load(target, tmp_path)
    (tmp_path / "text").write_text("not a checkpoint")
    with pytest.raises(FileFormatError):
        orthoserde.load(target, tmp_path / "text")
    assert_unchanged(target, before)


def test_the_meta_device_is_refused_as_a_place_for_tensors(tmp_path: Path) -> None:
    orthoserde.save(linear(), tmp_path / "model")
    with torch.device("meta"):
        target = linear()
    before = snapshot(target)
    with pytest.raises(ValueError, match="meta"):
        orthoserde.load(target, tmp_path / "model", device="meta")
    assert_unchanged(target, before)


# Refusals over meta and bare modules: nothing is made, swapped or attached


def test_a_refusal_leaves_meta_and_bare_modules_as_they_are(tmp_path: Path) -> None:
    saved = nn.Sequential(orthogonal(nn.Linear(3, 6)), weight_norm(linear()), nn.GRU(3, 4), linear(5))
    orthoserde.save(saved, tmp_path / "model")
    with torch.device("meta"):
        target = nn.Sequential(nn.Linear(3, 6), linear(), nn.GRU(3, 4))
        target.append(linear(4))
    before = snapshot(target)
    with pytest.raises(IncompatibleModelError) as caught:
        orthoserde.load(target, tmp_path / "model")
    assert_unchanged(target, before)
    assert sorted(problem.where for problem in caught.value.problems) == ["3.bias", "3.weight"]
    del before  # it holds the RNN's weak references, with which torch cannot replace a parameter
    target[3] = linear(5)
    orthoserde.load(target, tmp_path / "model")
    assert_same_state(saved, target)
    assert all(cast("Tensor", tensor).device.type == "cpu" for tensor in slots_of(target).values())
    assert bits(target.get_parameter("3.weight")) == bits(saved.get_parameter("3.weight"))


@pytest.mark.parametrize("make", [lambda: nn.Linear(3, 4), lambda: nn.GRU(3, 4)], ids=["Linear", "GRU"])
def test_a_meta_parameter_that_torch_cannot_replace_is_refused_before_anything_is_replaced(
    tmp_path: Path, make: Make
) -> None:
    saved = nn.Sequential(make(), make())
    orthoserde.save(saved, tmp_path / "model")
    with torch.device("meta"):
        target = nn.Sequential(make(), make())
    parameters = [*target.parameters()]
    reference = weakref.ref(parameters[-1])
    with pytest.raises(IncompatibleModelError, match=r"weak ?ref"):
        orthoserde.load(target, tmp_path / "model")
    assert all(parameter.device.type == "meta" for parameter in target.parameters())
    assert reference() is parameters[-1]
    del reference
    orthoserde.load(target, tmp_path / "model")
    assert_same_state(saved, target)
