"""Bases that are stored as their first columns come back bit for bit, and nobody can tell."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import orthoserde
from orthoserde import Fidelity, cli, storage
from orthoserde.capture import capture
from orthoserde.manifest import COLUMNS, Manifest, ParametrizedRecord
from orthoserde.orthonormal.completion import Completion, complete
from orthoserde.transforms import canonical, columns, compact, expand
from tests.helpers import same_bits, use_threads

SHAPES = {"tall": (12, 5), "wide": (5, 12), "batched": (3, 6, 4), "deep": (2, 3, 4, 7)}
DTYPES = (torch.float32, torch.float64, torch.complex64, torch.complex128)
KINDS = [
    pytest.param(name, shape, dtype, id=f"{name}-{shape}-{str(dtype).removeprefix('torch.')}")
    for name, shape, dtype in itertools.product(("householder", "cayley", "matrix_exp"), SHAPES, DTYPES)
    if not (name == "householder" and dtype.is_complex)
]
KEY = "parametrizations.weight.0.base"


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


class Holder(nn.Module):
    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape, dtype=dtype))


def make(
    orthogonal_map: str | None = None,
    shape: tuple[int, ...] = (12, 5),
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = orthoserde.orthogonal(Holder(shape, dtype), "weight", orthogonal_map)
        with torch.no_grad():  # as training leaves it
            original = model.get_parameter("parametrizations.weight.original")
            original.add_(0.1 * torch.randn(original.shape, dtype=dtype).tril(-1))
    return model


def base_of(model: nn.Module, path: str = "") -> Tensor:
    return model.get_buffer(f"{path}{KEY}")


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize(("name", "shape", "dtype"), KINDS)
def test_a_base_comes_back_bit_for_bit_into_any_model(
    name: str, shape: str, dtype: torch.dtype, verify: bool, tmp_path: Path
) -> None:
    model, path = make(name, SHAPES[shape], dtype), tmp_path / "m"
    report = orthoserde.save(model, path)
    assert report.compact == ("weight",)
    assert report.needs_orthoserde[0] == "bases are stored as columns"
    assert "bases stored as columns: 1" in str(report)
    n, k = max(SHAPES[shape][-2:]), min(SHAPES[shape][-2:])
    stored = orthoserde.inspect(path)
    assert stored.tensors[f"{KEY}.columns"].shape == (*SHAPES[shape][:-2], n, k)
    assert KEY not in stored
    assert "bases stored as columns: 1" in str(stored)
    row_major = make(name, SHAPES[shape], dtype, seed=1)
    row_major.get_submodule("parametrizations.weight.0").register_buffer("base", base_of(row_major).contiguous())
    untrained = Holder(SHAPES[shape], dtype)
    models = {
        "live": make(name, SHAPES[shape], dtype, seed=1),
        "row-major": row_major,
        "bare": untrained,
        "meta": Holder(SHAPES[shape], dtype).to("meta"),
    }
    for sort, other in models.items():
        strides = base_of(other).stride() if sort in ("live", "row-major") else base_of(model).stride()
        loaded = orthoserde.load(other, path, verify=verify)
        assert loaded.fidelity is Fidelity.EXACT
        assert same_bits(base_of(other), base_of(model))
        assert base_of(other).stride() == strides
        assert torch.equal(
            other.get_parameter("parametrizations.weight.original"),
            model.get_parameter("parametrizations.weight.original"),
        )
    verified = orthoserde.verify(path)
    assert verified.ok
    assert set(verified.residuals) == {"weight"}


def test_parametrizations_are_not_attached_against_the_callers_will(tmp_path: Path) -> None:
    orthoserde.save(make(), tmp_path / "m")
    bare = Holder((12, 5))
    before = bare.weight.clone()
    with pytest.raises(orthoserde.IncompatibleModelError, match="plain in the model"):
        orthoserde.load(bare, tmp_path / "m", reparametrize=False)
    assert torch.equal(bare.weight, before)


@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(1, 24),
    k=st.integers(1, 24),
    batch=st.lists(st.integers(0, 3), max_size=2),
    dtype=st.sampled_from(DTYPES),
    wide=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_expanding_undoes_compacting(
    n: int, k: int, batch: list[int], dtype: torch.dtype, wide: bool, seed: int
) -> None:
    n, k = max(n, k), min(n, k)
    if 0 in batch:
        return
    model = make("cayley", (*batch, k, n) if wide else (*batch, n, k), dtype, seed)
    dense = capture(model, orthoserde.default_registry)
    packed = compact(dense)
    assert bool(packed.manifest.compact) == (n != k)
    again = expand(packed)
    assert again.manifest == dense.manifest
    for key in dense.sources:
        assert same_bits(again.tensor(key), dense.tensor(key))
        assert again.tensor(key).stride() == dense.tensor(key).stride()
    assert compact(again).manifest == packed.manifest
    for key in packed.sources:
        assert same_bits(compact(again).tensor(key), packed.tensor(key))


def test_a_file_is_compacted_and_expanded_without_a_model(tmp_path: Path) -> None:
    model = make(shape=(2, 9, 4))
    orthoserde.save(model, tmp_path / "dense", base="dense")
    orthoserde.save(model, tmp_path / "packed")
    with storage.read(tmp_path / "dense") as dense:
        storage.write(compact(dense), tmp_path / "packed again")
    with storage.read(tmp_path / "packed") as packed:
        storage.write(expand(packed), tmp_path / "dense again")
    assert (tmp_path / "packed").read_bytes() == (tmp_path / "packed again").read_bytes()
    assert (tmp_path / "dense").read_bytes() == (tmp_path / "dense again").read_bytes()


def test_the_same_state_gives_the_same_bytes_on_any_number_of_threads(tmp_path: Path) -> None:
    model = nn.Sequential(*(make(shape=(1500, 3), seed=i) for i in range(4)))
    for threads in (1, 2):
        torch.set_num_threads(threads)
        assert len(orthoserde.save(model, tmp_path / str(threads), base="compact").compact) == 4
        other = nn.Sequential(*(make(shape=(1500, 3), seed=9) for i in range(4)))
        orthoserde.load(other, tmp_path / str(threads))
        assert all(same_bits(base_of(one), base_of(two)) for one, two in zip(model, other, strict=True))
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


@pytest.mark.parametrize("shape", [(600, 3), (3, 600), (2, 500, 3)])
def test_the_rows_of_one_base_are_shared_out_among_threads(
    shape: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, other = make(shape=shape), make(shape=shape, seed=1)
    orthoserde.save(model, tmp_path / "m")
    monkeypatch.setattr(columns, "SHARED_BYTES", 64 * 600 * 4)
    use_threads(3, monkeypatch)
    meeting, rows_of = threading.Barrier(3), Completion.rows
    workers: set[int] = set()

    def rows(completion: Completion, part: slice) -> Tensor:
        if len(workers) < 3:
            workers.add(threading.get_ident())
            meeting.wait(30)  # it would not end with fewer than three at work
        return rows_of(completion, part)

    monkeypatch.setattr(Completion, "rows", rows)
    before = threading.enumerate()
    with torch.inference_mode(), torch.device("meta"):
        orthoserde.load(other, tmp_path / "m")
    assert threading.enumerate() == before
    assert len(workers) == 3
    assert same_bits(base_of(other), base_of(model))
    assert base_of(other).stride() == base_of(model).stride()


def test_a_batch_is_worked_out_one_matrix_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """See Note [Rows at a time] of ``columns``."""
    model, other = make(shape=(20, 12, 5)), make(shape=(20, 12, 5), seed=1)
    alive: weakref.WeakSet[Completion] = weakref.WeakSet()
    at_a_time: list[int] = []

    class Counted(Completion):
        def __init__(self, columns: Tensor) -> None:
            alive.add(self)
            at_a_time.append(len(alive))
            super().__init__(columns)

    monkeypatch.setattr(columns, "Completion", Counted)
    orthoserde.save(model, tmp_path / "m", base="compact")
    assert at_a_time == [1] * 20
    orthoserde.load(other, tmp_path / "m")
    assert at_a_time == [1] * 40
    with storage.read(tmp_path / "m") as packed:
        storage.write(expand(packed), tmp_path / "dense")
    assert at_a_time == [1] * 60
    assert not alive
    assert same_bits(base_of(other), base_of(model))


def test_a_file_is_as_small_as_what_it_holds(tmp_path: Path) -> None:
    layer = orthoserde.orthogonal(nn.Linear(4, 4096))
    report = orthoserde.save(layer, tmp_path / "m")
    assert report.file_bytes < 1.1 * (2 * 4096 * 4 * 4 + 4096 * 4 + 2048)
    assert orthoserde.verify(tmp_path / "m").residuals["weight"] is not None


def test_a_save_evaluates_nothing_and_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    versions = {key: tensor._version for key, tensor in model.state_dict(keep_vars=True).items()}
    state = torch.get_rng_state()
    monkeypatch.setattr(parametrize.ParametrizationList, "forward", None)
    orthoserde.save(model, tmp_path / "m", base="compact")
    assert {key: tensor._version for key, tensor in model.state_dict(keep_vars=True).items()} == versions
    assert torch.equal(torch.get_rng_state(), state)


def test_callers_modes_make_no_difference(tmp_path: Path) -> None:
    model = make()
    orthoserde.save(model, tmp_path / "m")
    with torch.inference_mode(), torch.device("meta"):
        orthoserde.save(model, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "m").read_bytes()
    loaded = make(seed=1)
    with torch.device("meta"):
        orthoserde.load(loaded, tmp_path / "m")
    assert same_bits(base_of(loaded), base_of(model))


@pytest.mark.parametrize("inside", [True, False])
def test_a_model_that_was_made_in_inference_mode_is_loaded(inside: bool, tmp_path: Path) -> None:
    model = make()
    orthoserde.save(model, tmp_path / "m")
    with torch.inference_mode():
        other = make(seed=1)
    with torch.inference_mode(inside):
        assert orthoserde.load(other, tmp_path / "m").fidelity is Fidelity.EXACT
    assert same_bits(base_of(other), base_of(model))


def test_a_load_is_a_change_that_autograd_sees(tmp_path: Path) -> None:
    model = make()
    orthoserde.save(model, tmp_path / "m")
    before = base_of(model)._version
    orthoserde.load(model, tmp_path / "m")
    assert base_of(model)._version > before


# What is not determined by its first columns


def flip(base: Tensor) -> None:
    base[..., -1, -1].view(torch.int32).bitwise_xor_(1)


def set_base(model: nn.Module, base: Tensor) -> nn.Module:
    model.get_submodule("parametrizations.weight.0").register_buffer("base", base)
    return model


def chained() -> nn.Module:
    class Same(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    model = make()
    parametrize.register_parametrization(model, "weight", Same())
    return model


def one_bit() -> nn.Module:
    model = make()
    flip(base_of(model))
    return model


def tied() -> nn.Module:
    model = make()
    model.register_buffer("tied", base_of(model))
    return model


def overlapping() -> nn.Module:
    model = make()
    model.register_buffer("part", base_of(model)[1:3])
    return model


def not_finite() -> nn.Module:
    model = make()
    columns = base_of(model)[:, :5].clone()
    columns[0] = torch.nan
    return set_base(model, complete(columns))


def off_constraint() -> nn.Module:
    model = make()
    return set_base(model, complete(base_of(model)[:, :5] * 1.001))


def random_completion() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        return parametrizations.orthogonal(Holder((12, 5)))


DENSE_MODELS = {
    "torch's own": (random_completion, "its completion is torch's random one; call orthoserde.canonicalize_, or save"),
    "one bit": (one_bit, "torch's random one"),
    "row-major": (lambda: set_base(model := make(), base_of(model).contiguous()), "not column-major"),
    "tied": (tied, "tied to another tensor"),
    "overlapping": (overlapping, "lie in the memory"),
    "chained": (chained, "one of several"),
    "widened": (lambda: make().double(), "torch's random one"),
    "not finite": (not_finite, "not finite"),
    "off its constraint": (off_constraint, "farther from orthonormal"),
}


@pytest.mark.parametrize("name", DENSE_MODELS)
def test_what_is_not_determined_is_stored_whole(name: str, tmp_path: Path) -> None:
    build, reason = DENSE_MODELS[name]
    model = build()
    with pytest.raises(orthoserde.OrthoserdeError, match=f"weight: .*{reason}") as caught:
        orthoserde.save(model, tmp_path / "m", base="compact")
    assert isinstance(caught.value, ValueError)
    assert not (tmp_path / "m").exists()
    assert orthoserde.save(model, tmp_path / "auto").compact == ()
    orthoserde.save(model, tmp_path / "dense", base="dense")
    assert (tmp_path / "auto").read_bytes() == (tmp_path / "dense").read_bytes()


@pytest.mark.parametrize("shape", [(6, 6), (2, 4, 4)])
def test_square_and_plain_ones_have_nothing_to_compact(shape: tuple[int, ...], tmp_path: Path) -> None:
    model = nn.ModuleList([make(shape=shape), nn.Linear(3, 3), parametrizations.spectral_norm(nn.Linear(3, 4))])
    householder = parametrizations.orthogonal(Holder((6, 3)), orthogonal_map="householder", use_trivialization=False)
    model.append(householder)
    assert orthoserde.save(model, tmp_path / "m", base="compact").compact == ()


def test_every_tensor_that_cannot_be_is_named(tmp_path: Path) -> None:
    model = nn.ModuleList([random_completion(), make(), one_bit()])
    with pytest.raises(orthoserde.OrthoserdeError) as caught:
        orthoserde.save(model, tmp_path / "m", base="compact")
    assert "0.weight: its" in str(caught.value)
    assert "2.weight: its" in str(caught.value)
    assert "1.weight" not in str(caught.value)
    assert orthoserde.save(model, tmp_path / "m").compact == ("1.weight",)


def test_what_takes_long_to_find_out_is_compacted_only_when_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(canonical, "MOST_MULTIPLICATIONS", 12 * 5 * 5 - 1)
    report = orthoserde.save(make(), tmp_path / "m")
    assert (report.compact, report.untried) == ((), ("weight",))
    assert "bases stored whole, where base='compact' would try columns: 1" in str(report)
    report = orthoserde.save(make(), tmp_path / "m", base="compact")
    assert (report.compact, report.untried) == (("weight",), ())
    with orthoserde.Checkpoints(tmp_path / "folder") as checkpoints:
        checkpoints.save(1, make(), wait=False)
        written = checkpoints.wait()
    assert written is not None
    assert written.untried == ("weight",)


def test_a_report_names_no_base_that_was_tried_or_cannot_be_stored_so(tmp_path: Path) -> None:
    for model in (random_completion(), one_bit(), make(), make(shape=(6, 6)), nn.Linear(2, 2)):
        assert orthoserde.save(model, tmp_path / "m").untried == ()
    assert orthoserde.save(make(), tmp_path / "m", base="dense").untried == ()


def test_a_save_looks_at_each_base_once_unless_one_is_too_large_to_try(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_at: list[str] = []
    find = canonical._obstacle

    def obstacle(record: ParametrizedRecord, key: str, shape: tuple[int, ...], manifest: Manifest) -> str:
        looked_at.append(record.name)
        return find(record, key, shape, manifest)

    monkeypatch.setattr(canonical, "_obstacle", obstacle)
    model = nn.ModuleList([make(shape=(13, 5)), random_completion()])
    assert orthoserde.save(model, tmp_path / "m").untried == ()
    assert looked_at == ["0.weight", "1.weight"]
    looked_at.clear()
    monkeypatch.setattr(canonical, "MOST_MULTIPLICATIONS", 13 * 5 * 5 - 1)
    assert orthoserde.save(model, tmp_path / "m").untried == ("0.weight",)
    assert looked_at == ["0.weight", "1.weight", "0.weight"]


@pytest.mark.parametrize("name", ["row-major", "tied", "overlapping", "chained"])
def test_a_report_names_no_base_that_compact_would_refuse_without_trying(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build, reason = DENSE_MODELS[name]
    monkeypatch.setattr(canonical, "MOST_MULTIPLICATIONS", 1)
    report = orthoserde.save(build(), tmp_path / "m")
    assert (report.compact, report.untried) == ((), ())
    with pytest.raises(orthoserde.OrthoserdeError, match=reason):
        orthoserde.save(build(), tmp_path / "m", base="compact")


def test_a_base_of_another_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="base: expected one of auto, dense, compact, got 'rows'"):
        orthoserde.save(make(), tmp_path / "m", base="rows")  # type: ignore[arg-type]


# Together with everything else


def test_a_shared_module_is_stored_once(tmp_path: Path) -> None:
    def shared(seed: int) -> nn.ModuleDict:
        layer = make(seed=seed)
        return nn.ModuleDict({"a": layer, "b": layer, "c": make(seed=seed + 7)})

    model = shared(0)
    assert orthoserde.save(model, tmp_path / "m", base="compact").compact == ("a.weight", "c.weight")
    manifest = orthoserde.inspect(tmp_path / "m")
    assert manifest.aliases[f"b.{KEY}.columns"] == f"a.{KEY}.columns"
    other = shared(1)
    assert orthoserde.load(other, tmp_path / "m").fidelity is Fidelity.EXACT
    assert same_bits(base_of(other, "b."), base_of(model, "b."))
    layer = Holder((12, 5))
    bare = nn.ModuleDict({"a": layer, "b": layer, "c": Holder((12, 5))})
    assert orthoserde.load(bare, tmp_path / "m").fidelity is Fidelity.EXACT
    assert same_bits(base_of(bare, "a."), base_of(model, "a."))
    again = expand(compact(capture(model, orthoserde.default_registry)))
    assert again.manifest == capture(model, orthoserde.default_registry).manifest


def test_a_selection_and_added_weights_go_with_it(tmp_path: Path) -> None:
    layer = make()
    model = nn.ModuleDict({"frozen": nn.Linear(3, 3).requires_grad_(False), "layer": layer})
    report = orthoserde.save(model, tmp_path / "m", select="trainable", include_weights=True)
    assert report.compact == ("layer.weight",)
    with storage.read(tmp_path / "m") as checkpoint:
        assert torch.equal(checkpoint.tensor("layer.weight"), torch.as_tensor(layer.weight))
        assert same_bits(expand(checkpoint).tensor(f"layer.{KEY}"), base_of(model, "layer."))
    other = nn.ModuleDict({"frozen": nn.Linear(3, 3).requires_grad_(False), "layer": make(seed=1)})
    assert orthoserde.load(other, tmp_path / "m").fidelity is Fidelity.EXACT
    assert same_bits(base_of(other, "layer."), base_of(model, "layer."))


def test_a_widened_load_takes_the_base_as_it_was(tmp_path: Path) -> None:
    model = make()
    orthoserde.save(model, tmp_path / "m")
    other = make(dtype=torch.float64)
    assert orthoserde.load(other, tmp_path / "m").fidelity is Fidelity.UNVERIFIED
    assert torch.equal(base_of(other), base_of(model).to(torch.float64))


def test_a_computed_weight_is_compact_when_it_is_saved_again(tmp_path: Path) -> None:
    save_file({"weight": torch.as_tensor(make().weight).detach().contiguous()}, tmp_path / "old")
    model = make(seed=3)
    with pytest.warns(orthoserde.LegacyCheckpointWarning):
        orthoserde.load(model, tmp_path / "old")
    assert orthoserde.save(model, tmp_path / "m", base="compact").compact == ("weight",)


def test_an_inspection_shows_how_it_is_stored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    orthoserde.save(make(), tmp_path / "m")
    record = orthoserde.inspect(tmp_path / "m").parametrized[0]
    assert record.chain[0].tensors == {"base": COLUMNS}
    assert record.tensor_keys() == ["parametrizations.weight.original", f"{KEY}.columns"]
    assert cli.main(["inspect", str(tmp_path / "m")]) == 0
    assert "stored as columns: base" in " ".join(capsys.readouterr().out.split())
