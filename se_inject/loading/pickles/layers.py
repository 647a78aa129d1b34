"""Check that the numbers of a layer out of a file fit its tensors, and that nothing is missing.

torch checks these when a layer is made. A file's layer was never made, and what runs it trusts its numbers: some operators
divide by them, or reserve memory by them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.pooling import _AdaptiveAvgPoolNd, _AdaptiveMaxPoolNd, _AvgPoolNd, _LPPoolNd, _MaxPoolNd

from se_inject.errors import LoadError, quoted

_LARGEST = 2**31
_MODES = ("nearest", "linear", "bilinear", "bicubic", "trilinear", "area", "nearest-exact")
_NONE = object()
Rule = Callable[[Any], bool]


def _is_whole(least: int, value: Any) -> bool:
    return type(value) is int and least <= value < _LARGEST


def _whole(least: int) -> Rule:
    return lambda value: _is_whole(least, value)


def _numbers(least: int, *, optional: bool = False) -> Rule:
    """Make the rule for a whole number, or a few; with ``optional`` each may be None."""

    def rule(value: Any) -> bool:
        parts = value if isinstance(value, tuple | list) else (value,)
        return 0 < len(parts) <= 8 and all((optional and part is None) or _is_whole(least, part) for part in parts)

    return rule


def _real(least: float = -math.inf, most: float = math.inf) -> Rule:
    return lambda value: type(value) in (int, float) and least <= value <= most


def _or_none(rule: Rule) -> Rule:
    return lambda value: value is None or rule(value)


def _one_of(*values: Any) -> Rule:
    return lambda value: type(value) in (str, bool) and value in values


def _is_flag(value: Any) -> bool:
    return type(value) is bool


def _padding(value: Any) -> bool:
    return value in ("same", "valid") if isinstance(value, str) else _numbers(0)(value)


def _factor(value: Any) -> bool:
    parts = value if isinstance(value, tuple | list) else (value,)
    return 0 < len(parts) <= 3 and all(type(part) in (int, float) and 0 < part < 10_000 for part in parts)


def _shape(value: Any) -> bool:
    return isinstance(value, tuple | list) and 0 < len(value) <= 8 and all(_is_whole(1, part) for part in value)


_RULES: dict[type, dict[str, Rule]] = {
    _ConvNd: {
        "in_channels": _whole(1), "out_channels": _whole(1), "kernel_size": _numbers(1), "stride": _numbers(1),
        "padding": _padding, "dilation": _numbers(1), "output_padding": _numbers(0), "groups": _whole(1),
        "padding_mode": _one_of("zeros", "reflect", "replicate", "circular"), "transposed": _is_flag,
    },
    _NormBase: {
        "num_features": _whole(1), "eps": _real(0, 1e6), "momentum": _or_none(_real()), "affine": _is_flag,
        "track_running_stats": _is_flag,
    },
    nn.Linear: {"in_features": _whole(1), "out_features": _whole(0)},
    nn.GroupNorm: {"num_groups": _whole(1), "num_channels": _whole(1), "eps": _real(0, 1e6)},
    nn.LayerNorm: {"normalized_shape": _shape, "eps": _real(0, 1e6)},
    nn.RMSNorm: {"normalized_shape": _shape, "eps": _or_none(_real(0, 1e6))},
    nn.MultiheadAttention: {
        "embed_dim": _whole(1), "num_heads": _whole(1), "head_dim": _whole(1), "dropout": _real(0, 1), "batch_first": _is_flag,
    },
    nn.TransformerEncoderLayer: {"norm_first": _is_flag},
    nn.RNNBase: {
        "input_size": _whole(1), "hidden_size": _whole(1), "num_layers": _whole(1), "bias": _is_flag, "batch_first": _is_flag,
        "dropout": _real(0, 1), "bidirectional": _is_flag, "mode": _one_of("LSTM", "GRU", "RNN_TANH", "RNN_RELU"),
    },
    nn.Embedding: {"num_embeddings": _whole(1), "embedding_dim": _whole(1), "padding_idx": _or_none(_whole(-_LARGEST))},
    _MaxPoolNd: {
        "kernel_size": _numbers(1), "stride": _or_none(_numbers(1)), "padding": _numbers(0), "dilation": _numbers(1),
        "return_indices": _is_flag, "ceil_mode": _is_flag,
    },
    _AvgPoolNd: {"kernel_size": _numbers(1), "stride": _or_none(_numbers(1)), "padding": _numbers(0)},
    _LPPoolNd: {"kernel_size": _numbers(1), "stride": _or_none(_numbers(1)), "norm_type": _real()},
    _AdaptiveAvgPoolNd: {"output_size": _numbers(1, optional=True)},
    _AdaptiveMaxPoolNd: {"output_size": _numbers(1, optional=True), "return_indices": _is_flag},
    nn.Upsample: {"size": _or_none(_numbers(1)), "scale_factor": _or_none(_factor), "mode": _one_of(*_MODES)},
    nn.PixelShuffle: {"upscale_factor": _whole(1)},
    nn.PixelUnshuffle: {"downscale_factor": _whole(1)},
    nn.ChannelShuffle: {"groups": _whole(1)},
    nn.LocalResponseNorm: {"size": _whole(1), "alpha": _real(), "beta": _real(), "k": _real()},
    _DropoutNd: {"p": _real(0, 1), "inplace": _is_flag},
    nn.Softmax: {"dim": _or_none(_whole(-64))},
    nn.LogSoftmax: {"dim": _or_none(_whole(-64))},
    nn.Flatten: {"start_dim": _whole(-64), "end_dim": _whole(-64)},
    nn.Unfold: {"kernel_size": _numbers(1), "dilation": _numbers(1), "padding": _numbers(0), "stride": _numbers(1)},
    nn.Fold: {
        "output_size": _numbers(1), "kernel_size": _numbers(1), "dilation": _numbers(1), "padding": _numbers(0),
        "stride": _numbers(1),
    },
    nn.LeakyReLU: {"negative_slope": _real()},
    nn.ELU: {"alpha": _real()},
    nn.Hardtanh: {"min_val": _real(), "max_val": _real()},
    nn.Softplus: {"beta": _real(), "threshold": _real()},
    nn.GELU: {"approximate": _one_of("none", "tanh")},
    **{kind: {"inplace": _is_flag} for kind in (nn.ReLU, nn.SiLU, nn.Hardswish, nn.Hardsigmoid, nn.Mish, nn.SELU)},
}  # fmt: skip
"""What the attributes of a layer may be; of a class that inherits from one here, too."""


def layer_fault(module: nn.Module) -> str | None:
    """Describe what is wrong with a layer of torch.nn; None if nothing is, or if it is not one."""
    if fault := _fault_of_any(module):
        return fault
    for kind, rules in _RULES.items():
        if isinstance(module, kind):
            for name, fits in rules.items():
                value = getattr(module, name, _NONE)
                if value is _NONE:
                    return f"it has no `{name}`"
                if not fits(value):
                    return f"its `{name}` is {quoted(value)}"
    for kind, fault_of in _FITTING.items():
        if isinstance(module, kind) and (fault := fault_of(module)):
            return fault
    return None


def check_layer(module: nn.Module) -> None:
    """Look whether a module is one that can run.

    Raises:
        LoadError: its numbers don't fit its tensors, or it lacks something.
    """
    if fault := layer_fault(module):
        raise LoadError(f"a {type(module).__name__} in this file can't be right", seen=fault)


_OF_EVERY_MODULE = frozenset(nn.Module().__dict__) - {"training", "_is_full_backward_hook"}
"""What torch reads of any module that is called or written; ``__setstate__`` adds what older versions didn't have."""


_COPIED = frozenset(
    kind
    for kind in vars(torch).values()
    if isinstance(kind, torch.dtype)
    and re.fullmatch(r"(b?float|complex|u?int)(8|16|32|64|128)(_e\w+)?|bool", str(kind).removeprefix("torch."))
)
"""The types of numbers that torch copies. The others are for a few operators alone: quantised ones, halves of bytes, bits."""


def type_fault(value: Any) -> str | None:
    """Describe what is wrong with the type of a tensor's numbers; None if nothing is, or if it is none."""
    if isinstance(value, Tensor) and value.dtype not in _COPIED:
        return f"{str(value.dtype).removeprefix('torch.')}, numbers that torch can't even copy"
    return None


def _fault_of_any(module: nn.Module) -> str | None:
    state = vars(module)
    if not isinstance(getattr(type(module), "training", None), property) and type(state.get("training")) is not bool:
        return "it has no `training`, or one that is neither on nor off"
    if missing := _OF_EVERY_MODULE - state.keys():
        return f"it has no `{min(missing)}`"
    if not isinstance(state.get("_non_persistent_buffers_set"), set):
        return "it has no `_non_persistent_buffers_set`"
    return next(
        (
            f"its `{name}` is {quoted(value)}"
            for name, value in state.items()
            if _is_hooks(name) and not isinstance(value, dict)
        ),
        None,
    )


def _is_hooks(name: str) -> bool:
    return name.endswith("_hooks") and name.startswith("_")


def _tensor_fault(module: nn.Module, name: str, shape: tuple[int, ...], *, needed: bool = False) -> str | None:
    """Describe what is wrong with a parameter or buffer of this expected shape; one that was reparametrised is elsewhere."""
    tables = (module._parameters, module._buffers, vars(module))
    holders = [table for table in tables if name in table]
    if not holders:
        is_elsewhere = any(f"{name}{ending}" in table for table in tables for ending in _REPARAMETRISED)
        return None if is_elsewhere else f"it has no `{name}`"
    value = holders[0][name]
    if value is None:
        return f"it has no `{name}`" if needed else None
    if not isinstance(value, Tensor):
        return f"its `{name}` is {quoted(value)}"
    if tuple(value.shape) != shape:
        return f"its `{name}` has the shape {tuple(value.shape)}, and {shape} would fit its numbers"
    return f"its `{name}` is not on a device" if value.layout is not torch.strided else None


_REPARAMETRISED = ("_g", "_v", "_orig", "_mask")
"""Endings of what weight_norm, spectral_norm and pruning keep in place of a tensor."""


def _first(*faults: str | None) -> str | None:
    return next((fault for fault in faults if fault), None)


def _of_conv(module: Any) -> str | None:
    rank = len(module.kernel_size) if isinstance(module.kernel_size, tuple | list) else 0
    if rank not in (1, 2, 3) or any(
        isinstance(value, tuple | list) and len(value) != rank
        for value in (module.stride, module.padding, module.dilation)
    ):
        return "its kernel size, stride, padding and dilation are of different ranks"
    if module.in_channels % module.groups or module.out_channels % module.groups:
        return f"its channels can't be divided by its {module.groups} groups"
    ins, outs = module.in_channels, module.out_channels
    inner = (ins, outs // module.groups) if isinstance(module, _ConvTransposeNd) else (outs, ins // module.groups)
    return _first(
        _tensor_fault(module, "weight", (*inner, *module.kernel_size), needed=True),
        _tensor_fault(module, "bias", (outs,)),
    )


def _of_norm(module: Any) -> str | None:
    names = ("weight", "bias", "running_mean", "running_var")
    return _first(*(_tensor_fault(module, name, (module.num_features,)) for name in names))


def _of_linear(module: Any) -> str | None:
    weight = _tensor_fault(module, "weight", (module.out_features, module.in_features), needed=True)
    return _first(weight, _tensor_fault(module, "bias", (module.out_features,)))


def _of_group_norm(module: Any) -> str | None:
    if module.num_channels % module.num_groups:
        return f"its {module.num_channels} channels can't be divided by its {module.num_groups} groups"
    return _first(*(_tensor_fault(module, name, (module.num_channels,)) for name in ("weight", "bias")))


def _of_layer_norm(module: Any) -> str | None:
    return _first(*(_tensor_fault(module, name, tuple(module.normalized_shape)) for name in ("weight", "bias")))


def _of_embedding(module: Any) -> str | None:
    if module.padding_idx is not None and not -module.num_embeddings <= module.padding_idx < module.num_embeddings:
        return f"its `padding_idx` is {module.padding_idx}"
    return _tensor_fault(module, "weight", (module.num_embeddings, module.embedding_dim), needed=True)


def _of_attention(module: Any) -> str | None:
    width = module.embed_dim
    if module.num_heads * module.head_dim != width:
        return f"its {module.num_heads} heads of {module.head_dim} don't make up its {width} channels"
    if not isinstance(module._modules.get("out_proj"), nn.Linear) or module.out_proj.in_features != width:
        return "it has no `out_proj` of its width"
    return _first(
        _tensor_fault(module, "in_proj_weight", (3 * width, width)), _tensor_fault(module, "in_proj_bias", (3 * width,))
    )


def _of_encoder_layer(module: Any) -> str | None:
    attention = module._modules.get("self_attn")
    if not isinstance(attention, nn.MultiheadAttention):
        return "it has no `self_attn`"
    width = attention.embed_dim
    linears = [module._modules.get(name) for name in ("linear1", "linear2")]
    norms = [module._modules.get(name) for name in ("norm1", "norm2")]
    if not all(isinstance(part, nn.Linear) for part in linears) or not all(
        isinstance(part, nn.LayerNorm) for part in norms
    ):
        return "it lacks a layer"
    if (linears[0].in_features, linears[1].out_features) != (width, width):  # type: ignore[union-attr]
        return f"its layers are not of its attention's {width} channels"
    return next(
        (
            f"a norm of it has the shape {norm.normalized_shape}"
            for norm in norms
            if tuple(norm.normalized_shape) != (width,)
        ),
        None,
    )  # type: ignore[union-attr]


def _of_recurrent(module: Any) -> str | None:
    kinds: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
        "LSTM": (nn.LSTM, {"proj_size": getattr(module, "proj_size", 0)}),
        "GRU": (nn.GRU, {}),
        "RNN_TANH": (nn.RNN, {"nonlinearity": "tanh"}),
        "RNN_RELU": (nn.RNN, {"nonlinearity": "relu"}),
    }
    kind, options = kinds[module.mode]
    tensors = sum(tensor.numel() for tensor in module._parameters.values() if isinstance(tensor, Tensor))
    layers, hidden = int(module.num_layers), int(module.hidden_size)
    if not issubclass(type(module), kind) or layers * hidden > max(tensors, 1):
        return f"its `mode` or its {layers} layers don't fit it"
    names = ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional")
    try:
        like = kind(**{name: getattr(module, name) for name in names}, **options, device="meta")
    except (TypeError, ValueError) as error:
        return str(error)
    shapes = {name: tuple(parameter.shape) for name, parameter in like.named_parameters()}
    own = {name: tuple(value.shape) for name, value in module._parameters.items() if isinstance(value, Tensor)}
    if own.keys() <= shapes.keys() and any(own[name] != shapes[name] for name in own):
        return "its weights are of other shapes than its numbers say"
    return None


_FITTING: dict[type, Callable[[Any], str | None]] = {
    _ConvNd: _of_conv,
    _NormBase: _of_norm,
    nn.Linear: _of_linear,
    nn.GroupNorm: _of_group_norm,
    nn.LayerNorm: _of_layer_norm,
    nn.RMSNorm: _of_layer_norm,
    nn.Embedding: _of_embedding,
    nn.Hardtanh: lambda module: "its `min_val` is above its `max_val`" if module.min_val > module.max_val else None,
    nn.MultiheadAttention: _of_attention,
    nn.TransformerEncoderLayer: _of_encoder_layer,
    nn.RNNBase: _of_recurrent,
}
