"""What can only be checked by reading: digests, and stored tensors that must agree."""

from __future__ import annotations

import math

import torch

from orthoserde.checkpoint import Checkpoint
from orthoserde.errors import DamagedFileError
from orthoserde.restore.plan import Plan, Write
from orthoserde.tensor_bytes import digest_of, iter_bytes, span
from orthoserde.transforms import check_columns
from orthoserde.walk import identity
from orthoserde.wording import counted, shorten


def check_digests(checkpoint: Checkpoint) -> None:
    """Read every tensor of a checkpoint once.

    Raises:
        DamagedFileError: Bytes are not those that were saved; every damaged tensor is named.
    """
    damaged = checkpoint.damaged()
    if damaged:
        raise DamagedFileError(
            f"{checkpoint.origin}: the bytes of {counted(len(damaged), 'tensor')} are not those that were saved "
            f"({shorten(damaged)}); nothing was loaded, use another copy of the file"
        )


def check_bases(checkpoint: Checkpoint, plan: Plan) -> None:
    """Find bases that are wanted and cannot be worked out from what the file has of them.

    Raises:
        DamagedFileError: What it has is not what was saved.
    """
    wanted = [make.stored for make in plan.makes] + [write.stored for write in plan.writes]
    plan.problems += filter(None, (check_columns(checkpoint, key) for key in dict.fromkeys(wanted)))


def check_ties(checkpoint: Checkpoint, plan: Plan) -> None:
    """Find stored tensors that differ although they go into the same elements of the model."""
    for tie in plan.ties:
        digests = {_digest(checkpoint, key) for key in tie.stored}
        if len(digests) > 1:
            plan.mismatch(
                tie.key,
                f"one tensor in the model, different ones in the file: {shorten(tie.stored)}; untie them to load both",
            )
    for cluster in plan.sharing_memory:
        if not _agree(checkpoint, cluster):
            names = shorten([write.key for write in cluster])
            plan.mismatch(cluster[0].key, f"shares memory in the model with tensors that differ in the file: {names}")


def _digest(checkpoint: Checkpoint, key: str) -> str:
    return checkpoint.manifest.tensors[key].digest or digest_of(checkpoint.sources[key].blocks())


def _agree(checkpoint: Checkpoint, cluster: list[Write]) -> bool:
    """Whether writing all of them, in scratch memory that is shared the same way, leaves each with its own values."""
    if len({identity(write.target) for write in cluster}) == 1:
        return len({_digest(checkpoint, write.stored) for write in cluster}) == 1
    spans = [span(write.target) for write in cluster]
    base = min(start for start, _ in spans) // 16 * 16
    scratch = torch.empty(math.ceil((max(stop for _, stop in spans) - base) / 16) * 16, dtype=torch.uint8, device="cpu")
    views = [
        torch.as_strided(
            scratch.view(write.target.dtype),
            write.target.shape,
            write.target.stride(),
            (start - base) // write.target.element_size(),
        )
        for write, (start, _) in zip(cluster, spans, strict=True)
    ]
    wanted: list[str] = []
    for write, view in zip(cluster, views, strict=True):
        checkpoint.sources[write.stored].fill(view)
        wanted.append(digest_of(iter_bytes(view)))
    return wanted == [digest_of(iter_bytes(view)) for view in views]
