"""The allow-list for names in a pickle: classes of networks, plain values, makers and functions of tensors.

The lists are what the pickles of all networks of torchvision 0.29 and timm 1.0.31 refer to.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from se_inject.forwards import Program

NETWORKS = (
    "torch.nn",
    "torchvision.models",
    "torchvision.ops",
    "timm.models",
    "timm.layers",
    "se_inject.generated.FixedBatchNorm",
    "se_inject.generated.SqueezeExcitation",
    "se_inject_plugins",
    "torch.ao.nn.quantized.modules.functional_modules.FloatFunctional",
    "torch.ao.quantization.stubs.QuantStub",
    "torch.ao.quantization.stubs.DeQuantStub",
)
NOT_NETWORKS = (
    nn.parallel.DistributedDataParallel,  # its __setstate__ talks to a process group
    torch.fx.GraphModule,  # is source code
    torch.jit.ScriptModule,
    Program,  # is named by its text alone
)
_TRACING = (
    "timm.models._features.FeatureHookNet",
    "timm.models._features_fx.",
    "torch.nn.parallel.",
    "torch.nn.utils._expanded_weights.",
    "torchvision.models.feature_extraction.",
)
"""Where classes are that trace, load or build source when they are made; they are in no network's file."""

BUILDERS = frozenset(
    [
        *(f"builtins.{name}" for name in ("bytearray", "complex", "frozenset", "range", "set", "slice")),
        "_codecs.encode",
        "collections.Counter",
        "collections.OrderedDict",
        "se_inject.generated.edited",
        "se_inject.generated.frozen",
        "se_inject.generated.fused",
        "se_inject.generated.program",
        "se_inject.generated.program_class",
        "torch.Size",
        "torch.Tensor",
        "torch._tensor._rebuild_from_type_v2",
        "torch.device",
        "torch.serialization._get_layout",
        "torch._utils._rebuild_meta_tensor_no_storage",
        "torch._utils._rebuild_parameter",
        "torch._utils._rebuild_parameter_with_state",
        "torch._utils._rebuild_tensor",
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_tensor_v3",
    ]
)
DATA = frozenset(
    [
        "timm.layers.format.Format",
        "timm.models._features.FeatureInfo",
        "torchvision.models.detection._utils.BalancedPositiveNegativeSampler",
        "torchvision.models.detection._utils.BoxCoder",
        "torchvision.models.detection._utils.BoxLinearCoder",
        "torchvision.models.detection._utils.Matcher",
        "torchvision.models.detection._utils.SSDMatcher",
    ]
)
REFERENCES = frozenset(
    [
        "functools.partial",
        "timm.layers.activations.gelu",
        "torch._C._VariableFunctionsClass",
        "torch.storage.UntypedStorage",
        "torchvision.models.optical_flow.raft._pass_through_h",
        "torchvision.ops.boxes.box_iou",
    ]
)
_CALLED = ("builtins.getattr", "functools.partial", "torch.storage._load_from_bytes")
ACTIVATIONS = frozenset(["relu", "sigmoid", "tanh", "selu", "celu", "rrelu", "prelu", "softmax", "log_softmax"])
LISTED = BUILDERS | DATA | REFERENCES


def within(name: str, packages: Sequence[str]) -> bool:
    """Return whether a dotted name is one of these packages or something in them."""
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def may_be_looked_up(module: str, name: str) -> bool:
    """Return whether a file may have this name imported, to see what it is.

    A name with dots reaches through what was imported, and ``__main__`` runs when it is imported.
    """
    full = f"{module}.{name}"
    plain = "." not in name and not any(part.startswith("__") for part in full.split("."))
    return plain and (full in LISTED or within(full, NETWORKS) or module in ("torch", "torch._C._nn"))


def is_network(found: Any) -> bool:
    """Return whether this is a module class that is defined in one of ``NETWORKS``, not only imported there."""
    if not (isinstance(found, type) and issubclass(found, nn.Module)) or issubclass(found, NOT_NETWORKS):
        return False
    name = f"{found.__module__}.{found.__qualname__}"
    return within(name, NETWORKS) and (issubclass(found, nn.DataParallel) or not name.startswith(_TRACING))


def is_data(found: Any) -> bool:
    """Return whether this is a class of plain values."""
    return isinstance(found, type) and f"{found.__module__}.{found.__qualname__}" in DATA


def is_harmless(module: str, name: str, found: Any) -> bool:
    """Return whether a file may refer to what a name of ``may_be_looked_up`` stands for."""
    known = f"{module}.{name}" in LISTED or is_network(found)
    return known or _is_tensor_function(module, found) or isinstance(found, torch.dtype)


def _is_tensor_function(module: str, found: Any) -> bool:
    if str(getattr(found, "__name__", "_")).startswith("_"):
        return False
    if module == "torch.nn.functional":
        return inspect.isfunction(found) and found.__module__ == module
    return module == "torch._C._nn" and inspect.isbuiltin(found)


def may_be_called(full: str) -> bool:
    """Return whether a file may call what has this name, with arguments that are checked."""
    return full in BUILDERS or full in _CALLED


def may_be_got(name: str) -> bool:
    """Return whether a file may get an attribute of this name of a module or of torch's functions."""
    return name.startswith("forward") or name in ACTIVATIONS


def who_allows(module: str, name: str) -> tuple[str, str | None]:
    """Identify a name in a pickle and the rule that allows it; None if none does.

    Only torch, torchvision, timm and this package are imported to find out.
    """
    full = f"{module}.{name}"
    if may_be_called(full) and full not in ("builtins.getattr", "functools.partial"):
        return "function", "makes tensors or plain data; its arguments are checked"
    if full == "builtins.getattr":
        return "function", "for a module's own forward and for torch's activations alone"
    if module in ("torch", "torch.cuda") and name.endswith("Storage"):
        return "class", "a tensor's numbers"
    if not may_be_looked_up(module, name):
        return ("class" if name[:1].isupper() else "function"), None
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        return "class", None
    if is_network(found):
        return "class", f"a network class of {module.partition('.')[0]}"
    if is_data(found) or isinstance(found, torch.dtype):
        return "class" if isinstance(found, type) else "value", "plain data"
    if is_harmless(module, name, found):
        return "function", "a function of tensors, where the library's own constructor puts it"
    return "class" if isinstance(found, type) else "function", None
