"""Deliberately broken builds of the library: each takes one check out, and a suite has to notice."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

from orthoserde import restore
from orthoserde.checkpoint import Checkpoint
from orthoserde.errors import DamagedFileError
from orthoserde.manifest import as_json
from orthoserde.parametrizations.orthogonal import OrthogonalCodec
from orthoserde.storage import container, format, reader, torch_files

Break = Callable[[pytest.MonkeyPatch], None]


class _LikeAny(str):
    """A text that no comparison tells from another."""

    __slots__ = ()
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        return True

    def __ne__(self, other: object) -> bool:
        return False


class _LikeAnyBytes(bytes):
    """Bytes that no comparison tells from others."""

    __slots__ = ()
    __hash__ = bytes.__hash__

    def __eq__(self, other: object) -> bool:
        return True

    def __ne__(self, other: object) -> bool:
        return False


def without_digests(patch: pytest.MonkeyPatch) -> None:
    """Tensors are not held to their digests."""
    fill = Checkpoint.fill
    patch.setattr(restore, "check_digests", lambda checkpoint: None)
    patch.setattr(Checkpoint, "fill", lambda self, targets, digests, in_order=(): fill(self, targets, {}, in_order))


def without_header_comparison(patch: pytest.MonkeyPatch) -> None:
    """The header is not held to the manifest."""
    written = format.file_header
    patch.setattr(format, "file_header", lambda manifest: _LikeAnyBytes(written(manifest)))


def without_manifest_digest(patch: pytest.MonkeyPatch) -> None:
    """The manifest is not held to its digest."""
    found = format._digest
    patch.setattr(format, "_digest", lambda text: _LikeAny(found(text)))


def without_size_check(patch: pytest.MonkeyPatch) -> None:
    """A file may be shorter or longer than its header says."""

    def decode(text: bytes, data_bytes: int, where: str) -> container.Header:
        try:
            return checked(text, data_bytes, where)
        except DamagedFileError as error:
            described = int(str(error).partition("describes ")[2].partition(" bytes")[0])
            return checked(text, described, where)

    checked = container.decode_header
    patch.setattr(reader, "decode_header", decode)


def without_version_check(patch: pytest.MonkeyPatch) -> None:
    """A newer format is read as if it were ours."""
    patch.setattr(as_json, "FORMAT_VERSION", 2**62)


def with_any_pickle(patch: pytest.MonkeyPatch) -> None:
    """Pickles are read by Python's own unpickler, and what names they hold is not looked at."""
    load = torch.load

    def trusting(file: Any, **options: Any) -> Any:
        return load(file, **{**options, "weights_only": False, "pickle_module": pickle})

    patch.setattr(torch, "load", trusting)
    patch.setattr(torch_files, "check_pickle", lambda *arguments: None)
    patch.setattr(torch_files, "SAFE_TORCH", (0, 0))


def without_constraint(patch: pytest.MonkeyPatch) -> None:
    """Any weight counts as orthogonal."""
    patch.setattr(OrthogonalCodec, "admits", lambda self, weight, config: True)


#: What is taken out of each, and which suites notice.
BUILDS: dict[str, tuple[Break, tuple[str, ...]]] = {
    "digests of tensors": (without_digests, ("corruption", "hostile")),
    "comparison of the header with the manifest": (without_header_comparison, ("corruption", "hostile")),
    "digest of the manifest": (without_manifest_digest, ("hostile",)),
    "size of the file": (without_size_check, ("corruption", "hostile")),
    "format version": (without_version_check, ("hostile",)),
    "restricted unpickler": (with_any_pickle, ("hostile", "audit")),
    "orthogonality": (without_constraint, ("hostile", "numerics")),
}


def noticed_by(suite: str) -> list[str]:
    """The builds that a suite has to notice."""
    return [name for name, (_, suites) in BUILDS.items() if suite in suites]
