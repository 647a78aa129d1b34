"""Make a copy of a network that only infers, and check it against the network."""

from __future__ import annotations

import contextlib
import copy
import json
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map_only

from se_inject.blocks import NoGate, SqueezeExcitation, is_fused, unfuse_block_
from se_inject.errors import InjectError, VerificationError
from se_inject.forwards import (
    bodies_in,
    body_of,
    class_when_unfused,
    generated_class,
    graph_of,
    in_modes,
    is_at_output,
    lines_of,
    original_class,
    with_bodies,
)
from se_inject.guarding import under_guard
from se_inject.inference.blocks import FixedGate, compacted, early
from se_inject.inference.forwards import drop_pass_throughs_, fold_in_forwards_
from se_inject.inference.norms import Uses, fold_norms_, is_convolution, scale_outputs_
from se_inject.surgery import fuse_, may_change, set_class, steps_of, thaw_statistics_, unfuse_
from se_inject.tracing import Trace, check_has_numbers, copied, cropped, float_like, observe_model, real_inputs
from se_inject.verification import TOLERANCES, difference, tensors

BATCHES = (1, 2, 5)


@under_guard
def for_inference(model: nn.Module, example_inputs: Any = None, *, fold_norms: bool = True) -> nn.Module:
    """Make a copy of a network for inference alone: faster, the same outputs up to rounding. The network is not changed.

    Batch normalisation is folded into convolutions; hidden units and gates that are the same for every input are folded;
    blocks take over the addition and the activation behind them, as in ``fuse_``; and where a block's value is made by a
    1×1 convolution with fewer inputs than outputs, its squeeze reads those. The copy is in eval mode, its parameters
    require no gradient, and it can't be trained, unfused or injected into. It exports as any network does.

    Args:
        model: a network, injected or not, fused or not.
        example_inputs: as for ``plan``.
        fold_norms: False leaves batch normalisation as it is: in half precision at large batches cuDNN can be slower with a
            bias than without.

    Returns:
        the copy, after its outputs were compared with the network's at three sizes and batches.

    Raises:
        VerificationError: its outputs are not the network's.
        UnsupportedModel: a wrapped, compiled, scripted or quantised module, or one without numbers.
        TraceError: the network fails on the inputs.
    """
    trace = observe_model(model, example_inputs)
    check_has_numbers(model)
    new = _made(model, trace.inputs, fold_norms)
    _check(model, new, trace.inputs, fold_norms)
    return new


def _made(model: nn.Module, inputs: Any, fold_norms: bool) -> nn.Module:
    with torch.no_grad():  # else TorchScript's copies have a history
        new = copy.deepcopy(model).eval().requires_grad_(False)
    unfuse_(new)
    for module in list(new.modules()):
        thaw_statistics_(module, False)
    drop_pass_throughs_(new)
    _compact_(new)
    trace = observe_model(new, *inputs)
    if fold_norms:
        fold_norms_(new, trace)
        fold_in_forwards_(new, trace)
    _fold_fixed_gates_(new, trace)
    if steps_of(new):
        fuse_(new)
        _squeeze_early_(new)
    return new


@torch.no_grad()
def _compact_(model: nn.Module) -> None:
    for step in steps_of(model):
        owner = model.get_submodule(step.owner)
        owner._modules[step.block_name] = compacted(model.get_submodule(step.path))


@torch.no_grad()
def _fold_fixed_gates_(model: nn.Module, trace: Trace) -> None:
    """Multiply the weights of the convolution in front of a fixed gate by it."""
    uses = Uses(trace)
    for step in steps_of(model):
        block = model.get_submodule(step.path)
        places = uses.places.get(step.path, [])
        if not isinstance(block, FixedGate) or not uses.only(step.path):
            continue
        path, node = places[0]
        source = node.args[0]
        while isinstance(source, fx.Node) and len(source.users) == 1 and source.op == "call_module":
            before = trace.child(path, source.target)
            module = model.get_submodule(before)
            if is_convolution(module) and uses.only(before):
                scale_outputs_(module, block.factor.double().flatten())
                model.get_submodule(step.owner)._modules[step.block_name] = NoGate()
                break
            if type(module) is not nn.Identity:
                break
            source = source.args[0]


@torch.no_grad()
def _squeeze_early_(model: nn.Module) -> None:
    """Let the blocks behind 1×1 convolutions read what those read. The forwards become those of eval mode alone."""
    for module in list(model.modules()):
        body = body_of(module)
        if body is None or is_at_output(body["lines"]):
            continue
        bodies = {name: _with_early_squeezes_(module, body["steps"], lines) for name, lines in bodies_in(body).items()}
        tails = (body.get("fused") or {"tails": {}})["tails"]
        new = with_bodies({**body, "fused": {"before": {}, "tails": tails}}, bodies)
        set_class(module, generated_class(original_class(module), json.dumps(new)))


def _with_early_squeezes_(owner: nn.Module, steps: list[dict[str, Any]], lines: list[Any]) -> list[Any]:
    """Write the lines of eval mode in which an owner's blocks read what the convolutions in front of them read, where they can."""
    expected, _, evaluated = in_modes(lines)
    graph = graph_of(evaluated)
    for step in steps:
        block = owner.get_submodule(step["block_name"])
        calls = [node for node in graph.nodes if node.op == "call_module" and node.target == step["block_name"]]
        if len(calls) == 1 and len(calls[0].args) <= 3 and _can_be_early(block):
            _make_early_(graph, calls[0], owner)
    return [*expected, *lines_of(graph)]


def _can_be_early(block: nn.Module) -> bool:
    return (
        class_when_unfused(block) is SqueezeExcitation
        and is_fused(block)
        and block.squeeze == "avg"
        and block.bn is None
    )


def _make_early_(graph: fx.Graph, call: fx.Node, owner: nn.Module) -> None:
    value = made = call.args[0]
    while _calls(made, owner, nn.Identity) and len(made.users) == 1:  # type: ignore[union-attr]
        made = made.args[0]  # type: ignore[union-attr]
    if not isinstance(made, fx.Node) or made.op != "call_module" or len(made.args) != 1:
        return
    convolution: Any = owner.get_submodule(str(made.target))
    source = made.args[0]
    if not isinstance(source, fx.Node) or not is_convolution(convolution) or not _commutes(convolution):
        return
    nodes = list(graph.nodes)
    if any(may_change(node, source) for node in nodes[nodes.index(made) + 1 : nodes.index(call)]):
        return
    name = str(call.target)
    block: Any = owner.get_submodule(name)
    unfuse_block_(block)
    setattr(owner, name, early(block, convolution, overwrites=len(made.users) == 1 and len(value.users) == 1))  # type: ignore[union-attr]
    call.args = (value, source, *call.args[1:])


def _calls(node: Any, owner: nn.Module, kind: type) -> bool:
    return (
        isinstance(node, fx.Node) and node.op == "call_module" and type(owner.get_submodule(str(node.target))) is kind
    )


def _commutes(convolution: Any) -> bool:
    """Return whether a convolution of the mean over space equals the mean of the convolution, and reads less."""
    if convolution.transposed or convolution.in_channels >= convolution.out_channels:
        return False
    plain = all(size == 1 for size in (*convolution.kernel_size, *convolution.stride))
    return plain and (convolution.padding == "valid" or not any(convolution.padding))


@torch.no_grad()
def _check(model: nn.Module, new: nn.Module, inputs: Any, fold_norms: bool) -> None:
    """Compare the copy with the network at three batches and sizes, as far as the network itself accepts them."""
    like = float_like(model)
    modes = [(module, module.training) for module in model.modules()]
    allowed = TOLERANCES.get(like.dtype, TOLERANCES[torch.float32])
    compared = 0
    try:
        model.eval()
        for index, batch in enumerate(BATCHES):
            whole = real_inputs(inputs, batch=batch, device=like.device, dtype=like.dtype)
            args, kwargs = _smaller(whole, index)
            try:
                wanted = list(tensors(model(*copied(args), **copied(kwargs))))
            except Exception:
                continue  # a network of one size, or of one batch
            try:
                error = difference(tensors(new(*copied(args), **copied(kwargs))), wanted)[1]
            except InjectError:
                raise
            except Exception as failure:
                raise VerificationError(
                    "the copy for inference fails", seen=f"{type(failure).__name__}: {failure}"
                ) from failure
            compared += 1
            if not error <= allowed and not _same_in_double(model, (args, kwargs), fold_norms):
                raise VerificationError(
                    "the copy for inference computes something else",
                    seen=f"relative error {error:.1e} at batch {batch}, allowed {allowed:.0e}",
                )
    finally:
        for module, mode in modes:
            module.training = mode
    if not compared:
        raise VerificationError(
            "the network runs at none of the batches 1, 2 and 5: its copy can't be compared with it"
        )


@torch.enable_grad()
def _same_in_double(model: nn.Module, inputs: Any, fold_norms: bool) -> bool:
    """Return whether a copy in float64 computes the same: then the two differ by rounding, which steep gates can amplify."""
    with contextlib.suppress(Exception):
        before = copy.deepcopy(model).double()
        args, kwargs = tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, inputs)
        after = _made(before, (args, kwargs), fold_norms)
        with torch.no_grad():
            wanted = list(tensors(before(*copied(args), **copied(kwargs))))
            return bool(difference(tensors(after(*copied(args), **copied(kwargs))), wanted)[1] <= 1e-6)
    return False


def _smaller(inputs: Any, index: int) -> Any:
    """Return the inputs themselves, then images with sides of three quarters and half of theirs, in multiples of 32."""
    side = max((max(leaf.shape[2:]) for leaf in _images(inputs)), default=0)
    wanted = (4 - index) * side // 4
    return cropped(inputs, max(32, wanted // 32 * 32)) if index else inputs


def _images(inputs: Any) -> list[Tensor]:
    found: list[Tensor] = []
    tree_map_only(Tensor, lambda leaf: found.append(leaf) if leaf.dim() > 3 else None, inputs)
    return found
