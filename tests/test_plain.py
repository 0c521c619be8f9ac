"""Models and files without any parametrization, as with safetensors' save_model and load_model."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils import weight_norm as old_weight_norm
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm
from torch.optim.swa_utils import AveragedModel

import orthoserde
from orthoserde import Fidelity, IncompatibleModelError


class Tied(nn.Module):
    """A language model in small: the decoder is the embedding."""

    def __init__(self, tie: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.norm = nn.BatchNorm1d(4)
        self.decoder = nn.Linear(4, 7)
        if tie:
            self.decoder.weight = self.embedding.weight


def equal(left: nn.Module, right: nn.Module) -> bool:
    ours, theirs = left.state_dict(), right.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_plain_model_round_trips_exactly(tmp_path: Path) -> None:
    model, other = Tied(), Tied()
    report = orthoserde.save(model, tmp_path / "m.safetensors")
    assert report.aliases == {"decoder.weight": "embedding.weight"}
    assert report.needs_orthoserde == ("tied tensors are stored once",)
    loaded = orthoserde.load(other, tmp_path / "m.safetensors")
    assert loaded.fidelity is Fidelity.EXACT
    assert (loaded.missing_keys, loaded.unexpected_keys) == ([], [])
    assert tuple(loaded) == ([], [])
    assert equal(model, other)
    assert other.decoder.weight is other.embedding.weight


def test_safetensors_loads_what_orthoserde_saved(tmp_path: Path) -> None:
    model, other = Tied(), Tied()
    orthoserde.save(model, tmp_path / "m.safetensors")
    missing, unexpected = safetensors.torch.load_model(other, tmp_path / "m.safetensors")
    assert not missing
    assert not unexpected
    assert equal(model, other)


def test_torch_loads_what_orthoserde_saved_where_the_report_says_so(tmp_path: Path) -> None:
    model, other = Tied(tie=False), Tied(tie=False)
    assert orthoserde.save(model, tmp_path / "m.safetensors").needs_orthoserde == ()
    other.load_state_dict(safetensors.torch.load_file(tmp_path / "m.safetensors"))
    assert equal(model, other)


@pytest.mark.parametrize("tie", [True, False])
def test_orthoserde_loads_what_safetensors_saved(tmp_path: Path, tie: bool) -> None:
    model, other = Tied(tie), Tied(tie)
    safetensors.torch.save_model(model, str(tmp_path / "m.safetensors"))
    assert orthoserde.load(other, tmp_path / "m.safetensors").fidelity is Fidelity.EXACT
    assert equal(model, other)


def test_a_tied_key_that_the_file_leaves_out_is_not_missing(tmp_path: Path) -> None:
    model, other = Tied(), Tied()
    state = {key: value for key, value in model.state_dict().items() if key != "decoder.weight"}
    safetensors.torch.save_file(state, tmp_path / "m.safetensors")
    assert orthoserde.load(other, tmp_path / "m.safetensors").missing_keys == []
    assert equal(model, other)


def test_both_copies_of_a_tied_tensor_must_agree(tmp_path: Path) -> None:
    model = Tied()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    safetensors.torch.save_file(state, tmp_path / "same.safetensors")
    other = Tied()
    assert orthoserde.load(other, tmp_path / "same.safetensors").fidelity is Fidelity.EXACT
    assert equal(model, other)
    state["decoder.weight"] += 1
    safetensors.torch.save_file(state, tmp_path / "differ.safetensors")
    before = other.embedding.weight.detach().clone()
    with pytest.raises(IncompatibleModelError, match=r"embedding\.weight: one tensor in the model, different ones"):
        orthoserde.load(other, tmp_path / "differ.safetensors")
    assert torch.equal(other.embedding.weight, before)


def test_a_tie_that_the_model_has_lost_is_refused_and_strict_false_loads_copies(tmp_path: Path) -> None:
    model, other = Tied(), Tied(tie=False)
    orthoserde.save(model, tmp_path / "m.safetensors")
    before = {key: value.clone() for key, value in other.state_dict().items()}
    with pytest.raises(IncompatibleModelError, match=r"decoder\.weight: tied to embedding\.weight in the file"):
        orthoserde.load(other, tmp_path / "m.safetensors")
    assert all(torch.equal(before[key], value) for key, value in other.state_dict().items())
    report = orthoserde.load(other, tmp_path / "m.safetensors", strict=False)
    assert report.fidelity is Fidelity.UNVERIFIED
    assert "separate parameter" in str(report)
    assert torch.equal(other.decoder.weight, model.decoder.weight)
    assert torch.equal(other.embedding.weight, model.embedding.weight)


def test_a_tie_that_the_file_does_not_have_is_no_exact_load(tmp_path: Path) -> None:
    def make() -> nn.Sequential:
        return nn.Sequential(nn.LayerNorm(3), nn.LayerNorm(3))

    orthoserde.save(make(), tmp_path / "m")
    tied = make()
    tied[1] = tied[0]
    report = orthoserde.load(tied, tmp_path / "m")
    assert report.fidelity is Fidelity.UNVERIFIED
    assert "0.weight: tied in the model to what is separate in the file: 1.weight" in report.notes
    assert orthoserde.load(make(), tmp_path / "m").fidelity is Fidelity.EXACT


def test_a_shared_buffer_that_was_moved_apart_is_no_lost_tie(tmp_path: Path) -> None:
    mask = torch.arange(4.0)
    model = nn.Sequential(nn.Module(), nn.Module())
    model[0].register_buffer("mask", mask)
    model[1].register_buffer("mask", mask)
    orthoserde.save(model, tmp_path / "m.safetensors")
    other = nn.Sequential(nn.Module(), nn.Module())
    for child in other:
        child.register_buffer("mask", torch.zeros(4))
    assert orthoserde.load(other, tmp_path / "m.safetensors").fidelity is Fidelity.EXACT
    assert all(torch.equal(cast("Tensor", child.mask), mask) for child in other)


def test_a_transposed_view_as_a_tie_is_kept_consistent(tmp_path: Path) -> None:
    def make() -> nn.Module:
        model = nn.Module()
        model.encoder = nn.Linear(3, 2, bias=False)
        model.decoder = nn.Linear(2, 3, bias=False)
        model.decoder.weight = nn.Parameter(model.encoder.weight.detach().t())
        return model

    model, other = make(), make()
    orthoserde.save(model, tmp_path / "m.safetensors")
    assert orthoserde.load(other, tmp_path / "m.safetensors").fidelity is Fidelity.EXACT
    assert equal(model, other)
    state = {key: value.contiguous().clone() for key, value in model.state_dict().items()}
    state["decoder.weight"] = state["decoder.weight"] + 1
    safetensors.torch.save_file(state, tmp_path / "differ.safetensors")
    with pytest.raises(IncompatibleModelError, match="shares memory in the model with tensors that differ"):
        orthoserde.load(other, tmp_path / "differ.safetensors")
    assert equal(model, other)


def test_interleaved_views_of_one_memory_are_no_tie(tmp_path: Path) -> None:
    def make() -> nn.Module:
        memory = torch.randn(4, 6)
        model = nn.Module()
        model.left = nn.Parameter(memory[:, :3])
        model.right = nn.Parameter(memory[:, 3:])
        return model

    model, other = make(), make()
    orthoserde.save(model, tmp_path / "m.safetensors")
    assert orthoserde.load(other, tmp_path / "m.safetensors").fidelity is Fidelity.EXACT
    assert equal(model, other)


def test_a_state_dict_file_of_a_parametrized_model_is_unverified(tmp_path: Path) -> None:
    def make() -> nn.Module:
        return nn.Sequential(orthogonal(nn.Linear(5, 3)), spectral_norm(nn.Linear(3, 3)))

    model, other = make(), make()
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    safetensors.torch.save_file(state, tmp_path / "m.safetensors")
    report = orthoserde.load(other, tmp_path / "m.safetensors")
    assert report.fidelity is Fidelity.UNVERIFIED
    assert "the file has no configuration to check" in str(report)
    assert equal(model, other)
    del state["0.parametrizations.weight.0.base"]
    safetensors.torch.save_file(state, tmp_path / "half.safetensors")
    with pytest.raises(IncompatibleModelError) as caught:
        orthoserde.load(other, tmp_path / "half.safetensors")
    assert caught.value.missing_keys == ["0.parametrizations.weight.0.base"]
    with pytest.raises(IncompatibleModelError, match=r"0\.weight: only part of its state"):
        orthoserde.load(other, tmp_path / "half.safetensors", strict=False)
    assert equal(model, other)


def test_a_load_that_leaves_something_missing_is_not_exact(tmp_path: Path) -> None:
    orthoserde.save(nn.ModuleDict({"other": nn.Linear(2, 2)}), tmp_path / "m")
    report = orthoserde.load(nn.Linear(2, 2), tmp_path / "m", strict=False)
    assert report.fidelity is Fidelity.UNVERIFIED
    assert report.loaded == 0
    assert report.missing_keys == ["weight", "bias"]


@pytest.mark.parametrize("wrapped", ["file", "model"])
def test_a_prefix_on_one_side_is_pointed_out(tmp_path: Path, wrapped: str) -> None:
    plain, inner = nn.Linear(2, 2), nn.ModuleDict({"module": nn.Linear(2, 2)})
    model, target = (inner, plain) if wrapped == "file" else (plain, inner)
    safetensors.torch.save_file(model.state_dict(), tmp_path / "m")
    with pytest.raises(IncompatibleModelError, match=rf"all keys of the {wrapped} begin with 'module\.': load into "):
        orthoserde.load(target, tmp_path / "m")


def test_a_file_of_a_wrapped_model_is_loaded_as_the_refusal_says(tmp_path: Path) -> None:
    """Also where the weight was only computed, so that its key in the model is another one."""
    wrapped = nn.DataParallel(nn.Linear(4, 2))
    nn.init.orthogonal_(wrapped.module.weight)
    safetensors.torch.save_file(wrapped.state_dict(), tmp_path / "m")
    model = orthogonal(nn.Linear(4, 2))
    with pytest.raises(IncompatibleModelError, match=r"load into nn\.ModuleDict\(\{'module': model\}\); 5 problems:"):
        orthoserde.load(model, tmp_path / "m")
    with pytest.warns(orthoserde.LegacyCheckpointWarning):
        orthoserde.load(nn.ModuleDict({"module": model}), tmp_path / "m")
    torch.testing.assert_close(model.weight, wrapped.module.weight)


def test_a_refusal_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "m"
    orthoserde.save(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)), path)

    def advice(model: nn.Module, **arguments: Any) -> str:
        with pytest.raises(IncompatibleModelError) as caught:
            orthoserde.load(model, path, **arguments)
        return str(caught.value).splitlines()[0].removeprefix(f"{path} does not fit Sequential, nothing was loaded; ")

    as_saved = "make the model as it was when it was saved"
    shorter, wider = nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    longer, other = nn.Sequential(*model, nn.Linear(2, 2)), nn.Sequential(nn.Sequential(nn.Linear(2, 2)))
    leaves_out = f"{as_saved}, or let strict=False leave out what only the"
    assert advice(shorter) == f"{leaves_out} file has; 2 problems:"
    assert advice(longer) == f"{leaves_out} model has; 2 problems:"
    assert advice(wider) == advice(wider, strict=False) == f"{as_saved}; 3 problems:"
    # Here strict=False would load nothing, or not do.
    assert advice(other) == f"{as_saved}; 6 problems:"
    assert advice(shorter, rng=True) == f"{as_saved}; 3 problems:"
    # A remedy for the model would be none where the training state does not fit.
    assert advice(model, rng=True) == "1 problem:"
    assert orthoserde.load(shorter, path, strict=False).unexpected_keys == ["2.bias", "2.weight"]
    assert orthoserde.load(longer, path, strict=False).missing_keys == ["3.weight", "3.bias"]


def _is_loaded(target: nn.Module, path: Path, model: nn.Module) -> bool:
    """Whether a load into something else brings the weight of the model back."""
    weight = cast("Tensor", model.weight).clone()
    with torch.no_grad():
        model.get_parameter("parametrizations.weight.original").zero_()
    orthoserde.load(target, path)
    return torch.equal(weight, cast("Tensor", model.weight))


@pytest.mark.parametrize("names", [["module"], ["_orig_mod"], ["module", "_orig_mod"], ["a", "0", "b"]], ids=".".join)
@pytest.mark.parametrize("select", [None, lambda key, _: "weight" in key], ids=["all", "selection"])
def test_keys_behind_a_prefix_are_loaded_as_the_refusal_says(tmp_path: Path, names: list[str], select: Any) -> None:
    model = wrapped = orthogonal(nn.Linear(4, 2))
    target = "model"
    for name in reversed(names):
        wrapped, target = nn.ModuleDict({name: wrapped}), f"nn.ModuleDict({{{name!r}: {target}}})"
    orthoserde.save(wrapped, tmp_path / "m", select=select)
    with pytest.raises(
        IncompatibleModelError, match=re.escape(f" begin with {'.'.join([*names, ''])!r}: load into {target};")
    ):
        orthoserde.load(model, tmp_path / "m")
    assert _is_loaded(eval(target, {"nn": nn, "model": model}), tmp_path / "m", model)  # noqa: S307 - the advice is run as it is read


def test_an_averaged_model_is_loaded_as_the_refusal_says(tmp_path: Path) -> None:
    model = orthogonal(nn.Linear(4, 2))
    orthoserde.save(AveragedModel(model), tmp_path / "m")
    with pytest.raises(IncompatibleModelError, match=r"swa_utils\.AveragedModel\(model\), which is a copy, and use "):
        orthoserde.load(model, tmp_path / "m")
    averaged = AveragedModel(model)
    assert averaged.module is not model
    assert _is_loaded(averaged, tmp_path / "m", averaged.module)


@pytest.mark.parametrize("hooked", ["file", "model"])
@pytest.mark.parametrize(
    "norm", [(old_weight_norm, weight_norm), (old_spectral_norm, spectral_norm)], ids=["weight", "spectral"]
)
def test_keys_behind_a_prefix_may_be_those_of_another_form(tmp_path: Path, norm: Any, hooked: str) -> None:
    saved, model = (kind(nn.Linear(4, 2)) for kind in (norm if hooked == "file" else norm[::-1]))
    orthoserde.save(nn.ModuleDict({"module": saved}), tmp_path / "m")
    with pytest.raises(IncompatibleModelError, match=r"load into nn\.ModuleDict\(\{'module': model\}\); "):
        orthoserde.load(model, tmp_path / "m")
    orthoserde.load(nn.ModuleDict({"module": model}), tmp_path / "m")


def test_of_tied_tensors_one_key_is_enough_behind_a_prefix(tmp_path: Path) -> None:
    saved, model = Tied(), Tied()
    state = {f"module.{key}": value for key, value in saved.state_dict().items() if key != "decoder.weight"}
    safetensors.torch.save_file(state, tmp_path / "m")
    with pytest.raises(IncompatibleModelError, match=r"load into nn\.ModuleDict\(\{'module': model\}\); "):
        orthoserde.load(model, tmp_path / "m")
    orthoserde.load(nn.ModuleDict({"module": model}), tmp_path / "m")
    assert equal(saved, model)


class Wrapper(nn.Module):
    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


def test_where_a_prefix_is_not_all_there_is_no_prefix_is_spoken_of(tmp_path: Path) -> None:
    linear, conv = nn.Linear(2, 2), nn.Sequential(nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1))
    registry = orthoserde.Registry()
    registry.register("tests>Wrapper")(Wrapper)
    cases: dict[str, tuple[nn.Module, nn.Module]] = {
        "beside others": (Wrapper(head=linear, module=linear), Wrapper(head=linear, body=linear)),
        "one key of several": (Wrapper(a=linear, enc=nn.LayerNorm(2)), Wrapper(a=linear, norm=nn.LayerNorm(2))),
        "of something else": (Wrapper(module=linear), conv),
        "of other shapes": (Wrapper(module=nn.Linear(3, 2)), linear),
        "a registered wrapper": (Wrapper(module=linear), linear),
    }
    for name, (saved, model) in cases.items():
        orthoserde.save(saved, tmp_path / "m", registry=registry if "registered" in name else None)
        with pytest.raises(IncompatibleModelError) as caught:
            orthoserde.load(model, tmp_path / "m", registry=registry)
        assert "begin with" not in str(caught.value), name


@pytest.mark.parametrize("name", ["training", "_buffers", "keys", ""])
def test_a_name_that_no_module_dict_can_have_is_not_advised(tmp_path: Path, name: str) -> None:
    safetensors.torch.save_file({f"{name}.weight": torch.zeros(2, 2), f"{name}.bias": torch.zeros(2)}, tmp_path / "m")
    with pytest.raises(IncompatibleModelError) as caught:
        orthoserde.load(nn.Linear(2, 2), tmp_path / "m")
    assert "ModuleDict" not in str(caught.value)


def test_a_load_says_what_it_has_widened(tmp_path: Path) -> None:
    orthoserde.save(nn.Linear(3, 2).half(), tmp_path / "m")
    report = orthoserde.load(nn.Linear(3, 2), tmp_path / "m")
    assert report.fidelity is orthoserde.Fidelity.UNVERIFIED
    assert "float16 restored as float32: weight, bias" in str(report)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names of files are text")
def test_reports_of_a_file_whose_name_is_no_text_can_be_printed(tmp_path: Path) -> None:
    path, model = os.fsdecode(os.fsencode(tmp_path) + b"/\xff\x1b[2J"), nn.Linear(2, 2)
    reports = (orthoserde.save(model, path), orthoserde.load(model, path), orthoserde.verify(path))
    for report in reports:
        assert r"\udcff\x1b[2J" in str(report)
        assert str(report).replace("\n", "").isprintable()
    assert [report.path for report in reports] == [path] * 3
