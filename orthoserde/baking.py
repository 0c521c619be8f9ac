"""Live models to plain ones: parametrizations and hooks removed, the weights left as plain tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import prune, remove_spectral_norm, remove_weight_norm

from orthoserde import _torch, modes
from orthoserde.errors import Problem, UnsupportedModuleError
from orthoserde.integrations import in_process
from orthoserde.keys import prefixes_in, prefixes_of
from orthoserde.manifest import join
from orthoserde.parametrizations import codec_for_type
from orthoserde.parametrizations.hooks import other_hooks
from orthoserde.parametrizing import unregister
from orthoserde.registry import Registry
from orthoserde.reports import BakeReport
from orthoserde.walk import Inventory, ParametrizedTensor, take_inventory
from orthoserde.weights.live import computed, evaluating


def bake_(model: nn.Module, *, registry: Registry | None = None) -> BakeReport:
    """Make a model plain for serving, in place: what parametrizations and hooks compute becomes a plain tensor.

    Weights are those of evaluation mode, bit for bit, and so are the outputs of the model (but for rounding where a
    parametrization gives overlapping memory, which no parameter can have); what constrains them in training is gone.
    Removed are all parametrizations (``torch.nn.utils.parametrize``), torch's older hooks
    (``torch.nn.utils.weight_norm`` and ``spectral_norm``) and pruning (``torch.nn.utils.prune``). Buffers, training
    mode and random state are kept. A tensor that had one original of its dtype keeps its Parameter object.

    Args:
        model: Any module.
        registry: Codecs of your own; those of ``orthoserde.default_registry`` by default. What has none is computed by
            its own code, in evaluation mode.

    Returns:
        What was baked.

    Raises:
        UnsupportedModuleError: Something cannot be computed (on the meta device, an error in a parametrization), an
            original is tied to another tensor, or a hook is one that no parametrization has the state of (of a vector
            or a complex tensor, of a subclass, or with tensors that were taken away). All such are listed, and nothing
            has changed. Nor has it after any other error, or an interrupt.
        TypeError: ``model`` is no module.

    Example:
        >>> import torch, orthoserde
        >>> layer = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(4, 3))
        >>> print(orthoserde.bake_(layer))
        baked 1 tensor: plain now
          weight: torch>weight_norm
          new parameters: weight; build the optimizer anew
        >>> sorted(layer.state_dict())
        ['bias', 'weight']
    """
    registry = in_process(registry)
    with modes.undisturbed(), torch.no_grad():
        survey = _Survey(take_inventory(model))
        tensors, problems = survey.tensors, list(survey.problems())
        weights: list[Tensor] = []
        for tensor in () if problems else tensors:
            try:
                weights.append(_weight_of(tensor, registry))
            except Exception as error:  # whatever a user's parametrization raises
                problems.append(Problem(tensor.name, "unsupported", f"it cannot be computed: {error}"))
        if problems:
            raise UnsupportedModuleError(f"cannot bake {type(model).__qualname__}, which is as it was", problems)
        _change(survey, weights)
        done = {tensor.name: _kinds_of(tensor, registry) for tensor in tensors}
        done |= {join(pruned.paths[0], pruned.name): "pruning, a hook" for pruned in survey.pruned}
    return BakeReport(done, tuple(tensor.name for tensor in tensors if _is_replaced(tensor)))


@dataclass(frozen=True)
class _Pruned:
    """A tensor that is pruned: the paths of its module, the module and its name."""

    paths: tuple[str, ...]
    module: nn.Module
    name: str


class _Survey:
    """What there is to bake, and what is in the way."""

    def __init__(self, inventory: Inventory) -> None:
        self._prefixes = {prefix for tensor in inventory.parametrized for prefix in prefixes_of(tensor)}
        self._places = Counter(id(slot.tensor) for slot in inventory.slots.values())
        modules: dict[int, tuple[nn.Module, list[str]]] = {}
        for path, module in inventory.modules.items():
            modules.setdefault(id(module), (module, []))[1].append(path)
        self._modules = [(module, tuple(paths)) for module, paths in modules.values() if not self._is_part(paths)]
        hooked = [tensor for tensor in inventory.hooked if "0.mask" not in tensor.hook_names]  # what is pruned is below
        both = (*inventory.parametrized, *hooked)
        self.tensors = [tensor for tensor in both if not self._is_part((tensor.module_path, *tensor.aliases))]
        self.pruned = [
            _Pruned(paths, module, name) for module, paths in self._modules for name in _torch.pruned_names(module)
        ]

    def _is_part(self, paths: Iterable[str]) -> bool:
        """Whether a module with these paths stands within parametrizations alone, which go as a whole."""
        return all(not self._prefixes.isdisjoint(prefixes_in(join(path, "_"))) for path in paths)

    def problems(self) -> Iterator[Problem]:
        """What has no values, originals that other tensors are tied to, and hooks that cannot be removed."""
        for tensor in self.tensors:
            if not tensor.hook_names and len(tensor.originals) < _count_of_originals(tensor):
                yield Problem(tensor.name, "unsupported", "an original is no registered tensor, as when it is pruned")
                continue
            found = (self._unfit(original, 1 + len(tensor.aliases)) for original in tensor.originals.values())
            text = next(filter(None, found), None)
            if text is not None:
                yield Problem(tensor.name, "unsupported", text)
        for pruned in self.pruned:
            original = _torch.own_parameters(pruned.module).get(f"{pruned.name}_orig")
            text = "its pruning is not whole" if original is None else self._unfit(original, len(pruned.paths))
            if text is not None:
                yield Problem(join(pruned.paths[0], pruned.name), "unsupported", text)
        for module, paths in self._modules:
            for name in other_hooks(module):
                text = (
                    "its hook is not whole, of a class of your own, or of a vector or complex tensor; remove it before"
                )
                yield Problem(join(paths[0], name), "unsupported", text)

    def _unfit(self, original: Tensor, count: int) -> str | None:
        """Why an original, whose module has so many paths, cannot become the weight."""
        if original.device.type == "meta":
            return "on the meta device, where it has no values; load it first"
        if self._places[id(original)] > count:
            return "its original is tied to another tensor, which would become the weight too; untie it"
        return None


def _change(survey: _Survey, weights: Sequence[Tensor]) -> None:
    """Put the weights in the places of what computes them; what raises on the way, an interrupt too, is undone."""
    undo: list[Callable[[], None]] = []
    try:
        for tensor, weight in zip(survey.tensors, weights, strict=True):
            undo.append(_remembered(tensor.module, tensor.originals.values()))
            if tensor.hook_names:
                _unhook(tensor, weight)
            else:
                unregister(tensor.module, tensor.tensor_name, weight)
        for pruned in survey.pruned:
            undo.append(_remembered(pruned.module, [_torch.own_parameters(pruned.module)[f"{pruned.name}_orig"]]))
            prune.remove(pruned.module, pruned.name)  # type: ignore[no-untyped-call]
    except BaseException:
        for step in reversed(undo):
            step()
        raise


def _remembered(module: nn.Module, originals: Iterable[Tensor]) -> Callable[[], None]:
    """Remember what baking a tensor of a module changes; the result puts it back."""
    lists = _torch.child_modules(module).get("parametrizations")
    modules = [_torch.remember_module(each) for each in (module, lists) if each is not None]
    tensors = [(original, original.data, original.grad, original.requires_grad) for original in originals]

    def put_back() -> None:
        for step in modules:
            step()
        for original, data, grad, requires_grad in tensors:
            original.data = data
            original.requires_grad_(requires_grad)
            original.grad = grad

    return put_back


def _count_of_originals(tensor: ParametrizedTensor) -> int:
    return len(_torch.original_names(_torch.parametrization_lists(tensor.module)[tensor.tensor_name]))


def _is_replaced(tensor: ParametrizedTensor) -> bool:
    """Whether its parameter is another object now."""
    now = _torch.own_parameters(tensor.module).get(tensor.tensor_name)
    return now is not None and all(now is not original for original in tensor.originals.values())


def _weight_of(tensor: ParametrizedTensor, registry: Registry) -> Tensor:
    """The weight as it is in evaluation mode, in memory of its own."""
    weight = computed(tensor, registry)
    if weight is None:
        weight = _evaluated(tensor)
    if weight.layout is not torch.strided:
        raise TypeError(f"it is a tensor of the layout {weight.layout}, which no plain parameter can have here")
    # What was computed may be state itself, another tensor's too, or a small part of a large matrix.
    return weight.detach().clone()


def _evaluated(tensor: ParametrizedTensor) -> Tensor:
    """The weight by the parametrizations' own code, in evaluation mode.

    Raises:
        TypeError: What they compute is no tensor.
    """
    with evaluating(part for link in tensor.parametrizations for part in _torch.unwrap(link).modules()):
        weight: object = _torch.parametrization_lists(tensor.module)[tensor.tensor_name]()
    if not isinstance(weight, Tensor):
        raise TypeError(f"expected a tensor, got a {type(weight).__name__}")
    return weight


def _kinds_of(tensor: ParametrizedTensor, registry: Registry) -> str:
    names: list[str] = []
    for link in tensor.parametrizations:
        cls = _torch.class_before_parametrizations(_torch.unwrap(link))
        codec = codec_for_type(registry, cls)
        names.append(cls.__qualname__ if codec is None else codec.kind)
    return ", then ".join(names) + (", a hook" if tensor.hook_names else "")


def _unhook(tensor: ParametrizedTensor, weight: Tensor) -> None:
    """Let torch remove its hook, and put in the weight of evaluation mode."""
    originals = list(tensor.originals.values())
    module, name = tensor.module, tensor.tensor_name
    vars(module)[name] = weight  # torch takes it away first, and would fail where it has been taken away before
    if isinstance(tensor.parametrizations[0], _torch.WeightNormModule):
        remove_weight_norm(module, name)
    else:
        remove_spectral_norm(module, name)
    if len(originals) == 1:
        setattr(module, name, originals[0])
    plain = _torch.own_parameters(module)[name]
    plain.grad = None
    plain.data = weight
    plain.requires_grad_(any(original.requires_grad for original in originals))
