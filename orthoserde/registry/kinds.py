"""`Registry`: kinds and the classes that they stand for."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from torch import nn

from orthoserde.errors import RegistrationError
from orthoserde.registry.codec import Codec
from orthoserde.registry.registered_class import RegisteredClass, capture_arguments, describes_itself

ModuleClass = TypeVar("ModuleClass", bound=type[nn.Module])

_KIND = re.compile(r"[^\s>]+>[^\s>]+")


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
        self._adapters: set[type[nn.Module]] = set()

    def register(self, kind: str, version: int = 1, *, adapter: bool = False) -> Callable[[ModuleClass], ModuleClass]:
        """Make a decorator that registers a class of modules or parametrizations.

        ``__init__`` is wrapped in place and the class itself is returned. The arguments of a construction are its
        configuration, captured only when exactly this class is constructed, with defaults applied. A class whose
        arguments are not JSON may define ``get_config(self)`` and the class method ``from_config(config)`` instead.

        Args:
            kind: Name in files, ``"package>Name"``.
            version: Version of the configuration, from 1. With a new one, give the class a static method
                ``upgrade(config, from_version)``.
            adapter: Whether modules of this class and of its subclasses are adapters, as LoReFT is: of a model that
                holds one, ``save`` leaves out the frozen tensors outside of them.

        Returns:
            The decorator, which returns the class itself.

        Raises:
            RegistrationError: The kind is malformed, or another class has it, or the class has another kind.

        Example:
            >>> import torch, orthoserde
            >>> @orthoserde.register("mylab>Scaled", version=1)
            ... class Scaled(torch.nn.Module):
            ...     def __init__(self, factor: float = 2.0):
            ...         super().__init__()
            ...         self.factor = factor
            ...     def forward(self, weight):
            ...         return self.factor * weight
            >>> orthoserde.default_registry.for_kind("mylab>Scaled").config(Scaled(0.5))
            {'factor': 0.5}
        """
        _check_kind(kind)

        def decorate(cls: ModuleClass) -> ModuleClass:
            self.add(RegisteredClass(cls, kind, version))
            if not describes_itself(cls):
                capture_arguments(cls)
            if adapter:
                self.mark_adapter(cls)
            return cls

        return decorate

    def add(self, codec: Codec) -> None:
        """Register a codec. The same class defined again (a notebook cell run twice) replaces the earlier one.

        Args:
            codec: An object with all that :class:`Codec` has.

        Raises:
            RegistrationError: The kind is malformed, or another class has it, or the class has another kind.
        """
        given: object = codec
        if not isinstance(given, Codec):
            hint = "; a class is registered with register()" if inspect.isclass(given) else ""
            got = f"{type(given).__qualname__}, which lacks {', '.join(_missing_of(given))}"
            raise RegistrationError(f"expected a Codec, got {got}{hint}")
        cls, kind = codec.type, codec.kind
        _check_kind(kind)
        if type(codec.version) is not int or codec.version < 1:
            raise RegistrationError(f"{kind!r}: expected a version from 1, got {codec.version!r}")
        candidate: object = cls
        if not inspect.isclass(candidate) or not issubclass(candidate, nn.Module):
            raise RegistrationError(f"{kind!r}: expected a subclass of nn.Module, got {cls!r}")
        if kind.startswith("torch>"):
            raise RegistrationError(f"{kind!r}: the package 'torch' stands for torch's own parametrizations")
        if kind.startswith("orthoserde>") and cls.__module__.partition(".")[0] != "orthoserde":
            raise RegistrationError(f"{kind!r}: the package 'orthoserde' stands for this library's own modules")
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

    def mark_adapter(self, cls: type[nn.Module]) -> None:
        """Say that modules of this class and of its subclasses are adapters; see :meth:`register`."""
        self._adapters.add(cls)

    def is_adapter(self, cls: type[nn.Module]) -> bool:
        """Whether modules of this class are adapters, because it or a class that it is made from is marked so."""
        return not self._adapters.isdisjoint(cls.__mro__)

    def extended(self, codecs: Iterable[Codec], adapters: Iterable[type[nn.Module]] = ()) -> Registry:
        """A registry that knows more; this one stays as it is.

        Args:
            codecs: Codecs of further classes. Those of classes that are registered here already are left out.
            adapters: Classes to mark as adapters.

        Raises:
            RegistrationError: A kind stands for another class here.
        """
        other = Registry()
        for cls in (*self._adapters, *adapters):
            other.mark_adapter(cls)
        for codec in self._by_type.values():
            other.add(codec)
        for codec in codecs:
            if other.for_type(codec.type) is None:
                other.add(codec)
        return other

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


def _missing_of(codec: object) -> list[str]:
    """Which attributes and methods of a Codec something does not have."""
    members = (*Codec.__annotations__, *(name for name in vars(Codec) if not name.startswith("_")))
    return [name for name in members if not hasattr(codec, name)]


def _identity(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


#: The registry that ``orthoserde.register`` fills; ``save`` and ``load`` use it unless they are given another one.
default_registry = Registry()

register = default_registry.register
