"""A model with stand-ins for its tensors, and everything as before afterwards."""

from __future__ import annotations

import contextlib
import logging
import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils._pytree import tree_map_only

from se_inject.tracing.tracer import restore, snapshot


@contextlib.contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Put every module's attributes back as they were: flags, hooks, and whatever its forward stores or caches."""
    before = [(module, snapshot(module)) for module in model.modules()]
    try:
        yield
    finally:
        for module, state in before:
            restore(module, state)


@contextlib.contextmanager
def standing_in(model: nn.Module, how: str) -> Iterator[Callable[[Any], Any]]:
    """The model in eval mode with stand-ins for its tensors; the function given makes inputs that match them.

    Afterwards everything is as before: attributes, modes, hooks, and the random generator.
    """
    python_state = random.getstate()
    chatter = logging.getLogger("torch._subclasses.fake_tensor")
    disabled, chatter.disabled = chatter.disabled, True
    with preserved(model), warnings.catch_warnings(), torch.random.fork_rng(devices=[]), torch.enable_grad():
        warnings.simplefilter("ignore")
        for module in model.modules():
            module.training = False
        try:
            with swapped(model, how) as place:
                yield place
        finally:
            random.setstate(python_state)
            chatter.disabled = disabled


@contextlib.contextmanager
def swapped(module: nn.Module, how: str) -> Iterator[Callable[[Any], Any]]:
    """Stand-ins for all parameters and buffers, and the function that makes the inputs match them."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    if how == "real":
        state = {
            name: tensor.detach().clone() if name not in dict(module.named_parameters()) else tensor.detach()
            for name, tensor in tensors.items()
        }
        device = next((tensor.device for tensor in tensors.values()), torch.device("cpu"))
        with _reparametrize_module(module, state, tie_weights=True):
            yield lambda inputs: tree_map_only(Tensor, lambda t: _with_numbers(t).to(device, copy=True), inputs)
        return
    if how == "meta":
        meta = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
        with _reparametrize_module(module, meta, tie_weights=True):
            yield lambda inputs: tree_map_only(Tensor, lambda t: t.detach().to("meta"), inputs)
        return
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake: dict[str, Tensor] = {
            name: mode.from_tensor(tensor.detach(), static_shapes=True) for name, tensor in tensors.items()
        }
        device = next((tensor.device for tensor in tensors.values()), torch.device("cpu"))
        with _reparametrize_module(module, fake, tie_weights=True):
            yield lambda inputs: tree_map_only(
                Tensor, lambda t: mode.from_tensor(_with_numbers(t).to(device), static_shapes=True), inputs
            )


def forget_modes(model: nn.Module) -> None:
    """Take the mode flags out of the modules' own attributes, so that every read of one passes the observer."""
    for module in model.modules():
        if not isinstance(module, torch.jit.ScriptModule):
            module.__dict__.pop("training", None)


def shapes_only(tensor: Tensor) -> Tensor:
    """A tensor on the meta device with another's shape and dtype."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def _with_numbers(tensor: Tensor) -> Tensor:
    """A tensor with numbers in it."""
    if tensor.device.type != "meta":
        return tensor.detach()
    return torch.randn(tensor.shape).to(tensor.dtype)
