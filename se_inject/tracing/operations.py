"""Classify the nodes of one-level graphs by what they compute, never by the names an author chose.

The tracer writes it on every node when it makes it, as ``node.meta["operation"]``.
"""

from __future__ import annotations

from torch import Tensor, fx, nn

from se_inject.tracing.foreign import leaf_kind
from se_inject.tracing.names import function_name_of
from se_inject.tracing.nodes import CONVOLUTIONS

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


def kind(node: fx.Node) -> str:
    """Return which operation a node is.

    One of conv, norm, act, pass, add, mul, cat, pool, module (one with a graph of its own) or other.
    """
    return str(node.meta.get("operation", "other"))


def operation_of(node: fx.Node, module: nn.Module | None = None) -> str:
    """Work out which operation a node is, from its function or from the module that it calls."""
    if module is not None:
        return _operation_of_module(module)
    if node.op not in ("call_function", "call_method"):
        return "other"
    found = _FUNCTIONS.get(function_name_of(node), "other")
    return "other" if found in ("add", "mul") and not any(map(is_data, node.args[:2])) else found


def _operation_of_module(module: nn.Module) -> str:
    if not is_leaf(module):
        return "module"
    for classes, name in _MODULES:
        if isinstance(module, classes):
            return name
    return "act" if type(module).__module__ == "torch.nn.modules.activation" else "other"


def is_leaf(module: nn.Module) -> bool:
    """Return whether a module's forward is torch's own, ``nn.Sequential``'s apart: its operation is known without tracing."""
    if leaf_kind(type(module)) is not None:
        return True
    forward = type(module).forward
    if forward is nn.Module.forward and not type(module).__module__.startswith("torch."):
        return False  # it has other methods that are called
    return (
        (getattr(forward, "__module__", None) or "").startswith("torch.")
        and forward is not nn.Sequential.forward
        and not isinstance(module, fx.GraphModule)
    )


def is_data(argument: object) -> bool:
    """Return whether an argument is a node whose value is a tensor made from the owner's inputs."""
    return isinstance(argument, fx.Node) and isinstance(argument.meta.get("val"), Tensor) and not is_constant(argument)


def is_constant(node: fx.Node) -> bool:
    """Return whether a node's value depends on parameters and plain numbers only."""
    known: bool | None = node.meta.get("constant")
    if known is not None:
        return known
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
