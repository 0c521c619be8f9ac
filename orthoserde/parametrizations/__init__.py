"""The parametrizations that every registry knows: those that torch brings, and the structured form of one of them."""

from __future__ import annotations

from torch import nn

from orthoserde.codec import Codec
from orthoserde.parametrizations.orthogonal import OrthogonalCodec
from orthoserde.parametrizations.spectral_norm import SpectralNormCodec
from orthoserde.parametrizations.structured import StructuredCodec
from orthoserde.parametrizations.weight_norm import WeightNormCodec
from orthoserde.registry import Registry

BUILT_IN_CODECS: tuple[Codec, ...] = (OrthogonalCodec(), StructuredCodec(), WeightNormCodec(), SpectralNormCodec())

_BY_TYPE = {codec.type: codec for codec in BUILT_IN_CODECS}
_BY_KIND = {codec.kind: codec for codec in BUILT_IN_CODECS}


def codec_for_type(registry: Registry, cls: type[nn.Module]) -> Codec | None:
    """The codec of exactly this class: the registry's, else a built-in one."""
    return registry.for_type(cls) or _BY_TYPE.get(cls)


def codec_for_kind(registry: Registry, kind: str) -> Codec | None:
    """The codec of a kind: the registry's, else a built-in one."""
    return registry.for_kind(kind) or _BY_KIND.get(kind)


__all__ = ["BUILT_IN_CODECS", "codec_for_kind", "codec_for_type"]
