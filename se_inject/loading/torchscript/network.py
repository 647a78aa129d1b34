"""Make ordinary modules of a TorchScript archive.

A TorchScript module holds its children, and a graph for each of its methods. The graph of the forward becomes a program
(``translate``), and layers of torch.nn come back as themselves. So the network has the modules, the names and the
modes of the one that was scripted, or, if it was traced, of the call that was traced.

torch has a converter of its own (``torch._export.converter``); it gives one flat graph without modules, in eval mode,
and makes buffers of the parameters.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from se_inject.errors import LoadError
from se_inject.loading.layers import assembled, container
from se_inject.loading.leaves import Leaves
from se_inject.loading.torchscript.graphs import Archive, class_of, plain_class_of
from se_inject.loading.torchscript.translate import Forward

_EAGER = "pass the eager module that it was made from"
_LAYERS: dict[str, tuple[Any, ...]] = {
    **{f"conv.Conv{transposed}{rank}d": (1, 1, 1) for transposed in ("", "Transpose") for rank in (1, 2, 3)},
    **{f"batchnorm.BatchNorm{rank}d": (1,) for rank in (1, 2, 3)},
    **{f"dropout.Dropout{rank}": () for rank in ("", "1d", "2d", "3d")},
    **{f"pooling.{kind}{rank}d": (1,) for kind in ("MaxPool", "AvgPool", "AdaptiveAvgPool", "AdaptiveMaxPool") for rank in (1, 2, 3)},
    **{f"padding.{kind}Pad{rank}d": (0,) for kind in ("Zero", "Reflection", "Replication") for rank in (1, 2, 3)},
    **{f"activation.{kind}": () for kind in (
        "ReLU", "ReLU6", "SiLU", "GELU", "Mish", "Hardswish", "Hardsigmoid", "Hardtanh", "LeakyReLU", "ELU", "SELU",
        "CELU", "PReLU", "Sigmoid", "Tanh", "Softplus", "Softmax",
    )},
    "linear.Linear": (1, 1),
    "linear.Identity": (),
    "normalization.LayerNorm": (1,),
    "normalization.GroupNorm": (1, 1),
    "flatten.Flatten": (),
    "upsampling.Upsample": (),
}  # fmt: skip
"""Layers of torch.nn that are made again from their attributes, with arguments to make one."""

_RECURRENT = {
    "rnn.RNN": ("nonlinearity",),
    "rnn.GRU": (),
    "rnn.LSTM": ("proj_size",),
}
"""Recurrent layers, with the options that not all of them have."""


def network_from_script(
    script: torch.jit.ScriptModule, function: Callable[[str], Any], notes: list[str] | None = None
) -> nn.Module:
    """Build an ordinary network that computes the same as a TorchScript module, with the same tensors.

    A module within it that can't be written down stays the TorchScript module that it is.

    Args:
        script: the module; it isn't run.
        function: the archive's function of a qualified name.
        notes: a list that gets a note for each module that stays.

    Raises:
        LoadError: it can't be written down as modules; the message says why.
    """
    is_frozen = next(script.parameters(), None) is None
    building = _Network(Archive(script, function), is_frozen)
    return building.leaves.check(building.module(script, ""), notes)


class _Network:
    """One archive being translated, children before their parents.

    Args:
        archive: what its forwards share.
        is_frozen: whether its weights are constants; otherwise constants are not part of the state dict.

    Attributes:
        leaves: the modules that stay TorchScript.
    """

    def __init__(self, archive: Archive, is_frozen: bool) -> None:
        self.archive = archive
        self.is_frozen = is_frozen
        self.leaves = Leaves("a TorchScript archive", "TorchScript")
        self._tensors: dict[int, Tensor] = {}
        """By the address of their C++ object: what is shared stays so."""
        self._originals: list[Tensor] = []
        """Kept, so that no address is used again."""

    def module(self, script: Any, path: str) -> nn.Module:
        """Build the module for this one."""
        kind = plain_class_of(script)
        if script._c._get_forward_hooks() or script._c._get_forward_pre_hooks():
            raise LoadError(f"`{path or kind}` of a TorchScript archive has hooks", hint=_EAGER)
        tensors = self.tensors(script)
        module = _layer_again(script, kind, tensors)
        if module is None:
            module = self._translated(script, path, kind, tensors)
        with contextlib.suppress(AttributeError):
            module.training = script.training
        return module

    def tensors(self, script: Any) -> dict[str, Tensor]:
        """Return a module's own parameters and buffers."""
        found = {name: self._kept(tensor, nn.Parameter) for name, tensor in script._parameters.items()}
        return {**found, **{name: self._kept(tensor, None) for name, tensor in script._buffers.items()}}

    def _kept(self, tensor: Tensor, kind: Any) -> Tensor:
        key = tensor._cdata
        if key not in self._tensors:
            self._tensors[key] = tensor if kind is None else kind(tensor.detach(), tensor.requires_grad)
            self._originals.append(tensor)
        return self._tensors[key]

    def _translated(self, script: Any, path: str, kind: str, tensors: dict[str, Tensor]) -> nn.Module:
        home, _, name = kind.rpartition(".")
        children = {key: self.module(child, f"{path}.{key}".lstrip(".")) for key, child in script._modules.items()}
        own = self.archive.forward_of(script)
        if own is None:
            return container(name, tensors, children)
        takes_modules = _takes_modules(script._c._get_method(own))
        try:
            identities = frozenset(key for key, child in children.items() if type(child) is nn.Identity)
            forward = Forward(self.archive, script, identities=identities)
        except LoadError as error:
            if takes_modules:
                return container(name, tensors, children)  # its callers have it written out
            return self.leaves.keep(path, name, script, error)
        if takes_modules:
            self.archive.borrowing.add(class_of(script))
        children |= {key: self.module(passed, f"{path}.{key}") for key, passed in forward.borrowed.items()}
        module = assembled(name, home, forward.inputs, forward.lines, {**tensors, **forward.constants}, children)
        if not self.is_frozen:
            module._non_persistent_buffers_set |= module._buffers.keys() & forward.constants.keys()
        return module


def _takes_modules(method: Any) -> bool:
    """Return whether a forward gets modules as arguments, as tracing writes it for modules that are shared."""
    return any(argument.type.kind() == "ClassType" for argument in method.schema.arguments[1:])


def _layer_again(script: Any, kind: str, tensors: dict[str, Tensor]) -> nn.Module | None:
    """Rebuild the torch.nn layer that was scripted; None if it is none, or was traced and so has lost its attributes."""
    short = kind.removeprefix("torch.nn.modules.")
    if short in _RECURRENT and short != kind:
        return _recurrent_again(script, getattr(nn, short.removeprefix("rnn.")), tensors)
    if short == kind or short not in _LAYERS or len(script._modules):
        return None
    home, name = short.split(".")
    layer: nn.Module = getattr(getattr(nn.modules, home), name)(*_LAYERS[short])
    for key in list(vars(layer)):
        if key in ("training", "_reversed_padding_repeated_twice") or not key.startswith("_"):
            if not script._c.hasattr(key) and not hasattr(script, key):
                return None
            vars(layer)[key] = getattr(script, key) if hasattr(script, key) else script._c.getattr(key)
    for key in (*layer._parameters, *layer._buffers):
        if key not in tensors and getattr(script, key, tensors) is not None:
            return None
    if set(tensors) - {*layer._parameters, *layer._buffers}:
        return None
    for key in layer._parameters:
        layer._parameters[key] = tensors.get(key)  # type: ignore[assignment]
    for key in layer._buffers:
        layer._buffers[key] = tensors.get(key)
    return layer


def _recurrent_again(script: Any, kind: type[nn.RNNBase], tensors: dict[str, Tensor]) -> nn.Module | None:
    """Rebuild the recurrent layer that was scripted; None as above. Which tensors it has depends on its options."""
    common = ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional")
    names = (*common, *_RECURRENT[f"rnn.{kind.__name__}"])
    options = {name: getattr(script, name) for name in names if hasattr(script, name)}
    if len(options) < len(names) or options["num_layers"] > len(tensors):
        return None
    layer = kind(**options, device="meta")
    own = {name: (tensor.shape, nn.Parameter) for name, tensor in layer.named_parameters()}
    if own != {name: (tensor.shape, type(tensor)) for name, tensor in tensors.items()}:
        return None
    for name, tensor in tensors.items():
        setattr(layer, name, tensor)
    return layer
