"""Recognise layers of torch.nn in a program: a convolution alone is an ``nn.Conv2d``, a chain a ``Sequential``."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from se_inject.forwards import FixedBatchNorm, decoded, function_called, program_module


def assembled(
    name: str, home: str, inputs: list[Any], lines: list[Any], tensors: Mapping[str, Tensor],
    children: Mapping[str, nn.Module], example: Any = None,
) -> nn.Module:  # fmt: skip
    """Build the module of a program, with its tensors and children: one of torch.nn if there is one that does the same."""
    module = None
    if not children:
        module = layer_of(inputs, lines, tensors)
    elif not tensors and (name == "Sequential" or _are_indices(children)):
        module = sequential_of(inputs, lines, children)
    return module or _filled(program_module(name, home, inputs, lines, example), tensors, children)


def container(name: str, tensors: Mapping[str, Tensor], children: Mapping[str, nn.Module]) -> nn.Module:
    """Build a module that is never called itself."""
    if name == "ModuleDict":
        return nn.ModuleDict(children)
    if children and _are_indices(children) and not tensors:
        return nn.ModuleList(children.values())
    return _filled(nn.Module(), tensors, children)


def _filled(module: nn.Module, tensors: Mapping[str, Tensor], children: Mapping[str, nn.Module]) -> nn.Module:
    """Build an empty module with these parameters, buffers and children."""
    for key, child in children.items():
        module.register_module(key, child)
    for key, tensor in tensors.items():
        if isinstance(tensor, nn.Parameter):
            module.register_parameter(key, tensor)
        else:
            module.register_buffer(key, tensor)
    return module


def _are_indices(names: Iterable[str]) -> bool:
    """Return whether these are the names of the modules in a list."""
    return all(name == str(index) for index, name in enumerate(names))


def layer_of(inputs: list[Any], lines: list[Any], tensors: Mapping[str, Tensor]) -> nn.Module | None:
    """Build the layer that does what these lines do, with these tensors; None if there is none.

    Args:
        inputs: the program's.
        lines: the program's.
        tensors: parameters and buffers of the module itself, by name.
    """
    reads = {line[1][0]: line[2] for line in lines if line[0] == "read"}
    rest = [line for line in lines if line[0] != "read"]
    if len(inputs) != 1 or not rest or rest[-1][0] != "return":
        return None
    if rest[0] == ["return", {"node": inputs[0][0]}] and not tensors:
        return nn.Identity()
    if len(rest) == 3 and rest[1][0] == "set" and rest[1][2:] == ["operator:getitem", [{"node": rest[0][1][0]}, 0], {}]:
        rest = [[rest[0][0], rest[1][1], *rest[0][2:]], rest[2]]  # the first of what a decomposed normalisation returns
        if rest[0][2].split(".")[1] not in _OF_SEVERAL:
            return None
    if len(rest) != 2 or rest[0][0] != "set" or rest[1][1] != {"node": rest[0][1][0]}:
        return None
    _, _, name, args, kwargs = rest[0]
    function = function_called(name)
    if not isinstance(function, torch._ops.OpOverload) or not name.startswith("ops:aten."):
        return None
    names = [argument.name for argument in function._schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    given = {argument.name: given.get(argument.name, argument.default_value) for argument in function._schema.arguments}
    if given.pop(names[0]) != {"node": inputs[0][0]}:
        return None
    values: dict[str, Any] = {}
    used: dict[str, Tensor] = {}
    for key, value in given.items():
        if isinstance(value, dict) and value.get("node") in reads:
            path = reads[value["node"]]
            if path not in tensors:
                return None
            values[key] = used[path] = tensors[path]
        elif _holds_node(value):
            return None
        else:
            values[key] = decoded(value, {})
    build = _LAYERS.get(name.split(".")[1])
    layer = build(values) if build is not None else None
    if layer is None or any(path not in layer._parameters and path not in layer._buffers for path in used):
        return None
    for path, tensor in tensors.items():
        if path in layer._parameters and isinstance(tensor, nn.Parameter):
            layer._parameters[path] = tensor
        elif path in layer._buffers:
            layer._buffers[path] = tensor
        else:
            return None
    if layer._buffers.get("num_batches_tracked") is not None and "num_batches_tracked" not in tensors:
        layer._buffers["num_batches_tracked"] = torch.zeros((), dtype=torch.long)
    whole = all(
        tensor is None or not tensor.is_meta for tensor in (*layer._parameters.values(), *layer._buffers.values())
    )
    return layer if whole else None


def sequential_of(inputs: list[Any], lines: list[Any], children: Mapping[str, nn.Module]) -> nn.Module | None:
    """Build the ``Sequential`` of a module's children, if these lines call each of them once, on the result of the one before."""
    if len(inputs) != 1 or not children or len(lines) != len(children) + 1:
        return None
    value = {"node": inputs[0][0]}
    for line, name in zip(lines, children, strict=False):
        if line[0] != "call" or len(line[1]) != 1 or line[2:] != [name, [value], {}]:
            return None
        value = {"node": line[1][0]}
    return nn.Sequential(OrderedDict(children)) if lines[-1] == ["return", value] else None


def _holds_node(value: Any) -> bool:
    if isinstance(value, dict):
        return "node" in value or any(map(_holds_node, value.values()))
    return isinstance(value, list) and any(map(_holds_node, value))


def _empty(kind: type[nn.Module], *args: Any, **kwargs: Any) -> nn.Module:
    """Build a layer of this kind on the meta device, whose tensors are put in later."""
    return kind(*args, **kwargs, device="meta")


def _convolution(given: dict[str, Any]) -> nn.Module | None:
    weight = given["weight"]
    rank = weight.dim() - 2 if isinstance(weight, Tensor) else 0
    if not 1 <= rank <= 3 or not isinstance(given["bias"], Tensor | None):
        return None
    transposed = bool(given.get("transposed", False))
    groups = given["groups"]
    kind = getattr(nn, f"Conv{'Transpose' if transposed else ''}{rank}d")
    options = {key: _each(given[key], rank) for key in ("stride", "padding", "dilation")}
    if transposed:
        options["output_padding"] = _each(given["output_padding"], rank)
    elif any(_each(given.get("output_padding", 0), rank)):
        return None
    ins, outs = weight.shape[1] * groups, weight.shape[0]
    if transposed:
        ins, outs = weight.shape[0], weight.shape[1] * groups
    return _empty(
        kind, ins, outs, tuple(weight.shape[2:]), groups=groups, bias=given["bias"] is not None, **options
    )  # fmt: skip


def _transposed(given: dict[str, Any]) -> nn.Module | None:
    return _convolution({**given, "transposed": True})


def _each(value: Any, rank: int) -> Any:
    """Expand an option of a convolution to every dimension."""
    if isinstance(value, str):
        return value
    numbers = tuple(value) if isinstance(value, list | tuple) else (value,)
    return numbers * rank if len(numbers) == 1 else numbers


def _batch_norm(given: dict[str, Any]) -> nn.Module | None:
    if given["training"] or not isinstance(given["running_mean"], Tensor):
        return None
    affine = isinstance(given["weight"], Tensor)
    if affine != isinstance(given["bias"], Tensor):
        return None
    return _empty(FixedBatchNorm, len(given["running_mean"]), given["eps"], given["momentum"], affine)


def _batch_norm_of_eval(given: dict[str, Any]) -> nn.Module | None:
    return _batch_norm({**given, "training": False})


def _layer_norm(given: dict[str, Any]) -> nn.Module | None:
    affine, bias = (isinstance(given[key], Tensor) for key in ("weight", "bias"))
    return _empty(nn.LayerNorm, list(given["normalized_shape"]), given["eps"], affine, affine and bias)


def _group_norm(given: dict[str, Any]) -> nn.Module | None:
    if not isinstance(given["weight"], Tensor) or not isinstance(given["bias"], Tensor):
        return None
    return _empty(nn.GroupNorm, given["num_groups"], len(given["weight"]), given["eps"])


def _linear(given: dict[str, Any]) -> nn.Module | None:
    weight = given["weight"]
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        return None
    return _empty(nn.Linear, weight.shape[1], weight.shape[0], isinstance(given["bias"], Tensor))


def _prelu(given: dict[str, Any]) -> nn.Module | None:
    return _empty(nn.PReLU, len(given["weight"])) if isinstance(given["weight"], Tensor) else None


def _elu(given: dict[str, Any]) -> nn.Module | None:
    return nn.ELU(given["alpha"]) if given["scale"] == given["input_scale"] == 1 else None


def _dropout(given: dict[str, Any]) -> nn.Module | None:
    return None if given["train"] else nn.Identity()


_WINDOW = ("kernel_size", "stride", "padding")


def _pool(kind: type[nn.Module], *keys: str) -> Callable[[dict[str, Any]], nn.Module]:
    """Build a pooling layer from these arguments; an empty stride means the kernel's."""

    def make(given: dict[str, Any]) -> nn.Module:
        values = {key: tuple(given[key]) if isinstance(given[key], list) else given[key] for key in keys}
        return kind(**{key: value for key, value in values.items() if value != ()})

    return make


def _simple(kind: Callable[..., nn.Module], *keys: str) -> Callable[[dict[str, Any]], nn.Module]:
    return lambda given: kind(*(given[key] for key in keys))


_IN_PLACE: dict[str, tuple[Callable[..., nn.Module], tuple[str, ...]]] = {
    "relu": (nn.ReLU, ()),
    "relu6": (nn.ReLU6, ()),
    "silu": (nn.SiLU, ()),
    "mish": (nn.Mish, ()),
    "hardswish": (nn.Hardswish, ()),
    "hardsigmoid": (nn.Hardsigmoid, ()),
    "hardtanh": (nn.Hardtanh, ("min_val", "max_val")),
    "leaky_relu": (nn.LeakyReLU, ("negative_slope",)),
    "selu": (nn.SELU, ()),
}


def _in_place(kind: Callable[..., nn.Module], keys: tuple[str, ...]) -> Callable[[dict[str, Any]], nn.Module]:
    return lambda given: kind(*(given[key] for key in keys), inplace=True)


_OF_SEVERAL = ("_native_batch_norm_legit_no_training", "native_layer_norm")
_LAYERS: dict[str, Callable[[dict[str, Any]], nn.Module | None]] = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution", "_convolution", "_convolution_mode"), _convolution),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _transposed),
    **{name: _simple(kind, *keys) for name, (kind, keys) in _IN_PLACE.items()},
    **{f"{name}_": _in_place(kind, keys) for name, (kind, keys) in _IN_PLACE.items()},
    **{f"adaptive_avg_pool{rank}d": _pool(getattr(nn, f"AdaptiveAvgPool{rank}d"), "output_size") for rank in (1, 2, 3)},
    **{f"max_pool{rank}d": _pool(getattr(nn, f"MaxPool{rank}d"), *_WINDOW, "dilation", "ceil_mode") for rank in (1, 2, 3)},
    **{
        f"avg_pool{rank}d": _pool(getattr(nn, f"AvgPool{rank}d"), *_WINDOW, "ceil_mode", "count_include_pad", *more)
        for rank, more in ((1, ()), (2, ("divisor_override",)), (3, ("divisor_override",)))
    },
    "batch_norm": _batch_norm,
    "_native_batch_norm_legit_no_training": _batch_norm_of_eval,
    "native_layer_norm": _layer_norm,
    "layer_norm": _layer_norm,
    "group_norm": _group_norm,
    "linear": _linear,
    "prelu": _prelu,
    "elu": _elu,
    "dropout": _dropout,
    "feature_dropout": _dropout,
    "alpha_dropout": _dropout,
    "gelu": lambda given: nn.GELU(given["approximate"]),
    "sigmoid": _simple(nn.Sigmoid),
    "tanh": _simple(nn.Tanh),
    "softplus": _simple(nn.Softplus, "beta", "threshold"),
    "flatten": _simple(nn.Flatten, "start_dim", "end_dim"),
}  # fmt: skip
