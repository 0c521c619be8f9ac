"""What one file holds, to another in another form. The source is never written over."""

from __future__ import annotations

import dataclasses
import errno
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from orthoserde import storage
from orthoserde.arguments import check_flags, path_of, target_of
from orthoserde.checkpoint import Checkpoint
from orthoserde.errors import ConfigError, DamagedFileError, FileAccessError
from orthoserde.integrations import in_process
from orthoserde.manifest import DENSE, ORTHOGONAL, STRUCTURED, Manifest, ParametrizedRecord
from orthoserde.opening import files_of, is_pyreft, open_checkpoint, stored_bytes
from orthoserde.registry import Registry
from orthoserde.transforms import bake, check_columns, expand, to_hooks, to_parametrizations, unstructure
from orthoserde.transforms.canonical import compact_named
from orthoserde.watching import Progress, no_progress, watched
from orthoserde.wording import shorten

#: What a file can be converted to.
Form = Literal["dense", "compact", "baked", "hooks", "torch", "pyreft", "pyreft-full"]

#: Endings of file names for which a plain state dict is written by ``torch.save``.
TORCH_ENDINGS = (".pt", ".pth", ".bin")

#: Sorts of files that are written.
OURS, PLAIN, TORCH, PYREFT = "orthoserde file", "plain safetensors file", "file of torch.save", "folder of pyreft's"


@dataclass(frozen=True)
class ConversionReport:
    """What was converted.

    Attributes:
        source: The source.
        target: What was written.
        form: What it was converted to.
        sort: What sort of file that is: ``"orthoserde file"``, ``"plain safetensors file"``, ``"file of torch.save"``
            or ``"folder of pyreft's"``.
        source_bytes: Size of the source.
        target_bytes: Size of the target.
        tensors: Number of tensors that were written.
        left_dense: Orthogonal tensors whose base had to stay whole (``compact`` alone).
        notes: What else is to be known: what was left out, and what it takes to load it; one sentence each.

    Example:
        >>> import tempfile, torch, orthoserde
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     saved = orthoserde.save(orthoserde.orthogonal(torch.nn.Linear(8, 4)), f"{folder}/model.safetensors")
        ...     report = orthoserde.convert(f"{folder}/model.safetensors", f"{folder}/plain.safetensors", "baked")
        >>> report.form, report.tensors
        ('baked', 2)
    """

    source: str
    target: str
    form: str
    sort: str
    source_bytes: int
    target_bytes: int
    tensors: int
    left_dense: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    form: Form,
    *,
    force: bool = False,
    registry: Registry | None = None,
    progress: Progress | None = None,
) -> ConversionReport:
    """Write what a file holds in another form, without a model.

    Every tensor that has a digest is held to it on the way. Memory holds a block at a time, and what has to be worked
    out: one base, or one weight. A file of ``torch.save`` or a folder of pyreft's takes as much as the whole.

    Args:
        source: Whatever :func:`orthoserde.verify` reads.
        target: The file to write, or the folder for the forms of pyreft.
        form: What is written:
            ``"dense"``, our file with whole bases;
            ``"compact"``, with bases as columns where these determine them bit for bit;
            ``"baked"``, with the computed weights alone;
            ``"hooks"``, under the keys of torch's older hooks, where there is such a hook;
            ``"torch"``, what ``load_state_dict`` takes in a model with torch's own parametrizations;
            ``"pyreft"`` and ``"pyreft-full"``, a folder with the computed weights of rotations alone, or with their
            state too.
            A source without configuration gives a plain file. Plain files, and for ``"baked"`` and ``"hooks"`` all
            files, whose names end in .pt, .pth or .bin are written by ``torch.save``.
        force: Whether a file that is there already is replaced. A folder never is.
        registry: Codecs of your own.
        progress: Is told the bytes of each block that is read.

    Returns:
        What was converted, and what was left out of it.

    Raises:
        ConfigError: The source cannot have that form, or only with its model; or source and target are one.
        FileAccessError: The target is there already, or the system refuses something. Nothing was written.
        CheckpointNotFoundError: There is no source.
        FileFormatError: The source is not a checkpoint, or damaged. Nothing was written.

    Example:
        >>> import tempfile, torch, orthoserde
        >>> from torch.nn.utils.parametrizations import orthogonal
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report = orthoserde.save(orthogonal(torch.nn.Linear(8, 4)), f"{folder}/model.safetensors")
        ...     report = orthoserde.convert(f"{folder}/model.safetensors", f"{folder}/plain.safetensors", "baked")
        ...     sorted(orthoserde.inspect(f"{folder}/plain.safetensors").tensors)
        ['bias', 'weight']
    """
    check_flags(force=force)
    if form not in get_args(Form):
        raise ConfigError(f"form: expected one of {', '.join(get_args(Form))}, got {form!r}")
    origin, goal = path_of(source, "source"), target_of(target, "target")
    is_folder = form in ("pyreft", "pyreft-full")
    _check_places(origin, goal, is_folder=is_folder, force=force)
    if is_folder:
        return _to_pyreft(origin, goal, form)
    with open_checkpoint(origin) as found:
        _check_name(goal, form, found.manifest)
        changed, notes = _FORMS[form](watched(found, progress or no_progress, verify=True), in_process(registry))
        if form in ("baked", "hooks") and goal.lower().endswith(TORCH_ENDINGS):
            changed, more = _plain(changed)
            notes += more
        sort, written = _write(changed, goal)
        if sort != OURS and found.manifest.metadata:
            notes = (*notes, "metadata was left out: such a file has no place for it")
        return ConversionReport(
            source=origin,
            target=goal,
            form=form,
            sort=sort,
            source_bytes=stored_bytes(origin),
            target_bytes=written,
            tensors=len(changed.manifest.tensors) + (0 if sort == OURS else len(changed.manifest.aliases)),
            left_dense=tuple(r.name for r in changed.manifest.parametrized if form == "compact" and _is_dense(r)),
            notes=notes,
        )


#: A changed checkpoint, and what is to be known of it.
_Changed = tuple[Checkpoint, tuple[str, ...]]


def _dense(checkpoint: Checkpoint, registry: Registry) -> _Changed:
    notes: list[str] = []
    if not checkpoint.manifest.has_configuration:
        notes.append("the source has no configuration, so its tensors were written as they are")
    structured = [r.name for r in checkpoint.manifest.parametrized if any(k.kind == STRUCTURED for k in r.chain)]
    if structured:
        notes.append(f"structured, so without a base, and written as they are: {shorten(structured)}")
    return _whole(checkpoint), tuple(notes)


def _whole(checkpoint: Checkpoint) -> Checkpoint:
    """The same with whole bases, whose columns make sense: else what follows from them would not either."""
    expanded = expand(checkpoint)
    problems = [problem for key in expanded.sources if (problem := check_columns(expanded, key)) is not None]
    if problems:
        raise DamagedFileError(f"{checkpoint.origin}: {problems[0]}")
    return expanded


def _compact(checkpoint: Checkpoint, registry: Registry) -> _Changed:
    manifest = checkpoint.manifest
    if not manifest.has_configuration:
        raise ConfigError(
            f"{checkpoint.origin}: it has no configuration, so it does not say which tensors are bases; load it into "
            "its model, and save that"
        )
    changed = compact_named(checkpoint, {record.name for record in manifest.parametrized})
    dense = [record.name for record in changed.manifest.parametrized if _is_dense(record)]
    if not dense:
        return changed, ()
    return changed, (
        f"bases that stay whole, because their first columns do not determine them bit for bit: {shorten(dense)}; "
        "orthoserde.canonicalize_ gives a model bases that they do",
    )


def _is_dense(record: ParametrizedRecord) -> bool:
    """Whether it has a base that is stored whole and is larger than its weight."""
    if record.shape is None or len(record.shape) < 2 or record.shape[-1] == record.shape[-2]:
        return False
    return any(link.kind == ORTHOGONAL and link.tensors.get("base") == DENSE for link in record.chain)


def _torch(checkpoint: Checkpoint, registry: Registry) -> _Changed:
    plain, notes = _plain(unstructure(to_parametrizations(checkpoint)))
    structured = [r.name for r in plain.manifest.parametrized if any(k.kind == STRUCTURED for k in r.chain)]
    if structured:
        text = "structured ones that torch's form cannot stand for stay as they are"
        notes = (*notes, f"{text}: {shorten(structured)}")
    return plain, notes


def _baked(checkpoint: Checkpoint, registry: Registry) -> _Changed:
    notes = () if checkpoint.manifest.training is None else (_training_note(checkpoint),)
    return bake(checkpoint, registry), notes


def _hooks(checkpoint: Checkpoint, registry: Registry) -> _Changed:
    changed = to_hooks(checkpoint)
    if checkpoint.manifest.tensors.keys() == changed.manifest.tensors.keys():
        return changed, ("the source has no tensor that one of torch's older hooks would keep under other keys",)
    return changed, ()


_FORMS: Mapping[str, Callable[[Checkpoint, Registry], _Changed]] = {
    "dense": _dense,
    "compact": _compact,
    "baked": _baked,
    "hooks": _hooks,
    "torch": _torch,
}


def _plain(checkpoint: Checkpoint) -> _Changed:
    """What of a checkpoint a state dict is: the tensors of the model, whole, without their configuration."""
    manifest = checkpoint.manifest
    notes: list[str] = []
    if manifest.training is not None:
        notes.append(_training_note(checkpoint))
    if manifest.computed:
        notes.append(f"computed tensors were left out, which load_state_dict does not expect: {len(manifest.computed)}")
    if manifest.left_out:
        notes.append(
            f"tensors of the model that are not in the source: {len(manifest.left_out)}; load it with strict=False"
        )
    if manifest.aliases:
        notes.append(f"tied tensors stand under each of their names: {len(manifest.aliases)}")
    whole = _whole(_without(checkpoint.without_training(), manifest.computed))
    manifest = dataclasses.replace(whole.manifest, has_configuration=False)
    return dataclasses.replace(whole, manifest=manifest), tuple(notes)


def _training_note(checkpoint: Checkpoint) -> str:
    return f"training state was left out: {checkpoint.manifest.training}"


def _without(checkpoint: Checkpoint, keys: tuple[str, ...]) -> Checkpoint:
    """The same without these stored tensors and their other names."""
    gone = set(keys)
    manifest = checkpoint.manifest
    tensors = {key: record for key, record in manifest.tensors.items() if key not in gone}
    aliases = {alias: kept for alias, kept in manifest.aliases.items() if kept not in gone}
    changed = dataclasses.replace(manifest, tensors=tensors, aliases=aliases, computed=())
    return dataclasses.replace(checkpoint, manifest=changed, sources={key: checkpoint.sources[key] for key in tensors})


def _check_name(target: str, form: str, source: Manifest) -> None:
    """Refuse a name of torch.save's for what will be a file of ours, before anything is worked out."""
    if form in ("dense", "compact") and source.has_configuration and target.lower().endswith(TORCH_ENDINGS):
        raise ConfigError(
            f"{target}: {form} is written as a safetensors file, and the name ends as those of torch.save do; give "
            "another name, or the form torch"
        )


def _write(checkpoint: Checkpoint, target: str) -> tuple[str, int]:
    """Write a checkpoint; the sort of file, and its size."""
    if checkpoint.manifest.has_configuration:
        return OURS, storage.write(checkpoint, target)
    if target.lower().endswith(TORCH_ENDINGS):
        return TORCH, storage.write_torch(checkpoint, target)
    return PLAIN, storage.write_plain(checkpoint, target)


def _to_pyreft(source: str, target: str, form: str) -> ConversionReport:
    # A module of our own; files of other libraries are most of what is converted.
    from orthoserde.integrations import pyreft  # noqa: PLC0415
    from orthoserde.integrations.pyreft import without_model  # noqa: PLC0415
    from orthoserde.integrations.pyreft.writing import make_folder  # noqa: PLC0415

    notes: list[str] = []
    full = form == "pyreft-full"
    if is_pyreft(source):
        states, config, afresh = without_model.rewritten(source, full=full)
        if afresh:
            text = "the source has the weights alone of these, so training starts afresh at them"
            notes.append(f"{text}: {shorten(afresh)}")
        if config is None:
            notes.append("the source has no config.json, without which pyreft's own loader does not read the folder")
        sizes = make_folder(os.path.realpath(target), states, config)
    else:
        with open_checkpoint(source) as checkpoint:
            _check_reft(checkpoint)
            if checkpoint.manifest.training is not None:
                notes.append(f"training state was left out: {checkpoint.manifest.training}")
        sizes = pyreft.write(source, target, "full" if full else "legacy")
        notes.append("pyreft's loader takes dropout, activation and dtype of W and b to be its defaults")
    files = sum(name.endswith(TORCH_ENDINGS) for name in sizes)
    return ConversionReport(
        *(source, target, form, PYREFT, stored_bytes(source), sum(sizes.values()), files), notes=tuple(notes)
    )


def _check_reft(checkpoint: Checkpoint) -> None:
    from orthoserde.integrations.pyreft.classes import MODEL_KIND  # noqa: PLC0415

    if not any(record.kind == MODEL_KIND for record in checkpoint.manifest.modules):
        raise ConfigError(
            f"{checkpoint.origin}: it was not saved from a ReftModel, so it does not say where interventions act; load "
            "it into the ReftModel, and call orthoserde.integrations.pyreft.write(model, folder)"
        )


def _check_places(source: str, target: str, *, is_folder: bool, force: bool) -> None:
    """Refuse a target that is the source, or a part of it, or holds it, or is there already."""
    real_source, real_target = _real(source), _real(target)
    if not os.path.exists(source):
        return  # opening it says so
    try:
        if os.path.lexists(target):
            parts = [source, *files_of(source)]
            if any(os.path.exists(part) and os.path.samefile(part, target) for part in parts):
                raise ConfigError(f"{target}: it is the source, or a part of it, which is never written over")
        if _is_in(real_target, real_source):
            raise ConfigError(f"{target}: it lies in the folder that is the source; give a place beside it")
        if _is_in(real_source, real_target):
            raise ConfigError(f"{target}: it is a folder that holds the source; give another one")
    except OSError as error:
        raise FileAccessError(error.errno, f"cannot look there: {error.strerror}", target) from error
    if os.path.isdir(target):
        if not is_folder:
            raise FileAccessError(errno.EISDIR, "is a folder; give the name of a file", target)
        return  # an empty one will do, and whoever writes it looks
    if not is_folder:
        storage.check_name(target)
    if os.path.lexists(target) and (is_folder or not force):
        hint = (
            "give the name of a folder" if is_folder else "give another name, or replace it with force=True (--force)"
        )
        raise FileAccessError(errno.EEXIST, f"is there already; {hint}", target)


def _real(path: str) -> str:
    try:
        return os.path.realpath(path)
    except ValueError as error:  # a NUL in it, or what no name can hold
        raise FileAccessError(errno.EINVAL, str(error), path) from error


def _is_in(path: str, folder: str) -> bool:
    return os.path.isdir(folder) and path != folder and path.startswith(os.path.join(folder, ""))
