"""What `prove` finds in runs that go on, and in runs that do not."""

from __future__ import annotations

import functools
import multiprocessing
import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import orthoserde
from orthoserde import Fidelity, Grade, _torch, testing
from orthoserde.proof import proving
from orthoserde.proof.settings import current
from tests.helpers import assert_unchanged, snapshot, surroundings
from tests.proof import cases
from tests.proof.here import run_here

STEPS = ["1", "2", "3"]


@pytest.fixture(autouse=True)
def generators() -> Iterator[None]:
    """Leave the random generators as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        yield
    random.setstate(python)
    np.random.set_state(numpy)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in this process what would run in a new one."""
    monkeypatch.setattr(proving, "run", run_here)


def files(folder: Path) -> list[Path]:
    return [folder / name for name in STEPS]


def test_every_parametrization_goes_on_bit_for_bit_and_nothing_here_changes(tmp_path: Path) -> None:
    run = cases.make_all()
    for _ in range(3):
        cases.step_all(*run)
    losses = cases.save_and_go_on(tmp_path, run, cases.step_all)
    model, around = snapshot(run[0]), surroundings()
    temporary, folder = set(os.listdir(tempfile.gettempdir())), os.getcwd()
    children = set(multiprocessing.active_children())  # an older torch.compile keeps some
    proof = orthoserde.prove(tmp_path / "start", cases.make_all, cases.step_all, reference=files(tmp_path))
    assert proof.grade is Grade.BIT_EXACT, proof
    assert (proof.first, proof.max_difference, proof.differences) == (None, 0.0, 0)
    assert proof.losses == tuple(losses)
    assert proof.fidelity is Fidelity.EXACT
    assert proof.compared == (
        "model",
        "optimizer.sgd",
        "optimizer.adam",
        "state.scheduler",
        "state.shuffle",
        "state.count",
    )
    assert_unchanged(run[0], model)
    assert surroundings() == around
    assert os.getcwd() == folder
    assert set(multiprocessing.active_children()) <= children
    left = set(os.listdir(tempfile.gettempdir())) - temporary
    assert not {name for name in left if "orthoserde" in name}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2", "3", "start"]


@pytest.mark.usefixtures("here")
def test_an_optimizer_that_was_not_saved_is_found_out(tmp_path: Path) -> None:
    run = cases.make_small()
    for _ in range(3):
        cases.step_small(*run)
    orthoserde.save(run[0], tmp_path / "bare", rng=True)
    losses = cases.save_and_go_on(tmp_path, run, cases.step_small)
    proof = orthoserde.prove(tmp_path / "bare", cases.make_small, cases.step_small, reference=files(tmp_path))
    assert (proof.grade, proof.fidelity) == (Grade.DIVERGES, Fidelity.EXACT)
    assert proof.losses[0] == losses[0]
    assert proof.first is not None
    assert (proof.first.step, proof.first.name) == (1, "0.bias")
    assert any("afresh" in note for note in proof.notes)
    assert "step 1, 0.bias" in str(proof)


def test_the_computed_weight_alone_is_found_out(tmp_path: Path) -> None:
    run = cases.make_small("SGD")
    for _ in range(3):
        cases.step_small(*run)
    model = run[0]
    weights = {"0.weight": model[0].weight, "0.bias": model[0].bias}  # type: ignore[index]
    weights |= {f"2.{name}": parameter for name, parameter in model[2].named_parameters()}  # type: ignore[index]
    save_file({name: weight.detach().contiguous() for name, weight in weights.items()}, tmp_path / "weights")
    losses = cases.save_and_go_on(tmp_path, run, cases.step_small)
    make = functools.partial(cases.make_small, "SGD")
    proof = orthoserde.prove(tmp_path / "weights", make, cases.step_small, reference=files(tmp_path))
    assert (proof.grade, proof.fidelity) == (Grade.DIVERGES, Fidelity.INFERENCE)
    assert proof.losses[0] == pytest.approx(losses[0], rel=1e-6)  # this is why nobody noticed
    assert proof.losses[1:] != pytest.approx(losses[1:], rel=1e-6)
    assert proof.first is not None
    assert (proof.first.step, proof.first.name) == (1, "0.parametrizations.weight.original")


@pytest.mark.usefixtures("here")
def test_shards_go_on_as_one_file_does(tmp_path: Path) -> None:
    run = cases.make_all()
    cases.step_all(*run)
    model, optimizer, state = run
    kept: Any = {"optimizer": optimizer, "state": state, "rng": True, "max_shard_size": 2000}
    orthoserde.save(model, tmp_path / "start", **kept)
    losses = [float(cases.step_all(*run).detach())]
    orthoserde.save(model, tmp_path / "1", **kept)
    assert (tmp_path / "start").is_dir()
    proof = orthoserde.prove(tmp_path / "start", cases.make_all, cases.step_all, reference=tmp_path / "1", steps=1)
    assert (proof.grade, proof.losses) == (Grade.BIT_EXACT, tuple(losses)), proof
    assert not [note for note in proof.notes if "afresh" in note or "random generators" in note]
    assert "optimizer.adam" in proof.compared


def test_a_folder_without_a_checkpoint_is_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(multiprocessing, "get_context", None)
    with pytest.raises(orthoserde.FileFormatError):
        orthoserde.prove(tmp_path, cases.make_small, cases.step_small)


def test_without_a_reference_two_loads_are_compared(tmp_path: Path) -> None:
    cases.save_and_go_on(tmp_path, cases.make_all(), cases.step_all, steps=0)
    proof = testing.assert_continues(tmp_path / "start", cases.make_all, cases.step_all, steps=2)
    assert (proof.grade, proof.max_difference, proof.first) == (Grade.DETERMINISTIC, None, None)
    assert proof.compared[:2] == ("losses", "model")
    assert "deterministic, 2 steps against two fresh loads" in str(proof)


@pytest.mark.usefixtures("here")
def test_what_is_drawn_from_nowhere_is_not_deterministic(tmp_path: Path) -> None:
    orthoserde.save(cases.make_model_alone(), tmp_path / "start")
    proof = orthoserde.prove(tmp_path / "start", cases.make_model_alone, cases.step_from_outside, steps=1)
    assert proof.grade is Grade.DIVERGES
    assert proof.first is not None
    assert (proof.first.step, proof.first.name, proof.first.relative) == (1, "0.bias", None)
    assert proof.max_difference is None


@pytest.mark.usefixtures("here")
def test_random_states_that_were_not_saved_are_found_out(tmp_path: Path) -> None:
    run = cases.make_all()
    orthoserde.save(run[0], tmp_path / "start", optimizer=run[1], state=run[2])
    reference = [cases.step_all(*run)]
    proof = orthoserde.prove(tmp_path / "start", cases.make_all, cases.step_all, reference=reference, steps=1)
    assert proof.grade is Grade.DIVERGES
    assert proof.compared == ("losses",)
    assert any("random generators" in note for note in proof.notes)
    # Two loads would agree if they began with the same seed.
    proof = orthoserde.prove(tmp_path / "start", cases.make_all, cases.step_all, steps=1)
    assert proof.grade is Grade.DIVERGES


def test_settings_are_those_of_this_process_and_threads_that_differ_are_within_rounding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = cases.make_sums()
    orthoserde.save(model, tmp_path / "start")
    monkeypatch.setenv("ORTHOSERDE_TEST", "here")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    threads, dtype, precision = torch.get_num_threads(), torch.get_default_dtype(), torch.get_float32_matmul_precision()
    try:
        torch.set_num_threads(1)
        loss = cases.step_sums(model)
        orthoserde.save(model, tmp_path / "1")
        torch.set_num_threads(2)
        torch.set_default_dtype(torch.float64)
        torch.set_float32_matmul_precision("high")
        torch.use_deterministic_algorithms(True, warn_only=True)
        make = functools.partial(cases.make_with_settings, tuple(cases.settings()))
        proof = orthoserde.prove("start", make, cases.step_sums, reference="1", steps=2)
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
        torch.set_float32_matmul_precision(precision)
        torch.use_deterministic_algorithms(False)
    assert proof.environment == {"torch": torch.__version__, "threads": "2", "deterministic algorithms": "warn only"}
    assert proof.grade is Grade.WITHIN, proof
    assert proof.max_difference is not None
    assert 0 < proof.max_difference < 1e-5
    assert proof.first is not None
    # One file is what is left after all steps.
    assert (proof.first.step, proof.first.name, proof.first.within, proof.differences) == (2, "sums", True, 1)
    assert proof.losses == pytest.approx((loss, loss), rel=1e-5)


def test_a_default_device_is_handed_over_without_being_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may not be there, and a tensor on it would begin a context."""

    def allocated() -> NoReturn:
        raise AssertionError("CUDA was asked for")

    monkeypatch.setattr(torch.cuda, "_lazy_init", allocated)
    try:
        for device in ("cuda", "cuda:1"):
            torch.set_default_device(device)
            handed_over = current()
            assert handed_over.device == device
            handed_over.apply()
            torch.set_default_device("cpu")
            handed_over.apply()
            assert _torch.default_device() == torch.device(device)
    finally:
        torch.set_default_device(None)


@pytest.mark.usefixtures("here")
def test_losses_alone_will_do(tmp_path: Path) -> None:
    run = cases.make_all()
    losses = cases.save_and_go_on(tmp_path, run, cases.step_all)
    proof = testing.assert_continues(tmp_path / "start", cases.make_all, cases.step_all, reference=losses)
    assert (proof.grade, proof.compared) == (Grade.BIT_EXACT, ("losses",))
    assert str(proof).startswith(f"{tmp_path / 'start'}: bit-exact, 3 steps against the reference\n")
    proof = orthoserde.prove(
        tmp_path / "start", cases.make_all, cases.step_all, reference=[loss * (1 + 1e-7) for loss in losses]
    )
    assert (proof.grade, proof.differences) == (Grade.WITHIN, 3)
    proof = orthoserde.prove(tmp_path / "start", cases.make_all, cases.step_all, reference=[*losses[:2], losses[0]])
    assert proof.grade is Grade.DIVERGES
    assert proof.first is not None
    assert (proof.first.step, proof.first.name) == (3, "loss")
