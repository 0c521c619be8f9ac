"""Interventions on a model: attached by forward hooks, saved on their own."""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from orthoserde import _torch
from orthoserde.arguments import check_flags
from orthoserde.errors import AdapterError
from orthoserde.integrations.loreft import hooks
from orthoserde.integrations.loreft.calls import Calls
from orthoserde.integrations.loreft.layers import check_layers, find_layers
from orthoserde.integrations.loreft.module import LoReFT
from orthoserde.integrations.loreft.positions import Positions, parse
from orthoserde.json_values import JSON
from orthoserde.registry import default_registry, register

#: Every adapter that is attached, so that one does not thaw what another keeps frozen.
_ATTACHED: weakref.WeakSet[Adapter] = weakref.WeakSet()


@dataclass
class Attachment:
    """Where an adapter is attached.

    Attributes:
        root: The model, wrappers left out.
        name: The adapter's name in it.
        freeze: Whether the rest of the model was to be frozen.
        frozen: Names of the parameters that were frozen.
    """

    root: weakref.ref[nn.Module]
    name: str
    freeze: bool
    frozen: list[str]


@register("orthoserde>LoReFTAdapter", adapter=True)
class Adapter(nn.Module):
    """LoReFT interventions, one for each of some layers, and the tokens on which they act.

    Its children are the interventions, each under the path of its layer with ``/`` for ``.``, and it holds no other
    state: ``orthoserde.save(adapter, path)`` saves the interventions, ``orthoserde.build(path)`` makes the adapter
    again. As a module it hands on what it is given, so that a model that is an ``nn.Sequential`` goes on.

    Which tokens are real is read off the calls of the model: the nearest enclosing module that was given an
    ``attention_mask`` of shape (batch, seq) (real where not 0), or torch's ``src_key_padding_mask``,
    ``tgt_key_padding_mask`` or ``key_padding_mask`` (padding where True). Without a mask all tokens are real. Masks
    of other names are not seen.

    Generation: a call whose cache (``past_key_values``, ``cache_params``, ``cache_position``) already holds tokens
    continues a generation and is left alone, so the interventions act on the prompt only, as in pyreft. Without a
    cache each step is a forward over all tokens so far, and each is intervened on: ``"f{n}"`` and a ``prompt`` give
    what the cache gives, while the last tokens of ``"l{m}"`` are then those of the text so far. (pyreft intervenes
    on the first step alone, so that without a cache its later tokens are those of the model without adapter.)

    Args:
        layers: A LoReFT for each path of a layer. One LoReFT may serve several layers.
        positions: ``"f{n}"``, ``"l{m}"``, ``"f{n}+l{m}"`` (the first n and last m real tokens of each row, once),
            ``"all"`` (the real tokens), or a callable that is given the real tokens, bool of shape (batch, seq), and
            returns bool of the same shape or integer indices of shape (batch, m). An adapter with a callable can be
            saved, but not built from the file.

    Raises:
        ValueError: There are no layers, paths that collide, or malformed positions.
        TypeError: Something is not a LoReFT, or positions are neither a string nor callable.

    Source: Wu et al. 2024, arXiv 2404.03592, sections 3.2 and 4; ``generate`` in pyvene/models/intervenable_base.py,
    0.1.8.

    Example:
        >>> import torch
        >>> from orthoserde.integrations.loreft import LoReFT, attach
        >>> model = torch.nn.Sequential(torch.nn.Embedding(10, 8), torch.nn.Linear(8, 8))
        >>> adapter = attach(model, {"1": LoReFT(8, rank=2)})
        >>> sorted(adapter.layers), adapter.root is model
        (['1'], True)
    """

    config_forms: ClassVar = LoReFT.config_forms

    def __init__(self, layers: Mapping[str, LoReFT], positions: Positions = "f1+l1") -> None:
        super().__init__()
        check_layers(layers)
        self.select = parse(positions)
        self.positions = positions
        self.calls = Calls()
        self.attachment: Attachment | None = None
        self._names: dict[str, str] = {}
        for path, loreft in layers.items():
            name = path.replace(".", "/")
            if name in self._names.values():
                raise ValueError(f"layers: {path!r} and another path would both have the name {name!r}")
            try:
                self.add_module(name, loreft)
            except KeyError as error:
                raise ValueError(
                    f"layers: {path!r} is a name that an adapter has a use for itself; attach it to "
                    f"torch.nn.ModuleDict({{'model': model}}), where the path is 'model.{path}'"
                ) from error
            self._names[path] = name

    @property
    def layers(self) -> Mapping[str, LoReFT]:
        """The intervention of each layer, by path."""
        return {path: self.intervention(path) for path in self._names}

    def intervention(self, path: str) -> LoReFT:
        """The intervention of one layer.

        Raises:
            KeyError: The layer has none.
        """
        return cast("LoReFT", _torch.child_modules(self)[self._names[path]])

    def has(self, path: str) -> bool:
        """Whether a layer has an intervention."""
        return path in self._names

    @property
    def root(self) -> nn.Module | None:
        """The model that it is attached to, None where it is not."""
        return None if self.attachment is None else self.attachment.root()

    def forward(self, hidden_states: Any) -> Any:
        """Hand on what is given: the interventions act in the layers.

        Raises:
            AdapterError: It is called by a model that is no ``nn.Sequential``, and may do more with what it gets.
        """
        if self.root is not None and not isinstance(self.root, nn.Sequential):
            raise AdapterError(
                f"the {type(self.root).__qualname__} calls all of its children, and so its adapter; attach to a module "
                "around it, such as nn.ModuleDict({'model': model})"
            )
        return hidden_states

    def attach(self, model: nn.Module, *, freeze: bool = True, name: str = "loreft") -> Adapter:
        """Put the interventions into a model, or refuse and leave it as it was; see :func:`attach`."""
        check_flags(freeze=freeze)
        if self.attachment is not None:
            raise AdapterError("this adapter is attached already; detach it first, or copy it")
        root = _torch.unwrap(model)
        on_the_way = find_layers(root, self._names)
        _check_name(root, name)
        if _torch.is_ddp(model) and any(parameter.requires_grad for parameter in self.parameters()):
            raise AdapterError(
                "model: DistributedDataParallel synchronises the parameters that it found when it was made; attach to "
                "the model that it wraps, and wrap that again"
            )
        outside = _outside_adapters(root)
        frozen = [key for key, parameter in outside.items() if freeze and parameter.requires_grad]
        self.attachment = Attachment(weakref.ref(root), name, freeze, frozen)
        _ATTACHED.add(self)
        try:
            root.add_module(name, self)
            for path, module in on_the_way.items():
                module.register_forward_pre_hook(hooks.hook(self, path, hooks.enter), with_kwargs=True)
                if path in self._names:
                    module.register_forward_hook(hooks.hook(self, path, hooks.intervene))
                module.register_forward_hook(hooks.hook(self, path, hooks.leave), always_call=True)
            for key in frozen:
                outside[key].requires_grad_(False)
            self.train(root.training)
            _torch.forget_compiled()
        except BaseException:
            self.detach()
            raise
        return self

    def detach(self) -> None:
        """Take the interventions out of the model, which is then as it was before.

        Parameters that attaching froze and that are still frozen are thawed, unless another adapter wants them frozen.

        Raises:
            AdapterError: It is not attached.
        """
        attachment = self.attachment
        if attachment is None:
            raise AdapterError("this adapter is not attached to a model")
        self.attachment = None
        root = attachment.root()
        if root is None:
            return
        for module in root.modules():
            _torch.remove_hooks(module, lambda hook: hooks.is_hook_of(self, hook))
        if _torch.child_modules(root).get(attachment.name) is self:
            delattr(root, attachment.name)
        _ATTACHED.discard(self)
        outside = _outside_adapters(root)
        freezing = [other for other in _ATTACHED if other.attachment is not None and other.attachment.freeze]
        keepers = [(other.attachment, _keys_by_parameter(other.root)) for other in freezing]
        for parameter in (outside[key] for key in attachment.frozen if key in outside):
            keeper = next((each for each in keepers if id(parameter) in each[1]), None)
            if keeper is None or keeper[0] is None:
                parameter.requires_grad_(True)
            else:
                keeper[0].frozen.append(keeper[1][id(parameter)])
        _torch.forget_compiled()

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Its parameters that require a gradient, each once."""
        return trainable_parameters(self)

    @contextlib.contextmanager
    def prompt(self, mask: Tensor) -> Iterator[None]:
        """Within it, only tokens of the prompt count as real, as in a generation that starts from it.

        To be used in training on prompts with their completions: positions such as ``"l1"`` are then the prompt's.

        Args:
            mask: Which tokens belong to the prompt, bool (or 0 and 1) of shape (batch, seq).

        Raises:
            ValueError: The mask has another shape.
        """
        if mask.dim() != 2:
            raise ValueError(f"mask: expected shape (batch, seq), got {tuple(mask.shape)}")
        before = self.calls.prompt
        self.calls.prompt = mask.detach() != 0
        try:
            yield
        finally:
            self.calls.prompt = before

    def get_config(self) -> dict[str, JSON] | None:
        """The layers in order, each with the configuration of its intervention or the path it is shared with.

        None where the positions are a callable or an intervention is of a class of the user's, which it does not say.
        """
        if not isinstance(self.positions, str) or any(type(each) is not LoReFT for each in self.layers.values()):
            return None
        first: dict[int, str] = {}
        layers: list[JSON] = []  # in order, for optimizers count parameters by it
        for path, loreft in self.layers.items():
            shared = first.setdefault(id(loreft), path)
            layers.append({"path": path, **({"loreft": loreft.get_config()} if shared == path else {"as": shared})})
        return {"layers": layers, "positions": self.positions}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Adapter:
        """Make one, not attached, from what :meth:`get_config` returned.

        Raises:
            ValueError: A value is outside of its range.
            KeyError: Something is missing.
        """
        layers: dict[str, LoReFT] = {}
        for entry in config["layers"]:
            shared = entry.get("as")
            layers[entry["path"]] = LoReFT.from_config(entry["loreft"]) if shared is None else layers[shared]
        return cls(layers, config["positions"])

    def extra_repr(self) -> str:
        """Positions, for ``repr``."""
        return f"positions={self.positions!r}"

    def __deepcopy__(self, memo: dict[int, Any]) -> Adapter:
        """A copy, attached to the copy of the model if that is being copied, else not attached."""
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        own = {key: value for key, value in vars(self).items() if key not in ("calls", "attachment")}
        vars(copied).update({"calls": Calls(), "attachment": None})
        vars(copied).update(copy.deepcopy(own, memo))
        root = memo.get(id(self.root)) if self.root is not None else None
        if root is not None and self.attachment is not None:
            attachment = self.attachment
            copied.attachment = Attachment(
                weakref.ref(root), attachment.name, attachment.freeze, list(attachment.frozen)
            )
            _ATTACHED.add(copied)
        return copied


def attach(
    model: nn.Module,
    layers: Mapping[str, LoReFT],
    positions: Positions = "f1+l1",
    *,
    freeze: bool = True,
    name: str = "loreft",
) -> Adapter:
    """Put LoReFT interventions behind layers of a model, or refuse and leave it as it was.

    The adapter becomes the submodule ``name`` of the model and takes over its training mode; it stays on the device it
    was made on. Two adapters of different names can be on one model: positions ``"f1"`` and ``"l1"`` under two names
    are what pyreft calls ``f1+l1`` with weights that are not shared.

    What ``torch.compile`` has compiled in this process is compiled again, for it would not notice the hooks.

    ``copy.deepcopy`` of the model copies the adapter and its hooks with it; a part of the model cannot be copied while
    an adapter is attached.

    Args:
        model: Any model in which each layer is a module. ``torch.compile`` and other wrappers are looked through.
        layers: A LoReFT for each path of a layer, as in ``model.get_submodule(path)``. The layer returns its hidden
            states, (batch, seq, hidden_size), as a tensor, first in a tuple or list, or as ``last_hidden_state``.
        positions: The tokens to intervene on; see :class:`Adapter`.
        freeze: Whether to freeze all parameters of the model that are in no adapter.
        name: Name of the submodule.

    Returns:
        The adapter.

    Raises:
        ValueError: A path or the name does not fit the model, or an argument is malformed.
        TypeError: The model is not a module, or something is not a LoReFT.
        AdapterError: The model cannot be adapted as it is (DistributedDataParallel, hidden states of (seq, batch)).

    Example:
        >>> import torch
        >>> from orthoserde.integrations.loreft import LoReFT, attach
        >>> model = torch.nn.Sequential(torch.nn.Embedding(10, 8), torch.nn.Linear(8, 8))
        >>> adapter = attach(model, {"1": LoReFT(8, rank=2)}, positions="l1")
        >>> model(torch.zeros(1, 3, dtype=torch.long)).shape  # hidden states of (batch, seq, hidden_size)
        torch.Size([1, 3, 8])
        >>> model[1].weight.requires_grad
        False
    """
    return Adapter(layers, positions).attach(model, freeze=freeze, name=name)


def detach(model: nn.Module) -> None:
    """Take an adapter out of its model, or all adapters out of a model.

    Args:
        model: The adapter, or the model.

    Raises:
        AdapterError: There is no adapter that is attached.

    Example:
        >>> import torch
        >>> from orthoserde.integrations.loreft import LoReFT, attach, detach
        >>> model = torch.nn.Sequential(torch.nn.Embedding(10, 8), torch.nn.Linear(8, 8))
        >>> adapter = attach(model, {"1": LoReFT(8, rank=2)})
        >>> detach(model)
        >>> len(model)
        2
    """
    adapters = [model] if isinstance(model, Adapter) else _attached(_torch.unwrap(model))
    if not adapters:
        raise AdapterError("model: no adapter is attached to it")
    for adapter in reversed(adapters):
        adapter.detach()


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of a model or adapter that require a gradient, each once.

    Args:
        model: The model or adapter.

    Example:
        >>> import torch
        >>> from orthoserde.integrations.loreft import LoReFT, attach, trainable_parameters
        >>> model = torch.nn.Sequential(torch.nn.Embedding(10, 8), torch.nn.Linear(8, 8))
        >>> adapter = attach(model, {"1": LoReFT(8, rank=2)})
        >>> optimizer = torch.optim.Adam(trainable_parameters(model), lr=0.01)
        >>> [tuple(parameter.shape) for parameter in trainable_parameters(model)]
        [(8, 2), (2, 8), (2,)]
    """
    return [parameter for parameter in _torch.unwrap(model).parameters() if parameter.requires_grad]


def _keys_by_parameter(root: nn.Module | None) -> dict[int, str]:
    """Keys of the parameters outside of adapters, by the id of the parameter."""
    return {} if root is None else {id(parameter): key for key, parameter in _outside_adapters(root).items()}


def _attached(root: nn.Module) -> list[Adapter]:
    return [module for module in root.modules() if isinstance(module, Adapter) and module.root is not None]


def _check_name(root: nn.Module, name: object) -> None:
    if not isinstance(name, str) or not name or "." in name:
        raise ValueError(f"name: expected a name without dots, got {name!r}")
    if isinstance(getattr(root, name, None), Adapter):
        text = f"an adapter is attached as {name!r} already; detach(model) first, or give another name to have both"
        raise ValueError(f"name: {text}")  # noqa: TRY004  # the type is right, the name is taken
    if hasattr(root, name):
        raise ValueError(f"name: the model has an attribute {name!r} already; choose another name")


def _outside_adapters(root: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that are in no adapter, by name."""
    adapters = [module for module in root.modules() if default_registry.is_adapter(type(module))]
    inside = {id(parameter) for adapter in adapters for parameter in adapter.parameters()}
    return {name: parameter for name, parameter in root.named_parameters() if id(parameter) not in inside}
