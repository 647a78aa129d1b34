"""Put blocks into a model by the steps of a plan, and take them out again. Nothing else in this package changes a model.

The one mutation is a class swap: an owner's ``__class__`` becomes a generated subclass of its own class whose
forward is the edited one, and the block becomes a child of the owner. Everything that can go wrong is found
before that, and if something does go wrong after all, the owners already swapped are put back.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from se_inject.blocks import block_numbers, build_block
from se_inject.errors import InjectError, OptionError, PluginError, SurgeryError, either
from se_inject.forwards import (
    bodies_in,
    body_of,
    generated_class,
    give_back_forward_,
    has_changed_class,
    is_at_output,
    is_frozen,
    original_class,
    steps_data,
    with_bodies,
)
from se_inject.surgery.edit import new_bodies
from se_inject.surgery.freeze import freeze_statistics_, thaw_statistics_
from se_inject.surgery.step import Step
from se_inject.tables import counted, short
from se_inject.tracing import Trace

_SPARE = 2**26
"""Numbers that blocks may have however small the network is."""


@dataclass
class _Operation:
    """All that is needed to change one owner."""

    owner: nn.Module
    generated: type
    blocks: dict[str, nn.Module]
    was_none: dict[str, str]


def inject_(
    model: nn.Module, trace: Trace, steps: Iterable[Step], states: Mapping[str, Mapping[str, Tensor]] | None = None
) -> nn.Module:
    """Put the blocks of these steps into the model itself. No weight of the model is touched or copied.

    Args:
        model: the traced model, or a copy of it.
        trace: an observed call of it.
        steps: what to put where; blocks at one value act in the order of the steps.
        states: state dicts of trained blocks, by the path of the block; None: all start as their steps say.

    Raises:
        SurgeryError: a step does not fit; the model is as it was.
        OptionError: the blocks are too large for it.
    """
    check_unfused(model)
    steps = list(steps)
    check_sizes(model, steps)
    by_owner: dict[str, list[Step]] = {}
    for step in steps:
        by_owner.setdefault(step.owner, []).append(step)
    operations = [_prepare(model, trace, path, group, states or {}) for path, group in by_owner.items()]
    done: list[tuple[_Operation, type]] = []
    try:
        for operation in operations:
            done.append((operation, type(operation.owner)))
            for name, block in operation.blocks.items():
                setattr(operation.owner, name, block)
            operation.owner.__class__ = operation.generated
    except BaseException as error:
        for operation, before in reversed(done):
            _restore(operation.owner, before, list(operation.blocks), operation.was_none)
        if isinstance(error, InjectError) or not isinstance(error, Exception):  # interrupted
            raise
        raise SurgeryError(
            f"a {type(done[-1][0].owner).__name__} can't take another forward",
            seen=f"{type(error).__name__}: {error}",
        ) from error
    return model


def eject_(model: nn.Module) -> nn.Module:
    """Take every block of ours out again: the original classes, keys and outputs, bit for bit.

    Statistics of batch normalisation that were frozen are so no longer. A model without blocks is returned as it is.
    """
    check_own_classes(model)
    for module in list(model.modules()):
        thaw_statistics_(module, model.training)
        restore(module)
    return model


def restore(owner: nn.Module) -> None:
    """Give one module its original class again, without its blocks; one that holds none is left as it is."""
    body = body_of(owner)
    if body is not None:
        names = [step["block_name"] for step in body["steps"]]
        _restore(owner, original_class(owner), names, body["was_none"])


def check_own_classes(model: nn.Module) -> None:
    """Check that the generated classes of owners are still their classes.

    Raises:
        SurgeryError: something else has made a subclass of one since.
    """
    for path, module in model.named_modules():
        if has_changed_class(module):
            raise SurgeryError(
                f"`{path}` has become a {type(module).__name__} since blocks were put into it",
                hint="undo that first: remove its parametrizations, or eject before wrapping",
            )


def set_class(module: nn.Module, kind: Any) -> None:
    """Give a module another class; frozen statistics of batch normalisation stay frozen."""
    frozen = is_frozen(module)
    if frozen:
        thaw_statistics_(module, module.training)
    module.__class__ = kind
    if frozen:
        freeze_statistics_(module)


def check_sizes(model: nn.Module, steps: Sequence[Step]) -> None:
    """Check that these blocks together are not far larger than the network, before any is built.

    Raises:
        OptionError: they have more than four times its numbers and ``_SPARE``.
    """
    own = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    most = 4 * own + _SPARE
    total = sum(block_numbers(step.block, step.channels, step.size, step.options) for step in steps)
    if total > most:
        raise OptionError(
            f"{counted(len(steps), 'block')} for this {original_class(model).__name__} would be too large",
            seen=f"{short(total)} numbers in them, {short(own)} in the network; {short(most)} at most",
            hint="a larger reduction, or fewer stages",
        )


def check_unfused(model: nn.Module) -> None:
    """Check that blocks can be planned and put in: in a fused forward the additions are within the blocks.

    Raises:
        SurgeryError: the network is fused.
    """
    if any((body_of(module) or {}).get("fused") for module in model.modules()):
        raise SurgeryError("this network is fused: its additions are within its blocks", hint="`unfuse_` it first")


def steps_of(model: nn.Module) -> tuple[Step, ...]:
    """Read the steps that were applied to this model from the model itself."""
    found = []
    for path, module in model.named_modules():
        for data in steps_data(module):
            site = data["site"] if not data["site"].startswith(".") else path + data["site"]
            found.append(Step.from_data({**data, "owner": path, "site": site.lstrip(".")}))
    return tuple(found)


def own_steps(model: nn.Module) -> tuple[Step, ...]:
    """Read the steps that were applied to this model, at least one.

    Raises:
        SurgeryError: it holds no block of ours.
    """
    steps = steps_of(model)
    if not steps:
        raise SurgeryError("this model holds no block of se-inject's", seen=f"a {type(model).__name__}")
    return steps


def injected_blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """List path and module of every injected block in a model."""
    for step in steps_of(model):
        yield step.path, model.get_submodule(step.path)


def _restore(owner: nn.Module, original: type, names: list[str], was_none: dict[str, str]) -> None:
    for name in names:
        if was_none.get(name) == "module":
            owner._modules[name] = None
        elif name in owner._modules:
            delattr(owner, name)
        if was_none.get(name) == "attribute":
            setattr(owner, name, None)
    owner.__class__ = original
    give_back_forward_(owner)


def _prepare(
    model: nn.Module, trace: Trace, path: str, steps: list[Step], states: Mapping[str, Mapping[str, Tensor]]
) -> _Operation:
    """Prepare everything for one owner, with nothing changed yet."""
    try:
        owner = model.get_submodule(path)
    except AttributeError as error:
        raise SurgeryError(f"the plan has a block in `{path}`", seen="the model has no such module") from error
    before = body_of(owner)
    original = original_class(owner)
    was_none = dict(before["was_none"]) if before else {}
    earlier = [Step.from_data(step) for step in before["steps"]] if before else []
    for step in steps:
        if [other.block_name for other in steps].count(step.block_name) > 1:
            raise SurgeryError(f"`{step.path}` is to become two blocks", hint="give one of them another name")
        if hasattr(owner, step.block_name):
            if getattr(owner, step.block_name) is not None:
                raise SurgeryError(
                    f"`{step.path}` is to become a block",
                    seen=f"{type(owner).__name__} has an attribute of that name",
                    hint=f"choose another name with `{either('--name NAME', 'name=…')}`",
                )
            was_none[step.block_name] = "module" if step.block_name in owner._modules else "attribute"
    kept = [replace(step, owner="", site=_relative(step.site, path)) for step in (*earlier, *steps)]
    bodies = new_bodies(trace, path, earlier, steps).bodies
    if before and not bodies["forward"]:
        bodies = _beside(before, bodies, path)
    if was_none and is_at_output(bodies["forward"]):
        # the original forward, which still runs, would find its attribute taken
        raise SurgeryError(
            f"`{path}` reads an attribute of the name the block is to get: `{next(iter(was_none))}`",
            hint=f"choose another name with `{either('--name NAME', 'name=…')}`",
        )
    body = with_bodies({"steps": [step.to_data() for step in kept], "was_none": was_none}, bodies)
    blocks = {step.block_name: _surrounded(owner, model, step, states.get(step.path)) for step in steps}
    try:
        generated = generated_class(original, json.dumps(body))
    except InjectError:
        raise
    except Exception as error:
        raise SurgeryError(
            f"no subclass of {original.__name__} (`{path}`) can be made", seen=f"{type(error).__name__}: {error}"
        ) from error
    return _Operation(owner, generated, blocks, was_none)


def _beside(before: dict[str, Any], bodies: dict[str, list[Any]], path: str) -> dict[str, list[Any]]:
    """Return a module's bodies with those of a method by which it is called this time in the place of that method's.

    Raises:
        SurgeryError: its forward computes what the method does by itself, and would pass by the new blocks.
    """
    kept = bodies_in(before)
    if kept["forward"] and not kept.keys() >= bodies.keys():
        raise SurgeryError(
            f"`{path}` holds blocks that were put in when it was called by its forward, and it is called by another method",
            hint="take them out first, `si.eject_(model)`, and put all in at once",
        )
    new = {name: lines for name, lines in bodies.items() if name != "forward"}
    return {**kept, **new}


def _relative(site: str, path: str) -> str:
    """Return a site's address within its owner, so that equal owners have equal bodies."""
    return site[len(path) :] if path and site.startswith(path + ".") else site


def _surrounded(owner: nn.Module, model: nn.Module, step: Step, state: Mapping[str, Tensor] | None) -> nn.Module:
    """Build a block with the dtype, device, memory format and mode of the modules around it, and its state if it has one."""
    with torch.inference_mode(False):
        block = build_block(step.block, step.channels, step.size, step.options, step.init)
    try:
        block = _fitted(block, owner, model, step.rank)
        if state is not None:
            block.load_state_dict(state)
    except Exception as error:
        raise PluginError(
            f"block `{step.block}` can't be put into `{step.owner or '(the network)'}`",
            seen=f"{type(error).__name__}: {error}",
        ) from error
    return block


def _fitted(block: nn.Module, owner: nn.Module, model: nn.Module, rank: int) -> nn.Module:
    near = next((p for p in (*owner.parameters(), *model.parameters()) if p.is_floating_point()), None)
    if near is not None:
        block = block.to(device=near.device, dtype=near.dtype)
    last = torch.channels_last
    if rank == 2 and any(
        p.dim() == 4 and p.is_contiguous(memory_format=last) and not p.is_contiguous() for p in owner.parameters()
    ):
        block = block.to(memory_format=last)  # type: ignore[call-overload]
    return block.train(owner.training)
