"""``int``, ``float`` and ``len`` in a forward, on sizes: Python makes plain numbers of them, which no graph can follow.

While such a forward is traced, the twin is of a class whose functions are the author's, with other builtins: theirs write down
what they are asked. No other thread, and no other network, sees them.
"""

from __future__ import annotations

import builtins
import contextlib
import dis
import functools
import math
import operator
import sys
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import TYPE_CHECKING, Any

from torch import Tensor

from se_inject.tracing.proxy import Untraceable, is_proxy
from se_inject.tracing.settings import codes_of

if TYPE_CHECKING:
    from se_inject.tracing.tracer import OwnerTracer


class _Kind(type):
    """The class of a stand-in for ``int`` or ``float``: the same in checks of a class, and for all that is not a proxy."""

    original: type

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if len(args) != 1 or kwargs or not is_proxy(args[0]) or not isinstance(args[0].value, int | float):
            return cls.original(*args, **kwargs)
        return _converted(args[0], cls.original)

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance.value if is_proxy(instance) else instance, cls.original)

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, cls.original)

    def __getattr__(cls, name: str) -> Any:
        return getattr(cls.original, name)


class _Int(metaclass=_Kind):
    original = int


class _Float(metaclass=_Kind):
    original = float


def _converted(number: Any, kind: type) -> Any:
    """Write down ``int(number)`` or ``float(number)``: exactly what Python makes of it, as an operation on sizes that may be free."""
    if type(number.value) is kind:
        return number
    if kind is float:
        return number.tracer.create_proxy("call_function", operator.truediv, (number, 1), {})
    if isinstance(number.value, bool):
        return number.tracer.create_proxy("call_function", operator.add, (number, 0), {})
    return number.tracer.create_proxy("call_function", math.trunc, (number,), {})


def _length(value: Any) -> Any:
    """Do ``len``: of a tensor its first size."""
    if is_proxy(value) and isinstance(value.value, Tensor) and value.value.dim():
        return value.tracer.create_proxy("call_method", "size", (value, 0), {})
    return len(value)


_BUILTINS = {**vars(builtins), "int": _Int, "float": _Float, "len": _length}


@contextlib.contextmanager
def numbers_written_down(tracer: OwnerTracer) -> Iterator[None]:
    """Let the twin's own functions write down what they make of sizes meanwhile, if they use these names for calls alone."""
    owner, kind = tracer.owner, type(tracer.owner)
    if not _calls_only(kind, tracer.door):
        yield
        return
    owner.__class__ = _rebuilt(kind)  # type: ignore[arg-type]
    try:
        yield
    finally:
        owner.__class__ = kind


def _calls_only(kind: type, method: str) -> bool:
    """Return whether a method of a class, and what it names, uses the three names to call them or to check a class, not as values."""
    return sys.version_info >= (3, 11) and all(map(_calls_them, codes_of(kind, method)))


@functools.lru_cache(maxsize=2_000)
def _calls_them(code: CodeType) -> bool:
    found = list(dis.get_instructions(code))
    for place, instruction in enumerate(found):
        if instruction.opname == "STORE_GLOBAL":
            return False
        if instruction.opname != "LOAD_GLOBAL" or instruction.argval not in ("int", "float", "len"):
            continue
        is_called = bool((instruction.arg or 0) & 1)
        rest = [
            each for each in found[place + 1 : place + 8] if each.opname not in ("CACHE", "EXTENDED_ARG", "PRECALL")
        ]
        checks_class = bool(rest) and rest[0].opname == "CALL" and rest[0].arg == 2
        if not is_called and not (checks_class and "isinstance" in code.co_names):
            return False
    return True


class _Space(dict[str, Any]):
    """The global names of an author's module, its functions and those of its package made again."""

    def __init__(self, names: dict[str, Any], spaces: dict[int, _Space]) -> None:
        super().__init__(__builtins__=_BUILTINS, __name__=names.get("__name__"))
        self._names, self._spaces = names, spaces
        self._made: dict[str, tuple[Any, Any]] = {}

    def __getitem__(self, name: str) -> Any:
        value = self._names[name]
        if type(value) is not FunctionType or _package(value.__globals__) != _package(self._names):
            return value
        if name not in self._made or self._made[name][0] is not value:
            self._made[name] = value, _again(value, self._spaces)
        return self._made[name][1]


def _package(names: dict[str, Any]) -> str:
    return str(names.get("__name__", "")).partition(".")[0]


def _again(function: FunctionType, spaces: dict[int, _Space]) -> FunctionType:
    """Make a function again, with the other builtins, and the functions that it calls likewise."""
    names = function.__globals__
    if id(names) not in spaces:
        spaces[id(names)] = _Space(names, spaces)
    new = FunctionType(
        function.__code__, spaces[id(names)], function.__name__, function.__defaults__, function.__closure__
    )
    new.__kwdefaults__ = function.__kwdefaults__
    new.__dict__.update(function.__dict__)
    return new


@functools.lru_cache(maxsize=200)
def _rebuilt(kind: type) -> type:
    """Make a class like an author's, whose functions see the other builtins."""
    spaces: dict[int, _Space] = {}
    own: dict[str, Any] = {}
    for base in reversed(kind.__mro__):
        if base.__module__.partition(".")[0] in ("torch", "builtins", "se_inject"):
            continue
        for name, value in vars(base).items():
            if type(value) is FunctionType and (value.__module__ or "").partition(".")[0] != "torch":
                own[name] = _again(value, spaces)
            elif isinstance(value, staticmethod | classmethod) and type(value.__func__) is FunctionType:
                own[name] = type(value)(_again(value.__func__, spaces))
            elif name in own:
                own[name] = value
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    try:
        return type(kind)(kind.__name__, (kind,), {**own, **names})
    except TypeError as error:
        raise Untraceable(f"its class can't be derived from: {error}") from error
