"""Compute the tail of a gated branch in plain torch: scale, add the shortcut, activate. Every other implementation is compared with this one."""

from __future__ import annotations

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = ("none", "relu", "relu6", "silu", "hardswish", "gelu", "gelu_tanh")
"""The activations that a tail can end with, by name."""


def plain_tail(value: Tensor, gate: Tensor, shortcut: Optional[Tensor], activation: str) -> Tensor:  # noqa: UP045 -- TorchScript
    """Compute ``activation(value * gate + shortcut)`` with the roundings of the three operators one by one.

    The sum and the activation overwrite the product, which nobody else reads, where autograd and the shapes allow it;
    the arguments are never overwritten. TorchScript, tracing and export see operators that overwrite nothing.

    Args:
        value: (N, C, *).
        gate: anything that broadcasts to the value.
        shortcut: added to the product; None: nothing is.
        activation: one of ``ACTIVATIONS``.
    """
    out = value * gate
    if torch.jit.is_scripting() or torch.jit.is_tracing():  # type: ignore
        if shortcut is not None:
            out = out + shortcut
        return activated(out, activation)
    return _in_place(out, shortcut, activation)


@torch.jit.unused
def _in_place(out: Tensor, shortcut: Optional[Tensor], activation: str) -> Tensor:  # noqa: UP045 -- TorchScript
    if torch.compiler.is_compiling():
        return activated(out if shortcut is None else out + shortcut, activation)
    if shortcut is not None:
        fits = out.shape == shortcut.shape and out.dtype == shortcut.dtype
        out = out.add_(shortcut) if fits else out + shortcut
    if activation == "relu":
        return out.relu_()
    if torch.is_grad_enabled() and out.requires_grad:  # their derivatives are made from the input
        return activated(out, activation)
    return _activated_in_place(out, activation)


def _activated_in_place(out: Tensor, activation: str) -> Tensor:
    if activation == "relu":
        return out.relu_()
    if activation == "silu":
        return F.silu(out, inplace=True)
    if activation == "hardswish":
        return F.hardswish(out, inplace=True)
    if activation == "relu6":
        return F.relu6(out, inplace=True)
    return activated(out, activation)


@torch.jit.unused
def overwriting_tail(value: Tensor, gate: Tensor, shortcut: Optional[Tensor], activation: str) -> Tensor:  # noqa: UP045
    """Compute a tail in as few passes as torch has, for inference: the value is overwritten where that can be done.

    One rounding less than ``plain_tail``: product and sum are one operator.
    """
    fits = shortcut is None or (shortcut.shape == value.shape and shortcut.dtype == value.dtype)
    recorded = torch.jit.is_tracing() or torch.compiler.is_compiling()  # type: ignore
    if not fits or recorded or torch.is_grad_enabled() or gate.dtype != value.dtype:
        return plain_tail(value, gate, shortcut, activation)
    out = value.mul_(gate) if shortcut is None else torch.addcmul(shortcut, value, gate, out=value)
    return _activated_in_place(out, activation)


def activated(x: Tensor, activation: str) -> Tensor:
    """Apply an activation by its name. Overwrites nothing."""
    if activation == "none":
        return x
    if activation == "relu":
        return torch.relu(x)
    if activation == "relu6":
        return F.relu6(x)
    if activation == "silu":
        return F.silu(x)
    if activation == "hardswish":
        return F.hardswish(x)
    if activation == "gelu":
        return F.gelu(x)
    return F.gelu(x, approximate="tanh")
