"""Compute in torch's own operators what the kernels compute, for where they fail, and the small products between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from se_inject.kernels.plain import activated, plain_tail

aten: Any = torch.ops.aten

Sigma = tuple[str, bool]
"""The name of σ, and whether it is the one of the identity start."""
GIVEN: Sigma = ("given", False)
"""The σ of a gate that is given itself, not its logits."""


class Excitation(NamedTuple):
    """W2 δ(W1 z) and its gate: the weights as matrices, and the names of δ and σ."""

    w1: Tensor
    b1: Tensor | None
    w2: Tensor
    b2: Tensor | None
    inner: str
    gate: str
    one_at_zero: bool

    @property
    def sigma(self) -> Sigma:
        """The σ of the logits."""
        return self.gate, self.one_at_zero


def excited(mean: Tensor, e: Excitation) -> tuple[Tensor, Tensor]:
    """Compute the hidden units before δ (N, R) and the logits of the gates (N, C), in the mean's precision."""
    kind = mean.dtype
    hidden = F.linear(mean, e.w1.to(kind), None if e.b1 is None else e.b1.to(kind))
    logits = F.linear(activated(hidden, e.inner), e.w2.to(kind), None if e.b2 is None else e.b2.to(kind))
    return hidden, logits


def gate_of(a: Tensor, sigma: Sigma) -> Tensor:
    """Compute σ of the logits, by its name."""
    gate, one_at_zero = sigma
    if gate == "given":
        return a
    if gate == "tanh":
        return 1 + torch.tanh(a) if one_at_zero else torch.tanh(a)
    if gate == "relu":
        return torch.relu(1 + a) if one_at_zero else torch.relu(a)
    s = torch.sigmoid(a) if gate == "sigmoid" else F.hardsigmoid(a)
    return 2 * s if one_at_zero else s


def _gate_backward(d: Tensor, a: Tensor, sigma: Sigma) -> Tensor:
    gate, one_at_zero = sigma
    shifted = 1 + a if one_at_zero and gate == "relu" else a
    d = 2 * d if one_at_zero and gate in ("sigmoid", "hard_sigmoid") else d
    return _GATES_BACKWARD[gate](d, shifted)


def activation_backward(d: Tensor, x: Tensor, activation: str) -> Tensor:
    """Compute the gradient before an activation; ``x`` is its input, or for ReLU and ReLU6 the output, which does as well."""
    return _BACKWARD[activation](d, x)


_GATES_BACKWARD: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "given": lambda d, a: d,
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


def hidden_backward(
    d_logits: Tensor, mean: Tensor, hidden: Tensor, e: Excitation
) -> tuple[Tensor, list[Tensor | None]]:
    """Compute the gradients of the mean (N, C), and of W1, b1, W2, b2, from that of the logits (N, C)."""
    kind = mean.dtype
    d_hidden = activation_backward(d_logits @ e.w2.to(kind), hidden, e.inner)
    d_b1 = None if e.b1 is None else d_hidden.sum(0)
    d_b2 = None if e.b2 is None else d_logits.sum(0)
    return d_hidden @ e.w1.to(kind), [d_hidden.T @ mean, d_b1, d_logits.T @ activated(hidden, e.inner), d_b2]


def wide(value: Tensor) -> torch.dtype:
    """Return the dtype for sums over a value: at least float32."""
    return torch.float64 if value.dtype == torch.float64 else torch.float32


def spread(gate: Tensor, value: Tensor) -> Tensor:
    """Reshape a gate of (N, C) to broadcast over a value (N, C, *)."""
    return gate.reshape(*gate.shape, *[1] * (value.dim() - 2))


def tail(value: Tensor, gate: Tensor, shortcut: Tensor | None, activation: str, sigma: Sigma = GIVEN) -> Tensor:
    """Compute act(value · gate + shortcut), for a gate of (N, C) or, with a ``sigma``, its logits."""
    return plain_tail(value, spread(gate_of(gate, sigma), value).to(value.dtype), shortcut, activation)


def tail_backward(
    grad: Tensor, value: Tensor, gate: Tensor, other: Tensor | None, activation: str, adds: bool, scale: bool,
    sigma: Sigma = GIVEN,
) -> tuple[Tensor | None, Tensor | None, Tensor]:  # fmt: skip
    """Compute the gradients of shortcut (None: it is ``grad`` itself), value (only with ``scale``) and ``gate`` (N, C)."""
    g = spread(gate_of(gate, sigma), value).to(value.dtype)
    x = other
    if activation not in ("none", "relu", "relu6"):
        x = value * g if other is None else value * g + other
    d = grad if x is None or activation == "none" else activation_backward(grad, x, activation)
    d_gate = _gate_backward((d.to(gate.dtype) * value.to(gate.dtype)).flatten(2).sum(2), gate, sigma)
    return (d if adds and activation != "none" else None), (d * g if scale else None), d_gate


def excite(
    value: Tensor, shortcut: Tensor | None, e: Excitation, activation: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute a block and its tail: the output, the mean (N, C), the hidden units before δ (N, R), the logits (N, C)."""
    mean = value.flatten(2).mean(2, dtype=wide(value))
    hidden, logits = excited(mean, e)
    return tail(value, logits, shortcut, activation, e.sigma), mean, hidden, logits


def excite_from(source: Tensor, value: Tensor, shortcut: Tensor | None, e: Excitation, activation: str) -> Tensor:
    """Compute the output with the mean of another value."""
    mean = source.flatten(2).mean(2, dtype=wide(value))
    return tail(value, excited(mean, e)[1], shortcut, activation, e.sigma)


def excite_backward(
    grad: Tensor, value: Tensor, other: Tensor | None, mean: Tensor, hidden: Tensor, logits: Tensor, e: Excitation,
    activation: str, adds: bool,
) -> tuple[Tensor, Tensor | None, list[Tensor | None]]:  # fmt: skip
    """Compute the gradients of value, shortcut (None: it is ``grad`` itself), and of W1, b1, W2, b2."""
    d_shortcut, d_value, d_logits = tail_backward(grad, value, logits, other, activation, adds, True, e.sigma)
    d_mean, weights = hidden_backward(d_logits, mean, hidden, e)
    positions = value.numel() // max(1, value.shape[0] * value.shape[1])
    assert d_value is not None
    return (d_value + spread(d_mean, value).to(value.dtype) / positions).to(value.dtype), d_shortcut, weights
