"""Values that flow through a forward while it is written down; each knows its node in the graph."""

from __future__ import annotations

import copy
import dataclasses
import dis
import functools
import math
import operator
import sys
from collections.abc import Callable, Iterator
from types import CodeType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from se_inject.forwards import field
from se_inject.tracing.containers import contents, form_of, holds, is_special, made
from se_inject.tracing.operations import is_constant

if TYPE_CHECKING:
    from se_inject.tracing.tracer import OwnerTracer


class Untraceable(Exception):
    """Why this forward can't be written down as a graph; it loses its own sites and nothing else."""


FOREIGN_TENSOR = (
    "uses a tensor that is neither an input nor an attribute of the module, nor made in its forward of plain numbers"
)
DATA_DECIDES = "its control flow depends on the data"
PYTHON_NUMBER = "turns a size or a tensor into a Python number"
LENGTH = "takes the length of a tensor"
_STRUCTURES = (tuple, list, dict)
_BAKED_ATTRIBUTES = frozenset({"ndim", "layout", "is_quantized", "is_sparse", "is_nested"})
_BAKED_METHODS = frozenset({"dim", "ndimension", "is_floating_point", "keys"})
_UNKNOWN = {
    **dict.fromkeys(("is_cuda", "is_cpu", "is_meta", "is_mps", "is_xpu", "get_device"), "asks for its input's device"),
    **dict.fromkeys(("requires_grad", "grad_fn", "is_leaf"), "asks whether its input needs grad"),
    "is_contiguous": "asks for its input's memory format",
}
"""What a tensor on the meta device can't tell about the ones to come."""


class ValueProxy(fx.Proxy):
    """A node of the graph and the value it had in the observed call.

    ``isinstance`` in Python code is answered for the value. Code written in C++ that asks gets the truth: it would
    take the proxy's memory for a tensor's.
    """

    tracer: OwnerTracer
    __getitem__: Callable[[Any, Any], Any]

    def __init__(self, node: fx.Node, tracer: OwnerTracer, value: Any) -> None:
        fx.Proxy.__init__(self, node, tracer)
        self.value = value

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        frame = sys._getframe(1)
        return type(self.value) if _is_isinstance(frame.f_code, frame.f_lasti) else ValueProxy

    def __repr__(self) -> str:
        return f"ValueProxy({self.node.name})"

    def __getattr__(self, name: str) -> Any:
        if name == "sqrt" and isinstance(self.value, int | float):  # as NumPy calls it
            return lambda: self.tracer.create_proxy("call_function", math.sqrt, (self,), {})
        attribute = getattr(self.value, name)  # an AttributeError is the author's own
        if name in _BAKED_ATTRIBUTES:
            return attribute
        if name in _UNKNOWN and isinstance(self.value, Tensor):
            raise Untraceable(_UNKNOWN[name])
        fields = getattr(type(self.value), "_fields", ())
        if name in fields:
            return self[fields.index(name)]
        if callable(attribute):
            if name in _BAKED_METHODS:
                return attribute
            if isinstance(self.value, dict) and name in ("items", "values", "get"):
                return getattr({key: self[key] for key in self.value}, name)
            return lambda *args, **kwargs: self.tracer.create_proxy("call_method", name, (self, *args), kwargs)
        read = field if is_special(self.value) else getattr
        return self.tracer.create_proxy("call_function", read, (self, name), {})

    def keys(self) -> Any:
        return self.value.keys()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise Untraceable("calls a value as a function")

    def __len__(self) -> int:
        if isinstance(self.value, _STRUCTURES):
            return len(self.value)
        if not isinstance(self.value, Tensor):
            raise TypeError(f"object of type '{type(self.value).__name__}' has no len()")
        if is_constant(self.node) and self.value.dim():
            return int(self.value.shape[0])
        raise Untraceable(LENGTH)

    def __iter__(self) -> Iterator[Any]:
        if isinstance(self.value, dict):
            return iter(self.value)
        if isinstance(self.value, _STRUCTURES):
            return iter([self[i] for i in range(len(self.value))])
        frame = sys._getframe(1)
        if isinstance(self.value, Tensor) and self.value.dim():
            count = self.value.shape[0]
            if is_constant(self.node):
                return iter([self[i] for i in range(count)])
            if _unpacked(frame.f_code, frame.f_lasti) == count:
                self.tracer.guard(self.size(0) == count, True)
                return iter([self[i] for i in range(count)])
        kind = "tensor" if isinstance(self.value, Tensor) else type(self.value).__name__
        raise Untraceable(f"iterates over a {kind}")

    def __bool__(self) -> bool:
        if isinstance(self.value, _STRUCTURES):
            return bool(self.value)
        if isinstance(self.value, Tensor):
            raise Untraceable(DATA_DECIDES)
        answer = bool(self.value)
        self.tracer.guard(self, answer)
        return answer

    def __contains__(self, item: Any) -> bool:
        if isinstance(self.value, dict):
            return item in self.value
        if isinstance(self.value, str) and isinstance(item, str):
            self.tracer.guard(
                self.tracer.create_proxy("call_function", operator.contains, (self, item), {}), item in self.value
            )
            return item in self.value
        raise Untraceable("asks whether a value holds another")

    def _fixed(self) -> Any:
        """Return the plain number that a number of channels is, which no input changes; the graph checks it."""
        if not _is_number_of_channels(self.node) or not bool(self == self.value):
            raise Untraceable(PYTHON_NUMBER)
        return self.value

    def __int__(self) -> int:
        return int(self._fixed())

    def __index__(self) -> int:
        return operator.index(self._fixed())

    def __float__(self) -> float:
        return float(self._fixed())

    def __format__(self, form: str) -> str:
        if not isinstance(self.value, int | float):
            return format(self.value, form)
        if not _is_number_of_channels(self.node):
            raise Untraceable("makes text of a size")
        return format(self._fixed(), form)

    def __str__(self) -> str:
        return format(self)

    def __divmod__(self, other: Any) -> Any:
        return self // other, self % other

    def __rdivmod__(self, other: Any) -> Any:
        return other // self, other % self

    def __setitem__(self, index: Any, item: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, item), {})

    def __ceil__(self) -> Any:
        return self.tracer.create_proxy("call_function", math.ceil, (self,), {})

    def __floor__(self) -> Any:
        return self.tracer.create_proxy("call_function", math.floor, (self,), {})

    def __trunc__(self) -> Any:
        return self.tracer.create_proxy("call_function", math.trunc, (self,), {})

    def __round__(self, digits: int | None = None) -> Any:
        return self.tracer.create_proxy("call_function", round, (self,) if digits is None else (self, digits), {})


def _is_number_of_channels(node: fx.Node) -> bool:
    """Return whether a number is the size of dimension 1 of some tensor, or computed from such sizes and constants alone."""
    if not isinstance(node.meta["val"], int | float):
        return False
    first = node.args[0] if node.args else None
    if node.target in (operator.getitem, "size") and isinstance(first, fx.Node):
        sizes, rank = first.meta["val"], len(getattr(first.meta["val"], "shape", first.meta["val"]))
        is_size = isinstance(sizes, Tensor if node.target == "size" else torch.Size)
        return is_size and rank > 1 and isinstance(node.args[1], int) and node.args[1] % rank == 1
    return bool(node.all_input_nodes) and all(map(_is_number_of_channels, node.all_input_nodes))


def _inplace(name: str) -> Callable[[ValueProxy, Any], Any]:
    target = getattr(operator, name)

    def method(self: ValueProxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", target, (self, other), {})

    return method


for _name in ("iadd", "isub", "imul", "itruediv"):
    setattr(ValueProxy, f"__{_name}__", _inplace(_name))


@functools.lru_cache(maxsize=10_000)
def _is_isinstance(code: CodeType, position: int) -> bool:
    """Return whether the instruction at this position is Python's own check of a class: ``isinstance(…, …)``, or ``match``.

    Goes back from the call over what its two arguments push on the stack, to the instruction that loaded the function.
    """
    done = []
    for instruction in dis.get_instructions(code):
        done.append(instruction)
        if instruction.offset == position:
            break
    call = done.pop()
    if call.opname == "MATCH_CLASS":
        return True
    if not call.opname.startswith(("CALL", "PRECALL")) or call.arg != 2:
        return False
    if done and done[-1].opname == "PRECALL":  # Python 3.11 has a call in two
        done.pop()
    missing = 2
    while missing > 0 and done:
        before = done.pop()
        missing -= dis.stack_effect(before.opcode, before.arg, jump=False)
    return bool(done) and done[-1].opname in ("LOAD_GLOBAL", "LOAD_NAME") and done[-1].argval == "isinstance"


@functools.lru_cache(maxsize=10_000)
def _unpacked(code: CodeType, position: int) -> int | None:
    """Return how many values the instruction at this position takes, if it is ``a, b, c = …``."""
    for instruction in dis.get_instructions(code):
        if instruction.offset == position:
            return instruction.arg if instruction.opname == "UNPACK_SEQUENCE" else None
    return None


def is_proxy(value: Any) -> bool:
    """Return whether a value is a proxy itself."""
    return type(value) is ValueProxy


def values_of(argument: Any) -> Any:
    """Replace every proxy in the arguments by its value."""
    if type(argument) is ValueProxy:
        return argument.value
    if is_special(argument) and holds(argument, is_proxy):
        form = form_of(argument)
        if form is not None:
            return made(type(argument), form, {key: values_of(item) for key, item in contents(argument).items()})
    if isinstance(argument, tuple):
        items = [values_of(item) for item in argument]
        if type(argument) is tuple:
            return tuple(items)
        return type(argument)(*items) if hasattr(argument, "_fields") else tuple.__new__(type(argument), items)
    if isinstance(argument, list):
        if type(argument) is list:
            return [values_of(item) for item in argument]
        twin = copy.copy(argument)
        list.__setitem__(twin, slice(None), [values_of(item) for item in argument])
        return twin
    if isinstance(argument, dict):
        if type(argument) is dict:
            return {key: values_of(item) for key, item in argument.items()}
        copied = copy.copy(argument)
        for key in dict.keys(argument):
            dict.__setitem__(copied, key, values_of(dict.__getitem__(argument, key)))
        return copied
    if dataclasses.is_dataclass(argument) and not isinstance(argument, type):
        result: Any = copy.copy(argument)
        for item in dataclasses.fields(argument):
            object.__setattr__(result, item.name, values_of(getattr(argument, item.name)))
        return result
    if isinstance(argument, slice):
        return slice(values_of(argument.start), values_of(argument.stop), values_of(argument.step))
    return argument


def holds_tensor(argument: Any) -> bool:
    """Return whether a tensor is in this argument, at any depth of tuples, lists and dicts."""
    if isinstance(argument, Tensor):
        return True
    if isinstance(argument, dict):
        return any(holds_tensor(item) for item in argument.values())
    return isinstance(argument, tuple | list) and any(holds_tensor(item) for item in argument)


def is_numbers(value: Any) -> bool:
    """Return whether a value is a plain number, or a tuple or list of some."""
    if isinstance(value, tuple | list):
        return bool(value) and all(map(is_numbers, value))
    return isinstance(value, int | float) and not isinstance(value, bool)


def holds_proxy(argument: Any) -> bool:
    """Return whether an argument is a proxy, or a tuple or list with one in it."""
    return type(argument) is ValueProxy or (
        isinstance(argument, tuple | list) and any(type(item) is ValueProxy for item in argument)
    )


def contents_of(argument: Any) -> Any:
    """Record the contents of plain containers, at any depth, by identity: equal before and after a call that changes none of them."""
    if isinstance(argument, dict):
        return [(key, contents_of(value)) for key, value in dict.items(argument)]
    if isinstance(argument, list | tuple):
        return [contents_of(value) for value in argument]
    return frozenset(argument) if isinstance(argument, set) else id(argument)
