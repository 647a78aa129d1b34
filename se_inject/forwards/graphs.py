"""Convert the fx graph of one module into the lines of a stored forward, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from se_inject.errors import LoadError
from se_inject.forwards.constants import decoded, encoded
from se_inject.forwards.lines import names_in
from se_inject.forwards.own_methods import OwnMethod, calls_own_method
from se_inject.forwards.python import is_name
from se_inject.forwards.vocabulary import checked_path, function_name, function_named


def lines_of(graph: fx.Graph) -> list[Any]:
    """Return a graph as lines; parameters keep their names, nodes too where a line may have them.

    Raises:
        SurgeryError: it holds something that can't be written down.
    """
    names = _names(graph)
    lines: list[Any] = []
    for node in graph.nodes:
        target = [names[node]] if node.users else []
        args = [_data(value, names) for value in node.args]
        kwargs = {key: _data(value, names) for key, value in node.kwargs.items()}
        if node.op == "output":
            lines.append(["return", args[0]])
        elif node.op == "get_attr":
            lines += [["read", target, str(node.target)]] * bool(target)
        elif node.op == "call_module" and "door" in node.meta:
            lines.append(["own", target, f"{node.target}.{node.meta['door']}", args, kwargs])
        elif node.op == "call_module":
            lines.append(["call", target, str(node.target), args, kwargs])
        elif node.op == "call_method":
            lines.append(["method", target, str(node.target), args, kwargs])
        elif calls_own_method(node):
            lines.append(["own", target, node.target.__name__, args, kwargs])  # type: ignore[union-attr]
        elif node.op == "call_function" and node.target is getattr:
            lines.append(["attribute", target, *args])
        elif node.op == "call_function":
            lines.append(["set", target, function_name(node.target), args, kwargs])
    return lines


def graph_of(lines: list[Any]) -> fx.Graph:
    """Return the graph of lines that ``lines_of`` gave; parameters come in the order in which they are read.

    Raises:
        LoadError: there are other kinds of lines among them, or they name what they must not.
    """
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    set_by_lines = {name for line in lines if line[0] != "return" for name in line[1]}
    for name in dict.fromkeys(name for line in lines for name in names_in(line)):
        if name not in set_by_lines:
            nodes[name] = graph.create_node("placeholder", name, name=name)
    for line in lines:
        kind, names, *parts = line
        if kind == "return":
            graph.output(decoded(names, nodes))
            continue
        op, target, args, kwargs = _node(kind, parts)
        node = graph.create_node(
            op,
            target,
            tuple(decoded(value, nodes) for value in args),
            {key: decoded(value, nodes) for key, value in kwargs.items()},
            name=names[0] if names else None,
        )
        nodes.update(dict.fromkeys(names, node))
    return graph


def _node(kind: str, parts: list[Any]) -> tuple[str, Any, list[Any], dict[str, Any]]:
    """Return kind, target and arguments of the node for a line."""
    if kind == "read":
        return "get_attr", checked_path(parts[0]), [], {}
    if kind == "attribute":
        return "call_function", getattr, parts, {}
    target, args, kwargs = parts
    if kind == "own":
        return "call_function", OwnMethod(target), args, kwargs
    if kind == "set":
        return "call_function", function_named(target), args, kwargs
    if kind in ("call", "method"):
        return f"call_{'module' if kind == 'call' else 'method'}", target, args, kwargs
    raise LoadError(f"a forward in this file has a line of kind `{kind}`, which is in no graph")


def expectations(constants: Mapping[str, Any], settings: Mapping[str, Any]) -> list[Any]:
    """Return the lines that check, at each call, the arguments and settings that a forward was observed with.

    Args:
        constants: the arguments that were plain values, by name.
        settings: the plain attributes of the module that its forward read.

    Raises:
        SurgeryError: one of them can't be written down.
    """
    arguments = [["expect", "argument", name, encoded(value)] for name, value in constants.items()]
    return arguments + [["expect", "setting", name, encoded(value)] for name, value in settings.items()]


def _names(graph: fx.Graph) -> dict[fx.Node, str]:
    """Return a name for every node, no two the same."""
    names = {node: str(node.target).lstrip("*") for node in graph.nodes if node.op == "placeholder"}
    taken = set(names.values())
    for node in graph.nodes:
        if node not in names:
            name = plain = node.name if is_name(node.name) else f"v{node.name.lstrip('_')}"
            count = 0
            while name in taken or not is_name(name):
                count += 1
                name = f"{plain if is_name(plain) else 'v'}_{count}"
            names[node] = name
            taken.add(name)
    return names


def _data(value: Any, names: dict[fx.Node, str]) -> Any:
    """Return a node's argument as plain data."""
    if isinstance(value, fx.Node):
        return {"node": names[value]}
    if isinstance(value, list):
        return [_data(item, names) for item in value]
    if type(value) is tuple or isinstance(value, torch.Size):
        return {"tuple": [_data(item, names) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[encoded(key), _data(item, names)] for key, item in value.items()]}
    if isinstance(value, slice):
        return {"slice": [_data(part, names) for part in (value.start, value.stop, value.step)]}
    return encoded(value)
