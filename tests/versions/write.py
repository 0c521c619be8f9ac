"""Write the golden models as the torch of this process does, for others to read: see :mod:`tests.versions.read`.

``python -m tests.versions.write FOLDER`` writes to ``FOLDER/torch-<version>``.
"""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from pathlib import Path

import numpy
import torch
from torch import nn

import orthoserde
from orthoserde.tensor_bytes import digest_of, iter_bytes
from orthoserde.walk import take_inventory
from tests.golden.models import ALL, made


def state_of(model: nn.Module) -> dict[str, list[object]]:
    """Digest and strides of each tensor of a model, the whole bases of compact files among them."""
    return {
        key: [digest_of(iter_bytes(slot.tensor)), list(slot.tensor.stride())]
        for key, slot in take_inventory(model).slots.items()
        if slot.tensor is not None
    }


def weights_of(model: nn.Module) -> dict[str, numpy.ndarray]:
    """The computed tensors of a model in evaluation mode, by one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model.eval()
        with torch.no_grad():
            return {
                record.name: getattr(record.module, record.tensor_name).numpy().copy()
                for record in orthoserde.parametrized_tensors(model)
                if not record.hook_names  # what a hook computes is as old as the last forward
            }
    finally:
        torch.set_num_threads(threads)


def write(folder: Path) -> Path:
    """Write the file of each model, its state and its computed tensors; return the folder of this torch."""
    place = folder / f"torch-{torch.__version__.partition('+')[0]}"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    for name in ALL:
        model, options = made(name)
        orthoserde.save(model, place / f"{name}.safetensors", **options)
        (place / f"{name}.json").write_text(json.dumps(state_of(model)))
        numpy.savez(place / f"{name}.npz", allow_pickle=False, **weights_of(model))
    return place


if __name__ == "__main__":
    warnings.simplefilter("ignore", orthoserde.TrainingTrapWarning)  # the values come from a formula, not from training
    print(write(Path(sys.argv[1])))
