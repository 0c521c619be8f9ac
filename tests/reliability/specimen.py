"""The small checkpoint that the suites of reading damage: parametrized tensors, a compact base, training state.

One model is saved, and one is loaded into again and again; a look at it costs microseconds, so that it can be held to
what it was after each of a million refusals.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import orthoserde
from orthoserde.api import prepare
from orthoserde.json_values import JSON, same
from orthoserde.manifest import Manifest, qualname_of
from orthoserde.manifest.as_json import encode_manifest
from orthoserde.reports import LoadReport
from orthoserde.tensor_bytes import digest_of


class Net(nn.Module):
    """An orthogonal weight whose base is stored as columns, a weight norm, a buffer of integers and a tie."""

    def __init__(self) -> None:
        super().__init__()
        self.turn = orthoserde.orthogonal(nn.Linear(2, 3, bias=False), orthogonal_map="cayley")
        self.norm = parametrizations.weight_norm(nn.Linear(2, 2, bias=False))
        self.head = nn.Linear(2, 1)
        self.tied = self.head
        self.register_buffer("steps", torch.tensor(7))

    def forward(self, x: Tensor) -> Tensor:
        turned: Tensor = self.turn(self.norm(x))
        return turned.sum() + torch.as_tensor(self.head(x)).sum()


@dataclass
class Specimen:
    """A model in training, and all that is saved of it."""

    model: Net
    optimizer: torch.optim.Optimizer
    state: dict[str, object]

    def save(self, path: Path) -> None:
        """Save it all."""
        orthoserde.save(self.model, path, optimizer=self.optimizer, state=self.state, metadata={"run": "seven"})

    def load(self, path: Path | str, *, verify: bool = True) -> LoadReport:
        """Load it all."""
        return orthoserde.load(self.model, path, optimizer=self.optimizer, state=self.state, verify=verify)

    def look(self) -> tuple[object, ...]:
        """Everything that a refused load may not change, in a form that is compared quickly."""
        return (
            *((id(tensor), tensor._version, tensor.stride(), _bits(tensor)) for tensor in self._tensors()),
            repr([{**group, "params": len(group["params"])} for group in self.optimizer.param_groups]),
            repr(self.state),
            [list(module._modules) for module in self.model.modules()],
            torch.random.get_rng_state().sum().item(),
        )

    def content(self) -> Manifest:
        """What would be saved of it now, digests included; nothing is written."""
        prepared = prepare(self.model, optimizer=self.optimizer, state=self.state, metadata={"run": "seven"})
        checkpoint = prepared.checkpoint
        tensors = {
            key: dataclasses.replace(record, digest=digest_of(checkpoint.sources[key].blocks()))
            for key, record in checkpoint.manifest.tensors.items()
        }
        return dataclasses.replace(checkpoint.manifest, tensors=tensors)

    def _tensors(self) -> list[Tensor]:
        kept = [value for entry in self.optimizer.state.values() for value in entry.values()]
        return [*self.model.parameters(), *self.model.buffers(), *(each for each in kept if isinstance(each, Tensor))]


def make(seed: int, *, steps: int = 1) -> Specimen:
    """A specimen that has been trained for some steps; its optimizer has no state before the first."""
    torch.manual_seed(seed)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01 + seed / 1000, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 2)).backward()
        optimizer.step()
    return Specimen(model, optimizer, {"epoch": seed, "best": 0.5, "order": [3, 1, 2]})


def _bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().numpy().tobytes()


#: Of these the model keeps its own, or they are the file's alone.
_NOT_RESTORED = ("requires_grad", "stride", "parameter")


def contradicts(specimen: Specimen, path: Path, report: LoadReport) -> str:
    """How a loaded specimen differs from what the manifest of its file says; empty if it does not.

    Of what is reported as not exact, configurations are left out.
    """
    said, held = encode_manifest(orthoserde.inspect(path)), encode_manifest(specimen.content())
    assert isinstance(said, dict)
    assert isinstance(held, dict)
    for part in (said, held):
        assert isinstance(part["tensors"], dict)
        part["training"] = _asked_for(part["training"])
        part["tensors"] = {
            key: {name: value for name, value in record.items() if name not in _NOT_RESTORED}
            for key, record in part["tensors"].items()
            if isinstance(record, dict) and key not in (said["computed"] or ())  # type: ignore[operator]
        }
    compared = ["tensors", "training", "version", "digest"]
    if report.fidelity is orthoserde.Fidelity.EXACT:
        compared += ["parametrized", "modules"]
    return ", ".join(name for name in compared if not same(said[name], _as_far_as(said[name], held[name])))


def _asked_for(training: JSON) -> JSON:
    """Training state as a load compares it: classes by their names alone, and no random generators."""
    if isinstance(training, dict):
        return {
            name: qualname_of(value) if name == "class" and isinstance(value, str) else _asked_for(value)
            for name, value in training.items()
            if name != "rng"
        }
    return [_asked_for(item) for item in training] if isinstance(training, list) else training


def _as_far_as(said: JSON, held: JSON) -> JSON:
    """What is held, as far as a file speaks of it.

    A shape that is null is not known, and of an option that a file lacks the optimizer keeps its own value: files of an
    older torch lack some.
    """
    if isinstance(said, dict) and isinstance(held, dict):
        inner = {name: _as_far_as(said.get(name), value) for name, value in held.items()}
        if "originals" in said:
            known = {name: None if said.get(name) is None else value for name, value in inner.items()}
            # Whether a parametrization was registered unsafely matters while it is registered; the model keeps its own.
            return {**known, "unsafe": said.get("unsafe")}
        if "options" in said:
            return {**inner, "options": _options_of(said["options"], held["options"])}
        return inner
    if isinstance(said, list) and isinstance(held, list) and len(said) == len(held):
        return [_as_far_as(*pair) for pair in zip(said, held, strict=True)]
    return held


def _options_of(said: JSON, held: JSON) -> JSON:
    """Those options that are held of which a file speaks."""
    if not isinstance(said, dict) or not isinstance(held, dict):
        return held
    ours, theirs = held.get("dict"), said.get("dict")
    if not isinstance(ours, list) or not isinstance(theirs, list):
        return held
    named = [pair[0] for pair in theirs if isinstance(pair, list)]
    return {"dict": [pair for pair in ours if isinstance(pair, list) and pair[0] in named]}


def descriptors() -> int:
    """How many files this process has open."""
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
