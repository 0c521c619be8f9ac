"""One file to another: what is in it, what takes it, and that the source and whatever is there already stay."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

import orthoserde
from orthoserde import (
    CheckpointNotFoundError,
    ConfigError,
    DamagedFileError,
    Fidelity,
    FileAccessError,
    FileFormatError,
    comparison,
    storage,
)
from orthoserde.capture import capture
from orthoserde.checkpoint import LiveTensor
from orthoserde.conversion import OURS, PLAIN, TORCH, ConversionReport, Form, convert
from orthoserde.opening import open_checkpoint, stored_bytes
from orthoserde.transforms import compact as compact_transform
from tests.helpers import assert_same_state, bits, flip_bit, scramble_, watch_computations
from tests.integrations.test_pyreft_folders import needs_reader


def make(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return nn.Sequential(
        orthogonal(nn.Linear(6, 4), orthogonal_map="cayley"),
        weight_norm(nn.Linear(4, 4)),
        spectral_norm(nn.Linear(4, 4)),
        nn.BatchNorm1d(4),
    ).eval()


def compactable(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(orthoserde.orthogonal(nn.Linear(9, 3)), orthogonal(nn.Linear(3, 9)))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    orthoserde.save(model, tmp_path / "source.safetensors", optimizer=optimizer, metadata={"run": "1"})
    return tmp_path / "source.safetensors"


def assert_note(report: ConversionReport, text: str) -> None:
    assert any(text in note for note in report.notes), report.notes


def test_dense_has_whole_bases_and_compact_columns_where_these_are_exact(tmp_path: Path) -> None:
    model = compactable()
    orthoserde.save(model, tmp_path / "dense", base="dense")
    report = convert(tmp_path / "dense", tmp_path / "compact", "compact")
    assert report.sort == OURS
    assert report.left_dense == ("1.weight",)
    assert_note(report, "canonicalize_")
    assert orthoserde.inspect(tmp_path / "compact").compact == ("0.weight",)
    assert report.target_bytes == (tmp_path / "compact").stat().st_size < report.source_bytes
    back = convert(tmp_path / "compact", tmp_path / "back", "dense")
    assert not back.notes
    assert (tmp_path / "back").read_bytes() == (tmp_path / "dense").read_bytes()
    again = compactable(1)
    assert orthoserde.load(again, tmp_path / "compact").fidelity is Fidelity.EXACT
    assert_same_state(model, again)


def strict_state(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return load_file(path)
    loaded: dict[str, Tensor] = torch.load(path, weights_only=True)
    return loaded


@pytest.mark.parametrize("name", ["m.safetensors", "m.pt", "m.bin", "m.PTH"])
def test_torch_is_what_a_strict_load_state_dict_takes(name: str, source: Path, tmp_path: Path) -> None:
    report = convert(source, tmp_path / name, "torch")
    assert report.sort == (PLAIN if name == "m.safetensors" else TORCH)
    assert_note(report, "training state was left out: optimizer")
    assert_note(report, "metadata was left out")
    again = make(1)
    again.load_state_dict(strict_state(tmp_path / name))
    assert_same_state(make(), again, strides=False)


def structured() -> nn.Module:
    return orthoserde.orthogonal(nn.Linear(9, 3), structured=True)


def compact() -> nn.Module:
    return orthoserde.orthogonal(nn.Linear(9, 3))


@pytest.mark.parametrize("make_source", [structured, compact])
def test_torch_is_torchs_form_of_any(make_source: Callable[[], nn.Module], tmp_path: Path) -> None:
    model = scramble_original(make_source())
    orthoserde.save(model, tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b.safetensors", "torch")
    again = orthogonal(nn.Linear(9, 3))
    again.load_state_dict(load_file(tmp_path / "b.safetensors"))
    assert torch.allclose(again.weight, model.weight, atol=1e-6)  # type: ignore[arg-type]


def scramble_original(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        parametrizations: Any = model.parametrizations
        original = parametrizations.weight.original
        # Off the diagonal: householder's must be +-1.
        original += 0.1 * torch.randn(original.shape).tril(-1)
    return model


def test_ties_stand_under_each_name_and_computed_tensors_go(tmp_path: Path) -> None:
    shared = weight_norm(nn.Linear(3, 3))
    model = nn.ModuleDict({"a": shared, "b": shared, "c": nn.Linear(3, 3)})
    orthoserde.save(model, tmp_path / "a", include_weights=True)
    report = convert(tmp_path / "a", tmp_path / "b.safetensors", "torch")
    assert_note(report, "computed tensors were left out")
    assert_note(report, "under each of their names")
    other = weight_norm(nn.Linear(3, 3))
    again = nn.ModuleDict({"a": other, "b": other, "c": nn.Linear(3, 3)})
    again.load_state_dict(load_file(tmp_path / "b.safetensors"))
    assert_same_state(model, again)
    assert report.tensors == len(load_file(tmp_path / "b.safetensors"))


def test_baked_is_plain_weights(source: Path, tmp_path: Path) -> None:
    report = convert(source, tmp_path / "baked", "baked")
    assert report.sort == OURS
    assert_note(report, "training state was left out")
    plain = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
    orthoserde.load(plain, tmp_path / "baked")
    weights = [bits(layer.weight) for layer in make()]
    assert [bits(layer.weight) for layer in plain] == weights  # type: ignore[arg-type]
    convert(source, tmp_path / "baked.pt", "baked")
    plain.load_state_dict({key: value + 1 for key, value in plain.state_dict().items()})
    plain.load_state_dict(strict_state(tmp_path / "baked.pt"))
    assert [bits(layer.weight) for layer in plain] == weights  # type: ignore[arg-type]


def test_each_baked_weight_is_run_dry_once_and_computed_once(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed = watch_computations(monkeypatch)
    convert(source, tmp_path / "baked", "baked")
    kinds = ("torch>orthogonal", "torch>weight_norm", "torch>spectral_norm")
    assert Counter(computed) == {(kind, device): 1 for kind in kinds for device in ("meta", "cpu")}


def test_hooks_are_the_older_keys_and_torch_the_way_back(source: Path, tmp_path: Path) -> None:
    report = convert(source, tmp_path / "hooks", "hooks")
    assert report.sort == OURS
    keys = orthoserde.inspect(tmp_path / "hooks").tensors.keys()
    assert {"1.weight_g", "1.weight_v", "2.weight_orig", "2.weight_u", "2.weight_v"} <= keys
    again = make(1)
    orthoserde.load(again, tmp_path / "hooks")
    assert_same_state(make(), again)
    orthoserde.save(nn.Linear(2, 2), tmp_path / "plain")
    assert_note(convert(tmp_path / "plain", tmp_path / "other", "hooks"), "no tensor that one of torch's older hooks")


@needs_reader
def test_a_state_dict_with_keys_of_hooks_becomes_one_of_parametrizations(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "hooks.pt", "hooks")
    assert "1.weight_g" in strict_state(tmp_path / "hooks.pt")
    convert(tmp_path / "hooks.pt", tmp_path / "new.safetensors", "torch")
    again = make(1)
    again.load_state_dict(load_file(tmp_path / "new.safetensors"))
    assert_same_state(make(), again, strides=False)


def test_a_source_without_configuration_gives_a_plain_file(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "a")
    report = convert(tmp_path / "a", tmp_path / "b", "dense")
    assert report.sort == PLAIN
    assert_note(report, "no configuration")
    assert load_file(tmp_path / "b")["w"].tolist() == [1.0, 1.0]
    with pytest.raises(ConfigError, match="does not say which tensors are bases"):
        convert(tmp_path / "a", tmp_path / "c", "compact")


def test_a_module_that_is_called_parametrizations_is_no_parametrization(tmp_path: Path) -> None:
    save_file({"parametrizations.a.weight": torch.ones(2, 2)}, tmp_path / "m")
    convert(tmp_path / "m", tmp_path / "x", "baked")
    assert load_file(tmp_path / "x").keys() == {"parametrizations.a.weight"}


def test_the_size_of_a_folder_is_that_of_the_files_that_are_read(tmp_path: Path) -> None:
    report = orthoserde.save(make(), tmp_path / "run", max_shard_size=300)
    files = list((tmp_path / "run").iterdir())
    assert len(files) > 2
    assert report.file_bytes == sum(path.stat().st_size for path in files)
    (tmp_path / "run" / "notes.txt").write_bytes(bytes(5000))
    (tmp_path / "run" / "pytorch_model.bin").write_bytes(bytes(7000))
    for place in (tmp_path / "run", tmp_path / "run" / "model.safetensors.index.json"):
        assert stored_bytes(place) == report.file_bytes
        converted = convert(place, tmp_path / "x", "dense", force=True)
        assert converted.source_bytes == report.file_bytes
    alone = orthoserde.save(make(), tmp_path / "run" / "model.safetensors")
    assert stored_bytes(tmp_path / "run") == alone.file_bytes
    assert stored_bytes(tmp_path / "nothing") == 0


def test_progress_is_told_of_every_byte(source: Path, tmp_path: Path) -> None:
    counted: list[int] = []
    convert(source, tmp_path / "b", "dense", progress=counted.append)
    assert sum(counted) == orthoserde.inspect(source).nbytes


class TestRefusals:
    """After each of them the folder is as it was."""

    @pytest.fixture(autouse=True)
    def unchanged(self, tmp_path: Path, source: Path) -> Any:
        (tmp_path / "link").symlink_to(source)
        (tmp_path / "hard").hardlink_to(source)
        (tmp_path / "there").write_bytes(b"there")
        (tmp_path / "folder").mkdir()
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        yield
        after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        assert after == before

    @pytest.mark.parametrize("form", get_args(Form))
    @pytest.mark.parametrize("name", ["source.safetensors", "link", "hard", "folder/../source.safetensors"])
    def test_the_source_is_never_written_over(self, name: str, form: Form, source: Path, tmp_path: Path) -> None:
        for a, b in ((source, tmp_path / name), (tmp_path / "link", tmp_path / name)):
            with pytest.raises(ConfigError, match="never written over"):
                convert(a, b, form, force=True)

    def test_what_is_there_is_not_replaced_unasked(self, source: Path, tmp_path: Path) -> None:
        with pytest.raises(FileAccessError, match="is there already"):
            convert(source, tmp_path / "there", "dense")
        with pytest.raises(FileAccessError, match="is there already"):
            convert(source, tmp_path / "there", "pyreft", force=True)
        with pytest.raises(FileAccessError, match="is a folder"):
            convert(source, tmp_path / "folder", "dense", force=True)

    def test_a_folder_that_holds_the_source_is_refused(self, source: Path, tmp_path: Path) -> None:
        for form in ("dense", "pyreft"):
            with pytest.raises(ConfigError, match="holds the source"):
                convert(source, tmp_path, form, force=True)

    def test_a_name_of_torchs_for_a_file_of_ours_is_refused(self, source: Path, tmp_path: Path) -> None:
        def refuse(count: int) -> None:
            raise AssertionError("something was read")

        for form in ("dense", "compact"):
            with pytest.raises(ConfigError, match="or the form torch"):
                convert(source, tmp_path / "x.pt", form, progress=refuse)

    def test_a_file_that_is_no_reft_model_gives_no_folder(self, source: Path, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"not saved from a ReftModel.*load it into the ReftModel"):
            convert(source, tmp_path / "x", "pyreft")

    def test_another_form_is_refused(self, source: Path, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="expected one of dense, compact"):
            convert(source, tmp_path / "x", "sparse")  # type: ignore[arg-type]

    @pytest.mark.parametrize("path", ["a\0b", "a\ud800b"])
    @pytest.mark.parametrize("form", ["dense", "pyreft"])
    def test_what_is_no_path_is_refused(self, path: str, form: Form, source: Path, tmp_path: Path) -> None:
        before = sorted(tmp_path.iterdir())
        with pytest.raises(FileAccessError, match=r"null|surrogate"):
            convert(f"{tmp_path}/{path}", tmp_path / "x", form)
        with pytest.raises(FileAccessError, match=r"null|surrogate"):
            convert(source, f"{tmp_path}/{path}", form, force=True)
        assert sorted(tmp_path.iterdir()) == before

    @pytest.mark.parametrize("form", ["compact", "torch", "pyreft"])
    def test_an_empty_path_is_not_the_folder_where_the_process_is(
        self, form: Form, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(FileAccessError, match="expected a path, got an empty one"):
            convert(source, "", form, force=True)

    def test_no_source_and_no_checkpoint(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointNotFoundError):
            convert(tmp_path / "none", tmp_path / "x", "dense")
        with pytest.raises(FileFormatError):
            convert(tmp_path / "there", tmp_path / "x", "dense")


def test_force_replaces_a_file_as_a_whole(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "there"
    target.write_bytes(b"there")
    convert(source, target, "dense", force=True)
    assert target.read_bytes() == source.read_bytes()


@pytest.mark.parametrize("form", ["dense", "compact", "baked", "hooks", "torch"])
def test_damage_is_not_passed_on(form: Form, source: Path, tmp_path: Path) -> None:
    flip_bit(source, -1)
    with pytest.raises((DamagedFileError, ConfigError)):
        convert(source, tmp_path / "x", form)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source.safetensors"]


def test_an_interrupt_leaves_nothing(source: Path, tmp_path: Path) -> None:
    def interrupt(count: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "x", "dense", progress=interrupt)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source.safetensors"]


def test_selected_tensors_are_said(tmp_path: Path) -> None:
    model = make()
    scramble_(model)
    orthoserde.save(model, tmp_path / "a", select=lambda name, tensor: name.startswith("3"))
    report = convert(tmp_path / "a", tmp_path / "b.safetensors", "torch")
    assert_note(report, "load it with strict=False")
    loaded = load_file(tmp_path / "b.safetensors")
    assert bits(loaded["3.weight"]) == bits(model[3].weight)


@pytest.mark.parametrize("form", ["dense", "torch"])
def test_no_base_is_worked_out_of_columns_that_make_no_sense(form: Form, tmp_path: Path) -> None:
    with capture(orthoserde.orthogonal(nn.Linear(9, 3)), orthoserde.Registry()) as live:
        columns = compact_transform(live)
        (key,) = [key for key in columns.sources if key.endswith(".columns")]
        odd = {**columns.sources, key: LiveTensor(2 * columns.tensor(key))}
        storage.write(dataclasses.replace(columns, sources=odd), tmp_path / "a")
    with pytest.raises(DamagedFileError, match="not orthonormal"):
        convert(tmp_path / "a", tmp_path / "b", form)
    assert not (tmp_path / "b").exists()


class TestShards:
    """A folder of shards, and its index, are sources like any other."""

    @pytest.fixture
    def shards(self, tmp_path: Path) -> Path:
        orthoserde.save(make(), tmp_path / "shards", max_shard_size=300)
        return tmp_path / "shards"

    @pytest.mark.parametrize("name", ["", "model.safetensors.index.json"])
    def test_they_become_one_file(self, name: str, shards: Path, tmp_path: Path) -> None:
        assert len(list(shards.iterdir())) > 2
        report = convert(shards / name, tmp_path / "one", "dense")
        assert report.source_bytes == sum(path.stat().st_size for path in shards.iterdir())
        again = make(1)
        assert orthoserde.load(again, tmp_path / "one").fidelity is Fidelity.EXACT
        assert_same_state(make(), again)

    @pytest.mark.parametrize("name", ["", "model.safetensors.index.json"])
    def test_no_shard_is_written_over(self, name: str, shards: Path) -> None:
        before = {path: path.read_bytes() for path in shards.iterdir()}
        for path in before:
            with pytest.raises(ConfigError, match="never written over"):
                convert(shards / name, path, "dense", force=True)
        assert {path: path.read_bytes() for path in shards.iterdir()} == before

    def test_nothing_is_written_into_the_folder_that_is_the_source(self, shards: Path) -> None:
        with pytest.raises(ConfigError, match="lies in the folder that is the source"):
            convert(shards, shards / "new.safetensors", "dense")

    def test_they_are_the_same_as_one_file(self, shards: Path, source: Path, tmp_path: Path) -> None:
        orthoserde.save(make(), tmp_path / "one")
        with open_checkpoint(shards) as one, open_checkpoint(tmp_path / "one") as two:
            assert comparison.diff(one, two, orthoserde.Registry()).same
