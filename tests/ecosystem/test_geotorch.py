"""geotorch's constraints: known where geotorch is imported, and kept where they are not known."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import geotorch
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import orthoserde
from orthoserde import Fidelity, IncompatibleModelError, LegacyCheckpointWarning, Registry, storage
from orthoserde.capture import capture
from orthoserde.integrations.geotorch import extend
from orthoserde.integrations.geotorch.codec import GeotorchCodec
from orthoserde.integrations.geotorch.constraints import ROUNDING, SORTS
from orthoserde.manifest import OPAQUE
from orthoserde.registry.codec import Codec, own_tensors
from orthoserde.restore import restore
from tests.ecosystem.constrained import CASES, CONSTRAINTS, Holder, adam, bare, by, constrained, of, train, weight_of
from tests.helpers import assert_same_state, assert_unchanged, snapshot, surroundings

FILE = "model.safetensors"
TRAINABLE = [case for case in CASES if case[0] != "Rn"]


def test_every_constraint_of_geotorch_is_known_and_tried() -> None:
    classes = {name for name in geotorch.__all__ if isinstance(getattr(geotorch, name), type)}
    assert set(SORTS) == set(CONSTRAINTS) == classes - {"ProductManifold"}  # which is made of others, and no constraint
    registry = extend(Registry())
    assert set(registry) == {f"geotorch>{name}" for name in SORTS}
    assert all(isinstance(registry.for_kind(kind), Codec) for kind in registry)


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_training_goes_on_where_it_stopped(name: str, shape: str, tmp_path: Path) -> None:
    model = constrained(name, shape)
    optimizer = adam(model)
    train(model, optimizer, 3)
    report = orthoserde.save(model, tmp_path / FILE, optimizer=optimizer)
    assert not report.opaque
    assert not report.unconfigured
    other = constrained(name, shape)
    second = adam(other)
    before = surroundings()
    assert orthoserde.load(other, tmp_path / FILE, optimizer=second).fidelity is Fidelity.EXACT
    assert surroundings() == before
    assert_same_state(other, model)
    assert torch.equal(weight_of(other), weight_of(model))
    assert train(other, second, 5) == train(model, optimizer, 5)
    assert_same_state(other, model)


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_the_file_says_how_it_was_made(name: str, shape: str, tmp_path: Path) -> None:
    orthoserde.save(constrained(name, shape), tmp_path / FILE)
    (record,) = orthoserde.inspect(tmp_path / FILE).parametrized
    size = {} if name == "Symmetric" else {"size": list(CONSTRAINTS[name].shapes[shape])}
    assert record.chain[0].kind == f"geotorch>{name}"
    assert record.chain[0].config == {**CONSTRAINTS[name].config, **size}


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_a_bare_model_gets_its_constraint_back_and_trains_on(name: str, shape: str, tmp_path: Path) -> None:
    model = constrained(name, shape)
    train(model, adam(model), 3)
    orthoserde.save(model, tmp_path / FILE)
    plain = bare(name, shape)
    before = surroundings()
    assert orthoserde.load(plain, tmp_path / FILE).fidelity is Fidelity.EXACT
    assert surroundings() == before
    # geotorch makes some originals as parts of larger tensors; nobody else lays a tensor out with gaps.
    assert_same_state(plain, model, strides=False)
    assert torch.equal(weight_of(plain), weight_of(model))
    assert all(tensor.device.type == "cpu" for tensor in plain.buffers())
    assert train(plain, adam(plain), 5) == train(model, adam(model), 5)


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_a_bare_model_on_the_meta_device_gets_all_of_it(name: str, shape: str, tmp_path: Path) -> None:
    model = constrained(name, shape)
    orthoserde.save(model, tmp_path / FILE)
    plain = bare(name, shape).to("meta")
    assert orthoserde.load(plain, tmp_path / FILE).fidelity is Fidelity.EXACT
    assert torch.equal(weight_of(plain), weight_of(model))
    assert all(tensor.device.type == "cpu" for tensor in (*plain.parameters(), *plain.buffers()))


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_building_one_costs_neither_memory_nor_random_numbers(name: str, shape: str) -> None:
    codec = GeotorchCodec(getattr(geotorch, name), name)
    like = torch.empty(CONSTRAINTS[name].shapes[shape])
    link = parametrized_by(constrained(name, shape))
    before = surroundings()
    config = codec.config(link)
    assert config is not None
    built = codec.build(config, like)
    assert surroundings() == before
    ours, theirs = own_tensors(built), own_tensors(link)
    assert {role: tensor.shape for role, tensor in ours.items()} == {role: t.shape for role, t in theirs.items()}
    assert all(tensor.device.type == "meta" for tensor in ours.values())


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_an_attached_constraint_is_the_one_that_was_saved(name: str, shape: str, tmp_path: Path) -> None:
    model = constrained(name, shape)
    orthoserde.save(model, tmp_path / FILE)
    plain = bare(name, shape)
    orthoserde.load(plain, tmp_path / FILE)
    orthoserde.save(plain, tmp_path / "again")
    again, first = orthoserde.inspect(tmp_path / "again"), orthoserde.inspect(tmp_path / FILE)
    assert again.parametrized == first.parametrized
    assert {key: record.digest for key, record in again.tensors.items()} == {
        key: record.digest for key, record in first.tensors.items()
    }
    link = parametrized_by(plain)
    if hasattr(link, "sample"):  # its buffers for sampling are in no file
        assert parametrized_by(model).sample().dtype is link.sample().dtype


def parametrized_by(model: nn.Module) -> Any:
    """The first parametrization of the weight."""
    return model.get_submodule("parametrizations.weight.0")


@pytest.mark.parametrize(("name", "shape"), TRAINABLE)
def test_another_configuration_is_refused(name: str, shape: str, tmp_path: Path) -> None:
    other = CONSTRAINTS[name].other
    assert other is not None
    orthoserde.save(constrained(name, shape), tmp_path / FILE)
    model = bare(name, shape)
    other(model)
    before = snapshot(model)
    with pytest.raises(IncompatibleModelError, match=rf"geotorch>{name}: \w+ is .* in the file, .* in the model"):
        orthoserde.load(model, tmp_path / FILE)
    assert_unchanged(model, before)


def test_another_rank_is_refused_although_all_shapes_of_the_base_fit(tmp_path: Path) -> None:
    model, other = bare("LowRank", "tall"), bare("LowRank", "tall")
    by(geotorch.low_rank, 2)(model)
    by(geotorch.low_rank, 1)(other)
    orthoserde.save(model, tmp_path / FILE)
    with pytest.raises(IncompatibleModelError, match="rank is 2 in the file, 1 in the model"):
        orthoserde.load(other, tmp_path / FILE)


def test_another_class_is_refused(tmp_path: Path) -> None:
    orthoserde.save(constrained("Stiefel", "tall"), tmp_path / FILE)
    with pytest.raises(IncompatibleModelError, match="the file has geotorch>Stiefel, the model geotorch>Grassmannian"):
        orthoserde.load(constrained("Grassmannian", "tall"), tmp_path / FILE)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_dtypes_are_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    for name in ("Stiefel", "LowRank", "Sphere", "Hurwitz", "Skew"):
        shape = next(iter(CONSTRAINTS[name].shapes.values()))
        model, plain = Holder(shape, dtype), Holder(shape, dtype)
        CONSTRAINTS[name].register(model)
        orthoserde.save(model, tmp_path / FILE)
        assert orthoserde.load(plain, tmp_path / FILE).fidelity is Fidelity.EXACT
        assert_same_state(plain, model, strides=False)
        assert orthoserde.verify(tmp_path / FILE).ok


# Functions of one's own


def own(matrix: Tensor) -> Tensor:
    rotation: Tensor = torch.linalg.matrix_exp(matrix)
    return rotation


def own_positive(values: Tensor) -> Tensor:
    return values.exp()


OWN: dict[str, Callable[[nn.Module], object]] = {
    "triv": by(geotorch.orthogonal, own),
    "triv of a factor": by(geotorch.low_rank, 2, own),
    "f": by(geotorch.fixed_rank, 2, (own_positive, torch.log)),
    "f of SL": by(geotorch.sln, (own_positive, torch.log)),
    "radius": by(geotorch.sphere, torch.tensor(2.0)),
}


@pytest.mark.parametrize("name", OWN)
def test_what_has_no_name_leaves_the_configuration_unknown(name: str, tmp_path: Path) -> None:
    model, other = Holder((4, 4)), Holder((4, 4))
    OWN[name](model)
    OWN[name](other)
    assert "weight" in orthoserde.save(model, tmp_path / FILE).unconfigured
    report = orthoserde.load(other, tmp_path / FILE)
    assert report.fidelity is Fidelity.UNVERIFIED
    assert "does not know the configuration" in str(report)
    assert_same_state(other, model)
    plain = Holder((4, 4))
    before = snapshot(plain)
    with pytest.raises(IncompatibleModelError, match="does not say how geotorch>"):
        orthoserde.load(plain, tmp_path / FILE)
    assert_unchanged(plain, before)


def test_an_attribute_that_was_changed_leaves_the_configuration_unknown() -> None:
    model = constrained("LowRank", "tall")
    codec = GeotorchCodec(geotorch.LowRank, "LowRank")
    assert codec.config(parametrized_by(model)) is not None
    parametrized_by(model)[2].triv = geotorch.SO.trivializations["cayley"]
    assert codec.config(parametrized_by(model)) is None


def test_functions_that_are_made_anew_are_told_apart() -> None:
    # geotorch makes the function of SL for each instance, around the one that it was given.
    codec, link = GeotorchCodec(geotorch.SL, "SL"), geotorch.SL((3, 3))
    assert codec.config(link) == {"f": "softplus", "size": [3, 3], "triv": "expm"}
    link.f = geotorch.SL((3, 3)).f
    assert codec.config(link) is not None
    link.f, _ = around(own_positive)
    assert codec.config(link) is None


def around(function: Callable[[Tensor], Tensor]) -> tuple[Any, Any]:
    """The function of SL, around another one than softplus."""
    fs = geotorch.FixedRank.fs
    softplus = fs["softplus"]
    fs["softplus"] = (function, torch.log)
    try:
        return geotorch.SL.parse_f("softplus")  # type: ignore[no-any-return]
    finally:
        fs["softplus"] = softplus


# Unknown classes


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_as_an_unknown_class_its_state_is_kept_all_the_same(name: str, shape: str, tmp_path: Path) -> None:
    registry = Registry()  # one that knows nothing of geotorch
    model = constrained(name, shape)
    train(model, adam(model), 3)
    with capture(model, registry) as checkpoint:
        storage.write(checkpoint, tmp_path / FILE)
    other = constrained(name, shape)
    with storage.read(tmp_path / FILE) as checkpoint:
        assert [link.kind for link in checkpoint.manifest.parametrized[0].chain] == [OPAQUE]
        assert restore(checkpoint, other, registry).fidelity is Fidelity.UNVERIFIED
    assert_same_state(other, model)
    assert train(other, adam(other), 5) == train(model, adam(model), 5)


class Mine(geotorch.Stiefel):  # type: ignore[misc]
    pass


def test_a_class_of_ones_own_is_not_taken_for_geotorchs(tmp_path: Path) -> None:
    model, other = bare("Stiefel", "tall"), bare("Stiefel", "tall")
    of(Mine)(model)
    of(Mine)(other)
    assert orthoserde.save(model, tmp_path / FILE).opaque == ("weight",)
    assert orthoserde.load(other, tmp_path / FILE).fidelity is Fidelity.UNVERIFIED
    assert_same_state(other, model)
    with pytest.raises(IncompatibleModelError, match="the file has the parametrization Mine"):
        orthoserde.load(constrained("Stiefel", "tall"), tmp_path / FILE)


def test_what_the_user_registered_stays(tmp_path: Path) -> None:
    registry = Registry()

    @registry.register("geotorch>Sphere")
    class Sphere(nn.Module):
        def forward(self, value: Tensor) -> Tensor:
            return torch.nn.functional.normalize(value, dim=-1)

    registry.register("mine>Stiefel")(Mine)
    extended = extend(registry)
    assert extended.for_type(Sphere) is registry.for_type(Sphere)
    assert extended.for_type(geotorch.Sphere) is None
    assert extended.for_type(Mine) is registry.for_type(Mine)
    assert len(registry) == 2


def test_a_constraint_inside_of_a_registered_one_is_checked_too(tmp_path: Path) -> None:
    registry = Registry()

    @registry.register("tests>Scaled")
    class Scaled(nn.Module):
        def __init__(self, triv: str = "expm") -> None:
            super().__init__()
            self.rotation = geotorch.SO((4, 4), triv)

        def forward(self, value: Tensor) -> Tensor:
            rotated: Tensor = self.rotation(value)
            return 2.0 * rotated

        def right_inverse(self, value: Tensor) -> Tensor:
            original: Tensor = self.rotation.right_inverse(value / 2.0, check_in_manifold=False)
            return original

    model, other = Holder((4, 4)), Holder((4, 4))
    parametrize.register_parametrization(model, "weight", Scaled(), unsafe=True)
    parametrize.register_parametrization(other, "weight", Scaled(), unsafe=True)
    orthoserde.save(model, tmp_path / FILE, registry=registry)
    assert orthoserde.load(other, tmp_path / FILE, registry=registry).fidelity is Fidelity.EXACT
    assert_same_state(other, model)


def test_a_list_is_as_good_a_size_as_a_tuple() -> None:
    codec = GeotorchCodec(geotorch.Skew, "Skew")
    assert codec.config(geotorch.Skew([4, 4])) == codec.config(geotorch.Skew(torch.Size((4, 4)))) is not None


def test_a_base_that_was_moved_to_the_present_point_is_kept(tmp_path: Path) -> None:
    model, other = constrained("Stiefel", "wide"), constrained("Stiefel", "wide")
    train(model, adam(model), 3)
    geotorch.update_base(model, "weight")
    orthoserde.save(model, tmp_path / FILE)
    assert orthoserde.load(other, tmp_path / FILE).fidelity is Fidelity.EXACT
    assert train(other, adam(other), 3) == train(model, adam(model), 3)


def test_a_chain_is_kept(tmp_path: Path) -> None:
    def chained() -> Holder:
        model = Holder((4, 4))
        geotorch.skew(model, "weight")
        parametrize.register_parametrization(model, "weight", geotorch.Rn(torch.Size((4, 4))), unsafe=True)
        return model

    model, other, plain = chained(), chained(), Holder((4, 4))
    orthoserde.save(model, tmp_path / FILE)
    assert orthoserde.load(other, tmp_path / FILE).fidelity is Fidelity.EXACT
    assert orthoserde.load(plain, tmp_path / FILE).fidelity is Fidelity.EXACT
    assert torch.equal(weight_of(other), weight_of(model))
    assert torch.equal(weight_of(plain), weight_of(model))


def test_recurrent_kernels_go_on(tmp_path: Path) -> None:
    def cell() -> nn.RNNCell:
        rnn = nn.RNNCell(3, 6)
        geotorch.orthogonal(rnn, "weight_hh", triv="cayley")
        parametrized_by_cayley = rnn.get_submodule("parametrizations.weight_hh.0")
        rnn.weight_hh = parametrized_by_cayley.sample("torus")  # type: ignore[operator]
        return rnn

    model, other = cell(), cell()
    orthoserde.save(model, tmp_path / FILE)
    assert orthoserde.load(other, tmp_path / FILE).fidelity is Fidelity.EXACT
    inputs = torch.randn(2, 3)
    assert torch.equal(other(inputs), model(inputs))


# Limits


def test_a_batch_under_alpha_stable_is_refused_as_torch_refuses_it(tmp_path: Path) -> None:
    def batch() -> Holder:
        model = Holder((2, 4, 4))
        geotorch.alpha_stable(model, "weight", 0.5)
        return model

    # geotorch keeps one identity for the whole batch, an expanded tensor, into which torch cannot write either.
    model, other = batch(), batch()
    with pytest.raises(RuntimeError, match="more than one element of the written-to tensor"):
        other.load_state_dict(model.state_dict())
    orthoserde.save(model, tmp_path / FILE)
    before = snapshot(other)
    with pytest.raises(IncompatibleModelError, match=r"weight\.0\.In: its elements share memory"):
        orthoserde.load(other, tmp_path / FILE)
    assert_unchanged(other, before)
    parametrized_by(other).In = parametrized_by(other).In.contiguous()
    assert orthoserde.load(other, tmp_path / FILE).fidelity is Fidelity.EXACT
    assert torch.equal(weight_of(other), weight_of(model))
    plain = Holder((2, 4, 4))
    assert orthoserde.load(plain, tmp_path / FILE).fidelity is Fidelity.EXACT
    assert torch.equal(weight_of(plain), weight_of(model))


# Measuring

UNMEASURED = {"Rn", "GLp"}


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_verify_measures_the_constraint_after_training(name: str, shape: str, tmp_path: Path) -> None:
    model = constrained(name, shape)
    train(model, adam(model), 20)
    orthoserde.save(model, tmp_path / FILE)
    report = orthoserde.verify(tmp_path / FILE)
    assert report.ok
    assert not report.not_measured
    residual = report.residuals["weight"]
    assert residual is None if name in UNMEASURED else residual is not None
    loaded = orthoserde.load(constrained(name, shape), tmp_path / FILE)
    assert loaded.tensors["weight"].residual == residual


@pytest.mark.parametrize(("name", "shape"), [case for case in CASES if case[0] not in UNMEASURED])
def test_a_tensor_off_the_constraint_is_noticed(name: str, shape: str) -> None:
    codec = GeotorchCodec(getattr(geotorch, name), name)
    model = constrained(name, shape)
    config = codec.config(parametrized_by(model))
    assert config is not None
    weight = weight_of(model)
    assert codec.admits(weight, config)
    inside = codec.residual_in(weight, config)
    off = 3 * weight + torch.linspace(1, 2, weight.numel()).reshape(weight.shape)
    if name[0] in "PH":  # of those with a sign: the wrong one
        off = weight + torch.eye(weight.size(-1)) * (20 if name == "Hurwitz" else -20)
    outside = codec.residual_in(off, config)
    assert not codec.admits(off, config)
    assert inside is not None
    assert outside is not None
    assert outside > 100 * inside


@pytest.mark.parametrize("name", [name for name in CONSTRAINTS if name not in UNMEASURED])
def test_rounding_of_a_larger_tensor_is_far_from_what_is_refused(name: str) -> None:
    side = 24 if name == "Hurwitz" else 96
    model = Holder((side, side))
    CONSTRAINTS[name].register(model)
    train(model, adam(model), 10)
    codec, weight = GeotorchCodec(getattr(geotorch, name), name), weight_of(model)
    config = codec.config(parametrized_by(model))
    assert config is not None
    assert codec.admits(weight, config)
    distance = codec.residual_in(weight, config)
    assert distance is not None
    scale = SORTS[name].scale(weight.double(), SORTS[name].vectors)
    assert distance <= ROUNDING / 10 * torch.finfo(torch.float32).eps * scale
    # Rounding to bfloat16 leaves symmetry and intervals as they are; where it does not, it is noticed.
    if name in ("SO", "Stiefel", "Grassmannian", "Sphere", "SphereEmbedded", "LowRank", "FixedRank"):
        assert not codec.admits(weight.bfloat16().float(), config)


def test_a_damaged_base_is_found_by_verify_and_diagnose(tmp_path: Path) -> None:
    model = constrained("Stiefel", "tall")
    with torch.no_grad():
        parametrized_by(model).base.mul_(1.01)
    orthoserde.save(model, tmp_path / FILE)
    assert orthoserde.verify(tmp_path / FILE).off_constraint == ("weight",)
    assert [finding.code for finding in orthoserde.diagnose(model)] == ["weight-off-constraint"]


VERIFY = """
import sys, geotorch, orthoserde
for path in sys.argv[1:]:
    report = orthoserde.verify(path)
    print(report.ok, report.residuals.get("weight"))
"""


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_tensor_that_is_not_finite_is_off_the_constraint_and_does_not_end_the_process(
    value: float, tmp_path: Path
) -> None:
    """LAPACK's eigenvalues of such a matrix write past its memory."""
    # A square matrix has one column space, whatever its parameters are.
    measured = [case for case in TRAINABLE if SORTS[case[0]].distance and case != ("Grassmannian", "square")]
    paths = [str(tmp_path / f"{name} {shape}") for name, shape in measured]
    for (name, shape), path in zip(measured, paths, strict=True):
        model = constrained(name, shape)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(value)
        orthoserde.save(model, path)
    found = subprocess.run([sys.executable, "-c", VERIFY, *paths], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert dict(zip(paths, found.stdout.splitlines(), strict=True)) == dict.fromkeys(paths, "False nan")


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_a_sound_model_has_no_traps(name: str, shape: str) -> None:
    model = constrained(name, shape)
    optimizer = adam(model)
    train(model, optimizer, 3)
    assert orthoserde.diagnose(model, optimizer) == []


# Computed weights


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_a_computed_weight_starts_afresh_or_is_refused(name: str, shape: str, tmp_path: Path) -> None:
    model, other = constrained(name, shape), constrained(name, shape)
    train(model, adam(model), 3)
    weight = weight_of(model).contiguous()
    safetensors.torch.save_file({"weight": weight, "shift": model.shift.detach()}, tmp_path / FILE)
    before = snapshot(other)
    if SORTS[name].recover is None:
        with pytest.raises(IncompatibleModelError, match="cannot be recovered"):
            orthoserde.load(other, tmp_path / FILE)
        assert_unchanged(other, before)
        return
    with pytest.warns(LegacyCheckpointWarning):
        assert orthoserde.load(other, tmp_path / FILE).fidelity is Fidelity.INFERENCE
    if "Sphere" in name:
        assert torch.allclose(weight_of(other), weight, rtol=0, atol=4 * 2.5 * torch.finfo(torch.float32).eps)
    else:
        assert torch.equal(weight_of(other), weight)
    train(other, adam(other), 10)
    assert orthoserde.save(other, tmp_path / "again").parametrized == 1
    assert orthoserde.verify(tmp_path / "again").ok


@pytest.mark.parametrize("name", [name for name, sort in SORTS.items() if sort.recover is not None])
def test_a_damaged_weight_is_projected(name: str, tmp_path: Path) -> None:
    shape = next(iter(CONSTRAINTS[name].shapes))
    model, other = constrained(name, shape), constrained(name, shape)
    weight = weight_of(model)
    damaged = weight + 0.05 * torch.linspace(0, 1, weight.numel()).reshape(weight.shape)
    safetensors.torch.save_file({"weight": damaged, "shift": model.shift.detach()}, tmp_path / FILE)
    before = snapshot(other)
    with pytest.raises(IncompatibleModelError, match="off the constraint"):
        orthoserde.load(other, tmp_path / FILE)
    assert_unchanged(other, before)
    with pytest.warns(LegacyCheckpointWarning):
        orthoserde.load(other, tmp_path / FILE, legacy="project")
    orthoserde.save(other, tmp_path / "again")
    assert orthoserde.verify(tmp_path / "again").ok
    assert float((weight_of(other) - damaged).abs().max()) < 0.1


# Serving


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_a_baked_model_keeps_its_weight(name: str, shape: str, tmp_path: Path) -> None:
    model = constrained(name, shape)
    train(model, adam(model), 3)
    weight = weight_of(model)
    assert f"geotorch>{name}" in str(orthoserde.bake_(model))
    assert torch.equal(weight_of(model), weight)
    assert set(model.state_dict()) == {"weight", "shift"}


# Without geotorch


def test_a_file_does_not_have_geotorch_imported(tmp_path: Path) -> None:
    orthoserde.save(constrained("Stiefel", "tall"), tmp_path / FILE)
    code = f"""
import sys, torch, orthoserde
assert "1 x geotorch>Stiefel" in str(orthoserde.inspect({str(tmp_path / FILE)!r}))
assert "not registered" in orthoserde.verify({str(tmp_path / FILE)!r}).not_measured["weight"]
class Plain(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.shift = torch.nn.Parameter(torch.zeros(5, 3)), torch.nn.Parameter(torch.zeros(3))
try:
    orthoserde.load(Plain(), {str(tmp_path / FILE)!r})
except orthoserde.IncompatibleModelError as error:
    assert "geotorch>Stiefel in the file, which is not registered" in str(error), error
else:
    raise AssertionError("it was loaded")
assert "geotorch" not in sys.modules
import geotorch
model = Plain()
assert orthoserde.load(model, {str(tmp_path / FILE)!r}).fidelity is orthoserde.Fidelity.EXACT
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# Strangers' files


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"size": [5, 3]},
        {"size": [5, 3], "triv": "eval"},
        {"size": [5, 3], "triv": ["expm"]},
        {"size": [3, 5], "triv": "expm"},
        {"size": [5, -3], "triv": "expm"},
        {"size": [5, True], "triv": "expm"},
        {"size": "53", "triv": "expm"},
        {"size": [5, 3], "triv": "expm", "more": 1},
    ],
)
def test_a_configuration_that_is_none_does_not_build(config: dict[str, Any]) -> None:
    codec = GeotorchCodec(geotorch.Stiefel, "Stiefel")
    with pytest.raises(orthoserde.ConfigError, match="geotorch>Stiefel"):
        codec.build(config, torch.empty(5, 3))
    assert codec.check(config, {"original": (5, 3)}, {"base": (5, 5)}) is not None


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("LowRank", {"size": [5, 3], "triv": "expm", "rank": 0}),
        ("LowRank", {"size": [5, 3], "triv": "expm", "rank": 4}),
        ("LowRank", {"size": [5, 3], "triv": "expm", "rank": 2.0}),
        ("AlmostOrthogonal", {"size": [5, 3], "triv": "expm", "f": "softplus", "lam": 0.1}),
        ("AlmostOrthogonal", {"size": [5, 3], "triv": "expm", "f": "sin", "lam": 1.5}),
        ("Sphere", {"size": [5, 3], "radius": 0}),
        ("Sphere", {"size": [5, 3], "radius": "2"}),
        ("SO", {"size": [5, 3], "triv": "expm", "lower": True}),
        ("SO", {"size": [5, 3], "triv": "expm", "lower": 1}),
    ],
)
def test_a_configuration_out_of_range_does_not_build(name: str, config: dict[str, Any]) -> None:
    with pytest.raises(orthoserde.ConfigError, match=f"geotorch>{name}"):
        GeotorchCodec(getattr(geotorch, name), name).build(config, torch.empty(5, 3))


def test_shapes_that_contradict_each_other_are_noticed() -> None:
    codec = GeotorchCodec(geotorch.Stiefel, "Stiefel")
    config: dict[str, Any] = {"size": [5, 3], "triv": "expm"}
    assert codec.check(config, {"original": (5, 3)}, {"base": (5, 5)}) is None
    assert codec.check(config, {"original": (5, 3)}, {"base": (4, 4)}) is not None
    assert codec.check(config, {"original": (5, 3)}, {}) is not None
    assert codec.check(config, {"original0": (5, 3)}, {"base": (5, 5)}) is not None
    assert codec.check(config, {"original": (2**40, 2**20)}, {"base": (5, 5)}) is not None
