"""Find blocks whose value is computed in a method that users may call by itself, and in which the block does not act."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterable
from types import CodeType
from typing import Any

from torch import nn

from se_inject.errors import SurgeryError
from se_inject.forwards import bodies_in, body_of, original_class
from se_inject.surgery.edit import Edited, calls_with, new_bodies
from se_inject.surgery.step import Step
from se_inject.tables import counted
from se_inject.tracing import Trace


def method_notes(trace: Trace, model: nn.Module, steps: Iterable[Step]) -> list[str]:
    """Return a note for every method that computes values which get a block, that anybody can call, and that stays as it is.

    Found by what was observed, and by the submodules that the code of ``forward`` and of its methods names.

    Args:
        trace: an observed call of the network without the blocks.
        model: the network, with the blocks or without.
        steps: what is put where.
    """
    steps = list(steps)
    found: dict[tuple[str, str], list[str]] = {}
    passed: dict[str, list[str]] = {}
    for step in steps:
        owner = model.get_submodule(step.owner)
        names, within = calls_with(trace, step.owner, step.value)
        if within:
            passed.setdefault(within, []).append(step.path)
        if step.value is not None:
            names += _methods_with(original_class(owner), step.value.partition(".")[0])
            if not within and (inner := _passed_by(owner, step.value)):
                passed.setdefault(".".join(filter(None, (step.owner, inner))), []).append(step.path)
        for name in dict.fromkeys(names):
            found.setdefault((step.owner, name), []).append(step.path)
    edited = {path: _edited(trace, model, path, steps) for path in {path for path, _ in found}}
    notes = [
        f"called by itself, `{place}` runs without {_blocks(paths)}: the forward of the module that holds it computes what is gated"
        + _instead(model, place)
        for place, paths in passed.items()
    ]
    for (place, name), paths in found.items():
        bodies, inlined = edited[place]
        whose = f"`{place}.{name}`" if place else f"`{name}`"
        if name in bodies and (fixed := _fixed_arguments(bodies[name])):
            notes.append(
                f"{whose} has {_blocks(paths)} for the {fixed} that `forward` calls it with; called with others it raises"
            )
        if name not in bodies:
            why = f" ({inlined[name]})" if name in inlined else ""
            notes.append(
                f"called by itself, {whose} runs without {_blocks(paths)}: the blocks act in `forward`, which calls it{why}"
            )
    return notes


def _edited(trace: Trace, model: nn.Module, path: str, steps: list[Step]) -> Edited:
    """Return the bodies of an owner with these blocks: those that it has, or will have."""
    body = body_of(model.get_submodule(path))
    earlier = [Step.from_data(step) for step in body["steps"]] if body else []
    own = [step for step in steps if step.owner == path]
    if body is not None and {step.block_name for step in own} <= {step.block_name for step in earlier}:
        return Edited(bodies_in(body), {})
    try:
        return new_bodies(trace, path, earlier, own)
    except SurgeryError:
        return Edited({}, {})


def _instead(model: nn.Module, place: str) -> str:
    """Return how a module whose method can't hold the blocks of its caller can have them: as a network by itself."""
    path = place.rpartition(".")[0]
    if place in dict(model.named_modules()) or not path:
        return ""
    has_forward = original_class(model.get_submodule(path)).forward is not nn.Module.forward
    return f"; a plan for `{path}` as a network by itself has them in its methods" if has_forward else ""


def _fixed_arguments(lines: list[Any]) -> str:
    """Return the names of the arguments that a body's lines expect to be as they were observed; empty if there are none."""
    return ", ".join(f"`{line[2]}`" for line in lines if line[:2] == ["expect", "argument"])


def _blocks(paths: list[str]) -> str:
    return f"`{paths[0]}`" + (f" and {counted(len(paths) - 1, 'more block')}" if len(paths) > 1 else "")


def _passed_by(owner: nn.Module, value: str) -> str | None:
    """Return the submodule of an author's class into which an owner's forward reaches for a value (``net.layer1``)."""
    names = value.partition("#")[0].split(".")[:-1]
    for count in range(len(names), 0, -1):
        path = ".".join(names[:count])
        with contextlib.suppress(AttributeError):
            module = owner.get_submodule(path)
            if not type(module).__module__.startswith("torch."):
                return path
    return None


def _methods_with(kind: Any, child: str) -> list[str]:
    """Return the public methods by which ``forward`` reaches a submodule that it does not mention itself."""
    mentioned = _mentioned(kind.forward)
    if child in mentioned:
        return []
    found, seen, todo = [], {"forward"}, sorted(mentioned)
    while todo:
        name = todo.pop()
        method = inspect.getattr_static(kind, name, None)
        if name in seen or not inspect.isfunction(method) or hasattr(nn.Module, name):
            continue
        seen.add(name)
        within = _mentioned(method)
        todo += sorted(within)
        if not name.startswith("_") and (child in within or any(child in _mentioned_by(kind, each) for each in within)):
            found.append(name)
    return sorted(found)


def _mentioned_by(kind: Any, name: str) -> set[str]:
    method = inspect.getattr_static(kind, name, None)
    return _mentioned(method) if inspect.isfunction(method) and not hasattr(nn.Module, name) else set()


def _mentioned(function: Any) -> set[str]:
    """Return the attribute names and texts in the code of a function, functions within it too."""
    names: set[str] = set()
    code = getattr(inspect.unwrap(function), "__code__", None)
    todo = [code] if code is not None else []
    while todo:
        code = todo.pop()
        names |= {*code.co_names, *(text for text in code.co_consts if isinstance(text, str))}
        todo += [each for each in code.co_consts if isinstance(each, CodeType)]
    return names
