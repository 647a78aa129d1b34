"""Record state and put it back: a module's attributes, and the random generators."""

from __future__ import annotations

import contextlib
import random
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from se_inject.random_numbers import OwnNumbers, is_alone
from se_inject.tracing.patches import patched


def snapshot(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """Record a module's attributes, with copies of the plain lists, dicts and sets among them; hooks are in dicts too."""
    attributes = dict(module.__dict__)
    contents = {key: value.copy() if value else () for key, value in attributes.items() if type(value) in _PLAIN}
    return attributes, contents


_PLAIN = frozenset([dict, OrderedDict, list, set])  # others may run code of their own when they are copied


def restore(module: nn.Module, state: tuple[dict[str, Any], dict[str, Any]]) -> list[str]:
    """Put back what ``snapshot`` saved, and return the names of the attributes that had changed."""
    attributes, contents = state
    now = module.__dict__
    changed = [key for key, value in now.items() if key not in attributes or attributes[key] is not value]
    if changed or len(now) != len(attributes):
        now.clear()
        now.update(attributes)
    for key, content in contents.items():
        value = attributes[key]
        if len(value) != len(content) or (content and not _same_items(value, content)):
            changed.append(key)
            value.clear()
            value.extend(content) if isinstance(value, list) else value.update(content)
    return changed


def _same_items(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return all(other.get(key, other) is value for key, value in one.items())
    if isinstance(one, list):
        return all(a is b for a, b in zip(one, other, strict=True))
    return bool(one == other)


@contextlib.contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Put every module's attributes back as they were: flags, hooks, and whatever its forward stores or caches."""
    before = [(module, snapshot(module)) for module in model.modules()]
    try:
        yield
    finally:
        for module, state in before:
            restore(module, state)


def containers_in(value: Any) -> list[tuple[Any, Any]]:
    """Find the plain lists, dicts and sets in a value, at any depth, each with a copy."""
    if isinstance(value, dict):
        inside = [pair for item in value.values() for pair in containers_in(item)]
    elif isinstance(value, list | tuple):
        inside = [pair for item in value for pair in containers_in(item)]
    else:
        inside = []
    return [(value, value.copy()), *inside] if type(value) in _PLAIN else inside


def refill(containers: list[tuple[Any, Any]]) -> None:
    """Give containers the contents back that ``containers_in`` found."""
    for container, contents in containers:
        container.clear()
        container.extend(contents) if isinstance(container, list) else container.update(contents)


def random_state() -> Any:
    """Record the state of every random generator that a forward may use on the CPU."""
    return torch.get_rng_state().tolist(), *python_state()


def python_state() -> Any:
    """Record the state of Python's random generator, and of numpy's if it is there."""
    numpy = sys.modules.get("numpy")
    drawn = numpy.random.get_state() if numpy is not None else None
    listed = None if drawn is None else (drawn[0], drawn[1].tolist(), *drawn[2:])
    return random.getstate(), listed


def set_random_state(state: Any) -> None:
    """Put the generators back."""
    torch.set_rng_state(torch.tensor(state[0], dtype=torch.uint8, device="cpu"))
    set_python_state(state[1:])


def set_python_state(state: Any) -> None:
    """Put Python's and numpy's generators back."""
    random.setstate(state[0])
    if state[1] is not None:
        sys.modules["numpy"].random.set_state(state[1])


_NO_GENERATORS = frozenset([dict, OrderedDict, bool, int, float, str, set, list, tuple, type(None)])
_GENERATORS = ("Random", "RandomState", "Generator")


@contextlib.contextmanager
def draws_in_python(found: Callable[[], None]) -> Iterator[None]:
    """Call a function whenever this thread draws from Python's generators, or from NumPy's own one."""

    def called(frame: Any, event: str, function: Any) -> None:
        if event == "c_call" and _is_generator(getattr(function, "__self__", None)):
            found()

    def drawing(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        found()
        return original(*args, **kwargs)

    numpy: Any = sys.modules.get("numpy")
    before = sys.getprofile()
    with contextlib.ExitStack() as stack:
        for name, function in list(vars(numpy.random).items()) if numpy is not None else ():
            if _is_generator(getattr(function, "__self__", None)) and name not in ("seed", "get_state", "set_state"):
                stack.enter_context(patched(numpy.random, name, drawing))
        sys.setprofile(called)
        try:
            yield
        finally:
            sys.setprofile(before)


def states_of_generators(module: nn.Module) -> list[Any]:
    """Record the states of a module's own random generators of Python's and NumPy's."""
    return [
        repr(_state_of(value))
        for value in vars(module).values()
        if type(value) not in _NO_GENERATORS and _is_generator(value)
    ]


def _state_of(generator: Any) -> Any:
    if isinstance(generator, random.Random):
        return generator.getstate()
    return generator.get_state() if hasattr(generator, "get_state") else generator.bit_generator.state


def _is_generator(value: Any) -> bool:
    return type(value).__name__ in _GENERATORS and type(value).__module__.partition(".")[0] in ("random", "numpy")


def own_numbers() -> contextlib.AbstractContextManager[OwnNumbers | None]:
    """Draw from generators of this thread's own, if another thread may be drawing meanwhile; else from the process's."""
    return contextlib.nullcontext() if is_alone() else OwnNumbers(0)


def put_back(state: Any) -> None:
    """Put the generators back after what ran under ``own_numbers``; torch's too, if they were used."""
    if is_alone():
        set_random_state(state)
    elif python_state() != state[1:]:
        set_python_state(state[1:])


def drawing(again: Callable[[], Any], state: Any, own: OwnNumbers | None) -> bool:
    """Return whether a call in this thread drew random numbers; if so, put the generators back.

    Args:
        again: makes the call once more, should other threads be the ones who drew.
        state: of the generators before the call.
        own: what ``own_numbers`` gave for the call.
    """
    if own is None and random_state() == state:
        return False
    if own is not None and not own.drew:
        if python_state() == state[1:]:
            return False
        drawn: list[bool] = []
        with contextlib.suppress(Exception), OwnNumbers(0), draws_in_python(lambda: drawn.append(True)):
            again()
        if not drawn:
            return False
    put_back(state)
    return True
