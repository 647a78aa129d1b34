"""Follow data through one-level graphs: ancestors, reachability, numbers of convolutions."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, fx

from se_inject.sites.operations import convolves, is_bundle, parent, path_of, prefixes
from se_inject.tracing import (
    OwnerGraph,
    Trace,
    ancestors,
    function_name_of,
    gate_and_gated,
    inputs_of,
    is_buffer,
    is_data,
    kind,
    sources,
    writes_into,
)

IN_PLACE = frozenset({"iadd", "isub", "imul", "itruediv", "setitem"})
"""Operators that write into their first operand."""
_COLLECTING = frozenset({"append", "extend", "insert", "update"})


def lineage(node: fx.Node) -> set[fx.Node]:
    """Return a node, every tensor it was computed from, and the calls of modules that returned several of these."""
    return {
        found for found in ancestors(node) if isinstance(found.meta.get("val"), Tensor) or _returns_several(found)
    } | {node}


def last_write(value: fx.Node) -> fx.Node | None:
    """Return the last node that fills a buffer (``writes_into``).

    None if nothing does, and for a value that was computed: what its forward writes into it later (``out.add_(x)``) comes behind the gate.
    """
    writes = writes_into(value) if is_buffer(value) else []
    return max(writes) if writes else None


_TAKES = ("getitem", "field")
"""What takes an item out of a container."""


def since(operands: list[fx.Node], common: set[fx.Node]) -> set[fx.Node]:
    """Return what operands were computed from since the values that are common to all of them."""
    lineages = [lineage(operand) for operand in operands]
    behind: set[fx.Node] = set().union(*lineages)
    return behind - common - lineages[0].intersection(*lineages)


def _returns_several(node: fx.Node) -> bool:
    return node.op == "call_module" and is_bundle(node)


def shared_lineage(operands: list[fx.Node]) -> set[fx.Node]:
    """Return the tensors that all of these were computed from; a caller may have handed over one value twice."""
    lineages = [_with_joined_items(sources(operand) | {operand}) for operand in operands]
    shared = set.intersection(*lineages)
    if not shared:
        values = set.intersection(*({id(node.meta["val"]) for node in nodes} for nodes in lineages))
        shared = {node for nodes in lineages for node in nodes if id(node.meta["val"]) in values}
    return shared


def _with_joined_items(nodes: set[fx.Node]) -> set[fx.Node]:
    """Return nodes and the items, taken one by one elsewhere, of the structures that a concatenation among them reads whole: ``cat(x)``, ``x[0]``."""
    wholes = {node.args[0] for node in nodes if kind(node) == "cat" and node.args and isinstance(node.args[0], fx.Node)}
    return nodes | {user for whole in wholes for user in whole.users if function_name_of(user) == "getitem"}


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

    def between(self, node: fx.Node, common: set[fx.Node], *, longest: bool = False) -> float:
        """Return the number of convolutions on the shortest path from one of the common values to this one.

        Paths through gates do not count.

        Args:
            node: the later value.
            common: the earlier ones.
            longest: take the longest path instead.
        """
        choose, none = (max, -math.inf) if longest else (min, math.inf)
        known: dict[fx.Node, float] = dict.fromkeys(common, 0)
        pending, entered = [node], set()
        while pending:
            current = pending[-1]
            before = [] if current in known else _read(current)
            waiting = [source for source in before if source not in known and source not in entered]
            entered.add(current)
            if waiting:
                pending += waiting
                continue
            if current not in known:
                depths = [
                    known[source] + self._depth_of_item(source, current, longest)
                    for source in before
                    if source in known  # else a buffer that is read while it is filled
                ]
                known[current] = choose(depths, default=none) + self._own_depth(current, longest)
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

    def _own_depth(self, node: fx.Node, longest: bool) -> float:
        """Return the convolutions of a node itself; those of a call that returns several values count where one is taken."""
        if not convolves(node) or _returns_several(node):
            return 0
        return self._depth_of(path_of(node), (), longest) if node.op == "call_module" else 1

    def _depth_of_item(self, source: fx.Node, reader: fx.Node, longest: bool) -> float:
        """Return the convolutions behind the item that a reader takes out of what a module returned; 0 for any other value."""
        takes = function_name_of(reader) in _TAKES
        if not is_bundle(source) or (takes and is_bundle(reader)):
            return 0
        keys = [reader.args[1]] if takes else []
        while function_name_of(source) in _TAKES and isinstance(source.args[0], fx.Node):
            keys.insert(0, source.args[1])
            source = source.args[0]
        if source.op != "call_module" or not convolves(source):
            return 0
        return self._depth_of(path_of(source), tuple(keys), longest)

    def _depth_of(self, path: str, keys: tuple[Any, ...], longest: bool) -> float:
        """Return the number of convolutions from a module's input to its output, or to the item under these keys."""
        owner = self.trace.graphs.get(path)
        if owner is None:
            return 1
        name = repr((path, keys, longest))
        if name not in self._known:
            inputs = {node for node in owner.graph.nodes if node.op == "placeholder"}
            item, rest = _taken(next(iter(reversed(owner.graph.nodes))).args[0], keys)
            values = [node for node in _nodes_in(item) if is_data(node) or is_bundle(node)]
            depths = [self.between(node, inputs, longest=longest) + self._rest(node, rest, longest) for node in values]
            depth = max(depths, default=0.0) if longest else min(depths, default=math.inf)
            self._known[name] = 0 if math.isinf(depth) else depth
        return self._known[name]

    def _rest(self, node: fx.Node, keys: tuple[Any, ...], longest: bool) -> float:
        """Return the depth of an item of what a node's module returned, or the depth of all."""
        return self._depth_of(path_of(node), keys, longest) if _returns_several(node) and convolves(node) else 0


def _read(node: fx.Node) -> list[fx.Node]:
    """Return the data that a node reads; of a product with a gate only the value that is gated."""
    pair = gate_and_gated(node)
    before = inputs_of(node) if pair is None else [source for source in inputs_of(node) if source is not pair[0]]
    return [source for source in before if is_data(source) or is_bundle(source)]


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
