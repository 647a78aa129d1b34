"""Keep blocks acting when a library changes the module that holds them: another forward on the instance, merged branches.

Where the blocks stand at what the module returns, a forward that is bound on the instance takes the place of the
author's, and the blocks act on what it returns. Where they stand within, it would pass them by: that is an error.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from se_inject.errors import SurgeryError

UNGATED = "_ungated_forward"
"""The author's forward, under which a generated class keeps it; on an instance, the forward bound instead of it."""

_MERGING = ("fuse", "merge", "reparam", "switch_to_deploy", "convert_to_deploy", "switch_to_inference")
_MOST_OBJECTS = 200
_HINT = (
    "do that to the network without blocks and put them in afterwards: `si.save_adapter(model, path)` keeps trained "
    "blocks, `si.eject_(model)` takes them out, `si.load_adapter(network, path)` puts them in again"
)


def lasting(
    original: Any, forward: Any, blocks: list[str], *, at_output: bool, methods: Iterable[Any] = ()
) -> dict[str, Any]:
    """Return the attributes of a generated class that keep its blocks acting.

    Args:
        original: the class the author wrote.
        forward: the generated one.
        blocks: the names of the blocks in it.
        at_output: whether all of them act on what the module returns.
        methods: the generated methods that hold blocks as well.
    """

    if not blocks:
        return {}
    written = {method.__name__: method for method in (forward, *methods) if method is not None}

    def __setattr__(self: Any, name: str, value: Any) -> None:
        if name not in written or _calls(self, value, written[name]):
            original.__setattr__(self, name, value)
        elif getattr(value, "__func__", None) is written[name] and value.__self__ is self:
            vars(self).pop(UNGATED, None)
            vars(self).pop(name, None)
        elif at_output and name == "forward":
            vars(self)[UNGATED] = value
        else:
            raise _lost(original, f"another {name} on the instance, {_label(value)},", blocks)

    def __delattr__(self: Any, name: str) -> None:
        original.__delattr__(self, UNGATED if name == "forward" and UNGATED in vars(self) else name)

    return {
        "__setattr__": __setattr__,
        "__delattr__": __delattr__,
        **{name: _merging(original, name, blocks, at_output=at_output) for name in _merging_names(original)},
    }


def give_back_forward_(module: nn.Module) -> None:
    """Bind the forward that the blocks were kept behind on the instance itself, as it would be without blocks."""
    if UNGATED in vars(module):
        vars(module)["forward"] = vars(module).pop(UNGATED)


def _merging_names(original: Any) -> list[str]:
    """Return the methods of a class that merge the branches of a module, judged by their names: ``fuse()`` without arguments."""
    found = []
    for name in dir(original):
        method = inspect.getattr_static(original, name, None)
        if name.startswith(_MERGING) and inspect.isfunction(method):
            parameters = list(inspect.signature(method).parameters.values())[1:]
            if all(each.default is not each.empty or each.kind in (2, 4) for each in parameters):
                found.append(name)
    return found


def _merging(original: Any, name: str, blocks: list[str], *, at_output: bool) -> Callable[..., Any]:
    function = getattr(original, name)

    @functools.wraps(function)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not at_output:
            raise _lost(original, f"`{name}`", blocks)
        result = function(self, *args, **kwargs)
        if isinstance(result, nn.Module) and result is not self:
            raise _lost(original, f"`{name}`, which returns another module,", blocks)
        return result

    return method


def _lost(original: Any, what: str, blocks: list[str]) -> SurgeryError:
    names = ", ".join(f"`{name}`" for name in blocks)
    return SurgeryError(
        f"{what} would pass by the block{'s' * (len(blocks) > 1)} {names} of a {original.__name__}", hint=_HINT
    )


def _label(value: Any) -> str:
    return f"`{getattr(value, '__qualname__', None) or type(value).__name__}`"


def _calls(module: nn.Module, value: Any, forward: Any) -> bool:
    """Return whether a callable is a wrapper of the generated forward, as far as what it holds shows."""
    if getattr(value, "__func__", None) is forward and getattr(value, "__self__", None) is module:
        return False
    is_method = isinstance(value, types.MethodType) and value.__self__ is module
    todo = [value]
    if not (is_method and getattr(type(module), value.__name__, None) is value.__func__):
        todo += [held for held in vars(module).values() if isinstance(held, types.MethodType)]
    seen: set[int] = set()
    while todo and len(seen) < _MOST_OBJECTS:
        held = todo.pop()
        if held is forward:
            return True
        if id(held) in seen or isinstance(held, nn.Module | type):
            continue
        seen.add(id(held))
        todo += _held_by(held)
    return False


def _held_by(value: Any) -> list[Any]:
    """Return what a callable may call."""
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, types.MethodType):
        return [value.__func__, value.__self__]
    held = list(vars(value).values()) if hasattr(value, "__dict__") else []
    for cell in getattr(value, "__closure__", None) or ():
        try:
            held.append(cell.cell_contents)
        except ValueError:  # not filled yet
            continue
    return [each for each in held if callable(each)]
