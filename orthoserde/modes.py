"""What the caller has switched on in torch has no say: autocast, default devices, inference mode, random generators."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator

import torch

from orthoserde import _torch
from orthoserde.errors import UnsupportedModuleError


@contextlib.contextmanager
def ordinary() -> Iterator[None]:
    """Compute as torch does by default, see :func:`plain_arithmetic`, with ordinary new tensors in inference mode too.

    The random generators are left alone: what is done inside of it draws nothing. Another thread may.
    """
    if _torch.in_fake_mode():  # nothing that is read or written would be the real thing
        raise UnsupportedModuleError("inside of FakeTensorMode there is nothing to save or load; leave it first")
    with torch.inference_mode(False), plain_arithmetic():
        yield


@contextlib.contextmanager
def generators_kept() -> Iterator[None]:
    """Put the random generators (torch on CPU and CUDA, Python, NumPy) back to where they are.

    For code of others, which may draw. The generators belong to the process: what another thread draws meanwhile is
    taken back as well, so as little as can be is done inside of it.
    """
    numpy_random = sys.modules.get("numpy.random")
    python_state = random.getstate()
    numpy_state = numpy_random.get_state() if numpy_random is not None else None
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python_state)
        if numpy_random is not None:
            numpy_random.set_state(numpy_state)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Both: :func:`ordinary`, and :func:`generators_kept`."""
    with ordinary(), generators_kept():
        yield


@contextlib.contextmanager
def plain_arithmetic() -> Iterator[None]:
    """Compute in the dtypes of the tensors, without autocast, and make new tensors on the CPU unless told otherwise."""
    with contextlib.ExitStack() as stack:
        # A mode costs every call of torch a detour through Python, so it is entered only where the default is another.
        if _torch.default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        stack.enter_context(torch.autocast("cpu", enabled=False))
        if torch.cuda.is_available():  # without, torch warns that there is nothing to switch off
            stack.enter_context(torch.autocast("cuda", enabled=False))
        yield


def without_autocast(device_type: str) -> contextlib.AbstractContextManager[object]:
    """Leave autocast on one type of device."""
    try:
        return torch.autocast(device_type, enabled=False)
    except RuntimeError:  # torch knows no autocast for this type of device (meta), so there is none to leave
        return contextlib.nullcontext()


def autocasts(device_type: str) -> bool:
    """Whether autocast is on for a type of device."""
    try:
        return torch.is_autocast_enabled(device_type)
    except TypeError:  # torch 2.3 has one function for each
        return torch.is_autocast_cpu_enabled() if device_type == "cpu" else torch.is_autocast_enabled()
    except RuntimeError:  # torch knows no autocast for this type of device (meta)
        return False
