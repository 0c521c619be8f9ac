"""Numerical faults in orthogonal weights: each put into maps, shapes and dtypes, saved, loaded, verified, diagnosed."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

import orthoserde
from orthoserde.errors import LegacyCheckpointWarning, OrthoserdeError, TrainingTrapWarning

MAPS = ("householder", "cayley", "matrix_exp")

SHAPES: tuple[tuple[int, ...], ...] = ((6, 4), (4, 6), (5, 5), (2, 6, 4))

DTYPES = (torch.float32, torch.float64)

Fault = Callable[[nn.Module, Tensor, Tensor], object]


def layer(shape: tuple[int, ...], map_: str, dtype: torch.dtype) -> nn.Module:
    """A module with an orthogonal weight, whose ``original`` has been trained a little."""
    made = nn.Module()
    made.weight = nn.Parameter(torch.randn(shape, dtype=dtype))
    orthogonal(made, orthogonal_map=map_)
    original, _ = state_of(made)
    with torch.no_grad():
        small = 0.1 * torch.randn_like(original)
        original += small.triu(1) if original.size(-2) < original.size(-1) else small.tril(-1)
    return made


def state_of(module: nn.Module) -> tuple[Tensor, Tensor]:
    """The original and the base of an orthogonal weight."""
    found = dict(module.named_parameters()) | dict(module.named_buffers())
    return found["parametrizations.weight.original"], found["parametrizations.weight.0.base"]


def _put(original: Tensor, value: float, *, read: bool = True) -> None:
    """Put a number into the corner of the triangle that torch's maps read, or of the other one."""
    wide = original.size(-2) < original.size(-1)
    row, column = (0, -1) if read == wide else (-1, 0)
    original[..., row, column] = value


def _diagonal(original: Tensor, value: float) -> None:
    original.diagonal(dim1=-2, dim2=-1)[..., 0] = value


def _halfway(module: nn.Module, dtype: torch.dtype) -> None:
    wide = state_of(module)[0].dtype
    module.to(dtype).to(wide)


def _below_one(module: nn.Module, original: Tensor, base: Tensor) -> None:
    one = torch.ones((), dtype=original.dtype)
    _diagonal(original, float(torch.nextafter(one, torch.zeros_like(one))))


def _decay(module: nn.Module, original: Tensor, base: Tensor) -> None:
    original *= 1 - 1e-5


#: Faults of a model, by what the table calls them.
FAULTS: dict[str, Fault] = {
    "none": lambda module, original, base: None,
    "cast to bfloat16": lambda module, original, base: module.bfloat16(),
    "cast to float16": lambda module, original, base: module.half(),
    "cast to bfloat16 and back": lambda module, original, base: _halfway(module, torch.bfloat16),
    "cast to float16 and back": lambda module, original, base: _halfway(module, torch.float16),
    "NaN in the triangle of original that is read": lambda module, original, base: _put(original, float("nan")),
    "NaN in the other triangle": lambda module, original, base: _put(original, float("nan"), read=False),
    "NaN on the diagonal of original": lambda module, original, base: _diagonal(original, float("nan")),
    "infinity in the triangle that is read": lambda module, original, base: _put(original, float("inf")),
    "a huge original": lambda module, original, base: _put(original, 1e6),
    "an original of zeros": lambda module, original, base: original.zero_(),
    "an original of ones (rank 1)": lambda module, original, base: original.fill_(1),
    "a diagonal one ulp below 1": _below_one,
    "a decayed original": _decay,
    "NaN in the base": lambda module, original, base: base[..., 0, 0].fill_(float("nan")),
    "a base off by eps": lambda module, original, base: base[..., 0, 0].add_(torch.finfo(base.dtype).eps),
    "a base off by 1e-4": lambda module, original, base: base[..., 0, 0].add_(1e-4),
    "a base off by 1": lambda module, original, base: base[..., 0, 0].add_(1),
    "a base of zeros": lambda module, original, base: base.zero_(),
    "a base of ones (rank 1)": lambda module, original, base: base.fill_(1),
    "two weights that share their original": lambda module, original, base: _tie(module),
}


def _tie(module: nn.Module) -> None:
    """Another module with a base of its own, over the same original: two weights from one parameter."""
    original, _ = state_of(module)
    other = nn.Module()
    other.weight = nn.Parameter(torch.randn_like(original))
    orthogonal(other, orthogonal_map=module.parametrizations.weight[0].orthogonal_map.name)  # type: ignore[union-attr,index]
    other.parametrizations.weight.original = original  # type: ignore[union-attr]
    module.other = other


def _moved(weight: Tensor, distance: float) -> Tensor:
    return weight + distance * torch.eye(*weight.shape[-2:], dtype=weight.dtype)


#: Faults of a file that has the computed weight alone.
WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "computed weight alone": lambda weight: weight,
    "computed weight alone, rounded to bfloat16": lambda weight: weight.bfloat16().to(weight.dtype),
    "computed weight alone, off by eps": lambda weight: _moved(weight, torch.finfo(weight.dtype).eps),
    "computed weight alone, off by 1e-4": lambda weight: _moved(weight, 1e-4),
    "computed weight alone, zero": torch.zeros_like,
    "computed weight alone, rank 1": torch.ones_like,
    "computed weight alone, NaN": lambda weight: weight.fill_(float("nan")),
}


@dataclass(frozen=True)
class Outcomes:
    """What each call says of a fault; "-" where it says nothing.

    Attributes:
        save: Of saving a model that has it.
        load: Of loading the file into a sound model.
        verify: Of verifying the file.
        diagnose: Of the model that has it, or of the one that it was loaded into.
    """

    save: str
    load: str
    verify: str
    diagnose: str

    @property
    def silent(self) -> bool:
        """Whether nobody says a word."""
        return self.save == "-" and self.load == "EXACT" and self.verify == "ok" and self.diagnose == "-"


def of_fault(fault: str, map_: str, shape: tuple[int, ...], dtype: torch.dtype) -> Outcomes:
    """Put a fault into a model, and ask everyone about it."""
    torch.manual_seed(1)
    faulty, sound = layer(shape, map_, dtype), layer(shape, map_, dtype)
    with torch.no_grad():
        FAULTS[fault](faulty, *state_of(faulty))
        if hasattr(faulty, "other"):
            _tie(sound)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            orthoserde.save(faulty, path)
        return Outcomes(_warned(told, "-"), _loaded(sound, path), _verified(path), _diagnosed(faulty))


def of_weight(fault: str, map_: str, shape: tuple[int, ...], dtype: torch.dtype) -> Outcomes:
    """Put a fault into a file that has the computed weight alone, and ask everyone about it."""
    torch.manual_seed(1)
    made, sound = layer(shape, map_, dtype), layer(shape, map_, dtype)
    with torch.no_grad():
        weight = WEIGHTS[fault](torch.as_tensor(made.weight).detach().clone())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.safetensors"
        safetensors.torch.save_file({"weight": weight.to(dtype).contiguous()}, path)
        return Outcomes("another's", _loaded(sound, path), _verified(path), _diagnosed(sound))


def _warned(told: list[warnings.WarningMessage], nothing: str) -> str:
    kinds = {type(each.message) for each in told}
    assert kinds <= {TrainingTrapWarning, LegacyCheckpointWarning}
    return "warns" if kinds else nothing


def _loaded(model: nn.Module, path: Path) -> str:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            report = orthoserde.load(model, path)
        except OrthoserdeError:
            return "refused"
    return f"{report.fidelity}{_warned(told, '') and ', warns'}"


def _verified(path: Path) -> str:
    report = orthoserde.verify(path)
    if report.misfits:
        return "does not fit"
    if report.off_constraint:
        return "off its constraint"
    return "ok" if not report.not_measured else "ok, not measured"


def _diagnosed(model: nn.Module) -> str:
    codes = {finding.code for finding in orthoserde.diagnose(model)}
    return ", ".join(sorted(codes)) or "-"


#: Why a fault of which nobody speaks does no harm, by what the table calls it.
HARMLESS = {
    "none": "there is none",
    "a huge original": "every original makes an orthogonal weight",
    "an original of zeros": "it makes the base itself",
    "an original of ones (rank 1)": "every original makes an orthogonal weight",
    "a diagonal one ulp below 1": "these maps do not read the diagonal",
    "a decayed original": "every original makes an orthogonal weight, for these maps do not read the diagonal",
    "a base off by eps": "it is rounding, as every base has",
    "computed weight alone, off by eps": "it is rounding, as every weight has",
    "computed weight alone": "there is none",
}


def rows() -> Iterator[tuple[str, str, str, Outcomes]]:
    """Every fault with the maps, shapes and dtypes that come to the same."""
    for faults, of in ((FAULTS, of_fault), (WEIGHTS, of_weight)):
        for fault in faults:
            found: dict[Outcomes, dict[str, list[str]]] = {}
            for map_ in MAPS:
                for shape in SHAPES:
                    for dtype in DTYPES:
                        case = f"{'x'.join(map(str, shape))} {str(dtype).removeprefix('torch.')}"
                        found.setdefault(of(fault, map_, shape, dtype), {}).setdefault(map_, []).append(case)
            for outcomes, maps in found.items():
                by_cases: dict[str, list[str]] = {}
                for map_, cases in maps.items():
                    every = len(cases) == len(SHAPES) * len(DTYPES)
                    by_cases.setdefault("all" if every else ", ".join(cases), []).append(map_)
                for cases_text, names in by_cases.items():
                    yield fault, ", ".join(names) if len(names) < len(MAPS) else "all", cases_text, outcomes


def cases() -> int:
    """How many combinations there are."""
    return (len(FAULTS) + len(WEIGHTS)) * len(MAPS) * len(SHAPES) * len(DTYPES)


def table() -> str:
    """The table of docs/reference/numerics.md."""
    lines = [["fault", "maps", "shapes and dtypes", "save", "load", "verify", "diagnose", "so"], ["---"] * 8]
    for fault, maps, which, found in rows():
        lines.append([fault, maps, which, found.save, found.load, found.verify, found.diagnose, so(fault, found)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def so(fault: str, found: Outcomes) -> str:
    """Who speaks of a fault, or why nobody needs to."""
    told = {
        "save warns": "warns" in found.save,
        "load refuses it": found.load == "refused",
        "load warns": "warns" in found.load and found.load != "refused" and found.diagnose != "-",
        "load says UNVERIFIED": "UNVERIFIED" in found.load,
        "verify finds it": found.verify in ("off its constraint", "does not fit"),
        "diagnose finds it": found.diagnose != "-",
    }
    spoken = [who for who, speaks in told.items() if speaks]
    return ", ".join(spoken) if spoken else f"harmless: {HARMLESS[fault]}"
