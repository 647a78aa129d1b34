"""The errors that this package raises on purpose.

::

    InjectError
    ├── TraceError        (RuntimeError)   the observed call failed
    ├── NoSites           (LookupError)    nothing here can take a block
    ├── SiteNotFound      (LookupError)    a stage or pattern that matches nothing
    ├── OptionError       (ValueError)     an option no block or plan can have
    │   └── AlreadyInjected                the site holds one of our blocks already
    ├── PluginError       (RuntimeError)   a block of somebody else's fails or breaks the contract
    ├── UnsupportedModel  (TypeError)      a wrapped, compiled, scripted or quantised module
    ├── SurgeryError      (RuntimeError)   a plan that does not fit the model it is applied to
    ├── VerificationError (RuntimeError)   a check on the result failed
    ├── WorkerError       (RuntimeError)   the process that did the work was ended by a fault or a limit
    ├── LoadError         (ValueError)     a file or name that gives no model
    │   └── UntrustedGlobals               a pickle that refers to code nobody allowed
    ├── DataError         (ValueError)     data that can't be read, or that the network can't take
    └── ExportError       (RuntimeError)   a file that could not be written, or is not right

An error says what was asked, what was seen, and what to do next. Each also derives from the builtin that
fits, so that ``except LookupError`` works for a caller who doesn't want to know this package.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

_door = "python"


def either(command: str, python: str) -> str:
    """Choose the wording of a hint: the command line's words, or Python's.

    Args:
        command: a flag: ``--force``.
        python: the same in Python: ``force=True``.
    """
    return command if _door == "command" else python


@contextlib.contextmanager
def hints_for_command() -> Iterator[None]:
    """Have hints speak of flags and commands while the block runs, instead of arguments and functions."""
    global _door
    before, _door = _door, "command"
    try:
        yield
    finally:
        _door = before


def printable(text: str, most: int | None = 300, keep: str = "") -> str:
    """Make text that may come from a file safe for a terminal: control characters are written out.

    Args:
        text: the text.
        most: letters to take of it; None: all.
        keep: others that may stay.
    """
    return "".join(letter if letter.isprintable() or letter in keep else repr(letter)[1:-1] for letter in text[:most])


def quoted(value: Any, most: int = 80) -> str:
    """Quote a value out of a file for an error: as Python writes it, of large or nested ones the beginning.

    ``repr`` would write all of it: that of a list in a list in a list, each twice, has no end.

    Args:
        value: any value; of what is not plain data, only the class is named.
        most: letters of the result.
    """
    return _quoted(value, 2)[:most]


def _quoted(value: Any, levels: int) -> str:
    kind = type(value)
    if kind is int:
        return repr(value) if value.bit_length() < 300 else f"a number of {value.bit_length():,} bits"
    if kind in (str, bytes, bytearray):
        return repr(value[:100])
    if kind in (bool, float, complex, type(None)):
        return repr(value)
    if kind in (list, tuple, set, frozenset, dict):
        items = list(itertools.islice(value.items() if kind is dict else value, 4))
        if not levels:
            return f"a {kind.__name__} of {len(value)}"
        inside = [
            ": ".join(_quoted(part, levels - 1) for part in item) if kind is dict else _quoted(item, levels - 1)
            for item in items
        ]
        text = ", ".join(inside) + ", …" * (len(value) > len(items)) + "," * (kind is tuple and len(value) == 1)
        brackets = "[]" if kind is list else "()" if kind is tuple else "{}"
        return f"{brackets[0]}{text}{brackets[1]}"
    return f"a {kind.__name__}"[:100]


_MOST_LETTERS = 10_000


class InjectError(Exception):
    """The base class: something was asked that could not be done.

    Args:
        message: what was asked or what went wrong, one line.
        seen: what was found instead; None if there is nothing to add.
        hint: what the user can do about it; None: what its kind of error has in general.
    """

    general_hint: str | tuple[str, str] | None = None
    """A hint for errors that bring none; a pair if the command line and Python say it differently."""

    exit_code = 1
    """What the command line returns for it: 1 could not be done, 2 was asked wrongly."""

    def __init__(self, message: str, *, seen: str | None = None, hint: str | None = None) -> None:
        self.message = printable(message, _MOST_LETTERS)
        self.seen = seen and printable(seen, _MOST_LETTERS, keep="\n")
        general = self.general_hint
        hint = hint or (either(*general) if isinstance(general, tuple) else general)
        self.hint = hint and printable(hint, _MOST_LETTERS, keep="\n")
        super().__init__(self.message)

    def __str__(self) -> str:
        text = self.message
        if self.seen:
            text += f"\nseen: {self.seen}"
        if self.hint:
            text += f"\n\nhint: {self.hint}"
        return text


class TraceError(InjectError, RuntimeError):
    """The network's own forward failed on the example inputs, so there is nothing to look at."""


class NoSites(InjectError, LookupError):
    """The network holds no place for a block."""


class SiteNotFound(InjectError, LookupError):
    """A stage, path or pattern matches no site."""

    general_hint = ("list the sites with `se-inject sites MODEL -v`", "print(si.find_sites(model)) lists them")

    exit_code = 2


class OptionError(InjectError, ValueError):
    """An option has a value that no block or plan can have."""

    general_hint = (
        "`se-inject --help` lists the options, `se-inject blocks NAME` those of a block",
        "help(si.plan) lists the options, `se-inject blocks NAME` those of a block",
    )

    exit_code = 2


class AlreadyInjected(OptionError):
    """The chosen sites hold a block of ours already."""

    exit_code = 1


class PluginError(InjectError, RuntimeError):
    """A plug-in's block can't be imported or built, or doesn't do what a block must."""

    general_hint = "the fault is that block's; `se_inject.testing.check_block` shows its author all that is wrong"


class UnsupportedModel(InjectError, TypeError):
    """The module is not one whose forward can be edited; the hint says what to pass instead."""


class SurgeryError(InjectError, RuntimeError):
    """The plan does not fit the model it was to be applied to. The model is as it was."""


class VerificationError(InjectError, RuntimeError):
    """The injected network failed one of its checks."""


class WorkerError(InjectError, RuntimeError):
    """The process that did the work was ended: by a fault in native code, by a limit, or by the system."""


class LoadError(InjectError, ValueError):
    """A file or a name gave no model."""

    general_hint = (
        "MODEL is a whole network in a file, or a name such as torchvision:resnet50; see `se-inject --help`",
        "it reads whole networks from files, and names such as torchvision:resnet50; see help(si.load)",
    )


class UntrustedGlobals(LoadError):
    """A pickled model refers to classes or functions outside the allow-list."""


class DataError(InjectError, ValueError):
    """The data that was given can't be read, or the network can't take it."""


class ExportError(InjectError, RuntimeError):
    """A file could not be written, or what was written does not compute what the model computes."""

    general_hint = ("choose another file or format with -o", "choose another file or format")


def with_causes(error: BaseException | None) -> Iterator[BaseException]:
    """Iterate over an exception and those that it came from, each once: torch's exporters raise some that come from themselves."""
    todo, seen = [error], set()
    while todo:
        each = todo.pop()
        if each is not None and id(each) not in seen:
            seen.add(id(each))
            yield each
            todo += [each.__context__, each.__cause__]


def out_of_memory(error: BaseException | None) -> bool:
    """Return whether an exception, or one it came from, says that memory ran out."""
    for each in with_causes(error):
        text = str(each).lower()
        if isinstance(each, MemoryError):
            return True
        if isinstance(each, RuntimeError | OSError) and any(sign in text for sign in _NO_MEMORY):
            return True
    return False


_NO_MEMORY = ("not enough memory", "can't allocate memory", "cannot allocate memory", "bad_alloc", "out of memory")
