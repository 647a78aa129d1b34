"""Check that gradients reach every new parameter, and every unit of the blocks."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from se_inject.surgery import steps_of
from se_inject.tables import counted
from se_inject.verification.calls import run_awake
from se_inject.verification.comparison import tensors_in
from se_inject.verification.identity import is_identity, without_blocks
from se_inject.verification.learning import DRAWS, Learning, redrawn
from se_inject.verification.methods import held_in
from se_inject.verification.verdicts import Check
from se_inject.verification.watching import calls_of, failure, named, watched


def gradients(
    after: nn.Module, blocks: dict[str, nn.Module], inputs: Any, may_skip: Callable[[str], bool] = lambda path: False
) -> Check:
    """Ask for gradients of the new parameters, and of every unit in the blocks, over several inputs if need be.

    Args:
        after: the injected network.
        blocks: the new blocks by their paths.
        inputs: of the calls.
        may_skip: says of a module's path whether something around it decides by the data what it calls.
    """
    name = "blocks trainable"
    learning = Learning(blocks)
    outside = blocks.keys() - set().union(*held_in(after, blocks).values())  # methods may be called besides the owner
    old = _awakened(after, learning.parameters)
    ever: set[str] = set()
    owners: set[str] = set()
    for draw in range(DRAWS):
        woken = {**old, **learning.woken(draw)}
        with calls_of(after, blocks) as calls, torch.enable_grad():

            def backward(output: Any, draw: int = draw, woken: dict[str, Tensor] = woken) -> tuple[Counter[str], bool]:
                made = calls.copy()  # before anything is called again in backward
                learning.ask(output, woken, draw)
                return made, after.training

            with watched(blocks) as running:
                try:
                    made, trained = run_awake(after, redrawn(inputs, draw), woken, backward, draw + 1)
                except Exception as error:
                    return Check(name, False, failure(after, error, running))
        ever.update(path for path in blocks if made[path])
        owners.update(owner for owner in (path.rpartition(".")[0] for path in blocks) if made[owner])
        if repeated := sorted(path for path in outside if 0 < made[path.rpartition(".")[0]] < made[path]):
            return Check(name, False, f"called more often than their owners: {', '.join(repeated[:3])}")
        silent = sorted(set(blocks) - ever)  # stochastic depth may have dropped the unit
        if not (silent or learning.missing() or learning.off() or learning.partly_off()):
            break
    skipped = [path for path in silent if (owner := path.rpartition(".")[0]) not in owners and may_skip(owner)]
    if lost := [path for path in silent if path not in skipped]:
        return Check(name, False, f"not called: {', '.join(lost[:3])}")
    if skipped:
        others = {path: block for path, block in blocks.items() if path not in skipped}
        return _with_skipped(gradients(after, others, inputs) if others else Check(name, None, "not checked"), skipped)
    steps = {step.path: step for step in steps_of(after)}
    off = learning.off()
    unreached = learning.missing() or [path for path in off if is_identity(blocks[path], steps[path])]
    if not unreached:
        reached = f"gradients reach all {counted(len(learning.parameters), 'new parameter')} of {counted(len(blocks), 'block')}"
        frozen = [
            key for path, block in blocks.items() for key, p in block.named_parameters(path) if not p.requires_grad
        ]
        found = {"off for every input tried": off, "partly off": learning.partly_off(), "frozen": frozen}
        details = [f"; {what}: {', '.join(some[:3])}{', …' * (len(some) > 3)}" for what, some in found.items() if some]
        return Check(name, True, reached + "".join(details))
    if any("quantized" in type(module).__module__ for module in after.modules()):
        return Check(name, None, "not checked: no gradient passes its quantised modules")
    if not trained:  # a detector's best boxes need not come from everywhere
        seen = f"in eval mode no gradient reached {unreached[0]}"
        return Check(name, None, f"not checked: the network can't be trained on these inputs alone; {seen}")
    silent = sorted({path for path in blocks for key in unreached if f"{key}.".startswith(f"{path}.")})
    own = without_own_gradient(after, blocks, silent, old, inputs)
    if None not in own.values() and "zero" not in own.values():
        rest = f"; gradients reach the other {counted(len(blocks) - len(own), 'block')}" * (len(own) < len(blocks))
        places = ", ".join(silent[:3]) + ", …" * (len(silent) > 3)
        seen = f"without blocks, too, the network passes no gradient back to {counted(len(own), 'place')}: {places}"
        return Check(name, None, seen + rest)
    owner = next(path for path in silent if own[path] != "none")
    unreached = [key for key in unreached if f"{key}.".startswith(f"{owner}.")]
    zero = "; without blocks, too, the gradient at its place is zero" * (own[owner] == "zero")
    return Check(name, False, f"no gradient reaches {', '.join(unreached[:3])}: {named(after, owner)}{zero}")


def _with_skipped(check: Check, skipped: list[str]) -> Check:
    """Add to the check of the other blocks that these were not reached: the network decides by the data what it calls."""
    places = ", ".join(skipped[:3]) + ", …" * (len(skipped) > 3)
    seen = f"the network decides by the data what it calls, and no input tried reaches {places}"
    return Check(check.name, check.passed, f"{check.detail}; {seen}")


def without_own_gradient(
    after: nn.Module, blocks: dict[str, nn.Module], paths: list[str], old: dict[str, Tensor], inputs: Any
) -> dict[str, str | None]:
    """Find out which gradient arrives at the places of blocks in the network without blocks: it may round, detach, or be off itself.

    Args:
        after: the injected network.
        blocks: the new blocks by their paths.
        paths: of those that are asked for.
        old: weights of the network that were zero, and random numbers for them.
        inputs: of the calls.

    Returns:
        for each path ``none`` if no way leads back there, ``zero`` if the gradient is zero, None if one arrives, or if that isn't known.
    """
    connected: set[str] = set()
    reached: set[str] = set()
    values: dict[str, list[Tensor]] = {}

    def taken(path: str, value: Tensor) -> Tensor:
        value = value if value.requires_grad else value.detach().requires_grad_()
        values.setdefault(path, []).append(value)
        return value

    def backward(output: Any) -> None:
        outputs = [leaf for leaf in tensors_in(output) if leaf.requires_grad]
        asked = [(path, value) for path, found in values.items() for value in found]
        if not outputs or not asked:
            return
        generator = torch.Generator().manual_seed(3)
        directions = [torch.randn(out.shape, generator=generator).to(out) for out in outputs]
        grads = torch.autograd.grad(outputs, [value for _, value in asked], directions, allow_unused=True)
        arrived = [(path, grad) for (path, _), grad in zip(asked, grads, strict=True) if grad is not None]
        connected.update(path for path, _ in arrived)
        reached.update(path for path, grad in arrived if grad.any())

    with without_blocks(after, blocks), contextlib.ExitStack() as stack, torch.enable_grad():
        for path in paths:
            place = after.get_submodule(path)
            hook = place.register_forward_pre_hook(
                lambda _, args, path=path: (taken(path, args[0]), *args[1:]) if args else None
            )
            stack.callback(hook.remove)
        for draw in range(DRAWS):
            values.clear()
            with contextlib.suppress(Exception):
                run_awake(after, redrawn(inputs, draw), old, backward, draw + 1)
            if values.keys() != set(paths):  # what isn't called tells nothing
                return dict.fromkeys(paths)
    return {path: None if path in reached else "zero" if path in connected else "none" for path in paths}


def _awakened(model: nn.Module, new: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Make random numbers for the old weights that are all zero (a residual branch's last scale, as many start it).

    What they multiply would get no gradient, which says nothing about the new blocks.
    """
    generator = torch.Generator().manual_seed(4)
    return {
        name: torch.randn(parameter.shape, generator=generator).to(parameter)
        for name, parameter in model.named_parameters()
        if name not in new and parameter.is_floating_point() and _all_zero(parameter)
    }


def _all_zero(tensor: Tensor) -> bool:
    return not tensor.flatten()[:1].any() and not tensor.any()  # of most, one number tells it
