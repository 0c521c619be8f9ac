"""Carry a plan out: everything that can fail first, then the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from torch import Tensor, nn

from orthoserde import _torch
from orthoserde.checkpoint import Checkpoint
from orthoserde.errors import DamagedFileError, LoadInterruptedError, UnsupportedModuleError
from orthoserde.restore.plan import Make, Plan, Write
from orthoserde.side_by_side import GoOn, work_through
from orthoserde.tensor_bytes import DTYPES, Digest, empty_like_recorded, is_row_major_memory

Undo = Callable[[], None]


def apply(checkpoint: Checkpoint, plan: Plan, digests: Mapping[str, str], before_writing: Callable[[], Undo]) -> None:
    """Load.

    New tensors are allocated and filled before the model changes. Then meta tensors are replaced and parametrizations
    attached, which can be undone, and last the existing tensors are overwritten, which cannot. Large tensors of a file
    that go into plain memory are read several at a time.

    Args:
        checkpoint: What to load.
        plan: What goes where.
        digests: By stored key, the digests that bytes must have when they have been read.
        before_writing: What else is loaded, when the model has its structure and before tensors are overwritten; it
            returns what undoes it. What it raises is raised here, and the model is as it was.

    Raises:
        DamagedFileError: A new tensor has another digest; the model is as it was.
        UnsupportedModuleError: The structure of the model could not be changed; it is as it was.
        LoadInterruptedError: Reading failed, or was interrupted, while existing tensors were being overwritten.
    """
    made = [(make, _allocate(checkpoint, make)) for make in plan.makes]
    _fill(checkpoint, digests, [(make.stored, tensor) for make, tensor in made])
    restore_structure = _change_structure(plan, made)
    try:
        undo = before_writing()
    except BaseException:
        restore_structure()
        raise
    try:
        _fill(checkpoint, digests, [(write.stored, write.target) for write in plan.writes], plan.sharing_memory)
    except BaseException as error:
        undo()
        raise LoadInterruptedError(
            f"{checkpoint.origin}: loading stopped half-way ({type(error).__name__}: {error}): the model is partly "
            "written; load it again or discard it"
        ) from error
    finally:
        for outcome in plan.outcomes:
            _torch.forget_cached(outcome.module, outcome.tensor_name)


def _allocate(checkpoint: Checkpoint, make: Make) -> Tensor:
    record = checkpoint.manifest.tensors[make.stored]
    return empty_like_recorded(record.shape, record.stride, make.dtype, make.device)


def _fill(
    checkpoint: Checkpoint,
    digests: Mapping[str, str],
    targets: list[tuple[str, Tensor]],
    clusters: Iterable[Iterable[Write]] = (),
) -> None:
    """Fill tensors.

    Args:
        checkpoint: Where the elements come from.
        digests: Those that are compared, by stored key.
        targets: Stored keys, and the tensors that the elements go into.
        clusters: Targets that share memory: what is written last stays, so they are written in the order given.
    """
    in_order = {id(write.target) for cluster in clusters for write in cluster}

    def fill(pair: tuple[str, Tensor], go_on: GoOn) -> None:
        stored, target = pair
        digest = Digest()
        compared = stored in digests

        def see(block: memoryview) -> None:
            go_on()
            if compared:
                digest.add(block)

        checkpoint.sources[stored].fill(target, see)
        if compared and str(digest) != digests[stored]:
            raise DamagedFileError(f"{checkpoint.origin}: {stored} is damaged, or changed while it was read")

    def movable(pair: tuple[str, Tensor]) -> int:
        stored, target = pair
        # Elsewhere bytes are read into memory, no more: what torch computes (other dtypes, strides and devices) and
        # what a subclass of Tensor may do is done under the modes of the caller's thread.
        plain = type(target) in (Tensor, nn.Parameter) and id(target) not in in_order
        record = checkpoint.manifest.tensors[stored]
        if plain and checkpoint.sources[stored].any_thread and is_row_major_memory(target, DTYPES[record.dtype]):
            return record.nbytes
        return 0

    work_through(targets, fill, movable)


def _change_structure(plan: Plan, made: list[tuple[Make, Tensor]]) -> Undo:
    undo: list[Undo] = []

    def restore_structure() -> None:
        with _torch.without_weak_references(plan.holders):
            for step in reversed(undo):
                step()

    with _torch.without_weak_references(plan.holders):
        try:
            for make, tensor in made:
                undo.append(make.place(tensor))
            for attachment in plan.attachments:
                undo.append(attachment.attach())
        except BaseException as error:
            restore_structure()
            if isinstance(error, Exception):
                raise UnsupportedModuleError(
                    f"the model could not be changed, nothing was loaded: {type(error).__name__}: {error}"
                ) from error
            raise
    return restore_structure
