"""Checkpoints of files that are looked at while they are read: for progress, and for damage."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from orthoserde import tensor_bytes
from orthoserde.checkpoint import Checkpoint, LiveTensor, TensorSource
from orthoserde.errors import DamagedFileError
from orthoserde.tensor_bytes import Digest

#: Is told the bytes of each block that was read, perhaps from several threads.
Progress = Callable[[int], None]


def no_progress(count: int) -> None:
    """Say nothing."""


def watched(checkpoint: Checkpoint, progress: Progress, *, verify: bool) -> Checkpoint:
    """The same checkpoint, whose tensors say how far they are read.

    Args:
        checkpoint: Any; tensors that are in memory are passed on as they are.
        progress: Is told the bytes of each block.
        verify: Whether a tensor that is read to its end is held to its digest, if it has one. So what is written to
            another file, with a new digest, is never damaged.

    Returns:
        A checkpoint of the same origin, whose sources raise ``DamagedFileError`` where that is so.
    """
    sources: dict[str, TensorSource] = {}
    for key, source in checkpoint.sources.items():
        digest = checkpoint.manifest.tensors[key].digest if verify else None
        if isinstance(source, LiveTensor):
            sources[key] = source
            continue
        cls = _AnyThread if source.any_thread else _Watched
        sources[key] = cls(source, progress, digest, f"{checkpoint.origin}: {key}")
    return dataclasses.replace(checkpoint, sources=sources)


@dataclass(frozen=True, slots=True)
class _Watched:
    """The elements of a stored tensor, looked at on their way."""

    source: TensorSource
    progress: Progress
    digest: str | None
    where: str

    any_thread: ClassVar[bool] = False

    def blocks(self) -> Iterator[memoryview]:
        """Yield the elements as row-major bytes."""
        digest = Digest()
        for block in self.source.blocks():
            self._look(block, digest)
            yield block
        self._judge(digest)

    def fill(self, target: Tensor, see: Callable[[memoryview], None] = tensor_bytes.ignore) -> None:
        """Overwrite ``target`` in place with the elements."""
        digest = Digest()

        def look(block: memoryview) -> None:
            self._look(block, digest)
            see(block)

        self.source.fill(target, look)
        self._judge(digest)

    def _look(self, block: memoryview, digest: Digest) -> None:
        if self.digest is not None:
            digest.add(block)
        self.progress(len(block))

    def _judge(self, digest: Digest) -> None:
        if self.digest not in (None, str(digest)):
            raise DamagedFileError(f"{self.where}: its bytes are not those that were saved; use another copy")


class _AnyThread(_Watched):
    """The same for tensors that may be read in any thread."""

    __slots__ = ()

    any_thread: ClassVar[bool] = True
