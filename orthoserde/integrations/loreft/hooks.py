"""The hooks that an adapter puts on a model. A copied model has hooks of its own."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from orthoserde.errors import AdapterError
from orthoserde.integrations.loreft import outputs, positions
from orthoserde.integrations.loreft.calls import Call, Indices

if TYPE_CHECKING:
    from orthoserde.integrations.loreft.adapter import Adapter


@dataclass(frozen=True)
class Place:
    """Where a hook is, and whose it is.

    Attributes:
        adapter: The adapter.
        path: Where the module stands in the model.
    """

    adapter: Adapter
    path: str

    def __deepcopy__(self, memo: dict[int, Any]) -> Place:
        root = self.adapter.root
        if self.adapter.attachment is not None and (root is None or id(root) not in memo):
            raise AdapterError(
                f"{self.path or '(model)'} cannot be copied without its model, to which an adapter is attached; copy "
                "the whole model, or detach first"
            )
        return Place(copy.deepcopy(self.adapter, memo), self.path)


def hook(adapter: Adapter, path: str, run: Callable[..., object]) -> Callable[..., Any]:
    """Make a hook for one module of a model.

    A deepcopy of the model copies the partial function, and with it its place.

    Args:
        adapter: The adapter.
        path: Where the module stands in the model.
        run: :func:`enter`, :func:`intervene` or :func:`leave`.
    """
    # Stacks and frames are nothing that torch.compile could trace.
    return functools.partial(torch.compiler.disable(run), Place(adapter, path))  # type: ignore[no-untyped-call]


def is_hook_of(adapter: Adapter, candidate: object) -> bool:
    """Whether a hook is one that :func:`hook` made for this adapter."""
    return (
        isinstance(candidate, functools.partial)
        and bool(candidate.args)
        and isinstance(candidate.args[0], Place)
        and candidate.args[0].adapter is adapter
    )


def enter(place: Place, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before a module on the way to a target: note the call."""
    adapter = place.adapter
    adapter.calls.enter(place.path, module, args, kwargs, is_target=adapter.has(place.path))


def leave(place: Place, module: nn.Module, args: tuple[Any, ...], result: object) -> None:
    """After it, also by an exception."""
    place.adapter.calls.leave(place.path, result)


def intervene(place: Place, module: nn.Module, args: tuple[Any, ...], output: object) -> object:
    """After a target: put new hidden states in place of its own.

    Raises:
        AdapterError: The output has no hidden states of the expected shape, or the mask does not fit them.
    """
    if place.adapter.attachment is None:
        return output  # detached while it ran, or the module has left the model before
    call = place.adapter.calls.current
    if call is None or call.path != place.path:
        raise AdapterError(f"{place.path} has returned without having been called, so its tokens are not known")
    if call.continues:
        return output
    try:
        hidden, put = outputs.hidden_states(output)
    except TypeError as error:
        raise AdapterError(f"{place.path} returned {error}") from error
    loreft = place.adapter.intervention(place.path)
    nested = hidden.is_nested
    dense, real = outputs.padded(hidden) if nested else (hidden, None)
    if dense.dim() == 0 or dense.shape[-1] != loreft.hidden_size:
        raise AdapterError(
            f"{place.path} returned hidden states of shape {tuple(dense.shape)}, but its LoReFT was made for "
            f"hidden_size={loreft.hidden_size}; make it for the width of the layer"
        )
    chosen = _chosen(call, place.adapter.select, dense, real, place.path)
    if chosen is None:
        new = loreft(dense)
    elif chosen[0].numel() == 0:
        return output
    else:
        new = dense.index_put(chosen, loreft(dense[chosen]))
    if nested and new.requires_grad:
        raise AdapterError(
            f"{place.path} returned a nested tensor, which torch makes of a padded one in eval mode and cannot "
            "differentiate; run under no_grad, or make the TransformerEncoder with enable_nested_tensor=False"
        )
    return put(outputs.nested_again(new, real) if real is not None else new)


def _chosen(
    call: Call, select: Callable[[Tensor], Tensor], hidden: Tensor, lengths: Tensor | None, path: str
) -> Indices | None:
    """Indices of the tokens to intervene on, None for all; worked out once for all layers of a forward.

    Args:
        call: The target's call.
        select: Chooses among the real tokens.
        hidden: ``(batch, seq, hidden)``, or of any leading shape where every token is chosen.
        lengths: Which tokens of a nested tensor are real, None for an ordinary one.
        path: The target, for messages.
    """
    source = call.source()
    real = source.real if lengths is None else lengths
    if select is positions.all_real and real is None and call.prompt is None:
        return None
    if hidden.dim() != 3:
        raise AdapterError(
            f"{path} returned hidden states of shape {tuple(hidden.shape)}, but positions are those of "
            "(batch, seq, hidden)"
        )
    shape = (hidden.shape[0], hidden.shape[1])
    key = (*shape, hidden.device)
    chosen = source.chosen.get(key)
    if chosen is None:
        tokens = torch.ones(shape, dtype=torch.bool, device=hidden.device)
        for name, mask in (("attention mask", real), ("prompt", call.prompt)):
            if mask is not None:
                if lengths is not None:
                    mask = mask[:, : shape[1]]
                if mask.shape != shape:
                    raise AdapterError(
                        f"{path} returned hidden states of shape {tuple(hidden.shape)}, but the {name} has shape "
                        f"{tuple(mask.shape)}, so it is not known which tokens are real; pass one of (batch, seq)"
                    )
                tokens = tokens & mask.to(hidden.device)
        rows, columns = positions.choose(select, tokens).nonzero(as_tuple=True)
        chosen = source.chosen[key] = (rows, columns)
    return chosen
