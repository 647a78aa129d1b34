"""Write the lines of a program for a TorchScript graph: names, constants, and which values are numbers."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import MutableMapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from se_inject.loading.torchscript.values import Constant, Scalar


@dataclass
class Names:
    """The names that the lines of one forward set, in all its blocks.

    Attributes:
        count: of the names so far.
        constants: tensors of the program's own, which become buffers.
        numbers: names of numbers that TorchScript has as tensors, with the dtype of these.
        dtypes: names of dtypes.
    """

    count: int = 0
    constants: dict[str, Tensor] = field(default_factory=dict)
    numbers: dict[str, str] = field(default_factory=dict)
    dtypes: set[str] = field(default_factory=set)

    def new(self) -> str:
        """Return a name that no line has set."""
        self.count += 1
        return f"v{self.count}"

    def is_number(self, value: Any) -> bool:
        """Return whether a value is a number, also where TorchScript has it as a tensor."""
        if isinstance(value, Constant):
            return isinstance(value.value, int | float)
        return isinstance(value, dict) and value.get("node") in self.numbers

    def is_whole(self, value: Any) -> bool:
        """Return whether a number is an integer."""
        if isinstance(value, Constant):
            return isinstance(value.value, int)
        return self.numbers[value["node"]] == "int64"


@dataclass(frozen=True)
class Scope:
    """A block while it is written.

    Attributes:
        names: of the whole forward.
        values: of the graph, by their names there.
        lines: of the block so far.
        reads: the tensors of the module that have been read, by their paths.
    """

    names: Names
    values: MutableMapping[str, Any] = field(default_factory=dict)
    lines: list[Any] = field(default_factory=list)
    reads: dict[str, Any] = field(default_factory=dict)

    def of_call(self, values: dict[str, Any]) -> Scope:
        """Return the scope of a function that is written out here: it sees its own values only."""
        return replace(self, values=values)

    def of_turn(self, values: dict[str, Any]) -> Scope:
        """Return the scope of a block that is written out here: it sees the values around it."""
        return replace(self, values=ChainMap(values, self.values))

    def of_branch(self, values: dict[str, Any]) -> Scope:
        """Return the scope of a block with lines of its own, which may not be run."""
        return Scope(self.names, ChainMap(values, self.values), [], dict(self.reads))

    def line(self, kind: str, *parts: Any) -> dict[str, str]:
        """Write a line that sets one name, and return this as a value."""
        return self.line_of_several(kind, 1, *parts)[0]

    def line_of_several(self, kind: str, count: int, *parts: Any) -> list[dict[str, str]]:
        """Write a line that sets ``count`` names, and return these as values."""
        names = [self.names.new() for _ in range(count)]
        self.lines.append([kind, names, *parts])
        return [{"node": name} for name in names]

    def call(self, name: str, *args: Any) -> dict[str, str]:
        """Write a line that calls a function, and return its result's name as a value."""
        return self.line("set", name, list(args), {})

    def constant(self, value: Tensor) -> dict[str, str]:
        """Keep a tensor as one of the program's own, and write the line that reads it."""
        name = f"constant_{len(self.names.constants)}"
        self.names.constants[name] = value
        return self.line("read", name)

    def tensor(self, value: Any) -> Any:
        """Convert a value to a tensor, if TorchScript has it as one and it is written as a number."""
        if isinstance(value, Scalar):
            return self.constant(value.tensor)
        if isinstance(value, dict) and value.get("node") in self.names.numbers:
            dtype = {"dtype": {"dtype": self.names.numbers[value["node"]]}}
            return self.line("set", "ops:aten.scalar_tensor.default", [value], dtype)
        return value

    def as_list(self, value: Any) -> Any:
        """Convert a value to a list where TorchScript has one: sizes of tensors are tuples in Python."""
        is_node = isinstance(value, dict) and "node" in value
        return self.call("python:list", value) if is_node else value
