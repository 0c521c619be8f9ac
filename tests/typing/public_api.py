"""The public API as a user's type checker sees it. Checked by mypy, never executed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import orthoserde
from orthoserde.testing import assert_continues


def saving(model: nn.Linear, path: Path) -> None:
    report = orthoserde.save(model, path, metadata={"run": "7"}, registry=orthoserde.Registry())
    assert_type(report, orthoserde.SaveReport)
    assert_type(report.file_bytes, int)
    assert_type(report.aliases, Mapping[str, str])
    assert_type(report.opaque, tuple[str, ...])
    assert_type(report.compact, tuple[str, ...])
    orthoserde.save(model, "model.safetensors", base="dense")
    orthoserde.save(model, path, max_shard_size="5GB")
    orthoserde.save(model, path, max_shard_size=5_000_000_000)
    orthoserde.save(model, path, max_shard_size=0.5)  # type: ignore[arg-type]


def keeping(model: nn.Linear, folder: Path, background: bool) -> None:
    with orthoserde.Checkpoints(folder, keep=None, mode="max", prefix="run") as checkpoints:
        assert_type(checkpoints, orthoserde.Checkpoints)
    assert_type(checkpoints.save(1, model, metric=torch.ones(()), base="dense"), orthoserde.SaveReport)
    assert_type(checkpoints.save(1, model, metric=0.5, metadata={"run": "7"}), orthoserde.SaveReport)
    checkpoints.save(2, model, wait=False)
    assert_type(checkpoints.save(3, model, wait=background), orthoserde.SaveReport | None)
    assert_type(checkpoints.wait(), orthoserde.SaveReport | None)
    assert_type(checkpoints.latest(), Path | None)
    assert_type(checkpoints.best, Path | None)
    assert_type(checkpoints.steps(), list[int])
    assert_type(checkpoints.path(2), Path)
    checkpoints.save(model, 1)  # type: ignore[call-overload]
    checkpoints.save(1, model, base="rows")  # type: ignore[call-overload]
    checkpoints.save(1, model, other=1)  # type: ignore[call-overload]
    orthoserde.Checkpoints(folder, mode="best")  # type: ignore[arg-type]


def loading(model: nn.Linear, path: Path) -> None:
    report = orthoserde.load(
        model, path, strict=False, reparametrize=False, device="cpu", verify=False, registry=orthoserde.default_registry
    )
    assert_type(report, orthoserde.LoadReport)
    assert_type(report.fidelity, orthoserde.Fidelity)
    assert_type(report.fidelity < orthoserde.Fidelity.EXACT, bool)
    missing, unexpected = report
    assert_type(missing, list[str])
    assert_type(unexpected, list[str])
    assert_type(report.tensors["weight"], orthoserde.TensorReport)
    assert_type(report.tensors["weight"].residual, float | None)


def looking(path: Path) -> None:
    manifest = orthoserde.inspect(path)
    assert_type(manifest, orthoserde.Manifest)
    assert_type(manifest.tensors["weight"].shape, tuple[int, ...])
    assert_type(manifest.parametrized[0].chain[0].kind, str)
    assert_type(manifest.metadata, Mapping[str, str])
    report = orthoserde.verify("model.safetensors", registry=orthoserde.Registry())
    assert_type(report, orthoserde.VerifyReport)
    assert_type(report.ok, bool)
    assert_type(report.digests, bool)
    assert_type(report.damaged, tuple[str, ...])
    assert_type(report.residuals, Mapping[str, float | None])
    assert_type(report.not_measured, Mapping[str, str])


def make() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Linear(2, 2)
    return model, torch.optim.SGD(model.parameters())


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensor:
    return torch.zeros(())


def proving(path: Path) -> None:
    proof = orthoserde.prove(path, make, step, reference=[1.0, torch.ones(()), 2], steps=2)
    assert_type(proof, orthoserde.Proof)
    assert_type(proof.grade, orthoserde.Grade)
    assert_type(proof.grade >= orthoserde.Grade.WITHIN, bool)
    assert_type(proof.first, orthoserde.Difference | None)
    assert_type(proof.max_difference, float | None)
    assert_type(proof.losses, tuple[float | None, ...])
    assert_type(orthoserde.prove("a", make, step, reference=["b", path]).fidelity, orthoserde.Fidelity)
    assert_type(assert_continues(path, make, step, reference="b", within=1e-5), orthoserde.Proof)
    orthoserde.prove(path, make, step, [1.0])  # type: ignore[call-arg]
    orthoserde.prove(path, make(), step)  # type: ignore[arg-type]


def walking(model: nn.Module) -> None:
    assert_type(orthoserde.parametrized_tensors(model), Iterator[orthoserde.ParametrizedTensor])
    for record in orthoserde.parametrized_tensors(model):
        assert_type(record.module, nn.Module)
        assert_type(record.originals, Mapping[str, Tensor])


def canonicalizing(model: nn.Module, optimizer: torch.optim.SGD) -> None:
    report = orthoserde.canonicalize_(model, optimizer=optimizer)
    assert_type(report, orthoserde.CanonicalizeReport)
    assert_type(report.tensors, Mapping[str, orthoserde.ChartReport])
    assert_type(report.canonicalized, tuple[str, ...])
    assert_type(report.weight_change, float)
    assert_type(report.tensors["weight"].rotated, tuple[str, ...])
    orthoserde.canonicalize_(model, optimizer=[optimizer, torch.optim.Adam(model.parameters())], reset_state=True)
    orthoserde.canonicalize_(model, optimizer=False)
    orthoserde.canonicalize_(model, optimizer=True)  # type: ignore[arg-type]
    orthoserde.canonicalize_(model, optimizer)  # type: ignore[call-arg]


def diagnosing(model: nn.Module, optimizer: torch.optim.SGD) -> None:
    found = orthoserde.diagnose(model)
    assert_type(found, list[orthoserde.Finding])
    assert_type(found[0].severity, orthoserde.Severity)
    assert_type(found[0].severity >= orthoserde.Severity.WARNING, bool)
    assert_type(found[0].where, str)
    orthoserde.diagnose(model, optimizer)
    orthoserde.diagnose(model, [optimizer])
    orthoserde.diagnose(model, {"rotations": optimizer})
    orthoserde.diagnose(model, 3)  # type: ignore[arg-type]


@orthoserde.register("mylab>Symmetric", version=2)
class Symmetric(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale


def the_decorator_keeps_the_class() -> None:
    assert_type(Symmetric(1.0), Symmetric)
    assert_type(Symmetric(1.0).scale, float)
    Symmetric("a")  # type: ignore[arg-type]


def failing(model: nn.Module) -> None:
    try:
        orthoserde.load(model, "model.safetensors")
    except orthoserde.IncompatibleModelError as error:
        assert_type(error.missing_keys, list[str])
        assert_type(error.problems, tuple[orthoserde.Problem, ...])
    except orthoserde.FormatVersionError as error:
        assert_type(error.supported, int)
    except orthoserde.OrthoserdeError:
        raise


def wrong_calls(model: nn.Module) -> None:
    orthoserde.save(model)  # type: ignore[call-arg]
    orthoserde.save(model, 3)  # type: ignore[arg-type]
    orthoserde.save(model, "a", base="rows")  # type: ignore[arg-type]
    orthoserde.load(model, "a", False)  # type: ignore[call-arg]
    orthoserde.verify("a", orthoserde.Registry())  # type: ignore[call-arg]
    orthoserde.register(nn.Linear)  # type: ignore[arg-type]
