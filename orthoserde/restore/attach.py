"""Give a bare module its parametrizations back, from the file's configuration: no right_inverse, no factorisation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from orthoserde import _torch
from orthoserde.errors import ConfigError, Problem
from orthoserde.manifest import OPAQUE, ParametrizationRecord, ParametrizedRecord, TensorRecord
from orthoserde.parametrizations import codec_for_kind
from orthoserde.parametrizing import register_given
from orthoserde.registry import Registry
from orthoserde.registry.codec import current_config
from orthoserde.tensor_bytes import DTYPES


@dataclass
class Attachment:
    """Parametrizations that are built and wait to be attached to a module.

    Attributes:
        record: What the file says of the tensor.
        module: The bare module.
        bare: Its plain tensor.
        links: The parametrizations, in order.
        frozen: Names of originals that required no gradient when they were saved.
        originals: New unconstrained tensors; empty where ``bare`` becomes the original as it is.
    """

    record: ParametrizedRecord
    module: nn.Module
    bare: Tensor
    links: tuple[nn.Module, ...]
    frozen: frozenset[str]
    originals: dict[str, Tensor] = field(default_factory=dict)

    @property
    def keeps_parameter(self) -> bool:
        """Whether the plain tensor keeps its identity, so that an optimizer built before goes on with it."""
        return set(self.record.originals) == {"original"}

    def attach(self) -> Callable[[], None]:
        """Attach the parametrizations; return what undoes it."""
        undo = register_given(
            self.module,
            self.record.tensor_name,
            self.links,
            [self.originals[name] for name in self.record.originals] if self.originals else [],
            single=self.keeps_parameter,
            unsafe=self.record.unsafe,
        )
        if not self.keeps_parameter:
            parametrized = _torch.parametrization_lists(self.module)[self.record.tensor_name]
            for frozen in self.frozen:
                _torch.own_parameters(parametrized).get(frozen, self.bare.detach()).requires_grad_(False)
        return undo


def build_links(
    record: ParametrizedRecord,
    bare: Tensor,
    stored: Mapping[str, TensorRecord],
    registry: Registry,
    device: torch.device,
) -> tuple[nn.Module, ...] | list[Problem]:
    """Build the parametrizations of a tensor for a bare module.

    Args:
        record: What the file says of the tensor.
        bare: The plain tensor of the module.
        stored: Records of the file's tensors by key, aliases resolved.
        registry: The user's classes.
        device: Where they are built if the plain tensor is on the meta device.

    Returns:
        The parametrizations, or what keeps them from being built.
    """
    if record.shape is not None and record.shape != tuple(bare.shape):
        text = f"the file has shape {list(record.shape)}, the model {list(bare.shape)}"
        return [Problem(record.name, "mismatch", text)]
    first = stored[record.original_key(next(iter(record.originals)))]
    device = device if bare.device.type == "meta" else bare.device
    like = _shaped_like(first.shape, DTYPES[first.dtype], device)
    links: list[nn.Module] = []
    problems: list[Problem] = []
    for link in record.chain:
        try:
            links.append(_build_link(link, like, registry))
        except ConfigError as error:
            problems.append(Problem(record.name, "mismatch", str(error)))
        like = _shaped_like(tuple(bare.shape), DTYPES[first.dtype], device)
    return problems or tuple(links)


def _build_link(link: ParametrizationRecord, like: Tensor, registry: Registry) -> nn.Module:
    codec = codec_for_kind(registry, link.kind)
    name = link.class_name if link.kind == OPAQUE else link.kind
    if codec is None and link.kind == OPAQUE:
        raise ConfigError(
            f"plain in the model, parametrized by {name} in the file, which was not registered when it was saved, so "
            "its configuration is not known; parametrize the module before loading"
        )
    if codec is None:
        raise ConfigError(
            f"plain in the model, parametrized by {name} in the file, which is not registered in this process; "
            "register the class, or parametrize the module before loading"
        )
    config = current_config(codec, link.config, link.version)
    if config is None:
        raise ConfigError(
            f"the file does not say how {name} was configured, so it cannot be built; "
            "parametrize the module before loading"
        )
    return codec.build(config, like)


def _shaped_like(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor that has a shape, dtype and device, and hardly any memory."""
    return torch.empty((), dtype=dtype, device=device).expand(shape)
