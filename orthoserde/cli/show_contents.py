"""What a checkpoint holds, as a tree of its modules."""

from __future__ import annotations

from collections.abc import Iterator

from rich.text import Text

from orthoserde import outline
from orthoserde.cli.layout import Row, heading, listed, pair, sections, table
from orthoserde.cli.terminal import Guides
from orthoserde.manifest import Manifest, qualname_of
from orthoserde.outline import Branch, Leaf

#: Rows of a tree, unless all are asked for.
MOST_ROWS = 200

_TITLES = ("model", "shape", "dtype", "bytes", "")


def show_contents(
    manifest: Manifest, path: str, file_bytes: int, *, width: int, guides: Guides, everything: bool
) -> list[Text]:
    """Describe a checkpoint: what it is, its modules with their tensors, training state, and what was left out.

    Args:
        manifest: What it holds.
        path: Where it is.
        file_bytes: Its size.
        width: Columns.
        guides: What the tree is drawn with.
        everything: Whether nothing is joined or cut off.
    """
    return sections(
        [
            _head(manifest, path, file_bytes, width),
            _tree(manifest, width, guides, everything),
            _training(manifest, width),
            listed("left out when it was saved", manifest.left_out, width),
        ]
    )


def _head(manifest: Manifest, path: str, file_bytes: int, width: int) -> list[Text]:
    lines = [heading(path, width)]
    lines += pair("size", f"{file_bytes:,} bytes", width)
    lines += pair("tensors", f"{len(manifest.tensors):,} stored, {manifest.nbytes:,} bytes", width)
    if manifest.has_configuration:
        versions = ", ".join(f"{name} {version}" for name, version in sorted(manifest.writer.items()))
        lines += pair("written by", versions or "unknown", width)
    else:
        lines += pair("written by", "another library: names, shapes and values, no configuration, no digests", width)
    entries = list(manifest.metadata.items())
    for i, (key, value) in enumerate(entries[:10]):
        lines += pair("" if i else "metadata", f"{key}: {value}", width)
    if len(entries) > 10:
        lines += pair("", f"and {len(entries) - 10:,} more", width)
    return lines


def _tree(manifest: Manifest, width: int, guides: Guides, everything: bool) -> list[Text]:
    root = outline.outline(manifest, join_alike=not everything)
    rows = [Row(_TITLES, style="bold", below=(("  ", root.kind),) if root.kind else ())]
    hidden = 0
    for row in _rows(root, guides, ""):
        if len(rows) > MOST_ROWS and not everything:
            hidden += 1
        else:
            rows.append(row)
    if len(rows) == 1 and not root.kind:
        return []
    lines = table(rows, width, right=frozenset({3}))
    if hidden:
        lines.append(Text(f"and {hidden:,} more lines; --all shows them", style="dim"))
    return lines


def _rows(branch: Branch, guides: Guides, before: str) -> Iterator[Row]:
    """The rows of what is in a module, and in the modules in it."""
    inside: list[Leaf | Branch] = [*branch.leaves, *branch.branches]
    for i, each in enumerate(inside):
        last = i == len(inside) - 1
        guide = before + (guides.end if last else guides.fork)
        beside = before + (guides.blank if last else guides.pipe)
        name = each.name or "(empty)"
        if each.count > 1:
            name = f"{outline.label(each.name, each.last)}  ({each.count:,} alike)"
        if isinstance(each, Leaf):
            below = tuple((beside + "  ", link) for link in each.links)
            yield Row((name, _shape(each), each.dtype or "?", f"{each.nbytes:,}", _sort(each)), guide, "", below)
        else:
            kind = ((beside + "  ", each.kind),) if each.kind else ()
            size = f"{each.nbytes:,}" if each.count > 1 else ""
            yield Row((name, "", "", size, "together" if size else ""), guide, "bold", kind)
            yield from _rows(each, guides, beside)


def _sort(leaf: Leaf) -> str:
    return ", ".join(part for part in (leaf.sort, leaf.note) if part)


def _shape(leaf: Leaf) -> str:
    if leaf.shape is None:
        return "?"
    return " x ".join(map(str, leaf.shape)) if leaf.shape else "scalar"


def _training(manifest: Manifest, width: int) -> list[Text]:
    """Optimizers with their classes, parameters and tensors; names of other state."""
    training = manifest.training
    if training is None:
        return []
    nbytes = sum(manifest.tensors[key].nbytes for key in manifest.training_keys)
    lines = [heading("training state", width)]
    lines += pair("tensors", f"{len(manifest.training_keys):,} stored, {nbytes:,} bytes", width)
    for label, optimizer in training.optimizers.items():
        count = sum(len(group.parameters) for group in optimizer.groups)
        name = qualname_of(optimizer.class_name)
        text = f"{name}, groups: {len(optimizer.groups)}, parameters: {count:,}"
        lines += pair("optimizer", f"{label}: {text}" if label else text, width)
    for name, entry in training.state.items():
        what = "a value" if entry.class_name is None else qualname_of(entry.class_name)
        lines += pair("state", f"{name}: {what}", width)
    if training.rng is not None:
        lines += pair("generators", "of torch, Python and NumPy", width)
    return lines
