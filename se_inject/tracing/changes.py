"""Show an author's containers what a child put into the copies that it was given."""

from __future__ import annotations

from typing import Any

from se_inject.tracing.proxy import Untraceable, contents_of, is_proxy


class Changed:
    """Stands in an author's container for what a child put there: the graph has no name for it, so no use is let pass."""

    def __init__(self, path: str) -> None:
        self._path = path

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise Untraceable(f"uses what `{self._path}` put into a container that it was given")

    __getattr__ = __call__ = __bool__ = __len__ = __iter__ = __hash__ = __eq__ = __getitem__ = _refuse  # type: ignore[assignment]
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __index__ = __float__ = _refuse

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise Untraceable("uses what a child put into a container that it was given")


def reflect(author: Any, given: Any, before: Any, path: str) -> None:
    """Let an author's containers show that a child changed the copies it was given.

    Args:
        author: arguments of a call.
        given: their copies, after the call.
        before: ``contents_of`` the copies before it.
        path: of the child.

    Raises:
        Untraceable: a set was changed.
    """
    if is_proxy(author) or contents_of(given) == before:
        return
    if isinstance(author, dict):
        known = dict(before)
        for key in [key for key in author if key not in given]:
            del author[key]
        for key, item in given.items():
            if key not in author or contents_of(item) != known[key]:
                _reflect_item(author, key, item, known.get(key), path)
    elif isinstance(author, list):
        del author[len(given) :]
        for index, item in enumerate(given):
            if index >= len(author):
                author.append(Changed(path))
            elif contents_of(item) != before[index]:
                _reflect_item(author, index, item, before[index], path)
    elif isinstance(author, tuple):
        for own, item, old in zip(author, given, before, strict=True):
            reflect(own, item, old, path)
    else:
        raise Untraceable(f"passes a {type(author).__name__} to `{path}`, which changes it")


def _reflect_item(author: Any, key: Any, item: Any, before: Any, path: str) -> None:
    known = author[key] if isinstance(author, list) or key in author else None
    if isinstance(known, list | dict | tuple) and type(known) is type(item):
        reflect(known, item, before, path)
    else:
        author[key] = Changed(path)
