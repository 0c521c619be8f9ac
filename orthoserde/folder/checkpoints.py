"""`Checkpoints`: what a training script asks of its folder."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal, SupportsFloat, SupportsIndex, TypedDict, overload

from torch import nn
from torch.optim import Optimizer

from orthoserde.api import Base, Prepared, prepare
from orthoserde.arguments import check_flags, folder_of
from orthoserde.capture import Select
from orthoserde.checkpoint import Checkpoint
from orthoserde.errors import ConfigError, FileAccessError, FileFormatError
from orthoserde.folder import record
from orthoserde.folder.background import Background
from orthoserde.folder.files import Contents, Files, best_of
from orthoserde.folder.record import Mode, Record
from orthoserde.metrics import Sink
from orthoserde.registry import Registry
from orthoserde.reports import SaveReport
from orthoserde.traps import warn_of_traps

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack


class SaveArguments(TypedDict, total=False):
    """The keyword arguments of :func:`orthoserde.save`, which :meth:`Checkpoints.save` passes on."""

    optimizer: Optimizer | Mapping[str, Optimizer] | None
    state: Mapping[str, object] | None
    rng: bool
    base: Base
    include_weights: bool
    select: Select
    metadata: Mapping[str, str] | None
    registry: Registry | None
    debug: bool | Sink | None


class Checkpoints:
    """The checkpoints of one run in one folder, ``step-00000120.safetensors`` and so on.

    Each is an ordinary file of :func:`orthoserde.save`, which also says in its metadata that it belongs to such a
    folder, of which step it is, and with which metric. Nothing is kept elsewhere, so a new process knows what the last
    one knew, and a folder can be moved.

    **Rotation** removes a checkpoint only after a newer one is durable on the disk, and only a regular file whose name
    and header both say that it is a checkpoint of this step, of this scheme. Anything else in the folder stays: other
    names, copies, links, files of other libraries, damaged ones. The temporary file of a save that was killed is
    removed by a later one, an hour after its last write, if the system says that no process has it open.

    **Nothing older is handed out in silence.** A file that has the name of the newest checkpoint and cannot be read is
    an error of :meth:`latest`, and any such file is one of :attr:`best`.

    One process at a time saves into a folder, from one thread: with DDP that of rank 0. Any process may read it; what
    it was told may be rotated away before it opens it.

    Args:
        folder: The folder. It is made by the first save.
        keep: How many of the newest checkpoints to keep; the best one is kept beside them. None keeps all.
        mode: Whether the least (``"min"``) or the greatest (``"max"``) metric is the best.
        prefix: How the names begin. Checkpoints with another prefix are not touched.

    Raises:
        ConfigError: An argument is none of these.
        TypeError: The folder is no path.
        FileAccessError: The folder has a name that none can have.

    Example:
        >>> import tempfile, torch, orthoserde
        >>> model = torch.nn.Linear(8, 4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with orthoserde.Checkpoints(folder, keep=2) as checkpoints:
        ...         for step, loss in [(10, 0.5), (20, 0.1), (30, 0.3), (40, 0.2)]:
        ...             checkpoints.save(step, model, metric=loss, wait=False)
        ...     print(checkpoints.steps(), checkpoints.best.name, checkpoints.latest().name)
        [20, 30, 40] step-00000020.safetensors step-00000040.safetensors
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        keep: int | None = 3,
        mode: Mode = "min",
        prefix: str = "step",
    ) -> None:
        self._files = Files(folder_of(folder), record.checked_prefix(prefix))
        self._keep = record.checked_keep(keep)
        self._mode = record.checked_mode(mode)
        self._background: Background[SaveReport] = Background()
        self._memory: Checkpoint | None = None

    @overload
    def save(
        self,
        step: SupportsIndex,
        model: nn.Module,
        *,
        metric: SupportsFloat | None = None,
        wait: Literal[True] = True,
        **arguments: Unpack[SaveArguments],
    ) -> SaveReport: ...

    @overload
    def save(
        self,
        step: SupportsIndex,
        model: nn.Module,
        *,
        metric: SupportsFloat | None = None,
        wait: Literal[False],
        **arguments: Unpack[SaveArguments],
    ) -> None: ...

    @overload
    def save(
        self,
        step: SupportsIndex,
        model: nn.Module,
        *,
        metric: SupportsFloat | None = None,
        wait: bool,
        **arguments: Unpack[SaveArguments],
    ) -> SaveReport | None: ...

    def save(
        self,
        step: SupportsIndex,
        model: nn.Module,
        *,
        metric: SupportsFloat | None = None,
        wait: bool = True,
        **arguments: Unpack[SaveArguments],
    ) -> SaveReport | None:
        """Save the model as the checkpoint of a step, then remove what is no longer wanted.

        A checkpoint of the same step is replaced, as by a run that was resumed. A step below the newest one is refused:
        it would be rotated away at once, or :meth:`latest` would go on handing out the newer.

        With ``wait=False`` everything is copied into memory on the CPU, and a thread writes the copy and rotates: what
        becomes of the model after the call is not in the file, whose bytes are those of a save that waits. There is one
        such save at a time; the next call waits for it. If it fails, that is raised by the next call (of ``save``,
        ``latest``, ``best``, ``steps``, ``wait`` or ``close``), once, and that call does nothing else. When the
        interpreter ends, it is completed first.

        The memory of the copy is kept for the next one, because new memory costs more than copying, until
        :meth:`close`. It is as large as the file.

        Args:
            step: The step after which the model is saved, from 0 on.
            model: As for :func:`orthoserde.save`.
            metric: What :attr:`best` goes by: a number, or a tensor with one element. NaN is never the best.
            wait: Whether to return when the file and its name are on the disk.
            **arguments: Those of :func:`orthoserde.save`.

        Returns:
            What was saved; None if that is not waited for, :meth:`wait` returns it then.

        Raises:
            BackgroundSaveError: The last save with ``wait=False`` failed. Nothing was saved now.
            ConfigError: The step is below the newest one of the folder; or as of :func:`orthoserde.save`.
            FileAccessError: Under the name stands what is not proven to be a checkpoint of this folder; or the system
                refused something. The previous checkpoints are untouched, unless the message says that the new one is
                saved and an old one could not be removed.
            UnsupportedModuleError: As of :func:`orthoserde.save`.
            CommitUncertainError: As of :func:`orthoserde.save`; nothing was removed.
        """
        unknown = arguments.keys() - SaveArguments.__annotations__.keys()
        if unknown:
            text = "; each checkpoint is one file" if "max_shard_size" in unknown else ""
            raise TypeError(f"save() got an unexpected keyword argument {min(unknown)!r}{text}")
        check_flags(wait=wait)
        self.wait()
        own = Record(self._files.prefix, record.checked_step(step), record.checked_metric(metric))
        arguments["metadata"] = record.with_record(arguments.get("metadata"), own)
        self._check_place(own.step)
        prepared = prepare(model, **arguments)
        warn_of_traps(model, arguments.get("optimizer"))
        self._files.make_folder()
        if wait:
            return self._write(prepared, own.step)
        # Taken while it is overwritten: a signal handler that saves meanwhile must not get the same memory.
        memory, self._memory = self._memory, None
        copied = prepared.snapshot(memory)
        self._background.start(functools.partial(self._write, copied, own.step), f"the save of step {own.step}")
        self._memory = copied.checkpoint
        return None

    def _check_place(self, step: int) -> None:
        contents = self._files.contents()
        newest = max(contents.entries, default=step)
        if step < newest:
            raise ConfigError(
                f"{self._files.folder}: step {step} is below step {newest}, which is there already; to go on from an "
                "older step, move the newer checkpoints away or save to another folder"
            )
        self._files.check_free(step, contents)

    def _write(self, prepared: Prepared, step: int) -> SaveReport:
        report = prepared.write(self._files.path_of(step))
        if self._keep is not None:
            self._files.rotate(self._keep, self._mode)
        self._files.remove_leftovers()
        return report

    def wait(self) -> SaveReport | None:
        """Wait for a save that was made with ``wait=False``.

        Returns:
            What it saved; None if there was none to wait for.

        Raises:
            BackgroundSaveError: It failed; what it raised is the cause.
        """
        return self._background.settle()

    def latest(self) -> Path | None:
        """The checkpoint of the highest step; its header is read, its tensors are not.

        Returns:
            Its path, None if the folder has none.

        Raises:
            FileFormatError: A file has the name of a later one, and is damaged or of a newer format.
            FileAccessError: The system refuses to list the folder, or to read such a file.
            BackgroundSaveError: The last save with ``wait=False`` failed.
        """
        self.wait()
        contents = self._files.contents()
        newest = max(contents.entries, default=-1)
        self._refuse_unreadable(contents, newest)
        return Path(contents.entries[newest].path) if contents.entries else None

    @property
    def best(self) -> Path | None:
        """The checkpoint with the best metric, the later one of equals; None where none has a metric but NaN.

        Raises:
            FileFormatError: A file has the name of a checkpoint, and is damaged or of a newer format: its metric is not
                known.
            FileAccessError: The system refuses to list the folder, or to read such a file.
            BackgroundSaveError: The last save with ``wait=False`` failed.
        """
        self.wait()
        contents = self._files.contents()
        self._refuse_unreadable(contents, -1)
        best = best_of(contents.entries.values(), self._mode)
        return None if best is None else Path(best.path)

    def _refuse_unreadable(self, contents: Contents, above: int) -> None:
        """Raise for the latest file above a step that cannot be read."""
        step = max(contents.unreadable, default=above)
        if step <= above:
            return
        error, path = contents.unreadable[step], self._files.path_of(step)
        readable = max(contents.entries, default=None)
        instead = "no other" if readable is None else self._files.path_of(readable)
        what = "has the name of a checkpoint and cannot be read; move it away to do without it"
        if isinstance(error, FileAccessError):
            raise FileAccessError(error.errno, f"{what} (the newest that can: {instead}): {error.strerror}", path)
        raise FileFormatError(f"{path} {what} (the newest that can: {instead}): {error}") from error

    def steps(self) -> list[int]:
        """The steps of which the folder has a checkpoint, in ascending order.

        Raises:
            FileAccessError: The system refuses to list the folder.
            BackgroundSaveError: The last save with ``wait=False`` failed.
        """
        self.wait()
        return list(self._files.contents().entries)

    def path(self, step: SupportsIndex) -> Path:
        """Where the checkpoint of a step stands, or would stand.

        Raises:
            ConfigError: Not a step.
        """
        return Path(self._files.path_of(record.checked_step(step)))

    def close(self) -> None:
        """Wait for a save that was made with ``wait=False``, and give its memory back; the object can be used again.

        Raises:
            BackgroundSaveError: It failed; what it raised is the cause.
        """
        self._memory = None
        self.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if exc_type is None:
            self.close()
            return
        # The exception of the block must not be hidden behind a failure of the save: that is logged.
        self._memory = None
        self._background.leave()

    def __repr__(self) -> str:
        options = f"keep={self._keep}, mode={self._mode!r}, prefix={self._files.prefix!r}"
        return f"Checkpoints({self._files.folder!r}, {options})"
