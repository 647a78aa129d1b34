"""Make an injected network faster without changing what it computes: every block takes over the operations behind it; and undo it.

The unfused forwards stay beside the fused ones in the owners' classes, so nothing is lost: no weight is touched
or copied, the state dict stays the same, and it can be done and undone at any time, between two training steps too.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from torch import nn

from se_inject.blocks import can_fuse, fuse_block_, how_computed, is_fused, unfuse_block_
from se_inject.errors import LoadError, SurgeryError
from se_inject.forwards import (
    bodies_in,
    body_of,
    check_forward,
    checked_class,
    class_when_thawed,
    generated_class,
    graph_of,
    in_modes,
    is_at_output,
    lines_of,
    original_class,
    with_bodies,
)
from se_inject.guarding import is_marked
from se_inject.surgery.step import Step
from se_inject.surgery.swap import check_own_classes, own_steps, set_class
from se_inject.surgery.tails import fuse_in_graph
from se_inject.tables import Printed, counted, table
from se_inject.tracing import check_supported


def fuse_(model: nn.Module) -> nn.Module:
    """Let every block take over the addition of the shortcut and the activation behind it, in the model itself.

    Changes neither weights nor the state dict. A block without a ``gate`` method stays as it is; what follows a block and
    isn't an addition or known activation stays where it is. ``print(fused(model))`` says what became of each.

    Args:
        model: an injected network, in any mode.

    Returns:
        the model itself.

    Raises:
        SurgeryError: it holds no block of ours, is fused already, or its class can't be changed.
        UnsupportedModel: it is or holds a wrapped, compiled, scripted or quantised module.
    """
    check_supported(model)
    check_own_classes(model)
    steps = own_steps(model)
    if any(is_fused(model.get_submodule(step.path)) for step in steps):
        raise SurgeryError("the blocks of this model are fused already", hint="`unfuse_` takes it back")
    steps = tuple(step for step in steps if can_fuse(model.get_submodule(step.path)))
    owners = [(model.get_submodule(path), body) for path, body in _fused_bodies(model, list(steps)).items()]
    generated = [generated_class(original_class(owner), json.dumps(body)) for owner, body in owners]
    done: list[tuple[nn.Module, type]] = []
    try:
        for (owner, _), kind in zip(owners, generated, strict=True):
            done.append((owner, class_when_thawed(owner)))
            set_class(owner, kind)
        for step in steps:
            block = model.get_submodule(step.path)
            done.append((block, type(block)))
            fuse_block_(block)
    except BaseException as error:
        for module, before in reversed(done):
            set_class(module, before)
        if not isinstance(error, Exception):  # interrupted
            raise
        raise SurgeryError(
            f"a {done[-1][1].__name__} can't take another forward", seen=f"{type(error).__name__}: {error}"
        ) from error
    return model


def unfuse_(model: nn.Module) -> nn.Module:
    """Give every fused block back to its owner's forward: the network as it was before ``fuse_``. No weight is touched.

    A model that is not fused is returned as it is.

    Raises:
        SurgeryError: something else has changed its classes since, or it is a copy for inference.
        LoadError: it is from a file, and what it was before is not a forward that a file may hold.
        UnsupportedModel: it is or holds a wrapped, compiled, scripted or quantised module.
    """
    check_supported(model)
    check_own_classes(model)
    bodies = [(body_of(module) or {}).get("fused") for module in model.modules()]
    if any(fused is not None and not fused["before"] for fused in bodies):
        raise SurgeryError(
            "this is a copy for inference: what it was before is not in it",
            hint="go on with the network it was made from",
        )
    for module in model.modules():
        unfuse_block_(module)
        body = body_of(module)
        if body is not None and body.get("fused"):
            now = class_when_thawed(module)
            set_class(module, checked_class(original_class(module), json.dumps(body["fused"]["before"])))
            try:
                check_forward(module, trusted=not is_marked(model))
            except LoadError:  # out of somebody's file
                set_class(module, now)
                raise
    return model


@dataclass(frozen=True)
class FusedBlock:
    """The operations that one block takes over, and how it is computed.

    Args:
        path: of the block.
        block: its name in the registry.
        takes: what it takes over, in words; None: it is not fused.
        how: how it is computed where it is now: by kernels, or by torch's own operators and why.
    """

    path: str
    block: str
    takes: str | None
    how: str


@dataclass(frozen=True, repr=False)
class Fused(Printed):
    """The fused blocks of a network, and those that fall back to plain torch, printed as a table."""

    blocks: tuple[FusedBlock, ...]

    def text(self) -> str:
        """Format a line for each block."""
        return fused_text(self)

    def summary(self) -> str:
        """Say how many blocks take something over."""
        taking = sum(item.takes not in (None, "nothing") for item in self.blocks)
        return f"{taking} of {counted(len(self.blocks), 'block')} with what is behind"


def fused(model: nn.Module) -> Fused:
    """List the fused blocks of a model: the operations that each takes over, and whether it has a kernel. Changes nothing.

    Raises:
        SurgeryError: it holds no block of ours.
    """
    taken: dict[str, str] = {}
    for path, module in model.named_modules():
        body = body_of(module)
        for block, words in (((body or {}).get("fused") or {}).get("tails") or {}).items():
            taken[f"{path}.{block}".lstrip(".")] = words
    found = []
    for step in own_steps(model):
        block = model.get_submodule(step.path)
        takes = taken.get(step.path, "nothing" if is_fused(block) else None)
        how = how_computed(block, scaled=takes.endswith("a scale")) if takes is not None else "not fused"
        found.append(FusedBlock(step.path, step.block, takes, how))
    return Fused(tuple(found))


def _fused_bodies(model: nn.Module, steps: list[Step]) -> dict[str, dict[str, Any]]:
    """Write the owners' new forwards, by path. A block that gates what its owner returns has nothing behind it there."""
    bodies: dict[str, dict[str, Any]] = {}
    for step in steps:
        owner = model.get_submodule(step.owner)
        body = bodies.get(step.owner) or body_of(owner)
        new = _with_tail(owner, body, step) if body is not None else None
        if new is not None:
            bodies[step.owner] = new
    return bodies


def _with_tail(owner: nn.Module, body: dict[str, Any], step: Step) -> dict[str, Any] | None:
    """Write an owner's forward in which a block takes over the operations behind it, in each mode; None if there are none."""
    words: list[str] = []
    block = step.block_name

    def with_tail(lines: list[Any]) -> list[Any]:
        graph = graph_of(lines)
        calls = [node for node in graph.nodes if node.op == "call_module" and node.target == block]
        if len(calls) == 1 and len(calls[0].args) == 1 and not calls[0].kwargs:
            tail = fuse_in_graph(graph, calls[0], owner.get_submodule, (step.channels, *[1] * step.rank))
            if tail.takes:
                words.append(str(tail))
                return lines_of(graph)
        return lines

    if is_at_output(body["lines"]):
        return None
    bodies = {}
    for name, lines in bodies_in(body).items():
        expected, trained, evaluated = in_modes(lines)
        in_training = None if trained is None else with_tail(trained)
        now = with_tail(evaluated)
        bodies[name] = [*expected, *(now if trained is None else [["if", {"training": True}, in_training, now]])]
    if not words:
        return None
    earlier = body.get("fused") or {"before": body, "tails": {}}
    tails = {**earlier["tails"], block: words[-1]}
    return with_bodies({**body, "fused": {"before": earlier["before"], "tails": tails}}, bodies)


def fused_text(result: Fused) -> str:
    """Write a line for each block: the operations it takes over, and how it is computed."""
    rows = [[item.path, item.block, item.takes or "-", item.how] for item in result.blocks]
    return table(["block", "kind", "takes over", "computed by"], rows)
