"""Make a plan from a network, a block and options: look at the network, choose sites, check the block. Nothing is changed."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from se_inject.blocks import (
    LEAST_WIDTH,
    build_block,
    check_block,
    check_values,
    has_class_at,
    has_identity_start,
    is_at_hand,
    is_ours,
    start_as_identity_,
)
from se_inject.errors import InjectError, OptionError, SiteNotFound, SurgeryError, TraceError, either
from se_inject.forwards import is_plain_name, original_class
from se_inject.plans.budget import Search, parsed_budget, plan_within
from se_inject.plans.candidates import ratios_of
from se_inject.plans.stored import check_trust
from se_inject.plans.value import Plan, already
from se_inject.sites import POSITIONS, HeldBack, Place, Refusal, Site, Sites, commonest, place_of, sites_in
from se_inject.surgery import Step, check_sizes, check_unfused, method_notes, own_steps
from se_inject.tables import counted
from se_inject.tracing import Trace, float_like, observe_model, shapes_of

Predicate = Callable[[Site], bool]


def plan(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    example_kwargs: dict[str, Any] | None = None,
    stages: Iterable[int | str] | int | str | None = None,
    at: Iterable[str | Predicate] | str | Predicate | None = None,
    attended: bool = False,
    block: str = "se",
    position: str = "standard",
    init: str | None = None,
    name: str | None = None,
    require_all: bool = False,
    budget: Mapping[str, Any] | Iterable[str] | None = None,
    **block_options: Any,
) -> Plan:
    """Look at a network and say what would be put where. Nothing is computed and nothing changed.

    Args:
        model: the network; any mode, dtype and device.
        example_inputs: a tensor or a tuple of the forward's positional arguments (they may be on the meta device).
            None: inferred, and the plan's notes say what was inferred.
        example_kwargs: the forward's keyword arguments.
        stages: numbers (``[3, 4]``), ranges (``"2-4"``), path prefixes (``"layer3"``), levels (``"C4"``), ``"last"`` or
            ``"all-but-last"``; None: all stages.
        at: globs (``"layer3.*"``) or ``re:`` expressions on site addresses, or functions of a ``Site`` that say whether
            it is chosen; instead of or besides stages.
        attended: also sites that have attention of their own already.
        block: name of the block.
        position: where the block sits relative to a residual unit: ``standard``, ``pre``, ``post``, ``identity`` or
            ``conv3x3``; other kinds of site have only ``standard``.
        init: ``identity``: the block starts as x ↦ x, so the network's output stays the same bit for bit until it is
            trained; ``paper``: as its authors start it. None: ``identity`` if the block has it.
        name: attribute that a block gets on its owner; None: ``se``, or ``se_<value>`` if an owner has several.
        require_all: a module with convolutions that can't be traced is an error, instead of losing its own sites.
        budget: the most that the blocks may add: ``{"params": 0.05, "bytes": "3%", "macs": 20e6, "latency": "2%"}``, each a
            share (a number below 1, or per cent) or an amount (of ``params``, ``macs``, ``elementwise`` operations,
            ``bytes`` or milliseconds). Of the chosen stages, and of r = 2, 4, 8, 16 and 32 unless ``reduction`` is given,
            the plan with the most blocks and then the smallest r is taken; its notes say which, and the two best that did
            not fit. Latency is measured, where the network is.
        **block_options: the block's, for SE ``reduction=16``, ``bias=True``, ``gate="sigmoid"`` and more.

    Raises:
        NoSites: the network has no place for a block, or no blocks fit the budget.
        SiteNotFound: a stage or pattern matches nothing.
        OptionError: an option that the block refuses, or blocks that are far larger than the network.
        TraceError: the network's own forward fails on the inputs, or with ``require_all`` a module can't be traced.
        UnsupportedModel: a wrapped, compiled, scripted or quantised module.
        AlreadyInjected: every chosen site holds a block of ours.
    """
    if position not in POSITIONS:
        raise OptionError(f"no position is called `{position}`", seen=", ".join(POSITIONS))
    block_options = _storable(block_options)
    check_values(block, block_options)
    if name is not None and not is_plain_name(name):
        raise OptionError(f"`{name}` can't be the name of an attribute")
    if budget is not None:
        chosen_by = {"stages": stages, "at": at, "attended": attended, "require_all": require_all, "name": name}
        where = {"example_inputs": example_inputs, "example_kwargs": example_kwargs, "position": position, **chosen_by}
        return _within(budget, model, block, init, block_options, where)
    trace = observe_model(model, example_inputs, example_kwargs)
    check_unfused(model)
    if require_all:
        _require_all(trace)
    sites = sites_in(trace)
    chosen, notes = _select(sites, _listed(stages), _listed(at), attended, model)
    places, unplaced = _places(trace, chosen, position)
    dtype = float_like(model).dtype
    start, odd = _probed([place for _, place in places], block, block_options, init, dtype)
    draft = Step("", "", None, 0, 0, block, dict(block_options), start, position=position)
    steps = tuple(_step(draft, site, place, name) for site, place in places)
    _check_names(model, steps)
    check_sizes(model, steps)
    notes = [*trace.notes, *notes, *unplaced, *odd, *method_notes(trace, model, steps)]
    args, kwargs = trace.inputs
    shapes = None if kwargs or (listed := shapes_of(args)) is None else tuple(listed)
    if trace.failures:
        failed = counted(len(trace.failures), "module")
        why = commonest([Refusal(path, reason) for path, reason in trace.failures.items()])
        look = either("se-inject sites MODEL -v", "si.find_sites(model).refused")
        notes.append(f"left alone: {failed} that can't be traced, most often: {why}; `{look}` lists them")
    return Plan(steps, original_class(model).__name__, shapes, tuple(notes), trace)


def _within(
    budget: Mapping[str, Any] | Iterable[str],
    model: nn.Module,
    block: str,
    init: str | None,
    options: dict[str, Any],
    where: dict[str, Any],
) -> Plan:
    """Make the plan with the most blocks within a budget, from one observed call."""
    limits = parsed_budget(budget)
    rest = {key: value for key, value in options.items() if key != "reduction"}
    ratios = ratios_of(block, [options["reduction"]] if "reduction" in options else None, rest)
    smallest: dict[str, Any] = (
        {} if ratios[0] is None else {"reduction": min(ratio for ratio in ratios if ratio is not None)}
    )
    base = plan(model, block=block, init=init, **where, **rest, **smallest)
    found = plan_within(Search(base, ratios, limits))
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    _, odd = _probed(found.steps, block, dict(found.steps[0].options), found.steps[0].init, dtype)
    return replace(found, notes=tuple(dict.fromkeys((*found.notes, *odd))))


def inject(model: nn.Module, example_inputs: Any = None, **options: Any) -> nn.Module:
    """Put blocks into a copy of the network: ``plan`` and ``Plan.apply`` in one. The network is not changed.

    Args:
        model: the network.
        example_inputs: as for ``plan``.
        **options: as for ``plan``.

    Raises:
        InjectError: as ``plan`` and ``Plan.apply`` do.
    """
    return plan(model, example_inputs, **options).apply(model)


def plan_of(model: nn.Module, example_inputs: Any = None, *, trust: Sequence[str] = ()) -> Plan:
    """Read the plan that was injected into this model from the model itself, in data-flow order if a call can be observed.

    Args:
        model: the injected network.
        example_inputs: as for ``plan``, for the order alone.
        trust: packages, modules and ``.py`` files from which the plan may take blocks, if that code is not imported yet.

    Raises:
        SurgeryError: it holds no block of ours.
        UntrustedGlobals: it names a block in somebody's code, and nothing has imported that.
    """
    steps = own_steps(model)
    for step in steps:
        if not is_at_hand(step.block) and not has_class_at(model.get_submodule(step.path), step.block):
            check_trust(step.block, trust)
    try:
        called = list(observe_model(model, example_inputs).calls)
    except InjectError:
        called = []
    order = {path: number for number, path in enumerate(called)}
    steps = tuple(sorted(steps, key=lambda step: order.get(step.path, len(order))))
    return Plan(steps, original_class(model).__name__)


def _require_all(trace: Trace) -> None:
    """Check that every module with convolutions in it was traced."""
    lost = {path: reason for path, reason in trace.failures.items() if _convolves(trace.model.get_submodule(path))}
    if lost:
        path, reason = next(iter(lost.items()))
        raise TraceError(
            f"{counted(len(lost), 'module')} with convolutions can't be traced, and all were required",
            seen=f"`{path or type(trace.model).__name__}`: {reason}",
            hint=f"`{either('se-inject sites MODEL -v', 'si.find_sites(model).refused')}` lists them; without `require_all` they lose their own sites and the rest goes on",
        )


def _convolves(module: nn.Module) -> bool:
    return any(isinstance(each, nn.modules.conv._ConvNd) for each in module.modules())


def _select(
    sites: Sites, stages: list[Any], at: list[Any], attended: bool, model: nn.Module
) -> tuple[list[Site], list[str]]:
    """Choose the requested sites without those that are taken, and make notes about these."""
    found: list[Site] = []
    if stages:
        found += sites.stages(*stages, attended=attended)
    if at:
        found += sites.at(*at, attended=attended)
    if not stages and not at:
        found += sites.everything(attended=attended)
    found = sorted(set(found), key=lambda site: site.order)
    taken = [site for site in found if site.blocks]
    left = [site for site in found if not site.blocks]
    if not left:
        raise already([path for site in taken for path in site.blocks], model, sites.shortfall())
    notes = [f"left out: {counted(len(taken), 'chosen site')} with a block of ours already"] if taken else []
    inside = [site for site in sites.all_sites if site.stage is not None]
    if sites.missed:
        notes.append(sites.shortfall())
    if not stages and not at and sites.attention():
        notes.append(sites.attention())
    attention = sum(site.held_back is HeldBack.ATTENTION for site in inside)
    if attention and not attended:
        number = counted(attention, "site")
        notes.append(f"left out: {number} with attention of their own already; `attended` adds them")
    necks = {site.stage for site in inside if site.held_back is HeldBack.NECK} - {site.stage for site in found}
    if necks:
        number = counted(len(necks), "stage")
        notes.append(f"left out: {number} of necks and heads; ask for them by number or path")
    return left, notes


def _check_names(model: nn.Module, steps: Sequence[Step]) -> None:
    """Check that the blocks' names are free on their owners, and each is one block's."""
    paths = Counter(step.path for step in steps)
    for path, count in paths.items():
        if count > 1:
            raise SurgeryError(
                f"{count} blocks are to become `{path}`",
                seen=", ".join(step.site for step in steps if step.path == path),
                hint=f"choose one of these sites at a time, each with a name of its own: `{either('--at and --name', 'at= and name=')}`",
            )
    for step in steps:
        if getattr(model.get_submodule(step.owner), step.block_name, None) is not None:
            raise SurgeryError(
                f"`{step.path}` is to become a block",
                seen=f"{type(model.get_submodule(step.owner)).__name__} has an attribute of that name",
                hint=f"choose another name with `{either('--name NAME', 'name=…')}`",
            )


def _places(trace: Trace, sites: Sequence[Site], position: str) -> tuple[list[tuple[Site, Place]], list[str]]:
    """Find the place of each site's block.

    Sites without this position are left out, unless all are, and so are those whose place another site has: a unit
    and the unit within it may end in the same convolution.
    """
    places: dict[Place, Site] = {}
    refused: list[OptionError] = []
    shared = 0
    for site in sites:
        try:
            place = place_of(trace, site, position)
        except OptionError as error:
            refused.append(error)
            continue
        shared += place in places
        places.setdefault(place, site)
    if not places:
        if len(refused) > 1:
            others = f"so it is with all {len(refused)} chosen sites: none has a position `{position}`"
            refused[0].seen = "; ".join(filter(None, (refused[0].seen, others)))
        raise refused[0]
    notes = []
    if refused:
        notes.append(f"left out: {counted(len(refused), 'site')} without a position `{position}`: {refused[0].message}")
    if shared:
        notes.append(f"left out: {counted(shared, 'site')} whose place at position `{position}` is another's")
    return [(site, place) for place, site in places.items()], notes


def _step(draft: Step, site: Site, place: Place, name: str | None) -> Step:
    return replace(
        draft,
        site=site.address,
        owner=place.owner,
        value=place.value,
        channels=place.channels,
        rank=len(place.size),
        block_name=site.block_name.replace("se", name or "se", 1),
        stage=site.stage,
        size=place.size,
        readers=place.readers,
    )


def _probed(
    places: Sequence[Place | Step], block: str, options: dict[str, Any], init: str | None, dtype: torch.dtype
) -> tuple[str, list[str]]:
    """Build one block of each size, so that bad options are refused first of all: how it starts, and what is odd.

    A block of somebody's is called at each size as well, one of ours once for each number of dimensions.
    """
    notes = []
    called: set[int] = set()
    narrow: list[int] = []
    least = LEAST_WIDTH
    start = init or "identity"
    reduction = options.get("reduction") or 16
    for channels, size in sorted({(place.channels, place.size) for place in places}):
        with torch.device("meta"):
            built = build_block(block, channels, size, options, init or "paper")
            if init is None and not has_identity_start(built):
                start = "paper"
                notes.append(f"block `{block}` has no identity start: the network's output changes until it is trained")
            elif init is None:
                start_as_identity_(block, built)
            if not is_ours(built) or len(size) not in called:
                check_block(block, built, channels, size, dtype)
                called.add(len(size))
        width = int(getattr(built, "width", 0))  # type: ignore[arg-type]
        if width > channels / reduction and "divisor" not in options and options.get("width") is None:
            narrow.append(channels)
            least = min(least, width)
    if narrow:
        widths = " to ".join(str(channels) for channels in dict.fromkeys((min(narrow), max(narrow))))
        notes.append(
            f"r = {reduction:g} is too much for the {widths} channels of some sites: the bottleneck is {least} wide there, "
            "for one narrower is soon off for every input"
        )
    return start, list(dict.fromkeys(notes))


def _storable(options: dict[str, Any]) -> dict[str, Any]:
    """Convert the options to those read back from a file, so that the block built now is the one built then."""
    try:
        return {key: json.loads(json.dumps(value)) for key, value in options.items()}
    except (TypeError, ValueError) as error:
        raise OptionError(
            "an option of the block can't be stored", seen=str(error), hint="pass numbers, texts, or lists of them"
        ) from error


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    if callable(value):
        return [value]
    if isinstance(value, int | str):
        value = str(value).split(",") if isinstance(value, str) and not value.startswith("re:") else [value]
    result = [item.strip() if isinstance(item, str) else item for item in value]
    if not result or any(item == "" for item in result):
        raise SiteNotFound("an empty choice of sites matches nothing", hint="leave it out to choose all stages")
    return result
