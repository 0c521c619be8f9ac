"""Checkpoints to checkpoints: what is stored another way, and stands for the same model."""

from orthoserde.transforms.bake import bake
from orthoserde.transforms.canonical import compact, compact_all, expand, untried
from orthoserde.transforms.columns import check_columns
from orthoserde.transforms.forms import hook_keys, to_hooks, to_parametrizations
from orthoserde.transforms.structured import structure, unstructure

__all__ = [
    "bake",
    "check_columns",
    "compact",
    "compact_all",
    "expand",
    "hook_keys",
    "structure",
    "to_hooks",
    "to_parametrizations",
    "unstructure",
    "untried",
]
