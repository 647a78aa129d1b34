"""Check the steps that a stored forward was edited by: what a plan's schema asks of them, and that their blocks are there.

A plan, an adapter and a network bring the same data, and all three are checked. A block with a colon in its name is code
to be imported and called: no file may name one unless its package is trusted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from se_inject.errors import LoadError, UntrustedGlobals, quoted
from se_inject.forwards.marks import body_of
from se_inject.forwards.vocabulary import is_plain_name

_LARGEST = 2**24
_MOST = 2**40
_POSITIONS = ("standard", "pre", "post", "identity", "conv3x3")


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 < value <= _LARGEST


def is_possible(channels: int, size: Sequence[int]) -> bool:
    """Return whether a value of this size could be in any memory: a terabyte numbers at most."""
    return channels * math.prod(size) <= _MOST


def is_block_name(name: Any) -> bool:
    """Return whether a block may have this name: neither Python nor this package has a use for it."""
    is_ours = isinstance(name, str) and (name.startswith(("__", "_se_inject")) or name == "_ungated_forward")
    return is_plain_name(name) and not is_ours


_RULES: dict[str, Callable[[Any], bool]] = {
    "site": lambda value: isinstance(value, str),
    "owner": lambda value: isinstance(value, str),
    "value": lambda value: value is None or isinstance(value, str),
    "channels": _is_size,
    "rank": lambda value: type(value) is int and 1 <= value <= 3,
    "block": lambda value: isinstance(value, str) and value != "",
    "options": lambda value: isinstance(value, dict),
    "init": lambda value: value in ("identity", "paper"),
    "block_name": is_block_name,
    "stage": lambda value: value is None or type(value) is int,
    "size": lambda value: isinstance(value, list) and all(map(_is_size, value)),
    "position": lambda value: value in _POSITIONS,
    "readers": lambda value: value is None or (isinstance(value, list) and all(isinstance(r, str) for r in value)),
}


def check_steps(body: dict[str, Any]) -> None:
    """Check the form of the steps in the data of an edited forward.

    Raises:
        LoadError: they are none.
    """
    steps = body["steps"]
    for step in steps if isinstance(steps, list) else [None]:
        if not isinstance(step, dict) or step.keys() != _RULES.keys():
            raise LoadError("a damaged file: an edited forward with a step of an unknown form", seen=quoted(step))
        for key, fits in _RULES.items():
            if not fits(step[key]):
                raise LoadError(
                    "a step of an edited forward can't be right", seen=f"its `{key}` is {quoted(step[key])}"
                )
        if len(step["size"]) != step["rank"]:
            raise LoadError(f"a step of rank {step['rank']} has {len(step['size'])} numbers for its `size`")
        if not is_possible(step["channels"], step["size"]):
            raise LoadError("a step gates a value that no memory holds", seen=f"{step['channels']} × {step['size']}")
    names, before = {step["block_name"] for step in steps}, body["was_none"]
    if not before.keys() <= names or not all(value in ("module", "attribute") for value in before.values()):
        raise LoadError("a damaged file: an edited forward of an unknown form", seen=f"was None: {quoted(before)}")


def check_blocks(module: nn.Module, trust: Sequence[str]) -> None:
    """Check that the blocks of an edited forward are submodules, and none of them is code to be imported.

    Args:
        module: of any class.
        trust: packages whose code may be.

    Raises:
        LoadError: a block is not there.
        UntrustedGlobals: one is code.
    """
    for step in _steps_in(body_of(module)):
        if not isinstance(module._modules.get(step["block_name"]), nn.Module):
            raise LoadError(
                f"a {type(module).__name__} in this file lacks its block `{step['block_name'][:80]}`",
                seen="the steps of its edited forward name it",
            )
        place = step["block"].rpartition(":")[0]
        is_known = is_trusted(step["block"], trust) or (place.endswith(".py") and Path(place).stem in trust)
        if is_code(step["block"]) and not is_known:
            raise UntrustedGlobals(f"block `{step['block'][:100]}` is code that a file may not name")


def _steps_in(body: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    while body:
        yield from body["steps"]
        body = body.get("fused", {}).get("before")


def is_code(block: str) -> bool:
    """Return whether a block's name is the place of somebody's code: ``package.module:Class``, ``file.py:Class``."""
    return ":" in block


def is_trusted(block: str, trust: Sequence[str]) -> bool:
    """Return whether the place of a block's code is a trusted package or file, or something in one."""
    place = block.rpartition(":")[0]
    names = {place} if place.endswith(".py") else {place, place.partition(".")[0]}
    return not names.isdisjoint(trust)
