"""Draw the bytes of an orthogonal layer of n x 4, on disk and in memory, against n.

``python -m tests.benchmarks.plot_sizes`` writes and measures a file of each form for each n, prints the numbers, and
draws docs/explanation/bytes.svg with matplotlib (of the ``demo`` extra). It needs 1 GiB of memory and of disk.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from torch import nn

import orthoserde
from tests.benchmarks import bench_sizes
from tests.benchmarks.bench_sizes import COMPACT, DENSE, LEGACY, PR_179, STATE_DICT, STRUCTURED, row

PICTURE = Path(__file__).resolve().parents[2] / "docs" / "explanation" / "bytes.svg"

WIDTHS = (128, 256, 512, 1024, 2048, 4096, 8192)
RANK = 4

#: Colours that keep apart for the colour-blind (Okabe and Ito 2008), on a card of white.
ORANGE, BLUE, GREY = "#d55e00", "#0072b2", "#555555"

#: Ticks of the axis of bytes, from 4**6 in steps of four.
UNITS = ("4 KiB", "16 KiB", "64 KiB", "256 KiB", "1 MiB", "4 MiB", "16 MiB", "64 MiB", "256 MiB")

Sizes = dict[str, list[int]]


def measure(folder: Path) -> tuple[Sizes, Sizes]:
    """Bytes by form and width: of files, and of the parameters and buffers of a module."""
    disk: Sizes = {}
    memory: Sizes = {}
    for n in WIDTHS:
        layers = {
            form: orthoserde.orthogonal(nn.Linear(RANK, n), structured=form == STRUCTURED)
            for form in (STATE_DICT, STRUCTURED)
        }
        for form, size in bench_sizes.file_sizes(folder, layers[STATE_DICT], layers[STRUCTURED]).items():
            disk.setdefault(form, []).append(size)
        for form, layer in layers.items():
            memory.setdefault(form, []).append(in_memory(layer))
    return disk, memory


def in_memory(module: nn.Module) -> int:
    """Bytes of the storages of a module's parameters and buffers."""
    storages = [tensor.untyped_storage() for tensor in (*module.parameters(), *module.buffers())]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def draw(disk: Sizes, memory: Sizes, path: Path) -> None:
    """Two panels, with the same axis of bytes; forms of the same size but for 1 % have one label."""
    mpl.rcParams["svg.hashsalt"] = "orthoserde"  # the same numbers give the same file
    figure = Figure(figsize=(10, 4.4), facecolor="white")
    left, right = figure.subplots(1, 2, sharey=True)
    figure.subplots_adjust(left=0.09, right=0.9, bottom=0.13, top=0.84, wspace=0.55)
    line(left, [disk[STATE_DICT], disk[PR_179], disk[DENSE]], "torch state dict,\nPR #179,\ndense base", ORANGE)
    line(left, [disk[COMPACT], disk[STRUCTURED]], "compact base,\nstructured", BLUE, lift=9)
    line(left, [disk[LEGACY]], "computed weight\nalone", GREY, lift=-13)
    line(right, [memory[STATE_DICT]], "torch's form", ORANGE)
    line(right, [memory[STRUCTURED]], "structured", BLUE)
    ratio(left, disk[DENSE], disk[COMPACT])
    ratio(right, memory[STATE_DICT], memory[STRUCTURED])
    dress(left, "On disk: the file")
    dress(right, "In memory: parameters and buffers")
    left.set_ylabel("bytes")
    figure.suptitle(f"One nn.Linear({RANK}, n) in float32 with an orthogonal weight of n x {RANK}", fontsize=12)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=100)


def line(axes: Axes, sizes: list[list[int]], label: str, colour: str, lift: float = 0) -> None:
    """Lines that lie on each other, and what they are to their right, so many points higher than they end."""
    for each in sizes:
        axes.loglog(WIDTHS, each, "o-", color=colour, markersize=3.5, linewidth=1.6)
        if abs(each[-1] / sizes[0][-1] - 1) > 0.01:
            raise ValueError(f"{label}: these need labels of their own, {each[-1]} and {sizes[0][-1]}")
    where = (WIDTHS[-1], sizes[0][-1])
    axes.annotate(
        label,
        where,
        (8, lift),
        textcoords="offset points",
        color=colour,
        va="center",
        fontsize=9,
        annotation_clip=False,
    )


def ratio(axes: Axes, above: list[int], below: list[int], n: int = 4096) -> None:
    """An arrow from one line to another, and how many times smaller that is."""
    high, low = (sizes[WIDTHS.index(n)] for sizes in (above, below))
    axes.annotate("", (n, low), (n, high), arrowprops={"arrowstyle": "->", "color": GREY, "shrinkA": 4, "shrinkB": 4})
    middle = (n, (high * low) ** 0.5)
    axes.annotate(f"{high / low:.0f} times", middle, (-4, 0), textcoords="offset points", ha="right", fontsize=9)


def dress(axes: Axes, title: str) -> None:
    """Title, axes and their ticks."""
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("n, rows of the weight")
    axes.xaxis.set_major_locator(FixedLocator(list(WIDTHS)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
    ticks = {4.0**exponent: size for exponent, size in enumerate(UNITS, 6)}
    axes.yaxis.set_major_locator(FixedLocator(list(ticks)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: ticks[value]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.tick_params(labelleft=True, labelsize=9)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    """Measure, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--picture", type=Path, default=PICTURE, help="file that is drawn, an SVG or a PNG by its name")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        disk, memory = measure(Path(folder))
    print(f"torch: {torch.__version__}, orthoserde: {orthoserde.__version__}\n")
    row("n", *(f"disk: {form}" for form in disk), *(f"memory: {form}" for form in memory))
    row(*["---"] * (1 + len(disk) + len(memory)))
    for index, n in enumerate(WIDTHS):
        row(str(n), *(f"{sizes[index]:,}" for sizes in (*disk.values(), *memory.values())))
    draw(disk, memory, arguments.picture)


if __name__ == "__main__":
    main()
