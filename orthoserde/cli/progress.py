"""A bar for whatever takes more than a second, on the standard error, if that is a terminal."""

from __future__ import annotations

import sys
import threading
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn

from orthoserde.cli.terminal import is_terminal, wants_ascii

#: Seconds before it is shown.
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
            self._timer = threading.Timer(PATIENCE, self._show)
            self._timer.daemon = True

    def advance(self, count: int) -> None:
        """So many more bytes are done. It may be called from any thread."""
        if self._progress is not None:
            with self._lock:
                # What is read twice, or only in part, makes of the total an estimate.
                self._done = min(self._total, self._done + count)
            self._progress.update(self._task, completed=self._done)

    def _show(self) -> None:
        with self._lock:
            if not self._ended and self._progress is not None:
                self._progress.start()

    def __enter__(self) -> Bar:
        if self._timer is not None:
            self._timer.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        with self._lock:
            self._ended = True
            if self._progress is not None:
                self._progress.stop()
