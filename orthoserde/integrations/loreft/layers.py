"""The layers of a model that an adapter is to act behind, found by their paths, or said why they cannot be."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from torch import nn

from orthoserde import _torch
from orthoserde.errors import AdapterError
from orthoserde.integrations.loreft.module import LoReFT
from orthoserde.manifest import join

#: Torch layers whose hidden states are (seq, batch, hidden) unless they were made with batch_first.
_BATCH_FIRST = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


def check_layers(layers: object) -> None:
    """Hold the argument of an adapter to what it is to be.

    Raises:
        TypeError: It is no mapping, or something in it is not a LoReFT.
        ValueError: There are no layers, or something is not the path of one.
    """
    if not isinstance(layers, Mapping):
        raise TypeError(f"layers: expected a mapping from paths to LoReFT, got {type(layers).__name__}")
    if not layers:
        raise ValueError("layers: expected at least one path with its LoReFT")
    for path, loreft in layers.items():
        if not isinstance(path, str) or not all(path.split(".")):
            raise ValueError(f"layers: expected the path of a layer, such as 'layers.0', got {path!r}")
        if not isinstance(loreft, LoReFT):
            raise TypeError(f"layers: expected a LoReFT for {path!r}, got {type(loreft).__name__}")


def find_layers(root: object, paths: Mapping[str, str]) -> dict[str, nn.Module]:
    """The layers and all modules above them, by path, each module once.

    Raises:
        TypeError: The root is not a module.
        ValueError: A path leads nowhere, or to a module that is not called as a layer is.
        AdapterError: A layer has hidden states of (seq, batch, hidden).
    """
    if not isinstance(root, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(root).__name__}")
    on_the_way: dict[str, nn.Module] = {"": root}
    by_id: dict[int, str] = {id(root): ""}
    for path in paths:
        module, reached = root, ""
        for part in path.split("."):
            child = _torch.child_modules(module).get(part)
            if child is None:
                raise ValueError(_no_such_layer(root, path))
            module, reached = _torch.unwrap(child), join(reached, part)
            known = by_id.setdefault(id(module), reached)
            on_the_way.setdefault(known, module)
        if by_id[id(module)] != path:
            raise ValueError(f"layers: {path!r} and {by_id[id(module)]!r} are the same module; name it once")
        _check_layer(path, module)
    return on_the_way


def _check_layer(path: str, module: nn.Module) -> None:
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        kind = type(module).__name__
        raise ValueError(f"layers: {path!r} is a {kind}, which is never called; name what is in it")  # noqa: TRY004
    for inner in module.modules():
        if isinstance(inner, _BATCH_FIRST) and not inner.self_attn.batch_first:
            raise AdapterError(
                f"{path} has hidden states of (seq, batch, hidden); make its {type(inner).__name__} with "
                "batch_first=True"
            )


def _no_such_layer(root: nn.Module, path: str) -> str:
    known = [name for name, _ in root.named_modules() if name]
    near = difflib.get_close_matches(path, known, n=5, cutoff=0.5)
    shown = ", ".join(repr(name) for name in near or known[:5]) or "none"
    return f"layers: the model has no module {path!r}; {'near ones' if near else 'it has'}: {shown}"
