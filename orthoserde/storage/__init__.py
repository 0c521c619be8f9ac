"""Checkpoint <-> bytes: a safetensors file whose metadata holds the manifest."""

from orthoserde.storage.format import FORBIDDEN_TENSOR_KEYS
from orthoserde.storage.reader import read
from orthoserde.storage.writer import write

__all__ = ["FORBIDDEN_TENSOR_KEYS", "read", "write"]
