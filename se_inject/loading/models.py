"""Files and names → a model, without running what a file brings along.

A name (``torchvision:resnet50``, ``package.module:callable``, ``net.py:Net``) is the user's own word, and
its code runs (``_names``). A file is a stranger's: it is recognised by its bytes (``_formats``), and its
pickle is read by ``_unpickling``, which makes only modules of torch, torchvision, timm and this package, tensors
and plain data, and calls nothing of the file's choosing. ``UntrustedGlobals`` names what it refused;
``trust`` lets one package out of that rule. SECURITY.md says what is promised.
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, TypeVar

import torch
from torch import nn
from torch.export import ExportedProgram

from se_inject.errors import LoadError, OptionError, UntrustedGlobals, either
from se_inject.forwards import original_class
from se_inject.guarding import mark
from se_inject.loading.architectures import architectures_of
from se_inject.loading.formats import PICKLES, PROGRAMS, form_of, unreadable
from se_inject.loading.opened import opened
from se_inject.loading.pickles.allowlist import NETWORKS, within
from se_inject.loading.pickles.containers import unpickle
from se_inject.loading.pickles.module_checks import holds_inert
from se_inject.loading.weights import (
    contents,
    differences,
    is_state_dict,
    listed,
    network_or_weights,
    other_classes,
    without_prefix,
)
from se_inject.user_code import ZOOS, NoSuchFile, fact, from_code, from_zoo, importable

__all__ = ["NoSuchFile", "describe", "is_program", "load", "load_program", "load_weights_"]

T = TypeVar("T")


def load(
    source: str | os.PathLike[str],
    *,
    arch: str | None = None,
    weights: str | os.PathLike[str] | None = None,
    trust: Sequence[str] = (),
    mmap: bool = False,
    isolated: bool = False,
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
        trust: packages whose code a pickle may import and call.
        mmap: leave the tensors in the file, and read them when they are used. Nobody may write to the file then.
        isolated: read the file in a confined process; not together with ``trust`` or ``mmap``.
        prepare: what becomes of the network before weights are loaded into it: ``plan.apply_`` puts blocks in.

    Raises:
        NoSuchFile: a file that doesn't exist.
        UntrustedGlobals: a pickle that refers to other code than it may.
        LoadError: anything else that gives no model.
        OptionError: a package that can't be trusted.
        WorkerError: with ``isolated``, the process died: of a fault in native code, a limit, or of memory.
    """
    if isolated:
        from se_inject.loading.isolated import load_isolated

        if trust or mmap:
            raise OptionError("isolated=True goes with neither trust nor mmap", hint="leave one of them out")
        return load_isolated(load, source, arch=arch, weights=weights)
    trust = _trustworthy([trust] if isinstance(trust, str) else trust)
    if arch is not None:
        if weights is not None:
            raise OptionError("with `arch`, the file is the weights already", hint="leave `weights` out")
        if os.path.exists(arch):
            raise OptionError(f"`{arch}` is a file, not the name of an architecture")
        if is_program(source):
            raise OptionError(f"`{source}` is a network already", hint="leave `arch` out")
        return load(arch, weights=source, trust=trust, prepare=prepare)
    text = os.fspath(source)
    zoo, _, name = text.partition(":")
    if os.path.exists(text) or not isinstance(source, str) or not name:
        model = _from_file(Path(text), trust, mmap)
    elif "://" in text:
        raise LoadError(f"`{text}` is on the web, and nothing is downloaded", hint="download it, and pass the file")
    elif zoo in ZOOS:
        model = from_zoo(zoo, name)
    else:
        model = from_code(*text.rsplit(":", 1))
    model = prepare(model)
    if weights is None:
        return model
    state = _weights_in(Path(weights))
    current = model.state_dict()
    classes = other_classes(current, without_prefix(state, current)) if zoo in ZOOS else None
    if classes is not None:
        model = prepare(from_zoo(zoo, name, num_classes=classes))
    _put_weights_(model, state, Path(weights))
    return model


def write_network(path: Path, *, source: str, arch: str | None, weights: str | None) -> None:
    """Read a network and write it as a whole module: what the confined process of ``load`` does."""
    torch.save(load(source, arch=arch, weights=weights), path)


def load_weights_(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load the state dict in a file into a model.

    The file may also be a training checkpoint, or a whole pickled module even of an unknown class: only its
    tensors are used. A prefix of all keys (``module.``, ``model.``, ``_orig_mod.``) goes if they fit then.

    Args:
        model: the model; it keeps its dtypes and devices.
        path: a safetensors file, or what ``torch.save`` wrote.

    Raises:
        NoSuchFile: a file that doesn't exist.
        LoadError: no state dict in it, or not exactly the model's keys and shapes; the model is as it was.
    """
    _put_weights_(model, _weights_in(Path(path)), Path(path))


def _weights_in(path: Path) -> Mapping[str, Any]:
    """The state dict in a file; mapped where the format allows it.

    Raises:
        NoSuchFile: a file that doesn't exist.
        LoadError: no state dict in it.
    """
    refused: dict[str, str | None] = {}
    with opened(path) as file:
        form = form_of(file)
        if form not in ("safetensors", *PICKLES):
            raise unreadable(path, form)
        whole, found = _read(path, lambda: _looked_into(_contents_of(file, form, refused)))
    if found is None:
        hint = next(_explanations(refused), _ONE_OF_THESE)
        raise LoadError(f"`{path}` holds no state dict", seen=contents(whole), hint=hint)
    return _read(path, lambda: found.state_dict() if isinstance(found, nn.Module) else found)


def _looked_into(whole: Any) -> tuple[Any, Any]:
    """What a file holds, and the network or weights in that."""
    return whole, network_or_weights(whole)


def _contents_of(file: IO[bytes], form: str, refused: dict[str, str | None]) -> Any:
    if form != "safetensors":
        return unpickle(file, form, (), refused, mapped=True)
    from safetensors.torch import load_file

    return load_file(file.name)


def _put_weights_(model: nn.Module, state: Mapping[str, Any], path: Path) -> None:
    """Load a state dict into a model, completely or not at all."""
    current = model.state_dict()
    before = {key: value.clone() for key, value in current.items() if isinstance(value, torch.Tensor)}
    state = without_prefix(state, current)
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
            hint=_other_network_hint(state, path),
        ) from error


def _other_network_hint(state: Mapping[str, Any], path: Path) -> str:
    """Which network the weights are of, or how one of one's own is named."""
    names = architectures_of(state)
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
_ONE_OF_THESE = "one network, or one state dict, is looked for: alone, or in dicts, lists and tuples"
_KINDS = {"torchscript": "a TorchScript archive", "pt2": "an exported program"}


_BESIDE_A_NETWORK = (
    "argparse.Namespace", "builtins.dict", "builtins.float", "builtins.int", "builtins.list", "collections.defaultdict",
    "datetime", "numpy", "omegaconf", "pathlib", "timm.utils.model_ema", "torch.amp", "torch.optim",
    "types.SimpleNamespace",
)  # fmt: skip
"""What a training script saves beside its network. It isn't read, and the network can be had without it."""


def _from_file(path: Path, trust: Sequence[str], mapped: bool) -> nn.Module:
    refused: dict[str, str | None] = {}
    with opened(path) as file:
        form = form_of(file)
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
                whole, found = _read(path, lambda: _looked_into(unpickle(file, form, trust, refused, mapped=mapped)))
        except LoadError:
            if not refused:
                raise
            whole = found = None  # something inert was in the way, and that is the better thing to say
    if is_state_dict(found):
        raise _only_weights(path, "state dict", found)
    is_whole = isinstance(found, nn.Module) and not holds_inert(found)
    if refused and not (is_whole and all(within(name, _BESIDE_A_NETWORK) for name in refused)):
        raise _untrusted(path, refused, has_weights=found is not None)
    if not isinstance(found, nn.Module):
        raise LoadError(f"`{path}` holds neither a network nor weights", seen=contents(whole), hint=_ONE_OF_THESE)
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
