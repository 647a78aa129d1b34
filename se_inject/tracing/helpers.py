"""Patch calls of torch that don't know proxies, in this thread and for one forward, once one has failed."""

from __future__ import annotations

import contextlib
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode

from se_inject.tracing.known_results import FACTORIES
from se_inject.tracing.numbers import numbers_written_down
from se_inject.tracing.patches import patched, place_of
from se_inject.tracing.proxy import FOREIGN_TENSOR, LENGTH, PYTHON_NUMBER, Untraceable, is_numbers, is_proxy

if TYPE_CHECKING:
    from se_inject.tracing.tracer import OwnerTracer


class Helper(NamedTuple):
    """What makes calls of one name known to proxies while a forward is traced."""

    name: str
    active: Callable[[OwnerTracer], AbstractContextManager[Any]]


def helper_for(error: Exception) -> Helper | None:
    """Find a remedy for a forward that failed with this error; None if nothing is known."""
    text = str(error)
    if text.startswith(("part of it runs under another grad", "unwrap_if_dead()")):  # the latter in torch 2.9
        return _apply_around(error)
    if isinstance(error, Untraceable):
        if text == FOREIGN_TENSOR:
            return Helper("tensors made in the forward", _Factories)
        return Helper("numbers", _numbers) if text in (PYTHON_NUMBER, LENGTH) else None
    found = re.match(r"(\w+)\(\) (takes 1 positional argument|received an invalid combination of arguments)", text)
    if found and found[1] in ("zeros", "ones", "empty", "rand", "randn"):
        return _patch([(torch, found[1])], _sizes_in_a_tuple)
    found = re.match(
        r"descriptor '(\w+)' for 'torch\._C\.TensorBase' objects doesn't apply to a 'ValueProxy' object", text
    )
    if found:
        name = found[1]
        return _patch([(torch.Tensor, name)], lambda original, *args, **kwargs: _method(original, name, args, kwargs))
    if "instead found type 'ValueProxy'" in text:
        return _patch([(torch.jit.ScriptFunction, "__call__")], _scripted)
    if re.match(r"Could not infer dtype of ValueProxy|object of type '(int|float)' has no len", text):
        return _patch([(torch, "tensor")], _tensor_of_number)
    if "for Dlpack" in text or "__dlpack__" in text:
        return _patch([(torch, "as_tensor")], _as_tensor)
    if text.startswith("Variable data has to be a tensor, but got ValueProxy"):
        return _patch([(torch.autograd.Variable, "__new__")], _variable)
    return None


def _apply_around(error: Exception) -> Helper | None:
    """Find the autograd function in whose forward an error was raised, and by which names the author's code applies it."""
    step, caller = error.__traceback__, None
    while step is not None:
        frame = step.tb_frame
        function = _function_in(frame)
        if function is not None:
            places = [(function, "apply")]
            for holder, held in _holders(caller):
                places += [(holder, name) for name, value in held.items() if _is_same(value, function.apply)]
            return _patch(places, _applied)
        step, caller = step.tb_next, frame
    return None


def _is_same(value: Any, method: Any) -> bool:
    return type(value) is type(method) and bool(value == method)


def _function_in(frame: FrameType) -> Any:
    """Return the autograd function whose forward, or whose ``apply``, runs in a frame; None if none does."""
    first = _first_argument(frame)
    if isinstance(first, torch.autograd.function.FunctionCtx):
        return getattr(type(first), "_forward_cls", None)
    applies = frame.f_code.co_name == "apply" and isinstance(first, type) and issubclass(first, torch.autograd.Function)
    return first if applies else None


def _holders(frame: FrameType | None) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yield what may hold a function for the code in a frame: its module's attributes, and its globals."""
    if frame is None:
        return
    owner = _first_argument(frame)
    if isinstance(owner, torch.nn.Module):
        yield owner, dict(vars(owner))
    module = sys.modules.get(frame.f_globals.get("__name__", ""))
    if module is not None and vars(module) is frame.f_globals:
        yield module, dict(vars(module))
    else:  # a forward that was made from text
        names = _Names()
        names.__dict__ = frame.f_globals
        yield names, dict(frame.f_globals)


class _Names:
    """The global names of code, as attributes."""


def _first_argument(frame: FrameType) -> Any:
    names = frame.f_code.co_varnames
    return frame.f_locals.get(names[0]) if names else None


def _applied(original: Any, *args: Any, **kwargs: Any) -> Any:
    """Record the application of an autograd function as one call."""
    found = next((arg for arg in args if is_proxy(arg)), None)
    if found is None:
        return original(*args, **kwargs)
    return found.tracer.create_proxy("call_function", original, args, kwargs)


def _patch(places: Iterable[tuple[Any, str]], replacement: Callable[..., Any]) -> Helper:
    """Return what patches attributes of objects: several, where several names are one function."""
    places = list(places)

    @contextlib.contextmanager
    def active(tracer: OwnerTracer) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for owner, name in places:
                stack.enter_context(patched(owner, name, replacement))
            yield

    return Helper(" ".join(f"{place_of(owner)}.{name}" for owner, name in places), active)


@contextlib.contextmanager
def _numbers(tracer: OwnerTracer) -> Any:
    """Write down functions of ``math``, and ``int``, ``float`` and ``len``, that are given sizes."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(numbers_written_down(tracer))
        for name in ("sqrt", "log", "log2", "log10", "exp", "pow", "gcd"):
            stack.enter_context(patched(math, name, _called_on_sizes))
        yield


def _called_on_sizes(original: Any, *numbers: Any) -> Any:
    proxies = [number for number in numbers if is_proxy(number)]
    return proxies[0].tracer.create_proxy("call_function", original, numbers, {}) if proxies else original(*numbers)


class _Factories(TorchFunctionMode):
    """Write down the tensors that a forward makes of plain numbers: ``torch.arange(8)``."""

    def __init__(self, tracer: OwnerTracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_own = self.tracer.observer.tracer is self.tracer  # not a child's, nor one within a function of torch
        if is_own and function in FACTORIES:
            return self.tracer.create_proxy("call_function", function, args, kwargs or {})
        return function(*args, **(kwargs or {}))


def _sizes_in_a_tuple(original: Any, *sizes: Any, **kwargs: Any) -> Any:
    return original(sizes, **kwargs) if any(map(is_proxy, sizes)) else original(*sizes, **kwargs)


def _tensor_of_number(original: Any, data: Any, **kwargs: Any) -> Any:
    if not is_proxy(data) or not (isinstance(data.value, int | float) or is_numbers(data.value)):
        return original(data, **kwargs)
    return data.tracer.create_proxy("call_function", original, (data,), kwargs)


def _as_tensor(original: Any, data: Any, **kwargs: Any) -> Any:
    if not is_proxy(data):
        return original(data, **kwargs)
    return data.tracer.create_proxy("call_function", original, (data,), kwargs)


def _method(original: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if not args or not is_proxy(args[0]):
        return original(*args, **kwargs)
    return args[0].tracer.create_proxy("call_method", name, args, kwargs)


def _scripted(original: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
    """Call the Python function that a scripted one was made from, if an argument is a proxy."""
    python = getattr(function, "_torchdynamo_inline", None)
    if python is None or not any(map(is_proxy, (*args, *kwargs.values()))):
        return original(function, *args, **kwargs)
    return python(*args, **kwargs)


def _variable(original: Any, kind: Any, *args: Any, **kwargs: Any) -> Any:
    """Do ``Variable(x)``: return the same numbers, without a history."""
    if not any(map(is_proxy, (*args, *kwargs.values()))):
        return original(kind, *args, **kwargs)
    if len(args) != 1 or kwargs:
        raise Untraceable("makes a Variable with options")
    return args[0].tracer.create_proxy("call_method", "detach", args, {})
