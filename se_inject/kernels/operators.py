"""Register the kernels as operators of torch, with fake values, gradients, and autocast kept out.

``se_inject::tail`` is scale, addition and activation; ``se_inject::excite`` is squeeze, bottleneck and tail of an SE block;
``se_inject::excite_from`` the same with the mean of another value, for inference.
CUDA graphs, FSDP and activation checkpointing see these alone; torch.compile can, but gets torch's own (dispatch.py). What is kept for backward is the value,
the small tensors of the bottleneck, and of the full-size tensors one more: the output where it tells the activation's slope
(ReLU; the next convolution keeps it anyway), else the shortcut; nothing for no activation.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from se_inject.kernels import formulas
from se_inject.kernels.formulas import Excitation
from se_inject.kernels.plain import plain_tail

_library: Any = torch.library.Library("se_inject", "DEF")  # type: ignore[no-untyped-call]
_WEIGHTS = "Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, str inner, str sigma, bool one_at_zero"
for _schema in (
    "tail(Tensor value, Tensor gate, Tensor? shortcut, str activation) -> Tensor",
    "tail_backward(Tensor grad, Tensor value, Tensor gate, Tensor? other, str activation, bool adds) -> Tensor[]",
    f"excite(Tensor value, Tensor? shortcut, {_WEIGHTS}, str activation) -> (Tensor, Tensor, Tensor, Tensor)",
    f"excite_from(Tensor source, Tensor value, Tensor? shortcut, {_WEIGHTS}, str activation) -> Tensor",
    f"excite_backward(Tensor grad, Tensor value, Tensor? other, Tensor mean, Tensor hidden, Tensor logits, "
    f"{_WEIGHTS}, str activation, bool adds) -> Tensor[]",
):
    _library.define(_schema)

_failed: set[str] = set()


def _run(name: str, *args: Any) -> Any:
    """Run a kernel, or the same in torch's operators where it can't be compiled: a warning says so once.

    Triton launches on the current device, whatever device its arguments are on: it is made that of the first.
    """
    if name not in _failed:
        try:
            from se_inject.kernels import launch

            with torch.cuda.device_of(args[0]):  # type: ignore[no-untyped-call]
                return getattr(launch, name)(*args)
        except Exception as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            _failed.add(name)
            first = (str(error).strip().splitlines() or [""])[0]
            warnings.warn(
                f"the kernel `{name}` can't be used here, torch's own operators do its work from now on "
                f"({type(error).__name__}: {first})",
                RuntimeWarning,
                stacklevel=3,
            )
    return getattr(formulas, name)(*args)


def _layout_of(value: Tensor) -> torch.memory_format:
    """Return the memory format of a value that is dense; contiguous for one that isn't."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(value.dim())
    if last is not None and not value.is_contiguous() and value.is_contiguous(memory_format=last):
        return last
    return torch.contiguous_format


def _alike(like: Tensor, *tensors: Tensor | None) -> list[Tensor | None]:
    """Convert tensors to the layout of one of them; those already in it are not copied."""
    layout = _layout_of(like)
    return [None if tensor is None else tensor.contiguous(memory_format=layout) for tensor in tensors]


def _excitation(w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, *names: Any) -> Excitation:
    return Excitation(w1.flatten(1).contiguous(), b1, w2.flatten(1).contiguous(), b2, *names)


# -- values ------------------------------------------------------------------------------------------------


def _tail(value: Tensor, gate: Tensor, shortcut: Tensor | None, activation: str) -> Tensor:
    with torch._C._DisableAutocast():
        full, other = _alike(value, value, shortcut)
        out: Tensor = _run("tail", full, gate.flatten(1).contiguous(), other, activation)
        return out


def _tail_backward(
    grad: Tensor, value: Tensor, gate: Tensor, other: Tensor | None, activation: str, adds: bool
) -> list[Tensor]:
    with torch._C._DisableAutocast():
        d, v, o = _alike(value, grad, value, other)
        flat = gate.flatten(1).contiguous()
        d_shortcut, d_value, d_gate = _run("tail_backward", d, v, flat, o, activation, adds, True)
        return [d_value, d_gate.to(gate.dtype).reshape(gate.shape), *([] if d_shortcut is None else [d_shortcut])]


def _excite(value: Tensor, shortcut: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *weights, activation = rest
    with torch._C._DisableAutocast():
        full, other = _alike(value, value, shortcut)
        result: tuple[Tensor, Tensor, Tensor, Tensor] = _run("excite", full, other, _excitation(*weights), activation)
        return result


def _excite_from(source: Tensor, value: Tensor, shortcut: Tensor | None, *rest: Any) -> Tensor:
    *weights, activation = rest
    with torch._C._DisableAutocast():
        full, other = _alike(value, value, shortcut)
        (read,) = _alike(source, source)
        out: Tensor = _run("excite_from", read, full, other, _excitation(*weights), activation)
        return out


def _excite_backward(
    grad: Tensor, value: Tensor, other: Tensor | None, mean: Tensor, hidden: Tensor, logits: Tensor, *rest: Any
) -> list[Tensor]:
    *weights, activation, adds = rest
    with torch._C._DisableAutocast():
        d, v, o = _alike(value, grad, value, other)
        e = _excitation(*weights)
        d_value, d_shortcut, d_weights = _run("excite_backward", d, v, o, mean, hidden, logits, e, activation, adds)
        found = [
            found.to(weight.dtype).reshape(weight.shape)
            for found, weight in zip(d_weights, weights[:4], strict=True)
            if weight is not None
        ]
        return [d_value, *found, *([] if d_shortcut is None else [d_shortcut])]


# -- fake values -------------------------------------------------------------------------------------------


def _like(value: Tensor) -> Tensor:
    return torch.empty_like(value, memory_format=_layout_of(value))


def _fake_tail(value: Tensor, gate: Tensor, shortcut: Tensor | None, activation: str) -> Tensor:
    return _like(value)


def _fake_tail_backward(
    grad: Tensor, value: Tensor, gate: Tensor, other: Tensor | None, activation: str, adds: bool
) -> list[Tensor]:
    return [_like(value), torch.empty_like(gate), *([_like(value)] if adds and activation != "none" else [])]


def _fake_excite(
    value: Tensor, shortcut: Tensor | None, w1: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kind = formulas.wide(value)
    (batch, channels), units = value.shape[:2], w1.shape[0]
    mean, hidden, logits = (value.new_empty((batch, width), dtype=kind) for width in (channels, units, channels))
    return _like(value), mean, hidden, logits


def _fake_excite_backward(
    grad: Tensor, value: Tensor, other: Tensor | None, mean: Tensor, hidden: Tensor, logits: Tensor, *rest: Any
) -> list[Tensor]:
    weights, activation, adds = rest[:4], rest[-2], rest[-1]
    extra = [_like(value)] if adds and activation != "none" else []
    return [_like(value), *(w.new_empty(w.shape) for w in weights if w is not None), *extra]


# -- gradients ---------------------------------------------------------------------------------------------


def _kept(activation: str, out: Tensor, shortcut: Tensor | None) -> Tensor | None:
    """Return the full-size tensor that backward needs beside the value."""
    if activation in ("relu", "relu6"):
        return out
    return None if activation == "none" else shortcut


def _keep_tail(ctx: Any, inputs: Any, output: Tensor) -> None:
    value, gate, shortcut, activation = inputs
    ctx.activation, ctx.adds = activation, shortcut is not None
    kept = _kept(activation, output, shortcut)
    ctx.save_for_backward(value, gate, *([] if kept is None else [kept]))


def _grads_of_tail(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    value, gate, *kept = ctx.saved_tensors
    other = kept[0] if kept else None
    if torch.is_grad_enabled():
        return (*_twice(grad, [value, gate], other, ctx.activation, ctx.adds, plain_tail), None)
    d_value, d_gate, *rest = torch.ops.se_inject.tail_backward(grad, value, gate, other, ctx.activation, ctx.adds)
    return d_value, d_gate, (rest[0] if rest else grad if ctx.adds else None), None


def _keep_excite(ctx: Any, inputs: Any, output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    value, shortcut, w1, b1, w2, b2, *names, activation = inputs
    out, mean, hidden, logits = output
    ctx.mark_non_differentiable(mean, hidden, logits)
    ctx.set_materialize_grads(False)
    ctx.names, ctx.activation, ctx.adds = names, activation, shortcut is not None
    kept = _kept(activation, out, shortcut)
    ctx.biased = b1 is not None, b2 is not None
    tensors = [tensor for tensor in (w1, b1, w2, b2) if tensor is not None]
    ctx.save_for_backward(value, mean, hidden, logits, *tensors, *([] if kept is None else [kept]))


def _grads_of_excite(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 10
    value, mean, hidden, logits, *rest = ctx.saved_tensors
    one, two = ctx.biased
    weights = [rest.pop(0), rest.pop(0) if one else None, rest.pop(0), rest.pop(0) if two else None]
    other = rest[0] if rest else None
    nothing = (None,) * 4
    if torch.is_grad_enabled():

        def whole(value: Tensor, w1: Tensor, b1: Any, w2: Tensor, b2: Any, shortcut: Any, activation: str) -> Tensor:
            e = _excitation(w1, b1, w2, b2, *ctx.names)
            return formulas.excite(value, shortcut, e, activation)[0]

        d_value, *d_weights, d_shortcut = _twice(grad, [value, *weights], other, ctx.activation, ctx.adds, whole)
        return d_value, d_shortcut, *d_weights, *nothing
    d_value, *found = torch.ops.se_inject.excite_backward(
        grad, value, other, mean, hidden, logits, *weights, *ctx.names, ctx.activation, ctx.adds
    )
    d_weights = [None if weight is None else found.pop(0) for weight in weights]
    return d_value, (found[0] if found else grad if ctx.adds else None), *d_weights, *nothing


def _twice(
    grad: Tensor, given: list[Tensor | None], other: Tensor | None, activation: str, adds: bool, function: Any
) -> list[Tensor | None]:
    """Compute gradients that can be differentiated again, by torch's own operators: for gradient penalties.

    The sum is not kept for ReLU, but its slope is that of the output: it is passed as a constant.
    """
    if activation in ("relu", "relu6") and other is not None:
        grad = formulas.activation_backward(grad, other.detach(), activation)
        activation, other = "none", None
    inputs = [tensor for tensor in given if tensor is not None and tensor.requires_grad]
    with torch.enable_grad():
        if activation == "none":
            out, ends = function(*given, None, "none"), inputs
        else:
            ends = inputs + ([other] if other is not None and other.requires_grad else [])
            out = function(*given, other, activation)
        found = iter(torch.autograd.grad(out, ends, grad, create_graph=True, allow_unused=True) if ends else ())
    result: list[Tensor | None] = [
        next(found) if tensor is not None and tensor.requires_grad else None for tensor in given
    ]
    if not adds:
        return [*result, None]
    return [*result, grad if activation == "none" else next(found, None)]


for _name, _function, _fake in (
    ("tail", _tail, _fake_tail),
    ("tail_backward", _tail_backward, _fake_tail_backward),
    ("excite", _excite, _fake_excite),
    ("excite_backward", _excite_backward, _fake_excite_backward),
    ("excite_from", _excite_from, lambda source, value, *_: _like(value)),
):
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, _function, _key)
    torch.library.register_fake(f"se_inject::{_name}", _fake, lib=_library)
torch.library.register_autograd("se_inject::tail", _grads_of_tail, setup_context=_keep_tail, lib=_library)
torch.library.register_autograd("se_inject::excite", _grads_of_excite, setup_context=_keep_excite, lib=_library)
