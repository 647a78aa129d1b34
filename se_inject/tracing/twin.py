"""Make a network's twin: the same modules with other tensors, in which anything may be stored. The network is only read."""

from __future__ import annotations

import contextlib
import copy
import functools
import types
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from se_inject.guarding import mark_like
from se_inject.tracing.foreign import is_compiled

_ATOMIC = frozenset(
    {
        type(None), bool, int, float, complex, str, bytes, type, type(...), types.BuiltinFunctionType, types.ModuleType,
        torch.dtype, torch.device, torch.Size, torch.memory_format, torch.layout, fx.Graph,
    }
)  # fmt: skip
_MOST_OBJECTS = 20_000
"""Python objects that are copied; what lies beyond is shared: a module may hold on to its trainer and all that knows."""


def twin_of(model: nn.Module, tensor: Callable[[Tensor], Tensor]) -> nn.Module:
    """Make a network's twin; no weight is copied unless ``tensor`` does.

    Modules, containers, bound methods, and functions that close over such are made anew, at any depth; other objects as
    ``copy.deepcopy`` would, those that refuse to be copied are shared. Neither constructors nor ``__getstate__`` run.

    Args:
        model: the network. It is only read.
        tensor: gives the twin's tensor for one of the network's, asked once for each.
    """
    twin: nn.Module = _Copier(model, tensor).memo[id(model)]
    mark_like(twin, model)
    return twin


class _Copier:
    """One twin in the making: ``memo`` maps the id of an object to its copy, as ``copy.deepcopy`` keeps it."""

    def __init__(self, model: nn.Module, tensor: Callable[[Tensor], Tensor]) -> None:
        self.tensor = tensor
        self.memo: dict[int, Any] = {}
        self.objects = 0
        self.kept: list[Any] = []
        modules = list(model.modules())
        with torch.no_grad():
            for module in modules:
                if id(module) not in self.memo:
                    self._make(module)
            for module in modules:
                for table in (module._parameters, module._buffers):
                    for each in table.values():
                        self.copied(each)
            for module in modules:
                if not isinstance(module, torch.jit.ScriptModule):
                    self._fill(self.memo[id(module)], module)

    def _make(self, module: nn.Module) -> None:
        """Make a module of the same class with nothing in it; of a scripted one, a copy with its weights."""
        if not isinstance(module, torch.jit.ScriptModule):
            self._remember(module, object.__new__(type(module)))
            return
        scripted = copy.deepcopy(module)
        with contextlib.suppress(Exception):
            if any(self.tensor(parameter).is_meta for parameter in module.parameters()):
                scripted = scripted.to("meta")
        for inside, twin in zip(module.modules(), scripted.modules(), strict=True):
            self._remember(inside, twin)

    def _fill(self, twin: Any, original: Any) -> None:
        attributes = twin.__dict__
        compiled = is_compiled(original)
        for name, value in original.__dict__.items():
            if name in _OF_EVERY_MODULE and not value:  # tables of hooks, as a rule
                attributes[name] = value if type(value) in _ATOMIC else type(value)()
            elif not compiled or name in _OF_EVERY_MODULE:  # and nothing of the compiler's
                attributes[name] = value if type(value) in _ATOMIC else self.copied(value)
        if compiled:
            attributes["_super_module_initialized"] = True
            attributes["forward"] = functools.partial(_call, self.memo[id(original._modules["_orig_mod"])])

    def copied(self, value: Any) -> Any:
        """Copy any value for the twin."""
        kind = type(value)
        if kind in _ATOMIC or isinstance(value, type):
            return value
        if id(value) in self.memo:
            return self.memo[id(value)]
        make = _MAKERS.get(kind)
        if make is not None:
            return make(self, value)
        if isinstance(value, Tensor):
            return self._remember(value, self.tensor(value))
        if isinstance(value, nn.Module) and not isinstance(value, torch.jit.ScriptModule):
            self._fill(self._remember(value, object.__new__(kind)), value)
            return self.memo[id(value)]
        if self.objects > _MOST_OBJECTS:
            return value
        self.objects += 1
        if _is_plain_object(kind):
            if not value.__dict__:
                return value
            self._fill(self._remember(value, object.__new__(kind)), value)
            return self.memo[id(value)]
        return self._deepcopied(value)

    def _remember(self, value: Any, twin: Any) -> Any:
        self.memo[id(value)] = twin
        self.kept.append(value)  # as long as the memo is in use, nothing else gets its id
        return twin

    def _deepcopied(self, value: Any) -> Any:
        """Copy an object as Python does, with the tensors in it replaced; return itself if it refuses."""
        known = len(self.memo)
        try:
            with _Tensors(self):
                return copy.deepcopy(value, self.memo)
        except Exception:
            while len(self.memo) > known:
                self.memo.popitem()
            return value

    def _dict(self, value: dict[Any, Any]) -> Any:
        twin = self._remember(value, type(value)())
        for key, item in value.items():
            twin[key if type(key) in _ATOMIC else self.copied(key)] = (
                item if type(item) in _ATOMIC else self.copied(item)
            )
        return twin

    def _list(self, value: list[Any]) -> Any:
        twin = self._remember(value, [])
        twin.extend(map(self.copied, value))
        return twin

    def _tuple(self, value: tuple[Any, ...]) -> Any:
        items = tuple(map(self.copied, value))
        return value if all(map(_same, items, value)) else self._remember(value, items)

    def _set(self, value: set[Any]) -> Any:
        return self._remember(value, set(map(self.copied, value)))

    def _method(self, value: types.MethodType) -> Any:
        return types.MethodType(self.copied(value.__func__), self.copied(value.__self__))

    def _partial(self, value: functools.partial[Any]) -> Any:
        keywords = {key: self.copied(item) for key, item in value.keywords.items()}
        return self._remember(
            value, functools.partial(self.copied(value.func), *map(self.copied, value.args), **keywords)
        )

    def _function(self, value: types.FunctionType) -> Any:
        """Copy a function that holds modules, tensors or containers in its closure or defaults; return any other itself."""
        held = [cell for cell in value.__closure__ or () if not _is_empty(cell)]
        defaults = [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
        if not any(map(_may_hold_state, (*(cell.cell_contents for cell in held), *defaults))):
            return value
        cells = tuple(map(self._cell, value.__closure__ or ()))
        twin = types.FunctionType(
            value.__code__, value.__globals__, value.__name__, self.copied(value.__defaults__), cells or None
        )
        self._remember(value, twin)
        twin.__kwdefaults__ = self.copied(value.__kwdefaults__)
        twin.__qualname__, twin.__module__, twin.__doc__ = value.__qualname__, value.__module__, value.__doc__
        twin.__dict__.update(value.__dict__)
        for old, new in zip(value.__closure__ or (), cells, strict=True):
            if not _is_empty(old) and _is_empty(new):
                new.cell_contents = self.copied(old.cell_contents)
        return twin

    def _cell(self, cell: types.CellType) -> types.CellType:
        twin: types.CellType = self.memo.get(id(cell)) or self._remember(cell, types.CellType())
        return twin


_OF_EVERY_MODULE = frozenset(nn.Module().__dict__)


def _call(module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
    return module(*args, **kwargs)


class _Tensors(TorchFunctionMode):
    """While this is open, ``copy.deepcopy`` of a tensor gives the twin's."""

    def __init__(self, copier: _Copier) -> None:
        super().__init__()
        self.copier = copier

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is Tensor.__deepcopy__ or getattr(function, "__name__", "") == "clone":
            return self.copier.copied(args[0])
        return function(*args, **(kwargs or {}))


_MAKERS: dict[type, Callable[[_Copier, Any], Any]] = {
    dict: _Copier._dict,
    OrderedDict: _Copier._dict,
    list: _Copier._list,
    tuple: _Copier._tuple,
    set: _Copier._set,
    types.MethodType: _Copier._method,
    functools.partial: _Copier._partial,
    types.FunctionType: _Copier._function,
}


def _is_plain_object(kind: type) -> bool:
    """Return whether instances consist of their attributes alone, without copy methods or finalisers of their own."""
    own: Any = kind
    return bool(
        kind.__dictoffset__
        and own.__new__ is object.__new__
        and own.__reduce_ex__ is object.__reduce_ex__
        and own.__reduce__ is object.__reduce__
        and not any(hasattr(kind, name) for name in ("__deepcopy__", "__setstate__", "__getnewargs__", "__del__"))
        and kind.__flags__ & _HEAP
        and not any("__slots__" in vars(base) for base in kind.__mro__)
        and all(base.__flags__ & _HEAP for base in kind.__mro__[:-1])
    )


_HEAP = 1 << 9  # a class written in Python


def _same(one: Any, other: Any) -> bool:
    return one is other


def _is_empty(cell: types.CellType) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return True
    return False


def _may_hold_state(value: Any) -> bool:
    return type(value) not in _ATOMIC and not isinstance(value, type)
