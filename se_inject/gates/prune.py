"""Drop blocks whose gates hardly depend on the image: the mean of such a gate is folded into the weights before it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from se_inject.blocks import is_fused
from se_inject.cost import Cost, Latency, measure_latency, rows_of_steps
from se_inject.errors import DataError, OptionError, SurgeryError, TraceError
from se_inject.forwards import original_class
from se_inject.gates.batches import Progress, moved
from se_inject.gates.changes import ChangeMeter, Metric
from se_inject.gates.excitations import eval_mode
from se_inject.gates.folding import Fold, Folds, NotFoldable, fold_
from se_inject.gates.statistics import Excitations
from se_inject.gates.text import pruned_text
from se_inject.surgery import Step, own_steps, put_back_, remove_
from se_inject.tables import Printed, counted
from se_inject.tracing import Trace, observe_model


@dataclass(frozen=True, eq=False)
class Dropped:
    """One block that was folded away.

    Args:
        path: where it was.
        step: what had been put where.
        into: paths of the modules into whose weights its mean gate went.
        variation: how much its gate varied, as a share of its size.
        change: the change measured with it and all before it gone.
        saved: what it had cost.
    """

    path: str
    step: Step
    into: tuple[str, ...]
    variation: float
    change: float
    saved: Cost


@dataclass(frozen=True, eq=False, repr=False)
class Pruned(Printed):
    """The result of ``prune_blocks_``, printed as a table.

    Args:
        model: class name of the network.
        dropped: the blocks that are gone, in the order in which they went.
        kept: those that stayed, by path, with the reason.
        change: the change of the output, or the loss of the metric, with all of them gone.
        tolerance: the most that was allowed.
        measure: what was measured.
        passes: how often the data was gone through.
        notes: what the user should know.
    """

    model: str
    dropped: tuple[Dropped, ...]
    kept: dict[str, str]
    change: float
    tolerance: float
    measure: str
    passes: int
    notes: tuple[str, ...] = ()
    _weights: dict[str, Tensor] = field(default_factory=dict, repr=False)
    _blocks: dict[str, nn.Module] = field(default_factory=dict, repr=False)
    _steps: tuple[Step, ...] = field(default=(), repr=False)

    def __len__(self) -> int:
        return len(self.dropped)

    def text(self) -> str:
        """Format the dropped and the kept blocks as a table."""
        return pruned_text(self)

    def summary(self) -> str:
        """Say how many blocks are gone."""
        return f"{len(self.dropped)} of {counted(len(self.dropped) + len(self.kept), 'block')} dropped"

    @property
    def saved(self) -> Cost:
        """The cost of all dropped blocks together."""
        return sum((block.saved for block in self.dropped), Cost())

    def undo_(self, model: nn.Module, example_inputs: Any = None) -> nn.Module:
        """Put the blocks and the weights in front of them back, bit for bit, in this process.

        Args:
            model: the network that was pruned; it must not have been trained since.
            example_inputs: as for ``plan``.

        Raises:
            SurgeryError: the weights are not those that pruning left.
        """
        state = dict(model.named_parameters())
        if missing := [name for name in self._weights if name not in state]:
            raise SurgeryError("this is not the network that was pruned", seen=f"it has no `{missing[0]}`")
        if self._blocks:
            put_back_(model, observe_model(model, example_inputs), self._steps, self._blocks)
        with torch.no_grad():
            for name, tensor in self._weights.items():
                state[name].copy_(tensor)
        return model


def prune_blocks_(
    model: nn.Module,
    excitations: Excitations,
    *,
    tolerance: float = 0.01,
    batches: Iterable[Any] | None = None,
    metric: Metric | None = None,
    example_inputs: Any = None,
    progress: Progress | None = None,
) -> Pruned:
    """Drop the blocks whose gates hardly depend on the image, in place.

    Each becomes the mean of its gate, multiplied into the convolution or norm in front of it, which for a constant gate
    changes nothing but rounding. The blocks whose gates vary least go first. After each the change is measured over the
    data, against the network as it was, and the block stays if it would be more than the tolerance. The data is gone
    through at most twice for each block that goes, and once more. Blocks that can't be folded exactly (behind a SiLU, at a
    value that is read elsewhere too) stay. Nothing is trained, and nothing of the network is changed if an error is raised.

    Args:
        model: an injected network.
        excitations: what its gates do, from ``excitations``.
        tolerance: the most that may change: of the outputs the root mean square of the difference over that of the
            outputs, or of the metric how much smaller it may become.
        batches: the data to measure on; None: that of the excitations, if it can be gone through again.
        metric: a function of the network to measure instead, better the larger it is.
        example_inputs: as for ``plan``; None: the first batch.
        progress: called after every batch.

    Raises:
        SurgeryError: the network holds no block of ours, not those of the excitations, or its blocks are fused.
        OptionError: a negative tolerance, or no data to measure on.
        DataError: the network fails on the data.
    """
    steps = {step.path: step for step in own_steps(model)}
    if any(is_fused(model.get_submodule(path)) for path in steps):
        raise SurgeryError(
            "the blocks of this model are fused", hint="`si.unfuse_(model)` first; fuse again afterwards"
        )
    batches = excitations.source if batches is None else batches
    _check(excitations, steps, tolerance, batches, metric)
    trace = _observed(model, example_inputs, batches)
    folds, kept = _foldable(model, trace, excitations, steps)
    ranked = sorted(folds, key=lambda path: _variation(excitations, path))
    means = {path: _mean_gate(excitations, path) for path in ranked}
    meter = ChangeMeter(model, batches, metric, progress)
    chosen: dict[str, float] = {}
    for path in ranked:
        constant = all(block.is_constant for block in excitations if block.path == path)
        if meter.tries > max(2 * len(chosen) - 1, 0) and not constant:
            kept[path] = "not tried: enough passes over the data"
            continue
        change = meter.change({each: means[each] for each in (*chosen, path)})
        if change <= tolerance:
            chosen[path] = change
        else:
            kept[path] = f"without it the change would be {change:.3g}"
    return _fold_all(model, trace, excitations, steps, folds, chosen, means, kept, tolerance, meter)


def _observed(model: nn.Module, example_inputs: Any, batches: Any) -> Trace:
    """Observe one call of the network: on the example inputs, or on the first batch of the data."""
    if example_inputs is None and batches is not None:
        first = next(moved(model, batches))
        try:
            return observe_model(model, first.args, first.kwargs)
        except TraceError as error:
            raise DataError("the network fails on the data", seen=error.seen, hint=error.hint) from error
    return observe_model(model, example_inputs)


def _check(
    excitations: Excitations, steps: dict[str, Step], tolerance: float, batches: Any, metric: Metric | None
) -> None:
    if not 0 <= tolerance < math.inf:
        raise OptionError("the tolerance is a number from 0 up", seen=str(tolerance))
    if batches is None and metric is None:
        raise OptionError(
            "there is no data to measure the change on",
            seen="the excitations are of batches that can't be gone through again",
            hint="prune_blocks_(model, excitations, batches=loader)",
        )
    if strange := [block.path for block in excitations if block.path not in steps]:
        raise SurgeryError(
            "the excitations are of another network", seen=f"there is no block `{strange[0]}` in this one"
        )
    for block in excitations:
        if block.channels != steps[block.path].channels:
            seen = f"`{block.path}` has {steps[block.path].channels} channels, not {block.channels}"
            raise SurgeryError("the excitations are of another network", seen=seen)


def _foldable(
    model: nn.Module, trace: Trace, excitations: Excitations, steps: dict[str, Step]
) -> tuple[dict[str, tuple[Fold, ...]], dict[str, str]]:
    """Find the modules that each block's gate can be folded into, and the reason for each that can't be."""
    finder = Folds(trace, list(steps))
    folds: dict[str, tuple[Fold, ...]] = {}
    kept = dict.fromkeys(steps, "its gate was not seen")
    for block in excitations:
        if block.path in folds or (block.path in kept and kept[block.path] != "its gate was not seen"):
            continue
        try:
            if block.positions > 1:
                raise NotFoldable("it has a gate for every position")
            if callable(getattr(type(model.get_submodule(block.path)), "channel_gate", None)):
                raise NotFoldable("its channel gate is a part of what it does")
            found = finder.of(block.path, block.channels)
            negative = any(float(each.mean.min()) < 0 for each in excitations if each.path == block.path)
            if negative and any(fold.needs_positive for fold in found):
                raise NotFoldable("its mean gate is negative, and a ReLU or a max pooling stands in front")
            folds[block.path] = found
            del kept[block.path]
        except NotFoldable as reason:
            kept[block.path] = f"it can't be folded: {reason}"
    return folds, kept


def _variation(excitations: Excitations, path: str) -> float:
    return max(block.variation for block in excitations if block.path == path)


def _mean_gate(excitations: Excitations, path: str) -> Tensor:
    """Compute the mean gate of a block over the examples and calls."""
    blocks = [block for block in excitations if block.path == path]
    whole = sum(block.examples for block in blocks)
    return torch.stack([block.mean * (block.examples / whole) for block in blocks]).sum(0)


def _fold_all(
    model: nn.Module,
    trace: Trace,
    excitations: Excitations,
    steps: dict[str, Step],
    folds: dict[str, tuple[Fold, ...]],
    chosen: dict[str, float],
    means: dict[str, Tensor],
    kept: dict[str, str],
    tolerance: float,
    meter: ChangeMeter,
) -> Pruned:
    """Fold the chosen blocks and take them out."""
    rows = {row.site: row.cost for row in rows_of_steps(trace, [steps[path] for path in chosen])}
    blocks = {path: model.get_submodule(path) for path in chosen}
    weights: dict[str, Tensor] = {}
    dropped = []
    for path, change in chosen.items():
        step = steps[path]
        into = tuple(fold.module for fold in folds[path])
        dropped.append(Dropped(path, step, into, _variation(excitations, path), change, rows.get(step.site, Cost())))
    remove_(model, trace, list(chosen))
    for path in chosen:
        for fold in folds[path]:
            weights = fold_(model, fold, means[path]) | weights  # the first copy is the original
    notes = []
    if meter.lost:
        notes.append(f"{counted(meter.lost, 'number')} of the outputs were NaN or infinite and are left out")
    if not chosen:
        notes.append("no block was dropped")
    measure = "relative change of the output" if meter.metric is None else "loss of the metric"
    last = max(chosen.values(), default=0.0) if meter.metric is None else list(chosen.values() or [0.0])[-1]
    name = original_class(model).__name__
    return Pruned(
        name,
        tuple(dropped),
        kept,
        last,
        tolerance,
        measure,
        meter.passes,
        tuple(notes),
        weights,
        blocks,
        tuple(steps.values()),
    )


def latency_beside(
    before: nn.Module, after: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], seconds: float = 3.0
) -> Latency:
    """Time two networks in turns, both in eval mode, for about so many seconds."""
    with eval_mode(before), eval_mode(after):
        return measure_latency(before, after, args, kwargs, seconds)
