"""The rotation of an intervention: its names in files and in models, and what a manifest says of it.

Note [Forms of a rotation]
``LoreftIntervention`` overrides ``state_dict``: it saves its learned source as ``weight`` and ``bias``, and of its
rotation the computed weight alone, ``rotate_layer`` (the legacy form). pyreft pull request 179 adds
``rotate_layer_original`` and ``rotate_layer_base`` (the full form). Every other class saves its state
as torch names it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from orthoserde.json_values import JSON
from orthoserde.manifest import DENSE, ORTHOGONAL, ParametrizationRecord, ParametrizedRecord, TensorRecord, join
from orthoserde.parametrizations.orthogonal import default_map

#: Names within an intervention: of the rotation, of its computed weight, and of its state.
ROTATION = "rotate_layer"
WEIGHT = f"{ROTATION}.weight"
ORIGINAL = f"{ROTATION}.parametrizations.weight.original"
BASE = f"{ROTATION}.parametrizations.weight.0.base"

#: Names in files of the class that overrides ``state_dict``, and what they stand for.
RENAMED = {
    "weight": "learned_source.weight",
    "bias": "learned_source.bias",
    ROTATION: WEIGHT,
    "rotate_layer_original": ORIGINAL,
    "rotate_layer_base": BASE,
}


def rotation_record(where: str, original: TensorRecord, certain: bool) -> ParametrizedRecord:
    """What a manifest says of a rotation.

    Args:
        where: Path of the intervention.
        original: Its unconstrained tensor.
        certain: Whether its configuration is known to be that of pyreft's own class.
    """
    config = configuration(original.shape) if certain else None
    link = ParametrizationRecord(ORTHOGONAL, 1, config, None, {"base": DENSE})
    return ParametrizedRecord(
        module=join(where, ROTATION),
        tensor_name="weight",
        aliases=(),
        shape=original.shape,
        dtype=original.dtype,
        parameter=True,
        unsafe=False,
        originals={"original": DENSE},
        chain=(link,),
    )


def configuration(shape: Sequence[int]) -> dict[str, JSON]:
    """What ``torch.nn.utils.parametrizations.orthogonal`` chooses for a real matrix when it is told nothing."""
    name = default_map(torch.empty(*shape, device="meta"))
    return {"orthogonal_map": name, "shape": [int(size) for size in shape], "use_trivialization": True}
