"""Check the functions, methods, paths and names that a forward written as data may refer to.

Functions are tensor operations of torch, operators that anyone registered in this process (``torch.library``), and
operators of Python; methods are those of tensors without an underscore in front. Which of these a stranger's file may name
is for ``se_inject.loading`` to say. Constants are in ``constants``.
"""

from __future__ import annotations

import inspect
import keyword
import math
import operator
import unicodedata
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from se_inject.errors import LoadError, SurgeryError
from se_inject.forwards.named_classes import APPLY, MAKE, Unlike, class_name, class_named, field, is_container

LONGEST = 8_000_000
"""Letters of the JSON text of one forward."""

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
_BUILTINS: dict[str, Callable[..., Any]] = {
    "OrderedDict": OrderedDict,
    "getattr": getattr,
    "round": round,
    "assert": torch._assert,
    "field": field,
}
_FORBIDDEN = frozenset(
    {
        "from_file",
        "save",
        "load",
        "call",
        "attrgetter",
        "itemgetter",
        "methodcaller",
        "handle_torch_function",
        "triplet_margin_with_distance_loss",
        "read_file",
        "write_file",
        "load_tensor",
    }
)
_FORBIDDEN_METHODS = frozenset(
    {
        "numpy", "storage", "untyped_storage", "typed_storage", "apply_", "map_", "map2_", "register_hook", "backward",
        "register_post_accumulate_grad_hook", "share_memory_", "module_load", "set_", "record_stream", "tolist",
        "data_ptr", "as_subclass", "update", "setdefault",
    }
)  # fmt: skip


def function_name(function: Any) -> str:
    """Return the name under which ``function_named`` finds a function.

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
        for name in (short, short.removeprefix(f"{space.rpartition('.')[2]}_")):  # `torch.fft.rfft2` is `fft_rfft2`
            if _function_in(space, name) is function:
                return f"{space}:{name}"
    if isinstance(function, Unlike):
        raise SurgeryError(f"its forward makes a `{short}`, which can't be made from its contents alone")
    if is_container(function):
        return class_name(MAKE, function)
    holder = getattr(function, "__self__", None)
    if short == "apply" and isinstance(holder, type) and issubclass(holder, torch.autograd.Function):
        return class_name(APPLY, holder)
    raise SurgeryError(f"its forward calls `{short or function}`, which is not a tensor operation of torch")


def function_named(name: str) -> Callable[..., Any]:
    """Return the function with a name that ``function_name`` gave.

    Raises:
        LoadError: no function that an edited forward may call has it.
    """
    if name in _BUILTINS:
        return _BUILTINS[name]
    space, _, short = name.partition(":")
    found: Any = None
    if space == "ops":
        found = _operator(short)
    elif space in _NAMESPACES:
        found = _function_in(space, short)
    else:
        found = class_named(name)
    if found is None:
        raise LoadError(f"a forward in this file calls `{name}`, which is not a tensor operation of torch")
    return found  # type: ignore[no-any-return]


def _operator(name: str) -> Any:
    """Return the operator of the dispatcher with this name, ``aten.relu`` or ``aten.relu.default``; None if it may not be.

    Raises:
        LoadError: nobody has registered one in this process.
    """
    parts = name.split(".")
    if not 2 <= len(parts) <= 3 or any(part.startswith("__") for part in parts) or _FORBIDDEN & set(parts):
        return None
    qualified = f"{parts[0]}::{parts[1]}"
    if not torch._C._jit_get_schemas_for_operator(
        qualified
    ):  # `torch.ops` makes a namespace of any name it is asked for
        raise LoadError(
            f"a forward calls the operator `{qualified}`, which is not registered in this process",
            hint="import the library that registers it first",
        )
    found: Any = torch.ops
    for part in parts:
        found = getattr(found, part, None)
    return found if isinstance(found, torch._ops.OpOverload | torch._ops.OpOverloadPacket) else None


def _function_in(space: str, short: str) -> Any:
    if short in _FORBIDDEN or (short.startswith("_") and space != "torch.nn.functional"):
        return None
    found = getattr(_NAMESPACES[space], short, None)
    own = _OWN_MODULES.get(space)
    if inspect.isfunction(found):
        return found if own is None or found.__module__ in own else None
    return found if inspect.isbuiltin(found) and not short.startswith("_") else None


def is_plain_name(name: Any) -> bool:
    """Return whether source text can hold this name: Python reads some letters as others (NFKC), and so another name."""
    plain = isinstance(name, str) and name.isidentifier() and not keyword.iskeyword(name)
    return plain and unicodedata.normalize("NFKC", name) == name


def checked_keywords(kwargs: Any, kind: str, name: str) -> None:
    """Check the keywords of a call: of a submodule (``call``), a method, or a function.

    Raises:
        LoadError: one is not a name, or makes a call of what is passed.
    """
    calls_what_is_passed = kind != "call" and "key" in kwargs  # `sort(key=…)`; attention has a `key` too
    if not all(map(is_plain_name, kwargs)) or calls_what_is_passed or (kind == "method" and name == "new" and kwargs):
        raise LoadError("a forward in this file passes keywords that no operation has")


_PLAIN = (
    torch.Tensor, fx.Proxy, int, float, complex, str, type(None), torch.dtype, torch.device, torch.SymInt, torch.SymFloat,
    torch.SymBool, slice, type(...),
)  # fmt: skip


def method_named(name: Any) -> str:
    """Return the name of a method, if a forward may call it.

    Raises:
        LoadError: it may not, or there is none.
    """
    if not isinstance(name, str) or name.startswith("_") or name in _FORBIDDEN_METHODS:
        raise LoadError(f"a forward in this file calls the method `{name}`, which it must not")
    if not any(hasattr(kind, name) for kind in (torch._C.TensorBase, torch.Size, dict, list)):
        raise LoadError(f"a forward in this file calls the method `{name}`, which tensors don't have")
    return name


def checked_path(name: Any) -> str:
    """Check a dotted path: what fx writes into source text must not be able to end the text it stands in.

    Raises:
        LoadError: it is none.
    """
    parts = name.split(".") if isinstance(name, str) else [""]
    if any(part.isidentifier() and unicodedata.normalize("NFKC", part) != part for part in parts) or any(
        not part.isprintable() or not part or part.startswith("__") or set(part) & set("\"'\\") for part in parts
    ):
        raise LoadError(f"a forward in this file refers to `{name}`, which is not a submodule")
    return name  # type: ignore[no-any-return]


def parameter_named(name: Any) -> str:
    """Check the name of a parameter of a forward, with its stars.

    Raises:
        LoadError: it is none.
    """
    if not isinstance(name, str) or not is_plain_name(name.lstrip("*")):
        raise LoadError(f"a forward in this file has a parameter `{name}`, which is not a name")
    return name


def is_tensor_attribute(names: Any) -> bool:
    """Return whether this is one name of an attribute of a tensor, as text: a node's value would be known too late."""
    if len(names) != 1 or type(names[0]) is not str:
        return False
    return not names[0].startswith("_") and names[0] not in _FORBIDDEN_METHODS and hasattr(torch.Tensor, names[0])


def plain(value: Any) -> Any:
    """Return a value, if it is one that flows through a network: a tensor, a number, text, or a list, tuple or dict of such.

    What a file's modules give could also be a module, its tables, or a function, which a forward could change or call.

    Raises:
        LoadError: it is something else.
    """
    todo = [value]
    while todo:
        part = todo.pop()
        if isinstance(part, dict):
            todo.extend(part.values())
        elif isinstance(part, list | tuple):
            todo.extend(part)  # not `+=`: what is being traced would add the list to itself
        elif not isinstance(part, _PLAIN):
            raise LoadError(f"a forward in this file handles a {type(part).__name__} as a value")
    return value


def set_item(container: Any, key: Any, value: Any) -> None:
    """Call ``operator.setitem`` with nothing but values."""
    operator.setitem(container, key, plain(value))


def value_at(module: Any, path: str) -> Any:
    """Get what a path leads to through submodules; a function, which nobody may read, if it leads elsewhere."""
    *through, last = path.split(".")
    for part in through:
        module = None if hasattr(type(module), part) else vars(module)["_modules"].get(part)
        if not isinstance(module, nn.Module):
            return value_at
    state = vars(module)
    tables = (state["_modules"], state["_parameters"], state["_buffers"])
    own = next((table[last] for table in tables if last in table), value_at)
    return state.get(last, value_at if hasattr(type(module), last) else own)
