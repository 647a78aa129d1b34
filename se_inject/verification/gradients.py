"""Check that gradients reach every new parameter, and every unit of the blocks."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from se_inject.surgery import steps_of
from se_inject.tables import counted
from se_inject.verification.calls import run_awake
from se_inject.verification.identity import is_identity
from se_inject.verification.learning import DRAWS, Learning, redrawn
from se_inject.verification.verdicts import Check
from se_inject.verification.watching import calls_of, failure, named, watched


def gradients(after: nn.Module, blocks: dict[str, nn.Module], inputs: Any) -> Check:
    """Ask for gradients of the new parameters, and of every unit in the blocks, over several inputs if need be."""
    name = "blocks trainable"
    learning = Learning(blocks)
    woken = {**_awakened(after, learning.parameters), **learning.woken()}
    ever: set[str] = set()
    for draw in range(DRAWS):
        with calls_of(after, blocks) as calls, torch.enable_grad():

            def backward(output: Any, draw: int = draw) -> tuple[Counter[str], bool]:
                made = calls.copy()  # before anything is called again in backward
                learning.ask(output, woken, draw)
                return made, after.training

            with watched(blocks) as running:
                try:
                    made, trained = run_awake(after, redrawn(inputs, draw), woken, backward, draw + 1)
                except Exception as error:
                    return Check(name, False, failure(after, error, running))
        ever.update(path for path in blocks if made[path])
        if repeated := sorted(path for path in blocks if 0 < made[path.rpartition(".")[0]] < made[path]):
            return Check(name, False, f"called more often than their owners: {', '.join(repeated[:3])}")
        silent = sorted(set(blocks) - ever)  # stochastic depth may have dropped the unit
        if not (silent or learning.missing() or learning.off() or learning.partly_off()):
            break
    if silent:
        return Check(name, False, f"not called: {', '.join(silent[:3])}")
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
    owner = next(path for path in blocks if f"{unreached[0]}.".startswith(f"{path}."))
    return Check(name, False, f"no gradient reaches {', '.join(unreached[:3])}: {named(after, owner)}")


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
