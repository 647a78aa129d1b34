"""Write the lines of a stored forward as Python: the one place that checks every name in them.

Functions of torch and of ``math`` are written as one would write them, operators as operators, so that TorchScript,
``torch.compile`` and a reader find what they know. Values are freed after their last use, as in an author's code where
one name is used again and again.
"""

from __future__ import annotations

import inspect
import keyword
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from se_inject.errors import LoadError, quoted
from se_inject.forwards.constants import checked_key, decoded
from se_inject.forwards.lines import last_uses, names_in
from se_inject.forwards.python import IN_PLACE, INFIX, PREFIX, function_called, is_name
from se_inject.forwards.signatures import head_of, passed_on
from se_inject.forwards.source import compiled
from se_inject.forwards.vocabulary import (
    checked_keywords,
    checked_path,
    is_plain_name,
    is_tensor_attribute,
    method_named,
    plain,
    set_item,
)

MOST_LINES = 60_000
_DEEPEST = 90
_SAYABLE = {"torch": torch, "math": math}


class Writer:
    """Write one forward.

    Args:
        signature: of the forward that an author wrote, with the module first; or the inputs of a program, each
            ``[name]`` or ``[name, default]``.
        label: the class in messages of what the forward expects.
        guarded: whether what a submodule returns is checked to be a value, no module or function.
        name: of the function.
        methods: of the module itself, which the lines may call.

    Raises:
        LoadError: an input has no name.
    """

    def __init__(
        self,
        signature: inspect.Signature | list[Any],
        label: str,
        *,
        guarded: bool,
        name: str = "forward",
        methods: Iterable[str] = (),
    ) -> None:
        self.scope: dict[str, Any] = {"__name__": "se_inject.generated", "torch": torch}
        self._label = label
        self._guarded = guarded
        self._name = name
        self._methods = frozenset(methods)
        self._edits = isinstance(signature, inspect.Signature)
        self._set: set[str] = set()
        self._read: set[str] = set()
        self._constants: dict[int, str] = {}
        self._count = self._depth = 0
        if isinstance(signature, inspect.Signature):
            self._myself, *self._inputs = signature.parameters
            self._passed = passed_on(signature)
            self._head, defaults = head_of(signature)
            self.scope.update(defaults)
        else:
            self._myself, self._passed, self._inputs = "self", "", []
            parts = [f"{_checked(name)}{''.join(f'={self._value(v)}' for v in rest[:1])}" for name, *rest in signature]
            if self._read:  # a default is computed where the forward's own names aren't there, and Python's are
                raise LoadError("an input of a program has a default that is no constant", seen=quoted(min(self._read)))
            self._inputs = [name for name, *_ in signature]
            self._head = ", ".join(["self", *parts])

    def function(self, lines: list[Any], filename: str) -> Callable[..., Any]:
        """Return the forward of these lines, its text known to ``inspect`` and tracebacks under this filename.

        Raises:
            LoadError: a line is none, or names what it must not.
        """
        return compiled(self.text(lines), filename, self.scope)

    def text(self, lines: list[Any]) -> str:
        """Return the forward of these lines as text; the names that it uses are in ``scope`` afterwards.

        Raises:
            LoadError: a line is none, or names what it must not.
        """
        body = self._block(lines, "    ", set(), own=True)
        if free := sorted(self._read - self._set - set(self._inputs)):
            raise LoadError(f"a forward in this file reads `{free[0]}`, which nothing sets")
        return f"def {self._name}({self._head}):\n" + "\n".join(body) + "\n"

    # -- lines ---------------------------------------------------------------------------------------------

    def _builtin(self, name: str) -> str:
        """Return the text for a builtin, which a parameter may have the name of."""
        return self._constant(__builtins__[name]) if name in self._inputs else name  # type: ignore[index]

    def _block(self, lines: list[Any], indent: str, outside: set[str], *, own: bool = False) -> list[str]:
        """Return these lines, indented; if they are all that is left to do, values are freed after their last use."""
        self._depth += 1
        if self._depth > _DEEPEST:
            raise LoadError("a forward in this file has lines within lines without end")
        if not isinstance(lines, list) or not all(isinstance(line, list) and line for line in lines):
            raise LoadError("a forward in this file has a line that is none")
        ends = own or (bool(lines) and lines[-1][0] == "return")
        last = last_uses(lines) if ends else {}
        known = set(self._inputs) if own else set()
        result = []
        for index, line in enumerate(lines):
            texts = self._line(line[0], line[1:], outside | known)
            if ends and line[0] not in ("if", "loop", "return", "raise", "expect"):
                known.update(line[1])
                freed = [name for name in sorted(known - outside) if last.get(name, index) <= index]
                known -= set(freed)
                if freed:
                    texts[-1] += "; " + " = ".join(freed) + " = None"
            result += [indent + text for text in texts]
        self._depth -= 1
        return result or [f"{indent}pass"]

    def _line(self, kind: Any, parts: list[Any], outside: set[str]) -> list[str]:
        self._count += 1
        if self._count > MOST_LINES:
            raise LoadError(f"a program of more than {MOST_LINES:,} lines")
        if kind == "if":
            condition, then, otherwise = parts
            found = [f"if {self._value(condition)}:", *self._block(then, "    ", outside)]
            return [*found, "else:", *self._block(otherwise, "    ", outside)] if otherwise else found
        if kind == "loop":
            index, count, condition, body = parts
            head = f"for {self._target(index)} in {self._builtin('range')}({self._value(count)}):"
            stop = [f"    if not {self._reading(condition)}:", "        break"]
            return [head, *stop, *self._block(body, "    ", outside)]
        if kind == "raise":
            return [f"raise {self._builtin('RuntimeError')}({str(parts[0])!r})"]
        if kind == "return":
            return [f"return {self._value(parts[0])}"]
        if kind == "expect":
            return self._expected(*parts)
        names, *rest = parts
        if kind == "set" and len(names) == 1 and rest[0].startswith("operator:i") and not rest[2]:
            in_place = self._in_place(names[0], rest[0].removeprefix("operator:"), rest[1])
            if in_place:
                return in_place
        target = ", ".join(map(self._target, names)) + ("," if len(names) > 1 else "")
        return [(f"{target} = " if names else "") + self._computed(kind, rest)]

    def _in_place(self, name: str, operator: str, args: list[Any]) -> list[str]:
        """Return an operator in place as two statements: the value it changes goes under the result's name first."""
        if operator not in IN_PLACE or len(args) != 2 or name in names_in(args):
            return []
        value, other = (self._value(arg) for arg in args)
        return [f"{self._target(name)} = {value}", f"{name} {IN_PLACE[operator]} {other}"]

    def _expected(self, what: str, name: str, value: Any) -> list[str]:
        """Return the check of an argument or plain attribute that the forward was written for."""
        if what == "argument":
            subject = self._reading(name)
        elif what == "setting" and _is_path_of_names(name):
            subject = f"{self._myself}.{name}"
        else:
            raise LoadError("a forward in this file expects something of what has no name", seen=quoted(name))
        if isinstance(value, dict) and "form" in value:
            constant = repr(decoded(value["form"], {}))
            call = self._builtin("len" if isinstance(value["form"], int) else "tuple")
            subject = f"{call}({subject})"
            test = f"{subject} != {self._value(value['form'])}"
        else:
            constant = repr(decoded(value, {}))
            test = f"{subject} is not None" if value is None else f"{subject} != {self._value(value)}"
        message = f"{self._label} was edited for {subject} = {constant}{self._advice(what, name)}"
        return [f"if {test}:", f"    raise {self._builtin('RuntimeError')}({message!r})"]

    def _advice(self, what: str, name: str) -> str:
        """Return what to do where a call is not as the one that the forward was written for."""
        if what == "setting":
            return ": set it back, or `si.eject_` the network and `si.inject` it again"
        if self._name == "forward":
            return f": for another `{name}`, `si.eject_` the network and `si.inject` it with that in its example inputs"
        return (
            f", as the network's forward calls it, and its blocks act for that alone: for another `{name}`, `si.eject_` the network "
            "and `si.inject` a module whose forward calls this method so"
        )

    # -- values --------------------------------------------------------------------------------------------

    def _computed(self, kind: Any, parts: list[Any]) -> str:
        if kind == "let":
            return self._value(parts[0])
        if kind == "read":
            return self._path(parts[0])
        if kind == "original" and self._edits:
            return f"{self._myself}._ungated_forward({self._passed})"
        if kind == "attribute":
            value, name = parts
            if not is_tensor_attribute([name]):
                raise LoadError(f"a forward in this file reads the attribute `{name}`, which tensors don't have")
            return f"{self._operand(value)}.{name}"
        name, args, kwargs = parts
        checked_keywords(kwargs, kind, name)
        arguments = [self._value(argument) for argument in args]
        arguments += [f"{key}={self._value(value)}" for key, value in kwargs.items()]
        if kind == "set":
            return self._called(name, args, kwargs) or f"{self._function(name)}({', '.join(arguments)})"
        if kind == "method":
            return f"{self._operand(args[0])}.{method_named(name)}({', '.join(arguments[1:])})"
        if kind == "own" and self._is_method(name):
            return f"{self._path(name)}({', '.join(arguments)})"
        if kind == "call":
            text = f"{self._path(name)}({', '.join(arguments)})"
            return f"{self._constant(plain)}({text})" if self._guarded else text
        raise LoadError(f"a forward in this file has a line of kind `{kind}`")

    def _is_method(self, path: Any) -> bool:
        """Return whether this is a method of the module that is lines too, or leads to a public method of a submodule."""
        if not isinstance(path, str) or "." not in path:
            return path in self._methods
        name = path.rpartition(".")[2]
        return is_plain_name(name) and not name.startswith("_") and not hasattr(torch.nn.Module, name)

    def _called(self, name: str, args: list[Any], kwargs: Mapping[str, Any]) -> str:
        """Return the text of an operator of Python; empty if it is to be called as a function."""
        space, _, short = name.partition(":")
        if space != "operator" or kwargs:
            return ""
        if short in INFIX and len(args) == 2:
            return f"{self._operand(args[0])} {INFIX[short]} {self._operand(args[1])}"
        if short in PREFIX and len(args) == 1:
            return f"{PREFIX[short]}{self._operand(args[0])}"
        if short == "getitem" and len(args) == 2:
            return f"{self._operand(args[0])}[{self._index(args[1])}]"
        return ""

    def _function(self, name: str) -> str:
        """Return the text for a function: as one writes it if that is the very same, else a name in the scope."""
        function = function_called(name)
        if function is getattr:
            raise LoadError("a forward in this file calls `getattr`, which is a line of its own")
        if name == "operator:setitem":
            return self._constant(set_item)
        space, _, short = name.partition(":")
        said = {"assert": "torch._assert", "ops": f"torch.ops.{short}"}.get(space, f"{space}.{short}")
        first, *rest = said.split(".")
        found: Any = None if first in self._inputs else _SAYABLE.get(first)
        for part in rest:
            found = getattr(found, part, None)
        if found is not function:
            return self._constant(function)
        self.scope[first] = _SAYABLE[first]
        return said

    def _index(self, value: Any) -> str:
        """Return what stands in the brackets of an index."""
        if isinstance(value, dict) and value.get("tuple"):
            return ", ".join(map(self._sliced, value["tuple"])) + ("," if len(value["tuple"]) == 1 else "")
        return self._sliced(value)

    def _sliced(self, value: Any) -> str:
        if isinstance(value, dict) and "slice" in value:
            start, stop, step = ("" if part is None else self._operand(part) for part in value["slice"])
            return f"{start}:{stop}:{step}" if step else f"{start}:{stop}"
        return self._value(value)

    def _operand(self, value: Any) -> str:
        """Return a value as it stands beside an operator or a dot."""
        text = self._value(value)
        return text if text.isidentifier() or text[0] in "([{" else f"({text})"

    def _value(self, value: Any) -> str:
        if value is None or isinstance(value, bool | int | str):
            return repr(value)
        if isinstance(value, float) and math.isfinite(value):
            return repr(value)
        if isinstance(value, list):
            return f"[{', '.join(map(self._value, value))}]"
        if not isinstance(value, dict) or len(value) != 1:
            raise LoadError("a forward in this file holds a value of an unknown form", seen=quoted(value))
        ((kind, content),) = value.items()
        if kind == "node":
            return self._reading(content)
        if kind == "training":
            return f"{self._myself}.training"
        if kind == "tuple":
            return f"({''.join(f'{self._value(item)}, ' for item in content)})"
        if kind == "dict":
            return f"{{{', '.join(f'{self._value(checked_key(key))}: {self._value(item)}' for key, item in content)}}}"
        if kind == "slice":
            return f"{self._builtin('slice')}({', '.join(map(self._value, content))})"
        if kind == "ellipsis":
            return "..."
        constant = decoded(value, {})
        if isinstance(constant, torch.dtype | torch.memory_format | torch.layout) and "torch" not in self._inputs:
            return str(constant)
        if isinstance(constant, torch.device) and "torch" not in self._inputs:
            return f"torch.device({str(constant)!r})"
        if isinstance(constant, float):
            return f"{self._builtin('float')}({str(constant)!r})"
        return self._constant(constant)

    def _constant(self, value: Any) -> str:
        """Return a name for a value in the scope."""
        name = self._constants.get(id(value))
        if name is None:
            label = getattr(value, "__name__", "")
            name = self._constants[id(value)] = f"_{len(self.scope)}_{label if label.isidentifier() else 'constant'}"
            self.scope[name] = value
        return name

    # -- names ---------------------------------------------------------------------------------------------

    def _target(self, name: Any) -> str:
        self._set.add(_checked(name))
        if self._edits and name in (self._myself, *self._inputs):
            raise LoadError(f"a forward in this file sets its own parameter `{name}`")
        return str(name)

    def _reading(self, name: Any) -> str:
        if name not in self._inputs:
            self._read.add(_checked(name))
        return str(name)

    def _path(self, path: Any) -> str:
        """Return a path as an expression."""
        text = self._myself
        for part in checked_path(path).split("."):
            known = part.isascii() and part.isidentifier() and not keyword.iskeyword(part)
            text = f"{text}.{part}" if known else f"{self._builtin('getattr')}({text}, {part!r})"
        return text


def _checked(name: Any) -> str:
    if not is_name(name):
        raise LoadError("a forward in this file uses a name that is none", seen=quoted(name))
    return str(name)


def _is_path_of_names(path: Any) -> bool:
    """Return whether a text is a dotted path of plain names, none of them with two underscores in front."""
    names = path.split(".") if isinstance(path, str) else [""]
    return len(names) <= 2 and all(is_plain_name(name) and not name.startswith("__") for name in names)
