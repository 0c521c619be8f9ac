"""The only user of torch's private names, each with what it is relied on for.

Sources: torch/nn/modules/module.py, torch/nn/utils/parametrize.py, torch/nn/utils/parametrizations.py,
torch/nn/modules/rnn.py and torch/utils/checkpoint.py, read in torch 2.3.1 to 2.15.0.
"""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode
from torch.utils._pytree import tree_leaves

OrthogonalModule: type[nn.Module] = parametrizations._Orthogonal
WeightNormModule: type[nn.Module] = parametrizations._WeightNorm
SpectralNormModule: type[nn.Module] = parametrizations._SpectralNorm

#: Maps of ``parametrizations.orthogonal`` by name.
ORTHOGONAL_MAPS: dict[str, Any] = dict(parametrizations._OrthMaps.__members__)

#: Torch's own test of orthonormal columns, within 10 n eps, and its Q factor, whose R has a positive diagonal.
is_orthogonal: Callable[[Tensor], bool] = parametrizations._is_orthogonal
make_orthogonal: Callable[[Tensor], Tensor] = parametrizations._make_orthogonal

# Wrappers that hold one module and no state of their own: module and name of the class, attribute with the module.
_WRAPPERS = (
    ("torch._dynamo.eval_frame", "OptimizedModule", "_orig_mod"),
    ("torch.nn.parallel.distributed", "DistributedDataParallel", "module"),
    ("torch.nn.parallel.data_parallel", "DataParallel", "module"),
    (
        "torch.distributed.algorithms._checkpoint.checkpoint_wrapper",
        "ActivationWrapper",
        "_checkpoint_wrapped_module",
    ),
)


def unwrap(module: nn.Module) -> nn.Module:
    """The module inside of ``torch.compile``, DDP, DataParallel and activation checkpointing, at any depth."""
    while True:
        for module_name, class_name, attribute in _WRAPPERS:
            # A wrapper whose module was never imported cannot be here, so nothing is imported to ask.
            wrapper = getattr(sys.modules.get(module_name), class_name, None)
            if wrapper is not None and isinstance(module, wrapper) and _holds_only(module, attribute):
                module = cast("nn.Module", module._modules[attribute])
                break
        else:
            return module


def _holds_only(module: nn.Module, attribute: str) -> bool:
    """Whether a wrapper is no more than that: a subclass of the user's may hold state of its own."""
    return set(module._modules) == {attribute} and not module._parameters and not module._buffers


def version_of(tensor: Tensor) -> int | None:
    """How often a tensor, or any view of it, has been written to in place; None where torch does not count."""
    return None if tensor.is_inference() else tensor._version


def has_nonzero(tensor: Tensor) -> bool:
    """Whether an element is not zero; for a complex tensor, torch 2.3 warns in ``any`` of what it does itself."""
    return bool(torch.count_nonzero(tensor.detach()))


def is_ddp(module: nn.Module) -> bool:
    """Whether DistributedDataParallel wraps a model or a part of it."""
    ddp = getattr(sys.modules.get("torch.nn.parallel.distributed"), "DistributedDataParallel", None)
    return ddp is not None and any(isinstance(part, ddp) for part in module.modules())


def is_fsdp1(module: nn.Module) -> bool:
    """Whether the module is the FullyShardedDataParallel wrapper, whose parameters are shards of flat ones."""
    fsdp = sys.modules.get("torch.distributed.fsdp.fully_sharded_data_parallel")
    wrapper = getattr(fsdp, "FullyShardedDataParallel", None)
    return wrapper is not None and isinstance(module, wrapper)


def child_modules(module: nn.Module) -> dict[str, nn.Module]:
    """Direct children by name; an overridden ``named_modules`` or ``named_children`` has no say."""
    return {name: child for name, child in module._modules.items() if child is not None}


def forward_pre_hooks(module: nn.Module) -> list[object]:
    """What is called before the forward of this very module, in order."""
    return list(module._forward_pre_hooks.values())


def pruned_names(module: nn.Module) -> list[str]:
    """Names of the tensors of this very module that ``torch.nn.utils.prune`` masks."""
    return [hook._tensor_name for hook in forward_pre_hooks(module) if isinstance(hook, prune.BasePruningMethod)]


def own_parameters(module: nn.Module) -> dict[str, Tensor]:
    """Parameters registered on this very module; an overridden ``named_parameters`` has no say."""
    return {name: parameter for name, parameter in module._parameters.items() if parameter is not None}


def own_buffers(module: nn.Module) -> dict[str, Tensor | None]:
    """Persistent buffers registered on this very module, with those that are None."""
    hidden = module._non_persistent_buffers_set
    return {name: buffer for name, buffer in module._buffers.items() if name not in hidden}


def own_transient_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Non-persistent buffers registered on this very module."""
    hidden = module._non_persistent_buffers_set
    return {name: buffer for name, buffer in module._buffers.items() if name in hidden and buffer is not None}


def set_buffer(module: nn.Module, name: str, buffer: Tensor | None) -> None:
    """Put a tensor into a buffer's slot, without what ``__setattr__`` overrides would make of it."""
    module._buffers[name] = buffer


def remember_module(module: nn.Module) -> Callable[[], None]:
    """Remember the class and all attributes of this very module, and what its tables hold; the result puts it back."""
    cls, attributes = type(module), dict(vars(module))
    tables = [(table, dict(table)) for table in attributes.values() if isinstance(table, dict)]

    def put_back() -> None:
        module.__class__ = cls
        vars(module).clear()
        vars(module).update(attributes)
        for table, copy in tables:
            table.clear()
            table.update(copy)

    return put_back


def saves_itself(module: nn.Module) -> bool:
    """Whether the class has its own ``_save_to_state_dict``, so that its state may be elsewhere than in tensors."""
    return type(module)._save_to_state_dict is not nn.Module._save_to_state_dict


def saved_by_itself(module: nn.Module) -> dict[str, object]:
    """What the module's own ``_save_to_state_dict``, called on it alone, writes."""
    destination: dict[str, object] = {}
    module._save_to_state_dict(destination, "", keep_vars=True)
    return destination


def has_extra_state(module: nn.Module) -> bool:
    """Whether the class, or this very module, keeps extra state (``get_extra_state``)."""
    return "get_extra_state" in vars(module) or type(module).get_extra_state is not nn.Module.get_extra_state


def state_of_its_own(module: nn.Module) -> list[str]:
    """Names of the state-dict entries that a module makes itself, beside its tensors."""
    own = [] if is_fsdp1(module) or not saves_itself(module) else list(saved_by_itself(module))
    extra = ["_extra_state"] if has_extra_state(module) else []
    return [*own, *extra]


def overrides_dispatch(tensor: Tensor) -> bool:
    """Whether a tensor subclass computes for itself (DTensor, fake), so that its memory is not its elements."""
    return type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__


def parametrization_lists(module: nn.Module) -> dict[str, parametrize.ParametrizationList]:
    """ParametrizationLists of a module by tensor name, empty where it is not parametrized."""
    # What is registered counts: a wrapper may forward the attribute of another module, as is_parametrized asks for it.
    if "parametrizations" not in module._modules:  # TorchScript's table of modules has no get
        return {}
    lists = module._modules["parametrizations"]
    if not isinstance(lists, nn.ModuleDict):
        return {}
    return {
        name: child
        for name, child in child_modules(lists).items()
        if isinstance(child, parametrize.ParametrizationList)
    }


def all_parametrizations(model: nn.Module) -> Iterator[parametrize.ParametrizationList]:
    """Every ParametrizationList in a model, once, without names: a fraction of the time of a walk."""
    seen: set[int] = set()
    pending = [model]
    while pending:
        module = pending.pop()
        if id(module) not in seen:
            seen.add(id(module))
            if isinstance(module, parametrize.ParametrizationList):
                yield module
            pending.extend(child for child in module._modules.values() if child is not None)


def original_names(parametrized: parametrize.ParametrizationList) -> list[str]:
    """Names of the unconstrained tensors: ``original``, or ``original0``, ``original1``, ..."""
    if parametrized.is_tensor:
        return ["original"]
    return [f"original{i}" for i in range(parametrized.ntensors)]


def class_before_parametrizations(module: nn.Module) -> type[nn.Module]:
    """The class that the module had before one of its tensors was parametrized."""
    cls = type(module)
    # Registering makes a class on the fly, of which the class before is the one base.
    return cls.__bases__[0] if parametrization_lists(module) else cls


def is_caching() -> bool:
    """Whether this is inside of ``parametrize.cached()``."""
    return parametrize._cache_enabled > 0


def caches_for_another(module: nn.Module, tensor_name: str) -> bool:
    """Whether ``parametrize.cached()`` keeps the weight under the id of another module, of which this is a copy.

    ``_inject_property`` closes over the module; where a torch release does that otherwise, the answer is no.
    """
    found: object = vars(type(module)).get(tensor_name)
    for name in ("fget", "get_cached_parametrization", "module"):
        found = getattr(found, name, None) if isinstance(found, property) else _closed_over(found, name)
    return isinstance(found, nn.Module) and found is not module


def _closed_over(function: object, name: str) -> object:
    """What a function has taken from around it under a name; None where there is nothing of that name."""
    names = getattr(getattr(function, "__code__", None), "co_freevars", ())
    cells = getattr(function, "__closure__", None) or ()
    return dict(zip(names, cells, strict=True))[name].cell_contents if name in names else None


def forget_cached(module: nn.Module, tensor_name: str) -> None:
    """Drop the value that ``parametrize.cached()`` holds for a tensor, which a load has made stale."""
    parametrize._cache.pop((id(module), tensor_name), None)


@contextlib.contextmanager
def without_weak_references(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Let RNNs drop the weak references to their weights for a while: with them, the weights could not be swapped.

    Swapping keeps the objects, so the lists from which the references are made again stay true.
    """
    rnns = [module for module in modules if isinstance(module, nn.RNNBase)]
    for rnn in rnns:
        rnn._flat_weight_refs.clear()
    try:
        yield
    finally:
        for rnn in rnns:
            rnn._flat_weight_refs.extend(None if w is None else weakref.ref(w) for w in rnn._flat_weights)


def can_swap(tensor: Tensor) -> bool:
    """Whether no weak reference and no graph holds on to a tensor, so that it can be swapped."""
    use_count = getattr(tensor, "_use_count", None)  # torch 2.3 counts in C++ alone, while it swaps
    return not weakref.getweakrefs(tensor) and (use_count is None or use_count() <= 1)


def swap(tensor: Tensor, other: Tensor) -> None:
    """Exchange two tensors behind their Python objects, so that whoever holds the one object holds the other tensor."""
    torch.utils.swap_tensors(tensor, other)  # type: ignore[no-untyped-call]


def in_fake_mode() -> bool:
    """Whether this is inside of FakeTensorMode."""
    fake = getattr(sys.modules.get("torch._subclasses.fake_tensor"), "FakeTensorMode", None)
    mode: object = _get_current_dispatch_mode()
    return fake is not None and isinstance(mode, fake)


def default_device() -> torch.device:
    """The device that new tensors are made on unless told otherwise, as it was set, and without making one.

    ``torch.get_default_device`` makes one, which fails, or begins a CUDA context, where the device is not in use. A
    device that was set without an index has none: which it is, the library of the device says when a tensor is made.
    """
    # The innermost is the last; it is asked first, and what it has said the others leave.
    for mode in reversed(_get_current_function_mode_stack()):  # type: ignore[no-untyped-call]
        if isinstance(mode, DeviceContext):
            return mode.device
    return torch.device(torch._C._get_default_device())


class LargestTensor(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside of it, notes the size of the largest tensor that any operation returns.

    On the meta device that tells what a computation would allocate at once, before anything is allocated.

    Attributes:
        nbytes: Bytes of the largest tensor so far.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.nbytes = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation and look at its results."""
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() * leaf.element_size() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.nbytes = max([self.nbytes, *sizes])
        return result


class AtLeastFloat32(nn.Module):
    """A module whose tensors, and those of its children, no cast takes below float32.

    ``half()``, ``bfloat16()`` and ``to(dtype)`` all go through ``_apply``, which hands one function to every tensor.
    A cast of an enclosing module comes here too. What a cast to float16 or bfloat16 would have taken is moved to the
    same device and stops at float32.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def cast_no_further(tensor: Tensor) -> Tensor:
            applied = fn(tensor)
            if applied.dtype not in (torch.float16, torch.bfloat16):
                return applied
            return tensor.to(applied.device, torch.float32)

        return super()._apply(cast_no_further, recurse)  # type: ignore[no-untyped-call]


class NoticesCasts(nn.Module):
    """A module that is told when a cast or a move (``to``, ``double``, ``to_empty``) may have changed its tensors."""

    def after_cast(self) -> None:
        """Called with the new tensors in place."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        result = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.after_cast()
        return result


def forget_old_weight_norm(module: nn.Module, tensor_name: str) -> None:
    """Take off what ``parametrizations.weight_norm`` has registered on a module to load state dicts of the older hook.

    Torch leaves it there when the parametrization is removed, and with it the module cannot be pickled.
    """
    for key, wrapped in list(module._load_state_dict_pre_hooks.items()):
        hook = getattr(wrapped, "hook", wrapped)
        name = getattr(hook, "__qualname__", "")
        if name == "weight_norm.<locals>._weight_norm_compat_hook" and _closed_over(hook, "name") == tensor_name:
            del module._load_state_dict_pre_hooks[key]


def remove_hooks(module: nn.Module, mine: Callable[[object], bool]) -> None:
    """Take the forward hooks and forward pre-hooks of which ``mine`` is true off this very module.

    Handles would do, but a deepcopy of a module copies its hooks and not the handles that someone holds.
    """
    for hooks, *flags in (
        (module._forward_hooks, module._forward_hooks_with_kwargs, module._forward_hooks_always_called),
        (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
    ):
        for key in [key for key, hook in hooks.items() if mine(hook)]:
            del hooks[key]
            for flag in flags:
                flag.pop(key, None)


def backward_id() -> int:
    """Number of the backward pass that is running in this thread, -1 where none is.

    Activation checkpointing recomputes inside of one; torch/utils/checkpoint.py asks the same function.
    """
    return torch._C._current_graph_task_id()


def forget_compiled() -> None:
    """Make ``torch.compile`` look at its modules again: it does not notice hooks that come or go after a first call.

    Source: ``skip_nnmodule_hook_guards`` in torch/_dynamo/config.py, True by default.
    """
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
