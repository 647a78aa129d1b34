"""Inputs and errors in words."""

from __future__ import annotations

import os
import traceback
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from se_inject.tracing.proxy import Untraceable


def describe(args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> str:
    """Describe inputs in words: ``1 input of 1×3×224×224``."""
    shapes = [
        ("×".join(map(str, t.shape)) or "a number") for t in tree_leaves((args, kwargs or {})) if isinstance(t, Tensor)
    ]
    return f"{len(shapes)} input{'s' * (len(shapes) != 1)} of {', '.join(shapes)}" if shapes else "no tensor at all"


def reason_of(error: Exception) -> str:
    """Convert an error to the reason why a forward can't be traced, with the author's file and line."""
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if any("torch/utils/checkpoint.py" in frame.filename for frame in traceback.extract_tb(error.__traceback__)):
        return "it uses activation checkpointing, which a graph can't hold"
    if not isinstance(error, Untraceable) and "Proxy" in str(error):
        text = "hands a value to code that can't be followed: it is no function of torch's Python interface"
    elif not isinstance(error, Untraceable):
        text = f"{type(error).__name__}: {text}"
    return f"{text} {location(error)}".strip()


def location(error: BaseException | None) -> str:
    """Return ``(file.py:12)``: the innermost line of the error that is neither in torch nor in this package."""
    ours = os.path.dirname(os.path.abspath(__file__))
    torch_files = os.path.dirname(torch.__file__)
    frames = traceback.extract_tb(error.__traceback__) if error else []
    for frame in reversed(frames):
        if not frame.filename.startswith((ours, torch_files, "<")):
            return f"({os.path.basename(frame.filename)}:{frame.lineno})"
    return ""
