"""Files of ours whose manifest, with the right digest, says what no model of this process can be."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from orthoserde.errors import ConfigError, DamagedFileError, FileFormatError, FormatVersionError
from tests.reliability.hostile_files import Hostile, Outcome, Write, content, readable, refused
from tests.reliability.mutations import Parts, canonical, digest, file_of, resealed, sealed, text_of
from tests.reliability.specimen import make

Change = Callable[[dict[str, Any]], object]

BASE = "turn.parametrizations.weight.0.base.columns"
TURNED = "turn.parametrizations.weight.original"
MOMENTUM = ".optimizer.head.weight.momentum_buffer"


@functools.cache
def specimen_file() -> bytes:
    """The file of a specimen."""
    with TemporaryDirectory() as folder:
        make(1).save(Path(folder) / "saved")
        return (Path(folder) / "saved").read_bytes()


def changed(change: Change) -> Write:
    """The file with a manifest that is changed, and all digests and the header to match it."""

    def write(folder: Path) -> Path:
        parts = Parts.of(specimen_file())
        manifest = copy.deepcopy(parts.manifest)
        change(manifest)
        return content(resealed(parts, manifest))(folder)  # type: ignore[return-value]

    return write


def put(*path: str | int, value: Any) -> Write:
    """The file with one value of the manifest exchanged, or added."""

    def change(manifest: dict[str, Any]) -> None:
        holder: Any = manifest
        for step in path[:-1]:
            holder = holder[step]
        holder[path[-1]] = value

    return changed(change)


def without(*path: str | int) -> Write:
    """The file without one value of the manifest."""

    def change(manifest: dict[str, Any]) -> None:
        holder: Any = manifest
        for step in path[:-1]:
            holder = holder[step]
        del holder[path[-1]]

    return changed(change)


def header_with(change: Change) -> Write:
    """The file with a changed header, and the manifest that it had."""

    def write(folder: Path) -> Path:
        parts = Parts.of(specimen_file())
        change(parts.header)
        return content(file_of(text_of(parts.header), parts.data))(folder)  # type: ignore[return-value]

    return write


def _envelope(change: Callable[[str], str]) -> Write:
    def altered(header: dict[str, Any]) -> None:
        header["__metadata__"]["orthoserde"] = change(header["__metadata__"]["orthoserde"])

    return header_with(altered)


def elements(key: str, data: bytes) -> Write:
    """The file with other elements of a tensor, and the digest of these."""

    def write(folder: Path) -> Path:
        parts = Parts.of(specimen_file())
        place, stored = parts.stored(key), bytearray(parts.data)
        stored[place] = (data * (place.stop - place.start))[: place.stop - place.start]
        parts.manifest["tensors"][key]["digest"] = digest(bytes(stored[place]))
        return content(sealed(Parts(parts.header, parts.manifest, bytes(stored)), canonical(parts.manifest)))(folder)  # type: ignore[return-value]

    return write


def _flipped(folder: Path) -> Path:
    data = bytearray(specimen_file())
    data[-1] ^= 1
    return content(bytes(data))(folder)  # type: ignore[return-value]


def nested(levels: int) -> Any:
    """Lists within each other."""
    value: Any = []
    for _ in range(levels):
        value = [value]
    return value


def tree(value: Any) -> Write:
    """The file with another tree of training state."""
    return put("training", "state", "epoch", "value", value=value)


def config(**changes: Any) -> Write:
    """The file with another configuration of its orthogonal weight."""

    def change(manifest: dict[str, Any]) -> None:
        manifest["parametrized"][0]["chain"][0]["config"].update(changes)

    return changed(change)


def _columns(**changes: Any) -> Write:
    def change(manifest: dict[str, Any]) -> None:
        manifest["tensors"][BASE].update(changes)

    return changed(change)


def _huge_base(manifest: dict[str, Any]) -> None:
    """Columns of a base of 2**40 rows, of which not one is in the file."""
    manifest["tensors"][BASE].update(shape=[2**40, 2], stride=[2, 1])
    manifest["parametrized"][0].update(shape=[2**40, 2])
    manifest["parametrized"][0]["chain"][0]["config"].update(shape=[2**40, 2])


def _renamed(old: str, new: str) -> Write:
    """The file with a module of another name, wherever it stands."""

    def write(folder: Path) -> Path:
        parts = Parts.of(specimen_file())
        text = text_of(parts.manifest)
        quoted = json.dumps(new, ensure_ascii=False)[1:-1]
        for start in ('"', ":"):
            text = text.replace(f"{start}{old}.", f"{start}{quoted}.").replace(f'{start}{old}"', f'{start}{quoted}"')
        return content(resealed(parts, json.loads(text.replace(f".optimizer.{old}.", f".optimizer.{quoted}."))))(folder)  # type: ignore[return-value]

    return write


NEWER = "needs a newer orthoserde"

#: What cannot be opened.
BROKEN: dict[str, Hostile] = {
    "a newer version": refused(put("version", value=2), "upgrade orthoserde", FormatVersionError),
    "a version far away": refused(put("version", value=2**62), "upgrade orthoserde", FormatVersionError),
    "version 0": refused(put("version", value=0), "an integer from 1"),
    "a version that is true": refused(put("version", value=True), "an integer from 1"),
    "no version": refused(without("version"), "'version' is missing"),
    "an unknown digest": refused(put("digest", value="crc32"), NEWER, FormatVersionError),
    "no digests": refused(put("digest", value=None), "expected a string"),
    "a tensor without a digest": refused(put("tensors", BASE, "digest", value=None), "expected a string"),
    "an empty digest": refused(put("tensors", BASE, "digest", value=""), "32 hexadecimal digits"),
    "an unknown field": refused(put("run_this", value="os.system"), NEWER, FormatVersionError),
    "an unknown field of a tensor": refused(put("tensors", BASE, "hook", value="x"), NEWER, FormatVersionError),
    "no tensors": refused(put("tensors", value={}), "truncated or damaged", DamagedFileError),
    "tensors that are a list": refused(put("tensors", value=[]), "an object"),
    "a tensor that the file lacks": refused(
        put("parametrized", 0, "module", value="elsewhere"), "holds no tensor 'elsewhere.parametrizations"
    ),
    "a dtype of its own": refused(put("tensors", BASE, "dtype", value="__class__"), "a dtype that torch has"),
    "a shape of 2**64 elements": refused(put("tensors", BASE, "shape", value=[2**31, 2**31, 4]), "more than 64 bits"),
    "strides for another shape": refused(put("tensors", BASE, "stride", value=[1]), "expected 2 strides"),
    "an unknown encoding": refused(
        put("parametrized", 0, "originals", "original", value="pickle"), NEWER, FormatVersionError
    ),
    "no chain": refused(put("parametrized", 0, "chain", value=[]), "at least one parametrization"),
    "no originals": refused(put("parametrized", 0, "originals", value={}), "original, or original0"),
    "original 10**6": refused(
        put("parametrized", 1, "originals", value={"original1000000": "dense"}), "original, or original0"
    ),
    "one parametrized tensor twice": refused(
        changed(lambda manifest: manifest["parametrized"].append(manifest["parametrized"][0])), "stands twice"
    ),
    "an alias of an alias": refused(put("aliases", value={"a": "b", "b": "a"}), "the key of a stored tensor"),
    "an alias of nothing": refused(put("aliases", "tied.weight", value="nothing"), "the key of a stored tensor"),
    "a tensor that is left out and there": refused(put("left_out", value=["head.bias"]), "left_out"),
    "a computed tensor that is state": refused(put("computed", value=[TURNED]), "is state of"),
    "an opaque class with a kind": refused(put("parametrized", 0, "chain", 0, "class", value="os:system"), "class"),
    "an opaque class without a name": refused(put("parametrized", 0, "chain", 0, "kind", value="opaque"), "class"),
    "one module twice": refused(
        put("modules", value=[{"path": "", "kind": "a>B", "version": 1, "config": {}}] * 2), "stands twice"
    ),
    "two manifests": refused(
        _envelope(lambda text: text[:-1] + "," + text[1:]), "does not match its digest", DamagedFileError
    ),
    "a manifest of another digest": refused(
        _envelope(lambda text: text.replace("seven", "eight")), "does not match its digest", DamagedFileError
    ),
    "a digest of zeros": refused(
        _envelope(lambda text: text[:11] + "0" * 32 + text[43:]), "does not match its digest", DamagedFileError
    ),
    "no manifest under our key": refused(_envelope(lambda text: ""), "expected a manifest and its digest"),
    "a manifest under another key": refused(
        header_with(lambda header: header["__metadata__"].update(orthoserdf=header["__metadata__"].pop("orthoserde"))),
        "under another key",
        DamagedFileError,
    ),
    "a header of another dtype": refused(
        header_with(lambda header: header[BASE].update(dtype="I32")), "does not match the manifest", DamagedFileError
    ),
    "a header of another shape": refused(
        header_with(lambda header: header[BASE].update(shape=[2, 3])), "does not match the manifest", DamagedFileError
    ),
    "a header with two names exchanged": refused(
        header_with(lambda header: header.update({"head.weight": header[MOMENTUM], MOMENTUM: header["head.weight"]})),
        "does not match the manifest",
        DamagedFileError,
    ),
    "another text of the same header": refused(
        header_with(lambda header: header.update(__metadata__=header.pop("__metadata__"))),
        "does not match the manifest",
        DamagedFileError,
    ),
    "columns of 2**40 rows": refused(changed(_huge_base), "truncated or damaged", DamagedFileError),
    "more columns than rows": refused(_columns(shape=[2, 3], stride=[3, 1]), "expected columns of shape"),
    "columns that are a parameter": refused(_columns(parameter=True), "row-major buffer"),
    "columns of integers": refused(_columns(dtype="int32"), "columns of a base in int32"),
    "columns of a weight norm": refused(
        put("parametrized", 1, "chain", 0, "tensors", value={"base": "columns"}), "holds no tensor"
    ),
    "columns without trivialization": refused(config(use_trivialization=False), "without trivialization"),
    "state of parameters without a group": refused(
        put("training", "optimizers", "", "groups", value=[]), "state of its parameters"
    ),
    "tensors of training state without it": refused(put("training", value=None), "has the form of a key"),
    "a module that leads out of a folder": refused(_renamed("head", "../../x"), "has the form"),
    "hooks of a class that has none": refused(
        put("parametrized", 0, "originals", "original", value="hook"), "of one parametrization that has a hook"
    ),
}

#: Trees that are none.
TREES: dict[str, Hostile] = {
    "a tree of 70 levels": refused(tree(nested(70)), "nested deeper"),
    "a tree of 17 levels": refused(tree(nested(17)), "nested deeper"),
    "a tree of 100,000 levels": refused(tree(None), "", FileFormatError),
    "an object of two sorts": refused(tree({"tuple": [], "dict": []}), "one key"),
    "an unknown sort": refused(tree({"object": "os:system"}), "is no sort of value"),
    "a float that is none": refused(tree({"float": "1e5"}), "is no sort of value"),
    "an integer that needs no words": refused(tree({"integer": "1"}), "is no sort of value"),
    "an integer of a million digits": refused(tree({"integer": "9" * 1_000_000}), "is no sort of value"),
    "pairs that are none": refused(tree({"dict": [["a"]]}), "pairs of a key and a value"),
    "a key that is a list": refused(tree({"dict": [[[], 1]]}), "strings and numbers for keys"),
    "a key that is a tensor": refused(tree({"dict": [[{"tensor": "x"}, 1]]}), "strings and numbers for keys"),
    "a key twice in a tree": refused(tree({"dict": [["a", 1], ["a", 2]]}), "a key stands twice"),
    "keys that are equal numbers": refused(tree({"dict": [[1, 1], [True, 2]]}), "a key stands twice"),
    "a tensor that is not there": refused(tree({"tensor": ".nothing"}), "a tensor of its own"),
    "a tensor of the model": refused(tree({"tensor": "head.weight"}), "a tensor of its own"),
    "a tensor in two places": refused(tree({"tensor": MOMENTUM}), "a tensor of its own"),
    "an integer of 64 bits and a sign": refused(tree(2**63), "more than 64 bits"),
}


def _deep(folder: Path) -> Path:
    parts = Parts.of(specimen_file())
    marked = copy.deepcopy(parts.manifest)
    marked["training"]["state"]["epoch"]["value"] = "HERE"
    text = canonical(marked).replace('"HERE"', "[" * 100_000 + "]" * 100_000)
    return content(sealed(parts, text))(folder)  # type: ignore[return-value]


TREES["a tree of 100,000 levels"] = refused(_deep, "not valid JSON")
TREES["a tree of half a million lists"] = Hostile(
    tree([[]] * 500_000),
    load=Outcome(None, "EXACT"),
    inspect=Outcome(None, "12 tensors"),
    verify=Outcome(None, ": ok"),
    build=Outcome(ConfigError, "does not say"),
    heavy=True,
)
TREES["a tree of three million lists"] = refused(tree([[]] * 3_000_000), "holds more than", heavy=True)


def _kind(name: str) -> Hostile:
    return readable(put("parametrized", 1, "chain", 0, "kind", value=name), f"the file has {name}", inspect=name)


def _opaque(name: str) -> Hostile:
    link: dict[str, Any] = {"kind": "opaque", "class": name, "config": None, "tensors": {}, "version": 1}
    return readable(
        put("parametrized", 1, "chain", 0, value=link), "the file has the parametrization", inspect="opaque"
    )


def _module(kind: str, words: str, error: type[Exception] | None = None) -> Hostile:
    record = {"path": "", "kind": kind, "version": 1, "config": {"command": "echo owned"}}
    return readable(put("modules", value=[record]), "the file has", build=words)


#: What can be opened, for it may be of another process, and does not fit this one.
STRANGE: dict[str, Hostile] = {
    "the kind os>system": _kind("os>system"),
    "the kind builtins>eval": _kind("builtins>eval"),
    "a kind of dots": _kind("../../os"),
    "the class os:system": _opaque("os:system"),
    "the class __main__:Net": _opaque("__main__:Net"),
    "a class without a name": _opaque(""),
    "a root of the kind os>system": _module("os>system", "os>system is not registered in this process"),
    "a root of the kind torch>Linear": _module("torch.nn>Linear", "is not registered in this process"),
    "a root with an odd kind": _module("\x1b[2J", r"\x1b[2J is not registered"),
    "a newer version of a kind": readable(
        put("parametrized", 0, "chain", 0, "version", value=2**40), "version", verify="knows up to"
    ),
    "another map": readable(config(orthogonal_map="matrix_exp"), "orthogonal_map is 'matrix_exp' in the file"),
    "a map of no name": readable(config(orthogonal_map="os.system"), "orthogonal_map", verify="does not fit"),
    "more settings": readable(config(command="echo owned"), "command is 'echo owned' in the file"),
    "another shape of the weight": readable(put("parametrized", 1, "shape", value=[2**31, 2**31]), "contradicts"),
    "another dim": readable(
        put("parametrized", 1, "chain", 0, "config", "dim", value=2**62), "dim is", verify="does not fit"
    ),
    "another optimizer": readable(put("training", "optimizers", "", "class", value="os:system"), "system"),
    "options of another type": readable(
        put("training", "optimizers", "", "groups", 0, "options", value={"dict": [["lr", "nan"]]}), "lr is of type str"
    ),
    "columns that are NaN": readable(elements(BASE, b"\0\0\xc0\x7f"), "are damaged", verify="off their constraint"),
    "columns that are zero": readable(elements(BASE, b"\0"), "are damaged", verify="off their constraint"),
    "columns of rank 1": readable(elements(BASE, b"\0\0\x80\x3f"), "are damaged", verify="off their constraint"),
    "other bytes than were saved": readable(
        _flipped, "not those that were saved", DamagedFileError, verify="damaged", build="does not say"
    ),
    **{
        f"a module called {name[:24]!r}": readable(_renamed("head", name), words, inspect="tensors")
        for name, words in {
            "__class__": "__class__",
            "training": "training",
            "requires_grad_": "requires_grad_",
            "a/../../x": "a/../../x",
            "a\nb": r"a\nb",
            "\x1b[2J": r"\x1b[2J",
            "n" * 10**6: "n" * 64,
            "turn": "turn",
        }.items()
    },
}

FILES: dict[str, Hostile] = {
    f"manifests: {name}": hostile for part in (BROKEN, TREES, STRANGE) for name, hostile in part.items()
}
