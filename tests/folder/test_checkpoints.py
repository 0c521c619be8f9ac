from __future__ import annotations

import errno
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

import orthoserde
from orthoserde import storage
from orthoserde.checkpoint import Checkpoint
from orthoserde.folder.record import RECORD_KEY, step_in
from tests.folder.cases import names, saved, small
from tests.helpers import assert_same_state, assert_unchanged, flip_bit, snapshot

posix = pytest.mark.skipif(os.name == "nt", reason="about POSIX files")


# Names and what files say of themselves


def test_a_checkpoint_is_an_ordinary_file_under_a_name_that_sorts(tmp_path: Path) -> None:
    model = small()
    before = snapshot(model)
    report = orthoserde.Checkpoints(tmp_path).save(120, model, metric=0.5, metadata={"run": "7"}, base="dense")
    assert_unchanged(model, before)
    assert names(tmp_path) == ["step-00000120.safetensors"]
    path = tmp_path / "step-00000120.safetensors"
    assert report == orthoserde.SaveReport(**{**vars(report), "path": str(path), "file_bytes": path.stat().st_size})
    assert orthoserde.inspect(path).metadata == {
        "run": "7",
        RECORD_KEY: '{"metric":"0.5","prefix":"step","step":120,"version":1}',
    }
    other = small(seed=1)
    assert orthoserde.load(other, path).fidelity is orthoserde.Fidelity.EXACT
    assert_same_state(model, other)
    assert orthoserde.verify(path).ok


def test_every_argument_of_a_save_is_passed_on(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].requires_grad_(False)
    seen: list[object] = []
    registry = orthoserde.Registry()
    report = orthoserde.Checkpoints(tmp_path).save(
        1, model, select="trainable", include_weights=True, registry=registry, debug=seen.append
    )
    assert report.left_out == ("1.weight", "1.bias")
    with pytest.raises(orthoserde.ConfigError, match="base: expected one of"):
        orthoserde.Checkpoints(tmp_path).save(2, model, base="rows")  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="unexpected keyword argument 'other'"):
        orthoserde.Checkpoints(tmp_path).save(2, model, other=1)  # type: ignore[call-overload]


@pytest.mark.parametrize("wait", [True, False])
def test_debug_metrics_are_those_of_what_was_saved(tmp_path: Path, wait: bool) -> None:
    seen: list[object] = []
    checkpoints = orthoserde.Checkpoints(tmp_path)
    checkpoints.save(1, small(), debug=seen.append, wait=wait)
    assert len(seen) == 1
    checkpoints.wait()
    assert len(seen) == 1


def test_the_same_state_gives_the_same_bytes(tmp_path: Path) -> None:
    for folder in ("one", "other"):
        orthoserde.Checkpoints(tmp_path / folder).save(3, small(), metric=1e-3)
    one, other = ((tmp_path / folder / "step-00000003.safetensors").read_bytes() for folder in ("one", "other"))
    assert one == other


def test_steps_of_more_digits_than_the_names_are_padded_to_still_sort_as_steps(tmp_path: Path) -> None:
    steps = [0, 99_999_999, 100_000_000, 2**63 - 1]
    checkpoints = saved(tmp_path, *steps)
    assert checkpoints.steps() == steps
    assert checkpoints.latest() == tmp_path / f"step-{2**63 - 1}.safetensors" == checkpoints.path(2**63 - 1)


@pytest.mark.parametrize("name", ["step-1", "step-000000001", "step-+0000001", f"step-{2**63}", "step-00000001 ", "a"])
def test_other_names_are_of_no_step(name: str) -> None:
    assert step_in("step-00000001.safetensors", "step") == 1
    assert step_in(f"{name}.safetensors", "step") is None


def test_a_folder_is_made_by_the_first_save_and_not_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    sync = storage.sync_folder

    def watched(folder: str) -> None:
        synced.append(folder)
        sync(folder)

    monkeypatch.setattr(storage, "sync_folder", watched)
    monkeypatch.chdir(tmp_path)
    checkpoints = orthoserde.Checkpoints("runs/first")
    assert (checkpoints.latest(), checkpoints.best, checkpoints.steps()) == (None, None, [])
    assert names(tmp_path) == []
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    checkpoints.save(1, small())
    assert checkpoints.latest() == tmp_path / "runs" / "first" / "step-00000001.safetensors"
    # The names of the new folders are made durable, from the outside in.
    assert synced == [str(tmp_path), str(tmp_path / "runs")]


@pytest.mark.parametrize("step", [np.int64(5), torch.tensor(5)])
def test_a_step_may_be_any_integer(tmp_path: Path, step: np.int64 | torch.Tensor) -> None:
    orthoserde.Checkpoints(tmp_path).save(step, small())
    assert orthoserde.Checkpoints(tmp_path).steps() == [5]


@pytest.mark.parametrize("step", [-1, 2**63, 1.0, "1", None, True, torch.tensor([1, 2])])
def test_what_is_no_step_is_refused(tmp_path: Path, step: int) -> None:
    with pytest.raises(orthoserde.ConfigError, match="step: expected an integer"):
        orthoserde.Checkpoints(tmp_path).save(step, small())
    assert names(tmp_path) == []


@pytest.mark.parametrize("metric", ["0.1", True, torch.zeros(2), np.zeros(2), 1j, [1.0], 10**400])
def test_what_is_no_metric_is_refused(tmp_path: Path, metric: float) -> None:
    with pytest.raises(orthoserde.ConfigError, match="metric: expected a number"):
        orthoserde.Checkpoints(tmp_path).save(1, small(), metric=metric)
    assert names(tmp_path) == []


def test_what_is_no_option_is_refused(tmp_path: Path) -> None:
    for keep in (0, -1, True, 2.0, "3"):
        with pytest.raises(orthoserde.ConfigError, match="keep: expected how many"):
            orthoserde.Checkpoints(tmp_path, keep=keep)  # type: ignore[arg-type]
    with pytest.raises(orthoserde.ConfigError, match="mode: expected one of min, max"):
        orthoserde.Checkpoints(tmp_path, mode="best")  # type: ignore[arg-type]
    for prefix in ("", "a/b", ".a", "-a", "a b", "\0", "é", "a" * 101, "..", None):
        with pytest.raises(orthoserde.ConfigError, match="prefix: expected"):
            orthoserde.Checkpoints(tmp_path, prefix=prefix)  # type: ignore[arg-type]
    assert orthoserde.Checkpoints(tmp_path, prefix="a" * 100).save(1, small()).tensors


def test_metadata_that_is_none_or_takes_the_key_of_the_record_is_refused(tmp_path: Path) -> None:
    checkpoints = orthoserde.Checkpoints(tmp_path)
    with pytest.raises(orthoserde.ConfigError, match="metadata: expected a mapping"):
        checkpoints.save(1, small(), metadata=["a"])  # type: ignore[call-overload]
    with pytest.raises(orthoserde.ConfigError, match=r"metadata: the key .* is written by"):
        checkpoints.save(1, small(), metadata={RECORD_KEY: "1"})
    assert names(tmp_path) == []


def test_the_mapping_of_metadata_is_left_as_it_is(tmp_path: Path) -> None:
    metadata = {"run": "7"}
    orthoserde.Checkpoints(tmp_path).save(1, small(), metadata=metadata)
    assert metadata == {"run": "7"}


def test_it_says_what_it_is(tmp_path: Path) -> None:
    assert (
        repr(orthoserde.Checkpoints(tmp_path)) == f"Checkpoints({str(tmp_path)!r}, keep=3, mode='min', prefix='step')"
    )


# Which is the newest, and which the best


def test_the_latest_is_that_of_the_highest_step_whatever_the_times_of_the_files(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1, 2, 3)
    os.utime(checkpoints.path(1))
    os.utime(checkpoints.path(3), (0, 0))
    assert checkpoints.latest() == orthoserde.Checkpoints(tmp_path).latest() == checkpoints.path(3)


BEST = [
    ([3.0, 1.0, 2.0], 2, 1),
    ([1.0, 1.0, 2.0], 2, 3),  # the later of equals
    ([math.nan, 5.0, math.nan], 2, 2),
    ([None, 5.0, None], 2, 2),
    ([math.inf, 5.0, -math.inf], 3, 1),
    ([0.0, -0.0, 1], 2, 3),
    ([math.nan, None, math.nan], None, None),
]


@pytest.mark.parametrize(("metrics", "least", "greatest"), BEST)
def test_the_best_is_known_to_a_new_process(
    tmp_path: Path, metrics: list[float | None], least: int | None, greatest: int | None
) -> None:
    checkpoints = orthoserde.Checkpoints(tmp_path, keep=None)
    for step, metric in enumerate(metrics, start=1):
        checkpoints.save(step, small(), metric=metric)
    for mode, best in (("min", least), ("max", greatest)):
        found = orthoserde.Checkpoints(tmp_path, mode=mode).best  # type: ignore[arg-type]
        assert found == (None if best is None else checkpoints.path(best))


@pytest.mark.parametrize("metric", [torch.tensor(0.25), np.float32(0.25), torch.tensor([0.25], requires_grad=True)])
def test_a_metric_may_be_any_number(tmp_path: Path, metric: float) -> None:
    checkpoints = orthoserde.Checkpoints(tmp_path)
    checkpoints.save(1, small(), metric=metric)
    checkpoints.save(2, small(), metric=0.26)
    assert checkpoints.best == checkpoints.path(1)


# Steps that are there already


def test_a_step_that_is_there_is_replaced_with_its_metric(tmp_path: Path) -> None:
    checkpoints = orthoserde.Checkpoints(tmp_path)
    checkpoints.save(1, small(), metric=1.0)
    checkpoints.save(2, small(), metric=0.0)
    model = small(seed=3)
    orthoserde.Checkpoints(tmp_path).save(2, model, metric=2.0)
    assert checkpoints.best == checkpoints.path(1)
    other = small()
    orthoserde.load(other, checkpoints.path(2))
    assert_same_state(model, other)


def test_a_step_below_the_newest_is_refused(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 10, 20)
    for wait in (True, False):
        with pytest.raises(orthoserde.ConfigError, match=r"step 15 is below step 20, .* move the newer"):
            checkpoints.save(15, small(), wait=wait)
    assert checkpoints.steps() == [10, 20]
    saved(tmp_path, 15, prefix="other")


# Files that cannot be read, and files of others


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _damage_header(path: Path) -> None:
    flip_bit(path, 100)


def _lead_nowhere(path: Path) -> None:
    path.unlink()
    path.symlink_to("unmounted/disk")


def _write_newer_version(path: Path) -> None:
    path.unlink()
    record = '{"version":2,"more":"than is known"}'
    orthoserde.save(small(), path, metadata={RECORD_KEY: record})


def _write_nonsense(path: Path) -> None:
    path.unlink()
    orthoserde.save(small(), path, metadata={RECORD_KEY: '{"version":1,"prefix":"step","step":2,"metric":"low"}'})


DAMAGES = [_truncate, _empty, _damage_header, _write_newer_version, _write_nonsense]


@pytest.mark.parametrize("damage", [*DAMAGES, pytest.param(_lead_nowhere, marks=posix)])
def test_a_newest_file_that_cannot_be_read_is_an_error_and_not_an_older_one(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    checkpoints = orthoserde.Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, small(), metric=step)
    damage(checkpoints.path(2))
    for each in (checkpoints, orthoserde.Checkpoints(tmp_path)):
        expected = rf"(?s)cannot be read; move it away .*{checkpoints.path(1).name}"
        with pytest.raises((orthoserde.FileFormatError, orthoserde.FileAccessError), match=expected) as caught:
            each.latest()
        assert str(checkpoints.path(2)) in str(caught.value)
        with pytest.raises((orthoserde.FileFormatError, orthoserde.FileAccessError), match=expected):
            each.best  # noqa: B018 - it is what is tested
        assert each.steps() == [1]
        with pytest.raises(orthoserde.FileAccessError, match=r"not replaced; move it away") as refused:
            each.save(2, small())
        assert refused.value.errno == errno.EEXIST
    os.rename(checkpoints.path(2), tmp_path / "damaged")
    assert checkpoints.latest() == checkpoints.best == checkpoints.path(1)


def test_an_older_file_that_cannot_be_read_is_no_matter_for_the_latest(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1, 2, 3)
    _truncate(checkpoints.path(2))
    assert checkpoints.latest() == checkpoints.path(3)
    with pytest.raises(orthoserde.FileFormatError, match=r"step-00000002.*the newest that can: .*step-00000003"):
        checkpoints.best  # noqa: B018
    checkpoints.save(4, small())
    assert checkpoints.steps() == [1, 3, 4]


def test_damage_to_elements_is_left_to_the_load(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1)
    path = checkpoints.path(1)
    flip_bit(path, path.stat().st_size - 1)
    assert checkpoints.latest() == path
    with pytest.raises(orthoserde.DamagedFileError):
        orthoserde.load(small(), path)


def test_what_others_put_under_the_name_of_a_checkpoint_is_none(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1)
    safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "step-00000002.safetensors")
    orthoserde.save(small(), tmp_path / "step-00000003.safetensors")
    os.link(checkpoints.path(1), tmp_path / "step-00000004.safetensors")
    (tmp_path / "step-00000005.safetensors").mkdir()
    assert checkpoints.steps() == [1]
    assert checkpoints.latest() == checkpoints.path(1)
    for step in (2, 3, 4, 5):
        with pytest.raises(orthoserde.FileAccessError, match="not a checkpoint that this folder can be proven to own"):
            checkpoints.save(step, small())


@posix
def test_a_checkpoint_that_was_moved_away_and_linked_to_is_found_and_not_replaced(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path / "run", 1, 2)
    os.rename(checkpoints.path(2), tmp_path / "kept")
    checkpoints.path(2).symlink_to(tmp_path / "kept")
    assert checkpoints.latest() == checkpoints.path(2)
    with pytest.raises(orthoserde.FileAccessError, match="a link"):
        checkpoints.save(2, small())
    assert checkpoints.path(2).is_symlink()


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    checkpoints = orthoserde.Checkpoints(tmp_path / "run")
    for action in (checkpoints.latest, checkpoints.steps, lambda: checkpoints.save(1, small())):
        with pytest.raises(orthoserde.FileAccessError, match="cannot list the checkpoints") as caught:
            action()
        assert caught.value.errno == errno.ENOTDIR
    below = orthoserde.Checkpoints(tmp_path / "run" / "below")
    with pytest.raises(orthoserde.FileAccessError) as caught:
        below.save(1, small())
    assert caught.value.errno == errno.ENOTDIR
    assert (tmp_path / "run").read_text() == "mine"


def test_headers_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = saved(tmp_path, 1, 2)
    opened: list[str] = []
    read = storage.read

    def watched(path: str) -> Checkpoint:
        opened.append(path)
        return read(path)

    monkeypatch.setattr(storage, "read", watched)
    for _ in range(3):
        checkpoints.latest()
    assert opened == [str(checkpoints.path(2))]  # that of step 1 was read when 2 was saved


def test_arguments_that_a_checkpoint_of_one_file_does_not_have_are_refused(tmp_path: Path) -> None:
    checkpoints = orthoserde.Checkpoints(tmp_path)
    shards: dict[str, Any] = {"max_shard_size": "1GB"}
    misspelt: dict[str, Any] = {"optimiser": None}
    with pytest.raises(TypeError, match="unexpected keyword argument 'max_shard_size'; each checkpoint is one file"):
        checkpoints.save(1, nn.Linear(2, 2), **shards)
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'optimiser'$"):
        checkpoints.save(1, nn.Linear(2, 2), **misspelt)
    assert checkpoints.steps() == []


def test_its_folder_is_no_checkpoint_and_the_error_names_the_newest(tmp_path: Path) -> None:
    checkpoints = orthoserde.Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, nn.Linear(2, 2))
    with pytest.raises(orthoserde.FileFormatError, match=r"it holds step-00000002\.safetensors, step-00000001"):
        orthoserde.load(nn.Linear(2, 2), tmp_path)
