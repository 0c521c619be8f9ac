"""Files of strangers with tensors that are said to have had a hook: refused, and nothing changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

import orthoserde
from orthoserde import FileFormatError, FormatVersionError, IncompatibleModelError, storage
from orthoserde.capture import capture
from orthoserde.checkpoint import Checkpoint, LiveTensor
from orthoserde.manifest import COLUMNS, DENSE, HOOK, ParametrizationRecord, TensorRecord
from orthoserde.tensor_bytes import contiguous_strides, dtype_name
from tests.helpers import assert_unchanged, lived_in, snapshot, with_hook

Change = Callable[[Checkpoint], Checkpoint]


def weight_normed() -> Checkpoint:
    return capture(with_hook("weight_norm", nn.Linear(3, 4)), orthoserde.default_registry)


def spectral_normed() -> Checkpoint:
    return capture(with_hook("spectral_norm", nn.Linear(3, 4)), orthoserde.default_registry)


def with_record(checkpoint: Checkpoint, **changes: Any) -> Checkpoint:
    (record,) = checkpoint.manifest.parametrized
    manifest = dataclasses.replace(checkpoint.manifest, parametrized=(dataclasses.replace(record, **changes),))
    return dataclasses.replace(checkpoint, manifest=manifest)


def with_link(checkpoint: Checkpoint, **changes: Any) -> Checkpoint:
    link = checkpoint.manifest.parametrized[0].chain[0]
    return with_record(checkpoint, chain=(dataclasses.replace(link, **changes),))


def with_config(checkpoint: Checkpoint, **changes: Any) -> Checkpoint:
    config = checkpoint.manifest.parametrized[0].chain[0].config or {}
    return with_link(checkpoint, config={**config, **changes})


def with_tensor(checkpoint: Checkpoint, key: str, tensor: Tensor) -> Checkpoint:
    shape = tuple(tensor.shape)
    record = TensorRecord(dtype_name(tensor.dtype), shape, contiguous_strides(shape), parameter=False)
    manifest = dataclasses.replace(checkpoint.manifest, tensors={**checkpoint.manifest.tensors, key: record})
    return dataclasses.replace(checkpoint, manifest=manifest, sources={**checkpoint.sources, key: LiveTensor(tensor)})


def without(checkpoint: Checkpoint, key: str) -> Checkpoint:
    tensors = {each: record for each, record in checkpoint.manifest.tensors.items() if each != key}
    manifest = dataclasses.replace(checkpoint.manifest, tensors=tensors)
    return dataclasses.replace(
        checkpoint, manifest=manifest, sources={each: checkpoint.sources[each] for each in tensors}
    )


def two_links(checkpoint: Checkpoint) -> Checkpoint:
    (record,) = checkpoint.manifest.parametrized
    return with_record(checkpoint, chain=(*record.chain, ParametrizationRecord("a>B", 1, {}, None, {})))


def hook_behind(checkpoint: Checkpoint) -> Checkpoint:
    """A hook that comes second."""
    first = ParametrizationRecord("a>B", 1, {}, None, {})
    return with_record(checkpoint, chain=(first, *checkpoint.manifest.parametrized[0].chain))


WHOLE = "expected all the tensors of one parametrization that has a hook"

#: Manifests that say what no hook has.
ODD: dict[str, tuple[Callable[[], Checkpoint], Change, str]] = {
    "kind without hooks": (weight_normed, lambda c: with_link(c, kind="torch>orthogonal"), WHOLE),
    "unknown kind": (weight_normed, lambda c: with_link(c, kind="a>B"), WHOLE),
    "opaque": (weight_normed, lambda c: with_link(c, kind="opaque", config=None, class_name="a:B"), WHOLE),
    "the other kind": (weight_normed, lambda c: with_link(c, kind="torch>spectral_norm"), WHOLE),
    "one original of two": (
        weight_normed,
        lambda c: with_record(c, originals={"original0": HOOK, "original1": DENSE}),
        WHOLE,
    ),
    "originals alone": (spectral_normed, lambda c: with_link(c, tensors={"_u": DENSE, "_v": DENSE}), WHOLE),
    "vectors alone": (spectral_normed, lambda c: with_record(c, originals={"original": DENSE}), WHOLE),
    "one vector of two": (spectral_normed, lambda c: with_link(c, tensors={"_u": HOOK, "_v": DENSE}), WHOLE),
    "columns": (spectral_normed, lambda c: with_link(c, tensors={"_u": HOOK, "_v": COLUMNS}), WHOLE),
    "a vector is missing": (spectral_normed, lambda c: with_link(c, tensors={"_u": HOOK}), WHOLE),
    "no vectors": (spectral_normed, lambda c: with_link(c, tensors={}), WHOLE),
    "one more": (weight_normed, lambda c: with_link(c, tensors={"more": HOOK}), WHOLE),
    "one original more": (
        weight_normed,
        lambda c: with_record(c, originals={f"original{i}": HOOK for i in range(3)}),
        WHOLE,
    ),
    "other originals": (weight_normed, lambda c: with_record(c, originals={"original": HOOK}), WHOLE),
    "two links": (weight_normed, two_links, WHOLE),
    "behind another": (weight_normed, hook_behind, WHOLE),
    "a tensor is missing": (weight_normed, lambda c: without(c, "weight_g"), "the file holds no tensor 'weight_g'"),
    "another name": (
        weight_normed,
        lambda c: with_record(c, tensor_name="bias"),
        "the file holds no tensor 'bias_g'",
    ),
    "computed": (
        weight_normed,
        lambda c: dataclasses.replace(c, manifest=dataclasses.replace(c.manifest, computed=("weight_v",))),
        "'weight_v' is state of weight",
    ),
    "left out": (
        weight_normed,
        lambda c: dataclasses.replace(c, manifest=dataclasses.replace(c.manifest, left_out=("weight_v",))),
        "left_out: the file holds 'weight_v'",
    ),
    "twice": (
        weight_normed,
        lambda c: dataclasses.replace(
            c, manifest=dataclasses.replace(c.manifest, parametrized=c.manifest.parametrized * 2)
        ),
        "stands twice",
    ),
}

TARGETS: dict[str, Callable[[], nn.Module]] = {
    "weight_norm, hook": lambda: with_hook("weight_norm", nn.Linear(3, 4)),
    "weight_norm": lambda: weight_norm(nn.Linear(3, 4)),
    "spectral_norm, hook": lambda: with_hook("spectral_norm", nn.Linear(3, 4)),
    "spectral_norm": lambda: spectral_norm(nn.Linear(3, 4)),
    "plain": lambda: nn.Linear(3, 4),
    "orthogonal": lambda: orthogonal(nn.Linear(3, 4)),
}


@pytest.mark.parametrize("name", ODD)
def test_a_manifest_that_says_what_no_hook_has_is_refused(name: str, tmp_path: Path) -> None:
    make, change, text = ODD[name]
    storage.write(change(make()), tmp_path / "m")
    for look in (orthoserde.inspect, orthoserde.verify):
        with pytest.raises(FileFormatError) as caught:
            look(tmp_path / "m")
        assert text in str(caught.value)
    for target in TARGETS.values():
        model = lived_in(target())
        before = snapshot(model)
        with pytest.raises(FileFormatError):
            orthoserde.load(model, tmp_path / "m")
        assert_unchanged(model, before)


@pytest.mark.parametrize("encoding", ["hooks", "Hook", ""])
def test_an_unknown_encoding_needs_a_newer_version(encoding: str, tmp_path: Path) -> None:
    storage.write(with_link(spectral_normed(), tensors={"_u": HOOK, "_v": encoding}), tmp_path / "m")
    with pytest.raises(FormatVersionError, match=f"the encoding '{encoding}' needs a newer orthoserde"):
        orthoserde.inspect(tmp_path / "m")


#: Files that are sound, and whose tensors are none that their configuration can have; what a load into each says.
CONTRADICTORY: dict[str, tuple[Callable[[], Checkpoint], Change]] = {
    "another dim": (weight_normed, lambda c: with_config(c, dim=1)),
    "dim out of range": (weight_normed, lambda c: with_config(c, dim=2)),
    "negative dim out of range": (weight_normed, lambda c: with_config(c, dim=-3)),
    "dim that is no integer": (weight_normed, lambda c: with_config(c, dim="0")),
    "dim that is a boolean": (weight_normed, lambda c: with_config(c, dim=False)),
    "no dim": (weight_normed, lambda c: with_link(c, config={})),
    "unknown setting": (weight_normed, lambda c: with_config(c, more=1)),
    "newer configuration": (weight_normed, lambda c: with_link(c, version=2)),
    "magnitudes of another shape": (weight_normed, lambda c: with_tensor(c, "weight_g", torch.ones(1, 3))),
    "too few magnitudes": (weight_normed, lambda c: with_tensor(c, "weight_g", torch.ones(1, 1))),
    "direction of another shape": (weight_normed, lambda c: with_tensor(c, "weight_v", torch.ones(4))),
    "spectral dim": (spectral_normed, lambda c: with_config(c, dim=1)),
    "negative spectral dim": (spectral_normed, lambda c: with_config(c, dim=-1)),
    "many iterations": (spectral_normed, lambda c: with_config(c, n_power_iterations=10**9)),
    "no iterations": (spectral_normed, lambda c: with_config(c, n_power_iterations=0)),
    "negative eps": (spectral_normed, lambda c: with_config(c, eps=-1.0)),
    "short vector": (spectral_normed, lambda c: with_tensor(c, "weight_u", torch.ones(3))),
    "vector that is none": (spectral_normed, lambda c: with_tensor(c, "weight_v", torch.ones(3, 1))),
    "weight that is a vector": (spectral_normed, lambda c: with_tensor(c, "weight_orig", torch.ones(4))),
}


@pytest.mark.parametrize("name", CONTRADICTORY)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("strict", [True, False])
def test_state_that_contradicts_its_configuration_is_refused(
    name: str, target: str, strict: bool, tmp_path: Path
) -> None:
    make, change = CONTRADICTORY[name]
    storage.write(change(make()), tmp_path / "m")
    model = lived_in(TARGETS[target]())
    before = snapshot(model)
    with pytest.raises(IncompatibleModelError, match="weight"):
        orthoserde.load(model, tmp_path / "m", strict=strict)
    assert_unchanged(model, before)


#: Settings that only training would use.
OF_TRAINING = {"many iterations", "negative eps"}


@pytest.mark.parametrize("name", sorted(CONTRADICTORY.keys() - OF_TRAINING))
def test_a_verification_finds_it(name: str, tmp_path: Path) -> None:
    make, change = CONTRADICTORY[name]
    storage.write(change(make()), tmp_path / "m")
    report = orthoserde.verify(tmp_path / "m")
    assert {*report.misfits, *report.not_measured} == {"weight"}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("target", ["weight_norm", "plain", "spectral_norm"])
def test_keys_of_both_forms_are_not_mixed(target: str, strict: bool, tmp_path: Path) -> None:
    keys = ["parametrizations.weight.original0", "parametrizations.weight.original1"]
    make = weight_normed
    if target == "spectral_norm":
        make, keys = spectral_normed, ["parametrizations.weight.original", "parametrizations.weight.0._u"]
    for key in keys:
        storage.write(with_tensor(make(), key, torch.zeros(4, 3)), tmp_path / "m")
        models = [TARGETS[target]()] if target != "spectral_norm" else [TARGETS[target](), TARGETS["plain"]()]
        for model in models:
            before = snapshot(lived_in(model))
            with pytest.raises(IncompatibleModelError, match="the file also has tensors under the keys"):
                orthoserde.load(model, tmp_path / "m", strict=strict)
            assert_unchanged(model, before)


def test_a_plain_tensor_beside_is_unexpected(tmp_path: Path) -> None:
    storage.write(with_tensor(weight_normed(), "weight", torch.zeros(4, 3)), tmp_path / "m")
    for target in ("weight_norm, hook", "weight_norm", "plain"):
        model = lived_in(TARGETS[target]())
        before = snapshot(model)
        with pytest.raises(IncompatibleModelError) as caught:
            orthoserde.load(model, tmp_path / "m")
        assert caught.value.unexpected_keys == ["weight"]
        assert_unchanged(model, before)


def test_unknown_paths_of_a_module_are_of_no_importance(tmp_path: Path) -> None:
    storage.write(with_record(weight_normed(), aliases=("nowhere", "nowhere", "")), tmp_path / "m")
    for target in ("weight_norm, hook", "weight_norm", "plain"):
        model = TARGETS[target]()
        assert orthoserde.load(model, tmp_path / "m").fidelity is orthoserde.Fidelity.EXACT


def test_nothing_large_is_allocated_for_a_small_file(tmp_path: Path) -> None:
    checkpoint = with_tensor(spectral_normed(), "weight_orig", torch.empty(0, 1 << 40))
    checkpoint = with_tensor(checkpoint, "weight_u", torch.empty(0))
    storage.write(with_record(checkpoint, shape=(0, 1 << 40)), tmp_path / "m")
    for target in TARGETS.values():
        model = lived_in(target())
        before = snapshot(model)
        with pytest.raises(IncompatibleModelError):
            orthoserde.load(model, tmp_path / "m")
        assert_unchanged(model, before)
