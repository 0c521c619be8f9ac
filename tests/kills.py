"""Kill the example ``stop_and_resume`` with SIGKILL, and start it again, until it ends.

Run as ``python -m tests.kills FOLDER SAVE_EVERY KILLS SEED`` this is a process that imports torch once and forks a
worker for each start. What became of each start goes to standard output as JSON, one line each.

Half of the workers are killed from outside, at some moment after some steps. The others are killed inside a save or a
load: just before or just after a chosen call that touches the disk.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import orthoserde
from docs.examples.stop_and_resume import train
from orthoserde import storage
from orthoserde.storage.leftovers import TEMPORARY_MARK

#: How often each of these is called before a process is killed there: a save writes some 30 tensors.
CALLS = {"open": 4, "write": 60, "truncate": 2, "fsync": 4, "replace": 2}


@dataclass(frozen=True)
class Start:
    """What became of one start.

    Attributes:
        moment: When it was to be killed; "" for never.
        exit_code: 0, or -9 when it was killed.
        lines: Lines of the log when it was over.
        whole: Whether the checkpoint, if there is one, was found undamaged to the last byte.
        unfinished: Whether a temporary file was left, so that the kill hit a save.
    """

    moment: str
    exit_code: int | None
    lines: int
    whole: bool
    unfinished: bool


def lines_of(folder: Path) -> int:
    """Lines in the log of a run."""
    with contextlib.suppress(FileNotFoundError):
        return (folder / "log.txt").read_bytes().count(b"\n")
    return 0


def work(folder: Path, save_every: int, moment: str) -> None:
    """Train; where the moment is a call, die there."""
    if " call " in moment:
        die_at(*moment.split(" call "))
    train(folder, save_every)


def die_at(event: str, which: str) -> None:
    """Have this process killed just before or just after the n-th call of a name by ``orthoserde.storage``."""
    name, count = which.split()
    here = os.path.dirname(storage.__file__)
    left = int(count)

    def watch(frame: FrameType, what: str, called: Any) -> None:
        nonlocal left
        if what == event and called.__name__ == name and frame.f_code.co_filename.startswith(here):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(watch)


def moments(kills: int, generator: random.Random) -> Iterator[str]:
    """When to kill each worker; the last one is left alone."""
    for number in range(kills):
        if number % 2:
            name = generator.choice(list(CALLS))
            event = generator.choice(["c_call", "c_return"])
            yield f"{event} call {name} {generator.randint(1, CALLS[name])}"
        else:
            yield f"{generator.randint(0, 5)} steps {generator.uniform(0, 0.03)} seconds"
    yield ""


def start(folder: Path, save_every: int, moment: str) -> Start:
    """Start a worker, and kill it at a moment."""
    before = lines_of(folder)
    worker = multiprocessing.get_context("fork").Process(target=work, args=(folder, save_every, moment))
    worker.start()
    if " steps " in moment:
        steps, _, seconds, _ = moment.split()
        while worker.is_alive() and lines_of(folder) < before + int(steps):
            time.sleep(0.001)
        time.sleep(float(seconds))
        worker.kill()
    worker.join()
    checkpoint = folder / "checkpoint.safetensors"
    whole = not checkpoint.exists() or orthoserde.verify(checkpoint).ok
    unfinished = any(TEMPORARY_MARK in path.name for path in folder.iterdir()) if folder.exists() else False
    return Start(moment, worker.exitcode, lines_of(folder), whole, unfinished)


def main(folder: Path, save_every: int, kills: int, seed: int) -> None:
    """Start workers until one ends by itself."""
    torch.set_num_threads(1)  # so that there are no threads to be lost in a fork
    torch.optim.SGD([torch.zeros(1)])  # imports the compiler, which would take every worker a second
    for moment in moments(kills, random.Random(seed)):
        done = start(folder, save_every, moment)
        print(json.dumps(asdict(done)), flush=True)
        if done.exit_code != -signal.SIGKILL:
            break


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
