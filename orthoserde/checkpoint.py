"""`Checkpoint`: the one value in which everything meets, a manifest and named tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol

import torch
from torch import Tensor

from orthoserde import tensor_bytes
from orthoserde.manifest import Manifest


class TensorSource(Protocol):
    """The elements of one stored tensor, fetched when asked."""

    def blocks(self) -> Iterator[memoryview]:
        """Yield the elements as row-major bytes."""

    def fill(self, target: Tensor) -> str:
        """Overwrite ``target`` in place, converting the dtype; return the digest of the bytes that were read."""


@dataclass(frozen=True, slots=True)
class LiveTensor:
    """A tensor in memory, seen as it is at the moment of reading."""

    tensor: Tensor

    def blocks(self) -> Iterator[memoryview]:
        """Yield the elements as row-major bytes."""
        return tensor_bytes.iter_bytes(self.tensor)

    def fill(self, target: Tensor) -> str:
        """Overwrite ``target`` in place with the elements; return the digest of what was read."""
        blocks = self.blocks()
        pending = memoryview(b"")

        def read_into(memory: memoryview) -> None:
            nonlocal pending
            done = 0
            while done < len(memory):
                if not pending:
                    pending = next(blocks)
                step = min(len(pending), len(memory) - done)
                memory[done : done + step] = pending[:step]
                pending = pending[step:]
                done += step

        return tensor_bytes.fill(target, self.tensor.dtype, read_into)


def _nothing_to_close() -> None:
    return


@dataclass(frozen=True)
class Checkpoint:
    """A manifest and the tensors it names.

    A checkpoint read from a file owns the open file until it is closed (it is a context manager). A captured one is a
    live view of the model: nothing is copied until a sink asks.

    Attributes:
        manifest: What the tensors mean.
        sources: By stored key, in the order of the manifest.
        origin: Where it came from, for messages: a path or the class of a model.
        notes: What whoever loads it should know of its source, one sentence each.
    """

    manifest: Manifest
    sources: Mapping[str, TensorSource]
    origin: str
    on_close: Callable[[], None] = field(default=_nothing_to_close, repr=False)
    notes: tuple[str, ...] = ()

    def tensor(self, key: str) -> Tensor:
        """Return a new CPU tensor with the elements, dtype, shape and strides recorded under ``key``.

        Args:
            key: A stored key or an alias of one.

        Raises:
            KeyError: Nothing is stored under that key.
        """
        kept = self.manifest.kept_key(key)
        record = self.manifest.tensors[kept]
        dtype = tensor_bytes.DTYPES[record.dtype]
        with torch.inference_mode(False):
            tensor = tensor_bytes.empty_like_recorded(record.shape, record.stride, dtype, "cpu")
            self.sources[kept].fill(tensor)
        return tensor

    def damaged(self) -> list[str]:
        """Read every tensor that has a digest once; return the keys of those whose bytes are not what was saved.

        Raises:
            FileAccessError: The system refuses to read the file.
            FileFormatError: The file changed meanwhile.
        """
        return [
            key
            for key, record in self.manifest.tensors.items()
            if record.digest is not None and tensor_bytes.digest_of(self.sources[key].blocks()) != record.digest
        ]

    def below(self, path: str) -> Checkpoint:
        """The same tensors in names that begin at a module; all of them must be below its path.

        Raises:
            ValueError: A tensor is not below that path.
        """
        sources = {key[len(path) + 1 :]: source for key, source in self.sources.items()}
        return dataclasses.replace(self, manifest=self.manifest.below(path), sources=sources)

    def snapshot(self) -> Checkpoint:
        """Copy every tensor into memory, so that the result no longer follows the model or needs the file."""
        sources = {key: LiveTensor(self.tensor(key)) for key in self.sources}
        return Checkpoint(self.manifest, sources, self.origin, notes=self.notes)

    def close(self) -> None:
        """Release the file, if there is one. Closing twice is harmless."""
        self.on_close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
