"""Edited forwards: from an fx graph to plain data, and from plain data to a class.

A generated class can't be pickled by its name, so a module's pickle holds its original class and the edited graph
as JSON text, and loading makes the class again. The text is data, never code: a graph may only call tensor
operations from the lists below, and methods of tensors without an underscore in front.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import linecache
import math
import operator
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from se_inject._tracer import Form, Untraceable
from se_inject.errors import LoadError, SurgeryError
from se_inject.tracing import OwnerGraph, Trace

_NAMESPACES: dict[str, Any] = {
    "torch": torch._C._VariableFunctions,
    "torch.nn.functional": F,
    "torch._C._nn": torch._C._nn,
    "torch.functional": torch.functional,
    "torch.linalg": torch.linalg,
    "torch.special": torch.special,
    "torch.fft": torch.fft,
    "operator": operator,
    "math": math,
}
_OWN_MODULES = {
    "torch.nn.functional": ("torch.nn.functional",),
    "torch.functional": ("torch.functional",),
}
_BUILTINS: dict[str, Callable[..., Any]] = {"getattr": getattr, "round": round, "assert": torch._assert}
_FORBIDDEN = frozenset(
    {"from_file", "save", "load", "call", "attrgetter", "itemgetter", "methodcaller", "handle_torch_function"}
)
_OPERATOR_NAMESPACES = frozenset({"aten", "prims", "torchvision"})
_FORBIDDEN_METHODS = frozenset(
    {
        "numpy", "storage", "untyped_storage", "typed_storage", "apply_", "map_", "map2_", "register_hook", "backward",
        "register_post_accumulate_grad_hook", "share_memory_", "module_load", "set_", "record_stream", "tolist",
        "data_ptr",
    }
)  # fmt: skip
_CONSTANTS = {
    "dtype": torch.dtype,
    "memory_format": torch.memory_format,
    "layout": torch.layout,
}


# -- functions ---------------------------------------------------------------------------------------------


def function_name(function: Any) -> str:
    """The name under which ``function_named`` finds a function.

    Raises:
        SurgeryError: it isn't one an edited forward may call.
    """
    for name, builtin in _BUILTINS.items():
        if builtin is function:
            return name
    if isinstance(function, torch._ops.OpOverloadPacket):
        return f"ops:{function._qualified_op_name.replace('::', '.')}"
    if isinstance(function, torch._ops.OpOverload):
        return f"ops:{function._schema.name.replace('::', '.')}.{function._overloadname}"
    short = getattr(function, "__name__", "")
    for space in _NAMESPACES:
        if _function_in(space, short) is function:
            return f"{space}:{short}"
    raise SurgeryError(f"its forward calls `{short or function}`, which is no tensor operation of torch")


def function_named(name: str) -> Callable[..., Any]:
    """The function with a name that ``function_name`` gave.

    Raises:
        LoadError: no function that an edited forward may call has it.
    """
    if name in _BUILTINS:
        return _BUILTINS[name]
    space, _, short = name.partition(":")
    found: Any = None
    parts = short.split(".")
    if space == "ops" and parts[0] in _OPERATOR_NAMESPACES and "__" not in short and not _FORBIDDEN & set(parts):
        found = torch.ops
        for part in parts:
            found = getattr(found, part, None)
        if not isinstance(found, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
            found = None
    elif space in _NAMESPACES:
        found = _function_in(space, short)
    if found is None:
        raise LoadError(f"a forward in this file calls `{name}`, which is no tensor operation of torch")
    return found  # type: ignore[no-any-return]


def _function_in(space: str, short: str) -> Any:
    if short in _FORBIDDEN or (short.startswith("_") and space != "torch.nn.functional"):
        return None
    found = getattr(_NAMESPACES[space], short, None)
    own = _OWN_MODULES.get(space)
    if inspect.isfunction(found):
        return found if own is None or found.__module__ in own else None
    return found if inspect.isbuiltin(found) and not short.startswith("_") else None


def method_named(name: Any) -> str:
    if not isinstance(name, str) or name.startswith("_") or name in _FORBIDDEN_METHODS:
        raise LoadError(f"a forward in this file calls the method `{name}`, which it must not")
    if not any(hasattr(kind, name) for kind in (torch._C.TensorBase, torch.Size, dict, list)):
        raise LoadError(f"a forward in this file calls the method `{name}`, which tensors don't have")
    return name


def checked_path(name: Any) -> str:
    """A dotted path: what fx writes into source text must not be able to end the text it stands in.

    Raises:
        LoadError: it is none.
    """
    parts = name.split(".") if isinstance(name, str) else [""]
    if any(not part.isprintable() or not part or part.startswith("__") or set(part) & set("\"'\\") for part in parts):
        raise LoadError(f"a forward in this file refers to `{name}`, which is no submodule")
    return name  # type: ignore[no-any-return]


def _parameter(name: Any) -> str:
    if not isinstance(name, str) or not name.lstrip("*").isidentifier():
        raise LoadError(f"a forward in this file has a parameter `{name}`, which is no name")
    return name


# -- graphs ------------------------------------------------------------------------------------------------


def graph_data(graph: fx.Graph) -> list[Any]:
    """A graph as plain data.

    Raises:
        SurgeryError: it holds something that can't be written down.
    """
    rows = []
    for node in graph.nodes:
        target = function_name(node.target) if node.op == "call_function" else str(node.target)
        rows.append([node.name, node.op, target, encoded(node.args), encoded(node.kwargs)])
    return rows


def graph_from(rows: Any) -> fx.Graph:
    """The graph again.

    Raises:
        LoadError: the data is not that of a graph, or calls what it must not.
    """
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    checked: dict[str, Callable[[Any], Any]] = {
        "call_function": function_named,
        "call_method": method_named,
        "call_module": checked_path,
        "get_attr": checked_path,
        "placeholder": _parameter,
        "output": _parameter,
    }
    try:
        for name, op, target, args, kwargs in rows:
            if op not in checked or not str(name).isidentifier():
                raise LoadError("a forward in this file is not a graph", seen=f"a node `{name}` of kind `{op}`")
            real = checked[op](target)
            arguments, keywords = decoded(args, nodes), decoded(kwargs, nodes)
            if real is getattr and not is_tensor_attribute(arguments[1:]):
                raise LoadError("a forward in this file reads an attribute that tensors don't have")
            if (op == "placeholder" and arguments) or not all(map(str.isidentifier, keywords)):
                raise LoadError("a forward in this file has arguments that are no names")
            nodes[name] = graph.create_node(op, real, arguments, keywords, name=name)
        graph.lint()
    except LoadError:
        raise
    except Exception as error:
        raise LoadError("a forward in this file is damaged", seen=f"{type(error).__name__}: {error}") from error
    return graph


def is_tensor_attribute(names: Any) -> bool:
    """One name, as text: a node's value would only be known when the forward runs."""
    if len(names) != 1 or type(names[0]) is not str:
        return False
    return not names[0].startswith("_") and hasattr(torch.Tensor, names[0])


def encoded(value: Any) -> Any:
    """A graph's argument as plain data; nodes by name.

    Raises:
        SurgeryError: it can't be written down.
    """
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, Form):
        return {"form": encoded(value.form)}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if value is ...:
        return {"ellipsis": True}
    if isinstance(value, slice):
        return {"slice": [encoded(part) for part in (value.start, value.stop, value.step)]}
    if isinstance(value, dict):
        return {"dict": [[encoded(key), encoded(item)] for key, item in value.items()]}
    if type(value) is tuple or isinstance(value, torch.Size):
        return {"tuple": [encoded(item) for item in value]}
    if isinstance(value, list):
        return [encoded(item) for item in value]
    for name, kind in _CONSTANTS.items():
        if isinstance(value, kind):
            return {name: str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    raise SurgeryError(f"its forward holds a {type(value).__name__} as a constant, which can't be written down")


def decoded(value: Any, nodes: dict[str, fx.Node]) -> Any:
    if isinstance(value, list):
        return [decoded(item, nodes) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "node":
        return nodes[content]
    if kind == "tuple":
        return tuple(decoded(item, nodes) for item in content)
    if kind == "dict":
        return {decoded(key, nodes): decoded(item, nodes) for key, item in content}
    if kind == "slice":
        return slice(*(decoded(item, nodes) for item in content))
    if kind == "ellipsis":
        return ...
    if kind == "float":
        return float(content)
    if kind == "device":
        return torch.device(content)
    constant = getattr(torch, content)
    if not isinstance(constant, _CONSTANTS[kind]):
        raise LoadError(f"a forward in this file holds `{content}` as a {kind}")
    return constant


def check_editable(trace: Trace, owner: OwnerGraph) -> None:
    """Whether an owner's forward can be written down, for eval and, if it looks at its mode, for training.

    Raises:
        SurgeryError: it can't.
    """
    try:
        graph_from(graph_data(owner.graph))
        for value in (*owner.constants.values(), *owner.settings.values()):
            encoded(value)
        if owner.reads_training:
            graph_from(graph_data(trace.training_graph(owner)[0]))
    except Untraceable as error:
        raise SurgeryError(str(error)) from error
    except LoadError as error:
        raise SurgeryError(f"{error.message.replace('a forward in this file', 'its forward')}") from error


# -- classes -----------------------------------------------------------------------------------------------


def original_class(module: nn.Module) -> Any:
    """The class the author wrote: a generated one knows the class it was made from."""
    return getattr(type(module), "_se_inject_original", type(module))


@functools.cache
def generated_class(original: Any, body: str) -> type:
    """The subclass of ``original`` whose forward is this body; one for each pair, shared by equal owners.

    Args:
        original: the class the author wrote.
        body: JSON text of ``{"steps", "output", "eval", "train", "constants", "settings", "was_none"}``.
    """
    data = json.loads(body)
    name = f"Injected{original.__name__}"
    source, scope = _source(original, data)
    filename = f"<se_inject {original.__module__}.{original.__qualname__} {abs(hash(body)):x}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)
    scope["__name__"] = "se_inject.generated"
    exec(compile(source, filename, "exec"), scope)
    forward = scope["forward"]
    forward.__qualname__ = f"{name}.forward"
    forward.__doc__ = original.forward.__doc__
    forward.__annotations__ = _annotations(original)

    def __reduce_ex__(self: nn.Module, protocol: Any) -> Any:
        getstate = getattr(self, "__getstate__", None)
        return rebuild, (original, body), getstate() if getstate else self.__dict__

    attributes = {
        "__module__": original.__module__,
        "__qualname__": name,
        "__doc__": original.__doc__,
        "forward": forward,
        "__reduce_ex__": __reduce_ex__,
        "_se_inject_original": original,
        "_se_inject_body": body,
    }
    if data["output"]:
        attributes["_ungated_forward"] = _renamed(original.forward, "_ungated_forward")  # type: ignore[attr-defined]
    with _unannounced(original):
        return type(original)(name, (original,), attributes)  # type: ignore[no-any-return, call-overload]


@contextlib.contextmanager
def _unannounced(original: Any) -> Iterator[None]:
    """Make a subclass without telling the author's ``__init_subclass__``: it is no class of theirs to be registered."""
    own = original.__dict__.get("__init_subclass__")
    if own is None and original.__init_subclass__ == nn.Module.__init_subclass__:
        yield
        return
    original.__init_subclass__ = classmethod(lambda cls, **_: None)
    try:
        yield
    finally:
        if own is None:
            del original.__init_subclass__
        else:
            original.__init_subclass__ = own


def _annotations(original: Any) -> dict[str, Any]:
    """The forward's annotations, evaluated: TorchScript can't look up names in another module."""
    try:
        return typing.get_type_hints(original.forward)
    except Exception:  # a name that exists for type checkers only
        return {}


def _renamed(function: Any, name: str) -> Any:
    """The same function under another name: TorchScript compiles a method under the name its function has."""
    if not inspect.isfunction(function):
        return function
    twin = types.FunctionType(
        function.__code__, function.__globals__, name, function.__defaults__, function.__closure__
    )
    twin.__kwdefaults__ = function.__kwdefaults__
    twin.__annotations__ = dict(function.__annotations__)
    return twin


def rebuild(original: type, body: str) -> nn.Module:
    """What a pickle calls: an empty module of the generated class.

    Raises:
        LoadError: the arguments are not what this package writes.
    """
    if not (isinstance(original, type) and issubclass(original, nn.Module) and isinstance(body, str)):
        raise LoadError("a damaged file: an edited forward without its class")
    try:
        data = json.loads(body)
        well_formed = set(data) == {"steps", "output", "eval", "train", "constants", "settings", "was_none"}
        well_formed &= all(str(step["block_name"]).isidentifier() for step in data["steps"])
        well_formed &= all(str(key).isidentifier() for key in (*data["constants"], *data["settings"]))
    except (ValueError, TypeError, KeyError) as error:
        raise LoadError("a damaged file: an edited forward that is no JSON", seen=str(error)) from error
    if not well_formed:
        raise LoadError("a damaged file: an edited forward of an unknown form")
    kind: Any = original
    generated: Any = generated_class(kind, body)
    return generated.__new__(generated)  # type: ignore[no-any-return]


def check_targets(module: nn.Module) -> None:
    """Look whether an edited forward calls submodules, and reads values, and nothing else of the module's.

    Args:
        module: one whose class is generated, with its state.

    Raises:
        LoadError: it calls or reads something else.
    """
    data = json.loads(type(module)._se_inject_body)  # type: ignore[attr-defined]
    calls = [step["block_name"] for step in data["steps"]] if data["output"] else []
    rows = [*(data["eval"] or []), *(data["train"] or [])]
    calls += [target for _, op, target, *_ in rows if op == "call_module"]
    reads = [target for _, op, target, *_ in rows if op == "get_attr"]
    for path in calls:
        if not isinstance(value_at(module, path), nn.Module):
            raise LoadError(f"a forward in this file calls `{path}`, which is no submodule")
    for path in reads:
        value = value_at(module, path)
        if callable(value) and not isinstance(value, nn.Module):
            raise LoadError(f"a forward in this file reads `{path}`, which is no value")


def value_at(module: Any, path: str) -> Any:
    """What a path leads to through submodules; a function, which nobody may read, if it leads elsewhere."""
    *through, last = path.split(".")
    for part in through:
        module = vars(module)["_modules"].get(part)
        if not isinstance(module, nn.Module):
            return value_at
    state = vars(module)
    tables = (state["_modules"], state["_parameters"], state["_buffers"], state)
    return next((table[last] for table in tables if last in table), value_at)


def _source(original: type, data: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The text of the edited forward, and the names it uses."""
    signature = inspect.signature(original.forward)  # type: ignore[attr-defined]
    scope: dict[str, Any] = {"torch": torch}
    if data["output"]:
        names = []
        myself = next(iter(signature.parameters))
        for parameter in list(signature.parameters.values())[1:]:
            star = "*" * (parameter.kind is parameter.VAR_POSITIONAL) + "**" * (parameter.kind is parameter.VAR_KEYWORD)
            keyword = f"{parameter.name}=" if parameter.kind is parameter.KEYWORD_ONLY else ""
            names.append(f"{keyword}{star}{parameter.name}")
        lines = [f"    gated = {myself}._ungated_forward({', '.join(names)})"]
        lines += [f"    gated = {myself}.{step['block_name']}(gated)" for step in data["steps"]]
        lines.append("    return gated")
    else:
        lines = []
        myself = next(iter(signature.parameters))
        values = {**data["constants"], **{f"{myself}.{name}": value for name, value in data["settings"].items()}}
        for name, value in values.items():
            if isinstance(value, dict) and "form" in value:
                form = decoded(value["form"], {})
                constant = repr(form)
                test = f"len({name}) != {form}" if isinstance(form, int) else f"tuple({name}) != {form!r}"
            else:
                constant = repr(decoded(value, {}))
                test = f"{name} is not None" if constant == "None" else f"{name} != {constant}"
            message = f"{original.__name__} was edited for {name} = {constant}: eject the blocks and inject again"
            lines += [f"    if {test}:", f"        raise RuntimeError({message!r})"]
        body = _lines(data["eval"], scope, myself)
        if data["train"] is None:
            lines += body
        else:
            lines += [f"    if {myself}.training:", *("    " + line for line in _lines(data["train"], scope, myself))]
            lines += ["    else:", *("    " + line for line in body)]
    return f"def forward({_head(signature, scope)}):\n" + "\n".join(lines) + "\n", scope


def _head(signature: inspect.Signature, scope: dict[str, Any]) -> str:
    """The original's parameters, with their defaults by reference."""
    parts = []
    starred = False
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            starred = True
            parts.append(f"*{parameter.name}")
            continue
        if parameter.kind is parameter.VAR_KEYWORD:
            parts.append(f"**{parameter.name}")
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            starred = True
            parts.append("*")
        text = parameter.name
        if parameter.default is not parameter.empty:
            scope[f"_default_{parameter.name}"] = parameter.default
            text += f"=_default_{parameter.name}"
        parts.append(text)
    return ", ".join(parts)


def _lines(rows: Any, scope: dict[str, Any], myself: str) -> list[str]:
    """The statements that compute a graph; the globals they need go into ``scope``."""
    code = graph_from(rows).python_code(myself)
    scope.update(code.globals)
    lines = code.src.splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("def forward("))
    return [line.rstrip() for line in lines[start + 1 :] if line.strip()]
