"""Check that methods that hold blocks compute by themselves what they compute within ``forward``."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from se_inject.forwards import all_lines, bodies_in, body_of
from se_inject.tables import counted
from se_inject.tracing import copied
from se_inject.verification.calls import difference, first_line, run
from se_inject.verification.verdicts import Check
from se_inject.verification.watching import calls_of

_Method = tuple[str, str]
"""The path of a module and the name of its method."""


def methods_with_blocks(after: nn.Module, blocks: dict[str, nn.Module], inputs: Any) -> list[Check]:
    """Call every method that holds blocks by itself, on the arguments that ``forward`` gives it.

    Args:
        after: the injected network; methods are bound on it meanwhile.
        blocks: those to look for, by path.
        inputs: of the network.

    Returns:
        one check; none if no method holds a block.
    """
    held = held_in(after, blocks)
    if not held:
        return []
    try:
        with torch.no_grad(), _recorded(after, held) as calls:
            wrong = run(after, inputs, "eval", then=lambda _: _difference(after, held, calls)).output
    except Exception as error:
        wrong = f"{type(error).__name__}: {first_line(error)}"
    text = ", ".join(f"{_label(method)} {counted(len(paths), 'block')}" for method, paths in held.items())
    return [Check("methods hold the blocks", not wrong, wrong or text)]


def held_in(after: nn.Module, blocks: dict[str, nn.Module]) -> dict[_Method, set[str]]:
    """Find the paths of the blocks that each method calls, itself or by other methods.

    Args:
        after: the injected network.
        blocks: those to look for, by path.
    """
    found: dict[_Method, set[str]] = {}
    for path, module in after.named_modules():
        bodies = bodies_in(body) if (body := body_of(module)) is not None else {}
        prefix = f"{path}." if path else ""
        for name in bodies.keys() - {"forward"}:
            todo, seen, inside = [name], set(), set()
            while todo:
                each = todo.pop()
                seen.add(each)
                for kind, *parts in all_lines(bodies[each]):
                    if kind == "own" and parts[1] in bodies and parts[1] not in seen:
                        todo.append(parts[1])
                    elif kind == "call" and prefix + parts[1] in blocks:
                        inside.add(prefix + parts[1])
            if inside:
                found[path, name] = inside
    return dict(sorted(found.items()))


@contextlib.contextmanager
def _recorded(after: nn.Module, held: dict[_Method, set[str]]) -> Iterator[dict[_Method, tuple[Any, Any, Any]]]:
    """Record arguments and result of each method's first call."""
    calls: dict[_Method, tuple[Any, Any, Any]] = {}
    bound = [(after.get_submodule(path), name) for path, name in held]
    before = [dict(vars(module)) for module, _ in bound]

    def bind(module: nn.Module, key: _Method) -> None:
        method = getattr(module, key[1])

        def recording(self: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
            given = copied((args, kwargs))
            result = method(*args, **kwargs)
            calls.setdefault(key, (*given, copied((result,))[0]))
            return result

        vars(module)[key[1]] = types.MethodType(recording, module)

    for (module, _), key in zip(bound, held, strict=True):
        bind(module, key)
    try:
        yield calls
    finally:
        for (module, name), attributes in zip(reversed(bound), reversed(before), strict=True):
            vars(module).pop(name, None)
            vars(module).update({name: attributes[name]} if name in attributes else {})


def _difference(after: nn.Module, held: dict[_Method, set[str]], calls: dict[_Method, tuple[Any, Any, Any]]) -> str:
    """Say what is wrong with a method that is called by itself; an empty text if nothing is."""
    for (path, name), inside in held.items():
        if (path, name) not in calls:
            return f"{_label((path, name))} is not called by `forward`"
        args, kwargs, expected = calls[path, name]
        method = getattr(after.get_submodule(path), name)
        with calls_of(after, {block: after.get_submodule(block) for block in inside}) as seen:
            result = method(*copied(args), **copied(kwargs))
        if missing := [block for block in sorted(inside) if not seen[block]]:
            return f"{_label((path, name))} does not call `{missing[0]}`"
        different = difference(expected, result)
        if different and not difference(result, method(*args, **kwargs)):  # else it draws random numbers
            return f"{_label((path, name))} by itself {different}"
    return ""


def _label(method: _Method) -> str:
    return f"`{'.'.join(filter(None, method))}`"
