"""Classes by the names of pyvene's and pyreft's, with what of them this library looks at; neither is imported.

Their state is that of pyreft 0.1.0 and pyvene 0.1.8; ``tests/pyreft`` holds the same code to the real ones.
"""

from __future__ import annotations

from collections import OrderedDict
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

WIDTH, RANK = 8, 3


class Intervention(nn.Module):
    __module__ = "pyvene.models.interventions"

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        self.keep_last_dim = arguments.get("keep_last_dim", False)
        self.subspace_partition: object = arguments.get("subspace_partition")
        self.is_source_constant = False
        self.register_buffer("embed_dim", torch.tensor(arguments["embed_dim"]))
        self.register_buffer("interchange_dim", torch.tensor(arguments["embed_dim"]))
        if "source" in arguments:
            self.is_source_constant = True
            self.register_buffer("source_representation", arguments["source"])
        else:
            self.source_representation = None


class TrainableIntervention(Intervention):
    __module__ = "pyvene.models.interventions"


class VanillaIntervention(Intervention):
    __module__ = "pyvene.models.interventions"


class LowRankRotateLayer(nn.Module):
    __module__ = "pyreft.interventions"

    def __init__(self, n: int, m: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n, m))
        nn.init.orthogonal_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = x @ self.weight
        return output


class LoreftIntervention(TrainableIntervention):
    __module__ = "pyreft.interventions"

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments, keep_last_dim=True)
        width, rank = arguments["embed_dim"], arguments["low_rank_dimension"]
        self.rotate_layer = orthogonal(LowRankRotateLayer(width, rank))
        self.learned_source = nn.Linear(width, rank)
        self.dropout = nn.Dropout(arguments.get("dropout", 0.0))
        self.act_fn: nn.Module = nn.Identity()
        self.is_source_constant = True

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = x + (self.learned_source(x) - self.rotate_layer(x)) @ weight_of(self).T
        return output

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As pyreft overrides it."""
        state = OrderedDict(self.learned_source.state_dict())
        state["rotate_layer"] = weight_of(self).data
        return state


class ConsreftIntervention(TrainableIntervention):
    __module__ = "pyreft.interventions"

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments, keep_last_dim=True)
        width, rank = arguments["embed_dim"], arguments["low_rank_dimension"]
        self.rotate_layer = orthogonal(LowRankRotateLayer(width, rank))
        self.learned_source = nn.Parameter(torch.rand(rank))
        self.is_source_constant = True

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = x + (self.learned_source - self.rotate_layer(x)) @ weight_of(self).T
        return output


class Mine(LoreftIntervention):
    """A class of the user's."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.gate = nn.Parameter(torch.rand(arguments["low_rank_dimension"]))
        self.second = orthogonal(nn.Linear(arguments["embed_dim"], arguments["low_rank_dimension"]))


class Shift(VanillaIntervention):
    """A class of the user's that is not trained."""


class BaseModel(nn.Module):
    __module__ = "pyvene.models.intervenable_base"


class IntervenableModel(BaseModel):
    __module__ = "pyvene.models.intervenable_base"


class ReftModel(IntervenableModel):
    __module__ = "pyreft.reft_model"

    def __init__(self, interventions: dict[str, Intervention], model: nn.Module) -> None:
        super().__init__()
        self.interventions = nn.ModuleDict(interventions)
        self.model = model.requires_grad_(False)
        self.config = SimpleNamespace(
            mode="parallel",
            representations=[
                SimpleNamespace(layer=layer, component="block_output", unit="pos", max_number_of_units=1)
                for layer in range(len(interventions))
            ],
        )

    def __str__(self) -> str:
        raise AttributeError("pyvene's cannot be printed either")


def key_of(layer: int) -> str:
    return f"layer_{layer}_comp_block_output_unit_pos_nunit_1#0"


def make(
    *classes: type[Intervention], seed: int = 0, width: int = WIDTH, rank: int = RANK, **arguments: Any
) -> ReftModel:
    """A model with an intervention of each class in turn, by default two of LoReFT; the base is always the same."""
    torch.manual_seed(7)
    base = nn.Sequential(nn.Linear(2, 2))
    torch.manual_seed(seed)
    found = [
        cls(embed_dim=width, low_rank_dimension=rank, **arguments)
        for cls in classes or (LoreftIntervention, LoreftIntervention)
    ]
    return ReftModel({key_of(layer): each for layer, each in enumerate(found)}, base)


def weight_of(intervention: nn.Module) -> Tensor:
    weight = intervention.get_submodule("rotate_layer").weight
    assert isinstance(weight, Tensor)
    return weight


def original_of(intervention: nn.Module) -> Tensor:
    return intervention.get_parameter("rotate_layer.parametrizations.weight.original")


def base_of(intervention: nn.Module) -> Tensor:
    return intervention.get_buffer("rotate_layer.parametrizations.weight.0.base")
