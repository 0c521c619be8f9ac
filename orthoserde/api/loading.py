"""`load` and `build`: storage, or what an integration reads, and restore."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

import torch
from torch import nn
from torch.optim import Optimizer

from orthoserde import storage
from orthoserde.api.neighbours import with_neighbours, with_own
from orthoserde.arguments import check_flags, path_of
from orthoserde.checkpoint import Checkpoint
from orthoserde.errors import FileFormatError
from orthoserde.integrations import in_process
from orthoserde.metrics import Sink, Watch, sink_of
from orthoserde.registry import Registry
from orthoserde.reports import LoadReport
from orthoserde.restore import Legacy, build_model, restore
from orthoserde.training import Targets
from orthoserde.traps import warn_of_traps
from orthoserde.walk import check_model

#: Kinds that are registered when the integration is imported, which a file that names one asks for.
_LOREFT = frozenset({"orthoserde>LoReFT", "orthoserde>LoReFTAdapter"})


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
        What was loaded and how faithfully, ``report.fidelity``; ``print`` shows it, and it unpacks as ``missing_keys,
        unexpected_keys``.

    Raises:
        IncompatibleModelError: The file does not fit the model, or the training state what it is to be loaded into;
            everything that is wrong is listed.
        TypeError: An argument is of another type: ``model`` is no module, ``path`` no path, ``optimizer`` no optimizer,
            ``state`` no mapping.
        CheckpointNotFoundError: There is no such file.
        FileAccessError: The system refuses to open or read it.
        FileFormatError: Not a safetensors file, a newer format (``FormatVersionError``), or damaged
            (``DamagedFileError``).
        LoadInterruptedError: Reading failed after the first write: the one case in which the model is partly written.

    Example:
        >>> import tempfile, torch, orthoserde
        >>> model = orthoserde.orthogonal(torch.nn.Linear(8, 4))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = f"{folder}/model.safetensors"
        ...     saved = orthoserde.save(model, path, optimizer=optimizer, state={"step": 7}, rng=True)
        ...     report = orthoserde.load(model, path, optimizer=optimizer, state={"step": 0}, rng=True)
        >>> report.fidelity, report.state["step"]
        (<Fidelity.EXACT: 3>, 7)
        >>> missing_keys, unexpected_keys = report
    """
    check_model(model)
    name = path_of(path)
    check_flags(strict=strict, rng=rng, reparametrize=reparametrize, verify=verify)
    registry = in_process(registry)
    extended = with_neighbours(registry, model)
    sink = sink_of(debug)
    watch = None if sink is None else Watch("load", model, extended)
    training = Targets.of(optimizer, state, rng, reset)
    checkpoint, known = _open(name, model, registry, extended, legacy)
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
    with _read(path_of(path)) as checkpoint:
        registry = in_process(registry)
        if any(record.kind in _LOREFT for record in checkpoint.manifest.modules):
            # A module of our own, by a name that stands here: no file can have anything else imported.
            from orthoserde.integrations import loreft  # noqa: PLC0415

            registry = with_own(registry, {loreft.LoReFT, loreft.Adapter})
        return build_model(checkpoint, registry, device)


def _open(
    path: str, model: nn.Module, registry: Registry, extended: Registry, legacy: Legacy
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


def _read(path: str) -> Checkpoint:
    """The checkpoint at a path, for whoever has no model; without one, a folder of pyreft's means little."""
    if os.path.isdir(path):
        from orthoserde.integrations import pyreft  # noqa: PLC0415

        if pyreft.is_folder(path):
            raise FileFormatError(f"{path}: a folder of pyreft's; only load reads it, into a ReftModel")
    return storage.read(path)
