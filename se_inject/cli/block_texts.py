"""Parse the texts that describe blocks: ``4=cbam,kernel=5`` is CBAM in stage 4 with an option of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from se_inject.blocks import parsed_options
from se_inject.errors import OptionError


@dataclass(frozen=True)
class BlockText:
    """One ``--block``: the stages it goes to, its name and its options.

    Args:
        stages: as for ``--stages``; None: where the command's other options say.
        name: of the block.
        options: keyword arguments of the block.
    """

    stages: str | None
    name: str
    options: dict[str, Any]


def parsed_blocks(texts: Sequence[str], settings: Sequence[str], given: dict[str, Any]) -> list[BlockText]:
    """Parse the requested blocks, in this order; SE if none was requested.

    Args:
        texts: ``NAME``, ``STAGES=NAME``, and either with ``,KEY=VALUE`` behind it.
        settings: ``KEY=VALUE`` for the only block.
        given: options of the only block from other command-line options.

    Raises:
        OptionError: no such option or value, one given twice, or one that doesn't say for which block it is.
    """
    if len(texts) > 1 and (settings or given):
        which = settings[0].partition("=")[0] if settings else next(iter(given))
        raise OptionError(
            f"`{which}` is for which of the {len(texts)} blocks?",
            seen=", ".join(texts),
            hint=f"write it with its block: `--block {texts[0]},{which}=VALUE`",
        )
    return [_parsed(text, settings, given) for text in texts or ("se",)]


def _parsed(text: str, settings: Sequence[str], given: dict[str, Any]) -> BlockText:
    head, *own = text.split(",")
    stages, equals, name = head.rpartition("=")
    if not name or (equals and not stages):
        raise OptionError(f"`--block {text}` names no block", hint="write it as `cbam`, `4=cbam` or `4=cbam,kernel=5`")
    options: dict[str, Any] = {}
    for more in (given, *(parsed_options(name, [setting]) for setting in (*settings, *own))):
        for key in options.keys() & more.keys():
            raise OptionError(f"`{key}` is given twice", seen=f"{options[key]} and {more[key]}", hint="leave one out")
        options |= more
    return BlockText(stages or None, name, options)
