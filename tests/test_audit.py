"""`inspect` and `verify`: what can be said of a file without a model."""

from __future__ import annotations

import itertools
import math
import re
import tracemalloc
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

import orthoserde
from orthoserde import audit, storage
from orthoserde.json_values import JSON
from orthoserde.manifest import (
    DENSE,
    OPAQUE,
    Manifest,
    ParametrizationRecord,
    ParametrizedRecord,
    TensorRecord,
    join,
)
from orthoserde.parametrizations.weight_norm import WeightNormCodec
from orthoserde.reports import VerifyReport
from orthoserde.storage.format import file_header
from tests.golden.models import FOLDER, MODELS, REGISTRY
from tests.helpers import flip_bit, header_bytes, surroundings, watch_computations, watch_reads
from tests.storage.strategies import checkpoint_of

GIB = 1 << 30

MAPS = ("householder", "cayley", "matrix_exp")

#: Configurations that torch itself gives.
ORTHOGONAL: dict[str, JSON] = {"orthogonal_map": "cayley", "shape": [4, 3], "use_trivialization": True}
SPECTRAL: dict[str, JSON] = {"dim": 0, "eps": 1e-12, "n_power_iterations": 1}


def golden(name: str) -> Path:
    return FOLDER / f"{name}.safetensors"


def crafted(
    path: Path,
    kind: str,
    config: Mapping[str, JSON] | None,
    originals: Mapping[str, Tensor],
    own: Mapping[str, Tensor] | None = None,
    *,
    version: int = 1,
    shape: tuple[int, ...] | None = None,
) -> Path:
    """A valid file with one parametrized tensor, ``layer.weight``, of whatever state and configuration."""
    link = ParametrizationRecord(
        kind, version, config, "a:B" if kind == OPAQUE else None, dict.fromkeys(own or {}, DENSE)
    )
    record = ParametrizedRecord(
        *("layer", "weight", (), shape, None, True, False), dict.fromkeys(originals, DENSE), (link,)
    )
    stored = {record.original_key(name): tensor for name, tensor in originals.items()}
    stored |= {record.link_key(0, role): tensor for role, tensor in (own or {}).items()}
    storage.write(checkpoint_of(stored, Manifest({}, parametrized=(record,))), path)
    return path


@pytest.fixture
def model() -> nn.Module:
    """Every kind of torch's, as training leaves it."""
    return nn.Sequential(
        orthogonal(nn.Linear(6, 4), orthogonal_map="cayley"),
        orthogonal(nn.Linear(4, 6), orthogonal_map="householder", use_trivialization=False),
        orthogonal(nn.Linear(6, 6), orthogonal_map="matrix_exp"),
        weight_norm(nn.Linear(6, 3)),
        spectral_norm(nn.Linear(3, 5)),
        orthogonal(weight_norm(nn.Linear(5, 4)), use_trivialization=False, orthogonal_map="cayley"),
        nn.Linear(4, 2),
    )


@pytest.fixture
def path(model: nn.Module, tmp_path: Path) -> Path:
    orthoserde.save(model, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


class TestInspect:
    @pytest.mark.parametrize("name", MODELS)
    def test_it_returns_the_manifest_that_the_file_holds(self, name: str) -> None:
        with storage.read(golden(name)) as checkpoint:
            assert orthoserde.inspect(golden(name)) == checkpoint.manifest

    def test_it_reads_the_header_alone(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        reads = watch_reads(monkeypatch)
        orthoserde.inspect(path)
        assert max(position + count for position, count in reads) == header_bytes(path)

    @pytest.mark.parametrize("ours", [True, False])
    def test_a_file_of_gigabytes_takes_no_longer(self, ours: bool, tmp_path: Path) -> None:
        path = tmp_path / "large.safetensors"
        if ours:
            record = TensorRecord("float32", (GIB // 2,), (1,), parameter=True, digest="0" * 32)
            header = file_header(Manifest({"weight": record}))
        else:
            text = b'{"weight":{"dtype":"F32","shape":[%d],"data_offsets":[0,%d]}}' % (GIB // 2, 2 * GIB)
            header = len(text).to_bytes(8, "little") + text
        with path.open("wb") as file:
            file.write(header)
            file.truncate(len(header) + 2 * GIB)
        tracemalloc.start()
        manifest = orthoserde.inspect(path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert manifest.tensors["weight"].shape == (GIB // 2,)
        assert manifest.tensors["weight"].nbytes == manifest.nbytes == 2 * GIB
        assert manifest.has_configuration == ours
        assert peak < 1 << 20

    def test_the_file_is_closed(self, path: Path) -> None:
        orthoserde.inspect(path)  # an open one would warn when it is collected, and warnings are errors
        orthoserde.verify(path)
        path.rename(path.with_suffix(".moved"))

    def test_damage_behind_the_header_is_not_seen(self, path: Path) -> None:
        flip_bit(path, -1)
        orthoserde.inspect(path)

    def test_a_damaged_header_is_refused(self, path: Path) -> None:
        flip_bit(path, header_bytes(path) // 2)
        with pytest.raises(orthoserde.FileFormatError):
            orthoserde.inspect(path)

    def test_a_missing_file_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(orthoserde.CheckpointNotFoundError):
            orthoserde.inspect(tmp_path / "none.safetensors")

    def test_a_manifest_is_shown_in_a_few_lines(self) -> None:
        assert str(orthoserde.inspect(golden("norms"))).splitlines() == [
            "23 tensors, 1528 bytes, 7 parametrized",
            "  1 x torch>orthogonal",
            "  3 x torch>spectral_norm",
            "  3 x torch>weight_norm",
        ]
        assert "tied and stored once: 1" in str(orthoserde.inspect(golden("plain")))

    def test_a_manifest_of_another_library_says_so(self, tmp_path: Path) -> None:
        save_file({"weight": torch.zeros(2)}, tmp_path / "foreign.safetensors")
        assert "written by another library" in str(orthoserde.inspect(tmp_path / "foreign.safetensors"))


class TestSoundFiles:
    def test_every_kind_of_torch_is_measured(self, path: Path) -> None:
        report = orthoserde.verify(path)
        assert report.ok
        assert report.digests
        assert report.has_configuration
        assert report.path == str(path)
        assert not report.damaged
        assert not report.misfits
        assert not report.not_measured
        assert report.residuals.keys() == {f"{i}.weight" for i in range(6)}
        assert {name for name, residual in report.residuals.items() if residual is None} == {"3.weight", "4.weight"}
        assert all(residual < 1e-5 for residual in report.residuals.values() if residual is not None)

    def test_it_is_the_residual_that_a_load_reports(self, path: Path, model: nn.Module) -> None:
        loaded = orthoserde.load(model, path)
        for name, residual in orthoserde.verify(path).residuals.items():
            assert loaded.tensors[name].residual == residual

    @pytest.mark.parametrize(
        ("orthogonal_map", "dtype"),
        [*itertools.product(MAPS, (torch.float32, torch.float64)), *((name, torch.complex64) for name in MAPS[1:])],
    )
    @pytest.mark.parametrize("trivialized", [True, False])
    @pytest.mark.parametrize("shape", [(6, 3), (3, 6), (4, 4), (2, 5, 3), (1, 1), (0, 3), (3, 0), (2, 0, 0)])
    def test_every_orthogonal_tensor_that_torch_makes_is_on_its_constraint(
        self, orthogonal_map: str, trivialized: bool, shape: tuple[int, ...], dtype: torch.dtype, tmp_path: Path
    ) -> None:
        layer = nn.Module()
        layer.weight = nn.Parameter(torch.randn(shape, dtype=dtype))
        try:
            orthogonal(layer, orthogonal_map=orthogonal_map, use_trivialization=trivialized)
            assert layer.weight.shape == shape
        except (RuntimeError, ValueError) as error:  # some torch cannot do it with empty tensors
            pytest.skip(f"torch: {error}")
        orthoserde.save(layer, tmp_path / "layer.safetensors")
        report = orthoserde.verify(tmp_path / "layer.safetensors")
        assert report.ok, report
        assert not report.not_measured
        assert (report.residuals["weight"] or 0.0) < 1e-5

    @pytest.mark.parametrize("dim", [0, 1, 2, -1, None])
    def test_every_weight_norm_that_torch_makes_fits(self, dim: int, tmp_path: Path) -> None:
        orthoserde.save(weight_norm(nn.Conv1d(4, 3, 2), dim=dim), tmp_path / "layer.safetensors")
        assert orthoserde.verify(tmp_path / "layer.safetensors").residuals == {"weight": None}

    @pytest.mark.parametrize("layer", [nn.Conv2d(2, 3, 2), nn.ConvTranspose2d(2, 3, 2), nn.Linear(1, 1)])
    def test_every_spectral_norm_that_torch_makes_fits(self, layer: nn.Module, tmp_path: Path) -> None:
        orthoserde.save(spectral_norm(layer), tmp_path / "layer.safetensors")
        assert orthoserde.verify(tmp_path / "layer.safetensors").residuals == {"weight": None}

    def test_nothing_around_it_changes(self, path: Path) -> None:
        before = surroundings()
        with torch.inference_mode():
            inside = surroundings()
            orthoserde.verify(path)
            assert surroundings() == inside
        assert surroundings() == before

    @pytest.mark.parametrize("name", MODELS)
    def test_the_bytes_of_golden_files_are_those_that_were_saved(self, name: str) -> None:
        report = orthoserde.verify(golden(name), registry=REGISTRY)
        assert not report.damaged
        assert not report.misfits

    def test_each_weight_is_run_dry_once_and_computed_once_if_it_has_a_constraint(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        computed = watch_computations(monkeypatch)
        assert orthoserde.verify(path).ok
        assert Counter(computed) == {
            ("torch>orthogonal", "meta"): 4,
            ("torch>orthogonal", "cpu"): 4,
            ("torch>weight_norm", "meta"): 2,
            ("torch>weight_norm", "cpu"): 1,  # one stands before an orthogonal one
            ("torch>spectral_norm", "meta"): 1,
        }

    def test_a_file_without_tensors_is_sound(self, tmp_path: Path) -> None:
        orthoserde.save(nn.Module(), tmp_path / "empty.safetensors")
        assert orthoserde.verify(tmp_path / "empty.safetensors").ok

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_what_is_too_coarse_is_not_held_to_a_constraint(self, dtype: torch.dtype, tmp_path: Path) -> None:
        for orthogonal_map in MAPS:
            model = nn.Sequential(
                orthogonal(nn.Linear(3, 3), orthogonal_map=orthogonal_map), weight_norm(nn.Linear(3, 2))
            )
            orthoserde.save(model.to(dtype), tmp_path / "coarse.safetensors")
            report = orthoserde.verify(tmp_path / "coarse.safetensors")
            assert report.ok
            assert report.not_measured.keys() == {"0.weight"}
            assert report.residuals == {"1.weight": None}


class TestDamage:
    def test_each_damaged_tensor_is_named_and_the_others_are_measured(self, path: Path) -> None:
        with storage.read(path) as checkpoint:
            keys = list(checkpoint.manifest.tensors)
        names = {"0.parametrizations.weight.original", "0.bias"}
        start = header_bytes(path)
        for key, record in orthoserde.inspect(path).tensors.items():
            if key in names:
                flip_bit(path, start)
            start += record.nbytes
        report = orthoserde.verify(path)
        assert not report.ok
        assert set(report.damaged) == names
        assert report.damaged == tuple(key for key in keys if key in names)
        assert report.not_measured == {"0.weight": "its state is damaged"}
        assert "0.weight" not in report.residuals
        assert (report.residuals["2.weight"] or 0.0) < 1e-5

    def test_every_bit_flip_behind_the_header_is_found(self, tmp_path: Path) -> None:
        whole = golden("plain").read_bytes()
        path = tmp_path / "flipped.safetensors"
        for byte in range(header_bytes(golden("plain")), len(whole)):
            path.write_bytes(whole)
            flip_bit(path, byte, byte % 8)
            assert len(orthoserde.verify(path).damaged) == 1

    def test_a_damaged_tie_makes_all_its_names_unmeasured(self, tmp_path: Path) -> None:
        class Pair(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.left = self.right = orthogonal(nn.Linear(4, 4, bias=False))
                self.other = orthogonal(nn.Linear(4, 4, bias=False))
                original = self.left.get_parameter("parametrizations.weight.original")
                self.other.get_submodule("parametrizations.weight").original = original

        path = tmp_path / "tied.safetensors"
        orthoserde.save(Pair(), path)
        manifest = orthoserde.inspect(path)
        original = next(key for key in manifest.tensors if key.endswith("original"))
        before = itertools.takewhile(lambda key: key != original, manifest.tensors)
        flip_bit(path, header_bytes(path) + sum(manifest.tensors[key].nbytes for key in before))
        report = orthoserde.verify(path)
        assert report.damaged == (original,)
        assert set(report.not_measured) == {record.name for record in manifest.parametrized}

    @pytest.mark.parametrize("length", [0, 7, 8, 100, -1])
    def test_a_truncated_file_raises(self, path: Path, length: int) -> None:
        path.write_bytes(path.read_bytes()[:length])
        with pytest.raises(orthoserde.FileFormatError):
            orthoserde.verify(path)

    def test_a_damaged_header_raises(self, path: Path) -> None:
        flip_bit(path, header_bytes(path) // 2)
        with pytest.raises(orthoserde.FileFormatError):
            orthoserde.verify(path)


class TestOffTheConstraint:
    def test_a_base_that_was_rounded_is_found(self, path: Path, model: nn.Module) -> None:
        base = model.get_buffer("0.parametrizations.weight.0.base")
        base.copy_(base.bfloat16())
        orthoserde.save(model, path)
        report = orthoserde.verify(path)
        assert not report.ok
        assert report.off_constraint == ("0.weight",)
        assert "its base is off orthogonality" in report.causes["0.weight"]
        assert 1e-4 < (report.residuals["0.weight"] or 0.0) < 1e-1
        assert not report.damaged

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_a_tensor_that_is_not_finite_is_found(self, path: Path, model: nn.Module, value: float) -> None:
        for i in range(3):
            model.get_parameter(f"{i}.parametrizations.weight.original").detach().fill_(value)
        orthoserde.save(model, path)
        report = orthoserde.verify(path)
        assert report.off_constraint == ("0.weight", "1.weight", "2.weight")
        assert all("not finite" in cause for cause in report.causes.values())
        assert math.isnan(report.residuals["0.weight"] or 0.0)
        assert "largest residual nan" in str(report)

    def test_a_householder_whose_signs_decayed_is_found(self, path: Path, model: nn.Module) -> None:
        # Weight decay moves the diagonal, which torch truncates to integers: -0.999 becomes 0.
        model.get_parameter("1.parametrizations.weight.original").detach().mul_(0.999)
        orthoserde.save(model, path)
        report = orthoserde.verify(path)
        assert report.off_constraint == tuple(report.causes) == ("1.weight",)
        columns = min(model.get_parameter("1.parametrizations.weight.original").shape)
        found = (
            rf"{columns} of {columns} diagonal entries of its original are not \+-1 \(-?0\.999000013\), which torch "
        )
        assert re.match(found, report.causes["1.weight"])

    def test_what_is_read_right_is_not_blamed(self, tmp_path: Path) -> None:
        """Torch reads 1.0001 as 1: here the base alone is to blame."""
        layer = orthogonal(nn.Linear(6, 4), orthogonal_map="householder")
        layer.get_parameter("parametrizations.weight.original").detach().mul_(1.0001)
        base = layer.get_buffer("parametrizations.weight.0.base")
        base.copy_(base.bfloat16())
        orthoserde.save(layer, tmp_path / "m")
        assert orthoserde.verify(tmp_path / "m").causes["weight"].startswith("its base is off orthogonality by ")

    @pytest.mark.parametrize("value", [0.0, math.nan])
    def test_signs_that_are_lost_are_not_to_be_written_back(self, tmp_path: Path, value: float) -> None:
        layer = orthogonal(nn.Linear(6, 4), orthogonal_map="householder")
        diagonal = layer.get_parameter("parametrizations.weight.original").detach().diagonal()
        diagonal[:2] = torch.tensor([1.5, value])
        with pytest.warns(orthoserde.TrainingTrapWarning):
            orthoserde.save(layer, tmp_path / "m")
        (cause,) = orthoserde.verify(tmp_path / "m").causes.values()
        assert cause.startswith(f"2 of 4 diagonal entries of its original are not +-1 ({value:g})")
        assert "use a checkpoint from before, for signs are lost" in cause

    def test_a_base_that_is_far_off_is_not_to_be_projected(self, tmp_path: Path) -> None:
        layer = orthogonal(nn.Linear(6, 4))
        layer.get_buffer("parametrizations.weight.0.base").zero_()
        orthoserde.save(layer, tmp_path / "m")
        (cause,) = orthoserde.verify(tmp_path / "m").causes.values()
        assert cause == "its base is off orthogonality by 0.41; use a checkpoint from before"

    @pytest.mark.parametrize("cause", ["base", "diagonal"])
    def test_what_a_cause_advises_helps(self, tmp_path: Path, cause: str) -> None:
        path, model = tmp_path / "m", orthogonal(nn.Linear(6, 4), orthogonal_map="householder")
        state = model.parametrizations.weight  # type: ignore[union-attr]
        original, base = cast("Tensor", state.original), cast("Tensor", state[0].base)  # type: ignore[union-attr,index]
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", orthoserde.TrainingTrapWarning)
            if cause == "base":
                base.copy_(base.bfloat16())
            else:
                original.mul_(0.999)
            orthoserde.save(model, path)
            assert not orthoserde.verify(path).ok
            orthoserde.load(model, path)
            if cause == "base":
                orthoserde.convert(path, tmp_path / "baked", "baked")
                warnings.simplefilter("ignore", orthoserde.LegacyCheckpointWarning)
                orthoserde.load(model, tmp_path / "baked", legacy="project")
            else:
                original.diagonal().copy_(original.diagonal().sign())
        orthoserde.save(model, path)
        assert orthoserde.verify(path).ok


class TestClassesOfTheUser:
    def test_registered_and_opaque_classes_are_named_as_not_measured(self) -> None:
        report = orthoserde.verify(golden("users"), registry=REGISTRY)
        assert report.ok
        assert report.not_measured == {
            "chained.weight": "what golden>Scaled computes, and its constraint, are known to its own code alone",
            "chained.bias": "__main__:Doubled was not registered when it was saved",
            "buffered.running_mean": "what golden>Scaled computes, and its constraint, are known to its own code alone",
            "several.weight": "what golden>Outer computes, and its constraint, are known to its own code alone",
        }
        assert report.residuals == {"several.parametrizations.weight.0.inner.weight": None}

    def test_a_kind_that_this_process_does_not_know_is_named(self) -> None:
        report = orthoserde.verify(golden("users"))
        assert report.not_measured["buffered.running_mean"] == "golden>Scaled is not registered in this process"

    def test_a_registered_class_is_never_built(self, tmp_path: Path) -> None:
        built: list[nn.Module] = []
        registry = orthoserde.Registry()

        @registry.register("test>Watched")
        class Watched(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                built.append(self)

            def forward(self, x: Tensor) -> Tensor:
                return x

        layer = nn.Linear(3, 3)
        parametrize.register_parametrization(layer, "weight", Watched())
        orthogonal(layer)
        built.clear()
        orthoserde.save(layer, tmp_path / "layer.safetensors", registry=registry)
        assert "weight" in orthoserde.verify(tmp_path / "layer.safetensors", registry=registry).not_measured
        assert not built

    def test_a_codec_of_the_user_is_measured(self, tmp_path: Path) -> None:
        report = verified_halves(tmp_path / "a", HalvedCodec())
        assert report.residuals == {"weight": 2.0}
        assert report.off_constraint == ("weight",)
        expected = "its state does not come to a weight on the constraint; use a checkpoint from before"
        assert report.causes == {"weight": expected}

    def test_what_follows_it_in_a_chain_is_measured(self, tmp_path: Path) -> None:
        report = verified_halves(tmp_path / "a", HalvedCodec(), then_orthogonal=True)
        assert report.ok
        assert (report.residuals["weight"] or 0.0) < 1e-5

    def test_a_codec_that_fails_is_named(self, tmp_path: Path) -> None:
        report = verified_halves(tmp_path / "a", HalvedCodec("residual"))
        assert report.ok
        assert report.not_measured == {"weight": "test>Halved cannot be measured here: a mistake"}
        report = verified_halves(tmp_path / "a", HalvedCodec("compute"))
        assert report.not_measured == {"weight": "test>Halved cannot be computed here: a mistake"}


class Halved(nn.Module):
    """A parametrization that a codec of the user's own knows."""

    def forward(self, x: Tensor) -> Tensor:
        return x / 2


class HalvedCodec(WeightNormCodec):
    """A codec that measures how large a weight is, or raises in one of its methods."""

    type: type[nn.Module] = Halved
    kind = "test>Halved"

    def __init__(self, failing: str = "") -> None:
        self.failing = failing

    def _fail(self, method: str) -> None:
        if method == self.failing:
            raise ZeroDivisionError("a mistake\nin the codec")

    def config(self, parametrization: nn.Module) -> dict[str, JSON]:
        return {}

    def shape(self, originals: Mapping[str, torch.Size]) -> torch.Size:
        return originals["original"]

    def compute(self, config: Mapping[str, JSON], tensors: Mapping[str, Tensor]) -> Tensor:
        self._fail("compute")
        return tensors["original"] / 2

    def residual(self, weight: Tensor) -> float | None:
        self._fail("residual")
        return float(weight.abs().max())

    def admits(self, weight: Tensor, config: Mapping[str, JSON]) -> bool:
        return float(weight.abs().max()) < 1


def verified_halves(path: Path, codec: HalvedCodec, *, then_orthogonal: bool = False) -> VerifyReport:
    registry = orthoserde.Registry()
    registry.add(codec)
    layer = nn.Linear(3, 3)
    layer.weight = nn.Parameter(torch.full((3, 3), 4.0))
    parametrize.register_parametrization(layer, "weight", Halved())
    if then_orthogonal:
        orthogonal(layer, use_trivialization=False)
    orthoserde.save(layer, path, registry=registry)
    return orthoserde.verify(path, registry=registry)


class TestOtherLibraries:
    def test_a_file_without_digests_is_said_to_have_none(self, tmp_path: Path) -> None:
        path = tmp_path / "foreign.safetensors"
        model = nn.Sequential(orthogonal(nn.Linear(4, 4)), weight_norm(nn.Linear(4, 4)))
        save_file({key: value.contiguous() for key, value in model.state_dict().items()}, path)
        report = orthoserde.verify(path)
        assert report.ok
        assert not report.digests
        assert not report.has_configuration
        assert not report.residuals
        reason = "the file has no configuration"
        assert report.not_measured == {"0.weight": reason, "1.weight": reason}
        assert "no digests" in str(report)
        assert "match" not in str(report)


class TestCraftedFiles:
    def test_a_sound_one_is_measured(self, tmp_path: Path) -> None:
        path = crafted(
            tmp_path / "a", "torch>orthogonal", ORTHOGONAL, {"original": torch.eye(4, 3)}, {"base": torch.eye(4)}
        )
        assert orthoserde.verify(path).residuals == {"layer.weight": 0.0}

    @pytest.mark.parametrize(
        ("kind", "config", "originals", "own", "reason"),
        [
            ("orthogonal", ORTHOGONAL, {"original": (4, 3)}, {"base": (3, 3)}, "base of shape [4, 4], got [3, 3]"),
            (
                "orthogonal",
                ORTHOGONAL,
                {"original": (4, 3)},
                {"base": (9, 4, 4)},
                "base of shape [4, 4], got [9, 4, 4]",
            ),
            ("orthogonal", ORTHOGONAL, {"original": (4, 3)}, {"base": (0,)}, "base of shape [4, 4], got [0]"),
            ("orthogonal", ORTHOGONAL, {"original": (3, 4)}, {"base": (4, 4)}, "configured for shape [4, 3]"),
            ("orthogonal", ORTHOGONAL, {"original": (4, 3)}, {"base": (4, 4), "extra": (1,)}, "has no tensor 'extra'"),
            ("orthogonal", ORTHOGONAL, {"original0": (4, 3)}, {"base": (4, 4)}, "cannot be computed from original0"),
            ("orthogonal", {}, {"original": (4, 3)}, {"base": (4, 4)}, "not a configuration of this torch"),
            (
                "orthogonal",
                {**ORTHOGONAL, "shape": [4]},
                {"original": (4,)},
                {"base": (4, 4)},
                "Dimension out of range",
            ),
            ("orthogonal", {**ORTHOGONAL, "shape": []}, {"original": ()}, {"base": (1, 1)}, "do not fit"),
            ("weight_norm", {"dim": 0}, {"original0": (2, 1), "original1": (6, 3)}, {}, "original0 of shape [6, 1]"),
            ("weight_norm", {"dim": 0}, {"original0": (1, 3), "original1": (6, 3)}, {}, "original0 of shape [6, 1]"),
            ("weight_norm", {"dim": 0}, {"original0": (1, 99), "original1": (99, 1)}, {}, "original0 of shape [99, 1]"),
            ("weight_norm", {"dim": -1}, {"original0": (6, 1), "original1": (6, 3)}, {}, "original0 of shape []"),
            ("weight_norm", {"dim": 7}, {"original0": (6, 1), "original1": (6, 3)}, {}, "Dimension out of range"),
            ("weight_norm", {"dim": 0}, {"original": (6, 3)}, {}, "cannot be computed from original"),
            (
                *("weight_norm", {"dim": 0}),
                *({"original0": (6, 1), "original1": (6, 3), "original2": (1,)}, {}, "has no tensor 'original2'"),
            ),
            ("spectral_norm", SPECTRAL, {"original": (3, 4)}, {"_u": (3,), "_v": (5,)}, "_v of shape [4], got [5]"),
            ("spectral_norm", SPECTRAL, {"original": (3, 4)}, {"_u": (1,), "_v": (4,)}, "_u of shape [3], got [1]"),
            ("spectral_norm", SPECTRAL, {"original": (3, 4)}, {"_u": (3,)}, "needs a tensor '_v'"),
            ("spectral_norm", {**SPECTRAL, "dim": 2**62}, {"original": (3, 4)}, {"_u": (3,)}, "out of range"),
        ],
    )
    def test_a_state_that_does_not_fit_its_configuration_is_named(
        self,
        kind: str,
        config: dict[str, JSON],
        originals: dict[str, tuple[int, ...]],
        own: dict[str, tuple[int, ...]],
        reason: str,
        tmp_path: Path,
    ) -> None:
        path = crafted(
            tmp_path / "a",
            f"torch>{kind}",
            config,
            {name: torch.ones(shape) for name, shape in originals.items()},
            {role: torch.ones(shape) for role, shape in own.items()},
        )
        report = orthoserde.verify(path)
        assert not report.ok
        assert not report.damaged
        assert report.misfits.keys() == {"layer.weight"}
        assert reason in report.misfits["layer.weight"]
        assert "\n" not in report.misfits["layer.weight"]
        assert report.misfits["layer.weight"] in str(report)

    def test_a_recorded_shape_that_is_not_the_computed_one_is_named(self, tmp_path: Path) -> None:
        state = {"original0": torch.ones(3, 1), "original1": torch.ones(3, 2)}
        report = orthoserde.verify(crafted(tmp_path / "a", "torch>weight_norm", {"dim": 0}, state, shape=(2, 3)))
        assert report.misfits == {"layer.weight": "recorded with shape [2, 3], its state gives [3, 2]"}

    def test_a_base_that_torch_left_none_is_not_measured(self, tmp_path: Path) -> None:
        with torch.device("meta"):
            layer = orthogonal(nn.Linear(3, 4, bias=False))
        layer.get_submodule("parametrizations.weight").original = nn.Parameter(torch.eye(4, 3))
        orthoserde.save(layer, tmp_path / "a")
        report = orthoserde.verify(tmp_path / "a")
        assert report.ok
        assert report.not_measured == {"weight": "its base is None, as torch left it on the meta device"}

    @pytest.mark.parametrize(
        ("config", "version", "reason"),
        [(None, 1, "does not have the configuration"), ({}, 2, "version 2 of torch>orthogonal")],
    )
    def test_a_configuration_that_is_not_known_is_not_measured(
        self, config: dict[str, JSON] | None, version: int, reason: str, tmp_path: Path
    ) -> None:
        path = crafted(tmp_path / "a", "torch>orthogonal", config, {"original": torch.eye(2)}, version=version)
        assert reason in orthoserde.verify(path).not_measured["layer.weight"]

    def test_dtypes_that_torch_cannot_compute_with_are_not_measured(self, tmp_path: Path) -> None:
        for original, base in ((torch.int64, torch.int64), (torch.float32, torch.float64), (torch.bool, torch.int8)):
            state = torch.eye(4, 3).to(original)
            path = crafted(
                tmp_path / "a", "torch>orthogonal", ORTHOGONAL, {"original": state}, {"base": torch.eye(4).to(base)}
            )
            report = orthoserde.verify(path)
            assert report.not_measured.keys() | report.misfits.keys() == {"layer.weight"}

    @pytest.mark.parametrize("shape", [(1_000_000, 1), (10**9, 1, 0), (10**9, 0, 1)])
    def test_a_small_file_that_stands_for_a_large_computation_is_not_computed(
        self, shape: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config: dict[str, JSON] = {"orthogonal_map": "cayley", "shape": list(shape), "use_trivialization": False}
        path = crafted(tmp_path / "a", "torch>orthogonal", config, {"original": torch.zeros(shape)})
        monkeypatch.setattr(torch.linalg, "solve", _meta_only(torch.linalg.solve))
        report = orthoserde.verify(path)
        assert "bytes at once to compute" in report.not_measured["layer.weight"]
        assert report.ok

    def test_what_a_large_file_holds_may_be_computed(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(audit, "SCRATCH_BYTES", 1)
        assert len(orthoserde.verify(path).residuals) == 6


def _meta_only(function: object) -> object:
    def solve(left: Tensor, right: Tensor) -> Tensor:
        assert left.device.type == "meta"
        return function(left, right)  # type: ignore[operator,no-any-return]

    return solve


class TestReports:
    def test_it_says_in_a_few_lines_what_was_found(self) -> None:
        report = VerifyReport(
            path="model\x1b[31m.safetensors",
            has_configuration=True,
            digests=True,
            tensors=30,
            damaged=tuple(f"layers.{i}.bias" for i in range(7)),
            residuals={"a.weight": 0.25, "b.weight": 1e-7, "c.weight": None, "f.weight": 0.1},
            off_constraint=("a.weight", "f.weight"),
            causes=dict.fromkeys(("a.weight", "f.weight"), "its base is\x1b[2Jodd"),
            misfits={"d.weight": "its base is\nodd"},
            not_measured={join("e", str(i)): "unknown" for i in range(25)},
        )
        assert not report.ok
        lines = str(report).splitlines()
        assert lines[:7] == [
            r"verified model\x1b[31m.safetensors: NOT OK",
            "  23 of 30 tensors match their digests",
            "  damaged: layers.0.bias, layers.1.bias, layers.2.bias, layers.3.bias, layers.4.bias and 2 more",
            "  1 of 3 measured tensors are on their constraint, largest residual 0.25",
            r"  off their constraint: a.weight, f.weight: its base is\x1b[2Jodd",
            r"  d.weight: does not fit: its base is\nodd",
            "  e.0: not measured: unknown",
        ]
        assert lines[-1] == "  not measured: 5 more"

    def test_a_sound_file_takes_two_lines(self, tmp_path: Path) -> None:
        orthoserde.save(nn.Linear(2, 2), tmp_path / "a")
        assert str(orthoserde.verify(tmp_path / "a")).splitlines() == [
            f"verified {tmp_path / 'a'}: ok",
            "  2 of 2 tensors match their digests",
        ]
