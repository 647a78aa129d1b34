"""Make ordinary modules of an exported program.

``torch.export.unflatten`` puts the operations of the program back into the modules they came from; the graph of each
becomes the lines of a program (``forwards``), and layers of torch.nn come back as themselves.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram, unflatten
from torch.utils._pytree import TreeSpec, tree_unflatten

from se_inject.errors import LoadError, SurgeryError
from se_inject.forwards import encoded, function_name, is_name
from se_inject.loading.layers import assembled, container
from se_inject.loading.leaves import Leaves

_CHECKS = (
    "_assert_tensor_metadata",
    "_assert_scalar",
    "_assert_async",
    "sym_constrain_range",
    "sym_constrain_range_for_size",
)
"""Operators that look whether inputs are as they were when the program was made."""

_OF_SIZES = {
    "sym_float": "python:float",
    "sym_int": "python:int",
    "sym_max": "python:max",
    "sym_min": "python:min",
    "sym_not": "operator:not_",
    "_sym_sqrt": "math:sqrt",
}
"""Functions of sizes that may be symbols, and what they are for numbers."""


def network_from_export(program: ExportedProgram, notes: list[str] | None = None) -> nn.Module:
    """Build an ordinary network that computes the same as an exported program, with the same tensors.

    A module within it that can't be written down stays what torch makes of it.

    Args:
        program: it isn't run.
        notes: a list that gets a note for each module that stays.

    Raises:
        LoadError: it can't be written down as modules; the message says why.
    """
    building = _Network(program)
    return building.leaves.check(building.module(unflatten(program), ""), notes)


def arguments_of(program: ExportedProgram, args: tuple[Any, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Convert a network's arguments to those of its program: some of them by keyword."""
    positional, keywords = _children(program.call_spec.in_spec)  # type: ignore[arg-type]
    count = positional.num_children
    return args[:count], dict(zip(keywords.context, args[count:], strict=False))


class _Network:
    """One program being translated, children before their parents."""

    def __init__(self, program: ExportedProgram) -> None:
        self.program = program
        self._done: dict[int, nn.Module] = {}
        self.leaves = Leaves("an exported program", "an exported program")

    def module(self, found: Any, path: str) -> nn.Module:
        """Build the module for this one; the same for one that is in several places."""
        if id(found) not in self._done:
            module = self._done[id(found)] = self._translated(found, path)
            module.training = False
        return self._done[id(found)]

    def _root_class(self) -> str:
        """Return the qualified name of the network's class, which torch before 2.10 leaves to its nodes."""
        stacks = (node.meta.get("nn_module_stack") or {} for node in self.program.graph.nodes)
        return next((str(kind) for stack in stacks for place, kind in stack.values() if place == ""), "")

    def _children(self, found: Any) -> list[tuple[str, nn.Module]]:
        """Return the modules in a module, without those that are parts of a graph."""
        return [(name, child) for name, child in found.named_children() if not isinstance(child, fx.GraphModule)]

    def _translated(self, found: Any, path: str) -> nn.Module:
        children = {name: self.module(child, f"{path}.{name}".lstrip(".")) for name, child in self._children(found)}
        plain = {name: value for name, value in vars(found).items() if isinstance(value, Tensor)}
        tensors = {**found._parameters, **found._buffers, **plain}
        graph = getattr(found, "graph", None)
        if graph is None or all(node.op != "output" for node in graph.nodes):
            return container("", tensors, children)
        kind = getattr(found, "type_name", str)() or ("" if path else self._root_class())
        home, _, name = kind.rpartition(".")
        try:
            forward = _Forward(found.graph, None if path else self.program)
        except LoadError as error:
            return self.leaves.keep(path, name, found, error)
        module = assembled(name, home, forward.inputs, forward.lines, tensors, children, forward.example)
        module._non_persistent_buffers_set |= module._buffers.keys() & (
            found._non_persistent_buffers_set | plain.keys()
        )
        return module


class _Forward:
    """A module's graph as the lines of a program.

    Args:
        graph: of the module.
        program: if the module is the whole network, whose graph takes the leaves of its inputs.

    Raises:
        LoadError: it does what a program can't.
    """

    def __init__(self, graph: fx.Graph, program: ExportedProgram | None) -> None:
        self.inputs: list[Any] = []
        self.lines: list[Any] = []
        self.example: Any = None
        self._values: dict[fx.Node, Any] = {}
        placeholders = [node for node in graph.nodes if node.op == "placeholder"]
        if program is None:
            self.inputs = [[f"input{index}"] for index in range(len(placeholders))]
            given = [{"node": name} for (name,) in self.inputs]
        else:
            given = self._leaves(program)
            self.example = _example(placeholders, program.call_spec.in_spec)
        self._values.update(zip(placeholders, given, strict=True))
        for node in graph.nodes:
            if node.op != "placeholder":
                self._write(node, program)

    def _leaves(self, program: ExportedProgram) -> list[Any]:
        """Return the inputs of a whole network, and the values of their leaves."""
        spec = program.call_spec.in_spec
        if spec is None:
            raise LoadError("it doesn't say how it is called")
        args, kwargs = _children(spec)
        names = program.module_call_graph[0].signature
        names = list(names.forward_arg_names or []) if names is not None else []
        positional = [names[i] if i < len(names) else f"input{i}" for i in range(args.num_children)]
        self.inputs = [
            [name if is_name(name) else f"input{i}"] for i, name in enumerate((*positional, *kwargs.context))
        ]
        leaves: list[Any] = []
        for (name,), part in zip(self.inputs, (*_children(args), *_children(kwargs)), strict=True):
            self._take_apart({"node": name}, part, leaves)
        return leaves

    def _take_apart(self, value: Any, spec: TreeSpec, leaves: list[Any]) -> None:
        if spec.is_leaf():
            leaves.append(value)
            return
        keys = spec.context if spec.type in (dict, OrderedDict) else range(spec.num_children)
        for key, part in zip(keys, _children(spec), strict=True):
            self._take_apart(self._line("set", "operator:getitem", [value, encoded(key)], {}), part, leaves)

    def _line(self, kind: str, *parts: Any) -> Any:
        name = f"v{len(self.lines)}"
        self.lines.append([kind, [name], *parts])
        return {"node": name}

    def _write(self, node: fx.Node, program: ExportedProgram | None) -> None:
        name = getattr(node.target, "__name__", "").partition(".")[0]
        if node.op == "output":
            result = node.args[0]
            if program is not None and program.call_spec.out_spec is not None:
                flat = list(result) if isinstance(result, tuple | list) else [result]
                result = tree_unflatten(flat, program.call_spec.out_spec)
            self.lines.append(["return", self._data(result)])
        elif node.op == "get_attr":
            self._values[node] = self._line("read", str(node.target))
        elif node.op == "call_module":
            args, kwargs = self._arguments(node)
            self._values[node] = self._line("call", str(node.target), args, kwargs)
        elif name in _CHECKS:
            pass
        elif name in ("sym_size", "sym_stride", "sym_numel"):
            args, _ = self._arguments(node)
            self._values[node] = self._line("method", name.removeprefix("sym_"), args, {})
        elif isinstance(node.target, torch._ops.HigherOrderOperator):
            raise LoadError(f"a part of it runs under `{node.target}`")
        else:
            try:
                called = _OF_SIZES.get(name) or function_name(node.target)
            except SurgeryError as error:
                raise LoadError(error.message) from error
            args, kwargs = self._arguments(node)
            self._values[node] = self._line("set", called, args, kwargs)

    def _arguments(self, node: fx.Node) -> tuple[list[Any], dict[str, Any]]:
        return [self._data(value) for value in node.args], {
            key: self._data(value) for key, value in node.kwargs.items()
        }

    def _data(self, value: Any) -> Any:
        """Convert a value to the plain data of a stored program."""
        if isinstance(value, fx.Node):
            return self._values[value]
        if isinstance(value, list):
            return [self._data(item) for item in value]
        if isinstance(value, tuple):
            return {"tuple": [self._data(item) for item in value]}
        if isinstance(value, dict):
            return {"dict": [[encoded(key), self._data(item)] for key, item in value.items()]}
        try:
            return encoded(value)
        except SurgeryError as error:
            raise LoadError(error.message) from error


def _children(spec: TreeSpec) -> list[TreeSpec]:
    """Return the specs within one; torch before 2.10 names them otherwise."""
    return spec.children() if hasattr(spec, "children") else spec.children_specs


def _example(placeholders: list[fx.Node], spec: Any) -> Any:
    """Return shapes and dtypes of the inputs, as ``inputs.inputs_from`` reads them; a size that may vary is 2 or more.

    None if a leaf isn't a tensor, or a structure isn't known.
    """
    values = [node.meta.get("val") for node in placeholders]
    args, kwargs = _children(spec)
    if not all(isinstance(value, Tensor) for value in values):
        return None
    leaves = iter([[list(map(_size, v.shape)), str(v.dtype).removeprefix("torch.")] for v in values])  # type: ignore[union-attr]
    parts = [_structured(part, leaves) for part in (*_children(args), *_children(kwargs))]
    return None if any(part is None for part in parts) else parts


def _structured(spec: Any, leaves: Iterator[Any]) -> Any:
    """Describe one input: a leaf, or the structure of its leaves."""
    if spec.is_leaf():
        return next(leaves, None)
    parts = [_structured(part, leaves) for part in _children(spec)]
    if any(part is None for part in parts) or spec.type not in (tuple, list, dict, OrderedDict):
        return None
    if spec.type in (tuple, list):
        return {spec.type.__name__: parts}
    return {"dict": [[encoded(key), part] for key, part in zip(spec.context, parts, strict=True)]}


def _size(size: Any) -> int:
    return size if isinstance(size, int) else int(size.node.hint if size.node.hint is not None else 2)
