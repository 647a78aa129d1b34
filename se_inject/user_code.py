"""Get a model by name: from torchvision or timm, or from a user's own code.

The code that a name leads to runs: the user named it.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.machinery
import importlib.util
import inspect
import os
import stat
import sys
import traceback
import types
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from torch import nn

from se_inject.errors import LoadError
from se_inject.errors import printable as printable
from se_inject.random_numbers import seeded


class NoSuchFile(LoadError, FileNotFoundError):
    """The file that was named doesn't exist."""

    exit_code = 2


class NoSuchName(LoadError, LookupError):
    """The network, module or attribute that was named doesn't exist."""

    exit_code = 2


def from_zoo(zoo: str, name: str, **options: Any) -> nn.Module:
    """Build a network with random weights; nothing is downloaded.

    Args:
        zoo: a key of ``ZOOS``.
        name: the network's name there.
        **options: of the network: ``num_classes``.

    Raises:
        NoSuchName: it has no such network.
        LoadError: the package is missing.
    """
    try:
        names, build = ZOOS[zoo]()
    except ImportError as error:
        hint = "pip install 'se-inject[zoo]'"
        raise LoadError(f"`{zoo}:{name}` needs {zoo}", seen=str(error), hint=hint) from error
    if name.split(".")[0] not in names:  # `timm:resnet50.a1_in1k` is resnet50 with that one's settings
        raise NoSuchName(f"{zoo} has no network `{name}`", hint=did_you_mean(name, names))
    try:
        with warnings.catch_warnings(), seeded(0):  # a detector's boxes, and so its MACs, depend on the weights
            warnings.simplefilter("ignore")
            return build(name, **options)
    except Exception as error:
        raise LoadError(f"{zoo} could not build `{name}`", seen=fact(error)) from error


def from_code(place: str, attribute: str) -> nn.Module:
    """Get a module from the user's own code: an instance, or what a call without arguments returns.

    Args:
        place: a module's dotted name, or a path that ends in ``.py``.
        attribute: a name in it, dotted for an attribute of an attribute.

    Raises:
        NoSuchFile: no such ``.py`` file.
        NoSuchName: no such module or attribute.
        LoadError: an exception in that code, or no ``nn.Module``.
    """
    found, path = named(place, attribute), _file_of(place)
    try:
        with importable(path.parent if path else Path.cwd()):  # for imports inside the callable
            model = found if isinstance(found, nn.Module) else found()
    except (Exception, SystemExit) as error:
        raise _failure(place, attribute, path, error) from error
    if not isinstance(model, nn.Module):
        raise LoadError(f"`{place}:{attribute}` gave no torch.nn.Module", seen=f"{type(model).__name__}")
    return model


def named(place: str, attribute: str) -> Any:
    """Find the object that a name in the user's own code refers to, without calling it.

    Args:
        place: a module's dotted name, or a path that ends in ``.py``.
        attribute: a name in it, dotted for an attribute of an attribute.

    Raises:
        NoSuchFile: no such ``.py`` file.
        NoSuchName: no such module or attribute.
        LoadError: an exception in that code.
    """
    path = _file_of(place)
    if path and not path.is_file():
        raise NoSuchFile(f"no file `{place}`")
    try:
        with importable(path.parent if path else Path.cwd()):
            found: Any = _import_file(path) if path else importlib.import_module(place)
    except (Exception, SystemExit) as error:
        raise _failure(place, attribute, path, error) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise NoSuchName(f"`{place}` has no `{attribute}`", hint=did_you_mean(part, dir(found)))
        found = getattr(found, part)
    return found


def _file_of(place: str) -> Path | None:
    return Path(place).resolve() if place.endswith(".py") else None


@contextlib.contextmanager
def importable(directory: Path) -> Iterator[None]:
    """Import from this directory first, as a script in it would."""
    entry = str(directory)
    sys.path.insert(0, entry)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(entry)


def did_you_mean(word: str, words: Iterable[str]) -> str | None:
    """Make a hint with the words that are close to this one."""
    close = difflib.get_close_matches(word, list(words))
    return f"did you mean {' or '.join(f'`{name}`' for name in close)}?" if close else None


def fact(error: BaseException) -> str:
    """Format an exception in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {printable(lines[0])}" if lines else type(error).__name__


def _torchvision() -> tuple[list[str], Callable[..., nn.Module]]:
    models: Any = importlib.import_module("torchvision.models")

    def build(name: str, **options: Any) -> nn.Module:
        known = inspect.signature(models.get_model_builder(name)).parameters
        backbone = {"weights_backbone": None} if "weights_backbone" in known else {}
        network: nn.Module = models.get_model(name, weights=None, **backbone, **options)
        return network

    return models.list_models(), build


def _timm() -> tuple[list[str], Callable[..., nn.Module]]:
    timm: Any = importlib.import_module("timm")
    return timm.list_models(), lambda name, **options: timm.create_model(name, pretrained=False, **options)


ZOOS = {"torchvision": _torchvision, "timm": _timm}


def _import_file(path: Path) -> types.ModuleType:
    """Import a file under its own name, by which a pickle finds it again, or a longer one if taken."""
    name = path.stem
    if not name.isidentifier() or _taken(name, path):
        name = f"{name}_{zlib.crc32(str(path).encode()):08x}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _taken(name: str, path: Path) -> bool:
    if name in sys.modules:
        return getattr(sys.modules[name], "__file__", None) != str(path)
    elsewhere = [entry for entry in sys.path if Path(entry).resolve() != path.parent]
    spec = importlib.machinery.PathFinder.find_spec(name, elsewhere)
    return name in sys.stdlib_module_names or (spec is not None and spec.origin is not None)


def _failure(place: str, attribute: str, path: Path | None, error: BaseException) -> LoadError:
    if isinstance(error, ModuleNotFoundError) and f"{place}.".startswith(f"{error.name}."):
        return NoSuchName(f"no module `{error.name}`", hint="a file is named as `path/to/file.py:callable`")
    where = _where(error, path)
    missing = isinstance(error, TypeError) and where is None
    hint = "it is called without arguments: name a function that passes them" if missing else None
    return LoadError(f"`{place}:{attribute}` raised {fact(error)}", seen=where, hint=hint)


def _where(error: BaseException, path: Path | None) -> str | None:
    """Find the line where an error was raised: the last one in the user's file if there is one."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    frames = [frame for frame in frames if "importlib" not in frame.filename]
    frames = [frame for frame in frames if frame.filename == str(path)] or frames
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else None


# -- files -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def regular_file(path: Path, in_directory: Callable[[Path], str] | None = None) -> Iterator[IO[bytes]]:
    """Open a regular file for reading, and close it afterwards.

    Args:
        path: of the file; a link to one is followed.
        in_directory: what to do about a directory.

    Raises:
        NoSuchFile: nothing is there.
        LoadError: a directory, a device, a pipe or a socket is there, or it can't be opened.
    """
    try:
        is_directory = path.is_dir()
    except (OSError, ValueError) as error:  # a name that no file can have
        raise LoadError(f"`{os.fspath(path)[:100]}` can't be opened", seen=fact(error)) from error
    if is_directory:
        raise LoadError(f"`{path}` is a directory", hint=in_directory(path) if in_directory else None)
    try:
        file = open(path, "rb", opener=_without_waiting)  # noqa: SIM115 - the errors are about opening alone
    except FileNotFoundError as error:
        raise _missing(path) from error
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and path.exists() and not path.is_file():  # a socket can't even be opened
            raise _no_file(path) from error
        raise LoadError(f"`{os.fspath(path)[:200]}` can't be opened", seen=str(error)) from error
    with file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise _no_file(path)
        if not os.fstat(file.fileno()).st_size and file.name.startswith(("/proc/", "/sys/")):
            raise _no_file(path)  # what the kernel makes up as it is read, perhaps without end
        yield file


def _without_waiting(path: str, flags: int) -> int:
    """Open a pipe without waiting for somebody who writes to it."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _no_file(path: Path) -> LoadError:
    return LoadError(f"`{path}` is not a file, but a device, a pipe or a socket")


def _missing(path: Path) -> NoSuchFile:
    siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    hint = did_you_mean(path.name, siblings)
    if path.is_symlink():
        return NoSuchFile(f"`{path}` is a link to a file that does not exist", seen=os.readlink(path))
    if not path.suffix and path.name == str(path):
        hint = f"a network has its package in front: `torchvision:{path}`, `timm:{path}`"
    return NoSuchFile(f"no file `{path}`", hint=hint)
