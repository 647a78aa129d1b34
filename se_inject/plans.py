"""Sites + block + options → Plan: what would be done, to look at, to store, and to apply."""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from se_inject import report
from se_inject.blocks import build_block, check_block, check_options, has_identity_start
from se_inject.bodies import original_class
from se_inject.cost import CostReport, cost_of_steps
from se_inject.errors import AlreadyInjected, LoadError, OptionError, SiteNotFound, SurgeryError
from se_inject.finding import find_sites
from se_inject.inputs import check_supported, inputs_from, observe_model, shapes_of
from se_inject.positions import POSITIONS, Place, place_of
from se_inject.sites import ATTENDED, NECK, Site, Sites
from se_inject.surgery import Step, inject_, steps_of
from se_inject.tables import counted
from se_inject.tracing import Trace

VERSION = 1


@dataclass(frozen=True)
class Plan:
    """What would be put where. It is a value: printing, storing and applying don't change it.

    Args:
        steps: one for each new block, in data-flow order.
        model: class name of the network it was made for.
        inputs: shapes and dtypes of the observed call's inputs; None if they were more than tensors.
        notes: what the user should know about it.
        trace: the observed call, if the plan was made in this process.
    """

    steps: tuple[Step, ...]
    model: str
    inputs: tuple[Any, ...] | None = None
    notes: tuple[str, ...] = ()
    trace: Trace | None = field(default=None, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.steps)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"trace": None}  # the network does not go into a plan's pickle

    def __str__(self) -> str:
        return report.plan_text(self)

    def apply(self, model: nn.Module) -> nn.Module:
        """A copy of the model with the blocks in it. The model itself is not changed.

        Raises:
            SurgeryError: the plan does not fit the model.
        """
        checked = self.fitted(model)
        return checked._inject(copy.deepcopy(model))

    def apply_(self, model: nn.Module) -> nn.Module:
        """Put the blocks into the model itself and return it. No weight of it is copied or changed.

        Raises:
            SurgeryError: the plan does not fit the model, which then is as before.
        """
        return self.fitted(model)._inject(model)

    def _inject(self, model: nn.Module) -> nn.Module:
        assert self.trace is not None
        return inject_(model, self.trace, self.steps)

    def fitted(self, model: nn.Module) -> Plan:
        """This plan with an observed call of this very model; nothing is changed.

        Raises:
            AlreadyInjected: the model holds these blocks.
            SurgeryError: a step's site is missing, or has other channels.
        """
        check_supported(model)
        taken = {step.path for step in steps_of(model)} & {step.path for step in self.steps}
        if taken:
            raise _already(sorted(taken), model)
        if self.trace is not None and self.trace.model is model and not self._stale(model):
            return self
        if self.trace is not None:
            trace = observe_model(model, *self.trace.inputs)
        else:
            trace = observe_model(model, inputs_from(self.inputs) if self.inputs is not None else None)
        found = {site.address: site for site in find_sites(trace).all_sites}
        for number, step in enumerate(self.steps, 1):
            site = found.get(step.site)
            place = None if site is None else place_of(trace, site, step.position)
            if site is None or place is None or (place.owner, place.value) != (step.owner, step.value):
                raise SurgeryError(
                    f"step {number} of the plan puts a block at `{step.site}`",
                    seen=f"the network ({type(model).__name__}) has no such site",
                    hint="plan again on this network: `se-inject MODEL --dry-run`",
                )
            if (place.channels, len(place.size)) != (step.channels, step.rank):
                raise SurgeryError(
                    f"step {number} of the plan expects {step.channels} channels at `{step.site}`",
                    seen=f"{place.channels} channels and {len(place.size)} dimensions",
                    hint="the plan was made for another network",
                )
        return replace(self, trace=trace)

    def _stale(self, model: nn.Module) -> bool:
        assert self.trace is not None
        graphs = self.trace.graphs
        for path in {step.owner for step in self.steps} & set(graphs):
            owner, graph = model.get_submodule(path), graphs[path]
            if type(owner) is not graph.kind or any(getattr(owner, k, None) != v for k, v in graph.settings.items()):
                return True
        return False

    def cost(self, model: nn.Module | None = None) -> CostReport:
        """What the plan adds: parameters exactly, MACs, element-wise operations and bytes for one example.

        Args:
            model: the network, if the plan was loaded from JSON; else the one it was made for.

        Raises:
            OptionError: the plan was loaded from JSON and no model is given.
        """
        trace = self.fitted(model).trace if model is not None else self.trace
        if trace is None:
            raise OptionError("a stored plan needs the network to say what it costs", hint="plan.cost(model)")
        return cost_of_steps(trace.model, trace, self.steps)

    def to_json(self) -> str:
        """The plan as JSON text; ``from_json`` reads it back."""
        data = {
            "se_inject_plan": VERSION,
            "model": self.model,
            "inputs": self.inputs,
            "steps": [step.to_data() for step in self.steps],
        }
        return json.dumps(data, indent=2)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """A plan from the text that ``to_json`` gave.

        Raises:
            LoadError: not such a text, or one of a later version.
        """
        try:
            data = json.loads(text)
            if data["se_inject_plan"] != VERSION:
                raise LoadError(
                    f"a plan of version {data['se_inject_plan']!r}",
                    seen=f"this se-inject reads version {VERSION}",
                    hint="update se-inject",
                )
            steps = tuple(Step.from_data(step) for step in data["steps"])
            inputs = None if data["inputs"] is None else tuple(data["inputs"])
            for step in steps:
                check_options(step.block, step.options)
            return cls(steps, str(data["model"]), inputs)
        except (ValueError, TypeError, KeyError) as error:
            if isinstance(error, LoadError | OptionError):
                raise
            raise LoadError("this is no plan", seen=f"{type(error).__name__}: {error}") from error


def plan(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    example_kwargs: dict[str, Any] | None = None,
    stages: Iterable[int | str] | int | str | None = None,
    at: Iterable[str] | str | None = None,
    attended: bool = False,
    block: str = "se",
    position: str = "standard",
    init: str | None = None,
    name: str | None = None,
    **block_options: Any,
) -> Plan:
    """Look at a network and say what would be put where. Nothing is computed and nothing changed.

    Args:
        model: the network; any mode, dtype and device.
        example_inputs: a tensor or a tuple of the forward's positional arguments (they may be on the meta device).
            None: inferred, and the plan's notes say what was inferred.
        example_kwargs: the forward's keyword arguments.
        stages: numbers (``[3, 4]``), ranges (``"2-4"``), or path prefixes (``"layer3"``); None: all stages.
        at: globs (``"layer3.*"``) or ``re:`` expressions on site addresses, instead of or besides stages.
        attended: also sites that have attention of their own already.
        block: name of the block.
        position: where the block sits relative to a residual unit: ``standard``, ``pre``, ``post``, ``identity`` or
            ``conv3x3``; other kinds of site have only ``standard``.
        init: ``identity``: the block starts as x ↦ x, so the network's output stays the same bit for bit until it is
            trained; ``paper``: as its authors start it. None: ``identity`` if the block has it.
        name: attribute that a block gets on its owner; None: ``se``, or ``se_<value>`` if an owner has several.
        **block_options: the block's, for SE ``reduction=16``, ``bias=True``, ``gate="sigmoid"`` and more.

    Raises:
        NoSites: the network has no place for a block.
        SiteNotFound: a stage or pattern matches nothing.
        OptionError: an option that the block refuses.
        TraceError: the network's own forward fails on the inputs.
        UnsupportedModel: a wrapped, compiled, scripted or quantised module.
        AlreadyInjected: every chosen site holds a block of ours.
    """
    if position not in POSITIONS:
        raise OptionError(f"no position is called `{position}`", seen=", ".join(POSITIONS))
    check_options(block, block_options)
    if name is not None and not name.isidentifier():
        raise OptionError(f"`{name}` can't be the name of an attribute")
    trace = observe_model(model, example_inputs, example_kwargs)
    sites = find_sites(trace)
    chosen, notes = _select(sites, _listed(stages), _listed(at), attended, model)
    places, unplaced = _places(trace, chosen, position)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    start, odd = _probed([place for _, place in places], block, block_options, init, dtype)
    draft = Step("", "", None, 0, 0, block, dict(block_options), start, position=position)
    steps = tuple(_step(draft, site, place, name) for site, place in places)
    _check_names(model, steps)
    notes = [*trace.notes, *notes, *unplaced, *odd]
    args, kwargs = trace.inputs
    shapes = None if kwargs or (listed := shapes_of(args)) is None else tuple(listed)
    if trace.failures:
        failed = counted(len(trace.failures), "module")
        notes.append(f"left alone: {failed} that can't be traced; `se-inject sites MODEL -v` says why")
    return Plan(steps, type(model).__name__, shapes, tuple(notes), trace)


def inject(model: nn.Module, example_inputs: Any = None, **options: Any) -> nn.Module:
    """A copy of the network with blocks in it: ``plan`` and ``Plan.apply`` in one. The network is not changed.

    Args:
        model: the network.
        example_inputs: as for ``plan``.
        **options: as for ``plan``.

    Raises:
        InjectError: as ``plan`` and ``Plan.apply`` do.
    """
    return plan(model, example_inputs, **options).apply(model)


def plan_of(model: nn.Module) -> Plan:
    """What was injected into this model, read from the model itself.

    Raises:
        SurgeryError: it holds no block of ours.
    """
    steps = steps_of(model)
    if not steps:
        raise SurgeryError("this model holds no block of se-inject's", seen=f"a {type(model).__name__}")
    return Plan(tuple(steps), original_class(model).__name__)


def _select(
    sites: Sites, stages: list[Any], at: list[Any], attended: bool, model: nn.Module
) -> tuple[list[Site], list[str]]:
    """The sites asked for without those that are taken, and what to say about it."""
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
        raise _already([path for site in taken for path in site.blocks], model)
    notes = [f"left out: {counted(len(taken), 'chosen site')} with a block of ours already"] if taken else []
    stages = [site for site in sites.all_sites if site.stage is not None]
    attention = sum(site.held_back == ATTENDED for site in stages)
    if attention and not attended:
        told = counted(attention, "site")
        notes.append(f"left out: {told} with attention of their own already; `attended` adds them")
    necks = {site.stage for site in stages if site.held_back == NECK} - {site.stage for site in found}
    if necks:
        told = counted(len(necks), "stage")
        notes.append(f"left out: {told} of necks and heads; ask for them by number or path")
    return left, notes


def _already(paths: Sequence[str], model: nn.Module) -> AlreadyInjected:
    return AlreadyInjected(
        "the chosen sites hold blocks of ours already",
        seen=f"{len(paths)} in {type(model).__name__}, `{paths[0]}` the first",
        hint="choose other sites, or take the blocks out first: `si.eject_(model)`",
    )


def _check_names(model: nn.Module, steps: Sequence[Step]) -> None:
    """Whether the blocks' names are free on their owners, and each is one block's."""
    paths = Counter(step.path for step in steps)
    for path, count in paths.items():
        if count > 1:
            raise SurgeryError(
                f"{count} blocks are to become `{path}`",
                seen=", ".join(step.site for step in steps if step.path == path),
                hint="choose one of these sites at a time, each with a name of its own: `at=` and `name=` in Python",
            )
    for step in steps:
        if getattr(model.get_submodule(step.owner), step.block_name, None) is not None:
            raise SurgeryError(
                f"`{step.path}` is to become a block",
                seen=f"{type(model.get_submodule(step.owner)).__name__} has an attribute of that name",
                hint="choose another name with `name=` in Python, `--name` on the command line",
            )


def _places(trace: Trace, sites: Sequence[Site], position: str) -> tuple[list[tuple[Site, Place]], list[str]]:
    """Where the block of each site goes.

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
        raise refused[0]
    told = []
    if refused:
        told.append(f"left out: {counted(len(refused), 'site')} without a position `{position}`: {refused[0].message}")
    if shared:
        told.append(f"left out: {counted(shared, 'site')} whose place at position `{position}` is another's")
    return [(site, place) for place, site in places.items()], told


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
    places: Sequence[Place], block: str, options: dict[str, Any], init: str | None, dtype: torch.dtype
) -> tuple[str, list[str]]:
    """Build one block of each size, so that bad options are refused first of all: how it starts, and what is odd."""
    notes = []
    narrow = []
    start = init or "identity"
    reduction = options.get("reduction") or 16
    for channels, size in sorted({(place.channels, place.size) for place in places}):
        with torch.device("meta"):
            built = build_block(block, channels, size, options, "paper")
            if init is None and not has_identity_start(built):
                start = "paper"
                notes.append(f"block `{block}` has no identity start: the network's output changes until it is trained")
            check_block(block, build_block(block, channels, size, options, start), channels, size, dtype)
        if getattr(built, "width", None) == 1 and options.get("width") is None and reduction > channels:
            narrow.append(channels)
    if narrow:
        told = " to ".join(str(channels) for channels in dict.fromkeys((min(narrow), max(narrow))))
        notes.append(f"r = {reduction:g} is more than the {told} channels of some sites: the bottleneck is 1 wide")
    return start, list(dict.fromkeys(notes))


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    if isinstance(value, int | str):
        value = str(value).split(",") if isinstance(value, str) and not value.startswith("re:") else [value]
    result = [item.strip() if isinstance(item, str) else item for item in value]
    if not result or any(item == "" for item in result):
        raise SiteNotFound("an empty choice of sites matches nothing", hint="leave it out to choose all stages")
    return result
