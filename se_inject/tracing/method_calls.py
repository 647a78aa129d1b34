"""Calls of a module's own public methods within its forward: which nodes they compute, from what, and what they return."""

from __future__ import annotations

import functools
import inspect
import types
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import fx, nn

from se_inject.tracing.containers import contents, form_of, holds, is_special
from se_inject.tracing.operations import is_leaf
from se_inject.tracing.proxy import is_proxy
from se_inject.tracing.settings import names_in, pairs_in

if TYPE_CHECKING:
    from se_inject.tracing.tracer import OwnerTracer


@dataclass(eq=False)
class MethodCall:
    """One call of a public method within the forward of its module. ``node.meta["method"]`` is the one that made a node.

    Attributes:
        name: of the method.
        outer: the call of another method within which this one is.
        given: the arguments that the caller passed, nodes for what is computed.
        arguments: all arguments by parameter, defaults too; those without nodes are constants.
        start: the last node before the call.
        end: the last node of it.
        result: what it returned, nodes for what is computed.
        closed: why a call of the method by itself can't be told from this one; empty if it can.
    """

    name: str
    outer: MethodCall | None
    given: inspect.BoundArguments
    arguments: dict[str, Any]
    start: fx.Node
    end: fx.Node
    result: Any = None
    closed: str = "it does not return"


class Packed:
    """A container of an author's class with nodes in it, as the call of its class that makes one like it.

    Args:
        kind: the class.
        args: of the call, nodes for what is computed.
        kwargs: by keyword.
    """

    def __init__(self, kind: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.kind = kind
        self.args = args
        self.kwargs = kwargs


_OURS = "_se_inject_reports"
"""Marks the methods that are bound here."""


class _Opaque(Exception):
    """A container of an author's class that holds computed values and can't be made from its contents alone."""


@functools.lru_cache(maxsize=2_000)
def _methods(kind: type, door: str) -> dict[str, types.FunctionType]:
    """Return the public methods that a method of a class, or one that it calls, names."""
    found = {name: _public_method(kind, name) for name in sorted(names_in(kind, door)) if name != door}
    return {name: method for name, method in found.items() if method is not None}


def _public_method(kind: Any, name: str) -> types.FunctionType | None:
    """Return the method of this name that an author wrote for others to call; None if there is none."""
    method = inspect.getattr_static(kind, name, None)
    if name.startswith("_") or hasattr(nn.Module, name) or not isinstance(method, types.FunctionType):
        return None
    is_plain = not (inspect.isgeneratorfunction(method) or inspect.iscoroutinefunction(method))
    return method if is_plain else None


def reported_doors(tracer: OwnerTracer) -> list[tuple[nn.Module, str, Any]]:
    """Return methods for the owner's children that, where the owner calls them, count as calls of the child.

    ``self.backbone.encode(x)`` instead of ``self.backbone(x)``: the child, the name, and a bound method for the child.
    """
    kind: Any = type(tracer.owner)
    found = []
    for attribute, names in pairs_in(kind, tracer.door).items():
        child = tracer.owner._modules.get(attribute)
        if child is None or is_leaf(child) or isinstance(child, nn.Sequential):
            continue
        for name in sorted(names - vars(child).keys()):
            method = _public_method(type(child), name)
            if method is not None and any(isinstance(part, nn.modules.conv._ConvNd) for part in child.modules()):
                found.append((child, name, _door(tracer, child, name, method)))
    return found


def _door(tracer: OwnerTracer, child: nn.Module, name: str, function: types.FunctionType) -> Any:
    @functools.wraps(function)
    def method(self: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        if tracer.observer.tracer is not tracer or not holds((args, kwargs), is_proxy):
            return function(self, *args, **kwargs)
        if tracer.observer.may_enter(child, name):
            return tracer.call_module(child, args, kwargs, name)
        before = tracer.within
        tracer.within = f"{tracer.observer.result.watch.paths[id(child)]}.{name}"
        try:
            return function(self, *args, **kwargs)
        finally:
            tracer.within = before

    setattr(method, _OURS, True)
    return types.MethodType(method, child)


def reported_methods(tracer: OwnerTracer) -> dict[str, Any]:
    """Return, by name, bound methods for the owner that report their calls to its tracer."""
    owner = tracer.owner
    kind: Any = type(owner)
    methods = _methods(kind, tracer.door)
    bound = vars(owner)
    free = [name for name in methods if name not in bound or hasattr(bound[name], _OURS)]
    return {name: _reported(tracer, name, methods[name]) for name in free}


def _reported(tracer: OwnerTracer, name: str, function: types.FunctionType) -> Any:
    @functools.wraps(function)
    def method(self: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        if tracer.observer.tracer is not tracer:  # a child calls it
            return function(self, *args, **kwargs)
        call = _entered(tracer, name, function, args, kwargs)
        if call is None:
            return function(self, *args, **kwargs)
        before = _identities(call.arguments)
        tracer.method = call
        try:
            result = function(self, *args, **kwargs)
            call.closed = _left(tracer, call, result)
        finally:
            tracer.method = call.outer
        if not call.closed and not _are(before, call, tracer.owner, args, kwargs):
            call.closed = "it changes its arguments in place"
        return result

    return types.MethodType(method, tracer.owner)


def _are(before: Any, call: MethodCall, owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    try:
        return bool(_identities(_arguments(call.given.signature, owner, args, kwargs)) == before)
    except _Opaque:
        return False


def _entered(
    tracer: OwnerTracer, name: str, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> MethodCall | None:
    start = tracer.last_node
    if start is None:
        return None
    try:
        signature = inspect.signature(function)
        given = signature.bind(tracer.owner, *(map(outline, args)), **{key: outline(kwargs[key]) for key in kwargs})
        arguments = _arguments(signature, tracer.owner, args, kwargs)
    except (_Opaque, TypeError, ValueError):
        return None
    return MethodCall(name, tracer.method, given, arguments, start, start)


def _arguments(
    signature: inspect.Signature, owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    bound = signature.bind(owner, *args, **kwargs)
    bound.apply_defaults()
    return {name: outline(value) for name, value in list(bound.arguments.items())[1:]}


def _left(tracer: OwnerTracer, call: MethodCall, result: Any) -> str:
    """Write down what a call returned, and say why that can't be told, if it can't."""
    call.end = tracer.last_node or call.start
    try:
        call.result = outline(result)
    except _Opaque as error:
        return f"it returns a {error}, which can't be made from its contents alone"
    return ""


def outline(value: Any) -> Any:
    """Return a value with its node for each proxy, containers copied.

    Raises:
        _Opaque: a container of an author's class holds a proxy and can't be made anew.
    """
    if is_proxy(value):
        return value.node
    if type(value) in (list, tuple):
        return type(value)(map(outline, value))
    if type(value) is dict:
        return {key: outline(item) for key, item in value.items()}
    if not (is_special(value) and holds(value, is_proxy)):
        return value
    form = form_of(value)
    if form is None:
        raise _Opaque(type(value).__name__)
    return Packed(type(value), *form({key: outline(item) for key, item in contents(value).items()}))


def _identities(value: Any) -> Any:
    if type(value) in (list, tuple):
        return [_identities(item) for item in value]
    if type(value) is dict:
        return [(key, _identities(item)) for key, item in value.items()]
    if isinstance(value, Packed):
        return _identities((value.args, value.kwargs))
    return id(value)
