"""Ways through a one-level graph: what a value was made from, and how many convolutions lie between two values."""

from __future__ import annotations

import math

from torch import fx

from se_inject.sites.operations import convolutions, is_bundle, is_data, operation, parent, prefixes
from se_inject.tracing import OwnerGraph, Trace, function_name_of, sources

IN_PLACE = frozenset({"iadd", "isub", "imul", "itruediv", "setitem"})
"""Operators that write into their first operand."""
_COLLECTING = frozenset({"append", "extend", "insert", "update"})


def lineage(node: fx.Node) -> set[fx.Node]:
    """A node and every tensor it was computed from."""
    return sources(node) | {node}


def shared_lineage(operands: list[fx.Node]) -> set[fx.Node]:
    """The values that all of these were computed from; a caller may have handed over one value twice."""
    lineages = [lineage(operand) for operand in operands]
    shared = set.intersection(*lineages)
    if not shared:
        values = set.intersection(*({id(node.meta["val"]) for node in nodes} for nodes in lineages))
        shared = {node for nodes in lineages for node in nodes if id(node.meta["val"]) in values}
    return shared


def reaches_output(trace: Trace, owner: OwnerGraph, value: fx.Node) -> bool:
    """Whether the network's output is made from a value, as far as the graphs of its callers tell."""
    reached = _descendants([value])
    result = next(iter(reversed(owner.graph.nodes)))
    if result not in reached:
        return False
    if not owner.path:
        return True
    items = _items(result.args[0], reached)
    for path in reversed(prefixes(parent(owner.path))):
        caller = trace.graphs.get(path)
        if caller is None:
            continue
        calls = [
            node
            for node in caller.graph.nodes
            if node.op == "call_module" and trace.child(path, node.target) == owner.path
        ]
        readers = [reader for call in calls for reader in _readers(call, items)]
        if calls:
            return any(reaches_output(trace, caller, reader) for reader in readers)
    return True


def _descendants(nodes: list[fx.Node]) -> set[fx.Node]:
    """These nodes and all that is made from them; what they are written into counts."""
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
    """The indices of a returned structure under which the reached values are; None: it is no flat structure."""
    if isinstance(result, tuple | list):
        found = [index for index, item in enumerate(result) if item in reached or not isinstance(item, fx.Node)]
        return [*found, *(index - len(result) for index in found)]
    if isinstance(result, dict):
        return [key for key, item in result.items() if item in reached or not isinstance(item, fx.Node)]
    return None


def _readers(call: fx.Node, items: list[object] | None) -> list[fx.Node]:
    """The call, or of the values that are taken out of its result those with these indices."""
    if items is None or any(getattr(user.target, "__name__", "") != "getitem" for user in call.users):
        return [call]
    return [user for user in call.users if user.args[1] in items]


class Depths:
    """Numbers of convolutions between values of one observed call."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self._known: dict[str, int] = {}

    def between(self, owner: OwnerGraph, node: fx.Node, common: set[fx.Node]) -> float:
        """The least number of convolutions on a way from one of the common values to this one."""
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
                ways = [known[source] for source in before]
                known[current] = self._own_depth(owner.path, current) + min(ways) if ways else math.inf
            pending.pop()
        return known[node]

    def is_bare(self, owner: OwnerGraph, node: fx.Node, common: set[fx.Node]) -> bool:
        """Whether a way leads from one of the common values to this one without convolution and normalisation."""
        pending, seen = [node], set()
        while pending:
            current = pending.pop()
            if current in common:
                return True
            if current not in seen and not convolutions(current) and not self.contains(owner.path, current, "norm"):
                seen.add(current)
                pending += current.all_input_nodes
        return False

    def contains(self, path: str, node: fx.Node, kind: str) -> bool:
        """Whether a node is an operation of this kind, or a module with one in it."""
        found = operation(self.trace, path, node)
        if found != "module":
            return found == kind
        child = self.trace.child(path, node.target)
        inner = self.trace.graphs.get(child)
        return inner is not None and any(self.contains(child, each, kind) for each in inner.graph.nodes)

    def _own_depth(self, owner: str, node: fx.Node) -> int:
        if not convolutions(node):
            return 0
        if node.op != "call_module":
            return 1
        return self._depth_of(self.trace.child(owner, node.target))

    def _depth_of(self, path: str) -> int:
        """The least number of convolutions from a module's input to its output."""
        owner = self.trace.graphs.get(path)
        if owner is None:
            return 1
        if path in self._known:
            return self._known[path]
        inputs = {node for node in owner.graph.nodes if node.op == "placeholder"}
        output = next(iter(reversed(owner.graph.nodes)))
        depth = self.between(owner, output, inputs)
        self._known[path] = 0 if math.isinf(depth) else int(depth)
        return self._known[path]
