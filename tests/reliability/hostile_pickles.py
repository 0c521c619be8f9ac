"""Files of ``torch.save``, or what pretends to be: written opcode by opcode, for torch would not write them."""

from __future__ import annotations

import io
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from orthoserde.errors import IncompatibleModelError
from tests.reliability.hostile_files import Hostile, Write, content, readable, refused

START, STOP = b"\x80\x02", b"."
MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, 2)
PROTOCOL = pickle.dumps(1001, 2)
SYSTEM = pickle.dumps({"protocol_version": 1001, "little_endian": True, "type_sizes": {}}, 2)


def name(which: str) -> bytes:
    """The opcode for a global."""
    module, _, attribute = which.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def text(value: str) -> bytes:
    """The opcode for a string."""
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def number(value: int) -> bytes:
    """The opcode for an integer of any size."""
    data = pickle.encode_long(value)
    return b"\x8a" + bytes([len(data)]) + data


def sizes(*values: int) -> bytes:
    """Opcodes for a tuple of integers."""
    return b"(" + b"".join(map(number, values)) + b"t"


def called(which: str, *arguments: bytes) -> bytes:
    """Opcodes for what a global returns."""
    return name(which) + b"(" + b"".join(arguments) + b"tR"


def storage(numel: int, key: str = "0", kind: str = "torch.FloatStorage", location: str = "cpu") -> bytes:
    """Opcodes for a storage that stands in the file."""
    return b"(" + text("storage") + name(kind) + text(key) + text(location) + number(numel) + b"tQ"


def tensor(store: bytes, shape: bytes, stride: bytes, offset: int = 0) -> bytes:
    """Opcodes for a tensor over a storage."""
    hooks = called("collections.OrderedDict")
    return called("torch._utils._rebuild_tensor_v2", store, number(offset), shape, stride, b"\x89", hooks)


def entry(value: bytes, key: bytes = b"") -> bytes:
    """Opcodes for a dict with one value."""
    return b"}" + (key or text("weight")) + value + b"s"


def archive(opcodes: bytes, storages: dict[str, bytes] | None = None, **options: Any) -> bytes:
    """The archive that holds this pickle, as torch writes it but for what the options change."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", options.get("compression", zipfile.ZIP_STORED)) as written:
        for member in options.get("pickles", ["data.pkl"]):
            written.writestr(f"archive/{member}", START + opcodes + STOP)
        for member, data in {"byteorder": b"little", "version": b"3\n", **options.get("more", {})}.items():
            written.writestr(f"archive/{member}", data)
        for key, data in (storages or {}).items():
            written.writestr(f"archive/data/{key}", data)
    return file.getvalue()


def bare(opcodes: bytes, keys: list[str], data: bytes = b"", magic: bytes = MAGIC) -> bytes:
    """The form of before torch 1.6."""
    opcodes = opcodes.replace(b"tQ", b"NtQ")  # there, a storage may be a part of another one
    return magic + PROTOCOL + SYSTEM + START + opcodes + STOP + pickle.dumps(keys, 2) + data


def stored(*values: float) -> bytes:
    """A storage as it stands behind the pickles of the old form."""
    return struct.pack(f"<q{len(values)}f", len(values), *values)


def in_both(opcodes: bytes, words: str, **more: Any) -> dict[str, Hostile]:
    """Refused in either form, and for the same reason."""
    return {
        "archive": refused(content(archive(opcodes, {"0": bytes(4)})), words, **more),
        "bare": refused(content(bare(opcodes, ["0"], stored(0.0))), words, **more),
    }


ONE = tensor(storage(1), sizes(1), sizes(1))
NEEDS, CALLS = "which no state dict of tensors needs", "it calls "


def _deep_key(depth: int) -> bytes:
    return b"})" + b"\x85" * depth + b"Ns"


def _laughing_key(levels: int) -> bytes:
    """A tuple that holds one twice, which holds one twice: its hash takes 2**levels steps."""
    return b"})" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(levels)) + b"Ns"


def _saved(value: object, **options: Any) -> Write:
    def write(folder: Path) -> Path:
        torch.save(value, folder / "weights.bin", **options)
        return folder / "weights.bin"

    return write


def _overlapping(folder: Path) -> Path:
    """A thousand members that are one: the table says so, and nobody else."""
    good = archive(entry(ONE), {"0": bytes(4), "big": bytes(1 << 20)})
    with zipfile.ZipFile(io.BytesIO(good)) as opened:
        members = {member.filename: member for member in opened.infolist()}
        start = opened.start_dir
    table = good[start:-22]
    local = members["archive/data/big"]
    record = table[table.index(b"archive/data/big") - 46 :][: 46 + len("archive/data/big")]
    table += b"".join(record.replace(b"/big", b"/%03d" % i) for i in range(999))
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1004, 1004, len(table), start, 0)
    assert local.file_size == 1 << 20
    return content(good[:start] + table + end)(folder)  # type: ignore[return-value]


def _flipped(folder: Path) -> Path:
    sixteen = tensor(storage(16), sizes(16), sizes(1))
    data = bytearray(archive(entry(sixteen), {"0": b"\x7f" * 64}))
    data[data.index(b"\x7f" * 64)] ^= 1
    return content(bytes(data))(folder)  # type: ignore[return-value]


def _folder(folder: Path) -> Path:
    """One bit, and torch's reader leaves the memory of the tensor unfilled."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(GOOD)) as old, zipfile.ZipFile(file, "w") as new:
        for member in old.infolist():
            copied = zipfile.ZipInfo(member.filename)
            copied.external_attr = 0x10 if member.filename.endswith("/0") else 0
            new.writestr(copied, old.read(member))
    return content(file.getvalue())(folder)  # type: ignore[return-value]


def _tar(folder: Path) -> Path:
    """A tar archive whose first name begins as a pickle does; torch would make a folder and extract into it."""
    path = folder / "weights.bin"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, encoding="latin-1") as written:
        for member in ("\x80\x02storages", "storages", "tensors", "pickle"):
            info = tarfile.TarInfo(member)
            if member == "storages":
                info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
            info.mode = 0o644
            written.addfile(info, io.BytesIO())
    data = bytearray(path.read_bytes())
    header = tarfile.TarInfo("storages")
    raw = bytearray(header.tobuf(tarfile.USTAR_FORMAT))
    raw[:10] = b"\x80\x02storages"[:10]
    checksum = sum(raw[:148]) + 8 * 32 + sum(raw[156:512])
    raw[148:156] = b"%06o\0 " % checksum
    path.write_bytes(bytes(raw) + bytes(data))
    return path


def _patched(old: bytes, new: bytes, build: Callable[[], bytes]) -> Write:
    return content(build().replace(old, new))


GOOD = archive(entry(ONE), {"0": bytes(4)})
PRETENDS = {"weight": torch.zeros(1)}

CODE: dict[str, Hostile] = {}
for _what, _global in {
    "os.system": "os.system",
    "posix.system": "posix.system",
    "builtins.eval": "builtins.eval",
    "an old name of builtins.eval": "__builtin__.eval",
    "builtins.getattr": "builtins.getattr",
    "subprocess.Popen": "subprocess.Popen",
    "importlib.import_module": "importlib.import_module",
    "torch.hub.load": "torch.hub.load",
    "torch.load": "torch.load",
    "torch.jit.load": "torch.jit.load",
    "numpy._core.multiarray._reconstruct": "numpy._core.multiarray._reconstruct",
    "torch.nn.Linear": "torch.nn.modules.linear.Linear",
    "a class of ours": "orthoserde.registry.Registry",
    "a dunder of a module": "torch.__builtins__",
    "a name of dots": "torch.serialization.os.system",
}.items():
    for _form, _hostile in in_both(entry(called(_global, text("echo owned"))), NEEDS).items():
        CODE[f"{_what}, {_form}"] = _hostile

#: What torch's restricted unpickler would do, and no state dict needs.
BOMBS: dict[str, Hostile] = {}
for _what, (_opcodes, _words) in {
    "bytearray of 100 GB": (entry(called("builtins.bytearray", number(10**11))), NEEDS),
    "an encoding that is imported": (entry(called("_codecs.encode", text("a"), text("idna"))), NEEDS),
    "a text that doubles itself": (entry(called("_codecs.encode", text("a"), text("hex_codec"))), NEEDS),
    "torch.Tensor of any size": (entry(called("torch.Tensor", number(10**12))), NEEDS),
    "a storage that nothing fills": (entry(called("torch.storage.UntypedStorage", number(2**30))), CALLS),
    "a quantized tensor of any size": (
        entry(called("torch._utils._rebuild_qtensor", storage(1), number(0), sizes(10**12), sizes(1))),
        NEEDS,
    ),
    "a tensor with attributes": (entry(ONE + b"}" + text("__class__") + b"Nsb"), "it gives attributes"),
    "a key that overflows the stack": (_deep_key(10**6), "tuples more than"),
    "a key that is never hashed": (_laughing_key(60), "one tuple twice"),
    "an integer of 2,000 bits": (entry(b"\x8a\xff" + b"\x01" * 255), "an integer of"),
    "an empty stack": (b"0", "it has the operation POP"),
    "nothing to store": (b"q\x00", "cut off or malformed"),
    "a place in the memo that is not there": (b"h\x07", "cut off or malformed"),
    "no mark": (b"t", "cut off or malformed"),
    "an instance of the old sort": (b"(i" + b"os\nsystem\n", "it has the operation INST"),
    "an extension": (b"\x82\x01", "it has the operation EXT1"),
    "a text of 4 GB": (b"X\xff\xff\xff\xff", "its pickle is longer than"),
    "bytes of 2**63": (b"\x8e" + struct.pack("<Q", 2**63 - 1), "it has the operation BINBYTES8"),
}.items():
    for _form, _hostile in in_both(_opcodes, _words, heavy="GB" in _what or "stack" in _what or "any" in _what).items():
        BOMBS[f"{_what}, {_form}"] = _hostile

REFUSES = "restricted unpickler refuses"

#: Tensors that are none, or not those that the file holds.
TENSORS: dict[str, Hostile] = {
    "1e12 elements of four bytes": refused(
        content(archive(entry(tensor(storage(1), sizes(10**12), sizes(0))), {"0": bytes(4)})), "claims more elements"
    ),
    "1e12 elements of four bytes, bare": refused(
        content(bare(entry(tensor(storage(1), sizes(10**12), sizes(0))), ["0"], stored(0.0))), "claims more elements"
    ),
    "two elements of one": refused(
        content(archive(entry(tensor(storage(1), sizes(2), sizes(1))), {"0": bytes(4)})), REFUSES
    ),
    "an offset beyond the storage": refused(
        content(archive(entry(tensor(storage(1), sizes(1), sizes(1), 10**9)), {"0": bytes(4)})), REFUSES
    ),
    "a negative offset": refused(
        content(archive(entry(tensor(storage(1), sizes(1), sizes(1), -(10**9))), {"0": bytes(4)})), REFUSES
    ),
    "a negative stride": refused(
        content(archive(entry(tensor(storage(2), sizes(2), sizes(-1), 1)), {"0": bytes(8)})), REFUSES
    ),
    "a negative size": refused(
        content(archive(entry(tensor(storage(1), sizes(-1), sizes(1))), {"0": bytes(4)})), REFUSES
    ),
    "a storage of more than its bytes": refused(
        content(archive(entry(tensor(storage(10**9), sizes(10**9), sizes(1))), {"0": bytes(4)})), REFUSES, heavy=True
    ),
    "a storage of more than its bytes, bare": refused(
        content(bare(entry(tensor(storage(10**9), sizes(10**9), sizes(1))), ["0"], stored(0.0))), REFUSES, heavy=True
    ),
    "a storage that is not filled, bare": refused(
        content(bare(entry(tensor(storage(1), sizes(1), sizes(1))), [], stored(0.0))), "storages take"
    ),
    "a storage that is not there": refused(content(archive(entry(ONE), {})), REFUSES),
    "a storage from elsewhere": refused(
        content(archive(entry(tensor(storage(1, "../data.pkl"), sizes(1), sizes(1))), {"0": bytes(4)})), REFUSES
    ),
    "a storage of an unknown kind": refused(
        content(archive(entry(tensor(storage(1, kind="torch.EvilStorage"), sizes(1), sizes(1))), {"0": bytes(4)})),
        REFUSES,
    ),
    "meta": refused(_saved({"weight": torch.zeros(10**6, device="meta")}), "ordinary tensor"),
    "1e15 elements on the meta device": refused(
        _saved({"weight": torch.zeros(1, device="meta").expand(10**15)}), "ordinary tensor"
    ),
    "sparse": refused(_saved({"weight": torch.zeros(2).to_sparse()}), "ordinary tensor"),
    "nested": refused(_saved({"weight": {"deeper": {"deeper": torch.zeros(1)}}}), "flat state dict"),
    "itself": refused(content(archive(b"}q\0" + text("weight") + b"h\0s")), "flat state dict"),
    "lists within each other": refused(content(archive(entry(b"]" * 10**5 + b"a" * (10**5 - 1)))), "flat state dict"),
    "a number for a key": refused(_saved({1: torch.zeros(1)}), "keys that are strings"),
    "no dict": refused(_saved([torch.zeros(1)]), "expected a state dict, got list"),
    "a tensor alone": refused(_saved(torch.zeros(1)), "expected a state dict, got Tensor"),
    "a module": refused(_saved(torch.nn.Linear(1, 1)), NEEDS),
    "an array": refused(_saved({"weight": torch.zeros(1).numpy()}), NEEDS),
    "a name that a terminal obeys": readable(
        _saved({"\x1b[2J": torch.zeros(1)}), r"\x1b[2J", IncompatibleModelError, plain=True
    ),
    "a lone surrogate in a name": refused(
        content(archive(entry(ONE, text("\ud800")), {"0": bytes(4)})), r"the key '\ud800' is no valid Unicode"
    ),
}

#: Archives that torch and Python, or their checksums, do not agree about.
ARCHIVES: dict[str, Hostile] = {
    "deflated": refused(
        content(archive(entry(ONE), {"0": bytes(1 << 26)}, compression=zipfile.ZIP_DEFLATED)), "a compressed archive"
    ),
    "bzip2": refused(
        content(archive(entry(ONE), {"0": bytes(1 << 20)}, compression=zipfile.ZIP_BZIP2)), "a compressed archive"
    ),
    "a checksum that does not match": refused(_flipped, "checksum"),
    "a thousand members in one place": refused(_overlapping, "lie over each other", heavy=True),
    "no pickle": refused(content(archive(b"", pickles=[])), "expected an archive with one pickle"),
    "two pickles of one name": refused(
        content(GOOD.replace(b"archive/version", b"archive/data.pkl"[: len(b"archive/version")])), "damaged"
    ),
    "two pickles, one in capitals": refused(
        content(archive(entry(ONE), {"0": bytes(4)}, pickles=["data.pkl", "DATA.PKL"])), "two members of one name"
    ),
    "two pickles in two folders": refused(
        content(archive(entry(ONE), {"0": bytes(4)}, pickles=["data.pkl", "x/data.pkl"])), "one pickle"
    ),
    "TorchScript": refused(content(archive(entry(ONE), {"0": bytes(4)}, more={"constants.pkl": b"x"})), REFUSES),
    "a name with a NUL": refused(
        _patched(b"archive/version", b"archive/v\0rsion", lambda: archive(entry(ONE), {"0": bytes(4)})), "of one name"
    ),
    "something before it": refused(content(b"PK\3\4" + bytes(40) + GOOD), "a damaged archive"),
    "something behind it": refused(content(GOOD + b"trailing"), "a damaged archive"),
    "a comment": refused(content(GOOD[:-2] + b"\x02\x00hi"), "a damaged archive"),
    "a table from elsewhere": refused(content(GOOD[:-6] + b"\0\0\0\x7f\0\0"), "a damaged archive"),
    "cut off": refused(content(GOOD[: len(GOOD) // 2]), "a damaged archive"),
    "a magic number alone": refused(content(b"PK\3\4"), "a damaged archive"),
    "an archive that is a safetensors file": refused(content(b"PK\3\4\0\0\0\0{" + bytes(99)), "no safetensors header"),
    "an encrypted member": refused(
        _patched(b"PK\1\2\x14\x03\x14\0\0\0", b"PK\1\2\x14\x03\x14\0\1\0", lambda: GOOD), "a damaged archive"
    ),
    "a bare pickle of another magic": refused(content(bare(entry(ONE), ["0"], stored(0.0), PROTOCOL)), REFUSES),
    "a bare pickle, cut off": refused(content(bare(entry(ONE), ["0"], stored(0.0))[:-1]), REFUSES),
    "a bare pickle with more": refused(content(bare(entry(ONE), ["0"], stored(0.0) + b"x")), "storages take"),
    "a bare pickle of protocol 4": refused(content(pickle.dumps({"weight": [1.0]}, 4)), "the operation FRAME"),
    "a storage that is a folder": refused(_folder, "an archive with folders"),
    "big-endian": refused(
        content(archive(entry(ONE), {"0": bytes(4)}, more={"byteorder": b"big"})), "big-endian machine"
    ),
    "a tar archive": refused(_tar, "cut off or malformed"),
    "a pickle that is no tensor": refused(content(pickle.dumps({"a": 1}, 2)), "cut off or malformed"),
}

#: Before, torch's restricted unpickler could be made to run code, so that nothing of this is looked at.
IS_TRUSTED = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 6)

NO_PICKLE = ("an archive that is a safetensors file",)


def _here(name: str, hostile: Hostile) -> Hostile:
    """What comes of it with this torch."""
    trusted = IS_TRUSTED or name in NO_PICKLE
    return hostile if trusted else refused(hostile.write, "use torch 2.6 or newer", heavy=hostile.heavy)


FILES: dict[str, Hostile] = {
    f"pickles: {_name}": _here(_name, _hostile)
    for _part in (CODE, BOMBS, TENSORS, ARCHIVES)
    for _name, _hostile in _part.items()
}
