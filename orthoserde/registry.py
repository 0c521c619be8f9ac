"""What a class is called in files, and how its configuration is captured and built again.

A file names *kinds* ("package>Name"). Only a kind that this process has registered is ever built; nothing is imported.
"""

from __future__ import annotations

import copy
import functools
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar, cast, runtime_checkable

import torch
from torch import Tensor, nn

from orthoserde import _torch, json_values
from orthoserde.errors import ConfigError, RegistrationError
from orthoserde.json_values import JSON

ModuleClass = TypeVar("ModuleClass", bound=type[nn.Module])

_KIND = re.compile(r"[^\s>]+>[^\s>]+")

#: Where an instance keeps the arguments of its construction. It is copied with the instance.
_CAPTURED = "_orthoserde_captured"

#: Set on a wrapped ``__init__`` so that a class is not wrapped twice.
_WRAPPED = "_orthoserde_wrapped"


@runtime_checkable
class Codec(Protocol):
    """All that orthoserde knows of one class of parametrization or module.

    Attributes:
        type: The class, matched exactly: a subclass may hold more state.
        kind: Its name in files, ``"package>Name"``.
        version: Version of its configuration, from 1.
    """

    type: type[nn.Module]
    kind: str
    version: int

    def config(self, parametrization: nn.Module) -> dict[str, JSON] | None:
        """All that the tensors leave out; None where it is not known."""

    def build(self, config: Mapping[str, JSON], like: Tensor | None) -> nn.Module:
        """Make a parametrization, its tensors not yet filled: no ``right_inverse``, no factorisation.

        Args:
            config: As :meth:`config` gave it.
            like: A tensor with the shape, dtype and device of the (first) original; None for a module.

        Raises:
            ConfigError: The configuration does not build.
        """

    def tensors(self, parametrization: nn.Module) -> dict[str, Tensor]:
        """Its own parameters and persistent buffers, by role."""

    def compute(self, config: Mapping[str, JSON], tensors: Mapping[str, Tensor]) -> Tensor:
        """The computed tensor, from state alone: the originals by name and its own tensors by role."""

    def shape(self, originals: Mapping[str, torch.Size]) -> torch.Size | None:
        """Shape of the computed tensor, given those of its inputs; None where only running it would tell."""

    def check(
        self, config: Mapping[str, JSON], originals: Mapping[str, Sequence[int]], roles: Mapping[str, Sequence[int]]
    ) -> str | None:
        """What is wrong with the shapes of its inputs and its own tensors in this configuration; None if nothing."""

    def residual(self, weight: Tensor) -> float | None:
        """Distance of a computed tensor from the constraint; None where there is no constraint to measure."""

    def admits(self, weight: Tensor, config: Mapping[str, JSON]) -> bool:
        """Whether a computed tensor is on the constraint, as far as a tensor of float32 or better can be."""

    def project(self, weight: Tensor, config: Mapping[str, JSON]) -> Tensor:
        """The nearest tensor on the constraint."""

    def recovers(self, config: Mapping[str, JSON]) -> bool:
        """Whether :meth:`from_weight` can do anything with this configuration."""

    def from_weight(self, weight: Tensor, config: Mapping[str, JSON]) -> dict[str, Tensor]:
        """State of which the computed tensor is ``weight``, within the tolerance that the implementation states.

        Returns:
            The originals by name and its own tensors by role: a chart that starts afresh at this weight.

        Raises:
            ConfigError: The weight alone does not determine such a state.
        """

    def upgrade(self, config: dict[str, JSON], from_version: int) -> dict[str, JSON]:
        """Bring the configuration of an older version up to :attr:`version`.

        Raises:
            ConfigError: It cannot be done.
        """


class RegisteredClass:
    """The codec of a class that :meth:`Registry.register` decorated."""

    def __init__(self, cls: type[nn.Module], kind: str, version: int) -> None:
        self.type = cls
        self.kind = kind
        self.version = version

    def config(self, parametrization: nn.Module) -> dict[str, JSON] | None:
        """What ``get_config`` returns, else the arguments of the construction; None where these are not JSON.

        Raises:
            ConfigError: ``get_config`` returned something else than a JSON object.
        """
        if _describes_itself(self.type):
            try:
                config = json_values.to_json(cast("Any", parametrization).get_config())
            except ConfigError as error:
                raise ConfigError(f"{self.type.__qualname__}.get_config() must return JSON: {error}") from error
            if not isinstance(config, dict):
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
        """Build the parametrization, put its tensors in place and run it on the originals."""
        first = next(iter(tensors.values()))
        built = self.build(config, first)
        roles = own_tensors(built)
        originals = {name: tensor for name, tensor in tensors.items() if name not in roles}
        with torch.no_grad():
            for role, tensor in tensors.items():
                if role in roles:
                    roles[role].copy_(tensor)
            return cast("Tensor", built.eval()(*originals.values()))

    def shape(self, originals: Mapping[str, torch.Size]) -> torch.Size | None:
        """Not known without running the user's code."""
        return None

    def check(
        self, config: Mapping[str, JSON], originals: Mapping[str, Sequence[int]], roles: Mapping[str, Sequence[int]]
    ) -> str | None:
        """Nothing is known of the shapes that a user's class wants."""
        return None

    def residual(self, weight: Tensor) -> float | None:
        """A user's constraint is not known."""
        return None

    def admits(self, weight: Tensor, config: Mapping[str, JSON]) -> bool:
        """A user's constraint is not known, so nothing can be said against a weight."""
        return True

    def project(self, weight: Tensor, config: Mapping[str, JSON]) -> Tensor:
        """The weight itself: a user's constraint is not known."""
        return weight

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


def current_config(codec: Codec, config: Mapping[str, JSON] | None, version: int) -> dict[str, JSON] | None:
    """A configuration of a file in the codec's own version; None where the file does not know it.

    Raises:
        ConfigError: The file's version is newer, or cannot be upgraded.
    """
    if version > codec.version:
        raise ConfigError(f"the file has version {version} of {codec.kind}, this process version {codec.version}")
    if config is None:
        return None
    return codec.upgrade(dict(config), version) if version < codec.version else dict(config)


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers of a module and its children, by dotted name, None left out."""
    found: dict[str, Tensor] = dict(_torch.own_parameters(module))
    found |= {name: buffer for name, buffer in _torch.own_buffers(module).items() if buffer is not None}
    for name, child in _torch.child_modules(module).items():
        found |= {f"{name}.{role}": tensor for role, tensor in own_tensors(_torch.unwrap(child)).items()}
    return found


class Registry:
    """Kinds and the classes they stand for.

    Torch's own parametrizations are known to every registry and need no entry. An application that wants to keep its
    names apart makes its own registry and passes it to ``save`` and ``load``.

    Example:
        >>> registry = Registry()
        >>> @registry.register("mylab>Symmetric")
        ... class Symmetric(nn.Module):
        ...     def forward(self, x):
        ...         return x.triu() + x.triu(1).mT
        >>> "mylab>Symmetric" in registry
        True
    """

    def __init__(self) -> None:
        self._by_kind: dict[str, Codec] = {}
        self._by_type: dict[type[nn.Module], Codec] = {}

    def register(self, kind: str, version: int = 1) -> Callable[[ModuleClass], ModuleClass]:
        """Make a decorator that registers a class of modules or parametrizations.

        ``__init__`` is wrapped in place and the class itself is returned. The arguments of a construction are its
        configuration, captured only when exactly this class is constructed, with defaults applied. A class whose
        arguments are not JSON may define ``get_config(self)`` and the class method ``from_config(config)`` instead.

        Args:
            kind: Name in files, ``"package>Name"``.
            version: Version of the configuration, from 1. With a new one, give the class a static method
                ``upgrade(config, from_version)``.

        Raises:
            RegistrationError: The kind is malformed, or another class has it, or the class has another kind.
        """
        _check_kind(kind)

        def decorate(cls: ModuleClass) -> ModuleClass:
            self.add(RegisteredClass(cls, kind, version))
            if not _describes_itself(cls):
                _capture_arguments(cls)
            return cls

        return decorate

    def add(self, codec: Codec) -> None:
        """Register a codec. The same class defined again (a notebook cell run twice) replaces the earlier one.

        Raises:
            RegistrationError: The kind is malformed, or another class has it, or the class has another kind.
        """
        cls, kind = codec.type, codec.kind
        _check_kind(kind)
        if type(codec.version) is not int or codec.version < 1:
            raise RegistrationError(f"{kind!r}: expected a version from 1, got {codec.version!r}")
        candidate: object = cls
        if not inspect.isclass(candidate) or not issubclass(candidate, nn.Module):
            raise RegistrationError(f"{kind!r}: expected a subclass of nn.Module, got {cls!r}")
        if kind.startswith("torch>"):
            raise RegistrationError(f"{kind!r}: the package 'torch' stands for torch's own parametrizations")
        taken = self._by_kind.get(kind)
        if taken is not None and _identity(taken.type) != _identity(cls):
            raise RegistrationError(
                f"{kind!r} already stands for {_identity(taken.type)}, so it cannot stand for {_identity(cls)}; "
                "choose another name"
            )
        other = self._by_type.get(cls)
        if other is not None and other.kind != kind:
            raise RegistrationError(
                f"{_identity(cls)} is already registered as {other.kind!r}, so it cannot be {kind!r}"
            )
        if taken is not None:
            self._by_type.pop(taken.type, None)
        self._by_kind[kind] = codec
        self._by_type[cls] = codec

    def for_type(self, cls: type[nn.Module]) -> Codec | None:
        """The codec of exactly this class, None where it is not registered."""
        return self._by_type.get(cls)

    def for_kind(self, kind: str) -> Codec | None:
        """The codec of a kind, None where it is not registered."""
        return self._by_kind.get(kind)

    def __contains__(self, kind: object) -> bool:
        return kind in self._by_kind

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._by_kind))

    def __len__(self) -> int:
        return len(self._by_kind)

    def __repr__(self) -> str:
        return f"<Registry: {len(self)} kinds>"


def _check_kind(kind: object) -> None:
    if not isinstance(kind, str) or not _KIND.fullmatch(kind):
        raise RegistrationError(
            f"{kind!r}: expected a kind of the form 'package>Name', as in register('mylab>Symmetric')"
        )


def _identity(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _describes_itself(cls: type[nn.Module]) -> bool:
    """Whether ``get_config`` speaks for this class: one that is inherited past a newer ``__init__`` knows less."""
    for base in cls.__mro__:
        if "get_config" in vars(base):
            return True
        if "__init__" in vars(base) and getattr(vars(base)["__init__"], _WRAPPED, base) is base:
            return False
    return False


def _capture_arguments(cls: type[nn.Module]) -> None:
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


#: The registry that ``orthoserde.register`` fills; ``save`` and ``load`` use it unless they are given another one.
default_registry = Registry()

register = default_registry.register
