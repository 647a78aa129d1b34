"""What a module of an author's own is to a run of convolutions: one that only normalises, activates, pools or lays out.

Its graph tells: no convolution, no weights that mix channels, no gate made from its input.
"""

from __future__ import annotations

from torch import Tensor, fx

from se_inject.sites.operations import path_of, returned
from se_inject.tracing import OwnerGraph, Trace, function_name_of, is_data, is_gating, kind, numbers_of

LAYOUTS = frozenset(
    {
        "permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "view", "reshape", "_unsafe_view", "flatten", "unflatten",
        "view_as", "reshape_as", "squeeze", "unsqueeze", "contiguous", "Flatten", "Unflatten",
    }
)  # fmt: skip
"""Operations that keep all numbers of a value, and give it another form."""
_STATISTICS = frozenset({"mean", "var", "std", "var_mean", "std_mean", "norm", "vector_norm"})
_NONLINEAR = frozenset({"max", "maximum", "min", "minimum", "where", "exp", "erf", "sin", "log1p"})
_ARITHMETIC = frozenset(
    {
        "add", "iadd", "add_", "sub", "isub", "sub_", "rsub", "mul", "imul", "mul_", "multiply", "truediv", "itruediv", "div", "div_",
        "neg", "pow", "square", "sqrt", "rsqrt", "reciprocal", "abs", "addcmul", "to", "type", "type_as", "float", "half",
        "bfloat16", "expand", "expand_as", "repeat", "getitem", "getattr", "chunk", "split",
    }
)  # fmt: skip


class Roles:
    """The roles of the modules of one observed call.

    Args:
        trace: the call.
    """

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self._known: dict[str, str] = {}

    def of(self, node: fx.Node) -> str:
        """Return ``kind`` of a node, ``pass`` of one that lays out, and of a module of an author's own what its graph makes of it."""
        what = kind(node)
        if what == "module":
            path = path_of(node)
            if path not in self._known:
                self._known[path] = "module"  # while its graph is looked at
                inner = self.trace.graphs.get(path)
                self._known[path] = "module" if inner is None else self._of_graph(inner)
            return self._known[path]
        return "pass" if what == "other" and lays_out(node) else what

    def _of_graph(self, owner: OwnerGraph) -> str:
        """Return norm, act, pool or pass for a graph that is no more than this, else ``module``."""
        result = returned(owner.graph)
        if result is None:
            return "module"
        found: set[str] = set()
        for node in owner.graph.nodes:
            if node.op not in ("call_module", "call_function", "call_method") or not _is_of_tensors(node):
                continue
            name, role = function_name_of(node), self.of(node)
            if is_gating(node) or role in ("conv", "cat", "module"):
                return "module"
            if role == "other":
                if name not in _STATISTICS | _NONLINEAR | _ARITHMETIC:
                    return "module"
                role = "norm" if name in _STATISTICS else "act" if name in _NONLINEAR else "pass"
            found.add(role)
        return next((role for role in ("act", "norm", "pool") if role in found), "pass")


def lays_out(node: fx.Node) -> bool:
    """Return whether a node gives one value another form and keeps all of its numbers."""
    name = node.meta["class"].__name__ if "class" in node.meta else function_name_of(node)
    if name not in LAYOUTS or not isinstance(node.meta.get("val"), Tensor):
        return False
    data = [source for source in numbers_of(node) if is_data(source)]
    return len(data) == 1 and data[0].meta["val"].numel() == node.meta["val"].numel()


def _is_of_tensors(node: fx.Node) -> bool:
    """Return whether a node makes tensors of the module's input; sizes and parameters in another form have no role."""
    value = node.meta.get("val")
    return is_data(node) or (isinstance(value, tuple | list) and any(isinstance(item, Tensor) for item in value))
