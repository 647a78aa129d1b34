"""Fold norms that can't be folded by exchanging modules: functions, and modules that are called in several places.

The forward is edited: convolution and norm become one new convolution of the owner's for each place.
"""

from __future__ import annotations

import contextlib
import inspect
import json
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from se_inject.errors import InjectError
from se_inject.forwards import (
    bodies_in,
    body_of,
    generated_class,
    graph_of,
    in_modes,
    is_at_output,
    lines_of,
    original_class,
    with_bodies,
)
from se_inject.inference.norms import affine_of, is_convolution, is_plain_norm, scale_outputs_
from se_inject.surgery import edited_bodies, set_class
from se_inject.tracing import Trace, function_name_of

_LAYERS: dict[str, Any] = {"conv1d": nn.Conv1d, "conv2d": nn.Conv2d, "conv3d": nn.Conv3d}
_BATCH_NORM = inspect.signature(F.batch_norm)
_CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")


def fold_in_forwards_(model: nn.Module, trace: Trace) -> int:
    """Fold convolution and norm within forwards, in the model itself; its forwards become those of eval mode alone.

    Args:
        model: in eval mode.
        trace: an observed call of it, from before any norm was folded.

    Returns:
        how many norms were folded.
    """
    folded = 0
    for path, observed in trace.graphs.items():
        owner = model.get_submodule(path)
        if isinstance(owner, nn.Sequential) or not any(map(_may_be_norm, observed.graph.nodes)):
            continue
        body = body_of(owner)
        with contextlib.suppress(InjectError):
            if body is None:
                lines = edited_bodies(trace, path, [], [], training=False).bodies["forward"]
                body = {"steps": [], "was_none": {}, "lines": lines}
            for name in bodies_in(body):
                if not is_at_output(body["lines"]):
                    done, body = _fold_in_(owner, body, name)
                    folded += done
    return folded


def _may_be_norm(node: fx.Node) -> bool:
    return node.op == "call_module" or (node.op == "call_function" and function_name_of(node) == "batch_norm")


@torch.no_grad()
def _fold_in_(owner: nn.Module, body: dict[str, Any], name: str) -> tuple[int, dict[str, Any]]:
    """Fold in the forward or the method of this name; return how many norms, and the data with its new lines."""
    bodies = bodies_in(body)
    expected, _, evaluated = in_modes(bodies[name])
    graph = graph_of(evaluated)
    new: dict[str, nn.Module] = {}
    for node in list(graph.nodes):
        source = node.args[0] if node.op.startswith("call") and node.args else None
        if not isinstance(source, fx.Node) or len(source.users) != 1:
            continue
        norm = _norm(node, owner)
        convolution = _convolution(source, owner) if norm is not None else None
        if norm is None or convolution is None:
            continue
        scale_outputs_(convolution, *norm)
        free = next(
            free
            for number in range(len(graph.nodes) + len(new))
            if not hasattr(owner, free := f"folded_{number}") and free not in new
        )
        new[free] = convolution
        with graph.inserting_before(node):
            call = graph.call_module(free, (source.args[0],))
        node.replace_all_uses_with(call)
        graph.erase_node(node)
        graph.erase_node(source)
    if new:
        body = with_bodies(body, {**bodies, name: [*expected, *lines_of(graph)]})
        kind = generated_class(original_class(owner), json.dumps(body))
        for free, module in new.items():
            setattr(owner, free, module.eval())
        set_class(owner, kind)
    return len(new), body


def _norm(node: fx.Node, owner: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Scale and shift of a batch normalisation by fixed statistics, as a module or as a function."""
    if node.op == "call_module":
        module = owner.get_submodule(str(node.target))
        return affine_of(module) if is_plain_norm(module) and len(node.args) == 1 and not node.kwargs else None
    if node.target is not F.batch_norm:
        return None
    given = _BATCH_NORM.bind(*node.args, **node.kwargs)
    given.apply_defaults()
    values = {name: _constant(value, owner) for name, value in given.arguments.items() if name != "input"}
    if values["training"] is not False or not isinstance(values["running_mean"], Tensor) or _is_unknown(values):
        return None
    scale = (values["running_var"].double() + values["eps"]).rsqrt()
    scale = scale if values["weight"] is None else scale * values["weight"].double()
    shift = -values["running_mean"].double() * scale
    return scale, shift if values["bias"] is None else shift + values["bias"].double()


class _Unknown:
    pass


_UNKNOWN = _Unknown()


def _is_unknown(values: dict[str, Any]) -> bool:
    return any(value is _UNKNOWN for value in values.values())


def _constant(value: Any, owner: nn.Module) -> Any:
    """Return an argument's value if it is the same in every call: a number, or a tensor of the owner's."""
    if not isinstance(value, fx.Node):
        return value
    if value.op != "get_attr":
        return _UNKNOWN
    found: Any = owner
    for part in str(value.target).split("."):
        found = getattr(found, part)
    return found


def _convolution(node: fx.Node, owner: nn.Module) -> nn.Module | None:
    """Make a convolution that does what a node does; its parameters are not the owner's."""
    if node.op == "call_module":
        module = owner.get_submodule(str(node.target))
        if not is_convolution(module) or len(node.args) != 1 or node.kwargs:
            return None
        return _twin(module)
    kind = _LAYERS.get(function_name_of(node)) if node.op == "call_function" else None
    if kind is None or len(node.args) > len(_CONVOLUTION):
        return None
    given = {**dict(zip(_CONVOLUTION, node.args, strict=False)), **node.kwargs}
    values = {name: _constant(value, owner) for name, value in given.items() if name != "input"}
    weight = values.pop("weight", _UNKNOWN)
    bias = values.pop("bias", None)
    if not isinstance(weight, Tensor) or _is_unknown(values) or bias is _UNKNOWN:
        return None
    channels = weight.shape[1] * values.get("groups", 1)
    layer = kind(channels, weight.shape[0], weight.shape[2:], bias=bias is not None, device="meta", **values)
    layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return layer  # type: ignore[no-any-return]


def _twin(module: Any) -> nn.Module:
    """Make another module of the same convolution, which shares its parameters for now."""
    kind: Any = type(module)
    twin = kind.__new__(kind)
    twin.__dict__.update(
        {name: dict(value) if isinstance(value, dict) else value for name, value in vars(module).items()}
    )
    return twin  # type: ignore[no-any-return]


def drop_pass_throughs_(model: nn.Module) -> None:
    """Put identities in the place of what does nothing in eval mode: dropout, stochastic depth."""
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child is not None and _does_nothing(child):
                module._modules[name] = nn.Identity()


def _does_nothing(module: nn.Module) -> bool:
    kind = type(module)
    known = kind.__module__ == "torch.nn.modules.dropout" or (kind.__module__, kind.__name__) in (
        ("torchvision.ops.stochastic_depth", "StochasticDepth"),
        ("timm.layers.drop", "DropPath"),
    )
    return known and not module._forward_hooks
