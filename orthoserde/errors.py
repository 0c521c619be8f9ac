"""Every exception and warning that orthoserde raises on purpose.

One family, :class:`OrthoserdeError`. Each class is also the builtin that torch and safetensors users already catch:
``RuntimeError`` for a model that does not fit, ``ValueError`` for a file that is not sound, ``OSError`` for the disk.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from orthoserde.wording import legible, legible_name

ProblemKind = Literal["missing", "unexpected", "mismatch", "unsupported"]

#: A message shows this many mismatches, and keys that are on one side only; the ``problems`` attribute holds all.
SHOWN_PROBLEMS = 40
SHOWN_KEYS = 12


@dataclass(frozen=True)
class Problem:
    """One thing that keeps a checkpoint from fitting a model, or a model from being saved or changed.

    Attributes:
        where: Dotted name of the module or tensor, ``""`` for the whole model.
        kind: ``"missing"`` (the model has it, the file does not), ``"unexpected"`` (the other way round),
            ``"mismatch"`` (both have it and disagree), ``"unsupported"`` (it cannot be saved, restored or changed).
        text: What was expected, what was found, and what to do.

    Example:
        >>> import tempfile, torch, orthoserde
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     saved = orthoserde.save(torch.nn.Linear(3, 2), f"{folder}/model.safetensors")
        ...     try:
        ...         orthoserde.load(torch.nn.Linear(4, 2), f"{folder}/model.safetensors")
        ...     except orthoserde.IncompatibleModelError as error:
        ...         problems = error.problems
        >>> [(problem.where, problem.kind) for problem in problems]
        [('weight', 'mismatch')]
    """

    where: str
    kind: ProblemKind
    text: str

    def __str__(self) -> str:
        return f"{legible_name(self.where) or '(model)'}: {self.text}"


class OrthoserdeError(Exception):
    """Base of every error that orthoserde raises on purpose.

    Its text can be shown: the names that a file brings along cannot make a terminal do anything, nor fill it.

    Example:
        >>> import torch, orthoserde
        >>> try:
        ...     orthoserde.load(torch.nn.Linear(2, 2), "no_such_file.safetensors")
        ... except orthoserde.OrthoserdeError as error:
        ...     print(type(error).__name__, isinstance(error, FileNotFoundError))
        CheckpointNotFoundError True
    """

    def __str__(self) -> str:
        return legible(super().__str__())


class RegistrationError(OrthoserdeError, ValueError):
    """A class or codec cannot be registered: the name or the class is taken, or the name is malformed."""


class ConfigError(OrthoserdeError, ValueError):
    """A configuration cannot be turned into JSON, upgraded, or built into a module again."""


class TornSaveError(OrthoserdeError, RuntimeError):
    """The model changed while it was being saved; the previous checkpoint is untouched."""


class UnsupportedModuleError(OrthoserdeError, RuntimeError):
    """The model holds state that cannot be saved or restored without losing some of it.

    Attributes:
        problems: Every piece of state that is in the way.
    """

    def __init__(self, message: str, problems: Sequence[Problem] = ()) -> None:
        super().__init__(message, tuple(problems))
        self.message = message
        self.problems = tuple(problems)

    def __str__(self) -> str:
        return render(self.message, self.problems)


class AdapterError(OrthoserdeError, RuntimeError):
    """An adapter cannot be attached to this model, or cannot tell what it is to do in this forward."""


class CanonicalizeError(OrthoserdeError, RuntimeError):
    """A model, or the state of its optimizer, cannot be moved to canonical bases. Nothing has been changed.

    Attributes:
        problems: Everything that is in the way.
    """

    def __init__(self, message: str, problems: Sequence[Problem] = ()) -> None:
        super().__init__(message, tuple(problems))
        self.message = message
        self.problems = tuple(problems)

    def __str__(self) -> str:
        return render(self.message, self.problems)


class IncompatibleModelError(OrthoserdeError, RuntimeError):
    """The checkpoint and the model do not fit. The model has not been changed.

    Attributes:
        problems: Everything that does not fit.
        missing_keys: Tensor names that the model has and the file does not.
        unexpected_keys: Tensor names that the file has and the model does not.
    """

    def __init__(self, message: str, problems: Sequence[Problem] = ()) -> None:
        super().__init__(message, tuple(problems))
        self.message = message
        self.problems = tuple(problems)
        self.missing_keys = [problem.where for problem in problems if problem.kind == "missing"]
        self.unexpected_keys = [problem.where for problem in problems if problem.kind == "unexpected"]

    def __str__(self) -> str:
        return render(self.message, self.problems)


class FileFormatError(OrthoserdeError, ValueError):
    """The file is not a checkpoint that this version can read, or it is damaged. Nothing has been changed."""


class DamagedFileError(FileFormatError):
    """Bytes of the file are missing, or are not the bytes that were saved. Nothing has been changed."""


class FormatVersionError(FileFormatError):
    """The file was written in a newer format than this version of orthoserde reads.

    Attributes:
        found: Format version of the file.
        supported: Highest format version that this orthoserde reads.
    """

    def __init__(self, message: str, found: int, supported: int) -> None:
        super().__init__(message, found, supported)
        self.message = message
        self.found = found
        self.supported = supported

    def __str__(self) -> str:
        return legible(self.message)


class FileAccessError(OrthoserdeError, OSError):
    """The operating system refused to read or write the file; ``errno`` and ``filename`` say what and where.

    When it comes from ``save``, the previous file under that name is untouched.
    """


class CheckpointNotFoundError(FileAccessError, FileNotFoundError):
    """There is no file at the given path."""


class CommitUncertainError(FileAccessError):
    """The new file stands under its name, but the system did not confirm that its name is durable.

    It is readable now; after a power cut either the new or the previous file may be found.
    """


class BackgroundSaveError(OrthoserdeError, RuntimeError):
    """A save with ``wait=False`` failed after the call that asked for it had returned; ``__cause__`` says why.

    Unless that is a ``CommitUncertainError``, or says that an old checkpoint could not be removed, there is no file.
    """


class LoadInterruptedError(OrthoserdeError, RuntimeError):
    """Loading stopped after its first write: **the model is partly written** and must be loaded again or discarded.

    Everything that can be checked is checked before the first write. What remains are a disk that fails, a file that
    changes, or an interrupt while the tensors are being copied. The original exception is the ``__cause__``.
    """


class MissingPackageError(OrthoserdeError, ImportError):
    """What was asked for needs a package that is not installed, or a newer one; the message says how to install it."""


class ProofError(OrthoserdeError, RuntimeError):
    """``prove`` came to no result: a function cannot be run in a new process, or raised there, or the process ended.

    What was raised there stands in the message, with its traceback.
    """


def render(message: str, problems: Sequence[Problem]) -> str:
    """Join a headline and its problems into a readable message, one line each.

    Mismatches come first. Of keys that are merely on one side only a few are shown, and the others counted: a model
    that lacks an adapter lacks all of its keys, and has all of its own besides.
    """
    lines = [f"  - {problem}" for problem in problems if problem.kind in ("mismatch", "unsupported")]
    hidden = max(0, len(lines) - SHOWN_PROBLEMS)
    lines = lines[:SHOWN_PROBLEMS]
    for kind, where in (("unexpected", "in the file, not in the model"), ("missing", "in the model, not in the file")):
        found = [problem for problem in problems if problem.kind == kind]
        lines += [f"  - {problem}" for problem in found[:SHOWN_KEYS]]
        if len(found) > SHOWN_KEYS:
            lines.append(f"  - {len(found) - SHOWN_KEYS} more keys {where}")
    if hidden:
        lines.append(f"  - ... and {hidden} more mismatches (see the problems attribute)")
    return "\n".join([legible(message), *map(legible, lines)])


class LegacyCheckpointWarning(UserWarning):
    """Only computed weights were in the file: training starts in a new chart, at that weight."""


class TrainingTrapWarning(UserWarning):
    """The model that is saved, or that was loaded, will not train as it should; ``orthoserde.diagnose`` says more."""


def warn(message: str, category: type[Warning]) -> None:
    """Issue a warning at the line that called this library, through however many functions of ours it came."""
    ours = __name__.partition(".")[0]
    depth, frame = 1, inspect.currentframe()
    while frame is not None and str(frame.f_globals.get("__name__")).partition(".")[0] == ours:
        depth, frame = depth + 1, frame.f_back
    warnings.warn(message, category, stacklevel=depth)
