"""Trace an owner's forward as it is in training, from a trace that was made in eval mode."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.utils._pytree import tree_map_only

from se_inject.guarding import guarded
from se_inject.tracing.failures import reason_of
from se_inject.tracing.helpers import Helper, helper_for
from se_inject.tracing.observer import Observer
from se_inject.tracing.outlines import filled
from se_inject.tracing.patches import quiet
from se_inject.tracing.proxy import Untraceable
from se_inject.tracing.record import Record
from se_inject.tracing.settings import is_plain
from se_inject.tracing.snapshots import drawing, own_numbers, preserved, random_state
from se_inject.tracing.substitutes import shapes_only, substituted
from se_inject.tracing.trace import Guards, OwnerGraph, Trace, float_like
from se_inject.tracing.tracer import OwnerTracer
from se_inject.tracing.watching import Watch, observing


def training_graph(trace: Trace, owner: OwnerGraph) -> tuple[fx.Graph, Guards]:
    """Trace the owner's graph and guards with its ``training`` flag set, its children's outputs taken from the first trace.

    It is observed once; the trace does not change.

    Raises:
        Untraceable: the training branch can't be written down.
    """
    key = ("training", owner.path)
    if key not in trace.known:
        try:
            with guarded(trace.model):
                trace.known[key] = _observed(trace, owner)
        except Untraceable as error:
            trace.known[key] = str(error)
    found: tuple[fx.Graph, Guards] | str = trace.known[key]
    if isinstance(found, str):
        raise Untraceable(found)
    return found


def _observed(trace: Trace, owner: OwnerGraph) -> tuple[fx.Graph, Guards]:
    inputs, outputs = owner.inputs, _children_outputs(trace, owner)
    if trace.how == "fake":  # its values belong to a mode that is closed
        outputs, inputs = tree_map_only(Tensor, shapes_only, (outputs, inputs))
    elif trace.how == "real":
        outputs, inputs = tree_map_only(
            Tensor, partial(filled, device=float_like(trace.model).device), (outputs, inputs)
        )
    watch = _watch(trace)
    module = watch.twin.get_submodule(owner.path)

    helpers = list(owner.helpers)

    def traced() -> OwnerTracer:
        """Trace it, with the helpers that it turns out to need."""
        while True:
            try:
                return traced_with(helpers)
            except Exception as error:
                helper = helper_for(error)
                if helper is None or helper.name in [each.name for each in helpers]:
                    raise
                helpers.append(helper)

    def traced_with(helpers: list[Helper]) -> OwnerTracer:
        how = "real" if trace.how == "real" else "meta"
        observer = Observer(Record(watch, how, dict(trace.graphs), dict(trace.failures), doors=dict(trace.doors)))
        replay = {path: list(values) for path, values in outputs.items()}
        tracer = OwnerTracer(observer, module, owner.path, training=True, replay=replay, door=owner.door)
        with preserved(module), quiet(), torch.enable_grad(), observing(watch, observer):
            observer.trace(tracer, inputs, helpers)
        return tracer

    state = random_state()
    drawn = False
    try:
        with own_numbers() as own:
            tracer = traced()
    except Exception as error:
        raise Untraceable(f"in training: {reason_of(error)}") from error
    finally:
        drawn = drawing(traced, state, own)
    if drawn:
        raise Untraceable("in training: it draws random numbers that a graph can't hold")
    trace.known["settings", owner.path] = dict(tracer.settings_read)
    return tracer.graph, tuple(tracer.guards)


def training_settings(trace: Trace, owner: OwnerGraph) -> dict[str, Any]:
    """Return the plain attributes that the owner's forward reads in training, if that could be traced."""
    with contextlib.suppress(Untraceable):
        training_graph(trace, owner)
    found: dict[str, Any] = trace.known.get(("settings", owner.path), {})
    return found


def returns_alike(trace: Trace, path: str) -> bool:
    """Return whether a module returns a value of the same structure in training as in eval, as far as its graphs tell."""
    return _in_training(trace, path) is None


def _in_training(trace: Trace, path: str) -> tuple[Any] | None:
    """Return a module's output in training, if that has another structure than in eval; else None."""
    key = ("output", path)
    if key not in trace.known:
        trace.known[key] = None
        owner = trace.graphs.get(path)
        if owner is not None and (owner.reads_training or any(map(partial(_in_training, trace), _children(owner)))):
            read = _everything_read(trace, owner)
            twin = path if read is None else trace.known.setdefault(("everything read", read), path)
            trace.known[key] = _changed_output(trace, owner) if twin == path else _in_training(trace, twin)
    found: tuple[Any] | None = trace.known[key]
    return found


def _changed_output(trace: Trace, owner: OwnerGraph) -> tuple[Any] | None:
    with contextlib.suppress(Untraceable):
        value = _returned(training_graph(trace, owner)[0])
        if _structure(value) != _structure(_returned(owner.graph)):
            return (value,)
    return None


def _everything_read(trace: Trace, owner: OwnerGraph) -> str | None:
    """Return a text that is the same for two modules whose forwards can't differ in what they return.

    They are of one class, hold the same shapes and plain attributes, call nothing but torch's own modules, and were
    called on values of the same shapes. None: the module holds or was given something else.
    """
    if any(path in trace.graphs or path in trace.failures for path in _children(owner)):
        return None
    held = [(name, id(type(module)), _state(module)) for name, module in owner.module.named_modules()]
    given = _described(owner.inputs[:2])
    return None if given is None or any(state is None for *_, state in held) else repr((held, given))


def _state(module: nn.Module) -> str | None:
    """Describe what a module holds, its submodules left out; None if there is more than tensors and plain values."""
    tensors = {**module._parameters, **module._buffers}
    plain = {
        name: value
        for name, value in vars(module).items()
        if name not in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
        and (value or not isinstance(value, dict))
    }
    return _described([tensors, plain])


def _described(value: Any) -> str | None:
    """Describe tensors by type and shape and plain values as they are; None if there is something else among them."""
    shapes = tree_map_only(Tensor, lambda tensor: [str(tensor.dtype), *map(int, tensor.shape)], value)
    return repr(shapes) if is_plain(shapes) else None


def _children(owner: OwnerGraph) -> list[str]:
    return [node.meta["path"] for node in owner.graph.nodes if node.op == "call_module"]


def _returned(graph: fx.Graph) -> Any:
    return map_arg(next(iter(reversed(graph.nodes))).args[0], lambda node: node.meta["val"])


def _structure(value: Any) -> Any:
    """Return the classes of containers and leaves, and how many there are."""
    if isinstance(value, dict):
        return type(value), [(key, _structure(item)) for key, item in value.items()]
    if isinstance(value, list | tuple):
        return type(value), [_structure(item) for item in value]
    return Tensor if isinstance(value, Tensor) else type(value)


def _children_outputs(trace: Trace, owner: OwnerGraph) -> dict[str, list[Any]]:
    """Collect, by path, the outputs of each child in the first call, or in training, in the order of its calls."""
    outputs: dict[str, list[Any]] = {}
    for node in owner.graph.nodes:
        if node.op == "call_module":
            other = _in_training(trace, node.meta["path"])
            outputs.setdefault(str(node.target), []).append(node.meta["val"] if other is None else other[0])
    return outputs


def _watch(trace: Trace) -> Watch:
    """Return the twin that was observed, or a new one on the meta device."""
    if "" not in trace.known:
        trace.known[""] = Watch(trace.model, substituted(trace.model, "meta"))
    found: Watch = trace.known[""]
    return found
