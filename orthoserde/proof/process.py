"""One new process, from its start to its end: whatever happens, it is not left behind."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler

from orthoserde.errors import ProofError
from orthoserde.proof.child import Doing, Failed, Finished, Loaded, Stepped, Task, main

#: Seconds between looks at whether the process lives, and those that it gets to end by itself.
_LOOK, _GRACE = 0.5, 5.0


@dataclass(frozen=True)
class Run:
    """What a process told.

    Attributes:
        loaded: What became of the load.
        steps: What became of each step.
    """

    loaded: Loaded
    steps: tuple[Stepped, ...]


def run(task: Task, make: Callable[..., object], step: Callable[..., object]) -> Run:
    """Do a task in a new process, and wait for its end.

    Raises:
        ProofError: Something was raised there, or the process ended before its task.
    """
    # Spawned, not forked: it is to know nothing but what is in the file.
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    # No daemon: those may have no processes of their own, such as the workers of a loader.
    process = context.Process(target=main, args=(there, task, encoded(make, step)), name="orthoserde.prove")
    loaded: Loaded | None = None
    steps: list[Stepped] = []
    try:
        process.start()
        there.close()
        for message in _messages(here, process):
            if isinstance(message, Loaded):
                loaded = message
            elif isinstance(message, Stepped):
                steps.append(message)
    finally:
        here.close()
        there.close()
        _end(process, _GRACE if loaded is not None and len(steps) == task.steps else 0)
    if loaded is None:
        raise ProofError("the new process told nothing of the load")
    return Run(loaded, tuple(steps))


def encoded(make: Callable[..., object], step: Callable[..., object]) -> bytes:
    """Functions by their names, for a process that imports them when it is ready to tell what goes wrong."""
    return bytes(ForkingPickler.dumps((make, step)))


def _messages(here: Connection, process: BaseProcess) -> Iterator[object]:
    """What the process tells, until it is finished."""
    doing = ""
    while True:
        # An end of the pipe that closes is no sure sign of the end: processes of its own may hold it open.
        try:
            while not here.poll(_LOOK):
                if not process.is_alive() and not here.poll():
                    raise _ended(process, doing)
            message = here.recv()
        except (EOFError, ConnectionError) as error:
            process.join(_GRACE)
            raise _ended(process, doing) from error
        if isinstance(message, Failed):
            raise ProofError(f"{doing} failed in the new process: {message.error}\n\n{message.traceback}")
        if isinstance(message, Finished):
            return
        if isinstance(message, Doing):
            doing = message.what
        yield message


def _ended(process: BaseProcess, doing: str) -> ProofError:
    """The error for a process that ended before its task."""
    code = process.exitcode
    how = f"with exit code {code}"
    if code is not None and code < 0:
        names = {each.value: each.name for each in signal.Signals}
        how = f"by {names.get(-code, f'signal {-code}')}"
    if doing:
        memory = "; the system may have run out of memory" if how == "by SIGKILL" else ""
        return ProofError(f"the new process ended {how} in {doing}{memory}")
    return ProofError(
        f"the new process ended {how} before it began; what it printed says why. It imports the main file again, so in "
        'a script the call has to stand under `if __name__ == "__main__":`'
    )


def _end(process: BaseProcess, grace: float) -> None:
    """Let a process end by itself for some seconds, then end it."""
    if process.pid is None:
        return
    try:
        process.join(grace)
    finally:
        if process.is_alive():
            process.terminate()
            process.join(_GRACE)
        if process.is_alive():
            process.kill()
            process.join()
        process.close()
