"""Unpickle a network without running anything that its file brings along.

A pickle is a program: ``REDUCE`` calls what it names, ``BUILD`` hands any state to ``__setstate__``.
``torch.load(weights_only=True)`` narrows the names, but what one adds to its list can be *called* with the
file's own arguments, network classes included, and it reads no whole module in the format before torch 1.6.
So the opcodes that do something are replaced here, and one reader serves every format:

* A network class (``allowlist.is_network``) is made empty by ``object.__new__`` and given its state by its
  ``__setstate__``. The file never calls it, and ``module_checks`` looks at every module when all has been read.
* Called are only the ``constructors``, which make tensors and plain data and check their arguments; an enum with one
  value; ``functools.partial`` with one callable and nothing else; ``getattr`` for a module's own ``forward…``
  methods and torch's activations; and our own ``edited`` and ``frozen``, which check
  what they are given.
* Functions of tensors may be referred to: networks keep them as attributes and call them in their forward.
* Everything else, name or call, becomes a ``Placeholder`` module that keeps its tensors and does nothing. Reading
  goes on, so that an error can name all of it at once, and the tensors in such a file can still be had.
* A trusted package is outside all this: its code is imported, called and given state as the file says.
* The program's length, and the memory that it takes, have limits.
"""

from __future__ import annotations

import enum
import functools
import importlib
import pickle
import re
import types
from collections import OrderedDict
from collections.abc import Callable
from typing import IO, Any, ClassVar

import torch
from torch import nn

from se_inject.loading.pickles.allowlist import (
    ACTIVATIONS,
    BUILDERS,
    is_data,
    is_harmless,
    is_network,
    may_be_looked_up,
    within,
)
from se_inject.loading.pickles.constructors import Malformed, builder, checked_key
from se_inject.loading.pickles.reading import BoundedFile, OpcodeTable, Placeholder, Reading
from se_inject.user_code import printable

_BYTES_OF_A_MODULE = 2000
_BYTES_OF_A_SET = 216
_STORED_FORWARDS = "se_inject.generated"
_WIDE = re.compile(rb"[\xc4-\xff]")
"""In text, the beginning of a letter that takes more than one byte in memory; then every letter does."""

_TABLES = ("_modules", "_parameters", "_buffers")
_MOST_LAYERS_OF_AN_RNN = 100
_BYTES_OF_AN_RNN_LAYER = 10_000
"""Of the names and weak references that its ``__setstate__`` makes, and for the time that takes."""
_OLD_NAMES = {"__builtin__": "builtins", "copy_reg": "copyreg", "torch.tensor": "torch._tensor"}
"""Protocol 2 writes modules by their names in Python 2; torch before 1.8 had another module."""
_UNUSED = (
    pickle.INST, pickle.OBJ, pickle.NEWOBJ_EX, pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.PERSID, pickle.STRING,
    pickle.UNICODE,
)  # fmt: skip


def spelled_today(module: str) -> str:
    """Return the name that a module has now."""
    return _OLD_NAMES.get(module, module)


def _may_be_partial(function: Any) -> bool:
    """Return whether a file may store a partial of a function: not of a module, a method, or another partial."""
    is_bound = isinstance(function, nn.Module | functools.partial | types.MethodType)
    hands_on = getattr(function, "__name__", "") == "_pass_through_h"  # the only one that returns what it is given
    return callable(function) and not is_bound and not hands_on


class Unpickler(pickle._Unpickler):
    """The standard library's unpickler, with every opcode that calls something replaced.

    Args:
        file: where the pickle begins.
        reading: the file's reading, which it goes on with.
        persistent: what a persistent id stands for.
        load_bytes: a storage from bytes, as ``pickle.dump`` writes it.
    """

    stack: list[Any]
    memo: dict[int, Any]
    append: Callable[[Any], None]
    read: Callable[[int], bytes]
    pop_mark: Callable[[], list[Any]]

    def __init__(
        self,
        file: IO[bytes],
        reading: Reading,
        persistent: Callable[[Any], Any] | None = None,
        load_bytes: Callable[[bytes], Any] | None = None,
    ) -> None:
        super().__init__(BoundedFile(file), encoding="utf-8")
        self._reading = reading
        self._persistent_id = persistent
        self._load_bytes = load_bytes
        self._callable: dict[int, Any] = {}
        self.dispatch = OpcodeTable(self._OPCODES)  # type: ignore[misc]
        self.dispatch.reading = reading

    def find_class(self, module: str, name: str) -> Any:
        """Return the object of this name if the file may have it, else a placeholder."""
        module = spelled_today(module)
        name = "range" if (module, name) == ("builtins", "xrange") else name  # protocol 2 calls it so
        full = f"{module}.{name}"
        trusted = within(module, self._reading.trust)
        if full in ("builtins.getattr", "torch.storage._load_from_bytes"):
            return self._may_call(self._attribute if name == "getattr" else self._storage)
        if module in ("torch", "torch.cuda") and name.endswith("Storage") and name != "UntypedStorage":
            return torch.serialization.StorageType(name)  # type: ignore[no-untyped-call]
        if full in BUILDERS and not trusted:
            return self._may_call(builder(full))
        if full in self._reading.refused:  # an import that fails takes a while
            return self._refuse(full, self._reading.refused[full])
        if not trusted and not may_be_looked_up(module, name):
            return self._refuse(full)
        try:
            found: Any = importlib.import_module(module)
            for part in name.split("."):
                found = getattr(found, part)
        except (ImportError, AttributeError) as error:
            return self._refuse(full, str(error))
        if trusted and within(getattr(found, "__module__", None) or "", self._reading.trust):
            return self._may_call(found)
        return found if is_harmless(module, name, found) else self._refuse(full)

    def _may_call(self, found: Any) -> Any:
        self._callable[id(found)] = found
        return found

    def _refuse(self, name: str, why: str | None = None) -> Placeholder:
        self._reading.refused[printable(name)] = why and printable(why)
        return self._placeholder()

    def _placeholder(self) -> Placeholder:
        self._reading.takes(_BYTES_OF_A_MODULE)
        self._reading.modules.append(Placeholder())
        return self._reading.modules[-1]  # type: ignore[return-value]

    def _refuse_call(self, function: Any) -> Placeholder:
        kind = function if isinstance(function, type | types.FunctionType) else type(function)
        return self._refuse(f"{kind.__module__}.{kind.__qualname__}(…)")

    def _attribute(self, owner: Any, name: Any) -> Any:
        """Do ``getattr`` for the attributes that networks really store."""
        if type(name) is not str:
            raise Malformed("an attribute's name that is not a string")
        if isinstance(owner, nn.Module) and name.startswith("forward"):
            return types.MethodType(getattr(type(owner), name), owner)
        if owner is torch._C._VariableFunctionsClass and name in ACTIVATIONS:  # type: ignore[attr-defined]
            return getattr(owner, name)
        return self._refuse(f"builtins.getattr(…, {name!r})")

    def _storage(self, data: Any) -> Any:
        """Read a tensor's storage as ``pickle.dump`` writes it: a legacy file within the file, and none in that one."""
        if self._load_bytes is None or type(data) is not bytes:
            return self._refuse("torch.storage._load_from_bytes")
        return self._load_bytes(data)

    # -- opcodes -------------------------------------------------------------------------------------------

    def _reduce(self) -> None:
        args, function = self.stack.pop(), self.stack.pop()
        self.append(self._call(function, args))

    def _call(self, function: Any, args: Any) -> Any:
        if isinstance(function, Placeholder):  # TorchScript writes an enum's one value without a tuple
            args = ()
        if type(args) is not tuple:
            raise pickle.UnpicklingError("arguments that are not a tuple")
        may_call = self._callable.get(id(function), self) is function
        if isinstance(function, enum.EnumMeta):
            may_call = may_call or (len(args) == 1 and checked_key(args[0]) is args[0])
        elif function is functools.partial:
            may_call = len(args) == 1 and _may_be_partial(args[0])
        if any(isinstance(part, Placeholder) for part in (function, *args)):
            return self._placeholder()
        if not may_call:
            return self._refuse_call(function)
        for arg in args:
            self._reading.copies(arg)
        if getattr(function, "__module__", None) == _STORED_FORWARDS:
            self._reading.makes_class(function, *args)
        try:
            return self._made(function(*args))
        except (TypeError, AttributeError) as error:
            if self._reading.trust:
                raise
            raise Malformed(
                f"arguments that `{getattr(function, '__name__', 'it').strip('_')}` doesn't take"
            ) from error

    def _newobj(self) -> None:
        args, kind = self.stack.pop(), self.stack.pop()
        if isinstance(kind, Placeholder):
            self.append(self._placeholder())
        elif isinstance(kind, type) and within(kind.__module__, self._reading.trust):
            self.append(self._made(kind.__new__(kind, *args)))
        elif args == () and (is_network(kind) or is_data(kind)) and kind is not Placeholder:
            self.append(self._made(object.__new__(kind)))
        else:
            self.append(self._refuse_call(kind))

    def _made(self, found: Any) -> Any:
        if isinstance(found, nn.Module):
            self._reading.takes(_BYTES_OF_A_MODULE)
            self._reading.modules.append(found)
        return found

    def _build(self) -> None:
        state, instance = self.stack.pop(), self.stack[-1]
        self._set_state(instance, state)

    def _set_state(self, instance: Any, state: Any) -> None:
        kind: Any = type(instance)
        for part in state if type(state) is tuple else (state,):
            self._reading.copies(part)
        if within(kind.__module__, self._reading.trust):
            self.append(state)
            pickle._Unpickler.dispatch[pickle.BUILD[0]](self)  # type: ignore[arg-type]
        elif kind is Placeholder:
            tables = {name: state.get(name) for name in _TABLES} if type(state) is dict else {}
            vars(instance).update({name: table for name, table in tables.items() if isinstance(table, dict)})
        elif kind is OrderedDict:
            metadata = state.get("_metadata") if type(state) is dict else None
            vars(instance).update({"_metadata": metadata} if isinstance(metadata, dict) else {})
        elif is_data(kind):
            _check_attributes(kind, state)
            vars(instance).update(state)
        elif kind is functools.partial:
            if not (type(state) is tuple and state and _may_be_partial(state[0])):
                raise Malformed("a functools.partial of something that is not a function")
            instance.__setstate__(state)
        elif isinstance(instance, nn.Module) and type(state) is dict:
            layers = state.get("num_layers", 0)
            if isinstance(instance, nn.RNNBase) and not (type(layers) is int and layers <= _MOST_LAYERS_OF_AN_RNN):
                raise Malformed(f"a recurrent layer with more than {_MOST_LAYERS_OF_AN_RNN} layers")
            if isinstance(instance, nn.RNNBase):
                self._reading.takes(layers * _BYTES_OF_AN_RNN_LAYER)
            kind.__setstate__(instance, state)
        else:
            raise pickle.UnpicklingError(f"a state for a {kind.__name__}")

    def _set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, dict):
            for key, value in zip(items[::2], items[1::2], strict=True):
                target[checked_key(key)] = value
        elif not isinstance(target, Placeholder):
            raise pickle.UnpicklingError(f"items for a {type(target).__name__}")

    def _add_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif isinstance(target, set):
            target.update(map(checked_key, items))
        elif not isinstance(target, Placeholder):
            raise pickle.UnpicklingError(f"members for a {type(target).__name__}")

    def _list(self) -> None:
        items = self.pop_mark()
        self.append([])
        self._add_items(items)

    def _dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self._set_items(items)

    def _text(self, bytes_of_size: int) -> None:
        data = self.read(int.from_bytes(self.read(bytes_of_size), "little"))
        if _WIDE.search(data):
            self._reading.takes(3 * len(data))
            self.append(str(data, "utf-8", "surrogatepass"))
        else:  # protocol 2 writes bytes as text, of which it makes longer ones
            self.append(str(data, "utf-8"))
            self._reading.takes(len(self.stack[-1]) - len(data))

    def _byte_array(self) -> None:
        self.append(bytearray(self.read(int.from_bytes(self.read(8), "little"))))

    def _empty_set(self) -> None:
        self._reading.takes(_BYTES_OF_A_SET)
        self.append(set())

    def _persistent(self) -> None:
        key = self.stack.pop()
        if self._persistent_id is None:
            raise pickle.UnpicklingError("a persistent id outside of a file of torch.save")
        self.append(self._persistent_id(key))

    _OPCODES: ClassVar[dict[int, Any]] = {
        **{code: load for code, load in pickle._Unpickler.dispatch.items() if bytes([code]) not in _UNUSED},
        pickle.REDUCE[0]: _reduce,
        pickle.NEWOBJ[0]: _newobj,
        pickle.BUILD[0]: _build,
        pickle.LIST[0]: _list,
        pickle.DICT[0]: _dict,
        pickle.BINSTRING[0]: lambda self: self._text(4),
        pickle.BINUNICODE[0]: lambda self: self._text(4),
        pickle.BINUNICODE8[0]: lambda self: self._text(8),
        pickle.BYTEARRAY8[0]: _byte_array,
        pickle.EMPTY_SET[0]: _empty_set,
        pickle.FROZENSET[0]: lambda self: self.append(frozenset(map(checked_key, self.pop_mark()))),
        pickle.SETITEM[0]: lambda self: self._set_items([self.stack.pop(-2), self.stack.pop()]),
        pickle.SETITEMS[0]: lambda self: self._set_items(self.pop_mark()),
        pickle.APPEND[0]: lambda self: self._add_items([self.stack.pop()]),
        pickle.APPENDS[0]: lambda self: self._add_items(self.pop_mark()),
        pickle.ADDITEMS[0]: lambda self: self._add_items(self.pop_mark()),
        pickle.BINPERSID[0]: _persistent,
    }


def _check_attributes(kind: type, state: Any) -> None:
    names = state if type(state) is dict else {None: None}
    if any(type(name) is not str or name.startswith("__") or callable(getattr(kind, name, None)) for name in names):
        raise Malformed(f"a state for a {kind.__name__}")
