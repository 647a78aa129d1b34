"""Return results that are known without a call: on the meta device a value is its shape, and real numbers may be any.

torch works out many shapes in Python, at up to a millisecond each; a network has hundreds of such calls.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from se_inject.tracing.outlines import outline

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_ACTIVATIONS = frozenset(
    [
        nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.Hardsigmoid,
        nn.Hardtanh, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.Softsign, nn.LogSigmoid,
    ]
)  # fmt: skip
_UNARY = frozenset(
    [
        F.relu, F.relu6, F.leaky_relu, F.elu, F.celu, F.selu, F.gelu, F.silu, F.mish, F.hardswish, F.hardsigmoid, F.hardtanh,
        F.sigmoid, F.tanh, F.softplus, torch.relu, torch.sigmoid, torch.tanh,
    ]
)  # fmt: skip
_BINARY = frozenset(
    [operator.add, operator.sub, operator.mul, operator.truediv, torch.add, torch.sub, torch.mul, torch.div]
)

FACTORIES = frozenset(
    getattr(torch, name)
    for name in (
        "arange", "as_tensor", "bartlett_window", "blackman_window", "empty", "eye", "full", "hamming_window", "hann_window",
        "kaiser_window", "linspace", "logspace", "ones", "rand", "randint", "randn", "randperm", "scalar_tensor", "tensor",
        "tril_indices", "triu_indices", "zeros",
    )
)  # fmt: skip
"""Functions that make a tensor of plain numbers."""


def result_of_module(module: nn.Module, x: Any) -> Tensor | None:
    """Return what one of torch's own modules makes of a value on the meta device; None if it has to be called."""
    kind = type(module)
    if not _is_known(x):
        return None
    if kind in _ACTIVATIONS:
        return x if getattr(module, "inplace", False) else outline(x)  # type: ignore[no-any-return]
    if kind in _NORMS:
        if x.dim() < 2 or x.shape[1] != module.num_features:
            return None
        module._check_input_dim(x)  # type: ignore[operator]
        return outline(x)
    if kind is nn.LayerNorm:
        return _layer_norm(x, module.normalized_shape)
    return None


def result_of_function(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Return what a function makes of values on the meta device; None if it has to be called."""
    if target is torch.cat:
        return _concatenated(*args, **kwargs)
    if target in FACTORIES and "device" not in kwargs:
        with torch.device("meta"):
            return target(*args, **kwargs)  # type: ignore[no-any-return]
    if not args or not _is_known(args[0]):
        return None
    rule = _RULES.get(target)
    return None if rule is None else rule(*args, **kwargs)


def _is_known(x: Any) -> bool:
    return type(x) is Tensor and x.is_meta and x.is_floating_point()


def _unary(x: Tensor, *rest: Any, inplace: Any = False, **other: Any) -> Tensor | None:
    if rest or other:
        return None
    return x if inplace else outline(x)


def _binary(one: Tensor, other: Any, *rest: Any, **options: Any) -> Tensor | None:
    """Return the result for values of one dtype, or with a number; the larger shape must be one of theirs."""
    if rest or options:
        return None
    if type(other) in (int, float):
        return outline(one)
    if not _is_known(other) or one.dtype != other.dtype or not (one.is_contiguous() and other.is_contiguous()):
        return None
    for larger, smaller in ((one.shape, other.shape), (other.shape, one.shape)):
        if len(larger) == len(smaller) and all(b in (1, a) for a, b in zip(larger, smaller, strict=True)):
            return torch.empty(larger, dtype=one.dtype, device="meta")
    return None


def _batch_norm(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return outline(x)


def _layer_norm(x: Tensor, shape: Any, *_: Any, **__: Any) -> Tensor | None:
    if not isinstance(shape, tuple | list) or not shape or tuple(x.shape[-len(shape) :]) != tuple(shape):
        return None
    return torch.empty(x.shape, dtype=x.dtype, device="meta")


def _concatenated(*args: Any, **kwargs: Any) -> Tensor | None:
    """Return the result of ``torch.cat`` in plain cases."""
    tensors: Any
    tensors, dim = args if len(args) == 2 and not kwargs else ([], 0)
    kinds = {(type(each), each.dtype, *each.shape[:1], *each.shape[2:]) for each in tensors if isinstance(each, Tensor)}
    if dim != 1 or len(kinds) != 1 or not all(_is_plain(each) for each in tensors):
        return None
    first = tensors[0]
    shape = (first.shape[0], sum(each.shape[1] for each in tensors), *first.shape[2:])
    return torch.empty(shape, dtype=first.dtype, device="meta")


def _is_plain(each: Any) -> bool:
    return type(each) is Tensor and each.is_meta and each.dim() > 1 and each.is_contiguous()


_RULES: dict[Any, Callable[..., Tensor | None]] = {
    **dict.fromkeys(_UNARY, _unary),
    **dict.fromkeys(_BINARY, _binary),
    F.batch_norm: _batch_norm,
    F.layer_norm: _layer_norm,
}


class AnyNumbers:
    """Real results of convolutions and linear layers, whose numbers don't matter: the same random ones, repeated."""

    def __init__(self) -> None:
        self._numbers: Tensor | None = None

    def result_of_module(self, module: nn.Module, x: Any) -> Tensor | None:
        """Return a result of a convolution or linear layer without computing it; None for any other module."""
        if type(x) is not Tensor:
            return None
        if type(module) is nn.Linear and x.shape[-1] == module.in_features:
            return self._drawn((*x.shape[:-1], module.out_features), x)
        if type(module) in _CONVOLUTIONS:
            weight, bias = (None if t is None else t.to("meta") for t in (module.weight, module.bias))
            return self._drawn(module._conv_forward(x.to("meta"), weight, bias).shape, x)  # type: ignore[operator]
        return None

    def _drawn(self, shape: Sequence[int], like: Tensor) -> Tensor:
        if self._numbers is None:  # drawing millions takes longer than what is saved
            self._numbers = torch.randn(65_521, generator=torch.Generator().manual_seed(0), device="cpu")
        count = math.prod(shape)
        return self._numbers.repeat(-(-count // len(self._numbers)))[:count].view(*shape).to(like)
