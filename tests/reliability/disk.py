"""Saves whose outcome can be told from what stands on the disk: the previous checkpoint, the new one, or neither whole.

The same state gives the same bytes, so a file is compared with all the bytes that a save nobody disturbed has written;
and those were verified, loaded and compared with the model, once.
"""

from __future__ import annotations

import functools
import os
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils.parametrizations import orthogonal
from torch.optim import AdamW

import orthoserde
from orthoserde.storage.leftovers import TEMPORARY_MARK
from tests.storage import shard_cases

#: What stands at the path of a checkpoint; anything else is said in words.
OLD, NEW, NOTHING = "old", "new", "nothing"

FILE = "model.safetensors"

#: Permission bits of the previous file: neither those of the umask nor those of a private file.
MODE = 0o640

#: The temporary file of a save that was killed long ago.
LEFTOVER = f".{FILE}{TEMPORARY_MARK}{'0' * 16}"


def make(seed: int, layers: int, width: int) -> nn.Sequential:
    """A model with one parametrized weight among its ``layers``, whose numbers follow from the seed."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))
    orthogonal(model[0])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "parametrizations" not in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def trained(model: nn.Module, width: int) -> AdamW:
    """An optimizer that has made one step."""
    optimizer = AdamW(model.parameters(), weight_decay=0.0)
    model(torch.ones(2, width)).sum().backward()
    optimizer.step()
    return optimizer


@dataclass(frozen=True)
class FileCase:
    """A save to one file.

    Attributes:
        name: What it is called in reports.
        layers: Of the model.
        width: Of each layer; its weight has ``width * width`` float32 numbers.
        overwrite: Whether a previous checkpoint stands there.
        optimizer: Whether an optimizer is saved along.
        link: Whether the path is a symbolic link, to a file in the same folder.
        leftover: Whether a killed save has left its temporary file.
    """

    name: str
    layers: int = 1
    width: int = 8
    overwrite: bool = True
    optimizer: bool = False
    link: bool = False
    leftover: bool = False

    @property
    def before(self) -> str:
        """What stands there before the save."""
        return OLD if self.overwrite else NOTHING

    @functools.cached_property
    def models(self) -> dict[str, tuple[nn.Module, AdamW | None]]:
        """The previous and the new state."""
        made: dict[str, tuple[nn.Module, AdamW | None]] = {}
        for seed, which in enumerate((OLD, NEW)):
            model = make(seed, self.layers, self.width)
            made[which] = (model, trained(model, self.width) if self.optimizer else None)
        return made

    @functools.cached_property
    def content(self) -> dict[str, bytes]:
        """The bytes of the previous and of the new file, each verified, loaded and compared with its model."""
        contents = {}
        with tempfile.TemporaryDirectory() as folder:
            for which, (model, optimizer) in self.models.items():
                path = Path(folder, which)
                orthoserde.save(model, path, optimizer=optimizer)
                loaded = make(2, self.layers, self.width)
                orthoserde.load(loaded, path)
                expected = model.state_dict()
                assert all(torch.equal(tensor, expected[key]) for key, tensor in loaded.state_dict().items())
                assert orthoserde.verify(path).ok
                contents[which] = path.read_bytes()
        assert contents[OLD] != contents[NEW]
        return contents

    def path(self, folder: Path) -> Path:
        """Where the save is told to go."""
        return folder / ("link" if self.link else FILE)

    def prepare(self, folder: Path) -> None:
        """Make the folder as it is before the save.

        A save has been made by then, so that the children import nothing: torch 2.3 imports its compiler for the first
        ``state_dict`` of an optimizer, with twelve thousand calls to the system that are no part of a save.
        """
        assert self.content
        folder.mkdir(exist_ok=True)
        if self.link:
            (folder / "link").symlink_to(FILE)
        if self.overwrite:
            (folder / FILE).write_bytes(self.content[OLD])
            (folder / FILE).chmod(MODE)
        if self.leftover:
            (folder / LEFTOVER).write_bytes(b"half of it")
            os.utime(folder / LEFTOVER, (0, 0))

    def save(self, folder: Path, which: str = NEW) -> None:
        """The save."""
        self.save_to(self.path(folder), which)

    def save_to(self, path: Path, which: str = NEW) -> None:
        """The save, to another path."""
        model, optimizer = self.models[which]
        orthoserde.save(model, path, optimizer=optimizer)

    def seen(self, folder: Path) -> str:
        """What stands there: one of the three, or what is wrong with it."""
        if self.link and not (folder / "link").is_symlink():
            return "the link was replaced"
        path = folder / FILE
        if not path.exists():
            return NOTHING
        content = path.read_bytes()
        found = [which for which in (OLD, NEW) if self.content[which] == content]
        if not found:
            return f"{len(content)} bytes that are neither the old nor the new file"
        if self.overwrite and stat.S_IMODE(path.stat().st_mode) != MODE:
            return f"{found[0]}, with other permission bits"
        return found[0]


#: Of the model in shard_cases: so many bytes per shard that there are two.
SHARD_BYTES = 500


@dataclass(frozen=True)
class ShardsCase:
    """A save into a folder, as shards and an index, over a previous one of the same kind if ``overwrite``."""

    name: str
    overwrite: bool = True

    @property
    def before(self) -> str:
        """What stands there before the save."""
        return OLD if self.overwrite else NOTHING

    @functools.cached_property
    def models(self) -> dict[str, nn.Sequential]:
        """The previous and the new state."""
        return {OLD: shard_cases.make(1.0), NEW: shard_cases.make(2.0)}

    def path(self, folder: Path) -> Path:
        """Where the save is told to go."""
        return folder

    def prepare(self, folder: Path) -> None:
        """Make the folder as it is before the save."""
        folder.mkdir(exist_ok=True)
        if self.overwrite:
            self.save(folder, OLD)

    def save(self, folder: Path, which: str = NEW) -> None:
        """The save."""
        orthoserde.save(self.models[which], folder, max_shard_size=SHARD_BYTES)

    def seen(self, folder: Path) -> str:
        """What stands there: one of the three, or what is wrong with it."""
        if not (folder / shard_cases.INDEX).exists():
            return NOTHING
        loaded = shard_cases.loaded(folder)
        found = [which for which in (OLD, NEW) if shard_cases.equal(loaded, shard_cases.state(self.models[which]))]
        if not found:
            return "tensors of neither the old nor the new checkpoint"
        return found[0] if orthoserde.verify(folder).ok else f"{found[0]}, but verify finds it damaged"


Case = FileCase | ShardsCase

CASES: dict[str, Case] = {
    case.name: case
    for case in (
        FileCase("small, new file", overwrite=False),
        FileCase("small, overwrite"),
        FileCase("small, through a link", link=True),
        FileCase("small, after a leftover", leftover=True),
        FileCase("with optimizer, new file", layers=8, optimizer=True, overwrite=False),
        FileCase("with optimizer, overwrite", layers=8, optimizer=True),
        FileCase("2 MB, new file", layers=16, width=176, overwrite=False),
        FileCase("2 MB, overwrite", layers=16, width=176),
        ShardsCase("shards, new folder", overwrite=False),
        ShardsCase("shards, overwrite"),
    )
}


def temporaries(folder: Path) -> list[str]:
    """The temporary files in a folder."""
    return sorted(name for name in os.listdir(folder) if TEMPORARY_MARK in name)


def make_old(folder: Path) -> None:
    """Have the temporary files in a folder be as old as those of a save that was killed long ago."""
    for name in temporaries(folder):
        os.utime(folder / name, (0, 0))
