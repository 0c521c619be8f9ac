"""Files of strangers with bases that are stored as columns: refused before anything is allocated or changed."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import orthoserde
from orthoserde import storage
from orthoserde.capture import capture
from orthoserde.checkpoint import Checkpoint, LiveTensor
from orthoserde.json_values import JSON
from orthoserde.manifest import COLUMNS, Manifest, ParametrizationRecord, TensorRecord
from orthoserde.tensor_bytes import contiguous_strides, dtype_name
from orthoserde.transforms import compact
from tests.helpers import bits

KEY = "parametrizations.weight.0.base.columns"
ORIGINAL = "parametrizations.weight.original"


def make(seed: int = 0, rows: int = 12, columns: int = 5) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return orthoserde.orthogonal(nn.Linear(columns, rows))


def columns_of(model: nn.Module, count: int = 5) -> Tensor:
    return model.get_buffer("parametrizations.weight.0.base")[:, :count].clone()


def packed() -> Checkpoint:
    return compact(capture(make(), orthoserde.default_registry))


def with_tensor(checkpoint: Checkpoint, key: str, tensor: Tensor, *, parameter: bool = False) -> Checkpoint:
    record = TensorRecord(
        dtype_name(tensor.dtype), tuple(tensor.shape), contiguous_strides(tensor.shape), parameter, None, parameter
    )
    manifest = dataclasses.replace(checkpoint.manifest, tensors={**checkpoint.manifest.tensors, key: record})
    return dataclasses.replace(checkpoint, manifest=manifest, sources={**checkpoint.sources, key: LiveTensor(tensor)})


def with_link(checkpoint: Checkpoint, **changes: object) -> Checkpoint:
    (record,) = checkpoint.manifest.parametrized
    link = dataclasses.replace(record.chain[0], **changes)  # type: ignore[arg-type]
    return with_record(checkpoint, chain=(link,))


def with_config(checkpoint: Checkpoint, **changes: JSON) -> Checkpoint:
    config = checkpoint.manifest.parametrized[0].chain[0].config or {}
    return with_link(checkpoint, config={**config, **changes})


def with_record(checkpoint: Checkpoint, **changes: object) -> Checkpoint:
    (record,) = checkpoint.manifest.parametrized
    changed = dataclasses.replace(record, **changes)  # type: ignore[arg-type]
    return dataclasses.replace(checkpoint, manifest=dataclasses.replace(checkpoint.manifest, parametrized=(changed,)))


def with_manifest(checkpoint: Checkpoint, change: Callable[[Manifest], Manifest]) -> Checkpoint:
    return dataclasses.replace(checkpoint, manifest=change(checkpoint.manifest))


def renamed(checkpoint: Checkpoint, key: str, target: str) -> Checkpoint:
    tensors = {target if each == key else each: record for each, record in checkpoint.manifest.tensors.items()}
    sources = {target if each == key else each: source for each, source in checkpoint.sources.items()}
    manifest = dataclasses.replace(checkpoint.manifest, tensors=tensors)
    return dataclasses.replace(checkpoint, manifest=manifest, sources=sources)


def columns_of_the_original(checkpoint: Checkpoint) -> Checkpoint:
    link = checkpoint.manifest.parametrized[0].chain[0]
    changed = with_link(checkpoint, tensors={**link.tensors, "other": COLUMNS})
    return with_tensor(changed, "parametrizations.weight.0.other.columns", torch.zeros(12, 5))


def huge(checkpoint: Checkpoint, n: int = 1 << 40) -> Checkpoint:
    """A file of some hundred bytes that stands for 2**80 elements."""
    checkpoint = with_tensor(checkpoint, KEY, torch.empty(0, n, 1))
    checkpoint = with_tensor(checkpoint, ORIGINAL, torch.empty(0, n, 1), parameter=True)
    return with_record(with_config(checkpoint, shape=[0, n, 1]), shape=(0, n, 1))


def of_shape(checkpoint: Checkpoint, n: int, k: int) -> Checkpoint:
    checkpoint = with_tensor(checkpoint, KEY, torch.eye(n, k))
    checkpoint = with_tensor(checkpoint, ORIGINAL, torch.eye(n, k), parameter=True)
    return with_record(with_config(checkpoint, shape=[n, k]), shape=(n, k))


MANIFESTS: dict[str, tuple[Callable[[Checkpoint], Checkpoint], str]] = {
    "another role": (columns_of_the_original, "only the base of"),
    "another kind": (lambda c: with_link(c, kind="torch>weight_norm"), "only the base of an torch>orthogonal"),
    "a chain": (
        lambda c: with_record(
            c,
            chain=(*c.manifest.parametrized[0].chain, ParametrizationRecord("a>B", 1, {}, None, {})),
        ),
        "only the base of",
    ),
    "no trivialization": (lambda c: with_config(c, use_trivialization=False), "without trivialization"),
    "no configuration": (lambda c: with_link(c, config=None), "without trivialization"),
    "another configured shape": (lambda c: with_config(c, shape=[12, 4]), "configured for"),
    "no shape": (lambda c: with_record(c, shape=None), "configured for"),
    "square": (lambda c: of_shape(c, 5, 5), "fewer columns than rows"),
    "no columns": (lambda c: of_shape(c, 5, 0), "fewer columns than rows"),
    "more columns than rows": (lambda c: with_tensor(c, KEY, torch.eye(5, 12)), "expected columns of shape"),
    "columns of another shape": (lambda c: with_tensor(c, KEY, torch.eye(12, 4)), "expected columns of shape"),
    "columns of another dtype": (lambda c: with_tensor(c, KEY, torch.eye(12, 5).double()), "of a weight in float32"),
    "half precision": (
        lambda c: with_record(with_tensor(c, KEY, torch.eye(12, 5).half()), dtype="float16"),
        "columns of a base in float16",
    ),
    "a parameter": (lambda c: with_tensor(c, KEY, torch.eye(12, 5), parameter=True), "row-major buffer"),
    "another name": (lambda c: renamed(c, KEY, KEY.removesuffix(".columns")), "holds no tensor"),
    "base and columns": (
        lambda c: with_tensor(c, KEY.removesuffix(".columns"), torch.eye(12)),
        "stored beside its columns",
    ),
    "an alias": (
        lambda c: with_manifest(c, lambda m: dataclasses.replace(m, aliases={"again": KEY})),
        "tied to another tensor",
    ),
    "2**80 elements": (huge, "too large"),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_that_contradicts_itself_is_refused(name: str, tmp_path: Path) -> None:
    change, text = MANIFESTS[name]
    storage.write(change(packed()), tmp_path / "m")
    model = make(1)
    before = {key: bits(tensor) for key, tensor in model.state_dict().items()}
    for look in (orthoserde.inspect, orthoserde.verify, lambda path: orthoserde.load(model, path)):
        with pytest.raises(orthoserde.FileFormatError, match=text):
            look(tmp_path / "m")
    assert {key: bits(tensor) for key, tensor in model.state_dict().items()} == before


@pytest.mark.parametrize("encoding", ["rows", "", "Columns"])
def test_an_unknown_encoding_needs_a_newer_version(encoding: str, tmp_path: Path) -> None:
    storage.write(with_link(packed(), tensors={"base": encoding}), tmp_path / "m")
    with pytest.raises(orthoserde.FormatVersionError, match=f"encoding '{encoding}' needs a newer orthoserde"):
        orthoserde.inspect(tmp_path / "m")


def damaged_columns(value: float) -> Checkpoint:
    columns = columns_of(make())
    columns[3, 2] = value
    return with_tensor(packed(), KEY, columns)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.75])
@pytest.mark.parametrize("target", ["live", "bare", "meta"])
def test_columns_that_are_not_orthonormal_are_refused(
    value: float, verify: bool, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.write(damaged_columns(value), tmp_path / "m")
    model = make(1) if target == "live" else nn.Linear(5, 12, device="cpu" if target == "bare" else "meta")
    before = {key: (id(tensor), bits(tensor)) for key, tensor in model.named_parameters()}
    monkeypatch.setattr("orthoserde.transforms.columns.Completion", None)
    with pytest.raises(
        orthoserde.IncompatibleModelError, match="columns of its base in the file are not finite or not orthonormal"
    ):
        orthoserde.load(model, tmp_path / "m", verify=verify)
    assert {key: (id(tensor), bits(tensor)) for key, tensor in model.named_parameters()} == before


def test_a_verification_finds_columns_that_are_not_orthonormal(tmp_path: Path) -> None:
    storage.write(damaged_columns(0.75), tmp_path / "m")
    assert orthoserde.verify(tmp_path / "m").off_constraint == ("weight",)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("bare", [True, False])
def test_columns_that_do_not_match_their_digest_are_refused(verify: bool, bare: bool, tmp_path: Path) -> None:
    path = tmp_path / "m"
    storage.write(packed(), path)
    content = bytearray(path.read_bytes())
    stored = bits(columns_of(make()))
    at = bytes(content).index(stored)
    content[at] ^= 1  # the lowest bit: the columns are as orthonormal as before
    path.write_bytes(content)
    model = nn.Linear(5, 12) if bare else make(1)
    before = {key: bits(tensor) for key, tensor in model.state_dict().items()}
    with pytest.raises(orthoserde.DamagedFileError, match=re.escape("weight.0.base.columns")):
        orthoserde.load(model, path, verify=verify)
    assert {key: bits(tensor) for key, tensor in model.state_dict().items()} == before
    report = orthoserde.verify(path)
    assert report.damaged == (KEY,)
    assert "damaged" in report.not_measured["weight"]


def test_a_small_file_that_stands_for_much_is_refused_before_it_is_allocated(tmp_path: Path) -> None:
    storage.write(of_shape(packed(), 1 << 20, 1), tmp_path / "m")  # 4 MiB that stand for 4 TiB

    models: list[nn.Module] = [make(1), nn.Linear(5, 12), nn.Linear(5, 12, device="meta")]
    for model in models:
        with pytest.raises(orthoserde.IncompatibleModelError, match="shape"):
            orthoserde.load(model, tmp_path / "m")

    report = orthoserde.verify(tmp_path / "m")
    assert "bytes at once to work out" in report.not_measured["weight"]
