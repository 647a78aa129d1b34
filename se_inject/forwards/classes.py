"""Make classes whose forward is data, once for each text, and let them go when the last network of theirs has gone."""

from __future__ import annotations

import contextlib
import hashlib
import linecache
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn

_LOCK = threading.RLock()
_CLASSES: weakref.WeakValueDictionary[Any, type] = weakref.WeakValueDictionary()


def shared(key: tuple[Any, ...], make: Callable[[], type]) -> Any:
    """Return the class that was made for this key, or make it; it lives as long as somebody else holds it."""
    with _LOCK:
        found = _CLASSES.get(key)
        if found is None:
            found = _CLASSES[key] = make()
        return found


def source_name(label: str, *parts: str) -> str:
    """Return the name under which ``inspect`` and tracebacks find the text of a forward."""
    digest = hashlib.sha256("\0".join((label, *parts)).encode("utf-8", "surrogatepass")).hexdigest()
    return f"<se_inject {label} {digest[:16]}>"


def made(
    base: Any,
    name: str,
    forward: Callable[..., Any] | None,
    attributes: dict[str, Any],
    methods: Iterable[Callable[..., Any]] = (),
) -> Any:
    """Make a subclass with this forward, whose ``__init_subclass__`` is not called: it isn't a class of the author's.

    Args:
        base: the class that it inherits from.
        name: of the new class.
        forward: made by ``Writer.function``; its text is forgotten when the class is. None: the base's.
        attributes: of the class, ``__module__`` among them.
        methods: others that ``Writer.function`` made.
    """
    written = [each for each in (forward, *methods) if each is not None]
    for each in written:
        each.__qualname__ = f"{name}.{each.__name__}"
    with _unannounced(base):
        kind = type(base)(
            name,
            (base,),
            {"__qualname__": name, **attributes, **{each.__name__: each for each in written}},
        )
    for each in written:
        end = weakref.finalize(kind, linecache.cache.pop, each.__code__.co_filename, None)
        end.atexit = False
    return kind


@contextlib.contextmanager
def _unannounced(base: Any) -> Iterator[None]:
    own = base.__dict__.get("__init_subclass__")
    if own is None and base.__init_subclass__ == nn.Module.__init_subclass__:
        yield
        return
    base.__init_subclass__ = classmethod(lambda cls, **_: None)
    try:
        yield
    finally:
        if own is None:
            del base.__init_subclass__
        else:
            base.__init_subclass__ = own


def reduction(rebuild: Callable[..., nn.Module], *made_of: Any) -> Callable[..., Any]:
    """Return the ``__reduce_ex__`` of a generated class: how it is made again, and the module's state."""

    def __reduce_ex__(self: nn.Module, protocol: Any) -> Any:
        getstate = getattr(self, "__getstate__", None)
        return rebuild, made_of, getstate() if getstate else self.__dict__

    return __reduce_ex__


def addressed(name: str) -> Callable[[Any], Any]:
    """Decorate a class or function that pickles name: its address is ``se_inject.generated``, wherever it is defined."""

    def decorate(defined: Any) -> Any:
        defined.__module__, defined.__qualname__, defined.__name__ = "se_inject.generated", name, name
        return defined

    return decorate
