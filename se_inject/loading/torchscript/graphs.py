"""Gather what the forwards of one TorchScript archive share, and what a graph shows before it is translated."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from se_inject.errors import LoadError

_MANGLED = re.compile(r"\.___torch_mangle_\d+")
_MOST_STEPS = 40_000
DEEPEST = 50
"""Calls within calls."""
CHANGING = ("append", "extend", "insert", "pop", "clear", "reverse", "sort", "_set_item", "remove", "Delete")
"""Operators that change a list or dict."""
_READING = ("prim::ListUnpack", "prim::max", "prim::min", "prim::isinstance")


def class_of(script: Any) -> str:
    """Return the qualified name of a module's class in its archive."""
    return str(script._c._type().qualified_name())


def plain_class_of(script: Any) -> str:
    """Return that name without the number that distinguishes classes of one name."""
    return _MANGLED.sub("", class_of(script)).removeprefix("__torch__.")


class Archive:
    """What the forwards of one archive share.

    Attributes:
        function: the archive's function of a qualified name.
        example: a module of each class.
        same: whether a method of a class does what its forward does.
        borrowing: classes whose forward gets modules from its callers, as tracing has it for those that several others
            hold, and has been written so that it calls its own.
        outlets: what the forward of a class returns besides its own values: for each part of the tuple the number of the
            input that it hands back, or None. Tracing has it so where a value went through an identity.
    """

    def __init__(self, script: Any, function: Callable[[str], Any]) -> None:
        self.function = function
        self.same: dict[tuple[str, str], bool] = {}
        self.borrowing: set[str] = set()
        self.outlets: dict[str, list[int | None]] = {}
        self._steps = 0
        self._whole: set[str] = {class_of(script)}
        """Classes whose tuples are used as tuples somewhere; the network's own too."""
        self._called: dict[str, set[str]] = {}
        """The methods of each class that are called."""
        self._changed: set[str] = set()
        """The types of all lists and dicts that are changed somewhere."""
        self._seen: set[str] = set()
        self._graphs: dict[tuple[str, str], Any] = {}
        self.example = {class_of(module): module for module in script.modules()}
        for kind, each in self.example.items():
            for name in each._c._method_names():
                self._graphs[kind, name] = each._c._get_method(name).graph
                self._look_at(self._graphs[kind, name])

    def _look_at(self, block: Any) -> None:
        for node in block.nodes():
            self.step()
            if node.kind() == "prim::CallMethod":
                kind = node.inputsAt(0).type().annotation_str
                self._called.setdefault(kind, set()).add(node.s("name"))
                uses = [use.user for output in node.outputs() for use in output.uses()]
                if not node.s("name").startswith("forward") or any(user.kind() != "prim::TupleUnpack" for user in uses):
                    self._whole.add(kind)
            elif node.kind() == "prim::CallFunction":
                name = node.inputsAt(0).type().annotation_str
                if name not in self._seen:
                    self._seen.add(name)
                    self._look_at(self.function(name).graph)
            elif node.kind().rpartition("::")[2] in CHANGING:
                changed = node.inputsAt(0).type()
                if changed.kind() in ("ListType", "DictType"):  # tensors can be sorted too
                    self._changed.add(changed.annotation_str)
            for inner in node.blocks():
                self._look_at(inner)

    def graph_called(self, node: Any) -> Any:
        """Return the graph that a node calls."""
        if node.kind() == "prim::CallFunction":
            return self.function(node.inputsAt(0).type().annotation_str).graph
        return self._graphs[node.inputsAt(0).type().annotation_str, node.s("name")]

    def forward_of(self, script: Any) -> str | None:
        """Return the name of a module's forward, another one if it was overloaded; None if it has none, or several."""
        names = script._c._method_names()
        if "forward" in names:
            return "forward"
        overloads = [name for name in names if name.startswith("forward__")]
        if len(overloads) > 1:
            overloads = [name for name in overloads if name in self._called.get(class_of(script), ())]
        return overloads[0] if len(overloads) == 1 else None

    def hands_back(self, kind: str, inputs: list[Any], result: Any) -> Any:
        """Return the result of a class's forward without the inputs that its callers have already."""
        parts = result.get("tuple") if isinstance(result, dict) else None
        names = [{"node": name} for name, *_ in inputs]
        if not parts or kind in self._whole or all(part in names for part in parts):
            return result
        if any(part in names for part in parts):
            self.outlets[kind] = [names.index(part) if part in names else None for part in parts]
            parts = [part for part in parts if part not in names]
        return parts[0] if len(parts) == 1 and kind in self.outlets else {"tuple": parts}

    def step(self) -> None:
        """Count one operation that is translated.

        Raises:
            LoadError: that are more than any network has: functions that call each other many times over.
        """
        self._steps += 1
        if self._steps > _MOST_STEPS:
            raise LoadError(f"a TorchScript archive with more than {_MOST_STEPS:,} operations, written out")

    def is_one_object(self, value: Any, depth: int = 0) -> bool:
        """Return whether a list must keep its identity: it is changed, or goes where that can't be followed."""
        self.step()
        for use in value.uses():
            node, kind = use.user, use.user.kind()
            if kind in ("prim::CallFunction", "prim::CallMethod"):
                graph = self.graph_called(node)
                offset = use.offset - (kind == "prim::CallFunction")
                if depth > DEEPEST or self.is_one_object(list(graph.inputs())[offset], depth + 1):
                    return True
            elif kind.rpartition("::")[2] in CHANGING or (kind.startswith("prim::") and kind not in _READING):
                return True
        holds_others = re.search(r"\[.*(List|Dict)\[", value.type().annotation_str)
        return holds_others is not None and any(True for _ in value.uses())

    def may_change(self, value: Any) -> bool:
        """Return whether a list, or one in it, may be changed somewhere: it is passed on, and others of its type are changed."""
        kind = value.type().annotation_str
        return any(changed in kind for changed in self._changed) and self.is_one_object(value)
