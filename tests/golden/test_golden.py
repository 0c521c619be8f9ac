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
    "norms": "39f9d2f7d65e4ba210bd8a75285cdde3ef51ad84b604ce066fdcb7128292e4c6",
    "orthogonals": "cc56d307816d13d7f1366099267651e19af1ec6695830101443faa91fb8d7f56",
    "plain": "2fe8083e7c4d3138d39e967988f49a56bfc992dd6bb7bf5f9a2601f0bb23921e",
    "users": "5da0ef5d6751dc1ad72c94da93421aedd7762c194bd7cab4bebfb0eef8616439",
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
