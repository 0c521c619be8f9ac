"""Train LoReFT with pyreft, stop halfway, resume in a new process, and compare three runs step by step.

The base model is a small GPT-2 with random weights, so nothing is downloaded; the interventions are pyreft's own. The
task is to continue rows of counting numbers. All runs see the same batches and the same dropout:

- ``uninterrupted`` trains from the first step to the last;
- ``orthoserde`` is a new process that loads what ``orthoserde.save`` wrote halfway;
- ``pyreft`` is a new process that loads what ``ReftModel.save`` wrote halfway, with the loader of pyreft's own class.

It takes about a minute on a CPU. pyreft 0.1.0 and pyvene 0.1.8 must be installed without their dependencies, and
transformers beside them; ``nox -s pyreft`` does so. ``python docs/examples/pyreft_resume.py``
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import pyreft
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import orthoserde
from orthoserde.integrations.pyreft import write

RUNS = ("uninterrupted", "orthoserde", "pyreft")
LAYERS = (1, 3)
WIDTH, RANK = 256, 4
VOCABULARY, LENGTH, BATCH_SIZE = 97, 12, 16
LEARNING_RATE = 0.01
ROUNDING = 1e-5  # a larger orthogonality error than this is not one of float32 arithmetic here


@dataclass
class Run:
    """What a run measured: one value per step, taken before the step changes the weights."""

    losses: list[float]
    errors: list[float]  # of orthogonality


def make(seed: int) -> tuple[pyreft.ReftModel, torch.optim.Optimizer]:
    """Return the ReftModel and its optimizer. The base model is always the same, the interventions are the seed's."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=WIDTH, n_layer=4, n_head=4, vocab_size=VOCABULARY, n_positions=LENGTH, bos_token_id=0, eos_token_id=0
    )
    base = GPT2LMHeadModel(config)
    torch.manual_seed(seed)
    representations = [
        {
            "layer": layer,
            "component": "block_output",
            "low_rank_dimension": RANK,
            "intervention": pyreft.LoreftIntervention(
                embed_dim=WIDTH, low_rank_dimension=RANK, dropout=0.05, act_fn="relu", dtype=torch.float32
            ),
        }
        for layer in LAYERS
    ]
    model = pyreft.get_reft_model(base, pyreft.ReftConfig(representations=representations))
    return model, torch.optim.Adam(model.get_trainable_parameters(), lr=LEARNING_RATE)


@torch.no_grad()
def orthogonality_error(model: pyreft.ReftModel) -> float:
    """Return max |R^T R - I| over the interventions."""
    weights: list[Tensor] = [each.rotate_layer.weight for each in model.interventions.values()]
    return max((R.mT @ R - torch.eye(RANK)).abs().max().item() for R in weights)


def train(model: pyreft.ReftModel, optimizer: torch.optim.Optimizer, steps: range) -> Run:
    run = Run([], [])
    everywhere = [[list(range(LENGTH))] * BATCH_SIZE] * len(LAYERS)
    for step in steps:
        # Batch and dropout depend on the step alone, so all runs see the same ones.
        torch.manual_seed(1_000 + step)
        start, stride = torch.randint(VOCABULARY, (2, BATCH_SIZE, 1))
        tokens = (start + stride * torch.arange(LENGTH)) % VOCABULARY
        _, output = model({"input_ids": tokens}, unit_locations={"sources->base": (None, everywhere)}, labels=tokens)
        run.losses.append(output.loss.item())
        run.errors.append(orthogonality_error(model))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    return run


def run_uninterrupted(folder: Path, steps: int) -> Run:
    """Train from the first step to the last; halfway, save to ``folder`` what the other runs resume from."""
    model, optimizer = make(seed=1)
    first = train(model, optimizer, range(steps // 2))

    orthoserde.save(model, folder / "loreft.safetensors")  # the model alone, for its size
    orthoserde.save(model, folder / "run.safetensors", optimizer=optimizer)
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    model.save(str(folder / "pyreft"))
    write(model, folder / "full", form="full")  # the form of pyreft's pull request 179, for its size

    second = train(model, optimizer, range(steps // 2, steps))
    return Run(first.losses + second.losses, first.errors + second.errors)


def run_resumed(name: str, folder: Path, steps: int) -> Run:
    """Resume from ``folder``; the interventions start from another seed."""
    model, optimizer = make(seed=2)
    if name == "orthoserde":
        orthoserde.load(model, folder / "run.safetensors", optimizer=optimizer)
    else:
        for key, intervention in model.interventions.items():  # as ReftModel.load does, but with our arguments
            intervention.load_state_dict(torch.load(folder / "pyreft" / f"intkey_{key}.bin"))
        # That made new rotations, so the optimizer that was there before would train the old ones.
        optimizer = torch.optim.Adam(model.get_trainable_parameters(), lr=LEARNING_RATE)
        optimizer.load_state_dict(torch.load(folder / "optimizer.pt"))
    return train(model, optimizer, range(steps // 2, steps))


def resume_in_new_process(name: str, folder: Path, steps: int) -> Run:
    command = [sys.executable, __file__, "--resume", name, "--keep", str(folder), "--steps", str(steps)]
    subprocess.run(command, check=True)
    return Run(**json.loads((folder / f"{name}.json").read_text(encoding="utf-8")))


def size(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    return sum(each.stat().st_size for each in ([path] if path.is_file() else path.iterdir()))


def show(runs: dict[str, Run], folder: Path, steps: int) -> bool:
    """Print the table, and return whether the run that orthoserde resumed is the uninterrupted one."""
    half = steps // 2
    print(f"{'':6}{'loss':>15}{'':30}{'orthogonality error':>25}")
    print(f"{'step':>6}" + "".join(f"{name:>15}" for name in 2 * RUNS))
    for step in sorted({max(half - 1, 0), half, half + 1, half + 3, half + 10, steps - 1} & set(range(steps))):
        if step == half:
            print(" interrupted ".center(96, "-"))
        back = step - steps
        losses = [f"{run.losses[back]:.9g}" if -back <= len(run.losses) else "-" for run in runs.values()]
        errors = [f"{run.errors[back]:.1e}" if -back <= len(run.errors) else "-" for run in runs.values()]
        print(f"{step:6}" + "".join(f"{cell:>15}" for cell in losses + errors))
    same = runs["orthoserde"].losses == runs["uninterrupted"].losses[half:]
    same &= runs["orthoserde"].errors == runs["uninterrupted"].errors[half:]
    print(f"\nbit-identical: {'yes' if same else 'no'} (orthoserde and uninterrupted, each resumed step)")
    ends = (f"{name} {'kept' if run.errors[-1] < ROUNDING else 'left'}" for name, run in runs.items())
    print(f"constraint at the end: {', '.join(ends)}")
    print(f"bytes of {len(LAYERS)} interventions, {WIDTH} x {RANK}:")
    for label, name in (
        ("pyreft's folder (computed weights, cannot be resumed)", "pyreft"),
        ("pull request 179 (dense bases)", "full"),
        ("orthoserde (dense bases, configuration, digests)", "loreft.safetensors"),
    ):
        print(f"{size(folder / name):>10}  {label}")
    return same


def compare(folder: Path, steps: int) -> int:
    """Do the three runs, show them, and return the exit code."""
    runs = {"uninterrupted": run_uninterrupted(folder, steps)}
    for name in RUNS[1:]:
        runs[name] = resume_in_new_process(name, folder, steps)
    return 0 if show(runs, folder, steps) else 1


def main() -> int:
    parser = argparse.ArgumentParser(description="Train LoReFT, stop, resume from a checkpoint, and compare.")
    parser.add_argument("--steps", type=int, default=80, help="training steps; half of them before the interruption")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the checkpoints here (by default: nowhere)")
    parser.add_argument("--resume", choices=RUNS[1:], help=argparse.SUPPRESS)  # what the new processes are started with
    arguments = parser.parse_args()
    if arguments.steps < 2:
        parser.error("--steps must be at least 2")
    torch.set_num_threads(1)  # in every process: sums over several threads may round differently
    if arguments.resume:
        run = run_resumed(arguments.resume, arguments.keep, arguments.steps)
        (arguments.keep / f"{arguments.resume}.json").write_text(json.dumps(asdict(run)), encoding="utf-8")
        return 0
    if arguments.keep:
        arguments.keep.mkdir(parents=True, exist_ok=True)
        return compare(arguments.keep, arguments.steps)
    with tempfile.TemporaryDirectory() as folder:
        return compare(Path(folder), arguments.steps)


if __name__ == "__main__":
    sys.exit(main())
