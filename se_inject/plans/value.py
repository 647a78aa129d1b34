"""A plan as a value: which block goes where, to print, add up, store, and apply."""

from __future__ import annotations

import contextlib
import html
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from se_inject.atomic_files import atomic
from se_inject.cost import CostReport, cost_of_steps
from se_inject.errors import (
    AlreadyInjected,
    OptionError,
    SurgeryError,
    either,
    printable,
)
from se_inject.forwards import original_class
from se_inject.pictures import Picture, picture
from se_inject.plans.stored import read_plan, text_in, text_of
from se_inject.plans.text import plan_text
from se_inject.sites import place_of, sites_in
from se_inject.surgery import Step, inject_, steps_of
from se_inject.tables import counted
from se_inject.tracing import Trace, check_supported, duplicate, inputs_from, observe_model, shapes_of


@dataclass(frozen=True, repr=False)
class Plan:
    """What would be put where. It is a value: printing, adding, storing and applying don't change it.

    Args:
        steps: one for each new block, in data-flow order; blocks at one site act in this order.
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
        return plan_text(self)

    def __repr__(self) -> str:
        kinds = ", ".join(dict.fromkeys(step.block for step in self.steps))
        return f"<Plan: {counted(len(self.steps), 'block')} ({kinds}) for {printable(self.model)}>"

    def __add__(self, other: Plan) -> Plan:
        """Join both plans; at a site that both name, the first plan's block acts first, the second's on its output.

        A block whose name is taken by then gets a number: ``se``, ``se_2``.

        Raises:
            OptionError: they were made for different networks, or on different inputs.
        """
        if not isinstance(other, Plan):
            return NotImplemented
        networks = [plan.trace.model for plan in (self, other) if plan.trace is not None]
        if self.model != other.model or len({id(network) for network in networks}) > 1:
            raise OptionError(
                "plans for different networks don't add up",
                seen=f"a {self.model} and {'another ' if self.model == other.model else 'a '}{other.model}",
                hint="make both with `si.plan` on the same network",
            )
        if None not in (self.inputs, other.inputs) and self.inputs != other.inputs:
            raise OptionError("plans made on different inputs don't add up", seen=f"{self.inputs} and {other.inputs}")
        steps = list(self.steps)
        for step in other.steps:
            steps.append(replace(step, block_name=_free_name(step, steps, networks)))
        notes = tuple(dict.fromkeys((*self.notes, *other.notes)))
        both = Plan(tuple(steps), self.model, self.inputs or other.inputs, notes)
        trace = self.trace or other.trace
        return both if trace is None else both._fitted_to(trace)

    def apply(
        self, model: nn.Module, example_inputs: Any = None, example_kwargs: dict[str, Any] | None = None
    ) -> nn.Module:
        """Put the blocks into a copy of the model. The model itself is not changed.

        Args:
            model: the network.
            example_inputs: inputs of the model, as for ``plan``. A plan out of a file needs them if the network takes more
                than tensors (a dict, a list): it holds the shapes of tensors alone.
            example_kwargs: the forward's keyword arguments, likewise.

        Raises:
            SurgeryError: the plan does not fit the model.
        """
        checked = self.fitted(model, example_inputs, example_kwargs, resized=False)
        return checked.put_into_(duplicate(model))

    def apply_(
        self, model: nn.Module, example_inputs: Any = None, example_kwargs: dict[str, Any] | None = None
    ) -> nn.Module:
        """Put the blocks into the model itself and return it. No weight of it is copied or changed.

        Args:
            model: the network.
            example_inputs: as for ``apply``.
            example_kwargs: as for ``apply``.

        Raises:
            SurgeryError: the plan does not fit the model, which then is as before.
        """
        return self.fitted(model, example_inputs, example_kwargs, resized=False).put_into_(model)

    def put_into_(self, model: nn.Module, states: Mapping[str, Mapping[str, Tensor]] | None = None) -> nn.Module:
        """Put the blocks of a fitted plan into the model it was fitted to, or a copy of that.

        Args:
            model: the network.
            states: state dicts of trained blocks, by the path of the block.
        """
        assert self.trace is not None
        return inject_(model, self.trace, self.steps, states)

    def fitted(
        self,
        model: nn.Module,
        example_inputs: Any = None,
        example_kwargs: dict[str, Any] | None = None,
        *,
        resized: bool = True,
    ) -> Plan:
        """Fit this plan to an observed call of this model; nothing is changed.

        Args:
            model: the network.
            example_inputs: inputs of another size than the plan's.
            example_kwargs: the forward's keyword arguments.
            resized: the steps take over the spatial sizes that the given inputs lead to.

        Raises:
            AlreadyInjected: the model holds these blocks.
            SurgeryError: a step's site is missing, or has other channels.
        """
        check_supported(model)
        sites = {step.site for step in self.steps}
        paths = {step.path for step in self.steps}
        taken = [step.path for step in steps_of(model) if step.site in sites or step.path in paths]
        if taken:
            raise already(taken, model)
        if example_inputs is not None or example_kwargs:
            return self._fitted_to(observe_model(model, example_inputs, example_kwargs), resized=resized)
        if self.trace is not None and self.trace.model is model and not self._stale(model):
            return self
        inputs = self.trace.inputs if self.trace is not None else (self.stored_inputs(),)
        return self._fitted_to(observe_model(model, *inputs))

    def stored_inputs(self) -> tuple[Tensor, ...] | None:
        """Make inputs of the shapes that the plan was made with, on the meta device; None if they are not in it."""
        if self.inputs is None:
            return None
        return inputs_from(self.inputs)

    def _fitted_to(self, trace: Trace, resized: bool = False) -> Plan:
        """Return this plan with another observed call, its steps in the order of that and, if asked for, of its sizes."""
        found = {site.address: site for site in sites_in(trace).all_sites}
        steps = []
        for number, step in enumerate(self.steps, 1):
            place = None
            with contextlib.suppress(KeyError, OptionError):  # no such site, or it has no such position
                place = place_of(trace, found[step.site], step.position)
            if place is None or (place.owner, place.value, place.readers) != (step.owner, step.value, step.readers):
                raise SurgeryError(
                    f"step {number} of the plan puts a block at `{step.site}`",
                    seen=f"the network ({type(trace.model).__name__}) has no such site"
                    if place is None
                    else f"there, it would sit at `{place.value or 'the output'}` of `{place.owner}`",
                    hint=f"plan again on this network: `{either('se-inject MODEL --dry-run', 'si.plan(model)')}`",
                )
            if (place.channels, len(place.size)) != (step.channels, step.rank):
                raise SurgeryError(
                    f"step {number} of the plan expects {step.channels} channels at `{step.site}`",
                    seen=f"{place.channels} channels and {len(place.size)} dimensions",
                    hint="the plan was made for another network",
                )
            steps.append(replace(step, size=place.size) if resized else step)
        steps.sort(key=lambda step: found[step.site].order)
        shapes = shapes_of(trace.inputs[0]) if resized else None
        inputs = self.inputs if shapes is None else tuple(shapes)
        return replace(self, steps=tuple(steps), inputs=inputs, trace=trace)

    def _stale(self, model: nn.Module) -> bool:
        assert self.trace is not None
        graphs = self.trace.graphs
        for path in {step.owner for step in self.steps} & set(graphs):
            owner, graph = model.get_submodule(path), graphs[path]
            if type(owner) is not graph.kind or any(getattr(owner, k, None) != v for k, v in graph.settings.items()):
                return True
        return False

    def cost(self, model: nn.Module | None = None) -> CostReport:
        """Compute what the plan adds: parameters exactly, MACs, element-wise operations and bytes for one example.

        Args:
            model: the network, if the plan was loaded from JSON; else the one it was made for.

        Raises:
            OptionError: the plan was loaded from JSON and no model is given.
        """
        trace = self.fitted(model).trace if model is not None else self.trace
        if trace is None:
            raise OptionError("a stored plan needs the network to say what it costs", hint="plan.cost(model)")
        return cost_of_steps(trace.model, trace, self.steps)

    def draw(
        self,
        model: nn.Module | None = None,
        gates: Iterable[Any] | None = None,
        *,
        by: str = "variation",
        example_inputs: Any = None,
    ) -> Picture:
        """Draw the network as data flows through it, with the plan's blocks where they sit. Nothing is computed or written.

        A notebook shows what is returned; ``.save("net.svg")`` writes it.

        Args:
            model: the network, if the plan was loaded from JSON or read from an injected network.
            gates: from ``si.excitations``: colour the blocks by what their gates did.
            by: by which figure of theirs: ``variation``, ``between_images``, ``spread`` or ``average``.
            example_inputs: inputs of the model, if those of the plan or inferred ones don't do.

        Raises:
            OptionError: the plan has no trace and no model is given, or there is no such figure.
        """
        trace = self.trace
        if model is not None:
            held = {step.path for step in steps_of(model)}
            is_in = bool(held) and all(step.path in held for step in self.steps)
            inputs = self.stored_inputs() if example_inputs is None else example_inputs
            trace = observe_model(model, inputs) if is_in else self.fitted(model, example_inputs).trace
        if trace is None:
            raise OptionError("a stored plan needs the network to be drawn", hint="plan.draw(model)")
        figures: dict[str, float] = {}
        for block in gates or ():
            if not isinstance(getattr(block, by, None), int | float):
                raise OptionError(
                    f"no figure of gates is called `{by}`", seen="variation, between_images, spread, average"
                )
            figures.setdefault(block.path, float(getattr(block, by)))
        return picture(trace, sites_in(trace), self.steps, figures=figures, figure=by.replace("_", " "))

    def _repr_html_(self) -> str:
        table = f"<pre>{html.escape(str(self))}</pre>"
        return table if self.trace is None else self.draw().svg() + table

    def to_json(self) -> str:
        """Write the plan as JSON text; ``from_json`` reads it back.

        Raises:
            OptionError: an option of a block is infinite or no number, which JSON does not have.
        """
        return text_of(self.model, self.inputs, self.steps)

    @classmethod
    def from_json(cls, text: str, *, trust: Sequence[str] = ()) -> Plan:
        """Read a plan from the text that ``to_json`` gave.

        Args:
            text: the JSON text.
            trust: packages, modules and ``.py`` files from which the plan may take blocks: their code is imported.

        Raises:
            LoadError: not such a text, or one of a later version.
            UntrustedGlobals: a block in somebody's code that is not to be trusted.
            OptionError: a block or an option that is not known here.
        """
        steps, model, inputs = read_plan(text, trust)
        return cls(steps, model, inputs)

    def save(self, path: str | os.PathLike[str], *, force: bool = False) -> None:
        """Write the plan to a JSON file, completely or not at all.

        Args:
            path: the file.
            force: replace one that exists.

        Raises:
            ExportError: the file can't be written.
        """
        text = self.to_json()
        with atomic(path, force) as temporary:
            temporary.write_text(text + "\n", "utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, trust: Sequence[str] = ()) -> Plan:
        """Read a plan from a file that ``save`` wrote.

        Args:
            path: the file.
            trust: as for ``from_json``.

        Raises:
            NoSuchFile: a file that doesn't exist.
            LoadError: no plan, or one of a later version.
        """
        return cls.from_json(text_in(path), trust=trust)


def already(paths: Sequence[str], model: nn.Module, shortfall: str = "") -> AlreadyInjected:
    """Make the error about sites that hold injected blocks.

    Args:
        paths: of the blocks.
        model: the network.
        shortfall: how many of its units can take no block.
    """
    return AlreadyInjected(
        "the chosen sites hold blocks of ours already",
        seen=f"{len(paths)} in {original_class(model).__name__}, `{paths[0]}` the first"
        + (f"; {shortfall}" if shortfall else ""),
        hint="choose other sites, or take the blocks out first: `si.eject_(model)`; to chain blocks, add their plans up",
    )


def _free_name(step: Step, steps: Iterable[Step], networks: Sequence[nn.Module]) -> str:
    """Return the step's name for its block, with a number if one of the steps or the owner has it."""
    taken = {other.block_name for other in steps if other.owner == step.owner}
    name, number = step.block_name, 1
    while name in taken or (number > 1 and any(_has(network, step.owner, name) for network in networks)):
        number += 1
        name = f"{step.block_name}_{number}"
    return name


def _has(network: nn.Module, owner: str, name: str) -> bool:
    return getattr(network.get_submodule(owner), name, None) is not None
