"""What the nodes of a one-level graph do, told by the operation, never by the names an author chose."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from se_inject.tracing import CONVOLUTIONS, Trace, function_name_of, holds_tensor, is_leaf

_FUNCTIONS = {
    **dict.fromkeys(CONVOLUTIONS, "conv"),
    **dict.fromkeys(
        ("batch_norm", "group_norm", "layer_norm", "instance_norm", "rms_norm", "local_response_norm"), "norm"
    ),
    **dict.fromkeys(
        (
            "relu", "relu_", "relu6", "relu6_", "silu_", "mish_", "hardswish_", "hardsigmoid_", "leaky_relu", "leaky_relu_", "prelu", "rrelu", "elu", "elu_", "selu", "selu_",
            "celu", "celu_", "gelu", "silu", "mish", "hardswish", "hardtanh", "hardtanh_", "hardsigmoid", "sigmoid",
            "sigmoid_", "tanh", "tanh_", "softplus", "softsign", "logsigmoid", "threshold", "threshold_", "clamp",
            "clamp_", "clamp_min", "clamp_min_",
        ),
        "act",
    ),
    **dict.fromkeys(
        (
            "dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout", "contiguous",
            "clone", "stochastic_depth", "alias", "identity", "detach",
        ),
        "pass",
    ),
    **dict.fromkeys(("add", "iadd", "add_"), "add"),
    **dict.fromkeys(("mul", "imul", "mul_", "multiply"), "mul"),
    **dict.fromkeys(("cat", "concat", "concatenate"), "cat"),
    **dict.fromkeys(
        (
            "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "boolean_dispatch",
            "lp_pool1d", "lp_pool2d", "lp_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d",
        ),
        "pool",
    ),
}  # fmt: skip

_MODULES: tuple[tuple[type | tuple[type, ...], str], ...] = (
    (nn.modules.conv._ConvNd, "conv"),
    ((nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm, nn.RMSNorm), "norm"),
    ((nn.Identity, nn.modules.dropout._DropoutNd), "pass"),
    ((nn.MultiheadAttention,), "other"),
    (
        (
            nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AvgPoolNd, nn.modules.pooling._LPPoolNd,
            nn.modules.pooling._AdaptiveAvgPoolNd, nn.modules.pooling._AdaptiveMaxPoolNd,
        ),
        "pool",
    ),
)  # fmt: skip


def operation(trace: Trace, owner: str, node: fx.Node) -> str:
    """One of conv, norm, act, pass, add, mul, cat, pool, module (one with a graph of its own) or other."""
    known: str | None = node.meta.get("operation")
    if known is None:
        known = node.meta["operation"] = _operation(trace, owner, node)
    return known


def _operation(trace: Trace, owner: str, node: fx.Node) -> str:
    if node.op == "call_module":
        module = trace.model.get_submodule(trace.child(owner, node.target))
        if not is_leaf(module):
            return "module"
        for kinds, name in _MODULES:
            if isinstance(module, kinds):
                return name
        return "act" if type(module).__module__ == "torch.nn.modules.activation" else "other"
    if node.op not in ("call_function", "call_method"):
        return "other"
    kind = _FUNCTIONS.get(function_name_of(node), "other")
    if kind in ("add", "mul") and sum(is_data(argument) for argument in node.args[:2]) < 1:
        return "other"
    return kind


def child_path(owner: str, target: str) -> str:
    """The absolute path of a module that a graph names relative to its owner."""
    return ".".join(part for part in (owner, target) if part)


def parent(path: str) -> str:
    """The path of the module that holds this one."""
    return path.rpartition(".")[0]


def prefixes(path: str) -> list[str]:
    """The paths of all modules that hold this one, the network's first, and its own."""
    parts = path.split(".") if path else []
    return [".".join(parts[:end]) for end in range(len(parts) + 1)]


def any_prefix(path: str, roots: set[str]) -> bool:
    """Whether a module is one of these or within one."""
    return any(prefix in roots for prefix in prefixes(path))


def is_data(argument: object) -> bool:
    """Whether an argument is a node whose value is a tensor made from the owner's inputs."""
    return isinstance(argument, fx.Node) and isinstance(argument.meta.get("val"), Tensor) and not is_constant(argument)


def is_constant(node: fx.Node) -> bool:
    """Whether a node's value depends on parameters and plain numbers only."""
    pending = [node]  # no recursion: a network may be a thousand modules in a row
    while pending:
        current = pending[-1]
        unknown = [source for source in current.all_input_nodes if "constant" not in source.meta]
        if current.op in ("get_attr", "placeholder") or "constant" in current.meta or not unknown:
            pending.pop()
            inputs = all(source.meta.get("constant") for source in current.all_input_nodes)
            current.meta["constant"] = current.op == "get_attr" or (current.op != "placeholder" and inputs)
        else:
            pending += unknown
    return bool(node.meta["constant"])


def passed_through(trace: Trace, owner: str, node: fx.Node) -> fx.Node | None:
    """The value this node hands on unchanged or scaled by constants (dropout, stochastic depth, layer scale).

    None if the node computes something.
    """
    kind = operation(trace, owner, node)
    data = [argument for argument in node.args if is_data(argument)]
    if len(data) != 1 or not isinstance(data[0], fx.Node) or data[0].meta["val"].shape != node.meta["val"].shape:
        return None
    if kind in ("pass", "mul"):
        return data[0]
    if kind == "module":
        path = trace.child(owner, node.target)
        inner = trace.graphs.get(path)
        if inner is None or isinstance(inner.module, nn.Sequential):
            return None
        result = returned(inner.graph)
        while result is not None and result.op != "placeholder":
            result = passed_through(trace, path, result)
        return data[0] if result is not None else None
    return None


def returned(graph: fx.Graph) -> fx.Node | None:
    """The one tensor this graph returns; None if it returns something else."""
    result = next(iter(reversed(graph.nodes))).args[0]
    return result if isinstance(result, fx.Node) and isinstance(result.meta.get("val"), Tensor) else None


def convolutions(node: fx.Node) -> int:
    """How many convolutions ran while this node's value was computed."""
    return int(node.meta.get("counts", (0, 0, 0))[0])


def means_the_same(graph: fx.Graph, training: fx.Graph, label: str) -> bool:
    """Whether a label is that of the same value in both modes: the graphs hold as many of its kind."""
    kind = label.partition("#")[0]
    counts = [sum(name.partition("#")[0] == kind for name in labels(each).values()) for each in (graph, training)]
    return counts[0] == counts[1]


def labels(graph: fx.Graph) -> dict[fx.Node, str]:
    """A readable name for every computed value, the same in eval and train: ``bn3``, ``relu``, ``relu#2``."""
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
    """Whether a node's value is a structure of tensors: a split, a list input."""
    value = node.meta.get("val")
    return isinstance(value, tuple | list | dict) and holds_tensor(value)


def slices_channels(node: fx.Node) -> bool:
    """Whether a node takes some of the channels of a value."""
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
    """The values that a slice is a part of, also by way of a split."""
    origins = set(node.all_input_nodes)
    for source in node.all_input_nodes:
        if function_name_of(source) in ("split", "split_with_sizes", "tensor_split", "chunk"):
            origins |= set(source.all_input_nodes)
    return origins


def joins_channels(node: fx.Node) -> bool:
    """Whether a concatenation is along dimension 1."""
    dim: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", node.kwargs.get("axis", 0))
    return isinstance(dim, int) and dim % int(node.meta["val"].dim()) == 1
