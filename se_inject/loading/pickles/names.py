"""List the names in a pickle without making any object of it."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO, Any, ClassVar

from torch.serialization import MAGIC_NUMBER

from se_inject.loading.pickles.allowlist import BUILDERS, may_be_got
from se_inject.loading.pickles.constructors import builder
from se_inject.loading.pickles.reading import Placeholder, Reading
from se_inject.loading.pickles.unpickler import Unpickler, spelled_today
from se_inject.loading.zip_archive import Archive

_STORED_FORWARDS = tuple(name for name in BUILDERS if name.rpartition(".")[2] in ("edited", "program", "program_class"))


@dataclass
class Names:
    """What a pickle names.

    Attributes:
        made: classes of which it makes objects, each with how many.
        called: functions and classes that it calls, each with how often.
        referred: what it only refers to.
        texts: the JSON texts of stored forwards.
    """

    made: dict[str, int] = field(default_factory=dict)
    called: dict[str, int] = field(default_factory=dict)
    referred: dict[str, int] = field(default_factory=dict)
    texts: list[str] = field(default_factory=list)


class _Name(Placeholder):
    """Stands for one name of a pickle, and for whatever it would have made."""

    def __init__(self, full: str) -> None:
        super().__init__()
        self.full = full


class _Reader(Unpickler):
    """Our unpickler, in which every name and every call is the same empty module."""

    def __init__(self, file: IO[bytes], reading: Reading, names: Names) -> None:
        super().__init__(file, reading, lambda key: self._nothing)
        self._names = names
        self._nothing = _Name("")
        self._known: dict[str, _Name] = {}

    def _placeholder(self) -> Placeholder:
        return self._nothing

    def _nested(self, data: Any) -> None:
        """Read a storage as ``pickle.dump`` writes it: a legacy file within the file."""
        if type(data) is bytes:
            _read(io.BytesIO(data), "legacy", self._reading, self._names)

    def find_class(self, module: str, name: str) -> Any:
        full = f"{spelled_today(module)}.{name}"
        self._names.referred[full] = self._names.referred.get(full, 0) + 1
        return self._known.setdefault(full, _Name(full))

    def _call(self, function: Any, args: Any) -> Any:
        if isinstance(function, _Name) and function.full:
            full, args = function.full, args if type(args) is tuple else ()
            texts = [arg for arg in args if type(arg) is str]
            if full == "builtins.getattr" and texts and not may_be_got(texts[0]):
                full = f"builtins.getattr(…, {texts[0]!r})"
                self._names.referred[full] = 1
            if full == "torch.storage._load_from_bytes":
                self._nested(args[0] if args else None)
            if full in _STORED_FORWARDS:
                self._names.texts += texts
            self._names.called[full] = self._names.called.get(full, 0) + 1
            if full == "_codecs.encode":  # protocol 2 has no bytes, and writes text of which they are made
                return builder(full)(*args)
        return self._nothing

    def _made_empty(self) -> None:
        _, kind = self.stack.pop(), self.stack.pop()
        if isinstance(kind, _Name) and kind.full:
            self._names.made[kind.full] = self._names.made.get(kind.full, 0) + 1
        self.append(self._nothing)

    def _set_state(self, instance: Any, state: Any) -> None:
        """Ignore the state."""

    _OPCODES: ClassVar[dict[int, Any]] = {
        **Unpickler._OPCODES,
        pickle.NEWOBJ[0]: _made_empty,
        pickle.PERSID[0]: lambda self: self.append((self.readline(), self._nothing)[1]),
    }


def names_in(file: IO[bytes], form: str) -> Names:
    """List the names in the pickle of a file.

    Args:
        file: the open file, at its beginning.
        form: ``zip``, ``legacy`` or ``plain``.

    Raises:
        Exception: of any class, from a damaged file.
    """
    size = file.seek(0, 2)
    file.seek(0)
    names = Names()
    _read(file, form, Reading.of(size, ()), names)
    return names


def _read(file: IO[bytes], form: str, reading: Reading, names: Names) -> None:
    if form == "zip":
        archive = Archive(file)
        archive.check()
        file = io.BytesIO(archive.read("data.pkl"))
    if form == "legacy" and _Reader(file, reading, names).load() != MAGIC_NUMBER:
        raise pickle.UnpicklingError("it is not in the format that it begins like")
    for _ in range(4 if form == "legacy" else 1):  # a version, a machine, the data, its storages
        _Reader(file, reading, names).load()


def every_name(names: Names) -> Iterator[tuple[str, str, int]]:
    """List each name with its use in the pickle, ``made``, ``called`` or ``referred``, and how often."""
    for full, count in names.referred.items():
        uses = [(use, table[full]) for use, table in (("called", names.called), ("made", names.made)) if full in table]
        for use, number in uses or [("referred", count)]:
            yield full, use, number
