"""What the kernels compute, in torch's own operators: the small products between them, and all of it where they fail."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from se_inject.kernels.plain import activated, plain_tail

aten: Any = torch.ops.aten


class Excitation(NamedTuple):
    """W2 δ(W1 z) and its gate: the weights as matrices, and the names of δ and σ."""

    w1: Tensor
    b1: Tensor | None
    w2: Tensor
    b2: Tensor | None
    inner: str
    gate: str
    one_at_zero: bool


def excited(mean: Tensor, e: Excitation, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Compute the hidden units before δ (N, R), unless they are given, and the gates (N, C), in the mean's precision."""
    kind = mean.dtype
    if hidden is None:
        hidden = F.linear(mean, e.w1.to(kind), None if e.b1 is None else e.b1.to(kind))
    logits = F.linear(activated(hidden, e.inner), e.w2.to(kind), None if e.b2 is None else e.b2.to(kind))
    return hidden, gate_of(logits, e.gate, e.one_at_zero)


def gate_of(a: Tensor, gate: str, one_at_zero: bool) -> Tensor:
    """Compute σ of the logits, by its name; with ``one_at_zero`` that of the identity start."""
    if gate == "tanh":
        return 1 + torch.tanh(a) if one_at_zero else torch.tanh(a)
    if gate == "relu":
        return torch.relu(1 + a) if one_at_zero else torch.relu(a)
    s = torch.sigmoid(a) if gate == "sigmoid" else F.hardsigmoid(a)
    return 2 * s if one_at_zero else s


def _gate_backward(d: Tensor, a: Tensor, gate: str, one_at_zero: bool) -> Tensor:
    shifted = 1 + a if one_at_zero and gate == "relu" else a
    d = 2 * d if one_at_zero and gate in ("sigmoid", "hard_sigmoid") else d
    return _GATES_BACKWARD[gate](d, shifted)


def activation_backward(d: Tensor, x: Tensor, activation: str) -> Tensor:
    """Compute the gradient before an activation; ``x`` is its input, or for ReLU and ReLU6 the output, which does as well."""
    return _BACKWARD[activation](d, x)


_GATES_BACKWARD: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sigmoid": lambda d, a: aten.sigmoid_backward(d, torch.sigmoid(a)),
    "hard_sigmoid": lambda d, a: aten.hardsigmoid_backward(d, a),
    "tanh": lambda d, a: aten.tanh_backward(d, torch.tanh(a)),
    "relu": lambda d, a: aten.threshold_backward(d, a, 0),
}
_BACKWARD: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "none": lambda d, x: d,
    "relu": lambda d, x: aten.threshold_backward(d, x, 0),
    "relu6": lambda d, x: aten.hardtanh_backward(d, x, 0, 6),
    "silu": lambda d, x: aten.silu_backward(d, x),
    "hardswish": lambda d, x: aten.hardswish_backward(d, x),
    "gelu": lambda d, x: aten.gelu_backward(d, x),
}


def hidden_backward(d_gate: Tensor, mean: Tensor, hidden: Tensor, e: Excitation) -> tuple[Tensor, list[Tensor | None]]:
    """Compute the gradients of the mean (N, C), and of W1, b1, W2, b2, from that of the gates (N, C)."""
    kind = mean.dtype
    w1, w2 = e.w1.to(kind), e.w2.to(kind)
    h = activated(hidden, e.inner)
    logits = F.linear(h, w2, None if e.b2 is None else e.b2.to(kind))
    d_logits = _gate_backward(d_gate, logits, e.gate, e.one_at_zero)
    d_hidden = activation_backward(d_logits @ w2, hidden, e.inner)
    d_b1 = None if e.b1 is None else d_hidden.sum(0)
    d_b2 = None if e.b2 is None else d_logits.sum(0)
    return d_hidden @ w1, [d_hidden.T @ mean, d_b1, d_logits.T @ h, d_b2]


def wide(value: Tensor) -> torch.dtype:
    """Return the dtype for sums over a value: at least float32."""
    return torch.float64 if value.dtype == torch.float64 else torch.float32


def spread(gate: Tensor, value: Tensor) -> Tensor:
    """Reshape a gate of (N, C) to broadcast over a value (N, C, *)."""
    return gate.reshape(*gate.shape, *[1] * (value.dim() - 2))


def tail(value: Tensor, gate: Tensor, shortcut: Tensor | None, activation: str) -> Tensor:
    """Compute act(value · gate + shortcut), for a gate of (N, C)."""
    return plain_tail(value, spread(gate, value).to(value.dtype), shortcut, activation)


def tail_backward(
    grad: Tensor, value: Tensor, gate: Tensor, other: Tensor | None, activation: str, adds: bool, scale: bool
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Compute the gradients of shortcut (None: it is ``grad`` itself), value (only with ``scale``) and gate (N, C)."""
    g = spread(gate, value).to(value.dtype)
    x = other
    if activation not in ("none", "relu", "relu6"):
        x = value * g if other is None else value * g + other
    d = grad if x is None or activation == "none" else activation_backward(grad, x, activation)
    d_gate = (d.to(gate.dtype) * value.to(gate.dtype)).flatten(2).sum(2)
    return (d if adds and activation != "none" else None), (d * g if scale else None), d_gate


def excite(value: Tensor, shortcut: Tensor | None, e: Excitation, activation: str) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the whole block and its tail: the output, the mean (N, C) and the hidden units before δ (N, R)."""
    return excite_from(value, value, shortcut, e, activation)


def excite_from(
    source: Tensor, value: Tensor, shortcut: Tensor | None, e: Excitation, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the same as ``excite``, with the mean of another value."""
    mean = source.flatten(2).mean(2, dtype=wide(value))
    hidden, gate = excited(mean, e)
    return tail(value, gate, shortcut, activation), mean, hidden


def excite_backward(
    grad: Tensor, value: Tensor, other: Tensor | None, mean: Tensor, hidden: Tensor, e: Excitation, activation: str,
    adds: bool,
) -> tuple[Tensor, Tensor | None, list[Tensor | None]]:  # fmt: skip
    """Compute the gradients of value, shortcut (None: it is ``grad`` itself), and of W1, b1, W2, b2."""
    gate = excited(mean, e, hidden)[1]
    d_shortcut, d_value, d_gate = tail_backward(grad, value, gate, other, activation, adds, scale=True)
    d_mean, weights = hidden_backward(d_gate, mean, hidden, e)
    positions = value.numel() // max(1, value.shape[0] * value.shape[1])
    assert d_value is not None
    return (d_value + spread(d_mean, value).to(value.dtype) / positions).to(value.dtype), d_shortcut, weights
