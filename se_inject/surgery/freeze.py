"""Batch normalisation whose statistics stay as they are, in training too."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from se_inject.forwards import Program, rebuild


@functools.cache
def _frozen_class(original: Any) -> Any:
    """The subclass of a batch normalisation that stays in eval mode, whatever mode is asked for."""

    def train(self: Any, mode: bool = True) -> Any:
        return original.train(self, False)

    def __reduce_ex__(self: nn.Module, protocol: Any) -> Any:
        getstate = getattr(self, "__getstate__", None)
        body = vars(original).get("_se_inject_body")  # it holds a block itself
        made_of = (original,) if body is None else (original._se_inject_original, body)
        return rebuild_frozen, made_of, getstate() if getstate else self.__dict__

    attributes = {
        "__module__": original.__module__,
        "__qualname__": f"Frozen{original.__name__}",
        "__doc__": original.__doc__,
        "__reduce_ex__": __reduce_ex__,
        "train": train,
        "_se_inject_thawed": original,
    }
    return type(original)(f"Frozen{original.__name__}", (original,), attributes)


def rebuild_frozen(original: Any, body: Any = None) -> nn.Module:
    """What a pickle calls: an empty module of the frozen class, with an edited forward if there is one."""
    if not (isinstance(original, type) and issubclass(original, (_BatchNorm, Program))):
        raise TypeError("only a batch normalisation can be frozen")
    kind: Any = original if body is None else type(rebuild(original, body))
    frozen = _frozen_class(kind)
    return frozen.__new__(frozen)  # type: ignore[no-any-return]


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
        module.__class__ = type(module).__dict__["_se_inject_thawed"]
        module.train(mode)


def class_when_thawed(module: nn.Module) -> Any:
    """The class that a module has, or will have again."""
    return vars(type(module)).get("_se_inject_thawed", type(module))


def is_frozen(module: nn.Module) -> bool:
    """Whether these are frozen statistics of ours."""
    return "_se_inject_thawed" in type(module).__dict__
