"""Follow data through one-level graphs: ancestors, reachability, numbers of convolutions."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, fx

from se_inject.sites.operations import convolves, is_bundle, parent, path_of, prefixes
from se_inject.tracing import OwnerGraph, Trace, ancestors, function_name_of, is_data, kind, sources

IN_PLACE = frozenset({"iadd", "isub", "imul", "itruediv", "setitem"})
"""Operators that write into their first operand."""
_COLLECTING = frozenset({"append", "extend", "insert", "update"})


def lineage(node: fx.Node) -> set[fx.Node]:
    """Return a node, every tensor it was computed from, and the calls of modules that returned several of these."""
    return {
        found for found in ancestors(node) if isinstance(found.meta.get("val"), Tensor) or _returns_several(found)
    } | {node}


def last_write(value: fx.Node) -> fx.Node | None:
    """Return the last node that fills a buffer without returning what is read on: ``out[:, :4] = y``, ``out[0].copy_(y)``.

    None if nothing does, and for a value that was computed: what its forward writes into it later (``out.add_(x)``) comes behind the gate.
    """
    if function_name_of(value).strip("_") not in _BUFFERS:
        return None
    writes = [found for user in value.users for found in _writes(user, value)]
    return max(writes) if writes else None


def _writes(node: fx.Node, value: fx.Node) -> list[fx.Node]:
    """Return the writes into a value that a reader of it does: itself, or those into the view that it takes."""
    if not node.args or node.args[0] is not value:
        return []
    name = function_name_of(node)
    if name == "setitem" or (name.endswith("_") and not name.endswith("__") and not node.users):
        return [node]
    if name not in _VIEWS or not node.users:
        return []
    found = [_writes(user, node) for user in node.users]
    return [write for writes in found for write in writes] if all(found) else []


_BUFFERS = frozenset(
    f"{new}{kind}{like}"
    for new in ("", "new_")
    for kind in ("empty", "full", "ones", "zeros")
    for like in ("", "_like")
) | {"clone"}
"""What makes a tensor that is filled afterwards."""

_TAKES = ("getitem", "field")
"""What takes an item out of a container."""
_VIEWS = frozenset({"getitem", "narrow", "select", "view", "transpose", "permute", "unflatten"})


def since(operands: list[fx.Node], common: set[fx.Node]) -> set[fx.Node]:
    """Return what operands were computed from since the values that are common to all of them."""
    lineages = [lineage(operand) for operand in operands]
    behind: set[fx.Node] = set().union(*lineages)
    return behind - common - lineages[0].intersection(*lineages)


def _returns_several(node: fx.Node) -> bool:
    return node.op == "call_module" and is_bundle(node)


def shared_lineage(operands: list[fx.Node]) -> set[fx.Node]:
    """Return the tensors that all of these were computed from; a caller may have handed over one value twice."""
    lineages = [sources(operand) | {operand} for operand in operands]
    shared = set.intersection(*lineages)
    if not shared:
        values = set.intersection(*({id(node.meta["val"]) for node in nodes} for nodes in lineages))
        shared = {node for nodes in lineages for node in nodes if id(node.meta["val"]) in values}
    return shared


def reaches_output(trace: Trace, owner: OwnerGraph, value: fx.Node) -> bool:
    """Return whether the network's output is made from a value, as far as the graphs of its callers tell."""
    reached = _descendants([value])
    result = next(iter(reversed(owner.graph.nodes)))
    if _is_taken_by_a_hook(trace, owner, reached):
        return True
    if result not in reached:
        return False
    if not owner.path:
        return True
    items = _items(_contents(result.args[0]), reached)
    for path in reversed(prefixes(parent(owner.path))):
        caller = trace.graphs.get(path)
        if caller is None:
            continue
        calls = [node for node in caller.graph.nodes if node.op == "call_module" and path_of(node) == owner.path]
        readers = [reader for call in calls for reader in _readers(call, items)]
        if calls:
            return any(reaches_output(trace, caller, reader) for reader in readers)
    return True


def _is_taken_by_a_hook(trace: Trace, owner: OwnerGraph, reached: set[fx.Node]) -> bool:
    """Return whether a forward hook sees one of these values: no graph shows what it does with it."""
    if not trace.hooked:
        return False
    if owner.path in trace.hooked and any(node.op == "output" for node in reached):
        return True
    return any(node.op == "call_module" and path_of(node) in trace.hooked for node in reached)


def _descendants(nodes: list[fx.Node]) -> set[fx.Node]:
    """Find these nodes and all that is made from them, including the values they are written into."""
    seen: set[fx.Node] = set()
    pending = list(nodes)
    while pending:
        current = pending.pop()
        if current in seen:
            continue
        seen.add(current)
        pending += current.users
        name = function_name_of(current)
        if (
            current.args
            and isinstance(current.args[0], fx.Node)
            and (name.endswith("_") or name in IN_PLACE | _COLLECTING)
        ):
            pending.append(current.args[0])
    return seen


def _items(result: object, reached: set[fx.Node]) -> list[object] | None:
    """Find the indices of a returned structure under which the reached values are; None: the structure isn't flat."""
    if isinstance(result, tuple | list):
        found = [index for index, item in enumerate(result) if item in reached or not isinstance(item, fx.Node)]
        return [*found, *(index - len(result) for index in found)]
    if isinstance(result, dict):
        return [key for key, item in result.items() if item in reached or not isinstance(item, fx.Node)]
    return None


def _readers(call: fx.Node, items: list[object] | None) -> list[fx.Node]:
    """Find the call, or of the values that are taken out of its result those with these indices."""
    if items is None or any(getattr(user.target, "__name__", "") not in _TAKES for user in call.users):
        return [call]
    return [user for user in call.users if user.args[1] in items]


class Depths:
    """Numbers of convolutions between values of one observed call."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self._known: dict[str, float] = {}

    def between(self, node: fx.Node, common: set[fx.Node]) -> float:
        """Return the least number of convolutions on a path from one of the common values to this one."""
        known: dict[fx.Node, float] = dict.fromkeys(common, 0)
        pending = [node]
        while pending:
            current = pending[-1]
            before = [source for source in current.all_input_nodes if is_data(source) or is_bundle(source)]
            waiting = [source for source in before if source not in known]
            if current not in known and waiting:
                pending += waiting
                continue
            if current not in known:
                depths = [known[source] + self._depth_of_item(source, current) for source in before]
                known[current] = self._own_depth(current) + min(depths) if depths else math.inf
            pending.pop()
        return known[node]

    def is_bare(self, node: fx.Node, common: set[fx.Node]) -> bool:
        """Return whether a path leads from one of the common values to this one without convolution and normalisation."""
        pending, seen = [node], set()
        while pending:
            current = pending.pop()
            if current in common:
                return True
            if current not in seen and not convolves(current) and not self.contains(current, "norm"):
                seen.add(current)
                pending += current.all_input_nodes
        return False

    def contains(self, node: fx.Node, operation: str) -> bool:
        """Return whether a node is such an operation, or a module with one in it."""
        if kind(node) != "module":
            return kind(node) == operation
        inner = self.trace.graphs.get(path_of(node))
        return inner is not None and any(self.contains(each, operation) for each in inner.graph.nodes)

    def _own_depth(self, node: fx.Node) -> float:
        """Return the convolutions of a node itself; those of a call that returns several values count where one is taken."""
        if not convolves(node) or _returns_several(node):
            return 0
        return self._depth_of(path_of(node)) if node.op == "call_module" else 1

    def _depth_of_item(self, source: fx.Node, reader: fx.Node) -> float:
        """Return the convolutions behind the item that a reader takes out of what a module returned; 0 for any other value."""
        takes = function_name_of(reader) in _TAKES
        if not is_bundle(source) or (takes and is_bundle(reader)):
            return 0
        keys = [reader.args[1]] if takes else []
        while function_name_of(source) in _TAKES and isinstance(source.args[0], fx.Node):
            keys.insert(0, source.args[1])
            source = source.args[0]
        return self._depth_of(path_of(source), tuple(keys)) if source.op == "call_module" and convolves(source) else 0

    def _depth_of(self, path: str, keys: tuple[Any, ...] = ()) -> float:
        """Return the least number of convolutions from a module's input to its output, or to the item under these keys."""
        owner = self.trace.graphs.get(path)
        if owner is None:
            return 1
        name = repr((path, keys))
        if name not in self._known:
            inputs = {node for node in owner.graph.nodes if node.op == "placeholder"}
            item, rest = _taken(next(iter(reversed(owner.graph.nodes))).args[0], keys)
            values = [node for node in _nodes_in(item) if is_data(node) or is_bundle(node)]
            depths = [self.between(node, inputs) + self._rest(node, rest) for node in values]
            depth = min(depths, default=math.inf)
            self._known[name] = 0 if math.isinf(depth) else depth
        return self._known[name]

    def _rest(self, node: fx.Node, keys: tuple[Any, ...]) -> float:
        """Return the depth of an item of what a node's module returned, or the least depth of all."""
        return self._depth_of(path_of(node), keys) if _returns_several(node) and convolves(node) else 0


def _taken(result: object, keys: tuple[Any, ...]) -> tuple[object, tuple[Any, ...]]:
    """Follow keys into a returned structure, as far as it is one in this graph; return what is there, and the keys left."""
    while keys:
        result = _contents(result)
        if not isinstance(result, tuple | list | dict):
            break
        try:
            result, keys = result[keys[0]], keys[1:]
        except (LookupError, TypeError):
            break
    return result, keys


def _contents(result: object) -> object:
    """Return what a container of an author's class is made of; any other value as it is."""
    if not isinstance(result, fx.Node) or not isinstance(result.target, type):
        return result
    return result.kwargs or (result.args[0] if len(result.args) == 1 else result.args)


def _nodes_in(result: object) -> list[fx.Node]:
    if isinstance(result, fx.Node):
        return [result]
    items = result.values() if isinstance(result, dict) else result if isinstance(result, tuple | list) else ()
    return [node for item in items for node in _nodes_in(item)]
