"""Report in a few words what is being done right now, to whoever wants to show it: a spinner, a message about a failure."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

_state = threading.local()


def step(text: str) -> None:
    """Say what is done from here on: "verifying", "exporting x.onnx". Does nothing if nobody listens.

    Args:
        text: a present participle and its object, without a full stop.
    """
    _state.current = text
    listener = getattr(_state, "listener", None)
    if listener is not None:
        listener(text)


def current_step() -> str | None:
    """Return the step that this thread reported last."""
    return getattr(_state, "current", None)


@contextlib.contextmanager
def listening(listener: Callable[[str], None]) -> Iterator[None]:
    """Call this function at each step of this thread while the block runs."""
    before = getattr(_state, "listener", None)
    _state.listener = listener
    try:
        yield
    finally:
        _state.listener = before
