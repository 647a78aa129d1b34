"""Write a network as a file that torch itself loads: TorchScript, an exported program, a pickled module."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from se_inject.atomic_files import write_through
from se_inject.exporting.capture import captured
from se_inject.exporting.dimensions import Free
from se_inject.exporting.reference import Reference, Written
from se_inject.exporting.scripting import scripted
from se_inject.forwards import Program, original_class
from se_inject.verification import Rejected, same_value


def write_scripted(reference: Reference, path: Path, free: Free) -> Written:
    """Write TorchScript compiled from the source: every branch is in it."""
    return _write_torchscript(scripted(reference.model.eval()), path, "scripted")


def write_traced(reference: Reference, path: Path, free: Free) -> Written:
    """Write TorchScript recorded from one call: a branch that depends on the input is baked in."""
    args, kwargs = reference.call(free)
    inputs: dict[str, Any] = {"example_inputs": args}
    if kwargs:  # a trace takes positions or names, not both
        inputs = {"example_kwarg_inputs": dict(reference.signature.bind(*args, **kwargs).arguments)}
    model = reference.model.eval()
    traced = torch.jit.trace(model, check_trace=False, strict=False, **inputs)  # type: ignore[no-untyped-call]
    return _write_torchscript(traced, path, "traced")


def _write_torchscript(module: Any, path: Path, how: str) -> Written:
    write_through(path, lambda file: torch.jit.save(module, file))
    note = "PyTorch has deprecated TorchScript and recommends `.pt2`"
    return Written(how, torch.jit.load(os.fspath(path)), (note,))  # type: ignore[no-untyped-call]


def write_pt2(reference: Reference, path: Path, free: Free) -> Written:
    """Write the program that `torch.export` makes."""
    reference.model.eval()
    program, notes = captured(reference, free)
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # would tell paths on this machine
    write_through(path, lambda file: torch.export.save(program, file))
    note = "for inference: `torch.export.load(path).module()` runs it, and its `.train()` raises"
    return Written("torch.export", torch.export.load(path).module(), (*notes, note))


def write_module(reference: Reference, path: Path, free: Free) -> Written:
    """Write the pickled module, with the modes it has; loaded back it must have the same modes and weights."""
    model = reference.model
    if (inner := unpicklable_within(model)) is not None:
        raise Rejected(f"a pickle can't hold {inner}")
    content = _content(model)
    write_through(path, lambda file: torch.save(content, file))
    loaded = torch.load(path, weights_only=False)  # written a moment ago, so it may be trusted
    loaded = loaded if content is model else loaded["model"]
    modes = [[(name, module.training) for name, module in net.named_modules()] for net in (model, loaded)]
    before, after = model.state_dict(), loaded.state_dict()
    same = before.keys() == after.keys() and all(same_value(before[key], after[key]) for key in before)
    if not same or modes[0] != modes[1]:
        raise Rejected("what is loaded back has other weights or modes")
    kind = original_class(model)
    code = "`se_inject`" if isinstance(model, Program) else f"the code of `{kind.__module__}.{kind.__qualname__}`"
    notes = [f"a pickle: loading it needs {code}"]
    if content is not model:
        notes.append("a checkpoint as Ultralytics' own: `YOLO(path)` opens it, where `se_inject` is installed")
    return Written("whole module", loaded.eval(), tuple(notes))


def unpicklable_within(model: torch.nn.Module) -> str | None:
    """Name the first module in a network that is TorchScript, or part of an exported program; None if there is none."""
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            return f"the TorchScript module `{path}`"
        if type(module).__module__ == "torch.export.unflatten":
            return f"`{path}`, which is a part of an exported program"
    return None


def _content(model: torch.nn.Module) -> Any:
    """Return the object to pickle: the module, or its library's wrapper of it.

    Ultralytics reads checkpoints, and takes of a bare module its layers alone.
    """
    if not any(kind.__module__.startswith("ultralytics.") for kind in type(model).__mro__):
        return model
    args = getattr(model, "args", None) or {}
    return {
        "epoch": -1,  # no training is to be resumed
        "best_fitness": None,
        "model": model,
        "ema": None,
        "updates": None,
        "optimizer": None,
        "train_args": dict(args) if isinstance(args, dict) else dict(vars(args)),
    }
