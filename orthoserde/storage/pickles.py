"""What a pickle of ``torch.save`` would do, found out before torch does it.

Note [Pickles]
Torch's restricted unpickler calls nothing that a file could bring along, but it does as it is told with what it knows:
``bytearray(10**11)`` takes memory, ``_codecs.encode`` imports a module of a name that stands in the file, a tuple of a
million tuples within each other overflows the stack of the process when it becomes the key of a dict, forty tuples that
each hold the one before twice never end being one, and ``UntypedStorage(n)`` is memory that no byte of the file fills.
A state dict needs none of these. So the pickle is first run with values left out: all that is kept of one is which
global it is, and how deep tuples lie in it.
"""

from __future__ import annotations

import io
import pickletools
import re
from collections.abc import Callable, Iterator
from typing import Union

from orthoserde.errors import FileFormatError
from orthoserde.tensor_bytes import DTYPES

#: More than the names of as many tensors as a file may have take.
MAX_PICKLE_BYTES = 64 << 20

#: More than a module and a name within it take.
MAX_NAME_BYTES = 4096

#: More lists, tuples and dicts than those tensors are described with.
MAX_CONTAINERS = 1 << 21

#: In what ``torch.save`` writes, a tuple holds a tuple (the size of a tensor), and that none.
MAX_TUPLES = 4

#: The magic number of the form before torch 1.6 is the longest integer of a state dict.
MAX_LONG_BYTES = 10

#: What may be called. Sparse and meta tensors are among them only to be refused by name afterwards.
CALLED = frozenset(
    {
        "collections OrderedDict",
        "torch Size",
        "torch.serialization _get_layout",
        *(
            f"torch._utils {name}"
            for name in (
                "_rebuild_tensor",
                "_rebuild_tensor_v2",
                "_rebuild_tensor_v3",
                "_rebuild_parameter",
                "_rebuild_meta_tensor_no_storage",
                "_rebuild_sparse_tensor",
            )
        ),
    }
)

_STORAGE = re.compile(r"torch(\.cuda)? (\w+)Storage")

#: What may be named besides, for tensors are described with it.
NAMED = frozenset({"torch.storage UntypedStorage", *(f"torch {name}" for name in DTYPES)})

#: The operations that torch's unpickler knows, with how many bytes stand behind each: a negative number is that of the
#: bytes of a length, behind which as many bytes stand; a global has two lines.
_ARGUMENTS = {
    **dict.fromkeys(
        [
            "NONE",
            "NEWTRUE",
            "NEWFALSE",
            "EMPTY_TUPLE",
            "EMPTY_LIST",
            "EMPTY_DICT",
            "EMPTY_SET",
            "TUPLE1",
            "TUPLE2",
            "TUPLE3",
        ],
        0,
    ),
    **dict.fromkeys(
        ["MARK", "TUPLE", "APPEND", "APPENDS", "SETITEM", "SETITEMS", "BINPERSID", "REDUCE", "BUILD", "GLOBAL", "STOP"],
        0,
    ),
    **{"PROTO": 1, "BININT1": 1, "BININT2": 2, "BININT": 4, "BINFLOAT": 8},
    **{"BINPUT": 1, "BINGET": 1, "LONG_BINPUT": 4, "LONG_BINGET": 4},
    **{"BINUNICODE": -4, "SHORT_BINSTRING": -1, "LONG1": -1},
}

_OPERATIONS = {operation.code.encode("latin-1"): operation.name for operation in pickletools.opcodes}

_PLAIN = frozenset(
    [
        "NONE",
        "NEWTRUE",
        "NEWFALSE",
        "BININT",
        "BININT1",
        "BININT2",
        "BINFLOAT",
        "BINUNICODE",
        "SHORT_BINSTRING",
        "LONG1",
        "EMPTY_TUPLE",
    ]
)
_EMPTY = frozenset({"EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET"})
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}

#: A value of which nothing need be known, and what is an OrderedDict.
_VALUE, _ORDERED_DICT = 0, "an OrderedDict"

#: A value, left out: how deep tuples lie in it, or the global that it is.
_Abstract = Union[int, str]  # noqa: UP007


def check_pickle(file: io.BytesIO | io.BufferedReader, name: str) -> int:
    """Run one pickle with values left out; see Note [Pickles].

    Args:
        file: Where it begins; afterwards, where it ends.
        name: The file, for messages.

    Returns:
        How many strings it holds.

    Raises:
        FileFormatError: It does what no state dict needs, or is none that ``torch.save`` writes.
    """
    try:
        return _Run(name).all(_operations(file, name))
    except FileFormatError:
        raise
    except (ValueError, IndexError, KeyError) as error:  # cut off, malformed, or of an empty stack or unknown memo
        raise _refusal(name, "it is cut off or malformed") from error


def _operations(file: io.BytesIO | io.BufferedReader, name: str) -> Iterator[tuple[str, bytes]]:
    """The operations of one pickle, by the names that ``pickletools`` has for them, with what stands behind each.

    That module has a function for this; but it decodes texts by whatever codec an operation asks for.
    """
    left = MAX_PICKLE_BYTES

    def take(count: int) -> bytes:
        nonlocal left
        left -= count
        if left < 0:
            raise _refusal(name, f"its pickle is longer than {MAX_PICKLE_BYTES} bytes")
        data = file.read(count)
        if len(data) < count:
            raise ValueError("cut off")
        return data

    while True:
        code = take(1)
        operation = _OPERATIONS[code]
        if operation not in _ARGUMENTS:
            raise _refusal(name, f"it has the operation {operation}, which torch.save does not write")
        argument = _ARGUMENTS[operation]
        if operation == "GLOBAL":
            lines = [file.readline(MAX_NAME_BYTES), file.readline(MAX_NAME_BYTES)]
            if not all(line.endswith(b"\n") for line in lines):
                raise ValueError("cut off")
            yield operation, b" ".join(line[:-1] for line in lines)
        elif argument < 0:  # a length of so many bytes comes first
            yield operation, take(int.from_bytes(take(-argument), "little"))
        else:
            yield operation, take(argument)
        if operation == "STOP":
            return


class _Run:
    """The stack, the marks and the memo of one run."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.stack: list[_Abstract] = []
        self.marked: list[list[_Abstract]] = []
        self.memo: dict[int, _Abstract] = {}
        self.strings = 0
        self.containers = 0

    def all(self, operations: Iterator[tuple[str, bytes]]) -> int:
        """Run operations to the last one; return how many strings there were."""
        for code, argument in operations:
            self._one(code, argument)
        return self.strings

    def _one(self, code: str, argument: bytes) -> None:
        if code in _PLAIN:
            self.strings += code == "BINUNICODE"
            if code == "LONG1" and len(argument) > MAX_LONG_BYTES:
                raise _refusal(self.name, f"it holds an integer of {8 * len(argument)} bits")
            self.stack.append(_VALUE)
        elif code in ("BINPUT", "LONG_BINPUT"):
            self.memo[int.from_bytes(argument, "little")] = self.stack[-1]
        elif code in ("BINGET", "LONG_BINGET"):
            self._recall(self.memo[int.from_bytes(argument, "little")])
        elif code == "GLOBAL":
            self._name(argument.decode("ascii"))
        elif code in _STEPS:
            _STEPS[code](self)
        elif code in _TUPLES:
            self._tuple([self.stack.pop() for _ in range(_TUPLES[code])])
        elif code in _EMPTY:
            self._contain()
            self.stack.append(_VALUE)

    def _contain(self) -> None:
        self.containers += 1
        if self.containers > MAX_CONTAINERS:
            raise _refusal(self.name, f"it holds more than {MAX_CONTAINERS} lists, tuples and dicts")

    def _recall(self, value: _Abstract) -> None:
        if isinstance(value, int) and value:
            raise _refusal(self.name, "it holds one tuple twice, which torch.save does not write")
        self.stack.append(value)

    def _name(self, which: str) -> None:
        if which not in CALLED and which not in NAMED and not _STORAGE.fullmatch(which):
            where = which.replace(" ", ".")[:64]
            raise _refusal(self.name, f"it names {where!r}, which no state dict of tensors needs")
        self.stack.append(which)

    def _tuple(self, items: list[_Abstract]) -> None:
        self._contain()
        depth = 1 + max((item for item in items if isinstance(item, int)), default=0)
        if depth > MAX_TUPLES:
            raise _refusal(self.name, f"it holds tuples more than {MAX_TUPLES} deep")
        self.stack.append(depth)

    def _pop_mark(self) -> list[_Abstract]:
        items, self.stack = self.stack, self.marked.pop()
        return items

    def mark(self) -> None:
        """Begin with items of something."""
        self._contain()
        self.marked.append(self.stack)
        self.stack = []

    def tuple_of_marked(self) -> None:
        """Make a tuple of the items since the mark."""
        self._tuple(self._pop_mark())

    def drop_marked(self) -> None:
        """Put the items since the mark into what is below it."""
        self._pop_mark()

    def drop_one(self) -> None:
        """Put an item into what is below it."""
        self.stack.pop()

    def drop_two(self) -> None:
        """Put a pair into the dict below it."""
        del self.stack[-2:]

    def fetch(self) -> None:
        """Put a storage in the place of what says which."""
        self.stack[-1] = _VALUE

    def call(self) -> None:
        """Call something with arguments."""
        self.stack.pop()
        called = self.stack[-1]
        if called not in CALLED:
            what = called.replace(" ", ".") if isinstance(called, str) else "something that is no function"
            raise _refusal(self.name, f"it calls {what}")
        self.stack[-1] = _ORDERED_DICT if called == "collections OrderedDict" else _VALUE

    def build(self) -> None:
        """Give an object attributes; state dicts of modules are OrderedDicts with ``_metadata``."""
        self.stack.pop()
        if self.stack[-1] != _ORDERED_DICT:
            raise _refusal(self.name, "it gives attributes to something else than an OrderedDict")


_STEPS: dict[str, Callable[[_Run], None]] = {
    "MARK": _Run.mark,
    "TUPLE": _Run.tuple_of_marked,
    "APPEND": _Run.drop_one,
    "APPENDS": _Run.drop_marked,
    "SETITEM": _Run.drop_two,
    "SETITEMS": _Run.drop_marked,
    "BINPERSID": _Run.fetch,
    "REDUCE": _Run.call,
    "BUILD": _Run.build,
}


def _refusal(name: str, why: str) -> FileFormatError:
    return FileFormatError(
        f"{name}: not a state dict of tensors as torch.save writes it: {why}; it is damaged, or holds more than "
        "tensors; save model.state_dict() by itself"
    )
