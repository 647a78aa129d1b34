"""Edit the forward of an ``fx.GraphModule``: torch keeps it on a class of each module's own, and writes it anew.

So such a module is copied with the class it has, and pickled as the module without blocks and the body. Its ``graph`` and
``code`` are those of the edited forward: torch runs graphs instead of forwards in places (``torch.export``,
``fx.Interpreter``), and would leave the blocks out. A new graph, or a changed one, would take the place of the edited
forward and is refused, but for the switch between the graphs of eval and training. A graph module that holds such a one
lets it write its forward anew, from the graph that it has, whenever it is copied or pickled itself.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

from torch import fx, nn

_TWO = ("train_graph", "eval_graph")


class _AllLeaves(fx.Tracer):
    """Follow one forward, and no submodule's."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def methods(original: Any, body: str, names: list[str], rebuild: Callable[..., Any]) -> dict[str, Any]:
    """Return what the class of an edited graph module has besides its forward; nothing for any other class."""
    if not issubclass(original, fx.GraphModule):
        return {}
    refusal = f"this {original.__name__} holds blocks, which another graph would lose: take them out first, `si.eject_(model)`"
    graphs: WeakKeyDictionary[Any, dict[bool, tuple[fx.Graph, str]]] = WeakKeyDictionary()

    def traced(self: Any) -> tuple[fx.Graph, str]:
        """Return the graph of the edited forward in the mode that the module is in, and its code when it was made."""
        of_modes = graphs.setdefault(self, {})
        if self.training not in of_modes:
            graph = _AllLeaves().trace(self)
            of_modes[self.training] = graph, graph.python_code(root_module="self").src
        return of_modes[self.training]

    def set_graph(self: Any, new: fx.Graph) -> None:
        if not any(new is self.__dict__.get(name) for name in _TWO):
            raise RuntimeError(refusal)
        self.__dict__["_graph"] = new

    def recompile(self: Any) -> Any:
        given_out = graphs.get(self, {}).values()
        if any(graph.python_code(root_module="self").src != written for graph, written in given_out):
            raise RuntimeError(refusal)
        return self.__dict__["_graph"].python_code(root_module="self")

    def __deepcopy__(self: Any, memo: dict[int, Any]) -> Any:
        twin = memo[id(self)] = object.__new__(type(self))
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        plain = object.__new__(original)
        plain.__dict__.update(self.__dict__)
        plain.__dict__["_modules"] = {name: child for name, child in self._modules.items() if name not in names}
        return rebuild, (plain, body, {name: self._modules[name] for name in names}, self.training)

    return {
        "__deepcopy__": __deepcopy__,
        "__reduce_ex__": __reduce_ex__,
        "graph": property(lambda self: traced(self)[0], set_graph),
        "code": property(lambda self: traced(self)[1]),
        "__jit_unused_properties__": [*getattr(original, "__jit_unused_properties__", ()), "graph", "code"],
        "recompile": recompile,
    }
