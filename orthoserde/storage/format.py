"""Where the manifest stands in a safetensors file, and how the two are held to each other.

A file of ours is canonical: its header is a function of its manifest, byte for byte. So a reader parses the manifest,
writes the header again and compares, and no bit of the header can change unseen.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping

import xxhash

from orthoserde import json_values
from orthoserde.errors import DamagedFileError, FileFormatError
from orthoserde.json_values import JSON
from orthoserde.manifest import Manifest, TensorRecord
from orthoserde.manifest.as_json import decode_manifest, encode_manifest
from orthoserde.storage.container import (
    LENGTH_BYTES,
    Entry,
    Header,
    container_form,
    encode_header,
    entries_of,
    storage_order,
)
from orthoserde.tensor_bytes import contiguous_strides, is_countable

#: The key of ``__metadata__`` that holds the manifest.
MANIFEST_KEY = "orthoserde"

#: Keys of ``__metadata__`` that mean something else than an alias.
RESERVED_KEYS = frozenset({"format", MANIFEST_KEY})

#: How every manifest begins. A damaged key must not make a file of ours look like another library's.
_ENVELOPE_START = '{"digest":"'

_ENVELOPE = re.compile(_ENVELOPE_START + r'(?P<digest>[0-9a-f]{32})","manifest":(?P<manifest>\{.*\})\}', re.DOTALL)

#: What stands in a shard instead: the digest of the manifest, which is in the index.
_SHARD_MARK = re.compile(_ENVELOPE_START + r'[0-9a-f]{32}"\}')

#: What stands before the envelope in a header.
_BEFORE_ENVELOPE = f'"{MANIFEST_KEY}":"'
_STRING = json.JSONDecoder()

#: Keys that no tensor can have, because the container means something else by them.
FORBIDDEN_TENSOR_KEYS = frozenset({"__metadata__"})


def in_storage_order(tensors: Mapping[str, TensorRecord]) -> dict[str, TensorRecord]:
    """The same records in the order in which their bytes are stored."""
    return {key: tensors[key] for key in storage_order(_forms(tensors))}


def _forms(tensors: Mapping[str, TensorRecord]) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {key: container_form(record.dtype, record.shape) for key, record in tensors.items()}


def file_header(manifest: Manifest, digests: Mapping[str, str] | None = None) -> bytes:
    """The length and header of the file that holds this manifest, whose tensors are in storage order.

    Args:
        manifest: The manifest.
        digests: Those of its tensors by key; by default those that it has itself.
    """
    metadata = {key: kept for key, kept in manifest.aliases.items() if key not in RESERVED_KEYS}
    return encode_header(
        _forms(manifest.tensors), metadata | {"format": "pt", MANIFEST_KEY: envelope(manifest, digests)}
    )


def shard_header(tensors: Mapping[str, TensorRecord], digest: str) -> bytes:
    """The length and header of a shard.

    Args:
        tensors: Its tensors, in storage order.
        digest: That of the manifest, which stands in the index.
    """
    return encode_header(_forms(tensors), {"format": "pt", MANIFEST_KEY: shard_mark(digest)})


def shard_mark(digest: str) -> str:
    """What ties a shard to the manifest with this digest: the envelope without the manifest."""
    return f'{_ENVELOPE_START}{digest}"}}'


def is_shard(metadata: Mapping[str, str]) -> bool:
    """Whether the metadata of a file say that it is a shard of a checkpoint of ours."""
    return _SHARD_MARK.fullmatch(metadata.get(MANIFEST_KEY, "")) is not None


def envelope(manifest: Manifest, digests: Mapping[str, str] | None = None) -> str:
    """The text of a manifest, with its digest; the arguments are those of :func:`file_header`."""
    text = json_values.encode(encode_manifest(manifest, digests))
    return f'{_ENVELOPE_START}{_digest(text)}","manifest":{text}}}'


def digest_in(envelope_text: str) -> str:
    """The digest that stands in an envelope which :func:`envelope` wrote, or which was decoded."""
    return envelope_text[len(_ENVELOPE_START) : len(_ENVELOPE_START) + 32]


def _digest(manifest: str) -> str:
    return xxhash.xxh3_128_hexdigest(manifest.encode("utf-8", "surrogatepass"))


def holds_envelope(texts: Iterable[object]) -> bool:
    """Whether one of these values has the form of an envelope."""
    return any(isinstance(text, str) and text.startswith(_ENVELOPE_START) for text in texts)


def decode_envelope(text: str, where: str) -> Manifest:
    """The manifest in an envelope, its tensors in storage order.

    Raises:
        DamagedFileError: The manifest does not match its digest.
        FileFormatError: The envelope or the manifest is malformed, or of a newer format.
    """
    match = _ENVELOPE.fullmatch(text)
    if match is None:
        raise FileFormatError(
            f"{where}: expected a manifest and its digest in the metadata, under {MANIFEST_KEY!r}; use another copy"
        )
    if _digest(match["manifest"]) != match["digest"]:
        raise DamagedFileError(
            f"{where}: the manifest does not match its digest; the file is damaged, use another copy"
        )
    manifest = decode_manifest(json_values.decode(match["manifest"], f"{where}: manifest"), where)
    return dataclasses.replace(manifest, tensors=in_storage_order(manifest.tensors))


def canonical_parts(raw: bytes, data_bytes: int, where: str) -> tuple[Manifest, dict[str, Entry]] | None:
    """The manifest of a file of ours, and where its tensors lie, by its manifest alone.

    A header that is byte for byte the one that its manifest gives says nothing that the manifest does not say, so it
    need not be parsed as well. This is how nearly all files of ours are read; :func:`manifest_of` says what is wrong
    with the others.

    Args:
        raw: The bytes of length and header.
        data_bytes: Bytes that follow the header in the file.
        where: The file, for messages.

    Returns:
        None where the header is not that of any manifest, or the file is longer or shorter than it says.
    """
    try:
        text = raw[LENGTH_BYTES:].decode("utf-8")
        start = text.find(_BEFORE_ENVELOPE)
        if start < 0:
            return None
        envelope_text, _ = _STRING.raw_decode(text, start + len(_BEFORE_ENVELOPE) - 1)
        manifest = decode_envelope(envelope_text, where)
        if file_header(manifest) != raw:
            return None
    except (FileFormatError, ValueError):
        return None
    forms = _forms(manifest.tensors)
    if not all(is_countable(shape) for _, shape in forms.values()):  # a manifest counts pairs as one
        return None
    entries = entries_of(forms)
    last = next(reversed(entries.values()), None)
    return (manifest, entries) if (0 if last is None else last.stop) == data_bytes else None


def manifest_of(header: Header, raw: bytes, where: str) -> Manifest:
    """The manifest of a file.

    Args:
        header: The parsed header.
        raw: The bytes of length and header, as they stand in the file.
        where: The file, for messages.

    Raises:
        DamagedFileError: The manifest does not match its digest, or the header does not match the manifest.
        FileFormatError: The manifest is malformed or of a newer format, or the file is one shard of several.
    """
    if MANIFEST_KEY not in header.metadata:
        if holds_envelope(header.metadata.values()):
            raise DamagedFileError(
                f"{where}: a manifest stands under another key than {MANIFEST_KEY!r}; the file is damaged"
            )
        return foreign_manifest(header.entries, header.metadata)
    if is_shard(header.metadata):
        raise FileFormatError(
            f"{where}: one shard of a checkpoint, which does not say what its tensors mean; give the path of the "
            "folder, or of the index"
        )
    manifest = decode_envelope(header.metadata[MANIFEST_KEY], where)
    if file_header(manifest) != raw:
        raise DamagedFileError(
            f"{where}: the header does not match the manifest; the file is damaged or was rewritten by another tool"
        )
    return manifest


def foreign_manifest(entries: Mapping[str, Entry], metadata: Mapping[str, JSON]) -> Manifest:
    """What can be said of tensors that another library wrote, and of the aliases among the metadata."""
    tensors = {
        key: TensorRecord(entry.dtype, entry.shape, contiguous_strides(entry.shape), parameter=False)
        for key, entry in entries.items()
    }
    aliases = {
        key: kept
        for key, kept in metadata.items()
        if isinstance(kept, str) and kept in tensors and key not in tensors and key != "format"
    }
    return Manifest(tensors=tensors, aliases=aliases, has_configuration=False)
