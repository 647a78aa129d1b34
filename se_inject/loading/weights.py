"""What of a file's contents is a network or its weights, and how weights fit a network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from se_inject.errors import printable
from se_inject.loading.architectures import MOST_PREFIXES, PREFIXES
from se_inject.loading.pickles.unpickler import Inert

_WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "net", "network", "params")
_AVERAGES = ("state_dict_ema", "ema_state_dict", "model_ema", "ema", "params_ema")
_DEEPEST = 3
_LONGEST = 8
_PLAIN = (type(None), bool, int, float, str)


def network_or_weights(found: Any) -> Any:
    """The network or state dict in what a file holds: under the names that trainers use, else the only one there is.

    Args:
        found: what the file holds: that itself, or dicts, lists and tuples around it.

    Returns:
        a module, a mapping of tensors by name, or None if there is neither, or several.
    """
    return _inner(found, 0, {})


def _inner(found: Any, depth: int, known: dict[tuple[int, int], Any]) -> Any:
    key = (id(found), depth)
    if key not in known:
        known[key] = None  # while it is looked into, it holds itself
        known[key] = _looked_for(found, depth, known)
    return known[key]


def _looked_for(found: Any, depth: int, known: dict[tuple[int, int], Any]) -> Any:
    if isinstance(found, nn.DataParallel):
        found = found._modules.get("module")
    if isinstance(found, nn.Module) and not (type(found) is Inert and not found.state_dict()):
        return found
    if is_state_dict(found):
        return _tensors(found)
    if depth == _DEEPEST:
        return None
    if isinstance(found, Mapping):
        named = (_inner(found[key], depth + 1, known) for key in (*_WRAPPERS, *_AVERAGES) if key in found)
        inner = next((each for each in named if each is not None), None)
        if inner is not None:
            return inner
        parts = [value for key, value in found.items() if key not in (*_WRAPPERS, *_AVERAGES)]
    else:
        parts = list(found) if isinstance(found, list | tuple) and len(found) <= _LONGEST else []
    whole = [each for part in parts if (each := _inner(part, depth + 1, known)) is not None and _is_large(each)]
    return whole[0] if len(whole) == 1 else None


def is_state_dict(found: Any) -> bool:
    """Whether this is a mapping of tensors by name; numbers and text may be beside them."""
    if not isinstance(found, Mapping) or not all(isinstance(key, str) for key in found):
        return False
    others = [(key, value) for key, value in found.items() if not isinstance(value, torch.Tensor)]
    return len(others) < len(found) and all(key.endswith("_extra_state") or type(v) in _PLAIN for key, v in others)


def _tensors(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """A state dict without the numbers and text beside its tensors."""
    beside = {key for key, value in state.items() if type(value) in _PLAIN and not key.endswith("_extra_state")}
    return {key: value for key, value in state.items() if key not in beside} if beside else state


def _is_large(found: Any) -> bool:
    """Whether this is a network, or has weights of a module in a module: no mere table of numbers."""
    return isinstance(found, nn.Module) or any("." in key for key in found)


def contents(found: Any) -> str:
    """What a file holds instead, in a few words."""
    if isinstance(found, Mapping) and found:
        return f"a dict with the keys {listed(map(str, found))}"
    if isinstance(found, list | tuple):
        return f"a {type(found).__name__} of {listed(type(part).__name__ for part in found)}"
    return "something that is neither" if isinstance(found, Inert) else f"a {type(found).__name__}"


def without_prefix(state: Mapping[str, Any], current: Mapping[str, Any]) -> Mapping[str, Any]:
    """The state dict without those prefixes of all its keys that keep them from fitting."""
    candidates = [state]
    keys = [key for key in state if key != "n_averaged"]  # torch's AveragedModel has it beside `module.`
    while len(candidates) <= MOST_PREFIXES and (
        prefix := next((p for p in PREFIXES if keys and all(key.startswith(p) for key in keys)), None)
    ):
        candidates.append({key.removeprefix(prefix): candidates[-1][key] for key in keys})
        keys = list(candidates[-1])
    return max(candidates, key=lambda candidate: len(candidate.keys() & current.keys()))


def other_classes(current: Mapping[str, Any], state: Mapping[str, Any]) -> int | None:
    """The number of classes that weights were trained with, if that is all in which they don't fit a network.

    Only weights that the file really holds count: others could ask for a network of any size.

    Args:
        current: the network's state dict.
        state: the weights, by the same names.
    """
    if current.keys() != state.keys() or not all(map(_is_there, current.values(), (state[key] for key in current))):
        return None
    pairs = {
        (mine.shape[:1], theirs.shape[:1], mine.shape[1:] == theirs.shape[1:])
        for mine, theirs in ((current[key], state[key]) for key in current)
        if isinstance(mine, torch.Tensor) and isinstance(theirs, torch.Tensor) and mine.shape != theirs.shape
    }
    if len(pairs) != 1:
        return None
    ((mine, theirs, rest_is_equal),) = pairs
    return int(theirs[0]) if rest_is_equal and mine and theirs else None


def _is_there(mine: Any, theirs: Any) -> bool:
    """Whether as many bytes are in memory for weights as a network's would take."""
    if not isinstance(theirs, torch.Tensor) or not isinstance(mine, torch.Tensor):
        return True
    return not theirs.is_meta and theirs.numel() * mine.element_size() <= 8 * theirs.untyped_storage().nbytes()


def differences(current: Mapping[str, Any], state: Mapping[str, Any]) -> str:
    """In what weights don't fit a network with this state dict; empty if they do."""
    kinds = {
        "missing": [key for key in current if key not in state],
        "unexpected": [key for key in state if key not in current],
        "of another shape": [
            f"{key} {tuple(state[key].shape)} for {tuple(value.shape)}"
            for key, value in current.items()
            if key in state and state[key].shape != value.shape
        ],
    }
    return "; ".join(f"{len(keys)} {kind}: {listed(keys)}" for kind, keys in kinds.items() if keys)


def listed(names: Iterable[str], most: int = 4) -> str:
    """The first names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(f"`{printable(name, 100)}`" for name in names[:most]) + more
