"""Checkpoints to folders that pyreft loads."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import secrets
import shutil
import stat
from collections import OrderedDict
from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from orthoserde import modes, storage
from orthoserde.arguments import target_of
from orthoserde.capture import capture
from orthoserde.checkpoint import Checkpoint
from orthoserde.errors import CommitUncertainError, ConfigError, DamagedFileError, FileAccessError
from orthoserde.integrations.pyreft.classes import (
    KNOWN,
    MODEL_KIND,
    OPTIONAL,
    OVERRIDING,
    REPRESENTATION,
    extend,
)
from orthoserde.integrations.pyreft.folders import NUMBERS
from orthoserde.integrations.pyreft.keys import PREFIX, SUFFIX
from orthoserde.integrations.pyreft.listing import BASE_MODEL_FILE, CONFIG_FILE
from orthoserde.integrations.pyreft.rotations import BASE, ORIGINAL, RENAMED, ROTATION, WEIGHT
from orthoserde.json_values import JSON
from orthoserde.manifest import ModuleRecord, join
from orthoserde.parametrizations import codec_for_kind
from orthoserde.registry import Registry
from orthoserde.transforms import expand
from orthoserde.walk import module_types, take_inventory

#: What of a LoReFT rotation is written: the computed weight alone, or its state too.
Form = Literal["legacy", "full"]


#: Where an intervention keeps a source of its own.
SOURCE = "source_representation"


def write(
    path_or_model: str | os.PathLike[str] | nn.Module,
    folder: str | os.PathLike[str],
    form: Form = "legacy",
) -> dict[str, int]:
    """Write a folder that ``pyreft.ReftModel.load`` reads.

    The folder appears whole or not at all. pyreft's loader takes the constructor arguments that its ``config.json`` has
    no place for (dropout, activation, dtype of the learned source) to be its own defaults, whoever wrote the folder.

    Args:
        path_or_model: A file that ``orthoserde.save`` wrote from a ``ReftModel``, or such a model.
        folder: The folder to make. It must not exist, or be empty.
        form: What is written of the rotation of a ``LoreftIntervention``: ``"legacy"``, the computed weight (shape
            (n, k), float32) as every pyreft does, with which training cannot go on; ``"full"`` adds its original (n, k)
            and base (n, n), as pyreft pull request 179 does. Interventions of other classes are always written in full.

    Returns:
        Size in bytes of each file by name.

    Raises:
        ConfigError: ``form`` is none of these, or what is to be written is not a ``ReftModel`` that pyreft could make
            again: it holds a class of your own (pass the model, not the file), or its configuration is not known.
        UnsupportedModuleError: The model holds state that cannot be written.
        CheckpointNotFoundError: There is no such file.
        FileFormatError: It is not a checkpoint, or damaged.
        FileAccessError: The folder is there and not empty, or the system refuses to write it.

    Source: ``IntervenableModel.save`` of pyvene 0.1.8, ``LoreftIntervention.state_dict`` of pyreft 0.1.0.
    """
    if form not in get_args(Form):
        raise ConfigError(f"form: expected one of {', '.join(get_args(Form))}, got {form!r}")
    target = os.path.realpath(target_of(folder, "folder"))
    if isinstance(path_or_model, nn.Module):
        # What pyreft has to know of a class is not what its author may have registered of it.
        registry = extend(Registry(), module_types(path_or_model))
        modules = take_inventory(path_or_model).modules
        classes = {path: str(type(module)) for path, module in modules.items()}
        with capture(path_or_model, registry) as checkpoint, modes.undisturbed():
            return _write(checkpoint, classes, target, form)
    with storage.read(path_or_model) as checkpoint, modes.undisturbed():
        if checkpoint.damaged():
            raise DamagedFileError(f"{checkpoint.origin}: damaged, so nothing was written; use another copy")
        return _write(expand(checkpoint), {}, target, form)


def _write(checkpoint: Checkpoint, classes: Mapping[str, str], target: str, form: Form) -> dict[str, int]:
    root, interventions = _parts(checkpoint)
    assert root.config is not None
    names = [record.path.rpartition(".")[2] for record in interventions]
    configs = [record.config or {} for record in interventions]
    representations = root.config.get("representations")
    assert isinstance(representations, list)
    config: dict[str, JSON] = {
        "intervention_constant_sources": [each.get("source_constant") for each in configs],
        "intervention_dimensions": [_dimension(checkpoint, record) for record in interventions],
        "intervention_types": [_class(record, classes, checkpoint.origin) for record in interventions],
        "mode": root.config.get("mode"),
        "representations": [
            _representation(each, own, SOURCE in _below(checkpoint, record.path))
            for each, own, record in zip(representations, configs, interventions, strict=True)
        ],
        "sorted_keys": list(names),
    }
    states: dict[str, Mapping[str, Tensor]] = {}
    for record, name in zip(interventions, names, strict=True):
        state = _state(checkpoint, record, form)
        if state:
            states[f"{PREFIX}{name}{SUFFIX}"] = state
    base = _base_state(checkpoint, join(root.path, "model"))
    if base:
        states[BASE_MODEL_FILE] = base
    return make_folder(target, states, json.dumps(config, indent=2, sort_keys=True) + "\n")


def _parts(checkpoint: Checkpoint) -> tuple[ModuleRecord, list[ModuleRecord]]:
    """The record of the ``ReftModel``, and those of its interventions in its own order."""
    modules = checkpoint.manifest.modules
    roots = [record for record in modules if record.kind == MODEL_KIND]
    if len(roots) != 1 or roots[0].config is None:
        raise ConfigError(
            f"{checkpoint.origin}: expected one ReftModel with a known configuration, got {len(roots)}; pyreft could "
            "not make it again"
        )
    parent = join(roots[0].path, "interventions")
    interventions = [record for record in modules if record.path.rpartition(".")[0] == parent]
    representations = roots[0].config.get("representations")
    if not isinstance(representations, list) or len(representations) != len(interventions):
        raise ConfigError(f"{checkpoint.origin}: it does not say where its {len(interventions)} interventions act")
    for record in interventions:
        if not record.kind.startswith("pyvene>"):
            text = (
                f"registered as {record.kind}, of which the file does not say what pyreft needs; pass the model instead"
            )
            raise ConfigError(f"{checkpoint.origin}: {record.path}: {text}")
        if record.config is None:
            raise ConfigError(f"{checkpoint.origin}: {record.path}: the arguments it was made with are not known")
    return roots[0], interventions


def _class(record: ModuleRecord, classes: Mapping[str, str], origin: str) -> str:
    """How ``config.json`` names a class."""
    if record.path in classes:
        return classes[record.path]
    name = record.kind.partition(">")[2]
    if name not in KNOWN:
        raise ConfigError(
            f"{origin}: {record.path}: {name} is none of pyreft's own classes, and the file does not say where it is "
            "defined; pass the model instead of the file"
        )
    return f"<class '{KNOWN[name]}.{name}'>"


def _representation(fields: JSON, config: Mapping[str, JSON], has_source: bool) -> list[JSON]:
    """The fields of a ``RepresentationConfig`` in its order; classes, modules and tensors are None, as pyvene saves.

    ``hidden_source_representation`` says that there is a source, which is in the intervention's own file.
    """
    known: dict[str, JSON] = dict.fromkeys((*REPRESENTATION, *OPTIONAL))
    known |= fields if isinstance(fields, dict) else {}
    head: list[JSON] = [known[name] for name in REPRESENTATION]
    middle: list[JSON] = [known[name] for name in OPTIONAL[:-1]]
    return [*head, config.get("rank"), None, None, *middle, None, has_source or None, known[OPTIONAL[-1]]]


def _dimension(checkpoint: Checkpoint, record: ModuleRecord) -> JSON:
    key = join(record.path, "interchange_dim")
    if key not in checkpoint.manifest:
        return None
    value: JSON = checkpoint.tensor(key).tolist()
    return value


def _state(checkpoint: Checkpoint, record: ModuleRecord, form: Form) -> dict[str, Tensor]:
    """What pyreft would save of an intervention, empty where it would save nothing."""
    config = record.config or {}
    names = _below(checkpoint, record.path)
    if not config.get("trained") and SOURCE not in names:
        return {}
    if config.get("base") != OVERRIDING:
        return OrderedDict((name, checkpoint.tensor(join(record.path, name))) for name in names)
    wanted = dict(RENAMED)
    if form == "legacy":
        wanted = {theirs: ours for theirs, ours in wanted.items() if ours not in (ORIGINAL, BASE)}
    state: dict[str, Tensor] = OrderedDict()
    for theirs, ours in wanted.items():
        if ours == WEIGHT:
            state[theirs] = _weight(checkpoint, record)
        elif ours in names:
            state[theirs] = checkpoint.tensor(join(record.path, ours))
    for name in names:
        # What a class made from LoReFT's adds: pyreft's own save would lose it, its load passes over it.
        if name not in (*RENAMED.values(), *NUMBERS):
            if name in RENAMED:
                raise ConfigError(
                    f"{checkpoint.origin}: {record.path}: pyreft gives {name!r} another meaning; rename it"
                )
            state[name] = checkpoint.tensor(join(record.path, name))
    return state


def _base_state(checkpoint: Checkpoint, path: str) -> dict[str, Tensor]:
    """What was trained of the base model, a tied tensor once, as ``named_parameters`` has it."""
    keys = [join(path, name) for name in _below(checkpoint, path)]
    names: dict[str, str] = {}
    # The key that is kept is the first in the model.
    for key in sorted(keys, key=lambda key: key in checkpoint.manifest.aliases):
        if _is_trained(checkpoint, key):
            names.setdefault(checkpoint.manifest.kept_key(key), key.removeprefix(f"{path}."))
    return {name: checkpoint.tensor(kept) for kept, name in names.items()}


def _weight(checkpoint: Checkpoint, record: ModuleRecord) -> Tensor:
    path = join(record.path, ROTATION)
    for parametrized in checkpoint.manifest.parametrized:
        if path in (parametrized.module, *parametrized.aliases) and len(parametrized.chain) == 1:
            link = parametrized.chain[0]
            codec = codec_for_kind(Registry(), link.kind)
            if codec is not None and link.config is not None:
                tensors = {name: checkpoint.tensor(parametrized.original_key(name)) for name in parametrized.originals}
                tensors |= {role: checkpoint.tensor(parametrized.link_key(0, role)) for role in link.tensors}
                return codec.compute(link.config, tensors).contiguous()
    raise ConfigError(f"{checkpoint.origin}: {path}: not parametrized as pyreft's is, so pyreft could not load it")


def _below(checkpoint: Checkpoint, path: str) -> list[str]:
    """Names within a module of the tensors that are stored of it."""
    prefix = f"{path}."
    keys = (*checkpoint.manifest.tensors, *checkpoint.manifest.aliases)
    return sorted(key.removeprefix(prefix) for key in keys if key.startswith(prefix))


def _is_trained(checkpoint: Checkpoint, key: str) -> bool:
    """Whether a tensor of the base model is a trainable parameter, or a buffer that training moves."""
    record = checkpoint.manifest.tensors[checkpoint.manifest.kept_key(key)]
    return record.requires_grad or not record.parameter


def make_folder(target: str, states: Mapping[str, Mapping[str, Tensor]], config: str | None) -> dict[str, int]:
    """Make a folder of files of ``torch.save``, whole or not at all.

    Args:
        target: The folder; it must not exist, or be empty.
        states: State dicts by file name.
        config: Text of its ``config.json``; None for none.

    Returns:
        Size in bytes of each file by name.

    Raises:
        FileAccessError: It is there and not empty, or it is where the process is, or the system refuses to write it.
        CommitUncertainError: It is in place, but perhaps not durably.
    """
    parent, name = os.path.split(target)
    temporary = os.path.join(parent, f".{name[:64]}.orthoserde-{secrets.token_hex(8)}")
    try:
        if os.path.lexists(target) and (not os.path.isdir(target) or os.listdir(target)):
            raise FileAccessError(
                errno.EEXIST, "is there already, and is not an empty folder; give another name", target
            )
        standing = os.stat(target) if os.path.lexists(target) else None
        if standing is not None and os.path.samestat(standing, os.stat(os.curdir)):
            raise FileAccessError(
                errno.EBUSY, "is the folder where the process is, which cannot be replaced; give another name", target
            )
        os.mkdir(temporary)
        try:
            for file_name, state in states.items():
                content = io.BytesIO()  # torch turns the error of a full disk into one that does not say so
                torch.save(state, content)
                with open(os.path.join(temporary, file_name), "xb") as file:
                    file.write(content.getbuffer())
                    file.flush()
                    os.fsync(file.fileno())
            if config is not None:
                with open(os.path.join(temporary, CONFIG_FILE), "x", encoding="utf-8") as text:
                    text.write(config)
                    text.flush()
                    os.fsync(text.fileno())
            sizes = {entry.name: entry.stat().st_size for entry in os.scandir(temporary)}
            if standing is not None:
                os.chmod(temporary, stat.S_IMODE(standing.st_mode))
            storage.sync_folder(temporary)
            if os.path.lexists(target):
                os.rmdir(target)
            os.rename(temporary, target)
        except BaseException:
            with contextlib.suppress(OSError):
                shutil.rmtree(temporary)
            raise
    except FileAccessError:
        raise
    except OSError as error:
        raise FileAccessError(error.errno, f"cannot write the folder: {error.strerror}", target) from error
    try:
        storage.sync_folder(parent)
    except OSError as error:
        raise CommitUncertainError(error.errno, f"saved, but perhaps not durably: {error.strerror}", target) from error
    return dict(sorted(sizes.items()))
