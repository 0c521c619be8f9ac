"""The table of docs/reference/forms.md: every form of a weight in a file and in a model, each cell tried.

`python -m tests.test_forms` writes the table into the page.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor, nn
from torch.ao.pruning.sparsifier.utils import FakeSparsity
from torch.nn.utils import parametrizations, parametrize, prune

import orthoserde
from orthoserde import Fidelity, IncompatibleModelError, LegacyCheckpointWarning
from orthoserde.registry import default_registry
from orthoserde.walk import take_inventory
from orthoserde.weights.live import computed
from tests.helpers import assert_unchanged, same_bits, snapshot, train

PAGE = Path(__file__).parent.parent / "docs" / "reference" / "forms.md"
BEGIN, END = "<!-- table: python -m tests.test_forms -->", "<!-- end of table -->"

Make = Callable[[nn.Module], nn.Module]


def _each(apply: Callable[[nn.Module, int], object]) -> Make:
    """Apply to both layers, with the dimension of their output channels."""

    def make(model: nn.Module) -> nn.Module:
        first, _, last = model.children()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch's old weight_norm
            apply(first, 0)
            apply(last, 1)
        return model

    return make


def _as_it_is(model: nn.Module) -> nn.Module:
    return model


@dataclass(frozen=True)
class Kind:
    """One kind of constraint in its forms.

    Attributes:
        hooks: Registers torch's older hooks; None where there are none.
        parametrized: Registers parametrizations.
        power_method: Whether training refines estimates, each form in another order.
        eps: How far, in units of eps, a weight may be off that is recovered from itself alone.
    """

    hooks: Make | None
    parametrized: Make
    power_method: bool = False
    eps: int = 0


def _orthogonal(*, structured: bool) -> Make:
    def apply(layer: nn.Module, _: int) -> None:
        orthoserde.orthogonal(layer, "weight", "cayley", structured=structured)

    return _each(apply)


def _prune(layer: nn.Module, _: int) -> None:
    prune.random_unstructured(layer, "weight", amount=0.4)  # type: ignore[no-untyped-call]


def _mask(layer: nn.Module, _: int) -> None:
    weight = cast("Tensor", layer.weight)
    mask = (torch.rand(weight.shape) < 0.6).to(weight.dtype)
    parametrize.register_parametrization(layer, "weight", FakeSparsity(mask))  # type: ignore[no-untyped-call]


KINDS = {
    "weight_norm": Kind(
        _each(lambda layer, dim: nn.utils.weight_norm(layer, dim=dim)),
        _each(lambda layer, dim: parametrizations.weight_norm(layer, dim=dim)),
        eps=4,
    ),
    "spectral_norm": Kind(
        _each(lambda layer, dim: nn.utils.spectral_norm(layer, dim=dim)),
        _each(lambda layer, dim: parametrizations.spectral_norm(layer, dim=dim)),
        power_method=True,
        eps=100,
    ),
    "pruning": Kind(_each(_prune), _each(_mask)),
    "orthogonal": Kind(None, _orthogonal(structured=False)),
    "orthogonal, structured": Kind(None, _orthogonal(structured=True)),
}

#: Forms of a model. The last is what `reparametrize=False` asks for.
PARAMETRIZED, HOOKS, PLAIN, KEPT_PLAIN = "parametrizations", "hooks", "plain", "plain, reparametrize=False"

#: Forms of a file: whose it is, and of which model. A baked one is what `bake_` leaves of a parametrized one; the
#: weight of a plain one has never been under the constraint.
OURS, TORCH = "ours", "state dict"
BAKED = "baked"


def plain_model(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv1d(3, 4, 3), nn.Tanh(), nn.ConvTranspose1d(4, 5, 2))


def in_form(form: str, kind: Kind, seed: int) -> nn.Module:
    makers = {PARAMETRIZED: kind.parametrized, HOOKS: kind.hooks, PLAIN: _as_it_is, KEPT_PLAIN: _as_it_is}
    make = makers[form]
    assert make is not None
    return make(plain_model(seed))


def losses_of(model: nn.Module, steps: int, first: int) -> list[float]:
    """Train with SGD, which keeps no state of its own; return the losses."""
    return train(model, torch.optim.SGD(model.parameters(), lr=0.05), (2, 3, 12), range(first, first + steps))


def outputs(model: nn.Module) -> Tensor:
    was = model.training
    with torch.no_grad():
        result: Tensor = model.eval()(torch.randn(2, 3, 12, generator=torch.Generator().manual_seed(99)))
    model.train(was)
    return result


def weights(model: nn.Module) -> list[Tensor]:
    inventory = take_inventory(model)
    found = [computed(tensor, default_registry) for tensor in (*inventory.parametrized, *inventory.hooked)]
    plain = [slot.tensor for slot in inventory.slots.values() if slot.key.endswith(".weight")]
    return [weight.detach() for weight in (*found, *plain) if weight is not None]


def saved(owner: str, form: str, kind: Kind, path: Path) -> nn.Module:
    """Save a model that has been trained; return it."""
    model = in_form(PARAMETRIZED if form == BAKED else form, kind, seed=0)
    losses_of(model, 3, first=0)
    if form == BAKED:
        orthoserde.bake_(model)
    if owner == OURS:
        orthoserde.save(model, path)
    else:
        torch.save({key: value.clone() for key, value in model.state_dict().items()}, path)
    return model


def rows() -> Iterator[tuple[str, str, str]]:
    for name, kind in KINDS.items():
        for owner in (OURS, TORCH):
            for form in (PARAMETRIZED, HOOKS, BAKED, PLAIN):
                if form != HOOKS or kind.hooks is not None:
                    yield name, owner, form


def columns(kind: Kind) -> list[str]:
    return [form for form in (PARAMETRIZED, HOOKS, PLAIN, KEPT_PLAIN) if form != HOOKS or kind.hooks is not None]


def outcome(name: str, owner: str, form: str, target: str) -> str:
    """Save a model in one form, load it into a model of another form, and say what came of it."""
    kind = KINDS[name]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        model = saved(owner, form, kind, path)
        other = in_form(target, kind, seed=1)
        losses_of(other, 2, first=50)  # old hooks then hold the weight of their last forward
        before = snapshot(other)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", LegacyCheckpointWarning)
                report = orthoserde.load(other, path, reparametrize=target != KEPT_PLAIN)
        except IncompatibleModelError:
            assert_unchanged(other, before)
            return "refused"
    if report.fidelity is Fidelity.INFERENCE:
        bound = kind.eps * torch.finfo(torch.float32).eps
        for ours, theirs in zip(weights(model), weights(other), strict=True):
            assert float((ours - theirs).abs().max()) <= bound
        recovered = form in (BAKED, PLAIN) and kind.eps
        return "equal outputs" if not recovered else f"outputs within {kind.eps} eps"
    assert same_bits(outputs(model), outputs(other))
    continued = losses_of(model, 3, first=3) == losses_of(other, 3, first=3)
    other_order = kind.power_method and (form == HOOKS) != (target == HOOKS) and form not in (BAKED, PLAIN)
    assert continued == (not other_order)
    if report.fidelity is Fidelity.EXACT:
        assert continued
        return "exact"
    return "same state, trains on as saved" if continued else "same state"


def table() -> str:
    heads = (PARAMETRIZED, HOOKS, PLAIN, KEPT_PLAIN)
    lines = [["kind", "file", *heads], ["---"] * (len(heads) + 2)]
    for name, owner, form in rows():
        cells = [outcome(name, owner, form, head) if head in columns(KINDS[name]) else "" for head in heads]
        lines.append([name, f"{owner}, {form}", *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


CELLS = [
    pytest.param(name, owner, form, target, id=f"{name}-{owner}-{form}-{target}".replace(" ", "_"))
    for name, owner, form in rows()
    for target in columns(KINDS[name])
]


@pytest.fixture(scope="module")
def page() -> dict[tuple[str, str, str], str]:
    text = PAGE.read_text("utf-8").split(BEGIN)[1].split(END)[0].strip()
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    return {
        (line[0], line[1], head): cell
        for line in lines[2:]
        for head, cell in zip(lines[0][2:], line[2:], strict=True)
        if cell
    }


@pytest.mark.parametrize(("name", "owner", "form", "target"), CELLS)
def test_the_page_says_what_happens(
    name: str, owner: str, form: str, target: str, page: dict[tuple[str, str, str], str]
) -> None:
    if owner == TORCH and tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6):
        with pytest.raises(orthoserde.FileFormatError, match="use torch 2.6 or newer"):  # noqa: RUF043
            outcome(name, owner, form, target)
        return
    assert page[name, f"{owner}, {form}", target] == outcome(name, owner, form, target)


def test_the_page_has_no_other_cells(page: dict[tuple[str, str, str], str]) -> None:
    assert len(page) == len(CELLS)


if __name__ == "__main__":
    head, rest = PAGE.read_text("utf-8").split(BEGIN)
    PAGE.write_text(f"{head}{BEGIN}\n\n{table()}\n\n{END}{rest.split(END)[1]}", "utf-8")
