"""Where the manifest stands in a safetensors file, and how the two are held to each other.

A file of ours is canonical: its header is a function of its manifest, byte for byte. So a reader parses the manifest,
writes the header again and compares, and no bit of the header can change unseen.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

import xxhash

from orthoserde import json_values
from orthoserde.errors import DamagedFileError, FileFormatError
from orthoserde.manifest import Manifest, TensorRecord
from orthoserde.manifest_json import decode_manifest, encode_manifest
from orthoserde.storage.container import Header, container_form, encode_header, storage_order
from orthoserde.tensor_bytes import contiguous_strides

#: The key of ``__metadata__`` that holds the manifest.
MANIFEST_KEY = "orthoserde"

#: Keys of ``__metadata__`` that mean something else than an alias.
RESERVED_KEYS = frozenset({"format", MANIFEST_KEY})

#: How every manifest begins. A damaged key must not make a file of ours look like another library's.
_ENVELOPE_START = '{"digest":"'

_ENVELOPE = re.compile(_ENVELOPE_START + r'(?P<digest>[0-9a-f]{32})","manifest":(?P<manifest>\{.*\})\}', re.DOTALL)

#: Keys that no tensor can have, because the container means something else by them.
FORBIDDEN_TENSOR_KEYS = frozenset({"__metadata__"})


def in_storage_order(tensors: Mapping[str, TensorRecord]) -> dict[str, TensorRecord]:
    """The same records in the order in which their bytes are stored."""
    return {key: tensors[key] for key in storage_order(_forms(tensors))}


def _forms(tensors: Mapping[str, TensorRecord]) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {key: container_form(record.dtype, record.shape) for key, record in tensors.items()}


def file_header(manifest: Manifest) -> bytes:
    """The length and header of the file that holds this manifest, whose tensors are in storage order."""
    text = json_values.encode(encode_manifest(manifest))
    metadata = {key: kept for key, kept in manifest.aliases.items() if key not in RESERVED_KEYS}
    metadata |= {"format": "pt", MANIFEST_KEY: f'{_ENVELOPE_START}{_digest(text)}","manifest":{text}}}'}
    return encode_header(_forms(manifest.tensors), metadata)


def _digest(manifest: str) -> str:
    return xxhash.xxh3_128_hexdigest(manifest.encode("utf-8", "surrogatepass"))


def manifest_of(header: Header, raw: bytes, where: str) -> Manifest:
    """The manifest of a file.

    Args:
        header: The parsed header.
        raw: The bytes of length and header, as they stand in the file.
        where: The file, for messages.

    Raises:
        DamagedFileError: The manifest does not match its digest, or the header does not match the manifest.
        FileFormatError: The manifest is malformed or of a newer format.
    """
    if MANIFEST_KEY not in header.metadata:
        if any(text.startswith(_ENVELOPE_START) for text in header.metadata.values()):
            raise DamagedFileError(
                f"{where}: a manifest stands under another key than {MANIFEST_KEY!r}; the file is damaged"
            )
        return _foreign_manifest(header)
    match = _ENVELOPE.fullmatch(header.metadata[MANIFEST_KEY])
    if match is None:
        raise FileFormatError(f"{where}: expected a manifest and its digest in __metadata__.{MANIFEST_KEY}")
    if _digest(match["manifest"]) != match["digest"]:
        raise DamagedFileError(
            f"{where}: the manifest does not match its digest; the file is damaged, use another copy"
        )
    manifest = decode_manifest(json_values.decode(match["manifest"], f"{where}: manifest"), where)
    ordered = dataclasses.replace(manifest, tensors=in_storage_order(manifest.tensors))
    if file_header(ordered) != raw:
        raise DamagedFileError(
            f"{where}: the header does not match the manifest; the file is damaged or was rewritten by another tool"
        )
    return ordered


def _foreign_manifest(header: Header) -> Manifest:
    """What can be said of a safetensors file that another library wrote."""
    tensors = {
        key: TensorRecord(entry.dtype, entry.shape, contiguous_strides(entry.shape), parameter=False)
        for key, entry in header.entries.items()
    }
    aliases = {
        key: kept for key, kept in header.metadata.items() if kept in tensors and key not in tensors and key != "format"
    }
    return Manifest(tensors=tensors, aliases=aliases, has_configuration=False)
