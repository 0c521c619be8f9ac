"""The index of a checkpoint in shards: its text, and what follows from it.

An index of ours is canonical, as the header of a single file is: its text follows from the manifest and from which
shard holds which tensor, and so does the header of every shard.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

from orthoserde import json_values
from orthoserde.errors import DamagedFileError, FileFormatError
from orthoserde.json_values import JSON
from orthoserde.manifest import Manifest, TensorRecord
from orthoserde.storage.format import (
    MANIFEST_KEY,
    decode_envelope,
    digest_in,
    envelope,
    holds_envelope,
    shard_header,
)
from orthoserde.storage.shards.names import checked_basename

#: An index is held to the limit that headers of safetensors files have.
MAX_INDEX_BYTES = 100_000_000

#: More tensors than an index of ours has room for; of a few bytes each, reading them would take minutes and gigabytes.
MAX_TENSORS = 1 << 19

#: Keys of the index's ``metadata`` that mean something else than an alias, to us or to transformers.
RESERVED_KEYS = frozenset({"all_checkpoint_keys", "format", "total_parameters", "total_size", "weight_map"})


@dataclass(frozen=True)
class Index:
    """An index that has been read or is about to be written.

    Attributes:
        manifest: That of the whole checkpoint; None in the index of another library.
        weight_map: The file of each tensor, by key.
        metadata: What else another library says of it.
        digest: That of the manifest; "" in the index of another library.
    """

    manifest: Manifest | None
    weight_map: Mapping[str, str]
    metadata: Mapping[str, JSON] = field(default_factory=dict)
    digest: str = ""

    @property
    def keys_by_file(self) -> dict[str, set[str]]:
        """The keys of each shard, in ascending order of the names of the files."""
        shards: dict[str, set[str]] = {name: set() for name in sorted(set(self.weight_map.values()))}
        for key, name in self.weight_map.items():
            shards[name].add(key)
        return shards


def headers_of(index: Index, manifest: Manifest) -> dict[str, bytes]:
    """The length and header of every shard, by the name of its file; the manifest is in storage order."""
    by_file: dict[str, dict[str, TensorRecord]] = {name: {} for name in index.keys_by_file}
    for key, record in manifest.tensors.items():
        by_file[index.weight_map[key]][key] = record
    return {name: shard_header(records, index.digest) for name, records in by_file.items()}


def encode_index(manifest: Manifest, sealed: str, weight_map: Mapping[str, str]) -> bytes:
    """The text of the index of a manifest.

    Args:
        manifest: The manifest.
        sealed: Its envelope.
        weight_map: Names of the shards by key.

    Raises:
        FileFormatError: It would be larger than readers accept.
    """
    metadata: dict[str, JSON] = {key: kept for key, kept in manifest.aliases.items() if key not in RESERVED_KEYS}
    metadata |= {"total_size": manifest.nbytes, MANIFEST_KEY: sealed}
    text = json_values.encode({"metadata": metadata, "weight_map": dict(weight_map)}).encode("utf-8")
    if len(text) > MAX_INDEX_BYTES or len(weight_map) > MAX_TENSORS:
        raise FileFormatError(
            f"{len(weight_map)} tensors and an index of {len(text)} bytes: readers accept {MAX_TENSORS} tensors and "
            f"{MAX_INDEX_BYTES} bytes in one checkpoint"
        )
    return text


def decode_index(text: bytes, ending: str, where: str) -> Index:
    """Parse an index strictly, of ours or of another library.

    Args:
        text: The text of the file.
        ending: How the names of its shards have to end.
        where: The file, for messages.

    Raises:
        DamagedFileError: Its manifest does not match its digest, or the rest does not match the manifest.
        FileFormatError: It is malformed, or names a file that might be elsewhere.
    """
    # Before it is parsed: names may be written in other ways, so this is not the last word.
    if text.count(f'{ending}"'.encode()) > MAX_TENSORS:
        raise FileFormatError(f"{where}: the index speaks of more than {MAX_TENSORS} tensors")
    parsed = json_values.decode(text, where)
    if not isinstance(parsed, dict):
        raise FileFormatError(f"{where}: expected an object")
    weight_map = parsed.get("weight_map")
    metadata = parsed.get("metadata", {})
    if not isinstance(weight_map, dict) or not isinstance(metadata, dict):
        raise FileFormatError(f"{where}: expected an object weight_map, and perhaps an object metadata")
    if len(weight_map) > MAX_TENSORS:
        raise FileFormatError(f"{where}: the index speaks of more than {MAX_TENSORS} tensors")
    names = {
        key: checked_basename(name, ending, f"{where}: weight_map[{key[:64]!r}]") for key, name in weight_map.items()
    }
    if MANIFEST_KEY in metadata:
        return _decode_own(text, metadata[MANIFEST_KEY], names, where)
    if holds_envelope(metadata.values()) or holds_envelope(parsed.values()):
        raise DamagedFileError(f"{where}: a manifest stands under another key than {MANIFEST_KEY!r}; it is damaged")
    return Index(None, names, metadata)


def _decode_own(text: bytes, own: JSON, weight_map: Mapping[str, str], where: str) -> Index:
    own = own if isinstance(own, str) else ""
    manifest = decode_envelope(own, where)
    if manifest.tensors.keys() != weight_map.keys():
        odd = min(manifest.tensors.keys() ^ weight_map.keys())
        raise DamagedFileError(f"{where}: only one of weight_map and manifest has {odd[:64]!r}; the index is damaged")
    if encode_index(manifest, envelope(manifest), weight_map) != text:
        raise DamagedFileError(
            f"{where}: the index does not match its manifest; it is damaged or was rewritten by another tool"
        )
    return Index(manifest, weight_map, digest=digest_in(own))


def in_file_order(manifest: Manifest, weight_map: Mapping[str, str]) -> Manifest:
    """The same manifest with the tensors in the order of their files, then as they were."""
    keys = sorted(manifest.tensors, key=lambda key: weight_map[key])
    return dataclasses.replace(manifest, tensors={key: manifest.tensors[key] for key in keys})
