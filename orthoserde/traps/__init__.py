"""Traps in a live model, before they cost a week."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn

from orthoserde import _torch, modes
from orthoserde.errors import TrainingTrapWarning, warn
from orthoserde.integrations import in_process
from orthoserde.optimizers import Optimizers, optimizers_of
from orthoserde.registry import Registry
from orthoserde.reports import Finding, Severity
from orthoserde.traps import optimizers as held
from orthoserde.traps import sharing, state
from orthoserde.walk import Inventory, ParametrizedTensor, take_inventory
from orthoserde.wording import SHOWN


def diagnose(model: nn.Module, optimizer: Optimizers | None = None) -> list[Finding]:
    """Look for what will make parametrized tensors train, save or resume other than one expects.

    Nothing is disturbed: no forward of the model is run, no buffer, gradient, mode, version counter, cache or random
    generator changes. All parameters, buffers and optimizer states are read once, and every weight is computed once
    from its state, one at a time, which takes the time and memory of that weight in a forward (for cayley and
    matrix_exp without the structured form an n x n factorisation; seconds for 4096 rows), and a singular value
    decomposition of each weight under spectral_norm. Bases are probed by a few vectors, a block at a time.
    Classes of your own are not run. Tensors on the meta device, or sharded, are named and not looked into.

    Args:
        model: Any module.
        optimizer: The optimizer that trains it; several as an iterable, or as a mapping of names. Without one, nothing
            is said of optimizers.

    Returns:
        What was found, the worst first; empty for a healthy model. docs/how-to/find-traps.md has each code.

    Raises:
        TypeError: ``model`` is not a module, or ``optimizer`` is something else.
        UnsupportedModuleError: The module graph has a cycle, two tensors have one name, or FakeTensorMode is active.

    Example:
        >>> import torch, orthoserde
        >>> from torch.nn.utils.parametrizations import orthogonal
        >>> model = orthogonal(torch.nn.Linear(8, 4))
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> [(finding.where, finding.code) for finding in orthoserde.diagnose(model, optimizer)]
        [('weight', 'weight-decay-householder')]
    """
    with modes.generators_kept():
        inventory = take_inventory(model)
    optimizers = optimizers_of(optimizer)
    registry = in_process(None)
    found = list(sharing.autocast(inventory))
    with modes.undisturbed():
        found += sharing.tied_originals(inventory)
        found += sharing.cached_copies(inventory)
        found += _in_state(inventory, registry)
        if optimizers:
            places = held.held_by(optimizers)
            found += held.householder_and_others(inventory, places)
            found += held.outside_of_model(inventory, places, registry)
            found += held.out_of_order(inventory, optimizers)
            found += held.states(inventory, places)
            found += held.membership(inventory, places)
    return sorted(found, key=lambda finding: (-finding.severity, finding.where, finding.code))


def _in_state(inventory: Inventory, registry: Registry) -> Iterator[Finding]:
    broken = list(state.not_finite(inventory))
    yield from broken
    for record in inventory.parametrized:
        glance = list(_glance(record))
        yield from glance
        # What is unsound here would only be found once more in the weight.
        if not glance and not any(finding.where.startswith(f"{record.prefix}.") for finding in broken):
            yield from state.measured(record, registry)


def _glance(record: ParametrizedTensor) -> Iterator[Finding]:
    links = [_torch.unwrap(link) for link in record.parametrizations]
    return state.at_a_glance(record.name, links, record.originals.get("original"))


def warn_of_traps(model: nn.Module, optimizer: Optimizers | None = None) -> None:
    """Warn, once, of serious traps that cost next to nothing to find.

    It looks at dtypes and diagonals, and at the groups of the optimizer. Names are worked out only if there is
    something to say.

    Args:
        model: The module.
        optimizer: As for :func:`diagnose`.
    """
    places = held.held_by(optimizers_of(optimizer))
    if not any(_is_trapped(chain, places) for chain in _torch.all_parametrizations(model)):
        return
    inventory = take_inventory(model)
    found = [finding for record in inventory.parametrized for finding in _glance(record)]
    found += held.householder_and_others(inventory, places)
    serious = [finding for finding in found if finding.severity is Severity.SERIOUS]
    lines = [f"  - {finding}" for finding in serious[:SHOWN]]
    if len(serious) > SHOWN:
        lines.append(f"  - ... and {len(serious) - SHOWN} more (orthoserde.diagnose lists all)")
    if serious:
        warn("\n".join(["the model will not train as it should:", *lines]), TrainingTrapWarning)


def _is_trapped(chain: nn.Module, places: Mapping[int, list[held.Held]]) -> bool:
    """Whether there is something serious to say of a ParametrizationList."""
    links = list(_torch.child_modules(chain).values())
    if not any(map(state.is_orthogonal, links)):
        return False
    original = {**_torch.own_buffers(chain), **_torch.own_parameters(chain)}.get("original")
    found = list(state.at_a_glance("", links, original))
    if original is not None and state.is_orthogonal(links[0]):
        found += held.steps_of("", state.map_of(links[0]), places.get(id(original), ()))
    return any(finding.severity is Severity.SERIOUS for finding in found)
