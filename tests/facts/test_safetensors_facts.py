"""FACTS, safetensors: what its torch binding leaves open is settled in a file of orthoserde, which it still reads."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import cast

import pytest
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal, spectral_norm

import orthoserde
from orthoserde import ConfigError, DamagedFileError, Fidelity, FileAccessError, IncompatibleModelError
from tests.facts.conftest import Trap
from tests.helpers import assert_same_state, assert_unchanged, flip_bit, header_bytes, raised_by, same_bits, snapshot


class Tied(nn.Module):
    """Two parameters that are one, beside an orthogonal weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.turn = orthogonal(nn.Linear(3, 3), orthogonal_map="cayley")


def metadata_of(path: Path) -> dict[str, str]:
    """The ``__metadata__`` of a file, as it stands in the header."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return cast("dict[str, str]", json.loads(file.read(length))["__metadata__"])


# Metadata


def test_metadata_holds_strings_alone_and_the_format_that_readers_want(tmp_path: Path, trap: Trap) -> None:
    tensors = {"x": torch.zeros(1)}
    error = raised_by(lambda: safetensors.torch.save_file(tensors, tmp_path / "x", cast("dict[str, str]", {"a": 1})))
    trap(error is not None, "safetensors takes strings alone as metadata")
    model = Tied()
    orthoserde.save(model, tmp_path / "model", metadata={"run": "7", "format": "mine", "orthoserde": "yours"})
    found = metadata_of(tmp_path / "model")
    assert found["format"] == "pt"
    assert all(isinstance(value, str) for value in found.values())
    with safetensors.safe_open(tmp_path / "model", "pt") as file:
        assert file.metadata() == found
        assert sorted(file.keys()) == sorted(model.state_dict().keys() - {"second.weight"})
    other = Tied()
    assert orthoserde.load(other, tmp_path / "model").fidelity is Fidelity.EXACT
    assert_same_state(model, other)


@pytest.mark.parametrize("metadata", [{"a": 1}, {1: "a"}, {"a": None}, {"a": ["b"]}])
def test_metadata_that_is_not_strings_is_refused_and_nothing_is_written(
    tmp_path: Path, metadata: dict[object, object]
) -> None:
    path = tmp_path / "model"
    orthoserde.save(nn.Linear(2, 2), path)
    previous = path.read_bytes()
    with pytest.raises(ConfigError, match="metadata"):
        orthoserde.save(nn.Linear(2, 2), path, metadata=cast("dict[str, str]", metadata))
    assert path.read_bytes() == previous
    assert os.listdir(tmp_path) == ["model"]


def test_the_same_state_gives_the_same_bytes_in_twenty_saves(tmp_path: Path, trap: Trap) -> None:
    model = Tied()
    strings = {f"key{i}": str(i) for i in range(6)}
    files: set[bytes] = set()
    for _ in range(20):
        safetensors.torch.save_model(model, str(tmp_path / "theirs"), dict(strings))
        files.add((tmp_path / "theirs").read_bytes())
    trap(len(files) > 1, "safetensors writes another header from save to save")
    ours: set[bytes] = set()
    for i in range(20):
        turned = dict(sorted(strings.items(), reverse=bool(i % 2)))
        orthoserde.save(model, tmp_path / "ours", metadata=turned)
        ours.add((tmp_path / "ours").read_bytes())
    assert len(ours) == 1


def test_the_bytes_do_not_depend_on_the_number_of_threads(tmp_path: Path) -> None:
    model = orthogonal(nn.Linear(512, 512), orthogonal_map="cayley")
    threads = torch.get_num_threads()
    files: set[bytes] = set()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            orthoserde.save(model, tmp_path / "model")
            files.add((tmp_path / "model").read_bytes())
    finally:
        torch.set_num_threads(threads)
    assert len(files) == 1


# Ties


def test_the_metadata_of_the_caller_is_not_changed_by_ties(tmp_path: Path, trap: Trap) -> None:
    model, strings = Tied(), {"run": "7"}
    theirs = dict(strings)
    safetensors.torch.save_model(model, str(tmp_path / "theirs"), theirs)
    trap(theirs != strings, "save_model writes alias entries into the caller's metadata")
    ours = dict(strings)
    orthoserde.save(model, tmp_path / "ours", metadata=ours)
    assert ours == strings
    assert metadata_of(tmp_path / "ours")["second.weight"] == "first.weight"


def test_safetensors_reads_the_aliases_of_a_file_of_ours(tmp_path: Path) -> None:
    model, other = Tied(), Tied()
    report = orthoserde.save(model, tmp_path / "model")
    assert report.aliases == {"second.weight": "first.weight"}
    assert report.needs_orthoserde
    missing, unexpected = safetensors.torch.load_model(other, tmp_path / "model")
    assert (set(missing), set(unexpected)) == (set(), set())
    assert_same_state(model, other)


def test_we_read_the_aliases_of_a_file_of_save_model(tmp_path: Path) -> None:
    model, other = Tied(), Tied()
    model.turn = nn.Linear(3, 3)
    other.turn = nn.Linear(3, 3)
    safetensors.torch.save_model(model, str(tmp_path / "model"))
    assert orthoserde.load(other, tmp_path / "model").missing_keys == []
    assert_same_state(model, other)
    assert other.second.weight is other.first.weight


def test_a_file_without_ties_is_a_state_dict_without_orthoserde(tmp_path: Path) -> None:
    model, other = (nn.Sequential(orthogonal(nn.Linear(3, 5)), spectral_norm(nn.Linear(5, 2))) for _ in range(2))
    assert orthoserde.save(model, tmp_path / "model").needs_orthoserde == ()
    other.load_state_dict(safetensors.torch.load_file(tmp_path / "model"))
    assert_same_state(model, other)


# Refusals, damage, durability


def test_a_refused_strict_load_changes_nothing_where_load_model_has_already_written(tmp_path: Path, trap: Trap) -> None:
    saved = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    larger, same = (nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)) for _ in range(2))
    orthoserde.save(saved, tmp_path / "model")
    weight = larger.get_parameter("0.weight")
    before = weight.detach().clone()
    error = raised_by(lambda: safetensors.torch.load_model(larger, tmp_path / "model"))
    trap(error is not None and not torch.equal(before, weight), "a refused load_model has changed the model")
    unchanged = snapshot(same)
    with pytest.raises(IncompatibleModelError) as caught:
        orthoserde.load(same, tmp_path / "model")
    assert_unchanged(same, unchanged)
    assert sorted(caught.value.missing_keys) == ["2.bias", "2.weight"]
    assert caught.value.unexpected_keys == []


def test_a_flipped_bit_is_found_where_a_checksum_in_the_metadata_is_not_enforced(tmp_path: Path, trap: Trap) -> None:
    model, other = nn.Linear(3, 3), nn.Linear(3, 3)
    path = tmp_path / "model"
    orthoserde.save(model, path)
    flip_bit(path, header_bytes(path) + 1)
    deceived = raised_by(lambda: other.load_state_dict(safetensors.torch.load_file(path))) is None
    trap(deceived, "safetensors loads a damaged tensor in silence")
    before = snapshot(other)
    with pytest.raises(DamagedFileError, match="bytes of 1 tensor "):
        orthoserde.load(other, path)
    assert_unchanged(other, before)


def test_the_file_is_on_the_disk_before_it_takes_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model"
    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def recording_fsync(descriptor: int) -> None:
        at = os.fstat(descriptor)
        what = "folder" if at.st_ino == os.stat(tmp_path).st_ino else f"{at.st_size} bytes"
        events.append(f"fsync {what}")
        fsync(descriptor)

    def recording_replace(source: str, target: str) -> None:
        events.append(f"replace {Path(target).name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(os, "replace", recording_replace)
    report = orthoserde.save(nn.Linear(3, 3), path)
    folder = [] if os.name == "nt" else ["fsync folder"]
    assert events == [f"fsync {report.file_bytes} bytes", "replace model", *folder]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_save_leaves_the_previous_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = tmp_path / "model"
    orthoserde.save(nn.Linear(3, 3), path)
    previous = path.read_bytes()

    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    model = nn.Linear(3, 3)
    before = snapshot(model)
    with monkeypatch.context() as patch:
        patch.setattr(os, step, fail)
        with pytest.raises(FileAccessError, match="the previous file is untouched") as caught:
            orthoserde.save(model, path)
    assert caught.value.errno == 28
    assert_unchanged(model, before)
    assert path.read_bytes() == previous
    assert os.listdir(tmp_path) == ["model"]


def test_a_loaded_model_does_not_follow_the_file_as_a_lazy_map_does(tmp_path: Path, trap: Trap) -> None:
    model, other = nn.Linear(64, 64), nn.Linear(64, 64)
    path = tmp_path / "model"
    orthoserde.save(model, path)
    lazy = safetensors.torch.load_file(path)
    orthoserde.load(other, path)
    zeros = bytes(path.stat().st_size - header_bytes(path))
    with path.open("r+b") as file:
        file.seek(header_bytes(path))
        file.write(zeros)
    trap(not lazy["weight"].any() or same_bits(lazy["weight"], model.weight.detach()), "load_file maps the file")
    assert_same_state(model, other)
    path.write_bytes(b"")
    assert_same_state(model, other)


# dtypes


def test_complex128_makes_a_round_trip_that_safetensors_cannot(tmp_path: Path, trap: Trap) -> None:
    class Complex(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.z = nn.Parameter(torch.randn(3, 2, dtype=torch.complex128).mT)
            self.register_buffer("none", torch.zeros(0, 2, dtype=torch.complex128))
            self.register_buffer("scalar", torch.randn((), dtype=torch.complex128))

    model, other = Complex(), Complex()
    state = {key: tensor.contiguous() for key, tensor in model.state_dict().items()}
    error = raised_by(lambda: safetensors.torch.save_file(state, tmp_path / "theirs"))
    trap(isinstance(error, KeyError), "complex128 raises KeyError in safetensors")
    report = orthoserde.save(model, tmp_path / "ours")
    assert any("complex128" in reason for reason in report.needs_orthoserde)
    assert orthoserde.load(other, tmp_path / "ours").fidelity is Fidelity.EXACT
    assert_same_state(model, other)


DTYPES = (
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.uint16,
    torch.int16,
    torch.uint32,
    torch.int32,
    torch.uint64,
    torch.int64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
)


class Holder(nn.Module):
    def __init__(self, elements: Tensor) -> None:
        super().__init__()
        self.register_buffer("x", elements)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_is_read_by_safetensors_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    # Every byte there is, NaN payloads and negative zeros among them; bool has two.
    every = torch.arange(256, dtype=torch.int64).to(torch.uint8)
    elements = (every % 2).bool() if dtype is torch.bool else every.view(dtype)
    model, other = Holder(elements), Holder(torch.zeros_like(elements))
    orthoserde.save(model, tmp_path / "model")
    orthoserde.load(other, tmp_path / "model")
    assert_same_state(model, other)
    theirs = raised_by(lambda: safetensors.torch.load_file(tmp_path / "model"))
    if theirs is None:  # an older binding does not know each of these dtypes
        assert same_bits(safetensors.torch.load_file(tmp_path / "model")["x"], elements)
