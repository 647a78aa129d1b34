"""Write and read adapters: a small file that holds only the injected blocks, for the backbone they were trained on.

An adapter is a safetensors file. It holds the blocks' parameters and buffers under the names they have in the
network's state dict, and in its metadata, as JSON, the plan and what identifies the backbone: name, shape, dtype and
digest of each of its tensors. Nothing in it is ever executed. The same blocks give the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from se_inject.atomic_files import atomic, write_through
from se_inject.blocks import build_block, has_class_at, is_at_hand
from se_inject.errors import ExportError, InjectError, LoadError, OptionError, SurgeryError, printable
from se_inject.loading import described, form_of, opened
from se_inject.plans import Plan, plan_of
from se_inject.surgery import injected_blocks
from se_inject.tracing import check_supported, duplicate
from se_inject.user_code import fact

VERSION = 1
_KEY = "se_inject_adapter"  # one entry: of several, safetensors 0.8 writes the order anew each time
_FORM = "`-o se.safetensors` and `si.save_adapter` write adapters"

Fingerprint = dict[str, tuple[list[int], str, str]]
"""Shape, dtype and digest of every tensor of a backbone, by name."""


class BackboneWarning(UserWarning):
    """An adapter was put onto a backbone with other weights than its blocks were trained with."""


@dataclass(frozen=True)
class Adapter:
    """The contents of an adapter's file: a plan, the blocks' tensors, and the backbone's fingerprint."""

    plan: Plan
    tensors: Mapping[str, Tensor]
    backbone: Fingerprint

    def other_weights(self, model: nn.Module) -> str | None:
        """Describe the differences between the backbone's weights and those of the adapter's own backbone; None: there are none.

        Raises:
            SurgeryError: it is a network of another class or with other names or shapes.
        """
        check_supported(model)
        own = fingerprint(model)
        if self.plan.model not in _class_names(model):
            raise _other_network(self.plan.model, f"a {type(model).__name__}")
        for name in (*self.backbone, *own):
            if name not in own or name not in self.backbone:
                raise _other_network(
                    self.plan.model, f"`{name}` is in {'the adapter' if name in self.backbone else 'this network'} only"
                )
            if list(own[name][0]) != list(self.backbone[name][0]):
                raise _other_network(
                    self.plan.model, f"`{name}` of shape {tuple(own[name][0])}, not {tuple(self.backbone[name][0])}"
                )
        changed = [name for name in own if own[name][1:] != tuple(self.backbone[name][1:])]
        if not changed:
            return None
        statistics = ("running_mean", "running_var", "num_batches_tracked")
        which = "all of them statistics of batch normalisation" if _all_end(changed, statistics) else ""
        return f"{len(changed)} of its {len(own)} tensors, `{changed[0]}` the first" + (f"; {which}" if which else "")

    def put_into(self, model: nn.Module) -> nn.Module:
        """Put the blocks into a copy of a backbone. See ``load_adapter``, which also compares the weights."""
        fitted = self._fitted(model)
        return fitted.put_into_(duplicate(model), self._states())

    def put_into_(self, model: nn.Module) -> nn.Module:
        """Put the blocks into a backbone itself. See ``load_adapter_``, which also looks at the weights."""
        return self._fitted(model).put_into_(model, self._states())

    def _fitted(self, model: nn.Module) -> Plan:
        self._check_tensors()
        return self.plan.fitted(model)

    def _check_tensors(self) -> None:
        """Check that the tensors are those of the plan's blocks, before any memory is taken for these.

        Raises:
            LoadError: one is missing, of another shape, or belongs to no block.
            OptionError: a block that can't be built.
        """
        left = dict(self.tensors)
        for number, step in enumerate(self.plan.steps, 1):
            try:
                with torch.device("meta"):
                    block = build_block(step.block, step.channels, step.size, step.options, step.init)
            except InjectError as error:
                raise type(error)(
                    f"step {number} of the plan: {error.message}", seen=error.seen, hint=error.hint
                ) from error
            for name, tensor in block.state_dict(prefix=f"{step.path}.").items():
                found = left.pop(name, None)
                if found is None or found.shape != tensor.shape:
                    seen = "it is missing" if found is None else f"it is {tuple(found.shape)}"
                    raise LoadError(
                        f"step {number} needs `{name}` of shape {tuple(tensor.shape)}", seen=seen, hint=_FORM
                    )
        if left:
            raise LoadError(
                "the adapter holds a tensor that belongs to no block", seen=f"`{next(iter(left))}`", hint=_FORM
            )

    def _states(self) -> dict[str, dict[str, Tensor]]:
        """Return the state dict of each block, by its path."""
        return {
            step.path: {
                name.removeprefix(f"{step.path}."): tensor
                for name, tensor in self.tensors.items()
                if name.startswith(f"{step.path}.")
            }
            for step in self.plan.steps
        }


def save_adapter(model: nn.Module, path: str | os.PathLike[str], *, force: bool = False) -> None:
    """Write the injected blocks of a model, and the plan, to a safetensors file. The backbone is not written.

    Args:
        model: an injected network.
        path: the file, ``se.safetensors``.
        force: replace one that exists.

    Raises:
        SurgeryError: the model holds no block of ours.
        ExportError: the file can't be written, or a block holds more than tensors.
        UnsupportedModel: a wrapped or compiled module.
    """
    with atomic(path, force) as temporary:
        write_adapter(model, plan_of(model), temporary)


def write_adapter(model: nn.Module, plan: Plan, path: Path) -> None:
    """Write an adapter, and check what can be read back.

    Args:
        model: an injected network.
        plan: what was injected.
        path: the file, which may be replaced.

    Raises:
        ExportError: a block holds more than tensors, or the file does not give them back.
    """
    from safetensors.torch import save

    check_supported(model)
    tensors = {}
    for where, block in injected_blocks(model):
        for name, tensor in block.state_dict(prefix=f"{where}.").items():
            if not isinstance(tensor, Tensor) or tensor.is_meta or tensor.layout != torch.strided:
                raise ExportError(f"`{name}` can't be stored in an adapter", seen=_kind(tensor))
            tensors[name] = tensor.detach().cpu().contiguous().clone()
    content = {"version": VERSION, "plan": json.loads(plan.to_json()), "backbone": fingerprint(model)}
    write_through(path, lambda buffer: buffer.write(save(tensors, {_KEY: json.dumps(content)})))
    known = [step.block for step in plan.steps if is_at_hand(step.block)]
    known += [step.block for step in plan.steps if has_class_at(model.get_submodule(step.path), step.block)]
    again = read_adapter(path, trust=[block.rpartition(":")[0] for block in known])
    again._check_tensors()
    if any(not _same_bits(tensor, again.tensors[name]) for name, tensor in tensors.items()):
        raise ExportError(f"the adapter `{path.name}` does not give back what was written")


def read_adapter(path: str | os.PathLike[str], *, trust: Sequence[str] = ()) -> Adapter:
    """Read an adapter. Nothing in it is executed, and its tensors are only read.

    Args:
        path: a safetensors file that ``save_adapter`` wrote.
        trust: packages, modules and ``.py`` files from which its plan may take blocks.

    Raises:
        NoSuchFile: a file that doesn't exist.
        LoadError: no adapter, or one of a later version.
        UntrustedGlobals: its plan names a block in somebody's code.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with opened(Path(path)) as file:
            form = form_of(file)
        if form not in ("adapter", "safetensors"):
            raise LoadError(f"`{path}` is not an adapter", seen=described(form), hint=_FORM)
        with safe_open(os.fspath(path), framework="pt") as archive:
            metadata = archive.metadata() or {}
            names = list(archive.keys())
            tensors = {name: archive.get_tensor(name) for name in names} if _KEY in metadata else {}
    except LoadError:
        raise
    except (SafetensorError, OSError, ValueError) as error:
        raise LoadError(f"`{path}` is not an adapter", seen=fact(error), hint=_FORM) from error
    if _KEY not in metadata:
        raise LoadError(f"`{path}` is not an adapter but a file of weights", seen=f"{len(names)} tensors", hint=_FORM)
    text, backbone = _content(path, metadata[_KEY])
    try:
        plan = Plan.from_json(text, trust=trust)
    except InjectError as error:
        raise type(error)(f"adapter `{path}`: {error.message}", seen=error.seen, hint=error.hint) from error
    return Adapter(plan, tensors, _backbone(path, backbone))


def load_adapter(
    model: nn.Module, path: str | os.PathLike[str], *, strict: bool = False, trust: Sequence[str] = ()
) -> nn.Module:
    """Put an adapter's trained blocks into a copy of a backbone. The backbone itself is not changed.

    Args:
        model: the network that the adapter was made for, without these blocks.
        path: what ``save_adapter`` wrote.
        strict: refuse a backbone with other weights than the blocks were trained with, instead of warning.
        trust: packages, modules and ``.py`` files from which the adapter's plan may take blocks.

    Warns:
        BackboneWarning: the backbone has other weights.

    Raises:
        LoadError: no adapter, or a damaged one.
        SurgeryError: it was made for another network; or, if strict, for other weights.
        AlreadyInjected: the model holds such blocks.
    """
    return adapter_for(model, path, strict, trust).put_into(model)


def adapter_for(model: nn.Module, path: str | os.PathLike[str], strict: bool, trust: Sequence[str]) -> Adapter:
    """Read an adapter, and warn or refuse if it was made for other weights than this model's."""
    if isinstance(trust, str):
        raise OptionError("`trust` is a list of names", seen=f"the text `{trust}`", hint=f"trust=[{trust!r}]")
    adapter = read_adapter(path, trust=trust)
    differences = adapter.other_weights(model)
    if differences is not None:
        message = f"`{os.fspath(path)}` was made for a {adapter.plan.model} with other weights"
        if strict:
            raise SurgeryError(message, seen=f"other: {differences}", hint="load the backbone's weights first")
        warnings.warn(f"{message}: {differences}", BackboneWarning, stacklevel=3)
    return adapter


def fingerprint(model: nn.Module) -> Fingerprint:
    """Describe every tensor of the backbone's state dict (injected blocks left out): name, shape, dtype and digest."""
    blocks = {id(block) for _, block in injected_blocks(model)}
    named = model.named_modules(remove_duplicate=False)  # a module may have several names, and a block in it too
    ours = tuple(f"{name}." for name, module in named if id(module) in blocks)
    return {
        name: (list(tensor.shape), str(tensor.dtype).removeprefix("torch."), _digest(tensor))
        for name, tensor in model.state_dict().items()
        if isinstance(tensor, Tensor) and not (ours and name.startswith(ours))
    }


def _digest(tensor: Tensor) -> str:
    """Compute 64 bits of a hash of a tensor's numbers, in the order of its indices."""
    if tensor.is_meta or tensor.layout != torch.strided or tensor.is_quantized:
        return _kind(tensor)
    values = tensor.detach().cpu().contiguous().reshape(-1)
    return hashlib.sha256(values.view(torch.uint8).numpy().data).hexdigest()[:16] if values.numel() else "empty"


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return (one.shape, one.dtype, _digest(one)) == (other.shape, other.dtype, _digest(other))


def _content(path: str | os.PathLike[str], text: str) -> tuple[str, Any]:
    """Read the plan's text and the backbone's fingerprint from an adapter's metadata, if its version is known."""
    try:
        data = json.loads(text)
        version, plan, backbone = data["version"], json.dumps(data.get("plan")), data.get("backbone")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise LoadError(f"`{path}` is a damaged adapter", seen=fact(error), hint=_FORM) from error
    if version != VERSION:
        raise LoadError(
            f"an adapter of version {printable(str(version), 20)}",
            seen=f"this se-inject reads version {VERSION}",
            hint="update se-inject",
        )
    return plan, backbone


def _backbone(path: str | os.PathLike[str], data: Any) -> Fingerprint:
    try:
        found = {
            name: (list(map(int, shape)), str(dtype), str(digest)) for name, (shape, dtype, digest) in data.items()
        }
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise LoadError(
            f"`{path}` is a damaged adapter", seen=f"no fingerprint of its backbone: {fact(error)}"
        ) from error
    return found


def _other_network(wanted: str, seen: str) -> SurgeryError:
    return SurgeryError(
        f"the adapter was made for another network: a {wanted}",
        seen=seen,
        hint="load it onto the architecture that the blocks were trained in",
    )


def _class_names(model: nn.Module) -> set[str]:
    return {kind.__name__ for kind in type(model).__mro__}


def _all_end(names: Sequence[str], ends: tuple[str, ...]) -> bool:
    return all(name.endswith(ends) for name in names)


def _kind(value: Any) -> str:
    return f"a {type(value).__name__}" + (" without numbers" if isinstance(value, Tensor) and value.is_meta else "")
