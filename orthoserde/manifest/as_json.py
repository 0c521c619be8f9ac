"""Manifests to canonical JSON and back, every field checked.

`docs/reference/file-format.md` is the normative text of what is encoded here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import cast

from orthoserde import tensor_bytes
from orthoserde.errors import FileFormatError, FormatVersionError
from orthoserde.json_values import JSON
from orthoserde.manifest.records import (
    COLUMNS,
    DENSE,
    FORMAT_VERSION,
    HOOK,
    OPAQUE,
    Manifest,
    ModuleRecord,
    ParametrizationRecord,
    ParametrizedRecord,
    TensorRecord,
)
from orthoserde.manifest.references import check_references
from orthoserde.manifest.training import GroupRecord, OptimizerRecord, StateRecord, TrainingRecord


def encode_manifest(manifest: Manifest, digests: Mapping[str, str] | None = None) -> JSON:
    """Turn a manifest into JSON.

    Args:
        manifest: The manifest.
        digests: Those of its tensors by key; by default those that it has itself.

    Raises:
        ValueError: A digest has not been computed yet.
    """
    tensors: dict[str, JSON] = {}
    known = manifest.digests if digests is None else digests
    for key, record in manifest.tensors.items():
        if key not in known:
            raise ValueError(f"{key}: the digest has not been computed")
        tensors[key] = {
            "digest": known[key],
            "dtype": record.dtype,
            "parameter": record.parameter,
            "requires_grad": record.requires_grad,
            "shape": list(record.shape),
            "stride": list(record.stride),
        }
    return {
        "aliases": dict(manifest.aliases),
        "computed": list(manifest.computed),
        "digest": tensor_bytes.DIGEST,
        "left_out": list(manifest.left_out),
        "metadata": dict(manifest.metadata),
        "modules": [
            {"config": _config(rec.config), "kind": rec.kind, "path": rec.path, "version": rec.version}
            for rec in manifest.modules
        ],
        "parametrized": [_encode_parametrized(record) for record in manifest.parametrized],
        "tensors": tensors,
        "training": None if manifest.training is None else _encode_training(manifest.training),
        "version": FORMAT_VERSION,
        "writer": dict(manifest.writer),
    }


def _config(config: Mapping[str, JSON] | None) -> JSON:
    return None if config is None else dict(config)


def _encode_parametrized(record: ParametrizedRecord) -> JSON:
    return {
        "aliases": list(record.aliases),
        "chain": [
            {
                "class": link.class_name,
                "config": _config(link.config),
                "kind": link.kind,
                "tensors": dict(link.tensors),
                "version": link.version,
            }
            for link in record.chain
        ],
        "dtype": record.dtype,
        "module": record.module,
        "originals": dict(record.originals),
        "parameter": record.parameter,
        "shape": None if record.shape is None else list(record.shape),
        "tensor": record.tensor_name,
        "unsafe": record.unsafe,
    }


def decode_manifest(value: JSON, where: str) -> Manifest:
    """Turn JSON into a manifest, checking every field.

    Args:
        value: As :func:`orthoserde.json_values.decode` returned it.
        where: The file, for messages.

    Raises:
        FormatVersionError: A newer format version, a field, digest or encoding that this version does not know.
        FileFormatError: A field is missing, of another type, or contradicts another one.
    """
    top = _Fields(value, where, "manifest")
    version = top.version()
    if version > FORMAT_VERSION:
        raise FormatVersionError(
            f"{where}: written in format version {version}, this orthoserde reads up to {FORMAT_VERSION}; "
            "upgrade orthoserde",
            version,
            FORMAT_VERSION,
        )
    digest = top.string("digest")
    if digest != tensor_bytes.DIGEST:
        raise top.newer(f"digest: the digest {digest[:64]!r}")
    training = top.take("training")
    tensors = {
        key: _decode_tensor(_Fields(item, where, f"tensors[{key!r}]")) for key, item in top.mapping("tensors").items()
    }
    manifest = Manifest(
        tensors=tensors,
        aliases=top.strings("aliases"),
        parametrized=tuple(
            _decode_parametrized(_Fields(item, where, f"parametrized[{i}]"))
            for i, item in enumerate(top.sequence("parametrized"))
        ),
        modules=tuple(
            _decode_module(_Fields(item, where, f"modules[{i}]")) for i, item in enumerate(top.sequence("modules"))
        ),
        computed=top.string_list("computed"),
        left_out=top.string_list("left_out"),
        metadata=top.strings("metadata"),
        writer=top.strings("writer"),
        training=None if training is None else _decode_training(_Fields(training, where, "manifest.training")),
    )
    top.finish()
    check_references(manifest, where)
    return manifest


def _decode_tensor(fields: _Fields) -> TensorRecord:
    record = TensorRecord(
        dtype=fields.string("dtype"),
        shape=fields.sizes("shape"),
        stride=fields.sizes("stride"),
        parameter=fields.boolean("parameter"),
        digest=fields.string("digest"),
        requires_grad=fields.boolean("requires_grad"),
    )
    fields.finish()
    if record.dtype not in tensor_bytes.DTYPES:
        raise fields.error("dtype", "a dtype that torch has", record.dtype[:64])
    if not tensor_bytes.is_countable(record.shape):
        raise fields.error("shape", "fewer than 2**63 elements", "more")
    if len(record.stride) != len(record.shape):
        raise fields.error("stride", f"{len(record.shape)} strides", len(record.stride))
    digest = record.digest or ""
    if len(digest) != 32 or not set(digest) <= set("0123456789abcdef"):
        raise fields.error("digest", "32 hexadecimal digits", digest[:64])
    return record


def _decode_parametrized(fields: _Fields) -> ParametrizedRecord:
    record = ParametrizedRecord(
        module=fields.string("module"),
        tensor_name=fields.string("tensor"),
        aliases=fields.string_list("aliases"),
        shape=None if fields.peek("shape") is None else fields.sizes("shape"),
        dtype=None if fields.peek("dtype") is None else fields.string("dtype"),
        parameter=fields.boolean("parameter"),
        unsafe=fields.boolean("unsafe"),
        originals=_in_order(fields.encodings("originals", {DENSE, HOOK})),
        chain=tuple(
            _decode_link(_Fields(item, fields.where, f"{fields.path}.chain[{i}]"))
            for i, item in enumerate(fields.sequence("chain"))
        ),
    )
    fields.drop("shape", "dtype")
    fields.finish()
    if record.dtype is not None and record.dtype not in tensor_bytes.DTYPES:
        raise fields.error("dtype", "a dtype that torch has", record.dtype[:64])
    count = len(record.originals)
    names = {"original"} if set(record.originals) == {"original"} else {f"original{i}" for i in range(count)}
    if set(record.originals) != names or not count:
        raise fields.error("originals", "original, or original0, original1, ...", sorted(record.originals)[:8])
    if not record.chain:
        raise fields.error("chain", "at least one parametrization", "none")
    return record


def _in_order(originals: dict[str, str]) -> dict[str, str]:
    """Originals by their number: the order of a JSON object means nothing, and as text "original10" comes early."""
    return dict(sorted(originals.items(), key=lambda pair: (len(pair[0]), pair[0])))


def _decode_link(fields: _Fields) -> ParametrizationRecord:
    kind = fields.string("kind")
    class_name = None if fields.peek("class") is None else fields.string("class")
    config = None if fields.peek("config") is None else fields.mapping("config")
    link = ParametrizationRecord(
        kind, fields.version(), config, class_name, fields.encodings("tensors", {DENSE, COLUMNS, HOOK})
    )
    fields.drop("class", "config")
    fields.finish()
    if (kind == OPAQUE) != (class_name is not None):
        raise fields.error("class", "a name for an opaque parametrization, else null", class_name)
    return link


def _decode_module(fields: _Fields) -> ModuleRecord:
    config = None if fields.peek("config") is None else fields.mapping("config")
    record = ModuleRecord(fields.string("path"), fields.string("kind"), fields.version(), config)
    fields.drop("config")
    fields.finish()
    return record


def _encode_training(training: TrainingRecord) -> JSON:
    return {
        "optimizers": {
            label: {
                "class": optimizer.class_name,
                "groups": [
                    {"options": group.options, "parameters": list(group.parameters)} for group in optimizer.groups
                ],
                "rest": optimizer.rest,
                "state": dict(optimizer.state),
            }
            for label, optimizer in training.optimizers.items()
        },
        "rng": training.rng,
        "state": {name: {"class": entry.class_name, "value": entry.value} for name, entry in training.state.items()},
    }


def _decode_training(fields: _Fields) -> TrainingRecord:
    def inside(name: str) -> Iterator[tuple[str, _Fields]]:
        for key, item in fields.mapping(name).items():
            yield key, _Fields(item, fields.where, f"{fields.path}.{name}[{key!r}]")

    optimizers = {label: _decode_optimizer(inner) for label, inner in inside("optimizers")}
    state: dict[str, StateRecord] = {}
    for name, inner in inside("state"):
        class_name = None if inner.peek("class") is None else inner.string("class")
        state[name] = StateRecord(class_name, inner.take("value"))
        inner.drop("class")
        inner.finish()
    record = TrainingRecord(optimizers, state, fields.take("rng"))
    fields.finish()
    return record


def _decode_optimizer(fields: _Fields) -> OptimizerRecord:
    groups: list[GroupRecord] = []
    for i, item in enumerate(fields.sequence("groups")):
        inner = _Fields(item, fields.where, f"{fields.path}.groups[{i}]")
        groups.append(GroupRecord(inner.string_list("parameters"), inner.take("options")))
        inner.finish()
    record = OptimizerRecord(fields.string("class"), tuple(groups), fields.mapping("state"), fields.take("rest"))
    fields.finish()
    names = [name for group in record.groups for name in group.parameters]
    if len(set(names)) != len(names):
        raise fields.error("groups", "each parameter in one place", "one in several")
    if not record.state.keys() <= set(names):
        raise fields.error("state", "state of its parameters", "state of another")
    return record


class _Fields:
    """Takes the fields of a JSON object one by one, each checked for its type; what is left over is an error."""

    def __init__(self, value: JSON, where: str, path: str) -> None:
        self.where = where
        self.path = path
        if not isinstance(value, dict):
            raise FileFormatError(f"{where}: {path}: expected an object, got {_type_name(value)}")
        self._left = dict(value)

    def error(self, name: str, expected: str, got: object) -> FileFormatError:
        return FileFormatError(f"{self.where}: {self.path}.{name}: expected {expected}, got {got!r}")

    def newer(self, what: str) -> FormatVersionError:
        message = f"{self.where}: {self.path}.{what} needs a newer orthoserde"
        return FormatVersionError(message, FORMAT_VERSION, FORMAT_VERSION)

    def peek(self, name: str) -> JSON:
        if name not in self._left:
            raise FileFormatError(f"{self.where}: {self.path}: the field {name!r} is missing")
        return self._left[name]

    def take(self, name: str) -> JSON:
        value = self.peek(name)
        del self._left[name]
        return value

    def drop(self, *names: str) -> None:
        for name in names:
            self._left.pop(name, None)

    def finish(self) -> None:
        if self._left:
            names = ", ".join(repr(name) for name in sorted(self._left)[:8])
            message = f"{self.where}: {self.path}: unknown field {names}; the file needs a newer orthoserde"
            raise FormatVersionError(message, FORMAT_VERSION, FORMAT_VERSION)

    def string(self, name: str) -> str:
        value = self.take(name)
        if not isinstance(value, str):
            raise self.error(name, "a string", _type_name(value))
        return value

    def boolean(self, name: str) -> bool:
        value = self.take(name)
        if not isinstance(value, bool):
            raise self.error(name, "true or false", _type_name(value))
        return value

    def version(self) -> int:
        value = self.take("version")
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.error("version", "an integer from 1", value if isinstance(value, int) else _type_name(value))
        return value

    def sequence(self, name: str) -> list[JSON]:
        value = self.take(name)
        if not isinstance(value, list):
            raise self.error(name, "a list", _type_name(value))
        return value

    def mapping(self, name: str) -> dict[str, JSON]:
        value = self.take(name)
        if not isinstance(value, dict):
            raise self.error(name, "an object", _type_name(value))
        return value

    def strings(self, name: str) -> dict[str, str]:
        value = self.mapping(name)
        if not all(isinstance(item, str) for item in value.values()):
            raise self.error(name, "strings", "something else among its values")
        return cast("dict[str, str]", value)

    def encodings(self, name: str, known: set[str]) -> dict[str, str]:
        value = self.strings(name)
        for role, encoding in value.items():
            if encoding not in known:
                raise self.newer(f"{name}.{role}: the encoding {encoding[:64]!r}")
        return value

    def string_list(self, name: str) -> tuple[str, ...]:
        value = self.sequence(name)
        if not all(isinstance(item, str) for item in value):
            raise self.error(name, "a list of strings", "something else in it")
        return tuple(cast("list[str]", value))

    def sizes(self, name: str) -> tuple[int, ...]:
        value = self.sequence(name)
        if not all(isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in value):
            raise self.error(name, "a list of integers from 0", "something else in it")
        return tuple(cast("list[int]", value))


def _type_name(value: JSON) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
