"""Tell from the nodes of one graph what a value was made from, and whether attention is there already."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from se_inject.tracing.buffers import inputs_of
from se_inject.tracing.names import function_name_of

CONVOLUTIONS = frozenset(f"conv{transpose}{rank}d" for transpose in ("", "_transpose") for rank in (1, 2, 3)) | {
    "convolution",
    "_convolution",
    "_convolution_mode",
    "deform_conv2d",
}


_PRODUCTS = frozenset({"mul", "imul", "mul_", "multiply", "addcmul", "addcmul_"})
_VIEWS = frozenset(
    {"view", "reshape", "flatten", "permute", "transpose", "contiguous", "unsqueeze", "squeeze", "movedim"}
)
_SIZES = (int, float, str, torch.Size, torch.dtype, torch.device)


def gates_in(graph: fx.Graph) -> int:
    """Count the values in this graph that are multiplied by a gate made from themselves: attention that is already there."""
    return sum(is_gating(node) for node in graph.nodes)


def is_gating(node: fx.Node) -> bool:
    """Return whether a node is ``x * g(x)`` with a gate that has fewer positions or channels than x, also as an einsum or in addcmul.

    A gate of one number for each sample, as mixtures of branches have, does not count.
    """
    pair = gate_and_gated(node)
    if pair is None:
        return False
    gate, gated = pair
    if _volume((tensor_shape(_unexpanded(gate)) or ())[1:]) == 1:
        return False  # one number for a whole value is the weight of a branch
    before = ancestors(gated) | {gated}
    if not ancestors(gate) & before:
        return False
    return any(map(_decides, (ancestors(gate) | {gate}) - before))


def gate_and_gated(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Return the smaller and the larger factor of a product; None if it isn't a product of two tensors of different sizes."""
    name = function_name_of(node)
    if name == "einsum":
        return _einsum_factors(node)
    if name not in _PRODUCTS or len(node.args) < 2:
        return None
    arguments = node.args[1:3] if name.startswith("addcmul") else node.args[:2]
    operands = [argument for argument in arguments if isinstance(argument, fx.Node)]
    if len(operands) < 2:
        return None
    shapes = [tensor_shape(_unexpanded(operand)) for operand in operands]
    if None in shapes or len(shapes[0] or ()) < 3 or len(shapes[0] or ()) != len(shapes[1] or ()):
        return None
    if _volume(shapes[0]) == _volume(shapes[1]):
        return None
    smaller = 0 if _volume(shapes[0]) < _volume(shapes[1]) else 1
    return operands[smaller], operands[1 - smaller]


def _einsum_factors(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Return gate and gated of an einsum that multiplies a value by one with fewer dimensions, and sums over none."""
    terms, result, operands = einsum_terms(node)
    for gated, gate in ((0, 1), (1, 0)):
        if len(terms) == 2 and set(terms[gated]) == set(result) and set(terms[gate]) < set(terms[gated]):
            return operands[gate], operands[gated]
    return None


def einsum_terms(node: fx.Node) -> tuple[list[str], str, list[fx.Node]]:
    """Return the subscripts of an einsum's operands, those of its result, and the operands; empty if they are not in one text."""
    equation, *rest = node.args or ("",)
    if len(rest) == 1 and isinstance(rest[0], tuple | list):
        rest = list(rest[0])
    operands = [operand for operand in rest if isinstance(operand, fx.Node)]
    if not isinstance(equation, str) or "->" not in equation:
        return [], "", []
    left, _, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    return (terms, right, operands) if len(terms) == len(operands) == len(rest) else ([], "", [])


def attention_in(graph: fx.Graph) -> int:
    """Return how many matrices of attention between positions a graph computes itself."""
    return sum(map(is_attention, graph.nodes))


def is_attention(node: fx.Node) -> bool:
    """Return whether a node is a softmax over the rows of a matrix that values are then multiplied by, summed over the rows.

    The softmax may be over all pairs of positions at once, in a row that is made a square matrix afterwards. One over branches
    that weighs them element by element (selective kernels) is none.
    """
    value = node.meta.get("val")
    if node.op == "placeholder" or not _is_softmax(node) or not isinstance(value, Tensor):
        return False
    if value.dim() == 2:
        return any(function_name_of(user) in _VIEWS and _is_square(user) and _weighs(user) for user in node.users)
    return value.dim() > 2 and min(value.shape[-2:]) > 1 and _weighs(node)


def _is_square(node: fx.Node) -> bool:
    shape = tensor_shape(node) or ()
    return len(shape) > 2 and shape[-1] == shape[-2] > 1


def _weighs(node: fx.Node) -> bool:
    """Return whether values are multiplied by a matrix and summed over its rows; one that is square may be returned instead."""
    value = node.meta["val"]
    pending, seen = [node], {node}
    while pending:
        current = pending.pop()
        for user in current.users:
            if user.op == "output" and value.shape[-1] == value.shape[-2]:
                return True
            if _contracts(user, current):
                return True
            shape = tensor_shape(user)
            if user not in seen and shape is not None and _volume(shape) <= value.numel() and user.op != "output":
                seen.add(user)
                pending.append(user)
    return False


def _is_softmax(node: fx.Node) -> bool:
    if node.op == "call_module":
        return issubclass(node.meta.get("class", object), torch.nn.Softmax)
    return function_name_of(node) == "softmax"


def _contracts(node: fx.Node, factor: fx.Node) -> bool:
    """Return whether a node is a matrix product with this factor, the other one no stack of branches."""
    name = function_name_of(node)
    if name == "einsum":
        terms, result, operands = einsum_terms(node)
        if terms and not set("".join(terms)) - set(result):
            return False
    elif name not in ("matmul", "bmm", "baddbmm", "einsum", "tensordot", "mm"):
        return False
    else:
        operands = [argument for argument in node.args if isinstance(argument, fx.Node)]
    return not any(_is_stack(operand) for operand in operands if operand is not factor)


def _is_stack(node: fx.Node) -> bool:
    """Return whether a value is a stack of values, changed in its shape at most."""
    while function_name_of(node) in _VIEWS and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return function_name_of(node) == "stack"


def _decides(node: fx.Node) -> bool:
    """Return whether a node can make a gate of a statistic: it has weights or is bounded; what only divides by a norm can't."""
    name = function_name_of(node).rstrip("_")
    return (
        node.op == "call_module"
        or name in ("sigmoid", "hardsigmoid", "tanh", "softmax", "linear", "matmul", "einsum", "clamp", "relu")
        or name in CONVOLUTIONS
    )


def _unexpanded(node: fx.Node) -> fx.Node:
    """Return the value that a node repeats along dimensions of one, ``g.expand(…)`` or ``g.repeat(1, 1, h, w)``; any other node itself."""
    while node.op.startswith("call") and node.args and isinstance(node.args[0], fx.Node):
        name, before, after = function_name_of(node), tensor_shape(node.args[0]), tensor_shape(node)
        repeats = name == "repeat" and before is not None and after is not None and len(before) == len(after)
        if name not in ("expand", "expand_as") and not (
            repeats and all(a in (1, b) for a, b in zip(before or (), after or (), strict=True))
        ):
            break
        node = node.args[0]
    return node


def _volume(shape: Any) -> int:
    return torch.Size(shape).numel()


def tensor_shape(node: fx.Node) -> tuple[int, ...] | None:
    """Return the shape of a node's value in the observed call; None if it isn't a tensor."""
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else None


def ancestors(node: fx.Node) -> set[fx.Node]:
    """Find every node this node's value was computed from, but for parameters and nodes that only give a size."""
    seen: set[fx.Node] = set()
    pending = list(inputs_of(node))
    while pending:
        current = pending.pop()
        if current not in seen and current.op != "get_attr" and not isinstance(current.meta.get("val"), _SIZES):
            seen.add(current)
            pending.extend(inputs_of(current))
    return seen


def sources(node: fx.Node) -> set[fx.Node]:
    """Find every tensor this node's value was computed from, parameters left out."""
    return {found for found in ancestors(node) if isinstance(found.meta.get("val"), Tensor)}
