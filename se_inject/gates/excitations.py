"""Gather statistics of every gate of a network on data, by class too (Hu et al., section 7)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import nn

from se_inject.errors import SurgeryError
from se_inject.gates.batches import Progress, finite_examples, moved, outputs_of
from se_inject.gates.recording import gate_method, recorded_gates
from se_inject.gates.statistics import Excitations
from se_inject.gates.tally import Tally
from se_inject.surgery import own_steps
from se_inject.tables import counted
from se_inject.tracing import check_has_numbers, check_supported, preserved


def excitations(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    classes: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Excitations:
    """Run an injected network over data and gather statistics of its gates. The network is left as it was.

    It runs in eval mode and without gradients. Gates are recorded as they are computed and summed up batch by batch:
    memory does not grow with the data, but with the number of classes. A block takes part if it has a method
    ``gate(value)`` whose result the value is multiplied by, or ``channel_gate(value)`` for a part of what it does.

    Args:
        model: an injected network.
        batches: an iterable of batches (a ``DataLoader``): tensors, (tensor, labels), tuples of positional arguments, or
            dicts of keyword arguments. Labels are whole numbers from 0, one for each example.
        classes: their names; None: those of the data, or the numbers.
        progress: called after every batch with the number of examples so far, and of all or None.

    Raises:
        SurgeryError: the network holds no block of ours, or none that offers a gate.
        DataError: there is no example, the network fails on one, or all its gates are NaN.
    """
    check_supported(model)
    check_has_numbers(model)
    steps = {step.path: step for step in own_steps(model)}
    modules = {path: model.get_submodule(path) for path in steps}
    blocks = {path: block for path, block in modules.items() if gate_method(block) is not None}
    if not blocks:
        raise SurgeryError(
            f"none of {counted(len(steps), 'block')} offers its gate",
            seen=", ".join(sorted({step.block for step in steps.values()})),
            hint="a block offers it as a method `gate(value)`, its output being value * gate",
        )
    tally = Tally(blocks)
    with eval_mode(model), recorded_gates(blocks, tally.records):
        for batch in moved(model, batches, progress):
            tally.records.clear()
            output = outputs_of(model, batch)
            tally.add(batch.size, batch.labels, finite_examples(output, batch.size))
    return tally.result(model, steps, classes or getattr(batches, "classes", None), batches)


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put every module into eval mode for a while; restore attributes, flags and caches afterwards."""
    with preserved(model):
        for module in model.modules():
            module.training = False
        yield
