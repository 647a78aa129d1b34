"""Measure how much the outputs or a metric of a network change when blocks are replaced by constant gates."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from se_inject.errors import DataError
from se_inject.gates.batches import Progress, moved, outputs_of
from se_inject.gates.excitations import eval_mode
from se_inject.tracing import copied

Metric = Callable[[nn.Module], float]
"""A figure of a network that is better the larger it is: its accuracy, say."""


class ChangeMeter:
    """Measures what changes when some blocks are replaced by constant gates."""

    def __init__(self, model: nn.Module, batches: Any, metric: Metric | None, progress: Progress | None) -> None:
        self.model, self.batches, self.metric, self.progress = model, batches, metric, progress
        self.passes = 1  # the excitations, by which the blocks are ranked
        self.tries = 0
        self.before: float | None = None
        self.lost = 0

    def change(self, gates: dict[str, Tensor]) -> float:
        """Measure the change of the outputs, or the loss of the metric, with these blocks as constants."""
        self.passes += 1
        self.tries += 1
        if self.metric is not None:
            if self.before is None:
                self.before = self._measured()
                self.passes += 1
            with constant_gates(self.model, gates):
                return self.before - self._measured()
        sums: dict[int, tuple[float, float]] = {}
        self.lost = 0
        with eval_mode(self.model):
            for batch in moved(self.model, self.batches, self.progress):
                again = batch._replace(args=copied(batch.args), kwargs=copied(batch.kwargs))
                before = _numbers(outputs_of(self.model, batch))
                with constant_gates(self.model, gates):
                    after = _numbers(outputs_of(self.model, again))
                if [tensor.shape for tensor in before] != [tensor.shape for tensor in after]:
                    return math.inf
                for number, (one, other) in enumerate(zip(before, after, strict=True)):
                    good = one.isfinite() & other.isfinite()
                    self.lost += int((~good).sum())
                    difference, size = sums.get(number, (0.0, 0.0))
                    sums[number] = (
                        difference + float((one - other)[good].square().sum()),
                        size + float(one[good].square().sum()),
                    )
        if not sums:
            raise DataError("the network's output holds no numbers to compare", hint="give a `metric`")
        return max(_relative(difference, size) for difference, size in sums.values())

    def _measured(self) -> float:
        assert self.metric is not None
        with eval_mode(self.model):
            value = float(self.metric(self.model))
        if not math.isfinite(value):
            raise DataError("the metric is not a finite number", seen=str(value))
        return value


def _relative(difference: float, size: float) -> float:
    return math.sqrt(difference / size) if size else (math.inf if difference else 0.0)


def _numbers(output: Any) -> list[Tensor]:
    return [leaf.double() for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


@contextlib.contextmanager
def constant_gates(model: nn.Module, gates: dict[str, Tensor]) -> Iterator[None]:
    """Let these blocks multiply by a constant for each channel for a while, instead of by their gates."""
    blocks = [(model.get_submodule(path), gate) for path, gate in gates.items()]
    try:
        for block, gate in blocks:
            block.__dict__["forward"] = _constant(gate)
        yield
    finally:
        for block, _ in blocks:
            block.__dict__.pop("forward", None)


def _constant(gate: Tensor) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        return x * gate.to(device=x.device, dtype=x.dtype).reshape(1, -1, *[1] * (x.dim() - 2))

    return forward
