"""`save`, `load`, `build`, `inspect` and `verify`: they join the rooms and do nothing themselves."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import nn
from torch.optim import Optimizer

from orthoserde import audit, storage
from orthoserde.capture import capture
from orthoserde.checkpoint import Checkpoint
from orthoserde.errors import ConfigError, FileFormatError
from orthoserde.integrations import in_process
from orthoserde.manifest import OPAQUE, Manifest
from orthoserde.metrics import Sink, Watch, sink_of
from orthoserde.opening import open_checkpoint, rotations_of
from orthoserde.registry import Registry, default_registry
from orthoserde.reports import LoadReport, SaveReport, VerifyReport
from orthoserde.restore import Legacy, build_model, restore
from orthoserde.scope import Select
from orthoserde.training import Targets, with_training
from orthoserde.transforms import compact, compact_all
from orthoserde.traps import warn_of_traps
from orthoserde.walk import module_types

#: Kinds that are registered when the integration is imported, which a file that names one asks for.
_LOREFT = frozenset({"orthoserde>LoReFT", "orthoserde>LoReFTAdapter"})

#: How the bases of orthogonal parametrizations are stored.
Base = Literal["auto", "dense", "compact"]

_STORED: dict[Base, Callable[[Checkpoint], Checkpoint]] = {
    "auto": compact,
    "dense": lambda checkpoint: checkpoint,
    "compact": compact_all,
}


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    optimizer: Optimizer | Mapping[str, Optimizer] | None = None,
    state: Mapping[str, object] | None = None,
    rng: bool = False,
    base: Base = "auto",
    include_weights: bool = False,
    select: Select = None,
    metadata: Mapping[str, str] | None = None,
    registry: Registry | None = None,
    max_shard_size: int | str | None = None,
    debug: bool | Sink | None = None,
) -> SaveReport:
    """Save a model, with the state and configuration of every parametrized tensor, to one safetensors file or several.

    Nothing of the model is disturbed: no forward is evaluated, no buffer, gradient, mode, version counter or random
    generator changes. When it returns, the file and its name are on the disk; until then the previous file is
    untouched. The same state gives the same bytes.

    Args:
        model: Any module of ordinary tensors, on any device: each of any shape, and of dtype bool, (u)int8 to (u)int64,
            float8_e4m3fn, float8_e5m2, float16, bfloat16, float32, float64, complex64 or complex128. ``torch.compile``,
            DDP, DataParallel and activation checkpointing are looked through. Tied tensors are stored once.
        path: The file to create or replace. A symbolic link is followed. With ``max_shard_size``, a folder; it is made
            if there is none.
        optimizer: An optimizer whose state is saved along, or several by name. Its state is kept by the names of
            parameters, not by their numbers. All of its parameters must be the model's.
        state: What else training goes on from, by name: objects with ``state_dict`` and ``load_state_dict``
            (schedulers, gradient scalers, samplers), ``torch.Generator``, and plain values; made of tensors, numbers,
            strings, None, and lists, tuples and dicts of them.
        rng: Whether the states of the random generators are saved along: torch on the CPU and on every CUDA device,
            Python and NumPy.
        base: How the n x n ``base`` of a trivialized ``orthogonal`` weight with sides n > k is stored. It never changes
            in training, and a load gives it back bit for bit in any case:

            - ``"auto"``: as its first k columns, where the others are their canonical completion bit for bit, as in
              what :func:`orthoserde.orthogonal` registers; else whole, as with torch's own completion, a random one.
              To find out takes n k k multiplications; above 2**26 (half a second) it is stored whole untried.
            - ``"dense"``: whole.
            - ``"compact"``: as columns, however long it takes to find out; where that cannot be, refuse.

        include_weights: Add the computed tensors under their plain names, for readers that know nothing of
            parametrizations. They are worked out from the state, and are no part of it: a load ignores them.
        select: Which tensors to save. None saves everything; but of a model that holds an adapter (LoReFT, pyreft, or a
            class registered with ``adapter=True``) it leaves out the frozen tensors outside of the adapters, those
            parameters that require no gradient. Buffers are kept, for training may move them. ``"all"`` saves
            everything, ``"trainable"`` leaves out every frozen tensor, and a callable is asked with key and tensor. A
            parametrized tensor is saved whole if any of its parts is selected. What is left out is named in the report
            and in the file, and a strict load does not ask for it.
        metadata: Strings of your own, kept in the file.
        registry: Names of your classes; those of ``orthoserde.register`` by default.
        max_shard_size: The most bytes of tensors in one file, as a number or a string such as ``"5GB"`` (units are
            powers of 1000). What is more is split into shards with an index, as Hugging Face's libraries do; what is
            not is written as ``model.safetensors``. A previous checkpoint of ours in the folder is removed once the
            new one stands. None writes one file, however large.
        debug: Report residuals, norms, bytes and seconds of each parametrized tensor: True to the ``orthoserde`` logger
            (level INFO), a callable to itself, as mappings; None to do as the environment variable ``ORTHOSERDE_DEBUG``
            says. Off, nothing is measured.

    Returns:
        What was saved.

    Raises:
        UnsupportedModuleError: The model holds state that would be lost (quantized modules, extra state, DTensors, lazy
            or meta tensors, sparse layouts); every such place is listed, and nothing is written.
        ConfigError: A ``get_config`` returns other than JSON, ``metadata`` holds other than strings, ``select`` is
            something else or selects nothing, or ``base`` is none of these, or ``"compact"`` where that cannot be; the
            optimizer holds parameters that the model does not have, or training state is of other types; or
            ``max_shard_size`` is not a size.
        MissingPackageError: ``max_shard_size`` was given, and huggingface_hub is not installed.
        TypeError: ``model`` is no module, ``optimizer`` no optimizer, or ``state`` no mapping.
        FileAccessError: The system refused something, or a checkpoint of another library stands in the folder; the
            previous file is untouched, unless the message says that the new one is saved.
        CommitUncertainError: The file is in place, but the system did not confirm that its name is durable.

    Example:
        >>> import tempfile, torch, orthoserde
        >>> from torch.nn.utils.parametrizations import orthogonal
        >>> model = orthogonal(torch.nn.Linear(8, 4))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report = orthoserde.save(model, f"{folder}/model.safetensors")
        ...     other = orthogonal(torch.nn.Linear(8, 4))
        ...     print(orthoserde.load(other, f"{folder}/model.safetensors").fidelity)
        EXACT
        >>> torch.equal(model.weight, other.weight)
        True
    """
    prepared = prepare(
        model,
        optimizer=optimizer,
        state=state,
        rng=rng,
        base=base,
        include_weights=include_weights,
        select=select,
        metadata=metadata,
        registry=registry,
        debug=debug,
    )
    warn_of_traps(model, optimizer)
    return prepared.write(path, max_shard_size)


@dataclass(frozen=True)
class Prepared:
    """A checkpoint that is ready to be written.

    Attributes:
        checkpoint: It follows the model until it has been written, unless it is a snapshot.
        measured: Reports the debug metrics; they are those of the model at the moment of the call.
    """

    checkpoint: Checkpoint
    measured: Callable[[], None]

    def write(self, path: str | os.PathLike[str], max_shard_size: int | str | None = None) -> SaveReport:
        """Write it to a file or a folder, and say what was saved; raises as :func:`save` does."""
        with self.checkpoint as checkpoint:
            if max_shard_size is None:
                file_bytes = storage.write(checkpoint, path)
            else:
                file_bytes = storage.write_shards(checkpoint, path, max_shard_size)
            report = _save_report(checkpoint.manifest, os.fsdecode(path), file_bytes)
        self.measured()
        return report

    def snapshot(self, reuse: Checkpoint | None = None) -> Prepared:
        """A copy in memory that no longer follows the model; see :meth:`Checkpoint.snapshot`.

        The debug metrics are reported now, while the model is what the file will hold.
        """
        copied = Prepared(self.checkpoint.snapshot(reuse), _nothing)
        self.measured()
        return copied


def _nothing() -> None:
    return


def prepare(
    model: nn.Module,
    *,
    optimizer: Optimizer | Mapping[str, Optimizer] | None = None,
    state: Mapping[str, object] | None = None,
    rng: bool = False,
    base: Base = "auto",
    include_weights: bool = False,
    select: Select = None,
    metadata: Mapping[str, str] | None = None,
    registry: Registry | None = None,
    debug: bool | Sink | None = None,
) -> Prepared:
    """All of :func:`save` but the writing: same arguments, same errors."""
    if base not in get_args(Base):
        raise ConfigError(f"base: expected one of {', '.join(get_args(Base))}, got {base!r}")
    registry = _with_neighbours(in_process(registry), model)
    sink = sink_of(debug)
    measured = _nothing if sink is None else functools.partial(Watch("save", model, registry).report, sink)
    captured = capture(model, registry, include_weights=include_weights, select=select, metadata=metadata)
    captured = with_training(captured, model, optimizer=optimizer, state=state, rng=rng)
    return Prepared(_STORED[base](captured), measured)


def load(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    strict: bool = True,
    optimizer: Optimizer | Mapping[str, Optimizer] | None = None,
    state: Mapping[str, object] | None = None,
    rng: bool = False,
    reset: str | Iterable[str] = (),
    legacy: Legacy = "inference",
    reparametrize: bool = True,
    device: torch.device | str | None = None,
    verify: bool = True,
    registry: Registry | None = None,
    debug: bool | Sink | None = None,
) -> LoadReport:
    """Load a file into a model, in place, or refuse and leave the model as it was.

    Everything is checked first: names, shapes, dtypes, ties, the kind and configuration of every parametrization and
    registered module, and every byte of the file. Then the elements are copied into the existing tensors, so that
    parameters keep their identity (an optimizer built before goes on), strides, device, ``requires_grad`` and training
    mode; random generators are not used. A buffer that is None (the ``base`` of an orthogonal parametrization
    registered on the meta device) is made, with the strides it was saved with.

    Args:
        model: The module to load into.
        path: A file or folder written by :func:`save`; or a state dict in a safetensors file of another library or in
            a file of ``torch.save`` (torch 2.6 or newer), which has no configuration, so its parametrized tensors are
            ``UNVERIFIED``; or the index of shards of either sort, or a folder that holds one of all these under a name
            that Hugging Face's libraries give; or, for a ``ReftModel``, a folder that pyreft or its trainer wrote.
        strict: Refuse missing and unexpected keys, and ties that the model has lost. With False they are reported
            instead; anything else that does not fit is refused all the same.
        optimizer: An optimizer to load, or several by the names that they were saved with; made before the load or
            after, in any order of parameters, but with the same groups. Its class, its groups, their options and the
            shapes of its state are checked before anything changes; then its own ``load_state_dict`` takes them, before
            the model is written. Options of groups, such as ``lr``, become those of the file.
        state: What else to load, by the names of the save: objects are loaded by their ``load_state_dict`` (a
            ``torch.Generator`` by ``set_state``); other entries are replaced by the value in the file, in place. Plain
            values are also in the report.
        rng: Whether the random generators are put into the states of the file, as the last step.
        reset: Names of tensors, parameters or modules whose optimizer state is not loaded and starts afresh, or
            ``"all"``. A group of which every parameter is named keeps its own options. Every parametrized tensor of
            which the file has the computed weight alone has to be named.
        legacy: What to do where the model has a parametrized tensor and the file its computed weight alone:

            - ``"inference"``: start afresh at that weight, with one ``LegacyCheckpointWarning``; a weight that is off
              its constraint is refused.
            - ``"refuse"``: refuse any.
            - ``"project"``: as ``"inference"``, but move a weight that is off its constraint to the nearest one on it;
              outputs change with it.
            - ``"keep"``: as ``"inference"``, but take such a weight as it is, where the parametrization can express it.

        reparametrize: Where the file has a parametrized tensor and the model a plain one, attach the parametrization
            (without ``right_inverse``, factorisation or random numbers). With False that is refused.
        device: Where tensors on the meta device are placed, the CPU by default; no other tensor is moved.
        verify: Read the file twice: check every digest before the first write, then read into place and check again.
            With False the file is read once and no digest is compared: faster, but damaged elements are loaded as
            they are. (Damage to the header, and to a computed weight that stands for state, is found in any case.)
        registry: Names of your classes; those of ``orthoserde.register`` by default.
        debug: As for :func:`save`; residuals are those before and after the load.

    Returns:
        What was loaded; unpacks as ``missing_keys, unexpected_keys``.

    Raises:
        IncompatibleModelError: The file does not fit the model, or the training state what it is to be loaded into;
            everything that is wrong is listed.
        TypeError: ``model`` is no module, ``optimizer`` no optimizer, or ``state`` no mapping.
        CheckpointNotFoundError: There is no such file.
        FileAccessError: The system refuses to open or read it.
        FileFormatError: Not a safetensors file, a newer format (``FormatVersionError``), or damaged
            (``DamagedFileError``).
        LoadInterruptedError: Reading failed after the first write: the one case in which the model is partly written.
    """
    registry = in_process(registry)
    extended = _with_neighbours(registry, model)
    sink = sink_of(debug)
    watch = None if sink is None else Watch("load", model, extended)
    training = Targets.of(optimizer, state, rng, reset)
    checkpoint, known = _open(path, model, registry, extended, legacy)
    with checkpoint:
        report = restore(
            checkpoint,
            model,
            known,
            strict=strict,
            legacy=legacy,
            reparametrize=reparametrize,
            device=device,
            verify=verify,
            training=training,
        )
    warn_of_traps(model, optimizer)
    if sink is not None and watch is not None:
        watch.report(sink)
    return report


def build(
    path: str | os.PathLike[str],
    *,
    device: torch.device | str | None = None,
    registry: Registry | None = None,
) -> nn.Module:
    """Make the model that a file was saved from, and load it.

    The class of the model must be registered here under the kind that the file names; it is constructed with the
    configuration in the file. Random generators are left as they are, whatever the constructor draws. Of a file that
    holds an adapter alone (see ``select`` of :func:`save`), the adapter is made.

    Args:
        path: A file or folder of :func:`save`.
        device: Where the model is constructed; the CPU by default.
        registry: Names of your classes; those of ``orthoserde.register`` by default.

    Returns:
        The model, in training mode as its constructor leaves it.

    Raises:
        ConfigError: The file does not say what the model was, or its kind is not registered in this process, or the
            class does not take the configuration, or tensors of the model were left out.
        IncompatibleModelError: The class makes a model that does not fit the file; nothing is returned.
        CheckpointNotFoundError: There is no such file.
        FileAccessError: The system refuses to open or read it.
        FileFormatError: Not a checkpoint, a newer format, or damaged.

    Example:
        >>> import tempfile, torch, orthoserde
        >>> @orthoserde.register("docs>Net")
        ... class Net(torch.nn.Module):
        ...     def __init__(self, width: int):
        ...         super().__init__()
        ...         self.layer = torch.nn.utils.parametrizations.orthogonal(torch.nn.Linear(width, width))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report = orthoserde.save(Net(width=3), f"{folder}/net.safetensors")
        ...     orthoserde.build(f"{folder}/net.safetensors").layer.in_features
        3
    """
    with _read(path) as checkpoint:
        registry = in_process(registry)
        if any(record.kind in _LOREFT for record in checkpoint.manifest.modules):
            # A module of our own, by a name that stands here: no file can have anything else imported.
            from orthoserde.integrations import loreft  # noqa: PLC0415

            registry = _with_own(registry, {loreft.LoReFT, loreft.Adapter})
        return build_model(checkpoint, registry, device)


def inspect(path: str | os.PathLike[str]) -> Manifest:
    """Say what a file holds, without a model.

    Of a safetensors file, ours or another library's, the header alone is read, so this takes no longer for a large
    file. (A state dict of ``torch.save`` has no header; it is read whole.) ``orthoserde inspect PATH`` shows the
    same as a tree.

    Args:
        path: The file, the folder or index of shards, of which all headers are read, or a folder that pyreft wrote.

    Returns:
        Its tensors, parametrized tensors with their configuration, ties, modules and metadata. Of a file of another
        library, names, shapes and dtypes are all there is to say (``has_configuration`` is False).

    Raises:
        CheckpointNotFoundError: There is no such file.
        FileAccessError: The system refuses to open or read it.
        FileFormatError: Not a checkpoint, a newer format (``FormatVersionError``), or a damaged header
            (``DamagedFileError``). Damage behind the header is for :func:`verify` to find.

    Example:
        >>> import tempfile, torch, orthoserde
        >>> from torch.nn.utils.parametrizations import orthogonal
        >>> model = orthogonal(torch.nn.Linear(8, 4), orthogonal_map="cayley")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report = orthoserde.save(model, f"{folder}/model.safetensors")
        ...     manifest = orthoserde.inspect(f"{folder}/model.safetensors")
        >>> print(manifest)
        3 tensors, 400 bytes, 1 parametrized
          1 x torch>orthogonal
        >>> manifest.parametrized[0].chain[0].config["orthogonal_map"]
        'cayley'
    """
    with open_checkpoint(path) as checkpoint:
        return checkpoint.manifest


def verify(path: str | os.PathLike[str], *, registry: Registry | None = None) -> VerifyReport:
    """Check a file to its last byte, without a model.

    Reading it checks its schema. Then every tensor is held to its digest, and every parametrized tensor that can be
    computed from the file alone to its constraint. Memory holds one parametrized tensor at a time. Computing one takes
    what it takes in training: seconds for a matrix exponential of a few thousand rows.

    Args:
        path: The file, the folder or index of shards, or a folder that pyreft wrote. A file of another library has
            neither digests nor configuration; ``report.digests`` says so.
        registry: Codecs of your own, whose constraints are to be measured; those added to
            ``orthoserde.default_registry`` by default. A class that was merely registered is never built.

    Returns:
        What was found. A damaged tensor, or one that is off its constraint, is an entry of the report.

    Raises:
        CheckpointNotFoundError: There is no such file.
        FileAccessError: The system refuses to open or read it.
        FileFormatError: Not a checkpoint, a newer format (``FormatVersionError``), or its header is damaged
            (``DamagedFileError``), so that nothing can be said of its tensors.

    Example:
        >>> import tempfile, torch, orthoserde
        >>> from torch.nn.utils.parametrizations import orthogonal
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report = orthoserde.save(orthogonal(torch.nn.Linear(8, 4)), f"{folder}/model.safetensors")
        ...     verified = orthoserde.verify(f"{folder}/model.safetensors")
        >>> verified.ok
        True
        >>> verified.residuals["weight"] < 1e-5
        True
    """
    with open_checkpoint(path) as checkpoint:
        return audit.verify(checkpoint, in_process(registry), rotations_of(path, checkpoint))


def _with_neighbours(registry: Registry, model: nn.Module) -> Registry:
    """The registry, extended by what this library knows of classes of its own and of other libraries in a model.

    Which they are stands here; each integration is imported when a model first holds a class that it speaks for.
    """
    types = module_types(model)
    packages = {base.__module__.partition(".")[0] for cls in types for base in cls.__mro__}
    if "pyvene" in packages:
        from orthoserde.integrations import pyreft  # noqa: PLC0415

        registry = pyreft.extend(registry, types)
    return _with_own(registry, types) if "orthoserde" in packages else registry


def _with_own(registry: Registry, types: Iterable[type[nn.Module]]) -> Registry:
    """The registry, extended by this library's own classes among these."""
    if registry is default_registry:
        return registry
    own = [
        codec
        for cls in types
        if cls.__module__.startswith("orthoserde.") and (codec := default_registry.for_type(cls)) is not None
    ]
    return registry.extended(own, [codec.type for codec in own if default_registry.is_adapter(codec.type)])


def _open(
    path: str | os.PathLike[str], model: nn.Module, registry: Registry, extended: Registry, legacy: Legacy
) -> tuple[Checkpoint, Registry]:
    """The checkpoint at a path, and the registry by which its modules are to be compared."""
    is_folder = os.path.isdir(path)
    if not is_folder and extended is registry:
        return storage.read(path), registry
    from orthoserde.integrations import pyreft  # noqa: PLC0415

    if is_folder and not pyreft.is_folder(path):
        return storage.read(path), extended
    checkpoint, is_theirs = pyreft.read(path, model, extended, legacy)
    # pyreft's files do not say what their classes were made with, so there is nothing to compare.
    return checkpoint, registry if is_theirs else extended


def _read(path: str | os.PathLike[str]) -> Checkpoint:
    """The checkpoint at a path, for whoever has no model; without one, a folder of pyreft's means little."""
    if os.path.isdir(path):
        from orthoserde.integrations import pyreft  # noqa: PLC0415

        if pyreft.is_folder(path):
            raise FileFormatError(f"{os.fsdecode(path)}: a folder of pyreft's; only load reads it, into a ReftModel")
    return storage.read(path)


def _save_report(manifest: Manifest, path: str, file_bytes: int) -> SaveReport:
    reasons: list[str] = []
    if manifest.compact:
        reasons.append("bases are stored as columns")
    if manifest.aliases:
        reasons.append("tied tensors are stored once")
    if manifest.left_out:
        reasons.append(f"{len(manifest.left_out)} tensors are not in it, which a strict load_state_dict asks for")
    if manifest.computed:
        reasons.append("computed tensors are among them, which a strict load_state_dict does not expect")
    if manifest.training is not None:
        reasons.append("training state is among its tensors, which a strict load_state_dict does not expect")
    if any(record.dtype == "complex128" for record in manifest.tensors.values()):
        reasons.append("complex128 tensors are stored as pairs of float64")
    return SaveReport(
        path=path,
        file_bytes=file_bytes,
        tensors=len(manifest.tensors),
        parametrized=len(manifest.parametrized),
        aliases=dict(manifest.aliases),
        left_out=manifest.left_out,
        opaque=tuple(r.name for r in manifest.parametrized if any(link.kind == OPAQUE for link in r.chain)),
        unconfigured=tuple(
            [r.name for r in manifest.parametrized if any(k.config is None and k.kind != OPAQUE for k in r.chain)]
            + [r.path or "(model)" for r in manifest.modules if r.config is None]
        ),
        needs_orthoserde=tuple(reasons),
        compact=manifest.compact,
        training="" if manifest.training is None else str(manifest.training),
    )
