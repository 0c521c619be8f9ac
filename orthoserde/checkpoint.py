"""`Checkpoint`: the one value in which everything meets, a manifest and named tensors."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from orthoserde import tensor_bytes
from orthoserde.errors import DamagedFileError
from orthoserde.manifest import Manifest
from orthoserde.side_by_side import GoOn, work_through


class TensorSource(Protocol):
    """The elements of one stored tensor, fetched when asked.

    Attributes:
        any_thread: Whether several threads may read several of them at the same time, with the same bits in the end:
            bytes may be read, but nothing is computed and no memory is shared.
    """

    any_thread: ClassVar[bool]

    def blocks(self) -> Iterator[memoryview]:
        """Yield the elements as row-major bytes."""

    def fill(self, target: Tensor, see: Callable[[memoryview], None] = tensor_bytes.ignore) -> None:
        """Overwrite ``target`` in place, converting the dtype.

        ``see`` is called with each block of bytes that has been read, in row-major order. What it raises ends the
        filling.
        """


@dataclass(frozen=True, slots=True)
class LiveTensor:
    """A tensor in memory, seen as it is at the moment of reading."""

    tensor: Tensor

    any_thread: ClassVar[bool] = False

    def blocks(self) -> Iterator[memoryview]:
        """Yield the elements as row-major bytes."""
        return tensor_bytes.iter_bytes(self.tensor)

    def fill(self, target: Tensor, see: Callable[[memoryview], None] = tensor_bytes.ignore) -> None:
        """Overwrite ``target`` in place with the elements."""
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
            see(memory)

        tensor_bytes.fill(target, self.tensor.dtype, read_into)


@dataclass(frozen=True, slots=True)
class DerivedTensor:
    """A tensor that is worked out whenever it is asked for."""

    compute: Callable[[], Tensor]

    any_thread: ClassVar[bool] = False

    def blocks(self) -> Iterator[memoryview]:
        """Yield the elements as row-major bytes."""
        return LiveTensor(self.compute()).blocks()

    def fill(self, target: Tensor, see: Callable[[memoryview], None] = tensor_bytes.ignore) -> None:
        """Overwrite ``target`` in place with the elements."""
        LiveTensor(self.compute()).fill(target, see)


def _stoppable(blocks: Iterator[memoryview], go_on: GoOn) -> Iterator[memoryview]:
    for block in blocks:
        go_on()
        yield block


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

    def read(self, keys: Iterable[str], *, verify: bool) -> dict[str, Tensor]:
        """Read tensors into memory, large ones of a file several at a time.

        Args:
            keys: Stored keys.
            verify: Whether they are held to their digests.

        Raises:
            DamagedFileError: One has another digest.
        """
        wanted = list(keys)

        def fetch(key: str, go_on: GoOn) -> Tensor:
            record = self.manifest.tensors[key]
            tensor = tensor_bytes.empty_like_recorded(
                record.shape, record.stride, tensor_bytes.DTYPES[record.dtype], "cpu"
            )
            digest = tensor_bytes.Digest()

            def see(block: memoryview) -> None:
                go_on()
                if verify:
                    digest.add(block)

            self.sources[key].fill(tensor, see)
            if verify and record.digest not in (None, str(digest)):
                raise DamagedFileError(f"{self.origin}: {key} is damaged, or changed while it was read")
            return tensor

        def movable(key: str) -> int:
            record = self.manifest.tensors[key]
            plain = record.stride == tensor_bytes.contiguous_strides(record.shape)
            return record.nbytes if plain and self.sources[key].any_thread else 0

        return dict(zip(wanted, work_through(wanted, fetch, movable), strict=True))

    def damaged(self) -> list[str]:
        """Read every tensor that has a digest once; return the keys of those whose bytes are not what was saved.

        Large tensors of a file are read several at a time.

        Returns:
            Their keys, in the order of the manifest.

        Raises:
            FileAccessError: The system refuses to read the file.
            FileFormatError: The file changed meanwhile.
        """
        digests = self.manifest.digests

        def is_damaged(key: str, go_on: GoOn) -> bool:
            return tensor_bytes.digest_of(_stoppable(self.sources[key].blocks(), go_on)) != digests[key]

        def movable(key: str) -> int:
            return self.manifest.tensors[key].nbytes if self.sources[key].any_thread else 0

        keys = list(digests)
        return list(itertools.compress(keys, work_through(keys, is_damaged, movable)))

    def below(self, path: str) -> Checkpoint:
        """The same tensors in names that begin at a module; all of them must be below its path.

        Raises:
            ValueError: A tensor is not below that path.
        """
        sources = {key[len(path) + 1 :]: source for key, source in self.sources.items()}
        return dataclasses.replace(self, manifest=self.manifest.below(path), sources=sources)

    def without_training(self) -> Checkpoint:
        """The same without training state."""
        if self.manifest.training is None:
            return self
        own = set(self.manifest.training_keys)
        tensors = {key: record for key, record in self.manifest.tensors.items() if key not in own}
        manifest = dataclasses.replace(self.manifest, tensors=tensors, training=None)
        return dataclasses.replace(self, manifest=manifest, sources={key: self.sources[key] for key in tensors})

    def snapshot(self, reuse: Checkpoint | None = None) -> Checkpoint:
        """Copy every tensor into memory, so that the result no longer follows the model or needs the file.

        Args:
            reuse: An earlier snapshot, which is not used any more: its memory is overwritten where a tensor is stored
                under the same key with the same dtype, shape and strides. New memory costs several times the copy.
        """
        sources = {key: LiveTensor(self._copied(key, reuse)) for key in self.sources}
        return Checkpoint(self.manifest, sources, self.origin, notes=self.notes)

    def _copied(self, key: str, reuse: Checkpoint | None) -> Tensor:
        """The elements of a stored tensor, in memory of an earlier snapshot if it is of the same form."""
        old = None if reuse is None else reuse.sources.get(key)
        if reuse is None or not isinstance(old, LiveTensor):
            return self.tensor(key)
        record, before = self.manifest.tensors[key], reuse.manifest.tensors[key]
        if (record.dtype, record.shape, record.stride) != (before.dtype, before.shape, before.stride):
            return self.tensor(key)
        self.sources[key].fill(old.tensor)
        return old.tensor

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
