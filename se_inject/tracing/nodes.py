"""The nodes of one graph: what a value was made from, and whether attention is there already."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

CONVOLUTIONS = frozenset(f"conv{transpose}{rank}d" for transpose in ("", "_transpose") for rank in (1, 2, 3)) | {
    "convolution",
    "_convolution",
    "_convolution_mode",
    "deform_conv2d",
}


_IN_PLACE = {"add_": "iadd", "sub_": "isub", "mul_": "imul", "div_": "itruediv"}
_SIZES = (int, float, str, torch.Size, torch.dtype, torch.device)


def function_name_of(node: fx.Node) -> str:
    """What the function or method of a node is called.

    An operator of torch has no overload here, and is called as Python's operator in place is: ``add``, ``iadd``.
    """
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    if not isinstance(node.target, torch._ops.OpOverload):
        return name
    name = name.partition(".")[0]
    return _IN_PLACE.get(name, name)


def gates_in(graph: fx.Graph) -> int:
    """How many values this graph multiplies by a gate made from themselves: attention that is already there."""
    return sum(is_gating(node) for node in graph.nodes)


def is_gating(node: fx.Node) -> bool:
    """Whether a node is ``x * g(x)`` with a gate that has fewer positions or channels than x."""
    name = function_name_of(node)
    if name not in ("mul", "imul", "mul_", "multiply") or len(node.args) < 2:
        return False
    operands = [argument for argument in node.args[:2] if isinstance(argument, fx.Node)]
    if len(operands) < 2:
        return False
    shapes = [tensor_shape(_unexpanded(operand)) for operand in operands]
    if None in shapes or len(shapes[0] or ()) < 3 or len(shapes[0] or ()) != len(shapes[1] or ()):
        return False
    smaller = 0 if _volume(shapes[0]) < _volume(shapes[1]) else 1
    if _volume(shapes[0]) == _volume(shapes[1]):
        return False
    gate, gated = operands[smaller], operands[1 - smaller]
    before = ancestors(gated) | {gated}
    if not ancestors(gate) & before:
        return False
    return any(map(_decides, (ancestors(gate) | {gate}) - before))


def _decides(node: fx.Node) -> bool:
    """Whether a node can make a gate of a statistic: it has weights or is bounded; what only divides by a norm can't."""
    name = function_name_of(node).rstrip("_")
    return (
        node.op == "call_module"
        or name in ("sigmoid", "hardsigmoid", "tanh", "softmax", "linear", "matmul", "einsum", "clamp", "relu")
        or name in CONVOLUTIONS
    )


def _unexpanded(node: fx.Node) -> fx.Node:
    while (
        node.op.startswith("call")
        and function_name_of(node) in ("expand", "expand_as")
        and isinstance(node.args[0], fx.Node)
    ):
        node = node.args[0]
    return node


def _volume(shape: Any) -> int:
    return torch.Size(shape).numel()


def tensor_shape(node: fx.Node) -> tuple[int, ...] | None:
    """The shape of a node's value in the observed call; None if it is no tensor."""
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else None


def ancestors(node: fx.Node) -> set[fx.Node]:
    """Every node this node's value was computed from, parameters and what only gives a size left out."""
    seen: set[fx.Node] = set()
    pending = list(node.all_input_nodes)
    while pending:
        current = pending.pop()
        if current not in seen and current.op != "get_attr" and not isinstance(current.meta.get("val"), _SIZES):
            seen.add(current)
            pending.extend(current.all_input_nodes)
    return seen


def sources(node: fx.Node) -> set[fx.Node]:
    """Every tensor this node's value was computed from, parameters left out."""
    return {found for found in ancestors(node) if isinstance(found.meta.get("val"), Tensor)}
