"""The pickles in TorchScript archives, looked at before torch's reader in C++ gets to see them.

torch's reader takes values apart by recursion, and its interpreter believes what a class declares of its attributes. So
every object is compared with the declaration of its place, every tensor with its storage, and depth has a bound.
"""

from __future__ import annotations

import ast
import io
import pickle
import re
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch

from se_inject.errors import LoadError, printable
from se_inject.loading.pickles.constructors import Malformed
from se_inject.loading.pickles.reading import Placeholder, Reading
from se_inject.loading.pickles.storages import check_size, dtype_of, new_bytes, storage_id, typed
from se_inject.loading.pickles.unpickler import Unpickler
from se_inject.loading.torchscript.source import Declared, Type, type_of
from se_inject.loading.zip_archive import Archive

_OF_TORCHSCRIPT = ("__torch__.", "torch.jit._pickle.")
_OF_CPP = "__torch__.torch.classes."
_DEEPEST_VALUE = 1000
_MOST_VALUES = 1_000_000


def check_script_pickles(archive: Archive, names: Sequence[str], declared: Declared) -> None:
    """Check that the tensors in TorchScript's pickles, which torch's reader in C++ will read, are within their storages.

    Args:
        archive: the archive.
        names: of the records, ``data.pkl`` and ``constants.pkl``.
        declared: what each class declares, as ``checked_sources`` gives it.

    Raises:
        Exception: of any class; they aren't, or it names more than TorchScript does.
    """
    reading = Reading.of(len(archive), ())
    for name in names:
        folder = name.removesuffix(".pkl")

        def storage(key: Any, folder: str = folder) -> Any:
            kind, record, _, numel = storage_id(key, 4)
            dtype = dtype_of(kind)
            check_size(numel, dtype, archive.size(f"{folder}/{record}"))
            return typed(new_bytes(numel * dtype.itemsize, "meta"), dtype)

        reading.copies(data := archive.read(name))
        reader = _ScriptUnpickler(io.BytesIO(data), reading, storage)
        reader.declared = declared
        reader.load()
        for other in reading.refused:
            if not other.startswith(_OF_TORCHSCRIPT):
                raise LoadError(f"a TorchScript archive that holds `{other}`", seen=f"in its {name}")


def _tuple_of(code: bytes) -> Any:
    def load(self: _ScriptUnpickler) -> None:
        Unpickler._OPCODES[code[0]](self)
        self._hold(self.stack[-1], self.stack[-1])

    return load


class _Kind(Placeholder):
    """A class of a TorchScript archive."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name


class _Tag(Placeholder):
    """torch's function that says of what type a list or dict is."""


class _List(Placeholder):
    """torch's function that makes a list of numbers or tensors."""

    def __init__(self, of: str) -> None:
        super().__init__()
        self.of = of


_TAG = "torch.jit._pickle.restore_type_tag"
_BUILDERS_OF_LISTS = "torch.jit._pickle.build_{}list"
_CHOICES = ("Optional", "Union")
_ANYTHING = ("", "Any")
_NOTHING = ("-", ())
_TYPE = re.compile(r"[\w.\[\], ]{1,1000}")
_DEEPEST_TYPE = 20
_LISTS = {"int": "int", "double": "float", "bool": "bool", "tensor": "Tensor"}
_PLAIN: dict[type, tuple[str, ...]] = {
    int: ("int", "float", "number"),
    float: ("float", "number"),
    bool: ("bool",),
    str: ("str",),
}
"""The names of types that plain values are declared with."""


def _tagged_type(text: Any) -> Any:
    """Parse the text of a type, which torch's reader would parse by recursion.

    Raises:
        Malformed: it is none, or goes too deep.
    """
    if type(text) is not str or not _TYPE.fullmatch(text) or text.count("[") > _DEEPEST_TYPE:
        raise Malformed("a type that can't be read")
    try:
        return type_of(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError) as error:
        raise Malformed("a type that can't be read") from error


def _is_declared(kind: Any, declared: Any) -> bool:
    """Return whether a type is the one that is declared for its place."""
    name, inner = declared
    is_choice = name in _CHOICES and any(_is_declared(kind, part) for part in inner)
    return name in _ANYTHING or kind == declared or is_choice


def _fits(value: Any, declared: Any, classes: Declared) -> bool:
    """Return whether a value, and everything in it, is of the type that is declared for its place."""
    name, inner = declared
    if name in _ANYTHING or value is None:  # the interpreter looks whether a value is there
        return True
    if name in _CHOICES:
        return any(_fits(value, part, classes) for part in inner)
    if isinstance(value, Placeholder):
        return _fits_object(value, declared, classes)
    if isinstance(value, dict):
        each = inner if name == "Dict" and len(inner) == 2 else (_NOTHING, _NOTHING)
        return all(_fits(part, kind, classes) for item in value.items() for part, kind in zip(item, each, strict=True))
    if isinstance(value, list):
        return name == "List" and len(inner) == 1 and all(_fits(part, inner[0], classes) for part in value)
    if isinstance(value, tuple):
        named = classes.get(name)
        kinds = tuple(named.attributes.values()) if named is not None and named.base == "NamedTuple" else inner
        if (name != "Tuple" and kinds is inner) or len(kinds) != len(value):
            return False
        return all(_fits(part, kind, classes) for part, kind in zip(value, kinds, strict=True))
    if isinstance(value, torch.Tensor):
        return bool(name == "Tensor")
    return name in _PLAIN.get(type(value), (name,) if name not in classes else ())


def _fits_object(value: Placeholder, declared: Any, classes: Declared) -> bool:
    """Return whether an object of the archive, a list or a dict with a type is what is declared for its place."""
    tagged, kind = vars(value).get("tagged"), vars(value).get("kind")
    if tagged is not None:
        return _is_declared(tagged[1], declared) and _fits(tagged[0], tagged[1], classes)
    return bool(kind == declared)


class _ScriptUnpickler(Unpickler):
    """Reads what torch's reader would trip over: it takes values apart by recursion, and has a table of all that is stored.

    TorchScript writes a value completely before it is part of another. So the extent of each is known from its parts.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._known: dict[int, tuple[int, int, Any]] = {}
        """By address: how deep a value goes, how many it is when written out, and itself."""
        self._parts: set[int] = set()
        self.declared: Declared = {}

    def find_class(self, module: str, name: str) -> Any:
        """Do the same, but keep the name of a class of the archive."""
        found = super().find_class(module, name)
        full = f"{module}.{name}"
        if full == _TAG:
            return _Tag()
        if module == "torch.jit._pickle":
            of = next((kind for short, kind in _LISTS.items() if full == _BUILDERS_OF_LISTS.format(short)), None)
            if of is None:
                raise Malformed(f"a call of `{printable(full)}`")
            return _List(of)
        if full.startswith(_OF_CPP):
            raise LoadError(f"a TorchScript archive that holds `{printable(full)}`", seen="a class of C++")
        is_own = full.startswith(_OF_TORCHSCRIPT[0]) and type(found) is Placeholder
        return _Kind(full) if is_own else found

    def _new_object(self) -> None:
        _, kind = self.stack.pop(), self.stack[-1]
        self.stack[-1] = made = self._placeholder()
        if isinstance(kind, _Kind):
            vars(made)["kind"] = (kind.name, ())

    def _check_state(self, kind: Type, state: Any) -> None:
        """Check a state against the class's declaration: the interpreter believes that, and reads memory accordingly."""
        source = self.declared.get(kind[0])
        if source is None or type(state) is not dict:
            raise Malformed("an object of a class that has no source")
        for name, value in state.items():
            if not _fits(value, source.attributes.get(name, ("", ())), self.declared):
                raise LoadError(
                    f"a TorchScript archive whose `{str(name)[:80]}` holds an object of another class than it declares",
                    seen=f"in a {kind[0][:80]}",
                )

    def _hold(self, owner: Any, parts: Iterable[Any]) -> None:
        if type(owner) is tuple and not owner:
            return
        depth, size, _ = self._known.get(id(owner), (1, 1, None))
        for part in parts:
            if id(part) in self._known or isinstance(part, list | dict | Placeholder):
                below, inner, _ = self._known.setdefault(id(part), (1, 1, part))
                depth, size = max(depth, below + 1), size + inner
                self._parts.add(id(part))
        if depth > _DEEPEST_VALUE or size > _MOST_VALUES or id(owner) in self._parts:
            raise Malformed("values within values without end")
        self._known[id(owner)] = depth, size, owner

    def _call(self, function: Any, args: Any) -> Any:
        made = super()._call(function, args)
        if isinstance(made, Placeholder) and not isinstance(function, Placeholder):
            raise Malformed("a tensor that is made of something unknown")
        self._hold(made, args if type(args) is tuple else (args,))
        if isinstance(function, _Tag):
            if type(args) is not tuple or len(args) != 2:
                raise Malformed("a type that can't be read")
            vars(made)["tagged"] = args[0], _tagged_type(args[1])
        if isinstance(function, _List):
            if type(args) is not tuple or len(args) != 1 or not _fits(args[0], ("List", ((function.of, ()),)), {}):
                raise Malformed("a list of something else than it says")
            vars(made)["kind"] = "List", ((function.of, ()),)
        if isinstance(function, _Kind):  # a second way to make an object, which torch uses for enums alone
            source = self.declared.get(function.name)
            if source is None or source.base != "Enum" or type(args) not in (int, float, str):
                raise Malformed("an object that is made by a call")
            vars(made)["kind"] = function.name, ()
        return made

    def _set_state(self, instance: Any, state: Any) -> None:
        self._hold(instance, (state,))
        kind = vars(instance).get("kind") if isinstance(instance, Placeholder) else None
        if kind is None:  # torch's reader would make an object of a bare class
            raise Malformed("a state of what is not an object")
        self._check_state(kind, state)
        super()._set_state(instance, state)

    def _set_items(self, items: list[Any]) -> None:
        self._fill(items)
        super()._set_items(items)

    def _add_items(self, items: list[Any]) -> None:
        self._fill(items)
        super()._add_items(items)

    def _fill(self, items: list[Any]) -> None:
        """Note what goes into a list or dict, which has no type yet: torch's reader looks at none once it has one."""
        if isinstance(self.stack[-1], Placeholder):
            raise Malformed("items for what is whole already")
        self._hold(self.stack[-1], items)

    def _store(self, bytes_of_number: int) -> None:
        number = int.from_bytes(self.read(bytes_of_number), "little")
        if number > self._reading.opcodes:
            raise Malformed("a place in memory that is out of order")
        self.memo[number] = self.stack[-1]

    _OPCODES: ClassVar[dict[int, Any]] = {
        **{code: load for code, load in Unpickler._OPCODES.items() if bytes([code]) != pickle.PUT},
        pickle.NEWOBJ[0]: _new_object,
        pickle.BINPUT[0]: lambda self: self._store(1),
        pickle.LONG_BINPUT[0]: lambda self: self._store(4),
        pickle.TUPLE[0]: _tuple_of(pickle.TUPLE),
        pickle.TUPLE1[0]: _tuple_of(pickle.TUPLE1),
        pickle.TUPLE2[0]: _tuple_of(pickle.TUPLE2),
        pickle.TUPLE3[0]: _tuple_of(pickle.TUPLE3),
    }
