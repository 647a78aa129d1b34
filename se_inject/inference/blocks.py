"""Make SE blocks cheaper for inference: constant hidden units are folded, and the squeeze is taken where there is less to read."""

from __future__ import annotations

import copy
from typing import Any, Optional

import torch
from torch import Tensor, nn

from se_inject.blocks import NoGate, SqueezeExcitation
from se_inject.kernels import excite_from, overwriting_tail, tail


class FixedGate(nn.Module):
    """A gate that is the same for every input: (1, C, 1, …)."""

    factor: Tensor

    def __init__(self, factor: Tensor) -> None:
        super().__init__()
        self.register_buffer("factor", factor)

    def gate(self, x: Tensor) -> Tensor:
        return self.factor.expand(self._shape(x))

    def _shape(self, x: Tensor) -> list[int]:
        return [x.size(0)] + list(self.factor.shape[1:])  # noqa: RUF005 -- TorchScript has no unpacking

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class EarlySqueeze(SqueezeExcitation):
    """SE whose squeeze reads the input of the 1×1 convolution that made its value.

    The mean commutes with that convolution, so W1 is multiplied by its weights once and for all:
    W1 (W mean(h) + b) + b1 = (W1 W) mean(h) + (W1 b + b1). Only made by ``early``; for inference alone.

    Shape:
        value (N, C, *) and source (N, H, *) to (N, C, *).
    """

    is_one_operator = True

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        source: Tensor,
        shortcut: Optional[Tensor] = None,  # noqa: UP045 -- TorchScript
        activation: str = "none",
    ) -> Tensor:
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            out = _by_kernel(self, x, source, shortcut, activation)
            if out is not None:
                return out
            if self.overwrites:
                return overwriting_tail(x, self.gate(source), shortcut, activation)
        return tail(x, self.gate(source), shortcut, activation)


_INNER: dict[Any, str] = {nn.ReLU: "relu", nn.SiLU: "silu", nn.GELU: "gelu", nn.Hardswish: "hardswish"}


def _by_kernel(block: Any, x: Tensor, source: Tensor, shortcut: Tensor | None, activation: str) -> Tensor | None:
    weights = (block.fc1.weight, block.fc1.bias, block.fc2.weight, block.fc2.bias)
    names = (_INNER[type(block.act)], block.sigma, block.one_at_zero)
    return excite_from(source, x, shortcut, weights, names, activation)


def early(block: SqueezeExcitation, convolution: Any, overwrites: bool) -> EarlySqueeze:
    """Make a block whose squeeze reads what a 1×1 convolution reads.

    Args:
        block: with squeeze ``avg`` and no norm.
        convolution: that makes its value; stride 1, no padding.
        overwrites: whether the value may be overwritten, being read by nobody else.
    """
    new: Any = copy.deepcopy(block)
    w1 = block.fc1.weight.double().flatten(1)
    b1 = torch.zeros(w1.shape[0]).to(w1) if block.fc1.bias is None else block.fc1.bias.double()
    w = _dense(convolution).double()
    weight = (w1 @ w).reshape(w1.shape[0], w.shape[1], *[1] * len(block.space))
    if convolution.bias is not None:
        b1 = b1 + w1 @ convolution.bias.double()
    layer: Any = type(block.fc1)
    new.fc1 = layer(w.shape[1], w1.shape[0], 1, device="meta")
    kind = block.fc1.weight.dtype
    new.fc1.weight = nn.Parameter(weight.to(kind), requires_grad=False)
    new.fc1.bias = nn.Parameter(b1.to(kind), requires_grad=False)
    new.overwrites = overwrites
    new.__class__ = EarlySqueeze
    return new.eval()  # type: ignore[no-any-return]


def _dense(convolution: Any) -> Tensor:
    """Expand the weights of a 1×1 convolution to one matrix, zeros between its groups."""
    weight = convolution.weight.flatten(1)
    if convolution.groups == 1:
        return weight  # type: ignore[no-any-return]
    return torch.block_diag(*weight.chunk(convolution.groups))  # type: ignore


def compacted(block: nn.Module) -> nn.Module:
    """Simplify a block for inference: fold its norm, move constant hidden units into its biases, store fixed gates.

    Args:
        block: in eval mode; other blocks than SE are returned as they are.

    Returns:
        the block itself, changed; ``FixedGate`` if its gate is the same for every input; ``NoGate`` if that is 1.
    """
    if type(block) is not SqueezeExcitation or not isinstance(block.fc1, nn.Module):
        return block
    one: Any = block.fc1
    two: Any = block.fc2
    if any(not type(layer).__module__.startswith("torch.nn.modules") for layer in (one, two, block.act)):
        return block
    w1, w2 = one.weight.double().flatten(1), two.weight.double().flatten(1)
    b1 = torch.zeros_like(w1[:, 0]) if one.bias is None else one.bias.double()
    b2 = torch.zeros_like(w2[:, 0]) if two.bias is None else two.bias.double()
    if block.bn is not None:
        norm: Any = block.bn
        scale = (norm.running_var.double() + norm.eps).rsqrt() * norm.weight.double()
        w1, b1 = w1 * scale[:, None], (b1 - norm.running_mean.double()) * scale + norm.bias.double()
    alive = (w2 != 0).any(0)
    varies = alive & (w1 != 0).any(1)
    constant = alive & ~varies
    b2 = b2 + w2[:, constant] @ block.act(b1[constant])
    ones = [1] * len(block.space)
    if not bool(varies.any()):
        factor = block.gated(b2.to(two.weight.dtype))
        return NoGate() if bool((factor == 1).all()) else FixedGate(factor.reshape(1, -1, *ones)).eval()
    if block.bn is None and bool(varies.all()):
        return block
    layer: Any = type(one)
    kind = {"device": one.weight.device, "dtype": one.weight.dtype}
    width = int(varies.sum())
    block.fc1, block.fc2 = layer(w1.shape[1], width, 1, **kind), layer(width, w2.shape[0], 1, **kind)
    for new, weight, bias in ((block.fc1, w1[varies], b1[varies]), (block.fc2, w2[:, varies], b2)):
        new.weight = nn.Parameter(weight.reshape(*weight.shape, *ones).to(kind["dtype"]), requires_grad=False)
        new.bias = nn.Parameter(bias.to(kind["dtype"]), requires_grad=False)
    block.bn = None
    return block.eval()
