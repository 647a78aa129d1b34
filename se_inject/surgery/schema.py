"""Check data against the published form of a plan, `plan.schema.json`, and say in few words what is wrong."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from importlib import resources
from typing import Any

import fastjsonschema

Problem = tuple[tuple[str | int, ...], str]
"""Where something is wrong, as keys and indices, and what must be there instead."""


@functools.cache
def plan_schema() -> dict[str, Any]:
    """Return the JSON Schema of a plan, draft 7."""
    text = resources.files("se_inject.surgery").joinpath("plan.schema.json").read_text("utf-8")
    data: dict[str, Any] = json.loads(text)
    return data


@functools.cache
def _check(definition: str | None) -> Callable[[Any], Any]:
    """Compile the check of a plan, or of one of the schema's definitions."""
    schema = plan_schema()
    part = schema if definition is None else {"$schema": schema["$schema"], **schema["definitions"][definition]}
    check: Callable[[Any], Any] = fastjsonschema.compile(part, use_default=False)
    return check


def first_problem(data: Any, definition: str | None = None) -> Problem | None:
    """Find the first reason why data is not a plan, or one of the schema's definitions; None if there is none."""
    try:
        _check(definition)(data)
    except fastjsonschema.JsonSchemaValueException as error:
        place = tuple(int(part) if part.isdigit() else part for part in error.path[1:])
        return _in_words(place, error.rule or "", error.rule_definition, error.value, error.definition)
    return None


def with_integers(data: Any) -> Any:
    """Return the same data with ``4`` for ``4.0``, which JSON Schema takes for an integer; a block's options stay."""
    if isinstance(data, dict):
        return {key: value if key == "options" else with_integers(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [with_integers(item) for item in data]
    return int(data) if isinstance(data, float) and data.is_integer() else data


def _in_words(place: tuple[str | int, ...], rule: str, wanted: Any, value: Any, schema: dict[str, Any]) -> Problem:
    """Describe a problem and its place; for a key that is missing or unknown, the key's own place."""
    if rule == "required":
        return (*place, next(key for key in wanted if key not in value)), "is missing"
    if rule == "additionalProperties":
        known = schema["properties"]
        return (*place, next(key for key in value if key not in known)), f"is not known here: {', '.join(known)}"
    if rule == "type":
        kinds = [wanted] if isinstance(wanted, str) else wanted
        return place, f"must be {' or '.join(kinds)}, not {_shown(value)}"
    if rule == "enum":
        return place, f"must be one of {', '.join(map(str, wanted))}, not {_shown(value)}"
    if rule == "minLength":
        return place, "is empty"
    if rule in ("minItems", "maxItems"):
        return place, f"can't have {len(value)} entries"
    return place, f"can't be {_shown(value)}"


def _shown(data: Any) -> str:
    text = json.dumps(data)
    return text if len(text) <= 40 else f"{text[:40]}…"
