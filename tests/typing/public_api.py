"""The public API as a user's type checker sees it. Checked by mypy, never executed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import orthoserde
from orthoserde.integrations.loreft import Adapter, LoReFT, attach, detach, trainable_parameters
from orthoserde.integrations.pyreft import write
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


def building(path: Path, registry: orthoserde.Registry) -> None:
    assert_type(orthoserde.build(path, device=torch.device("cpu"), registry=registry), nn.Module)
    assert_type(orthoserde.build("model.safetensors", device="meta"), nn.Module)
    orthoserde.build(path, registry)  # type: ignore[call-arg, arg-type]


def converting(path: Path) -> None:
    report = orthoserde.convert(path, "plain.safetensors", "baked", force=True)
    assert_type(report, orthoserde.ConversionReport)
    assert_type(report.left_dense, tuple[str, ...])
    orthoserde.convert(path, path, "onnx")  # type: ignore[arg-type]
    orthoserde.convert(path, path)  # type: ignore[call-arg]


def baking(model: nn.Module) -> None:
    report = orthoserde.bake_(model, registry=orthoserde.default_registry)
    assert_type(report, orthoserde.BakeReport)
    assert_type(report.parameters_replaced, tuple[str, ...])
    orthoserde.bake_(model, orthoserde.default_registry)  # type: ignore[call-arg]


def making(layer: nn.Linear) -> None:
    assert_type(orthoserde.orthogonal(layer), nn.Module)
    assert_type(orthoserde.orthogonal(layer, "weight", "cayley", use_trivialization=False, structured=True), nn.Module)
    orthoserde.orthogonal(layer, "weight", "cayley", False)  # type: ignore[call-arg]


def training(model: nn.Module, optimizer: torch.optim.SGD, path: Path) -> None:
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    state = {"schedule": schedule, "step": 7}
    orthoserde.save(model, path, optimizer=optimizer, state=state, rng=True, select="trainable")
    orthoserde.save(model, path, optimizer={"a": optimizer}, select=lambda name, tensor: tensor.requires_grad)
    report = orthoserde.load(model, path, optimizer={"a": optimizer}, state=state, reset=["weight"], legacy="keep")
    assert_type(report.state, Mapping[str, object])
    orthoserde.save(model, path, optimizer=[optimizer])  # type: ignore[arg-type]
    orthoserde.load(model, path, legacy="always")  # type: ignore[arg-type]


def measuring(model: nn.Module, path: Path) -> None:
    seen: list[Mapping[str, object]] = []
    orthoserde.save(model, path, debug=seen.append)
    orthoserde.load(model, path, debug=True)
    orthoserde.load(model, path, debug="yes")  # type: ignore[arg-type]


def registering(registry: orthoserde.Registry, codec: orthoserde.Codec) -> None:
    registry.add(codec)
    registry.mark_adapter(nn.Linear)
    assert_type(registry.for_kind("mylab>Symmetric"), orthoserde.Codec | None)
    assert_type(registry.for_type(nn.Linear), orthoserde.Codec | None)
    assert_type(registry.extended([codec], [nn.Linear]), orthoserde.Registry)
    assert_type(list(registry), list[str])
    assert_type("mylab>Symmetric" in registry, bool)
    assert_type(codec.version, int)
    assert_type(codec.tensors(nn.Linear(1, 1)), dict[str, Tensor])
    registry.add(nn.Linear(1, 1))  # type: ignore[arg-type]


def adapting(model: nn.Module) -> None:
    adapter = attach(model, {"layers.0": LoReFT(8, rank=2)}, positions="l1")
    assert_type(adapter, Adapter)
    assert_type(adapter.layers, Mapping[str, LoReFT])
    assert_type(trainable_parameters(model), list[nn.Parameter])
    assert_type(detach(model), None)
    assert_type(write(model, "reft", "full"), dict[str, int])
    attach(model, LoReFT(8, rank=2))  # type: ignore[arg-type]


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
