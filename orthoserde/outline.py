"""What a checkpoint holds as a tree of modules, in which those that are alike stand once.

Note [Alike]
A model of 32 equal layers is one layer, 32 times. Modules that follow each other, whose names differ in numbers alone
and whose tensors have the same names, shapes, dtypes, kinds and configuration, become one branch with a count; so do
such tensors of one module. What is in a branch is that of the first.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from orthoserde import json_values
from orthoserde.json_values import JSON
from orthoserde.manifest import (
    COLUMNS,
    OPAQUE,
    Manifest,
    ParametrizationRecord,
    ParametrizedRecord,
    TensorRecord,
)

#: Levels of a tree; what a name has beyond them stays one name. The files of strangers may have thousands.
MAX_LEVELS = 24

_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True)
class Leaf:
    """A tensor of a module, or several that are alike.

    Attributes:
        name: Its name in the module.
        sort: ``"parameter"``, ``"frozen"`` (one that requires no gradient), ``"buffer"``, ``"computed"`` or ``"tied"``;
            empty where that is not known.
        shape: Shape, None where it is not recorded.
        dtype: dtype, None where it is not recorded.
        nbytes: Bytes that are stored for all of them.
        links: Its parametrizations, each with its configuration, in words.
        note: What else is to be said, such as the name that it is tied to.
        count: How many are alike.
        last: Name of the last of them.
    """

    name: str
    sort: str
    shape: tuple[int, ...] | None
    dtype: str | None
    nbytes: int
    links: tuple[str, ...] = ()
    note: str = ""
    count: int = 1
    last: str = ""


@dataclass(frozen=True)
class Branch:
    """A module, or several that are alike.

    Attributes:
        name: Its name in the module that holds it; ``""`` for the model.
        kind: Registered kind and configuration, in words; empty if it has none.
        leaves: Its tensors.
        branches: Modules in it.
        count: How many are alike.
        last: Name of the last of them.
    """

    name: str
    kind: str = ""
    leaves: tuple[Leaf, ...] = ()
    branches: tuple[Branch, ...] = ()
    count: int = 1
    last: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes that are stored for all of them."""
        inside = sum(leaf.nbytes for leaf in self.leaves) + sum(branch.nbytes for branch in self.branches)
        return inside * self.count


def outline(manifest: Manifest, *, join_alike: bool = True) -> Branch:
    """The model in a checkpoint as a tree; training state is no part of it.

    Args:
        manifest: What the checkpoint holds.
        join_alike: Whether what is alike stands once; see Note [Alike].
    """
    root = _Node()
    inside: set[str] = set(manifest.training_keys)
    for record in manifest.parametrized:
        inside.update(record.tensor_keys())
        leaf = _parametrized(record, manifest)
        root.at(record.module).leaves.append(leaf)
        for path in record.aliases:
            root.at(path).leaves.append(
                dataclasses.replace(leaf, sort="tied", nbytes=0, links=(), note=f"= {record.name}")
            )
            inside.update(record.at(path).tensor_keys())
    computed = manifest.computed_keys
    for key, tensor in manifest.tensors.items():
        if key not in inside:
            sort = "computed" if key in computed else _sort(tensor) if manifest.has_configuration else ""
            module, _, name = key.rpartition(".")
            root.at(module).leaves.append(Leaf(name, sort, tensor.shape, tensor.dtype, tensor.nbytes))
    for alias, kept in manifest.aliases.items():
        if alias not in inside:
            tensor = manifest.tensors[kept]
            module, _, name = alias.rpartition(".")
            root.at(module).leaves.append(Leaf(name, "tied", tensor.shape, tensor.dtype, 0, note=f"= {kept}"))
    for module_record in manifest.modules:
        version = "" if module_record.version == 1 else f" (version {module_record.version})"
        root.at(module_record.path).kind = f"{module_record.kind}{version}: {in_words(module_record.config)}"
    return root.branch("", join_alike)


def in_words(config: Mapping[str, JSON] | None) -> str:
    """A configuration, in words."""
    if config is None:
        return "configuration not known"
    return ", ".join(f"{name}={json_values.encode(value)}" for name, value in sorted(config.items())) or "no settings"


def natural(name: str) -> list[tuple[int, str]]:
    """Orders ``layer2`` before ``layer10``."""
    return [(len(part.lstrip("0")), part) if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", name)]


def label(first: str, last: str) -> str:
    """One name for things whose names differ in numbers alone: ``layer_{0..31}_out``."""
    ours, theirs = re.split(r"(\d+)", first), re.split(r"(\d+)", last)
    if len(ours) == 3 and not ours[0] and not ours[2]:
        return f"{first}..{last}"
    return "".join(a if a == b else f"{{{a}..{b}}}" for a, b in zip(ours, theirs, strict=True))


def _sort(tensor: TensorRecord) -> str:
    if not tensor.parameter:
        return "buffer"
    return "parameter" if tensor.requires_grad else "frozen"


def _parametrized(record: ParametrizedRecord, manifest: Manifest) -> Leaf:
    kept = {manifest.kept_key(key) for key in record.tensor_keys()}
    return Leaf(
        name=record.tensor_name,
        sort="parameter" if record.parameter else "buffer",
        shape=record.shape,
        dtype=record.dtype,
        nbytes=sum(manifest.tensors[key].nbytes for key in kept),
        links=tuple(_link(link) for link in record.chain),
        note="an older hook of torch" if record.hooked else "",
    )


def _link(link: ParametrizationRecord) -> str:
    if link.kind == OPAQUE:
        return f"{link.class_name or ''}, which was not registered"
    version = "" if link.version == 1 else f" (version {link.version})"
    compact = [role for role, encoding in sorted(link.tensors.items()) if encoding == COLUMNS]
    stored = f"; stored as columns: {', '.join(compact)}" if compact else ""
    return f"{link.kind}{version}: {in_words(link.config)}{stored}"


@dataclass
class _Node:
    """A module while the tree is made."""

    kind: str = ""
    leaves: list[Leaf] = field(default_factory=list)
    nodes: dict[str, _Node] = field(default_factory=dict)

    def at(self, path: str) -> _Node:
        """The node of a module below this one."""
        node = self
        for name in path.split(".", MAX_LEVELS) if path else ():
            node = node.nodes.setdefault(name, _Node())
        return node

    def branch(self, name: str, join_alike: bool) -> Branch:
        leaves: Sequence[Leaf] = sorted(self.leaves, key=lambda leaf: natural(leaf.name))
        names = sorted(self.nodes, key=natural)
        branches: Sequence[Branch] = [self.nodes[each].branch(each, join_alike) for each in names]
        if join_alike:
            leaves, branches = _joined_leaves(leaves), _joined_branches(branches)
        return Branch(name, self.kind, tuple(leaves), tuple(branches))


def _joined_leaves(leaves: Iterable[Leaf]) -> list[Leaf]:
    found: list[Leaf] = []
    for leaf in leaves:
        before = found[-1] if found else None
        if before is not None and _template(before.name) == _template(leaf.name) and _same_leaf(before, leaf):
            found[-1] = dataclasses.replace(
                before, nbytes=before.nbytes + leaf.nbytes, count=before.count + 1, last=leaf.name
            )
        else:
            found.append(leaf)
    return found


def _same_leaf(one: Leaf, two: Leaf) -> bool:
    # Bytes of a tensor follow from its shape and dtype, where these are recorded.
    alike = dataclasses.replace(two, name=one.name, nbytes=one.nbytes, count=one.count, last=one.last)
    return alike == one and one.nbytes == two.nbytes * one.count


def _joined_branches(branches: Iterable[Branch]) -> list[Branch]:
    found: list[Branch] = []
    for branch in branches:
        before = found[-1] if found else None
        if before is not None and _template(before.name) == _template(branch.name) and _same_branch(before, branch):
            found[-1] = dataclasses.replace(before, count=before.count + 1, last=branch.name)
        else:
            found.append(branch)
    return found


def _same_branch(one: Branch, two: Branch) -> bool:
    return dataclasses.replace(two, name=one.name, count=one.count, last=one.last) == one


def _template(name: str) -> str:
    return _NUMBER.sub("0", name)
