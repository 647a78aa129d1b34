"""Unpickle a network without running anything that its file brings along.

A pickle is a program: ``REDUCE`` calls what it names, ``BUILD`` hands any state to ``__setstate__``.
``torch.load(weights_only=True)`` narrows the names, but what one adds to its list can be *called* with the
file's own arguments, network classes included, and it reads no whole module in the format before torch 1.6.
So the opcodes that do something are replaced here, and one reader serves every format:

* A network class (an ``nn.Module`` whose name in the file and own ``__module__`` are both under ``NETWORKS``)
  is made empty by ``object.__new__`` and given its state by its ``__setstate__``. The file never calls it.
* Called are only ``BUILDERS``, which make tensors and plain data; an enum with one value;
  ``functools.partial`` with one callable and nothing else; ``getattr`` for a module's own ``forward…``
  methods and torch's activations; and our own ``rebuild`` and ``rebuild_frozen``, which check what they are given.
* Functions of tensors may be referred to: networks keep them as attributes and call them in their forward.
* Everything else, name or call, becomes an ``Inert`` module that takes any state and does nothing. Reading
  goes on, so that an error can name all of it at once, and the tensors in such a file can still be had.
* A trusted package is outside all this: its code is imported, called and given state as the file says.

The lists are what the pickles of all networks of torchvision 0.29 and timm 1.0.31 refer to.
"""

from __future__ import annotations

import enum
import functools
import importlib
import inspect
import io
import pickle
import types
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import IO, Any, ClassVar

import torch
from torch import nn

from se_inject.errors import LoadError

NETWORKS = (
    "torch.nn",
    "torchvision.models",
    "torchvision.ops",
    "timm.models",
    "timm.layers",
    "se_inject",
    "se_inject_plugins",
    "torch.ao.nn.quantized.modules.functional_modules.FloatFunctional",
    "torch.ao.quantization.stubs.QuantStub",
    "torch.ao.quantization.stubs.DeQuantStub",
)
NOT_NETWORKS = ("torch.nn.parallel.distributed",)  # its __setstate__ talks to a process group

BUILDERS = frozenset(
    [
        *(f"builtins.{name}" for name in ("bytearray", "complex", "frozenset", "range", "set", "slice")),
        "_codecs.encode",
        "collections.Counter",
        "collections.OrderedDict",
        "se_inject.bodies.rebuild",
        "se_inject.freezing.rebuild_frozen",
        "torch.Size",
        "torch.device",
        "torch.serialization._get_layout",
        "torch._utils._rebuild_meta_tensor_no_storage",
        "torch._utils._rebuild_parameter",
        "torch._utils._rebuild_parameter_with_state",
        "torch._utils._rebuild_tensor",
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_tensor_v3",
    ]
)
DATA = frozenset(
    [
        "timm.layers.format.Format",
        "timm.models._features.FeatureInfo",
        "torchvision.models.detection._utils.BalancedPositiveNegativeSampler",
        "torchvision.models.detection._utils.BoxCoder",
        "torchvision.models.detection._utils.BoxLinearCoder",
        "torchvision.models.detection._utils.Matcher",
        "torchvision.models.detection._utils.SSDMatcher",
    ]
)
REFERENCES = frozenset(
    [
        "functools.partial",
        "timm.layers.activations.gelu",
        "torch._C._VariableFunctionsClass",
        "torch.storage.UntypedStorage",
        "torchvision.models.optical_flow.raft._pass_through_h",
        "torchvision.ops.boxes.box_iou",
    ]
)
ACTIVATIONS = frozenset(["relu", "sigmoid", "tanh", "selu", "celu", "rrelu", "prelu", "softmax", "log_softmax"])

_LISTED = BUILDERS | DATA | REFERENCES
_QUOTES = frozenset("\"'\\")
_PYTHON_2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # protocol 2 writes the old names
_UNUSED = (pickle.INST, pickle.OBJ, pickle.NEWOBJ_EX, pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.PERSID)


class Inert(nn.Module):
    """Stands for what a file named and nobody allowed."""


def unpickle(file: IO[bytes], form: str, trust: Sequence[str], refused: dict[str, str | None]) -> Any:
    """Read what ``torch.save`` or ``pickle.dump`` wrote; its tensors go to the CPU.

    Args:
        file: the open file, at its beginning.
        form: ``zip`` (none of TorchScript) or ``legacy``, of ``torch.save``; ``plain``, of ``pickle.dump``.
        trust: packages whose code the file may use.
        refused: takes the names of what became ``Inert``, each with the reason if it could not be imported.

    Raises:
        Exception: of any class, from a damaged file or a trusted package.
    """

    class Unpickler(_Unpickler):
        _trust = tuple(trust)
        _refused = refused

    def load(file: IO[bytes], **options: Any) -> Any:
        return Unpickler(file, **options).load()

    if form == "plain":
        return load(file)
    if form == "legacy":
        file = io.BytesIO(file.read())  # of a real file, torch first tries whether it is a tar archive
    reader = types.SimpleNamespace(__name__=__name__, Unpickler=Unpickler, load=load)
    return torch.load(file, map_location="cpu", pickle_module=reader, weights_only=False)


def check_names(model: nn.Module) -> None:
    """Refuse attribute names that would be more than a name where torch.fx writes them into source text.

    It follows ``_modules`` itself, since a file can hide ``named_modules`` behind an attribute.

    Raises:
        LoadError: a name holds a quote, a backslash or something unprintable.
    """
    found, todo = {id(model)}, [model]
    while todo:
        state = vars(todo.pop())
        for names in (state, state["_modules"], state["_parameters"], state["_buffers"]):
            for name in names:
                if not isinstance(name, str) or not name.isprintable() or _QUOTES.intersection(name):
                    raise LoadError("a module in this file has an attribute that is no name", seen=repr(name)[:80])
        children = [m for m in state["_modules"].values() if m is not None and id(m) not in found]
        found.update(map(id, children))
        todo += children


def within(name: str, packages: Sequence[str]) -> bool:
    """Whether a dotted name is one of these packages or something in them."""
    return any(name == package or name.startswith(f"{package}.") for package in packages)


class _Unpickler(pickle._Unpickler):
    """The standard library's unpickler, with every opcode that calls something replaced."""

    _trust: tuple[str, ...]
    _refused: dict[str, str | None]
    stack: list[Any]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, file: IO[bytes], **options: Any) -> None:
        super().__init__(file, **options)
        self._callable: list[Any] = []

    def find_class(self, module: str, name: str) -> Any:
        """What has this name if the file may have it, else something inert."""
        module = _PYTHON_2.get(module, module)
        full = f"{module}.{name}"
        trusted = within(module, self._trust)
        listed = full in _LISTED
        if full in ("builtins.getattr", "torch.storage._load_from_bytes"):
            return self._may_call(self._attribute if name == "getattr" else self._storage)
        known = listed or within(full, NETWORKS) or module in ("torch", "torch._C._nn")
        if not trusted and ("." in name or not known):
            return self._refuse(full)
        try:
            found: Any = importlib.import_module(module)
            for part in name.split("."):
                found = getattr(found, part)
        except (ImportError, AttributeError) as error:
            return self._refuse(full, str(error))
        if full in BUILDERS or (trusted and within(getattr(found, "__module__", None) or "", self._trust)):
            return self._may_call(found)
        harmless = listed or _is_network(found) or _is_tensor_function(module, found)
        return found if harmless or isinstance(found, torch.dtype) else self._refuse(full)

    def _may_call(self, found: Any) -> Any:
        self._callable.append(found)
        return found

    def _refuse(self, name: str, why: str | None = None) -> Inert:
        self._refused[name] = why
        return Inert()

    def _refuse_call(self, function: Any) -> Inert:
        kind = function if isinstance(function, type | types.FunctionType) else type(function)
        return self._refuse(f"{kind.__module__}.{kind.__qualname__}(…)")

    def _attribute(self, owner: Any, name: str) -> Any:
        """``getattr``, for what networks really keep."""
        if isinstance(owner, nn.Module) and str(name).startswith("forward"):
            return types.MethodType(getattr(type(owner), name), owner)
        if owner is torch._C._VariableFunctionsClass and name in ACTIVATIONS:  # type: ignore[attr-defined]
            return getattr(owner, name)
        return self._refuse(f"builtins.getattr(…, {name!r})")

    def _storage(self, data: bytes) -> Any:
        """A tensor's storage as ``pickle.dump`` writes it: a legacy file within the file."""
        if data.startswith(b"PK"):
            raise pickle.UnpicklingError("an archive in place of a storage")
        return unpickle(io.BytesIO(data), "legacy", self._trust, self._refused)

    # -- opcodes -------------------------------------------------------------------------------------------

    def _reduce(self) -> None:
        args, function = self.stack.pop(), self.stack.pop()
        if type(args) is not tuple:
            raise pickle.UnpicklingError("arguments that are no tuple")
        may_call = any(function is known for known in self._callable)
        if isinstance(function, enum.EnumMeta):
            may_call = may_call or len(args) == 1
        elif function is functools.partial:
            may_call = len(args) == 1 and callable(args[0])
        if any(isinstance(part, Inert) for part in (function, *args)):
            self.append(Inert())
        else:
            self.append(function(*args) if may_call else self._refuse_call(function))

    def _newobj(self) -> None:
        args, kind = self.stack.pop(), self.stack.pop()
        if isinstance(kind, Inert):
            self.append(Inert())
        elif isinstance(kind, type) and within(kind.__module__, self._trust):
            self.append(kind.__new__(kind, *args))
        elif args == () and (_is_network(kind) or _is_data(kind)):
            self.append(object.__new__(kind))
        else:
            self.append(self._refuse_call(kind))

    def _build(self) -> None:
        state, instance = self.stack.pop(), self.stack[-1]
        kind: Any = type(instance)
        if within(kind.__module__, self._trust):
            self.append(state)
            pickle._Unpickler.dispatch[pickle.BUILD[0]](self)  # type: ignore[arg-type]
        elif kind in (Inert, OrderedDict) or _is_data(kind):
            vars(instance).update(state if isinstance(state, dict) else {})
        elif kind is functools.partial or (isinstance(instance, nn.Module) and type(state) is dict):
            kind.__setstate__(instance, state)
        else:
            raise pickle.UnpicklingError(f"a state for a {kind.__name__}")

    def _set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, dict):
            for key, value in zip(items[::2], items[1::2], strict=True):
                target[key] = value
        elif not isinstance(target, Inert):
            raise pickle.UnpicklingError(f"items for a {type(target).__name__}")

    def _add_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif isinstance(target, set):
            target.update(items)
        elif not isinstance(target, Inert):
            raise pickle.UnpicklingError(f"members for a {type(target).__name__}")

    def _persistent(self) -> None:
        key = self.stack.pop()
        is_class = isinstance(key, tuple) and key[0] == "module"  # in a legacy file, with its source
        self.append(key[1] if is_class else self.persistent_load(key))

    dispatch: ClassVar[dict[int, Any]] = {
        **{code: load for code, load in pickle._Unpickler.dispatch.items() if bytes([code]) not in _UNUSED},
        pickle.REDUCE[0]: _reduce,
        pickle.NEWOBJ[0]: _newobj,
        pickle.BUILD[0]: _build,
        pickle.SETITEM[0]: lambda self: self._set_items([self.stack.pop(-2), self.stack.pop()]),
        pickle.SETITEMS[0]: lambda self: self._set_items(self.pop_mark()),
        pickle.APPEND[0]: lambda self: self._add_items([self.stack.pop()]),
        pickle.APPENDS[0]: lambda self: self._add_items(self.pop_mark()),
        pickle.ADDITEMS[0]: lambda self: self._add_items(self.pop_mark()),
        pickle.BINPERSID[0]: _persistent,
    }


def _is_network(found: Any) -> bool:
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        return False
    home = f"{found.__module__}.{found.__qualname__}"
    return within(home, NETWORKS) and not within(home, NOT_NETWORKS) and found is not Inert


def _is_data(found: Any) -> bool:
    return isinstance(found, type) and f"{found.__module__}.{found.__qualname__}" in DATA


def _is_tensor_function(module: str, found: Any) -> bool:
    if str(getattr(found, "__name__", "_")).startswith("_"):
        return False
    if module == "torch.nn.functional":
        return inspect.isfunction(found) and found.__module__ == module
    return module == "torch._C._nn" and inspect.isbuiltin(found)
