"""What a new process takes over from this one, so that it computes the same bits.

The environment, the current folder and ``sys.path`` are not here: multiprocessing hands them over itself.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from orthoserde import _torch

#: Attributes of ``torch.backends`` that decide how numbers are computed.
_FLAGS = (
    "cudnn.enabled",
    "cudnn.benchmark",
    "cudnn.deterministic",
    "cuda.matmul.allow_fp16_reduced_precision_reduction",
    "cuda.matmul.allow_bf16_reduced_precision_reduction",
    "mkldnn.enabled",
    "mkldnn.deterministic",
)

#: The precision of float32. From torch 2.9 on there are newer names, and once one of those has been set the older ones
#: raise when they are asked. So the older come first, and a newer one is set only where it is still another; whole
#: before parts, for setting a whole sets its parts.
_PRECISIONS = (
    "cuda.matmul.allow_tf32",
    "cudnn.allow_tf32",
    "fp32_precision",
    "cuda.matmul.fp32_precision",
    "cudnn.fp32_precision",
    "cudnn.conv.fp32_precision",
    "cudnn.rnn.fp32_precision",
    "mkldnn.fp32_precision",
    "mkldnn.conv.fp32_precision",
    "mkldnn.rnn.fp32_precision",
    "mkldnn.matmul.fp32_precision",
)


@dataclass(frozen=True)
class Settings:
    """Settings of a process.

    Attributes:
        threads: ``torch.get_num_threads``: bits depend on it.
        interop_threads: ``torch.get_num_interop_threads``.
        deterministic: Whether algorithms have to be deterministic.
        warn_only: Whether others only warn.
        fill_uninitialized: Whether uninitialised memory is filled when they have to be.
        flags: Attributes of ``torch.backends`` by dotted name.
        matmul_precision: Precision of float32 products; None where newer names alone say it.
        dtype: The default dtype.
        device: The default device.
    """

    threads: int
    interop_threads: int
    deterministic: bool
    warn_only: bool
    fill_uninitialized: bool
    flags: Mapping[str, object]
    matmul_precision: str | None
    dtype: torch.dtype
    device: str

    def apply(self) -> None:
        """Give them to this process, which has computed nothing yet."""
        torch.set_num_threads(self.threads)
        if torch.get_num_interop_threads() != self.interop_threads:
            torch.set_num_interop_threads(self.interop_threads)
        torch.use_deterministic_algorithms(self.deterministic, warn_only=self.warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = self.fill_uninitialized  # type: ignore[attr-defined]
        if self.matmul_precision is not None and self.matmul_precision != torch.get_float32_matmul_precision():
            torch.set_float32_matmul_precision(self.matmul_precision)
        for name, value in self.flags.items():
            if _flag(name) != value:
                owner, _, attribute = name.rpartition(".")
                setattr(_flag(owner) if owner else torch.backends, attribute, value)
        torch.set_default_dtype(self.dtype)
        # Even setting the default again puts a mode on every call of torch.
        if str(_torch.default_device()) != self.device:
            torch.set_default_device(self.device)

    def described(self) -> dict[str, str]:
        """Those that a report names."""
        sort = "on" if self.deterministic else "off"
        return {
            "torch": str(torch.__version__),
            "threads": str(self.threads),
            "deterministic algorithms": "warn only" if self.deterministic and self.warn_only else sort,
        }


def current() -> Settings:
    """The settings of this process."""
    return Settings(
        threads=torch.get_num_threads(),
        interop_threads=torch.get_num_interop_threads(),
        deterministic=torch.are_deterministic_algorithms_enabled(),
        warn_only=torch.is_deterministic_algorithms_warn_only_enabled(),
        fill_uninitialized=torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
        flags={name: value for name in (*_FLAGS, *_PRECISIONS) if (value := _flag(name)) is not None},
        matmul_precision=_matmul_precision(),
        dtype=torch.get_default_dtype(),
        device=_default_device(),
    )


def _default_device() -> str:
    """The default device, with its index where the process uses one: a new process begins with the first of all."""
    device = _torch.default_device()
    index: int | None = device.index  # torch declares an int
    if device.type == "cuda" and index is None and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        device = torch.device("cuda", torch.cuda.current_device())
    return str(device)


def _flag(name: str) -> Any:
    """An attribute of ``torch.backends``; None where this torch does not have it, or newer names alone say it."""
    found: Any = torch.backends
    try:
        for part in name.split("."):
            found = getattr(found, part, None)
    except RuntimeError:
        return None
    return found


def _matmul_precision() -> str | None:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None


def seed_generators(number: int) -> None:
    """Start every global generator somewhere; what depends on that is not in the checkpoint."""
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number % 2**32)


def other_seed(number: int) -> int:
    """A seed that is not this process's, another one for each number; the same whenever it is asked for."""
    return (torch.initial_seed() ^ (0x5DEECE66D + number)) % 2**63
