"""Squeeze-and-Excitation, with the variants that its paper studies."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from se_inject.blocks.layers import LEAST_WIDTH, Bottleneck, chosen, hard_sigmoid, largest, mean_and_deviation
from se_inject.forwards import addressed

SQUEEZES = ("avg", "max", "avg+max", "std")
GATES = ("sigmoid", "hard_sigmoid", "tanh", "relu")
PUBLISHED_NAMES = (
    ("conv_reduce", "conv_expand"),
    ("conv1.conv", "conv2.conv"),
    ("conv1", "conv2"),
    ("fc.0", "fc.2"),
)
"""W1 and W2 in the state dicts of others: EfficientNets of timm, OpenMMLab, pytorchcv, a Sequential of nn.Linear."""


@addressed("SqueezeExcitation")
class SqueezeExcitation(Bottleneck):
    """Squeeze-and-Excitation: a gate for every channel, from the means of all channels.

    z_c = mean over space of u_c; s = σ(W2 δ(W1 z)), W1 of C/r × C and W2 of C × C/r, δ = ReLU; x_c = s_c · u_c
    (equations 2 to 4). W1 is ``fc1`` and W2 is ``fc2``, written as 1×1 convolutions. No shape is baked in.

    Where: after the last normalisation of every residual branch, before the addition.
    Parameters: 2Cm with m = C/r; with biases m + C more, with a norm 2m more.
    By: Jie Hu, Li Shen, Samuel Albanie, Gang Sun, Enhua Wu: "Squeeze-and-Excitation Networks", CVPR 2018 and TPAMI
    2020, arXiv 1709.01507.
    Not when: latency on a device that is slow at small kernels counts more than accuracy; with ``norm`` not when
    training with one example per device, since the norm then has one value for each channel; with ``gate=relu`` not in
    float16 with large values: it has no upper bound, so y grows as x² (and table 12 has it below no SE at all).
    Start: the identity is exact, with W2 zero, b1 = 1 (no inner unit is off, and of W1's first two rows one is on for any input) and a gate that is 1 at 0; else the factor is about 0.5 for the sigmoids
    and about 0 for tanh and ReLU.

    The gate g(a) of the paper's start, and that of the identity start, with its slope at 0:

    ============  =========  ============  =====
    ``gate``      paper      identity      slope
    ============  =========  ============  =====
    sigmoid       σ(a)       2·σ(a)        1/2
    hard_sigmoid  hσ(a)      2·hσ(a)       1/3, and 0 for |a| > 3
    tanh          tanh(a)    1 + tanh(a)   1
    relu          ReLU(a)    ReLU(1 + a)   1, and 0 for a < -1
    ============  =========  ============  =====

    All four are exactly 1 at a = 0 in every floating-point format, with biases and without, and none is flat there.
    (1 + ReLU(a) would be 1 as well, but ReLU's gradient at 0 is 0: nothing would ever move.)

    Args:
        channels: C.
        rank: number of spatial dimensions: 1, 2 or 3.
        reduction: r; the bottleneck is max(4, C // r) wide. None: 16.
        divisor: round C / r to a multiple of this instead; 8 is what timm does.
        width: of the bottleneck, instead of a reduction.
        bias: whether W1 and W2 have biases: the paper's ablations have none, its released models do.
        squeeze: z: ``avg``; ``max`` (table 11); ``avg+max``, half of each; ``std``, √(var + 1e-5).
        gate: σ: ``sigmoid``; ``hard_sigmoid``, min(max(a + 3, 0), 6) / 6; ``tanh`` or ``relu`` (table 12).
        activation: δ: ``relu``, ``silu``, ``gelu`` or ``hard_swish``.
        norm: batch normalisation between W1 and δ.

    Shape:
        (N, C, *) to (N, C, *), with ``rank`` dimensions for the star.

    Raises:
        OptionError: no such rank, width, squeeze, gate or activation.
    """

    __constants__ = ("one_at_zero", "sigma", "squeeze")  # TorchScript then drops the branches that are not taken

    least_width = LEAST_WIDTH

    def __init__(
        self,
        channels: int,
        *,
        rank: int = 2,
        reduction: float | None = None,
        divisor: int | None = None,
        width: int | None = None,
        bias: bool = True,
        squeeze: str = "avg",
        gate: str = "sigmoid",
        activation: str = "relu",
        norm: bool = False,
    ) -> None:
        super().__init__(
            channels,
            rank=rank,
            reduction=reduction,
            divisor=divisor,
            width=width,
            bias=bias,
            activation=activation,
            norm=norm,
        )
        self.squeeze = chosen("squeeze", squeeze, SQUEEZES)
        self.sigma = chosen("gate", gate, GATES)
        self.one_at_zero = False

    def identity_init(self) -> None:
        """Start as x ↦ x, exactly and in every floating-point format: W2 is zero and the gate is 1 there.

        Gradients reach W2 at once and W1 from the second step on.
        """
        self.one_at_zero = True
        self.rest_()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)

    def gate(self, x: Tensor) -> Tensor:
        """Compute s = σ(W2 δ(W1 z)) alone: the factor of every channel, (N, C, 1, …)."""
        return self.gated(self.excite(self.squeezed(x)))

    def squeezed(self, x: Tensor) -> Tensor:
        """Compute z: one number for each channel, (N, C, 1, …)."""
        if self.squeeze == "avg":
            return x.mean(self.space, keepdim=True)
        if self.squeeze == "max":
            return largest(x, self.space)
        if self.squeeze == "std":
            return mean_and_deviation(x, self.space, 1e-5)[1]
        return 0.5 * x.mean(self.space, keepdim=True) + 0.5 * largest(x, self.space)

    def gated(self, a: Tensor) -> Tensor:
        """Compute the gates s = g(a), with the gate of the start."""
        if self.sigma == "tanh":
            return 1 + torch.tanh(a) if self.one_at_zero else torch.tanh(a)
        if self.sigma == "relu":
            return torch.relu(1 + a) if self.one_at_zero else torch.relu(a)
        s = torch.sigmoid(a) if self.sigma == "sigmoid" else hard_sigmoid(a)
        return 2 * s if self.one_at_zero else s

    def extra_repr(self) -> str:
        names = dict(zip(GATES, ("2·sigmoid", "2·hard_sigmoid", "1 + tanh", "relu(1 + a)"), strict=True))
        return f"squeeze={self.squeeze}, gate={names[self.sigma] if self.one_at_zero else self.sigma}"

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Take W1 and W2 under the names of other packages too, and as matrices, so that their checkpoints load."""
        for names in PUBLISHED_NAMES:
            for theirs, layer in zip(names, ("fc1", "fc2"), strict=True):
                for key in ("weight", "bias"):
                    if f"{prefix}{theirs}.{key}" in state_dict:
                        state_dict[f"{prefix}{layer}.{key}"] = state_dict.pop(f"{prefix}{theirs}.{key}")
        for layer in ("fc1", "fc2"):
            weight = state_dict.get(f"{prefix}{layer}.weight")
            if isinstance(weight, Tensor) and weight.dim() == 2:
                state_dict[f"{prefix}{layer}.weight"] = weight[(..., *[None] * len(self.space))]
        super()._load_from_state_dict(state_dict, prefix, *rest)
