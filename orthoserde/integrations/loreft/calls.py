"""Which calls of enclosing modules a target layer runs in, also when checkpointing runs it again in backward.

Note [Whose call is it]: each call of a module on the way to a target is noted on a stack, of which the thread has
one for each adapter. Activation checkpointing runs a layer a second time during backward, when those calls have ended.
The call that it ran in is then found by the memory of its input, which the checkpoint keeps alive. Where the input was
made inside of the checkpoint, or moved away and back, every call whose graph is alive could be meant; if these differ
in what they say of their tokens, it is an error. A call's graph is alive while a node of it is: each call
hangs on the nodes that made its result.
"""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from types import FrameType
from typing import cast

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules import module as torch_module
from torch.utils.checkpoint import CheckpointFunction

from orthoserde import _torch
from orthoserde.errors import AdapterError
from orthoserde.integrations.loreft import tokens

#: Key in the metadata of a node under which calls hang.
_METADATA = "orthoserde"

#: (row, column) of each chosen token.
Indices = tuple[Tensor, Tensor]

#: Where a tensor is: its memory, and its place in that.
_Place = tuple[StorageWeakRef, tuple[object, ...]]


class Call:
    """One call of a module, and what its arguments say of the tokens.

    Attributes:
        path: The module; None for what is around all calls.
        parent: The enclosing call.
        prompt: Which tokens belong to the prompt, bool of shape ``(batch, seq)``; None where all do.
        real: Which tokens are real, bool of shape ``(batch, seq)``; None where this call does not say.
        outer: Whether an enclosing call may say which tokens are real, where this one does not.
        masked: Whether this or an enclosing call takes an attention mask.
        continues: Whether it continues a generation; None where neither this nor an enclosing call says.
        problem: What keeps the mask from being understood.
        grads: Whether gradients were enabled when the outermost call began.
        task: The backward pass in which it runs, -1 for none.
        frame: The Python frame that makes the call, until it has ended.
        chosen: Tokens to intervene on, by shape and device.
    """

    def __init__(self, path: str | None, parent: Call | None, prompt: Tensor | None = None) -> None:
        self.path = path
        self.parent = parent
        self.prompt: Tensor | None = prompt if parent is None else parent.prompt
        self.real: Tensor | None = None
        self.outer = parent is not None
        self.masked: bool = parent is not None and parent.masked
        self.continues: bool | None = None if parent is None else parent.continues
        self.problem: str | None = None
        self.grads: bool = torch.is_grad_enabled() if parent is None or parent.path is None else parent.grads
        self.task = _torch.backward_id()
        self.frame: FrameType | None = None
        self.chosen: dict[tuple[int, int, torch.device], Indices] = {}

    def read(self, arguments: tokens.Arguments, *, is_target: bool) -> None:
        """Note what the arguments say.

        A target's own cache has no say: the layers before it have filled it in the same forward.
        """
        try:
            if self.continues is None and not is_target and tokens.takes_cache(arguments):
                self.continues = tokens.continues(arguments)
            self.real = tokens.padding_mask(arguments)
            mask = arguments.get(tokens.ATTENTION)
            if self.real is None and mask is not None and not self.masked and not self.continues:
                self.real = tokens.full_mask(mask)
        except ValueError as error:
            self.problem = str(error)
        self.outer = self.outer and not tokens.is_other_sequence(arguments)
        self.masked = self.masked or arguments.takes(tokens.ATTENTION)

    def source(self) -> Call:
        """The nearest call that says which tokens are real; else the outermost one that may.

        Raises:
            AdapterError: There is a mask or a cache on the way that is not understood.
        """
        call = self
        while call.problem is None and call.real is None and call.outer and call.parent is not None:
            call = call.parent
        if call.problem is not None:
            raise AdapterError(
                f"{call.path or '(model)'} was called with {call.problem}, so it is not known where to intervene"
            )
        return call

    def like(self, other: Call) -> bool:
        """Whether two calls say the same of their tokens."""
        return (
            self.continues == other.continues
            and _same(self.prompt, other.prompt)
            and _same(self.source().real, other.source().real)
            # A callable may choose at random.
            and all(_same_chosen(self, other, key) for key in self.source().chosen)
        )

    def hold(self, result: object) -> bool:
        """Live as long as the graph of a result; False where nothing in it is a tensor."""
        found = False
        for tensor in _tensors(result):
            found = True
            if tensor.grad_fn is not None:
                cast("dict[str, list[Call]]", tensor.grad_fn.metadata).setdefault(_METADATA, []).append(self)
        return found


#: Where the input of a call was, and the call around that.
_Entry = tuple[StorageWeakRef, tuple[object, ...], Call | weakref.ref[Call]]


class Calls:
    """The calls under way in an adapter's model, and those that a backward may come back to."""

    def __init__(self) -> None:
        self._local = threading.local()
        self._inputs: dict[str, list[_Entry]] = {}
        self._alive: dict[str, weakref.WeakSet[Call]] = {}
        self._around: dict[str, Call] = {}
        self._lost = False

    @property
    def prompt(self) -> Tensor | None:
        """Which tokens belong to the prompt, for calls that begin now in this thread."""
        return cast("Tensor | None", getattr(self._local, "prompt", None))

    @prompt.setter
    def prompt(self, mask: Tensor | None) -> None:
        self._local.prompt = mask

    @property
    def current(self) -> Call | None:
        """The innermost call under way in this thread."""
        stack = self._stack()
        return stack[-1] if stack else None

    def enter(
        self, path: str, module: nn.Module, args: Sequence[object], kwargs: Mapping[str, object], *, is_target: bool
    ) -> None:
        """A module is being called."""
        first = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        parent = self._parent(path, first)
        call = Call(path, parent)
        call.frame = _calling_frame()
        call.read(tokens.arguments_of(module, args, kwargs), is_target=is_target)
        self._remember(path, first, parent, call.grads)
        self._stack().append(call)

    def leave(self, path: str, result: object) -> None:
        """A module's call has ended, with a result or, ``result`` being None, an exception."""
        stack = self._stack()
        if not stack or stack[-1].path != path:
            return  # it was never entered: another pre-hook raised before ours
        call = stack.pop()
        call.frame = None
        if torch.is_grad_enabled() and result is not None and not call.hold(result):
            self._lost = True

    def _stack(self) -> list[Call]:
        stack: list[Call] | None = getattr(self._local, "stack", None)
        if stack is None:
            stack = self._local.stack = []
        # An interrupt leaves calls behind: torch runs no hook for a BaseException.
        while stack and not _is_running(stack[-1].frame):
            stack.pop()
        return stack

    def _parent(self, path: str, first: Tensor | None) -> Call:
        task = _torch.backward_id()
        stack = self._stack()
        # The root takes nothing from a call that it is nested in.
        if path and stack and stack[-1].task == task:
            return stack[-1]
        return Call(None, None, self.prompt) if task == -1 else self._recall(path, first)

    def _remember(self, path: str, first: Tensor | None, parent: Call, grads: bool) -> None:
        bare = parent.path is None
        if not grads and not (bare and _is_in_checkpoint()):
            return
        if bare and path:
            self._around[path] = parent
        else:
            self._alive.setdefault(path, weakref.WeakSet()).add(parent)
        key = _memory(first)
        if key is not None:
            entries = [entry for entry in self._inputs.get(path, []) if _is_needed(entry, key, parent)]
            # Nothing else keeps what is around all calls.
            self._inputs[path] = [*entries, (*key, parent if bare else weakref.ref(parent))]

    def _recall(self, path: str, first: Tensor | None) -> Call:
        """The call around one that backward repeats; see Note [Whose call is it].

        Raises:
            AdapterError: It cannot be told.
        """
        found: list[Call] = []
        key = _memory(first)
        if key is not None:
            entries = [entry for entry in self._inputs.get(path, []) if entry[:2] == key]
            found = [call for entry in entries if (call := _call_of(entry)) is not None]
        if not found and not self._lost:
            found = list(self._alive.get(path, ()))
            found += [self._around[path]] if path in self._around else []
        if not found and not path and not self._lost:
            return Call(None, None, self.prompt)  # a forward of its own, inside of a backward
        if not found or any(not found[-1].like(call) for call in found[:-1]):
            raise AdapterError(
                f"{path or '(model)'} is recomputed in backward, and it cannot be told for which of several forwards: "
                "their masks differ; call backward after each forward, keep no losses that are not detached, or let "
                "the checkpoint begin at a module that is called with the mask"
            )
        return found[-1]


def _same(left: Tensor | None, right: Tensor | None) -> bool:
    if left is None or right is None:
        return left is right
    return left is right or (left.shape == right.shape and left.device == right.device and torch.equal(left, right))


def _same_chosen(left: Call, right: Call, key: tuple[int, int, torch.device]) -> bool:
    mine, theirs = left.source().chosen[key], right.source().chosen.get(key)
    return theirs is None or (_same(mine[0], theirs[0]) and _same(mine[1], theirs[1]))


def _call_of(entry: _Entry) -> Call | None:
    return entry[2]() if isinstance(entry[2], weakref.ref) else entry[2]


def _is_needed(entry: _Entry, place: _Place, parent: Call) -> bool:
    """Whether a backward may still ask for what was noted of an input, now that another call has one at a place."""
    call = _call_of(entry)
    if call is None or entry[0].expired():  # type: ignore[no-untyped-call]
        return False
    return not (entry[:2] == place and call.path is None and parent.path is None and call.like(parent))


def _memory(tensor: Tensor | None) -> _Place | None:
    """Where a tensor is; None for one that has no memory of its own."""
    if tensor is None or tensor.is_nested or tensor.layout is not torch.strided:
        return None
    try:
        storage = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
    except (RuntimeError, NotImplementedError):  # inside of a function transform
        return None
    return storage, (tensor.storage_offset(), tensor.shape, tensor.stride())


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from _tensors(getattr(value, field.name))


def _calling_frame() -> FrameType | None:
    """The frame in which torch calls the module, which ends with the call."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_code.co_filename != torch_module.__file__:
        frame = frame.f_back
    return frame


def _is_in_checkpoint() -> bool:
    """Whether a reentrant checkpoint is running, which makes no graph and comes back in backward."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not CheckpointFunction.forward.__code__:
        frame = frame.f_back
    return frame is not None


def _is_running(frame: FrameType | None) -> bool:
    """Whether a frame is among the callers; taken to be where there is none to look for."""
    if frame is None:
        return True
    caller = inspect.currentframe()
    while caller is not None and caller is not frame:
        caller = caller.f_back
    return caller is not None
