"""Prepare an injected network for training: its new parameters, a frozen backbone, an optimizer group, blocks switched off."""

from __future__ import annotations

import contextlib
import difflib
import functools
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from se_inject.blocks import ungated
from se_inject.errors import OptionError, SurgeryError
from se_inject.forwards import ALWAYS_ON, class_when_on, is_frozen
from se_inject.surgery import freeze_statistics_, injected_blocks, thaw_statistics_
from se_inject.tables import Printed


@dataclass(frozen=True, repr=False)
class Trainable(Printed):
    """How many parameters of a network an optimizer would change; printed as one line.

    Args:
        params: parameters that require gradients.
        total: all parameters.
        frozen_norms: batch normalisations whose statistics are frozen.
    """

    params: int
    total: int
    frozen_norms: int = 0

    def text(self) -> str:
        """Format the counts as one line."""
        return trainable_line(self)

    def summary(self) -> str:
        """Say how many parameters require gradients."""
        return f"{self.params:,} of {self.total:,} parameters"


def trainable(model: nn.Module) -> Trainable:
    """Count the parameters of a network that require gradients. Nothing is changed."""
    parameters = list(model.parameters())
    frozen = sum(is_frozen(module) for module in model.modules())
    return Trainable(sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters), frozen)


def injected_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Iterate over the parameters of the injected blocks alone, each once, for an optimizer group of their own."""
    for _, parameter in _named_parameters(model):
        yield parameter


def freeze_backbone_(model: nn.Module, *, batch_norm: bool = False) -> nn.Module:
    """Let only the injected blocks be trained: all other parameters stop requiring gradients.

    Batch normalisation goes on updating its running statistics in training mode, frozen parameters or not, unless
    ``batch_norm`` is set. Then the backbone's normalisations stay in eval mode: they use the statistics they have and
    keep them bit for bit, also after ``model.train()``. For that each gets a subclass of its own class that ignores
    ``train()``. Statistics that are frozen already stay so; ``unfreeze_backbone_`` and ``eject_`` thaw them.

    Args:
        model: an injected network.
        batch_norm: freeze the statistics of batch normalisation outside of the blocks.

    Returns:
        the model itself.

    Raises:
        SurgeryError: it holds no block of ours.
    """
    ours = {id(parameter) for _, parameter in _named_parameters(model)}
    inside = {id(module) for _, block in _blocks(model) for module in block.modules()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in ours)
    for module in model.modules():
        if batch_norm and id(module) not in inside:
            freeze_statistics_(module)
    return model


def unfreeze_backbone_(model: nn.Module, *, batch_norm: bool = True) -> nn.Module:
    """Let the whole network be trained again: all parameters require gradients, frozen statistics are updated.

    The inverse of ``freeze_backbone_``; ``model.requires_grad_(True)`` alone leaves frozen statistics frozen. Doesn't
    remember which parameters did not require gradients before. An optimizer made in between has only the parameters it
    was given: ``optimizer.add_param_group`` adds the rest.

    Args:
        model: any network.
        batch_norm: thaw the statistics of batch normalisation too; they take the mode, train or eval, of the model.

    Returns:
        the model itself.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point() or parameter.is_complex():
            parameter.requires_grad_(True)
    for module in model.modules():
        if batch_norm:
            thaw_statistics_(module, model.training)
    return model


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Switch the injected blocks off inside a ``with``: every block returns what it is given (a fused one still adds its
    shortcut and activates).

    The network then computes what it computes without blocks, bit for bit, and keeps its parameters, buffers, modes
    and state dict. It holds for calls made in this thread (or asyncio task): other threads that use the same network at
    the same time have the blocks on. The blocks are on again when the ``with`` is left, by an exception too. It nests.

    A compiled network is compiled once more for calls with the blocks off. What is traced or exported inside holds the
    network without blocks; a file that was exported before is not changed by it. Where activations are recomputed in the
    backward pass (checkpointing), that pass must be inside as well.

    Args:
        model: an injected network.

    Yields:
        the model itself.

    Raises:
        SurgeryError: it holds no block of ours.
    """
    blocks = list({id(block): block for _, block in _blocks(model)}.values())
    with _switching:
        for block in blocks:
            _users[id(block)] = _users.get(id(block), 0) + 1
            kind: Any = type(block)
            if _users[id(block)] == 1:
                _class_of.__set__(block, _switchable(kind))
    before = _off.set(_off.get() | {id(block) for block in blocks})
    try:
        yield model
    finally:
        _off.reset(before)
        with _switching:
            for block in blocks:
                _users[id(block)] -= 1
                if not _users[id(block)]:
                    del _users[id(block)]
                    block.__class__ = class_when_on(block)


_off: ContextVar[frozenset[int]] = ContextVar("blocks that are off", default=frozenset())
_users: dict[int, int] = {}  # how many `with disabled` a block is in at present, in all threads
_switching = threading.Lock()
_class_of: Any = vars(object)["__class__"]


@functools.cache
def _switchable(original: Any) -> Any:
    """Make the subclass of a block's class that returns its input where the block is off."""

    def forward(self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        return ungated(x, *args, **kwargs) if id(self) in _off.get() else original.forward(self, x, *args, **kwargs)

    def __reduce_ex__(self: nn.Module, protocol: Any) -> Any:  # copies and pickles are of the block's own class
        function, made_of, *rest = original.__reduce_ex__(self, protocol)
        return function, tuple(original if part is type(self) else part for part in made_of), *rest

    attributes = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "__reduce_ex__": __reduce_ex__,
        "__class__": property(lambda self: original, _class_of.__set__),  # pickle compares it
        "forward": forward,
        ALWAYS_ON: original,
    }
    return type(original)(original.__name__, (original,), attributes)


def add_to_optimizer(optimizer: Optimizer, model: nn.Module, **group: Any) -> dict[str, Any]:
    """Add the injected parameters to an optimizer as one group of their own. No other group or state is touched.

    Learning-rate schedulers keep one value for each group that they found: add the group first, make them afterwards.

    ``weight_decay`` is worth a thought. With the identity start the gate is 2·σ(W2 …), so decay pulls it to 1 and the
    block to x ↦ x; with the paper's start it pulls the gate to ½. ``weight_decay=0`` leaves it alone.

    Args:
        optimizer: new, or with any number of groups and steps behind it.
        model: an injected network.
        **group: options of the group, ``lr=1e-3``; the rest are the optimizer's defaults.

    Returns:
        the new group.

    Raises:
        SurgeryError: no block of ours with parameters.
        OptionError: an option the optimizer doesn't have, or some of the parameters are in it already.
    """
    for key in group:
        if key not in optimizer.defaults and key != "initial_lr":
            close = difflib.get_close_matches(key, optimizer.defaults, n=1)
            raise OptionError(
                f"{type(optimizer).__name__} has no option `{key}`",
                seen=", ".join(optimizer.defaults),
                hint=f"did you mean `{close[0]}`?" if close else None,
            )
    named = list(_named_parameters(model))
    if not named:
        raise SurgeryError("the blocks of this model have no parameters", hint="there is nothing to optimise in them")
    held = {id(parameter) for existing in optimizer.param_groups for parameter in existing["params"]}
    if twice := [name for name, parameter in named if id(parameter) in held]:
        raise OptionError(
            f"{len(twice)} of {len(named)} injected parameters are in the optimizer already",
            seen=f"`{twice[0]}` the first",
            hint="make the optimizer from the other parameters, or leave it as it is",
        )
    wants_names = any("param_names" in existing for existing in optimizer.param_groups)
    optimizer.add_param_group({"params": named if wants_names else [parameter for _, parameter in named], **group})
    return optimizer.param_groups[-1]


def _blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    blocks = list(injected_blocks(model))
    if not blocks:
        raise SurgeryError("this model holds no block of se-inject's", seen=f"a {type(model).__name__}")
    return blocks


def _named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """List the injected parameters with their names in the model, each once."""
    seen: set[int] = set()
    for path, block in _blocks(model):
        for name, parameter in block.named_parameters(path):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield name, parameter


def trainable_line(count: Trainable) -> str:
    """Say how much of a network is trained."""
    share = f" ({100 * count.params / count.total:.1f} %)" if count.total else ""
    frozen = f", statistics of {count.frozen_norms} batch normalisations frozen" if count.frozen_norms else ""
    return f"trainable {_millions(count.params)} of {_millions(count.total)}{share}{frozen}"


def _millions(number: int) -> str:
    """Format a number with one decimal in millions, and in full below."""
    return f"{number / 1e6:.1f} M" if number >= 1e5 else f"{number:,}"
