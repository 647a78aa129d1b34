"""Edited forwards: from an fx graph to plain data, and from plain data to a class.

A generated class can't be pickled by its name, so a module's pickle holds its original class and the edited graph
as JSON text, and loading makes the class again. The text is data, never code: a graph may only call tensor
operations, and say what ``_vocabulary`` knows.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import operator
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx, nn

from se_inject.errors import LoadError
from se_inject.forwards.source import compiled
from se_inject.forwards.vocabulary import (
    LONGEST,
    checked_keywords,
    checked_path,
    decoded,
    encoded,
    function_name,
    function_named,
    is_plain_name,
    is_tensor_attribute,
    method_named,
    parameter_named,
    set_item,
    value_at,
)

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
        "placeholder": parameter_named,
        "output": parameter_named,
    }
    try:
        for name, op, target, args, kwargs in rows:
            if op not in checked or not is_plain_name(name):
                raise LoadError("a forward in this file is not a graph", seen=f"a node `{name}` of kind `{op}`")
            real = checked[op](target)
            arguments, keywords = decoded(args, nodes), decoded(kwargs, nodes)
            if real is getattr and not is_tensor_attribute(arguments[1:]):
                raise LoadError("a forward in this file reads an attribute that tensors don't have")
            checked_keywords(keywords, real if op == "call_method" else None)
            if op == "placeholder" and arguments:
                raise LoadError("a forward in this file has arguments that are no names")
            nodes[name] = graph.create_node(op, real, arguments, keywords, name=name)
        graph.lint()
    except LoadError:
        raise
    except Exception as error:
        raise LoadError("a forward in this file is damaged", seen=f"{type(error).__name__}: {error}") from error
    return graph


# -- classes -----------------------------------------------------------------------------------------------


def original_class(module: nn.Module) -> Any:
    """The class the author wrote: a generated one knows the class it was made from."""
    return getattr(type(module), "_se_inject_original", type(module))


@functools.cache
def generated_class(original: Any, body: str) -> type:
    """The subclass of ``original`` whose forward is this body; one for each pair, shared by equal owners.

    Args:
        original: the class the author wrote.
        body: JSON text of ``{"steps", "output", "eval", "train", "constants", "settings", "was_none"}``, and
            of a fused owner ``"fused"``: the body ``before``, and in words what each of its ``tails`` took over.
    """
    data = json.loads(body)
    name = f"Injected{original.__name__}"
    source, scope = _source(original, data)
    filename = f"<se_inject {original.__module__}.{original.__qualname__} {abs(hash(body)):x}>"
    scope["__name__"] = "se_inject.generated"
    forward: Any = compiled(source, filename, scope)
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
    if len(body) > LONGEST:
        raise LoadError("an edited forward of absurd length", seen=f"{len(body):,} letters")
    try:
        data = json.loads(body)
        well_formed = set(data) - {"fused"} == {"steps", "output", "eval", "train", "constants", "settings", "was_none"}
        well_formed &= "fused" not in data or (
            set(data["fused"]) == {"before", "tails"} and isinstance(data["fused"]["before"], dict)
            and all(isinstance(words, str) for words in data["fused"]["tails"].values())
        )  # fmt: skip
        names = [step["block_name"] for step in data["steps"]]
        well_formed &= all(map(is_plain_name, (*names, *data["constants"], *data["settings"])))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
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
        if not isinstance(value_at(module, path), torch.Tensor | None):
            raise LoadError(f"a forward in this file reads `{path}`, which is no value")


def _source(original: type, data: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The text of the edited forward, and the names it uses."""
    signature = inspect.signature(original.forward)  # type: ignore[attr-defined]
    scope: dict[str, Any] = {"torch": torch}
    inputs = [target for _, op, target, *_ in (*(data["eval"] or []), *(data["train"] or [])) if op == "placeholder"]
    others = [*data["constants"], *(target.lstrip("*") for target in inputs)]
    if not set(others) <= set(list(signature.parameters)[1:]):
        raise LoadError(f"a forward in this file has inputs that a {original.__name__} does not have")
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
    graph = graph_from(rows)
    for node in graph.nodes:
        if node.target is operator.setitem:
            node.target = set_item
    code = graph.python_code(myself)
    scope.update(code.globals)
    lines = code.src.splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("def forward("))
    return [line.rstrip() for line in lines[start + 1 :] if line.strip()]
