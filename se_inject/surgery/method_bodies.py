"""Divide an edited graph into parts: each public method that computes a gated value gets a body of its own, which the forward calls.

While a graph is edited, two nodes stand for every call of a method: one for its arguments, one for what it returns. So
blocks that are put between a value and its readers are put between it and them as well.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

from torch import fx
from torch.fx.node import map_arg

from se_inject.errors import SurgeryError
from se_inject.forwards import Form, OwnMethod, encoded, field, lines_of
from se_inject.tracing import MethodCall, Packed

FORWARD = "forward"
_Path = tuple[Any, ...]


class Inlined(Exception):
    """A method can't be a body of its own: what it computes stays in the body that calls it.

    Args:
        name: of the method.
        reason: in words.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(reason)
        self.name = name
        self.reason = reason


class Body(NamedTuple):
    """The graph of a forward or method, and those of its arguments that were constants."""

    graph: fx.Graph
    constants: Mapping[str, Any]


def _given(arguments: Any, args: Any, kwargs: Any) -> None:
    """Stand in a graph for the arguments of a call."""


def _returned(result: Any) -> None:
    """Stand in a graph for what a call returned."""


def mark_calls(graph: fx.Graph, copies: Mapping[fx.Node, fx.Node]) -> None:
    """Put nodes that stand for the calls of methods into the copy of an observed graph.

    Args:
        graph: the copy.
        copies: node of the observed graph → node of the copy.
    """
    calls = list(dict.fromkeys(call for node in graph.nodes for call in calls_around(node)))
    calls = [call for call in calls if not call.closed and call.start in copies and call.end in copies]

    def mark(stands: Any, call: MethodCall, after: fx.Node, *args: Any) -> None:
        with graph.inserting_after(copies[after]):
            node = graph.call_function(stands, ())
        node.meta["call"] = call
        with graph.inserting_before(node):
            unpack = _Unpacking(graph, copies, call if stands is _returned else call.outer)
            node.args = unpack(args)

    for call in sorted(calls, key=lambda call: -len(_outwards(call))):  # the last one put in comes first
        given = {name: value for name, value in call.arguments.items() if _nodes_in(value)}
        mark(_given, call, call.start, given, call.given.args[1:], call.given.kwargs)
    for call in sorted(calls, key=lambda call: len(_outwards(call))):
        mark(_returned, call, call.end, call.result)


class _Unpacking:
    """Copies nested containers of observed nodes, with a node for each that is of an author's class."""

    def __init__(self, graph: fx.Graph, copies: Mapping[fx.Node, fx.Node], method: MethodCall | None) -> None:
        self.graph = graph
        self.copies = copies
        self.method = method
        self.made: dict[Packed, fx.Node] = {}

    def __call__(self, value: Any) -> Any:
        if isinstance(value, fx.Node):
            return self.copies[value]
        if isinstance(value, list | tuple):
            return type(value)(map(self, value))
        if isinstance(value, dict):
            return {key: self(item) for key, item in value.items()}
        if isinstance(value, Packed):
            if value not in self.made:
                node = self.made[value] = self.graph.call_function(value.kind, self(value.args), self(value.kwargs))
                node.meta |= {"packed": True, "method": self.method}
            return self.made[value]
        return value


def bodies_of(graph: fx.Graph, blocks: Collection[str], inlined: Collection[str]) -> dict[str, Body]:
    """Take an edited graph apart: the forward, and each method in which a block is called, by name.

    Args:
        graph: with marked calls; changed.
        blocks: the names of the blocks in it.
        inlined: names of methods that stay in what calls them.

    Raises:
        Inlined: another method has to stay as well.
    """
    gates = [node for node in graph.nodes if node.op == "call_module" and node.target in blocks]
    names = {call.name for node in gates for call in calls_around(node)} - set(inlined)
    marks: dict[MethodCall, list[fx.Node]] = {}
    for node in list(graph.nodes):
        call = node.meta.get("call")
        if call is not None and call.name in names:
            marks.setdefault(call, []).append(node)
        elif call is not None:
            _erase(graph, node)
    found: dict[str, list[Body]] = {}
    calls = dict.fromkeys(call for node in graph.nodes for call in calls_around(node) if call.name in names)
    for call in sorted(calls, key=lambda call: -len(_outwards(call))):
        if call not in marks or call.name in [outer.name for outer in _outwards(call)[1:]]:
            raise Inlined(call.name, call.closed or "it calls itself")
        found.setdefault(call.name, []).append(_Cut(graph, call, names, *marks[call]).body())
    for name, several in found.items():
        if any(_canonical(each) != _canonical(several[0]) for each in several):
            raise Inlined(name, f"its {len(several)} calls do not compute the same with the same blocks")
    return {FORWARD: Body(graph, {}), **{name: several[0] for name, several in found.items()}}


class _Cut:
    """One call of a method: its nodes become a graph of their own, and a call of the method takes their place."""

    def __init__(
        self, graph: fx.Graph, call: MethodCall, names: Collection[str], given: fx.Node, returned: fx.Node
    ) -> None:
        self.graph = graph
        self.call = call
        self.marks = (given, returned)
        self.inside = [node for node in graph.nodes if node.op != "get_attr" and _innermost(node, names) is call]
        self.new = fx.Graph()
        self.copies: dict[fx.Node, fx.Node] = {}
        self.arguments: dict[fx.Node, tuple[fx.Node, _Path]] = {}

    def body(self) -> Body:
        """Cut the call out."""
        given, returned = self.marks
        constants = self._constants(given.args[0])
        for name, value in given.args[0].items():  # type: ignore[union-attr]
            parameter = self.new.create_node("placeholder", name, name=name)
            for node, path in _places(value):
                if node in self.arguments:
                    raise Inlined(self.call.name, "it is given one value twice")
                self.arguments[node] = (parameter, path)
        for node in self.inside:
            self.copies[node] = self.new.node_copy(node, self._copy_of)
        self.new.output(map_arg(returned.args[0], self._copy_of))
        self._replace()
        return Body(self.new, constants)

    def _constants(self, given: Any) -> dict[str, Any]:
        constants = {name: value for name, value in self.call.arguments.items() if name not in given}
        for name, value in given.items():
            if not isinstance(value, fx.Node):
                items = list(value.values() if isinstance(value, dict) else value)
                if not all(isinstance(item, fx.Node) for item in items):
                    raise Inlined(self.call.name, f"its argument `{name}` holds other values than tensors")
                constants[name] = Form(tuple(value) if isinstance(value, dict) else len(value))
        for name, value in constants.items():
            try:
                encoded(value)
            except SurgeryError:
                raise Inlined(self.call.name, f"its argument `{name}` is a {type(value).__name__}") from None
        return constants

    def _copy_of(self, node: fx.Node) -> fx.Node:
        """Return the node of the method's own graph for one that is read in it."""
        if node not in self.copies:
            if node in self.arguments:
                parameter, path = self.arguments[node]
                self.copies[node] = _read(self.new, parameter, path)
            elif node.op == "get_attr":
                self.copies[node] = self.new.node_copy(node)
            else:
                raise Inlined(self.call.name, f"it uses the value `{node.name}`, which it is not given")
        return self.copies[node]

    def _replace(self) -> None:
        given, returned = self.marks
        _, args, kwargs = given.args
        within = {*self.inside, returned}
        places = dict(reversed(list(_places(returned.args[0]))))
        with self.graph.inserting_before(returned):
            call = self.graph.create_node("call_function", OwnMethod(self.call.name), args, kwargs, self.call.name)  # type: ignore[arg-type]
            call.meta["method"] = self.call.outer
            for node in self.inside:
                readers = [reader for reader in node.users if reader not in within]
                if readers and node not in places:
                    raise Inlined(self.call.name, f"its value `{node.name}` is read behind it, and not returned")
                result = _read(self.graph, call, places[node], method=self.call.outer) if readers else call
                for reader in readers:
                    reader.replace_input_with(node, result)
        _erase(self.graph, returned)
        for node in reversed(self.inside):
            if not node.meta.get("packed"):
                self.graph.erase_node(node)
        _erase(self.graph, given)


def _erase(graph: fx.Graph, node: fx.Node) -> None:
    """Erase a node that stands for a call, and the containers that were made for it alone."""
    held = node.all_input_nodes
    graph.erase_node(node)
    for each in held:
        if each.meta.get("packed") and not each.users:
            _erase(graph, each)


def _read(graph: fx.Graph, node: fx.Node, path: _Path, method: MethodCall | None = None) -> fx.Node:
    for read, key in path:
        node = graph.call_function(read, (node, key))
        node.meta["method"] = method
    return node


def calls_around(node: fx.Node) -> list[MethodCall]:
    """Return the calls of methods within which a node is, from the innermost."""
    return _outwards(node.meta.get("method"))


def _outwards(call: MethodCall | None) -> list[MethodCall]:
    found = []
    while call is not None:
        found.append(call)
        call = call.outer
    return found


def _innermost(node: fx.Node, names: Collection[str]) -> MethodCall | None:
    return next((call for call in calls_around(node) if call.name in names), None)


def _places(value: Any) -> Iterator[tuple[fx.Node, _Path]]:
    """Yield every node in nested containers, those of author's classes too, and how it is read from there."""
    held: Any = value
    read: Any = operator.getitem
    if isinstance(value, fx.Node):
        yield value, ()
        if not value.meta.get("packed"):
            return
        one = len(value.args) == 1 and isinstance(value.args[0], list | dict)
        held = value.kwargs or (value.args[0] if one else value.args)
        kind: Any = value.target
        read = operator.getitem if issubclass(kind, dict | list | tuple) else field
    if isinstance(held, list | tuple | dict):
        for key, item in held.items() if isinstance(held, dict) else enumerate(held):
            for node, path in _places(item):
                yield node, ((read, key), *path)


def _nodes_in(value: Any) -> bool:
    """Return whether an observed value holds nodes."""
    if isinstance(value, list | tuple | dict):
        return any(map(_nodes_in, value.values() if isinstance(value, dict) else value))
    return isinstance(value, fx.Node | Packed)


def _canonical(body: Body) -> Any:
    """Return what a body does, whatever its values are called."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for number, node in enumerate(body.graph.nodes):
        args, kwargs = map_arg((node.args, node.kwargs), copies.__getitem__)
        name = node.name if node.op == "placeholder" else f"value_{number}"
        copies[node] = graph.create_node(node.op, node.target, args, kwargs, name)
        copies[node].meta = dict(node.meta)
    return lines_of(graph), {name: encoded(value) for name, value in body.constants.items()}
