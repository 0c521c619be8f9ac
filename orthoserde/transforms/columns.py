"""Bases that are worked out from their first columns, a few rows at a time, and held to them.

Note [Rows at a time]
A base has n x n elements for n x k columns, so a file of some kilobytes may stand for gigabytes. Whoever reads one does
it in blocks of rows: beside what the base is read into, there are never more than 2 n k numbers in double precision and
some small blocks. Of a batch, one matrix is completed at a time. Columns are checked before anything of that size is
asked for.

Note [Rows by any thread]
Rows come out with the same bits in any thread, see Note [Same bits everywhere] of ``completion``. So those of one
matrix, where a base is read into memory, are shared out, a few blocks at a time, and seen in order.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import Parameter

from orthoserde.checkpoint import Checkpoint, LiveTensor, TensorSource
from orthoserde.errors import DamagedFileError, Problem
from orthoserde.manifest import TensorRecord
from orthoserde.orthonormal.completion import Completion, matrices, row_parts
from orthoserde.parametrizations.orthogonal import OrthogonalCodec
from orthoserde.side_by_side import MOST_THREADS, GoOn, work_through
from orthoserde.tensor_bytes import BLOCK_BYTES, DTYPES, Digest, as_bytes, ignore

#: Bytes of a base that are compared at a time: a base that is another completion is known by the first of them.
COMPARED_BYTES = 1 << 20

#: Bytes of a base that one thread works out at a time, where several do.
SHARED_BYTES = 1 << 20

_CODEC = OrthogonalCodec()


@dataclass(frozen=True)
class ColumnsOfBase:
    """The elements of a base, worked out from its columns whenever they are asked for.

    Attributes:
        key: Key of the columns, for messages.
        source: The columns, ``(..., n, k)``.
        record: What the manifest says of the columns; their digest is compared whenever they are read.
    """

    key: str
    source: TensorSource
    record: TensorRecord

    any_thread: ClassVar[bool] = False

    def columns(self) -> Tensor:
        """The columns, in memory.

        Raises:
            DamagedFileError: They are not those that were saved.
        """
        columns = torch.empty(self.record.shape, dtype=DTYPES[self.record.dtype], device="cpu")
        digest = Digest()
        self.source.fill(columns, digest.add)
        if self.record.digest not in (None, str(digest)):
            raise DamagedFileError(f"{self.key}: its bytes are not those that were saved; use another copy")
        return columns

    def blocks(self) -> Iterator[memoryview]:
        """Yield the elements as row-major bytes."""
        return (as_bytes(rows) for _, _, rows in _completed(self.columns(), BLOCK_BYTES))

    def fill(self, target: Tensor, see: Callable[[memoryview], None] = ignore) -> None:
        """Overwrite ``target`` in place with the elements."""
        columns = self.columns()

        def work(block: _Block, go_on: GoOn) -> Tensor:
            go_on()
            rows = block.rows()
            # Views of a tensor made in inference mode can only be written there.
            with torch.inference_mode(target.is_inference()), torch.no_grad():
                target.detach()[block.index][block.part].copy_(rows)
            return rows

        def movable(block: _Block) -> int:
            plain = type(target) in (Tensor, Parameter) and target.device.type == "cpu"
            return block.bytes_moved if plain else 0

        # See Note [Rows by any thread].
        for index in matrices(columns.shape[:-2]):
            blocks = _blocks(columns, index, SHARED_BYTES)
            while at_a_time := list(itertools.islice(blocks, MOST_THREADS)):
                for rows in work_through(at_a_time, work, movable):
                    see(as_bytes(rows))


def admitted(columns: Tensor) -> bool:
    """Whether columns are finite, and orthonormal but for rounding: see Note [Rounding or damage]."""
    return bool(torch.isfinite(torch.view_as_real(columns) if columns.is_complex() else columns).all()) and (
        _CODEC.admits(columns, {})
    )


def check_columns(checkpoint: Checkpoint, key: str) -> Problem | None:
    """Whether a base can be worked out: nothing is, where its columns are damaged or senseless.

    Args:
        checkpoint: An expanded one.
        key: A stored key of it; of anything but a base that is worked out nothing is said.

    Raises:
        DamagedFileError: The columns are not those that were saved.
    """
    source = checkpoint.sources[key]
    if not isinstance(source, ColumnsOfBase) or admitted(source.columns()):
        return None
    return Problem(
        source.key,
        "mismatch",
        "the columns of its base in the file are not finite or not orthonormal: they are damaged",
    )


def is_completion(source: TensorSource, columns: Tensor, go_on: GoOn) -> bool:
    """Whether a base is the canonical completion of its first columns, bit for bit.

    It is compared row block by row block, and the first difference ends it.

    Args:
        source: The base, ``(..., n, n)``, of the columns' dtype.
        columns: Its first columns, ``(..., n, k)`` with ``k < n``.
        go_on: Called between steps.
    """
    rows_of = _reader(source, columns.size(-2), columns.dtype)
    for index, part, rows in _completed(columns, COMPARED_BYTES):
        go_on()
        if not _same_bits(rows, rows_of(index, part)):
            return False
    return True


def first_columns(source: TensorSource, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The first columns of a base: a view of one in memory, else a new tensor.

    Args:
        source: The base, ``(..., n, n)``.
        shape: Shape of the columns, ``(..., n, k)``.
        dtype: dtype of the base.
    """
    n, k = shape[-2:]
    if isinstance(source, LiveTensor):
        return source.tensor.detach()[..., :k]
    columns = torch.empty(tuple(shape), dtype=dtype, device="cpu")
    rows_of = _reader(source, n, dtype)
    for index in matrices(columns.shape[:-2]):
        for part in row_parts(0, n, n):
            columns[index][part] = rows_of(index, part)[:, :k]
    return columns


def _reader(source: TensorSource, n: int, dtype: torch.dtype) -> Callable[[tuple[int, ...], slice], Tensor]:
    """What gives some rows of one of the matrices of a base; asked for in row-major order, none left out."""
    if isinstance(source, LiveTensor):
        tensor = source.tensor.detach()
        return lambda index, part: tensor[index][part]
    blocks = source.blocks()
    pending = memoryview(b"")

    def read(index: tuple[int, ...], part: slice) -> Tensor:
        nonlocal pending
        rows = torch.empty(part.stop - part.start, n, dtype=dtype, device="cpu")
        memory = as_bytes(rows)
        while memory:
            pending = pending or next(blocks)
            step = min(len(pending), len(memory))
            memory[:step] = pending[:step]
            memory, pending = memory[step:], pending[step:]
        return rows

    return read


@dataclass(frozen=True)
class _Block:
    """Some rows of one of the matrices of a base.

    Attributes:
        index: Which of the matrices.
        part: Which of its rows.
        columns: The columns of the matrix, ``(n, k)``.
        completion: Their completion.
    """

    index: tuple[int, ...]
    part: slice
    columns: Tensor
    completion: Completion

    @property
    def bytes_moved(self) -> int:
        """Bytes that are read and written for it: for each column all of them, in double precision."""
        numbers: int = (self.part.stop - self.part.start) * self.columns.size(0)
        return 16 * numbers * (self.columns.size(1) + 1)

    def rows(self) -> Tensor:
        """Work them out."""
        n, k = self.columns.shape
        rows = torch.empty(self.part.stop - self.part.start, n, dtype=self.columns.dtype, device="cpu")
        rows[:, :k] = self.columns[self.part]
        for part in row_parts(self.part.start, self.part.stop, n - k):
            rows[part.start - self.part.start : part.stop - self.part.start, k:] = self.completion.rows(part)
        return rows


def _blocks(columns: Tensor, index: tuple[int, ...], block_bytes: int) -> Iterator[_Block]:
    """The blocks of rows of one of the matrices of a base, in order."""
    n = columns.size(-2)
    step = max(1, block_bytes // (n * columns.element_size()))
    completion = Completion(columns[index])
    for start in range(0, n, step):
        yield _Block(index, slice(start, min(start + step, n)), columns[index], completion)


def _completed(columns: Tensor, block_bytes: int) -> Iterator[tuple[tuple[int, ...], slice, Tensor]]:
    """The completed columns, block by block of rows, in row-major order; see Note [Rows at a time]."""
    for index in matrices(columns.shape[:-2]):
        # A loop would hold the last block of one matrix, and so its completion, while the next is completed.
        yield from ((index, block.part, block.rows()) for block in _blocks(columns, index, block_bytes))


def _same_bits(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors of one shape and dtype have the same bits, those of NaN and of zeros included."""
    return torch.equal(_as_integers(left), _as_integers(right))


def _as_integers(tensor: Tensor) -> Tensor:
    plain = tensor.resolve_conj().resolve_neg().cpu()
    real = torch.view_as_real(plain) if plain.is_complex() else plain
    return real.view(torch.int32 if real.element_size() == 4 else torch.int64)
