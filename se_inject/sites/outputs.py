"""Tell whether a value is the network's own output: class scores, boxes, an image."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from se_inject.sites.operations import convolves, is_bundle, parent, path_of, prefixes
from se_inject.tracing import OwnerGraph, Trace, function_name_of, is_data, kind

FEW = 32
"""So many channels or fewer are few for an output that is made from more."""
_BOUNDED = frozenset(
    {"sigmoid", "sigmoid_", "tanh", "tanh_", "hardsigmoid", "Sigmoid", "Tanh", "Hardsigmoid", "softmax"}
)
_WEIGHTED = frozenset({"linear", "addmm", "mm", "matmul", "bmm", "einsum", "Linear", "Bilinear", "LSTM", "GRU", "RNN"})


def is_image_output(trace: Trace, owner: OwnerGraph, join: fx.Node, inside: set[fx.Node]) -> bool:
    """Return whether an addition adds a correction to an image: four channels at most, made from twice as many or more."""
    channels = join.meta["val"].shape[1]
    widths = [node.meta["val"].shape[1] for node in inside if _is_map(node.meta.get("val"), join.meta["val"].dim())]
    return channels <= 4 and (
        max((*widths, *_widths_within(trace, inside)), default=0) >= 2 * channels and is_returned(trace, owner, join)
    )


def is_narrow_output(trace: Trace, owner: OwnerGraph, value: fx.Node) -> bool:
    """Return whether the network returns a value of fewer channels than it was made from, operations without weights aside."""
    tensor = value.meta["val"]
    if not isinstance(tensor, Tensor) or tensor.dim() < 3:
        return False
    wide = _channels_before(trace, value)
    if tensor.shape[1] >= wide:
        return False
    few = tensor.shape[1] <= FEW or _name(trace, value) in _BOUNDED
    return few and is_returned(trace, owner, value)


def is_returned(trace: Trace, owner: OwnerGraph, value: fx.Node) -> bool:
    """Return whether the network returns a value, as it is or through operations without weights."""
    pending, seen = [value], set()
    result = next(iter(reversed(owner.graph.nodes)))
    while pending:
        node = pending.pop()
        for user in node.users:
            if user is result:
                return not owner.path or _is_returned_by_caller(trace, owner)
            if user not in seen and not _computes(trace, user):
                seen.add(user)
                pending.append(user)
    return False


def _is_returned_by_caller(trace: Trace, owner: OwnerGraph) -> bool:
    for path in reversed(prefixes(parent(owner.path))):
        caller = trace.graphs.get(path)
        for node in caller.graph.nodes if caller is not None else ():
            if caller is not None and node.op == "call_module" and path_of(node) == owner.path:
                return is_returned(trace, caller, node)
    return False


def _computes(trace: Trace, node: fx.Node) -> bool:
    """Return whether a node has weights, or joins its value with others."""
    if convolves(node) or kind(node) in ("cat", "norm") or _name(trace, node) in _WEIGHTED:
        return True
    if node.op == "call_module":
        return any(True for _ in node.meta["module"].parameters())
    return sum(is_data(source) for source in node.all_input_nodes) > 1


def _name(trace: Trace, node: fx.Node) -> str:
    if node.op == "call_module":
        return type(node.meta["module"]).__name__
    return function_name_of(node)


def _channels_before(trace: Trace, value: fx.Node) -> int:
    """Return the channels that the last convolutions before a value read; 0 if there are none in reach."""
    pending, seen, found = [value], set(), [0]
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if kind(node) == "conv":
            found += [source.meta["val"].shape[1] for source in node.all_input_nodes[:1] if is_data(source)]
        elif kind(node) == "module" and convolves(node):
            inner = trace.graphs.get(path_of(node))
            result = next(iter(reversed(inner.graph.nodes))).args[0] if inner is not None else None
            found += [_channels_before(trace, result)] if isinstance(result, fx.Node) else []
        else:
            pending += [source for source in node.all_input_nodes if is_data(source) or is_bundle(source)]
    return max(found)


def _is_map(value: Any, rank: int) -> bool:
    return isinstance(value, Tensor) and value.dim() == rank


def _widths_within(trace: Trace, nodes: set[fx.Node]) -> list[int]:
    """Return the channels of the values in the modules that these nodes call."""
    found = []
    for node in nodes:
        inner = trace.graphs.get(path_of(node)) if kind(node) == "module" else None
        if inner is not None:
            values = [each.meta["val"] for each in inner.graph.nodes if isinstance(each.meta.get("val"), Tensor)]
            found += [value.shape[1] for value in values if value.dim() > 2]
            found += _widths_within(trace, set(inner.graph.nodes))
    return found
