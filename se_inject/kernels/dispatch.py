"""Choose between a kernel and torch's own operators for one call."""

from __future__ import annotations

import importlib.util
import os
from typing import Optional

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from se_inject.kernels.plain import plain_tail

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""The dtypes of values that the kernels read."""
_IN_KERNELS = ("none", "relu", "relu6", "silu", "hardswish", "gelu")
_PLAIN_TENSORS = (Tensor, nn.Parameter, FakeTensor)
OLDEST = (3, 3)
"""The oldest Triton that the kernels were written for."""


class State:
    """What ``prepare`` found out: whether there are kernels, and if not why."""

    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    """Whether Triton interprets kernels on the CPU, which tests do."""
    why_not: str | None = "kernels were not asked for"


def prepare() -> None:
    """Find out whether there can be kernels, and import them. Costs nothing where there is no GPU.

    It is done when a block is fused, so that no forward has to.
    """
    if not torch.cuda.is_available() and not State.interpreted:
        State.why_not = "no CUDA device"
        return
    State.why_not = _why_no_triton()
    if State.why_not is None:
        from se_inject.kernels import operators as operators


def _why_no_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    import triton  # type: ignore[import-untyped]

    version = str(triton.__version__)
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    return f"triton {version} is older than {'.'.join(map(str, OLDEST))}" if numbers < OLDEST else None


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Say why a value of this kind has no kernel; None: it has one."""
    if device.type != "cuda" and not State.interpreted:
        return f"on {device.type}, torch's own operators"
    if dtype not in DTYPES:
        return f"no kernel for {str(dtype).removeprefix('torch.')}"
    return State.why_not


def tail(value: Tensor, gate: Tensor, shortcut: Optional[Tensor], activation: str) -> Tensor:  # noqa: UP045 -- TorchScript
    """Compute ``activation(value * gate + shortcut)``, on a GPU in one pass. The arguments are not overwritten.

    Args:
        value: (N, C, *).
        gate: anything that broadcasts to the value; one number for each channel has a kernel.
        shortcut: added to the product; None: nothing is.
        activation: one of ``ACTIVATIONS``.
    """
    if not torch.jit.is_scripting():  # type: ignore[attr-defined]
        out = _tail_by_kernel(value, gate, shortcut, activation)
        if out is not None:
            return out
    return plain_tail(value, gate, shortcut, activation)


@torch.jit.unused
def _tail_by_kernel(
    value: Tensor,
    gate: Tensor,
    shortcut: Optional[Tensor],  # noqa: UP045 -- TorchScript
    activation: str,
) -> Optional[Tensor]:  # noqa: UP045
    if not has_kernel(value, shortcut, activation) or gate.dtype != value.dtype or gate.device != value.device:
        return None
    wanted = (*value.shape[:2], *[1] * (value.dim() - 2))
    if gate.shape != wanted:
        if gate.dim() != value.dim() or any(size != 1 for size in gate.shape[2:]):
            return None
        gate = gate.expand(wanted)
    out: Tensor = torch.ops.se_inject.tail(value, gate, shortcut, activation)
    return out


def has_kernel(value: Tensor, shortcut: Tensor | None, activation: str) -> bool:
    """Tell whether a kernel can compute the tail of these very tensors, here and now.

    Tracing and export get torch's own operators, so that files need nothing of this package. torch.compile gets
    them too: it fuses them with the norm before the block, which it can't do around an operator of ours.
    """
    if (not value.is_cuda and not State.interpreted) or value.dtype not in DTYPES or activation not in _IN_KERNELS:
        return False
    if type(value) not in _PLAIN_TENSORS or value.dim() < 3 or value.numel() == 0 or State.why_not is not None:
        return False
    if torch.compiler.is_compiling() or torch.compiler.is_exporting():
        return False
    if torch.jit.is_tracing() or torch.onnx.is_in_onnx_export():  # type: ignore
        return False
    if _is_special(value):
        return False
    if shortcut is None:
        return True
    return shortcut.shape == value.shape and shortcut.dtype == value.dtype and shortcut.device == value.device


def _is_special(value: Tensor) -> bool:
    """Return whether a torch.func transform or forward-mode AD is active, or the value can't be kept for backward."""
    if torch._C._functorch.peek_interpreter_stack() is not None or torch.autograd.forward_ad._current_level >= 0:
        return True
    return value.is_inference() and torch.is_grad_enabled()


def excite(
    value: Tensor,
    shortcut: Tensor | None,
    weights: tuple[Tensor, Tensor | None, Tensor, Tensor | None],
    names: tuple[str, str, bool],
    activation: str,
) -> Tensor | None:
    """Compute an SE block with its tail as one operator; None: there is no kernel for its weights or for δ.

    Args:
        value: (N, C, *), one for which ``has_kernel`` holds.
        shortcut: added to the gated value; None: nothing is.
        weights: W1 (R, C, …), b1, W2 (C, R, …), b2.
        names: of δ (one of ``ACTIVATIONS``) and σ, and whether σ is the one of the identity start.
        activation: behind the addition.
    """
    if not _fit(value, weights[0], names[0]):
        return None
    if not torch.is_grad_enabled():
        return torch.ops.se_inject.excite_from(value, value, shortcut, *weights, *names, activation)  # type: ignore
    out: Tensor = torch.ops.se_inject.excite(value, shortcut, *weights, *names, activation)[0]
    return out


def excite_from(
    source: Tensor,
    value: Tensor,
    shortcut: Tensor | None,
    weights: tuple[Tensor, Tensor | None, Tensor, Tensor | None],
    names: tuple[str, str, bool],
    activation: str,
) -> Tensor | None:
    """Compute an SE block whose squeeze reads another value, without gradients; None: there is no kernel.

    Args:
        source: (N, H, *), whose mean W1 (R, H, …) is for; the rest is as for ``excite``.
    """
    if torch.is_grad_enabled() or not has_kernel(value, shortcut, activation) or not has_kernel(source, None, "none"):
        return None
    if source.dtype != value.dtype or source.device != value.device or not _fit(value, weights[0], names[0]):
        return None
    out: Tensor = torch.ops.se_inject.excite_from(source, value, shortcut, *weights, *names, activation)
    return out


def _fit(value: Tensor, weight: Tensor, inner: str) -> bool:
    """Return whether weights and a value fit together as without a kernel, and there is a kernel for δ."""
    same = weight.dtype == value.dtype or torch.is_autocast_enabled(value.device.type)
    return same and weight.device == value.device and inner in _IN_KERNELS
