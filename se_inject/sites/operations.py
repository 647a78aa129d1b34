"""Answer questions about the nodes of one-level graphs and the paths of modules, from the tracer's notes on the nodes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from se_inject.tracing import Counts, Trace, function_name_of, holds_tensor, is_attention, is_data, kind

_NOTHING = Counts()


def path_of(node: fx.Node) -> str:
    """Return the path of the module that a ``call_module`` node calls."""
    return str(node.meta["path"])


def counts(node: fx.Node) -> Counts:
    """Return how many convolutions, gates and attention matrices a node's call contains."""
    found: Counts = node.meta.get("counts", _NOTHING)
    return found


def attends(node: fx.Node) -> bool:
    """Return whether a node computes attention between positions, or calls a module that does."""
    return counts(node).attention > 0 or is_attention(node)


def child_path(owner: str, target: str) -> str:
    """Return the absolute path of a module that a graph names relative to its owner."""
    return ".".join(part for part in (owner, target) if part)


def parent(path: str) -> str:
    """Return the path of the module that holds this one."""
    return path.rpartition(".")[0]


def prefixes(path: str) -> list[str]:
    """Return the paths of all modules that hold this one, the network's first, and its own."""
    parts = path.split(".") if path else []
    return [".".join(parts[:end]) for end in range(len(parts) + 1)]


def any_prefix(path: str, roots: set[str]) -> bool:
    """Return whether a module is one of these or within one."""
    return any(prefix in roots for prefix in prefixes(path))


def passed_through(trace: Trace, node: fx.Node) -> fx.Node | None:
    """Return the value that a node hands on unchanged or scaled by constants (dropout, stochastic depth, layer scale).

    None if the node computes something.
    """
    data = [argument for argument in node.args if is_data(argument)]
    if len(data) != 1 or not isinstance(data[0], fx.Node) or data[0].meta["val"].shape != node.meta["val"].shape:
        return None
    if kind(node) in ("pass", "mul"):
        return data[0]
    if kind(node) == "module":
        inner = trace.graphs.get(path_of(node))
        if inner is None or isinstance(inner.module, nn.Sequential):
            return None
        result = returned(inner.graph)
        while result is not None and result.op != "placeholder":
            result = passed_through(trace, result)
        return data[0] if result is not None else None
    return None


def returned(graph: fx.Graph) -> fx.Node | None:
    """Return the one tensor this graph returns; None if it returns something else."""
    result = next(iter(reversed(graph.nodes))).args[0]
    return result if isinstance(result, fx.Node) and isinstance(result.meta.get("val"), Tensor) else None


def convolves(node: fx.Node) -> bool:
    """Return whether a convolution ran while a node's value was computed."""
    return counts(node).convolutions > 0


def means_the_same(graph: fx.Graph, training: fx.Graph, label: str) -> bool:
    """Return whether a label names the same value in both modes: the graphs hold as many of its kind."""
    name = label.partition("#")[0]
    found = [sum(each.partition("#")[0] == name for each in labels(one).values()) for one in (graph, training)]
    return found[0] == found[1]


def labels(graph: fx.Graph) -> dict[fx.Node, str]:
    """Name every computed value readably, the same in eval and train: ``bn3``, ``relu``, ``relu#2``."""
    seen: dict[str, int] = {}
    result = {}
    for node in graph.nodes:
        if node.op in ("call_module", "call_function", "call_method", "placeholder"):
            name = function_name_of(node).lstrip("*")
            if isinstance(node.target, torch._ops.OpOverload):  # F.relu(x, inplace=True) is `relu` as well
                name = name.removesuffix("_")
            seen[name] = seen.get(name, 0) + 1
            result[node] = name if seen[name] == 1 else f"{name}#{seen[name]}"
    return result


def is_bundle(node: fx.Node) -> bool:
    """Return whether a node's value is a structure of tensors: a split, a list input."""
    value = node.meta.get("val")
    return isinstance(value, tuple | list | dict) and holds_tensor(value)


def slices_channels(node: fx.Node) -> bool:
    """Return whether a node takes some of the channels of a value."""
    if function_name_of(node) not in ("getitem", "narrow", "slice"):
        return False
    value = node.meta["val"]
    for source in node.all_input_nodes:
        whole = source.meta.get("val")
        if is_bundle(source):
            return True
        if isinstance(whole, Tensor) and whole.dim() == value.dim() and value.shape[1] < whole.shape[1]:
            return True
    return False


def slice_origins(node: fx.Node) -> set[fx.Node]:
    """Find the values that a slice is a part of, also through a split."""
    origins = set(node.all_input_nodes)
    for source in node.all_input_nodes:
        if function_name_of(source) in ("split", "split_with_sizes", "tensor_split", "chunk"):
            origins |= set(source.all_input_nodes)
    return origins


def joins_channels(node: fx.Node) -> bool:
    """Return whether a concatenation is along dimension 1."""
    dim: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", node.kwargs.get("axis", 0))
    return isinstance(dim, int) and dim % int(node.meta["val"].dim()) == 1
