"""Make a module whose whole forward is data: a program out of a file, as an ordinary network.

A program is JSON text: ``{"class", "home", "inputs", "lines", "example"}``, with lines as ``lines`` says. A class is
made with that forward. It is pickled as its text.
"""

from __future__ import annotations

import copyreg
import json
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from se_inject.errors import LoadError
from se_inject.forwards.classes import addressed, made, reduction, shared, source_name
from se_inject.forwards.lines import all_lines
from se_inject.forwards.marks import original_class
from se_inject.forwards.python import function_called
from se_inject.forwards.vocabulary import LONGEST
from se_inject.forwards.writer import Writer

ATTRIBUTES = ("dtype", "device", "shape", "layout", "requires_grad", "is_cuda", "ndim")
"""The attributes of tensors that programs out of files read."""

_KEYS = {"class", "home", "inputs", "lines", "example"}


class ProgramKind(type):
    """The class of all classes of programs; its instances are pickled by their text."""


class Program(nn.Module, metaclass=ProgramKind):
    """A module out of a program. Batch normalisation and dropout in it do what the program says in every mode.

    Attributes:
        home: the module that its class was in.
        program: its JSON text.
    """

    home: str
    program: str

    def _get_name(self) -> str:
        return type(self).__name__.removeprefix("Injected")


@addressed("program_class")
def program_class(text: str) -> Any:
    """Return the class whose forward is this program; one for each text.

    Raises:
        LoadError: it isn't a program, or calls what it must not.
    """
    if len(text) > LONGEST:
        raise LoadError("a program is too long", seen=f"{len(text):,} characters")
    return shared(("program", text), lambda: _made(text))


def _made(text: str) -> type:
    try:
        data = json.loads(text)
        name, home = data["class"], data["home"]
        if set(data) != _KEYS or not all(map(str.isidentifier, (name, *home.split(".")))):
            raise ValueError("other keys, or a class that is not a name")
        writer = Writer(data["inputs"], name, guarded=True)
        forward = writer.function(data["lines"], source_name(name, text))
    except LoadError:
        raise
    except Exception as error:
        raise LoadError(
            "a damaged file: a program of an unknown form", seen=f"{type(error).__name__}: {error}"
        ) from error
    attributes = {
        "__module__": "se_inject.generated",
        "__doc__": f"{home}.{name}, out of a program.",
        "__reduce_ex__": reduction(program, text),
        "home": home,
        "program": text,
    }
    return made(Program, name, forward, attributes)  # type: ignore[no-any-return]


def program_module(name: str, home: str, inputs: list[Any], lines: list[Any], example: Any = None) -> nn.Module:
    """Make a module with this program and nothing in it.

    Args:
        name: of its class, ``home`` of the module that is in, as far as they are names.
        inputs: the parameters of its forward, each ``[name]`` or ``[name, default]``.
        lines: its forward.
        example: shapes and dtypes of inputs that it takes, as ``inputs.shapes_of`` gives them.
    """
    data = {
        "class": name if name.isidentifier() else "Module",
        "home": home if all(map(str.isidentifier, home.split("."))) else "unknown",
        "inputs": inputs,
        "lines": lines,
        "example": example,
    }
    module: nn.Module = program(json.dumps(data))
    nn.Module.__init__(module)
    return module


def class_of(module: nn.Module) -> Any:
    """Return the class that an author wrote; for a program a key of its own, since equal classes may have different programs."""
    kind = original_class(module)
    return (kind.home, kind.__name__) if issubclass(kind, Program) else kind


def recorded_inputs(module: nn.Module) -> Any:
    """Return the shapes and dtypes of a network's inputs, if it is a program that knows them."""
    text = getattr(type(module), "program", None) if isinstance(module, Program) else None
    return json.loads(text)["example"] if text else None


def is_of_training(module: nn.Module) -> bool:
    """Return whether a program has dropout, or normalisation by the batch, written down, which act in every mode then."""
    return isinstance(module, Program) and any(map(_trains, _operations(json.loads(type(module).program)["lines"])))


def _operations(lines: list[Any]) -> Iterator[list[Any]]:
    return (line[2:] for line in all_lines(lines) if line[0] == "set")


def _trains(operation: list[Any]) -> bool:
    name, args, kwargs = operation
    if not name.startswith("ops:aten.") or name.endswith(".no_stats"):  # what instance normalisation is made of
        return False
    schema = getattr(function_called(name), "_schema", None)
    if schema is None:
        return False
    given = {**dict(zip((argument.name for argument in schema.arguments), args, strict=False)), **kwargs}
    if given.get("p") == 0 or given.get("dropout") == 0 or given.get("running_mean", given) is None:
        return False  # no dropout; no statistics but the batch's in any mode
    return any(given.get(key) is True for key in ("train", "training"))


@addressed("program")
def program(text: str) -> nn.Module:
    """Make an empty module of the class of this program; a pickle calls this."""
    kind = program_class(text)
    return kind.__new__(kind)  # type: ignore[no-any-return]


def _reduced(kind: Any) -> Any:
    text = vars(kind).get("program")
    return (program_class, (text,)) if text else kind.__qualname__


copyreg.pickle(ProgramKind, _reduced)


@addressed("FixedBatchNorm")
class FixedBatchNorm(_BatchNorm):
    """Batch normalisation of a value of any rank by its running statistics, in training too, as a program of eval mode does."""

    @property
    def training(self) -> bool:  # type: ignore[override]
        """Never, whatever mode is asked for."""
        return False

    @training.setter
    def training(self, mode: bool) -> None:
        pass

    def _check_input_dim(self, input: Tensor) -> None:
        pass
