"""Additions in every form in which a network adds a branch to a shortcut.

``x + f``, ``x - f``, ``f - x``, ``torch.add(x, f, alpha=a)``, ``addcmul(x, f, g)``, ``lerp(x, f, w)``, and the sum or mean over
a stack of them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from se_inject.tracing import function_name_of, is_data, kind

_PLAIN = frozenset({"add", "iadd", "add_"})
_PRODUCTS = frozenset({"addcmul", "addcmul_", "addcdiv", "addcdiv_"})
_NAMES = _PLAIN | _PRODUCTS | {"sub", "isub", "sub_", "subtract", "subtract_", "rsub", "lerp", "lerp_"}
_KNOWN_OPERATORS = frozenset({"aten", "prims", "torchvision", "se_inject"})
_STACKS = frozenset({"stack"})
_REDUCTIONS = frozenset({"sum", "mean"})


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
    if name not in _NAMES and name not in _REDUCTIONS:
        return None
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or not 3 <= value.dim() <= 5:
        return None
    reader = node
    if name in _REDUCTIONS:
        stack = _stack_under(node)
        if stack is None:
            return None
        reader, arguments = stack, _items(stack)
    else:
        arguments = _arguments(node)
    data = [argument for argument in arguments if isinstance(argument, fx.Node) and is_data(argument)]
    if name in _PRODUCTS and len(data) > 2:
        data = [data[0], max(data[1:], key=lambda source: source.meta["val"].numel())]
    elif name not in _REDUCTIONS:
        data = data[:2]
    if len(data) < 1 or len({tuple(each.meta["val"].shape) for each in data}) != 1:
        return None
    factors = [source for source in reader.all_input_nodes if is_data(source) and source not in data]
    return Addition(data, reader, factors, name in _PLAIN or name in _REDUCTIONS)


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


def _stack_under(node: fx.Node) -> fx.Node | None:
    """Return the stack that a sum or mean reduces along the dimension in which its values lie side by side."""
    source = node.args[0] if node.args else node.kwargs.get("input")
    if not isinstance(source, fx.Node) or function_name_of(source) not in _STACKS or len(source.users) != 1:
        return None
    stacked = source.meta["val"].dim()
    dim: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", node.kwargs.get("axis"))
    if isinstance(dim, tuple | list) and len(dim) == 1:
        (dim,) = dim
    over: Any = source.args[1] if len(source.args) > 1 else source.kwargs.get("dim", 0)
    if not isinstance(dim, int) or not isinstance(over, int) or dim % stacked != over % stacked:
        return None
    return source
