"""Checkpoint <-> bytes: a safetensors file whose metadata holds the manifest."""

from orthoserde.storage.atomic import sync_folder
from orthoserde.storage.format import FORBIDDEN_TENSOR_KEYS
from orthoserde.storage.leftovers import remove_leftovers
from orthoserde.storage.plain import write_plain, write_torch
from orthoserde.storage.reader import read
from orthoserde.storage.writer import write

__all__ = ["FORBIDDEN_TENSOR_KEYS", "read", "remove_leftovers", "sync_folder", "write", "write_plain", "write_torch"]
