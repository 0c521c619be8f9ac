"""Checkpoint <-> bytes: a safetensors file whose metadata holds the manifest, or shards and an index that holds it."""

from orthoserde.storage.atomic import sync_folder
from orthoserde.storage.format import FORBIDDEN_TENSOR_KEYS
from orthoserde.storage.leftovers import remove_leftovers
from orthoserde.storage.paths import check_name, files_of, read
from orthoserde.storage.plain import write_plain, write_torch
from orthoserde.storage.reader import read_file
from orthoserde.storage.shards import write_shards
from orthoserde.storage.writer import write

__all__ = [
    "FORBIDDEN_TENSOR_KEYS",
    "check_name",
    "files_of",
    "read",
    "read_file",
    "remove_leftovers",
    "sync_folder",
    "write",
    "write_plain",
    "write_shards",
    "write_torch",
]
