"""Observe one call of a network: a twin of it is called, on values that are not computed wherever that will do."""

from __future__ import annotations

import contextlib
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from se_inject.errors import TraceError, either
from se_inject.guarding import under_guard
from se_inject.tracing.failures import describe, location
from se_inject.tracing.observer import Observer
from se_inject.tracing.record import Record
from se_inject.tracing.snapshots import drawing, draws_in_python, own_numbers, preserved, put_back, random_state
from se_inject.tracing.substitutes import standing_in
from se_inject.tracing.trace import Trace
from se_inject.tracing.watching import Watch, observing


@under_guard
def observe(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Trace:
    """Call a model once, in eval mode and without computing anything, and return what happened.

    The model is not changed. If an operator or the control flow needs data, the call is made with fake tensors
    that know their device, and at last with real ones.

    Raises:
        TraceError: the model's own forward fails on these inputs.
    """
    first: Exception | None = None
    last: Exception | None = None
    for how in ("meta", "fake", "real"):
        if how == "real" and type(first) is type(last) and _are_large((args, kwargs)):
            break  # both failed alike, so numbers won't help, and they would take long
        try:
            return _observed(model, args, kwargs or {}, how)
        except Exception as error:
            first = first or error
            last = error
    own = last if _is_from_forward(last) else first
    raise TraceError(
        f"the network's own forward fails on {describe(args, kwargs)}",
        seen=f"{type(own).__name__}: {str(own).strip().splitlines()[0] if str(own).strip() else ''} {location(own)}".strip(),
        hint=f"pass inputs that the network accepts: `{either('--input 3x224x224', 'example_inputs=torch.rand(2, 3, 224, 224)')}`",
    ) from last


def _observed(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], how: str) -> Trace:
    """Try to trace a new twin once. The random generators are put back where the forward drew from them."""

    shut: set[str] = set()

    def trace(*, watching_draws: bool = False) -> Trace:
        found = traced(watching_draws)
        return found if found is not None else trace(watching_draws=watching_draws)

    def traced(watching_draws: bool) -> Trace | None:
        with standing_in(model, how) as (twin, matching):
            record = Record(Watch(model, twin), how, shut=set(shut))
            observer = Observer(record)
            draws: Any = draws_in_python(observer.draws) if watching_draws else contextlib.nullcontext()
            with preserved(twin), observing(record.watch, observer), draws:
                outputs = observer.run(twin, matching(args), matching(kwargs))
            if record.shut - shut:
                shut.update(record.shut)
                return None
            return record.frozen((args, kwargs), outputs, observer.counts.macs)

    state = random_state()
    drawn = False
    try:
        with own_numbers() as own:
            found = trace()
    finally:
        drawn = drawing(trace, state, own)
    if not drawn:
        return found
    try:
        with own_numbers():
            return trace(watching_draws=True)
    finally:
        put_back(state)


def _are_large(inputs: Any) -> bool:
    return sum(leaf.numel() for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)) > 2**24


def _is_from_forward(error: BaseException | None) -> bool:
    return bool(location(error))
