"""The zip archives of ``torch.save``: held to the form that torch writes before torch reads them.

Torch never compresses, and never checks the checksums that it writes. An archive that needs either is refused, and one
whose members lie over each other, for then a small file stands for a large one.

Note [Checksums of what was read]
Two readers of one archive need not read the same: where a bit says that a member is a folder, torch's leaves the memory
of a tensor as it was, and Python's reads on. So the checksums of tensors are compared with what torch has in memory.
"""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass

from orthoserde.errors import FileFormatError
from orthoserde.storage.pickles import MAX_PICKLE_BYTES
from orthoserde.wording import one_line

#: The end of an archive without a comment, of the usual size and of the large one.
_END = struct.Struct("<4s4H2LH")
_END_64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR = struct.Struct("<4sLQL")

#: The bit by which a member is a folder.
_FOLDER = 0x10

#: The fixed part of what stands before a member.
_LOCAL_BYTES = 30

#: More than the table of as many tensors as a file may have takes.
MAX_TABLE_BYTES = 16 << 20


@dataclass(frozen=True)
class Archive:
    """What stands in an archive.

    Attributes:
        pickle: Its pickle.
        storages: Size in bytes and checksum of each storage.
    """

    pickle: bytes
    storages: frozenset[tuple[int, int]]

    def check(self, storages: Iterable[memoryview], name: str) -> None:
        """Hold what torch has read to the checksums; see Note [Checksums of what was read].

        Args:
            storages: The memory of all tensors.
            name: The file, for messages.

        Raises:
            FileFormatError: Some of it is not what was saved.
        """
        for memory in storages:
            if len(memory) and (len(memory), zlib.crc32(memory)) not in self.storages:
                raise FileFormatError(f"{name}: damaged: the checksum of a tensor does not match; use another copy")


def read_archive(file: io.FileIO, size: int, name: str) -> Archive:
    """Check all of an archive but its storages.

    Args:
        file: The open file.
        size: Its size in bytes.
        name: Its name, for messages.

    Raises:
        FileFormatError: It is damaged, compressed, or not of the form that torch writes.
    """
    try:
        table = _table_start(file, size)
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            _check_members(members, table, name)
            storages = [member for member in members if "/data/" in member.filename]
            others = {member.filename: member for member in members if "/data/" not in member.filename}
            if any(member.file_size > MAX_PICKLE_BYTES for member in others.values()):
                raise FileFormatError(f"{name}: an archive with more than {MAX_PICKLE_BYTES} bytes beside its tensors")
            read = {which: archive.read(member) for which, member in others.items()}
    except FileFormatError:
        raise
    except (
        *(zipfile.BadZipFile, zipfile.LargeZipFile, struct.error, NotImplementedError),
        *(RuntimeError, EOFError, OSError, OverflowError, ValueError),
    ) as error:
        raise FileFormatError(f"{name}: a damaged archive: {one_line(error)}") from error
    pickles = [data for which, data in read.items() if which.lower().endswith("data.pkl")]
    if len(pickles) != 1:
        raise FileFormatError(
            f"{name}: expected an archive with one pickle, as torch.save writes it, got {len(pickles)}"
        )
    if b"big" in (data for which, data in read.items() if which.endswith("/byteorder")):
        raise FileFormatError(f"{name}: written on a big-endian machine; load it there, and save it as safetensors")
    return Archive(pickles[0], frozenset((member.file_size, member.CRC) for member in storages))


def _table_start(file: io.FileIO, size: int) -> int:
    """Where the table of an archive begins; it has to go on to the end of the file."""
    tail = _read(file, max(0, size - _END.size), _END.size)
    signature, _, _, _, _, table_bytes, start, comment = _END.unpack(tail)
    if signature != b"PK\5\6" or comment:
        raise zipfile.BadZipFile("no table of its members at its end")
    stop = size - _END.size
    large = _read(file, max(0, stop - _END_64.size - _LOCATOR.size), _END_64.size + _LOCATOR.size)
    if large[_END_64.size :].startswith(b"PK\6\7"):  # torch writes both; what is in the large one counts
        stop -= len(large)
        signature, *_, table_bytes, start = _END_64.unpack_from(large)
        if signature != b"PK\6\6":
            raise zipfile.BadZipFile("no table of its members before its end")
    if start + table_bytes != stop:
        raise zipfile.BadZipFile("the table of its members is not where it should be")
    if table_bytes > MAX_TABLE_BYTES:
        raise zipfile.BadZipFile(f"the table of its members takes more than {MAX_TABLE_BYTES} bytes")
    return int(start)


def _read(file: io.FileIO, position: int, count: int) -> bytes:
    file.seek(position)
    return file.read(count)


def _check_members(members: list[zipfile.ZipInfo], table: int, name: str) -> None:
    """Each stored as it is, behind the one before and under a name of its own; torch takes no notice of case."""
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise FileFormatError(f"{name}: a compressed archive, which torch.save does not write")
    if any(member.external_attr & _FOLDER for member in members):
        raise FileFormatError(f"{name}: an archive with folders, which torch.save does not write")
    names = [member.orig_filename.lower() for member in members]
    if len(set(names)) != len(names) or any("\0" in each for each in names):
        raise FileFormatError(f"{name}: an archive with two members of one name")
    position = 0
    for member in sorted(members, key=lambda member: member.header_offset):
        if member.header_offset < position or member.compress_size != member.file_size:
            raise FileFormatError(f"{name}: an archive whose members lie over each other")
        position = member.header_offset + _LOCAL_BYTES + len(member.orig_filename) + member.file_size
    if position > table:
        raise FileFormatError(f"{name}: an archive whose members lie over each other")
