"""What the second reader makes of the golden files is what this package makes of them, and it refuses what it must."""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from torch import Tensor, nn

import orthoserde
from orthoserde import storage
from orthoserde.manifest import Manifest
from orthoserde.manifest.as_json import encode_manifest
from orthoserde.manifest.trees import decode_tree
from orthoserde.orthonormal.completion import complete
from orthoserde.tensor_bytes import empty_like_recorded
from orthoserde.transforms import expand
from tests.format import second_arrays, second_reader
from tests.format.second_arrays import base_of, laid_out
from tests.format.second_reader import canonical, header_of, parse, read
from tests.golden.models import FOLDER, values
from tests.helpers import bits

GOLDEN = sorted(FOLDER.glob("*.safetensors"))

#: How a reader without a hierarchy of errors refuses a file.
REFUSALS = (AssertionError, ValueError, LookupError, OverflowError, TypeError, AttributeError)

each_golden_file = pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)


def code_lines(source: str) -> int:
    """Lines that hold code: neither blank, nor comment, nor docstring."""
    documented: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            documented.update(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in layout:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - documented)


def test_the_second_reader_has_at_most_80_lines() -> None:
    assert code_lines('"""Two\nlines."""\n\n# why\nx = [\n    1,\n]\n') == 3
    assert 0 < code_lines(Path(second_reader.__file__).read_text(encoding="utf-8")) <= 80
    assert 0 < code_lines(Path(second_arrays.__file__).read_text(encoding="utf-8")) <= 80


def test_the_second_reader_knows_nothing_of_this_package() -> None:
    imported: set[str] = set()
    for module in (second_reader, second_arrays):
        for node in ast.walk(ast.parse(Path(module.__file__ or "").read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module or "")
    assert imported == {"collections", "json", "numpy", "re", "tests.format.second_arrays", "typing", "xxhash"}


def steps(array: Any) -> tuple[int, ...]:
    """Strides in elements."""
    return tuple(step // array.itemsize for step in array.strides)


@each_golden_file
def test_it_says_of_a_golden_file_what_this_package_says(path: Path) -> None:
    theirs = orthoserde.inspect(path)
    manifest, tensors, training = read(path.read_bytes())
    assert manifest == encode_manifest(theirs)
    assert tensors.keys() == theirs.tensors.keys() | theirs.aliases.keys()
    assert manifest["aliases"] == theirs.aliases
    assert manifest["metadata"] == theirs.metadata
    for key, record in theirs.tensors.items():
        found = manifest["tensors"][key]
        assert (found["dtype"], tuple(found["shape"]), tuple(found["stride"]), found["digest"]) == (
            record.dtype,
            record.shape,
            record.stride,
            record.digest,
        )
    for found, tensor in zip(manifest["parametrized"], theirs.parametrized, strict=True):
        assert (found["module"], found["tensor"], found["originals"]) == (
            tensor.module,
            tensor.tensor_name,
            tensor.originals,
        )
        assert [(link["kind"], link["version"], link["config"]) for link in found["chain"]] == [
            (link.kind, link.version, link.config) for link in tensor.chain
        ]
    assert (training is None) == (theirs.training is None)


@each_golden_file
def test_it_reads_the_bits_and_strides_that_this_package_reads(path: Path) -> None:
    _, tensors, _ = read(path.read_bytes())
    with storage.read(path) as checkpoint:
        for key, array in tensors.items():
            kept = checkpoint.manifest.kept_key(key)
            record, tensor = checkpoint.manifest.tensors[kept], checkpoint.tensor(kept)
            assert array.shape == record.shape
            assert array.tobytes() == bits(tensor), key
            assert steps(array) == empty_like_recorded(record.shape, record.stride, tensor.dtype, "cpu").stride(), key
            if array.dtype.kind in "biufc" and record.dtype not in ("bfloat16", "float8_e4m3fn", "float8_e5m2"):
                assert np.array_equal(array, tensor.numpy())
        assert all(tensors[alias] is tensors[kept] for alias, kept in checkpoint.manifest.aliases.items())


def bases_in(manifest: Manifest) -> Iterator[tuple[str, str]]:
    """Keys of the columns of every base that is not stored whole, and of that base."""
    for record in manifest.parametrized:
        for index, role in record.columns():
            yield record.link_key(index, role), record.link_key(index, role).removesuffix(".columns")


def test_it_completes_the_bases_of_the_golden_files_to_the_same_bits() -> None:
    completed = 0
    for path in GOLDEN:
        _, tensors, _ = read(path.read_bytes())
        with storage.read(path) as stored:
            checkpoint = expand(stored)
            for key, whole in bases_in(stored.manifest):
                base, theirs = base_of(tensors[key]), checkpoint.tensor(whole)
                assert base.shape == theirs.shape
                assert base.tobytes() == bits(theirs), key
                assert steps(base) == checkpoint.manifest.tensors[whole].stride
                completed += 1
    assert completed == 13


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128])
@pytest.mark.parametrize("shape", [(2, 1), (9, 4), (2, 7, 6), (33, 17)])
def test_it_completes_any_columns_to_the_same_bits(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    columns = torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(5))
    columns[..., 0] = 0.0
    base = np.concatenate([columns.numpy(), completed(columns)], axis=-1)
    assert base_of(columns.numpy()).tobytes() == base.tobytes()


def completed(columns: Tensor) -> Any:
    """U(W) of each matrix W, as this package has it."""
    n, k = columns.shape[-2:]
    whole = [complete(matrix.contiguous()) for matrix in columns.reshape(-1, n, k)]
    return torch.stack(whole)[..., k:].reshape(*columns.shape[:-2], n, n - k).numpy()


@pytest.mark.parametrize(
    ("shape", "stride"),
    [
        ((), ()),
        ((1,), (7,)),
        ((3,), (2,)),
        ((2, 3), (1, 2)),
        ((2, 1, 3), (3, 99, 1)),
        ((2, 3), (0, 1)),
        ((2, 3), (3, 2)),
        ((0, 3), (5, 2)),
        ((4, 2, 3), (1, 12, 4)),
    ],
)
def test_it_gives_a_tensor_the_strides_that_this_package_gives(shape: tuple[int, ...], stride: tuple[int, ...]) -> None:
    wanted = empty_like_recorded(shape, stride, torch.int16, "cpu").stride()
    assert steps(laid_out(np.zeros(shape, np.int16), list(stride))) == wanted


def same(ours: Any, theirs: Any) -> bool:
    """Whether two trees are of the same types and values; an array and a tensor may be the same."""
    if isinstance(theirs, Tensor):
        return isinstance(ours, np.ndarray) and ours.shape == theirs.shape and ours.tobytes() == bits(theirs)
    if type(ours) is not type(theirs):
        return False
    if isinstance(theirs, dict):
        return list(ours) == list(theirs) and all(same(ours[key], theirs[key]) for key in theirs)
    if isinstance(theirs, (list, tuple)):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    return bool(ours == theirs)


def test_it_reads_the_training_state_that_this_package_reads() -> None:
    _, _, found = read((FOLDER / "training.safetensors").read_bytes())
    assert found is not None
    with storage.read(FOLDER / "training.safetensors") as checkpoint:
        training = checkpoint.manifest.training
        assert training is not None

        def tree(value: Any) -> object:
            return decode_tree(value, "here", checkpoint.tensor)

        wanted = {
            "optimizers": {
                name: {
                    "class": record.class_name,
                    "groups": [
                        {"options": tree(group.options), "parameters": list(group.parameters)}
                        for group in record.groups
                    ],
                    "rest": tree(record.rest),
                    "state": {key: tree(value) for key, value in record.state.items()},
                }
                for name, record in training.optimizers.items()
            },
            "rng": tree(training.rng),
            "state": {
                name: {"class": record.class_name, "value": tree(record.value)}
                for name, record in training.state.items()
            },
        }
    assert same(found, wanted)
    assert same({name: entry["value"] for name, entry in found["state"].items()}, dict(sorted(values().items())))
    assert found["rng"]["torch"].dtype == np.uint8
    assert found["rng"]["python"]["words"].shape == (625,)


def test_it_reads_integers_of_more_than_64_bits(tmp_path: Path) -> None:
    state = {"numbers": [2**63 - 1, 2**63, -(2**100), {10**30: 1}]}
    orthoserde.save(nn.Linear(1, 1), tmp_path / "m", state=state)
    _, _, found = read((tmp_path / "m").read_bytes())
    assert found is not None
    assert found["state"]["numbers"]["value"] == state["numbers"]


# What it refuses


def file_of(manifest: dict[str, Any], content: bytes) -> bytes:
    """The bytes of a file with this manifest, whose digest and header are right, and the tensors of another."""
    begin = 8 + int.from_bytes(content[:8], "little")
    return header_of(manifest)[1] + content[begin:]


def file_of_text(text: str, content: bytes) -> bytes:
    """The bytes of a file whose manifest is this text, whatever it is, with the right digest."""
    begin = 8 + int.from_bytes(content[:8], "little")
    header, _ = header_of(read(content)[0])
    digest = xxhash.xxh3_128_hexdigest(text.encode("utf-8", "surrogatepass"))
    header["__metadata__"]["orthoserde"] = f'{{"digest":"{digest}","manifest":{text}}}'
    encoded = canonical(header, sort_keys=False).encode("utf-8", "surrogatepass")
    encoded += b" " * (-(8 + len(encoded)) % 64)
    return len(encoded).to_bytes(8, "little") + encoded + content[begin:]


def read_here(path: Path) -> None:
    """Read a file with this package, every byte of it checked."""
    with storage.read(path) as checkpoint:
        checkpoint.read(checkpoint.manifest.tensors, verify=True)


def assert_refused(content: bytes, folder: Path, match: str | None = None) -> None:
    """Both readers refuse a file; what this package says of it matches a pattern."""
    with pytest.raises(REFUSALS):
        read(content)
    (folder / "refused.safetensors").write_bytes(content)
    with pytest.raises(orthoserde.OrthoserdeError, match=match):
        read_here(folder / "refused.safetensors")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A file with a parametrized tensor whose base is stored as columns."""
    path = tmp_path_factory.mktemp("small") / "small.safetensors"
    orthoserde.save(orthoserde.orthogonal(nn.Linear(1, 2)), path)
    read_here(path)
    return path.read_bytes()


def test_a_change_of_any_byte_is_refused(small: bytes) -> None:
    read(small)
    for place in range(len(small)):
        changed = bytearray(small)
        changed[place] ^= 1 << place % 8
        with pytest.raises(REFUSALS):
            read(bytes(changed))


def test_bytes_too_few_or_too_many_are_refused(small: bytes, tmp_path: Path) -> None:
    for content in (b"", small[:5], small[:300], small[:-1], small + b"\0"):
        assert_refused(content, tmp_path)


def test_a_digest_that_does_not_match_is_refused(small: bytes, tmp_path: Path) -> None:
    assert_refused(small[:-1] + bytes([small[-1] ^ 1]), tmp_path, "parametrizations")
    manifest, _, _ = read(small)
    key = next(iter(manifest["tensors"]))
    manifest["tensors"][key]["digest"] = "0" * 32
    assert_refused(file_of(manifest, small), tmp_path, key)
    envelope = small.index(b'{\\"digest\\":\\"') + len(b'{\\"digest\\":\\"')
    assert_refused(small[:envelope] + b"0" * 32 + small[envelope + 32 :], tmp_path, "manifest")


def objects_in(manifest: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """One object of each sort that has a fixed set of fields."""
    training = manifest["training"]
    return {
        "manifest": manifest,
        "tensor": next(iter(manifest["tensors"].values())),
        "parametrized": manifest["parametrized"][0],
        "link": manifest["parametrized"][0]["chain"][0],
        "training": training,
        "optimizer": training["optimizers"]["plain"],
        "group": training["optimizers"]["plain"]["groups"][0],
        "entry": training["state"]["step"],
        "tree": training["state"]["ordered"]["value"],
    }


@pytest.fixture
def rich() -> bytes:
    """A file with training state."""
    return (FOLDER / "training.safetensors").read_bytes()


SORTS = ["manifest", "tensor", "parametrized", "link", "training", "optimizer", "group", "entry", "tree"]


@pytest.mark.parametrize("sort", SORTS)
def test_an_unknown_field_is_refused(sort: str, rich: bytes, tmp_path: Path) -> None:
    manifest, _, _ = read(rich)
    assert list(objects_in(manifest)) == SORTS
    objects_in(manifest)[sort]["later"] = None
    assert_refused(file_of(manifest, rich), tmp_path)


@pytest.mark.parametrize("sort", SORTS)
def test_a_field_that_is_missing_is_refused(sort: str, rich: bytes, tmp_path: Path) -> None:
    for field in objects_in(read(rich)[0])[sort]:
        manifest, _, _ = read(rich)
        text = canonical(manifest)
        del objects_in(manifest)[sort][field]
        if (sort, field) in {
            ("manifest", "tensors"),
            ("manifest", "aliases"),
            ("tensor", "dtype"),
            ("tensor", "shape"),
        }:
            assert_refused(file_of_text(canonical(manifest), rich), tmp_path)
        else:
            assert_refused(file_of(manifest, rich), tmp_path)
        assert canonical(manifest) != text


def test_an_unknown_field_of_a_module_is_refused(tmp_path: Path) -> None:
    content = (FOLDER / "users.safetensors").read_bytes()
    manifest, _, _ = read(content)
    manifest["modules"][0]["later"] = None
    assert_refused(file_of(manifest, content), tmp_path, "later")


def test_a_newer_version_is_refused_whatever_else_it_holds(small: bytes, tmp_path: Path) -> None:
    manifest, _, _ = read(small)
    assert_refused(file_of(manifest | {"version": 2}, small), tmp_path, "version 2")
    assert_refused(file_of_text('{"later":[],"version":2}', small), tmp_path, "version 2")


def test_an_unknown_digest_or_encoding_is_refused(small: bytes, tmp_path: Path) -> None:
    manifest, _, _ = read(small)
    assert_refused(file_of(manifest | {"digest": "xxh3-256"}, small), tmp_path, "xxh3-256")
    for tensors in ("originals", "chain"):
        manifest, _, _ = read(small)
        record = manifest["parametrized"][0]
        part = record["chain"][0]["tensors"] if tensors == "chain" else record["originals"]
        part[next(iter(part))] = "sparse"
        assert_refused(file_of(manifest, small), tmp_path, "sparse")


@pytest.mark.parametrize(
    "value",
    [
        str(2**63),
        str(-(2**63) - 1),
        "-0",
        "1E5",
        "100000.00",
        "NaN",
        "Infinity",
        "1e999",
        '"\\ud800"',
        '"\\u0041"',
        '"\\/"',
        "[ ]",
        '{"b":1,"a":1}',
        '{"a":1,"a":1}',
        "[" * 75 + "]" * 75,
    ],
)
def test_json_that_is_not_canonical_or_out_of_range_is_refused(value: str, small: bytes, tmp_path: Path) -> None:
    manifest, _, _ = read(small)
    manifest["parametrized"][0]["chain"][0]["config"] = {"here": "HERE"}
    manifest["parametrized"][0]["chain"][0]["kind"] = "later>Kind"
    manifest["parametrized"][0]["chain"][0]["tensors"] = {}
    text = canonical(manifest)
    for fine in ("1.5", "[]", str(2**63 - 1), str(-(2**63)), "[" * 74 + "]" * 74):
        content = file_of_text(text.replace('"HERE"', fine), small)
        read(content)
        (tmp_path / "fine").write_bytes(content)
        read_here(tmp_path / "fine")
    assert_refused(file_of_text(text.replace('"HERE"', value), small), tmp_path)


def test_json_of_too_many_values_is_refused() -> None:
    assert parse("[" + "1," * 9 + '"[,{,"]') == [1] * 9 + ["[,{,"]
    with pytest.raises(AssertionError, match="too many values"):
        parse("[" + "1," * 4_194_304 + "1]")
