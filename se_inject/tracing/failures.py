"""Describe inputs and errors in words."""

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
    """Convert an error to the reason why a forward can't be traced, with the author's file and line.

    An error that isn't ours came from code that was given a proxy: its text would mislead, the author's line doesn't.
    """
    if any("torch/utils/checkpoint.py" in frame.filename for frame in traceback.extract_tb(error.__traceback__)):
        return "it uses activation checkpointing, which a graph can't hold"
    frame = _author_frame(error)
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if not isinstance(error, Untraceable):
        line = frame.line if frame is not None else ""
        text = (
            f"a graph can't hold what `{line}` does"
            if line
            else f"a graph can't hold what it does: {type(error).__name__}"
        )
    return f"{text} {location(error)}".strip()


def location(error: BaseException | None) -> str:
    """Return ``(file.py:12)``: the innermost line of the error that is neither in torch nor in this package."""
    frame = _author_frame(error)
    return f"({os.path.basename(frame.filename)}:{frame.lineno})" if frame is not None else ""


def _author_frame(error: BaseException | None) -> traceback.FrameSummary | None:
    """Find the innermost frame of an error in code that is neither Python's, torch's nor this package's."""
    others = (
        os.path.dirname(os.path.abspath(__file__)),
        os.path.dirname(torch.__file__),
        os.path.dirname(os.__file__),
        "<",
    )
    frames = traceback.extract_tb(error.__traceback__) if error else []
    authors = [frame for frame in frames if not frame.filename.startswith(others) or "site-packages" in frame.filename]
    authors = [frame for frame in authors if not frame.filename.startswith(others[:2])]
    return authors[-1] if authors else None
