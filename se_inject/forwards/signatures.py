"""Write the parameters of an author's forward: in the head of another function, and in a call that passes all on."""

from __future__ import annotations

import inspect
from typing import Any


def head_of(signature: inspect.Signature) -> tuple[str, dict[str, Any]]:
    """Return the text of the parameters, and their defaults under the names by which the text refers to them.

    Plain types that the author wrote stand in the text: TorchScript takes a parameter for a tensor otherwise.
    """
    parts: list[str] = []
    defaults: dict[str, Any] = {}
    starred = False
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            parts.append("*")
        starred = starred or parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_POSITIONAL)
        text = _star(parameter) + parameter.name
        for plain in (bool, int, float, str):
            if parameter.annotation in (plain, plain.__name__) and plain.__name__ not in signature.parameters:
                defaults[plain.__name__] = plain
                text += f": {plain.__name__}"
        if parameter.default is not parameter.empty:
            defaults[f"_default_{parameter.name}"] = parameter.default
            text += f"=_default_{parameter.name}"
        parts.append(text)
    return ", ".join(parts), defaults


def passed_on(signature: inspect.Signature) -> str:
    """Return the arguments of a call that passes on every parameter but the first, the module."""
    parameters = list(signature.parameters.values())[1:]
    return ", ".join(
        f"{each.name}={each.name}" if each.kind is each.KEYWORD_ONLY else _star(each) + each.name for each in parameters
    )


def _star(parameter: inspect.Parameter) -> str:
    if parameter.kind is parameter.VAR_POSITIONAL:
        return "*"
    return "**" if parameter.kind is parameter.VAR_KEYWORD else ""
