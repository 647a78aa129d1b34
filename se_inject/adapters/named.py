"""Keep several adapters by name on one backbone, and switch between them in place.

The blocks of each adapter are modules with parameters of their own; one adapter's at a time are in the network. Which
adapters a network has is known in this process alone: a copy, a pickle or a state dict holds the active one's blocks.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from torch import nn

from se_inject.adapters.files import adapter_for
from se_inject.errors import AlreadyInjected, OptionError, SurgeryError
from se_inject.forwards import is_frozen
from se_inject.plans import Plan
from se_inject.random_numbers import seeded
from se_inject.surgery import eject_, freeze_statistics_, steps_of
from se_inject.user_code import did_you_mean


@dataclass
class _Named:
    """The adapters of one network.

    Args:
        plans: the plan of each, by name.
        blocks: the blocks of each by their path, by name.
        active: the name of the one whose blocks are in the network; None: no blocks are.
    """

    plans: dict[str, Plan] = field(default_factory=dict)
    blocks: dict[str, dict[str, nn.Module]] = field(default_factory=dict)
    active: str | None = None


_known: WeakKeyDictionary[nn.Module, _Named] = WeakKeyDictionary()


def load_adapter_(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    name: str | None = None,
    strict: bool = False,
    trust: Sequence[str] = (),
) -> nn.Module:
    """Put an adapter's blocks into the backbone itself and return it; with a name, beside adapters of other names.

    An adapter with a name becomes the active one: its blocks take the place of those that were active, which are kept
    with their parameters for ``set_adapter_``. Nothing of the model is changed if an error is raised.

    Args:
        model: the network that the adapter was made for; without blocks, or with those of adapters by name.
        path: what ``save_adapter`` wrote.
        name: what ``set_adapter_`` is to call it. None: the only adapter.
        strict: refuse a backbone with other weights than the blocks were trained with, instead of warning.
        trust: packages, modules and ``.py`` files from which the adapter's plan may take blocks.

    Warns:
        BackboneWarning: the backbone has other weights.

    Raises:
        LoadError: no adapter, or a damaged one.
        SurgeryError: it was made for another network; or, if strict, for other weights.
        AlreadyInjected: the model holds such blocks, or blocks without a name.
        OptionError: the name is taken, or left out beside others.
    """
    known = _known.get(model)
    if name is None:
        if known is not None and known.plans:
            raise OptionError("this network has adapters by name", seen=", ".join(known.plans), hint="give a `name=`")
        return adapter_for(model, path, strict, trust).put_into_(model)
    known = known or _Named()
    if name in known.plans:
        raise OptionError(
            f"there is an adapter `{name}` already", hint="`si.remove_adapter_(model, name)` takes it out"
        )
    _check_untouched(model, known)
    adapter = adapter_for(model, path, strict, trust)
    before = known.active
    _switch_(model, known, None)
    try:
        adapter.put_into_(model)
    except BaseException:
        _switch_(model, known, before)
        raise
    known.plans[name] = adapter.plan
    known.blocks[name] = {step.path: model.get_submodule(step.path) for step in adapter.plan.steps}
    known.active = name
    _known[model] = known
    return model


def set_adapter_(model: nn.Module, name: str | None) -> nn.Module:
    """Make another of a network's adapters the active one, in place; with None the backbone is alone.

    Each adapter keeps its own parameters, so an optimizer made for one doesn't touch another's. Blocks are moved to the
    device, dtype and mode of those they replace. Adapters with the same plan are switched in microseconds; with another
    one the network is observed once more, as in planning. Not while another thread calls the network.

    Args:
        model: a network with adapters that were loaded by name.
        name: of the adapter.

    Returns:
        the model itself.

    Raises:
        SurgeryError: no adapter was loaded by name, or the blocks have been changed by other means since.
        OptionError: there is none of this name.
    """
    known = _with(model, name)
    _switch_(model, known, name)
    return model


def remove_adapter_(model: nn.Module, name: str) -> nn.Module:
    """Forget one of a network's adapters; if it is the active one, the backbone alone is left.

    Args:
        model: a network with adapters that were loaded by name.
        name: of the adapter.

    Returns:
        the model itself.

    Raises:
        SurgeryError: no adapter was loaded by name, or the blocks have been changed by other means since.
        OptionError: there is none of this name.
    """
    known = _with(model, name)
    if name == known.active:
        _switch_(model, known, None)
    del known.plans[name], known.blocks[name]
    if not known.plans:
        del _known[model]
    return model


def adapters_of(model: nn.Module) -> dict[str, Plan]:
    """List the adapters that were loaded by name into this very network: the plan of each."""
    known = _known.get(model)
    return dict(known.plans) if known else {}


def active_adapter(model: nn.Module) -> str | None:
    """Name the adapter whose blocks are in the network; None if none is, or it has no name."""
    known = _known.get(model)
    return known.active if known is not None and steps_of(model) else None


def _switch_(model: nn.Module, known: _Named, name: str | None) -> None:
    """Put the blocks of another adapter into the network, or take out those that are in it."""
    if name == known.active and (name is None or steps_of(model)):
        return
    present = {step.path: step for step in steps_of(model)}
    if name is None or present != {step.path: step for step in known.plans[name].steps}:
        norms = [module for module in model.modules() if is_frozen(module)]
        eject_(model)
        if name is not None:
            with seeded(0):  # new blocks draw numbers; these are replaced at once
                known.plans[name].fitted(model).put_into_(model)
        for norm in norms:
            freeze_statistics_(norm)
    for path, block in known.blocks[name].items() if name is not None else ():
        owner, _, attribute = path.rpartition(".")
        modules = model.get_submodule(owner)._modules
        replaced = modules[attribute]
        assert replaced is not None
        like = next((p for p in replaced.parameters() if p.is_floating_point()), None)
        if like is not None:
            block.to(device=like.device, dtype=like.dtype)
        modules[attribute] = block.train(replaced.training)
    known.active = name


def _with(model: nn.Module, name: str | None) -> _Named:
    """Return a network's adapters, this name among them, if the blocks in the network are as they were left."""
    known = _known.get(model)
    if known is None:
        raise SurgeryError(
            "no adapter was loaded into this network by name",
            seen=f"a {type(model).__name__}",
            hint='`si.load_adapter_(model, path, name="birds")`; a copy of a network has none',
        )
    if name is not None and name not in known.plans:
        raise OptionError(
            f"no adapter `{name}`", seen=", ".join(known.plans), hint=did_you_mean(str(name), known.plans)
        )
    _check_untouched(model, known)
    return known


def _check_untouched(model: nn.Module, known: _Named) -> None:
    """Check that the blocks in the network are those of the active adapter, or none.

    Raises:
        AlreadyInjected: they are others.
    """
    steps = tuple(steps_of(model))
    if not steps:
        known.active = None
        return
    blocks = known.blocks.get(known.active or "", {})
    if any(model.get_submodule(step.path) is not blocks.get(step.path) for step in steps) or len(steps) != len(blocks):
        raise AlreadyInjected(
            "this network holds blocks that belong to no adapter by name",
            seen=f"`{steps[0].path}`",
            hint="`si.save_adapter` them, `si.eject_(model)`, and load each adapter by its name",
        )
