"""Does it matter to Adam how a base is completed? Handwritten digits, the canonical chart against random ones.

Run it with ``python -m tests.benchmarks.bench_charts``; it takes about twenty minutes on one core, and
``--maps householder --seeds 2`` a minute. Nothing in it is timed. scikit-learn has the data.

The network has the orthogonal layers of docs/examples/resume_digits.py, of which none is square, with one map for all
of them. For each seed there are runs that differ in one thing, the last n - k columns of each base: canonical, or one
of three random completions that torch made. The initial weights have the same bits, and so have the batches. With SGD
the chart makes no difference but rounding, which is the control.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import platform
import statistics
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from sklearn.datasets import load_digits  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import orthoserde

ROOT = Path(__file__).resolve().parents[2]

MAPS = ("householder", "cayley", "matrix_exp")

#: Which completion a base has: the canonical one, or one that torch draws from this seed.
CANONICAL = None
RANDOM = (1, 2, 3)
Chart = int | None

WIDTHS = (64, 128, 48, 32)
BATCH_SIZE = 128
ADAM_LR, SGD_LR, MOMENTUM = 0.01, 0.05, 0.9


@dataclass(frozen=True)
class Data:
    """Images, (samples, 64), and the digits that they show, (samples,)."""

    images: Tensor
    digits: Tensor


@dataclass(frozen=True)
class Run:
    """What came of a run.

    Attributes:
        losses: The loss of each batch, before the step that it led to.
        loss: Mean loss over all training data at the end.
        accuracy: On the test data at the end.
        weights: The orthogonal weights at the end.
    """

    losses: tuple[float, ...]
    loss: float
    accuracy: float
    weights: tuple[Tensor, ...]

    @property
    def mean_loss(self) -> float:
        """Mean loss over all steps: how fast it learned."""
        return statistics.fmean(self.losses)


def load_data() -> tuple[Data, Data]:
    """The training data and the test data, which is every fifth sample."""
    bunch = load_digits()
    images, digits = torch.tensor(bunch.data / 16), torch.tensor(bunch.target)
    test = torch.arange(len(digits)) % 5 == 0
    return Data(images[~test], digits[~test]), Data(images[test], digits[test])


def layers_of(model: nn.Sequential) -> list[nn.Linear]:
    """The orthogonal layers of a network."""
    return [layer for layer in list(model)[:-1] if isinstance(layer, nn.Linear)]


def base_of(layer: nn.Linear) -> Tensor:
    """The base of an orthogonal layer, (n, n)."""
    return layer.get_buffer("parametrizations.weight.0.base")


def build(
    orthogonal_map: str,
    seed: int,
    chart: Chart,
    dtype: torch.dtype = torch.float32,
    activation: type[nn.Module] = nn.ReLU,
) -> nn.Sequential:
    """A classifier of 8 x 8 images; its initial weights depend on the seed alone, bit for bit.

    Args:
        orthogonal_map: Of all orthogonal layers.
        seed: Of the initial weights.
        chart: Which completion the bases have.
        dtype: float32 or float64.
        activation: Between layers.
    """
    torch.manual_seed(seed)
    model = nn.Sequential()
    for inputs, outputs in itertools.pairwise(WIDTHS):
        model.extend([nn.Linear(inputs, outputs, dtype=dtype), activation()])
    model.append(nn.Linear(WIDTHS[-1], 10, dtype=dtype))
    for layer in layers_of(model):
        nn.init.orthogonal_(layer.weight)
        orthoserde.orthogonal(layer, orthogonal_map=orthogonal_map)
    if chart is not CANONICAL:
        torch.manual_seed(1000 * seed + chart)
        for layer in layers_of(model):
            draw_completion(layer, orthogonal_map)
    return model


def draw_completion(layer: nn.Linear, orthogonal_map: str) -> None:
    """Give the base of a layer that was never trained the completion that torch draws for its weight."""
    base, weight = base_of(layer), layer.weight.detach()
    drawn = nn.Linear(layer.in_features, layer.out_features, dtype=weight.dtype)
    drawn.weight = nn.Parameter(weight.clone())
    parametrizations.orthogonal(drawn, orthogonal_map=orthogonal_map)
    k = min(weight.shape)
    # The first columns are kept: torch's own have gone through another QR, so their last bits are others.
    base[:, k:] = base_of(drawn)[:, k:]


def adam(model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer in question."""
    return torch.optim.Adam(model.parameters(), lr=ADAM_LR)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """The control: its steps are the same in every chart."""
    return torch.optim.SGD(model.parameters(), lr=SGD_LR, momentum=MOMENTUM)


def train(
    model: nn.Sequential, optimizer: torch.optim.Optimizer, data: tuple[Data, Data], steps: int, seed: int
) -> Run:
    """Train a network; the batches depend on the seed and the step alone."""
    dtype = cast("Tensor", model[-1].bias).dtype
    training, test = (Data(part.images.to(dtype), part.digits) for part in data)
    generator = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    for _ in range(steps):
        batch = torch.randint(len(training.digits), (BATCH_SIZE,), generator=generator)
        loss = F.cross_entropy(model(training.images[batch]), training.digits[batch])
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    with torch.no_grad():
        end = F.cross_entropy(model(training.images), training.digits).item()
        accuracy = (model(test.images).argmax(dim=1) == test.digits).double().mean().item()
        weights = tuple(layer.weight.clone() for layer in layers_of(model))
    return Run(tuple(losses), end, accuracy, weights)


# Report


def spread(values: Sequence[float], scale: float = 1.0, sign: str = "") -> str:
    """Mean and standard deviation over the seeds."""
    deviation = statistics.stdev(values) if len(values) > 1 else float("nan")
    return f"{statistics.fmean(values) * scale:{sign}.2f} ± {deviation * scale:.2f}"


def row(*cells: str) -> None:
    """Print one line of a table."""
    print("|", " | ".join(cells), "|", flush=True)


def header(*cells: str) -> None:
    """Print the first two lines of a table."""
    row(*cells)
    row(*["---"] * len(cells))


MEASURES: dict[str, Callable[[Run], float]] = {
    "final training loss x 1000": lambda run: 1000 * run.loss,
    "mean loss of all steps x 1000": lambda run: 1000 * run.mean_loss,
    "test accuracy, %": lambda run: 100 * run.accuracy,
}


def compare_adam(maps: Sequence[str], seeds: int, steps: int, data: tuple[Data, Data]) -> None:
    """Train with Adam in every chart; print each chart's results, and the differences of pairs of one seed."""
    found: dict[str, dict[Chart, list[Run]]] = {}
    for name in maps:
        found[name] = {
            chart: [train(model, adam(model), data, steps, seed) for seed, model in _models(name, seeds, chart)]
            for chart in (CANONICAL, *RANDOM)
        }
    header("Adam", "map", "canonical", *(f"random {chart}" for chart in RANDOM))
    for measure, value in MEASURES.items():
        for name, runs in found.items():
            row(measure, name, *(spread([value(run) for run in of_chart]) for of_chart in runs.values()))
    print()
    first, *others = RANDOM
    header(
        "Adam, paired", "map", f"canonical - random {first}", *(f"random {chart} - random {first}" for chart in others)
    )
    for measure, value in MEASURES.items():
        for name, runs in found.items():
            pairs = {
                chart: [value(one) - value(two) for one, two in zip(runs[chart], runs[first], strict=True)]
                for chart in (CANONICAL, *others)
            }
            row(measure, name, *(spread(differences, sign="+") for differences in pairs.values()))
    print()


def _models(orthogonal_map: str, seeds: int, chart: Chart) -> list[tuple[int, nn.Sequential]]:
    return [(seed, build(orthogonal_map, seed, chart)) for seed in range(seeds)]


def largest_difference(one: Run, two: Run) -> tuple[float, float]:
    """The largest differences between two runs: of the loss of a step, and of an element of the weights at the end."""
    losses = max(abs(x - y) for x, y in zip(one.losses, two.losses, strict=True))
    weights = max(float((x - y).abs().max()) for x, y in zip(one.weights, two.weights, strict=True))
    return losses, weights


#: Two runs of SGD that part by rounding alone do so 2**29 times less in float64, and where no unit has a kink, at which
#: rounding decides whether it has a gradient.
CONTROLS = (
    (sgd, torch.float32, nn.ReLU),
    (sgd, torch.float32, nn.Tanh),
    (sgd, torch.float64, nn.ReLU),
    (adam, torch.float32, nn.ReLU),
)


def compare_sgd(maps: Sequence[str], seeds: int, steps: int, data: tuple[Data, Data]) -> None:
    """Train with SGD in two charts; print how far they part, beside how far Adam's runs of the same seeds do."""
    header("canonical against random 1", "dtype", "units", "map", "largest difference of a loss", "of a final weight")
    for (optimizer, dtype, activation), name in itertools.product(CONTROLS, maps):
        parted: list[tuple[float, float]] = []
        for seed in range(seeds):
            models = [build(name, seed, chart, dtype, activation) for chart in (CANONICAL, RANDOM[0])]
            parted.append(largest_difference(*(train(model, optimizer(model), data, steps, seed) for model in models)))
        worst = [f"{max(differences):.1e}" for differences in zip(*parted, strict=True)]
        row(optimizer.__name__, str(dtype).removeprefix("torch."), activation.__name__, name, *worst)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure everything and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--maps", nargs="+", choices=MAPS, default=MAPS, help="orthogonal maps")
    parser.add_argument("--seeds", type=int, default=10, help="runs with Adam in each chart")
    parser.add_argument("--control-seeds", type=int, default=2, help="runs of the control in each chart")
    parser.add_argument("--steps", type=int, default=400, help="training steps of each run")
    options = parser.parse_args(arguments)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, check=False, capture_output=True, text=True
    )
    print(
        f"date: {datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}; commit: {commit.stdout.strip() or 'unknown'}"
    )
    print(f"torch: {torch.__version__}, orthoserde: {orthoserde.__version__}")
    print(f"Python: {platform.python_version()}, {platform.system()} {platform.machine()}, one thread")
    print(f"seeds: {options.seeds} (control: {options.control_seeds}); steps: {options.steps}\n", flush=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        data = load_data()
        compare_adam(options.maps, options.seeds, options.steps, data)
        compare_sgd(options.maps, options.control_seeds, options.steps, data)
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    main()
