"""Call a network once for the numeric checks, with nothing left behind, and compare two such calls."""

from __future__ import annotations

import contextlib
import random
import sys
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.stateless import _reparametrize_module

from se_inject.errors import TraceError, either
from se_inject.random_numbers import seeded
from se_inject.tracing import (
    SMALL_SIDE,
    Trace,
    batch_of,
    copied,
    cropped,
    describe,
    draws_in_python,
    float_like,
    preserved,
    python_state,
    real_inputs,
    set_python_state,
)
from se_inject.verification.comparison import Unlike, pairs_in, same_numbers

LARGE = 500_000_000
"""MACs of convolutions in the observed call from which on the numeric checks use a smaller input."""


class Seen(NamedTuple):
    """The result of one call of a network: its output, and its buffers afterwards."""

    output: Any
    buffers: dict[str, Tensor]


def observed_in_eval(model: nn.Module, trace: Trace) -> tuple[Any, Seen]:
    """Make inputs for the numeric checks, and run the model on them in eval mode.

    They are of another batch size than the observed ones, if the model takes that, and small if those are large. A network
    that had to be observed with numbers may make large images of small ones, as detectors do: it gets one at a time.

    Raises:
        TraceError: it takes neither.
    """
    parameter = float_like(model)
    choices = [trace.inputs]
    if trace.macs > LARGE:
        choices.insert(0, cropped(trace.inputs, SMALL_SIDE))
    other = 1 if trace.how == "real" and trace.macs > LARGE and batch_of(trace.inputs) != 1 else 3
    for choice, batch in (*((choice, other) for choice in choices), (trace.inputs, None)):
        inputs = real_inputs(choice, batch=batch, device=parameter.device, dtype=parameter.dtype)
        try:
            with torch.no_grad():
                return inputs, run(model, inputs, "eval")
        except Exception as error:
            if batch is None:
                raise TraceError(
                    f"the network's own forward fails on {describe(*inputs)}, with numbers",
                    seen=f"{type(error).__name__}: {first_line(error)}",
                    hint="it was only looked at without numbers before; pass inputs that it can be called on: "
                    + either("`--input 3x224x224`", "`example_inputs=torch.rand(2, 3, 224, 224)`"),
                ) from error
    raise AssertionError("unreachable")  # pragma: no cover


def observed_in_training(model: nn.Module, inputs: Any) -> Seen | str:
    """Run the model on the inputs in training mode, or give the reason why it can't be: batch norm on one value, say."""
    try:
        with torch.no_grad():
            return run(model, inputs, "train")
    except Exception as error:
        return first_line(error)


def run(
    model: nn.Module,
    inputs: Any,
    mode: str,
    parameters: dict[str, Tensor] | None = None,
    then: Callable[[Any], Any] = lambda output: output,
    seed: int = 1,
) -> Seen:
    """Run one call with nothing left behind: modes, buffers and attributes as before.

    It draws the same random numbers each time. Torch's come from generators of this thread's own; Python's and numpy's,
    if the network draws those, from the process's, which are seeded and put back.

    Parameters that need no gradient are copied as well: codebooks are kept in such, which forwards write into.

    ``then`` gets what the call returned while all is still set: a checkpointed network runs again in backward.
    """

    def once() -> Seen:
        return _called(model, inputs, mode, parameters, then, seed)

    before = python_state()
    seen = once()
    if python_state() == before:
        return seen
    if threading.active_count() > 1:  # another thread may have drawn
        drawn: list[bool] = []
        with contextlib.suppress(Exception), draws_in_python(lambda: drawn.append(True)):
            once()
        if not drawn:
            return seen
    try:
        random.seed(seed)
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.seed(seed)
        return once()
    finally:
        set_python_state(before)


def _called(
    model: nn.Module,
    inputs: Any,
    mode: str,
    parameters: dict[str, Tensor] | None,
    then: Callable[[Any], Any],
    seed: int,
) -> Seen:
    args, kwargs = inputs
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    by_hand = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    with preserved(model), seeded(seed):
        for module in model.modules():
            module.training = mode == "train"
        args, kwargs = copied((tuple(args), kwargs))
        with _reparametrize_module(model, {**buffers, **by_hand, **(parameters or {})}, tie_weights=True):
            return Seen(then(model(*args, **kwargs)), buffers)


def difference(expected: Any, seen: Any) -> str:
    """Compare two outputs, of any classes: empty if they are the same bit for bit, else what differs."""
    errors: list[float] = []
    for one, other in pairs_in(expected, seen):
        if isinstance(one, Tensor) and isinstance(other, Tensor):
            if one.shape != other.shape or one.dtype != other.dtype:
                return f"{tuple(one.shape)} {one.dtype} became {tuple(other.shape)} {other.dtype}"
            if not same_numbers(one, other):
                wide = torch.promote_types(one.dtype, torch.float64)
                errors.append(float((one.to(wide) - other.to(wide)).abs().nan_to_num(nan=float("inf")).max()))
        elif type(one) is not type(other):
            return f"the output has another structure: a {type(one).__name__} became a {type(other).__name__}"
        elif isinstance(one, Unlike):
            return "the output has another structure"
        elif one != other:
            return f"{one} became {other}"
    return f"differs by up to {max(errors):.3g}" if errors else ""


def run_awake(
    model: nn.Module, inputs: Any, awake: dict[str, Tensor], then: Callable[[Any], Any], seed: int = 1
) -> Any:
    """Apply ``then`` to the output in training, if the network can be, with these weights in place of its own."""
    try:
        return run(model, inputs, "train", awake, then, seed).output
    except Exception:
        return run(model, inputs, "eval", awake, then, seed).output


def first_line(error: Exception) -> str:
    """Return the first line of an exception, shortened to part of a line."""
    return (str(error).splitlines() or [""])[0][:80] or type(error).__name__
