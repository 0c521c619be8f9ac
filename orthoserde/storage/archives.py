"""The zip archives of ``torch.save``: held to the form that torch writes before torch reads them.

Torch never compresses, and never checks the checksums that it writes. An archive that needs either is refused, and one
whose members lie over each other, for then a small file stands for a large one.
"""

from __future__ import annotations

import io
import struct
import zipfile

from orthoserde.errors import FileFormatError
from orthoserde.storage.pickles import MAX_PICKLE_BYTES

#: The end of an archive without a comment, of the usual size and of the large one.
_END = struct.Struct("<4s4H2LH")
_END_64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR = struct.Struct("<4sLQL")

#: The fixed part of what stands before a member.
_LOCAL_BYTES = 30

#: More than the table of as many tensors as a file may have takes.
MAX_TABLE_BYTES = 16 << 20


def read_pickle(file: io.FileIO, size: int, name: str) -> bytes:
    """Check an archive, and return the pickle in it.

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
            _check_members(archive.infolist(), table, name)
            damaged = archive.testzip()
            pickles = [member for member in archive.infolist() if member.filename.lower().endswith("data.pkl")]
            if damaged is None and len(pickles) == 1 and pickles[0].file_size <= MAX_PICKLE_BYTES:
                return archive.read(pickles[0])
    except (
        *(zipfile.BadZipFile, zipfile.LargeZipFile, struct.error, NotImplementedError),
        *(RuntimeError, EOFError, OSError, OverflowError),
    ) as error:
        raise FileFormatError(f"{name}: a damaged archive: {_first_line(error)}") from error
    except UnicodeDecodeError as error:
        raise FileFormatError(f"{name}: a damaged archive: a name in it is not UTF-8") from error
    if damaged is not None:
        raise FileFormatError(f"{name}: damaged: the checksum of {damaged!r} does not match; use another copy")
    raise FileFormatError(f"{name}: expected an archive with one pickle of at most {MAX_PICKLE_BYTES} bytes")


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


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return lines[0][:200] if lines else type(error).__name__
