"""Take some of a network's blocks out, and put them back as they were."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from se_inject.errors import SurgeryError
from se_inject.forwards import has_changed_class, is_frozen
from se_inject.surgery.step import Step
from se_inject.surgery.swap import inject_, restore, steps_of
from se_inject.tracing import Trace, observe_model


def remove_(model: nn.Module, trace: Trace, paths: Iterable[str]) -> nn.Module:
    """Take some blocks out of a network; the others stay the modules that they are. No weight is touched.

    Args:
        model: an injected network.
        trace: an observed call of it, for its inputs.
        paths: of the blocks to take out.

    Raises:
        SurgeryError: no such block, or the owner of one has become another class since; the model is then as before.
    """
    gone = set(paths)
    steps = steps_of(model)
    if missing := gone - {step.path for step in steps}:
        raise SurgeryError(f"there is no block `{min(missing)}`", seen=f"a {type(model).__name__}")
    owners = {step.owner for step in steps if step.path in gone}
    wanted = {owner: [step for step in steps if step.owner == owner and step.path not in gone] for owner in owners}
    return _arrange_(model, trace, wanted, {})


def put_back_(model: nn.Module, trace: Trace, steps: Sequence[Step], blocks: Mapping[str, nn.Module]) -> nn.Module:
    """Put blocks that were removed back, each the module that it was.

    Args:
        model: the network.
        trace: an observed call of it, for its inputs.
        steps: all steps that the network had, in their order.
        blocks: the modules that were removed, by path.

    Raises:
        SurgeryError: a step doesn't fit; the model is then as before.
    """
    here = {step.path for step in steps_of(model)}
    owners = {step.owner for step in steps if step.path in blocks}
    wanted = {
        owner: [step for step in steps if step.owner == owner and (step.path in blocks or step.path in here)]
        for owner in owners
    }
    return _arrange_(model, trace, wanted, blocks)


def _arrange_(
    model: nn.Module, trace: Trace, wanted: Mapping[str, Sequence[Step]], blocks: Mapping[str, nn.Module]
) -> nn.Module:
    """Give owners just these blocks, in this order: those they have, and others that are handed in."""
    modules = {step.path: model.get_submodule(step.path) for step in steps_of(model)} | dict(blocks)
    before = []
    for path in wanted:
        owner = model.get_submodule(path)
        if has_changed_class(owner):
            raise SurgeryError(
                f"`{path}` has become a {type(owner).__name__} since blocks were put into it",
                hint="undo that first: remove its parametrizations",
            )
        if is_frozen(owner):
            raise SurgeryError(f"the statistics of `{path}` are frozen", hint="`si.freeze_backbone_(model)` thaws them")
        before.append((owner, type(owner), dict(owner._modules)))
    try:
        for path in wanted:
            restore(model.get_submodule(path))
        steps = [step for group in wanted.values() for step in group]
        if steps:
            inject_(model, observe_model(model, *trace.inputs), steps)
            for step in steps:
                setattr(model.get_submodule(step.owner), step.block_name, modules[step.path])
    except BaseException:
        for owner, kind, held in before:
            owner.__class__ = kind
            owner._modules.clear()
            owner._modules.update(held)
        raise
    return model
