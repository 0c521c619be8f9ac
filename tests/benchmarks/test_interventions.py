"""The benchmark of interventions writes the forms that it names, and loads what was saved."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import orthoserde
from tests.benchmarks import bench_interventions
from tests.benchmarks.bench_interventions import (
    COMPACT,
    DENSE,
    FULL,
    LEGACY,
    LEGACY_SAFETENSORS,
    STATE_DICT,
    STRUCTURED,
    Settings,
)

N, K, LAYERS = 256, 4, 3

#: Bytes of the tensors of one intervention: the rotation in float32, the source in bfloat16.
SOURCE, WEIGHT, BASE = 2 * (K * N + K), 4 * N * K, 4 * N * N


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setattr(bench_interventions, "HIDDEN_SIZE", N)
    monkeypatch.setattr(bench_interventions, "RANK", K)
    return Settings(LAYERS, 1, tmp_path)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_forms_hold_what_their_names_say(settings: Settings) -> None:
    module = next(bench_interventions.interventions(bench_interventions.build(settings)))
    state = bench_interventions.legacy(module)
    assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()} == {
        "rotate_layer": ((N, K), torch.float32),
        "weight": ((K, N), torch.bfloat16),
        "bias": ((K,), torch.bfloat16),
    }
    more = bench_interventions.full(module)
    assert more.keys() - state.keys() == {"rotate_layer_original", "rotate_layer_base"}
    assert sum(tensor.nbytes for tensor in more.values()) == SOURCE + 2 * WEIGHT + BASE


def test_sizes_are_those_of_the_tensors_and_a_little_more(settings: Settings) -> None:
    found = bench_interventions.child_forms(settings)
    expected = {
        LEGACY: SOURCE + WEIGHT,
        LEGACY_SAFETENSORS: SOURCE + WEIGHT,
        FULL: SOURCE + 2 * WEIGHT + BASE,
        STATE_DICT: SOURCE + WEIGHT + BASE,
        DENSE: SOURCE + WEIGHT + BASE,
        COMPACT: SOURCE + 2 * WEIGHT,
        STRUCTURED: SOURCE + 2 * WEIGHT,
    }
    assert found["bytes"].keys() == expected.keys()
    for name, size in found["bytes"].items():
        assert LAYERS * expected[name] < size < LAYERS * (expected[name] + 5000), name
    assert all(len(times) == settings.repeat for times in found["times"].values())
    assert len(found["times"]) == 6
    assert len(orthoserde.inspect(settings.compact).compact) == LAYERS
    assert orthoserde.inspect(settings.dense).compact == ()


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is set back and read in /proc")
def test_a_registration_needs_a_base_and_no_more_and_the_structured_form_needs_none(tmp_path: Path) -> None:
    settings = Settings(1, 1, tmp_path)
    base = 4 * bench_interventions.HIDDEN_SIZE**2
    whole, structured = (
        int(bench_interventions.in_child(settings, "registration peak", name)) for name in ("orthoserde", "structured")
    )
    assert 0.9 * base < whole < 1.5 * base  # pages that the process had already do not count
    assert structured < base / 4
