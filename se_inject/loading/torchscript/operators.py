"""Translate the operators of a TorchScript graph into lines: a handler for each that needs one, a rule for all others.

A handler gets the node, its inputs as values and the scope that it writes into, and returns the outputs as values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from se_inject.errors import LoadError, SurgeryError
from se_inject.forwards import ATTRIBUTES, function_called, function_name
from se_inject.loading.torchscript.graphs import CHANGING
from se_inject.loading.torchscript.lines import Scope
from se_inject.loading.torchscript.values import DTYPES, Constant, Function, Scalar, computed, data

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
_OF_MESSAGES = ("prim::RaiseException", "prim::Print", "aten::warn", "aten::format", "aten::add")


def written(node: Any, inputs: list[Any], scope: Scope) -> list[Any]:
    """Write what an operator does, and return its outputs as values.

    Raises:
        LoadError: a program can't do it.
    """
    kind, names = node.kind(), scope.names
    namespace, _, name = kind.partition("::")
    handler = _HANDLERS.get(kind)
    if handler is not None:
        return handler(node, inputs, scope)
    if kind in _THE_SAME:
        return inputs
    if kind in _SILENT:
        return [None for _ in node.outputs()]
    if namespace == "prim" and name in ATTRIBUTES:
        found = scope.line("attribute", inputs[0], name)
        names.dtypes |= {found["node"]} if name == "dtype" else set()
        return [found]
    if kind in _CASTS and names.is_number(inputs[0]):
        is_whole = names.is_whole(inputs[0])
        if kind == "aten::ScalarImplicit" or is_whole == ("Int" in kind):
            return inputs
    of_tensors = "Tensor" in node.schema().partition("->")[0]
    if kind in _FROM_PYTHON and ("__" in name or not of_tensors or all(map(names.is_number, inputs))):
        return _python(node, _FROM_PYTHON[kind], inputs, scope)
    if kind in _FROM_PYTHON and (kind in _CASTS or kind in ("aten::Bool", "aten::len")):
        return _python(node, _FROM_PYTHON[kind], inputs, scope)
    is_scalar = any(isinstance(value, Scalar) for value in inputs)
    if kind in _POLYMORPHIC and not is_scalar and (len(inputs) == 2 or _is_plain(inputs[2:])):
        return _python(node, _FROM_PYTHON[kind], inputs[:2], scope)
    if kind.startswith("aten::") and name in _OF_TENSORS:
        return [scope.line("method", name, [data(value) for value in inputs], {})]
    if namespace == "prim":
        raise LoadError(f"it uses `{kind}`")
    return _operation(node, inputs, scope)


def _python(node: Any, name: str, inputs: list[Any], scope: Scope) -> list[Any]:
    """Write a call of a function of Python, on numbers, lists and dicts; compute what follows from constants."""
    if node.kind() in ("aten::add", "aten::sub"):
        if not _is_plain(inputs[2:]):
            raise LoadError("it computes with sizes in a way that only tensors know")
        inputs = inputs[:2]
    if node.kind() in ("aten::eq", "aten::ne", "aten::__contains__"):
        inputs = _with_dtypes(inputs, scope)
    if node.kind() in ("aten::eq", "aten::ne", "aten::add") and "[]" in node.schema():
        inputs = [scope.as_list(value) for value in inputs]
    if node.kind().rpartition("::")[2] in CHANGING:
        found = scope.call(name, *map(data, inputs))
        return [found if name == "python:pop" else inputs[0] for _ in node.outputs()]
    is_power = name == "operator:pow" and node.output().type().kind() == "FloatType"
    if all(isinstance(value, Constant) for value in inputs):
        known = computed(name, [value.value for value in inputs])
        if known is not None:
            return [Constant(float(known.value)) if is_power else known]
    found = scope.call(name, *map(data, inputs))
    if is_power:
        found = scope.call("python:float", found)
    names = scope.names
    if all(map(names.is_number, inputs)):
        is_whole = name not in ("operator:truediv", "python:float") and not is_power
        is_whole = is_whole and all(map(names.is_whole, inputs))
        names.numbers[found["node"]] = "int64" if is_whole or name == "python:int" else "float32"
    return [found for _ in node.outputs()]


def _with_dtypes(inputs: list[Any], scope: Scope) -> list[Any]:
    """Convert the operands of a comparison: TorchScript has dtypes as numbers, and reads them from tensors as such."""
    if not any(isinstance(value, dict) and value.get("node") in scope.names.dtypes for value in inputs):
        return inputs

    def dtype(value: Any) -> Any:
        return [dtype(item) for item in value] if isinstance(value, list) else DTYPES[value]

    return [Constant(dtype(value.value)) if isinstance(value, Constant) else value for value in inputs]


def _is_plain(rest: list[Any]) -> bool:
    """Return whether the arguments behind the operands have no effect: `alpha` is 1, there is no rounding mode."""
    return all(isinstance(value, Constant) and value.value in (None, 1) for value in rest)


def _operation(node: Any, inputs: list[Any], scope: Scope) -> list[Any]:
    """Write an operator on tensors."""
    if "Tensor" not in node.schema():
        raise LoadError(f"it uses `{node.kind()}` on something that is not a tensor")
    schema = torch._C.parse_schema(node.schema())
    name = _operator_name(schema)
    args, kwargs = [], {}
    for value, argument in zip(inputs, schema.arguments, strict=True):
        is_scalar = isinstance(value, Scalar)
        if "Tensor" in str(argument.type):
            as_number = node.kind() in _WITH_NUMBERS and argument.name == "other" and schema.overload_name == "Tensor"
            value = Constant(value.value) if as_number and is_scalar else scope.tensor(value)
        elif is_scalar:
            value = Constant(value.value)
        if argument.kwarg_only:
            kwargs[argument.name] = data(value)
        else:
            args.append(data(value))
    return scope.line_of_several("set", len(list(node.outputs())), name, args, kwargs)


def _operator_name(schema: Any) -> str:
    """Return a program's name of an operator.

    Raises:
        LoadError: this torch has none of that name, or a program must not call it.
    """
    packet: Any = torch.ops
    try:
        for part in (*schema.name.split("::"), schema.overload_name or "default"):
            packet = getattr(packet, part)
        name = function_name(packet)
        function_called(name)
    except (AttributeError, LoadError, SurgeryError) as error:
        raise LoadError(f"it uses the operator `{schema.name}`", seen=str(error)) from error
    return name


# -- constants and containers ------------------------------------------------------------------------------


def _constant(node: Any, inputs: list[Any], scope: Scope) -> list[Any]:
    output = node.output()
    if output.type().kind() == "FunctionType":
        return [Function(output.type().annotation_str)]
    value = output.toIValue()
    if isinstance(value, Tensor):
        return [Scalar(value) if value.dim() == 0 else scope.constant(value)]
    return [Constant(value)]


def _nothing(node: Any, inputs: list[Any], scope: Scope) -> list[Any]:
    return [Constant(None)]


def _list(node: Any, inputs: list[Any], scope: Scope) -> list[Any]:
    if all(isinstance(value, Constant) for value in inputs):
        return [Constant([value.value for value in inputs])]
    return [[data(value) for value in inputs]]


def _tuple(node: Any, inputs: list[Any], scope: Scope) -> list[Any]:
    inputs = [
        scope.tensor(value) if given.type().kind() == "TensorType" else value
        for value, given in zip(inputs, node.inputs(), strict=True)
    ]
    if all(isinstance(value, Constant) for value in inputs):
        return [Constant(tuple(value.value for value in inputs))]
    return [{"tuple": [data(value) for value in inputs]}]


def _dict(node: Any, inputs: list[Any], scope: Scope) -> list[Any]:
    pairs = [[data(key), data(value)] for key, value in zip(inputs[::2], inputs[1::2], strict=True)]
    return [scope.line("let", {"dict": pairs})]


def _unpacked(node: Any, inputs: list[Any], scope: Scope) -> list[Any]:
    (whole,) = inputs
    count = len(list(node.outputs()))
    if isinstance(whole, Constant):
        return [Constant(value) for value in whole.value]
    if isinstance(whole, list):
        return whole
    if "tuple" in whole:
        return list(whole["tuple"])
    if count == 1:
        return [scope.call("operator:getitem", whole, 0)]
    return scope.line_of_several("let", count, whole)


def _item(node: Any, inputs: list[Any], scope: Scope) -> list[Any]:
    return _python(node, "operator:getitem", inputs, scope)


def _view(node: Any, inputs: list[Any], scope: Scope) -> list[Any]:
    """Write the keys, values or items of a dict as the list that TorchScript makes of them."""
    found = scope.line("method", node.kind().removeprefix("aten::"), [data(inputs[0])], {})
    return [scope.call("python:list", found)]


def _slice(node: Any, inputs: list[Any], scope: Scope) -> list[Any]:
    if "Tensor" in node.schema():
        return _operation(node, inputs, scope)
    whole, *parts = inputs
    if all(isinstance(value, Constant) for value in inputs):
        return [Constant(whole.value[slice(*(part.value for part in parts))])]
    return [scope.call("operator:getitem", data(whole), {"slice": [data(part) for part in parts]})]


# -- numbers, types and messages ---------------------------------------------------------------------------


def _number_as_tensor(node: Any, inputs: list[Any], scope: Scope) -> list[Any]:
    if isinstance(inputs[0], dict) and "node" in inputs[0]:
        is_whole = node.input().type().kind() == "IntType"
        scope.names.numbers[inputs[0]["node"]] = "int64" if is_whole else "float32"
    return inputs


def _reverse_difference(node: Any, inputs: list[Any], scope: Scope) -> list[Any]:
    if _is_plain(inputs[2:]):
        return _python(node, "operator:sub", inputs[1::-1], scope)
    return _operation(node, inputs, scope)


def _quotient(node: Any, inputs: list[Any], scope: Scope) -> list[Any]:
    numbers, rounding = inputs[:2], inputs[2:]
    if "Tensor" in node.schema() and not all(map(scope.names.is_number, numbers)):
        return _operation(node, inputs, scope)
    if _is_plain(rounding):
        return _python(node, "operator:truediv", numbers, scope)
    if isinstance(rounding[0], Constant) and rounding[0].value == "floor":
        return _python(node, "operator:floordiv", numbers, scope)
    raise LoadError("it rounds a quotient of sizes towards zero")


def _new_tensor(node: Any, inputs: list[Any], scope: Scope) -> list[Any]:
    content, dtype, device, _ = inputs
    if isinstance(dtype, Constant) and dtype.value is not None:
        dtype = Constant(DTYPES[dtype.value])
    kwargs = {"dtype": data(dtype), "device": data(device)}
    kwargs = {key: value for key, value in kwargs.items() if value is not None}
    return [scope.line("set", "torch:tensor", [data(content)], kwargs)]


def _type_test(node: Any, inputs: list[Any], scope: Scope) -> list[Any]:
    known = node.input().type()
    asked = node.tys("types")
    if known.kind() not in ("UnionType", "OptionalType", "AnyType"):
        return [Constant(any(known.isSubtypeOf(kind) for kind in asked))]
    tests = {"TensorType": "python:is_tensor", "ListType": "python:is_list"}
    if len(asked) != 1 or asked[0].kind() not in tests:
        raise LoadError("it asks for the type of a value that may be of several")
    return [scope.call(tests[asked[0].kind()], data(inputs[0]))]


def _raise(node: Any, inputs: list[Any], scope: Scope) -> list[Any]:
    message = inputs[0].value if isinstance(inputs[0], Constant) else ""
    scope.lines.append(["raise", str(message)])
    return []


def _message(node: Any, inputs: list[Any], scope: Scope) -> list[Any]:
    if any(use.user.kind() not in _OF_MESSAGES for use in node.output().uses()):
        raise LoadError("it makes text that is used as a value")
    return [Constant(inputs[0].value if isinstance(inputs[0], Constant) else "")]


_HANDLERS: dict[str, Callable[[Any, list[Any], Scope], list[Any]]] = {
    "prim::Constant": _constant, "prim::Uninitialized": _nothing, "aten::_get_tracing_state": _nothing,
    "prim::ListConstruct": _list, "prim::TupleConstruct": _tuple, "prim::DictConstruct": _dict,
    "prim::ListUnpack": _unpacked, "prim::TupleUnpack": _unpacked, "prim::TupleIndex": _item,
    "aten::keys": _view, "aten::values": _view, "aten::items": _view, "aten::slice": _slice,
    "prim::NumToTensor": _number_as_tensor, "aten::rsub": _reverse_difference, "aten::div": _quotient,
    "aten::tensor": _new_tensor, "prim::isinstance": _type_test, "prim::RaiseException": _raise,
    "aten::format": _message,
}  # fmt: skip
