"""The `Codec` protocol: all that orthoserde knows of one class of parametrization or module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from orthoserde import _torch
from orthoserde.errors import ConfigError
from orthoserde.json_values import JSON


@runtime_checkable
class Codec(Protocol):
    """All that orthoserde knows of one class of parametrization or module.

    Attributes:
        type: The class, matched exactly: a subclass may hold more state.
        kind: Its name in files, ``"package>Name"``.
        version: Version of its configuration, from 1.

    Example:
        >>> import torch, orthoserde
        >>> registry = orthoserde.Registry()
        >>> @registry.register("mylab>Shift", version=2)
        ... class Shift(torch.nn.Module):
        ...     def __init__(self, by: float):
        ...         super().__init__()
        ...         self.by = by
        >>> codec = registry.for_kind("mylab>Shift")  # made by `register`; `Registry.add` takes one of your own
        >>> isinstance(codec, orthoserde.Codec), codec.version, codec.config(Shift(by=1.5))
        (True, 2, {'by': 1.5})
    """

    type: type[nn.Module]
    kind: str
    version: int

    def config(self, parametrization: nn.Module) -> dict[str, JSON] | None:
        """All that the tensors leave out.

        Args:
            parametrization: An object of :attr:`type`.

        Returns:
            Values of JSON by name, which a load compares with those of the model; None where they are not known.
        """

    def build(self, config: Mapping[str, JSON], like: Tensor | None) -> nn.Module:
        """Make a parametrization, its tensors not yet filled: no ``right_inverse``, no factorisation.

        Args:
            config: As :meth:`config` gave it.
            like: A tensor with the shape, dtype and device of the (first) original; None for a module.

        Returns:
            An object of :attr:`type`. No random generator has been used.

        Raises:
            ConfigError: The configuration does not build.
        """

    def tensors(self, parametrization: nn.Module) -> dict[str, Tensor]:
        """Its own parameters and persistent buffers, by role.

        Args:
            parametrization: An object of :attr:`type`.

        Returns:
            The tensors themselves, not copies; None ones are left out.
        """

    def compute(self, config: Mapping[str, JSON], tensors: Mapping[str, Tensor]) -> Tensor:
        """The computed tensor, from state alone, without a gradient; nothing that it is given changes.

        Args:
            config: As :meth:`config` gave it.
            tensors: The originals by name and its own tensors by role, of one dtype and device where the class wants
                that.

        Returns:
            The tensor, of the shape that :meth:`shape` gives.

        Raises:
            ConfigError: The configuration does not build.
        """

    def shape(self, originals: Mapping[str, torch.Size]) -> torch.Size | None:
        """Shape of the computed tensor; None where only running it would tell.

        Args:
            originals: Shapes of its inputs by name: ``original``, or ``original0``, ``original1``, ...
        """

    def check(
        self, config: Mapping[str, JSON], originals: Mapping[str, Sequence[int]], roles: Mapping[str, Sequence[int]]
    ) -> str | None:
        """What is wrong with the shapes of its inputs and its own tensors in this configuration; None if nothing.

        Args:
            config: As :meth:`config` gave it, or as the file of a stranger has it.
            originals: Shapes of its inputs by name.
            roles: Shapes of its own tensors by role.

        Returns:
            What was expected and what was found, in words.
        """

    def residual(self, weight: Tensor) -> float | None:
        """Distance of a computed tensor from the constraint, without a unit; 0 where it is on it.

        Args:
            weight: The computed tensor, of any floating or complex dtype.

        Returns:
            The distance that the implementation states, such as ``max |Q^H Q - I|``; None without one.
        """

    def admits(self, weight: Tensor, config: Mapping[str, JSON]) -> bool:
        """Whether a computed tensor is on the constraint, as far as a tensor of float32 or better can be.

        Args:
            weight: The computed tensor.
            config: As :meth:`config` gave it.
        """

    def project(self, weight: Tensor, config: Mapping[str, JSON]) -> Tensor:
        """The nearest tensor on the constraint, of the same shape and dtype.

        Args:
            weight: A tensor that :meth:`admits` does not take.
            config: As :meth:`config` gave it.
        """

    def recovers(self, config: Mapping[str, JSON]) -> bool:
        """Whether :meth:`from_weight` can do anything with this configuration.

        Args:
            config: As :meth:`config` gave it.
        """

    def from_weight(self, weight: Tensor, config: Mapping[str, JSON]) -> dict[str, Tensor]:
        """State of which the computed tensor is ``weight``, within the tolerance that the implementation states.

        Args:
            weight: A computed tensor that :meth:`admits` takes.
            config: As :meth:`config` gave it.

        Returns:
            The originals by name and its own tensors by role: a chart that starts afresh at this weight.

        Raises:
            ConfigError: The weight alone does not determine such a state.
        """

    def upgrade(self, config: dict[str, JSON], from_version: int) -> dict[str, JSON]:
        """Bring the configuration of an older version up to :attr:`version`.

        Args:
            config: A copy of what the file has.
            from_version: The version of that, less than :attr:`version`.

        Raises:
            ConfigError: It cannot be done.
        """


class OneVersion:
    """What a codec has of which there has been one version."""

    kind: str

    def upgrade(self, config: dict[str, JSON], from_version: int) -> dict[str, JSON]:
        """There is one version.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(f"{self.kind}: no version {from_version} is known")


class Unconstrained:
    """What a codec has that knows of no constraint to hold a computed tensor to."""

    def residual(self, weight: Tensor) -> float | None:
        """None: there is nothing to measure."""
        return None

    def admits(self, weight: Tensor, config: Mapping[str, JSON]) -> bool:
        """Nothing can be said against a weight."""
        return True

    def project(self, weight: Tensor, config: Mapping[str, JSON]) -> Tensor:
        """The weight itself."""
        return weight


@runtime_checkable
class MeasuredByConfig(Protocol):
    """A codec whose constraint depends on its configuration, as a sphere does on its radius."""

    def residual_in(self, weight: Tensor, config: Mapping[str, JSON]) -> float | None:
        """Distance of a computed tensor from the constraint in a configuration; None where there is none."""


def residual_of(codec: Codec, weight: Tensor, config: Mapping[str, JSON] | None) -> float | None:
    """Distance of a computed tensor from the constraint of a codec; None where there is none to measure."""
    if config is not None and isinstance(codec, MeasuredByConfig):
        return codec.residual_in(weight, config)
    return codec.residual(weight)


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
