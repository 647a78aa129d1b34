"""Check that modules out of a file hold the state of a network, and nothing that changes what their classes do.

A pickle sets attributes as it likes, so an instance could bring a ``forward`` of its own, a hook, or a tree that
unfolds without end. No network that torch, torchvision or timm makes has any of these.
"""

from __future__ import annotations

import functools
import pickle
import types
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from se_inject.errors import LoadError, quoted
from se_inject.forwards import check_blocks, check_forward
from se_inject.loading.operators import check_vocabulary
from se_inject.loading.pickles.allowlist import within
from se_inject.loading.pickles.layers import check_layer, type_fault
from se_inject.loading.pickles.reading import Placeholder, Reading
from se_inject.loading.pickles.values import ValueChecks

MOST_PATHS = 100_000
"""Submodules and their tensors, counted once for each path that leads to them."""

DEEPEST = 100
_QUOTES = frozenset("\"'\\")
_LARGEST_INPUT = 10_000
"""Of the sides of the input that a network says it takes."""

_TABLES: dict[str, type] = {"_modules": nn.Module, "_parameters": nn.Parameter, "_buffers": torch.Tensor}
_HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks",
    "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
)  # fmt: skip


def check_modules(reading: Reading) -> None:
    """Look at every module that a file made.

    Raises:
        LoadError: one holds what no network does.
        UnpicklingError: together they are not the tree of one network.
    """
    seen: set[tuple[str, int, bool]] = set()  # many modules may share a table
    for module in reading.modules:
        state = vars(module)
        state.pop("__overloads__", None)  # torch.jit.script leaves it behind, and makes it anew
        is_placeholder = type(module) is Placeholder
        for name, kind in _TABLES.items():
            values = state.get(name)
            if (name, id(values), is_placeholder) in seen:
                continue
            if not isinstance(values, dict) or not all(v is None or isinstance(v, kind) for v in values.values()):
                raise pickle.UnpicklingError(f"a {type(module).__name__} whose {name} are none")
            _check_names(values, _QUOTES | {"."})
            seen.add((name, id(values), is_placeholder))
        if not is_placeholder:
            _check_names(state)
    _check_tree(reading.modules)
    checked: set[tuple[type, int]] = set()
    values = ValueChecks(reading.trust)
    for module in reading.modules:
        try:
            _check_one(module, reading.trust, values, checked)
        except LoadError as error:
            place = _place_of(module, reading.modules)
            raise type(error)(
                error.message, seen=f"{error.seen}; {place}" if error.seen else place, hint=error.hint
            ) from error


def _check_one(module: nn.Module, trust: Sequence[str], values: ValueChecks, checked: set[tuple[type, int]]) -> None:
    kind, state = type(module), vars(module)
    if kind is not Placeholder and not within(kind.__module__, trust):
        _check_attributes(module, state)
        _check_twice(kind, state)
        for table in (state[name] for name in _TABLES):
            if (kind, id(table)) not in checked:
                checked.add((kind, id(table)))
                _check_parts(kind, table)
        values.check(module, {name: value for name, value in state.items() if name not in _TABLES})
        check_layer(module)
        _check_config(module, state)
    check_forward(module, trusted=bool(trust))
    check_blocks(module, trust)
    if not trust:
        check_vocabulary(module)


def _place_of(module: nn.Module, modules: list[nn.Module]) -> str:
    """Describe the place of a module in its network, for an error."""
    owners = {id(vars(owner)["_modules"]): owner for owner in modules}  # many may share a table
    parents = {id(child): (owner, name) for owner in owners.values() for name, child in vars(owner)["_modules"].items()}
    path: list[str] = []
    while id(module) in parents and len(path) < DEEPEST:
        module, name = parents[id(module)]
        path.insert(0, name)
    return f"it is `{'.'.join(path)}`" if path else "it is the network itself"


def _check_config(module: nn.Module, state: dict[str, Any]) -> None:
    """Check the input sizes that timm writes on its networks, since a network is run on those."""
    for name in ("pretrained_cfg", "default_cfg"):
        config = state.get(name)
        size = config.get("input_size") if isinstance(config, dict) else None
        is_size = (
            isinstance(size, tuple | list)
            and len(size) == 3
            and all(type(n) is int and 0 < n <= _LARGEST_INPUT for n in size)
        )
        if not (config is None or isinstance(config, dict)) or not (size is None or is_size):
            shown = f"{quoted(config)}" if size is None else f"an input of size {quoted(size)}"
            raise LoadError(f"a {type(module).__name__} in this file has a `{name}` that can't be right", seen=shown)


def holds_placeholder(model: nn.Module) -> bool:
    """Return whether a model holds a placeholder for something that was refused. Other objects in its file don't matter."""
    todo: list[Any] = [model]
    seen: set[int] = set()
    while todo:
        part = todo.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        if isinstance(part, Placeholder):
            return True
        if isinstance(part, dict):
            todo += [*part.keys(), *part.values()]
        elif isinstance(part, list | tuple | set | frozenset):
            todo += part
        elif isinstance(part, functools.partial):
            todo += [part.func, part.args, part.keywords]
        elif isinstance(part, types.MethodType):
            todo.append(part.__self__)
        elif not isinstance(part, type):
            todo.append(getattr(part, "__dict__", None))
    return False


def _check_names(names: Any, forbidden: frozenset[str] = _QUOTES) -> None:
    """Check that attributes that torch.fx writes into source text are plain names."""
    for name in names:
        if not isinstance(name, str) or not name or not name.isprintable() or forbidden.intersection(name):
            raise LoadError("a module in this file has an attribute that is not a name", seen=quoted(name))


_OVERWRITTEN = {"type": str}
"""Methods that nothing calls and that networks have something else for: YOLO's parsers write each layer's kind on it."""


def _check_attributes(module: nn.Module, state: dict[str, Any]) -> None:
    kind = type(module)
    for name in state:
        of_class = getattr(kind, name, None)
        is_own = name.startswith("forward") and _is_bound(state[name], module)  # timm's FasterNet chooses between two
        is_own = is_own or type(state[name]) is _OVERWRITTEN.get(name)
        if name.startswith("__") or (callable(of_class) and not is_own) or isinstance(of_class, property):
            raise LoadError(
                f"a {kind.__name__} in this file has a `{name[:100]}` of its own", seen="its class defines that"
            )
    if isinstance(module, nn.DataParallel) and not isinstance(state["_modules"].get("module"), nn.Module):
        raise LoadError("a DataParallel in this file has no network")
    for name in _HOOKS:
        if state.get(name):
            raise LoadError(f"a {kind.__name__} in this file has hooks", hint="remove them and save it again")
    if state.get("_compiled_call_impl") is not None:
        raise LoadError(f"a {kind.__name__} in this file is compiled", hint="save it uncompiled")


def _check_parts(kind: type, table: dict[str, Any]) -> None:
    """Refuse a part that has the name of a class attribute (Python would find that one instead), or numbers that nobody can use."""
    for name, value in table.items():
        if name.startswith("__") or getattr(kind, name, None) is not None:
            raise LoadError(
                f"a {kind.__name__} in this file has a part called `{name[:100]}`", seen="its class defines that"
            )
        if fault := type_fault(value):
            raise LoadError(f"a {kind.__name__} in this file can't be right", seen=f"its `{name[:100]}` holds {fault}")


def _check_twice(kind: type, state: dict[str, Any]) -> None:
    """Refuse a part that has the name of an attribute, or of another part: Python would find the one, torch the other."""
    known = set(state)
    for table in (state[name] for name in _TABLES):
        if both := known & table.keys():
            raise LoadError(f"a {kind.__name__} in this file has two parts called `{min(both)[:100]}`")
        known |= table.keys()


def _is_bound(value: Any, module: nn.Module) -> bool:
    return isinstance(value, types.MethodType) and value.__self__ is module


def _check_tree(modules: list[nn.Module]) -> None:
    """Count what ``state_dict`` will visit, which follows every path; without recursion, each table of children once."""
    paths: dict[int, int] = {}
    depth: dict[int, int] = {}
    for root in modules:
        todo = [(vars(root)["_modules"], False)]
        open_ones: set[int] = set()
        while todo:
            table, is_done = todo.pop()
            key = id(table)
            if key in paths:
                continue
            children = [vars(child) for child in table.values() if child is not None]
            below = [child["_modules"] for child in children]
            if is_done:
                open_ones.discard(key)
                tensors = sum(len(child["_parameters"]) + len(child["_buffers"]) for child in children)
                paths[key] = len(table) + tensors + sum(paths[id(child)] for child in below)
                depth[key] = 1 + max((depth[id(child)] for child in below), default=0)
                if paths[key] > MOST_PATHS or depth[key] > DEEPEST:
                    raise pickle.UnpicklingError("modules within modules without end")
            elif key in open_ones:
                raise pickle.UnpicklingError("a module within itself")
            else:
                open_ones.add(key)
                todo.append((table, True))
                todo += [(child, False) for child in below if id(child) not in paths]
