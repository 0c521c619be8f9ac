"""Kill a process that saves shards at every call of the system that changes the disk; look at what each kill left.

A script of its own, which imports torch once and forks: ``python -m tests.storage.killed_shards FOLDER``. It prints how
often it killed in each case.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

import orthoserde
from orthoserde import storage
from orthoserde.errors import FileFormatError
from tests.storage.shard_cases import (
    INDEX,
    SINGLE,
    as_transformers_reads,
    equal,
    loaded,
    make,
    names,
    shards,
    state,
)

#: What changes the disk.
CALLS = {"mkdir", "open", "write", "truncate", "fsync", "replace", "unlink", "rmdir"}

OLD, NEW = 1.0, 2.0

#: So many bytes per shard that there are two: enough for something to happen between them.
LIMIT = 500

#: What the folder holds before, and the size with which the new model is saved.
CASES: dict[str, tuple[Callable[[Path], object], int | str, float]] = {
    "nothing to shards": (lambda folder: None, LIMIT, NEW),
    "shards to shards": (lambda folder: orthoserde.save(make(OLD), folder, max_shard_size=LIMIT), LIMIT, NEW),
    "one file to shards": (lambda folder: orthoserde.save(make(OLD), folder, max_shard_size="1GB"), LIMIT, NEW),
    "shards to one file": (lambda folder: orthoserde.save(make(OLD), folder, max_shard_size=LIMIT), "1GB", NEW),
    "shards to the same": (lambda folder: orthoserde.save(make(OLD), folder, max_shard_size=LIMIT), LIMIT, OLD),
}


def die_at(count: int) -> None:
    """Have this process killed just before the n-th of the calls; to the disk that is just after the one before."""
    here = os.path.dirname(storage.__file__)
    left = count

    def watch(frame: FrameType, what: str, called: Any) -> None:
        nonlocal left
        if what == "c_call" and called.__name__ in CALLS and frame.f_code.co_filename.startswith(here):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(watch)


def save_and_die(folder: Path, size: int | str, value: float, count: int) -> bool:
    """Save in a child that is killed at the n-th call; return whether it was."""
    model = make(value)
    child = os.fork()
    if child == 0:
        try:
            die_at(count)
            orthoserde.save(model, folder, max_shard_size=size)
            sys.setprofile(None)
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL), f"the child ended by itself: {status}"
    return status != 0


def without_alias(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in found.items() if key != "2.weight"}


def look(folder: Path, before: list[dict[str, Tensor]], after: dict[str, Tensor]) -> bool:
    """Whether the new checkpoint stands; what stands is one of the two, whole, for us and for transformers."""
    if not before and not (folder.exists() and ((folder / SINGLE).exists() or (folder / INDEX).exists())):
        return False
    found = loaded(folder)
    assert orthoserde.verify(folder).ok
    assert any(equal(found, each) for each in (*before, after))
    assert equal(as_transformers_reads(folder), without_alias(found))
    return equal(found, after)


def check_next_save(folder: Path) -> None:
    """The next save goes well, and what was left goes with it, be it an hour later."""
    for path in folder.iterdir() if folder.exists() else ():
        os.utime(path, (0, 0))
    orthoserde.save(make(3.0), folder, max_shard_size=LIMIT)
    assert equal(loaded(folder), state(make(3.0)))
    assert names(folder) == [*shards(folder), INDEX], names(folder)


def kill_everywhere(root: Path, case: str) -> int:
    """Kill a save at each of its calls; return how many there were. Once the new checkpoint stands, it stays."""
    prepare, size, value = CASES[case]
    prepare(root / "template")
    before = [state(make(OLD))] if (root / "template").exists() else []
    stood = False
    for count in range(1, 10_000):
        folder = root / str(count)
        if before:
            shutil.copytree(root / "template", folder)
        killed = save_and_die(folder, size, value, count)
        stands = look(folder, before, state(make(value)))
        assert stands or not stood, (case, count)
        stood = stands
        check_next_save(folder)
        shutil.rmtree(folder)
        if not killed:
            assert stands, case
            return count - 1
    raise AssertionError("no end of the calls")


def main() -> None:
    """Go through all cases."""
    torch.set_num_threads(1)
    for case in CASES:
        root = Path(sys.argv[1]) / case
        root.mkdir()
        try:
            print(case, kill_everywhere(root, case), flush=True)
        except (AssertionError, FileFormatError) as error:
            raise SystemExit(f"{case}: {type(error).__name__}: {error}") from error


if __name__ == "__main__":
    main()
