"""A bar for whatever takes more than a second, on the standard error, if that is a terminal.

Note [Imports]
Some of torch is imported when it is first needed, within whatever is done. That takes a second or two, says nothing of
the file, and would show a bar for the smallest. So the second that counts is one in which no module was imported.
"""

from __future__ import annotations

import sys
import threading
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn

from orthoserde.cli.terminal import is_terminal, wants_ascii

#: Seconds without an import before it is shown, see Note [Imports].
PATIENCE = 1.0


class Bar:
    """Counts bytes, and shows how many there are to come once it has taken a while.

    It is a context manager; whatever ends the block, it takes itself off the screen.
    """

    def __init__(self, label: str, total: int) -> None:
        self._lock = threading.Lock()
        self._ended = False
        self._done, self._total = 0, max(1, total)
        self._progress: Progress | None = None
        self._timer: threading.Timer | None = None
        self._modules = 0
        if is_terminal(sys.stderr):
            columns: list[ProgressColumn] = [TextColumn("{task.description}", markup=False)]
            columns += [TextColumn("{task.percentage:>3.0f}%") if wants_ascii(sys.stderr) else BarColumn()]
            columns += [DownloadColumn(), TimeElapsedColumn()]
            self._progress = Progress(
                *columns,
                console=Console(stderr=True, highlight=False),
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._task = self._progress.add_task(label, total=self._total)

    def advance(self, count: int) -> None:
        """So many more bytes are done. It may be called from any thread."""
        if self._progress is not None:
            with self._lock:
                # What is read twice, or only in part, makes of the total an estimate.
                self._done = min(self._total, self._done + count)
            self._progress.update(self._task, completed=self._done)

    def _wait(self) -> None:
        self._modules = len(sys.modules)
        self._timer = threading.Timer(PATIENCE, self._show)
        self._timer.daemon = True
        self._timer.start()

    def _show(self) -> None:
        with self._lock:
            if self._ended or self._progress is None:
                return
            if len(sys.modules) != self._modules:
                self._wait()
            else:
                self._progress.start()

    def __enter__(self) -> Bar:
        if self._progress is not None:
            self._wait()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._lock:
            self._ended = True
            if self._timer is not None:
                self._timer.cancel()
            if self._progress is not None:
                self._progress.stop()
