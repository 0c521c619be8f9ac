"""What a save tells its caller."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from orthoserde.wording import counted, printable, shorten


@dataclass(frozen=True)
class SaveReport:
    """What was saved.

    Attributes:
        path: The file, or the folder of shards.
        file_bytes: Its size in bytes; of shards, that of all of them and of their index.
        tensors: Number of stored tensors.
        parametrized: Number of parametrized tensors among what was saved.
        aliases: Names of tied tensors that were stored under another name, with that name.
        left_out: Keys that the model has and the file was told not to hold.
        opaque: Parametrized tensors with an unregistered class: their state is saved, their configuration is not known.
        unconfigured: Parametrized tensors and modules of a registered class whose arguments are not known: they are not
            JSON, or the object was made before its class was registered.
        needs_orthoserde: Why ``model.load_state_dict(load_file(path))`` would not do without orthoserde; empty if it
            would.
        compact: Parametrized tensors whose base is stored as its first columns.
        untried: Parametrized tensors whose base is stored whole by ``base="auto"``, because it takes more than half a
            second to find out whether columns would do.
        training: What training state was saved, in words; empty if none was.

    Example:
        >>> import tempfile, torch, orthoserde
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report = orthoserde.save(orthoserde.orthogonal(torch.nn.Linear(8, 4)), f"{folder}/model.safetensors")
        >>> report.tensors, report.parametrized, report.compact
        (3, 1, ('weight',))
    """

    path: str
    file_bytes: int
    tensors: int
    parametrized: int
    aliases: Mapping[str, str] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    opaque: tuple[str, ...] = ()
    unconfigured: tuple[str, ...] = ()
    needs_orthoserde: tuple[str, ...] = ()
    compact: tuple[str, ...] = ()
    untried: tuple[str, ...] = ()
    training: str = ""

    def __str__(self) -> str:
        lines = [
            f"saved {printable(self.path)}: {counted(self.tensors, 'tensor')}, "
            f"{counted(self.parametrized, 'weight')} parametrized, {self.file_bytes} bytes"
        ]
        if self.training:
            lines.append(f"  training state: {self.training}")
        if self.compact:
            lines.append(f"  bases stored as columns: {len(self.compact)}")
        if self.untried:
            lines.append(f"  bases stored whole, where base='compact' would try columns: {len(self.untried)}")
        if self.aliases:
            lines.append(f"  tied and stored once: {len(self.aliases)}")
        if self.left_out:
            lines.append(f"  left out: {len(self.left_out)}")
        if self.opaque:
            lines.append(f"  not registered, so a load cannot check their configuration: {shorten(self.opaque)}")
        if self.unconfigured:
            reasons = "not JSON and without get_config, or made before the class was registered"
            lines.append(
                f"  registered, but with arguments that are not known ({reasons}): {shorten(self.unconfigured)}"
            )
        lines += [f"  needs orthoserde to load: {reason}" for reason in self.needs_orthoserde]
        return "\n".join(lines)
