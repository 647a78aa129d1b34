"""Make a subclass of an author's class whose forward is made from lines.

A generated class can't be pickled by its name, so a module's pickle holds its original class and the edited forward
as JSON text, and loading makes the class again. The text is data, never code: ``writer`` checks what it says.
"""

from __future__ import annotations

import inspect
import json
import types
import typing
from typing import Any

from torch import nn

from se_inject.errors import LoadError
from se_inject.forwards import graph_modules
from se_inject.forwards.classes import addressed, made, reduction, shared, source_name
from se_inject.forwards.lasting import UNGATED, lasting
from se_inject.forwards.lines import is_at_output
from se_inject.forwards.marks import BODY, ORIGINAL
from se_inject.forwards.own_methods import bodies_in, is_method_name
from se_inject.forwards.steps import check_steps
from se_inject.forwards.vocabulary import LONGEST
from se_inject.forwards.writer import Writer

KEYS = {"steps", "was_none", "lines"}
"""The data of an edited forward: the steps that edited it, attributes that were None before, and the lines.

Without lines the forward is the author's. ``methods``, if there, holds the lines of public methods that the forward calls and that hold blocks, by name.
That of a fused owner has ``fused`` besides: the data ``before``, and in words what each of its ``tails`` took over.
"""


def generated_class(original: Any, body: str) -> Any:
    """Return the subclass of a class whose forward is this body; one for each pair, shared by equal owners.

    Args:
        original: the class the author wrote.
        body: JSON text of a dict with ``KEYS``.

    Raises:
        LoadError: the lines do not fit the class, or name what they must not.
    """
    return shared(("edited", original, body), lambda: _generated(original, body))


def check_lines(original: Any, lines: list[Any], name: str = "forward") -> None:
    """Check that an edited forward, or another method, can be written, without making a class.

    Raises:
        LoadError: it can't.
    """
    _writer(original, name, {}).text(lines)


def _writer(original: Any, name: str, data: dict[str, Any]) -> Writer:
    """Return what writes the forward or a method of a class."""
    label = original.__name__ if name == "forward" else f"{original.__name__}.{name}"
    signature = inspect.signature(getattr(original, name))
    return Writer(signature, label, guarded=False, name=name, methods=data.get("methods", ()))


def _function(original: Any, name: str, data: dict[str, Any], body: str) -> Any:
    """Make the forward or a method of a generated class."""
    label = f"{original.__module__}.{original.__qualname__}" + f".{name}" * (name != "forward")
    function: Any = _writer(original, name, data).function(bodies_in(data)[name], source_name(label, body))
    author = getattr(original, name)
    function.__doc__ = author.__doc__
    function.__annotations__ = _annotations(author)
    return function


def _generated(original: Any, body: str) -> type:
    data = json.loads(body)
    forward = _function(original, "forward", data, body) if data["lines"] else None
    methods = [_function(original, name, data, body) for name in data.get("methods", ())]
    at_output = is_at_output(data["lines"])
    attributes = {
        **lasting(
            original, forward, [step["block_name"] for step in data["steps"]], at_output=at_output, methods=methods
        ),
        "__module__": original.__module__,
        "__doc__": original.__doc__,
        "__reduce_ex__": reduction(edited, original, body),
        ORIGINAL: original,
        BODY: body,
        **graph_modules.methods(original, body, [step["block_name"] for step in data["steps"]], edited_graph),
    }
    if at_output:
        attributes[UNGATED] = _renamed(original.forward, UNGATED)
    return made(original, f"Injected{original.__name__}", forward, attributes, methods)  # type: ignore[no-any-return]


def _annotations(author: Any) -> dict[str, Any]:
    """Return a method's annotations, evaluated: TorchScript can't look up names in another module."""
    try:
        return typing.get_type_hints(author)
    except Exception:  # a name that exists for type checkers only
        return {}


def _renamed(function: Any, name: str) -> Any:
    """Return the same function under another name: TorchScript compiles a method under the name its function has."""
    if not inspect.isfunction(function):
        return function
    twin = types.FunctionType(
        function.__code__, function.__globals__, name, function.__defaults__, function.__closure__
    )
    twin.__kwdefaults__ = function.__kwdefaults__
    twin.__annotations__ = dict(function.__annotations__)
    return twin


@addressed("edited")
def edited(original: type, body: str) -> nn.Module:
    """Make an empty module of the generated class; a pickle calls this.

    Raises:
        LoadError: the arguments are not what this package writes.
    """
    kind = checked_class(original, body)
    return kind.__new__(kind)  # type: ignore[no-any-return]


def checked_class(original: Any, body: Any) -> Any:
    """Return the generated class for the data in a file.

    Raises:
        LoadError: it is not what this package writes.
    """
    if not (isinstance(original, type) and issubclass(original, nn.Module) and isinstance(body, str)):
        raise LoadError("a damaged file: an edited forward without its class")
    if len(body) > LONGEST:
        raise LoadError("an edited forward is too long", seen=f"{len(body):,} characters")
    try:
        data = json.loads(body)
        well_formed = _has_form(data) and all(is_method_name(original, name) for name in data.get("methods", ()))
    except LoadError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise LoadError("a damaged file: an edited forward that is not JSON", seen=str(error)) from error
    if not well_formed:
        raise LoadError("a damaged file: an edited forward of an unknown form")
    try:
        return generated_class(original, body)
    except LoadError:
        raise
    except Exception as error:
        raise LoadError("a forward in this file is damaged", seen=f"{type(error).__name__}: {error}") from error


def _has_form(data: dict[str, Any]) -> bool:
    """Return whether this is the data of an edited forward, fused or not.

    Raises:
        LoadError: its steps are none.
    """
    well_formed = set(data) - {"fused", "methods"} == KEYS and isinstance(data["lines"], list)
    if not well_formed or not isinstance(data["was_none"], dict):
        return False
    if not isinstance(data.get("methods", {}), dict):
        return False
    check_steps(data)
    return "fused" not in data or _is_fused(data["fused"])


def _is_fused(data: Any) -> bool:
    tails = data["tails"].values()
    return (
        set(data) == {"before", "tails"}
        and isinstance(data["before"], dict)
        and (not data["before"] or _has_form(data["before"]))  # a copy for inference can't be unfused
        and all(isinstance(words, str) for words in tails)
    )


@addressed("edited_graph")
def edited_graph(plain: nn.Module, body: str, blocks: dict[str, nn.Module], training: bool) -> nn.Module:
    """Put the blocks and the class of an edited graph module back; a pickle calls this.

    Raises:
        LoadError: the arguments are not what this package writes.
    """
    plain._modules.update(blocks)
    plain.__class__ = checked_class(type(plain), body)
    plain.training = training
    return plain
