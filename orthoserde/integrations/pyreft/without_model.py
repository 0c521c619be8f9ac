"""pyreft's folders without the model that they are for: what they hold, and folders of the other form.

The keys are those of the model as far as a folder knows them: ``interventions.{key}`` and ``model`` stand for the paths
of the interventions and of the base model. Where these stand in a model of yours, only that model says.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping

from torch import Tensor

from orthoserde.checkpoint import Checkpoint, TensorSource
from orthoserde.errors import ConfigError, DamagedFileError, FileFormatError
from orthoserde.integrations.pyreft.classes import KNOWN
from orthoserde.integrations.pyreft.listing import (
    BASE_MODEL_FILE,
    CONFIG_FILE,
    files_in,
    folder_of,
    read_state,
    types_in,
)
from orthoserde.integrations.pyreft.rotations import (
    BASE,
    ORIGINAL,
    RENAMED,
    ROTATION,
    WEIGHT,
    configuration,
    rotation_record,
)
from orthoserde.manifest import (
    Manifest,
    ParametrizedRecord,
    TensorRecord,
    join,
)
from orthoserde.parametrizations.orthogonal import OrthogonalCodec
from orthoserde.tensor_bytes import ORTHONORMAL_DTYPES, dtype_name

#: Where the interventions and the base model stand in the keys.
INTERVENTIONS, MODEL = "interventions", "model"

#: Names in pyreft's files of the parts of a rotation.
_PARTS = tuple(theirs for theirs, ours in RENAMED.items() if ours in (ORIGINAL, BASE))

_CODEC = OrthogonalCodec()


def files_of(path: str) -> list[str]:
    """Paths of the files that a folder of pyreft's is made of."""
    folder = folder_of(path)
    names = [*files_in(folder).values(), BASE_MODEL_FILE, CONFIG_FILE]
    return [each for name in names if os.path.lexists(each := os.path.join(folder, name))]


def read_folder(path: str) -> Checkpoint:
    """Read a folder of pyreft's as a checkpoint without a model.

    Args:
        path: The folder, or a ``checkpoint-N`` of the Hugging Face Trainer.

    Returns:
        A checkpoint without configuration, in memory. Rotations whose state it holds are parametrized tensors, with
        the configuration that pyreft's own class gives them where ``config.json`` or the file says that it is that
        class. Of the others there is the computed weight, a plain tensor.

    Raises:
        FileFormatError: It is no folder of pyreft's, or its files are not sound.
        FileAccessError: The system refuses to read it.
    """
    folder = folder_of(path)
    tensors: dict[str, TensorRecord] = {}
    sources: dict[str, TensorSource] = {}
    rotations: list[ParametrizedRecord] = []

    def take(key: str, state: Checkpoint, stored: str) -> None:
        if key in tensors:
            raise FileFormatError(f"{state.origin}: {stored!r}: the folder holds {key!r} twice")
        tensors[key], sources[key] = state.manifest.tensors[stored], state.sources[stored]

    for where, state, class_name in _interventions(folder):
        for stored in state.manifest.tensors:
            name = RENAMED.get(stored, stored) if ROTATION in state.manifest.tensors else stored
            if name == WEIGHT and set(_PARTS) <= state.manifest.tensors.keys():
                continue  # computed from the other two
            take(join(where, name), state, stored)
        if {join(where, ORIGINAL), join(where, BASE)} <= tensors.keys():
            # Only the class with the override writes such names; a class of the user's may parametrize another way.
            certain = class_name in KNOWN or (class_name is None and ROTATION in state.manifest.tensors)
            _check_rotation(tensors[join(where, ORIGINAL)], tensors[join(where, BASE)], state.origin)
            rotations.append(rotation_record(where, tensors[join(where, ORIGINAL)], certain))
    if os.path.lexists(os.path.join(folder, BASE_MODEL_FILE)):
        with read_state(os.path.join(folder, BASE_MODEL_FILE)) as state:
            for stored in state.manifest.tensors:
                take(join(MODEL, stored), state, stored)
    manifest = Manifest(tensors=tensors, parametrized=tuple(rotations), has_configuration=False)
    return Checkpoint(manifest, sources, path)


def rotations_in(checkpoint: Checkpoint) -> list[str]:
    """Keys of the computed weights of rotations in what :func:`read_folder` read, which are to be orthonormal."""
    found: list[str] = []
    for key, record in checkpoint.manifest.tensors.items():
        if key.startswith(f"{INTERVENTIONS}.") and key.endswith(f".{WEIGHT}") and len(record.shape) == 2:
            found.append(key)
    return found


def rewritten(path: str, *, full: bool) -> tuple[dict[str, Mapping[str, Tensor]], str | None, tuple[str, ...]]:
    """The files of a folder in the other form; see Note [Forms of a rotation] in ``rotations.py``.

    Args:
        path: A folder of pyreft's.
        full: Whether rotations get their original and base, else these are left out. A rotation of which the folder
            has the weight alone gets the state that a load would give it: its weight in the first columns of a base
            that is completed canonically, and its original at the initial value.

    Returns:
        States by file name, the text of ``config.json`` (None where there is none), and names of the interventions
        whose state starts afresh.

    Raises:
        ConfigError: A file holds the state of a rotation without its weight, of a class that computes it its own way.
        DamagedFileError: A rotation is off the constraint, so no state has it.
        FileFormatError: It is no folder of pyreft's, or its files are not sound.
        FileAccessError: The system refuses to read it.
    """
    folder = folder_of(path)
    states: dict[str, Mapping[str, Tensor]] = {}
    afresh: list[str] = []
    for where, state, _ in _interventions(folder):
        tensors: dict[str, Tensor] = OrderedDict((key, state.tensor(key)) for key in state.manifest.tensors)
        if ROTATION in tensors:
            has_state = set(_PARTS) <= tensors.keys()
            if not full:
                tensors = OrderedDict((key, value) for key, value in tensors.items() if key not in _PARTS)
            elif not has_state:
                tensors |= _fresh_state(tensors[ROTATION], state.origin)
                afresh.append(where)
        states[os.path.basename(state.origin)] = tensors
    base = os.path.join(folder, BASE_MODEL_FILE)
    if os.path.lexists(base):
        with read_state(base) as state:
            states[BASE_MODEL_FILE] = {key: state.tensor(key) for key in state.manifest.tensors}
    config = os.path.join(folder, CONFIG_FILE)
    text = None
    if os.path.lexists(config):
        with open(config, encoding="utf-8") as file:
            text = file.read()
    return states, text, tuple(afresh)


def _interventions(folder: str) -> Iterator[tuple[str, Checkpoint, str | None]]:
    """Path, state and class name of each intervention."""
    files = files_in(folder)
    types = types_in(folder, files, frozenset())
    for key, name in files.items():
        with read_state(os.path.join(folder, name)) as state:
            missing = [part for part in _PARTS if part not in state.manifest.tensors]
            if ROTATION in state.manifest.tensors and len(missing) == 1:
                raise FileFormatError(f"{state.origin}: holds a rotation without its {missing[0]!r}; use another copy")
            yield join(INTERVENTIONS, key), state, types.get(key)


def _fresh_state(weight: Tensor, origin: str) -> dict[str, Tensor]:
    if weight.dim() != 2 or dtype_name(weight.dtype) not in ORTHONORMAL_DTYPES:
        raise ConfigError(f"{origin}: a rotation of {weight.dtype} and shape {list(weight.shape)} has no state")
    if not _CODEC.admits(weight, {}):
        raise DamagedFileError(
            f"{origin}: its rotation is off the constraint by {_CODEC.residual(weight):.3g}, so no state has it; use "
            "an earlier checkpoint, or load it with legacy='project'"
        )
    state = _CODEC.from_weight(weight, configuration(weight.shape))
    ours = {ours: theirs for theirs, ours in RENAMED.items()}
    return {ours[ORIGINAL]: state["original"], ours[BASE]: state["base"].contiguous()}


def _check_rotation(original: TensorRecord, base: TensorRecord, origin: str) -> None:
    side = max(original.shape, default=0)
    if len(original.shape) != 2 or not side or base.shape != (side, side) or original.dtype != base.dtype:
        raise FileFormatError(
            f"{origin}: expected a square base for the longer side of the original, of its dtype, got {base.dtype} "
            f"{list(base.shape)} for {original.dtype} {list(original.shape)}"
        )
