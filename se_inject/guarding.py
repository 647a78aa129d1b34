"""Refuse what a network out of a stranger's file has no business with while it runs.

In: a network that ``loading`` made of a file that nobody trusts. Out: a ``LoadError`` that names the module which compiled source,
wrote a file, started a process, opened a connection or made a module. Must not know: files, sites, or what runs the network.

Python tells an audit hook of each such act before it happens (PEP 578). The hook is installed once, when the first network is
marked, and returns at once unless the current thread is within ``guarded``; other threads are never looked at. An act counts
as the network's if a forward of one of its modules is being called: what torch does before and after that is torch's own.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import os
import sys
import sysconfig
import tempfile
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from se_inject.errors import LoadError
from se_inject.forbidden_acts import ACTS, PATCHED, READING, UNREPORTED

if TYPE_CHECKING:
    from torch import nn

P = ParamSpec("P")
T = TypeVar("T")

_marked: weakref.WeakSet[Any] = weakref.WeakSet()
_guards: dict[int, _Guard] = {}
"""By thread; a thread has one at most."""

_lock = threading.Lock()
_is_installed = False

_HINT = "a network has no business with that: don't trust this file"
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_IMPORTING = importlib._bootstrap._find_and_load.__code__  # type: ignore[attr-defined]
"""Whether an import is going on is asked by this very code: names of files are what whoever compiles says."""
_PACKAGES = ("torch.nn.", "torchvision.", "timm.", "se_inject", "torch.ao.")
_OF_TORCH_ITSELF = (
    "symbolic_shapes.py",
    "torch/fx/operator_schemas.py",
    "collections/__init__.py",
    "dataclasses.py",
    "/sympy/",
    "enum.py",
    "typing.py",
)
"""Files whose functions make small functions of text for torch, none of which is the network's."""


class _Guard:
    """One thread that runs a stranger's network."""

    def __init__(self, models: tuple[Any, ...], frame: types.FrameType | None) -> None:
        self.models = models
        self.frame = frame
        self.refusal: LoadError | None = None
        self.is_looking = False


def mark(model: nn.Module) -> None:
    """Remember that a network came out of a file that nobody trusts, and each module in it."""
    tempfile.gettempdir()  # torch asks while it is imported, and Python finds out by writing a file and removing it
    _install()
    _marked.update(model.modules())


def mark_like(copy: nn.Module, original: nn.Module) -> None:
    """Remember it of a copy too."""
    if is_marked(original):
        mark(copy)


def is_marked(model: nn.Module) -> bool:
    """Return whether a network, or one of its modules, came out of an untrusted file."""
    return len(_marked) > 0 and any(module in _marked for module in model.modules())


@contextlib.contextmanager
def guarded(*models: nn.Module) -> Iterator[None]:
    """Refuse what a forward has no business with, if one of these networks came out of a stranger's file.

    In this thread, and until the block ends; without such a network nothing is different.

    Args:
        *models: the networks that are run within.

    Raises:
        LoadError: a module of theirs did what it must not; it hasn't happened.
    """
    thread = threading.get_ident()
    if thread in _guards or not any(map(is_marked, models)):
        yield
        return
    guard = _Guard(models, sys._getframe(2))
    with _lock:
        _guards[thread] = guard
        _patch()
    try:
        yield
    except BaseException as error:
        if guard.refusal is not None and error is not guard.refusal:  # somebody caught it, and stumbled
            raise guard.refusal from error
        raise
    finally:
        with _lock:
            del _guards[thread]
            _patch()
        guard.frame = None
    if guard.refusal is not None:
        raise guard.refusal


def under_guard(function: Callable[P, T]) -> Callable[P, T]:
    """Run a function under ``guarded`` of all networks among its arguments."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        if not _marked:
            return function(*args, **kwargs)
        from torch import nn

        models = [value for value in (*args, *kwargs.values()) if isinstance(value, nn.Module)]
        with guarded(*models):
            return function(*args, **kwargs)

    return wrapper


# -- Python's acts -----------------------------------------------------------------------------------------


def _install() -> None:
    global _is_installed
    with _lock:
        if not _is_installed:
            _is_installed = True
            sys.addaudithook(_audit)


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if not _guards:
        return
    guard = _guards.get(threading.get_ident())
    if guard is None or guard.is_looking:
        return
    guard.is_looking = True  # looking raises events of its own
    try:
        what = _forbidden(event, args)
        if what is not None:
            _refuse(guard, what, event, args)
    finally:
        guard.is_looking = False


def _forbidden(event: str, args: tuple[Any, ...]) -> str | None:
    """Describe an audit event that a forward must not cause; None for any other."""
    if event in READING:
        return None
    if event == "open":
        _, mode, flags = args
        writes = any(letter in mode for letter in "wax+") if isinstance(mode, str) else bool((flags or 0) & _WRITING)
        return "opens a file for writing" if writes else None
    if event == "import":
        top = str(args[0]).partition(".")[0]
        if top in UNREPORTED:
            return f"imports `{top}`"
        return None if top in sys.modules or top in sys.stdlib_module_names else ACTS["import"]
    return ACTS.get(event) or ACTS.get(event[: event.find(".") + 1] or event) or _starting(event)


def _starting(event: str) -> str | None:
    return next((what for start, what in ACTS.items() if event.startswith(start) and "." in start), None)


def _refuse(guard: _Guard, what: str, event: str, args: tuple[Any, ...] = ()) -> None:
    module = _running(guard, event, args)
    if module is None:
        return
    place = next((path for model in guard.models for path, each in model.named_modules() if each is module), "")
    kind = type(module).__name__
    where = f"`{place}`, a {kind}," if place else f"a {kind}"
    guard.refusal = LoadError(f"{where} of this network {what} when it is run", seen=f"`{event}`", hint=_HINT)
    raise guard.refusal


def _running(guard: _Guard, event: str, args: tuple[Any, ...]) -> Any:
    """Return the module whose forward is at work; None if none is, or if what happens is an import or torch's own."""
    frame: types.FrameType | None = sys._getframe(3)
    if event in ("compile", "exec") and (_parses_alone(frame) or _is_of_torch_itself(frame)):
        return None
    may_import = event in _OF_AN_IMPORT and _is_installed_code(event, args)
    while frame is not None and frame is not guard.frame:
        code = frame.f_code
        if may_import and code is _IMPORTING:
            return None
        is_body = code.co_name == "<module>" and code.co_filename.startswith(_folders())
        may_import |= is_body and not event.startswith(_OF_NO_IMPORT)
        if code.co_argcount and (code.co_name.startswith("forward") or code.co_name == "_call_impl"):
            found = frame.f_locals.get(code.co_varnames[0])
            if _is_of_a_network(found):
                return found
        frame = frame.f_back
    return None


def _parses_alone(frame: types.FrameType | None) -> bool:
    """Return whether this is ``ast.parse``, of which no code comes: Python calls it to show where in a line an error was."""
    return frame is not None and frame.f_code is ast.parse.__code__ and frame.f_globals is vars(ast)


def _is_of_torch_itself(frame: types.FrameType | None) -> bool:
    """Return whether code is made by one of ``_OF_TORCH_ITSELF`` for torch, or for a module that is being imported."""
    if frame is None or not _is_among(frame, _OF_TORCH_ITSELF):
        return False
    while frame is not None and _is_among(frame, _OF_TORCH_ITSELF):
        frame = frame.f_back
    if frame is None:
        return False
    name, torch = frame.f_code.co_filename, _folders()[0]
    return (name.startswith(torch) and not name.startswith(f"{torch}nn{os.sep}")) or (
        frame.f_code.co_name == "<module>" and name.startswith(_folders())
    )


def _is_among(frame: types.FrameType, parts: tuple[str, ...]) -> bool:
    return any(part in frame.f_code.co_filename for part in parts)


def _is_installed_code(event: str, args: tuple[Any, ...]) -> bool:
    """Return whether the code that an import reads, compiles or executes is Python's or an installed package's."""
    if event in ("compile", "exec"):
        name = args[1] if event == "compile" else getattr(args[0], "co_filename", "")
        name = os.fsdecode(name) if isinstance(name, str | bytes) else ""
        return name.startswith(("<frozen ", *_folders()))
    return True


_OF_AN_IMPORT = ("compile", "exec", "import", "marshal.loads", "marshal.load", "code.__new__", "os.listdir")
"""What importing a module does by itself."""
_OF_NO_IMPORT = (
    *(
        "os.system",
        "os.exec",
        "os.posix_spawn",
        "os.fork",
        "os.kill",
        "os.remove",
        "os.rename",
        "os.rmdir",
        "os.truncate",
    ),
    *("subprocess.", "socket.connect", "socket.bind", "socket.sendto", "pty.", "shutil.rmtree"),
)
"""What no module of torch's or Python's does when it is imported; they make folders for what they compile."""


@functools.cache
def _folders() -> tuple[str, ...]:
    """List the folders where torch, Python and its packages are, torch's first."""
    import torch

    paths = sysconfig.get_paths()
    home = os.path.dirname(torch.__file__)
    found = [home, os.path.dirname(home), *(paths[key] for key in ("stdlib", "platstdlib", "purelib", "platlib"))]
    return tuple(folder.rstrip(os.sep) + os.sep for folder in dict.fromkeys(found))


def _is_of_a_network(found: Any) -> bool:
    from torch import fx, nn

    is_module = isinstance(found, nn.Module) and not isinstance(found, fx.GraphModule)
    return is_module and f"{type(found).__module__}.".startswith(_PACKAGES)


# -- modules -----------------------------------------------------------------------------------------------

_originals: list[tuple[Any, str, Any]] = []


def _patch() -> None:
    """While a thread is guarded, look at calls of what Python reports nothing of: making modules, writing in C++, and some of ``os``.

    It acts in that thread alone.
    """
    if _guards and not _originals:
        for what, places in PATCHED.items():
            for module, names in places.items():
                for name in names:
                    _patch_one(sys.modules.get(module), name, what)
    elif not _guards:
        while _originals:
            owner, name, original = _originals.pop()
            if original is None:
                delattr(owner, name)
            else:
                setattr(owner, name, original)


def _patch_one(owner: Any, path: str, what: str) -> None:
    *through, name = path.split(".")
    for part in through:
        owner = getattr(owner, part, None)
    found = getattr(owner, name, None)
    if found is not None:
        own = vars(owner).get(name)
        with contextlib.suppress(TypeError):  # a class that can't be changed, in some version
            setattr(owner, name, _looked_at(found, what, f"{owner.__name__}.{name}"))
            _originals.append((owner, name, own))


def _looked_at(original: Callable[P, T], what: str, name: str) -> Callable[P, T]:
    @functools.wraps(original)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        guard = _guards.get(threading.get_ident())
        if guard is not None:
            kind = f", a {type(args[0]).__name__}," if name.endswith("__init__") else ""
            _refuse(guard, f"{what}{kind}", name)
        return original(*args, **kwargs)

    return call
