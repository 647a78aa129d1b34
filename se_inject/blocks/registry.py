"""The registry in which blocks are found by name, and the options that each takes."""

from __future__ import annotations

import functools
import importlib.metadata
import inspect
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from se_inject.blocks.squeeze_excitation import SqueezeExcitation
from se_inject.errors import OptionError, PluginError
from se_inject.user_code import did_you_mean, named

GROUP = "se_inject.blocks"
"""The entry-point group in which packages announce their blocks."""
FILLED_IN = ("rank", "size")
"""Parameters of a block that it gets from its site: number of spatial dimensions, and the spatial size."""
_LARGEST = 2**31
Factory = Callable[..., nn.Module]
_registered: dict[str, Factory] = {"se": SqueezeExcitation}
_imported: dict[tuple[str, str], Factory] = {}
"""Blocks in somebody's code, by the place and the name there."""


def register_block(name: str) -> Callable[[Factory], Factory]:
    """Decorate a block to make it known by name in this process.

    A block is a callable whose first argument is the number of channels, with keywords for the rest, which returns a
    module that maps a tensor to one of the same shape. Optional keywords ``rank`` and ``size`` are filled in from the
    site; a method ``identity_init()`` on the module makes it start as x ↦ x. A block whose class has a method ``gate(value)``
    is ``value * gate(value)``, the gate broadcast to the value: it can be fused with what stands behind it (`fuse_`).

    Raises:
        OptionError: the name is taken, or no name.
    """
    if not name or ":" in name or name in block_names():
        raise OptionError(
            f"`{name}` can't be the name of a block", seen="it is taken" if name in block_names() else None
        )

    def register(factory: Factory) -> Factory:
        _registered[name] = factory
        return factory

    return register


def block_names() -> dict[str, str]:
    """List every block's name, and where it comes from: ``se-inject``, a package, or ``registered``."""
    names = {
        name: "se-inject" if factory is SqueezeExcitation else "registered" for name, factory in _registered.items()
    }
    for point in importlib.metadata.entry_points(group=GROUP):
        names.setdefault(point.name, point.dist.name if point.dist is not None else point.module)
    return names


def find_block(name: str) -> Factory:
    """Find the block with this name: registered, announced by a package, or ``package.module:Class``, ``file.py:Class``.

    Raises:
        OptionError: there is none.
        PluginError: there is one, and it can't be imported.
        LoadError: no such module, file or class.
    """
    if ":" not in name:
        return _announced(name)
    key = _place(name)
    if key not in _imported:
        if key[0].partition(".")[0] in sys.stdlib_module_names:
            raise OptionError(f"`{name}` is not a block", seen=f"`{key[0]}` is a part of Python")
        found = named(*key)
        if not callable(found) or inspect.isbuiltin(found):
            raise OptionError(
                f"`{name}` is not a block",
                seen=f"a {type(found).__name__}",
                hint="a block is a class of modules, or a function that makes one",
            )
        _imported[key] = found
    return _imported[key]


def is_at_hand(name: str) -> bool:
    """Return whether a block is one by name, or was taken from somebody's code in this process before."""
    return ":" not in name or _place(name) in _imported


def has_class_at(block: nn.Module, name: str) -> bool:
    """Return whether a module is of the class, or out of the file or package, that a block's name says, which was imported so.

    Python's own modules, and those of torch and the zoos, hold no blocks.
    """
    place, attribute = _place(name)
    kind = type(block)
    home = sys.modules.get(kind.__module__)
    is_theirs = kind.__module__.partition(".")[0] in sys.stdlib_module_names | _NO_BLOCKS
    at_home = kind.__module__ == place or os.path.abspath(getattr(home, "__file__", None) or "") == place
    made = getattr(home, attribute, None)
    is_block = made is kind or (inspect.isfunction(made) and made.__module__ == kind.__module__)
    return at_home and is_block and not is_theirs


_NO_BLOCKS = frozenset({"torch", "torchvision", "timm", "numpy", "se_inject"})


def _place(name: str) -> tuple[str, str]:
    """Split the place of a user's block into its module or file, and the name there."""
    place, _, attribute = name.rpartition(":")
    return os.path.abspath(place) if place.endswith(".py") else place, attribute


@functools.cache
def _announced(name: str) -> Factory:
    if name in _registered:
        return _registered[name]
    for point in importlib.metadata.entry_points(group=GROUP, name=name):
        try:
            factory: Factory = point.load()
        except (Exception, SystemExit) as error:
            raise PluginError(
                f"block `{name}` of {block_names()[name]} can't be imported",
                seen=f"{type(error).__name__}: {error}",
                hint="the fault is that package's; the other blocks are not affected",
            ) from error
        return factory
    known = block_names()
    raise OptionError(f"no block is called `{name}`", seen=", ".join(sorted(known)), hint=did_you_mean(name, known))


def block_options(name: str) -> dict[str, inspect.Parameter]:
    """Return the options a block takes: its factory's parameters but the first (the channels) and those filled in."""
    parameters = list(parameters_of(name).values())[1:]
    return {parameter.name: parameter for parameter in parameters if parameter.name not in FILLED_IN}


def parsed_options(name: str, settings: Iterable[str]) -> dict[str, Any]:
    """Parse ``key=value`` texts as options of a block, each of the type its default has.

    Raises:
        OptionError: no such option, or a value of another type.
    """
    result: dict[str, Any] = {}
    for text in settings:
        key, equals, value = text.partition("=")
        if not equals:
            raise OptionError(f"`{text}` sets nothing", hint="write it as key=value")
        check_options(name, {key: value})
        result[key] = _parsed(key, value, block_options(name)[key])
    return result


def _parsed(key: str, text: str, parameter: inspect.Parameter) -> Any:
    annotation = str(
        parameter.annotation if parameter.annotation is not parameter.empty else type(parameter.default).__name__
    )
    words = {"true": True, "yes": True, "false": False, "no": False}
    if text.lower() == "none" and ("None" in annotation or parameter.default is None):
        return None
    if "bool" in annotation and text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        if kind.__name__ in annotation or parameter.default is None:
            try:
                return kind(text)
            except ValueError:
                continue
    if any(kind in annotation for kind in ("int", "float", "bool")) and "str" not in annotation:
        raise OptionError(
            f"option `{key}` can't be `{text}`", seen=f"it is of type {annotation.replace('<class ', '').strip('<>')}"
        )
    return text


def parameters_of(name: str) -> dict[str, inspect.Parameter]:
    """List the parameters of a block's factory, the channels first.

    Raises:
        PluginError: it has no signature, or takes no argument.
    """
    factory = find_block(name)
    try:
        parameters = dict(inspect.signature(factory).parameters)
    except (TypeError, ValueError) as error:
        raise PluginError(f"block `{name}` is not a callable with a signature", seen=str(error)) from error
    if not parameters:
        raise PluginError(f"block `{name}` takes no argument", hint="its first argument is the number of channels")
    return parameters


def check_options(name: str, options: dict[str, Any]) -> None:
    """Check that a block takes these options.

    Raises:
        OptionError: one it doesn't know, or an integer that no tensor has a use for.
    """
    for key, value in options.items():
        if isinstance(value, int) and abs(value) > _LARGEST:
            raise OptionError(
                f"option `{key}` of block `{name}` is too large", seen=f"an integer of {value.bit_length()} bits"
            )
    known = block_options(name)
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
        return
    for key in options:
        if key not in known:
            raise OptionError(
                f"block `{name}` has no option `{key}`",
                seen=", ".join(known) or "it has none",
                hint="did you mean `reduction`?" if key == "r" and "reduction" in known else did_you_mean(key, known),
            )


def check_values(name: str, options: dict[str, Any]) -> None:
    """Check that a block's options have the types it declares, as far as those are numbers, flags and text.

    Raises:
        OptionError: an option that it doesn't know, or one of another type: ``"no"`` isn't a flag.
    """
    check_options(name, options)
    known = block_options(name)
    for key, value in options.items():
        if key in known and not _fits(value, known[key]):
            raise OptionError(
                f"option `{key}` of block `{name}` can't be {value!r}", seen=f"it is of type {known[key].annotation}"
            )


_TYPES: dict[str, tuple[type, ...]] = {
    "bool": (bool,), "int": (int,), "float": (int, float), "str": (str,), "None": (type(None),),
}  # fmt: skip


def _fits(value: Any, parameter: inspect.Parameter) -> bool:
    annotation = (
        parameter.annotation if isinstance(parameter.annotation, str) else getattr(parameter.annotation, "__name__", "")
    )
    words = annotation.replace(" ", "").split("|")
    if not set(words) <= _TYPES.keys():
        return True
    kinds = [kind for word in words for kind in _TYPES[word]]
    return type(value) in kinds or (not isinstance(value, bool) and isinstance(value, tuple(kinds)))
