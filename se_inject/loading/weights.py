"""Find the network or the weights in the contents of a file, and match weights to a network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from se_inject.errors import printable
from se_inject.loading.pickles.reading import Placeholder

_WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "net", "network", "params")
_AVERAGES = ("state_dict_ema", "ema_state_dict", "model_ema", "ema", "params_ema")
_DEEPEST = 3
_LONGEST = 8
_ASKED = 8
"""So many of a network's keys are looked for under any prefix."""
_MOST_PREFIXES = 64
_PLAIN = (type(None), bool, int, float, str)


class WeightsWarning(UserWarning):
    """A file holds weights beside those that were loaded, and they were left out."""


@dataclass(frozen=True)
class Taken:
    """What was taken out of a file's contents.

    Attributes:
        found: a module, a mapping of tensors by name, or None if there is neither, or several.
        entry: under which name it was; "" if the file has no names.
        entries: all names under which there are networks or weights.
    """

    found: Any
    entry: str
    entries: tuple[str, ...]


def network_or_weights(whole: Any, entry: str | None = None) -> Taken:
    """Take the network or state dict out of what a file holds: that of a name, or of the names that trainers use.

    Without ``entry`` it is the first of ``state_dict``, ``model``, …, then of the averages (``ema``, …), else the only
    one there is.

    Args:
        whole: what the file holds: that itself, or dicts, lists and tuples around it.
        entry: the name to take it from, or the prefix of some of the keys of the only weights there are (``teacher``);
            nothing is found if there is none of that name.
    """
    known: dict[tuple[int, int], Any] = {}
    entries = _entries(whole, known)
    if entry is not None:
        taken = entries.get(entry)
        return Taken(_under(whole, entry, known) if taken is None else taken, entry, tuple(entries))
    found = _inner(whole, 0, known)
    name = next((name for name, each in entries.items() if each is found and found is not None), "")
    return Taken(found, name, tuple(entries))


def _under(whole: Any, prefix: str, known: dict[tuple[int, int], Any]) -> dict[str, Any] | None:
    """Take the weights whose keys begin with a prefix and a dot, without both; None if there are none."""
    found, start = _inner(whole, 0, known), f"{prefix.rstrip('.')}."
    taken = (
        {key[len(start) :]: value for key, value in found.items() if key.startswith(start)}
        if is_state_dict(found)
        else {}
    )
    return taken or None


def _entries(whole: Any, known: dict[tuple[int, int], Any]) -> dict[str, Any]:
    """Collect the networks and weights in a dict by name; where it holds only one thing, that dict's own."""
    path = ""
    entries: dict[str, Any] = {}
    for depth in range(1, _DEEPEST + 1):
        if not isinstance(whole, Mapping) or is_state_dict(whole):
            break
        names = (*_WRAPPERS, *_AVERAGES)
        inner = {key: each for key in whole if (each := _inner(whole[key], depth, known)) is not None}
        inner = {key: each for key, each in inner.items() if key in names or _is_large(each)}
        if not inner:
            break
        entries = {f"{path}{key}": each for key, each in inner.items()}
        if len(entries) > 1:
            break
        (key,) = inner
        path, whole = f"{path}{key}.", whole[key]
    return entries


def _inner(found: Any, depth: int, known: dict[tuple[int, int], Any]) -> Any:
    key = (id(found), depth)
    if key not in known:
        known[key] = None  # while it is looked into, it holds itself
        known[key] = _looked_for(found, depth, known)
    return known[key]


def _looked_for(found: Any, depth: int, known: dict[tuple[int, int], Any]) -> Any:
    if isinstance(found, nn.DataParallel):
        found = found._modules.get("module")
    if isinstance(found, nn.Module) and not (type(found) is Placeholder and not found.state_dict()):
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
    """Return whether this is a mapping of tensors by name; numbers and text may be beside them."""
    if not isinstance(found, Mapping) or not all(isinstance(key, str) for key in found):
        return False
    others = [(key, value) for key, value in found.items() if not isinstance(value, torch.Tensor)]
    return len(others) < len(found) and all(key.endswith("_extra_state") or type(v) in _PLAIN for key, v in others)


def _tensors(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Leave out of a state dict the numbers and text beside its tensors."""
    beside = {key for key, value in state.items() if type(value) in _PLAIN and not key.endswith("_extra_state")}
    return {key: value for key, value in state.items() if key not in beside} if beside else state


def _is_large(found: Any) -> bool:
    """Return whether this is a network, or has weights of a module in a module: no mere table of numbers."""
    return isinstance(found, nn.Module) or any("." in key for key in found)


def contents(found: Any) -> str:
    """Describe what a file holds instead, in a few words."""
    if isinstance(found, Mapping) and found:
        return f"a dict with the keys {listed(map(str, found))}"
    if isinstance(found, list | tuple):
        return f"a {type(found).__name__} of {listed(type(part).__name__ for part in found)}"
    return "something that is neither" if isinstance(found, Placeholder) else f"a {type(found).__name__}"


@dataclass(frozen=True)
class Fitted:
    """The part of a state dict that is meant for a network, under the network's own names.

    Attributes:
        state: these weights.
        prefix: what stood before their names: ``net.``; "" if nothing did.
        beside: the names in the file that don't begin so.
        others: other prefixes under which there are weights for the whole network.
    """

    state: Mapping[str, Any]
    prefix: str
    beside: tuple[str, ...] = ()
    others: tuple[str, ...] = ()


def fitted(state: Mapping[str, Any], current: Mapping[str, Any]) -> Fitted:
    """Find a network's weights in a state dict: under the longest prefix that has all its keys, whatever is beside.

    If no prefix has all, it is the one that has most. Keys that are under the prefix and not the network's stay in:
    ``load_state_dict`` refuses them. Counters of batches may be missing, as older files don't have them.

    Args:
        state: the weights, by the names in the file.
        current: the network's state dict.
    """
    needed = [key for key in current if not key.endswith("num_batches_tracked")]
    prefixes = _prefixes(state, needed)
    whole = [prefix for prefix in prefixes if all(prefix + key in state for key in needed)]
    if whole:
        prefix = max(whole, key=len)
    else:
        prefix = max(prefixes, key=lambda prefix: sum(prefix + key in state for key in needed))
    if not prefix:
        return Fitted(state, "")
    taken = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    beside = [key for key in state if not key.startswith(prefix) and key != "n_averaged"]  # torch's AveragedModel's
    return Fitted(taken, prefix, tuple(beside), tuple(each for each in whole if each != prefix))


def _prefixes(state: Mapping[str, Any], needed: list[str]) -> list[str]:
    """List what stands before a few of a network's keys in a state dict, the shorter before the longer."""
    votes = Counter({"": 0})
    step = max(1, len(needed) // _ASKED)
    for key in needed[::step]:
        ending = f".{key}"
        votes.update(name[: -len(key)] for name in state if name.endswith(ending))
    return sorted([prefix for prefix, _ in votes.most_common(_MOST_PREFIXES)] + [""], key=len)


def other_classes(current: Mapping[str, Any], state: Mapping[str, Any]) -> int | None:
    """Get the number of classes that weights were trained with, if they don't fit a network in that alone.

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
    """Return whether as many bytes are in memory for weights as a network's would take."""
    if not isinstance(theirs, torch.Tensor) or not isinstance(mine, torch.Tensor):
        return True
    return not theirs.is_meta and theirs.numel() * mine.element_size() <= 8 * theirs.untyped_storage().nbytes()


def differences(current: Mapping[str, Any], state: Mapping[str, Any]) -> str:
    """Describe in what weights don't fit a network with this state dict; empty if they do."""
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
    """List the first names, and say how many more there are."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(f"`{printable(name, 100)}`" for name in names[:most]) + more
