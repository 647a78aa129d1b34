"""Recognise modules that can't be looked into: wrapped, compiled, scripted, quantised or unflattened; some are refused, others left alone."""

from __future__ import annotations

from torch import nn

_QUANTISED = ("quantised", "inject first, then quantise")
_COMPILED = ("compiled", "pass `model._orig_mod`, compile what you get")
_SCRIPTED = ("TorchScript", "save it with torch.jit.save: `se_inject.load` makes modules of the file")
_UNFLATTENED = (
    "an unflattened exported program",
    "pass `program.module()` of the program that it was made from, or save that with torch.export.save: `se_inject.load` makes modules of the file",
)
_LEAVES = {
    "torch._dynamo.eval_frame.OptimizedModule": _COMPILED,
    "torch.jit._script.ScriptModule": _SCRIPTED,
    "torch.export.unflatten.": _UNFLATTENED,
    "torch.ao.nn.quantized.": _QUANTISED,
    "torch.ao.nn.intrinsic.quantized.": _QUANTISED,
}
"""Where a class comes from → what its modules are, and what to do about it; as children they cost their own places alone."""
_REFUSED = {
    "torch.nn.parallel.data_parallel.DataParallel": ("wrapped in DataParallel", "pass `model.module`"),
    "torch.nn.parallel.distributed.": ("wrapped in DistributedDataParallel", "pass `model.module`"),
    "torch.optim.swa_utils.AveragedModel": ("an average of weights", "pass `model.module`"),
    "torch.distributed.fsdp._fully_shard.": (
        "sharded by FSDP",
        "inject before `fully_shard`; to save, load torch.distributed.checkpoint.state_dict.get_model_state_dict "
        "with full_state_dict=True into an injected network that is not sharded",
    ),
    "torch.distributed.fsdp.fully_sharded_data_parallel.": ("wrapped in FSDP", "inject first, then wrap"),
}
"""The same for those that refuse a network wherever they are in it."""


def leaf_kind(kind: type) -> tuple[str, str] | None:
    """Describe the class of a compiled, scripted or quantised module, with a hint; None for any other."""
    return _kind(kind, _LEAVES)


def is_compiled(module: object) -> bool:
    """Return whether ``torch.compile`` made this module."""
    return isinstance(module, nn.Module) and home(module) == "torch._dynamo.eval_frame.OptimizedModule"


def wrapper_kind(kind: type) -> tuple[str, str] | None:
    """Describe the class of a wrapper that refuses the whole network, with a hint; None for any other."""
    return _kind(kind, _REFUSED)


def home(module: nn.Module) -> str:
    """Return the full name of a module's class."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _kind(kind: type, table: dict[str, tuple[str, str]]) -> tuple[str, str] | None:
    if (kind, id(table)) not in _known:
        homes = [f"{base.__module__}.{base.__qualname__}" for base in kind.__mro__]
        found = next((kinds for prefix, kinds in table.items() if any(each.startswith(prefix) for each in homes)), None)
        if homes[0].endswith("FloatFunctional"):  # plain functions, for networks that are to be quantised
            found = None
        if len(_known) > 5_000:
            _known.clear()
        _known[kind, id(table)] = found
    return _known[kind, id(table)]


_known: dict[tuple[type, int], tuple[str, str] | None] = {}


def outside_of_leaves(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Iterate over path and module of all that is not inside of a compiled, scripted or quantised module."""
    found: list[tuple[str, nn.Module]] = []
    closed: tuple[str, ...] = ()
    for path, module in model.named_modules():
        if closed and path.startswith(closed):
            continue
        found.append((path, module))
        if leaf_kind(type(module)) is not None:
            closed = (*closed, f"{path}." if path else "")
    return found
