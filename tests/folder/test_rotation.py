from __future__ import annotations

import errno
import os
import shutil
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

import orthoserde
from orthoserde import storage
from orthoserde.storage import leftovers
from orthoserde.storage.atomic import replacing
from tests.folder.cases import names, saved, small

posix = pytest.mark.skipif(os.name == "nt", reason="about POSIX files")


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for keep in (1, 2, 3):
        assert saved(tmp_path / str(keep), *range(5), keep=keep).steps() == [0, 1, 2, 3, 4][-keep:]
    assert saved(tmp_path / "all", *range(5), keep=None).steps() == [0, 1, 2, 3, 4]


def test_the_best_is_kept_beside_them(tmp_path: Path) -> None:
    checkpoints = orthoserde.Checkpoints(tmp_path, keep=2, mode="max")
    kept: list[list[int]] = []
    for step, metric in enumerate([0.5, 0.9, float("nan"), 0.7, 0.8, 0.95, 0.1, 0.2]):
        checkpoints.save(step, small(), metric=metric)
        kept.append(checkpoints.steps())
    assert kept == [[0], [0, 1], [1, 2], [1, 2, 3], [1, 3, 4], [4, 5], [5, 6], [5, 6, 7]]


def test_a_new_process_goes_on_where_the_last_one_ended(tmp_path: Path) -> None:
    for step in range(6):
        orthoserde.Checkpoints(tmp_path, keep=2).save(step, small(), metric=step)
    assert orthoserde.Checkpoints(tmp_path).steps() == [0, 4, 5]


def test_nothing_is_removed_before_the_new_file_is_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = saved(tmp_path, 1, keep=1)
    calls: list[str] = []
    fsync, unlink = os.fsync, os.unlink

    def watched_fsync(descriptor: int) -> None:
        calls.append("sync")
        fsync(descriptor)

    def watched_unlink(path: str) -> None:
        calls.append(os.path.basename(path))
        unlink(path)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "unlink", watched_unlink)
    checkpoints.save(2, small())
    assert calls[-1] == "step-00000001.safetensors"
    assert calls[:-1] == ["sync"] * (1 if os.name == "nt" else 2)


@posix
def test_nothing_is_removed_if_the_new_file_is_perhaps_not_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = saved(tmp_path, 1, keep=1)

    def refuse(folder: str) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("orthoserde.storage.atomic.sync_folder", refuse)
    with pytest.raises(orthoserde.CommitUncertainError):
        checkpoints.save(2, small())
    assert checkpoints.steps() == [1, 2]


def test_nothing_is_removed_if_the_save_fails(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1, keep=1)
    with pytest.raises(orthoserde.UnsupportedModuleError):
        checkpoints.save(2, torch.nn.Linear(2, 2, device="meta"))
    assert names(tmp_path) == ["step-00000001.safetensors"]


def test_an_old_file_that_cannot_be_removed_is_said_while_the_new_one_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = saved(tmp_path, 1, keep=1)

    def refuse(path: str) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", refuse)
        with pytest.raises(orthoserde.FileAccessError, match="the new checkpoint is saved, but this old one") as caught:
            checkpoints.save(2, small())
    assert caught.value.filename == str(checkpoints.path(1))
    assert checkpoints.steps() == [1, 2]
    checkpoints.save(3, small())
    assert checkpoints.steps() == [3]


def _neighbours(folder: Path) -> None:
    """Files that look like checkpoints of the folder, and are not, or are not proven to be."""
    own = saved(folder / "elsewhere", 1, 2, 3).path(1)
    shutil.copy(own, folder / "copy of step-00000001.safetensors")
    shutil.copy(own, folder / "step-00000001.safetensors.bak")
    shutil.copy(own, folder / "step-1.safetensors")
    shutil.copy(own, folder / "step-000000001.safetensors")
    shutil.copy(own, folder / "Step-00000001.safetensors")
    shutil.copy(own, folder / "xstep-00000001.safetensors")
    shutil.copy(own, folder / "step-00000002.safetensors")  # says that it is step 1
    shutil.copy(own, folder / "step-\u0660\u0660\u0660\u0660\u0660\u0660\u0660\u0661.safetensors")
    saved(folder, 3, prefix="other")
    shutil.copy(folder / "other-00000003.safetensors", folder / "step-00000003.safetensors")
    orthoserde.save(small(), folder / "step-00000004.safetensors")
    safetensors.torch.save_file({"a": torch.zeros(1)}, folder / "step-00000005.safetensors")
    (folder / "step-00000006.safetensors").write_bytes(own.read_bytes()[:-1])
    (folder / "step-00000007.safetensors").mkdir()
    (folder / "step-00000008.safetensors").write_text("notes")
    (folder / "step-00000009.safetensors").write_bytes(b"")
    if os.name != "nt":
        (folder / "step-00000010.safetensors").symlink_to("nowhere")
        os.mkfifo(folder / "step-00000011.safetensors")
        # A link to a true checkpoint of this step: neither it nor what it leads to is removed.
        linked = saved(folder / "elsewhere", 12).path(12)
        (folder / "step-00000012.safetensors").symlink_to(linked)
    (folder / ".step-00000001.safetensors.orthoserde-0123456789abcdef").write_bytes(b"half")
    (folder / "best.safetensors").write_bytes(own.read_bytes())
    (folder / "notes.txt").write_text("mine")


def _tree(folder: Path) -> dict[str, tuple[object, ...]]:
    """Every name below a folder, with which file it is and what it holds."""
    found: dict[str, tuple[object, ...]] = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        content = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
        found[str(path.relative_to(folder))] = (status.st_ino, status.st_mode, content)
    return found


def test_what_is_not_proven_to_be_a_checkpoint_of_the_folder_is_never_removed(tmp_path: Path) -> None:
    _neighbours(tmp_path)
    before = _tree(tmp_path)
    assert len(before) > 20
    checkpoints = orthoserde.Checkpoints(tmp_path, keep=1)
    for step in range(20, 26):
        checkpoints.save(step, small(), metric=step, wait=step % 2 == 0)
    own = [name for name in checkpoints.steps() if name >= 20]
    checkpoints.close()
    assert own == [20, 25]
    after = _tree(tmp_path)
    assert {name: entry for name, entry in after.items() if name in before} == before
    assert after.keys() - before.keys() == {f"step-000000{step}.safetensors" for step in own}


def test_a_file_that_takes_the_place_of_a_proven_one_is_not_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = saved(tmp_path, 1, keep=1)
    lstat = os.lstat

    def replaced(path: str) -> os.stat_result:
        if str(path).endswith("step-00000001.safetensors"):
            os.unlink(path)
            Path(path).write_text("mine")
        return lstat(path)

    with monkeypatch.context() as patch:
        patch.setattr("orthoserde.folder.files.os.lstat", replaced)
        checkpoints.save(2, small())
    assert checkpoints.path(1).read_text() == "mine"


def test_another_name_of_a_removed_checkpoint_stays(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1, keep=1)
    os.link(checkpoints.path(1), tmp_path / "paper.safetensors")
    checkpoints.save(2, small())
    assert names(tmp_path) == ["paper.safetensors", "step-00000002.safetensors"]
    assert orthoserde.verify(tmp_path / "paper.safetensors").ok


# Temporary files of saves that were killed


def _leftover(folder: Path, target: str, age: float = 2 * leftovers.ABANDONED_SECONDS) -> Path:
    path = folder / f".{target}.orthoserde-0123456789abcdef"
    path.write_bytes(b"half")
    os.utime(path, (time.time() - age, time.time() - age))
    return path


@posix
def test_a_temporary_file_that_nobody_writes_any_more_is_removed(tmp_path: Path) -> None:
    path = _leftover(tmp_path, "step-00000007.safetensors")
    saved(tmp_path, 8)
    assert not path.exists()


def test_temporary_files_of_others_and_young_ones_stay(tmp_path: Path) -> None:
    kept = [
        _leftover(tmp_path, "step-00000007.safetensors", age=60),
        _leftover(tmp_path, "other-00000007.safetensors"),
        _leftover(tmp_path, "model.safetensors"),
        _leftover(tmp_path, "step-7.safetensors"),
    ]
    (tmp_path / ".step-00000007.safetensors.orthoserde-0123").write_text("mine")
    if os.name != "nt":
        (tmp_path / ".step-00000006.safetensors.orthoserde-0123456789abcdef").symlink_to(kept[1])
    before = _tree(tmp_path)
    saved(tmp_path, 8)
    assert _tree(tmp_path).items() >= before.items()


@posix
def test_a_temporary_file_that_is_being_written_stays_however_old_it_looks(tmp_path: Path) -> None:
    with replacing(tmp_path / "step-00000007.safetensors") as file:
        (path,) = tmp_path.iterdir()
        os.utime(path, (0, 0))
        storage.remove_leftovers(str(tmp_path), lambda name: True)
        assert path.exists()
        file.write(b"whole")
    assert (tmp_path / "step-00000007.safetensors").read_bytes() == b"whole"


@posix
def test_where_the_system_has_no_locks_nothing_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    path = _leftover(tmp_path, "step-00000007.safetensors")
    saved(tmp_path, 8)
    assert path.exists()
