"""Keep count of one pickle that is being read: its length, the memory that it takes, and what it named that is not allowed."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

from torch import nn

from se_inject.loading.pickles.constructors import Malformed
from se_inject.loading.zip_archive import SLACK_BYTES

MOST_OPCODES = 1_000_000
"""The largest network of timm has a quarter of a million."""

_BYTES_OF_AN_ITEM = 64
_BYTES_OF_A_CLASS = 16_000
"""Of the class of a stored forward: it takes a third of that, and time."""
_LONG_READ = 1 << 20


class Placeholder(nn.Module):
    """A placeholder for a class, function or call in a file that is not on the list of what is allowed."""


@dataclass
class Reading:
    """One file being read: what it may do, and what it has done so far.

    Attributes:
        trust: packages whose code the file may use.
        spare_bytes: what it may still take beyond the bytes that are read.
        refused: the names of what became ``Placeholder``, each with the reason if it could not be imported.
        modules: every module that it made.
        opcodes: how many have been carried out.
        classes: what the classes of stored forwards are made of; equal ones share one.
    """

    trust: tuple[str, ...]
    spare_bytes: int
    refused: dict[str, str | None] = field(default_factory=dict)
    modules: list[nn.Module] = field(default_factory=list)
    opcodes: int = 0
    classes: set[tuple[Any, ...]] = field(default_factory=set)

    @classmethod
    def of(cls, size: int, trust: Sequence[str]) -> Reading:
        """Start reading a file of this many bytes."""
        return cls(tuple(trust), size + SLACK_BYTES)

    def copies(self, data: Any) -> None:
        """Count something that is about to be copied: bytes by their number, what a container holds by its size.

        Raises:
            UnpicklingError: that is more than any file needs.
        """
        if isinstance(data, bytes | str | bytearray | memoryview):
            self.takes(len(data))
        elif isinstance(data, list | tuple | dict | set | frozenset):
            self.takes(len(data) * _BYTES_OF_AN_ITEM)

    def makes_class(self, *made_of: Any) -> None:
        """Count the class of a stored forward, if there is none of the same function, class and text yet.

        Raises:
            UnpicklingError: that are more than any file needs.
        """
        key = tuple(part for part in made_of if type(part) is str or callable(part))
        if key not in self.classes:
            self.classes.add(key)
            self.takes(_BYTES_OF_A_CLASS)

    def takes(self, size: int) -> None:
        """Count bytes of memory; fewer than none are given back.

        Raises:
            UnpicklingError: that is more than any file needs.
        """
        self.spare_bytes -= size
        if self.spare_bytes < 0:
            raise Malformed("it unfolds to far more than its own size")


class OpcodeTable(dict[int, Callable[..., None]]):
    """The table of opcodes; it counts the look-ups."""

    reading: Reading

    def __getitem__(self, code: int) -> Callable[..., None]:
        self.reading.opcodes += 1
        if self.reading.opcodes > MOST_OPCODES:
            raise Malformed(f"it holds more than {MOST_OPCODES:,} opcodes")
        try:
            return super().__getitem__(code)
        except KeyError:
            raise pickle.UnpicklingError(f"opcode {bytes([code])!r}, which no pickle of a network has") from None


class BoundedFile:
    """A file, of which nobody reads more than it has: Python would first make room for all that is asked for."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        start = file.tell()
        self._end = file.seek(0, 2)
        file.seek(start)
        self.readline = file.readline

    def read(self, size: int) -> bytes:
        if size > _LONG_READ and size > self._end - self._file.tell():
            raise EOFError("the file ends before its data does")
        return self._file.read(size)
