"""Build one block, as large as a block may be, and check what it does."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from se_inject.blocks.registry import check_options, find_block, parameters_of
from se_inject.errors import InjectError, OptionError, PluginError
from se_inject.tables import short
from se_inject.user_code import fact

INITS = ("identity", "paper")
"""How a block starts: as x ↦ x, by its ``identity_init``; or as its authors have it."""
LARGEST = 2**28
"""Numbers in one block: a gigabyte of float32. SE with r = 1 at 8,192 channels has half as many."""
_counts: dict[Any, int] = {}


def build_block(name: str, channels: int, size: Sequence[int], options: dict[str, Any], init: str) -> nn.Module:
    """Build one new block, of at most ``LARGEST`` numbers: they are counted before memory is taken for them.

    Args:
        name: of the block.
        channels: C of the values it will gate.
        size: their spatial size.
        options: keyword arguments of the block.
        init: ``identity`` or ``paper``.

    Raises:
        OptionError: no such block or option, a value that it refuses, a start or rank it doesn't have, or a block too large.
        PluginError: the block can't be built.
    """
    if init not in INITS:
        raise OptionError(f"no start is called `{init}`", seen=", ".join(INITS))
    if torch.get_default_device().type != "meta":
        block_numbers(name, channels, size, options)
    block = _built(name, channels, size, options)
    if init == "identity":
        start_as_identity_(name, block)
    return block


def block_numbers(name: str, channels: int, size: Sequence[int], options: dict[str, Any]) -> int:
    """Count the numbers in a block's parameters and buffers, without memory for them.

    Args:
        name: of the block.
        channels: C of the values it will gate.
        size: their spatial size.
        options: keyword arguments of the block.

    Raises:
        OptionError: no such block or option, a value that it refuses, or more numbers than ``LARGEST``.
        PluginError: the block can't be built.
    """
    key = (find_block(name), channels, tuple(size), repr(sorted(options.items())))
    if key not in _counts:
        if len(_counts) > 1000:
            _counts.clear()
        with torch.device("meta"):
            _counts[key] = _numbers(_built(name, channels, size, options))
    return _counts[key]


def _built(name: str, channels: int, size: Sequence[int], options: dict[str, Any]) -> nn.Module:
    factory = find_block(name)
    check_options(name, options)
    filled = {"rank": len(size), "size": tuple(size)}
    parameters = parameters_of(name)
    if len(size) != 2 and "rank" not in parameters:
        raise OptionError(f"block `{name}` is for two spatial dimensions", seen=f"a value with {len(size)}")
    try:
        block = factory(channels, **{key: value for key, value in filled.items() if key in parameters}, **options)
    except InjectError:
        raise
    except (Exception, SystemExit) as error:
        raise PluginError(
            f"block `{name}` can't be built for {channels} channels with {_listed(options)}",
            seen=fact(error),
        ) from error
    if not isinstance(block, nn.Module):
        raise PluginError(f"block `{name}` is not an nn.Module", seen=f"it returned a {type(block).__name__}")
    if (numbers := _numbers(block)) > LARGEST:
        raise OptionError(
            f"block `{name}` for {channels} channels with {_listed(options)} is too large",
            seen=f"{short(numbers)} numbers; a block has at most {short(LARGEST)}",
        )
    return block


def _numbers(block: nn.Module) -> int:
    return sum(tensor.numel() for tensor in (*block.parameters(), *block.buffers()))


def _listed(options: dict[str, Any]) -> str:
    return ", ".join(f"{key} = {value}" for key, value in options.items()) or "no options"


def start_as_identity_(name: str, block: nn.Module) -> None:
    """Let a new block start as x ↦ x.

    Args:
        name: of the block.
        block: as its authors start it.

    Raises:
        OptionError: it has no such start.
        PluginError: it fails.
    """
    if not has_identity_start(block):
        raise OptionError(f"block `{name}` has no identity start", hint="init `paper`: as its authors start it")
    try:
        block.identity_init()  # type: ignore[operator]
    except (Exception, SystemExit) as error:
        raise PluginError(
            f"block `{name}` fails in its identity_init", seen=f"{type(error).__name__}: {error}"
        ) from error


def check_block(name: str, block: nn.Module, channels: int, size: Sequence[int], dtype: torch.dtype) -> None:
    """Check that a block maps a value to a new one of the same shape and dtype, in both modes and at any batch size.

    Args:
        name: of the block.
        block: on the meta device, so that nothing is computed.
        channels: C of the values.
        size: their spatial size.
        dtype: of the network.

    Raises:
        PluginError: it fails, changes the shape or dtype, or overwrites what it is given.
    """
    try:
        block = block.to(dtype)
    except Exception as error:
        raise PluginError(f"block `{name}` can't be of type {dtype}", seen=fact(error)) from error
    for training, batch in ((False, 2), (True, 3), (False, 1)):
        value = torch.zeros((batch, channels, *size), device="meta", dtype=dtype)
        _check_call(name, block, value, training)


def _check_call(name: str, block: nn.Module, value: Tensor, training: bool) -> None:
    version = value._version
    try:
        with torch.no_grad():
            result = block.train(training)(value)
    except (Exception, SystemExit) as error:
        raise PluginError(
            f"block `{name}` fails on a value of {tuple(value.shape)} in {'training' if training else 'eval'}",
            seen=fact(error),
            hint="a block can't look at numbers (`if`, `.item()`): it is checked on tensors without any, and exported"
            if "meta tensor" in str(error)
            else None,
        ) from error
    if not isinstance(result, Tensor) or (result.shape, result.dtype) != (value.shape, value.dtype):
        returned = (
            f"{tuple(result.shape)} {result.dtype}" if isinstance(result, Tensor) else f"a {type(result).__name__}"
        )
        raise PluginError(
            f"block `{name}` must return what it was given: {tuple(value.shape)} {value.dtype}", seen=returned
        )
    if value._version != version:
        raise PluginError(f"block `{name}` overwrites the value it is given", hint="return a new tensor")


def is_ours(block: nn.Module) -> bool:
    """Return whether a block is of a class of this package itself, which maps a value of any size to one of that size."""
    return type(block).__module__.partition(".")[0] == "se_inject"


def has_identity_start(block: nn.Module) -> bool:
    """Return whether a block can start as x ↦ x."""
    return callable(getattr(block, "identity_init", None))


def has_gate(block: nn.Module) -> bool:
    """Tell whether a block is ``value * gate(value)``: whether its class has a method ``gate`` (a submodule is not one)."""
    return inspect.isfunction(getattr(type(block), "gate", None))
