"""Checkpoint -> nn.Module: plan, check everything, apply."""

from __future__ import annotations

import functools
from typing import get_args

import torch
from torch import nn

from orthoserde import _torch, modes
from orthoserde.arguments import device_of
from orthoserde.checkpoint import Checkpoint
from orthoserde.errors import ConfigError, LegacyCheckpointWarning, TrainingTrapWarning, warn
from orthoserde.manifest.training import TrainingRecord
from orthoserde.parametrizations.structured import Orthogonal
from orthoserde.registry import Registry
from orthoserde.registry.codec import current_config
from orthoserde.reports import Fidelity, LoadReport, TensorReport
from orthoserde.restore.apply import apply
from orthoserde.restore.baked import bake_bare
from orthoserde.restore.check import check_bases, check_digests, check_ties
from orthoserde.restore.forms import in_forms_of
from orthoserde.restore.legacy import Completed, Legacy, complete_checkpoint
from orthoserde.restore.plan import Outcome, Plan
from orthoserde.restore.planner import make_plan
from orthoserde.restore.refusal import Refusal
from orthoserde.training import NOTHING, Targets, plan_training
from orthoserde.transforms import expand
from orthoserde.walk import ParametrizedTensor, take_inventory
from orthoserde.weights import live
from orthoserde.wording import one_line, shorten


def restore(
    checkpoint: Checkpoint,
    model: nn.Module,
    registry: Registry,
    *,
    strict: bool = True,
    legacy: Legacy = "inference",
    reparametrize: bool = True,
    device: torch.device | str | None = None,
    verify: bool = True,
    training: Targets = NOTHING,
) -> LoadReport:
    """Load a checkpoint into a model, in place. The arguments are those of ``orthoserde.load``.

    Raises:
        IncompatibleModelError: The checkpoint does not fit; everything that is wrong is listed, nothing has changed.
        DamagedFileError: A digest does not match; nothing has changed.
        LoadInterruptedError: Reading failed after the first write.
    """
    where = device_of(device)
    if legacy not in get_args(Legacy):
        raise ConfigError(f"legacy: expected one of {', '.join(get_args(Legacy))}, got {legacy!r}")
    with modes.ordinary():
        with modes.generators_kept():  # modules are asked
            inventory = take_inventory(model)
        forms = in_forms_of(checkpoint, inventory, registry, verify=verify)
        baked = bake_bare(forms.checkpoint.without_training(), inventory, registry, legacy)
        with modes.generators_kept():  # classes of the user are asked and made
            completed = complete_checkpoint(expand(baked.checkpoint), inventory, registry, legacy)
            plan = make_plan(
                completed.checkpoint.manifest,
                inventory,
                registry,
                strict=strict,
                reparametrize=reparametrize,
                device=where,
                computed={name: weight.action for name, weight in completed.weights.items()},
            )
        refusal = Refusal(checkpoint, model, inventory.slots, strict)
        # What the walk has told may be why something could not be brought into form.
        found = [*forms.problems, *baked.problems, *completed.problems, *plan.problems]
        plan.problems[:] = dict.fromkeys(found)
        forms.note(plan)
        baked.note(plan, inventory.slots)
        afresh = [outcome.name for outcome in plan.outcomes if outcome.fidelity is Fidelity.INFERENCE]
        wanted = plan_training(forms.checkpoint.manifest, checkpoint.origin, training, plan.parameters, afresh)
        plan.problems += wanted.problems
        refusal.check(plan)
        if verify and not forms.checked:
            check_digests(checkpoint)
        check_bases(completed.checkpoint, plan)
        refusal.check(plan)
        check_ties(completed.checkpoint, plan)
        plan.problems += filter(None, (weight.check(legacy) for weight in completed.weights.values()))
        refusal.check(plan)
        _warn(checkpoint, completed, plan)
        baked.warn()
        wanted.read(checkpoint, verify=verify)
        digests = completed.checkpoint.manifest.digests if verify else {}
        apply(completed.checkpoint, plan, digests, wanted.apply)
        with modes.generators_kept():  # modules are asked once more
            _settle(plan, registry)
    wanted.finish()
    for outcome in plan.outcomes:
        if outcome.name in completed.weights:
            outcome.action = completed.weights[outcome.name].action
    reports = {outcome.name: _report(outcome, registry) for outcome in plan.outcomes}
    return LoadReport(
        path=checkpoint.origin,
        missing_keys=plan.missing,
        unexpected_keys=plan.unexpected,
        tensors=reports,
        fidelity=min([plan.fidelity, *(report.fidelity for report in reports.values())]),
        loaded=len(plan.writes) + len(plan.makes),
        notes=(
            *plan.notes,
            *_scope_notes(checkpoint),
            *_training_notes(checkpoint, training),
            *wanted.notes,
            *checkpoint.notes,
        ),
        state=wanted.values,
        training=wanted.summary,
    )


def _settle(plan: Plan, registry: Registry) -> None:
    """Work out what follows from the state that was loaded.

    Structured parametrizations would do it when they are first used, but compiled code does not; and modules with hooks
    have the weight of their last forward as an attribute until the next one.
    """
    for outcome in plan.outcomes:
        chain = _torch.parametrization_lists(outcome.module).get(outcome.tensor_name)
        for link in () if chain is None else map(_torch.unwrap, _torch.child_modules(chain).values()):
            if isinstance(link, Orthogonal):
                link.settle()
        for tensor in take_inventory(outcome.module).hooked if chain is None else ():
            if tensor.module is not outcome.module or tensor.tensor_name != outcome.tensor_name:
                continue
            if tensor.tensor_name in vars(outcome.module):
                _settle_hook(tensor, plan, registry)


def _settle_hook(tensor: ParametrizedTensor, plan: Plan, registry: Registry) -> None:
    """Give a module the weight that its hook would compute in evaluation mode."""
    try:
        vars(tensor.module)[tensor.tensor_name] = live.computed(tensor, registry)
    except RuntimeError as error:  # torch has no such operation for these dtypes, nor will the hook have
        plan.notes.append(f"{tensor.name}: its state is loaded, and its weight cannot be computed: {one_line(error)}")


def _scope_notes(checkpoint: Checkpoint) -> list[str]:
    """What a file that holds a selection cannot know."""
    count = len(checkpoint.manifest.left_out)
    if not count:
        return []
    return [f"{count} tensors were left out when it was saved and not compared: they must be what they were then"]


def _training_notes(checkpoint: Checkpoint, targets: Targets) -> list[str]:
    """What training state the file has and nobody asked for: whoever trains on without it starts another run."""
    training = checkpoint.manifest.training
    if training is None:
        return []
    left = TrainingRecord(
        optimizers={label: each for label, each in training.optimizers.items() if label not in targets.optimizers},
        state={name: each for name, each in training.state.items() if name not in targets.state},
        rng=None if targets.rng else training.rng,
    )
    return [f"in the file, and not asked for: {left}"] if str(left) else []


def build_model(checkpoint: Checkpoint, registry: Registry, device: torch.device | str | None) -> nn.Module:
    """Make the registered root of a checkpoint and load it; see ``orthoserde.build``.

    Raises:
        ConfigError: The root is not registered, there or here, or its class does not take the configuration.
        IncompatibleModelError: The class makes a model that does not fit.
    """
    where = device_of(device)
    checkpoint = checkpoint.without_training()
    if checkpoint.manifest.left_out:
        checkpoint = _adapter_alone(checkpoint)
    root = next((record for record in checkpoint.manifest.modules if record.path == ""), None)
    if root is None:
        raise ConfigError(
            f"{checkpoint.origin}: does not say how its model was made, because the class was not registered when it "
            "was saved; make the model yourself and use load"
        )
    codec = registry.for_kind(root.kind)
    if codec is None:
        raise ConfigError(
            f"{checkpoint.origin}: {root.kind} is not registered in this process; register the class first, or make "
            "the model yourself and use load"
        )
    with modes.undisturbed():
        config = current_config(codec, root.config, root.version)
        if config is None:
            raise ConfigError(
                f"{checkpoint.origin}: does not have the arguments of {root.kind}, for they were not JSON; make the "
                "model yourself and use load (or give the class get_config and from_config, and save again)"
            )
        model = codec.build(config, torch.empty(0, device=where))
    restore(checkpoint, model, registry, device=where)
    return model


def _adapter_alone(checkpoint: Checkpoint) -> Checkpoint:
    """The part of a selection that can be built: a registered module below which all of its tensors are.

    Raises:
        ConfigError: There is none, or that part is itself a selection.
    """
    manifest = checkpoint.manifest
    keys = [*manifest.tensors, *manifest.aliases]
    for record in sorted(manifest.modules, key=lambda record: len(record.path)):
        prefix = f"{record.path}."
        if record.path and all(key.startswith(prefix) for key in keys):
            if any(key.startswith(prefix) for key in manifest.left_out):
                break
            return checkpoint.below(record.path)
    raise ConfigError(
        f"{checkpoint.origin}: holds a selection of the tensors of its model ({len(manifest.left_out)} were left out); "
        "make the model yourself and use load"
    )


def _warn(checkpoint: Checkpoint, completed: Completed, plan: Plan) -> None:
    if plan.rounded:
        dtypes = " and ".join(sorted(set(plan.rounded.values())))
        records = completed.checkpoint.manifest.parametrized
        chained = any(len(r.chain) > 1 and not plan.rounded.keys().isdisjoint(r.tensor_keys()) for r in records)
        otherwise = ", or save this model, convert that file to baked, and load the result with legacy='project'"
        warn(
            f"the model will not train as it should: {checkpoint.origin} has {shorten(list(plan.rounded))} in {dtypes},"
            " which has rounded it off orthogonality, and no weight that training reaches from there is orthogonal; "
            f"load a checkpoint that was saved in float32{'' if chained else otherwise}",
            TrainingTrapWarning,
        )
    if completed.weights:
        projected = [name for name, weight in completed.weights.items() if weight.projected]
        kept = [name for name, weight in completed.weights.items() if weight.kept]
        outputs = f"projecting changed {shorten(projected)}" if projected else "outputs are equal"
        if kept:
            outputs += f", {shorten(kept)} stays off its constraint"
        warn(
            f"{checkpoint.origin} has only the computed weight of {shorten(list(completed.weights))}: {outputs}, and "
            "training starts afresh there, in new coordinates; start with a new optimizer state",
            LegacyCheckpointWarning,
        )


def _report(outcome: Outcome, registry: Registry) -> TensorReport:
    measure = functools.partial(_residual, outcome.module, outcome.tensor_name, registry)
    return TensorReport(outcome.name, outcome.fidelity, outcome.action, measure)


def _residual(module: nn.Module, tensor_name: str, registry: Registry) -> float | None:
    inventory = take_inventory(module)
    for tensor in (*inventory.parametrized, *inventory.hooked):
        if tensor.module is module and tensor.tensor_name == tensor_name:
            return live.residual(tensor, registry)
    return None


__all__ = ["Legacy", "build_model", "restore"]
