"""Manifests and reports as tables of plain text, for people."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from orthoserde import json_values
from orthoserde.json_values import JSON
from orthoserde.manifest import COLUMNS, OPAQUE, Manifest, ParametrizationRecord, TensorRecord, qualname_of
from orthoserde.reports import VerifyReport, printable

#: Columns of a terminal that tables keep to.
WIDTH = 100

#: A list shows this many entries and counts the rest; parametrized tensors are all shown.
SHOWN = 100

#: A configuration takes at most this many lines.
CONFIG_LINES = 4

_GAP = "  "
_LABEL = 13


def describe(manifest: Manifest, path: str, file_bytes: int) -> str:
    """Describe what a file holds.

    Args:
        manifest: As ``orthoserde.inspect`` returns it.
        path: The file.
        file_bytes: Its size.

    Returns:
        Lines of at most ``WIDTH`` characters, without one at the end that is empty: the file, its parametrized tensors
        with their configuration, its plain tensors, and what else the manifest says. Long names are shortened in the
        middle, and what a terminal would obey is escaped.
    """
    parts = [
        _head(manifest, path, file_bytes),
        _parametrized(manifest),
        _plain(manifest),
        _training(manifest),
        _listed("tied tensors", [f"{alias} = {kept}" for alias, kept in manifest.aliases.items()]),
        _modules(manifest),
        _listed("left out when it was saved", manifest.left_out),
    ]
    return "\n\n".join("\n".join(part) for part in parts if part)


def describe_verification(report: VerifyReport) -> str:
    """Describe what a verification found.

    Args:
        report: As ``orthoserde.verify`` returns it.

    Returns:
        Lines of at most ``WIDTH`` characters: the verdict, and a row for each parametrized tensor.
    """
    head = [squeeze(printable(report.path), WIDTH), _pair("verdict", report.verdict)]
    head += _wrapped_pair("digests", report.integrity)
    if report.residuals:
        head += _wrapped_pair("constraints", report.constraints)
    parts = [head, _listed("damaged tensors", report.damaged)]
    rows = [("parametrized tensor", "residual", "")]
    for name, residual in report.residuals.items():
        verdict = "" if residual is not None else "no constraint to measure"
        verdict = "OFF THE CONSTRAINT" if name in report.off_constraint else verdict
        rows.append((name, "-" if residual is None else f"{residual:.2g}", verdict))
    if len(rows) > 1:
        parts.append(_table(rows, right={1}))
    for title, reasons in (("does not fit its configuration", report.misfits), ("not measured", report.not_measured)):
        parts.append(_reasons(title, reasons))
    return "\n\n".join("\n".join(part) for part in parts if part)


def squeeze(text: str, width: int) -> str:
    """Shorten a text in the middle, where names differ least."""
    if len(text) <= width:
        return text
    head = max(0, width - 3) // 2
    return f"{text[:head]}...{text[len(text) - max(0, width - 3 - head) :]}"


def _head(manifest: Manifest, path: str, file_bytes: int) -> list[str]:
    lines = [
        squeeze(printable(path), WIDTH),
        _pair("file", f"{file_bytes:,} bytes"),
        _pair("tensors", f"{len(manifest.tensors):,} stored, {manifest.nbytes:,} bytes"),
    ]
    if manifest.has_configuration:
        versions = ", ".join(f"{name} {version}" for name, version in sorted(manifest.writer.items()))
        lines += _wrapped_pair("written by", versions or "unknown")
    else:
        lines += _wrapped_pair("written by", "another library: names, shapes and values, no configuration, no digests")
    entries = [f"{key}: {value}" for key, value in manifest.metadata.items()]
    for i, entry in enumerate(_some(entries)):
        lines.append(_pair("" if i else "metadata", entry))
    return lines


def _pair(label: str, text: str) -> str:
    return squeeze(f"  {label:<{_LABEL}}{printable(text)}".rstrip(), WIDTH)


def _wrapped_pair(label: str, text: str) -> list[str]:
    return _wrap(printable(text), f"  {label:<{_LABEL}}", " " * (2 + _LABEL))


def _wrap(text: str, first: str, then: str) -> list[str]:
    room = WIDTH * CONFIG_LINES
    lines = textwrap.wrap(
        squeeze(text, room - CONFIG_LINES * len(then)),
        WIDTH,
        initial_indent=first,
        subsequent_indent=then,
        break_on_hyphens=False,
    )
    return lines or [first.rstrip()]


@dataclass(frozen=True)
class _Row:
    """A row of a table of tensors; ``below`` are lines under it that span its columns."""

    name: str
    shape: str
    dtype: str
    nbytes: str
    sort: str
    below: tuple[str, ...] = ()

    @property
    def cells(self) -> tuple[str, ...]:
        return (self.name, self.shape, self.dtype, self.nbytes, self.sort)


def _parametrized(manifest: Manifest) -> list[str]:
    rows = [_Row("parametrized tensors", "shape", "dtype", "bytes", "")]
    module: str | None = None
    for record in manifest.parametrized:
        if record.module != module:
            module = record.module
            names = [name or "(model)" for name in (module, *record.aliases)]
            rows.append(_Row(f"  {' = '.join(names)}", "", "", "", ""))
        kept = {manifest.kept_key(key) for key in record.tensor_keys()}
        nbytes = sum(manifest.tensors[key].nbytes for key in kept)
        below = tuple(line for link in record.chain for line in _link(link))
        sort = "parameter" if record.parameter else "buffer"
        shape = "?" if record.shape is None else _shape(record.shape)
        rows.append(_Row(f"    {record.tensor_name}", shape, record.dtype or "?", f"{nbytes:,}", sort, below))
    return _tensor_table(rows) if manifest.parametrized else []


def _link(link: ParametrizationRecord) -> list[str]:
    kind = link.kind if link.version == 1 else f"{link.kind} (version {link.version})"
    if link.kind == OPAQUE:
        return _wrap(f"{printable(link.class_name or '')}, which was not registered", " " * 6, " " * 8)
    lines = _wrap(printable(f"{kind}: {_config(link.config)}"), " " * 6, " " * 8)
    compact = [role for role, encoding in sorted(link.tensors.items()) if encoding == COLUMNS]
    return lines + [f"      stored: columns of {printable(role)}" for role in compact]


def _config(config: Mapping[str, JSON] | None) -> str:
    if config is None:
        return "configuration not known"
    return ", ".join(f"{name}={json_values.encode(value)}" for name, value in sorted(config.items())) or "no settings"


def _plain(manifest: Manifest) -> list[str]:
    inside = {manifest.kept_key(key) for record in manifest.parametrized for key in record.tensor_keys()}
    inside |= set(manifest.training_keys)
    plain = {key: record for key, record in manifest.tensors.items() if key not in inside}
    computed = set(manifest.computed)
    rows = [_Row("plain tensors", "shape", "dtype", "bytes", "")]
    ordered = sorted(plain, key=_natural)
    for key in ordered[:SHOWN]:
        record = plain[key]
        sort = "computed" if key in computed else _plain_sort(record) if manifest.has_configuration else ""
        rows.append(_Row(f"  {key}", _shape(record.shape), record.dtype, f"{record.nbytes:,}", sort))
    if len(plain) > SHOWN:
        rest = sum(plain[key].nbytes for key in ordered[SHOWN:])
        rows.append(_Row(f"  and {len(plain) - SHOWN:,} more", "", "", f"{rest:,}", ""))
    return _tensor_table(rows) if plain else []


def _natural(key: str) -> list[tuple[int, str]]:
    """Orders ``layers.2`` before ``layers.10``."""
    return [(len(part), part) if part.isdecimal() else (0, part) for part in key.split(".")]


def _training(manifest: Manifest) -> list[str]:
    """Optimizers with their classes, parameters and tensors; names of other state."""
    training = manifest.training
    if training is None:
        return []
    nbytes = sum(manifest.tensors[key].nbytes for key in manifest.training_keys)
    lines = ["training state", _pair("tensors", f"{len(manifest.training_keys):,} stored, {nbytes:,} bytes")]
    for label, optimizer in training.optimizers.items():
        count = sum(len(group.parameters) for group in optimizer.groups)
        text = f"{qualname_of(optimizer.class_name)}, groups: {len(optimizer.groups)}, parameters: {count:,}"
        lines += _wrapped_pair("optimizer", f"{label}: {text}" if label else text)
    for name, entry in list(training.state.items())[:SHOWN]:
        sort = "a value" if entry.class_name is None else qualname_of(entry.class_name)
        lines.append(_pair(squeeze(printable(name), _LABEL - 1), sort))
    if len(training.state) > SHOWN:
        lines.append(f"  and {len(training.state) - SHOWN:,} more")
    if training.rng is not None:
        lines.append(_pair("generators", "of torch, Python and NumPy"))
    return lines


def _plain_sort(record: TensorRecord) -> str:
    if not record.parameter:
        return "buffer"
    return "parameter" if record.requires_grad else "frozen"


def _shape(shape: Sequence[int]) -> str:
    return squeeze(" x ".join(str(size) for size in shape), 24) if shape else "scalar"


def _modules(manifest: Manifest) -> list[str]:
    lines: list[str] = []
    for record in manifest.modules[:SHOWN]:
        version = "" if record.version == 1 else f" (version {record.version})"
        text = f"{record.path or '(model)'}: {record.kind}{version}: {_config(record.config)}"
        lines += _wrap(printable(text), "  ", " " * 4)
    if len(manifest.modules) > SHOWN:
        lines.append(f"  and {len(manifest.modules) - SHOWN:,} more")
    return ["modules of registered classes", *lines] if lines else []


def _listed(title: str, names: Sequence[str]) -> list[str]:
    return [title, *(squeeze(f"  {printable(name)}", WIDTH) for name in _some(names))] if names else []


def _some(names: Sequence[str]) -> list[str]:
    rest = [f"and {len(names) - SHOWN:,} more"] if len(names) > SHOWN else []
    return [*names[:SHOWN], *rest]


def _reasons(title: str, reasons: Mapping[str, str]) -> list[str]:
    lines: list[str] = []
    for name, reason in reasons.items():
        lines.append(squeeze(f"  {printable(name)}", WIDTH))
        lines += _wrap(printable(reason), " " * 6, " " * 6)
    return [title, *lines] if lines else []


def _tensor_table(rows: Iterable[_Row]) -> list[str]:
    rows = list(rows)
    lines = _table([row.cells for row in rows], right={3})
    return [line for row, text in zip(rows, lines, strict=True) for line in (text, *row.below)]


def _table(rows: Sequence[Sequence[str]], right: set[int]) -> list[str]:
    """Rows as aligned columns. The first one gives way where a line would be too long; one cell alone has it all."""
    cells = [[printable(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(1, len(cells[0]))]
    names = [row[0] for row in cells if any(row[1:])]
    first = min(max(map(len, names)), WIDTH - sum(len(_GAP) + width for width in widths))
    lines: list[str] = []
    for name, *others in cells:
        if not any(others):
            lines.append(squeeze(name, WIDTH))
            continue
        line = squeeze(name, first).ljust(first)
        for i, (cell, width) in enumerate(zip(others, widths, strict=True), start=1):
            line += _GAP + (cell.rjust(width) if i in right else cell.ljust(width))
        lines.append(line.rstrip())
    return lines
