"""Whether the classes and configurations of a file are those of the model."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from orthoserde import _torch
from orthoserde.errors import ConfigError, Problem
from orthoserde.json_values import JSON, differences
from orthoserde.manifest import OPAQUE, Manifest, ModuleRecord, ParametrizationRecord, ParametrizedRecord, qualname_of
from orthoserde.parametrizations import codec_for_kind, codec_for_type
from orthoserde.registry import Registry
from orthoserde.registry.codec import Codec, current_config
from orthoserde.reports import Fidelity
from orthoserde.walk import ParametrizedTensor, computed_originals

#: A message shows a list whole up to this many characters.
SHOWN_OF_A_LIST = 60


@dataclass(frozen=True)
class Verdict:
    """What a comparison found: problems, or how far the two sides can be trusted to mean the same, and why.

    Attributes:
        problems: What does not fit.
        fidelity: How far the two sides can be trusted to mean the same.
        reasons: Why not further.
        differs: Whether one of the problems is that the model is made otherwise than the one that was saved.
    """

    problems: tuple[Problem, ...]
    fidelity: Fidelity
    reasons: tuple[str, ...] = ()
    differs: bool = False


def compare_chain(record: ParametrizedRecord, tensor: ParametrizedTensor, registry: Registry) -> Verdict:
    """Compare the parametrizations of a tensor in the file with those of the model."""
    where = record.name
    links = [_torch.unwrap(link) for link in tensor.parametrizations]
    if len(links) != len(record.chain):
        text = f"the file has {kinds_of(record)}, the model {_classes(links)}; parametrize the model as it was saved"
        return Verdict((Problem(where, "mismatch", text),), Fidelity.UNVERIFIED)
    problems: list[Problem] = []
    reasons: list[str] = []
    fidelity = Fidelity.EXACT
    differs = False
    for stored, link in zip(record.chain, links, strict=True):
        verdict = _compare_link(where, stored, link, registry)
        problems += verdict.problems
        reasons += verdict.reasons
        fidelity = min(fidelity, verdict.fidelity)
        differs = differs or verdict.differs
    originals = {*tensor.originals, *computed_originals(tensor)}
    if not problems and set(record.originals) != originals:
        text = f"the file has {sorted(record.originals)}, the model {sorted(originals)}"
        problems.append(Problem(where, "mismatch", text))
        differs = True
    return Verdict(tuple(problems), fidelity, tuple(reasons), differs)


def compare_module(record: ModuleRecord, module: nn.Module, registry: Registry) -> Verdict:
    """Compare a registered module of the file with the module that stands in its place."""
    cls = _torch.class_before_parametrizations(module)
    codec = registry.for_type(cls)
    return _compare_config(record.path, record.kind, record.version, record.config, codec, module)


def contradiction(record: ParametrizedRecord, manifest: Manifest, registry: Registry) -> str | None:
    """What is wrong with the shapes of a parametrized tensor in the file, as far as its codecs can say."""

    def stored(key: str) -> tuple[int, ...]:
        return manifest.tensors[manifest.kept_key(key)].shape

    shapes = {name: stored(record.original_key(name)) for name in record.originals}
    for i, link in enumerate(record.chain):
        codec = codec_for_kind(registry, link.kind)
        if codec is None or link.config is None:
            return None
        problem = codec.check(link.config, shapes, {role: stored(record.link_key(i, role)) for role in link.tensors})
        if problem is not None:
            return f"{link.kind}: {problem}; the file contradicts itself"
        shape = codec.shape({name: torch.Size(size) for name, size in shapes.items()})
        if shape is None:
            return None
        shapes = {"original": tuple(shape)}
    if record.shape not in (None, shapes["original"]):
        return (
            f"the manifest says that it has the shape {list(record.shape or ())}, and its state makes "
            f"{list(shapes['original'])}; the file contradicts itself"
        )
    return None


def _compare_link(where: str, stored: ParametrizationRecord, link: nn.Module, registry: Registry) -> Verdict:
    cls = _torch.class_before_parametrizations(link)
    codec = codec_for_type(registry, cls)
    if stored.kind != OPAQUE:
        return _compare_config(where, stored.kind, stored.version, stored.config, codec, link)
    saved_name = qualname_of(stored.class_name or "")
    if saved_name != cls.__qualname__:
        text = f"the file has the parametrization {saved_name}, the model {cls.__qualname__}"
        return Verdict((Problem(where, "mismatch", text),), Fidelity.UNVERIFIED, differs=True)
    reason = f"{cls.__name__} was not registered when it was saved, so its configuration was not checked"
    return Verdict((), Fidelity.UNVERIFIED, (reason,))


def _compare_config(
    where: str,
    kind: str,
    version: int,
    config: Mapping[str, JSON] | None,
    codec: Codec | None,
    module: nn.Module,
) -> Verdict:
    def mismatch(text: str, *, differs: bool = False) -> Verdict:
        return Verdict((Problem(where, "mismatch", text),), Fidelity.UNVERIFIED, differs=differs)

    if codec is None:
        cls = _torch.class_before_parametrizations(module)
        return mismatch(
            f"the file has {kind}, the model the unregistered {cls.__qualname__}; register it or use {kind}"
        )
    if codec.kind != kind:
        return mismatch(f"the file has {kind}, the model {codec.kind}", differs=True)
    ours = codec.config(module)
    try:
        theirs = current_config(codec, config, version)
    except ConfigError as error:
        return mismatch(str(error))
    if theirs is None or ours is None:
        side = "file" if theirs is None else "model"
        return Verdict((), Fidelity.UNVERIFIED, (f"the {side} does not know the configuration of its {kind}",))
    # In which form state is kept is no difference: it is brought into that of the model, or the load says why not.
    forms: Collection[str] = getattr(codec.type, "config_forms", ())
    problems = tuple(
        Problem(where, "mismatch", f"{kind}: {place} is {_shown(theirs_)} in the file, {_shown(ours_)} in the model")
        for place, theirs_, ours_ in differences(theirs, ours)
        if place.rpartition(".")[2] not in forms
    )
    return Verdict(problems, Fidelity.EXACT, differs=bool(problems))


def _shown(value: JSON) -> str:
    """A value for a message: lists are counted and not shown if they are long."""
    text = repr(value)
    return text if len(text) <= SHOWN_OF_A_LIST or not isinstance(value, list) else f"a list of {len(value)}"


def kinds_of(record: ParametrizedRecord) -> str:
    """The kinds of a chain for a message, classes where they are not registered."""
    return ", then ".join(link.class_name or link.kind for link in record.chain)


def _classes(links: list[nn.Module]) -> str:
    return ", then ".join(_torch.class_before_parametrizations(link).__qualname__ for link in links)
