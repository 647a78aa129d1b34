"""The published form of a plan, `plan.schema.json`, is also what reading one checks: that part of JSON Schema it uses."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from importlib import resources
from typing import Any

_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "null": (type(None),),
}
CHECKED = frozenset(
    {
        "$ref", "type", "enum", "required", "properties", "additionalProperties", "items", "prefixItems", "minItems",
        "maxItems", "minLength", "minimum", "maximum", "pattern",
    }
)  # fmt: skip
"""The keywords that are understood here, and so the only ones the schema may use beside descriptions."""

Problem = tuple[tuple[str | int, ...], str]
"""Where something is wrong, as keys and indices, and what must be there instead."""


@functools.cache
def plan_schema() -> dict[str, Any]:
    """The JSON Schema of a plan."""
    data: dict[str, Any] = json.loads(resources.files("se_inject").joinpath("plan.schema.json").read_text("utf-8"))
    return data


def first_problem(data: Any, definition: str | None = None) -> Problem | None:
    """What keeps data from being a plan, or one of the schema's definitions; None if nothing does."""
    schema = plan_schema()
    return next(_problems(data, schema["$defs"][definition] if definition else schema, ()), None)


def _problems(data: Any, schema: dict[str, Any], place: tuple[str | int, ...]) -> Iterator[Problem]:
    if "$ref" in schema:
        schema = plan_schema()["$defs"][schema["$ref"].rpartition("/")[2]]
    if (wrong := _wrong(data, schema)) is not None:
        yield place, wrong
    elif isinstance(data, dict):
        known = schema.get("properties", {})
        for key in schema.get("required", ()):
            if key not in data:
                yield (*place, key), "is missing"
        for key, value in data.items():
            if key in known:
                yield from _problems(value, known[key], (*place, key))
            elif schema.get("additionalProperties") is False:
                yield (*place, key), f"is not known here: {', '.join(known)}"
    elif isinstance(data, list):
        first = schema.get("prefixItems", [])
        for index, item in enumerate(data):
            inner = first[index] if index < len(first) else schema.get("items", {})
            yield from _problems(item, inner, (*place, index))


def _wrong(data: Any, schema: dict[str, Any]) -> str | None:
    """What one value must be, and is not."""
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds and not any(isinstance(data, _TYPES[kind]) and not isinstance(data, bool) for kind in kinds):
        return f"must be {' or '.join(kinds)}, not {_shown(data)}"
    if "enum" in schema and (isinstance(data, bool) or data not in schema["enum"]):
        return f"must be one of {', '.join(map(str, schema['enum']))}, not {_shown(data)}"
    if isinstance(data, int) and not schema.get("minimum", data) <= data <= schema.get("maximum", data):
        return f"can't be {_shown(data)}"
    if isinstance(data, str) and len(data) < schema.get("minLength", 0):
        return "is empty"
    if isinstance(data, str) and not re.search(schema.get("pattern", ""), data):
        return f"can't be {_shown(data)}"
    if isinstance(data, list) and not schema.get("minItems", 0) <= len(data) <= schema.get("maxItems", len(data)):
        return f"can't have {len(data)} entries"
    return None


def _shown(data: Any) -> str:
    text = json.dumps(data)
    return text if len(text) <= 40 else f"{text[:40]}…"
