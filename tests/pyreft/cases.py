"""Training runs with real pyreft, and their second process: ``python -m tests.pyreft.cases FOLDER``."""

from __future__ import annotations

import contextlib
import io
import logging
import random
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import pyreft
import pyvene
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import orthoserde
from orthoserde.integrations.pyreft import write
from tests.helpers import bits, slots_of
from tests.pyreft import elsewhere, interventions

WIDTH, RANK, VOCABULARY, LENGTH, BATCH = 8, 3, 16, 10, 2
STEPS_BEFORE, STEPS_AFTER = 4, 20
BASE_SEED, FIRST_SEED, SECOND_SEED = 7, 1, 2
CHILD_RESULTS = "child.pt"

#: How state gets from the first process to the second: our file, a folder of ours, a folder that pyreft wrote itself.
ROUTES = ("file", "full", "real")

Representations = list[dict[str, Any]]


def gpt2() -> nn.Module:
    """A tiny GPT-2, with the same weights in every process."""
    torch.manual_seed(BASE_SEED)
    sizes = {"n_embd": WIDTH, "n_layer": 3, "n_head": 2, "vocab_size": VOCABULARY, "n_positions": 16}
    model: nn.Module = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=1))
    return model


def llama() -> nn.Module:
    """A tiny Llama."""
    torch.manual_seed(BASE_SEED)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 16, "num_hidden_layers": 3, "vocab_size": VOCABULARY}
    config = LlamaConfig(
        **sizes, num_attention_heads=2, num_key_value_heads=2, bos_token_id=0, eos_token_id=1, pad_token_id=0
    )
    model: nn.Module = LlamaForCausalLM(config)
    return model


def half_gpt2() -> nn.Module:
    """A tiny GPT-2 in bfloat16, as pyreft's own examples have their base models."""
    return gpt2().bfloat16()


class Holder(nn.Module):
    """A module of the user's around a ReftModel."""

    def __init__(self, reft: nn.Module) -> None:
        super().__init__()
        self.reft = reft
        self.head = nn.Linear(VOCABULARY, 2)


@dataclass(frozen=True)
class Case:
    """One training run.

    Attributes:
        name: The test's id.
        representations: Makes the interventions, from the global seed.
        base: Makes the base model.
        sources: Whether the interventions want a source.
        optimizer: A key of ``OPTIMIZERS``.
        prepare: What is done to the model before the optimizer is built.
        reft: Whether it is a ReftModel, or pyvene's own class.
        holder: Whether a module of the user's is around it.
        second: Makes the interventions in the second process; None for the same.
        exact: Whether a folder in its full form says all that there is to check.
        real: Whether a folder that pyreft writes itself holds the whole state.
    """

    name: str
    representations: Callable[[], Representations]
    base: Callable[[], nn.Module] = gpt2
    sources: bool = False
    optimizer: str = "adam"
    prepare: Callable[[nn.Module], object] = lambda model: None
    reft: bool = True
    holder: bool = False
    second: Callable[[], Representations] | None = None
    exact: bool = True
    real: bool = False

    @property
    def routes(self) -> tuple[str, ...]:
        """Those of ``ROUTES`` by which all of its state goes; folders hold nothing of a holder's own."""
        return ROUTES[:1] if self.holder else ROUTES if self.real else ROUTES[:2]


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=1e-2),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=1e-2, momentum=0.9),
}


def each(
    cls: Callable[..., nn.Module], layers: Iterable[int] = (0, 2), component: str = "block_output", **arguments: Any
) -> Callable[[], Representations]:
    """Representations with one intervention of a class in each of these layers."""
    link = {"intervention_link_key": arguments.pop("link")} if "link" in arguments else {}
    rank = arguments.pop("rank", RANK)
    where = [component.format(layer) for layer in layers]

    def make() -> Representations:
        return [
            {
                "layer": layer,
                "component": name,
                "low_rank_dimension": rank,
                "intervention": cls(embed_dim=WIDTH, low_rank_dimension=rank, **arguments),
                **link,
            }
            for layer, name in zip(layers, where, strict=True)
        ]

    return make


def of_type(cls: type[nn.Module], layers: Iterable[int] = (0, 2), **fields: Any) -> Callable[[], Representations]:
    """Representations that name a class, and leave it to pyvene to make it."""
    return lambda: [
        {"layer": layer, "component": "block_output", "intervention_type": cls, **fields} for layer in layers
    ]


def together(*parts: Callable[[], Representations]) -> Callable[[], Representations]:
    """All of these."""
    return lambda: [representation for part in parts for representation in part()]


#: pyreft makes ``learned_source`` in bfloat16 if it is not told otherwise.
FULL: dict[str, Any] = {"dropout": 0.1, "act_fn": "relu", "dtype": torch.float32}
UNROTATED = {**FULL, "add_bias": True}


def train_base(model: nn.Module) -> None:
    """Thaw one block and the (tied) embeddings of the base model, in training mode, so with its dropout too."""
    part = model.get_submodule("model")
    for path in ("transformer.wte", "transformer.h.1"):
        part.get_submodule(path).requires_grad_(True)
    part.train()


CASES: dict[str, Case] = {
    case.name: case
    for case in (
        Case("loreft", each(pyreft.LoreftIntervention, **FULL)),
        Case("loreft-sgd", each(pyreft.LoreftIntervention, **FULL), optimizer="sgd"),
        Case("loreft-square", each(pyreft.LoreftIntervention, rank=WIDTH, **FULL)),
        Case("loreft-bfloat16", each(pyreft.LoreftIntervention, dropout=0.1), base=half_gpt2),
        Case("loreft-llama", each(pyreft.LoreftIntervention, **FULL), base=llama),
        Case("loreft-linked", each(pyreft.LoreftIntervention, link=0, **FULL)),
        Case("loreft-first-and-last", each(pyreft.LoreftIntervention, layers=(1, 1), **FULL)),
        Case("loreft-string", each(pyreft.LoreftIntervention, component="transformer.h[{}].output", **FULL)),
        Case("loreft-base", each(pyreft.LoreftIntervention, **FULL), prepare=train_base),
        Case("loreft-holder", each(pyreft.LoreftIntervention, **FULL), holder=True),
        Case("loreft-pyvene", each(pyreft.LoreftIntervention, **FULL), reft=False),
        Case("subclass", each(interventions.Gated, **FULL), exact=False),
        Case(
            "subclass-elsewhere",
            each(interventions.Gated, **FULL),
            second=each(elsewhere.Gated, **FULL),
            exact=False,
        ),
        Case("subclass-consreft", each(interventions.Normed), exact=False, real=True),
        Case("consreft", each(pyreft.ConsreftIntervention), real=True),
        Case("lobireft", each(pyreft.LobireftIntervention, dropout=0.1), real=True),
        Case("direft", each(pyreft.DireftIntervention, **FULL), real=True),
        Case("direft-bfloat16", each(pyreft.DireftIntervention, dropout=0.1, act_fn="gelu"), real=True),
        Case("noreft", each(pyreft.NoreftIntervention, **UNROTATED), real=True),
        Case("nodireft", each(pyreft.NodireftIntervention, **UNROTATED), real=True),
        Case("rotated", of_type(pyvene.RotatedSpaceIntervention), sources=True, real=True),
        Case("boundless", of_type(pyvene.BoundlessRotatedSpaceIntervention), sources=True, real=True, reft=False),
        Case("sigmoid-mask", of_type(pyvene.SigmoidMaskRotatedSpaceIntervention), sources=True, real=True),
        Case(
            "low-rank",
            of_type(pyvene.LowRankRotatedSpaceIntervention, low_rank_dimension=RANK),
            sources=True,
            real=True,
            optimizer="sgd",
        ),
        Case(
            "mixed",
            together(
                each(pyreft.LoreftIntervention, layers=(0,), **FULL),
                of_type(interventions.Shift, layers=(0,)),
                each(pyreft.ConsreftIntervention, layers=(2, 2)),
            ),
            sources=True,
        ),
    )
}


class Outcome(TypedDict):
    """What came of a case in one process.

    Attributes:
        error: A traceback, empty where all went well.
        losses: The loss of each step.
        tensors: Everything that training moves, by name.
        disturbed: What a load should have left alone and did not (second process).
        differed_before: Whether the adapter held other values before the load (second process).
        fidelity: What the load reported (second process).
    """

    error: str
    losses: list[float]
    tensors: dict[str, Tensor]
    disturbed: list[str]
    differed_before: bool
    fidelity: str


def build(case: Case, seed: int = FIRST_SEED) -> nn.Module:
    """Make the model of a case; the base model is the same under every seed."""
    base = case.base()
    torch.manual_seed(seed)
    make = case.second if case.second is not None and seed == SECOND_SEED else case.representations
    model: nn.Module
    if case.reft:
        model = pyreft.get_reft_model(base, pyreft.ReftConfig(representations=make()))
    else:
        model = pyvene.IntervenableModel(pyvene.IntervenableConfig(make()), base)
    case.prepare(model)
    return Holder(model) if case.holder else model


def reft_of(model: nn.Module) -> Any:
    """The model of pyvene's, also where it is in a holder."""
    return model.reft if isinstance(model, Holder) else model


def interventions_of(model: nn.Module) -> dict[str, Any]:
    """Interventions by key."""
    return dict(reft_of(model).interventions.items())


def optimizer_of(case: Case, model: nn.Module) -> torch.optim.Optimizer:
    """An optimizer over what pyreft says is trained, each parameter once."""
    trained = reft_of(model).get_trainable_parameters()
    return OPTIMIZERS[case.optimizer](list({id(parameter): parameter for parameter in trained}.values()))


def train(case: Case, model: nn.Module, optimizer: torch.optim.Optimizer, steps: Iterable[int]) -> list[float]:
    """Train for some steps; return their losses. The data draw nothing from the global generator, dropout does."""
    losses: list[float] = []
    for step in steps:
        generator = torch.Generator().manual_seed(1000 + step)
        tokens, others = torch.randint(0, VOCABULARY, (2, BATCH, LENGTH), generator=generator)
        count = len(interventions_of(model))
        # pyvene flattens several positions into one vector where an intervention takes a source.
        places = [[[index] if case.sources else [index, LENGTH - 1 - index]] * BATCH for index in range(count)]
        inputs: dict[str, Any] = {"base": {"input_ids": tokens}, "unit_locations": {"sources->base": (None, places)}}
        if case.sources:
            inputs |= {
                "sources": [{"input_ids": others}] * count,
                "unit_locations": {"sources->base": (places, places)},
            }
        _, output = reft_of(model)(**inputs, labels=tokens)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append(output.loss.item())
    return losses


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Copies of all that training moves."""
    found = {f"model {key}": tensor for key, tensor in slots_of(model).items() if tensor is not None}
    states: Mapping[int, Mapping[str, object]] = optimizer.state_dict()["state"]
    found |= {f"optimizer {i}.{name}": torch.as_tensor(v) for i, state in states.items() for name, v in state.items()}
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def surroundings(model: nn.Module) -> dict[str, object]:
    """All that a load leaves alone."""
    slots = {key: tensor for key, tensor in slots_of(model).items() if tensor is not None}
    modules = dict(model.named_modules(remove_duplicate=False))
    name, keys, *rest = np.random.get_state()
    return {
        "ids": {key: id(tensor) for key, tensor in slots.items()},
        "strides": {key: tensor.stride() for key, tensor in slots.items()},
        "requires_grad": {key: tensor.requires_grad for key, tensor in slots.items()},
        "modes": {path: module.training for path, module in modules.items()},
        "classes": {path: type(module) for path, module in modules.items()},
        "hooks": {path: list(module._forward_hooks) for path, module in modules.items()},
        "torch generator": bits(torch.get_rng_state()),
        "random": random.getstate(),
        "numpy.random": (name, np.asarray(keys).tobytes(), *rest),
    }


def real_save(model: nn.Module, folder: Path, **options: Any) -> Path:
    """What pyreft itself writes; it prints where."""
    with contextlib.redirect_stdout(io.StringIO()):
        reft_of(model).save(str(folder), **options)
    return folder


def place(case: Case, route: str, folder: Path) -> Path:
    """Where the state of a case is between the processes."""
    return folder / (f"{case.name}.safetensors" if route == "file" else f"{case.name}-{route}")


def run_first(case: Case, folder: Path) -> Outcome:
    """Train, save in every way, and train on without a break."""
    model = build(case)
    optimizer = optimizer_of(case, model)
    train(case, model, optimizer, range(STEPS_BEFORE))
    before, state = surroundings(model), everything(model, optimizer)
    orthoserde.save(model, place(case, "file", folder))
    write(model, place(case, "full", folder), "full")
    after, same = surroundings(model), everything(model, optimizer)
    if case.real:
        real_save(model, place(case, "real", folder), include_model=True)
    rest = {"optimizer": optimizer.state_dict(), "generator": torch.get_rng_state()}
    torch.save(rest, folder / f"{case.name}.rest")
    disturbed = [aspect for aspect in before if before[aspect] != after[aspect]]
    disturbed += [name for name in state if not torch.equal(state[name], same[name])]
    outcome = _finish(case, model, optimizer)
    outcome["disturbed"] = disturbed
    return outcome


def run_second(case: Case, route: str, folder: Path) -> Outcome:
    """Start elsewhere with an optimizer, load, and train on."""
    model = build(case, SECOND_SEED)
    optimizer = optimizer_of(case, model)
    values, before = everything(model, optimizer), surroundings(model)
    report = orthoserde.load(model, place(case, route, folder))
    after, loaded = surroundings(model), everything(model, optimizer)
    rest = torch.load(folder / f"{case.name}.rest", weights_only=True)
    optimizer.load_state_dict(rest["optimizer"])
    torch.set_rng_state(rest["generator"])
    outcome = _finish(case, model, optimizer)
    outcome["disturbed"] = [aspect for aspect in before if before[aspect] != after[aspect]]
    outcome["differed_before"] = any(not torch.equal(values[name], loaded[name]) for name in values)
    outcome["fidelity"] = str(report.fidelity)
    return outcome


def _finish(case: Case, model: nn.Module, optimizer: torch.optim.Optimizer) -> Outcome:
    losses = train(case, model, optimizer, range(STEPS_BEFORE, STEPS_BEFORE + STEPS_AFTER))
    return Outcome(
        error="", losses=losses, tensors=everything(model, optimizer), disturbed=[], differed_before=False, fidelity=""
    )


def guarded(run: Callable[[], Outcome]) -> Outcome:
    """Run a case. What it raises becomes its ``error``, which its own test reports."""
    try:
        return run()
    except Exception:
        return Outcome(
            error=traceback.format_exc(), losses=[], tensors={}, disturbed=[], differed_before=False, fidelity=""
        )


def main() -> None:
    """Be the second process."""
    warnings.simplefilter("ignore")
    warnings.filterwarnings("error", category=orthoserde.LegacyCheckpointWarning)
    warnings.filterwarnings("error", module="orthoserde")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    outcomes = {
        f"{case.name} {route}": guarded(lambda case=case, route=route: run_second(case, route, folder))  # type: ignore[misc]
        for case in CASES.values()
        for route in case.routes
    }
    torch.save(outcomes, folder / CHILD_RESULTS)


if __name__ == "__main__":
    main()
