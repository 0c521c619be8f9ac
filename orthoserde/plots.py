"""Pictures of the parametrized tensors of a checkpoint: their spectra, and how far they are from orthonormal.

matplotlib is imported when a picture is asked for, and its own figures are used: whatever backend the caller has chosen
stays chosen.
"""

from __future__ import annotations

import errno
import io
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from orthoserde import modes
from orthoserde.arguments import target_of
from orthoserde.checkpoint import Checkpoint
from orthoserde.errors import ConfigError, FileAccessError, MissingPackageError
from orthoserde.manifest import ORTHOGONAL, STRUCTURED
from orthoserde.orthonormal.rounding import gram_error, tall
from orthoserde.registry import Registry
from orthoserde.storage.atomic import replacing
from orthoserde.storage.writer import write_all
from orthoserde.transforms import expand
from orthoserde.weights.stored import Misfit, NotComputable, stored_weight
from orthoserde.wording import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: A picture shows this many tensors; the others are named in the report.
MOST_TENSORS = 12

#: Multiplications (n k k) that a spectrum may take: some seconds.
MOST_MULTIPLICATIONS = 1 << 35

#: Entries from here on have squares that are not representable.
LARGEST = 1e150

#: A heatmap has at most this many cells a side; each stands for the largest entry of a block.
MOST_CELLS = 256

#: What a heatmap shows for an exact zero: below the rounding of float64.
SMALLEST = 1e-18

#: What the name of a picture ends in.
ENDING = ".png"

_PNG = b"\x89PNG\r\n\x1a\n"


class NothingToDrawError(ConfigError):
    """There is no parametrized tensor that can be drawn."""


@dataclass(frozen=True)
class PlotReport:
    """What a picture shows.

    Attributes:
        path: The picture.
        shown: Names of the tensors in it.
        left_out: Names of the others, with why.
    """

    path: str
    shown: tuple[str, ...]
    left_out: dict[str, str]


@dataclass(frozen=True)
class _Row:
    name: str
    spectrum: Tensor
    error: Tensor | None


def plot(checkpoint: Checkpoint, registry: Registry, path: str | os.PathLike[str]) -> PlotReport:
    """Draw the parametrized tensors of a checkpoint, a row for each.

    On the left its singular values, on the right, where it is orthogonal, ``|Q^H Q - I|`` on a logarithmic scale, Q the
    computed weight with its longer side first. Of a stack of matrices the first is drawn. One is computed at a time.

    Args:
        checkpoint: What to draw.
        registry: Codecs of your own.
        path: The PNG to make or replace. It shows the first ``MOST_TENSORS`` that can be computed.

    Raises:
        NothingToDrawError: There is no tensor to draw.
        ConfigError: ``path`` is not that of a PNG, see :func:`check_target`.
        MissingPackageError: matplotlib is not installed.
        FileAccessError: The system refuses to read or write. An earlier picture is untouched.
    """
    name = target_of(path)
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise MissingPackageError('pictures need matplotlib: pip install "orthoserde[plot]"') from error
    check_target(name)
    rows, left_out = _rows(checkpoint, registry)
    if not rows:
        reasons = "; ".join(f"{tensor}: {why}" for tensor, why in list(left_out.items())[:3])
        text = f"{checkpoint.origin}: no parametrized tensor to draw{': ' if reasons else ''}{reasons}"
        raise NothingToDrawError(text)
    figure = Figure(figsize=(9, 2.6 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, row in zip(figure.subplots(len(rows), 2, squeeze=False), rows, strict=True):
        _draw_spectrum(axes[0], row)
        _draw_error(axes[1], row)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=100, metadata={"Software": None})
    with replacing(name, what="picture") as file:
        write_all(file, content.getbuffer())
    return PlotReport(name, tuple(row.name for row in rows), left_out)


def check_target(path: str) -> None:
    """Refuse a place for a picture before one is worked out. What is no picture, above all a checkpoint, stays.

    Raises:
        ConfigError: Its name does not end in .png, or it is there and is no PNG.
        FileAccessError: There is no folder to put it in, or the system refuses to read what is there.
    """
    if not path.lower().endswith(ENDING):
        raise ConfigError(f"{path}: a picture is a PNG; give a name that ends in {ENDING}")
    if not os.path.exists(path):
        if not os.path.isdir(os.path.dirname(os.path.realpath(path))):
            raise FileAccessError(errno.ENOENT, "cannot create the picture: there is no such folder", path)
        return
    if not os.path.isfile(path):  # a FIFO would be waited for
        raise ConfigError(f"{path}: is no file; give another name")
    try:
        with open(path, "rb") as file:
            start = file.read(len(_PNG))
    except OSError as error:
        raise FileAccessError(error.errno, f"cannot look what is there: {error.strerror}", path) from error
    if start not in (_PNG, b""):
        raise ConfigError(f"{path}: is there already, and is no PNG; give another name")


def _rows(checkpoint: Checkpoint, registry: Registry) -> tuple[list[_Row], dict[str, str]]:
    expanded = expand(checkpoint)
    rows: list[_Row] = []
    left_out: dict[str, str] = {}
    with modes.ordinary():
        for record in expanded.manifest.parametrized:
            if len(rows) == MOST_TENSORS:
                left_out[record.name] = f"a picture shows {MOST_TENSORS}"
                continue
            try:
                weight = stored_weight(expanded, record, registry)
            except (NotComputable, Misfit) as reason:
                left_out[record.name] = str(reason)
                continue
            orthogonal = record.chain[-1].kind in (ORTHOGONAL, STRUCTURED)
            matrix = _matrix(weight, orthogonal)
            if matrix is None:
                left_out[record.name] = f"not a finite matrix of a size that can be drawn: {list(weight.shape)}"
                continue
            error = _cells(gram_error(matrix).abs()) if orthogonal else None
            rows.append(_Row(record.name, torch.linalg.svdvals(matrix), error))
    return rows, left_out


def _matrix(weight: Tensor, orthogonal: bool) -> Tensor | None:
    """The matrix of a weight, tall and in double precision: of an orthogonal stack the first, of others all of it."""
    if weight.dim() < 2 or not weight.numel() or not (weight.is_floating_point() or weight.is_complex()):
        return None
    matrix = weight[(0,) * (weight.dim() - 2)] if orthogonal else weight.flatten(1)
    matrix = tall(matrix.to(torch.complex128 if weight.is_complex() else torch.float64))
    n, k = matrix.shape
    return matrix if n * k * k <= MOST_MULTIPLICATIONS and bool((matrix.abs() < LARGEST).all()) else None


def _cells(error: Tensor) -> Tensor:
    """At most ``MOST_CELLS`` cells a side, each the largest entry of its block."""
    step = -(-error.size(0) // MOST_CELLS)
    if step == 1:
        return error
    pooled: Tensor = torch.nn.functional.max_pool2d(error[None, None], step, ceil_mode=True)
    return pooled[0, 0]


def _draw_spectrum(axes: Axes, row: _Row) -> None:
    axes.plot(range(1, len(row.spectrum) + 1), row.spectrum.tolist(), marker="." if len(row.spectrum) < 100 else "")
    axes.set_title(_title(row.name), fontsize=9, parse_math=False)
    axes.set_xlabel("index", fontsize=8)
    axes.set_ylabel("singular value", fontsize=8)
    axes.ticklabel_format(axis="y", useOffset=False)


def _draw_error(axes: Axes, row: _Row) -> None:
    if row.error is None:
        axes.set_axis_off()
        return
    image = axes.imshow(row.error.clamp(min=SMALLEST).log10().tolist(), interpolation="nearest")
    axes.set_title(f"|Q^H Q - I|, largest {float(row.error.max()):.2g}", fontsize=9, parse_math=False)
    axes.figure.colorbar(image, ax=axes, label="log10")


def _title(name: str) -> str:
    text = printable(name).encode("ascii", "backslashreplace").decode()  # fonts lack letters
    return text if len(text) <= 48 else f"{text[:22]}...{text[-23:]}"
