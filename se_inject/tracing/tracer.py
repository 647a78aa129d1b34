"""Write down one module's own ``forward`` as an fx graph, children as leaves, while it really runs.

The values that flow are concrete (tensors on the meta device, as a rule), and every one of them is wrapped in
a proxy that also knows its node. So what a bare proxy can't answer, the value does: ``len``, iteration,
``isinstance``, a shape in an ``if``. An answer that depends on a size is kept as a guard: the edited forward
checks it instead of assuming it.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import operator
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import Scope, TracerBase

from se_inject.forwards import Form, Unlike, field
from se_inject.tracing.changes import Changed, reflect
from se_inject.tracing.containers import contents, form_of, holds, is_special, made
from se_inject.tracing.hiding import hidden_settings
from se_inject.tracing.known_results import result_of_function
from se_inject.tracing.method_calls import MethodCall
from se_inject.tracing.operations import operation_of
from se_inject.tracing.proxy import (
    FOREIGN_TENSOR,
    Untraceable,
    ValueProxy,
    contents_of,
    holds_proxy,
    holds_tensor,
    is_numbers,
    is_proxy,
    values_of,
)
from se_inject.tracing.settings import nested_settings
from se_inject.tracing.snapshots import own_numbers, put_back, random_state, states_of_generators

if TYPE_CHECKING:
    from se_inject.tracing.observer import Observer


_PLAIN = (Tensor, int, float, str, type(None))
"""Values that a child can't change in place."""


class OwnerTracer(TracerBase):
    """The tracer of one owner. It creates nodes, and the values that belong to them.

    Args:
        observer: what runs the children and keeps count.
        owner: the module whose forward is traced.
        path: its path in the model.
        training: what the owner's ``training`` flag reads as.
        replay: recorded outputs of the children, by path, to be used instead of calling them again.
        door: the method that is traced.
    """

    def __init__(
        self,
        observer: Observer,
        owner: nn.Module,
        path: str,
        *,
        training: bool = False,
        replay: dict[str, list[Any]] | None = None,
        door: str = "forward",
    ) -> None:
        super().__init__()
        self.observer = observer
        self.owner = owner
        self.path = path
        self.training = training
        self.door = door
        self.reads_training = False
        self.iterates = False
        self.draws = False
        self.replay = replay
        self.graph = fx.Graph()
        self.scope = Scope("", None)
        self.module_stack = OrderedDict()
        self.node_name_to_scope = {}
        self.guards: list[tuple[fx.Node, bool]] = []
        self.constants: dict[str, Any] = {}
        self.settings_read: dict[str, Any] = {}
        self.method: MethodCall | None = None
        self.within = ""
        self._attributes: dict[str, ValueProxy] = {}
        self._modes = _modes()

    def trace(
        self,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        symbolic: frozenset[int | str] = frozenset(),
    ) -> Any:
        """Run ``forward`` on proxies of the given values and return its result as values.

        Args:
            forward: the owner's own.
            args: the values of its call.
            kwargs: the same by keyword.
            symbolic: positions and keywords of the plain numbers that the caller computed from its own inputs.
        """
        inputs, keywords = self._inputs(forward, args, kwargs, symbolic)
        given = {name: contents_of(value) for name, value in self.constants.items()}
        states = states_of_generators(self.owner)
        with hidden_settings(self) as changed:
            result = forward(self.owner, *inputs, **keywords)
            self.create_node("output", "output", (self.create_arg(result),), {})
        if self.draws or states_of_generators(self.owner) != states:
            raise Untraceable("it draws random numbers in Python, which a graph can't hold")
        self.settings_read |= nested_settings(self.owner, self.door)
        if changed:
            raise Untraceable(f"its forward stores into `self.{changed[0]}`")
        for name, value in self.constants.items():
            if contents_of(value) != given[name]:
                raise Untraceable(f"changes its argument `{name}` in place")
        return values_of(result)

    def _inputs(
        self,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        symbolic: frozenset[int | str],
    ) -> tuple[list[Any], dict[str, Any]]:
        """Make the arguments to run ``forward`` on: proxies of what holds tensors or computed numbers, the rest as it is."""
        try:
            bound = signature_of(forward).bind(self.owner, *args, **kwargs)
        except (TypeError, ValueError) as error:
            raise Untraceable(f"its arguments can't be bound to its parameters: {error}") from error
        given = set(bound.arguments)
        self.graph._graph_namespace.create_name(next(iter(bound.arguments)), None)  # no node is called as `self` is
        bound.apply_defaults()
        inputs: list[Any] = []
        keywords: dict[str, Any] = {}
        for position, (name, value) in enumerate(list(bound.arguments.items())[1:]):
            kind = bound.signature.parameters[name].kind
            if kind is inspect.Parameter.VAR_POSITIONAL:
                inputs += self._starred("*" + name, value, value)
            elif kind is inspect.Parameter.VAR_KEYWORD:
                keywords |= zip(value, self._starred("**" + name, value, value.values()), strict=True)
            else:
                argument = self._argument(name, value, name in given, bool(symbolic & {position, name}))
                if kind is inspect.Parameter.KEYWORD_ONLY:
                    keywords[name] = argument
                else:
                    inputs.append(argument)
        return inputs, keywords

    def _argument(self, name: str, value: Any, given: bool, computed: bool) -> Any:
        """Make one argument: a proxy, or a constant that the edited forward expects."""
        if holds_tensor(value) or (computed and is_numbers(value)):
            return self._placeholder(name, value)
        self.constants[name] = value
        if given:
            self._placeholder(name, value)
        return value

    def _starred(self, name: str, whole: Any, items: Any) -> list[Any]:
        """Make the values of ``*args`` or ``**kwargs``: all proxies, or all constants."""
        plain = name.lstrip("*")
        if not any(map(holds_tensor, items)):
            self.constants[plain] = whole
            self._placeholder(name, whole)
            return list(items)
        if not all(map(holds_tensor, items)):
            raise Untraceable(f"takes tensors and plain values together by `*{plain}`")
        self.constants[plain] = Form(tuple(whole) if isinstance(whole, dict) else len(whole))
        proxy = self._placeholder(name, whole)
        return [proxy[key] for key in (whole if isinstance(whole, dict) else range(len(whole)))]

    def _placeholder(self, name: str, value: Any) -> Any:
        node = self.create_node("placeholder", name, (), {})
        return self._wrap(node, value)

    @property
    def last_node(self) -> fx.Node | None:
        """The node that was made last; None before the first."""
        return next(iter(reversed(self.graph.nodes)), None)

    def _wrap(self, node: fx.Node, value: Any) -> ValueProxy:
        node.meta["val"] = self.observer.result.kept(value)
        node.meta.setdefault("operation", operation_of(node))
        node.meta["time"] = self.observer.tick()
        if self.method is not None:
            node.meta["method"] = self.method
        if self.within:
            node.meta["within"] = self.within
        return ValueProxy(node, self, value)

    def create_proxy(  # type: ignore[override]
        self, kind: str, target: Any, args: Any, kwargs: Any, name: str | None = None, *_: Any, **__: Any
    ) -> Any:
        if _modes() != self._modes:
            raise Untraceable(
                "part of it runs under another grad or autocast mode, or in an autograd function of its own"
            )
        node = self.create_node(kind, target, self.create_arg(args), self.create_arg(kwargs), name)  # type: ignore[arg-type]
        try:
            value = self._value(kind, target, values_of(args), values_of(kwargs), node)
        except BaseException:
            self.graph.erase_node(node)  # the forward may go on without it
            raise
        if value is None and target is operator.getitem and node.args[0].op == "call_module":  # type: ignore[union-attr]
            self.graph.erase_node(node)  # `if y is None` asks which object it is
            return None
        return self._wrap(node, value)

    def _value(self, kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], node: fx.Node) -> Any:
        """Call a function or method on the values of its arguments."""
        tracer, self.observer.tracer = self.observer.tracer, None
        on_meta = self.observer.result.how == "meta"
        drawing = self.training and not on_meta
        state = random_state() if drawing else None
        try:
            with own_numbers() if drawing else contextlib.nullcontext():
                if kind == "call_method":
                    value = getattr(args[0], target)(*args[1:], **kwargs)
                else:
                    value = result_of_function(target, args, kwargs) if on_meta else None
                    if value is None:
                        value = target(*args, **kwargs)
        finally:
            self.observer.tracer = tracer
            if drawing:
                put_back(state)  # what a node draws, it draws in the graph as well
        self.observer.count_function(node, value, args, kwargs)
        return value

    def call_module(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], door: str = "forward"
    ) -> Any:
        """Record the call of a child, or of a method of it, and run it on the values."""
        path = self.observer.result.watch.relative_path(module, self.path)
        if path is None:
            raise Untraceable(f"calls a {type(module).__name__} that is not one of its submodules")
        if _modes() != self._modes:
            raise Untraceable(f"calls `{path}` under another grad or autocast mode")
        node = self.create_node("call_module", path, self.create_arg(args), self.create_arg(kwargs))  # type: ignore[arg-type]
        before = self.observer.counts
        outputs = (self.replay or {}).get(path)
        value = outputs.pop(0) if outputs else self._run_child(module, path, node, args, kwargs, door)
        if door != "forward":
            node.meta["door"] = door
            if not holds_tensor(value):
                self.observer.shut(module)
        node.meta["counts"] = self.observer.counts.since(before)
        node.meta["path"] = self.observer.result.watch.paths[id(module)]
        original = node.meta["module"] = self.observer.result.watch.originals[node.meta["path"]]
        node.meta["class"], node.meta["operation"] = type(original), operation_of(node, original)
        return self._opened(self._wrap(node, value))

    def _run_child(
        self, module: nn.Module, path: str, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], door: str
    ) -> Any:
        """Call a child on the values. What it changes in place would be lost on the author's own containers."""
        given: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
        computed = frozenset(key for key, argument in given.items() if holds_proxy(argument))
        values, keywords = values_of(args), values_of(kwargs)
        held = not all(isinstance(value, _PLAIN) for value in (*values, *keywords.values()))
        before = contents_of((values, keywords)) if held else None
        try:
            value = self.observer.run(module, values, keywords, computed, door)
        except BaseException:
            self.graph.erase_node(node)  # the forward may go on without it
            raise
        if held:
            reflect((args, kwargs), (values, keywords), before, path)
        return value

    def attribute(self, module: nn.Module, name: str, value: Tensor) -> Any:
        """Record a parameter or buffer that the forward reads as a ``get_attr`` node."""
        prefix = self.observer.result.watch.relative_path(module, self.path)
        if prefix is None:
            raise Untraceable(f"reads `{name}` of a module that is not one of its submodules")
        target = f"{prefix}.{name}" if prefix else name
        if target not in self._attributes:
            self._attributes[target] = self._wrap(self.create_node("get_attr", target, (), {}), value)
        return self._attributes[target]

    def create_arg(self, a: Any) -> Any:
        if type(a) is ValueProxy:
            return a.node
        if type(a) is Changed:
            a._refuse()
        if isinstance(a, Tensor):
            for name, value in self.owner.__dict__.items():
                if value is a:
                    return self.attribute(self.owner, name, a).node
            raise Untraceable(FOREIGN_TENSOR)
        if is_special(a) and (isinstance(a, tuple | list | dict) or holds(a, is_proxy)):
            return self._container(a)
        if type(a).__module__ == "numpy" and callable(getattr(a, "item", None)) and getattr(a, "ndim", 1) == 0:
            a = a.item()  # a number of NumPy's
        try:
            return super().create_arg(a)
        except NotImplementedError as error:
            raise Untraceable(f"passes a {type(a).__name__} on, which a graph can't hold") from error

    def _container(self, container: Any) -> fx.Node:
        """Record a container of a class of its own as a node: the call of that class."""
        held, form = contents(container), form_of(container)
        args, kwargs = ((held,), {}) if form is None else form(held)
        target = Unlike(type(container)) if form is None else type(container)
        node = self.create_node("call_function", target, self.create_arg(args), self.create_arg(kwargs))
        return self._wrap(node, values_of(container)).node

    def _opened(self, proxy: ValueProxy) -> Any:
        """Return a container of an author's class as such, with proxies in it; any other value as its proxy.

        So the author's own methods, ``len`` and comparisons with ``None`` work on it.
        """
        value = proxy.value
        form = form_of(value) if is_special(value) and holds(value, _is_tensor) else None
        if form is None:
            return proxy
        is_field = not isinstance(value, dict | list | tuple)
        return made(
            type(value),
            form,
            {key: self._part(proxy, key, item, is_field=is_field) for key, item in contents(value).items()},
        )

    def _part(self, proxy: ValueProxy, key: Any, item: Any, *, is_field: bool) -> Any:
        if item is None or isinstance(item, bool | str):
            return item
        read: Any = field if is_field else operator.getitem
        return self._opened(self.create_proxy("call_function", read, (proxy, key), {}))

    def guard(self, proxy: ValueProxy, answer: bool) -> None:
        """Remember that the graph holds only while this condition has this answer."""
        pending, seen = [proxy.node], set()
        while pending:
            node = pending.pop()
            if node.target is getattr and node.args[1] == "device":
                raise Untraceable("asks for its input's device")
            pending += [source for source in node.all_input_nodes if source not in seen]
            seen.update(node.all_input_nodes)
        self.guards.append((proxy.node, answer))


@functools.lru_cache(maxsize=1024)
def signature_of(function: Callable[..., Any]) -> inspect.Signature:
    """Return a function's signature; it is worked out once."""
    return inspect.signature(function)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _modes() -> tuple[bool, bool, bool]:
    return torch._C.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")
