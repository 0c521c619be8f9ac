"""`inspect` and `verify`: what a file holds, without a model."""

from __future__ import annotations

import os

from orthoserde import audit
from orthoserde.integrations import in_process
from orthoserde.manifest import Manifest
from orthoserde.opening import open_checkpoint, rotations_of
from orthoserde.registry import Registry
from orthoserde.reports import VerifyReport


def inspect(path: str | os.PathLike[str]) -> Manifest:
    """Say what a file holds, without a model.

    Of a safetensors file, ours or another library's, the header alone is read, so this takes no longer for a large
    file. (A state dict of ``torch.save`` has no header; it is read whole.) ``orthoserde inspect PATH`` shows the
    same as a tree.

    Args:
        path: The file, the folder or index of shards, of which all headers are read, or a folder that pyreft wrote.

    Returns:
        Its tensors, parametrized tensors with their configuration, ties, modules and metadata. Of a file of another
        library, names, shapes and dtypes are all there is to say (``has_configuration`` is False).

    Raises:
        CheckpointNotFoundError: There is no such file.
        FileAccessError: The system refuses to open or read it.
        FileFormatError: Not a checkpoint, a newer format (``FormatVersionError``), or a damaged header
            (``DamagedFileError``). Damage behind the header is for :func:`verify` to find.

    Example:
        >>> import tempfile, torch, orthoserde
        >>> from torch.nn.utils.parametrizations import orthogonal
        >>> model = orthogonal(torch.nn.Linear(8, 4), orthogonal_map="cayley")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report = orthoserde.save(model, f"{folder}/model.safetensors")
        ...     manifest = orthoserde.inspect(f"{folder}/model.safetensors")
        >>> print(manifest)
        3 tensors, 400 bytes, 1 parametrized
          1 x torch>orthogonal
        >>> manifest.parametrized[0].chain[0].config["orthogonal_map"]
        'cayley'
    """
    with open_checkpoint(path) as checkpoint:
        return checkpoint.manifest


def verify(path: str | os.PathLike[str], *, registry: Registry | None = None) -> VerifyReport:
    """Check a file to its last byte, without a model.

    Reading it checks its schema. Then every tensor is held to its digest, and every parametrized tensor that can be
    computed from the file alone to its constraint. Memory holds one parametrized tensor at a time. Computing one takes
    what it takes in training: seconds for a matrix exponential of a few thousand rows.

    Args:
        path: The file, the folder or index of shards, or a folder that pyreft wrote. A file of another library has
            neither digests nor configuration; ``report.digests`` says so.
        registry: Codecs of your own, whose constraints are to be measured; those added to
            ``orthoserde.default_registry`` by default. A class that was merely registered is never built.

    Returns:
        What was found. A damaged tensor, or one that is off its constraint, is an entry of the report.

    Raises:
        CheckpointNotFoundError: There is no such file.
        FileAccessError: The system refuses to open or read it.
        FileFormatError: Not a checkpoint, a newer format (``FormatVersionError``), or its header is damaged
            (``DamagedFileError``), so that nothing can be said of its tensors.

    Example:
        >>> import tempfile, torch, orthoserde
        >>> from torch.nn.utils.parametrizations import orthogonal
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report = orthoserde.save(orthogonal(torch.nn.Linear(8, 4)), f"{folder}/model.safetensors")
        ...     verified = orthoserde.verify(f"{folder}/model.safetensors")
        >>> verified.ok
        True
        >>> verified.residuals["weight"] < 1e-5
        True
    """
    with open_checkpoint(path) as checkpoint:
        return audit.verify(checkpoint, in_process(registry), rotations_of(path, checkpoint))
