"""Make twins of a network: to be observed with tensors that hold no numbers, or to be run."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map_only

from se_inject.guarding import mark_like
from se_inject.tracing.outlines import outline
from se_inject.tracing.patches import quiet
from se_inject.tracing.twin import twin_of


def substituted(model: nn.Module, how: str, mode: Any = None) -> nn.Module:
    """Make a twin of a network with other tensors.

    Args:
        model: the network. It is only read.
        how: ``meta``: tensors without numbers; ``fake``: those that know their device, of ``mode``; ``real``: the
            network's own parameters, detached, and copies of all else.
        mode: a ``FakeTensorMode``.
    """
    tensor: Callable[[Tensor], Tensor]
    if how == "meta":
        tensor = outline
    elif how == "fake":
        tensor = partial(_fake, mode)
    else:
        tensor = _alias
    return twin_of(model, tensor)


def _fake(mode: Any, tensor: Tensor) -> Tensor:
    return mode.from_tensor(tensor.detach(), static_shapes=True)  # type: ignore[no-any-return]


def _alias(tensor: Tensor) -> Tensor:
    learns = isinstance(tensor, nn.Parameter) and tensor.requires_grad
    return tensor.detach() if learns else tensor.detach().clone()  # forwards write into the others


def rehearsed(model: nn.Module, parameters: dict[int, Tensor] | None = None) -> nn.Module:
    """Make a twin that computes the same as the network, and may be changed: it shares no state with the network.

    But for its parameters, which are the network's own, so that gradients reach them.

    Args:
        model: the network. It is only read.
        parameters: id of a parameter → what the twin has instead.
    """

    def tensor(own: Tensor) -> Tensor:
        other = (parameters or {}).get(id(own))
        return other if other is not None else own if isinstance(own, nn.Parameter) else own.detach().clone()

    return twin_of(model, tensor)


def duplicate(model: nn.Module) -> nn.Module:
    """Copy a network, weights and all, as ``copy.deepcopy`` does; a twin with copies of all tensors where that refuses.

    It does for networks that hold a tensor with a history (old ``weight_norm``), a lock or an open file. What can't be
    copied is shared.
    """
    other: nn.Module | None = None
    if not any(isinstance(module, fx.GraphModule) for module in model.modules()):  # whose copy loses attributes
        with contextlib.suppress(Exception), torch.no_grad():  # else TorchScript's copies have a history
            other = copy.deepcopy(model)
            for tensor, copied_tensor in zip(model.parameters(), other.parameters(), strict=True):
                if copied_tensor.requires_grad != tensor.requires_grad:
                    copied_tensor.requires_grad_(tensor.requires_grad)
            for own, copied in zip(model.modules(), other.modules(), strict=True):
                copied.training = own.training  # modules that are made anew when they are copied forget it
            mark_like(other, model)
    return twin_of(model, _cloned) if other is None else other


def _cloned(tensor: Tensor) -> Tensor:
    clone = tensor.detach().clone(memory_format=torch.preserve_format)
    return nn.Parameter(clone, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else clone


@contextlib.contextmanager
def standing_in(model: nn.Module, how: str) -> Iterator[tuple[nn.Module, Callable[[Any], Any]]]:
    """Make a network's twin in eval mode with other tensors, and a function that makes inputs which match them.

    Meanwhile this thread is quiet and records gradients. The network, and other threads, don't notice.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(quiet())
        stack.enter_context(torch.enable_grad())
        mode = None
        if how == "fake":
            from torch._subclasses.fake_tensor import FakeTensorMode

            mode = stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        twin = substituted(model, how, mode)
        for module in twin.modules():
            module.training = False
        like = next((each.device for each in chain(model.parameters(), model.buffers())), torch.device("cpu"))

        def matching(tensor: Tensor) -> Tensor:
            if how == "meta":
                return tensor.detach().to("meta")
            if mode is not None and tensor.device.type == "meta":  # within the mode no memory is taken
                return torch.empty(tensor.shape, dtype=tensor.dtype, device=like)
            if mode is not None:
                return mode.from_tensor(tensor.detach().to(like), static_shapes=True)  # type: ignore[no-any-return]
            return _with_numbers(tensor).to(like, copy=True)

        yield twin, lambda inputs: tree_map_only(Tensor, matching, inputs)


def shapes_only(tensor: Tensor) -> Tensor:
    """Make a tensor on the meta device with another's shape and dtype."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def _with_numbers(tensor: Tensor) -> Tensor:
    """Make a tensor with numbers in it, the same ones each time."""
    if tensor.device.type != "meta":
        return tensor.detach()
    return torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0)).to(tensor.dtype)
