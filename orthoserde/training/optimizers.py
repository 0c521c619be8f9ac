"""What an optimizer holds, by the names of parameters instead of their numbers.

Note [Names]
``Optimizer.state_dict`` numbers parameters in the order of the groups, and parametrizing a module changes that order: a
state that is loaded by number may end at other parameters of the same shape. Here the numbers are replaced by the keys
that the parameters have in the model, found by identity, and on the way back the numbers are those of the optimizer
that loads. What an optimizer's own ``state_dict`` and ``load_state_dict`` do besides stays theirs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from orthoserde.errors import ConfigError
from orthoserde.json_values import JSON
from orthoserde.manifest import class_name
from orthoserde.manifest.training import GroupRecord, OptimizerRecord
from orthoserde.manifest.trees import check_text, encode_tree
from orthoserde.optimizers import as_optimizer
from orthoserde.training.sources import Sources

#: What a group holds beside its options.
_NOT_OPTIONS = ("params", "param_names")

#: What the ``state_dict`` of every optimizer holds.
_STATE, _GROUPS = "state", "param_groups"


def labelled(optimizer: object) -> dict[str, Optimizer]:
    """Optimizers by name; a single one has the name ``""``. Wrappers of accelerate are taken off.

    Raises:
        TypeError: Something is no optimizer.
    """
    if optimizer is None:
        return {}
    if isinstance(optimizer, (list, tuple, LRScheduler)):
        advice = "it goes into state=" if isinstance(optimizer, LRScheduler) else "several go in by names"
        got = type(optimizer).__name__
        raise TypeError(f"optimizer: expected a torch.optim.Optimizer, got {got}; {advice}")
    found = dict(optimizer) if isinstance(optimizer, Mapping) else {"": optimizer}
    for label in found:
        if not isinstance(label, str) or (isinstance(optimizer, Mapping) and not label):
            raise TypeError(f"optimizer: expected names for optimizers, got {label!r}")
        check_text(label, f"optimizer.{label!r}")
    return {cast("str", label): as_optimizer(each, "optimizer") for label, each in found.items()}


def place_of(label: str) -> str:
    """What messages and keys call an optimizer."""
    return f"optimizer.{label}" if label else "optimizer"


def options_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """All that a group holds but its parameters."""
    return {name: value for name, value in group.items() if name not in _NOT_OPTIONS}


def numbered(optimizer: Optimizer, state_dict: Mapping[str, Any]) -> dict[int, nn.Parameter]:
    """The parameters of an optimizer by the numbers that its ``state_dict`` gives them.

    Raises:
        ConfigError: Its ``state_dict`` is not of the form that torch's optimizers have.
    """
    groups = state_dict.get(_GROUPS)
    live = optimizer.param_groups
    if not isinstance(groups, list) or len(groups) != len(live) or not isinstance(state_dict.get(_STATE), Mapping):
        raise ConfigError(f"the state_dict of {type(optimizer).__name__} has no state and param_groups as torch's has")
    found: dict[int, nn.Parameter] = {}
    for group, own in zip(groups, live, strict=True):
        if len(group["params"]) != len(own["params"]):
            raise ConfigError(f"the state_dict of {type(optimizer).__name__} has other parameters than its groups")
        found.update(zip(group["params"], own["params"], strict=True))
    return found


def record_of(label: str, optimizer: Optimizer, names: Mapping[int, str], sources: Sources) -> OptimizerRecord:
    """Describe an optimizer.

    Args:
        label: Its name.
        optimizer: The optimizer; its ``state_dict`` is asked for.
        names: Keys of the model's parameters by their ids.
        sources: Takes its tensors.

    Raises:
        ConfigError: It holds a parameter that the model does not have, or something that is no tree.
    """
    where = place_of(label)
    state_dict = cast("Mapping[str, Any]", optimizer.state_dict())
    parameters = numbered(optimizer, state_dict)
    orphans = list(_orphans(optimizer, names))
    if orphans:
        raise ConfigError(
            f"{where}: it holds parameters that the model does not have: {', '.join(orphans[:8])}; they were replaced "
            "after it was made, or belong to another module: make it from the parameters of the model that is saved"
        )
    groups = tuple(
        GroupRecord(
            tuple(names[id(parameter)] for parameter in own["params"]),
            encode_tree(options_of(group), f"{where}.groups.{i}", sources.put),
        )
        for i, (group, own) in enumerate(zip(state_dict[_GROUPS], optimizer.param_groups, strict=True))
    )
    state: dict[str, JSON] = {}
    shared: dict[object, object] = {}
    for number, entries in state_dict[_STATE].items():
        parameter = parameters.get(number)
        if parameter is None:
            shared[number] = entries
        else:
            name = names[id(parameter)]
            state[name] = encode_tree(entries, f"{where}.{name}", sources.put)
    rest = {name: value for name, value in state_dict.items() if name not in (_STATE, _GROUPS)}
    tree = encode_tree({"rest": rest, "shared": shared}, where, sources.put)
    return OptimizerRecord(class_name(type(optimizer)), groups, state, tree)


def _orphans(optimizer: Optimizer, names: Mapping[int, str]) -> Iterator[str]:
    for i, group in enumerate(optimizer.param_groups):
        for j, parameter in enumerate(cast("list[Tensor]", group["params"])):
            if id(parameter) not in names:
                yield f"number {j} of group {i}, of shape {list(parameter.shape)}"
