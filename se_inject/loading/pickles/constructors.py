"""Call the few functions that a pickle may call, after checking their arguments.

They make tensors, parameters and plain data. None takes more memory than what it is given: a tensor lies within its
storage, a container is made of one that exists.
"""

from __future__ import annotations

import builtins
import collections
import enum
import importlib
import pickle
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from se_inject.loading.zip_archive import SLACK_BYTES

_LARGEST = 2**63
_LARGEST_KEY = 2**61 - 1  # from here on, integers can be chosen to share one hash
_LARGEST_IN_A_TUPLE = 2**16  # and tuples of larger ones than these
_PARTS_OF_A_KEY = 4
_LONGEST_NAME = 100
_MARKS = {"conj", "neg"}
_HASHES = (str.__hash__, bytes.__hash__, bool.__hash__, type(None).__hash__, object.__hash__, nn.Module.__hash__)


class Malformed(pickle.UnpicklingError):
    """Arguments that no pickle of a network has."""


def checked_key(key: Any) -> Any:
    """Refuse a dict's key or a set's member whose hash could be made to collide, or takes forever to compute."""
    is_tuple = type(key) is tuple
    if is_tuple and len(key) > _PARTS_OF_A_KEY:
        raise Malformed("a key that no dict of a network has")
    for part in key if is_tuple else (key,):
        if type(part) is int:
            is_known = abs(part) < (_LARGEST_IN_A_TUPLE if is_tuple else _LARGEST_KEY)
        elif type(part) is float:
            is_known = not is_tuple
        else:  # text's hash is chosen anew for each process, other things' is their address
            is_known = type(part).__hash__ in _HASHES or isinstance(part, enum.Enum)
        if not is_known:
            raise Malformed("a key that no dict of a network has")
    return key


def builder(name: str) -> Callable[..., Any]:
    """Return the function of this name; where its arguments need a check, one that checks them first."""
    module, _, short = name.rpartition(".")
    return _CHECKED.get(name) or getattr(importlib.import_module(module), short)  # type: ignore[no-any-return]


# -- plain data --------------------------------------------------------------------------------------------


def _container(kind: Callable[..., Any], *takes: type) -> Callable[..., Any]:
    def make(*args: Any) -> Any:
        if len(args) > 1 or not all(type(arg) in takes for arg in args):
            raise Malformed(f"arguments for a {getattr(kind, '__name__', kind)}")
        for arg in args:
            for item in arg:
                checked_key(item)
        return kind(*args)

    return make


def _ordered_dict(*args: Any) -> Any:
    if len(args) > 1 or not all(type(arg) in (list, tuple) for arg in args):
        raise Malformed("arguments for an OrderedDict")
    return collections.OrderedDict((checked_key(key), value) for arg in args for key, value in arg)


def _bytearray(*args: Any) -> Any:
    if not (args == () or (len(args) == 1 and type(args[0]) in (bytes, list)) or _is_latin(args)):
        raise Malformed("arguments for a bytearray")
    return builtins.bytearray(*args)


def _encode(*args: Any) -> Any:
    if not _is_latin(args):
        raise Malformed("arguments for _codecs.encode")
    return args[0].encode("latin-1")


def _is_latin(args: Any) -> bool:
    return len(args) == 2 and type(args[0]) is str and args[1] in ("latin1", "latin-1")


def _plain(function: Callable[..., Any], *takes: type) -> Callable[..., Any]:
    def make(*args: Any) -> Any:
        if not all(type(arg) in takes and (type(arg) is not str or len(arg) < _LONGEST_NAME) for arg in args):
            raise Malformed(f"arguments for {function.__name__}")
        return function(*args)

    return make


# -- tensors -----------------------------------------------------------------------------------------------


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> Any:
    check_view(storage, storage.dtype, offset, size, stride)
    return torch._utils._rebuild_tensor(storage, offset, size, stride)  # type: ignore[no-untyped-call]


def _tensor_v2(
    storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any, hooks: Any, metadata: Any = None
) -> Any:
    check_view(storage, storage.dtype, offset, size, stride)
    _check_trimmings(requires_grad, hooks, metadata)
    return torch._utils._rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks, metadata)  # type: ignore[no-untyped-call]


def _tensor_v3(
    storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any, hooks: Any, dtype: Any, metadata: Any = None
) -> Any:
    check_view(storage, dtype, offset, size, stride)
    _check_trimmings(requires_grad, hooks, metadata)
    return torch._utils._rebuild_tensor_v3(storage, offset, size, stride, requires_grad, hooks, dtype, metadata)  # type: ignore[no-untyped-call]


def _meta_tensor(dtype: Any, size: Any, stride: Any, requires_grad: Any) -> Any:
    _check_shape(0, size, stride)
    _check_trimmings(requires_grad, {}, None)
    return torch._utils._rebuild_meta_tensor_no_storage(dtype, size, stride, requires_grad)  # type: ignore[no-untyped-call]


def _parameter(data: Any, requires_grad: Any, hooks: Any) -> Any:
    _check_trimmings(requires_grad, hooks, None)
    if not isinstance(data, torch.Tensor):
        raise Malformed("a parameter that is not a tensor")
    return nn.Parameter(data, requires_grad)


def _parameter_with_state(data: Any, requires_grad: Any, hooks: Any, state: Any) -> Any:
    return _with_attributes(_parameter(data, requires_grad, hooks), state)


def _of_type(make: Any, kind: Any, args: Any, state: Any) -> Any:
    """Build a plain tensor with attributes, as torch.compile leaves them on buffers."""
    if make not in (_tensor, _tensor_v2, _tensor_v3) or kind is not _tensor_class or type(args) is not tuple:
        raise Malformed("a tensor of another class")
    return _with_attributes(make(*args), state)


def _tensor_class(*_: Any) -> Any:
    raise Malformed("a tensor made by its class")


def _with_attributes(tensor: Any, state: Any) -> Any:
    """Add an author's attributes to the tensor; of those that begin with an underscore, numbers and text alone."""
    for name, value in (state if type(state) is dict else {}).items():
        is_name = type(name) is str and name.isidentifier() and not name.startswith("__")
        if not is_name or hasattr(torch.Tensor, name):
            raise Malformed("an attribute of a tensor that is none of the author's")
        if not name.startswith("_") or type(value) in (bool, int, float, str, type(None)):
            setattr(tensor, name, value)
    return tensor


def check_view(storage: Any, dtype: Any, offset: Any, size: Any, stride: Any) -> None:
    """Look whether a tensor lies within its storage.

    torch would make the storage larger rather than refuse, and so read memory that is not the file's.

    Raises:
        Malformed: it doesn't, or is far larger than its storage.
    """
    if not isinstance(storage, torch.storage.TypedStorage) or not isinstance(dtype, torch.dtype):
        raise Malformed("a tensor without a storage")
    _check_shape(offset, size, stride)
    last = 0 if 0 in size else 1 + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    elements = 1
    for length in size:
        elements *= length
    available = storage._untyped_storage.nbytes()
    if (offset + last) * dtype.itemsize > available:
        raise Malformed(f"a tensor of shape {tuple(size)} in a storage of {available:,} bytes")
    if elements * dtype.itemsize > available + SLACK_BYTES:  # expanded with strides of 0
        raise Malformed(f"a tensor of shape {tuple(size)} made of {available:,} bytes")


def _check_shape(offset: Any, size: Any, stride: Any) -> None:
    for numbers in (size, stride):
        if not isinstance(numbers, tuple) or len(numbers) > 64:
            raise Malformed("a tensor's shape or strides that are not a tuple")
    if len(size) != len(stride):
        raise Malformed("a tensor with more or fewer strides than dimensions")
    for number in (offset, *size, *stride):
        if type(number) is not int or not 0 <= number < _LARGEST:
            raise Malformed("a tensor whose shape, strides or offset are negative or too large")


def _check_trimmings(requires_grad: Any, hooks: Any, metadata: Any) -> None:
    if type(requires_grad) is not bool:
        raise Malformed("a tensor's requires_grad")
    if not (hooks is None or (isinstance(hooks, Mapping) and not hooks)):
        raise Malformed("a tensor with hooks")
    if not (metadata is None or (type(metadata) is dict and all(type(value) is bool for value in metadata.values()))):
        raise Malformed("a tensor's metadata")
    if metadata and not metadata.keys() <= _MARKS:
        raise Malformed("a tensor's metadata")


_CHECKED: dict[str, Callable[..., Any]] = {
    "_codecs.encode": _encode,
    "builtins.bytearray": _bytearray,
    "builtins.frozenset": _container(frozenset, list),
    "builtins.complex": _plain(complex, int, float),
    "builtins.range": _plain(range, int),
    "builtins.set": _container(set, list),
    "builtins.slice": _plain(slice, int, type(None)),
    "collections.Counter": _container(collections.Counter, dict),
    "collections.OrderedDict": _ordered_dict,
    "torch.Tensor": _tensor_class,
    "torch._tensor._rebuild_from_type_v2": _of_type,
    "torch.Size": _container(torch.Size, tuple, list),
    "torch.device": _plain(torch.device, str, int),
    "torch.serialization._get_layout": _plain(torch.serialization._get_layout, str),
    "torch._utils._rebuild_meta_tensor_no_storage": _meta_tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter_with_state,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor_v2,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
}
