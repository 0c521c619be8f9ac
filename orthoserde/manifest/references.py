"""What the parts of a manifest say of each other, held to be true."""

from __future__ import annotations

from collections import Counter

from orthoserde import tensor_bytes
from orthoserde.errors import FileFormatError
from orthoserde.manifest.records import COLUMNS, HOOK, HOOK_SUFFIXES, ORTHOGONAL, Manifest, ParametrizedRecord
from orthoserde.manifest.training import PREFIX


def is_shared(manifest: Manifest, record: ParametrizedRecord, index: int, role: str) -> bool:
    """Whether a stored tensor of a parametrization is another tensor too, by names that its module does not give."""
    key, own = record.link_key(index, role), record.alias_keys(index, role)
    return not own.issuperset(manifest.other_keys.get(key, ()))


def check_references(manifest: Manifest, where: str) -> None:
    """Hold the parts of a manifest to each other.

    Args:
        manifest: Any manifest.
        where: The file or model, for messages.

    Raises:
        FileFormatError: A part names a tensor that is not there, or one that is something else as well.
    """
    for key, kept in manifest.aliases.items():
        if kept not in manifest.tensors or key in manifest.tensors:
            raise FileFormatError(f"{where}: aliases[{key!r}]: expected the key of a stored tensor, got {kept!r}")
    for key in manifest.left_out:
        if key in manifest:
            raise FileFormatError(f"{where}: left_out: the file holds {key!r}")
    for key in manifest.computed:
        if key not in manifest.tensors:
            raise FileFormatError(f"{where}: computed: the file holds no tensor {key!r}")
    seen: set[str] = set()
    for record in manifest.parametrized:
        if record.name in seen:
            raise FileFormatError(f"{where}: {record.name!r} stands twice among the parametrized tensors")
        seen.add(record.name)
        odd = _odd_hook(record)
        if odd is not None:
            raise FileFormatError(f"{where}: {record.name}: {odd}")
        for key in record.tensor_keys():
            if key not in manifest:
                raise FileFormatError(f"{where}: {record.name}: the file holds no tensor {key!r}")
            if key in manifest.computed_keys:
                raise FileFormatError(f"{where}: computed: {key!r} is state of {record.name}")
        problem = _odd_columns(record, manifest) if record.columns() else None
        if problem is not None:
            raise FileFormatError(f"{where}: {record.name}: {problem}")
    _check_training(manifest, where)
    if len({record.path for record in manifest.modules}) != len(manifest.modules):
        raise FileFormatError(f"{where}: a module stands twice in the manifest")


def _check_training(manifest: Manifest, where: str) -> None:
    """Hold training state to the tensors that are stored for it."""
    referred = Counter(() if manifest.training is None else manifest.training.keys(where))
    for key, count in referred.items():
        if key not in manifest.tensors or not key.startswith(PREFIX) or count > 1:
            raise FileFormatError(f"{where}: training: expected the key of a tensor of its own, got {key!r}")
    model_keys = {*manifest.aliases, *manifest.aliases.values(), *manifest.computed}
    model_keys.update(key for record in manifest.parametrized for key in record.tensor_keys())
    model_keys.update(manifest.tensors.keys() - referred.keys())
    stray = next((key for key in sorted(model_keys) if key.startswith(PREFIX)), None)
    if stray is not None:
        raise FileFormatError(f"{where}: {stray!r} has the form of a key of training state, and is none")


def _odd_hook(record: ParametrizedRecord) -> str | None:
    """What is wrong with a tensor that is said to have had a hook."""
    encodings = [*record.originals.values(), *(how for link in record.chain for how in link.tensors.values())]
    if HOOK not in encodings:
        return None
    suffixes = HOOK_SUFFIXES.get(record.chain[0].kind, {})
    parts = [*record.originals, *record.chain[0].tensors]
    if len(record.chain) > 1 or set(encodings) != {HOOK} or set(parts) != set(suffixes):
        return "expected all the tensors of one parametrization that has a hook, and no other"
    return None


def _odd_columns(record: ParametrizedRecord, manifest: Manifest) -> str | None:
    """What is wrong with a base that is said to be stored as columns."""
    link, shape = record.chain[0], record.shape
    config = link.config or {}
    if len(record.chain) > 1 or record.columns() != [(0, "base")] or link.kind != ORTHOGONAL:
        return f"only the base of an {ORTHOGONAL} that stands alone can be stored as columns"
    if config.get("use_trivialization") is not True:
        return "columns of a base, without trivialization"
    if shape is None or len(shape) < 2 or config.get("shape") != list(shape):
        return f"columns of a base, of a weight of shape {shape} that is configured for {config.get('shape')}"
    n, k = max(shape[-2:]), min(shape[-2:])
    key = record.link_key(0, "base")
    stored = manifest.tensors.get(key)
    if stored is None or is_shared(manifest, record, 0, "base"):
        return f"{key!r} is tied to another tensor"
    if not 0 < k < n or stored.shape != (*shape[:-2], n, k):
        return f"expected columns of shape {[*shape[:-2], n, k]} with fewer columns than rows, got {list(stored.shape)}"
    if stored.stride != tensor_bytes.contiguous_strides(stored.shape) or stored.parameter or stored.requires_grad:
        return "columns of a base are a row-major buffer that requires no gradient"
    if stored.dtype != record.dtype or stored.dtype not in tensor_bytes.ORTHONORMAL_DTYPES:
        return f"columns of a base in {stored.dtype}, of a weight in {record.dtype}"
    if not tensor_bytes.is_countable((*shape[:-2], n, n)):
        return f"a base of {n} rows and columns is too large"
    whole = [key.removesuffix(f".{COLUMNS}") for key in (key, *record.alias_keys(0, "base"))]
    twice = next((each for each in whole if each in manifest), None)
    return None if twice is None else f"{twice!r} is stored beside its columns"
