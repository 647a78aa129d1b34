"""Modules whose forward is data: what a file brings as a program, as an ordinary network of ours.

A program is JSON text: ``{"class", "home", "inputs", "lines", "example"}``. Each line sets names, with values written as
in ``_vocabulary.encoded``:

* ``["set", names, function, args, kwargs]``: a tensor operation, or an operator or builtin of Python;
* ``["method", names, method, args, kwargs]``: of a tensor or list;
* ``["call", names, path, args, kwargs]``: of a submodule;
* ``["read", names, path]``: a parameter, a buffer, or the mode;
* ``["attribute", names, value, name]``: of a tensor;
* ``["let", names, value]``, ``["raise", text]``, ``["return", value]``;
* ``["if", condition, lines, lines]``, ``["loop", index, count, condition, lines]``.

From it a class is made with that forward. It is pickled as its text, and read as data: every name in it is looked up
in ``_vocabulary``, so that it can't call anything else.
"""

from __future__ import annotations

import copyreg
import functools
import json
import keyword
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from se_inject.errors import LoadError
from se_inject.forwards.edited import original_class
from se_inject.forwards.source import compiled
from se_inject.forwards.vocabulary import (
    LONGEST,
    checked_key,
    checked_keywords,
    checked_path,
    decoded,
    function_named,
    method_named,
    plain,
    value_at,
)

_PYTHON: dict[str, Callable[..., Any]] = {
    "python:len": len,
    "python:int": int,
    "python:float": float,
    "python:bool": bool,
    "python:list": list,
    "python:max": max,
    "python:min": min,
    "python:abs": abs,
    "python:sum": sum,
    "python:str": str,
    "python:is_tensor": torch.is_tensor,
    "python:is_list": lambda value: isinstance(value, list),
    "python:append": list.append,
    "python:extend": list.extend,
    "python:insert": list.insert,
    "python:reverse": list.reverse,
    "python:pop": list.pop,
    "python:dict": dict,
    "python:range_length": lambda start, stop, step: len(range(start, stop, step)),
    "python:derive_index": lambda turn, start, step: start + turn * step,
}
ATTRIBUTES = ("dtype", "device", "shape", "layout", "requires_grad", "is_cuda", "ndim")
"""The attributes of tensors that a program may read."""

MOST_LINES = 60_000
_TAKEN = ("self", "range", "slice", "getattr", "RuntimeError")  # names that the written forward uses itself
_WITHOUT_EFFECT = ("read", "attribute", "let", "method")  # and calls without arguments: traced identities
_KEYS = {"class", "home", "inputs", "lines", "example"}


class ProgramKind(type):
    """The class of all classes of programs; its instances are pickled by their text."""


class Program(nn.Module, metaclass=ProgramKind):
    """A module out of a program. Batch normalisation and dropout in it do what the program says in every mode.

    Attributes:
        home: the module that its class was in.
        program: its JSON text.
    """

    home: str
    program: str

    def _get_name(self) -> str:
        return type(self).__name__.removeprefix("Injected")


def function_called(name: str) -> Callable[..., Any]:
    """The function that a line may call by this name.

    Raises:
        LoadError: there is none.
    """
    return _PYTHON[name] if name in _PYTHON else function_named(name)


@functools.cache
def program_class(text: str) -> type:
    """The class whose forward is this program; one for each text.

    Raises:
        LoadError: it is no program, or calls what it must not.
    """
    if len(text) > LONGEST:
        raise LoadError("a program of absurd length", seen=f"{len(text):,} letters")
    try:
        data = json.loads(text)
        name, home = data["class"], data["home"]
        if set(data) != _KEYS or not all(map(str.isidentifier, (name, *home.split(".")))):
            raise ValueError("other keys, or a class that is no name")
        writer = _Writer()
        head = writer.head(data["inputs"])
        source = f"def forward({head}):\n" + "\n".join(writer.block(data["lines"], "    ")) + "\n"
        writer.check_names()
        filename = f"<se_inject {name} {abs(hash(text)):x}>"
        forward: Any = compiled(source, filename, writer.scope)
    except LoadError:
        raise
    except Exception as error:
        raise LoadError(
            "a damaged file: a program of an unknown form", seen=f"{type(error).__name__}: {error}"
        ) from error
    forward.__qualname__ = f"{name}.forward"

    def __reduce_ex__(self: nn.Module, protocol: Any) -> Any:
        return new_program, (text,), self.__dict__

    attributes = {
        "__module__": "se_inject.generated",
        "__doc__": f"{home}.{name}, out of a program.",
        "__reduce_ex__": __reduce_ex__,
        "forward": forward,
        "home": home,
        "program": text,
    }
    return ProgramKind(name, (Program,), attributes)


def program_module(name: str, home: str, inputs: list[Any], lines: list[Any], example: Any = None) -> nn.Module:
    """A module with this program and nothing in it.

    Args:
        name: of its class, ``home`` of the module that is in, as far as they are names.
        inputs: the parameters of its forward, each ``[name]`` or ``[name, default]``.
        lines: its forward.
        example: shapes and dtypes of inputs that it takes, as ``inputs.shapes_of`` gives them.
    """
    data = {
        "class": name if name.isidentifier() else "Module",
        "home": home if all(map(str.isidentifier, home.split("."))) else "unknown",
        "inputs": inputs,
        "lines": lines,
        "example": example,
    }
    module = new_program(json.dumps(data))
    nn.Module.__init__(module)
    return module


def class_of(module: nn.Module) -> Any:
    """The class that an author wrote; for a program what stands for it, since equal ones may have different programs."""
    kind = original_class(module)
    return (kind.home, kind.__name__) if issubclass(kind, Program) else kind


def recorded_inputs(module: nn.Module) -> Any:
    """Shapes and dtypes of inputs that a network takes, if it is a program that knows them."""
    text = getattr(type(module), "program", None) if isinstance(module, Program) else None
    return json.loads(text)["example"] if text else None


def is_of_training(module: nn.Module) -> bool:
    """Whether a program has dropout, or normalisation by the batch, written down, which act in every mode then."""
    return isinstance(module, Program) and any(map(_trains, _operations(json.loads(type(module).program)["lines"])))


def _operations(lines: list[Any]) -> Iterator[list[Any]]:
    for kind, *parts in lines:
        if kind == "set":
            yield parts[1:]
        elif kind in ("if", "loop"):
            for part in parts:
                if isinstance(part, list):
                    yield from _operations(part)


def _trains(operation: list[Any]) -> bool:
    name, args, kwargs = operation
    if not name.startswith("ops:aten.") or name.endswith(".no_stats"):  # what instance normalisation is made of
        return False
    schema = getattr(function_called(name), "_schema", None)
    if schema is None:
        return False
    given = {**dict(zip((argument.name for argument in schema.arguments), args, strict=False)), **kwargs}
    if given.get("p") == 0 or given.get("dropout") == 0 or given.get("running_mean", given) is None:
        return False  # no dropout; no statistics but the batch's in any mode
    return any(given.get(key) is True for key in ("train", "training"))


def new_program(text: str) -> nn.Module:
    """What a pickle calls: an empty module of the class of this program."""
    kind: Any = program_class(text)
    return kind.__new__(kind)  # type: ignore[no-any-return]


def _reduced(kind: Any) -> Any:
    text = vars(kind).get("program")
    return (program_class, (text,)) if text else kind.__qualname__


copyreg.pickle(ProgramKind, _reduced)


def check_program(module: nn.Module) -> None:
    """Look whether a program calls submodules, and reads values, and nothing else of the module's.

    Args:
        module: one of a program's class, with its state.

    Raises:
        LoadError: it calls or reads something else.
    """
    todo = list(json.loads(type(module).program)["lines"])  # type: ignore[attr-defined]
    while todo:
        kind, *parts = todo.pop()
        if kind == "if":
            todo += parts[1] + parts[2]
        elif kind == "loop":
            todo += parts[3]
        elif kind == "call" and not isinstance(value_at(module, parts[1]), nn.Module):
            raise LoadError(f"a program in this file calls `{parts[1]}`, which is no submodule")
        elif kind == "read" and not isinstance(value_at(module, parts[1]), torch.Tensor | bool):
            raise LoadError(f"a program in this file reads `{parts[1]}`, which is no tensor")


def without_unused(lines: list[Any]) -> list[Any]:
    """A program's lines without reads, sizes and copies that nobody uses."""
    return _kept(lines, set())


def _kept(lines: list[Any], used: set[str]) -> list[Any]:
    """Those lines that are needed where these names are used afterwards; what they use is added to the names."""
    result = []
    for kind, *parts in reversed(lines):
        if kind == "if":
            parts = [parts[0], _kept(parts[1], used), _kept(parts[2], used)]
            if not parts[1] and not parts[2]:
                continue
            used.update(_named(parts[0]))
        elif kind == "loop":
            used.update(_named([kind, *parts]))  # what a turn sets, the next one may use
            parts = [*parts[:3], _kept(parts[3], used)]
        elif kind in ("raise", "return"):
            used.update(_named(parts))
        elif not used.intersection(parts[0]) and (kind in _WITHOUT_EFFECT or (kind == "call" and not parts[2])):
            continue
        else:
            used.update(_named(parts[1:]))
        result.append([kind, *parts])
    return result[::-1]


def _named(value: Any) -> Iterator[str]:
    """Every name that a value or line reads."""
    if isinstance(value, dict):
        if "node" in value:
            yield value["node"]
        for item in value.values():
            yield from _named(item)
    elif isinstance(value, list):
        if value[:1] == ["loop"]:
            yield value[3]
        for item in value:
            yield from _named(item)


# -- source text -------------------------------------------------------------------------------------------


class _Writer:
    """Writes lines as Python. What is not plain goes into ``scope``, under names that no line can use."""

    def __init__(self) -> None:
        self.scope: dict[str, Any] = {"__name__": "se_inject.generated", "_plain": plain}
        self._set: set[str] = set()
        self._read: set[str] = set()
        self._count = 0

    def head(self, inputs: list[Any]) -> str:
        """The parameters of the forward, each a name or a name and its default."""
        parts = ["self"]
        for name, *default in inputs:
            parts.append(f"{self._target(name)}={self._value(default[0])}" if default else self._target(name))
        return ", ".join(parts)

    def check_names(self) -> None:
        """Whether everything that is read is set somewhere: other names would be Python's own.

        Raises:
            LoadError: something isn't.
        """
        if free := sorted(self._read - self._set):
            raise LoadError(f"a program in this file reads `{free[0]}`, which nothing sets")

    def _target(self, name: Any) -> str:
        self._set.add(_name(name))
        return str(name)

    def _reading(self, name: Any) -> str:
        self._read.add(_name(name))
        return str(name)

    def block(self, lines: list[Any], indent: str) -> list[str]:
        """These lines, indented."""
        return [indent + text for line in lines for text in self._line(*line)] or [f"{indent}pass"]

    def _line(self, kind: str, *parts: Any) -> list[str]:
        self._count += 1
        if self._count > MOST_LINES:
            raise LoadError(f"a program of more than {MOST_LINES:,} lines")
        if kind == "if":
            condition, then, otherwise = parts
            found = [f"if {self._value(condition)}:", *self.block(then, "    ")]
            return [*found, "else:", *self.block(otherwise, "    ")] if otherwise else found
        if kind == "loop":
            index, count, condition, body = parts
            stop = [f"    if not {self._reading(condition)}:", "        break"]
            return [f"for {self._target(index)} in range({self._value(count)}):", *stop, *self.block(body, "    ")]
        if kind == "raise":
            return [f"raise RuntimeError({self._constant(str(parts[0]))})"]
        if kind == "return":
            return [f"return {self._value(parts[0])}"]
        names, *rest = parts
        target = ", ".join(map(self._target, names)) + ("," if len(names) > 1 else "")
        return [(f"{target} = " if names else "") + self._computed(kind, rest)]

    def _computed(self, kind: str, parts: list[Any]) -> str:
        if kind == "let":
            return self._value(parts[0])
        if kind == "read":
            return _path(parts[0])
        if kind == "attribute":
            value, name = parts
            if name not in ATTRIBUTES:
                raise LoadError(f"a program in this file reads the attribute `{name}`, which tensors don't have")
            return f"{self._value(value)}.{_name(name)}"
        name, args, kwargs = parts
        checked_keywords(kwargs, name if kind == "method" else None)
        arguments = [self._value(argument) for argument in args]
        arguments += [f"{_name(key)}={self._value(value)}" for key, value in kwargs.items()]
        if kind == "set":
            return f"{self._constant(function_called(name))}({', '.join(arguments)})"
        if kind == "method":
            return f"{arguments[0]}.{method_named(name)}({', '.join(arguments[1:])})"
        if kind == "call":
            return f"_plain({_path(name)}({', '.join(arguments)}))"
        raise LoadError(f"a program in this file has a line of kind `{kind}`")

    def _value(self, value: Any) -> str:
        if isinstance(value, list):
            return f"[{', '.join(map(self._value, value))}]"
        if isinstance(value, dict) and "node" in value:
            return self._reading(value["node"])
        if isinstance(value, dict) and "tuple" in value:
            return f"({''.join(f'{self._value(item)}, ' for item in value['tuple'])})"
        if isinstance(value, dict) and "dict" in value:
            items = (f"{self._value(checked_key(key))}: {self._value(item)}" for key, item in value["dict"])
            return f"{{{', '.join(items)}}}"
        if isinstance(value, dict) and "slice" in value:
            return f"slice({', '.join(map(self._value, value['slice']))})"
        if value is None or isinstance(value, bool | int):
            return repr(value)
        return self._constant(decoded(value, {}))

    def _constant(self, value: Any) -> str:
        name = f"_constant_{len(self.scope)}"
        self.scope[name] = value
        return name


def is_name(name: Any) -> bool:
    """Whether a program may call a value so."""
    plain = isinstance(name, str) and name.isascii() and name.isidentifier() and not name.startswith("_")
    return plain and not keyword.iskeyword(name) and name not in _TAKEN


def _name(name: Any) -> str:
    if not is_name(name):
        raise LoadError("a program in this file uses a name that is none", seen=repr(name)[:80])
    return str(name)


def _path(path: Any) -> str:
    """A path as an expression."""
    text = "self"
    for part in checked_path(path).split("."):
        plain = part.isascii() and part.isidentifier() and not keyword.iskeyword(part)
        text = f"{text}.{part}" if plain else f"getattr({text}, {part!r})"
    return text


class FixedBatchNorm(_BatchNorm):
    """Batch normalisation of a value of any rank by the statistics it has, in training too: what a program of eval does."""

    @property
    def training(self) -> bool:  # type: ignore[override]
        """Never, whatever mode is asked for."""
        return False

    @training.setter
    def training(self, mode: bool) -> None:
        pass

    def _check_input_dim(self, input: Tensor) -> None:
        pass
