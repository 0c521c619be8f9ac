"""Pictures of parametrized tensors: what is in them, what is left out, and that nothing else is touched."""

from __future__ import annotations

import errno
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import orthogonal, weight_norm

import orthoserde
from orthoserde import ConfigError, FileAccessError, MissingPackageError, Registry, plots
from orthoserde.opening import open_checkpoint
from orthoserde.plots import NothingToDrawError, PlotReport

PNG = b"\x89PNG\r\n\x1a\n"


def draw(path: Path, picture: Path) -> PlotReport:
    with open_checkpoint(path) as checkpoint:
        return plots.plot(checkpoint, Registry(), picture)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    class Opaque(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    unknown = nn.Linear(2, 2)
    nn.utils.parametrize.register_parametrization(unknown, "weight", Opaque())
    model = nn.ModuleDict(
        {
            "wide": orthogonal(nn.Linear(300, 5)),
            "convolution": weight_norm(nn.Conv2d(2, 3, 3)),
            "unknown": unknown,
            "$a_b^c$\x1b\u4e2d": orthogonal(nn.Linear(3, 3)),
        }
    )
    orthoserde.save(model, tmp_path / "m.safetensors")
    return tmp_path / "m.safetensors"


def test_a_picture_shows_what_can_be_computed(path: Path, tmp_path: Path) -> None:
    backend = matplotlib.get_backend()
    report = draw(path, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(PNG)
    assert set(report.shown) == {"wide.weight", "convolution.weight", "$a_b^c$\x1b\u4e2d.weight"}
    assert list(report.left_out) == ["unknown.weight"]
    assert matplotlib.get_backend() == backend
    first = (tmp_path / "p.png").read_bytes()
    draw(path, tmp_path / "p.png")  # a picture is replaced
    assert (tmp_path / "p.png").read_bytes() == first


def test_pyplot_is_not_imported(path: Path, tmp_path: Path) -> None:
    code = (
        "import sys, orthoserde.plots as p; from orthoserde.opening import open_checkpoint as o; "
        "from orthoserde import Registry; p.plot(o(sys.argv[1]), Registry(), sys.argv[2]); "
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(path), str(tmp_path / "p.png")]
    subprocess.run(command, cwd=Path(__file__).parent.parent, check=True)


def test_too_many_are_counted(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "MOST_TENSORS", 1)
    report = draw(path, tmp_path / "p.png")
    assert len(report.shown) == 1
    assert len(report.left_out) == 3


def test_too_large_and_not_finite_ones_are_left_out(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plots, "MOST_MULTIPLICATIONS", 300 * 5 * 5 - 1)
    assert "size" in draw(path, tmp_path / "p.png").left_out["wide.weight"]


def test_what_is_not_finite_is_left_out(tmp_path: Path) -> None:
    for value in (math.nan, math.inf, 1e200):
        layer: Any = weight_norm(nn.Linear(2, 2).double())
        with torch.no_grad():
            layer.parametrizations.weight.original0.fill_(value)
        orthoserde.save(nn.ModuleDict({"a": layer, "b": orthogonal(nn.Linear(2, 2))}), tmp_path / "m")
        assert list(draw(tmp_path / "m", tmp_path / "p.png").left_out) == ["a.weight"]


def test_a_heatmap_has_bounded_cells() -> None:
    error = torch.zeros(1000, 1000)
    error[999, 0] = 1.0
    cells = plots._cells(error)
    assert max(cells.shape) <= plots.MOST_CELLS
    assert cells[-1, 0] == 1.0


def test_a_file_that_is_no_picture_is_not_replaced(path: Path, tmp_path: Path) -> None:
    other = tmp_path / "m.png"
    before = path.read_bytes()
    other.write_bytes(before)
    with pytest.raises(ConfigError, match="is no PNG"):
        draw(path, other)
    assert other.read_bytes() == before
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(ConfigError, match="is no file"):
        draw(path, tmp_path / "folder.png")


@pytest.mark.parametrize("name", ["p.jpg", "p", "png", "m.safetensors"])
def test_a_picture_has_the_name_of_one(name: str, path: Path, tmp_path: Path) -> None:
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=r"give a name that ends in \.png"):
        draw(path, tmp_path / name)
    assert [each.name for each in tmp_path.iterdir()] == ["m.safetensors"]
    assert path.read_bytes() == before
    draw(path, tmp_path / "p.PNG")


def test_a_picture_needs_a_folder_and_is_no_checkpoint(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(FileAccessError, match="cannot create the picture: there is no such folder"):
        draw(path, tmp_path / "none" / "p.png")

    def fail(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(FileAccessError, match="cannot write the picture: No space left"):
            draw(path, tmp_path / "p.png")
    draw(path, tmp_path / "p.png")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(FileAccessError, match="cannot write the picture, the previous file is untouched: No"):
            draw(path, tmp_path / "p.png")


def test_nothing_to_draw_is_said(tmp_path: Path) -> None:
    orthoserde.save(nn.Linear(2, 2), tmp_path / "m")
    with pytest.raises(NothingToDrawError, match="no parametrized tensor to draw"):
        draw(tmp_path / "m", tmp_path / "p.png")
    assert not (tmp_path / "p.png").exists()


def test_without_matplotlib_it_says_what_to_install(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingPackageError, match=r'pip install "orthoserde\[plot\]"'):
        draw(path, tmp_path / "p.png")
