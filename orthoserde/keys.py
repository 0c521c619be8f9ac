"""Keys of the parts of parametrized tensors: ``path.parametrizations.tensor`` and what follows.

The parts of a tensor that an older hook of torch computes have no prefix in common. They are given one, which no key
begins with.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from orthoserde.manifest import join
from orthoserde.walk import ParametrizedTensor


def names_of(tensor: ParametrizedTensor) -> list[str]:
    """Its name under each path of its module."""
    return [join(path, tensor.tensor_name) for path in (tensor.module_path, *tensor.aliases)]


def prefixes_of(tensor: ParametrizedTensor) -> list[str]:
    """What the keys of its parts begin with, or stand under, for each path of its module."""
    name = f"{tensor.tensor_name}\0hook" if tensor.hook_names else f"parametrizations.{tensor.tensor_name}"
    return [join(path, name) for path in (tensor.module_path, *tensor.aliases)]


def hook_prefixes(hooked: Iterable[ParametrizedTensor]) -> dict[str, str]:
    """What the parts of hooked tensors stand under, by key, for each path of their modules."""
    return {
        join(path, name): prefix
        for tensor in hooked
        for path, prefix in zip((tensor.module_path, *tensor.aliases), prefixes_of(tensor), strict=True)
        for name in tensor.hook_names.values()
    }


def original_keys(tensor: ParametrizedTensor) -> list[str]:
    """Keys of its originals, under the first path of its module."""
    return [tensor.key(name) for name in tensor.originals]


def prefixes_in(key: str) -> list[str]:
    """Every ``path.parametrizations.tensor`` that a key begins with, the shortest first."""
    parts = key.split(".")
    return [".".join(parts[: i + 2]) for i in range(len(parts) - 2) if parts[i] == "parametrizations"]


def plainly_parametrized(keys: Iterable[str]) -> list[str]:
    """Names of the parametrized tensors that torch's keys give away: where an original stands, and nothing else.

    A module may be called ``parametrizations`` too.
    """
    found: dict[str, None] = {}
    for key in keys:
        parts = key.split(".")
        if len(parts) > 2 and parts[-3] == "parametrizations" and parts[-1] in ("original", "original0"):
            found[join(*parts[:-3], parts[-2])] = None
    return list(found)


def parts_by_prefix(keys: Iterable[str], hooked: Mapping[str, str]) -> dict[str, list[str]]:
    """Keys of the parts of each parametrized tensor, by what they begin with, or stand under in ``hooked``."""
    found: dict[str, list[str]] = {}
    for key in keys:
        # A hook may stand within a parametrization, and its tensors are part of both.
        for prefix in [*prefixes_in(key), *([hooked[key]] if key in hooked else [])]:
            found.setdefault(prefix, []).append(key)
    return found


def local_names(parts: Mapping[str, list[str]], prefixes: Iterable[str]) -> dict[str, str]:
    """Names of the parts within a parametrized tensor, with the key of each."""
    return {key.removeprefix(f"{prefix}."): key for prefix in prefixes for key in parts.get(prefix, ())}
