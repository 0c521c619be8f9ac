"""Folders that pyreft wrote, to checkpoints.

A folder holds one file of ``torch.save`` for each intervention, ``intkey_{key}.bin``, perhaps ``config.json``, and
perhaps ``pytorch_model.bin`` with what was trained of the base model. A folder ``checkpoint-N`` of the Hugging Face
Trainer holds such a folder, ``intervenable_model``, without ``config.json``.

Note [Damaged base]
pyreft's loader puts the legacy weight into the first columns of a base whose other columns belong to another rotation.
The weight looks right, and leaves the constraint with the next step. So every base in a folder is probed, see
`orthoserde.orthonormal.probe`, which takes a mean entry of ``B^T B - I`` of 30 eps for rounding.
Measured with torch 2.13.0 on the bases of all three maps, new and trained, and on those that this library completes,
n = 2 to 2048, k = 1 to n, up to 30 seeds, in units of eps: at most 2.5 in float32 and 2.6 in float64 (n < 4; from
n = 64 on at most 0.6). One with the columns of another rotation has about sqrt(2 k) / (n eps): 4900 or more up to
n = 2048 in float32.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from orthoserde import _torch, modes, storage
from orthoserde.capture import link_record
from orthoserde.capture.scope import adapter_paths, is_below, scope_of
from orthoserde.checkpoint import Checkpoint, LiveTensor, TensorSource
from orthoserde.errors import (
    DamagedFileError,
    FileFormatError,
    IncompatibleModelError,
    Problem,
)
from orthoserde.integrations.pyreft.classes import (
    OVERRIDING,
    is_intervenable_model,
    is_intervention,
    is_trained,
    known_base,
)
from orthoserde.integrations.pyreft.keys import normalize
from orthoserde.integrations.pyreft.listing import BASE_MODEL_FILE, files_in, folder_of, read_state, types_in
from orthoserde.integrations.pyreft.rotations import (
    BASE,
    ORIGINAL,
    RENAMED,
    ROTATION,
    WEIGHT,
    configuration,
    rotation_record,
)
from orthoserde.keys import names_of
from orthoserde.manifest import (
    DENSE,
    ORTHOGONAL,
    Manifest,
    ParametrizedRecord,
    TensorRecord,
    check_references,
    join,
)
from orthoserde.orthonormal.probe import off_orthonormal
from orthoserde.parametrizations import codec_for_kind
from orthoserde.registry import Registry
from orthoserde.restore import Legacy
from orthoserde.tensor_bytes import ORTHONORMAL_DTYPES, dtype_name
from orthoserde.walk import Inventory, take_inventory
from orthoserde.wording import shorten

#: Numbers that pyvene registers as buffers and that the class with the override never saves; shapes say them too.
NUMBERS = ("embed_dim", "interchange_dim")

#: What a load from such files says.
NOTE = "pyreft's files do not say dropout, activation and other arguments; the model's own were kept"


def read(path: str | os.PathLike[str], model: nn.Module, registry: Registry, legacy: Legacy) -> tuple[Checkpoint, bool]:
    """Read a folder as a checkpoint for a model, or one file of such a folder for a model with one intervention.

    Args:
        path: The folder or file. A file that is none of pyreft's is read as any other.
        model: The model that it will be loaded into; it says where its interventions stand and which base tensors are
            frozen, so that they are not asked for.
        registry: One that knows the model's interventions.
        legacy: As for ``orthoserde.load``; with ``"project"`` or ``"keep"`` the computed weight stands for a rotation
            whose base is damaged.

    Returns:
        The checkpoint, and whether it is made from files of pyreft's.

    Raises:
        FileFormatError: It is no folder of pyreft's, or its files are not those that its ``config.json`` names, or they
            are not sound.
        DamagedFileError: The base of a rotation is not orthogonal: a resume from a legacy folder has damaged it.
        FileAccessError: The system refuses to read it.
        IncompatibleModelError: The model has no interventions, or others.
    """
    if not os.path.isdir(path):
        return _read_file(path, model, registry, legacy)
    folder = folder_of(os.fsdecode(path))
    files = files_in(folder)
    with modes.undisturbed():
        inventory = take_inventory(model)
        prefix = _prefix(inventory, folder)
        parent = join(prefix, "interventions")
        children = _torch.child_modules(inventory.modules[parent])
        modules = {normalize(name) or name: (join(parent, name), module) for name, module in children.items()}
        reader = _Reader(folder, inventory, modules, registry, legacy)
        types = types_in(folder, files, {key for key, (_, module) in modules.items() if not _has_file(module)})
        for key, name in files.items():
            with read_state(os.path.join(folder, name)) as state:
                where, module = modules.get(key, (join(parent, key), None))
                reader.take_intervention(where, module, state, types.get(key))
        if os.path.lexists(os.path.join(folder, BASE_MODEL_FILE)):
            with read_state(os.path.join(folder, BASE_MODEL_FILE)) as state:
                for key in state.manifest.tensors:
                    reader.take(join(prefix, "model", key), state, key)
        return reader.checkpoint(), True


def _read_file(
    path: str | os.PathLike[str], model: nn.Module, registry: Registry, legacy: Legacy
) -> tuple[Checkpoint, bool]:
    """Read one file, which may be the state of the model's only intervention."""
    checkpoint = storage.read(path)
    if checkpoint.manifest.has_configuration or ROTATION not in checkpoint.manifest.tensors:
        return checkpoint, False
    with checkpoint, modes.undisturbed():
        inventory = take_inventory(model)
        found: dict[int, tuple[str, nn.Module]] = {}
        for where, module in inventory.modules.items():
            if is_intervention(type(module)):
                found.setdefault(id(module), (where, module))
        if len(found) != 1:
            raise IncompatibleModelError(
                f"{checkpoint.origin} holds one intervention, the model {len(found)}; load the folder that it is in, "
                "or load it into its intervention"
            )
        modules = {where: (where, module) for where, module in found.values()}
        reader = _Reader(checkpoint.origin, inventory, modules, registry, legacy)
        for where, module in modules.values():
            reader.take_intervention(where, module, checkpoint, None)
        return reader.checkpoint().snapshot(), True


class _Reader:
    """Collects what goes into the checkpoint, and everything that is wrong with it."""

    def __init__(
        self,
        origin: str,
        inventory: Inventory,
        modules: Mapping[str, tuple[str, nn.Module]],
        registry: Registry,
        legacy: Legacy,
    ) -> None:
        self.origin = origin
        self.inventory = inventory
        self.modules = modules
        self.registry = registry
        self.legacy = legacy
        self.tensors: dict[str, TensorRecord] = {}
        self.sources: dict[str, TensorSource] = {}
        self.parametrized: list[ParametrizedRecord] = []
        self.problems: list[Problem] = []
        self.damaged: list[str] = []

    def take(self, key: str, state: Checkpoint, stored: str) -> None:
        """Put a tensor of a file under a key of the model."""
        if key in self.tensors:
            raise FileFormatError(f"{state.origin}: {stored!r}: the folder holds {key!r} twice")
        slot = self.inventory.slots.get(key)
        record = state.manifest.tensors[stored]
        if slot is not None:  # the file does not say whether it was a parameter
            requires_grad = slot.tensor is not None and slot.tensor.requires_grad
            record = dataclasses.replace(record, parameter=slot.parameter, requires_grad=requires_grad)
        self.tensors[key], self.sources[key] = record, state.sources[stored]

    def take_intervention(
        self, where: str, module: nn.Module | None, state: Checkpoint, class_name: str | None
    ) -> None:
        """Put the state of an intervention under the keys of the model; see Note [Forms of a rotation].

        Args:
            where: Path of the intervention.
            module: The model's; None where it has none.
            state: What the file holds.
            class_name: Name of its class, as far as it is known.
        """
        overridden = ROTATION in state.manifest.tensors
        base = None if module is None else known_base(type(module))
        if module is not None and class_name not in (None, type(module).__name__):
            text = f"a {class_name} in the folder, a {type(module).__name__} in the model"
            self.problems.append(Problem(where, "mismatch", text))
        elif module is not None and overridden and base != OVERRIDING:
            text = f"a {OVERRIDING} in the folder, a {type(module).__name__} in the model"
            self.problems.append(Problem(where, "mismatch", text))
        names = {stored: stored for stored in state.manifest.tensors}
        if overridden:
            names |= {stored: RENAMED[stored] for stored in names if stored in RENAMED}
        if len(set(names.values())) != len(names):
            raise FileFormatError(f"{state.origin}: holds a tensor under two names: {shorten(sorted(names))}")
        parts = {stored for stored, ours in names.items() if ours in (ORIGINAL, BASE)}
        if len(parts) == 1:
            raise FileFormatError(f"{state.origin}: holds {parts.pop()!r} without its other half; use another copy")
        taken = dict(names)
        if parts:
            taken = self._choose(names, state, where)
        for stored, ours in taken.items():
            self.take(join(where, ours), state, stored)
        if BASE in taken.values():
            # What pyreft builds is known if the file says of which class it is; what a subclass builds is not.
            exact = module is not None and base == type(module).__name__
            certain = exact and (overridden or class_name is not None)
            self.parametrized.append(rotation_record(where, self.tensors[join(where, ORIGINAL)], certain))

    def _choose(self, names: Mapping[str, str], state: Checkpoint, where: str) -> dict[str, str]:
        """The state of a rotation, or where its base is damaged and that is wanted, its computed weight."""
        stored = {ours: theirs for theirs, ours in names.items()}
        original, base = state.tensor(stored[ORIGINAL]), state.tensor(stored[BASE])
        side = max(original.shape, default=0)
        if not original.is_floating_point() or original.dtype != base.dtype:
            raise FileFormatError(
                f"{state.origin}: expected an original and a base of one real dtype, got {dtype_name(original.dtype)} "
                f"and {dtype_name(base.dtype)}"
            )
        if original.dim() != 2 or base.shape != (side, side):
            raise FileFormatError(
                f"{state.origin}: expected a square base for the longer side of the original, got shapes "
                f"{list(base.shape)} and {list(original.shape)}"
            )
        error = damage_of(base)
        if error is not None:
            self.damaged.append(f"{where}: its base is off orthogonality by {error:.3g}")
            if self.legacy in ("project", "keep"):
                kept = {theirs: ours for theirs, ours in names.items() if ours not in (ORIGINAL, BASE)}
                if WEIGHT not in kept.values():
                    self._compute(where, original, base)
                return kept
        return {theirs: ours for theirs, ours in names.items() if ours != WEIGHT}

    def _compute(self, where: str, original: Tensor, base: Tensor) -> None:
        codec = codec_for_kind(self.registry, ORTHOGONAL)
        assert codec is not None
        weight = codec.compute(configuration(original.shape), {"original": original, "base": base})
        key = join(where, WEIGHT)
        record = TensorRecord(dtype_name(weight.dtype), tuple(weight.shape), tuple(weight.stride()), parameter=False)
        self.tensors[key], self.sources[key] = record, LiveTensor(weight)

    def checkpoint(self) -> Checkpoint:
        """Everything that was taken.

        Raises:
            DamagedFileError: The base of a rotation is damaged, and is not to be made do with.
            IncompatibleModelError: An intervention is of another class than the model's.
        """
        if self.problems:
            raise IncompatibleModelError(f"{self.origin} does not fit the model, nothing was loaded:", self.problems)
        if self.damaged and self.legacy not in ("project", "keep"):
            raise DamagedFileError(
                f"{self.origin}: damaged by a resume from a legacy folder, nothing was loaded: "
                f"{'; '.join(self.damaged)}. Use an earlier checkpoint, or start afresh at the computed weights with "
                "legacy='project' or 'keep'"
            )
        manifest = Manifest(
            tensors=self.tensors,
            parametrized=(*self.parametrized, *self._others()),
            left_out=tuple(self._not_asked_for()),
        )
        check_references(manifest, self.origin)
        return Checkpoint(manifest, self.sources, self.origin, notes=(NOTE,))

    def _others(self) -> Iterator[ParametrizedRecord]:
        """Other parametrized tensors, of classes of the user's or of the base model: state without configuration."""
        known = {record.name for record in self.parametrized}
        for tensor in self.inventory.parametrized:
            if known.isdisjoint(names_of(tensor)):
                chain = [link_record(link, self.registry) for link in tensor.parametrizations]
                record = ParametrizedRecord(
                    module=tensor.module_path,
                    tensor_name=tensor.tensor_name,
                    aliases=tensor.aliases,
                    shape=None,
                    dtype=None,
                    parameter=tensor.parameter,
                    unsafe=tensor.unsafe,
                    originals=dict.fromkeys(tensor.originals, DENSE),
                    chain=tuple(dataclasses.replace(link, config=None) for link in chain),
                )
                if all(key in self.tensors for key in record.tensor_keys()):
                    yield record

    def _not_asked_for(self) -> Iterator[str]:
        """Keys of the model that no folder holds.

        Frozen tensors and buffers of the base, and numbers of the interventions that their shapes say too.
        """
        adapters = adapter_paths(self.inventory, self.registry)
        scope = scope_of(self.inventory, self.registry, None)
        slots = self.inventory.slots.items()
        buffers = [key for key, slot in slots if not slot.parameter and not is_below(key, adapters)]
        numbers = [join(where, number) for where, _ in self.modules.values() for number in NUMBERS]
        for key in dict.fromkeys([*scope.left_out, *buffers, *numbers]):
            if key not in self.tensors:
                yield key


def damage_of(base: Tensor) -> float | None:
    """How far a base is from orthogonal; None where rounding takes it as far; see Note [Damaged base].

    Half precision counts as damage: a base that was rounded to it is far from orthogonal in any other.
    """
    return off_orthonormal(base if dtype_name(base.dtype) in ORTHONORMAL_DTYPES else base.float())


def _has_file(module: nn.Module) -> bool:
    """Whether pyvene writes a file of an intervention whatever it holds; it does so of another with a source."""
    return is_trained(_torch.class_before_parametrizations(module))


def _prefix(inventory: Inventory, folder: str) -> str:
    """Path of the one module of pyvene's in a model.

    Raises:
        IncompatibleModelError: There is none, or there are several.
    """
    found: dict[int, str] = {}
    for path, module in inventory.modules.items():
        if is_intervenable_model(type(module)) and join(path, "interventions") in inventory.modules:
            found.setdefault(id(module), path)
    if len(found) != 1:
        count = "has none" if not found else f"has {len(found)}: {shorten(sorted(found.values()))}"
        raise IncompatibleModelError(
            f"{folder} is a folder of pyreft's, for a ReftModel; this model {count}. Make the ReftModel with the "
            "configuration that it had, and load into that"
        )
    return next(iter(found.values()))
