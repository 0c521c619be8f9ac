"""The parametrizations that every registry knows: those that torch brings, and the structured form of one of them.

That of torch.ao.pruning is known too, but looked for only when it is met: torch does not import it by itself.
"""

from __future__ import annotations

from torch import nn

from orthoserde.parametrizations import fake_sparsity
from orthoserde.parametrizations.orthogonal import OrthogonalCodec
from orthoserde.parametrizations.spectral_norm import SpectralNormCodec
from orthoserde.parametrizations.structured import StructuredCodec
from orthoserde.parametrizations.weight_norm import WeightNormCodec
from orthoserde.registry import Registry
from orthoserde.registry.codec import Codec

BUILT_IN_CODECS: tuple[Codec, ...] = (OrthogonalCodec(), StructuredCodec(), WeightNormCodec(), SpectralNormCodec())

_BY_TYPE = {codec.type: codec for codec in BUILT_IN_CODECS}
_BY_KIND = {codec.kind: codec for codec in BUILT_IN_CODECS}


def codec_for_type(registry: Registry, cls: type[nn.Module]) -> Codec | None:
    """The codec of exactly this class: the registry's, else a built-in one."""
    return registry.for_type(cls) or _BY_TYPE.get(cls) or fake_sparsity.for_type(cls)


def codec_for_kind(registry: Registry, kind: str) -> Codec | None:
    """The codec of a kind: the registry's, else a built-in one."""
    return registry.for_kind(kind) or _BY_KIND.get(kind) or fake_sparsity.for_kind(kind)


def is_built_in(codec: Codec) -> bool:
    """Whether a codec is one that every registry knows, so that it is safe to run on a stranger's tensors."""
    return codec in BUILT_IN_CODECS or isinstance(codec, fake_sparsity.FakeSparsityCodec)


__all__ = ["BUILT_IN_CODECS", "codec_for_kind", "codec_for_type", "is_built_in"]
