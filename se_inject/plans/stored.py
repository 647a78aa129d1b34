"""Write a plan as JSON text by `plan.schema.json`, and read it with every value checked."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
from collections.abc import Sequence
from typing import Any

from se_inject.blocks import check_values
from se_inject.errors import InjectError, LoadError, OptionError, UntrustedGlobals, either, printable
from se_inject.forwards import is_block_name, is_plain_name, is_trusted
from se_inject.surgery import Step, first_problem, with_integers
from se_inject.tracing import LARGEST_INPUTS
from se_inject.user_code import NoSuchFile

VERSION = 1
"""Of the stored form, `plan.schema.json`. A change of the form that an older reader would misread makes it 2."""
_FORM = "`-o plan.json` writes plans; `se_inject/surgery/plan.schema.json` says what one is"
_LONGEST = 8_000_000
_DEEPEST = 100


def text_of(model: str, inputs: Any, steps: Sequence[Step]) -> str:
    """Write a plan as JSON text.

    Raises:
        OptionError: an option of a block is infinite or no number, which JSON does not have.
    """
    data = {
        "se_inject_plan": VERSION,
        "model": model,
        "inputs": inputs,
        "steps": [step.to_data() for step in steps],
    }
    try:
        text = json.dumps(data, indent=2, allow_nan=False)
    except ValueError as error:
        raise OptionError("an option of a block can't be stored", seen=str(error)) from error
    return re.sub(r"\[\n\s+([^][{}\n]+(?:\n[^][{}\n]+)*)\]", _in_one_line, text)


def read_plan(text: str, trust: Sequence[str]) -> tuple[tuple[Step, ...], str, Any]:
    """Read steps, model and inputs of a plan from the text that ``text_of`` gave.

    Raises:
        LoadError: not such a text, or one of a later version.
        UntrustedGlobals: a block in somebody's code that is not to be trusted.
        OptionError: a block or an option that is not known here.
    """
    data = _json(text)
    version = data.get("se_inject_plan") if isinstance(data, dict) else None
    if isinstance(version, int) and version > VERSION:
        raise LoadError(
            f"a plan of version {version}", seen=f"this se-inject reads version {VERSION}", hint="update se-inject"
        )
    if (problem := first_problem(data)) is not None:
        place, wrong = problem
        raise LoadError("this is not a plan", seen=_described(place, wrong), hint=_FORM)
    steps = []
    for number, item in enumerate(data["steps"], 1):
        try:
            steps.append(Step.from_data(item))
            _check_name(steps[-1].block_name)
            check_trust(steps[-1].block, trust)
            check_values(steps[-1].block, steps[-1].options)
        except InjectError as error:
            raise type(error)(
                f"step {number} of the plan: {error.message}", seen=error.seen, hint=error.hint
            ) from error
    inputs = None if data["inputs"] is None else tuple(with_integers(data["inputs"]))
    _check_inputs(inputs or ())
    return tuple(steps), data["model"], inputs


def text_in(path: str | os.PathLike[str]) -> str:
    """Read the text of a plan from a regular file, no more of it than a plan may have.

    Raises:
        NoSuchFile: a file that doesn't exist.
        LoadError: it can't be read, or is not text.
    """
    if not os.path.lexists(path):
        raise NoSuchFile(f"no file `{path}`", hint=f"`{either('-o plan.json', 'plan.save(path)')}` writes one")
    if os.path.exists(path) and not os.path.isfile(path):  # a pipe would block, a device may never end
        raise LoadError(f"`{path}` is not a regular file", hint=_FORM)
    try:
        with open(path, "rb") as file:
            return file.read(4 * _LONGEST + 1).decode("utf-8-sig")
    except OSError as error:
        raise LoadError(f"`{path}` can't be read", seen=str(error), hint=_FORM) from error
    except ValueError as error:
        raise LoadError(f"`{path}` is not a plan", seen="it is not text", hint=_FORM) from error


def _check_name(name: str) -> None:
    """Look whether a block may have this name: neither Python nor this package may have a use for it.

    Raises:
        LoadError: it may not.
    """
    if not is_block_name(name):
        seen = "a name that Python or se-inject has a use for" if is_plain_name(name) else None
        raise LoadError(f"`{name}` can't be the name of an attribute", seen=seen)


def _check_inputs(inputs: Sequence[Any]) -> None:
    """Look whether a network can be tried on inputs of these shapes.

    Raises:
        LoadError: one is empty, or they are too large.
    """
    if any(0 in shape for shape, _ in inputs):
        raise LoadError("the plan's inputs are empty", seen=str(inputs), hint=_FORM)
    if sum(math.prod(shape) for shape, _ in inputs) > LARGEST_INPUTS:
        raise LoadError("the plan's inputs are too large", seen=str(inputs), hint=_FORM)


def _in_one_line(items: re.Match[str]) -> str:
    """Write lists of plain values in one line; a line break in JSON text is never part of a string."""
    return "[" + re.sub(r"\n\s*", " ", items[1].rstrip()) + "]"


def _depth(text: str) -> int:
    """Compute an upper bound of the nesting of lists and objects in JSON text: brackets in strings count as well."""
    levels = itertools.accumulate((letter in "[{") - (letter in "]}") for letter in text if letter in "[]{}")
    return max(levels, default=0)


def _json(text: str) -> Any:
    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is not a JSON number")

    try:
        if len(text) > _LONGEST or _depth(text) > _DEEPEST:
            raise ValueError("it is longer or deeper than any plan")
        return json.loads(text, parse_constant=refuse)
    except (ValueError, TypeError, RecursionError) as error:
        raise LoadError("this is not a plan", seen=f"{type(error).__name__}: {error}", hint=_FORM) from error


def _described(place: Sequence[str | int], wrong: str) -> str:
    """Describe a problem with the schema: steps are counted from 1."""
    if place[:1] == ("steps",) and len(place) > 1:
        rest = printable(".".join(map(str, place[2:])))
        return f"step {int(place[1]) + 1}: " + (f"`{rest}` {wrong}" if rest else f"it {wrong}")
    return f"`{printable('.'.join(map(str, place)))}` {wrong}" if place else f"it {wrong}"


def check_trust(block: str, trust: Sequence[str]) -> None:
    """Check that a stored plan may use this block: one with a colon in its name is code to be imported."""
    place = block.rpartition(":")[0]
    if place and not is_trusted(block, trust):
        hint = f"if you trust it: `{either(f'--trust {place}', f'trust=[{place!r}]')}`; its code is imported and run"
        is_plain = re.fullmatch(r"[\w./-]+", place, re.ASCII) is not None  # what one may copy into a shell
        raise UntrustedGlobals(f"block `{block}` is code that a file may not name", hint=hint if is_plain else None)
