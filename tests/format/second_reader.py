"""A second reader of the format, written from docs/reference/file-format.md alone: where it fails, the page is wrong.

Plain Python and numpy, and xxhash for the digests. It reads one file, and refuses what the page says a reader must.
How a tensor lies in memory, and what base stands behind columns, is in `second_arrays`.
"""

import json
import re
from collections import Counter, OrderedDict
from typing import Any

import numpy as np
from xxhash import xxh3_128_hexdigest as digest_of

from tests.format.second_arrays import DTYPES, array_of


def parse(text: str) -> Any:
    """The value of a JSON text. What else is not canonical in it shows when the header is compared."""
    marks = re.sub(r'"(?:[^"\\]|\\.)*"|[^\[\]{},]', "", text, flags=re.DOTALL)
    assert len(re.sub(r"[\]}]", "", marks)) <= 4_194_304, "JSON of too many values"
    assert np.cumsum([{"[": 1, "{": 1, ",": 0}.get(mark, -1) for mark in marks]).max() <= 80, "JSON nested too deep"
    return json.loads(text, parse_int=lambda digits: np.int64(digits).item())


def canonical(value: Any, sort_keys: bool = True) -> str:
    return json.dumps(value, sort_keys=sort_keys, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def check(manifest: dict[str, Any]) -> None:
    """Refuses what a later version may have added."""
    assert manifest["version"] == 1, "an unknown version"
    records, training = manifest["parametrized"], manifest["training"] or {"optimizers": {}, "rng": None, "state": {}}
    links = [link for record in records for link in record["chain"]]
    for names, objects in {
        "version digest tensors aliases parametrized modules metadata writer training computed left_out": [manifest],
        "dtype shape stride parameter requires_grad digest": manifest["tensors"].values(),
        "module tensor aliases shape dtype parameter unsafe originals chain": records,
        "kind version config class tensors": links,
        "path kind version config": manifest["modules"],
        "optimizers rng state": [training],
        "class groups state rest": training["optimizers"].values(),
        "parameters options": [group for each in training["optimizers"].values() for group in each["groups"]],
        "class value": training["state"].values(),
    }.items():
        assert all(set(each) == set(names.split()) for each in objects), f"fields other than {names}"
    encodings = [record["originals"] for record in records] + [link["tensors"] for link in links]
    used = {manifest["digest"], *(encoding for each in encodings for encoding in each.values())}
    assert used <= {"xxh3-128", "dense", "columns", "hook"}, "an unknown digest or encoding"


def header_of(manifest: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
    """The header that follows from a manifest, as a value and, behind its length, in bytes."""
    text, tensors, stop = canonical(manifest), manifest["tensors"], 0
    envelope = f'{{"digest":"{digest_of(text.encode())}","manifest":{text}}}'
    header = {"__metadata__": dict(sorted((manifest["aliases"] | {"format": "pt", "orthoserde": envelope}).items()))}
    widths = {key: min(np.dtype(DTYPES[tensor["dtype"]][1]).itemsize, 8) for key, tensor in tensors.items()}
    for key in sorted(tensors, key=lambda key: (-widths[key], key)):
        dtype, shape = tensors[key]["dtype"], tensors[key]["shape"] + [2] * (tensors[key]["dtype"] == "complex128")
        start, stop = stop, stop + widths[key] * int(np.prod(shape, dtype=object))
        header[key] = {"dtype": DTYPES[dtype][0], "shape": shape, "data_offsets": [start, stop]}
    encoded = canonical(header, sort_keys=False).encode()
    encoded += b" " * (-(8 + len(encoded)) % 64)
    return header, len(encoded).to_bytes(8, "little") + encoded


def python(tree: Any, tensors: dict[str, Any]) -> Any:
    """What a tree of the training state stands for."""
    if not isinstance(tree, dict):
        return [python(item, tensors) for item in tree] if isinstance(tree, list) else tree
    ((sort, value),) = tree.items()
    dicts = {"dict": dict, "ordered_dict": OrderedDict, "counter": Counter}
    if sort in dicts:
        return dicts[sort]({python(key, tensors): python(item, tensors) for key, item in value})
    makers: Any = {"tensor": tensors.__getitem__, "float": float, "integer": int}
    return tuple(python(value, tensors)) if sort == "tuple" else makers[sort](value)


def training_of(record: dict[str, Any], tensors: dict[str, Any]) -> dict[str, Any]:
    """The training state of a manifest, with what its trees stand for in their places."""

    def trees(value: dict[str, Any], *fields: str) -> dict[str, Any]:
        return value | {field: python(value[field], tensors) for field in fields}

    optimizers = {name: trees(each, "rest") for name, each in record["optimizers"].items()}
    for each in optimizers.values():
        each["state"] = trees(each["state"], *each["state"])
        each["groups"] = [trees(group, "options") for group in each["groups"]]
    state = {name: trees(each, "value") for name, each in record["state"].items()}
    return trees(record, "rng") | {"optimizers": optimizers, "state": state}


def read(content: bytes) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any] | None]:
    """The manifest, the tensors by every key that they have, and the training state."""
    begin = 8 + int.from_bytes(content[:8], "little")
    assert begin <= min(len(content), 100_000_008), "a header cut short, or too long"
    envelope = parse(content[8:begin].decode())["__metadata__"]["orthoserde"]
    assert digest_of(envelope[56:-1].encode()) == envelope[11:43], "the manifest does not match its digest"
    check(manifest := parse(envelope[56:-1]))
    header, encoded = header_of(manifest)
    assert content[:begin] == encoded, "the header does not follow from the manifest"
    tensors, stop = {}, 0
    for key, tensor in ((key, manifest["tensors"][key]) for key in header if key != "__metadata__"):
        start, stop = header[key]["data_offsets"]
        stored = content[begin + start : begin + stop]
        assert digest_of(stored) == tensor["digest"], f"{key} does not match its digest"
        tensors[key] = array_of(stored, tensor["dtype"], tensor["shape"], tensor["stride"])
    assert len(content) == begin + stop, "bytes behind the last tensor"
    tensors |= {alias: tensors[key] for alias, key in manifest["aliases"].items()}
    return manifest, tensors, manifest["training"] and training_of(manifest["training"], tensors)
