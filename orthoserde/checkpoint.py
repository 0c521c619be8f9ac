"""`Checkpoint`: the one value in which everything meets, a manifest and named tensors.

Note [Torn]
A model that another thread trains while it is saved would be stored half before a step and half after it, without any
error. Torch counts how often a tensor is written to in place, whoever holds it; whoever has read all tensors of a
captured checkpoint compares the counts with those of its capture before the result is taken for whole. Torch counts
when an operation has ended, and one that was at work while its tensor was read may end later: a file compares when its
bytes are on the disk, which is the last moment at which it can be refused. What is written through ``tensor.data`` or
through NumPy is not counted, and an operation that is at work from before its tensor is read until after the comparison
is not seen: on a busy machine its thread may wait for a processor for as long as a small save takes.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

from orthoserde import _torch, tensor_bytes
from orthoserde.errors import DamagedFileError, TornSaveError
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
    """A tensor in memory, seen as it is at the moment of reading.

    Attributes:
        tensor: The tensor.
        version: How often it had been written to in place when this was made; None where torch does not count.
    """

    tensor: Tensor
    version: int | None = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "version", _torch.version_of(self.tensor))

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
        """Read tensors into new memory, as :meth:`fill` does.

        Args:
            keys: Stored keys.
            verify: Whether they are held to their digests.

        Raises:
            DamagedFileError: One has another digest.
        """
        found: dict[str, Tensor] = {}
        for key in keys:
            record = self.manifest.tensors[key]
            dtype = tensor_bytes.DTYPES[record.dtype]
            found[key] = tensor_bytes.empty_like_recorded(record.shape, record.stride, dtype, "cpu")
        self.fill(list(found.items()), self.manifest.digests if verify else {})
        return found

    def fill(
        self,
        targets: Sequence[tuple[str, Tensor]],
        digests: Mapping[str, str],
        in_order: Collection[int] = (),
    ) -> None:
        """Overwrite tensors, large ones of a file several at a time.

        Args:
            targets: Stored keys, and the tensors that the elements go into.
            digests: Those that are compared, by stored key.
            in_order: Ids of targets that are written in the order given, because they share memory: what is written
                last stays.

        Raises:
            DamagedFileError: A tensor had another digest.
        """

        def fill(pair: tuple[str, Tensor], go_on: GoOn) -> None:
            stored, target = pair
            digest = tensor_bytes.Digest()
            compared = stored in digests

            def see(block: memoryview) -> None:
                go_on()
                if compared:
                    digest.add(block)

            self.sources[stored].fill(target, see)
            if compared and str(digest) != digests[stored]:
                raise DamagedFileError(f"{self.origin}: {stored} is damaged, or changed while it was read")

        def movable(pair: tuple[str, Tensor]) -> int:
            stored, target = pair
            # Elsewhere bytes are read into memory, no more: what torch computes (other dtypes, strides and devices) and
            # what a subclass of Tensor may do is done under the modes of the caller's thread.
            plain = type(target) in (Tensor, Parameter) and id(target) not in in_order
            record = self.manifest.tensors[stored]
            dtype = tensor_bytes.DTYPES[record.dtype]
            if plain and self.sources[stored].any_thread and tensor_bytes.is_row_major_memory(target, dtype):
                return record.nbytes
            return 0

        work_through(targets, fill, movable)

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

    def check_unchanged(self) -> None:
        """Hold the tensors of a live model to what they were when it was captured; see Note [Torn].

        Raises:
            TornSaveError: Some have been written to since.
        """
        changed = [
            key
            for key, source in self.sources.items()
            if isinstance(source, LiveTensor) and source.version != _torch.version_of(source.tensor)
        ]
        if changed:
            more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
            raise TornSaveError(
                f"{self.origin}: {changed[0]}{more} changed while it was being saved, so the checkpoint would be of no "
                "one step, and was not written; save between the steps, in the thread that trains, or hold a lock"
            )

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

        Raises:
            TornSaveError: Some tensors changed meanwhile.
        """
        sources = {key: LiveTensor(self._copied(key, reuse)) for key in self.sources}
        self.check_unchanged()
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
