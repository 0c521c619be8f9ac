"""What counts as an optimizer: the same for a save, a load, a diagnosis and a change of charts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias, cast

from torch.optim import Optimizer

from orthoserde.manifest import class_name

#: What a caller may give where all optimizers are asked for that train a model.
Optimizers: TypeAlias = Optimizer | Iterable[Optimizer] | Mapping[str, Optimizer]

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


def optimizers_of(argument: object) -> dict[str, Optimizer]:
    """The optimizers that a caller gave, by what they are called in texts; each once.

    Raises:
        TypeError: It is neither an optimizer nor None, nor are the entries of it, an iterable or a mapping.
    """
    if argument is None:
        return {}
    if isinstance(argument, Mapping):
        named = {f"optimizer {name!r}": each for name, each in argument.items()}
        given = [(label, as_optimizer(each, label)) for label, each in named.items()]
    elif isinstance(argument, Iterable) and not is_optimizer(argument):
        several = [as_optimizer(each, f"optimizer {i}") for i, each in enumerate(argument)]
        given = [(f"optimizer {i} ({type(each).__name__})", each) for i, each in enumerate(several)]
    else:
        single = as_optimizer(argument, "optimizer")
        given = [(type(single).__name__, single)]
    found: dict[str, Optimizer] = {}
    for label, optimizer in given:
        if not any(optimizer is other for other in found.values()):
            found[label] = optimizer
    return found
