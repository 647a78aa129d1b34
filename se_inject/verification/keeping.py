"""Check that injection kept the weights and the settings of a network."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import nn

from se_inject.blocks import build_block
from se_inject.forwards import original_class
from se_inject.surgery import Step, steps_of
from se_inject.tables import counted
from se_inject.verification.comparison import same_value
from se_inject.verification.verdicts import Check


def kept_state(before: nn.Module, after: nn.Module, blocks: dict[str, nn.Module]) -> Check:
    """Check that every entry of the state dict is as it was, and that the new ones are the planned blocks'."""
    old, new = before.state_dict(), after.state_dict()
    kept = [key for key, value in old.items() if key in new and same_value(value, new[key])]
    added = [key for key in new if key not in old]
    ours = {id(tensor) for block in blocks.values() for tensor in block.state_dict(keep_vars=True).values()}
    kept_vars = after.state_dict(keep_vars=True)
    foreign = [key for key in added if id(kept_vars[key]) not in ours]
    lost = [key for key in old if key not in kept]
    replaced = [
        step.path
        for step in steps_of(after)
        if step.path in blocks and not _planned_entries(step) <= blocks[step.path].state_dict().keys()
    ]
    text = f"{len(kept)}/{len(old)} entries of the state dict kept, bit-equal; {len(added)} new"
    if lost:
        text += f"; changed or lost: {', '.join(lost[:3])}"
    if foreign:
        text += f"; new and not a block's: {', '.join(foreign[:3])}"
    if replaced:
        text += f"; not the block that was put there: {', '.join(replaced[:3])}"
    return Check("weights kept", not (lost or foreign or replaced), text)


def _planned_entries(step: Step) -> set[str]:
    """Return the names in the state of a new block of this step, or an empty set where the block can't be built anew."""
    with contextlib.suppress(Exception), torch.device("meta"):
        return set(build_block(step.block, step.channels, step.size, step.options, step.init).state_dict())
    return set()


def kept_settings(before: nn.Module, after: nn.Module, blocks: dict[str, nn.Module]) -> Check:
    """Check that the modules' classes, modes and hooks and the parameters' traits are as they were."""
    old, new = dict(before.named_modules()), dict(after.named_modules())
    ours = {id(module) for block in blocks.values() for module in block.modules()}
    changed = [f"{path}: a new module" for path, module in new.items() if path not in old and id(module) not in ours]
    for path, module in old.items():
        twin = new.get(path)
        if twin is None or _class_of(twin) is not _class_of(module):
            changed.append(f"{path or '(the network)'}: class")
            continue
        changed += [f"{path}: {name}" for name in _SETTINGS if _setting(module, name) != _setting(twin, name)]
    parameters = dict(after.named_parameters())
    changed += [
        f"{name}: requires_grad, dtype or device"
        for name, parameter in before.named_parameters()
        if name not in parameters or _traits(parameters[name]) != _traits(parameter)
    ]
    text = f"classes, modes, hooks, requires_grad, dtype and device of {counted(len(old), 'module')} as before"
    return Check("settings kept", not changed, "; ".join(changed[:3]) if changed else text)


def _class_of(module: nn.Module) -> type:
    """Return a module's class as its author wrote it; a copy of a scripted module is scripted, and has another class than the original."""
    return torch.jit.ScriptModule if isinstance(module, torch.jit.ScriptModule) else original_class(module)


_SETTINGS = ("training", "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _traits(parameter: nn.Parameter) -> tuple[Any, ...]:
    return parameter.requires_grad, parameter.dtype, parameter.device


def _setting(module: nn.Module, name: str) -> Any:
    value = getattr(module, name)
    return len(value) if name != "training" else value
