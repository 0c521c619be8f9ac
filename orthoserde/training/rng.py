"""States of the random generators that training draws from: torch on CPU and every CUDA device, Python, NumPy."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from orthoserde.errors import ConfigError


def states() -> dict[str, object]:
    """The states as a tree: tensors, numbers and strings.

    ``torch`` and ``cuda`` are as ``get_rng_state`` returns them, uint8; the words of ``python`` and ``numpy``, Mersenne
    twisters of 624 words of 32 bits, are int64.
    """
    version, words, gauss = random.getstate()
    state = np.random.get_state(legacy=True)
    if isinstance(state, dict):
        raise ConfigError(
            f"rng: NumPy's global generator is a {state['bit_generator']}, expected its own MT19937; use rng=False"
        )
    name, keys, position, has_gauss, cached = cast("tuple[str, Any, int, int, float]", state)
    return {
        "torch": torch.get_rng_state(),
        "cuda": list(torch.cuda.get_rng_state_all()) if torch.cuda.is_available() else [],
        "python": {"version": version, "words": torch.tensor(words, dtype=torch.int64, device="cpu"), "gauss": gauss},
        "numpy": {
            "name": name,
            "words": torch.tensor(keys.astype(np.int64), dtype=torch.int64, device="cpu"),
            "position": position,
            "has_gauss": has_gauss,
            "gauss": cached,
        },
    }


class States:
    """States of generators that have been tried, and will not be refused when they are set.

    Args:
        tree: As :func:`states` returned it, or whatever a file holds.

    Raises:
        ValueError: It is none that the generators of this process take, with why.
    """

    def __init__(self, tree: object) -> None:
        try:
            parts = cast("Mapping[str, Any]", tree)
            self._torch = _bytes_of(parts["torch"])
            self._cuda = [_bytes_of(state) for state in parts["cuda"]]
            python, numpy = parts["python"], parts["numpy"]
            self._python = (python["version"], tuple(_words(python["words"], 625)), python["gauss"])
            words = np.array(_words(numpy["words"], 624), dtype=np.uint32)
            self._numpy = (numpy["name"], words, numpy["position"], numpy["has_gauss"], numpy["gauss"])
            _check_numbers(self._python, self._numpy, parts["cuda"])
            # Generators of their own say whether they would take them.
            torch.Generator("cpu").set_state(self._torch)
            random.Random().setstate(self._python)
            np.random.RandomState().set_state(self._numpy)
        except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise ValueError(f"not states of random generators ({type(error).__name__}: {error})") from error
        if isinstance(np.random.get_state(legacy=True), dict):
            raise ValueError("NumPy's global generator here is not its own MT19937; use rng=False")  # noqa: TRY004
        devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if len(self._cuda) != devices:
            raise ValueError(
                f"states of {len(self._cuda)} CUDA devices in the file, {devices} devices here; load with rng=False"
            )

    def set(self) -> None:
        """Put the generators into these states."""
        torch.set_rng_state(self._torch)
        if self._cuda:
            torch.cuda.set_rng_state_all(self._cuda)
        random.setstate(self._python)
        np.random.set_state(self._numpy)


def _check_numbers(python: tuple[Any, ...], numpy: tuple[Any, ...], cuda: object) -> None:
    """What the generators do not check themselves; NumPy would read outside of its words."""
    version, words, gauss = python
    _, _, position, has_gauss, cached = numpy
    if type(version) is not int or version != 3 or not 0 <= words[-1] <= 624:
        raise ValueError("not a state of Python's generator")
    if not (gauss is None or type(gauss) is float):
        raise ValueError("not a state of Python's generator: half of a pair that is no number")
    if type(position) is not int or not 0 <= position <= 624 or has_gauss not in (0, 1) or type(cached) is not float:
        raise ValueError("not a state of NumPy's generator")
    if not isinstance(cuda, list):
        raise ValueError("expected a list of states of CUDA devices")  # noqa: TRY004


def fingerprint() -> tuple[object, ...]:
    """Equal for two moments between which no generator moved."""
    cuda = [state.numpy().tobytes() for state in torch.cuda.get_rng_state_all()] if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    numpy = np.random.get_state(legacy=False)
    parts = {name: each.tobytes() if isinstance(each, np.ndarray) else each for name, each in numpy["state"].items()}
    pair = (numpy.get("has_gauss"), numpy.get("gauss"))
    return (torch.get_rng_state().numpy().tobytes(), random.getstate(), tuple(parts.items()), pair, *cuda)


def _bytes_of(state: Tensor) -> Tensor:
    if state.dtype != torch.uint8 or state.dim() != 1:
        raise ValueError(f"expected bytes, got {state.dtype} of {state.dim()} dimensions")
    return state


def _words(tensor: Tensor, count: int) -> list[int]:
    if tensor.dtype != torch.int64 or tensor.shape != (count,):
        raise ValueError(f"expected {count} words in int64, got {tensor.dtype} of shape {list(tensor.shape)}")
    words = [int(word) for word in tensor.tolist()]
    if not all(0 <= word < 2**32 for word in words):
        raise ValueError("a word of more than 32 bits")
    return words
