"""Folders of pyreft's, in every form and state: what goes in, what is refused, and what is written.

Classes stand in for pyvene's, so this runs without it and with every torch; ``tests/pyreft`` has the real ones.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import os
import stat
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

import orthoserde
from orthoserde import (
    ConfigError,
    DamagedFileError,
    Fidelity,
    FileAccessError,
    FileFormatError,
    IncompatibleModelError,
    LegacyCheckpointWarning,
    OrthoserdeError,
    storage,
)
from orthoserde.integrations.pyreft import folders, listing, write
from orthoserde.integrations.pyreft.keys import normalize
from orthoserde.orthonormal.rounding import MEAN_ROUNDING, gram_error
from tests.helpers import assert_same_state, assert_unchanged, raised_by, snapshot
from tests.integrations.stand_ins import (
    RANK,
    WIDTH,
    ConsreftIntervention,
    Intervention,
    LoreftIntervention,
    Mine,
    ReftModel,
    Shift,
    VanillaIntervention,
    base_of,
    key_of,
    make,
    original_of,
    weight_of,
)

#: torch's restricted unpickler is to be trusted from 2.6 on; before, every file of torch.save is refused.
UNREADABLE = tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 6)
TOO_OLD = r"use torch 2\.6 or newer"

State = dict[str, Any]


def file_of(layer: int) -> str:
    return f"intkey_{key_of(layer)}.bin"


def types_of(model: ReftModel) -> list[str]:
    return [str(type(each)) for each in model.interventions.values()]


def save(model: ReftModel, folder: Path, config: bool = True) -> Path:
    """What pyreft writes of a model: of each intervention what its own ``state_dict`` says."""
    folder.mkdir(parents=True)
    for key, intervention in model.interventions.items():
        torch.save(intervention.state_dict(), folder / f"intkey_{key}.bin")
    if config:
        content = {"sorted_keys": list(model.interventions), "intervention_types": types_of(model), "mode": "parallel"}
        (folder / "config.json").write_text(json.dumps(content), "utf-8")
    return folder


def complete(folder: Path, model: ReftModel) -> Path:
    """Give a folder the full form, in the order and under the names of pull request 179."""
    for key, intervention in model.interventions.items():
        state = intervention.state_dict()
        state["rotate_layer_original"] = original_of(intervention).data
        state["rotate_layer_base"] = base_of(intervention)
        torch.save(state, folder / f"intkey_{key}.bin")
    return folder


def append(model: ReftModel, layer: nn.Module) -> None:
    """Make the base model longer."""
    base = model.model
    assert isinstance(base, nn.Sequential)
    base.append(layer)


def train(model: ReftModel, steps: int, optimizer: torch.optim.Optimizer) -> list[float]:
    losses: list[float] = []
    for step in range(steps):
        x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        for intervention in model.interventions.values():
            x = intervention(x)
        loss = (x - 0.5).square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    return losses


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def residual(matrix: Tensor) -> float:
    wide = matrix.detach().double()
    return float((wide.mT @ wide - torch.eye(wide.size(-1), dtype=wide.dtype)).abs().max())


def refused(model: nn.Module, folder: Path, error: type[OrthoserdeError], text: str, **options: Any) -> None:
    """Loading raises that, and nothing has changed."""
    before = snapshot(model)
    with pytest.raises(error, match=text):  # and no warning, which would be an error
        orthoserde.load(model, folder, **options)
    assert_unchanged(model, before)


def needs_reader(test: Callable[..., None]) -> Callable[..., None]:
    """Of a test that reads files of torch.save, expect that these are refused where torch is too old."""
    if not UNREADABLE:
        return test

    @functools.wraps(test)
    def refused_instead(*args: Any, **arguments: Any) -> None:
        with pytest.raises(FileFormatError, match=TOO_OLD):
            test(*args, **arguments)

    return refused_instead


def legacy_warning() -> AbstractContextManager[Any]:
    """The warning is given, unless the file is refused before that."""
    return contextlib.nullcontext([]) if UNREADABLE else pytest.warns(LegacyCheckpointWarning)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Matrices this small are faster so, by far where other programs want the processor too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# Names


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("layer.0.repr.block_output.unit.pos.nunit.1#0", "layer_0_comp_block_output_unit_pos_nunit_1#0"),
        ("layer.12.comp.mlp_output.unit.h.pos.nunit.3#11", "layer_12_comp_mlp_output_unit_h_pos_nunit_3#11"),
        (
            "comp.transformer.h[0].output.unit.pos.nunit.1#0",
            "comp_transformer_h[0]_output_unit_pos_nunit_1#0",
        ),
        (
            "comp_model_layers[3]_output_unit_pos_nunit_1#1",
            "comp_model_layers[3]_output_unit_pos_nunit_1#1",
        ),
        ("layer_0_comp_block_output_unit_pos_nunit_1#0", "layer_0_comp_block_output_unit_pos_nunit_1#0"),
        ("layer_0_comp_repr_unit_pos_nunit_1#0", "layer_0_comp_repr_unit_pos_nunit_1#0"),
        ("layer_0_comp_block_output_unit_pos_nunit_1", None),
        ("layer_x_comp_block_output_unit_pos_nunit_1#0", None),
        ("layer_0_comp_block_output_unit_pos_nunit_1#0 ", None),
        ("layer_0_comp_block_output_unit_pos_nunit_1#0\n", None),
        ("pytorch_model", None),
        ("", None),
    ],
)
def test_every_name_that_pyvene_has_given_is_known(key: str, expected: str | None) -> None:
    assert normalize(key) == expected
    if expected is not None:
        assert normalize(expected) == expected


# Forms


def test_files_of_torch_save_are_refused_where_torch_cannot_read_them_safely(tmp_path: Path) -> None:
    folder = save(make(), tmp_path / "f")
    if UNREADABLE:
        refused(make(seed=1), folder, FileFormatError, TOO_OLD)
    else:
        assert raised_by(lambda: orthoserde.load(make(seed=1), folder)) is None


@needs_reader
@pytest.mark.parametrize("config", [True, False])
@pytest.mark.parametrize("rank", [1, RANK, WIDTH])
def test_a_computed_weight_comes_back_bit_for_bit_and_stays_on_the_constraint(
    tmp_path: Path, config: bool, rank: int
) -> None:
    model = make(rank=rank)
    train(model, 5, adam(model))
    folder = save(model, tmp_path / "f", config)
    other = make(seed=1, rank=rank)
    optimizer = adam(other)
    state = torch.get_rng_state()
    with legacy_warning() as caught:
        report = orthoserde.load(other, folder)
    assert len([each for each in caught if each.category is LegacyCheckpointWarning]) == 1
    assert torch.equal(torch.get_rng_state(), state)
    assert report.fidelity is Fidelity.INFERENCE
    for key, intervention in model.interventions.items():
        assert torch.equal(weight_of(other.interventions[key]), weight_of(intervention))
    losses = train(other, 50, optimizer)
    assert losses[-1] < losses[0]
    for intervention in other.interventions.values():
        assert residual(weight_of(intervention)) < 2e-6
        assert residual(base_of(intervention)) < 2e-6


@needs_reader
def test_the_full_form_is_exact_and_training_goes_on_bit_for_bit(tmp_path: Path) -> None:
    model = make()
    optimizer = adam(model)
    train(model, 5, optimizer)
    folder = complete(save(model, tmp_path / "f"), model)
    other = make(seed=1)
    resumed = adam(other)
    report = orthoserde.load(other, folder)
    assert report.fidelity is Fidelity.EXACT
    assert any("dropout, activation" in note for note in report.notes)
    assert_same_state(model, other)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # else the two would share it
    assert train(other, 20, resumed) == train(model, 20, optimizer)


@needs_reader
def test_of_the_full_form_the_state_counts_and_not_the_computed_weight(tmp_path: Path) -> None:
    model = make()
    folder = complete(save(model, tmp_path / "f"), model)
    state = torch.load(folder / file_of(0), weights_only=True)
    torch.save({**state, "rotate_layer": torch.zeros(WIDTH, RANK)}, folder / file_of(0))
    other = make(seed=1)
    assert orthoserde.load(other, folder).fidelity is Fidelity.EXACT
    assert_same_state(model, other)


@needs_reader
@pytest.mark.parametrize("config", [True, False])
def test_the_state_of_another_class_is_exact_where_the_folder_says_which_class_it_was(
    tmp_path: Path, config: bool
) -> None:
    model = make(ConsreftIntervention)
    other = make(ConsreftIntervention, seed=1)
    report = orthoserde.load(other, save(model, tmp_path / "f", config))
    assert report.fidelity is (Fidelity.EXACT if config else Fidelity.UNVERIFIED)
    assert_same_state(model, other)


@needs_reader
@pytest.mark.parametrize("form", ["legacy", "full"])
def test_a_class_of_the_users_comes_back_with_all_that_it_adds(tmp_path: Path, form: Any) -> None:
    model = make(Mine)
    write(model, tmp_path / "f", form)
    other = make(Mine, seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LegacyCheckpointWarning)
        report = orthoserde.load(other, tmp_path / "f")
    assert report.fidelity is (Fidelity.INFERENCE if form == "legacy" else Fidelity.UNVERIFIED)
    assert torch.equal(weight_of(other.interventions[key_of(0)]), weight_of(model.interventions[key_of(0)]))
    if form == "full":
        assert_same_state(model, other)


@needs_reader
@pytest.mark.parametrize("config", [True, False])
def test_classes_that_are_not_trained_have_no_file(tmp_path: Path, config: bool) -> None:
    model = make(LoreftIntervention, Shift, VanillaIntervention)
    write(model, tmp_path / "f", "full")
    assert [path.name for path in (tmp_path / "f").glob("*.bin")] == [file_of(0)]
    if not config:
        (tmp_path / "f" / "config.json").unlink()
    other = make(LoreftIntervention, Shift, VanillaIntervention, seed=1)
    assert orthoserde.load(other, tmp_path / "f").fidelity is Fidelity.EXACT
    assert_same_state(model, other)


@needs_reader
def test_a_source_of_its_own_comes_back(tmp_path: Path) -> None:
    model = make(LoreftIntervention, Shift, source=torch.ones(WIDTH))
    write(model, tmp_path / "f", "full")
    config = json.loads((tmp_path / "f" / "config.json").read_text("utf-8"))
    assert [fields[12] for fields in config["representations"]] == [True, True]  # hidden_source_representation
    other = make(LoreftIntervention, Shift, seed=1, source=torch.zeros(WIDTH))
    orthoserde.load(other, tmp_path / "f")
    assert_same_state(model, other)


@needs_reader
def test_the_folder_of_the_trainer_is_found_in_its_checkpoint(tmp_path: Path) -> None:
    model = make()
    checkpoint = tmp_path / "checkpoint-5"
    complete(save(model, checkpoint / "intervenable_model", config=False), model)
    for name in ("optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json", "training_args.bin"):
        (checkpoint / name).write_bytes(b"not ours to read")
    torch.save({}, checkpoint / "intervenable_model" / "pytorch_model.bin")
    other = make(seed=1)
    assert orthoserde.load(other, checkpoint).fidelity is Fidelity.EXACT
    assert_same_state(model, other)


@needs_reader
def test_what_was_trained_of_the_base_model_comes_back_with_its_parametrization(tmp_path: Path) -> None:
    def thawed(seed: int) -> ReftModel:
        model = make(seed=seed)
        append(model, orthogonal(nn.Linear(2, 2)))
        return model

    model = thawed(0)
    folder = complete(save(model, tmp_path / "f"), model)
    torch.save(OrderedDict(model.model.state_dict()), folder / "pytorch_model.bin")
    other = thawed(1)
    assert orthoserde.load(other, folder).fidelity is Fidelity.UNVERIFIED
    assert_same_state(model, other)
    # named_parameters, which pyvene saves, has the original and not the base.
    torch.save(dict(model.model.named_parameters()), folder / "pytorch_model.bin")
    refused(thawed(1), folder, IncompatibleModelError, r"model\.1\.weight: the file has its tensors, but no record")


@needs_reader
def test_a_symbolic_link_to_a_file_elsewhere_is_followed_as_caches_have_them(tmp_path: Path) -> None:
    model = make()
    folder = complete(save(model, tmp_path / "f"), model)
    (tmp_path / "blobs").mkdir()
    for path in sorted(folder.iterdir()):
        path.rename(tmp_path / "blobs" / path.name)
        path.symlink_to(tmp_path / "blobs" / path.name)
    (tmp_path / "link").symlink_to(folder)
    other = make(seed=1)
    assert orthoserde.load(other, tmp_path / "link").fidelity is Fidelity.EXACT
    assert_same_state(model, other)


# Damage


def damage(model: ReftModel) -> ReftModel:
    """Do what pyreft's loader does: a new rotation, into the first columns of whose base the old weight goes."""
    torch.manual_seed(5)
    for intervention in model.interventions.values():
        weight = weight_of(intervention).detach().clone()
        rotation = orthogonal(nn.Linear(RANK, WIDTH, bias=False))
        with torch.no_grad():
            base_of(intervention).copy_(rotation.parametrizations.weight[0].base)  # type: ignore[union-attr, index]
            base_of(intervention)[:, :RANK] = weight
            original_of(intervention).copy_(-torch.eye(WIDTH, RANK))
    return model


@needs_reader
@pytest.mark.parametrize("legacy", ["inference", "refuse"])
def test_a_damaged_base_is_recognised_before_a_step_and_after(tmp_path: Path, legacy: str) -> None:
    model = damage(make())
    complete(save(model, tmp_path / "before"), model)
    refused(make(seed=1), tmp_path / "before", DamagedFileError, "its base is off orthogonality by", legacy=legacy)
    train(model, 3, adam(model))
    complete(save(model, tmp_path / "after"), model)
    refused(make(seed=1), tmp_path / "after", DamagedFileError, "its base is off orthogonality by", legacy=legacy)
    save(model, tmp_path / "weights")
    text = "off the constraint by" if legacy == "inference" else "which legacy='refuse' does not take"
    refused(make(seed=1), tmp_path / "weights", IncompatibleModelError, text, legacy=legacy)


@needs_reader
@pytest.mark.parametrize("form", ["weights", "full", "state alone"])
@pytest.mark.parametrize("legacy", ["project", "keep"])
def test_a_damaged_rotation_is_projected_or_kept_on_request(tmp_path: Path, legacy: Any, form: str) -> None:
    cls = ConsreftIntervention if form == "state alone" else LoreftIntervention
    model = damage(make(cls))
    train(model, 3, adam(model))
    folder = save(model, tmp_path / "f")
    if form == "full":
        complete(folder, model)
    weight = weight_of(model.interventions[key_of(0)]).detach()
    assert residual(weight) > 1e-3
    other = make(cls, seed=1)
    optimizer = adam(other)
    with legacy_warning():
        report = orthoserde.load(other, folder, legacy=legacy)
    assert report.fidelity is Fidelity.INFERENCE
    now = weight_of(other.interventions[key_of(0)]).detach()
    if legacy == "keep" and form == "state alone":
        assert torch.allclose(now, weight, atol=1e-6)  # worked out with other strides than the model's
    elif legacy == "keep":
        assert torch.equal(now, weight)
    else:
        left, _, right = torch.linalg.svd(weight.double(), full_matrices=False)
        assert torch.allclose(now.double(), left @ right, atol=1e-6)
        train(other, 50, optimizer)
        assert residual(weight_of(other.interventions[key_of(0)])) < 2e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("orthogonal_map", ["householder", "cayley", "matrix_exp"])
@pytest.mark.parametrize("n", [2, 3, 4, 5, 8, 33, 128, 400])
def test_a_probe_finds_damage_and_nothing_else(n: int, orthogonal_map: str, dtype: torch.dtype) -> None:
    eps = torch.finfo(dtype).eps
    for seed, k in enumerate({1, max(1, n // 2), n}):
        torch.manual_seed(seed)
        holder = nn.Module()
        holder.weight = nn.Parameter(torch.randn(n, k, dtype=dtype))
        orthogonal(holder, orthogonal_map=orthogonal_map)
        base = holder.get_buffer("parametrizations.weight.0.base")
        assert folders.damage_of(base) is None
        assert gram_error(base).square().mean().sqrt() < MEAN_ROUNDING * eps / 5
        if k < n:
            torn = base.clone()
            torn[:, :k] = torch.linalg.qr(torch.randn(n, k, dtype=dtype))[0]
            # In two dimensions another rotation may be nearly the same one.
            assert n == 2 or (folders.damage_of(torn) or 0) > 500 * eps
        assert folders.damage_of(torch.full_like(base, float("nan"))) is not None
        assert folders.damage_of(torch.zeros_like(base)) is not None


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_a_large_base_that_was_in_half_precision_is_damaged(half: torch.dtype) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = torch.linalg.qr(torch.randn(1024, 1024))[0]
    assert folders.damage_of(base) is None
    assert folders.damage_of(base.to(half)) is not None
    assert folders.damage_of(base.to(half).float()) is not None


# Hostile folders


@dataclass(frozen=True)
class Hostile:
    """What is done to a good folder, and what is said of it.

    Attributes:
        spoil: Spoils it.
        error: What loading raises.
        text: What it says, as a pattern.
        reads: Whether that shows only when a file of torch.save is read.
        full: Whether the folder is in the full form to begin with.
    """

    spoil: Callable[[Path], object]
    error: type[OrthoserdeError]
    text: str
    reads: bool = True
    full: bool = False


def replace(**changes: Any) -> Callable[[Path], None]:
    """Replace tensors of the first file; None takes one out."""

    def spoil(folder: Path) -> None:
        state = dict(torch.load(folder / file_of(0), weights_only=True)) if not UNREADABLE else {}
        state |= changes
        torch.save({name: each for name, each in state.items() if each is not None}, folder / file_of(0))

    return spoil


def content(value: Any) -> Callable[[Path], None]:
    """Put something else than a state dict into the first file."""
    return lambda folder: torch.save(value, folder / file_of(0))


def remove(*names: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        for name in names or [path.name for path in folder.iterdir()]:
            (folder / name).unlink()

    return spoil


def another_without_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / file_of(2)).write_bytes((folder / file_of(1)).read_bytes())


def raw(name: str, data: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(data)


def config(**changes: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        found: Mapping[str, Any] = json.loads((folder / "config.json").read_text("utf-8"))
        (folder / "config.json").write_text(json.dumps({**found, **changes}), "utf-8")

    return spoil


def swap(name: str, put: Callable[[Path], object]) -> Callable[[Path], None]:
    """Put something that is no file in the place of one."""

    def spoil(folder: Path) -> None:
        (folder / name).unlink()
        put(folder / name)

    return spoil


def in_both_names(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / f"intkey_{key_of(0).replace('_', '.')}.bin").write_bytes((folder / file_of(0)).read_bytes())


class Boom:
    """A pickle that runs code where it may."""

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.remove, (str(Boom.target),)

    target: Path


def code(folder: Path) -> None:
    Boom.target = folder / "config.json"
    torch.save({"weight": Boom()}, folder / file_of(0))


def truncate(folder: Path) -> None:
    data = (folder / file_of(0)).read_bytes()
    (folder / file_of(0)).write_bytes(data[: len(data) // 2])


def safetensors_file(folder: Path) -> None:
    state = {name: tensor.contiguous() for name, tensor in make().interventions[key_of(0)].state_dict().items()}
    safetensors.torch.save_file(state, folder / file_of(0))


def our_file(folder: Path) -> None:
    (folder / file_of(0)).unlink()
    orthoserde.save(nn.Linear(2, 2), folder / file_of(0))


SHAPE = (WIDTH, RANK)
BAD_NAMES = r"config\.json: sorted_keys: not names that pyreft gives"
MISSING = r"config\.json names files that are missing"

HOSTILE: dict[str, Hostile] = {
    "empty": Hostile(remove(), FileFormatError, "without a checkpoint; looked for model.safetensors", False),
    "another library's": Hostile(
        lambda folder: [
            (folder / file_of(0)).rename(folder / "adapter_model.bin"),
            (folder / file_of(1)).rename(folder / "pytorch_model.bin"),
        ],
        IncompatibleModelError,
        "rotate_layer: in the file, not in the model",
    ),
    "a file missing": Hostile(remove(file_of(1)), FileFormatError, MISSING, False),
    "a file missing, no config": Hostile(
        remove(file_of(1), "config.json"),
        IncompatibleModelError,
        rf"{key_of(1)}\.rotate_layer.*in the model, not in the file",
    ),
    "a file too many": Hostile(
        raw(file_of(2), b""), FileFormatError, r"holds files that config\.json does not name", False
    ),
    "a file too many, no config": Hostile(
        another_without_config, IncompatibleModelError, rf"{key_of(2)}\S*: in the file, not in the model"
    ),
    "a name that pyreft does not give": Hostile(
        raw("intkey_.._.._etc.bin", b""),
        FileFormatError,
        r"intkey_\.\._\.\._etc\.bin: not a name that pyreft gives",
        False,
    ),
    "two names of one": Hostile(in_both_names, FileFormatError, "are names of the same intervention", False),
    "truncated": Hostile(truncate, FileFormatError, rf"{key_of(0)}\.bin: a damaged archive"),
    "no bytes": Hostile(raw(file_of(0), b""), FileFormatError, rf"{key_of(0)}\.bin: no safetensors header", False),
    "text": Hostile(raw(file_of(0), b"{}" * 40), FileFormatError, rf"{key_of(0)}\.bin", False),
    "code": Hostile(code, FileFormatError, rf"{key_of(0)}\.bin: .* it names '(posix|nt)\.remove'"),
    "a safetensors file": Hostile(
        safetensors_file, FileFormatError, rf"{key_of(0)}\.bin: expected a file of torch\.save", False
    ),
    "a file of ours": Hostile(our_file, FileFormatError, rf"{key_of(0)}\.bin: expected a file of torch\.save", False),
    "a list": Hostile(content([1, 2]), FileFormatError, rf"{key_of(0)}\.bin: expected a state dict, got list"),
    "a nested dict": Hostile(
        content({"state": {"weight": torch.zeros(2)}}), FileFormatError, "expected a flat state dict of tensors"
    ),
    "keys that are no strings": Hostile(
        content({1: torch.zeros(2)}), FileFormatError, "expected keys that are strings"
    ),
    "no tensors": Hostile(content({}), IncompatibleModelError, "in the model, not in the file"),
    "a rank too small": Hostile(
        replace(rotate_layer=torch.linalg.qr(torch.randn(WIDTH, RANK - 1))[0]),
        IncompatibleModelError,
        rf"{key_of(0)}\.rotate_layer\.weight: .*of shape \[8, 2\], the model has \[8, 3\]",
    ),
    "three dimensions": Hostile(
        replace(rotate_layer=torch.zeros(1, *SHAPE)), IncompatibleModelError, r"of shape \[1, 8, 3\]"
    ),
    "one dimension": Hostile(replace(rotate_layer=torch.zeros(8)), IncompatibleModelError, r"of shape \[8\]"),
    "NaN in a weight": Hostile(
        replace(rotate_layer=torch.full(SHAPE, float("nan"))), IncompatibleModelError, "is not finite"
    ),
    "zero": Hostile(replace(rotate_layer=torch.zeros(SHAPE)), IncompatibleModelError, "off the constraint by 1"),
    "integers": Hostile(
        replace(rotate_layer=torch.eye(*SHAPE, dtype=torch.int32)), IncompatibleModelError, "in int32, which"
    ),
    "complex": Hostile(
        replace(rotate_layer=torch.eye(*SHAPE, dtype=torch.complex64)), IncompatibleModelError, "in complex64, which"
    ),
    "a source in double precision": Hostile(
        replace(bias=torch.zeros(RANK, dtype=torch.float64)),
        IncompatibleModelError,
        r"learned_source\.bias: float64 in the file, float32 in the model",
    ),
    "a source of another shape": Hostile(
        replace(weight=torch.zeros(RANK, WIDTH + 1)), IncompatibleModelError, r"shape \[3, 9\] in the file"
    ),
    "a source missing": Hostile(
        replace(bias=None), IncompatibleModelError, r"learned_source\.bias: in the model, not in the file"
    ),
    "more than there is": Hostile(
        replace(extra=torch.zeros(2)), IncompatibleModelError, r"extra: in the file, not in the model"
    ),
    "one tensor under two names": Hostile(
        replace(**{"learned_source.weight": torch.zeros(RANK, WIDTH)}), FileFormatError, "under two names"
    ),
    "an original without its base": Hostile(
        replace(rotate_layer_base=None), FileFormatError, "'rotate_layer_original' without its other half", full=True
    ),
    "a base without its original": Hostile(
        replace(rotate_layer_original=None), FileFormatError, "'rotate_layer_base' without its other half", full=True
    ),
    "a base of another shape": Hostile(
        replace(rotate_layer_base=torch.eye(WIDTH - 1)), FileFormatError, r"got shapes \[7, 7\] and \[8, 3\]", full=True
    ),
    "a base of three dimensions": Hostile(
        replace(rotate_layer_base=torch.eye(WIDTH)[None]), FileFormatError, r"\[1, 8, 8\]", full=True
    ),
    "an original of one dimension": Hostile(
        replace(rotate_layer_original=torch.zeros(WIDTH)), FileFormatError, r"expected a square base", full=True
    ),
    "an original of no dimension": Hostile(
        replace(rotate_layer_original=torch.zeros(())), FileFormatError, r"expected a square base", full=True
    ),
    "a base and an original of another size": Hostile(
        replace(rotate_layer_original=torch.zeros(9, 3), rotate_layer_base=torch.eye(9)),
        IncompatibleModelError,
        r"shape is \[9, 3\] in the file, \[8, 3\] in the model",
        full=True,
    ),
    "NaN in a base": Hostile(
        replace(rotate_layer_base=torch.full((WIDTH, WIDTH), float("nan"))), DamagedFileError, "by nan", full=True
    ),
    "infinity in a base": Hostile(
        replace(rotate_layer_base=torch.full((WIDTH, WIDTH), float("inf"))), DamagedFileError, "by nan", full=True
    ),
    "an integer base": Hostile(
        replace(rotate_layer_base=torch.eye(WIDTH, dtype=torch.int64)), FileFormatError, "float32 and int64", full=True
    ),
    "a complex base": Hostile(
        replace(rotate_layer_base=torch.eye(WIDTH, dtype=torch.complex64)),
        FileFormatError,
        "float32 and complex64",
        full=True,
    ),
    "an integer original": Hostile(
        replace(rotate_layer_original=torch.eye(*SHAPE, dtype=torch.int64)),
        FileFormatError,
        "one real dtype, got int64 and float32",
        full=True,
    ),
    "a base in double precision": Hostile(
        replace(rotate_layer_base=torch.eye(WIDTH, dtype=torch.float64)), FileFormatError, "float64", full=True
    ),
    "an expanded tensor": Hostile(
        replace(rotate_layer=torch.zeros(1).expand(SHAPE)), FileFormatError, "claims more elements than the file holds"
    ),
    "a sparse tensor": Hostile(replace(bias=torch.zeros(RANK).to_sparse()), FileFormatError, "no ordinary tensor"),
    "a tensor of the base model that there is not": Hostile(
        lambda folder: torch.save({"nothing": torch.zeros(2)}, folder / "pytorch_model.bin"),
        IncompatibleModelError,
        r"model\.nothing: in the file, not in the model",
    ),
    "a base model of another shape": Hostile(
        lambda folder: torch.save({"0.weight": torch.zeros(2)}, folder / "pytorch_model.bin"),
        IncompatibleModelError,
        r"model\.0\.weight: shape \[2\] in the file, \[2, 2\] in the model",
    ),
    "a base model that is no file": Hostile(
        lambda folder: (folder / "pytorch_model.bin").mkdir(),
        FileFormatError,
        r"pytorch_model\.bin: not a regular file",
    ),
    "a folder for a file": Hostile(
        swap(file_of(0), lambda path: path.mkdir()), FileFormatError, r"\.bin: not a regular file", False
    ),
    "a FIFO for a file": Hostile(swap(file_of(0), os.mkfifo), FileFormatError, r"\.bin: not a regular file", False),
    "a link to nothing": Hostile(
        swap(file_of(0), lambda path: path.symlink_to("nowhere")), FileAccessError, "no such checkpoint", False
    ),
    "a link to itself": Hostile(
        swap(file_of(0), lambda path: path.symlink_to(path)), FileAccessError, "cannot open the checkpoint", False
    ),
    "a FIFO for the config": Hostile(
        swap("config.json", os.mkfifo), FileFormatError, r"config\.json: expected a file", False
    ),
    "a folder for the config": Hostile(
        swap("config.json", lambda path: path.mkdir()), FileFormatError, r"config\.json: expected a file", False
    ),
    "a config that links to nothing": Hostile(
        swap("config.json", lambda path: path.symlink_to("nowhere")), FileAccessError, r"cannot read it", False
    ),
    "a huge config": Hostile(
        lambda folder: os.truncate(folder / "config.json", listing.MAX_CONFIG_BYTES + 1),
        FileFormatError,
        r"config\.json: expected a file of at most",
        False,
    ),
    "a deep config": Hostile(raw("config.json", b"[" * 10**6), FileFormatError, r"config\.json: not valid JSON", False),
    "a deep config that ends": Hostile(
        raw("config.json", b'{"mode":' + b"[" * 200 + b"]" * 200 + b"}"), FileFormatError, "nested deeper", False
    ),
    "a config that is not UTF-8": Hostile(
        raw("config.json", b'{"mode": "\xff"}'), FileFormatError, r"config\.json: not valid JSON", False
    ),
    "a key twice in the config": Hostile(
        raw("config.json", b'{"mode": 1, "mode": 2}'), FileFormatError, "a key stands twice", False
    ),
    "NaN in the config": Hostile(raw("config.json", b'{"mode": NaN}'), FileFormatError, "NaN is not JSON", False),
    "an empty config": Hostile(raw("config.json", b""), FileFormatError, "not valid JSON", False),
    "a config that is a list": Hostile(raw("config.json", b"[]"), FileFormatError, "expected an object", False),
    "keys that are a string": Hostile(
        config(sorted_keys=key_of(0)), FileFormatError, "sorted_keys: expected a list of strings", False
    ),
    "keys that are an object": Hostile(
        config(sorted_keys={key_of(0): 1}), FileFormatError, "sorted_keys: expected a list of strings", False
    ),
    "keys that are numbers": Hostile(
        config(sorted_keys=[0, 1]), FileFormatError, "sorted_keys: expected a list of strings", False
    ),
    "types that are a number": Hostile(
        config(intervention_types=3), FileFormatError, "intervention_types: expected a list of strings", False
    ),
    "types that are too few": Hostile(
        config(intervention_types=["x"]), FileFormatError, "intervention_types: expected 2 of them, got 1", False
    ),
    "a key twice": Hostile(
        config(sorted_keys=[key_of(0), key_of(0)]), FileFormatError, "names an intervention twice", False
    ),
    "a key twice in two spellings": Hostile(
        config(sorted_keys=[key_of(0), key_of(0).replace("_", ".")]), FileFormatError, "intervention twice", False
    ),
    "a path for a key": Hostile(config(sorted_keys=["../../etc/passwd", key_of(1)]), FileFormatError, BAD_NAMES, False),
    "an absolute path for a key": Hostile(
        config(sorted_keys=["/etc/passwd", key_of(1)]), FileFormatError, BAD_NAMES, False
    ),
    "a path within a key": Hostile(
        config(sorted_keys=["comp_/../../x_unit_pos_nunit_1#0", key_of(1)]), FileFormatError, MISSING, False
    ),
    "a key that a terminal would obey": Hostile(
        config(sorted_keys=["\x1b[2J", key_of(1)]), FileFormatError, rf"{BAD_NAMES}: \\x1b", False
    ),
    "a key as long as a book": Hostile(
        config(sorted_keys=["x" * 10**6, key_of(1)]), FileFormatError, rf"{BAD_NAMES}: x{{100}}$", False
    ),
    "another class": Hostile(
        config(intervention_types=["<class 'pyreft.interventions.DireftIntervention'>"] * 2),
        IncompatibleModelError,
        "a DireftIntervention in the folder, a LoreftIntervention in the model",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_not_sound_is_refused_by_name_and_nothing_has_changed(tmp_path: Path, name: str) -> None:
    hostile = HOSTILE[name]
    source = make()
    folder = save(source, tmp_path / "folder")
    if hostile.full:
        complete(folder, source)
    hostile.spoil(folder)
    if UNREADABLE and hostile.reads:
        refused(make(seed=1), folder, FileFormatError, TOO_OLD)
        return
    model = make(seed=1)
    refused(model, folder, hostile.error, f"(?s){hostile.text}")
    error = raised_by(lambda: orthoserde.load(model, folder))
    assert str(folder) in str(error)
    assert len(str(error)) < 10_000
    if name == "code":
        assert (folder / "config.json").exists()
    if isinstance(error, IncompatibleModelError) and "not in the" not in str(error):
        refused(model, folder, hostile.error, f"(?s){hostile.text}", strict=False)


def test_a_folder_that_the_system_will_not_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(make(), tmp_path / "folder")

    def forbidden(path: object) -> list[str]:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "listdir", forbidden)
    refused(make(seed=1), folder, FileAccessError, "cannot read the folder: Permission denied")


def test_a_folder_is_refused_for_a_model_without_interventions_or_with_several(tmp_path: Path) -> None:
    folder = save(make(), tmp_path / "folder")
    refused(nn.Linear(2, 2), folder, IncompatibleModelError, "for a ReftModel; this model has none")
    two = nn.ModuleList([make(), make()])
    refused(two, folder, IncompatibleModelError, "this model has 2: 0, 1")
    assert "ReftModel" in str(raised_by(lambda: orthoserde.load(nn.Linear(2, 2), folder)))


@needs_reader
def test_a_folder_is_looked_into_without_a_model_and_built_from_by_nobody(tmp_path: Path) -> None:
    folder = save(make(), tmp_path / "folder")
    with pytest.raises(FileFormatError, match="only load reads it, into a ReftModel"):
        orthoserde.build(folder)
    assert orthoserde.inspect(folder).tensors
    assert orthoserde.verify(folder).ok


@needs_reader
def test_a_holder_loads_a_folder_and_is_asked_for_what_is_its_own(tmp_path: Path) -> None:
    model = make()
    folder = complete(save(model, tmp_path / "f"), model)
    holder = nn.ModuleDict({"reft": make(seed=1)})
    assert orthoserde.load(holder, folder).fidelity is Fidelity.EXACT
    assert_same_state(model, holder["reft"])
    owner = nn.ModuleDict({"reft": make(seed=1), "head": nn.Linear(2, 2)})
    refused(owner, folder, IncompatibleModelError, r"head\.weight: in the model, not in the file")
    assert orthoserde.load(owner, folder, strict=False).missing_keys == ["head.weight", "head.bias"]


# Writing


def states_in(folder: Path) -> dict[str, State]:
    return {path.name: torch.load(path, weights_only=True) for path in sorted(folder.glob("*.bin"))}


def assert_same_folders(left: Path, right: Path) -> None:
    assert sorted(path.name for path in left.iterdir()) == sorted(path.name for path in right.iterdir())
    assert (left / "config.json").read_bytes() == (right / "config.json").read_bytes()
    ours, theirs = states_in(left), states_in(right)
    for name, state in ours.items():
        assert list(state) == list(theirs[name])
        for key, tensor in state.items():
            assert tensor.dtype == theirs[name][key].dtype, key
            assert torch.equal(tensor, theirs[name][key]), key


@pytest.mark.parametrize("form", ["legacy", "full"])
@pytest.mark.parametrize("cls", [LoreftIntervention, ConsreftIntervention, Shift])
def test_a_model_and_its_file_give_equal_folders(tmp_path: Path, cls: type[Intervention], form: Any) -> None:
    model = make(cls, cls)
    train_on = adam(model) if cls is not Shift else None
    if train_on is not None:
        train(model, 3, train_on)
    before = snapshot(model)
    sizes = write(model, tmp_path / "model", form)
    assert_unchanged(model, before)
    assert sizes == {path.name: path.stat().st_size for path in sorted((tmp_path / "model").iterdir())}
    orthoserde.save(model, tmp_path / "file")
    if cls is Shift:
        with pytest.raises(ConfigError, match="Shift is none of pyreft's own classes"):
            write(tmp_path / "file", tmp_path / "from-file", form)
        return
    assert write(tmp_path / "file", tmp_path / "from-file", form) == sizes
    assert_same_folders(tmp_path / "model", tmp_path / "from-file")
    for name, state in states_in(tmp_path / "model").items():
        intervention = model.interventions[name.removeprefix("intkey_").removesuffix(".bin")]
        if cls is LoreftIntervention:
            expected = ["weight", "bias", "rotate_layer"]
            expected += ["rotate_layer_original", "rotate_layer_base"] if form == "full" else []
            assert list(state) == expected
            assert torch.equal(state["rotate_layer"], weight_of(intervention))
        else:
            theirs = intervention.state_dict()
            assert state.keys() == theirs.keys()
            assert all(torch.equal(state[key], theirs[key]) for key in theirs)


def test_trained_tensors_of_the_base_model_are_written_once_each(tmp_path: Path) -> None:
    model = make()
    tied = nn.Linear(2, 2, bias=False)
    tied.weight = model.model.get_parameter("0.weight")
    append(model, tied)
    model.model.requires_grad_(True)
    write(model, tmp_path / "model")
    orthoserde.save(model, tmp_path / "file")
    write(tmp_path / "file", tmp_path / "from-file")
    assert_same_folders(tmp_path / "model", tmp_path / "from-file")
    state = states_in(tmp_path / "model")["pytorch_model.bin"]
    assert sorted(state) == sorted(dict(model.model.named_parameters())) == ["0.bias", "0.weight"]


def test_frozen_tensors_of_the_base_model_are_not_written(tmp_path: Path) -> None:
    write(make(), tmp_path / "f")
    assert not (tmp_path / "f" / "pytorch_model.bin").exists()


@needs_reader
def test_the_full_form_is_read_back_exactly(tmp_path: Path) -> None:
    model = make(LoreftIntervention, ConsreftIntervention)
    train(model, 3, adam(model))
    write(model, tmp_path / "f", "full")
    other = make(LoreftIntervention, ConsreftIntervention, seed=1)
    assert orthoserde.load(other, tmp_path / "f").fidelity is Fidelity.EXACT
    assert_same_state(model, other)


def test_an_existing_folder_is_not_touched(tmp_path: Path) -> None:
    folder = save(make(), tmp_path / "f")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    (tmp_path / "file").write_bytes(b"mine")
    for target in (folder, tmp_path / "file"):
        with pytest.raises(FileAccessError, match="is there already, and is not an empty folder") as caught:
            write(make(seed=1), target)
        assert caught.value.filename == str(target)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert (tmp_path / "file").read_bytes() == b"mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f", "file"]


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "f").mkdir()
    write(make(), tmp_path / "f")
    assert file_of(0) in {path.name for path in (tmp_path / "f").iterdir()}
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


@pytest.mark.skipif(os.name == "nt", reason="about POSIX folders")
def test_an_empty_folder_keeps_its_mode_and_the_one_where_the_process_is_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "f").mkdir()
    (tmp_path / "f").chmod(0o2770)
    write(make(), tmp_path / "f")
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == 0o2770
    (tmp_path / "read").mkdir(mode=0o555)
    write(make(), tmp_path / "read")
    assert stat.S_IMODE((tmp_path / "read").stat().st_mode) == 0o555
    (tmp_path / "read").chmod(0o755)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(FileAccessError, match="the folder where the process is"):
        write(make(), ".")
    assert list(Path.cwd().iterdir()) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f", "here", "read"]


def test_the_names_in_a_folder_and_its_own_are_forced_to_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    monkeypatch.setattr(storage, "sync_folder", lambda folder: synced.append(os.path.basename(folder)))
    write(make(), tmp_path / "f")
    assert len(synced) == 2
    assert synced[0].startswith(".f.orthoserde-")
    assert synced[1] == tmp_path.name


def test_a_folder_in_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileAccessError, match="cannot write the folder"):
        write(make(), tmp_path / "no" / "f")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize("failing", ["save", "fsync", "rename", "interrupt"])
def test_a_write_that_fails_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str, existing: bool
) -> None:
    if existing:
        (tmp_path / "f").mkdir()
    real, calls = torch.save, []

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    def second_fails(*args: Any, **options: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(*args, **options)

    if failing == "interrupt":
        monkeypatch.setattr(torch, "save", second_fails)
    else:
        monkeypatch.setattr(torch if failing == "save" else os, failing, fail)
    if failing == "interrupt":
        with pytest.raises(KeyboardInterrupt):
            write(make(), tmp_path / "f")
    else:
        with pytest.raises(FileAccessError, match="No space left on device"):
            write(make(), tmp_path / "f")
    left = [path for path in tmp_path.iterdir() if not (existing and path.name == "f")]
    assert left == []
    if (tmp_path / "f").exists():
        assert list((tmp_path / "f").iterdir()) == []
    monkeypatch.undo()
    write(make(), tmp_path / "f")


def test_a_full_disk_is_an_error_of_the_disk(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    signal = pytest.importorskip("signal")
    model = make(width=64, rank=4)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        with pytest.raises(FileAccessError, match="cannot write the folder: File too large"):
            write(model, tmp_path / "f", "full")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_written_is_refused_by_name(tmp_path: Path) -> None:
    plain = nn.Linear(2, 2)
    orthoserde.save(plain, tmp_path / "plain")
    for source in (plain, tmp_path / "plain"):
        with pytest.raises(ConfigError, match="expected one ReftModel with a known configuration, got 0"):
            write(source, tmp_path / "f")
    with pytest.raises(ConfigError, match="form: expected one of legacy, full, got 'both'"):
        write(make(), tmp_path / "f", "both")  # type: ignore[arg-type]
    with pytest.raises(orthoserde.CheckpointNotFoundError):
        write(tmp_path / "nothing", tmp_path / "f")
    orthoserde.save(make(), tmp_path / "file")
    data = bytearray((tmp_path / "file").read_bytes())
    data[-1] ^= 1
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(DamagedFileError, match="so nothing was written; use another copy"):
        write(tmp_path / "file", tmp_path / "f")
    assert not (tmp_path / "f").exists()


def test_a_class_that_its_user_registered_is_written_as_pyreft_does(tmp_path: Path) -> None:
    class Registered(LoreftIntervention):
        pass

    orthoserde.Registry().register("lab>Registered")(Registered)
    model = make(Registered)
    write(model, tmp_path / "f")
    assert list(states_in(tmp_path / "f")[file_of(0)]) == ["weight", "bias", "rotate_layer"]


def test_a_name_of_the_users_that_means_something_else_to_pyreft_is_refused(tmp_path: Path) -> None:
    model = make()
    model.interventions[key_of(0)].register_buffer("bias", torch.zeros(2))
    with pytest.raises(ConfigError, match="pyreft gives 'bias' another meaning; rename it"):
        write(model, tmp_path / "f")
    assert list(tmp_path.iterdir()) == []


# Files, as far as they need no pyvene


def test_a_file_compares_what_the_tensors_do_not_say(tmp_path: Path) -> None:
    model = make(dropout=0.5)
    report = orthoserde.save(model, tmp_path / "file")
    assert set(report.left_out) == {"model.0.weight", "model.0.bias"}
    assert orthoserde.load(make(seed=1, dropout=0.5), tmp_path / "file").fidelity is Fidelity.EXACT
    refused(make(seed=1), tmp_path / "file", IncompatibleModelError, "dropout is 0.5 in the file, 0.0 in the model")
    with pytest.raises(ConfigError, match="make the model yourself and use load"):
        orthoserde.build(tmp_path / "file")
