"""Check that every part of the new blocks can learn: gradients of their parameters, unit by unit, over several inputs.

A unit behind a ReLU that is off for every input gets no gradient, ever. At the identity start a last layer of zeros hides what
is before it, so zeros among the new weights are random numbers while gradients are asked for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from se_inject.verification.comparison import tensors_in

DRAWS = 4
"""How often gradients are asked for: stochastic depth may drop a branch at random, and a unit may be off for some inputs."""
_WOKEN_SCALES = (0.1, 1e-3, 1e-5, 0.1)
"""The size of the random numbers among the new weights in each draw: where a network's values are huge, large ones saturate a gate."""
_HALF_SCALES = (2.0**6, 2.0**12, 1.0, 2.0**3)
"""By what gradients in float16 are scaled in each draw: small ones are rounded to zero."""


class Learning:
    """Which of the new parameters got a gradient so far.

    Args:
        blocks: the new blocks by their paths.
    """

    def __init__(self, blocks: dict[str, nn.Module]) -> None:
        self.blocks = {
            path: {key: p for key, p in block.named_parameters() if p.requires_grad} for path, block in blocks.items()
        }
        self.parameters = {f"{path}.{key}": p for path, own in self.blocks.items() for key, p in own.items()}
        self._reached: set[str] = set()
        self._rows: dict[str, Tensor] = {}
        """For each parameter, which of its rows got a gradient that is not zero."""

    def woken(self, draw: int) -> dict[str, Tensor]:
        """Return random numbers for the new weights that are all zero.

        Args:
            draw: the number of this try; in some the numbers are small.
        """
        generator = torch.Generator().manual_seed(5)
        return {
            name: (_WOKEN_SCALES[draw] * torch.randn(p.shape, generator=generator)).to(p).requires_grad_()
            for name, p in self.parameters.items()
            if name.endswith("weight") and not p.any()
        }

    def ask(self, output: Any, woken: dict[str, Tensor], draw: int) -> None:
        """Note which parameters the gradient of a random projection of the outputs reaches.

        Args:
            output: of a call in which ``woken`` stood for parameters of the same names.
            woken: weights that were zero.
            draw: the number of this try.
        """
        outputs = [leaf for leaf in tensors_in(output) if leaf.requires_grad]
        if not self.parameters or not outputs:
            return
        targets = {name: woken.get(name, p) for name, p in self.parameters.items()}
        generator = torch.Generator().manual_seed(3)
        half = any(target.dtype == torch.float16 for target in targets.values())
        scale = _HALF_SCALES[draw] if half else 1.0
        directions = [scale * torch.randn(out.shape, generator=generator).to(out) for out in outputs]
        grads = torch.autograd.grad(outputs, list(targets.values()), directions, allow_unused=True)
        for name, grad in zip(targets, grads, strict=True):
            if grad is not None:
                hit = (grad != 0) & grad.isfinite() if half else grad != 0  # what overflows when scaled tells nothing
                rows = hit.flatten(1).any(1) if grad.dim() > 1 else hit.any()[None]
                self._reached.add(name)
                self._rows[name] = self._rows[name] | rows if name in self._rows else rows

    def missing(self) -> list[str]:
        """Return the parameters that no path leads to."""
        return [name for name in self.parameters if name not in self._reached]

    def off(self) -> list[str]:
        """Return the blocks of which no weight got a gradient."""
        return [path for path, own in self.blocks.items() if own and not self._learns(path)]

    def _learns(self, path: str) -> bool:
        """Return whether a weight matrix of a block gets a gradient; for a block without one, whether any parameter does."""
        own = self.blocks[path]
        names = [f"{path}.{key}" for key in own]
        matrices = [name for name in names if self.parameters[name].dim() > 1]
        return any(bool(self._rows[name].any()) for name in matrices or names if name in self._rows)

    def partly_off(self) -> list[str]:
        """Return the blocks with units or weight matrices that got no gradient: ``layer1.0.se (1 of 4 units)``."""
        found = []
        for path, own in self.blocks.items():
            if not self._learns(path):
                continue
            parts = []
            for key, parameter in own.items():
                rows = self._rows.get(f"{path}.{key}")
                if parameter.dim() < 2 or rows is None or bool(rows.all()):
                    continue
                if not bool(rows.any()):
                    parts.append(key)
                elif len(rows) < parameter[0].numel():  # it reduces: its rows are inner units
                    parts.append(f"{int((~rows).sum())} of {len(rows)} units")
            if parts:
                found.append(f"{path} ({', '.join(parts)})")
        return found


def redrawn(inputs: Any, draw: int) -> Any:
    """Return the inputs of a try: as they are in the first, with noise in the others."""
    if not draw:
        return inputs
    generator = torch.Generator().manual_seed(draw)

    def noisy(value: Tensor) -> Tensor:
        if not value.is_floating_point():
            return value
        noise = torch.randn(value.shape, generator=generator).to(value)
        return value + noise * (value.std() if value.numel() > 1 else 1)

    return tree_map_only(Tensor, noisy, inputs)
