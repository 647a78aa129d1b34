"""Explain why a pickle was refused, what to do about it, and which packages can be trusted."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from se_inject.errors import LoadError, OptionError, UntrustedGlobals, either
from se_inject.loading.pickles.allowlist import NETWORKS
from se_inject.loading.weights import listed

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


def trustworthy(trust: Sequence[str]) -> Sequence[str]:
    """Return these packages if a user may trust them.

    Raises:
        OptionError: one is Python's, torch's or this package's own, or is no name.
    """
    for name in trust:
        top = name.split(".")[0]
        if top in sys.stdlib_module_names or top in _OWN or not top.isidentifier():
            raise OptionError(
                f"`{name}` can't be trusted",
                seen="a file could make its functions do harm" if top.isidentifier() else "no package name",
                hint="name your own package, the one that defines the model's classes",
            )
    return trust


def explanations(refused: Iterable[str]) -> Iterator[str]:
    """Explain, for names that were refused and are known, what to do about them."""
    return (why for start, why in _EXPLAINED.items() for name in refused if name.startswith(start))


def untrusted(path: Path, refused: Mapping[str, str | None], has_weights: bool) -> LoadError:
    """Make the error about a pickle that refers to code that it may not use.

    Args:
        path: the file.
        refused: the names it refers to, each with the reason why it can't be imported, or None if it may not be.
        has_weights: whether there are tensors that could be taken alone.
    """
    for name, why in refused.items():
        if why is not None:
            hint = "install the version that the model was saved with, or go to its directory"
            return LoadError(f"`{path}` needs `{name}`, which can't be imported", seen=why, hint=hint)
    packages = sorted({name.split(".")[0] for name in refused})
    if not all(package.isidentifier() for package in packages):
        return UntrustedGlobals(f"`{path}` refers to code by names that are none: {listed(refused)}")
    hint = next(explanations(refused), "")
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
