"""What the tests of shards share: models that tell which save they are of, and what a folder holds."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

import orthoserde

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

#: So many bytes per shard that the model below takes four.
LIMIT = 300


def make(value: float = 0.0) -> nn.Sequential:
    """A model of 856 bytes with a parametrized weight and a tie, whose plain elements are all ``value``."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(8, 8), nn.Linear(8, 8), nn.BatchNorm1d(8))
    model[2].weight = model[1].weight
    orthogonal(model[0])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "parametrizations" not in name:
                parameter.fill_(value)
    return model


def state(model: nn.Module) -> dict[str, Tensor]:
    """Copies of its tensors."""
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Whether two states are equal in keys and bits."""
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def loaded(path: Path | str, **arguments: Any) -> dict[str, Tensor]:
    """The state of a model into which a checkpoint has been loaded."""
    model = make(-1.0)
    orthoserde.load(model, path, **arguments)
    return state(model)


def as_transformers_reads(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder by its keys, in the order of preference of transformers, digests and manifest unseen."""
    if (folder / SINGLE).exists():
        return safetensors.torch.load_file(folder / SINGLE)
    weight_map: dict[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
    found: dict[str, Tensor] = {}
    for name in sorted(set(weight_map.values())):
        with safetensors.safe_open(folder / name, "pt") as file:
            assert file.metadata()["format"] == "pt"
        found |= safetensors.torch.load_file(folder / name)
    assert found.keys() == weight_map.keys()
    return found


def names(folder: Path) -> list[str]:
    """What is in a folder, in order."""
    return sorted(os.listdir(folder))


def shards(folder: Path) -> list[str]:
    """The names of the shards that the index of a folder refers to, in order."""
    return sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
