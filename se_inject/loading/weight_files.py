"""Take the weights out of a file, and put them into a network: completely, or not at all."""

from __future__ import annotations

import os
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn

from se_inject.errors import LoadError, OptionError, either, printable
from se_inject.forwards import steps_data
from se_inject.loading.architectures import architectures_of
from se_inject.loading.formats import PICKLES, form_of, unreadable
from se_inject.loading.opened import checked_read, opened
from se_inject.loading.pickles.containers import unpickle
from se_inject.loading.refusals import explanations
from se_inject.loading.weights import (
    Fitted,
    Taken,
    WeightsWarning,
    contents,
    differences,
    fitted,
    listed,
    network_or_weights,
)
from se_inject.tables import counted
from se_inject.user_code import fact

NO_ENTRIES = "an entry is for training checkpoints, such as `ema`: leave it out"


def load_weights_(model: nn.Module, path: str | os.PathLike[str], *, entry: str | None = None) -> None:
    """Load the state dict in a file into a model.

    The file may also be a training checkpoint, or a whole pickled module even of an unknown class: only its
    tensors are used. They may stand under any prefix (``module.``, ``net.``, ``backbone.``), with others beside: the
    longest prefix under which the model has all its keys is taken.

    Args:
        model: the model; it keeps its dtypes and devices.
        path: a safetensors file, or what ``torch.save`` wrote.
        entry: which entry of a training checkpoint to take (``"ema"``), or which prefix (``"teacher"``); as for ``load``.

    Warns:
        WeightsWarning: one of several entries was taken, or the file holds weights under another prefix, or none, and they
            were left out.

    Raises:
        NoSuchFile: a file that doesn't exist.
        LoadError: no state dict in it, or not exactly the model's keys and shapes; the model is as it was.
        OptionError: an entry that isn't there.
    """
    notes: list[str] = []
    state = weights_in(Path(path), entry, notes)
    for note in notes:
        warnings.warn(note, WeightsWarning, stacklevel=2)
    put_weights_(model, state, Path(path), saying(None))


def weights_in(path: Path, entry: str | None = None, notes: list[str] | None = None) -> Mapping[str, Any]:
    """Get the state dict in a file, mapped where the format allows it.

    Raises:
        NoSuchFile: a file that doesn't exist.
        LoadError: no state dict in it.
        OptionError: an entry that isn't there.
    """
    refused: dict[str, str | None] = {}
    with opened(path) as file:
        form = form_of(file)
        if form not in ("safetensors", *PICKLES):
            raise unreadable(path, form)
        whole, taken = checked_read(path, lambda: looked_into(contents_of(file, form, refused), entry))
    check_entry(path, taken, entry, notes)
    found = taken.found
    if found is None:
        hint = next(explanations(refused), what_is_taken(len(taken.entries) > 1))
        which = f"several: {listed(taken.entries, most=8)}" if len(taken.entries) > 1 else "no state dict"
        raise LoadError(f"`{path}` holds {which}", seen=contents(whole), hint=hint)
    return checked_read(path, lambda: found.state_dict() if isinstance(found, nn.Module) else found)


def looked_into(whole: Any, entry: str | None) -> tuple[Any, Taken]:
    """Find the network or weights in what a file holds, and give both."""
    return whole, network_or_weights(whole, entry)


def check_entry(path: Path, taken: Taken, entry: str | None, notes: list[str] | None) -> None:
    """Refuse an entry that isn't there; of several, note which was taken."""
    if entry is not None and taken.found is None:
        there = listed(taken.entries, most=8)
        seen = f"networks and weights are under {there}" if there else "no network or weights under a name"
        hint = either("one of them with --entry, or leave it out", "one of them as `entry`, or leave it out")
        raise OptionError(f"`{path}` has no entry `{entry}`", seen=seen, hint=hint if there else NO_ENTRIES)
    others = [name for name in taken.entries if name != taken.entry]
    if notes is not None and entry is None and taken.entry and others:
        how = either(f"`--entry {printable(others[0], 100)}`", f"`entry={printable(others[0], 100)!r}`")
        notes.append(
            f"`{path}` holds {listed(taken.entries, most=8)}: {listed([taken.entry])} is taken; {how} takes another"
        )


def what_is_taken(several: bool) -> str:
    """Say what is looked for in a file, or how to choose if there are several."""
    if several:
        return "one network, or one state dict, is taken: " + either("choose it with --entry", "choose it with `entry`")
    return "one network, or one state dict, is looked for: alone, or in dicts, lists and tuples"


def saying(notes: list[str] | None) -> Callable[[str], None]:
    """Give the function that takes a note about weights that were left out: add it to the list, or warn."""
    if notes is not None:
        return notes.append
    return lambda note: warnings.warn(note, WeightsWarning, stacklevel=4)


def contents_of(file: IO[bytes], form: str, refused: dict[str, str | None]) -> Any:
    """Read what an opened file of weights holds; names that were refused are added to ``refused``."""
    if form != "safetensors":
        return unpickle(file, form, (), refused, mapped=True)
    from safetensors.torch import load_file

    return load_file(file.name)


def put_weights_(model: nn.Module, state: Mapping[str, Any], path: Path, say: Callable[[str], None]) -> None:
    """Load a state dict into a model, completely or not at all."""
    current = model.state_dict()
    before = {key: value.clone() for key, value in current.items() if isinstance(value, torch.Tensor)}
    fit = fitted(state, current)
    state = _with_versions_alone(fit.state)
    if any(isinstance(value, torch.Tensor) and value.is_meta for value in state.values()):
        raise LoadError(f"the weights in `{path}` have no numbers", seen="tensors on the meta device")
    try:
        model.load_state_dict(state)
    except BaseException as error:
        with torch.no_grad():
            for key, value in before.items():
                current[key].copy_(value)
        if not isinstance(error, Exception):  # interrupted
            raise
        raise LoadError(
            f"the weights in `{path}` are not those of a {type(model).__name__}",
            seen=differences(before, state) or fact(error),
            hint=_hint_of_order(model, state, current)
            or _other_network_hint(state, path, blocks=state.keys() > current.keys()),
        ) from error
    if fit.beside:
        say(_left_out(fit, path))


def _with_versions_alone(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the same weights with no metadata but the versions of layers.

    ``load_state_dict`` takes orders from it: ``assign_to_params_buffers`` replaces the network's parameters by the file's.
    """
    plain: Any = OrderedDict(state)
    metadata = getattr(state, "_metadata", None)
    versions = {
        path: {"version": entry["version"]}
        for path, entry in (metadata.items() if isinstance(metadata, dict) else ())
        if isinstance(path, str) and isinstance(entry, dict) and type(entry.get("version")) is int
    }
    if versions:
        plain._metadata = versions
    return plain  # type: ignore[no-any-return]


def _left_out(fit: Fitted, path: Path) -> str:
    """Name the weights beside those that were taken, in a sentence."""
    others = "".join(
        f"; {f'`{printable(each, 100)}`' if each else 'what has no prefix'} would fit too" for each in fit.others[:4]
    )
    count = counted(len(fit.beside), "key")
    return (
        f"of `{path}` what is under {listed([fit.prefix])} is taken, and {count} left out: {listed(fit.beside)}{others}"
    )


def _hint_of_order(model: nn.Module, state: Mapping[str, Any], current: Mapping[str, Any]) -> str | None:
    """Say what to do if all that is missing is the blocks that the network holds; None for anything else."""
    blocks = tuple(
        f"{path}.{step['block_name']}.".lstrip(".")
        for path, module in model.named_modules()
        for step in steps_data(module)
    )
    missing = current.keys() - state.keys()
    if not missing or not state.keys() < current.keys() or not all(key.startswith(blocks) for key in missing):
        return None
    return "what is missing is the blocks: load the weights into the network first, then put the blocks in"


def _other_network_hint(state: Mapping[str, Any], path: Path, *, blocks: bool = False) -> str:
    """Say which network the weights are of, or how one of one's own is named; ``blocks``: they have all keys, and more."""
    names = architectures_of(state)
    if blocks and not names:
        plan = either(
            f"`se-inject export MODEL --weights {path} --plan plan.json`", "`si.Plan.load('plan.json').apply_(model)`"
        )
        return f"if what is too much are blocks, the plan puts them in first: {plan}"
    if names:
        arch = names[0]
        return "they are of " + either(f"`--arch {arch}`, or MODEL `{arch}`", f"`si.load({arch!r}, weights=…)`")
    make = either(
        f"`net.py:make --weights {path}`, make() without arguments", "build it in the same way, and load again"
    )
    return f"make it as it was when they were trained: {make}"
