"""Report every call of a twin's modules, and every read of their tensors and settings, to an observer.

Nothing of torch is patched for this. ``nn.Module`` calls ``_compiled_call_impl`` where a module has one, which is how
``module.compile()`` works; and it looks an attribute that is not in ``__dict__`` up in ``_parameters``, which here is a
dict that answers.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from se_inject.tracing.patches import patched
from se_inject.tracing.proxy import Untraceable

if TYPE_CHECKING:
    from se_inject.tracing.observer import Observer


class Watch:
    """A twin that reports calls and reads to its observer, and the paths of its modules.

    Args:
        model: the network.
        twin: of it, in eval mode, and nobody else's; its modules' mode, parameters and buffers are hidden behind the watch.

    Attributes:
        observer: receives the calls and reads; None: the twin is called like any network.
        paths: id of a module of the twin → its path, the first one of several.
        aliases: path of a module → its other paths.
        originals: path of a module → the network's own.
    """

    def __init__(self, model: nn.Module, twin: nn.Module) -> None:
        self.model = model
        self.twin = twin
        self.observer: Observer | None = None
        self.originals = dict(model.named_modules())
        self.paths: dict[int, str] = {}
        self.aliases: dict[str, list[str]] = {}
        call = self._call
        for path, module in twin.named_modules(remove_duplicate=False):
            known = self.paths.setdefault(id(module), path)
            if known != path:
                self.aliases.setdefault(known, []).append(path)
            else:
                module.__dict__["_compiled_call_impl"] = functools.partial(call, module)
                self._hide(module)

    def _hide(self, module: nn.Module) -> None:
        if isinstance(module, torch.jit.ScriptModule):
            return
        attributes = module.__dict__
        hidden = {} if attributes.pop("training", None) is None else {"training": False}
        attributes["_parameters"] = WatchedTensors(module._parameters, module, self, hidden)
        attributes["_buffers"] = WatchedTensors(module._buffers, module, self, {})

    def _call(self, module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        """Run when a module is called, in place of its call."""
        if self.observer is None:
            return plain_call(module, args, kwargs)
        return self.observer.called(module, args, kwargs)

    def relative_path(self, module: nn.Module, root: str) -> str | None:
        """Return the path of one of the twin's modules from another, which is at ``root``; None if it is not within that."""
        path = self.paths.get(id(module))
        if path is None or path == root:
            return None if path is None else ""
        if not root:
            return path
        for name in (path, *self.aliases.get(path, ())):
            if name.startswith(root + "."):
                return str(name[len(root) + 1 :])
        return None


def plain_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a module with its hooks, as torch does."""
    return module._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]


class WatchedTensors(dict[str, Any]):
    """A module's parameters or buffers. The former also answer for attributes that are hidden from ``__dict__``.

    Args:
        tensors: by name.
        module: whose.
        watch: where reads go.
        hidden: attributes of which every read is to be noticed, and their values.
    """

    __slots__ = ("hidden", "module", "watch")

    def __init__(self, tensors: dict[str, Any], module: nn.Module, watch: Watch, hidden: dict[str, Any]) -> None:
        super().__init__(tensors)
        self.module = module
        self.watch = watch
        self.hidden = hidden

    def __contains__(self, name: object) -> bool:
        if dict.__contains__(self, name):
            return True
        if name not in self.hidden:
            return False
        asking = sys._getframe(1).f_code
        if asking is _STORES and self.watch.observer is not None and self.watch.observer.tracer is not None:
            raise Untraceable(f"stores into `{name}` of a {type(self.module).__name__}")
        return asking is _READS

    def __getitem__(self, name: str) -> Any:
        observer = self.watch.observer
        if not dict.__contains__(self, name) and name in self.hidden:
            return self.hidden[name] if observer is None else observer.setting(self.module, name, self.hidden[name])
        value = dict.__getitem__(self, name)
        if value is None or observer is None or observer.tracer is None:
            return value
        return observer.tracer.attribute(self.module, name, value)

    def __setitem__(self, name: str, value: Any) -> None:
        if self.watch.observer is not None and self.watch.observer.tracer is not None:
            raise Untraceable(f"stores into `{name}` of a {type(self.module).__name__}")
        dict.__setitem__(self, name, value)


_READS = nn.Module.__getattr__.__code__
_STORES = nn.Module.__setattr__.__code__


@contextlib.contextmanager
def observing(watch: Watch, observer: Observer) -> Iterator[None]:
    """Let an observer see what the twin does, and this thread's questions for the grad and autocast modes."""

    def is_grad_enabled(original: Any) -> Any:
        if observer.tracer is not None:
            raise Untraceable("asks for the grad mode, or changes it")
        return original()

    def enter_autocast(original: Any, context: Any) -> Any:
        if observer.tracer is not None:
            raise Untraceable("changes the autocast mode")
        return original(context)

    watch.observer = observer
    try:
        with (
            patched(torch, "is_grad_enabled", is_grad_enabled),
            patched(torch.autocast, "__enter__", enter_autocast),
        ):
            yield
    finally:
        watch.observer = None
