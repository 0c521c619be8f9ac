"""Files of released format versions are read for ever, and written the same."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

import orthoserde
from orthoserde import Fidelity, storage
from orthoserde.tensor_bytes import digest_of, iter_bytes
from orthoserde.walk import take_inventory
from tests.golden.models import FOLDER, MODELS, REGISTRY, expected

#: SHA-256 of each golden file: whoever changes one changes what "readable for ever" means.
SHA256 = {
    "norms": "55557eb77afcce9307d741905ac6a599930e1c32df0a03f14bff7cb1b0b0c84b",
    "orthogonals": "5d15a00c90465625aa411acc4d172442cdbed0cf5efe271e0f60c62e1271f8e2",
    "plain": "455705f05d14522e60e29af79e7934527f67016b39f95099d608f08677c8b1ad",
    "users": "40bc4a64ff2c0de54aa8cd6d5deaa9f375c86768169fef73da256a598fba2121",
}

FIDELITY = {
    "plain": Fidelity.EXACT,
    "orthogonals": Fidelity.EXACT,
    "norms": Fidelity.EXACT,
    "users": Fidelity.UNVERIFIED,
}


def path_of(name: str) -> Path:
    return FOLDER / f"{name}.safetensors"


def test_every_golden_file_is_known() -> None:
    assert {path.stem for path in FOLDER.iterdir()} == set(SHA256) == set(MODELS)


@pytest.mark.parametrize("name", SHA256)
def test_a_golden_file_is_what_it_was(name: str) -> None:
    assert hashlib.sha256(path_of(name).read_bytes()).hexdigest() == SHA256[name]


@pytest.mark.parametrize("name", SHA256)
def test_a_golden_file_loads_with_its_values_and_strides(name: str) -> None:
    model = MODELS[name]()
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
