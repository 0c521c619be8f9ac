"""What counts as an optimizer: the same for a save, a load and a diagnosis."""

from __future__ import annotations

from typing import Any, cast

from torch.optim import Optimizer

from orthoserde.manifest import class_name

#: What every optimizer has, torch's own and those of other libraries, some of which derive from nothing of torch.
_ATTRIBUTES = ("state_dict", "load_state_dict", "param_groups", "state")


def is_optimizer(given: object) -> bool:
    """Whether something has all that an optimizer has."""
    return all(hasattr(given, name) for name in _ATTRIBUTES)


def as_optimizer(given: object, where: str) -> Optimizer:
    """The optimizer that a caller gave. Wrappers of accelerate are taken off.

    Args:
        given: Anything.
        where: What it is called in the error.

    Raises:
        TypeError: It is no optimizer.
    """
    if not is_optimizer(given):
        raise TypeError(f"{where}: expected a torch.optim.Optimizer, got {type(given).__name__}")
    # Accelerate's wrapper hands everything on; it is known by its name, for accelerate is not imported here.
    while class_name(type(given)) == "accelerate.optimizer:AcceleratedOptimizer":
        given = cast("Any", given).optimizer
    return cast("Optimizer", given)
