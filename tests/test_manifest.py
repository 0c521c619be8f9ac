from __future__ import annotations

import copy
import dataclasses
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import orthoserde
from orthoserde import json_values
from orthoserde.errors import FileFormatError, FormatVersionError
from orthoserde.json_values import JSON
from orthoserde.manifest import (
    FORMAT_VERSION,
    Manifest,
    TensorRecord,
    check_references,
    join,
)
from orthoserde.manifest.as_json import decode_manifest, encode_manifest
from tests.storage.strategies import manifests

DIGEST = "0123456789abcdef" * 2

#: Every sort of field, each with a value that is not empty where the format allows one.
SAMPLE = """{
"aliases": {"head.weight": "embedding.weight"},
"computed": ["embedding.weight"],
"digest": "xxh3-128",
"left_out": ["frozen.weight"],
"metadata": {"run": "seven"},
"modules": [{"config": {"width": 3}, "kind": "mine>Net", "path": "", "version": 2}],
"parametrized": [{
  "aliases": ["again"],
  "chain": [
    {"class": null, "config": {"map": "cayley"}, "kind": "torch>orthogonal", "tensors": {"base": "dense"},
     "version": 1},
    {"class": "mine:Other", "config": null, "kind": "opaque", "tensors": {}, "version": 1}],
  "dtype": "float32", "module": "layer", "originals": {"original": "dense"}, "parameter": true,
  "shape": [4, 2], "tensor": "weight", "unsafe": false}],
"tensors": {
  "embedding.weight": {"digest": "DIGEST", "dtype": "float32", "parameter": true,
   "requires_grad": true, "shape": [5], "stride": [1]},
  "layer.parametrizations.weight.original":
    {"digest": "DIGEST", "dtype": "float32", "parameter": true, "requires_grad": true,
     "shape": [4, 2], "stride": [2, 1]},
  "layer.parametrizations.weight.0.base":
    {"digest": "DIGEST", "dtype": "float32", "parameter": false, "requires_grad": false,
     "shape": [4, 4], "stride": [1, 4]}},
"training": {
  "optimizers": {"": {
    "class": "torch.optim.adagrad:Adagrad",
    "groups": [{"options": {"dict": [["lr", 0.1]]}, "parameters": ["embedding.weight"]}],
    "rest": {"dict": []},
    "state": {}}},
  "rng": null,
  "state": {"step": {"class": null, "value": 3}}},
"version": 1,
"writer": {"orthoserde": "0.1.0"}}""".replace("DIGEST", DIGEST)

#: Paths to the objects of the sample that have fixed fields, and what messages call them.
TOP: tuple[str | int, ...] = ()
MODULE = ("modules", 0)
PARAMETRIZED = ("parametrized", 0)
LINK = ("parametrized", 0, "chain", 0)
OPAQUE_LINK = ("parametrized", 0, "chain", 1)
TRAINING = ("training",)
OPTIMIZER = ("training", "optimizers", "")
GROUP = ("training", "optimizers", "", "groups", 0)
STATE = ("training", "state", "step")
BASE = ("tensors", "layer.parametrizations.weight.0.base")
PLACES: dict[tuple[str | int, ...], str] = {
    TOP: "manifest",
    MODULE: "modules[0]",
    PARAMETRIZED: "parametrized[0]",
    LINK: "parametrized[0].chain[0]",
    OPAQUE_LINK: "parametrized[0].chain[1]",
    TRAINING: "manifest.training",
    OPTIMIZER: "manifest.training.optimizers['']",
    GROUP: "manifest.training.optimizers[''].groups[0]",
    STATE: "manifest.training.state['step']",
    BASE: "tensors['layer.parametrizations.weight.0.base']",
}

#: JSON of every type; a field accepts those of its own type alone.
OF_TYPE: dict[str, JSON] = {
    "null": None,
    "boolean": True,
    "integer": 1,
    "float": 1.0,
    "string": "x",
    "list": [],
    "object": {},
    "list of wrong items": [None],
    "list of floats": [1.0],
    "list of booleans": [True],
    "list of negative integers": [-1],
    "list of lists": [[1]],
    "object of wrong items": {"original": 1},
}
_STRINGS = {"object"}
_STRING_LIST = {"list"}
_SIZES = {"list"}
_TREES = set(OF_TYPE) - {"object", "object of wrong items"}
ACCEPTED: dict[tuple[str | int, ...], dict[str, set[str]]] = {
    TOP: {
        "aliases": _STRINGS,
        "computed": {"list"},
        "digest": set(),
        "left_out": _STRING_LIST,
        "metadata": _STRINGS,
        "modules": {"list"},
        "parametrized": {"list"},
        "tensors": set(),
        "training": {"null"},
        "version": {"integer"},
        "writer": _STRINGS,
    },
    MODULE: {
        "config": {"null", "object", "object of wrong items"},
        "kind": {"string"},
        "path": {"string"},
        "version": {"integer"},
    },
    PARAMETRIZED: {
        "aliases": _STRING_LIST,
        "chain": set(),
        "dtype": {"null"},
        "module": set(),
        "originals": set(),
        "parameter": {"boolean"},
        "shape": {"null", *_SIZES},
        "tensor": set(),
        "unsafe": {"boolean"},
    },
    LINK: {
        "class": {"null"},
        "config": {"null", "object", "object of wrong items"},
        "kind": {"string"},
        "tensors": {"object"},
        "version": {"integer"},
    },
    TRAINING: {"optimizers": {"object"}, "rng": _TREES, "state": {"object"}},
    OPTIMIZER: {"class": {"string"}, "groups": {"list"}, "rest": _TREES, "state": {"object"}},
    GROUP: {"options": _TREES, "parameters": {"list"}},
    STATE: {"class": {"null", "string"}, "value": _TREES},
    BASE: {
        "digest": set(),
        "dtype": set(),
        "parameter": {"boolean"},
        "requires_grad": {"boolean"},
        "shape": set(),
        "stride": set(),
    },
}
FIELDS = [(place, name) for place, names in ACCEPTED.items() for name in names]


def sample() -> dict[str, JSON]:
    value = json_values.decode(SAMPLE, "the sample")
    assert isinstance(value, dict)
    return value


def at(value: JSON, place: tuple[str | int, ...]) -> dict[str, JSON]:
    """The object of the sample at a place, to be changed."""
    for step in place:
        value = cast("dict[str | int, JSON]", value)[step]
    assert isinstance(value, dict)
    return value


def changed(place: tuple[str | int, ...], **fields: JSON) -> dict[str, JSON]:
    value = sample()
    at(value, place).update(fields)
    return value


def test_the_sample_decodes_to_these_values() -> None:
    manifest = decode_manifest(sample(), "f")
    assert manifest.aliases == {"head.weight": "embedding.weight"}
    assert manifest.left_out == ("frozen.weight",)
    assert manifest.metadata == {"run": "seven"}
    assert manifest.writer == {"orthoserde": "0.1.0"}
    assert manifest.has_configuration
    (module,) = manifest.modules
    assert (module.path, module.kind, module.version, module.config) == ("", "mine>Net", 2, {"width": 3})
    assert manifest.tensors["layer.parametrizations.weight.0.base"] == TensorRecord(
        "float32", (4, 4), (1, 4), False, DIGEST
    )
    (record,) = manifest.parametrized
    assert (record.module, record.tensor_name, record.name, record.aliases) == (
        *("layer", "weight", "layer.weight"),
        ("again",),
    )
    assert (record.shape, record.dtype, record.parameter, record.unsafe) == ((4, 2), "float32", True, False)
    assert record.originals == {"original": "dense"}
    assert record.tensor_keys() == ["layer.parametrizations.weight.original", "layer.parametrizations.weight.0.base"]
    known, opaque = record.chain
    assert (known.kind, known.version, known.config, known.class_name) == (
        *("torch>orthogonal", 1),
        {"map": "cayley"},
        None,
    )
    assert known.tensors == {"base": "dense"}
    assert (opaque.kind, opaque.config, opaque.class_name, opaque.tensors) == ("opaque", None, "mine:Other", {})


def test_the_sample_is_what_its_values_encode_to() -> None:
    assert json_values.encode(encode_manifest(decode_manifest(sample(), "f"))) == json_values.encode(sample())


def test_the_table_of_fields_above_is_complete() -> None:
    assert {place: set(names) for place, names in ACCEPTED.items()} == {
        place: set(at(sample(), place)) for place in ACCEPTED
    }


@settings(deadline=None, max_examples=150)
@given(manifests())
def test_a_manifest_comes_back_as_it_was(manifest: Manifest) -> None:
    text = json_values.encode(encode_manifest(manifest))
    back = decode_manifest(json_values.decode(text, "f"), "f")
    assert back == manifest
    assert json_values.encode(encode_manifest(back)) == text


@settings(deadline=None, max_examples=50)
@given(manifests(), st.randoms(use_true_random=False))
def test_equal_manifests_have_one_text_whatever_the_order_of_their_mappings(
    manifest: Manifest, shuffle: random.Random
) -> None:
    fields: dict[str, dict[str, object]] = {}
    for name in ("tensors", "aliases", "metadata", "writer"):
        items = list(getattr(manifest, name).items())
        shuffle.shuffle(items)
        fields[name] = dict(items)
    other = dataclasses.replace(manifest, **fields)  # type: ignore[arg-type]
    assert json_values.encode(encode_manifest(other)) == json_values.encode(encode_manifest(manifest))


def test_encoding_shares_no_mapping_or_list_with_the_manifest() -> None:
    manifest = decode_manifest(sample(), "f")
    before = json_values.encode(encode_manifest(manifest))
    for name in ("aliases", "metadata", "writer", "tensors"):
        at(encode_manifest(manifest), (name,)).clear()
    for place in (MODULE, LINK):
        at(encode_manifest(manifest), (*place, "config")).clear()
    assert json_values.encode(encode_manifest(manifest)) == before


def test_a_manifest_without_digests_is_not_encoded() -> None:
    manifest = Manifest({"weight": TensorRecord("float32", (1,), (1,), True)})
    with pytest.raises(ValueError, match=r"^weight: the digest has not been computed$"):
        encode_manifest(manifest)


@pytest.mark.parametrize(("place", "name"), FIELDS)
def test_a_missing_field_is_named_with_its_path(place: tuple[str | int, ...], name: str) -> None:
    value = sample()
    del at(value, place)[name]
    with pytest.raises(FileFormatError) as caught:
        decode_manifest(value, "the file")
    assert str(caught.value) == f"the file: {PLACES[place]}: the field {name!r} is missing"


@pytest.mark.parametrize(("place", "name"), FIELDS)
@pytest.mark.parametrize("sort", OF_TYPE)
def test_a_field_takes_its_own_type_alone(place: tuple[str | int, ...], name: str, sort: str) -> None:
    value = sample()
    at(value, place)[name] = copy.deepcopy(OF_TYPE[sort])
    if sort in ACCEPTED[place][name]:
        decode_manifest(value, "f")
        return
    with pytest.raises(FileFormatError) as caught:
        decode_manifest(value, "the file")
    assert str(caught.value).startswith("the file: ")
    # A value of the right type is refused by what it contains, or by what depends on it, each by a path of its own.
    if not isinstance(OF_TYPE[sort], type(at(sample(), place)[name])):
        assert f": {PLACES[place]}.{name}: " in str(caught.value)


@pytest.mark.parametrize("place", [place for place in PLACES if place])
@pytest.mark.parametrize("sort", [sort for sort in OF_TYPE if not sort.startswith("object")])
def test_an_object_is_refused_by_its_path_where_something_else_stands(place: tuple[str | int, ...], sort: str) -> None:
    value = sample()
    if place == TRAINING and sort == "null":
        assert decode_manifest(changed(TOP, training=None), "the file").training is None
        return
    outer: JSON = value
    for step in place[:-1]:
        outer = cast("dict[str | int, JSON]", outer)[step]
    cast("dict[str | int, JSON]", outer)[place[-1]] = OF_TYPE[sort]
    with pytest.raises(FileFormatError) as caught:
        decode_manifest(value, "the file")
    assert str(caught.value).startswith(f"the file: {PLACES[place]}: expected an object, got ")


@pytest.mark.parametrize("sort", [sort for sort in OF_TYPE if not sort.startswith("object")])
def test_a_manifest_that_is_no_object_is_refused(sort: str) -> None:
    with pytest.raises(FileFormatError, match=r"^f: manifest: expected an object, got (?!an object)"):
        decode_manifest(OF_TYPE[sort], "f")


@pytest.mark.parametrize("place", PLACES)
def test_an_unknown_field_needs_a_newer_version(place: tuple[str | int, ...]) -> None:
    with pytest.raises(FormatVersionError) as caught:
        decode_manifest(changed(place, surprise=1), "the file")
    assert str(caught.value) == (
        f"the file: {PLACES[place]}: unknown field 'surprise'; the file needs a newer orthoserde"
    )


@pytest.mark.parametrize("version", [2, 3, 2**62])
def test_a_newer_version_is_refused_whatever_else_the_manifest_holds(version: int) -> None:
    with pytest.raises(FormatVersionError, match=f"format version {version}, .* reads up to 1; upgrade") as caught:
        decode_manifest({"version": version, "entirely": "different"}, "f")
    assert (caught.value.found, caught.value.supported) == (version, FORMAT_VERSION)


@pytest.mark.parametrize("version", [0, -1])
@pytest.mark.parametrize("place", [TOP, MODULE, LINK])
def test_versions_begin_at_one(place: tuple[str | int, ...], version: int) -> None:
    with pytest.raises(FileFormatError) as caught:
        decode_manifest(changed(place, version=version), "f")
    assert str(caught.value) == f"f: {PLACES[place]}.version: expected an integer from 1, got {version}"
    assert not isinstance(caught.value, FormatVersionError)


NEWER: dict[str, tuple[tuple[str | int, ...], dict[str, JSON], str]] = {
    "encoding of an original": (PARAMETRIZED, {"originals": {"original": "packed"}}, "originals.original"),
    "encoding of a tensor": (LINK, {"tensors": {"base": "rows"}}, "tensors.base"),
    "empty encoding": (LINK, {"tensors": {"base": ""}}, "tensors.base"),
    "digest": (TOP, {"digest": "sha-256"}, "digest"),
}


@pytest.mark.parametrize("what", NEWER)
def test_what_this_version_does_not_know_needs_a_newer_one(what: str) -> None:
    place, fields, name = NEWER[what]
    with pytest.raises(FormatVersionError, match="needs a newer orthoserde") as caught:
        decode_manifest(changed(place, **fields), "f")
    assert str(caught.value).startswith(f"f: {PLACES[place]}.{name}: ")
    assert (caught.value.found, caught.value.supported) == (FORMAT_VERSION, FORMAT_VERSION)


def _contradictions() -> Iterator[tuple[str, tuple[str | int, ...], dict[str, JSON], str]]:
    base = "tensors['layer.parametrizations.weight.0.base']"
    link, other = "parametrized[0].chain[0]", "parametrized[0].chain[1]"
    yield "too few strides", BASE, {"stride": [1]}, f"{base}.stride: expected 2 strides, got 1"
    yield "too many strides", BASE, {"stride": [1, 4, 4]}, f"{base}.stride: expected 2 strides, got 3"
    yield "unknown dtype", BASE, {"dtype": "float31"}, f"{base}.dtype: expected a dtype that torch has, got 'float31'"
    yield "dtype of torch that is not stored", BASE, {"dtype": "qint8"}, f"{base}.dtype: expected a dtype"
    yield "dtype with its module", BASE, {"dtype": "torch.float32"}, f"{base}.dtype: expected a dtype"
    for name, digest in {
        "short": DIGEST[1:],
        "long": DIGEST + "0",
        "upper-case": DIGEST.upper(),
        "not hexadecimal": "g" + DIGEST[1:],
        "not ASCII": "\u0661" + DIGEST[1:],
        "empty": "",
    }.items():
        yield f"{name} digest", BASE, {"digest": digest}, f"{base}.digest: expected 32 hexadecimal digits"
    yield "unknown dtype of the weight", PARAMETRIZED, {"dtype": "float31"}, "parametrized[0].dtype: expected a dtype"
    yield "dangling alias", TOP, {"aliases": {"a": "nowhere"}}, "aliases['a']: expected the key of a stored tensor"
    stored = "embedding.weight"
    yield "alias of a stored key", TOP, {"aliases": {stored: stored}}, f"aliases['{stored}']: expected the key"
    yield "alias of an alias", TOP, {"aliases": {"a": stored, "b": "a"}}, "aliases['b']: expected the key of a stored"
    yield "left out and stored", TOP, {"left_out": [stored]}, f"left_out: the file holds '{stored}'"
    yield "left out and an alias", TOP, {"left_out": ["head.weight"]}, "left_out: the file holds 'head.weight'"
    yield "computed and not stored", TOP, {"computed": ["gone"]}, "computed: the file holds no tensor 'gone'"
    original = "layer.parametrizations.weight.original"
    yield "computed and state", TOP, {"computed": [original]}, f"computed: {original!r} is state of layer.weight"
    yield "no tensor of the chain", LINK, {"tensors": {"gone": "dense"}}, "layer.weight: the file holds no tensor"
    yield "no original", PARAMETRIZED, {"module": "elsewhere"}, "elsewhere.weight: the file holds no tensor"
    yield "opaque without class", OPAQUE_LINK, {"class": None}, f"{other}.class: expected a name for an opaque"
    yield "known with class", LINK, {"class": "a:B"}, f"{link}.class: expected a name for an opaque"
    yield "known without class", OPAQUE_LINK, {"kind": "mine>Other"}, f"{other}.class: expected a name for an opaque"
    yield "empty chain", PARAMETRIZED, {"chain": []}, "parametrized[0].chain: expected at least one parametrization"
    for names in ([], ["original", "original0"], ["original1"], ["original0", "original2"], ["weight"], ["original00"]):
        originals: dict[str, JSON] = dict.fromkeys(names, "dense")
        yield (
            f"originals {names}",
            PARAMETRIZED,
            {"originals": originals},
            "parametrized[0].originals: expected original",
        )


CONTRADICTIONS = {what: (place, fields, message) for what, place, fields, message in _contradictions()}


@pytest.mark.parametrize("what", CONTRADICTIONS)
def test_fields_that_contradict_each_other_are_refused_by_their_path(what: str) -> None:
    place, fields, message = CONTRADICTIONS[what]
    with pytest.raises(FileFormatError) as caught:
        decode_manifest(changed(place, **fields), "f")
    assert str(caught.value).startswith(f"f: {message}")
    assert not isinstance(caught.value, FormatVersionError)


@pytest.mark.parametrize(("module", "tensor"), [("layer", "weight"), ("", "layer.weight")])
def test_a_parametrized_tensor_stands_once(module: str, tensor: str) -> None:
    value = sample()
    twin = copy.deepcopy(at(value, PARAMETRIZED))
    twin |= {"module": module, "tensor": tensor}
    cast("list[JSON]", value["parametrized"]).append(twin)
    with pytest.raises(FileFormatError, match=r"^f: 'layer\.weight' stands twice among the parametrized tensors$"):
        decode_manifest(value, "f")


def test_a_module_stands_once() -> None:
    value = sample()
    modules = cast("list[JSON]", value["modules"])
    modules.append(copy.deepcopy(modules[0]))
    with pytest.raises(FileFormatError, match=r"^f: a module stands twice in the manifest$"):
        decode_manifest(value, "f")


class Unsearched(tuple[str, ...]):
    """Is not looked through for one key."""

    def __contains__(self, key: object) -> bool:
        raise AssertionError("a list of the file was searched")


class Counted(dict[str, str]):
    """Counts how often all of it is looked at."""

    looks = 0

    def items(self) -> Any:
        self.looks += 1
        return super().items()


def test_what_the_parts_say_of_each_other_takes_time_in_proportion_to_their_number(tmp_path: Path) -> None:
    """A stranger's header has room for a hundred thousand of them."""
    layers = [orthoserde.orthogonal(nn.Linear(6, 2)) for _ in range(9)]
    orthoserde.save(nn.Sequential(*layers, *layers), tmp_path / "m", base="compact", include_weights=True)
    manifest = orthoserde.inspect(tmp_path / "m")
    aliases = Counted(manifest.aliases)
    searched = dataclasses.replace(manifest, computed=Unsearched(manifest.computed), aliases=aliases)
    assert len(searched.computed) == len(searched.compact) == 9
    check_references(searched, "m")
    assert aliases.looks <= 2


def test_decoding_changes_nothing_of_its_argument() -> None:
    value = sample()
    decode_manifest(value, "f")
    assert json_values.encode(value) == json_values.encode(sample())


def test_several_originals_are_numbered_from_zero() -> None:
    value = changed(PARAMETRIZED, originals={"original0": "dense", "original1": "dense"})
    stored = at(value, ("tensors",))
    record = stored.pop("layer.parametrizations.weight.original")
    stored |= {f"layer.parametrizations.weight.original{i}": copy.deepcopy(record) for i in range(2)}
    (decoded,) = decode_manifest(value, "f").parametrized
    assert decoded.tensor_keys()[:2] == [f"layer.parametrizations.weight.original{i}" for i in range(2)]


def test_a_tensor_of_a_chain_may_be_an_alias() -> None:
    value = sample()
    stored = at(value, ("tensors",))
    stored["first.base"] = stored.pop("layer.parametrizations.weight.0.base")
    at(value, ("aliases",))["layer.parametrizations.weight.0.base"] = "first.base"
    manifest = decode_manifest(value, "f")
    assert manifest.kept_key("layer.parametrizations.weight.0.base") == "first.base"
    assert "layer.parametrizations.weight.0.base" in manifest
    assert "nowhere" not in manifest
    assert manifest.kept_key("embedding.weight") == "embedding.weight"


@pytest.mark.parametrize(("parts", "path"), [(("", "weight"), "weight"), (("a.b", "c"), "a.b.c"), (("", ""), "")])
def test_parts_of_a_path_are_joined_without_empty_ones(parts: tuple[str, ...], path: str) -> None:
    assert join(*parts) == path


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_a_field_with_any_other_value_raises_nothing_but_a_format_error(data: st.DataObject) -> None:
    value = sample()
    place, name = data.draw(st.sampled_from(FIELDS))
    at(value, place)[name] = data.draw(st.recursive(st.sampled_from(list(OF_TYPE.values())), _grow, max_leaves=4))
    try:
        manifest = decode_manifest(value, "f")
    except FileFormatError:
        return
    assert json_values.encode(encode_manifest(manifest)) == json_values.encode(value)


def _grow(items: st.SearchStrategy[JSON]) -> st.SearchStrategy[JSON]:
    return st.lists(items, max_size=2) | st.dictionaries(st.sampled_from(["a", "original", "base"]), items, max_size=2)
