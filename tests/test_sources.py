"""The table of docs/reference/sources.md: every source form and kind of parametrization, each cell tried.

`python -m tests.test_sources` writes the table into the page.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.ao.pruning.sparsifier import utils
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

import orthoserde
from orthoserde import IncompatibleModelError, LegacyCheckpointWarning, Registry
from tests.helpers import assert_unchanged, snapshot

PAGE = Path(__file__).parent.parent / "docs" / "reference" / "sources.md"
BEGIN, END = "<!-- table: python -m tests.test_sources -->", "<!-- end of table -->"

REGISTRY = Registry()
FakeSparsity: Any = utils.FakeSparsity  # torch does not annotate it


@REGISTRY.register("tests.sources>Scaled")
class Scaled(nn.Module):
    def __init__(self, factor: float = 2.0) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


class Unregistered(Scaled):
    pass


def _orthogonal(orthogonal_map: str, *, trivialized: bool) -> Callable[[], nn.Module]:
    return lambda: orthogonal(nn.Linear(3, 7), orthogonal_map=orthogonal_map, use_trivialization=trivialized)


def _with(*links: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        layer = nn.Linear(3, 7)
        for link in links:
            parametrize.register_parametrization(layer, "weight", link())
        return layer

    return make


KINDS: dict[str, Callable[[], nn.Module]] = {
    **{f"orthogonal, {name}": _orthogonal(name, trivialized=True) for name in ("householder", "cayley", "matrix_exp")},
    "orthogonal, householder, not trivialized": _orthogonal("householder", trivialized=False),
    "orthogonal, cayley, not trivialized": _orthogonal("cayley", trivialized=False),
    "orthogonal, matrix_exp, not trivialized": _orthogonal("matrix_exp", trivialized=False),
    "weight_norm": lambda: weight_norm(nn.Linear(3, 7)),
    "spectral_norm": lambda: spectral_norm(nn.Linear(3, 7)),
    "a mask of torch.ao.pruning": _with(lambda: FakeSparsity((torch.rand(7, 3) > 0.5).float())),
    "a registered class": _with(Scaled),
    "an unregistered class": _with(Unregistered),
    "two in a row": lambda: parametrize.register_parametrization(
        _orthogonal("cayley", trivialized=True)(), "weight", Scaled()
    ),
}


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.contiguous() for key, value in model.state_dict().items()}


def _computed(model: nn.Module) -> dict[str, Tensor]:
    others = {key: value for key, value in _state(model).items() if "parametrizations" not in key}
    return {**others, "weight": weight_of(model).contiguous().clone()}


def weight_of(model: nn.Module) -> Tensor:
    return cast("Tensor", model.weight).detach()


FORMS: dict[str, Callable[[nn.Module, Path], object]] = {
    "file of orthoserde": lambda model, path: orthoserde.save(model, path, registry=REGISTRY),
    "state dict": lambda model, path: safetensors.torch.save_file(_state(model), path),
    "state dict of torch.save": lambda model, path: torch.save(_state(model), path),
    "computed weight": lambda model, path: safetensors.torch.save_file(_computed(model), path),
    "computed weight, from our file": lambda model, path: orthoserde.save(_plain(model), path),
}


def _plain(model: nn.Module) -> nn.Module:
    plain = nn.Linear(3, 7)
    plain.load_state_dict(_computed(model))
    return plain


#: The widest difference of a recovered weight that is promised, in units of eps, for shapes up to this one.
PROMISED = {"orthogonal, householder, not trivialized": 70, "weight_norm": 4, "spectral_norm": 100}


def outcome(form: str, kind: str) -> str:
    """Save one model in a form, load it into another one of the same kind, and say what came of it."""
    torch.manual_seed(0)
    model, other = KINDS[kind]().eval(), KINDS[kind]().eval()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        FORMS[form](model, path)
        before = snapshot(other)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", LegacyCheckpointWarning)
                report = orthoserde.load(other, path, registry=REGISTRY)
        except IncompatibleModelError:
            assert_unchanged(other, before)
            return "refused"
    if report.fidelity is not orthoserde.Fidelity.INFERENCE:
        ours, theirs = model.state_dict(), other.state_dict()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
        return str(report.fidelity)
    difference = float((weight_of(model) - weight_of(other)).abs().max())
    if kind not in PROMISED:
        assert difference == 0
        return "INFERENCE, equal outputs"
    assert difference <= PROMISED[kind] * torch.finfo(torch.float32).eps
    return f"INFERENCE, within {PROMISED[kind]} eps"


def table() -> str:
    rows = [["kind", *FORMS], ["---"] * (len(FORMS) + 1)]
    rows += [[kind, *(outcome(form, kind) for form in FORMS)] for kind in KINDS]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


@pytest.fixture(scope="module")
def page() -> dict[tuple[str, str], str]:
    text = PAGE.read_text("utf-8").split(BEGIN)[1].split(END)[0].strip()
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    return {(form, line[0]): cell for line in lines[2:] for form, cell in zip(lines[0][1:], line[1:], strict=True)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
def test_the_page_says_what_happens(form: str, kind: str, page: dict[tuple[str, str], str]) -> None:
    if form == "state dict of torch.save" and tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6):
        with pytest.raises(orthoserde.FileFormatError, match="use torch 2.6 or newer"):  # noqa: RUF043
            outcome(form, kind)
        return
    assert page[form, kind] == outcome(form, kind)


def test_the_page_has_no_other_cells(page: dict[tuple[str, str], str]) -> None:
    assert set(page) == {(form, kind) for form in FORMS for kind in KINDS}


if __name__ == "__main__":
    head, rest = PAGE.read_text("utf-8").split(BEGIN)
    PAGE.write_text(f"{head}{BEGIN}\n\n{table()}\n\n{END}{rest.split(END)[1]}", "utf-8")
