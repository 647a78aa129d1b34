"""What an injected network is trained with: its new parameters, a frozen backbone, an optimizer group."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from se_inject.errors import OptionError, SurgeryError
from se_inject.surgery import freeze_statistics_, injected_blocks, thaw_statistics_


@dataclass(frozen=True)
class Trainable:
    """How many parameters of a network an optimizer would change; printed as one line.

    Args:
        params: parameters that require gradients.
        total: all parameters.
        frozen_norms: batch normalisations whose statistics are frozen.
    """

    params: int
    total: int
    frozen_norms: int = 0

    def __str__(self) -> str:
        return trainable_line(self)


def trainable(model: nn.Module) -> Trainable:
    """How many of a network's parameters require gradients. Nothing is changed."""
    parameters = list(model.parameters())
    frozen = sum(hasattr(type(module), "_se_inject_thawed") for module in model.modules())
    return Trainable(sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters), frozen)


def injected_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of the injected blocks alone, each once, for an optimizer group of their own."""
    for _, parameter in _named_parameters(model):
        yield parameter


def freeze_backbone_(model: nn.Module, *, batch_norm: bool = False) -> nn.Module:
    """Let only the injected blocks be trained: all other parameters stop requiring gradients.

    Batch normalisation goes on updating its running statistics in training mode, frozen parameters or not, unless
    ``batch_norm`` is set. Then the backbone's normalisations stay in eval mode: they use the statistics they have and
    keep them bit for bit, also after ``model.train()``. For that each gets a subclass of its own class that ignores
    ``train()``; ``freeze_backbone_(model)`` takes it back, ``eject_`` does as well.

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
        if id(module) in inside:
            continue
        if batch_norm:
            freeze_statistics_(module)
        else:
            thaw_statistics_(module, model.training)
    return model


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
    """The injected parameters with their names in the model, each once."""
    seen: set[int] = set()
    for path, block in _blocks(model):
        for name, parameter in block.named_parameters(path):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield name, parameter


def trainable_line(count: Trainable) -> str:
    """How much of a network is trained."""
    share = f" ({100 * count.params / count.total:.1f} %)" if count.total else ""
    frozen = f", statistics of {count.frozen_norms} batch normalisations frozen" if count.frozen_norms else ""
    return f"trainable {_millions(count.params)} of {_millions(count.total)}{share}{frozen}"


def _millions(number: int) -> str:
    """With one decimal in millions, and in full below."""
    return f"{number / 1e6:.1f} M" if number >= 1e5 else f"{number:,}"
