"""Observe one call of a network, and write down every module's forward as a one-level graph meanwhile.

One pass does both: whenever a module with a forward of its own is called, its forward runs on proxies that
carry the values of that call, and its children run as leaves, each in turn written down likewise. The
values are tensors on the meta device, so nothing is computed and no weight is copied. What is called is a twin
of the model: the model itself, which other threads may be using, is only read.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from se_inject.forwards import is_edited
from se_inject.tracing.failures import reason_of
from se_inject.tracing.foreign import leaf_kind
from se_inject.tracing.helpers import Helper, helper_for
from se_inject.tracing.known_results import AnyNumbers, result_of_module
from se_inject.tracing.names import function_name_of
from se_inject.tracing.nodes import CONVOLUTIONS, attention_in, gates_in
from se_inject.tracing.operations import is_leaf
from se_inject.tracing.proxy import Untraceable
from se_inject.tracing.record import Record
from se_inject.tracing.settings import is_plain, recorded
from se_inject.tracing.snapshots import containers_in, refill
from se_inject.tracing.trace import NOTHING, Counts, OwnerGraph
from se_inject.tracing.tracer import OwnerTracer
from se_inject.tracing.watching import plain_call


class Observer:
    """Runs modules inside an observed call: writes the trace, and stands between a module and its children."""

    def __init__(self, record: Record) -> None:
        self.result = record
        self.tracer: OwnerTracer | None = None
        self.counts = NOTHING
        """What has run so far."""
        self._time = 0
        self._closed = 0
        self._numbers = AnyNumbers()

    def tick(self) -> int:
        self._time += 1
        return self._time

    def _count(self, convolutions: int = 0, macs: int = 0, gates: int = 0, attention: int = 0) -> None:
        if convolutions or macs or gates or attention:
            self.counts = Counts(*map(int.__add__, self.counts, (convolutions, macs, gates, attention)))

    def count_function(self, node: fx.Node, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        name = function_name_of(node)
        before = self.counts
        self._count(attention=int(name == "scaled_dot_product_attention"))
        if name in CONVOLUTIONS and isinstance(value, Tensor):
            weight = kwargs.get("weight", args[1] if len(args) > 1 else None)
            if isinstance(weight, Tensor):
                transposed = "transpose" in name or (name in ("convolution", "_convolution") and bool(args[6]))
                self._count_convolution(value, weight, transposed=transposed, x=args[0] if args else value)
        node.meta["counts"] = self.counts.since(before)

    def _count_convolution(self, output: Tensor, weight: Tensor, *, transposed: bool, x: Tensor) -> None:
        if all(extent == 1 for extent in (*output.shape[2:], *x.shape[2:], *weight.shape[2:])):
            return  # a fully connected layer in other words: attention's bottlenecks, classifiers
        self.result.size = self.result.size or tuple(x.shape[2:])
        positions = x.numel() if transposed else output.numel()
        self._count(convolutions=1, macs=positions * weight[0].numel())

    def run(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        symbolic: frozenset[int | str] = frozenset(),
        door: str = "forward",
    ) -> Any:
        """Call a module, or a method of it, on values; trace its forward if it has one of its own."""
        outer, self.tracer = self.tracer, None
        path = self.result.watch.paths.get(id(module))
        try:
            if path is None:
                return plain_call(module, args, kwargs)
            calls = self.result.calls
            calls[path] = calls.get(path, 0) + 1
            try:
                output = self._run_known(module, path, args, kwargs, symbolic, door)
                if outer is None:  # else the caller's graph tells what becomes of the matrix
                    self._count(attention=int(isinstance(module, nn.Softmax) and _is_matrix(output)))
            except BaseException:
                calls[path] -= 1  # the caller may go on without it
                if not calls[path]:
                    del calls[path]
                    self.result.failures.pop(path, None)
                raise
            if not torch._C.is_grad_enabled():
                self.result.without_grad.add(path)
            return output
        finally:
            self.tracer = outer

    def _run_known(
        self,
        module: nn.Module,
        path: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        symbolic: frozenset[int | str],
        door: str,
    ) -> Any:
        """Call a module of the network: torch's own are counted, others traced the first time."""
        if self.result.doors.setdefault(path, door) != door:
            self.result.shut.add(path)
        closed = leaf_kind(type(module))
        if closed is not None or self._closed:
            return self._run_closed(module, path, args, kwargs, closed)
        if not is_leaf(module):
            kind = _kinds((args, kwargs))
            if path in self.result.graphs or path in self.result.failures:
                output = _call(module, door, args, kwargs)
            else:
                output = self._run_traced(module, path, args, kwargs, symbolic, door)
            self.result.kinds.setdefault(path, set()).add(kind)
            return output
        return self._run_leaf(module, args, kwargs)

    def _run_closed(
        self, module: nn.Module, path: str, args: tuple[Any, ...], kwargs: dict[str, Any], kind: tuple[str, str] | None
    ) -> Any:
        """Call a compiled, scripted or quantised module, or one inside of it: counted, never traced."""
        if kind is not None:
            self.result.failures[path] = f"it is {kind[0]}: {kind[1]}"
        elif is_leaf(module):
            return self._run_leaf(module, args, kwargs)
        self._closed += 1
        before = self.counts.convolutions
        seen: Any
        try:
            with _Convolutions() if self._closed == 1 else contextlib.nullcontext() as seen:  # type: ignore[no-untyped-call]
                return plain_call(module, args, kwargs)
        finally:
            self._closed -= 1
            if seen is not None and self.counts.convolutions == before:  # else its children were called one by one
                self._count(convolutions=seen.count)

    def _run_leaf(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call one of torch's own modules, and count what it does."""
        output = self._known_result(module, args[0]) if len(args) == 1 and not kwargs else None
        if output is None:
            output = plain_call(module, args, kwargs)
        self._count(attention=int(isinstance(module, nn.MultiheadAttention)))
        if isinstance(module, nn.modules.conv._ConvNd) and isinstance(output, Tensor):
            self._count_convolution(output, module.weight, transposed=module.transposed, x=args[0] if args else output)
        return output

    def _known_result(self, module: nn.Module, x: Any) -> Tensor | None:
        if module._forward_hooks or module._forward_pre_hooks:
            return None
        if self.result.how == "meta":
            return result_of_module(module, x)
        return self._numbers.result_of_module(module, x) if self.result.how == "real" else None

    def _run_traced(
        self,
        module: nn.Module,
        path: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        symbolic: frozenset[int | str],
        door: str,
    ) -> Any:
        """Call a module with its forward traced, or as it is if it can't be: then say why."""
        own = module.__dict__.get("forward") if door == "forward" else None

        def forward(*args: Any, **kwargs: Any) -> Any:
            if door == "forward":
                _put_back(module, own)
            before = (dict(self.result.calls), self.counts, containers_in((args, kwargs)))
            helpers: list[Helper] = []
            while True:
                tracer = OwnerTracer(self, module, path, door=door)
                try:
                    if own is not None:
                        raise Untraceable("its forward was replaced on the instance")
                    output = self.trace(tracer, (args, kwargs, symbolic), helpers)
                    break
                except Exception as error:
                    self.result.calls.clear()
                    self.result.calls.update(before[0])
                    self.counts = before[1]
                    refill(before[2])
                    helper = helper_for(error)
                    if helper is not None and helper.name not in [each.name for each in helpers]:
                        helpers.append(helper)
                        continue
                    self.result.failures[path] = reason_of(error)
                    self.tracer = None
                    return self._run_untraced(module, args, kwargs, door)
            self.result.graphs[path] = OwnerGraph(
                path=path,
                module=self.result.watch.originals[path],
                kind=type(module),
                graph=tracer.graph,
                constants=MappingProxyType(tracer.constants),
                guards=tuple(tracer.guards),
                settings=MappingProxyType(tracer.settings_read),
                reads_training=tracer.reads_training,
                iterates=tracer.iterates,
                inputs=(*self.result.kept((args, kwargs)), symbolic),
                helpers=tuple(helpers),
                door=door,
            )
            self._count(gates=gates_in(tracer.graph), attention=attention_in(tracer.graph))
            return output

        if door != "forward":
            return forward(*args, **kwargs)
        module.__dict__["forward"] = forward
        try:
            return plain_call(module, args, kwargs)
        finally:
            _put_back(module, own)

    def _run_untraced(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], door: str) -> Any:
        """Call a module that can't be traced; one without modules of an author's own has its convolutions counted as functions."""
        before = self.counts.convolutions
        is_part = all(is_leaf(child) for child in module.children()) and self.result.how == "meta"
        seen: Any
        with _Convolutions() if is_part else contextlib.nullcontext() as seen:  # type: ignore[no-untyped-call]
            output = module.forward(*args, **kwargs) if door == "forward" else _call(module, door, args, kwargs)
        if seen is not None and self.counts.convolutions == before:  # else its children were called one by one
            self._count(convolutions=seen.count)
        return output

    def trace(
        self,
        tracer: OwnerTracer,
        inputs: tuple[tuple[Any, ...], dict[str, Any], frozenset[int | str]],
        helpers: Iterable[Helper] = (),
    ) -> Any:
        """Run an owner's forward under its tracer, with the helpers that it needs."""
        outer, self.tracer = self.tracer, tracer
        try:
            if graphs_of_modes(tracer.owner) is not None:
                tracer.reads_training = True
            with contextlib.ExitStack() as stack:
                for helper in helpers:
                    stack.enter_context(helper.active(tracer))
                return tracer.trace(_traced_method(tracer), *inputs)
        finally:
            self.tracer = outer

    def called(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call one of the twin's modules: the result is a node where a forward is being traced, else the values."""
        if self.tracer is None:
            return self.run(module, args, kwargs)
        return self.tracer.call_module(module, args, kwargs)

    def may_enter(self, module: nn.Module, door: str) -> bool:
        """Return whether a call of a module's method may count as the call of the module: it has to be the only way in."""
        path = self.result.watch.paths.get(id(module))
        return path is not None and path not in self.result.shut and self.result.doors.get(path, door) == door

    def shut(self, module: nn.Module) -> None:
        """Remember that calls of a module's methods are calls of functions, in the next observation."""
        self.result.shut.add(self.result.watch.paths[id(module)])

    def draws(self) -> None:
        """Remember that the forward that is being traced drew a random number that no node of its graph draws."""
        if self.tracer is not None:
            self.tracer.draws = True

    def setting(self, module: nn.Module, name: str, value: Any) -> Any:
        """Return the result of reading a module's mode, or a plain attribute of the owner. The read is recorded."""
        tracer = self.tracer
        if tracer is None:
            return value
        if name != "training":
            if module is tracer.owner:
                if not is_plain(value):
                    raise Untraceable(f"its forward, or a hook, puts tensors or objects into `self.{name}`")
                tracer.settings_read[name] = recorded(value)
            return value
        if module is not tracer.owner:
            raise Untraceable(f"reads the mode of a {type(module).__name__} in it")
        tracer.reads_training = True
        return tracer.training


class _Convolutions(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the convolutions that run while it is active, also those of scripted code."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        name, is_map = func._overloadpacket.__name__, isinstance(output, Tensor) and output.dim() > 2
        self.count += is_map and (name in CONVOLUTIONS or (func.namespace == "quantized" and name.startswith("conv")))
        return output


def graphs_of_modes(module: nn.Module) -> tuple[fx.Graph, fx.Graph] | None:
    """Return the graphs in eval mode and in training of a graph module that has two, as torchvision's feature extractors do.

    None for any other, and for one with blocks: its forward was written of both.
    """
    if not isinstance(module, fx.GraphModule) or is_edited(module):
        return None
    graphs = tuple(module.__dict__.get(name) for name in ("eval_graph", "train_graph"))
    return graphs if all(isinstance(graph, fx.Graph) for graph in graphs) else None  # type: ignore[return-value]


def forward_of(module: nn.Module, training: bool) -> Callable[..., Any]:
    """Return the forward of a module's class; of a graph module with two graphs that of the mode, whichever it is in."""
    graphs = graphs_of_modes(module)
    if graphs is None:
        return type(module).forward
    code = graphs[training].python_code("self")
    scope = dict(code.globals)
    exec(compile(code.src, f"<{type(module).__name__}>", "exec"), scope)
    forward: Callable[..., Any] = scope["forward"]
    return forward


def _traced_method(tracer: OwnerTracer) -> Callable[..., Any]:
    if tracer.door != "forward":
        return getattr(type(tracer.owner), tracer.door)  # type: ignore[no-any-return]
    return forward_of(tracer.owner, tracer.training)


def _call(module: nn.Module, door: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a module with its hooks, or the method of its class."""
    return (
        plain_call(module, args, kwargs) if door == "forward" else getattr(type(module), door)(module, *args, **kwargs)
    )


def _is_matrix(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 2 and min(value.shape[-2:]) > 1


def _put_back(module: nn.Module, forward: Any) -> None:
    if forward is None:
        module.__dict__.pop("forward", None)
    else:
        module.__dict__["forward"] = forward


def _kinds(arguments: Any) -> Any:
    """Compute a key that tells two calls' arguments apart for control flow: structure, rank, and plain values."""
    if isinstance(arguments, Tensor):
        return ("tensor", arguments.dim())
    if isinstance(arguments, dict):
        return tuple((key, _kinds(value)) for key, value in arguments.items())
    if isinstance(arguments, tuple | list):
        return tuple(_kinds(value) for value in arguments)
    return arguments if isinstance(arguments, bool | int | float | str | None) else type(arguments).__name__
