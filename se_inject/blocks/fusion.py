"""Let a block take over the operations behind it in its owner: the addition of a shortcut, and an activation.

A fused block is of a generated subclass of its own class, whose forward takes ``(value, shortcut, activation, source)``; its
state and state dict stay as they are. Called with a value alone it does what it did before. ``source`` is what the gate is
computed from where that isn't the value: a layer scale then stands before the block and no longer behind it.
"""

from __future__ import annotations

import functools
from typing import Any, Optional

import torch
from torch import Tensor, nn

from se_inject.blocks.building import has_gate
from se_inject.blocks.squeeze_excitation import SqueezeExcitation
from se_inject.errors import LoadError
from se_inject.forwards import UNFUSED, addressed, class_when_unfused, is_fused
from se_inject.kernels import activated, excite, has_kernel, prepare, tail, why_not


def _fused_forward(
    self: Any,
    x: Tensor,
    shortcut: Optional[Tensor] = None,  # noqa: UP045 -- TorchScript
    activation: str = "none",
    source: Optional[Tensor] = None,  # noqa: UP045
) -> Tensor:
    if source is not None:
        return tail(x, self.gate(source), shortcut, activation)
    if not torch.jit.is_scripting():  # type: ignore[attr-defined]
        out = _as_one_operator(self, x, shortcut, activation)
        if out is not None:
            return out
    return tail(x, self.gate(x), shortcut, activation)


def _as_one_operator(block: Any, x: Tensor, shortcut: Tensor | None, activation: str) -> Tensor | None:
    """Compute an SE block and its tail as one operator; None if there is no kernel for it."""
    if not has_kernel(x, shortcut, activation) or _why_in_parts(block) is not None:
        return None
    weights = (block.fc1.weight, block.fc1.bias, block.fc2.weight, block.fc2.bias)
    return excite(x, shortcut, weights, (_INNER[type(block.act)], block.sigma, block.one_at_zero), activation)


_INNER: dict[Any, str] = {nn.ReLU: "relu", nn.SiLU: "silu", nn.GELU: "gelu", nn.Hardswish: "hardswish"}


def _why_in_parts(block: Any) -> str | None:
    """Explain why a block's gate is computed by torch and only its tail by a kernel; None: a kernel computes all of it."""
    if getattr(block, "is_one_operator", False):
        return None
    if class_when_unfused(block) is not SqueezeExcitation:
        return "the block's own gate"
    if block.squeeze != "avg":
        return f"squeeze `{block.squeeze}`"
    if block.bn is not None:
        return "a norm in the bottleneck"
    parts = (block.fc1, block.act, block.fc2)
    if type(block.act) not in _INNER or any(not type(part).__module__.startswith("torch.nn.modules") for part in parts):
        return "a bottleneck of other layers"
    if any(part._forward_hooks or part._forward_pre_hooks or part._backward_hooks for part in parts):
        return "hooks in the bottleneck"
    return None


def how_computed(block: nn.Module, *, scaled: bool = False) -> str:
    """Say how a fused block is computed where its parameters are now; ``scaled``: its gate reads another value."""
    near = next(block.parameters(), torch.zeros(()))
    plain = why_not(near.device, near.dtype)
    if plain is not None:
        return plain
    parts = _why_in_parts(block) or ("a scale in between" if scaled else None)
    return "one kernel operator" if parts is None else f"tail in a kernel; gate by torch: {parts}"


@functools.cache
def _fused_class(original: Any) -> Any:
    """Make the subclass of a block that takes a shortcut and an activation; one for each class."""

    def __reduce_ex__(self: nn.Module, protocol: Any) -> Any:
        getstate = getattr(self, "__getstate__", None)
        return rebuild_fused, (original,), getstate() if getstate else self.__dict__

    prepare()
    name = f"Fused{original.__name__}"
    attributes = {
        "__module__": original.__module__,
        "__qualname__": name,
        "__doc__": original.__doc__,
        "__reduce_ex__": __reduce_ex__,
        "forward": _fused_forward,
        UNFUSED: original,
    }
    return type(original)(name, (original,), attributes)


@addressed("fused")
def rebuild_fused(original: Any) -> nn.Module:
    """Make an empty block of the fused class: what a pickle calls.

    Raises:
        LoadError: the class is not that of a block with a gate.
    """
    if not (isinstance(original, type) and issubclass(original, nn.Module)):
        raise LoadError("a damaged file: a fused block without its class")
    block = nn.Module.__new__(original)
    if not has_gate(block):
        raise LoadError("a fused block in this file has no gate", seen=original.__name__)
    kind: Any = original
    fused = _fused_class(kind)
    return fused.__new__(fused)  # type: ignore[no-any-return]


def can_fuse(block: nn.Module) -> bool:
    """Return whether a block can take over the operations behind it: it has a gate, and its forward is its class's own."""
    return has_gate(block) and "forward" not in vars(block) and not is_fused(block)


def fuse_block_(block: nn.Module) -> None:
    """Let a block's forward take a shortcut and an activation; one for which ``can_fuse`` holds. Its state is not touched."""
    kind: Any = type(block)
    block.__class__ = _fused_class(kind)


def unfuse_block_(block: nn.Module) -> None:
    """Give a fused block its own class again; others are left as they are."""
    if is_fused(block):
        block.__class__ = class_when_unfused(block)


class NoGate(nn.Module):
    """An identity in the place of a block, fused or not, with which the network computes as if it had none."""

    def forward(
        self,
        x: Tensor,
        shortcut: Optional[Tensor] = None,  # noqa: UP045 -- TorchScript
        activation: str = "none",
        source: Optional[Tensor] = None,  # noqa: UP045
    ) -> Tensor:
        return ungated(x, shortcut, activation, source)


def ungated(
    x: Tensor,
    shortcut: Optional[Tensor] = None,  # noqa: UP045 -- TorchScript
    activation: str = "none",
    source: Optional[Tensor] = None,  # noqa: UP045
) -> Tensor:
    """Compute the output of a block, fused or not, as if its gate were 1. Overwrites nothing."""
    return activated(x if shortcut is None else x + shortcut, activation)
