"""List Python's own operators, functions and reserved names that the lines of a stored forward may use."""

from __future__ import annotations

import keyword
from collections.abc import Callable
from typing import Any

import torch

from se_inject.forwards.source import BUILTINS
from se_inject.forwards.vocabulary import function_named

_TAKEN = BUILTINS | {"self", "torch", "math"}
INFIX = {
    "add": "+", "sub": "-", "mul": "*", "truediv": "/", "floordiv": "//", "mod": "%", "pow": "**", "matmul": "@",
    "and_": "&", "or_": "|", "xor": "^", "lshift": "<<", "rshift": ">>", "eq": "==", "ne": "!=", "lt": "<", "le": "<=",
    "gt": ">", "ge": ">=",
}  # fmt: skip
IN_PLACE = {
    "iadd": "+=", "isub": "-=", "imul": "*=", "itruediv": "/=", "ifloordiv": "//=", "imod": "%=", "ipow": "**=",
    "imatmul": "@=", "iand": "&=", "ior": "|=", "ixor": "^=",
}  # fmt: skip
PREFIX = {"neg": "-", "pos": "+", "invert": "~", "inv": "~", "not_": "not "}
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


def function_called(name: str) -> Callable[..., Any]:
    """Return the function that a line may call by this name.

    Raises:
        LoadError: there is none.
    """
    return _PYTHON[name] if name in _PYTHON else function_named(name)


def is_name(name: Any) -> bool:
    """Return whether a line may give a value this name."""
    known = isinstance(name, str) and name.isascii() and name.isidentifier() and not name.startswith("_")
    return known and not keyword.iskeyword(name) and name not in _TAKEN
