"""Interventions of a user's own, as the issue has them: subclasses with parameters that pyreft knows nothing of."""

from __future__ import annotations

from typing import Any

import pyreft
import pyvene
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal, weight_norm


class Gated(pyreft.LoreftIntervention):  # type: ignore[misc]
    """LoReFT with a gate, a buffer that its forward moves, and a second rotation."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        rank = kwargs["low_rank_dimension"]
        self.gate = nn.Parameter(torch.rand(rank))
        self.register_buffer("seen", torch.zeros(()))
        self.second = orthogonal(nn.Linear(int(self.embed_dim), rank), orthogonal_map="cayley")

    def forward(self, base: Tensor, source: Tensor | None = None, subspaces: object = None) -> Tensor:
        self.seen += 1
        inner = self.act_fn(self.learned_source(base)) - self.rotate_layer(base) + self.second(base)
        output: Tensor = self.dropout(base + (self.gate * inner) @ self.rotate_layer.weight.T)
        return output


class Normed(pyreft.ConsreftIntervention):  # type: ignore[misc]
    """ConsReFT with a parametrization of another kind; its own ``state_dict`` is torch's."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.extra = weight_norm(nn.Linear(int(self.embed_dim), int(self.embed_dim)))

    def forward(self, base: Tensor, source: Tensor | None = None, subspaces: object = None) -> Tensor:
        output: Tensor = super().forward(base) + self.extra(base)
        return output


class Shift(pyvene.VanillaIntervention):  # type: ignore[misc]
    """Not trained, and no class that this library knows by name."""
