"""Checkpoint <-> a folder of shards and their index, as Hugging Face's libraries lay it out.

Note [Commit]
A folder is read by the first of these names that it has: ``model.safetensors``, ``model.safetensors.index.json``.
transformers has the same order. So a checkpoint becomes the one that is read in a single step, whatever was there:

- shards, in a folder without ``model.safetensors``: when the index takes its name;
- shards, in a folder with one: when that file, which is ours, is removed, with the index and all shards in place;
- one file: when it takes its name.

Until that step nothing that the previous checkpoint needs has been touched, for no shard takes the name of one that
the standing index refers to. After it, what the previous one alone needed is removed. A process may be killed anywhere.
"""

from orthoserde.storage.shards.names import is_index_name
from orthoserde.storage.shards.reading import files_of_index, found_in, read_folder, read_index
from orthoserde.storage.shards.writing import write_shards

__all__ = ["files_of_index", "found_in", "is_index_name", "read_folder", "read_index", "write_shards"]
