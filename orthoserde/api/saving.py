"""`save`: capture, what is stored another way, and storage."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from torch import nn
from torch.optim import Optimizer

from orthoserde import modes, storage
from orthoserde.api.neighbours import with_neighbours
from orthoserde.arguments import check_flags, target_of
from orthoserde.capture import Select, capture
from orthoserde.checkpoint import Checkpoint
from orthoserde.errors import ConfigError
from orthoserde.integrations import in_process
from orthoserde.manifest import OPAQUE, Manifest
from orthoserde.metrics import Sink, Watch, sink_of
from orthoserde.registry import Registry
from orthoserde.reports import SaveReport
from orthoserde.training import with_training
from orthoserde.transforms import compact, compact_all, untried
from orthoserde.traps import warn_of_traps
from orthoserde.walk import check_model, take_inventory

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
            parameters, not by their numbers. All of its parameters must be the model's. Gradients are not saved.
        state: What else training goes on from, by name: objects with ``state_dict`` and ``load_state_dict``
            (schedulers, gradient scalers, samplers), ``torch.Generator``, and plain values; made of tensors, numbers,
            strings, None, and lists, tuples and dicts of them.
        rng: Whether the states of the random generators are saved along: torch on the CPU and on every CUDA device,
            Python and NumPy.
        base: How the n x n ``base`` of a trivialized ``orthogonal`` weight with sides n > k is stored. It never changes
            in training, and a load gives it back bit for bit in any case:

            - ``"auto"``: as its first k columns, where the others are their canonical completion bit for bit, as in
              what :func:`orthoserde.orthogonal` registers; else whole, as with torch's own completion, a random one.
              To find out takes n k k multiplications; above 2**26 (half a second) it is stored whole untried, which
              the report says.
            - ``"dense"``: whole.
            - ``"compact"``: as columns, however long it takes to find out; where that cannot be, refuse.

        include_weights: Add the computed tensors under their plain names, for readers that know nothing of
            parametrizations. They are worked out from the state, and are no part of it: a load ignores them. That of a
            module which stands in several places is stored once, under its first name, where
            ``safetensors.torch.load_model`` finds it for all of them.
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
            optimizer holds parameters that the model does not have, or training state is of other types;
            ``max_shard_size`` is not a size; or the path of one file ends as the name of a folder does.
        MissingPackageError: ``max_shard_size`` was given, and huggingface_hub is not installed.
        TypeError: An argument is of another type: ``model`` is no module, ``path`` no path, ``optimizer`` no optimizer,
            ``state`` no mapping.
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
    check_model(model)
    name = target_of(path)
    if max_shard_size is None:
        storage.check_name(name, "; max_shard_size saves into a folder")
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
    return prepared.write(name, max_shard_size)


@dataclass(frozen=True)
class Prepared:
    """A checkpoint that is ready to be written.

    Attributes:
        checkpoint: It follows the model until it has been written, unless it is a snapshot.
        measured: Reports the debug metrics; they are those of the model at the moment of the call.
        untried: Parametrized tensors whose bases ``base="auto"`` left whole, for the work that finding out would take.
    """

    checkpoint: Checkpoint
    measured: Callable[[], None]
    untried: tuple[str, ...] = ()

    def write(self, path: str, max_shard_size: int | str | None = None) -> SaveReport:
        """Write it to a file or a folder, and say what was saved; raises as :func:`save` does."""
        with self.checkpoint as checkpoint:
            if max_shard_size is None:
                file_bytes = storage.write(checkpoint, path)
            else:
                file_bytes = storage.write_shards(checkpoint, path, max_shard_size)
            report = _save_report(checkpoint.manifest, path, file_bytes, self.untried)
        self.measured()
        return report

    def snapshot(self, reuse: Checkpoint | None = None) -> Prepared:
        """A copy in memory that no longer follows the model; see :meth:`Checkpoint.snapshot`.

        The debug metrics are reported now, while the model is what the file will hold.
        """
        copied = Prepared(self.checkpoint.snapshot(reuse), _nothing, self.untried)
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
    check_flags(rng=rng, include_weights=include_weights)
    if base not in get_args(Base):
        raise ConfigError(f"base: expected one of {', '.join(get_args(Base))}, got {base!r}")
    registry = with_neighbours(in_process(registry), model)
    sink = sink_of(debug)
    measured = _nothing if sink is None else functools.partial(Watch("save", model, registry).report, sink)
    with modes.undisturbed():
        inventory = take_inventory(model)
    captured = capture(
        model, registry, include_weights=include_weights, select=select, metadata=metadata, inventory=inventory
    )
    captured = with_training(captured, inventory, optimizer=optimizer, state=state, rng=rng)
    stored = _STORED[base](captured)
    return Prepared(stored, measured, untried(stored) if base == "auto" else ())


def _save_report(manifest: Manifest, path: str, file_bytes: int, untried: tuple[str, ...]) -> SaveReport:
    reasons: list[str] = []
    if manifest.compact:
        reasons.append("bases are stored as columns")
    if manifest.aliases:
        reasons.append("tied tensors are stored once")
    if manifest.left_out:
        reasons.append(f"what a strict load_state_dict asks for is not all in it: {len(manifest.left_out)} left out")
    if manifest.computed:
        reasons.append("computed tensors are among them, which a strict load_state_dict does not expect")
    if manifest.training_keys:
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
        untried=untried,
        training="" if manifest.training is None else str(manifest.training),
    )
