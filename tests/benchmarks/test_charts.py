"""The benchmark of charts compares what it says it compares."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.benchmarks import bench_charts
from tests.benchmarks.bench_charts import CANONICAL, MAPS, RANDOM
from tests.helpers import same_bits


@pytest.mark.parametrize("name", MAPS)
def test_charts_differ_in_the_completions_alone(name: str) -> None:
    models = [bench_charts.build(name, 3, chart) for chart in (CANONICAL, *RANDOM[:2])]
    for one, other in itertools.combinations(models, 2):
        for layer, same in zip(bench_charts.layers_of(one), bench_charts.layers_of(other), strict=True):
            k = min(layer.weight.shape)
            base, changed = bench_charts.base_of(layer), bench_charts.base_of(same)
            assert same_bits(layer.weight, same.weight)
            assert same_bits(base[:, :k], changed[:, :k])
            assert (base[:, k:] - changed[:, k:]).abs().max() > 0.1
            torch.testing.assert_close(changed.mT @ changed, torch.eye(len(changed)), rtol=0, atol=1e-5)


def test_sgd_takes_the_same_way_in_every_chart_and_adam_does_not() -> None:
    data, parted = bench_charts.load_data(), {}
    for optimizer in (bench_charts.sgd, bench_charts.adam):
        models = [bench_charts.build("cayley", 0, chart, torch.float64) for chart in (CANONICAL, RANDOM[0])]
        runs = [bench_charts.train(model, optimizer(model), data, 5, seed=0) for model in models]
        parted[optimizer] = bench_charts.largest_difference(*runs)
    assert max(parted[bench_charts.sgd]) < 1e-12
    assert min(parted[bench_charts.adam]) > 1e-5


def test_it_prints_its_tables(capsys: pytest.CaptureFixture[str]) -> None:
    bench_charts.main(["--maps", "cayley", "--seeds", "1", "--control-seeds", "1", "--steps", "2"])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(rows) == (2 + 3) + (2 + 3) + (2 + 4)
    assert sum("| cayley |" in line for line in rows) == 10
