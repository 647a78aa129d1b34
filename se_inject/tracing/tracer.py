"""Write down one module's own ``forward`` as an fx graph, children as leaves, while it really runs.

The values that flow are concrete (tensors on the meta device, as a rule), and every one of them is wrapped in
a proxy that also knows its node. So what a bare proxy can't answer, the value does: ``len``, iteration,
``isinstance``, a shape in an ``if``. An answer that depends on a size is kept as a guard: the edited forward
checks it instead of assuming it.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
import operator
import random
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.proxy import Scope, TracerBase

from se_inject.forwards import Form

if TYPE_CHECKING:
    from se_inject.tracing.observer import Observer


class Untraceable(Exception):
    """Why this forward can't be written down as a graph; it loses its own sites and nothing else."""


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
    """A node of the graph and the value it had in the observed call."""

    tracer: OwnerTracer
    __getitem__: Callable[[Any, Any], Any]

    def __init__(self, node: fx.Node, tracer: OwnerTracer, value: Any) -> None:
        super().__init__(node, tracer)
        self.value = value

    def __repr__(self) -> str:
        return f"ValueProxy({self.node.name})"

    def __getattr__(self, name: str) -> Any:
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
        return self.tracer.create_proxy("call_function", getattr, (self, name), {})

    def keys(self) -> Any:
        return self.value.keys()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise Untraceable("calls a value as a function")

    def __len__(self) -> int:
        if isinstance(self.value, _STRUCTURES):
            return len(self.value)
        raise Untraceable("takes the length of a tensor")

    def __iter__(self) -> Iterator[Any]:
        if isinstance(self.value, dict):
            return iter(self.value)
        if isinstance(self.value, _STRUCTURES):
            return iter([self[i] for i in range(len(self.value))])
        raise Untraceable("iterates over a tensor")

    def __bool__(self) -> bool:
        if isinstance(self.value, _STRUCTURES):
            return bool(self.value)
        if isinstance(self.value, Tensor):
            raise Untraceable("its control flow depends on the data")
        answer = bool(self.value)
        self.tracer.guard(self, answer)
        return answer

    def __contains__(self, item: Any) -> bool:
        if isinstance(self.value, dict):
            return item in self.value
        raise Untraceable("asks whether a value holds another")

    def __int__(self) -> int:
        raise Untraceable("turns a size or a tensor into a Python number")

    __index__ = __float__ = __int__  # type: ignore[method-assign]

    def __setitem__(self, index: Any, item: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, item), {})

    def __ceil__(self) -> Any:
        return self.tracer.create_proxy("call_function", math.ceil, (self,), {})

    def __floor__(self) -> Any:
        return self.tracer.create_proxy("call_function", math.floor, (self,), {})

    def __round__(self, digits: int | None = None) -> Any:
        return self.tracer.create_proxy("call_function", round, (self,) if digits is None else (self, digits), {})


def _inplace(name: str) -> Callable[[ValueProxy, Any], Any]:
    target = getattr(operator, name)

    def method(self: ValueProxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", target, (self, other), {})

    return method


for _name in ("iadd", "isub", "imul", "itruediv"):
    setattr(ValueProxy, f"__{_name}__", _inplace(_name))


def values_of(argument: Any) -> Any:
    """The same arguments with every proxy replaced by its value."""
    if type(argument) is ValueProxy:
        return argument.value
    if isinstance(argument, tuple):
        items = [values_of(item) for item in argument]
        return type(argument)(*items) if hasattr(argument, "_fields") else type(argument)(items)
    if isinstance(argument, list):
        return [values_of(item) for item in argument]
    if isinstance(argument, dict):
        return type(argument)((key, values_of(item)) for key, item in argument.items())
    if dataclasses.is_dataclass(argument) and not isinstance(argument, type):
        twin = copy.copy(argument)
        for item in dataclasses.fields(argument):
            object.__setattr__(twin, item.name, values_of(getattr(argument, item.name)))
        return twin
    if isinstance(argument, slice):
        return slice(values_of(argument.start), values_of(argument.stop), values_of(argument.step))
    return argument


def holds_tensor(argument: Any) -> bool:
    """Whether a tensor is in this argument, at any depth of tuples, lists and dicts."""
    if isinstance(argument, Tensor):
        return True
    if isinstance(argument, dict):
        return any(holds_tensor(item) for item in argument.values())
    return isinstance(argument, tuple | list) and any(holds_tensor(item) for item in argument)


def _is_numbers(value: Any) -> bool:
    """Whether a value is a plain number, or a tuple or list of some."""
    if isinstance(value, tuple | list):
        return bool(value) and all(map(_is_numbers, value))
    return isinstance(value, int | float) and not isinstance(value, bool)


def _holds_proxy(argument: Any) -> bool:
    return type(argument) is ValueProxy or (
        isinstance(argument, tuple | list) and any(type(item) is ValueProxy for item in argument)
    )


def _concatenated(*args: Any, **kwargs: Any) -> Any:
    """What ``torch.cat`` gives on the meta device, where torch takes long to find out for plain cases too."""
    tensors: Any
    tensors, dim = args if len(args) == 2 and not kwargs else ([], 0)
    kinds = {(type(each), each.dtype, *each.shape[:1], *each.shape[2:]) for each in tensors if isinstance(each, Tensor)}
    if dim != 1 or len(kinds) != 1 or any(not isinstance(each, Tensor) or each.dim() < 2 for each in tensors):
        return torch.cat(*args, **kwargs)
    first = tensors[0]
    return first.new_empty((first.shape[0], sum(each.shape[1] for each in tensors), *first.shape[2:]))


def snapshot(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """A module's attributes, and copies of the plain lists, dicts and sets among them; hooks are in dicts too."""
    attributes = dict(module.__dict__)
    contents = {key: value.copy() if value else () for key, value in attributes.items() if type(value) in _PLAIN}
    return attributes, contents


_PLAIN = frozenset([dict, OrderedDict, list, set])  # others may run code of their own when they are copied


def restore(module: nn.Module, state: tuple[dict[str, Any], dict[str, Any]]) -> list[str]:
    """Put back what ``snapshot`` saved, and return the names of the attributes that had changed."""
    attributes, contents = state
    now = module.__dict__
    changed = [key for key, value in now.items() if key not in attributes or attributes[key] is not value]
    if changed or len(now) != len(attributes):
        now.clear()
        now.update(attributes)
    for key, content in contents.items():
        value = attributes[key]
        if len(value) != len(content) or (content and not _same_items(value, content)):
            changed.append(key)
            value.clear()
            value.extend(content) if isinstance(value, list) else value.update(content)
    return changed


def _same_items(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return all(other.get(key, other) is value for key, value in one.items())
    if isinstance(one, list):
        return all(a is b for a, b in zip(one, other, strict=True))
    return bool(one == other)


class _WatchedChildren(dict[str, Any]):
    """A module's children, which notices if somebody goes through all of them."""

    iterated = False

    def _all(self, name: str) -> Any:
        self.iterated = True
        return getattr(super(), name)()

    def __iter__(self) -> Any:
        return self._all("__iter__")

    def keys(self) -> Any:
        return self._all("keys")

    def values(self) -> Any:
        return self._all("values")

    def items(self) -> Any:
        return self._all("items")


class OwnerTracer(TracerBase):
    """The tracer of one owner. It creates nodes, and the values that belong to them.

    Args:
        observer: what runs the children and keeps count.
        owner: the module whose forward is traced.
        path: its path in the model.
        training: what the owner's ``training`` flag reads as.
        replay: recorded outputs of the children, by path, to be used instead of calling them again.
    """

    def __init__(
        self,
        observer: Observer,
        owner: nn.Module,
        path: str,
        *,
        training: bool = False,
        replay: dict[str, list[Any]] | None = None,
    ) -> None:
        super().__init__()
        self.observer = observer
        self.owner = owner
        self.path = path
        self.training = training
        self.reads_training = False
        self.iterates = False
        self.replay = replay
        self.graph = fx.Graph()
        self.scope = Scope("", None)
        self.module_stack = OrderedDict()
        self.node_name_to_scope = {}
        self.guards: list[tuple[fx.Node, bool]] = []
        self.constants: dict[str, Any] = {}
        self.settings: dict[str, Any] = {}
        """The owner's plain attributes, out of its ``__dict__`` while it runs, so that reads are noticed."""
        self.settings_read: dict[str, Any] = {}
        self._attributes: dict[str, ValueProxy] = {}
        self._modes = _modes()

    def trace(
        self,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        symbolic: frozenset[int | str] = frozenset(),
    ) -> Any:
        """Run ``forward`` on proxies of the given values and return its result as values.

        Args:
            forward: the owner's own.
            args: the values of its call.
            kwargs: the same by keyword.
            symbolic: positions and keywords of the plain numbers that the caller computed from its own inputs.
        """
        try:
            bound = inspect.signature(forward).bind(self.owner, *args, **kwargs)
        except (TypeError, ValueError) as error:
            raise Untraceable(f"its arguments can't be told apart: {error}") from error
        given = set(bound.arguments)
        bound.apply_defaults()
        inputs: list[Any] = []
        keywords: dict[str, Any] = {}
        for position, (name, value) in enumerate(bound.arguments.items()):
            kind = bound.signature.parameters[name].kind
            if position == 0:
                continue
            if kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
                items = value.values() if isinstance(value, dict) else value
                if not any(map(holds_tensor, items)):
                    self.constants[name] = value
                    inputs += value if isinstance(value, tuple) else ()
                    keywords |= value if isinstance(value, dict) else {}
                    self._placeholder(("**" if isinstance(value, dict) else "*") + name, value)
                    continue
                if not all(map(holds_tensor, items)):
                    raise Untraceable(f"takes tensors and plain values together by `*{name}`")
                self.constants[name] = Form(tuple(value) if isinstance(value, dict) else len(value))
            if kind is inspect.Parameter.VAR_POSITIONAL:
                proxy = self._placeholder("*" + name, value)
                inputs += [proxy[i] for i in range(len(value))]
            elif kind is inspect.Parameter.VAR_KEYWORD:
                proxy = self._placeholder("**" + name, value)
                keywords |= {key: proxy[key] for key in value}
            else:
                if holds_tensor(value) or (_is_numbers(value) and symbolic & {position - 1, name}):
                    argument = self._placeholder(name, value)
                else:
                    self.constants[name] = argument = value
                    if name in given:
                        self._placeholder(name, value)
                if kind is inspect.Parameter.KEYWORD_ONLY:
                    keywords[name] = argument
                else:
                    inputs.append(argument)
        before = snapshot(self.owner)
        for key, value in before[0].items():
            if type(value) in (bool, int, float, str) and not key.startswith("_") and key != "training":
                if hasattr(type(self.owner), key):  # reads would find the class's
                    self.settings_read[key] = value
                else:
                    self.settings[key] = self.owner.__dict__.pop(key)
        children = self.owner.__dict__["_modules"] = _WatchedChildren(before[0]["_modules"])
        try:
            result = forward(self.owner, *inputs, **keywords)
            self.create_node("output", "output", (self.create_arg(result),), {})
        finally:
            self.iterates = children.iterated
            if dict(children) == before[0]["_modules"]:
                self.owner.__dict__["_modules"] = before[0]["_modules"]
            self.owner.__dict__.update(
                {key: value for key, value in self.settings.items() if key not in self.owner.__dict__}
            )
            stored = restore(self.owner, before)
        if stored:
            raise Untraceable(f"its forward stores into `self.{stored[0]}`")
        return values_of(result)

    def _placeholder(self, name: str, value: Any) -> Any:
        node = self.create_node("placeholder", name, (), {})
        return self._wrap(node, value)

    def _wrap(self, node: fx.Node, value: Any) -> ValueProxy:
        node.meta["val"] = value
        node.meta["time"] = self.observer.tick()
        return ValueProxy(node, self, value)

    def create_proxy(  # type: ignore[override]
        self, kind: str, target: Any, args: Any, kwargs: Any, name: str | None = None, *_: Any, **__: Any
    ) -> Any:
        if _modes() != self._modes:
            raise Untraceable("part of it runs under another grad or autocast mode")
        node = self.create_node(kind, target, self.create_arg(args), self.create_arg(kwargs), name)  # type: ignore[arg-type]
        real_args, real_kwargs = values_of(args), values_of(kwargs)
        tracer, self.observer.tracer = self.observer.tracer, None
        drawing = self.training and self.observer.result.how != "meta"
        state = random_state() if drawing else None
        try:
            if kind == "call_method":
                value = getattr(real_args[0], target)(*real_args[1:], **real_kwargs)
            elif target is F.batch_norm and self.observer.result.how == "meta":
                value = torch.empty_like(real_args[0])  # as `Observer._known_result` has it
            elif target is torch.cat and self.observer.result.how == "meta":
                value = _concatenated(*real_args, **real_kwargs)
            else:
                value = target(*real_args, **real_kwargs)
        finally:
            self.observer.tracer = tracer
            if drawing:
                set_random_state(state)  # what a node draws, it draws in the graph as well
        self.observer.count_function(node, value, real_args, real_kwargs)
        return self._wrap(node, value)

    def call_module(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Record the call of a child and run it on the values."""
        path = self.observer.relative_path(module, self.path)
        if path is None:
            raise Untraceable(f"calls a {type(module).__name__} that is not one of its submodules")
        if _modes() != self._modes:
            raise Untraceable(f"calls `{path}` under another grad or autocast mode")
        node = self.create_node("call_module", path, self.create_arg(args), self.create_arg(kwargs))  # type: ignore[arg-type]
        before = self.observer.counts()
        outputs = (self.replay or {}).get(path)
        if outputs:
            value = outputs.pop(0)
        else:
            given: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
            computed = frozenset(key for key, argument in given.items() if _holds_proxy(argument))
            value = self.observer.run(module, values_of(args), values_of(kwargs), computed)
        node.meta["counts"] = self.observer.counts_since(before)
        node.meta["path"] = self.observer.result.paths[id(module)]
        return self._wrap(node, value)

    def attribute(self, module: nn.Module, name: str, value: Tensor) -> Any:
        """A parameter or buffer that the forward reads, as a ``get_attr`` node."""
        prefix = self.observer.relative_path(module, self.path)
        if prefix is None:
            raise Untraceable(f"reads `{name}` of a module that is not one of its submodules")
        target = f"{prefix}.{name}" if prefix else name
        if target not in self._attributes:
            self._attributes[target] = self._wrap(self.create_node("get_attr", target, (), {}), value)
        return self._attributes[target]

    def create_arg(self, a: Any) -> Any:
        if type(a) is ValueProxy:
            return a.node
        if isinstance(a, Tensor):
            for name, value in self.owner.__dict__.items():
                if value is a:
                    return self.attribute(self.owner, name, a).node
            raise Untraceable("uses a tensor that is neither an input nor an attribute of the module")
        try:
            return super().create_arg(a)
        except NotImplementedError as error:
            raise Untraceable(f"passes a {type(a).__name__} on, which a graph can't hold") from error

    def guard(self, proxy: ValueProxy, answer: bool) -> None:
        """Remember that the graph holds only while this condition has this answer."""
        pending, seen = [proxy.node], set()
        while pending:
            node = pending.pop()
            if node.target is getattr and node.args[1] == "device":
                raise Untraceable("asks for its input's device")
            pending += [source for source in node.all_input_nodes if source not in seen]
            seen.update(node.all_input_nodes)
        self.guards.append((proxy.node, answer))


def _modes() -> tuple[bool, bool, bool]:
    return _grad_enabled(), torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")


_grad_enabled = torch.is_grad_enabled


def random_state() -> Any:
    """The state of every random generator that a forward may use on the CPU."""
    numpy = sys.modules.get("numpy")
    drawn = numpy.random.get_state() if numpy is not None else None
    told = None if drawn is None else (drawn[0], drawn[1].tolist(), *drawn[2:])
    return torch.get_rng_state().tolist(), random.getstate(), told


def set_random_state(state: Any) -> None:
    """Put the generators back."""
    torch.set_rng_state(torch.tensor(state[0], dtype=torch.uint8, device="cpu"))
    random.setstate(state[1])
    if state[2] is not None:
        sys.modules["numpy"].random.set_state(state[2])
