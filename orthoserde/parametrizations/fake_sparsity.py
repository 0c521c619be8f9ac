"""``torch.ao.pruning.FakeSparsity``, the mask of torch's sparsifiers."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from orthoserde import _torch
from orthoserde.errors import ConfigError
from orthoserde.json_values import JSON
from orthoserde.manifest import FAKE_SPARSITY
from orthoserde.registry.codec import OneVersion, Unconstrained, own_tensors


class FakeSparsityCodec(OneVersion, Unconstrained):
    """Codec of torch's sparsity mask: ``weight = mask * original``.

    Shapes: ``mask`` is that of the weight; its dtype is the sparsifier's choice, and is kept. The class gives an empty
    ``state_dict()``, so that a state dict of a model has no mask, and its own ``load_state_dict`` misses it: a
    sparsifier is meant to make it again. Here it is state like any other.

    Source: torch/ao/pruning/sparsifier/utils.py (torch 2.13).
    """

    kind = FAKE_SPARSITY
    version = 1

    def __init__(self, cls: type[nn.Module]) -> None:
        self.type = cls

    def config(self, parametrization: nn.Module) -> dict[str, JSON]:
        """Nothing: the mask is all there is."""
        return {}

    def build(self, config: Mapping[str, JSON], like: Tensor | None) -> nn.Module:
        """Make the parametrization with its mask on the meta device.

        Raises:
            ConfigError: There is a configuration, or no tensor to mask.
        """
        if config or like is None:
            raise ConfigError(f"{self.kind}: not a configuration of this torch: {dict(config)}")
        return self.type(torch.empty(like.shape, dtype=like.dtype, device="meta"))

    def tensors(self, parametrization: nn.Module) -> dict[str, Tensor]:
        """``mask``."""
        return own_tensors(parametrization)

    def compute(self, config: Mapping[str, JSON], tensors: Mapping[str, Tensor]) -> Tensor:
        """``mask * original``, with torch's own forward."""
        built = self.build(config, tensors["original"])
        _torch.set_buffer(built, "mask", tensors["mask"])
        with torch.no_grad():
            weight: Tensor = built(tensors["original"])
        return weight

    def shape(self, originals: Mapping[str, torch.Size]) -> torch.Size | None:
        """That of ``original``."""
        return originals["original"]

    def check(
        self, config: Mapping[str, JSON], originals: Mapping[str, Sequence[int]], roles: Mapping[str, Sequence[int]]
    ) -> str | None:
        """One original, and a mask of its shape."""
        if set(originals) != {"original"} or {role: list(shape) for role, shape in roles.items()} != {
            "mask": list(originals["original"])
        }:
            return f"expected one original and a mask of its shape, got {dict(originals)} and {dict(roles)}"
        return None

    def recovers(self, config: Mapping[str, JSON]) -> bool:
        """No: an entry that is zero by chance and one that is masked look alike."""
        return False

    def from_weight(self, weight: Tensor, config: Mapping[str, JSON]) -> dict[str, Tensor]:
        """Refused.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(f"{self.kind}: a computed weight does not say which of its zeros are masked")


def for_type(cls: type[nn.Module]) -> FakeSparsityCodec | None:
    """The codec, if this is torch's class. Nothing is imported: a class that nobody imported is in no model."""
    known = getattr(sys.modules.get("torch.ao.pruning.sparsifier.utils"), "FakeSparsity", None)
    return FakeSparsityCodec(cls) if known is not None and cls is known else None


def for_kind(kind: str) -> FakeSparsityCodec | None:
    """The codec, if this is its kind and this torch has the class, which is imported only then."""
    if kind != FAKE_SPARSITY:
        return None
    try:
        from torch.ao.pruning.sparsifier.utils import FakeSparsity  # noqa: PLC0415
    except ImportError:  # a torch without it has nothing to build
        return None
    return FakeSparsityCodec(FakeSparsity)
