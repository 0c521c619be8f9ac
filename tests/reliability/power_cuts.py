"""Cut the power of a disk while a file is saved on it, and after: mount a copy of the disk as it was at that moment.

The disk is the image of a file system, mounted through a loop device, so what the image holds is what the kernel has
sent to the disk; what it still keeps in memory is lost to a copy, as it is to a power cut. A mount of the copy replays
the journal as a start of the machine does. Needs root, ``mount``, loop devices and the ``mkfs`` of the file system.
"""

from __future__ import annotations

import functools
import os
import random
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.reliability.disk import NEW, FileCase
from tests.reliability.disk_broken import Build, sound
from tests.reliability.disk_children import Child, run
from tests.reliability.disk_figures import Figures
from tests.reliability.disk_kills import working
from tests.reliability.disk_mounts import CannotBeArrangedError, make_image, mounted, no_new_mounts_elsewhere


@dataclass(frozen=True)
class Disk:
    """A kind of file system.

    Attributes:
        kind: As mount calls it.
        make: The command that makes one.
        size: In bytes, of the image.
        options: With which it is mounted.
    """

    kind: str
    make: tuple[str, ...]
    size: int
    options: str = "loop"


#: ext4 as it comes, and without the crutch that hides a missing fsync; xfs has none.
DISKS: dict[str, Disk] = {
    "ext4": Disk("ext4", ("mkfs.ext4", "-q", "-F", "-m", "0"), 32 << 20),
    "ext4, noauto_da_alloc": Disk("ext4", ("mkfs.ext4", "-q", "-F", "-m", "0"), 32 << 20, "loop,noauto_da_alloc"),
    "ext4, data=writeback": Disk(
        "ext4", ("mkfs.ext4", "-q", "-F", "-m", "0"), 32 << 20, "loop,data=writeback,noauto_da_alloc"
    ),
    "xfs": Disk("xfs", ("mkfs.xfs", "-q", "-f"), 300 << 20),
}

#: 300 KB: so much that it is written in several steps.
CASES = (
    FileCase("new file", layers=8, width=96, overwrite=False),
    FileCase("overwrite", layers=8, width=96),
)

#: Seconds after the return of a save at which the power is cut as well. The kernel writes names after about 5 seconds,
#: and data after about 30: in between, a file system may know of a file whose data is not there.
DELAYS = (0.0, 7.0)


def cut(
    disk: Disk,
    case: FileCase,
    root: Path,
    figures: Figures,
    cuts: int,
    *,
    seed: int = 0,
    delays: Sequence[float] = DELAYS,
    build: Build = sound,
) -> None:
    """Cut the power at some moments during a save, and after its return.

    Args:
        disk: On which kind of disk.
        case: What is saved.
        root: A folder for the images.
        figures: Where the points are counted.
        cuts: At how many moments during a save; each needs a save of its own.
        seed: For the moments.
        delays: Seconds after the return of a save at which the power is cut.
        build: What saves.

    Raises:
        AssertionError: A child went wrong.
        CannotBeArrangedError: This machine cannot do it.
    """
    assert case.content
    generator = random.Random(seed)
    for number in range(cuts + 1):
        # The last one is the save that returns.
        after = None if number == cuts else generator.random()
        report = run(functools.partial(_cut_once, disk, case, root, after, delays, build)).report
        assert report is not None
        if report.error == CannotBeArrangedError.__name__:
            raise CannotBeArrangedError(report.message)
        assert not report.error, f"{report.error}: {report.message}"
        for moment, seen in report.value:
            allowed = (NEW,) if moment.startswith("after") else (case.before, NEW)
            violations = [] if seen in allowed else [f"{disk.kind}, {disk.options}, {case.name}, {moment}: {seen}"]
            figures.point(f"{moment.split()[0]}: {seen}", *violations)


def _cut_once(
    disk: Disk, case: FileCase, root: Path, during: float | None, delays: Sequence[float], build: Build
) -> list[tuple[str, str]]:
    """Save once, in mounts of its own; cut the power when this part of the usual time has passed, or afterwards."""
    if os.geteuid() != 0:
        raise CannotBeArrangedError("only root can mount images")
    no_new_mounts_elsewhere()
    image, mounts = root / "image", root / "mounted"
    mounts.mkdir(exist_ok=True)
    make_image(image, list(disk.make), disk.size)
    copies: list[tuple[str, Path]] = []
    with mounted(mounts, disk.kind, disk.options, source=str(image)):
        folder = mounts / "checkpoints"
        case.prepare(folder)
        subprocess.run(["sync", "-f", str(mounts)], check=True)
        child = Child(working(case, folder, build))
        child.go()
        if during is not None:
            time.sleep(during * USUAL_SECONDS)
            copies.append((f"during the save, {during:.3f}", _copy(image, root / "copy")))
            child.wait()
        else:
            ended = child.wait()
            assert ended.report is not None
            assert not ended.report.error, ended.report
            for delay in delays:
                time.sleep(delay)
                copies.append((f"after the return, {delay} s", _copy(image, root / f"copy-{delay}")))
    seen: list[tuple[str, str]] = []
    for moment, copy in copies:
        with mounted(mounts, disk.kind, "loop", source=str(copy)):
            seen.append((moment, case.seen(mounts / "checkpoints")))
        copy.unlink()
    image.unlink()
    return seen


#: About as long as a save takes here, together with the start of the child.
USUAL_SECONDS = 0.03


def _copy(image: Path, copy: Path) -> Path:
    """Copy what an image holds now, without its holes; the kernel may go on writing, so it has to be quick."""
    size = image.stat().st_size
    with open(image, "rb") as source, open(copy, "wb") as target:
        position = 0
        while position < size:
            try:
                position = os.lseek(source.fileno(), position, os.SEEK_DATA)
            except OSError:  # nothing but a hole up to the end
                break
            end = os.lseek(source.fileno(), position, os.SEEK_HOLE)
            os.lseek(target.fileno(), position, os.SEEK_SET)
            while position < end:
                position += os.sendfile(target.fileno(), source.fileno(), position, end - position)
        target.truncate(size)
    return copy
