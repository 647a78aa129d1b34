"""Recognise the network of torchvision or timm that weights belong to, by the keys and shapes of a state dict.

``architectures.json`` holds a fingerprint of each; ``tests/census/architectures.py`` makes it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib import resources
from typing import Any

import torch

_MOST_PREFIXES = 4
"""Of one key."""


def fingerprint(state: Mapping[str, Any]) -> str:
    """Hash a network's keys, and the shapes of its convolutions and position embeddings.

    Shapes of one and two dimensions are left out, so that it is the same for any number of classes; so are the
    counters of batches, which older files don't have.
    """
    rows = sorted(
        (key, list(value.shape) if value.ndim > 2 else [])
        for key, value in state.items()
        if isinstance(value, torch.Tensor) and not key.endswith("num_batches_tracked")
    )
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:12]


def architectures_of(state: Mapping[str, Any]) -> list[str]:
    """List the known networks with these keys and shapes, those of torchvision first; [] if none is known.

    A name that all keys begin with (``module.``, ``net.``) is tried without. Networks that differ in something else, such as an activation, share
    their keys and shapes: all of them are named.
    """
    known = json.loads(resources.files("se_inject").joinpath("architectures.json").read_text())
    for taken in range(_MOST_PREFIXES + 1):
        found: list[str] = known.get(fingerprint(state), [])
        first, dot, _ = next(iter(state), "").partition(".")
        prefix = first + dot
        if found or not dot or taken == _MOST_PREFIXES or not all(key.startswith(prefix) for key in state):
            break
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return found
