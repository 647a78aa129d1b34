"""Read zip archives in place: nothing is unpacked to disk, and nothing unfolds to much more than the file."""

from __future__ import annotations

import io
import mmap
import os
import struct
import zipfile
import zlib
from collections.abc import Iterable
from typing import IO, Any

SLACK_BYTES = 64 << 20
"""What a file may need beyond its own size, whatever it is."""

_LOCAL_HEADER = struct.Struct("<4s2xHH4xIIIHH")
_END = struct.Struct("<4sHHHHIIH")
_END_64 = struct.Struct("<4sQHHIIQQQQ")
_LOCATOR_64 = struct.Struct("<4sIQI")
_LARGEST_DIRECTORY = 8 << 20
_SATURATED = (2**16 - 1, 2**16 - 1, 2**32 - 1, 2**32 - 1)
_ENCRYPTED, _SIZES_BEHIND, _UTF_8 = 0x1, 0x8, 0x800
"""Flags of a record: its checksum and sizes may stand behind it, in a descriptor, and be 0 before it."""
_DESCRIPTOR = b"PK\x07\x08"
_IN_64_BITS = 2**32 - 1
_CHUNK = 1 << 20


class DamagedArchive(ValueError):
    """An archive that is damaged, or made to be misread."""


def _mapped(file: IO[bytes]) -> mmap.mmap:
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


class Archive:
    """A zip archive's records by their names below its one top folder, as torch writes it.

    Args:
        file: the open file; it must stay open.

    Raises:
        Exception: of any class, from a file that isn't such an archive.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._data = file.getbuffer() if isinstance(file, io.BytesIO) else _mapped(file)
        directory, count = _directory(self._data)
        self._zip = zipfile.ZipFile(file)
        everything = self._zip.infolist()
        if (self._zip.start_dir, len(everything)) != (directory, count):
            raise DamagedArchive("its directory is not where it says, or holds another number of records")
        entries = [entry for entry in everything if not entry.is_dir()]
        roots = {entry.filename.partition("/")[0] for entry in entries}
        self.root = roots.pop() if len(roots) == 1 else ""
        self.records = {entry.filename.removeprefix(f"{self.root}/"): entry for entry in entries}
        if any(entry.filename != entry.orig_filename.replace(os.sep, "/") for entry in everything):
            raise DamagedArchive("a record has two names")
        if len({entry.filename.rstrip("/").lower() for entry in everything}) < len(
            everything
        ):  # torch ignores capitals
            raise DamagedArchive("two of its records have one name")
        if any(entry.flag_bits & _ENCRYPTED for entry in entries):
            raise DamagedArchive("it is encrypted")
        if any(entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for entry in entries):
            raise DamagedArchive("it is compressed in a way that torch never uses")
        if min((entry.header_offset for entry in entries), default=0) != 0:
            raise DamagedArchive("something stands before it")
        unfolded = sum(entry.file_size for entry in entries)
        if unfolded > len(self._data) + SLACK_BYTES:
            raise DamagedArchive(f"it would unfold from {len(self._data):,} to {unfolded:,} bytes")
        self._check_places(everything, directory)
        for entry in entries:
            if entry.CRC == 0:  # torch has an option to compute none
                del entry.CRC

    def __contains__(self, name: object) -> bool:
        return name in self.records

    def __len__(self) -> int:
        """Return the bytes of the file."""
        return len(self._data)

    def size(self, name: str) -> int:
        """Return the bytes of a record."""
        return self.records[name].file_size

    def read(self, name: str) -> bytes:
        """Read a record's bytes, checked against its checksum."""
        return self._zip.read(self.records[name])

    def view(self, name: str) -> memoryview:
        """Return a record's bytes: those of the file, mapped so that writing to them is private, or, if compressed, a copy."""
        entry = self.records[name]
        if entry.compress_type == zipfile.ZIP_STORED:
            start = self._start(entry)
            return memoryview(self._data)[start : start + entry.file_size]
        found, size = bytearray(entry.file_size), 0
        with self._zip.open(entry) as stream:
            while piece := stream.read(_CHUNK):
                found[size : size + len(piece)] = piece
                size += len(piece)
        if size != entry.file_size:
            raise DamagedArchive(f"its record `{name}` is of another size")
        return memoryview(found)

    def copy(self, names: Iterable[str], to: IO[bytes]) -> None:
        """Write an archive of these records alone, uncompressed and each with its checksum."""
        with zipfile.ZipFile(to, "w") as archive:
            for name in names:
                with archive.open(zipfile.ZipInfo(f"{self.root}/{name}"), "w", force_zip64=True) as record:
                    record.write(self.view(name))

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

    def _check_places(self, entries: list[zipfile.ZipInfo], directory: int) -> None:
        """Check that every record has its own place, one behind the other, with nothing between them."""
        end = 0
        for entry in sorted(entries, key=lambda entry: entry.header_offset):
            self._check_place(entry.header_offset, end)
            end = self._start(entry) + entry.compress_size
            if entry.flag_bits & _SIZES_BEHIND:
                end = self._behind(entry, end)
        self._check_place(directory, end)

    def _check_place(self, where: int, end: int) -> None:
        if where != end:
            raise DamagedArchive(
                "two of its records overlap" if where < end else "something stands between its records"
            )

    def _behind(self, entry: zipfile.ZipInfo, end: int) -> int:
        """Return where a record's descriptor ends, if there is one: two lengths, each with or without a beginning."""
        crc = struct.pack("<I", getattr(entry, "CRC", 0))
        for beginning in (_DESCRIPTOR, b""):
            for form in ("<II", "<QQ"):
                try:
                    wanted = beginning + crc + struct.pack(form, entry.compress_size, entry.file_size)
                except struct.error:  # longer than 4 GiB
                    continue
                if self._data[end : end + len(wanted)] == wanted:
                    return end + len(wanted)
        return end

    def _start(self, entry: zipfile.ZipInfo) -> int:
        magic: bytes
        length: int
        extra: int
        magic, flags, method, crc, packed, size, length, extra = _LOCAL_HEADER.unpack_from(
            self._data, entry.header_offset
        )
        at = entry.header_offset + _LOCAL_HEADER.size
        name = entry.orig_filename.encode("utf-8" if entry.flag_bits & _UTF_8 else "cp437")
        if (magic, method, self._data[at : at + length]) != (b"PK\x03\x04", entry.compress_type, name):
            raise DamagedArchive("its directory names other records than it holds")
        said = zip((crc, packed, size), (getattr(entry, "CRC", 0), entry.compress_size, entry.file_size), strict=True)
        is_unsaid = bool(flags & _SIZES_BEHIND)
        agree = all(one in (other, _IN_64_BITS) or (is_unsaid and one == 0) for one, other in said)
        if not agree or (flags ^ entry.flag_bits) & (_ENCRYPTED | _SIZES_BEHIND | _UTF_8):
            raise DamagedArchive("a record that says something else of itself than its directory")
        if entry.compress_type == zipfile.ZIP_STORED and entry.compress_size != entry.file_size:
            raise DamagedArchive("a record that is longer or shorter than it is")
        return at + length + extra


def _directory(data: Any) -> tuple[int, int]:
    """Find the offset of an archive's directory and its number of records; every reader must find the same one."""
    end = len(data) - _END.size
    magic, disk, first, *parts, comment = _END.unpack_from(data, end)
    if magic != b"PK\x05\x06" or bytes(data[end:]).rfind(magic) != 0 or disk or first or comment:
        raise DamagedArchive("something stands behind it")
    locator = end - _LOCATOR_64.size
    if locator >= 0 and data[locator : locator + 4] == b"PK\x06\x07":
        _, disk, where, disks = _LOCATOR_64.unpack_from(data, locator)
        end = locator - _END_64.size
        if (disk, where, disks) != (0, end, 1):
            raise DamagedArchive("its directory is not where it says")
        magic, size, _, _, disk, first, *long = _END_64.unpack_from(data, end)
        agree = all(short in (part, largest) for short, part, largest in zip(parts, long, _SATURATED, strict=True))
        if magic != b"PK\x06\x06" or size != _END_64.size - 12 or disk or first or not agree:
            raise DamagedArchive("it has two directories")
        parts = long
    here, count, size, start = parts
    if here != count or size > _LARGEST_DIRECTORY or start + size != end:
        raise DamagedArchive("its directory is not where it says")
    return start, count
