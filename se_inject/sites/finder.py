"""Find the sites of an observed network: call the rules in their order.

What is looked for is structure, never a name. Each rule has a file of its own: ``residuals``, ``joins``, ``chains``; they
write into one ``Ledger``, children before their parents. Within one another, the inner unit has the site: an outer
addition or concatenation over units is held back.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import nn

from se_inject.sites.chains import plain_convolutions
from se_inject.sites.joins import dense_blocks, joined_branches, skips
from se_inject.sites.ledger import Ledger
from se_inject.sites.naming import named
from se_inject.sites.operations import any_prefix
from se_inject.sites.residuals import residual_units, two_streams, units_without_shortcut
from se_inject.sites.selection import Sites
from se_inject.sites.site import Refusal
from se_inject.sites.stages import staged
from se_inject.tracing import Trace, observe_model


def find_sites(model: nn.Module, example_inputs: Any = None, example_kwargs: dict[str, Any] | None = None) -> Sites:
    """Find every place of a network that a block could gate, by stage, and those refused. Changes nothing.

    Args:
        model: the network.
        example_inputs: as for ``plan``.
        example_kwargs: as for ``plan``.

    Raises:
        TraceError: the network's own forward fails on the inputs.
    """
    return sites_in(observe_model(model, example_inputs, example_kwargs))


def sites_in(trace: Trace) -> Sites:
    """Find every site of an observed network, grouped into stages. Nothing is changed; a trace is searched once.

    Returns:
        the sites that nothing holds back chosen, the others in ``all_sites``.
    """
    return _searched(trace)[1]


def ledger_of(trace: Trace) -> Ledger:
    """Return what the rules wrote down about an observed network."""
    return _searched(trace)[0]


def _searched(trace: Trace) -> tuple[Ledger, Sites]:
    """Return the results for a trace: they are worked out once."""
    if sites_in not in trace.known:
        ledger = _search(trace)
        sites = staged(trace, named(trace, sorted(ledger.found.values(), key=lambda site: site.order)))
        untraced = (Refusal(path or "(the network)", reason) for path, reason in trace.failures.items())
        chosen = tuple(site for site in sites if site.stage is not None and site.held_back is None)
        refused = (*untraced, *ledger.refused)
        trace.known[sites_in] = ledger, Sites(chosen, refused, sites, tuple(ledger.missed.values()))
    found: tuple[Ledger, Sites] = trace.known[sites_in]
    return found


def _search(trace: Trace) -> Ledger:
    """Apply the rules to a network, one after the other, to each graph."""
    ledger = Ledger(trace)
    owners = []
    for owner in trace.graphs.values():
        if owner.path in trace.without_grad:
            ledger.refuse(owner.path, "it runs without grad: a block in it could not be trained")
        elif len(trace.kinds.get(owner.path, ())) > 1:
            ledger.refuse(owner.path, "it is called with different kinds of arguments")
        else:
            owners.append(owner)
    for owner in owners:
        residual_units(ledger, owner)
    units_without_shortcut(ledger, owners)
    two_streams(ledger)
    skips(ledger, owners)
    for owner in owners:
        joined_branches(ledger, owner)
    dense_blocks(ledger)
    units_without_shortcut(ledger, owners, anywhere=True)
    miss_untraced_units(ledger)
    plain_convolutions(ledger, owners)
    return ledger


def miss_untraced_units(ledger: Ledger) -> None:
    """Write down the modules that can't be traced and are units by all that is known without a graph.

    They hold convolutions, and stand several times in the network or are small; they hold no unit, and no unit holds them or
    one of their class.
    """
    model = ledger.trace.model
    parts = {
        type(model.get_submodule(path)) for path in ledger.trace.failures if path and any_prefix(path, ledger.units)
    }
    failed = {path: model.get_submodule(path) for path in ledger.trace.failures if path}
    classes = Counter(type(module) for module in failed.values())
    for path, module in failed.items():
        convolutions = sum(isinstance(each, nn.modules.conv._ConvNd) for each in module.modules())
        like_unit = convolutions > 1 and (classes[type(module)] > 1 or convolutions <= _SMALL)
        within = any_prefix(path, ledger.units) or any(any_prefix(path, {other}) for other in failed if other != path)
        if like_unit and not within and path not in ledger.around and type(module) not in parts:
            ledger.missed[path] = Refusal(path, ledger.trace.failures[path])
            if classes[type(module)] == 1:
                ledger.alone.add(path)


_SMALL = 4
"""So many convolutions or fewer are a unit's, not a whole network's."""
