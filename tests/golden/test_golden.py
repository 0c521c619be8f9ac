"""Files of released format versions are read for ever, and written the same."""

from __future__ import annotations

import dataclasses
import hashlib
import random
from pathlib import Path
from typing import cast

import numpy
import pytest
import torch
from torch.nn.utils.parametrizations import weight_norm

import orthoserde
from orthoserde import Fidelity, storage
from orthoserde.tensor_bytes import digest_of, iter_bytes
from orthoserde.walk import take_inventory
from tests.golden.models import (
    ALL,
    COMPACT,
    FOLDER,
    HOOKS,
    MODELS,
    REGISTRY,
    expected,
    in_training,
    optimizers_of,
    set_bases_,
    training,
    values,
)

#: SHA-256 of each golden file: whoever changes one changes what "readable for ever" means.
SHA256 = {
    "compact": "edc239c73d75ae7f35f46f30a94673135a61847bfb59ef1e00d356344cdce5eb",
    "hooks": "7631151357554bdb2f0f446dbfd98038ce0b5571112e9414b4152647ef7ffc3c",
    "masks": "d5594bfe4f72b850921449cd5c3b451c162cb3472c2849b0c5901c0572cc057a",
    "norms": "55557eb77afcce9307d741905ac6a599930e1c32df0a03f14bff7cb1b0b0c84b",
    "orthogonals": "5d15a00c90465625aa411acc4d172442cdbed0cf5efe271e0f60c62e1271f8e2",
    "plain": "455705f05d14522e60e29af79e7934527f67016b39f95099d608f08677c8b1ad",
    "training": "45208238f000ca54bb15f4e94facfbdb2ff4fe553d5998d5099469e90811118e",
    "users": "40bc4a64ff2c0de54aa8cd6d5deaa9f375c86768169fef73da256a598fba2121",
}

FIDELITY = {
    "plain": Fidelity.EXACT,
    "orthogonals": Fidelity.EXACT,
    "norms": Fidelity.EXACT,
    "hooks": Fidelity.EXACT,
    "masks": Fidelity.EXACT,
    "users": Fidelity.UNVERIFIED,
}


def path_of(name: str) -> Path:
    return FOLDER / f"{name}.safetensors"


def test_every_golden_file_is_known() -> None:
    assert {path.stem for path in FOLDER.iterdir()} == set(SHA256) == set(ALL)


@pytest.mark.parametrize("name", SHA256)
def test_a_golden_file_is_what_it_was(name: str) -> None:
    assert hashlib.sha256(path_of(name).read_bytes()).hexdigest() == SHA256[name]


@pytest.mark.parametrize("name", MODELS | HOOKS)
def test_a_golden_file_loads_with_its_values_and_strides(name: str) -> None:
    model = (MODELS | HOOKS)[name]()
    report = orthoserde.load(model, path_of(name), registry=REGISTRY)
    assert report.fidelity is FIDELITY[name]
    with storage.read(path_of(name)) as checkpoint:
        manifest = checkpoint.manifest
        slots = take_inventory(model).slots
        for key, slot in slots.items():
            if slot.tensor is not None:
                wanted = expected(manifest.kept_key(key), slot.tensor)
                assert (slot.tensor.shape, slot.tensor.dtype) == (wanted.shape, wanted.dtype)
                # As bytes: torch 2.3 cannot compare float8.
                assert digest_of(iter_bytes(slot.tensor)) == digest_of(iter_bytes(wanted)), key
        assert set(manifest.tensors) | set(manifest.aliases) == {
            k for k, slot in slots.items() if slot.tensor is not None
        }
        assert manifest.metadata == {"golden": name, "ключ": "значение"}


@pytest.mark.parametrize("name", SHA256)
def test_a_golden_file_is_written_the_same_again(name: str, tmp_path: Path) -> None:
    with storage.read(path_of(name)) as checkpoint:
        storage.write(checkpoint, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path_of(name).read_bytes()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("folder", ["torch-2.3.1", "torch-2.15.0"])
def test_a_file_that_another_torch_wrote_loads_the_same(name: str, folder: str) -> None:
    path = FOLDER.parent / folder / f"{name}.safetensors"
    model = MODELS[name]()
    assert orthoserde.load(model, path, registry=REGISTRY).fidelity is FIDELITY[name]
    with storage.read(path) as checkpoint:
        assert checkpoint.manifest.writer["torch"].startswith(folder.removeprefix("torch-"))
        for key, slot in take_inventory(model).slots.items():
            if slot.tensor is not None:
                wanted = expected(checkpoint.manifest.kept_key(key), slot.tensor)
                assert digest_of(iter_bytes(slot.tensor)) == digest_of(iter_bytes(wanted)), key


@pytest.mark.parametrize("name", ["orthogonals", "norms"])
def test_a_golden_file_loads_into_bare_modules_and_meta_ones(name: str) -> None:
    def bare(device: str) -> torch.nn.Module:
        model = MODELS[name]()
        for record in list(orthoserde.parametrized_tensors(model)):
            weight = model.get_submodule(record.module_path).get_parameter(
                f"parametrizations.{record.tensor_name}.{list(record.originals)[-1]}"
            )
            torch.nn.utils.parametrize.remove_parametrizations(record.module, record.tensor_name)
            setattr(record.module, record.tensor_name, torch.nn.Parameter(torch.zeros_like(weight)))
        return model.to(device)

    whole = MODELS[name]()
    orthoserde.load(whole, path_of(name), registry=REGISTRY)
    for device in ("cpu", "meta"):
        model = bare(device)
        assert orthoserde.load(model, path_of(name), registry=REGISTRY).fidelity is Fidelity.EXACT
        ours, theirs = take_inventory(model).slots, take_inventory(whole).slots
        assert set(ours) == set(theirs)
        for key, slot in theirs.items():
            tensor = ours[key].tensor
            if slot.tensor is None:
                assert tensor is None
            else:
                assert tensor is not None
                assert torch.equal(tensor, slot.tensor)
                assert tensor.stride() == slot.tensor.stride()


def test_the_golden_file_of_hooks_is_what_a_save_writes(tmp_path: Path) -> None:
    model = HOOKS["hooks"]()
    orthoserde.load(model, path_of("hooks"), registry=REGISTRY)
    metadata = {"golden": "hooks", "ключ": "значение"}
    orthoserde.save(model, tmp_path / "m", registry=REGISTRY, metadata=metadata)
    ours, theirs = orthoserde.inspect(tmp_path / "m"), orthoserde.inspect(path_of("hooks"))
    assert dataclasses.replace(ours, writer=theirs.writer) == theirs


def test_the_golden_file_of_hooks_has_the_same_state_as_parametrizations() -> None:
    hooked = HOOKS["hooks"]()
    orthoserde.load(hooked, path_of("hooks"), registry=REGISTRY)
    model = torch.nn.ModuleDict(
        {
            "weight_norm": weight_norm(torch.nn.Linear(4, 3)),
            "spectral_norm_transposed": torch.nn.ConvTranspose2d(2, 3, 2),
            "recurrent": weight_norm(torch.nn.GRU(3, 4), "weight_hh_l0"),
        }
    )
    report = orthoserde.load(model, path_of("hooks"), registry=REGISTRY, strict=False)
    assert {name: tensor.fidelity for name, tensor in report.tensors.items()} == {
        "weight_norm.weight": Fidelity.EXACT,
        "spectral_norm_transposed.weight": Fidelity.UNVERIFIED,
        "recurrent.weight_hh_l0": Fidelity.EXACT,
    }
    ours, theirs = take_inventory(model).slots, take_inventory(hooked).slots
    for key, other in {
        "weight_norm.parametrizations.weight.original0": "weight_norm.weight_g",
        "weight_norm.parametrizations.weight.original1": "weight_norm.weight_v",
        "spectral_norm_transposed.parametrizations.weight.original": "spectral_norm_transposed.weight_orig",
        "spectral_norm_transposed.parametrizations.weight.0._u": "spectral_norm_transposed.weight_u",
        "spectral_norm_transposed.parametrizations.weight.0._v": "spectral_norm_transposed.weight_v",
        "recurrent.parametrizations.weight_hh_l0.original0": "recurrent.weight_hh_l0_g",
        "recurrent.parametrizations.weight_hh_l0.original1": "recurrent.weight_hh_l0_v",
    }.items():
        left, right = ours[key].tensor, theirs[other].tensor
        assert left is not None
        assert right is not None
        assert torch.equal(left, right)


#: Digest of each base of the compact file: whoever changes one changes what every compact file stands for.
BASES = {
    "householder_tall": "7bc43019b5f1fb48b4981108f3b0a090",
    "cayley_tall": "7bc43019b5f1fb48b4981108f3b0a090",
    "matrix_exp_tall": "274057e3a0eddb1a35c7acdca1ed182b",
    "householder_wide": "a3437b6c64741e554dab51bc2d4a3029",
    "cayley_wide": "7709dc4c0ac9e238f198095e3dd79268",
    "matrix_exp_wide": "a3437b6c64741e554dab51bc2d4a3029",
    "householder_batched": "7be159698398d4d7a7a68d0085034025",
    "cayley_batched": "313c9c596507e97e049eb69dffc713b9",
    "matrix_exp_batched": "313c9c596507e97e049eb69dffc713b9",
    "cayley_complex": "f9b344626c4704c9a272b2662ceaf2e7",
    "matrix_exp_complex": "f9b344626c4704c9a272b2662ceaf2e7",
    "cayley_complex_wide": "f43ccf7b4f148f272127a9ad91a2ff66",
    "matrix_exp_complex_wide": "f9f9c3a1931d00dc6f73486ef9c8dc7a",
    "householder_square": "280f222763f3d987c1060311b3b7b1c3",
    "cayley_square": "ba4c5d1747c850e9d600fc922e57dc91",
    "matrix_exp_square": "ba4c5d1747c850e9d600fc922e57dc91",
    "again": "7bc43019b5f1fb48b4981108f3b0a090",
}


def test_a_golden_file_with_compact_bases_loads_with_its_values_and_strides() -> None:
    wanted, model = set_bases_(COMPACT["compact"]()), COMPACT["compact"]()
    bare = COMPACT["compact"]()
    for record in list(orthoserde.parametrized_tensors(bare)):
        torch.nn.utils.parametrize.remove_parametrizations(record.module, record.tensor_name)
    for other in (model, bare):
        assert orthoserde.load(other, path_of("compact")).fidelity is Fidelity.EXACT
        slots, theirs = take_inventory(other).slots, take_inventory(wanted).slots
        assert slots.keys() == theirs.keys()
        for key, slot in slots.items():
            assert slot.tensor is not None
            tensor = theirs[key].tensor
            assert tensor is not None
            value = tensor if key.endswith(".base") else expected(key.replace("again.", "cayley_tall."), tensor)
            assert torch.equal(slot.tensor, value), key
            assert slot.tensor.stride() == tensor.stride(), key
    found = {
        key: digest_of(iter_bytes(slot.tensor))
        for key, slot in take_inventory(model).slots.items()
        if slot.tensor is not None and key.endswith(".base")
    }
    assert found == {f"{key}.parametrizations.weight.0.base": digest for key, digest in BASES.items()}


def test_a_golden_file_with_compact_bases_is_what_a_save_writes(tmp_path: Path) -> None:
    model = COMPACT["compact"]()
    orthoserde.load(model, path_of("compact"))
    orthoserde.save(model, tmp_path / "m", base="compact", metadata={"golden": "compact", "ключ": "значение"})
    ours, theirs = orthoserde.inspect(tmp_path / "m"), orthoserde.inspect(path_of("compact"))
    assert dataclasses.replace(ours, writer=theirs.writer) == theirs
    assert sum(name.endswith("square.weight") for name in theirs.compact) == 0
    assert len(theirs.compact) == 13


def test_training_state_of_the_golden_file_is_what_was_saved() -> None:
    model, twin = training(), training()
    optimizers, saved = optimizers_of(model), in_training(twin)
    for group in (group for optimizer in optimizers.values() for group in optimizer.param_groups):
        group["lr"] = 9.0
    state = dict.fromkeys(values())
    python, numbers = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng(devices=[]):
        report = orthoserde.load(
            model, path_of("training"), optimizer=optimizers, state=state, rng=torch.cuda.device_count() == 0
        )
        drawn = random.random(), float(numpy.random.rand())
    random.setstate(python)
    numpy.random.set_state(numbers)
    assert report.fidelity is Fidelity.EXACT
    for key, slot in take_inventory(model).slots.items():
        assert slot.tensor is not None
        if not key.startswith("again"):
            assert torch.equal(slot.tensor, expected(key, slot.tensor))
    for name, optimizer in optimizers.items():
        ours, theirs = optimizer.state_dict(), saved[name].state_dict()
        for one, other in zip(ours["param_groups"], theirs["param_groups"], strict=True):
            assert {option: one[option] for option in ("lr", "params")} == {o: other[o] for o in ("lr", "params")}
        assert ours["state"].keys() == theirs["state"].keys()
        for number, entries in theirs["state"].items():
            assert all(torch.equal(ours["state"][number][entry], value) for entry, value in entries.items())
    wanted = values()
    assert torch.equal(cast("torch.Tensor", state.pop("tensor")), cast("torch.Tensor", wanted.pop("tensor")))
    assert state == wanted
    assert list(cast("dict[str, int]", state["ordered"])) == ["z", "a"]
    if torch.cuda.device_count() == 0:
        assert drawn == (0.8444218515250481, 0.5488135039273248)  # the first numbers of seed 0
