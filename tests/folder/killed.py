"""Kill a process that saves into a folder, again and again; after each, look at what it left.

A script of its own, which imports torch once and forks: ``python -m tests.folder.killed FOLDER KILLS``.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time

import torch
from torch import nn

import orthoserde

KEEP = 2


def model_at(step: int) -> nn.Module:
    """A model of 2 MB that tells its step: every element is that."""
    model = nn.Linear(512, 1024)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(step)
    return model


def train(folder: str, report: int) -> None:
    """Go on from the newest checkpoint until killed; report each step whose save is known to have ended."""
    checkpoints = orthoserde.Checkpoints(folder, keep=KEEP)
    step = (checkpoints.steps() or [0])[-1]
    while True:
        step += 1
        checkpoints.save(step, model_at(step), metric=abs(7 - step), wait=step % 2 == 0)
        if step % 2:
            time.sleep(random.random() / 500)
            checkpoints.wait()
        os.write(report, f"{step}\n".encode())


def kill_once(folder: str) -> int | None:
    """Let a child train and kill it at a random moment; return the last step it reported."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            train(folder, writing)
        finally:
            os._exit(1)
    os.close(writing)
    time.sleep(0.01 + random.random() / 10)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL, f"the child ended by itself: {status}"
    with os.fdopen(reading) as reported:
        steps = reported.read().split()
    return int(steps[-1]) if steps else None


def check(folder: str, known: int) -> int:
    """Whatever is named is whole, and the last step that was known to be saved is among it; return the newest."""
    checkpoints = orthoserde.Checkpoints(folder, keep=KEEP)
    steps = checkpoints.steps()
    assert known == 0 or known in steps, (known, steps)
    latest = checkpoints.latest()
    assert latest == (checkpoints.path(steps[-1]) if steps else None)
    for step in steps:
        assert orthoserde.verify(checkpoints.path(step)).ok
        model = model_at(-1)
        orthoserde.load(model, checkpoints.path(step))
        assert all(bool((parameter == step).all()) for parameter in model.parameters())
    return steps[-1] if steps else 0


def main() -> None:
    """Kill and look, as often as is asked for; print what came of it."""
    folder, kills = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(1)
    newest, reports = 0, 0
    for _ in range(kills):
        reported = kill_once(folder)
        reports += reported is not None
        newest = check(folder, newest if reported is None else reported)
    # What a killed process had no time to remove goes with the next save that ends.
    checkpoints = orthoserde.Checkpoints(folder, keep=KEEP)
    checkpoints.save(newest + 1, model_at(newest + 1))
    assert len(checkpoints.steps()) <= KEEP + 1, checkpoints.steps()
    print(f"{newest} {reports}")


if __name__ == "__main__":
    main()
