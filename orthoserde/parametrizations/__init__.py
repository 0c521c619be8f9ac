"""One codec for each parametrization that torch brings, known to every registry."""

from __future__ import annotations

from torch import nn

from orthoserde.codec import Codec
from orthoserde.parametrizations.orthogonal import OrthogonalCodec
from orthoserde.parametrizations.spectral_norm import SpectralNormCodec
from orthoserde.parametrizations.weight_norm import WeightNormCodec
from orthoserde.registry import Registry

TORCH_CODECS: tuple[Codec, ...] = (OrthogonalCodec(), WeightNormCodec(), SpectralNormCodec())

_BY_TYPE = {codec.type: codec for codec in TORCH_CODECS}
_BY_KIND = {codec.kind: codec for codec in TORCH_CODECS}


def codec_for_type(registry: Registry, cls: type[nn.Module]) -> Codec | None:
    """The codec of exactly this class: the registry's, else torch's."""
    return registry.for_type(cls) or _BY_TYPE.get(cls)


def codec_for_kind(registry: Registry, kind: str) -> Codec | None:
    """The codec of a kind: the registry's, else torch's."""
    return registry.for_kind(kind) or _BY_KIND.get(kind)


__all__ = ["TORCH_CODECS", "codec_for_kind", "codec_for_type"]
