"""The codec of a class that was registered with the decorator: its configuration is its constructor arguments."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from orthoserde import _torch, json_values
from orthoserde.errors import ConfigError
from orthoserde.json_values import JSON
from orthoserde.registry.codec import Unconstrained, own_tensors

#: Where an instance keeps the arguments of its construction. It is copied with the instance.
_CAPTURED = "_orthoserde_captured"

#: Set on a wrapped ``__init__`` so that a class is not wrapped twice.
_WRAPPED = "_orthoserde_wrapped"


class RegisteredClass(Unconstrained):
    """The codec of a class that :meth:`Registry.register` decorated."""

    def __init__(self, cls: type[nn.Module], kind: str, version: int) -> None:
        self.type = cls
        self.kind = kind
        self.version = version

    def config(self, parametrization: nn.Module) -> dict[str, JSON] | None:
        """What ``get_config`` returns, else the arguments of the construction; None where these are not JSON.

        A ``get_config`` may return None itself, for an instance that has something in it which JSON cannot say.

        Raises:
            ConfigError: ``get_config`` returned something else than a JSON object or None.
        """
        if describes_itself(self.type):
            try:
                config = json_values.to_json(cast("Any", parametrization).get_config())
            except ConfigError as error:
                raise ConfigError(f"{self.type.__qualname__}.get_config() must return JSON: {error}") from error
            if config is not None and not isinstance(config, dict):
                raise ConfigError(f"{self.type.__qualname__}.get_config() must return a dict of JSON values")
            return config
        captured = cast("str | None", vars(parametrization).get(_CAPTURED))
        return None if captured is None else cast("dict[str, JSON]", json_values.decode(captured, self.kind))

    def build(self, config: Mapping[str, JSON], like: Tensor | None) -> nn.Module:
        """``from_config(config)`` where the class has it, else the class called with the configuration.

        Raises:
            ConfigError: The class raised, or made something else than an instance of itself.
        """
        device = torch.device("cpu") if like is None else like.device
        from_config = getattr(self.type, "from_config", None)
        arguments: dict[str, Any] = copy.deepcopy(dict(config))
        try:
            with torch.device(device):
                built = from_config(arguments) if from_config is not None else call_with(self.type, arguments)
        except Exception as error:  # whatever the user's constructor raises: the file's configuration does not fit it
            raise ConfigError(f"{self.kind}: cannot be built: {type(error).__name__}: {error}") from error
        if type(built) is not self.type and _torch.class_before_parametrizations(built) is not self.type:
            raise ConfigError(f"{self.kind}: from_config returned a {type(built).__qualname__}")
        return cast("nn.Module", built)

    def tensors(self, parametrization: nn.Module) -> dict[str, Tensor]:
        """Its own parameters and persistent buffers and those of its children, by dotted name."""
        return own_tensors(parametrization)

    def compute(self, config: Mapping[str, JSON], tensors: Mapping[str, Tensor]) -> Tensor:
        """Build the parametrization, put its tensors in place in their own dtypes and run it on the originals."""
        first = next(iter(tensors.values()))
        built = self.build(config, first)
        roles = own_tensors(built)
        originals = {name: tensor for name, tensor in tensors.items() if name not in roles}
        with torch.no_grad():
            for role, tensor in tensors.items():
                if role in roles:
                    own = roles[role]
                    if own.dtype != tensor.dtype:  # built in the default dtype, trained in another
                        own.requires_grad_(False)  # integers cannot
                        own.data = torch.empty_like(own, dtype=tensor.dtype)
                    own.copy_(tensor)
            return cast("Tensor", built.eval()(*originals.values()))

    def shape(self, originals: Mapping[str, torch.Size]) -> torch.Size | None:
        """Not known without running the user's code."""
        return None

    def check(
        self, config: Mapping[str, JSON], originals: Mapping[str, Sequence[int]], roles: Mapping[str, Sequence[int]]
    ) -> str | None:
        """Nothing is known of the shapes that a user's class wants."""
        return None

    def recovers(self, config: Mapping[str, JSON]) -> bool:
        """No: the inverse of a user's class is not known."""
        return False

    def from_weight(self, weight: Tensor, config: Mapping[str, JSON]) -> dict[str, Tensor]:
        """Refused: the inverse of a user's class is not known.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(f"{self.kind}: its state cannot be recovered from the computed weight")

    def upgrade(self, config: dict[str, JSON], from_version: int) -> dict[str, JSON]:
        """What the class's own ``upgrade(config, from_version)`` returns.

        Raises:
            ConfigError: The class has none, or it raised.
        """
        upgrade = getattr(self.type, "upgrade", None)
        if upgrade is None:
            raise ConfigError(
                f"{self.kind}: the file has version {from_version}, the class is registered as version {self.version}; "
                "give it a static method upgrade(config, from_version)"
            )
        try:
            upgraded = json_values.to_json(upgrade(copy.deepcopy(config), from_version))
        except Exception as error:  # whatever the user's upgrade raises: this configuration cannot be upgraded
            raise ConfigError(
                f"{self.kind}: upgrade from version {from_version}: {type(error).__name__}: {error}"
            ) from error
        if not isinstance(upgraded, dict):
            raise ConfigError(f"{self.kind}: upgrade from version {from_version} must return a dict of JSON values")
        return upgraded


def describes_itself(cls: type[nn.Module]) -> bool:
    """Whether ``get_config`` speaks for this class: one that is inherited past a newer ``__init__`` knows less."""
    for base in cls.__mro__:
        if "get_config" in vars(base):
            return True
        if "__init__" in vars(base) and getattr(vars(base)["__init__"], _WRAPPED, base) is base:
            return False
    return False


def capture_arguments(cls: type[nn.Module]) -> None:
    """Wrap ``__init__`` in place, so that an instance of exactly this class remembers what it was made with."""
    init = cls.__init__
    if getattr(init, _WRAPPED, None) is cls:
        return
    signature = inspect.signature(init)

    @functools.wraps(init)
    def capturing(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        # A subclass that calls up to here is another class, with arguments of its own.
        captured = _encode_arguments(signature, self, args, kwargs) if type(self) is cls else None
        init(self, *args, **kwargs)
        if captured is not None:
            vars(self)[_CAPTURED] = captured

    setattr(capturing, _WRAPPED, cls)
    cls.__init__ = capturing  # type: ignore[method-assign]


def _encode_arguments(
    signature: inspect.Signature, instance: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> str | None:
    """The arguments as canonical JSON, None where they are not JSON.

    Positional-only and variadic arguments keep their names; :func:`call_with` puts them back.
    """
    try:
        bound = signature.bind(instance, *args, **kwargs)
    except TypeError:
        return None  # the constructor itself is about to say what is wrong
    bound.apply_defaults()
    variadic = {p.name for p in signature.parameters.values() if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    named = list(bound.arguments.items())[1:]
    arguments = {name: value for name, value in named if name not in variadic or value}
    try:
        return json_values.encode(json_values.to_json(arguments))
    except ConfigError:
        return None


def call_with(cls: type[nn.Module], arguments: Mapping[str, Any]) -> nn.Module:
    """Construct a class from captured arguments.

    Raises:
        TypeError: The constructor has no such arguments.
    """
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    left = dict(arguments)
    # Once *args is filled, what stands before it must be positional too.
    positional = any(p.kind is p.VAR_POSITIONAL and left.get(p.name) for p in parameters)
    for parameter in parameters:
        if parameter.name not in left:
            continue
        value = left.pop(parameter.name)
        if parameter.kind is parameter.VAR_POSITIONAL:
            args.extend(value)
        elif parameter.kind is parameter.VAR_KEYWORD:
            kwargs.update(value)
        elif parameter.kind is parameter.POSITIONAL_ONLY or (
            positional and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        ):
            args.append(value)
        else:
            kwargs[parameter.name] = value
    if left:
        raise TypeError(f"{cls.__qualname__} has no argument {', '.join(sorted(left))}")
    return cls(*args, **kwargs)
