"""Keep the statistics of batch normalisation as they are, in training too."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from se_inject.forwards import (
    THAWED,
    Program,
    addressed,
    checked_class,
    class_when_thawed,
    is_frozen,
    made_from,
    reduction,
    shared,
)


def _frozen_class(original: Any) -> Any:
    """Return the subclass of a batch normalisation that stays in eval mode, whatever mode is asked for."""
    return shared(("frozen", original), lambda: _made(original))


def _made(original: Any) -> type:
    def train(self: Any, mode: bool = True) -> Any:
        return original.train(self, False)

    attributes = {
        "__module__": original.__module__,
        "__qualname__": f"Frozen{original.__name__}",
        "__doc__": original.__doc__,
        "__reduce_ex__": reduction(frozen, *made_from(original)),
        "train": train,
        THAWED: original,
    }
    return type(original)(f"Frozen{original.__name__}", (original,), attributes)  # type: ignore[no-any-return]


@addressed("frozen")
def frozen(original: Any, body: Any = None) -> nn.Module:
    """Make an empty module of the frozen class, with an edited forward if there is one; a pickle calls this.

    Raises:
        TypeError: it isn't a batch normalisation.
        LoadError: the edited forward is not what this package writes.
    """
    if not (isinstance(original, type) and issubclass(original, (_BatchNorm, Program))):
        raise TypeError("only a batch normalisation can be frozen")
    kind = _frozen_class(original if body is None else checked_class(original, body))
    return kind.__new__(kind)  # type: ignore[no-any-return]


def freeze_statistics_(module: nn.Module) -> None:
    """Put a batch normalisation into eval mode for good; other modules, and frozen ones, are left as they are."""
    of_program = isinstance(module, Program) and module._buffers.get("running_mean") is not None
    if (isinstance(module, _BatchNorm) or of_program) and not is_frozen(module):
        original: Any = type(module)
        module.__class__ = _frozen_class(original)
        module.train(False)


def thaw_statistics_(module: nn.Module, mode: bool) -> None:
    """Give a frozen batch normalisation its own class again, and this mode; others are left as they are."""
    if is_frozen(module):
        module.__class__ = class_when_thawed(module)
        module.train(mode)
