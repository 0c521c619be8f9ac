"""Carry a plan out: everything that can fail first, then the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from orthoserde import _torch, modes
from orthoserde.checkpoint import Checkpoint
from orthoserde.errors import LoadInterruptedError, UnsupportedModuleError
from orthoserde.restore.plan import Make, Plan
from orthoserde.tensor_bytes import empty_like_recorded
from orthoserde.training.undo import Undo


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
    checkpoint.fill([(make.stored, tensor) for make, tensor in made], digests)
    with modes.generators_kept():  # modules are asked, and objects of the user load
        restore_structure = _change_structure(plan, made)
        try:
            undo = before_writing()
        except BaseException:
            restore_structure()
            raise
    try:
        in_order = {id(write.target) for cluster in plan.sharing_memory for write in cluster}
        checkpoint.fill([(write.stored, write.target) for write in plan.writes], digests, in_order)
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


def _change_structure(plan: Plan, made: list[tuple[Make, Tensor]]) -> Undo:
    undo: list[Undo] = []

    def restore_structure() -> None:
        with _torch.without_weak_references(plan.holders):
            for step in reversed(undo):
                step()

    for weight in plan.graphs:
        weight.detach_()
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
