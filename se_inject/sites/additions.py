"""Recognise additions in every form in which a network adds a branch to a shortcut.

``x + f``, ``x - f``, ``f - x``, ``torch.add(x, f, alpha=a)``, ``addcmul(x, f, g)``, ``lerp(x, f, w)``, and the sum or mean over
a stack of them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from se_inject.tracing import einsum_terms, function_name_of, is_data, kind

_PLAIN = frozenset({"add", "iadd", "add_"})
_PRODUCTS = frozenset({"addcmul", "addcmul_", "addcdiv", "addcdiv_"})
_NAMES = _PLAIN | _PRODUCTS | {"sub", "isub", "sub_", "subtract", "subtract_", "rsub", "lerp", "lerp_"}
_KNOWN_OPERATORS = frozenset({"aten", "prims", "torchvision", "se_inject"})
_SUMS = frozenset({"sum", "mean", "einsum"})


class Addition(NamedTuple):
    """What a node adds up.

    Args:
        operands: the tensors that are added, all of one form (N, C, …).
        reader: the node that reads them; another than the sum for a stack.
        factors: other tensors that the sum depends on: gates and weights.
        is_plain: whether it is a sum with no signs and factors.
    """

    operands: list[fx.Node]
    reader: fx.Node
    factors: list[fx.Node]
    is_plain: bool


def addition_of(node: fx.Node) -> Addition | None:
    """Return what a node adds up; None if it isn't an addition of tensors of one form (N, C, …)."""
    name = function_name_of(node) if node.op in ("call_function", "call_method") else ""
    if name not in _NAMES and name not in _SUMS:
        return None
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or not 3 <= value.dim() <= 5:
        return None
    reader = node
    summed: list[fx.Node] = []
    if name in _SUMS:
        stack = _summed_stack(node)
        if stack is None:
            return None
        reader, arguments, summed = stack.node, stack.items, stack.weights
    else:
        arguments = _arguments(node)
    data = [argument for argument in arguments if isinstance(argument, fx.Node) and is_data(argument)]
    if name in _PRODUCTS and len(data) > 2:
        data = [data[0], max(data[1:], key=lambda source: source.meta["val"].numel())]
    elif name not in _SUMS:
        data = data[:2]
    if len(data) < 1 or len({tuple(each.meta["val"].shape) for each in data}) != 1:
        return None
    factors = [*summed, *(each for each in reader.all_input_nodes if is_data(each) and name not in _SUMS)]
    is_plain = name in _PLAIN or (name in _SUMS and not summed)
    return Addition(data, reader, [each for each in factors if each not in data], is_plain)


def operands_of(node: fx.Node, operation: str) -> list[fx.Node]:
    """Return the tensors that an addition or concatenation puts together, if they are of one form (N, C, …).

    Args:
        node: of a graph.
        operation: ``add`` or ``cat``; a node of another kind has no operands.
    """
    if operation == "add":
        found = addition_of(node)
        return [] if found is None else found.operands
    value = node.meta.get("val")
    if operation != "cat" or kind(node) != "cat" or not isinstance(value, Tensor) or not 3 <= value.dim() <= 5:
        return []
    operands = [item for item in _items(node) if isinstance(item, fx.Node) and is_data(item)]
    shapes = {tuple(operand.meta["val"].shape[:1] + operand.meta["val"].shape[2:]) for operand in operands}
    return operands if len(shapes) == 1 else []


def joined_by_custom_operator(node: fx.Node) -> list[fx.Node]:
    """Return the two tensors of one form that a custom operator makes a third of; it could be adding them, or anything else."""
    if not isinstance(node.target, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        return []
    name = str(node.target)  # `mylib.mix`, `mylib.mix.default`
    value, data = node.meta.get("val"), [source for source in node.all_input_nodes if is_data(source)]
    if name.partition(".")[0] in _KNOWN_OPERATORS or not isinstance(value, Tensor) or not 3 <= value.dim() <= 5:
        return []
    return data if len(data) == 2 and all(each.meta["val"].shape == value.shape for each in data) else []


def _arguments(node: fx.Node) -> list[Any]:
    named = ("input", "other", "end", "tensor1", "tensor2", "weight")
    return [*node.args, *(node.kwargs[name] for name in named if name in node.kwargs)]


def _items(node: fx.Node) -> list[Any]:
    """Return what a stack or concatenation is made of."""
    first: Any = node.args[0] if node.args else node.kwargs.get("tensors", ())
    return list(first) if isinstance(first, tuple | list) else []


class _Stack(NamedTuple):
    """Values side by side in a dimension of their own, which is summed over.

    Args:
        node: the ``stack`` or ``cat``.
        items: the values.
        weights: what they are multiplied by before, if it is made from the module's input.
    """

    node: fx.Node
    items: list[fx.Node]
    weights: list[fx.Node]


def _summed_stack(node: fx.Node) -> _Stack | None:
    """Return the stack that a sum, mean or einsum reduces along the dimension in which its values lie side by side."""
    if function_name_of(node) == "einsum":
        return _contracted_stack(node)
    source: Any = node.args[0] if node.args else node.kwargs.get("input")
    dim: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", node.kwargs.get("axis"))
    if isinstance(dim, tuple | list) and len(dim) == 1:
        (dim,) = dim
    weights: list[fx.Node] = []
    while isinstance(source, fx.Node) and kind(source) == "mul" and len(source.users) == 1:
        stacks = [each for each in source.all_input_nodes if _stacked(each) is not None or kind(each) == "mul"]
        if len(stacks) != 1:
            return None
        weights += [each for each in source.all_input_nodes if each is not stacks[0] and is_data(each)]
        (source,) = stacks
    stack = _stacked(source) if isinstance(source, fx.Node) and len(source.users) == 1 else None
    if stack is None or not isinstance(dim, int) or dim % source.meta["val"].dim() != stack[0]:
        return None
    return _Stack(source, stack[1], weights)


def _contracted_stack(node: fx.Node) -> _Stack | None:
    """Return the stack that an einsum multiplies by one weight a value, and sums over."""
    terms, result, operands = einsum_terms(node)
    for one, other in ((0, 1), (1, 0)):
        stack = _stacked(operands[one]) if len(terms) == 2 else None
        if stack is not None and terms[one][: stack[0]] + terms[one][stack[0] + 1 :] == result:
            weights = [operands[other]] if is_data(operands[other]) else []
            return _Stack(operands[one], stack[1], weights) if terms[one][stack[0]] in terms[other] else None
    return None


def _stacked(node: fx.Node) -> tuple[int, list[fx.Node]] | None:
    """Return the dimension in which values lie side by side, and the values; None if the node is not a stack."""
    name, value = function_name_of(node), node.meta.get("val")
    items = [item for item in _items(node) if isinstance(item, fx.Node)]
    if not isinstance(value, Tensor) or not items or (name != "stack" and kind(node) != "cat"):
        return None
    dim: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", node.kwargs.get("axis", 0))
    if not isinstance(dim, int):
        return None
    dim %= value.dim()
    if name == "stack":
        return dim, items
    inner = [_flattened(item, dim) for item in items]
    found = [each for each in inner if each is not None]
    return (dim, found) if len(found) == len(items) else None


def _flattened(node: fx.Node, dim: int) -> fx.Node | None:
    """Return the value that a node gives a new dimension of one at this place: ``x[:, None]``, ``x.unsqueeze(1)``."""
    if function_name_of(node) not in ("getitem", "unsqueeze", "view", "reshape") or not node.all_input_nodes:
        return None
    source = node.all_input_nodes[0]
    before, after = source.meta.get("val"), node.meta["val"].shape
    is_new = isinstance(before, Tensor) and after[dim] == 1 and after[:dim] + after[dim + 1 :] == before.shape
    return source if is_new else None
