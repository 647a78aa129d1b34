"""Zip archives, read where they lie: nothing is unpacked to disk, and nothing unfolds to much more than the file."""

from __future__ import annotations

import io
import mmap
import struct
import zipfile
import zlib
from typing import IO

SLACK_BYTES = 64 << 20
"""What a file may need beyond twice its own size, whatever it is."""

_LOCAL_HEADER = struct.Struct("<4s22xHH")
_CHUNK = 1 << 20
_ENCRYPTED = 1


class DamagedArchive(ValueError):
    """An archive that is damaged, or made to be misread."""


def _mapped(file: IO[bytes]) -> mmap.mmap:
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


class Archive:
    """A zip archive's records by their names below its one top folder, as torch writes it.

    Args:
        file: the open file; it must stay open.

    Raises:
        Exception: of any class, from a file that is no such archive.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._zip = zipfile.ZipFile(file)
        self._data = file.getbuffer() if isinstance(file, io.BytesIO) else _mapped(file)
        entries = [entry for entry in self._zip.infolist() if not entry.is_dir()]
        roots = {entry.filename.partition("/")[0] for entry in entries}
        self.root = roots.pop() if len(roots) == 1 else ""
        self.records = {entry.filename.removeprefix(f"{self.root}/"): entry for entry in entries}
        if len(self.records) < len(entries):
            raise DamagedArchive("two of its records have one name")
        if any(entry.flag_bits & _ENCRYPTED for entry in entries):
            raise DamagedArchive("it is encrypted")
        if any(entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for entry in entries):
            raise DamagedArchive("it is compressed in a way that torch never uses")
        if min((entry.header_offset for entry in entries), default=0) != 0:
            raise DamagedArchive("something stands before it")
        unfolded = sum(entry.file_size for entry in entries)
        if unfolded > 2 * len(self._data) + SLACK_BYTES:
            raise DamagedArchive(f"it would unfold from {len(self._data):,} to {unfolded:,} bytes")
        for entry in entries:
            if entry.CRC == 0:  # torch can be told to compute none
                del entry.CRC

    def __contains__(self, name: object) -> bool:
        return name in self.records

    def size(self, name: str) -> int:
        """The bytes of a record."""
        return self.records[name].file_size

    def read(self, name: str) -> bytes:
        """A record's bytes, checked against its checksum."""
        return self._zip.read(self.records[name])

    def view(self, name: str) -> memoryview:
        """A record's bytes: those of the file, mapped so that writing to them is private, or, if compressed, a copy."""
        entry = self.records[name]
        if entry.compress_type != zipfile.ZIP_STORED:
            return memoryview(bytearray(self.read(name)))
        start = self._start(entry)
        return memoryview(self._data)[start : start + entry.file_size]

    def check(self) -> None:
        """Compare every record with its checksum: a copy or a download that went wrong shows here.

        Raises:
            Exception: of any class; a record is not what was written.
        """
        for name, entry in self.records.items():
            if entry.compress_type != zipfile.ZIP_STORED:
                self.read(name)
                continue
            data, found = self.view(name), 0
            for start in range(0, len(data), _CHUNK):
                found = zlib.crc32(data[start : start + _CHUNK], found)
            if found != getattr(entry, "CRC", found):
                raise DamagedArchive(f"its record `{name}` is not what was written")

    def _start(self, entry: zipfile.ZipInfo) -> int:
        magic, name, extra = _LOCAL_HEADER.unpack_from(self._data, entry.header_offset)
        start: int = entry.header_offset + _LOCAL_HEADER.size + name + extra
        if magic != b"PK\x03\x04" or start + entry.file_size > len(self._data):
            raise DamagedArchive("its directory points outside of it")
        return start
