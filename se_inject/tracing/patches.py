"""Patch Python and torch while a thread observes, with effect in that thread alone.

Several threads may observe at the same time: a patch is made when the first one starts and undone when the last one is
done, whichever that is.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

_lock = threading.RLock()
_here = threading.local()
_used: dict[tuple[int, str], list[Any]] = {}
"""For each patched attribute: how many use the patch, the patch, and the original."""


def _depth() -> int:
    return getattr(_here, "quiet", 0)


class _Here:
    """The pattern of a warnings filter that holds for the messages of observing threads."""

    def match(self, text: str) -> bool:
        return _depth() > 0


_FILTER: Any = ("ignore", _Here(), Warning, None, 0)
_quiet_threads = 0


def _drop(record: logging.LogRecord) -> bool:
    return _depth() == 0


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Ignore this thread's warnings, and what torch logs about fake tensors."""
    global _quiet_threads
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    with _lock:
        _quiet_threads += 1
        if _FILTER not in warnings.filters:
            warnings.filters.insert(0, _FILTER)  # type: ignore[attr-defined]
            _filters_changed()
        logger.addFilter(_drop)
    _here.quiet = _depth() + 1
    try:
        yield
    finally:
        _here.quiet -= 1
        with _lock:
            _quiet_threads -= 1
            if not _quiet_threads:
                with contextlib.suppress(ValueError):
                    warnings.filters.remove(_FILTER)  # type: ignore[attr-defined]
                    _filters_changed()
                logger.removeFilter(_drop)


def _filters_changed() -> None:
    """Let Python forget which warnings its filters let through."""
    changed = getattr(warnings, "_filters_mutated", None) or getattr(warnings, "_filters_mutated_lock_held", None)
    if changed is not None:
        changed()


@contextlib.contextmanager
def patched(owner: Any, name: str, replacement: Callable[..., Any]) -> Iterator[None]:
    """Let this thread's calls of ``owner.name`` go to ``replacement(original, *args, **kwargs)``.

    Calls within the replacement, and those of other threads, go to the original.
    """
    key = (place_of(owner), name)
    active: dict[Any, list[Callable[..., Any]]] = _here.__dict__.setdefault("active", {})
    with _lock:
        if key not in _used:
            own = name in vars(owner)
            original = inspect.getattr_static(owner, name)
            patch = _dispatching(key, getattr(owner, name), is_static=isinstance(original, staticmethod))
            _used[key] = [0, patch, original, own]
            setattr(owner, name, patch)
        _used[key][0] += 1
    active.setdefault(key, []).append(replacement)
    try:
        yield
    finally:
        active[key].pop()
        with _lock:
            _used[key][0] -= 1
            if not _used[key][0]:
                _, patch, original, own = _used.pop(key)
                if inspect.getattr_static(owner, name) is patch:  # or somebody has patched it since
                    if own:
                        setattr(owner, name, original)
                    else:
                        delattr(owner, name)


def place_of(owner: Any) -> int:
    """Return a number for where an owner's attributes are: two objects that share them have the same."""
    held = getattr(owner, "__dict__", None)
    return id(held) if type(held) is dict else id(owner)


def _dispatching(key: tuple[int, str], original: Callable[..., Any], *, is_static: bool) -> Any:
    def dispatch(*args: Any, **kwargs: Any) -> Any:
        replacements = getattr(_here, "active", {}).get(key)
        if not replacements:
            return original(*args, **kwargs)
        replacement = replacements.pop()
        try:
            return replacement(original, *args, **kwargs)
        finally:
            replacements.append(replacement)

    return staticmethod(dispatch) if is_static else dispatch
