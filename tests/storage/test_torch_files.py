"""What `torch.save` writes is read, whatever state dict it is; `tests/reliability` has what is refused."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from orthoserde import FileFormatError, storage
from orthoserde.storage import pickles
from tests.helpers import same_bits

pytestmark = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6), reason="refused with an older torch, whatever it is"
)


def tied() -> dict[str, Tensor]:
    whole = torch.arange(12.0)
    return {"whole": whole, "again": whole, "part": whole[3:7], "turned": whole.view(3, 4).T, "wide": whole[None]}


STATES: dict[str, dict[str, Tensor]] = {
    "of modules": nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.LSTM(3, 2)).state_dict(),
    "of parameters": dict(nn.Linear(3, 2).named_parameters()),
    "tied": tied(),
    "without tensors": OrderedDict(),
    "of odd shapes": {"scalar": torch.tensor(1.0), "none": torch.zeros(0, 3), "six": torch.zeros(1, 1, 2, 1, 1, 1)},
    "of dtypes": {
        str(dtype): torch.ones(3, dtype=dtype)
        for dtype in (
            *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16),
            *(torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128),
        )
    },
    "conjugated": {"weight": torch.ones(2, dtype=torch.complex64).conj(), "negated": torch.ones(2)},
    "named oddly": {"": torch.ones(1), "a\nb": torch.ones(2), "é🎼": torch.ones(3), "n" * 70_000: torch.ones(4)},
}


def read(path: Path) -> dict[str, Tensor]:
    with storage.read(path) as checkpoint:
        return {key: checkpoint.tensor(key) for key in checkpoint.manifest.tensors}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("which", STATES)
def test_a_state_dict_comes_back(which: str, zipped: bool, tmp_path: Path) -> None:
    torch.save(STATES[which], tmp_path / "m", _use_new_zipfile_serialization=zipped)
    found = read(tmp_path / "m")
    assert found.keys() == STATES[which].keys()
    assert all(same_bits(found[key], STATES[which][key]) for key in found)


def test_a_key_that_is_no_unicode_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1), "b\udc80": torch.ones(1)}, tmp_path / "m")
    with pytest.raises(FileFormatError, match=r"m: the key 'b\\udc80' is no valid Unicode; rename it"):
        storage.read(tmp_path / "m")


def test_dtypes_of_the_newer_form_come_back(tmp_path: Path) -> None:
    state = {str(each): torch.ones(3).to(each) for each in (torch.uint16, torch.float8_e4m3fn, torch.float8_e5m2)}
    torch.save(state, tmp_path / "m")
    found = read(tmp_path / "m")
    assert all(same_bits(found[key], state[key]) for key in state)


def test_more_members_than_a_small_archive_has_are_read(tmp_path: Path) -> None:
    state = {str(i): torch.full((1,), float(i)) for i in range(2**16 + 1)}
    torch.save(state, tmp_path / "m")
    found = read(tmp_path / "m")
    assert found.keys() == state.keys()
    assert all(float(found[key]) == float(key) for key in ("0", "65536"))


def test_a_pickle_that_is_too_long_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"n" * 5000: torch.ones(1)}, tmp_path / "m", _use_new_zipfile_serialization=False)
    assert read(tmp_path / "m")
    monkeypatch.setattr(pickles, "MAX_PICKLE_BYTES", 4000)
    with pytest.raises(ValueError, match="its pickle is longer than 4000 bytes"):
        read(tmp_path / "m")


def test_more_containers_than_tensors_need_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(STATES["tied"], tmp_path / "m")
    monkeypatch.setattr(pickles, "MAX_CONTAINERS", 3)
    with pytest.raises(ValueError, match="more than 3 lists, tuples and dicts"):
        read(tmp_path / "m")
