"""Fold batch normalisation into the weights of the convolution in front of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from se_inject.forwards import generated_class, made_from, original_class
from se_inject.tracing import Trace

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


class Uses:
    """Where each module of a network is called, as one observed call tells it."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.places: dict[str, list[tuple[str, fx.Node]]] = {}
        for path, owner in trace.graphs.items():
            for node in owner.graph.nodes:
                if node.op == "call_module":
                    self.places.setdefault(trace.child(path, node.target), []).append((path, node))

    def only(self, path: str) -> bool:
        """Return whether a module is called in one place alone, as often as that place is run."""
        places = self.places.get(path, [])
        owner_calls = max(1, self.trace.calls.get(places[0][0], 1)) if places else 0
        return len(places) == 1 and self.trace.calls.get(path) == owner_calls


@torch.no_grad()
def fold_norms_(model: nn.Module, trace: Trace) -> tuple[int, int]:
    """Fold every batch normalisation that directly follows a convolution into it, in the model itself.

    In the norm's place stays an identity, or the activation that it also applied. A convolution or norm that is called in
    several places keeps its weights, and so does one with hooks or of an unknown class.

    Args:
        model: in eval mode.
        trace: an observed call of it.

    Returns:
        how many norms were folded, and how many are left.
    """
    uses = Uses(trace)
    folded = 0
    for path, places in uses.places.items():
        norm = model.get_submodule(path)
        if not is_norm(norm) or not uses.only(path):
            continue
        owner, node = places[0]
        source = node.args[0] if len(node.args) == 1 and not node.kwargs else None
        if not isinstance(source, fx.Node) or source.op != "call_module" or len(source.users) != 1:
            continue
        before = trace.child(owner, source.target)
        convolution = model.get_submodule(before)
        if not uses.only(before) or not is_convolution(convolution):
            continue
        scale, shift = affine_of(norm)
        scale_outputs_(convolution, scale, shift)
        _replace(model, norm, _what_is_left(norm))
        folded += 1
    left = sum(is_norm(module) for module in model.modules())
    return folded, left


def is_convolution(module: Any) -> bool:
    """Return whether a module is a convolution of torch's whose outputs can be scaled through its weights."""
    if type(module) not in _CONVOLUTIONS or any(vars(module).get(table) for table in _HOOKS):
        return False
    return "forward" not in vars(module) and not (module.transposed and module.groups > 1)


def is_plain_norm(module: nn.Module) -> bool:
    """Return whether a module is a batch normalisation by fixed statistics and nothing else."""
    return is_norm(module) and type(module) in _NORMS


def is_norm(module: nn.Module) -> bool:
    """Return whether a module is a batch normalisation by fixed statistics, perhaps with an activation or a block behind it."""
    kind = original_class(module)
    known = kind in _NORMS or _is_norm_of_somebody(kind)
    if not known or any(vars(module).get(table) for table in _HOOKS) or "forward" in vars(module):
        return False
    return isinstance(getattr(module, "running_mean", None), Tensor)


def _is_norm_of_somebody(kind: Any) -> bool:
    """Return whether a module is torchvision's norm with fixed statistics, or timm's with an activation."""
    return (kind.__module__, kind.__name__) in (
        ("torchvision.ops.misc", "FrozenBatchNorm2d"),
        ("timm.layers.norm_act", "BatchNormAct2d"),
        ("timm.layers.norm_act", "FrozenBatchNormAct2d"),
    )


def affine_of(norm: Any) -> tuple[Tensor, Tensor]:
    """Find scale and shift of a norm in eval mode, in float64."""
    mean, variance = norm.running_mean.double(), norm.running_var.double()
    scale = (variance + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -mean * scale
    return scale, shift if norm.bias is None else shift + norm.bias.double()


def scale_outputs_(convolution: Any, scale: Tensor, shift: Tensor | None = None) -> None:
    """Let a convolution return its outputs times ``scale`` plus ``shift``, both (C,). Its parameters are new ones."""
    weight, bias = convolution.weight, convolution.bias
    shape = [1] * weight.dim()
    shape[1 if convolution.transposed else 0] = -1
    scaled = (weight.double() * scale.reshape(shape)).to(weight.dtype)
    kept = weight.is_contiguous(memory_format=torch.channels_last) if weight.dim() == 4 else False
    scaled = scaled.contiguous(memory_format=torch.channels_last) if kept else scaled
    convolution.weight = nn.Parameter(scaled, requires_grad=False)
    total = None if bias is None else bias.double() * scale
    if shift is not None:
        total = shift if total is None else total + shift
    if total is not None:
        convolution.bias = nn.Parameter(total.to(weight.dtype), requires_grad=False)


def _what_is_left(norm: Any) -> nn.Module:
    """Return the module that replaces a folded norm: an identity, its activation, or its gate."""
    left: nn.Module = nn.Identity()
    if hasattr(norm, "act") and isinstance(norm.act, nn.Module):
        left = nn.Sequential(getattr(norm, "drop", nn.Identity()), norm.act)
    _, *body = made_from(type(norm))
    if body:  # a block gates what it returns
        names = [name for name in norm._modules if name not in ("act", "drop")]
        for name in names:
            setattr(left, name, norm._modules[name])
        kind: Any = type(left)
        left.__class__ = generated_class(kind, *body)
    return left.eval()


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put a module in another's place, under all its names."""
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child is old:
                module._modules[name] = new
