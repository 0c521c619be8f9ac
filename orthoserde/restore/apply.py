"""Carry a plan out: everything that can fail first, then the model."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from orthoserde import _torch
from orthoserde.checkpoint import Checkpoint
from orthoserde.errors import DamagedFileError, LoadInterruptedError, UnsupportedModuleError
from orthoserde.restore.plan import Make, Plan
from orthoserde.tensor_bytes import empty_like_recorded


def apply(checkpoint: Checkpoint, plan: Plan) -> None:
    """Load.

    New tensors are allocated and filled before the model changes. Then meta tensors are replaced and parametrizations
    attached, which can be undone, and last the existing tensors are overwritten, which cannot.

    Raises:
        UnsupportedModuleError: The structure of the model could not be changed; it is as it was.
        LoadInterruptedError: Reading failed, or was interrupted, while existing tensors were being overwritten.
    """
    made = [(make, _made(checkpoint, make)) for make in plan.makes]
    _change_structure(plan, made)
    try:
        for write in plan.writes:
            _fill(checkpoint, write.stored, write.target)
    except BaseException as error:
        raise LoadInterruptedError(
            f"{checkpoint.origin}: loading stopped half-way ({type(error).__name__}: {error}): the model is partly "
            "written; load it again or discard it"
        ) from error
    finally:
        for outcome in plan.outcomes:
            _torch.forget_cached(outcome.module, outcome.tensor_name)


def _made(checkpoint: Checkpoint, make: Make) -> Tensor:
    record = checkpoint.manifest.tensors[make.stored]
    tensor = empty_like_recorded(record.shape, record.stride, make.dtype, make.device)
    _fill(checkpoint, make.stored, tensor)
    return tensor


def _fill(checkpoint: Checkpoint, stored: str, target: Tensor) -> None:
    digest = checkpoint.manifest.tensors[stored].digest
    found = checkpoint.sources[stored].fill(target)
    if digest is not None and found != digest:
        raise DamagedFileError(f"{checkpoint.origin}: {stored} is damaged, or changed while it was read")


def _change_structure(plan: Plan, made: list[tuple[Make, Tensor]]) -> None:
    undo: list[Callable[[], None]] = []
    with _torch.without_weak_references(plan.holders):
        try:
            for make, tensor in made:
                undo.append(make.place(tensor))
            for attachment in plan.attachments:
                undo.append(attachment.attach())
        except BaseException as error:
            for step in reversed(undo):
                step()
            if isinstance(error, Exception):
                raise UnsupportedModuleError(
                    f"the model could not be changed, nothing was loaded: {type(error).__name__}: {error}"
                ) from error
            raise
