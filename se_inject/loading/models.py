"""Files and names → a model, without running what a file brings along.

A name (``torchvision:resnet50``, ``package.module:callable``, ``net.py:Net``) is the user's own word, and
its code runs (``_names``). A file is a stranger's: it is recognised by its bytes (``_formats``), and its
pickle is read by ``_unpickling``, which makes only modules of torch, torchvision, timm and this package, tensors
and plain data, and calls nothing of the file's choosing. ``UntrustedGlobals`` names what it refused;
``trust`` lets one package out of that rule. SECURITY.md says what is promised.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, TypeVar

import torch
from torch import nn
from torch.export import ExportedProgram

from se_inject.errors import LoadError, OptionError, UntrustedGlobals, either, printable
from se_inject.forwards import original_class
from se_inject.guarding import mark
from se_inject.loading.architectures import architectures_of
from se_inject.loading.formats import PICKLES, PROGRAMS, form_of, unreadable
from se_inject.loading.opened import opened
from se_inject.loading.pickles.allowlist import NETWORKS, within
from se_inject.loading.pickles.containers import unpickle
from se_inject.loading.pickles.module_checks import holds_inert
from se_inject.loading.weights import (
    Fitted,
    Taken,
    WeightsWarning,
    contents,
    differences,
    fitted,
    is_state_dict,
    listed,
    network_or_weights,
    other_classes,
)
from se_inject.tables import counted
from se_inject.user_code import ZOOS, NoSuchFile, fact, from_code, from_zoo, importable

__all__ = ["NoSuchFile", "describe", "is_program", "load", "load_program", "load_weights_"]

T = TypeVar("T")


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
        trust: packages whose code a pickle may import and call.
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
        return load_isolated(load, source, arch=arch, weights=weights, entry=entry, say=_saying(notes))
    trust = _trustworthy([trust] if isinstance(trust, str) else trust)
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
        raise OptionError(f"`{text}` has no entries", seen=f"the entry `{entry}`", hint=_NO_ENTRIES)
    elif zoo in ZOOS:
        model = from_zoo(zoo, name)
    else:
        model = from_code(*text.rsplit(":", 1))
    model = prepare(model)
    if weights is None:
        return model
    state = _weights_in(Path(weights), entry, notes)
    current = model.state_dict()
    classes = other_classes(current, fitted(state, current).state) if zoo in ZOOS else None
    if classes is not None:
        model = prepare(from_zoo(zoo, name, num_classes=classes))
    _put_weights_(model, state, Path(weights), _saying(notes))
    return model


def write_network(path: Path, *, source: str, arch: str | None, weights: str | None, entry: str | None) -> None:
    """Read a network and write it as a whole module, and print the notes: what the confined process of ``load`` does."""
    notes: list[str] = []
    torch.save(load(source, arch=arch, weights=weights, entry=entry, notes=notes), path)
    sys.stdout.write(json.dumps(notes) + "\n")


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
    state = _weights_in(Path(path), entry, notes)
    for note in notes:
        warnings.warn(note, WeightsWarning, stacklevel=2)
    _put_weights_(model, state, Path(path), _saying(None))


def _weights_in(path: Path, entry: str | None = None, notes: list[str] | None = None) -> Mapping[str, Any]:
    """The state dict in a file; mapped where the format allows it.

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
        whole, taken = _read(path, lambda: _looked_into(_contents_of(file, form, refused), entry))
    _check_entry(path, taken, entry, notes)
    found = taken.found
    if found is None:
        hint = next(_explanations(refused), _one_of(len(taken.entries) > 1))
        which = f"several: {listed(taken.entries, most=8)}" if len(taken.entries) > 1 else "no state dict"
        raise LoadError(f"`{path}` holds {which}", seen=contents(whole), hint=hint)
    return _read(path, lambda: found.state_dict() if isinstance(found, nn.Module) else found)


def _looked_into(whole: Any, entry: str | None) -> tuple[Any, Taken]:
    """What a file holds, and the network or weights in that."""
    return whole, network_or_weights(whole, entry)


def _check_entry(path: Path, taken: Taken, entry: str | None, notes: list[str] | None) -> None:
    """Refuse an entry that isn't there; of several, note which was taken."""
    if entry is not None and taken.found is None:
        there = listed(taken.entries, most=8)
        seen = f"networks and weights are under {there}" if there else "no network or weights under a name"
        hint = either("one of them with --entry, or leave it out", "one of them as `entry`, or leave it out")
        raise OptionError(f"`{path}` has no entry `{entry}`", seen=seen, hint=hint if there else _NO_ENTRIES)
    others = [name for name in taken.entries if name != taken.entry]
    if notes is not None and entry is None and taken.entry and others:
        how = either(f"`--entry {printable(others[0], 100)}`", f"`entry={printable(others[0], 100)!r}`")
        notes.append(
            f"`{path}` holds {listed(taken.entries, most=8)}: {listed([taken.entry])} is taken; {how} takes another"
        )


def _one_of(several: bool) -> str:
    """Say what is looked for in a file, or how to choose if there are several."""
    if several:
        return "one network, or one state dict, is taken: " + either("choose it with --entry", "choose it with `entry`")
    return "one network, or one state dict, is looked for: alone, or in dicts, lists and tuples"


def _saying(notes: list[str] | None) -> Callable[[str], None]:
    """Give the function that takes a note about weights that were left out: add it to the list, or warn."""
    if notes is not None:
        return notes.append
    return lambda note: warnings.warn(note, WeightsWarning, stacklevel=4)


def _contents_of(file: IO[bytes], form: str, refused: dict[str, str | None]) -> Any:
    if form != "safetensors":
        return unpickle(file, form, (), refused, mapped=True)
    from safetensors.torch import load_file

    return load_file(file.name)


def _put_weights_(model: nn.Module, state: Mapping[str, Any], path: Path, say: Callable[[str], None]) -> None:
    """Load a state dict into a model, completely or not at all."""
    current = model.state_dict()
    before = {key: value.clone() for key, value in current.items() if isinstance(value, torch.Tensor)}
    fit = fitted(state, current)
    state = fit.state
    if any(isinstance(value, torch.Tensor) and value.is_meta for value in state.values()):
        raise LoadError(f"the weights in `{path}` have no numbers", seen="tensors on the meta device")
    try:
        model.load_state_dict(state)
    except Exception as error:
        with torch.no_grad():
            for key, value in before.items():
                current[key].copy_(value)
        raise LoadError(
            f"the weights in `{path}` are not those of a {type(model).__name__}",
            seen=differences(before, state) or fact(error),
            hint=_other_network_hint(state, path, blocks=state.keys() > current.keys()),
        ) from error
    if fit.beside:
        say(_left_out(fit, path))


def _left_out(fit: Fitted, path: Path) -> str:
    """Name the weights beside those that were taken, in a sentence."""
    others = "".join(
        f"; {f'`{printable(each, 100)}`' if each else 'what has no prefix'} would fit too" for each in fit.others[:4]
    )
    count = counted(len(fit.beside), "key")
    return (
        f"of `{path}` what is under {listed([fit.prefix])} is taken, and {count} left out: {listed(fit.beside)}{others}"
    )


def _other_network_hint(state: Mapping[str, Any], path: Path, *, blocks: bool = False) -> str:
    """Which network the weights are of, or how one of one's own is named; ``blocks``: they have keys more, and all others."""
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


def load_program(path: str | os.PathLike[str]) -> ExportedProgram | torch.jit.ScriptModule:
    """Get the program in a ``.pt2`` or TorchScript archive, without running anything of it.

    Args:
        path: what ``torch.export.save`` or ``torch.jit.save`` wrote.

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

        return _read(path, lambda: exported_program(file) if form == "pt2" else script_module(file)[0])


def is_program(source: str | os.PathLike[str]) -> bool:
    """Whether this is a file with a program that ``load`` makes modules of."""
    if not os.path.isfile(source):
        return False
    with opened(Path(source)) as file:
        return form_of(file) in PROGRAMS


def describe(source: str | os.PathLike[str], model: nn.Module, arch: str | None = None) -> str | None:
    """What a file was found to hold, in one line: its kind, the network's class, parameters; None for a name.

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


# -- files -------------------------------------------------------------------------------------------------

_WRITERS = {
    "zip": "torch.save",
    "legacy": "torch.save before torch 1.6",
    "plain": "pickle.dump",
    "safetensors": "safetensors",
    "torchscript": "torch.jit.save",
    "pt2": "torch.export.save",
}
_NO_ENTRIES = "an entry is for training checkpoints, such as `ema`: leave it out"
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
            raise OptionError(f"`{path}` has no entries", seen=_KINDS[form], hint=_NO_ENTRIES)
        if form == "safetensors":
            raise _only_weights(path, form, _read(path, lambda: _contents_of(file, form, {})))
        if form in PROGRAMS:
            network = _network(path, file, form)
            mark(network)
            return network
        if form not in PICKLES:
            raise unreadable(path, form)
        try:
            with importable(Path.cwd()) if trust else contextlib.nullcontext():
                whole, taken = _read(
                    path, lambda: _looked_into(unpickle(file, form, trust, refused, mapped=mapped), entry)
                )
            if entry in (None, *taken.entries) or all(within(name, _BESIDE_A_NETWORK) for name in refused):
                _check_entry(path, taken, entry, notes)
            found, several = taken.found, len(taken.entries) > 1
        except LoadError:
            if not refused:
                raise
            # something inert was in the way, and that is the better thing to say
            whole, found, several = None, None, False
    if is_state_dict(found):
        raise _only_weights(path, "state dict", found)
    is_whole = isinstance(found, nn.Module) and not holds_inert(found)
    if refused and not (is_whole and all(within(name, _BESIDE_A_NETWORK) for name in refused)):
        raise _untrusted(path, refused, has_weights=found is not None)
    if not isinstance(found, nn.Module):
        raise LoadError(f"`{path}` holds neither a network nor weights", seen=contents(whole), hint=_one_of(several))
    if not trust:
        mark(found)
    return found


def _network(path: Path, file: IO[bytes], form: str) -> nn.Module:
    """The program in an archive, as an ordinary network."""
    from se_inject.loading.exported.network import network_from_export
    from se_inject.loading.exported.reader import exported_program
    from se_inject.loading.torchscript.network import network_from_script
    from se_inject.loading.torchscript.reader import script_module

    program: tuple[Any, ...] = _read(path, lambda: (exported_program(file),) if form == "pt2" else script_module(file))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return network_from_export(*program) if form == "pt2" else network_from_script(*program)
    except LoadError:
        raise
    except Exception as error:
        raise LoadError(
            f"`{path}` can't be made a network of modules",
            seen=fact(error),
            hint="pass the eager module that it was made from",
        ) from error


def _only_weights(path: Path, form: str, state: Mapping[str, Any]) -> LoadError:
    """The error about weights without a network, with the network's name if its keys and shapes are known."""
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


def _read(path: Path, read: Callable[[], T]) -> T:
    """Run this reader, without a warning; whatever it stumbles over is an error about the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return read()
    except LoadError:
        raise
    except Exception as error:
        raise LoadError(
            f"`{path}` is damaged, or not what it seems to be", seen=fact(error), hint="copy or download it again"
        ) from error


# -- trust -------------------------------------------------------------------------------------------------

_OWN = frozenset(name.split(".")[0] for name in NETWORKS)
_NEVER = _OWN | {"numpy"}
_EXPLAINED = {
    "torch._dynamo.eval_frame.OptimizedModule": "it was saved compiled: save `model._orig_mod` instead",
    "torch.fx.graph_module.reduce_graph_module": "a GraphModule is saved as source code: pass what makes it",
    "torch.nn.parallel.distributed.": "it was saved wrapped: save `model.module` instead",
    "torch.ao.nn.quantized.": "it is quantised: inject first, then quantise",
    "torch._utils._rebuild_sparse_tensor": "it holds a sparse tensor: save it dense, as tensor.to_dense() gives it",
    "torch._utils._rebuild_qtensor": "it is quantised: inject first, then quantise",
    "torch.nn.parameter.UninitializedParameter": "it is lazy: call the network once on real inputs, and save it again",
    "torch.optim.swa_utils.": "it was saved within its average: save `model.module` instead",
    "timm.utils.model_ema.": "it was saved within its average: save `model.module` instead",
    "numpy.": "it holds arrays of NumPy: save tensors instead, torch.from_numpy makes them",
}


def _trustworthy(trust: Sequence[str]) -> Sequence[str]:
    for name in trust:
        top = name.split(".")[0]
        if top in sys.stdlib_module_names or top in _OWN or not top.isidentifier():
            raise OptionError(
                f"`{name}` can't be trusted",
                seen="a file could make its functions do harm" if top.isidentifier() else "no package name",
                hint="name your own package, the one that defines the model's classes",
            )
    return trust


def _explanations(refused: Iterable[str]) -> Iterator[str]:
    """What to do about code of torch's and others' that stands around a network."""
    return (why for start, why in _EXPLAINED.items() for name in refused if name.startswith(start))


def _untrusted(path: Path, refused: Mapping[str, str | None], has_weights: bool) -> LoadError:
    for name, why in refused.items():
        if why is not None:
            hint = "install the version that the model was saved with, or go to its directory"
            return LoadError(f"`{path}` needs `{name}`, which can't be imported", seen=why, hint=hint)
    packages = sorted({name.split(".")[0] for name in refused})
    if not all(package.isidentifier() for package in packages):
        return UntrustedGlobals(f"`{path}` refers to code by names that are none: {listed(refused)}")
    hint = next(_explanations(refused), "")
    if "__main__" in packages:
        hint = "what is in `__main__` was defined by the script that saved it, and is found only there"
    elif not hint and any(package in sys.stdlib_module_names or package in _NEVER for package in packages):
        hint = "that could do harm, so it can't be allowed"
    elif not hint:
        trust = either(" ".join(f"--trust {package}" for package in packages), f"trust={packages}")
        hint = f"if you trust its maker, `{trust}` imports that code and lets the file call it"
    if has_weights:
        taken = either(f"`FILE.py:CLASS --weights {path}`", f"`si.load_weights_(model, {str(path)!r})`")
        hint += f"; its tensors alone are taken by {taken}"
    return UntrustedGlobals(f"`{path}` refers to code that it may not use: {listed(refused)}", hint=hint)
