"""Translate one forward of a TorchScript archive into the lines of a program.

The graph of a method is written out line by line (``lines``): a child's forward is called, other methods and
functions are written out where they are called, and what follows from constants is computed. Operators are written in
``operators``; here are modules, calls and control flow.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from se_inject.errors import LoadError
from se_inject.forwards import encoded, is_name, without_unused
from se_inject.loading.torchscript.graphs import DEEPEST, Archive, class_of, plain_class_of
from se_inject.loading.torchscript.lines import Names, Scope
from se_inject.loading.torchscript.operators import written
from se_inject.loading.torchscript.values import Constant, Function, Part, data

_LONGEST_UNROLLED = 1_000


class Forward:
    """The forward of one module as the lines of a program.

    Args:
        archive: that the module is in.
        script: the module.
        method: which of its methods; None: its forward.
        named: whether the inputs have the names that they have there, or all the same.
        identities: the names of the children that hand on what they get.

    Attributes:
        inputs: the names of its inputs, each with its default if it has one.
        lines: the program's.
        constants: tensors of the program's own, which become buffers.
        borrowed: the children that are called instead of modules that the caller passes, and these.

    Raises:
        LoadError: it does what a program can't.
    """

    def __init__(
        self,
        archive: Archive,
        script: Any,
        method: str | None = None,
        *,
        named: bool = True,
        identities: frozenset[str] = frozenset(),
    ) -> None:
        self.archive = archive
        self._identities = identities
        self._same_as: dict[str, Any] = {}
        self._script = script
        self._depth = 0
        self._handlers = {
            "prim::GetAttr": self._attribute, "prim::SetAttr": self._stored, "prim::CallMethod": self._method,
            "prim::CallFunction": self._function, "prim::If": self._choice, "prim::Loop": self._loop,
        }  # fmt: skip
        self.borrowed: dict[str, Any] = {}
        self.inputs: list[Any] = []
        own = archive.forward_of(script)
        found = script._c._get_method(method or own)
        scope = Scope(Names())
        returned = self._inlined(found.graph, self._entries(found.schema, named=named), scope)[0]
        kind = next(found.graph.outputs()).type().kind()
        result = data(scope.tensor(returned) if kind == "TensorType" else returned)
        if method in (None, own) and isinstance(result, dict) and "tuple" in result:
            result = {"tuple": [self._origin(part) for part in result["tuple"]]}
            result = archive.hands_back(class_of(script), self.inputs, result)
        scope.lines.append(["return", result])
        self.lines = without_unused(scope.lines)
        self.constants: dict[str, Tensor] = scope.names.constants

    def _entries(self, schema: Any, *, named: bool) -> list[Any]:
        """Name the inputs, and return what the graph gets."""
        entries: list[Any] = [Part(self._script, "")]
        for argument in schema.arguments[1:]:
            if argument.type.kind() == "ClassType":
                entries.append(Part(self.archive.example.get(argument.type.annotation_str), None))
                continue
            name = argument.name
            if not named or not is_name(name) or re.fullmatch(r"v\d+", name):
                name = f"input{len(self.inputs)}"
            default = [encoded(argument.default_value)] if argument.has_default_value() else []
            self.inputs.append([name, *default])
            entries.append({"node": name})
        return entries

    def _inlined(self, graph: Any, entries: list[Any], scope: Scope) -> list[Any]:
        """Write a graph's lines, and return what it returns."""
        self._depth += 1
        if self._depth > DEEPEST:
            raise LoadError("functions that call each other without end")
        inner = scope.of_call(dict(zip((value.debugName() for value in graph.inputs()), entries, strict=True)))
        self._block(graph, inner)
        self._depth -= 1
        return [inner.values[value.debugName()] for value in graph.outputs()]

    def _block(self, block: Any, scope: Scope) -> None:
        for node in block.nodes():
            self.archive.step()
            inputs = [scope.values[value.debugName()] for value in node.inputs()]
            results = self._handlers.get(node.kind(), written)(node, inputs, scope)
            for value, result in zip(node.outputs(), results, strict=True):
                content, kinds = (result.value, list | dict) if isinstance(result, Constant) else (result, list)
                if isinstance(content, kinds) and self.archive.is_one_object(value):
                    result = scope.line("let", data(result))
                scope.values[value.debugName()] = result

    # -- modules and calls ---------------------------------------------------------------------------------

    def _attribute(self, node: Any, inputs: list[Any], scope: Scope) -> list[Any]:
        (part,) = inputs
        name = node.s("name")
        if not isinstance(part, Part):
            raise LoadError(f"it reads `{name}` of something that is not a module")
        if part.path is None:
            raise LoadError(f"it reads `{name}` of a module that its caller passes to it")
        path = f"{part.path}.{name}".lstrip(".")
        if name in part.script._modules:
            return [Part(part.script._modules[name], path)]
        value = part.script._c.getattr(name)
        if isinstance(value, Tensor) or name == "training":
            if path not in scope.reads:
                scope.reads[path] = scope.line("read", path)
            return [scope.reads[path]]
        if any(isinstance(leaf, Tensor | torch.ScriptObject) for leaf in tree_leaves(value)):
            raise LoadError(f"its `{name}` holds tensors or an object of C++")
        if isinstance(value, list | dict) and self.archive.may_change(node.output()):
            raise LoadError(f"it may change its `{name}`, for this call and all others")
        return [Constant(value)]

    def _stored(self, node: Any, inputs: list[Any], scope: Scope) -> list[Any]:
        raise LoadError(f"it stores into its `{node.s('name')}`")

    def _method(self, node: Any, inputs: list[Any], scope: Scope) -> list[Any]:
        part, *args = inputs
        name = node.s("name")
        if not isinstance(part, Part):
            raise LoadError(f"it calls `{name}` of something that is not a module")
        called = part.script._c._get_method(name)
        if part.path is None or "." in part.path:
            part = self._own_instead_of(part)
        if class_of(part.script) in self.archive.borrowing:
            args = [value for value in args if not isinstance(value, Part)]
        takes_modules = any(isinstance(value, Part) for value in args)
        if part.path and not takes_modules and self._is_forward(part.script, name):
            given = [data(scope.tensor(value)) for value in args]
            result = scope.line("call", part.path, given, {})
            if part.path in self._identities and len(given) == 1:
                self._same_as[result["node"]] = given[0]
            outlets = self.archive.outlets.get(class_of(part.script))
            if outlets is None:
                return [result]
            count = outlets.count(None)
            own = iter(scope.line_of_several("let", count, result) if count > 1 else [result])
            return [{"tuple": [next(own) if outlet is None else given[outlet] for outlet in outlets]}]
        return self._inlined(called.graph, [part, *args], scope)

    def _own_instead_of(self, shared: Part) -> Part:
        """Find the child that the author called, if the called module lies elsewhere because several modules share it.

        The archive has an empty one in all other places; here the next of its class that nothing calls.
        """
        script, kind = shared.script, plain_class_of(shared.script)
        own = [
            key
            for key, child in self._script._modules.items()
            if plain_class_of(child) == kind and self.archive.forward_of(child) is None and not len(child._modules)
        ]
        if own and not script._parameters and not script._buffers:
            key = next((key for key in own if key not in self.borrowed), own[0])
            self.borrowed[key] = script
            return Part(script, key)
        if shared.path is None:
            raise LoadError(f"it calls a {kind} that its caller passes to it")
        return shared

    def _origin(self, value: Any) -> Any:
        """Return a value before it went through identities."""
        while isinstance(value, dict) and value.get("node") in self._same_as:
            value = self._same_as[value["node"]]
        return value

    def _is_forward(self, script: Any, name: str) -> bool:
        """Return whether a method does what the forward does; tracing makes one for each call."""
        own = self.archive.forward_of(script)
        if name == own or own is None:
            return name == own
        key = (class_of(script), name)
        if key not in self.archive.same:
            one, other = (Forward(self.archive, script, method, named=False) for method in (own, name))
            self.archive.same[key] = one.lines == other.lines and one.inputs == other.inputs
        return self.archive.same[key]

    def _function(self, node: Any, inputs: list[Any], scope: Scope) -> list[Any]:
        called, *args = inputs
        if not isinstance(called, Function):
            raise LoadError("it calls a function that is a value")
        return self._inlined(self.archive.function(called.name).graph, args, scope)

    # -- control flow --------------------------------------------------------------------------------------

    def _choice(self, node: Any, inputs: list[Any], scope: Scope) -> list[Any]:
        (condition,) = inputs
        blocks = list(node.blocks())
        if isinstance(condition, Constant):
            taken = blocks[0] if condition.value else blocks[1]
            self._block(taken, scope)
            return [scope.values[value.debugName()] for value in taken.outputs()]
        branches = [scope.of_branch({}) for _ in blocks]
        ends = []
        for block, branch in zip(blocks, branches, strict=True):
            self._block(block, branch)
            ends.append([branch.values[value.debugName()] for value in block.outputs()])
        results: list[Any] = []
        for first, second in zip(*ends, strict=True):
            values = [end.value if isinstance(end, Constant) else None for end in (first, second)]
            if values[0] is True and values[1] is False:
                results.append(condition)
                continue
            name = scope.names.new()
            branches[0].lines.append(["let", [name], data(first)])
            branches[1].lines.append(["let", [name], data(second)])
            results.append({"node": name})
        scope.lines.append(["if", data(condition), *(branch.lines for branch in branches)])
        return results

    def _loop(self, node: Any, inputs: list[Any], scope: Scope) -> list[Any]:
        count, condition, *carried = inputs
        (block,) = node.blocks()
        first = next(iter(block.outputs()))
        goes_on = first.node().kind() == "prim::Constant" or isinstance(scope.values.get(first.debugName()), Constant)
        is_known = isinstance(count, Constant) and isinstance(condition, Constant)
        if is_known and goes_on and count.value <= _LONGEST_UNROLLED:
            return self._unrolled(block, count.value if condition.value else 0, carried, scope)
        names = [value.debugName() for value in block.inputs()]
        turn, stop, *own = (scope.names.new() for _ in (*names, None))
        scope.lines.append(["let", [stop], data(condition)])
        for name, value in zip(own, carried, strict=True):
            scope.lines.append(["let", [name], data(value)])
        body = scope.of_branch(dict(zip(names, [{"node": name} for name in (turn, *own)], strict=True)))
        self._block(block, body)
        after = [data(body.values[value.debugName()]) for value in block.outputs()]
        body.lines.append(["let", [stop, *own], {"tuple": after} if own else after[0]])
        scope.lines.append(["loop", turn, data(count), stop, body.lines])
        return [{"node": name} for name in own]

    def _unrolled(self, block: Any, count: int, carried: list[Any], scope: Scope) -> list[Any]:
        """Write a loop's body once for each of its turns, and return what it carries out of the last."""
        names = [value.debugName() for value in block.inputs()]
        for number in range(count):
            self.archive.step()
            inner = scope.of_turn(dict(zip(names, [Constant(number), *carried], strict=True)))
            self._block(block, inner)
            going, *carried = (inner.values[value.debugName()] for value in block.outputs())
            if not going.value:
                break
        return carried
