"""Edit the graph of a forward so that blocks are called with the shortcut and the activation behind them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from se_inject.forwards import calls_own_method
from se_inject.tracing import function_name_of

_MODULES: dict[type, str] = {nn.ReLU: "relu", nn.ReLU6: "relu6", nn.SiLU: "silu", nn.Hardswish: "hardswish"}
_FUNCTIONS = {"relu": "relu", "relu_": "relu", "relu6": "relu6", "silu": "silu", "silu_": "silu"}
_FUNCTIONS |= {"hardswish": "hardswish", "hardswish_": "hardswish", "relu6_": "relu6"}
_GELU = {"none": "gelu", "tanh": "gelu_tanh"}


@dataclass(frozen=True)
class Tail:
    """What a block takes over: whether it adds a shortcut, the activation it ends with, and whether a scale was in between."""

    adds: bool
    activation: str
    scaled: bool = False

    @property
    def takes(self) -> bool:
        """Whether it takes over anything."""
        return self.adds or self.activation != "none"

    def __str__(self) -> str:
        parts = ["the addition"] * self.adds + [self.activation] * (self.activation != "none")
        return (" and ".join(parts) or "nothing") + " behind a scale" * self.scaled


def fuse_in_graph(
    graph: fx.Graph, call: fx.Node, child: Callable[[str], nn.Module], shape: tuple[int, ...] = ()
) -> Tail:
    """Let a block take over the addition and the activation behind it, in this graph itself.

    A factor for each channel that is multiplied in between (a layer scale) goes before the block, whose gate goes on
    reading the unscaled value: at the identity start, where the gate is 1, that changes no bit.

    Args:
        graph: a forward; changed.
        call: of the block, with a value alone.
        child: finds a module by its path from the graph's owner.
        shape: of a factor for each channel that broadcasts to the value: (C, 1, …).

    Returns:
        what the block takes over; the graph is as it was if that is nothing.
    """
    chain, shortcut, activation = _behind(call, child, shape)
    if not chain or not _can_wait(graph, call, chain, shortcut):
        return Tail(False, "none")
    last = chain[-1]
    value = call.args[0]
    before: dict[fx.Node, Any] = {call: value}  # what stands for each node of the chain before the gate is applied
    with graph.inserting_before(last):
        for node in chain:
            if _factor(node, child, shape) is not None:
                before[node] = graph.node_copy(node, lambda old: before.get(old, old))
            elif _passes(node, child):
                before[node] = before[node.args[0]]  # type: ignore[index]
        scaled = list(before.values())[-1]
        rest = () if scaled is value else (value,)
        fused = graph.call_module(str(call.target), (scaled, shortcut, activation, *rest))
    last.replace_all_uses_with(fused)
    for node in (*reversed(chain), call):
        graph.erase_node(node)
    return Tail(shortcut is not None, activation, bool(rest))


def _behind(
    value: fx.Node, child: Callable[[str], nn.Module], shape: tuple[int, ...]
) -> tuple[list[fx.Node], fx.Node | None, str]:
    """Find the nodes that can be taken over, in their order, the shortcut among their arguments, and the activation's name."""
    chain: list[fx.Node] = []
    shortcut, activation = None, "none"
    reader = _reader(value, child)
    while reader is not None and (_passes(reader, child) or _factor(reader, child, shape) is not None):
        chain.append(reader)
        reader = _reader(reader, child)
    last = chain[-1] if chain else value
    if reader is not None and (other := _added(reader, last, child)) is not None:
        chain.append(reader)
        shortcut = other
        reader = _reader(reader, child)
    if reader is not None and (name := _activation(reader, child)) is not None:
        chain.append(reader)
        activation = name
    if shortcut is None and activation == "none":
        return [], None, "none"
    return chain, shortcut, activation


def _reader(node: fx.Node, child: Callable[[str], nn.Module]) -> fx.Node | None:
    """Find the one node that reads a value; None if there are several, or one that reads it more than once."""
    if len(node.users) != 1:
        return None
    (user,) = node.users
    return user if user.op.startswith("call") and user.all_input_nodes.count(node) == 1 else None


def _passes(node: fx.Node, child: Callable[[str], nn.Module]) -> bool:
    """Return whether a node hands its argument on: an nn.Identity."""
    return node.op == "call_module" and len(node.args) == 1 and _plain(child(str(node.target))) is nn.Identity


def _factor(node: fx.Node, child: Callable[[str], nn.Module], shape: tuple[int, ...]) -> Tensor | None:
    """Return the tensor of the owner's, one number for each channel or for all, that a node multiplies a value by."""
    if node.op == "call_module" or function_name_of(node) not in ("mul", "__mul__", "__rmul__", "multiply"):
        return None
    if len(node.args) != 2 or node.kwargs:
        return None
    found = [tensor for arg in node.args if (tensor := _own_tensor(arg, child)) is not None]
    if len(found) != 1 or found[0].dim() > len(shape) + 1:
        return None
    ones = [1] * (found[0].dim() - len(shape))
    return found[0] if found[0].numel() == 1 or found[0].shape == (*ones, *shape) else None


def _own_tensor(node: object, child: Callable[[str], nn.Module]) -> Tensor | None:
    """Return a parameter or buffer that a node reads, in the shape that the forward gives it."""
    if not isinstance(node, fx.Node):
        return None
    if node.op == "get_attr":
        path, _, name = str(node.target).rpartition(".")
        found = getattr(child(path), name, None)
        return found if isinstance(found, Tensor) else None
    shaped = node.op.startswith("call_") and node.op != "call_module" and not node.kwargs
    if not shaped or function_name_of(node) not in ("reshape", "view", "unsqueeze") or len(node.all_input_nodes) != 1:
        return None
    source = _own_tensor(node.args[0], child)
    return None if source is None else getattr(source, function_name_of(node))(*node.args[1:])  # type: ignore[no-any-return]


def _added(node: fx.Node, value: fx.Node, child: Callable[[str], nn.Module]) -> fx.Node | None:
    """Find the other operand of an addition that overwrites nothing that is read elsewhere."""
    name = function_name_of(node)
    if node.op == "call_module" or name not in ("add", "iadd", "add_", "__add__") or node.kwargs or len(node.args) != 2:
        return None
    one, other = node.args
    if name in ("iadd", "add_") and one is not value and not _is_new(one, child):
        return None
    shortcut = other if one is value else one
    return shortcut if isinstance(shortcut, fx.Node) and shortcut is not value else None


def _is_new(node: object, child: Callable[[str], nn.Module]) -> bool:
    """Return whether a convolution or batch normalisation made a value, in memory of its own, and it is read only once."""
    if not isinstance(node, fx.Node) or node.op != "call_module" or len(node.users) != 1:
        return False
    kind = _plain(child(str(node.target)))
    return kind is not None and issubclass(kind, (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm))


def _activation(node: fx.Node, child: Callable[[str], nn.Module]) -> str | None:
    """Return the name of the activation that a node applies; None if it does something else."""
    if len(node.args) != 1:
        return None
    if node.op == "call_module":
        module = child(str(node.target))
        kind = _plain(module)
        if kind is nn.GELU:
            return _GELU.get(getattr(module, "approximate", ""))
        return None if kind is None or node.kwargs else _MODULES.get(kind)
    name = function_name_of(node)
    if name == "gelu" and set(node.kwargs) <= {"approximate"}:
        return _GELU.get(str(node.kwargs.get("approximate", "none")))
    return _FUNCTIONS.get(name) if set(node.kwargs) <= {"inplace"} else None


def _plain(module: nn.Module) -> type | None:
    """Return the class of a module whose call is its class's forward and nothing else; None if hooks see the call."""
    state = vars(module)
    tables = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return None if "forward" in state or any(state.get(table) for table in tables) else type(module)


def _can_wait(graph: fx.Graph, value: fx.Node, chain: list[fx.Node], shortcut: fx.Node | None) -> bool:
    """Return whether the block may run where the last node is: nothing in between overwrites what it reads."""
    nodes = list(graph.nodes)
    between = nodes[nodes.index(value) + 1 : nodes.index(chain[-1])]
    source = value.args[0]
    if isinstance(source, fx.Node) and any(may_change(node, source) for node in between):
        return False
    late = [node for node in between if shortcut is not None and node > next(n for n in chain if shortcut in n.args)]
    return shortcut is None or not any(may_change(node, shortcut) for node in late)


def may_change(node: fx.Node, value: fx.Node) -> bool:
    """Tell whether a node may overwrite a value: a module that reads it, or an operator in place on what shares its memory."""
    if node.op == "call_module" or calls_own_method(node):
        return value in node.all_input_nodes
    if node.op not in ("call_function", "call_method") or not node.args or not _overwrites(node):
        return False
    first = node.args[0]
    return isinstance(first, fx.Node) and bool(_alike(first) & _alike(value))


def _overwrites(node: fx.Node) -> bool:
    name = function_name_of(node)
    in_place = name.startswith("i") and name[1:] in ("add", "sub", "mul", "truediv", "and", "or", "xor", "floordiv")
    return (
        in_place
        or name == "setitem"
        or (name.endswith("_") and not name.endswith("__"))
        or bool(node.kwargs.get("inplace"))
    )


def _alike(node: fx.Node) -> set[fx.Node]:
    """Find a value and those that may share its memory: what it is made of without a module's call in between."""
    found = {node}
    todo = [node]
    while todo:
        current = todo.pop()
        if current.op in ("call_function", "call_method"):
            for source in current.all_input_nodes:
                if source not in found:
                    found.add(source)
                    todo.append(source)
    return found
