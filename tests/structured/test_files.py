"""Files of the structured form, and of torch's form in its place."""

from __future__ import annotations

import copy
import dataclasses
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import orthoserde
from orthoserde import Fidelity, IncompatibleModelError, storage
from orthoserde.api.saving import Base
from orthoserde.json_values import JSON
from orthoserde.manifest import ORTHOGONAL, STRUCTURED
from orthoserde.parametrizations.structured import Orthogonal
from orthoserde.transforms import expand, structure, unstructure
from tests.helpers import assert_unchanged, flip_bit, same_bits, snapshot, watch_reads
from tests.structured.models import BASE, CASES, COLUMNS, ORIGINAL, Holder, link, make, orthonormal, weight_of


def resumed(path: Path, module: nn.Module) -> orthoserde.LoadReport:
    report = orthoserde.load(module, path)
    assert not report.missing_keys
    assert not report.unexpected_keys
    return report


@pytest.mark.parametrize(("orthogonal_map", "shape", "dtype"), CASES)
def test_it_is_saved_and_restored_bit_for_bit(
    orthogonal_map: str, shape: tuple[int, ...], dtype: torch.dtype, tmp_path: Path
) -> None:
    module = make(shape, orthogonal_map, dtype)
    orthoserde.save(module, tmp_path / "m")
    other = make(shape, orthogonal_map, dtype, seed=5)
    assert resumed(tmp_path / "m", other).fidelity is Fidelity.EXACT
    for key, value in module.state_dict().items():
        assert torch.equal(other.state_dict()[key], value)
    if shape[-1] != shape[-2]:
        assert torch.equal(reflectors_of(other), reflectors_of(module))
    assert torch.equal(weight_of(other), weight_of(module))
    assert orthoserde.verify(tmp_path / "m").ok


def reflectors_of(module: nn.Module) -> torch.Tensor:
    return module.get_buffer("parametrizations.weight.0.vectors")


def test_the_file_has_the_columns_and_not_the_base(tmp_path: Path) -> None:
    orthoserde.save(make((400, 4)), tmp_path / "m")
    manifest = orthoserde.inspect(tmp_path / "m")
    assert set(manifest.tensors) == {ORIGINAL, COLUMNS}
    assert manifest.tensors[COLUMNS].shape == (400, 4)
    assert os.path.getsize(tmp_path / "m") < 2 * 400 * 4 * 4 + 4096
    (record,) = manifest.parametrized
    assert record.chain[0].kind == STRUCTURED
    assert record.chain[0].config == {"orthogonal_map": "householder", "shape": [400, 4]}


def test_every_way_to_store_bases_stores_it_the_same(tmp_path: Path) -> None:
    module = make((12, 4))
    for base in ("auto", "dense", "compact"):
        orthoserde.save(module, tmp_path / base, base=base)
    assert (tmp_path / "auto").read_bytes() == (tmp_path / "dense").read_bytes()
    assert (tmp_path / "auto").read_bytes() == (tmp_path / "compact").read_bytes()


def test_a_bare_module_and_one_without_memory_get_it_back(tmp_path: Path) -> None:
    module = make((12, 4), "cayley")
    orthoserde.save(module, tmp_path / "m")
    bare = Holder(torch.zeros(12, 4))
    parameter = bare.weight
    assert resumed(tmp_path / "m", bare).fidelity is Fidelity.EXACT
    assert same_bits(weight_of(bare), weight_of(module))
    assert bare.get_parameter(ORIGINAL) is parameter
    with torch.device("meta"):
        empty = orthoserde.orthogonal(Holder(torch.empty(12, 4)), orthogonal_map="cayley", structured=True)
    report = resumed(tmp_path / "m", empty)
    assert same_bits(weight_of(empty), weight_of(module))
    assert not report.notes


def test_what_was_worked_out_is_worked_out_again(tmp_path: Path) -> None:
    """A load must not leave the reflectors of other columns behind."""
    orthoserde.save(make((6, 3), seed=1), tmp_path / "m")
    other = make((6, 3), seed=2)
    assert not torch.equal(reflectors_of(other), reflectors_of(make((6, 3), seed=1)))
    orthoserde.load(other, tmp_path / "m")
    # Compiled code does not look, so this is not left to the next forward.
    assert same_bits(reflectors_of(other), reflectors_of(make((6, 3), seed=1)))
    assert same_bits(weight_of(other), weight_of(make((6, 3), seed=1)))


@pytest.mark.parametrize("shape", [(12, 4), (4, 12)], ids=str)
@pytest.mark.parametrize("orthogonal_map", ["householder", "cayley", "matrix_exp"])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_a_run_goes_on_bit_for_bit(
    orthogonal_map: str, shape: tuple[int, ...], optimizer: type[torch.optim.Optimizer], tmp_path: Path
) -> None:
    def train(module: nn.Module, steps: torch.optim.Optimizer) -> list[float]:
        losses = []
        for _ in range(5):
            steps.zero_grad()
            loss = (weight_of(module) - 1).square().sum()
            loss.backward()  # type: ignore[no-untyped-call]
            steps.step()
            losses.append(loss.item())
        return losses

    module = make(shape, orthogonal_map)
    steps = optimizer(module.parameters(), lr=1e-2)  # type: ignore[call-arg]
    train(module, steps)
    orthoserde.save(module, tmp_path / "m")
    state = copy.deepcopy(steps.state_dict())
    expected = train(module, steps)
    other = make(shape, orthogonal_map, seed=8)
    again = optimizer(other.parameters(), lr=1e-2)  # type: ignore[call-arg]
    again.load_state_dict(state)
    orthoserde.load(other, tmp_path / "m")
    assert train(other, again) == expected
    assert same_bits(weight_of(other), weight_of(module))


# The other form


@pytest.mark.parametrize("base", ["auto", "dense"])
@pytest.mark.parametrize(("orthogonal_map", "shape", "dtype"), CASES)
def test_files_of_torchs_form_load_into_it(
    orthogonal_map: str, shape: tuple[int, ...], dtype: torch.dtype, base: str, tmp_path: Path
) -> None:
    dense = make(shape, orthogonal_map, dtype, structured=False)
    orthoserde.save(dense, tmp_path / "m", base=base)  # type: ignore[arg-type]
    module = make(shape, orthogonal_map, dtype, seed=5)
    report = resumed(tmp_path / "m", module)
    twin = make(shape, orthogonal_map, dtype)
    assert torch.equal(module.get_parameter(ORIGINAL), twin.get_parameter(ORIGINAL))
    assert torch.equal(module.get_buffer(COLUMNS), twin.get_buffer(COLUMNS))
    assert torch.equal(weight_of(module), weight_of(twin))
    assert report.fidelity is Fidelity.UNVERIFIED
    assert "from torch>orthogonal: the same state" in report.tensors["weight"].action


@pytest.mark.parametrize(("orthogonal_map", "shape", "dtype"), CASES)
def test_its_files_load_into_torchs_form(
    orthogonal_map: str, shape: tuple[int, ...], dtype: torch.dtype, tmp_path: Path
) -> None:
    orthoserde.save(make(shape, orthogonal_map, dtype), tmp_path / "m")
    dense = parametrizations.orthogonal(Holder(orthonormal(shape, dtype, 5)), orthogonal_map=orthogonal_map)
    report = resumed(tmp_path / "m", dense)
    twin = make(shape, orthogonal_map, dtype, structured=False)
    assert torch.equal(dense.get_parameter(ORIGINAL), twin.get_parameter(ORIGINAL))
    assert torch.equal(dense.get_buffer(BASE), twin.get_buffer(BASE))
    assert torch.equal(weight_of(dense), weight_of(twin))
    assert report.fidelity is Fidelity.UNVERIFIED
    assert "from orthoserde>orthogonal: the same state" in str(report)


def test_there_and_back_is_the_same_file(tmp_path: Path) -> None:
    dense = make((12, 4), structured=False)
    orthoserde.save(dense, tmp_path / "dense")
    with storage.read(tmp_path / "dense") as checkpoint:
        storage.write(structure(checkpoint), tmp_path / "structured")
    module = make((12, 4), seed=5)
    assert resumed(tmp_path / "structured", module).fidelity is Fidelity.EXACT
    orthoserde.save(make((12, 4)), tmp_path / "expected")
    assert (tmp_path / "structured").read_bytes() == (tmp_path / "expected").read_bytes()
    with storage.read(tmp_path / "structured") as checkpoint:
        storage.write(unstructure(checkpoint), tmp_path / "compact")
    assert (tmp_path / "compact").read_bytes() == (tmp_path / "dense").read_bytes()
    with storage.read(tmp_path / "structured") as checkpoint:
        storage.write(expand(unstructure(checkpoint)), tmp_path / "whole")
    other = parametrizations.orthogonal(Holder(orthonormal((12, 4), seed=6)))
    assert resumed(tmp_path / "whole", other).fidelity is Fidelity.EXACT
    assert same_bits(other.get_buffer(BASE), dense.get_buffer(BASE))


def test_only_those_that_are_named_are_converted(tmp_path: Path) -> None:
    model = nn.Sequential(make((12, 4), structured=False), make((12, 4), structured=False, seed=2))
    orthoserde.save(model, tmp_path / "m")
    with storage.read(tmp_path / "m") as checkpoint:
        converted = structure(checkpoint, {"1.weight"})
        kinds = [record.chain[0].kind for record in converted.manifest.parametrized]
        assert kinds == [ORTHOGONAL, STRUCTURED]
        assert unstructure(converted, {"0.weight"}) is converted
        assert converted.manifest.compact == ("0.weight",)


def test_torchs_random_completion_has_no_structured_form(tmp_path: Path) -> None:
    dense = parametrizations.orthogonal(Holder(orthonormal((12, 4))))
    orthoserde.save(dense, tmp_path / "m")
    module = make((12, 4), seed=5)
    before = snapshot(module)
    with pytest.raises(IncompatibleModelError, match=r"weight: .*not the canonical completion.*structured"):
        orthoserde.load(module, tmp_path / "m")
    assert_unchanged(module, before)


def test_damage_is_not_taken_for_another_completion(tmp_path: Path) -> None:
    orthoserde.save(make((12, 4), structured=False), tmp_path / "m", base="dense")
    flip_bit(tmp_path / "m", (tmp_path / "m").stat().st_size - 100)
    with pytest.raises(orthoserde.DamagedFileError):
        orthoserde.load(make((12, 4), seed=5), tmp_path / "m")


@pytest.mark.parametrize("base", ["auto", "dense"])
@pytest.mark.parametrize(("verify", "times"), [(False, 1), (True, 2)])
def test_a_load_into_it_reads_other_tensors_no_more_often_than_any_load(
    base: Base, verify: bool, times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "m"
    orthoserde.save(nn.Sequential(nn.Linear(300, 7), make((12, 4), structured=False)), file, base=base)
    reads = watch_reads(monkeypatch)
    orthoserde.load(nn.Sequential(nn.Linear(300, 7), make((12, 4), seed=5)), file, verify=verify)
    assert [count for _, count in reads].count(300 * 7 * 4) == times


def test_a_shared_module_is_converted_under_both_names(tmp_path: Path) -> None:
    shared = make((12, 4), structured=False)
    orthoserde.save(nn.ModuleDict({"a": shared, "b": shared}), tmp_path / "m")
    other = make((12, 4), seed=5)
    report = resumed(tmp_path / "m", nn.ModuleDict({"a": other, "b": other}))
    assert same_bits(other.get_buffer(COLUMNS), make((12, 4)).get_buffer(COLUMNS))
    assert report.fidelity is Fidelity.UNVERIFIED
    orthoserde.save(nn.ModuleDict({"a": other, "b": other}), tmp_path / "back")
    dense = parametrizations.orthogonal(Holder(orthonormal((12, 4), seed=7)))
    resumed(tmp_path / "back", nn.ModuleDict({"a": dense, "b": dense}))
    assert same_bits(dense.get_buffer(BASE), shared.get_buffer(BASE))


@pytest.mark.parametrize("structured", [True, False])
def test_another_map_is_refused_in_either_form(structured: bool, tmp_path: Path) -> None:
    orthoserde.save(make((12, 4), "cayley", structured=structured), tmp_path / "m")
    module = make((12, 4), "householder", structured=not structured)
    before = snapshot(module)
    with pytest.raises(
        IncompatibleModelError, match="orthogonal_map is 'cayley' in the file, 'householder' in the mod"
    ):
        orthoserde.load(module, tmp_path / "m")
    assert_unchanged(module, before)


def test_columns_that_are_tied_stay_in_their_form(tmp_path: Path) -> None:
    """As torch's form they would have to be columns alone, and another tensor too."""
    module = nn.Module()
    module.first = make((12, 4))
    module.register_buffer("copy", module.first.get_buffer(COLUMNS))
    orthoserde.save(module, tmp_path / "m")
    with storage.read(tmp_path / "m") as checkpoint:
        assert unstructure(checkpoint) is checkpoint
    other = nn.Module()
    other.first = make((12, 4), structured=False)
    other.register_buffer("copy", torch.zeros(12, 4))
    with pytest.raises(IncompatibleModelError, match="its columns in the file are tied to another tensor"):
        orthoserde.load(other, tmp_path / "m")


def test_a_computed_weight_starts_it_afresh(tmp_path: Path) -> None:
    weight = orthonormal((12, 4), seed=3)
    save_file({"weight": weight}, tmp_path / "m")
    module = make((12, 4), seed=5)
    with pytest.warns(orthoserde.LegacyCheckpointWarning):
        assert orthoserde.load(module, tmp_path / "m").fidelity is Fidelity.INFERENCE
    assert torch.equal(weight_of(module), weight)
    assert same_bits(module.get_buffer(COLUMNS), weight)
    assert torch.equal(reflectors_of(module), reflectors_of(make((12, 4), seed=3)))


def test_a_state_dict_of_torch_is_read(tmp_path: Path) -> None:
    module = make((12, 4))
    save_file(module.state_dict(), tmp_path / "m")
    other = make((12, 4), seed=5)
    assert resumed(tmp_path / "m", other).fidelity is Fidelity.UNVERIFIED
    assert same_bits(weight_of(other), weight_of(module))


@pytest.mark.parametrize(
    "config",
    [
        {"orthogonal_map": "qr", "shape": [12, 4]},
        {"orthogonal_map": "cayley", "shape": [4, 12]},
        {"orthogonal_map": "cayley"},
        {"orthogonal_map": "cayley", "shape": [12, 4], "more": 1},
    ],
    ids=str,
)
def test_files_that_make_no_sense_are_refused(config: dict[str, JSON], tmp_path: Path) -> None:
    orthoserde.save(make((12, 4), "cayley"), tmp_path / "m")
    with storage.read(tmp_path / "m") as checkpoint:
        (record,) = checkpoint.manifest.parametrized
        changed = dataclasses.replace(record.chain[0], config=config)
        manifest = dataclasses.replace(
            checkpoint.manifest, parametrized=(dataclasses.replace(record, chain=(changed,)),)
        )
        storage.write(dataclasses.replace(checkpoint, manifest=manifest), tmp_path / "odd")
    for module in (
        make((12, 4), "cayley", seed=5),
        Holder(torch.zeros(12, 4)),
        make((12, 4), "cayley", structured=False),
    ):
        before = snapshot(module)
        with pytest.raises(orthoserde.OrthoserdeError):
            orthoserde.load(module, tmp_path / "odd")
        assert_unchanged(module, before)
    assert not orthoserde.verify(tmp_path / "odd").ok


def test_it_goes_with_others_in_a_chain(tmp_path: Path) -> None:
    module, other = make((12, 4)), make((12, 4), seed=5)
    for each in (module, other):
        parametrize.register_parametrization(each, "weight", Doubled())
    orthoserde.save(module, tmp_path / "m")
    resumed(tmp_path / "m", other)
    assert same_bits(weight_of(other), weight_of(module))


class Doubled(nn.Module):
    """Twice the weight."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


def test_its_class_is_known_to_every_registry(tmp_path: Path) -> None:
    module = make((12, 4))
    orthoserde.save(module, tmp_path / "m", registry=orthoserde.Registry())
    other = make((12, 4), seed=5)
    assert orthoserde.load(other, tmp_path / "m", registry=orthoserde.Registry()).fidelity is Fidelity.EXACT
    assert type(link(other)) is Orthogonal
