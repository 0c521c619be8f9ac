"""Train on handwritten digits, stop halfway, resume in a new process, and compare three runs step by step.

The network has an orthogonal layer for each of torch's three maps and a layer with spectral norm. The data are the
digits that come with scikit-learn. All runs see the same batches:

- ``uninterrupted`` trains from the first step to the last;
- ``orthoserde`` is a new process that loads what ``orthoserde.save`` wrote halfway;
- ``weights-only`` is a new process that loads the computed weights, as pyreft does.

It takes less than a minute on a CPU, offline: ``python docs/examples/resume_digits.py``
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import orthogonal, spectral_norm

import orthoserde

RUNS = ("uninterrupted", "orthoserde", "weights-only")
ORTHOGONAL = ("householder", "cayley", "matrix_exp")
ROUNDING = 1e-5  # a larger orthogonality error than this is not one of float32 arithmetic here
BATCH_SIZE = 128
LEARNING_RATE = 0.01


class Network(nn.Module):
    """A classifier of 8 x 8 images. No orthogonal weight is square, so the base of each has a random completion."""

    def __init__(self) -> None:
        super().__init__()
        self.householder = orthogonal(nn.Linear(64, 128), orthogonal_map="householder")
        self.cayley = orthogonal(nn.Linear(128, 48), orthogonal_map="cayley")
        self.matrix_exp = orthogonal(nn.Linear(48, 32), orthogonal_map="matrix_exp")
        self.spectral = spectral_norm(nn.Linear(32, 32))
        self.head = nn.Linear(32, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits, (batch, 10), of images, (batch, 64)."""
        hidden = images
        for layer in (self.householder, self.cayley, self.matrix_exp, self.spectral):
            hidden = F.relu(layer(hidden))
        logits: Tensor = self.head(hidden)
        return logits


@dataclass(frozen=True)
class Data:
    """Images, (samples, 64), and the digits that they show, (samples,)."""

    images: Tensor
    digits: Tensor


@dataclass
class Run:
    """What a run measured. The histories have one value per step, taken before the step changes the weights."""

    losses: list[float]
    errors: list[float]  # of orthogonality
    accuracy: float = 0.0  # on the test data, after the last step
    digest: str = ""  # of every tensor of the model, after the last step


def load_data() -> tuple[Data, Data]:
    """Return the training data and the test data, which is every fifth sample."""
    bunch = load_digits()
    images = torch.tensor(bunch.data / 16, dtype=torch.float32)
    digits = torch.tensor(bunch.target)
    test = torch.arange(len(digits)) % 5 == 0
    return Data(images[~test], digits[~test]), Data(images[test], digits[test])


def make(seed: int) -> tuple[Network, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = Network()
    return model, torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)


def tall_weight(model: Network, name: str) -> Tensor:
    """Return an orthogonal layer's weight with its longer side first, (n, k), so that its columns are orthonormal."""
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    return layer.weight if layer.out_features > layer.in_features else layer.weight.mT


@torch.no_grad()
def orthogonality_error(model: Network) -> float:
    """Return max |Q^T Q - I| over the orthogonal layers."""
    weights = [tall_weight(model, name) for name in ORTHOGONAL]
    return max((Q.mT @ Q - torch.eye(Q.shape[1])).abs().max().item() for Q in weights)


def train(model: Network, optimizer: torch.optim.Optimizer, data: Data, steps: range) -> Run:
    run = Run([], [])
    for step in steps:
        # The batch depends on the step alone, so all runs see the same ones.
        generator = torch.Generator().manual_seed(step)
        batch = torch.randint(len(data.digits), (BATCH_SIZE,), generator=generator)
        loss = F.cross_entropy(model(data.images[batch]), data.digits[batch])
        run.losses.append(loss.item())
        run.errors.append(orthogonality_error(model))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return run


@torch.no_grad()
def evaluate(run: Run, model: Network, data: Data) -> None:
    tensors = (tensor.numpy().tobytes() for tensor in model.state_dict().values())
    run.digest = hashlib.sha256(b"".join(tensors)).hexdigest()
    run.accuracy = (model.eval()(data.images).argmax(dim=1) == data.digits).double().mean().item()


def save_computed_weights(model: Network, path: Path) -> None:
    """Save the orthogonal weights themselves, without what they are computed from, and all else as it is."""
    state = model.state_dict()
    for name in ORTHOGONAL:
        del state[f"{name}.parametrizations.weight.original"], state[f"{name}.parametrizations.weight.0.base"]
        state[f"{name}.weight"] = tall_weight(model, name).detach()
    torch.save(state, path)


def load_computed_weights(model: Network, path: Path) -> None:
    """Load them as pyreft 0.1.0 does: into the first columns of a new base, whose other columns stay as they are."""
    state = torch.load(path, weights_only=True)
    for name in ORTHOGONAL:
        weight = state.pop(f"{name}.weight")
        base = model.get_buffer(f"{name}.parametrizations.weight.0.base")
        base[:, : weight.shape[1]] = weight
    model.load_state_dict(state, strict=False)


def run_uninterrupted(folder: Path, steps: int) -> Run:
    """Train from the first step to the last; halfway, save to ``folder`` what the other runs resume from."""
    training, test = load_data()
    model, optimizer = make(seed=0)
    first = train(model, optimizer, training, range(steps // 2))

    orthoserde.save(model, folder / "model.safetensors", optimizer=optimizer)
    save_computed_weights(model, folder / "weights-only.pt")
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")

    second = train(model, optimizer, training, range(steps // 2, steps))
    run = Run(first.losses + second.losses, first.errors + second.errors)
    evaluate(run, model, test)
    return run


def run_resumed(name: str, folder: Path, steps: int) -> Run:
    """Resume from ``folder``: the model starts from another seed, and the optimizer is there before the load."""
    training, test = load_data()
    model, optimizer = make(seed=1)
    if name == "orthoserde":
        orthoserde.load(model, folder / "model.safetensors", optimizer=optimizer)
    else:
        load_computed_weights(model, folder / "weights-only.pt")
        optimizer.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))

    run = train(model, optimizer, training, range(steps // 2, steps))
    evaluate(run, model, test)
    return run


def resume_in_new_process(name: str, folder: Path, steps: int) -> Run:
    command = [sys.executable, __file__, "--resume", name, "--keep", str(folder), "--steps", str(steps)]
    subprocess.run(command, check=True)
    return Run(**json.loads((folder / f"{name}.json").read_text(encoding="utf-8")))


def first_difference(whole: Run, resumed: Run) -> str | None:
    """Say where a resumed run first differs from the end of the whole one, or return None."""
    for back in range(-len(resumed.losses), 0):  # counted from the end, so that a step has one index in both
        expected = whole.losses[back], whole.errors[back]
        got = resumed.losses[back], resumed.errors[back]
        if got != expected:
            step = len(whole.losses) + back
            return f"at step {step}: expected loss and orthogonality error {expected}, got {got}"
    return None if resumed.digest == whole.digest else "after the last step: the tensors of the model differ"


def print_headline(steps: int) -> None:
    print(
        f"A network with orthogonal layers learns handwritten digits for {steps} steps: uninterrupted, resumed\n"
        f"at step {steps // 2} in a new process with orthoserde, and resumed likewise from the computed weights\n"
        "only, as pyreft does. Where the orthogonality error, max |Q^T Q - I|, is above rounding level (about\n"
        "1e-6), the layers are orthogonal no more: that is another model, and its loss, higher or lower, does\n"
        "not compare.\n"
    )


def print_table(runs: dict[str, Run], steps: int) -> None:
    def row(back: int) -> str:
        # Nine significant digits tell any two float32 numbers apart.
        losses = [f"{run.losses[back]:.9g}" if -back <= len(run.losses) else "-" for run in runs.values()]
        errors = [f"{run.errors[back]:.1e}" if -back <= len(run.errors) else "-" for run in runs.values()]
        return "".join(f"{cell:>15}" for cell in losses + errors)

    half = steps // 2
    around = [half + offset for offset in (-2, -1, 0, 1, 2, 3, 5, 10, 20, 50, 100)]
    print(f"{'':6}{'loss':>15}{'':30}{'orthogonality error':>25}")
    print(f"{'step':>6}" + "".join(f"{name:>15}" for name in 2 * RUNS))
    for step in [*(step for step in around if 0 <= step < steps - 1), steps - 1]:
        if step == half:
            print(" interrupted ".center(96, "-"))
        print(f"{step:6}{row(step - steps)}")


def print_verdicts(runs: dict[str, Run], difference: str | None) -> None:
    def constraint(run: Run) -> str:
        return f"{'kept' if run.errors[-1] < ROUNDING else 'left'} ({run.errors[-1]:.1e})"

    verdict = "no" if difference else "yes"
    print(f"\nbit-identical: {verdict} (orthoserde and uninterrupted: each resumed step, and the final model)")
    print("constraint at the end: " + ", ".join(f"{name} {constraint(run)}" for name, run in runs.items()))
    print("test accuracy at the end: " + ", ".join(f"{name} {run.accuracy:.1%}" for name, run in runs.items()))


def plot(runs: dict[str, Run], steps: int, path: Path) -> None:
    figure = Figure(figsize=(8, 6), layout="constrained")
    loss, error = figure.subplots(2, 1, sharex=True)
    # Colours of the Okabe-Ito palette. The thin dashes lie on the wide line, so that both can be seen where they agree.
    styles = (
        {"label": "uninterrupted", "color": "#56B4E9", "linewidth": 4.0},
        {"label": "resumed with orthoserde", "color": "#000000", "linewidth": 1.2, "linestyle": "--"},
        {"label": "resumed from computed weights only", "color": "#D55E00", "linewidth": 1.5},
    )
    for run, style in zip(runs.values(), styles, strict=True):
        first = steps - len(run.losses)
        loss.plot(range(first, steps), run.losses, **style)
        error.plot(range(first, steps), run.errors, **style)
    for axes in (loss, error):
        axes.axvline(steps // 2, color="#666666", linestyle=":")
        axes.grid(alpha=0.3)
    place = {"xycoords": ("data", "axes fraction"), "xytext": (-6, 0), "textcoords": "offset points"}
    loss.annotate("interrupted", (steps // 2, 0.95), horizontalalignment="right", verticalalignment="top", **place)
    loss.set_ylabel("training loss")
    loss.legend()
    error.set_ylabel("orthogonality error")
    error.set_yscale("log")
    error.set_xlabel("step")
    figure.suptitle("Handwritten digits, a network with orthogonal layers, interrupted and resumed")
    figure.savefig(path, dpi=150)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train on digits, stop, resume from a checkpoint, and compare.")
    parser.add_argument("--steps", type=int, default=400, help="training steps; half of them before the interruption")
    parser.add_argument("--output", type=Path, default=Path("resume_digits.png"), help="the plot (%(default)s)")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the checkpoints here (by default: nowhere)")
    parser.add_argument("--resume", choices=RUNS[1:], help=argparse.SUPPRESS)  # what the new processes are started with
    arguments = parser.parse_args()
    if arguments.steps < 2:
        parser.error("--steps must be at least 2")
    return arguments


def compare(folder: Path, steps: int, output: Path) -> int:
    """Do the three runs, show them, and return the exit code."""
    runs = {"uninterrupted": run_uninterrupted(folder, steps)}
    for name in RUNS[1:]:
        runs[name] = resume_in_new_process(name, folder, steps)
    difference = first_difference(runs["uninterrupted"], runs["orthoserde"])

    print_headline(steps)
    print_table(runs, steps)
    print_verdicts(runs, difference)
    plot(runs, steps, output)
    print(f"plot: {output}")
    if difference:
        print(f"error: the run resumed with orthoserde differs {difference}", file=sys.stderr)
        return 1
    return 0


def main() -> int:
    arguments = parse_arguments()
    torch.set_num_threads(1)  # in every process: sums over several threads may round differently
    if arguments.resume:
        run = run_resumed(arguments.resume, arguments.keep, arguments.steps)
        (arguments.keep / f"{arguments.resume}.json").write_text(json.dumps(asdict(run)), encoding="utf-8")
        return 0
    if arguments.keep:
        arguments.keep.mkdir(parents=True, exist_ok=True)
        return compare(arguments.keep, arguments.steps, arguments.output)
    with tempfile.TemporaryDirectory() as folder:
        return compare(Path(folder), arguments.steps, arguments.output)


if __name__ == "__main__":
    sys.exit(main())
