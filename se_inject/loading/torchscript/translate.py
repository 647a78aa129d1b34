"""A forward of a TorchScript archive → the lines of a program.

The graph of a method is written out line by line (``_programs``): a child's forward is called, other methods and
functions are written out where they are called, and what follows from constants is computed.
"""

from __future__ import annotations

import re
from collections import ChainMap
from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from se_inject.errors import LoadError, SurgeryError
from se_inject.forwards import ATTRIBUTES, encoded, function_called, function_name, is_name, without_unused
from se_inject.loading.torchscript.graphs import CHANGING, DEEPEST, Archive, class_of, plain_class_of
from se_inject.loading.torchscript.values import DTYPES, Constant, Function, Part, Scalar, computed, data

_LONGEST_UNROLLED = 1_000
_FROM_PYTHON = {
    "aten::__getitem__": "operator:getitem", "aten::add": "operator:add", "aten::sub": "operator:sub",
    "aten::mul": "operator:mul", "aten::div": "operator:truediv", "aten::true_divide": "operator:truediv",
    "aten::floordiv": "operator:floordiv", "aten::floor_divide": "operator:floordiv", "aten::mod": "operator:mod",
    "aten::remainder": "operator:mod", "aten::pow": "operator:pow", "aten::neg": "operator:neg",
    "aten::eq": "operator:eq", "aten::ne": "operator:ne", "aten::lt": "operator:lt", "aten::le": "operator:le",
    "aten::gt": "operator:gt", "aten::ge": "operator:ge", "aten::__and__": "operator:and_",
    "aten::__or__": "operator:or_", "aten::__xor__": "operator:xor", "aten::__not__": "operator:not_",
    "aten::__is__": "operator:is_", "aten::__isnot__": "operator:is_not", "aten::__contains__": "operator:contains",
    "aten::__range_length": "python:range_length", "aten::__derive_index": "python:derive_index",
    "aten::len": "python:len", "aten::list": "python:list", "aten::copy": "python:list", "aten::append": "python:append",
    "aten::dict": "python:dict", "aten::extend": "python:extend", "aten::insert": "python:insert",
    "aten::reverse": "python:reverse", "aten::pop": "python:pop", "aten::_set_item": "operator:setitem",
    "prim::max": "python:max", "prim::min": "python:min", "prim::abs": "python:abs", "aten::sum": "python:sum",
    "aten::str": "python:str",
    "aten::floor": "math:floor", "aten::ceil": "math:ceil", "aten::sqrt": "math:sqrt", "aten::log": "math:log",
    "aten::Int": "python:int", "aten::IntImplicit": "python:int", "aten::Float": "python:float",
    "aten::FloatImplicit": "python:float", "aten::Bool": "python:bool", "aten::ScalarImplicit": "python:float",
}  # fmt: skip
_POLYMORPHIC = ("aten::remainder", "aten::floor_divide")  # Python's operator does the same for tensors and for numbers
_WITH_NUMBERS = ("aten::add", "aten::sub", "aten::mul", "aten::div")
"""Where TorchScript takes a constant of Python's types, which tracing has made a tensor, for a number again."""
_CASTS = ("aten::Int", "aten::IntImplicit", "aten::Float", "aten::FloatImplicit", "aten::ScalarImplicit")
_OF_TENSORS = ("size", "dim", "numel", "stride", "is_floating_point")
_THE_SAME = ("prim::unchecked_cast", "prim::unchecked_unwrap_optional", "aten::_unwrap_optional")
_SILENT = ("prim::Print", "aten::warn", "prim::Guard")


class Forward:
    """The forward of one module as the lines of a program.

    Args:
        archive: that the module is in.
        script: the module.
        method: which of its methods; None: its forward.
        named: whether the inputs have the names that they have there, or all the same.
        identities: the names of the children that hand on what they get.

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
        self.borrowed: dict[str, Any] = {}
        """The children that are called instead of modules that the caller passes, and these."""
        self.constants: dict[str, Tensor] = {}
        self.inputs: list[Any] = []
        self._count = self._depth = 0
        self._numbers: dict[str, str] = {}
        """Names of numbers that TorchScript has as tensors, with the dtype of these."""
        self._dtypes: set[str] = set()
        """Names of dtypes."""
        own = archive.forward_of(script)
        found = script._c._get_method(method or own)
        entries: list[Any] = [Part(script, "")]
        for argument in found.schema.arguments[1:]:
            if argument.type.kind() == "ClassType":
                entries.append(Part(archive.example.get(argument.type.annotation_str), None))
                continue
            name = argument.name
            if not named or not is_name(name) or re.fullmatch(r"v\d+", name):
                name = f"input{len(self.inputs)}"
            default = [encoded(argument.default_value)] if argument.has_default_value() else []
            self.inputs.append([name, *default])
            entries.append({"node": name})
        lines: list[Any] = []
        returned = self._inlined(found.graph, entries, lines, {})[0]
        kind = next(found.graph.outputs()).type().kind()
        result = data(self._tensor(returned, lines) if kind == "TensorType" else returned)
        if method in (None, own) and isinstance(result, dict) and "tuple" in result:
            result = {"tuple": [self._origin(part) for part in result["tuple"]]}
            result = archive.hands_back(class_of(script), self.inputs, result)
        lines.append(["return", result])
        self.lines = without_unused(lines)

    # -- blocks --------------------------------------------------------------------------------------------

    def _inlined(self, graph: Any, entries: list[Any], lines: list[Any], reads: dict[str, Any]) -> list[Any]:
        """Write a graph's lines, and return what it returns."""
        self._depth += 1
        if self._depth > DEEPEST:
            raise LoadError("functions that call each other without end")
        env = dict(zip((value.debugName() for value in graph.inputs()), entries, strict=True))
        self._block(graph, env, lines, reads)
        self._depth -= 1
        return [env[value.debugName()] for value in graph.outputs()]

    def _block(self, block: Any, env: MutableMapping[str, Any], lines: list[Any], reads: dict[str, Any]) -> None:
        for node in block.nodes():
            self.archive.step()
            inputs = [env[value.debugName()] for value in node.inputs()]
            results = self._node(node, inputs, env, lines, reads)
            for value, result in zip(node.outputs(), results, strict=True):
                content, kinds = (result.value, list | dict) if isinstance(result, Constant) else (result, list)
                if isinstance(content, kinds) and self.archive.is_one_object(value):
                    result = self._line(lines, "let", 1, data(result))
                env[value.debugName()] = result

    def _node(
        self, node: Any, inputs: list[Any], env: MutableMapping[str, Any], lines: list[Any], reads: dict[str, Any]
    ) -> Any:
        kind = node.kind()
        namespace, _, name = kind.partition("::")
        special = getattr(self, f"_{namespace}_{name}", None) if namespace in ("prim", "aten") else None
        if special is not None:
            return special(node, inputs, env, lines, reads)
        if kind in _THE_SAME:
            return inputs
        if kind in _SILENT:
            return [None for _ in node.outputs()]
        if namespace == "prim" and name in ATTRIBUTES:
            found = self._line(lines, "attribute", 1, inputs[0], name)
            self._dtypes |= {found["node"]} if name == "dtype" else set()
            return [found]
        if kind in _CASTS and self._is_number(inputs[0]):
            is_whole = self._is_whole(inputs[0])
            if kind == "aten::ScalarImplicit" or is_whole == ("Int" in kind):
                return inputs
        of_tensors = "Tensor" in node.schema().partition("->")[0]
        if kind in _FROM_PYTHON and ("__" in name or not of_tensors or all(map(self._is_number, inputs))):
            return self._python(node, _FROM_PYTHON[kind], inputs, lines)
        if kind in _FROM_PYTHON and (kind in _CASTS or kind in ("aten::Bool", "aten::len")):
            return self._python(node, _FROM_PYTHON[kind], inputs, lines)
        is_scalar = any(isinstance(value, Scalar) for value in inputs)
        if kind in _POLYMORPHIC and not is_scalar and (len(inputs) == 2 or self._is_plain(inputs[2:])):
            return self._python(node, _FROM_PYTHON[kind], inputs[:2], lines)
        if kind.startswith("aten::") and name in _OF_TENSORS:
            return [self._line(lines, "method", 1, name, [data(value) for value in inputs], {})]
        if namespace == "prim":
            raise LoadError(f"it uses `{kind}`")
        return self._operation(node, inputs, lines)

    def _line(self, lines: list[Any], kind: str, count: int, *parts: Any) -> Any:
        """Write a line that sets so many names; gives the one name as a value, or all."""
        names = [self._name() for _ in range(count)]
        lines.append([kind, names, *parts])
        return {"node": names[0]} if count == 1 else [{"node": name} for name in names]

    def _name(self) -> str:
        self._count += 1
        return f"v{self._count}"

    def _is_number(self, value: Any) -> bool:
        """Return whether a value is a number, whatever its type in TorchScript."""
        if isinstance(value, Constant):
            return isinstance(value.value, int | float)
        return isinstance(value, dict) and value.get("node") in self._numbers

    def _is_whole(self, value: Any) -> bool:
        """Return whether a number is an integer."""
        if isinstance(value, Constant):
            return isinstance(value.value, int)
        return self._numbers[value["node"]] == "int64"

    def _python(self, node: Any, name: str, inputs: list[Any], lines: list[Any]) -> list[Any]:
        if node.kind() in ("aten::add", "aten::sub"):
            if not self._is_plain(inputs[2:]):
                raise LoadError("it computes with sizes in a way that only tensors know")
            inputs = inputs[:2]
        if node.kind() in ("aten::eq", "aten::ne", "aten::__contains__"):
            inputs = self._with_dtypes(inputs)
        if node.kind() in ("aten::eq", "aten::ne", "aten::add") and "[]" in node.schema():
            inputs = [self._as_list(value, lines) for value in inputs]
        if node.kind().rpartition("::")[2] in CHANGING:
            found = self._line(lines, "set", 1, name, [data(value) for value in inputs], {})
            return [found if name == "python:pop" else inputs[0] for _ in node.outputs()]
        is_power = name == "operator:pow" and node.output().type().kind() == "FloatType"
        if all(isinstance(value, Constant) for value in inputs):
            known = computed(name, [value.value for value in inputs])
            if known is not None:
                return [Constant(float(known.value)) if is_power else known]
        found = self._line(lines, "set", 1, name, [data(value) for value in inputs], {})
        if is_power:
            found = self._line(lines, "set", 1, "python:float", [found], {})
        if all(map(self._is_number, inputs)):
            is_whole = name not in ("operator:truediv", "python:float") and not is_power
            is_whole = is_whole and all(map(self._is_whole, inputs))
            self._numbers[found["node"]] = "int64" if is_whole or name == "python:int" else "float32"
        return [found for _ in node.outputs()]

    def _as_list(self, value: Any, lines: list[Any]) -> Any:
        """Convert a value to a list where TorchScript has one: sizes of tensors are tuples in Python."""
        is_node = isinstance(value, dict) and "node" in value
        return self._line(lines, "set", 1, "python:list", [value], {}) if is_node else value

    def _with_dtypes(self, inputs: list[Any]) -> list[Any]:
        """Convert the operands of a comparison: TorchScript has dtypes as numbers, and reads them from tensors as such."""
        if not any(isinstance(value, dict) and value.get("node") in self._dtypes for value in inputs):
            return inputs

        def dtype(value: Any) -> Any:
            return [dtype(item) for item in value] if isinstance(value, list) else DTYPES[value]

        return [Constant(dtype(value.value)) if isinstance(value, Constant) else value for value in inputs]

    def _operation(self, node: Any, inputs: list[Any], lines: list[Any]) -> Any:
        """Translate an operator on tensors."""
        if "Tensor" not in node.schema():
            raise LoadError(f"it uses `{node.kind()}` on what is no tensor")
        schema = torch._C.parse_schema(node.schema())
        packet = torch.ops
        try:
            for part in (*schema.name.split("::"), schema.overload_name or "default"):
                packet = getattr(packet, part)
            name = function_name(packet)
            function_called(name)
        except (AttributeError, LoadError, SurgeryError) as error:
            raise LoadError(f"it uses the operator `{schema.name}`", seen=str(error)) from error
        args, kwargs = [], {}
        for value, argument in zip(inputs, schema.arguments, strict=True):
            is_tensor = "Tensor" in str(argument.type)
            if is_tensor:
                as_number = (
                    node.kind() in _WITH_NUMBERS and argument.name == "other" and schema.overload_name == "Tensor"
                )
                value = Constant(value.value) if as_number and isinstance(value, Scalar) else self._tensor(value, lines)
            elif isinstance(value, Scalar):
                value = Constant(value.value)
            if argument.kwarg_only:
                kwargs[argument.name] = data(value)
            else:
                args.append(data(value))
        count = len(list(node.outputs()))
        found = self._line(lines, "set", count, name, args, kwargs)
        return found if count > 1 else [found] * count

    def _tensor(self, value: Any, lines: list[Any]) -> Any:
        """Convert a value to a tensor, if TorchScript has it as one and it is written as a number."""
        if isinstance(value, Scalar):
            return self._constant(value.tensor, lines)
        if isinstance(value, dict) and value.get("node") in self._numbers:
            dtype = {"dtype": {"dtype": self._numbers[value["node"]]}}
            return self._line(lines, "set", 1, "ops:aten.scalar_tensor.default", [value], dtype)
        return value

    # -- what isn't an operator -------------------------------------------------------------------------------

    def _prim_Constant(self, node: Any, inputs: Any, env: Any, lines: list[Any], reads: dict[str, Any]) -> list[Any]:
        output = node.output()
        if output.type().kind() == "FunctionType":
            return [Function(output.type().annotation_str)]
        value = output.toIValue()
        if isinstance(value, Tensor):
            return [Scalar(value) if value.dim() == 0 else self._constant(value, lines)]
        return [Constant(value)]

    def _constant(self, value: Tensor, lines: list[Any]) -> Any:
        """Translate a tensor of the program's own, which becomes a buffer."""
        name = f"constant_{len(self.constants)}"
        self.constants[name] = value
        return self._line(lines, "read", 1, name)

    def _prim_GetAttr(
        self, node: Any, inputs: list[Any], env: Any, lines: list[Any], reads: dict[str, Any]
    ) -> list[Any]:
        (part,) = inputs
        name = node.s("name")
        if not isinstance(part, Part):
            raise LoadError(f"it reads `{name}` of something that is no module")
        if part.path is None:
            raise LoadError(f"it reads `{name}` of a module that its caller passes to it")
        path = f"{part.path}.{name}".lstrip(".")
        if name in part.script._modules:
            return [Part(part.script._modules[name], path)]
        value = part.script._c.getattr(name)
        if isinstance(value, Tensor) or name == "training":
            if path not in reads:
                reads[path] = self._line(lines, "read", 1, path)
            return [reads[path]]
        if any(isinstance(leaf, Tensor | torch.ScriptObject) for leaf in tree_leaves(value)):
            raise LoadError(f"its `{name}` holds tensors or an object of C++")
        if isinstance(value, list | dict) and self.archive.may_change(node.output()):
            raise LoadError(f"it may change its `{name}`, for this call and all others")
        return [Constant(value)]

    def _prim_SetAttr(self, node: Any, *_: Any) -> Any:
        raise LoadError(f"it stores into its `{node.s('name')}`")

    def _prim_CallMethod(
        self, node: Any, inputs: list[Any], env: Any, lines: list[Any], reads: dict[str, Any]
    ) -> list[Any]:
        part, *args = inputs
        name = node.s("name")
        if not isinstance(part, Part):
            raise LoadError(f"it calls `{name}` of something that is no module")
        called = part.script._c._get_method(name)
        if part.path is None or "." in part.path:
            part = self._own_instead_of(part)
        if class_of(part.script) in self.archive.borrowing:
            args = [value for value in args if not isinstance(value, Part)]
        takes_modules = any(isinstance(value, Part) for value in args)
        if part.path and not takes_modules and self._is_forward(part.script, name):
            given = [data(self._tensor(value, lines)) for value in args]
            result = self._line(lines, "call", 1, part.path, given, {})
            if part.path in self._identities and len(given) == 1:
                self._same_as[result["node"]] = given[0]
            outlets = self.archive.outlets.get(class_of(part.script))
            if outlets is None:
                return [result]
            count = outlets.count(None)
            own = iter(self._line(lines, "let", count, result) if count > 1 else [result])
            return [{"tuple": [next(own) if outlet is None else given[outlet] for outlet in outlets]}]
        return self._inlined(called.graph, [part, *args], lines, reads)

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

    def _prim_CallFunction(
        self, node: Any, inputs: list[Any], env: Any, lines: list[Any], reads: dict[str, Any]
    ) -> list[Any]:
        called, *args = inputs
        if not isinstance(called, Function):
            raise LoadError("it calls a function that is a value")
        return self._inlined(self.archive.function(called.name).graph, args, lines, reads)

    def _prim_If(
        self, node: Any, inputs: list[Any], env: MutableMapping[str, Any], lines: list[Any], reads: Any
    ) -> list[Any]:
        (condition,) = inputs
        blocks = list(node.blocks())
        if isinstance(condition, Constant):
            taken = blocks[0] if condition.value else blocks[1]
            self._block(taken, env, lines, reads)
            return [env[value.debugName()] for value in taken.outputs()]
        branches: list[list[Any]] = [[], []]
        ends = []
        for block, branch in zip(blocks, branches, strict=True):
            inner = ChainMap({}, env)
            self._block(block, inner, branch, dict(reads))
            ends.append([inner[value.debugName()] for value in block.outputs()])
        results: list[Any] = []
        for first, second in zip(*ends, strict=True):
            values = [end.value if isinstance(end, Constant) else None for end in (first, second)]
            if values[0] is True and values[1] is False:
                results.append(condition)
                continue
            name = self._name()
            branches[0].append(["let", [name], data(first)])
            branches[1].append(["let", [name], data(second)])
            results.append({"node": name})
        lines.append(["if", data(condition), *branches])
        return results

    def _prim_Loop(
        self, node: Any, inputs: list[Any], env: MutableMapping[str, Any], lines: list[Any], reads: Any
    ) -> list[Any]:
        count, condition, *carried = inputs
        (block,) = node.blocks()
        names = [value.debugName() for value in block.inputs()]
        outputs = [value.debugName() for value in block.outputs()]
        last = next(iter(block.outputs())).node()
        goes_on = last.kind() == "prim::Constant" or isinstance(env.get(outputs[0]), Constant)
        if (
            isinstance(count, Constant)
            and isinstance(condition, Constant)
            and goes_on
            and count.value <= _LONGEST_UNROLLED
        ):
            for number in range(count.value if condition.value else 0):
                self.archive.step()
                inner = ChainMap(dict(zip(names, [Constant(number), *carried], strict=True)), env)
                self._block(block, inner, lines, reads)
                going, *carried = (inner[name] for name in outputs)
                if not going.value:
                    break
            return carried
        turn, stop, *own = (self._name() for _ in (*names, None))
        lines.append(["let", [stop], data(condition)])
        for name, value in zip(own, carried, strict=True):
            lines.append(["let", [name], data(value)])
        body: list[Any] = []
        inner = ChainMap(dict(zip(names, [{"node": name} for name in (turn, *own)], strict=True)), env)
        self._block(block, inner, body, dict(reads))
        after = [data(inner[name]) for name in outputs]
        body.append(["let", [stop, *own], {"tuple": after} if own else after[0]])
        lines.append(["loop", turn, data(count), stop, body])
        return [{"node": name} for name in own]

    def _prim_ListConstruct(self, node: Any, inputs: list[Any], env: Any, lines: list[Any], reads: Any) -> list[Any]:
        if all(isinstance(value, Constant) for value in inputs):
            return [Constant([value.value for value in inputs])]
        return [[data(value) for value in inputs]]

    def _prim_TupleConstruct(self, node: Any, inputs: list[Any], env: Any, lines: list[Any], reads: Any) -> list[Any]:
        inputs = [
            self._tensor(value, lines) if given.type().kind() == "TensorType" else value
            for value, given in zip(inputs, node.inputs(), strict=True)
        ]
        if all(isinstance(value, Constant) for value in inputs):
            return [Constant(tuple(value.value for value in inputs))]
        return [{"tuple": [data(value) for value in inputs]}]

    def _prim_DictConstruct(self, node: Any, inputs: list[Any], env: Any, lines: list[Any], reads: Any) -> list[Any]:
        pairs = [[data(key), data(value)] for key, value in zip(inputs[::2], inputs[1::2], strict=True)]
        return [self._line(lines, "let", 1, {"dict": pairs})]

    def _prim_TupleUnpack(self, node: Any, inputs: list[Any], env: Any, lines: list[Any], reads: Any) -> list[Any]:
        (whole,) = inputs
        count = len(list(node.outputs()))
        if isinstance(whole, Constant):
            return [Constant(value) for value in whole.value]
        if isinstance(whole, list):
            return whole
        if "tuple" in whole:
            return list(whole["tuple"])
        if count == 1:
            return [self._line(lines, "set", 1, "operator:getitem", [whole, 0], {})]
        return self._line(lines, "let", count, whole)  # type: ignore[no-any-return]

    _prim_ListUnpack = _prim_TupleUnpack

    def _prim_TupleIndex(self, node: Any, inputs: list[Any], env: Any, lines: list[Any], reads: Any) -> list[Any]:
        return self._python(node, "operator:getitem", inputs, lines)

    def _prim_NumToTensor(self, node: Any, inputs: list[Any], *_: Any) -> list[Any]:
        if isinstance(inputs[0], dict) and "node" in inputs[0]:
            self._numbers[inputs[0]["node"]] = "int64" if node.input().type().kind() == "IntType" else "float32"
        return inputs

    def _is_plain(self, rest: list[Any]) -> bool:
        """Return whether the arguments behind the operands have no effect: `alpha` is 1, there is no rounding mode."""
        return all(isinstance(value, Constant) and value.value in (None, 1) for value in rest)

    def _aten_keys(self, node: Any, inputs: list[Any], env: Any, lines: list[Any], reads: Any) -> list[Any]:
        found = self._line(lines, "method", 1, node.kind().removeprefix("aten::"), [data(inputs[0])], {})
        return [self._line(lines, "set", 1, "python:list", [found], {})]

    _aten_values = _aten_items = _aten_keys

    def _aten_rsub(self, node: Any, inputs: list[Any], env: Any, lines: list[Any], reads: Any) -> list[Any]:
        if self._is_plain(inputs[2:]):
            return self._python(node, "operator:sub", inputs[1::-1], lines)
        return self._operation(node, inputs, lines)  # type: ignore[no-any-return]

    def _aten_div(self, node: Any, inputs: list[Any], env: Any, lines: list[Any], reads: Any) -> list[Any]:
        numbers, rounding = inputs[:2], inputs[2:]
        if "Tensor" in node.schema() and not all(map(self._is_number, numbers)):
            return self._operation(node, inputs, lines)  # type: ignore[no-any-return]
        if self._is_plain(rounding):
            return self._python(node, "operator:truediv", numbers, lines)
        if isinstance(rounding[0], Constant) and rounding[0].value == "floor":
            return self._python(node, "operator:floordiv", numbers, lines)
        raise LoadError("it rounds a quotient of sizes towards zero")

    def _aten_tensor(self, node: Any, inputs: list[Any], env: Any, lines: list[Any], reads: Any) -> list[Any]:
        content, dtype, device, _ = inputs
        if isinstance(dtype, Constant) and dtype.value is not None:
            dtype = Constant(DTYPES[dtype.value])
        kwargs = {"dtype": data(dtype), "device": data(device)}
        kwargs = {key: value for key, value in kwargs.items() if value is not None}
        return [self._line(lines, "set", 1, "torch:tensor", [data(content)], kwargs)]

    def _prim_isinstance(self, node: Any, inputs: list[Any], env: Any, lines: list[Any], reads: Any) -> list[Any]:
        known = node.input().type()
        asked = node.tys("types")
        if known.kind() not in ("UnionType", "OptionalType", "AnyType"):
            return [Constant(any(known.isSubtypeOf(kind) for kind in asked))]
        tests = {"TensorType": "python:is_tensor", "ListType": "python:is_list"}
        if len(asked) != 1 or asked[0].kind() not in tests:
            raise LoadError("it asks for the type of a value that may be of several")
        return [self._line(lines, "set", 1, tests[asked[0].kind()], [data(inputs[0])], {})]

    def _prim_RaiseException(self, node: Any, inputs: list[Any], env: Any, lines: list[Any], reads: Any) -> list[Any]:
        message = inputs[0].value if isinstance(inputs[0], Constant) else ""
        lines.append(["raise", str(message)])
        return []

    def _prim_Uninitialized(self, *_: Any) -> list[Any]:
        return [Constant(None)]

    def _aten_slice(self, node: Any, inputs: list[Any], env: Any, lines: list[Any], reads: Any) -> list[Any]:
        if "Tensor" in node.schema():
            return self._operation(node, inputs, lines)  # type: ignore[no-any-return]
        whole, *parts = inputs
        if all(isinstance(value, Constant) for value in inputs):
            return [Constant(whole.value[slice(*(part.value for part in parts))])]
        window = {"slice": [data(part) for part in parts]}
        return [self._line(lines, "set", 1, "operator:getitem", [data(whole), window], {})]

    def _aten_format(self, node: Any, inputs: list[Any], *_: Any) -> list[Any]:
        ignorable = ("prim::RaiseException", "prim::Print", "aten::warn", "aten::format", "aten::add")
        if any(use.user.kind() not in ignorable for use in node.output().uses()):
            raise LoadError("it makes text that is used as a value")
        return [Constant(inputs[0].value if isinstance(inputs[0], Constant) else "")]

    def _aten__get_tracing_state(self, *_: Any) -> list[Any]:
        return [Constant(None)]
