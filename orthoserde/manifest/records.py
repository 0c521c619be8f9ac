"""Frozen values that say what each stored tensor means. `as_json.py` has the text of them."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from orthoserde import tensor_bytes
from orthoserde.json_values import JSON
from orthoserde.manifest.training import PREFIX, TrainingRecord
from orthoserde.wording import legible_name

#: The format version that this package writes, and the highest that it reads.
FORMAT_VERSION = 1

#: The kind of a parametrization whose class is not registered: its state is kept, its configuration is not known.
OPAQUE = "opaque"

#: ``str`` of a manifest counts this many sorts of parametrized tensors.
SHOWN_KINDS = 20

#: A stored tensor that is the whole tensor, as opposed to a compressed form of it.
DENSE = "dense"

#: The base of an orthogonal parametrization, stored as its first columns; the others are their canonical completion.
COLUMNS = "columns"

#: A tensor under the key that the older hooks of torch give it, such as ``weight_g``, instead of ``parametrizations``'.
HOOK = "hook"

#: The kind whose base may be stored as columns.
ORTHOGONAL = "torch>orthogonal"

#: The kind that keeps the first columns alone, in memory too.
STRUCTURED = "orthoserde>orthogonal"

WEIGHT_NORM = "torch>weight_norm"
SPECTRAL_NORM = "torch>spectral_norm"
FAKE_SPARSITY = "torch>fake_sparsity"

#: By kind, what an older hook of torch adds to the name of the tensor: for each original and each tensor of its own.
HOOK_SUFFIXES: Mapping[str, Mapping[str, str]] = {
    WEIGHT_NORM: {"original0": "_g", "original1": "_v"},
    SPECTRAL_NORM: {"original": "_orig", "_u": "_u", "_v": "_v"},
    FAKE_SPARSITY: {"original": "_orig", "mask": "_mask"},
}


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """One stored tensor.

    Attributes:
        dtype: Name without ``torch.``, such as ``"float32"``.
        shape: Shape of the tensor.
        stride: Strides, in elements, that the tensor had in memory; the stored bytes are row-major.
        parameter: Whether it was an ``nn.Parameter`` (else a buffer).
        digest: XXH3-128 of the stored bytes, 32 hexadecimal digits; None while it has not been computed.
        requires_grad: Whether it required a gradient. A model that is loaded into keeps its own setting.
    """

    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    parameter: bool
    digest: str | None = None
    requires_grad: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return math.prod(self.shape) * tensor_bytes.DTYPES[self.dtype].itemsize


@dataclass(frozen=True, slots=True)
class ParametrizationRecord:
    """One link of a chain of parametrizations.

    Attributes:
        kind: Registered name, ``"torch>orthogonal"``, or ``"opaque"``.
        version: Version of the kind's configuration.
        config: All that the tensors leave out; None where it is not known.
        class_name: For an opaque link, ``module:qualname`` of its class, compared but never imported; else None.
        tensors: Encoding of each tensor of its own, by role (the name within the parametrization).
    """

    kind: str
    version: int
    config: Mapping[str, JSON] | None
    class_name: str | None
    tensors: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class ParametrizedRecord:
    """One parametrized tensor of a module.

    Attributes:
        module: Dotted path of the module, ``""`` for the root.
        tensor_name: Name of the tensor, such as ``"weight"``.
        aliases: Other paths of the same module object.
        shape: Shape of the computed tensor; None where only running the parametrization would tell.
        dtype: dtype name of the computed tensor; None where only running the parametrization would tell.
        parameter: Whether the tensor was an ``nn.Parameter`` before it was parametrized (else a buffer).
        unsafe: Whether it was registered with ``unsafe=True``.
        originals: Encoding of each unconstrained tensor by name: ``original``, or ``original0``, ``original1``, ...
        chain: The parametrizations in the order in which they are applied.
    """

    module: str
    tensor_name: str
    aliases: tuple[str, ...]
    shape: tuple[int, ...] | None
    dtype: str | None
    parameter: bool
    unsafe: bool
    originals: Mapping[str, str]
    chain: tuple[ParametrizationRecord, ...]

    @property
    def name(self) -> str:
        """Dotted name of the parametrized tensor, such as ``"layers.0.weight"``."""
        return join(self.module, self.tensor_name)

    @property
    def names(self) -> list[str]:
        """Its name under each path of its module."""
        return [join(path, self.tensor_name) for path in (self.module, *self.aliases)]

    @property
    def hooked(self) -> bool:
        """Whether it had an older hook of torch, and its tensors have the names of that."""
        return HOOK in self.originals.values()

    def original_key(self, name: str) -> str:
        """Key of an unconstrained tensor, the one torch's ``state_dict`` gives it."""
        return join(self.module, self.local_original_key(name))

    def link_key(self, index: int, role: str) -> str:
        """Key of a tensor of the parametrization at ``index``: torch's in a ``state_dict`` where it is stored dense."""
        return join(self.module, self.local_link_key(index, role))

    def local_original_key(self, name: str) -> str:
        """Key of an unconstrained tensor within the module."""
        if self.originals.get(name) == HOOK:
            return f"{self.tensor_name}{HOOK_SUFFIXES[self.chain[0].kind][name]}"
        return join("parametrizations", self.tensor_name, name)

    def local_link_key(self, index: int, role: str) -> str:
        """Key of a tensor of the parametrization at ``index`` within the module."""
        encoding = self.chain[index].tensors.get(role, DENSE)
        if encoding == HOOK:
            return f"{self.tensor_name}{HOOK_SUFFIXES[self.chain[index].kind][role]}"
        key = join("parametrizations", self.tensor_name, str(index), role)
        return f"{key}.{COLUMNS}" if encoding == COLUMNS else key

    def alias_keys(self, index: int, role: str) -> set[str]:
        """Key of a tensor of the parametrization at ``index`` under the other paths of the module."""
        return {join(path, self.local_link_key(index, role)) for path in self.aliases}

    def at(self, path: str) -> ParametrizedRecord:
        """The same tensor under another path of its module."""
        return dataclasses.replace(self, module=path)

    def columns(self) -> list[tuple[int, str]]:
        """Link and role of its tensors that are stored as columns."""
        return [(i, role) for i, link in enumerate(self.chain) for role, how in link.tensors.items() if how == COLUMNS]

    def tensor_keys(self) -> list[str]:
        """Keys under which all its tensors are stored."""
        own = [self.original_key(name) for name in self.originals]
        return own + [self.link_key(i, role) for i, link in enumerate(self.chain) for role in link.tensors]


@dataclass(frozen=True, slots=True)
class ModuleRecord:
    """One module of a registered class.

    Attributes:
        path: Dotted path of the module, ``""`` for the root.
        kind: Registered name of its class.
        version: Version of the kind's configuration.
        config: Constructor configuration; None where it is not known.
    """

    path: str
    kind: str
    version: int
    config: Mapping[str, JSON] | None


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds.

    Attributes:
        tensors: Stored tensors by key, in the order in which they are stored.
        aliases: Other keys of stored tensors: tied tensors are stored once.
        parametrized: Every parametrized tensor.
        modules: Every module of a registered class.
        computed: Stored keys that hold computed tensors, for readers without this library; they are no state.
        left_out: Keys that the saved model had and a selection left out.
        metadata: The user's own strings.
        writer: Versions of the libraries that wrote it, by name.
        training: Training state, whose tensors are among the stored ones; None where there is none.
        has_configuration: False for a file that some other library wrote: names, shapes and values are all it says.

    Example:
        >>> import tempfile, torch, orthoserde
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     saved = orthoserde.save(torch.nn.Linear(8, 4), f"{folder}/model.safetensors", metadata={"run": "7"})
        ...     manifest = orthoserde.inspect(f"{folder}/model.safetensors")
        >>> manifest.tensors["weight"].shape, manifest.nbytes, manifest.metadata
        ((4, 8), 144, {'run': '7'})
    """

    tensors: Mapping[str, TensorRecord]
    aliases: Mapping[str, str] = field(default_factory=dict)
    parametrized: tuple[ParametrizedRecord, ...] = ()
    modules: tuple[ModuleRecord, ...] = ()
    computed: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    writer: Mapping[str, str] = field(default_factory=dict)
    training: TrainingRecord | None = None
    has_configuration: bool = True

    def kept_key(self, key: str) -> str:
        """The key under which a tensor is stored, given that key or an alias."""
        return self.aliases.get(key, key)

    @functools.cached_property
    def computed_keys(self) -> frozenset[str]:
        """The keys of :attr:`computed`, to look a key up in."""
        return frozenset(self.computed)

    @functools.cached_property
    def other_keys(self) -> Mapping[str, list[str]]:
        """Aliases by the key of the tensor that they stand for."""
        found: dict[str, list[str]] = {}
        for alias, kept in self.aliases.items():
            found.setdefault(kept, []).append(alias)
        return found

    @property
    def training_keys(self) -> list[str]:
        """Keys of the tensors that are training state."""
        return [key for key in self.tensors if key.startswith(PREFIX)] if self.training is not None else []

    def __contains__(self, key: str) -> bool:
        return key in self.tensors or key in self.aliases

    def below(self, path: str) -> Manifest:
        """What it says of one module, in names that begin there; all stored tensors must be below its path.

        Raises:
            ValueError: A tensor is not below that path.
        """

        def strip(name: str) -> str:
            if name != path and not name.startswith(f"{path}."):
                raise ValueError(f"{name!r} is not below {path!r}")
            return name[len(path) + 1 :]

        def inside(name: str) -> bool:
            return name == path or name.startswith(f"{path}.")

        return dataclasses.replace(
            self,
            tensors={strip(key): record for key, record in self.tensors.items()},
            aliases={strip(key): strip(kept) for key, kept in self.aliases.items()},
            parametrized=tuple(
                dataclasses.replace(r, module=strip(r.module), aliases=tuple(map(strip, r.aliases)))
                for r in self.parametrized
            ),
            modules=tuple(dataclasses.replace(r, path=strip(r.path)) for r in self.modules if inside(r.path)),
            computed=tuple(map(strip, self.computed)),
            left_out=tuple(strip(key) for key in self.left_out if inside(key)),
        )

    @property
    def compact(self) -> tuple[str, ...]:
        """Names of the parametrized tensors whose base is stored as columns."""
        return tuple(record.name for record in self.parametrized if record.columns())

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors."""
        return sum(record.nbytes for record in self.tensors.values())

    @property
    def digests(self) -> dict[str, str]:
        """Digests of the stored tensors that have one, by key."""
        return {key: record.digest for key, record in self.tensors.items() if record.digest is not None}

    def __str__(self) -> str:
        lines = [f"{len(self.tensors)} tensors, {self.nbytes} bytes, {len(self.parametrized)} parametrized"]
        counts = Counter(", then ".join(link.kind for link in record.chain) for record in self.parametrized)
        lines += [f"  {count} x {legible_name(kinds)}" for kinds, count in sorted(counts.items())[:SHOWN_KINDS]]
        if self.compact:
            lines.append(f"  bases stored as columns: {len(self.compact)}")
        if self.aliases:
            lines.append(f"  tied and stored once: {len(self.aliases)}")
        if self.training is not None:
            lines.append(f"  training state: {legible_name(str(self.training))}")
        if self.left_out:
            lines.append(f"  left out when it was saved: {len(self.left_out)}")
        if not self.has_configuration:
            lines.append("  written by another library: names, shapes and values, but no configuration and no digests")
        return "\n".join(lines)


def join(*parts: str) -> str:
    """Join parts of a dotted path, leaving out empty ones."""
    return ".".join(part for part in parts if part)


def class_name(cls: type) -> str:
    """How a file records a class that it does not know by a kind: ``module:qualname``."""
    return f"{cls.__module__}:{cls.__qualname__}"


def qualname_of(recorded: str) -> str:
    """The part of :func:`class_name` that is compared: the module changes when a script is imported instead of run."""
    return recorded.partition(":")[2]
