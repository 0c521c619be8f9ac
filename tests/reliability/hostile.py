"""The whole collection of hostile files, and what comes of each in this process or in one of its own.

`python -m tests.reliability.hostile COMMAND ...` is the process of its own; it prints JSON.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn

import orthoserde
from orthoserde.errors import FileFormatError, OrthoserdeError
from tests.helpers import assert_unchanged, snapshot
from tests.reliability import hostile_files, hostile_manifests, hostile_paths, hostile_pickles
from tests.reliability.broken_builds import BUILDS
from tests.reliability.hostile_files import Hostile, Outcome
from tests.reliability.specimen import make

FILES: dict[str, Hostile] = {
    **hostile_files.renamed(hostile_files.FILES, "containers"),
    **hostile_manifests.FILES,
    **hostile_pickles.FILES,
    **hostile_paths.FILES,
}

CALLS = ("load", "inspect", "verify", "build")

#: What a heavy file may take: so many times its own size, and so many bytes more.
FACTOR, CONSTANT = 8, 512 << 20

#: Seconds of this process for one call on a file of a hundred megabytes, and on a small one.
LONGEST, LONGEST_SMALL = 60.0, 2.0

#: Seconds by the clock on the wall, which also run while a call waits: a machine may have other things to do.
PATIENCE = 120.0


def outcomes(hostile: Hostile, path: Path | str) -> Iterator[tuple[str, str]]:
    """What each of the calls came to that is not what was to come of it, in words."""
    specimen, layer = make(3), nn.Linear(1, 1)
    calls: dict[str, Callable[[], object]] = {
        "load": (lambda: orthoserde.load(layer, path)) if hostile.plain else (lambda: specimen.load(path)),
        "inspect": lambda: orthoserde.inspect(path),
        "verify": lambda: orthoserde.verify(path),
        "build": lambda: orthoserde.build(path),
    }
    for name, call in calls.items():
        expected: Outcome = getattr(hostile, name)
        models = [(model, snapshot(model)) for model in (specimen.model, layer)]
        looked = specimen.look()
        start, worked = time.perf_counter(), time.process_time()
        got, shown = _called(call)
        seconds, worked = time.perf_counter() - start, time.process_time() - worked
        if got is not expected.error or expected.words not in shown:
            yield name, f"expected {expected}, got {got and got.__name__}: {shown[:500]}"
        if worked > (LONGEST if hostile.heavy else LONGEST_SMALL) or seconds > PATIENCE:
            yield name, f"took {worked:.1f} s of work, {seconds:.1f} s in all"
        if any(not char.isprintable() and char != "\n" for char in shown):
            yield name, f"would let a terminal do something: {shown[:500]!r}"
        if len(shown) > 20_000:
            yield name, f"says too much: {len(shown)} characters"
        if got is not None:
            for model, before in models:
                assert_unchanged(model, before)
            assert specimen.look() == looked


def _called(call: Callable[[], object]) -> tuple[type[BaseException] | None, str]:
    try:
        return None, str(call())
    except OrthoserdeError as error:
        return type(error), str(error)
    except Exception as error:  # what the collection is about
        return type(error), "".join(traceback.format_exception(error))


@contextmanager
def written(hostile: Hostile) -> Iterator[Path | str]:
    """A hostile file in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        yield hostile.write(Path(folder))


# In a process of its own


def in_a_child(*command: str) -> Any:
    """What this module prints when it is run with a command."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.reliability.hostile", *command],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, f"{done.returncode}: {done.stderr[-3000:]}"
    return json.loads(done.stdout.splitlines()[-1])


def forked(action: Callable[[], object]) -> tuple[object, int, int]:
    """Run something in a fork of this process.

    Returns:
        What it returned, the signal that ended it or 0, and the most memory that it had, in bytes.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        with os.fdopen(writing, "w") as pipe:
            json.dump(action(), pipe)
            pipe.flush()
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    _, status, usage = os.wait4(child, 0)
    signal = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    return json.loads(said) if said else None, signal, usage.ru_maxrss * 1024


def _watched(name: str, where: str) -> dict[str, object]:
    watch = Watch()
    watch.begin()
    with watch.over(name, where):
        wrong = list(outcomes(FILES[name], where))
    return {"wrong": wrong, "caused": watch.wrong, "events": watch.events}


def measure_heavy() -> dict[str, dict[str, Any]]:
    """Try each heavy file in a fork: what is wrong, what it caused, its size, and how much memory was taken."""
    _warm_up()
    found: dict[str, dict[str, Any]] = {}
    for name, hostile in FILES.items():
        if not hostile.heavy:
            continue
        with tempfile.TemporaryDirectory() as folder:
            path, _, _ = forked(lambda hostile=hostile, folder=folder: str(hostile.write(Path(folder))))  # type: ignore[misc]
            where = str(path)
            _, _, before = forked(lambda: None)
            start = time.perf_counter()
            seen, signal, peak = forked(lambda name=name, where=where: _watched(name, where))  # type: ignore[misc]
            found[name] = {
                **cast("dict[str, Any]", seen or {}),
                "signal": signal,
                "bytes": os.stat(where).st_size,
                "memory": peak - before,
                "seconds": round(time.perf_counter() - start, 2),
            }
    return found


def _warm_up() -> None:
    """Do once all that is done lazily the first time."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "saved"
        make(1).save(path)
        for specimen in (make(2), make(3)):
            specimen.load(path)
        orthoserde.inspect(path)
        orthoserde.verify(path)
        layer = nn.Linear(1, 1)
        for zipped in (True, False):
            torch.save(layer.state_dict(), path, _use_new_zipfile_serialization=zipped)
            with suppress(FileFormatError):  # an older torch reads no pickle safely, so none is read
                orthoserde.load(layer, path)
                orthoserde.verify(path)
        orthoserde.save(layer, Path(folder) / "shards", max_shard_size=4)
        orthoserde.load(layer, Path(folder) / "shards")
        orthoserde.inspect(Path(folder) / "shards")
        orthoserde.verify(Path(folder) / "shards")
        for content in (
            b"",
            hostile_pickles.archive(hostile_pickles.entry(hostile_pickles.called("os.system"))),
            b"PK\3\4",
        ):
            path.write_bytes(content)
            list(outcomes(hostile_files.refused(lambda folder: folder, ""), path))
            list(outcomes(hostile_files.refused(lambda folder: folder, ""), "/dev/null"))


#: Events of Python that no file may cause.
FORBIDDEN = (
    *("import", "exec", "compile", "code.__new__", "marshal.loads", "pickle.find_class", "cpython.run_"),
    *("os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.startfile", "subprocess.", "pty."),
    *("socket.", "urllib.", "http.", "ftplib.", "smtplib.", "telnetlib.", "ctypes.", "mmap.", "webbrowser."),
    *("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod"),
    *("os.chown", "os.utime", "os.putenv", "os.unsetenv", "os.kill", "os.setxattr", "shutil.", "tempfile."),
    *("os.chdir", "glob.", "builtins.input", "builtins.breakpoint"),
)

#: Of a folder that is given, what is in it may be listed.
LISTING = ("os.listdir", "os.scandir")


def _within(given: str, where: object) -> bool:
    """Whether a path is the one that was given, or lies in it."""
    path = os.fsdecode(where) if isinstance(where, (str, bytes)) else ""
    return path == given or path.startswith(f"{given}{os.sep}")


@dataclass
class Watch:
    """What an audit hook sees while a file is looked at.

    Attributes:
        events: How many events there were.
        opened: How many of them opened something.
        wrong: Those that must not be, in words.
    """

    events: int = 0
    opened: int = 0
    wrong: list[str] = field(default_factory=list)
    _current: list[str] = field(default_factory=list)

    def begin(self) -> None:
        """Have this process watched, for good."""
        sys.addaudithook(self._see)

    @contextmanager
    def over(self, name: str, path: Path | str) -> Iterator[None]:
        """Watch what a file causes within the block."""
        self._current[:] = [name, os.fsdecode(path)]
        yield
        self._current.clear()

    def _see(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._current:
            return
        name, given = self._current
        self.events += 1
        if event == "open":
            self.opened += 1
            if not isinstance(arguments[0], int) and not _within(given, arguments[0]):
                self.wrong.append(f"{name}: opened {arguments[0]!r}")
        elif event in LISTING:
            if not _within(given, arguments[0]):
                self.wrong.append(f"{name}: listed {arguments[0]!r}")
        elif event.startswith(FORBIDDEN):
            self.wrong.append(f"{name}: {event} {arguments!r:.200}")


def audit(only: str = "", build: str = "") -> dict[str, object]:
    """Call everything on all hostile files but the heavy ones, which are watched as they are measured, under a hook.

    Args:
        only: What names of files begin with.
        build: The broken build to try, if any.

    Returns:
        How many calls there were, how many events, and those that must not be.
    """
    _warm_up()
    files = 0
    watch = Watch()
    watch.begin()
    with pytest.MonkeyPatch.context() as patch:
        if build:
            BUILDS[build][0](patch)
        for name, hostile in FILES.items():
            if not name.startswith(only) or hostile.heavy:
                continue
            with written(hostile) as path, watch.over(name, path):
                for _ in outcomes(hostile, path):
                    pass
            files += 1
    counts = {"files": files, "calls": files * len(CALLS), "events": watch.events, "opened": watch.opened}
    return {**counts, "wrong": watch.wrong}


def changed_while_it_is_read(kind: str) -> dict[str, Any]:
    """Load a file that changes before each of its reads in turn; say what came of it."""
    from tests.reliability import vanishing  # noqa: PLC0415

    return vanishing.run(kind)


def main(command: str, *arguments: str) -> None:
    """Run a command and print what it returns as JSON."""
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    commands: dict[str, Callable[..., object]] = {
        "heavy": measure_heavy,
        "audit": audit,
        "vanishing": changed_while_it_is_read,
    }
    print(json.dumps(commands[command](*arguments)))


if __name__ == "__main__":
    main(*sys.argv[1:])
