"""The models of the golden files, with values that come from a formula instead of a random generator.

`python -m tests.golden.models [FOLDER]` writes the files that do not exist yet. A file that exists is never written
again: it stands for every file of its format version that users have. `v1` was written under torch 2.13.0, and
`torch-2.3.1` and `torch-2.15.0` hold the same models as other versions of torch wrote them.
"""

from __future__ import annotations

import math
import random
import sys
import warnings
import zlib
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy
import torch
from torch import Tensor, nn
from torch.ao.pruning.sparsifier.utils import FakeSparsity
from torch.nn.utils import parametrize, prune
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

import orthoserde
from orthoserde.orthonormal.completion import complete
from orthoserde.walk import take_inventory

FOLDER = Path(__file__).parent / "v1"

DTYPES = ["bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64"]
DTYPES += ["complex64", "complex128", "float8_e4m3fn", "float8_e5m2"]

REGISTRY = orthoserde.Registry()


@REGISTRY.register("golden>Scaled", version=3)
class Scaled(nn.Module):
    """A registered parametrization with a tensor of its own."""

    def __init__(self, gain: float, *, note: str = "é") -> None:
        super().__init__()
        self.gain = gain
        self.shift = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * x + self.shift


class Doubled(nn.Module):
    """An unregistered parametrization."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


@REGISTRY.register("golden>Outer")
class Outer(nn.Module):
    """Several originals, and a parametrized tensor inside of the parametrization."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = spectral_norm(nn.Linear(3, 3, bias=False))

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        inner: Tensor = self.inner(left)
        return inner @ right

    def right_inverse(self, value: Tensor) -> tuple[Tensor, Tensor]:
        return value.new_zeros(4, 3), value.new_zeros(3, 5)


@REGISTRY.register("golden>HookedInside")
class HookedInside(nn.Module):
    """A tensor that a hook computes inside of the parametrization."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = hooked("spectral_norm", nn.Linear(3, 3, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        inner: Tensor = self.inner(x)
        return inner


@REGISTRY.register("golden>Block", version=2)
class Block(nn.Module):
    """A registered module."""

    def __init__(self, width: int, names: tuple[str, ...] = ("a", "b")) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)


def plain() -> nn.Module:
    """Every dtype, ties, odd strides and shapes; no parametrization."""
    model = nn.Module()
    for name in DTYPES:
        model.register_buffer(f"as_{name}", torch.zeros(2, 3, dtype=getattr(torch, name)))
    model.register_buffer("scalar", torch.zeros(()))
    model.register_buffer("empty", torch.zeros(0, 4))
    model.register_buffer("transposed", torch.zeros(3, 5).t())
    model.register_buffer("hidden", torch.zeros(1), persistent=False)
    model.embedding = nn.Embedding(7, 4)
    model.decoder = nn.Linear(4, 7)
    model.decoder.weight = model.embedding.weight
    model.norm = nn.BatchNorm1d(4)
    model.frozen = nn.Parameter(torch.zeros(2), requires_grad=False)
    return model


def orthogonals() -> nn.Module:
    """Torch's orthogonal in all its maps and shapes."""
    model = nn.Module()
    shapes = {"tall": (6, 3), "wide": (3, 6), "square": (4, 4), "batched": (2, 5, 3)}
    for orthogonal_map in ("householder", "cayley", "matrix_exp"):
        for trivialized in (True, False):
            for shape_name, shape in shapes.items():
                dtype = torch.float64 if shape_name == "wide" else torch.float32
                if shape_name == "square" and orthogonal_map != "householder":
                    dtype = torch.complex64
                layer = nn.Module()
                layer.weight = nn.Parameter(torch.eye(*shape[-2:], dtype=dtype).expand(shape).clone())
                orthogonal(layer, orthogonal_map=orthogonal_map, use_trivialization=trivialized)
                model.add_module(f"{orthogonal_map}_{trivialized}_{shape_name}", layer)
    return model


def norms() -> nn.Module:
    """Torch's weight_norm and spectral_norm."""
    vector = nn.Module()
    vector.weight = nn.Parameter(torch.ones(5))
    return nn.ModuleDict(
        {
            "weight_norm": weight_norm(nn.Linear(4, 3)),
            "weight_norm_dim": weight_norm(nn.Conv1d(4, 3, 2), dim=1),
            "weight_norm_all": weight_norm(nn.Linear(4, 3), dim=cast("int", None)),
            "spectral_norm": spectral_norm(nn.Linear(4, 3), n_power_iterations=2, eps=1e-9),
            "spectral_norm_transposed": spectral_norm(nn.ConvTranspose2d(2, 3, 2)),
            "spectral_norm_vector": spectral_norm(vector),
            "recurrent": orthogonal(nn.GRU(3, 4), "weight_hh_l0"),
        }
    )


def hooked(kind: str, layer: nn.Module, *args: object, **options: object) -> nn.Module:
    """A layer with one of torch's older hooks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's weight_norm
        register: Callable[..., nn.Module] = getattr(nn.utils, kind)
        return register(layer, *args, **options)


def hooks() -> nn.Module:
    """Torch's older hooks, a shared module and a tied original among them."""
    model = nn.ModuleDict(
        {
            "weight_norm": hooked("weight_norm", nn.Linear(4, 3)),
            "weight_norm_dim": hooked("weight_norm", nn.Conv1d(4, 3, 2), dim=1),
            "weight_norm_all": hooked("weight_norm", nn.Linear(4, 3, dtype=torch.float64), dim=None),
            "spectral_norm": hooked("spectral_norm", nn.Linear(4, 3), n_power_iterations=2, eps=1e-9),
            "spectral_norm_transposed": hooked("spectral_norm", nn.ConvTranspose2d(2, 3, 2)),
            "recurrent": hooked("weight_norm", nn.GRU(3, 4), "weight_hh_l0"),
            "both": hooked("weight_norm", orthogonal(nn.Linear(4, 4)), "bias"),
            "nested": nn.Linear(3, 5),
            "tied": nn.Linear(4, 3),
        }
    )
    parametrize.register_parametrization(model["nested"], "weight", HookedInside())
    model["tied"].weight = model["weight_norm"].get_parameter("weight_v")
    model["again"] = model["spectral_norm"]
    return model


def masks() -> nn.Module:
    """Masks of torch.ao.pruning, and of torch.nn.utils.prune, which are hooks."""
    sparse = nn.Linear(4, 3)
    mask = torch.ones(3, 4, dtype=torch.bool)
    parametrize.register_parametrization(sparse, "weight", FakeSparsity(mask))  # type: ignore[no-untyped-call]
    pruned = nn.Conv1d(4, 3, 2)
    for name in ("weight", "bias"):
        prune.identity(pruned, name)  # type: ignore[no-untyped-call]
    return nn.ModuleDict({"sparse": sparse, "pruned": pruned})


def users() -> nn.Module:
    """Classes of the user: registered and not, chained, nested, tied, shared."""
    chained = orthogonal(nn.Linear(4, 4))
    parametrize.register_parametrization(chained, "weight", Scaled(0.5, note="chained"))
    parametrize.register_parametrization(chained, "bias", Doubled())
    buffered = nn.BatchNorm1d(4)
    parametrize.register_parametrization(buffered, "running_mean", Scaled(2.0))
    several = nn.Linear(5, 4)
    parametrize.register_parametrization(several, "weight", Outer(), unsafe=True)
    return nn.ModuleDict(
        {"chained": chained, "buffered": buffered, "several": several, "block": Block(3), "again": chained}
    )


def compact() -> nn.Module:
    """Bases that are stored as columns; a shared module, and a square base, which is stored whole."""
    model = nn.Module()
    shapes = {
        "tall": ((9, 4), torch.float32),
        "wide": ((3, 8), torch.float64),
        "batched": ((2, 5, 2), torch.float32),
        "complex": ((7, 3), torch.complex64),
        "complex_wide": ((2, 6), torch.complex128),
        "square": ((4, 4), torch.float32),
    }
    for name, (shape, dtype) in shapes.items():
        for orthogonal_map in ("cayley", "matrix_exp") if dtype.is_complex else ("householder", "cayley", "matrix_exp"):
            layer = nn.Module()
            layer.weight = nn.Parameter(torch.eye(*shape[-2:], dtype=dtype).expand(shape).clone())
            orthoserde.orthogonal(layer, orthogonal_map=orthogonal_map)
            model.add_module(f"{orthogonal_map}_{name}", layer)
    model.again = model.cayley_tall
    return model


def training() -> nn.Module:
    """Structured rotations of every sort, and a tied layer, which two optimizers train."""
    model = nn.Module()
    for orthogonal_map, shape in (("householder", (9, 4)), ("cayley", (3, 8)), ("matrix_exp", (4, 4))):
        layer = nn.Module()
        layer.weight = nn.Parameter(torch.eye(*shape))
        model.add_module(orthogonal_map, orthoserde.orthogonal(layer, orthogonal_map=orthogonal_map, structured=True))
    model.plain = nn.Linear(3, 2)
    model.again = model.plain
    return model


def optimizers_of(model: nn.Module) -> dict[str, torch.optim.Optimizer]:
    """Two optimizers, one with two groups."""
    rotations = [parameter for name, parameter in model.named_parameters() if "original" in name]
    plain = list(model.get_submodule("plain").parameters())
    groups: list[dict[str, Any]] = [{"params": rotations[:1], "lr": 0.5}, {"params": rotations[1:]}]
    return {
        "rotations": torch.optim.SGD(groups, lr=0.25, momentum=0.5),
        "plain": torch.optim.Adam(plain, lr=0.125, betas=(0.5, 0.75)),
    }


def in_training(model: nn.Module) -> dict[str, torch.optim.Optimizer]:
    """The optimizers with state, by arithmetic that is exact."""
    optimizers = optimizers_of(model)
    for i, parameter in enumerate(optimizers["rotations"].param_groups[0]["params"]):
        optimizers["rotations"].state[parameter] = {"momentum_buffer": expected(f"momentum {i}", parameter)}
    for i, parameter in enumerate(optimizers["plain"].param_groups[0]["params"]):
        optimizers["plain"].state[parameter] = {
            "step": torch.tensor(3.0),
            "exp_avg": expected(f"average {i}", parameter),
            "exp_avg_sq": expected(f"square {i}", parameter) ** 2,
        }
    return optimizers


def values() -> dict[str, object]:
    """Every sort of value."""
    tree = [None, True, -3, 0.5, math.inf, -math.inf, "ключ", (1, (2,)), {1: "a", "b": {2.5: None}, None: []}]
    return {
        "step": 120,
        "tree": tree,
        "counter": Counter({3: 1, 5: 2}),
        "ordered": OrderedDict([("z", 1), ("a", 2)]),
        "tensor": expected("tensor", torch.empty(2, 3, dtype=torch.int16)),
    }


def set_bases_(model: nn.Module) -> nn.Module:
    """Give every base orthonormal columns and their completion, by arithmetic whose bits are those of every machine."""
    for record in list(orthoserde.parametrized_tensors(model)):
        base = model.get_buffer(f"{record.prefix}.0.base")
        n, k = base.size(-1), min(record.originals["original"].shape[-2:])
        for i, matrix in enumerate([base] if base.dim() == 2 else base.unbind(0)):
            vector = ((torch.arange(n) * 5 + zlib.crc32(record.name.encode()) + i) % 7 + 1).to(torch.float64)
            unit = vector / math.sqrt(float((vector * vector).sum()))  # the sum is exact
            columns = complete((unit * (0.6 + 0.8j) if base.is_complex() else unit)[:, None])[:, n - k :]
            with torch.no_grad():
                matrix.copy_(complete(columns.to(base.dtype)))
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "plain": plain,
    "orthogonals": orthogonals,
    "norms": norms,
    "users": users,
}

#: Written by orthoserde 0.1 under torch 2.13.0 alone: a file of canonical bases is the same under every torch.
COMPACT: dict[str, Callable[[], nn.Module]] = {"compact": compact}


#: Written by orthoserde 0.1 under torch 2.13.0 alone.
HOOKS: dict[str, Callable[[], nn.Module]] = {"hooks": hooks, "masks": masks}

#: Of which training state is saved too. Written by orthoserde 0.1 under torch 2.13.0 alone.
TRAINING: dict[str, Callable[[], nn.Module]] = {"training": training}

ALL = MODELS | COMPACT | HOOKS | TRAINING


def expected(key: str, like: Tensor) -> Tensor:
    """The value that a golden file holds under ``key``: a few exact binary fractions, different for each key."""
    numbers = (torch.arange(like.numel()) * 37 + zlib.crc32(key.encode())) % 251
    if like.dtype == torch.bool:
        return (numbers % 2 == 0).reshape(like.shape)
    if not like.is_floating_point() and not like.is_complex():
        return (numbers % 100).to(like.dtype).reshape(like.shape)
    real = ((numbers - 125).to(torch.float64) / 64).to(like.dtype)
    return (real * (1 + 0.5j) if like.is_complex() else real).reshape(like.shape)


def fill_(model: nn.Module) -> nn.Module:
    """Give every tensor of a model its expected value; a tied one that of its first key."""
    seen: set[int] = set()
    with torch.no_grad():
        for key, slot in take_inventory(model).slots.items():
            if slot.tensor is not None and id(slot.tensor) not in seen:
                seen.add(id(slot.tensor))
                slot.tensor.copy_(expected(key, slot.tensor))
    return model


def made(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """The model of a golden file with its values, and what a save of that file is told beside it."""
    model = fill_(ALL[name]())
    if name in COMPACT:
        set_bases_(model)
    options: dict[str, Any] = {"registry": REGISTRY, "metadata": {"golden": name, "ключ": "значение"}}
    if name in TRAINING:
        random.seed(0)
        numpy.random.seed(0)
        torch.manual_seed(0)
        options |= {"optimizer": in_training(model), "state": values(), "rng": True}
    return model, options


if __name__ == "__main__":
    folder = FOLDER.parent / sys.argv[1] if len(sys.argv) > 1 else FOLDER
    folder.mkdir(exist_ok=True)
    for name in ALL:
        path = folder / f"{name}.safetensors"
        if not path.exists():
            model, options = made(name)
            print(orthoserde.save(model, path, **options))
