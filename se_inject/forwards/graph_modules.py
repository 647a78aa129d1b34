"""Edit the forward of an ``fx.GraphModule``: torch keeps it on a class of each module's own, and writes it anew.

So such a module is copied with the class it has, pickled as the module without blocks and the body, and a new graph,
which would take the place of the edited forward, is refused, but for the switch between the graphs of eval and training.
A graph module that holds such a one lets it write its forward anew, from the graph that it has, whenever it is copied
or pickled itself: then the edited forward stays.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import fx

_TWO = ("train_graph", "eval_graph")


def methods(original: Any, body: str, names: list[str], rebuild: Callable[..., Any]) -> dict[str, Any]:
    """Return what the class of an edited graph module has besides its forward; nothing for any other class."""
    if not issubclass(original, fx.GraphModule):
        return {}

    refusal = f"this {original.__name__} holds blocks, which another graph would lose: take them out first, `si.eject_(model)`"

    def __deepcopy__(self: Any, memo: dict[int, Any]) -> Any:
        twin = memo[id(self)] = object.__new__(type(self))
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        plain = object.__new__(original)
        plain.__dict__.update(self.__dict__)
        plain.__dict__["_modules"] = {name: child for name, child in self._modules.items() if name not in names}
        return rebuild, (plain, body, {name: self._modules[name] for name in names}, self.training)

    def graph(self: Any, new: fx.Graph) -> None:
        if not any(new is self.__dict__.get(name) for name in _TWO):
            raise RuntimeError(refusal)
        self.__dict__["_graph"] = new

    def recompile(self: Any) -> Any:
        code = self.__dict__["_graph"].python_code(root_module="self")
        if code.src == self.__dict__.get("_code"):
            return code
        raise RuntimeError(refusal)

    return {
        "__deepcopy__": __deepcopy__,
        "__reduce_ex__": __reduce_ex__,
        "graph": property(lambda self: self.__dict__["_graph"], graph),
        "recompile": recompile,
    }
