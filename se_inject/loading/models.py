"""Read a network from a file or by name, without running code that the file brings along.

A name (``torchvision:resnet50``, ``package.module:callable``, ``net.py:Net``) is the user's own word, and
its code runs (``user_code``). A file is a stranger's: it is recognised by its bytes (``formats``), and its
pickle is read by ``pickles``, which makes only modules of torch, torchvision, timm and this package, tensors
and plain data, and calls nothing of the file's choosing. ``UntrustedGlobals`` names what it refused;
``trust`` lets one package out of that rule. SECURITY.md says what is promised.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn
from torch.export import ExportedProgram

from se_inject.errors import LoadError, OptionError, either
from se_inject.forwards import original_class
from se_inject.guarding import mark
from se_inject.loading.architectures import architectures_of
from se_inject.loading.formats import PICKLES, PROGRAMS, form_of, unreadable
from se_inject.loading.opened import checked_read, opened
from se_inject.loading.pickles.allowlist import within
from se_inject.loading.pickles.containers import unpickle
from se_inject.loading.pickles.module_checks import holds_placeholder
from se_inject.loading.refusals import trustworthy, untrusted
from se_inject.loading.weight_files import (
    NO_ENTRIES,
    check_entry,
    contents_of,
    looked_into,
    put_weights_,
    saying,
    weights_in,
    what_is_taken,
)
from se_inject.loading.weights import (
    contents,
    fitted,
    is_state_dict,
    listed,
    other_classes,
)
from se_inject.user_code import ZOOS, fact, from_code, from_zoo, importable

__all__ = ["describe", "is_program", "load", "load_program"]


def load(
    source: str | os.PathLike[str],
    *,
    arch: str | None = None,
    weights: str | os.PathLike[str] | None = None,
    entry: str | None = None,
    trust: Sequence[str] = (),
    mmap: bool = False,
    isolated: bool = False,
    notes: list[str] | None = None,
    prepare: Callable[[nn.Module], nn.Module] = lambda model: model,
) -> nn.Module:
    """Get a model from a file, or by its name.

    Downloads nothing, runs no code out of a file, and leaves training flags as they are. But the file is read in
    this process, by torch's readers too, and these can crash at what a hostile file says; with ``isolated`` it is
    read in a process of its own, which the system confines and limits, and only tensors and plain data of allowed
    classes come back. That takes the time to start Python and to import torch.

    Args:
        source: a file with a whole pickled module, a TorchScript archive or an exported program (``.pt2``), which
            become ordinary modules; ``torchvision:NAME`` or ``timm:NAME``, built with random weights;
            ``package.module:callable`` or ``path/to/file.py:callable``, called without arguments.
        arch: the network's name if ``source`` is a file of weights: ``load(file, arch=name)`` is
            ``load(name, weights=file)``.
        weights: a file to take the weights from, as ``load_weights_`` does.
        entry: which entry of a training checkpoint to take (``"ema"``), of ``weights`` if that is given, else of
            ``source``. None: the first of ``state_dict``, ``model``, …, then of the averages.
        trust: packages whose code a pickle may import and call; namespaces of operators, beside those of torch and
            torchvision, that an archive of TorchScript or ``.pt2`` may call, from a package of the same name if they are
            not registered yet.
        mmap: leave the tensors in the file, and read them when they are used. Nobody may write to the file then.
        isolated: read the file in a confined process; not together with ``trust`` or ``mmap``.
        notes: a list that gets what there is to say: which of several entries was taken, what was left out. None: a
            warning, of what was left out alone.
        prepare: what becomes of the network before weights are loaded into it: ``plan.apply_`` puts blocks in.

    Warns:
        WeightsWarning: the file holds weights beside the network's, and they were left out.

    Raises:
        NoSuchFile: a file that doesn't exist.
        UntrustedGlobals: a pickle that refers to other code than it may.
        LoadError: anything else that gives no model.
        OptionError: a package that can't be trusted, or an entry that isn't there.
        WorkerError: with ``isolated``, the process died: of a fault in native code, a limit, or of memory.
    """
    if isolated:
        from se_inject.loading.isolated import load_isolated

        if trust or mmap:
            raise OptionError("isolated=True goes with neither trust nor mmap", hint="leave one of them out")
        return load_isolated(load, source, arch=arch, weights=weights, entry=entry, say=saying(notes))
    trust = trustworthy([trust] if isinstance(trust, str) else trust)
    if arch is not None:
        if weights is not None:
            raise OptionError("with `arch`, the file is the weights already", hint="leave `weights` out")
        if os.path.exists(arch):
            raise OptionError(f"`{arch}` is a file, not the name of an architecture")
        if is_program(source):
            raise OptionError(f"`{source}` is a network already", hint="leave `arch` out")
        return load(arch, weights=source, entry=entry, trust=trust, notes=notes, prepare=prepare)
    text = os.fspath(source)
    zoo, _, name = text.partition(":")
    if os.path.exists(text) or not isinstance(source, str) or not name:
        model = _from_file(Path(text), trust, mmap, entry if weights is None else None, notes)
    elif "://" in text:
        raise LoadError(f"`{text}` is on the web, and nothing is downloaded", hint="download it, and pass the file")
    elif entry is not None and weights is None:
        raise OptionError(f"`{text}` has no entries", seen=f"the entry `{entry}`", hint=NO_ENTRIES)
    elif zoo in ZOOS:
        model = from_zoo(zoo, name)
    else:
        model = from_code(*text.rsplit(":", 1))
    model = prepare(model)
    if weights is None:
        return model
    state = weights_in(Path(weights), entry, notes)
    current = model.state_dict()
    classes = other_classes(current, fitted(state, current).state) if zoo in ZOOS else None
    if classes is not None:
        model = prepare(from_zoo(zoo, name, num_classes=classes))
    put_weights_(model, state, Path(weights), saying(notes))
    return model


def write_network(path: Path, *, source: str, arch: str | None, weights: str | None, entry: str | None) -> None:
    """Read a network and write it as a whole module, and print the notes: what the confined process of ``load`` does."""
    notes: list[str] = []
    network = load(source, arch=arch, weights=weights, entry=entry, notes=notes)
    kept = [note for note in notes if " stays " in note]
    if kept:
        raise LoadError(
            "a part of this network can't be made modules, and the confined process can't hand it over as it is",
            seen=kept[0],
            hint="leave `isolated` out, or pass the eager module that the archive was made from",
        )
    torch.save(network, path)
    sys.stdout.write(json.dumps(notes) + "\n")


def load_program(
    path: str | os.PathLike[str], *, trust: Sequence[str] = ()
) -> ExportedProgram | torch.jit.ScriptModule:
    """Get the program in a ``.pt2`` or TorchScript archive, without running anything of it.

    Args:
        path: what ``torch.export.save`` or ``torch.jit.save`` wrote.
        trust: as for ``load``.

    Raises:
        NoSuchFile: a file that doesn't exist.
        LoadError: no such archive, or one that can't be read safely.
    """
    path = Path(path)
    with opened(path) as file:
        form = form_of(file)
        if form not in PROGRAMS:
            raise LoadError(f"`{path}` is neither an exported program nor a TorchScript archive")
        from se_inject.loading.exported.reader import exported_program
        from se_inject.loading.torchscript.reader import script_module

        trust = trustworthy(trust)
        return checked_read(
            path, lambda: exported_program(file, trust) if form == "pt2" else script_module(file, trust)[0]
        )


def is_program(source: str | os.PathLike[str]) -> bool:
    """Return whether this is a file with a program that ``load`` makes modules of."""
    if not os.path.isfile(source):
        return False
    with opened(Path(source)) as file:
        return form_of(file) in PROGRAMS


def describe(source: str | os.PathLike[str], model: nn.Module, arch: str | None = None) -> str | None:
    """Describe what a file was found to hold, in one line: its kind, the network's class, parameters; None for a name.

    No file of a whole network or of weights records the version of torch that wrote it.

    Args:
        source: as given to ``load``.
        model: as ``load`` gave it.
        arch: as given to ``load``.
    """
    if not os.path.exists(source):
        return None
    with opened(Path(source)) as file:
        form = form_of(file)
        writer = _WRITERS[form]
        if form == "pt2":
            from se_inject.loading.exported.reader import torch_version

            writer += f", torch {torch_version(file)}"
    parameters = sum(parameter.numel() for parameter in model.parameters())
    what = _KINDS.get(form, "a pickled network") if arch is None else f"weights for {arch}"
    return f"{os.fspath(source)}: {what} ({writer}), {original_class(model).__name__}, {parameters:,} parameters"


_WRITERS = {
    "zip": "torch.save",
    "legacy": "torch.save before torch 1.6",
    "plain": "pickle.dump",
    "safetensors": "safetensors",
    "torchscript": "torch.jit.save",
    "pt2": "torch.export.save",
}
_KINDS = {"torchscript": "a TorchScript archive", "pt2": "an exported program"}
_BESIDE_A_NETWORK = (
    "argparse.Namespace", "builtins.dict", "builtins.float", "builtins.int", "builtins.list", "collections.defaultdict",
    "datetime", "numpy", "omegaconf", "pathlib", "timm.utils.model_ema", "torch.amp", "torch.optim",
    "types.SimpleNamespace",
)  # fmt: skip
"""What a training script saves beside its network. It isn't read, and the network can be had without it."""


def _from_file(
    path: Path, trust: Sequence[str], mapped: bool, entry: str | None = None, notes: list[str] | None = None
) -> nn.Module:
    refused: dict[str, str | None] = {}
    with opened(path) as file:
        form = form_of(file)
        if entry is not None and form in PROGRAMS:
            raise OptionError(f"`{path}` has no entries", seen=_KINDS[form], hint=NO_ENTRIES)
        if form == "safetensors":
            raise _only_weights(path, form, checked_read(path, lambda: contents_of(file, form, {})))
        if form in PROGRAMS:
            with importable(Path.cwd()) if trust else contextlib.nullcontext():
                network = _network(path, file, form, trust, notes)
            if not trust:
                mark(network)
            return network
        if form not in PICKLES:
            raise unreadable(path, form)
        try:
            with importable(Path.cwd()) if trust else contextlib.nullcontext():
                whole, taken = checked_read(
                    path, lambda: looked_into(unpickle(file, form, trust, refused, mapped=mapped), entry)
                )
            if entry in (None, *taken.entries) or all(within(name, _BESIDE_A_NETWORK) for name in refused):
                check_entry(path, taken, entry, notes)
            found, several = taken.found, len(taken.entries) > 1
        except LoadError:
            if not refused:
                raise
            # a placeholder was in the way, and that is the better thing to say
            whole, found, several = None, None, False
    if is_state_dict(found):
        raise _only_weights(path, "state dict", found)
    is_whole = isinstance(found, nn.Module) and not holds_placeholder(found)
    if refused and not (is_whole and all(within(name, _BESIDE_A_NETWORK) for name in refused)):
        raise untrusted(path, refused, has_weights=found is not None)
    if not isinstance(found, nn.Module):
        raise LoadError(
            f"`{path}` holds neither a network nor weights", seen=contents(whole), hint=what_is_taken(several)
        )
    if not trust:
        mark(found)
    return found


def _network(path: Path, file: IO[bytes], form: str, trust: Sequence[str], notes: list[str] | None) -> nn.Module:
    """Make an ordinary network of the program in an archive; packages that are trusted register their operators first."""
    from se_inject.loading.exported.network import network_from_export
    from se_inject.loading.exported.reader import exported_program
    from se_inject.loading.torchscript.network import network_from_script
    from se_inject.loading.torchscript.reader import script_module

    for name in trust:
        with contextlib.suppress(ImportError):  # a namespace of operators that is registered otherwise
            importlib.import_module(name)
    program: tuple[Any, ...] = checked_read(
        path, lambda: (exported_program(file, trust),) if form == "pt2" else script_module(file, trust)
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if form == "pt2":
                return network_from_export(program[0], notes)
            return network_from_script(program[0], program[1], notes)
    except LoadError:
        raise
    except Exception as error:
        raise LoadError(
            f"`{path}` can't be made a network of modules",
            seen=fact(error),
            hint="pass the eager module that it was made from",
        ) from error


def _only_weights(path: Path, form: str, state: Mapping[str, Any]) -> LoadError:
    """Make the error about weights without a network, with the network's name if its keys and shapes are known."""
    tensors = [value for value in state.values() if isinstance(value, torch.Tensor)]
    seen = f"{len(tensors)} tensors, {sum(tensor.numel() for tensor in tensors):,} numbers"
    names = architectures_of(state)
    if not names:
        return unreadable(path, form, seen)
    seen += f"; its keys and shapes are those of {listed(names, most=3)}"
    return unreadable(
        path,
        form,
        seen,
        hint=either(f"`se-inject {path} --arch {names[0]}`", f"`si.load({str(path)!r}, arch={names[0]!r})`"),
    )
