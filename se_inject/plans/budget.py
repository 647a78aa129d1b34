"""Find the plan that gates the most units within a budget: every choice of stages and every ratio, from one observed call."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from se_inject.cost import FIGURES, Cost, Latency, cost_of_steps, measure_latency
from se_inject.errors import NoSites, OptionError, either
from se_inject.plans.candidates import steps_with
from se_inject.plans.value import Plan
from se_inject.tables import counted, percent, short
from se_inject.tracing import preserved, real_inputs
from se_inject.user_code import did_you_mean

LATENCY = "latency"
_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
_MEASURED = 4
"""The most plans whose latency is measured."""


@dataclass(frozen=True)
class Limit:
    """The most that blocks may add of one figure.

    Args:
        figure: ``params``, ``macs``, ``elementwise``, ``bytes`` or ``latency`` (milliseconds).
        amount: a number, or a share of what the network has.
        is_share: which of the two.
    """

    figure: str
    amount: float
    is_share: bool

    def __str__(self) -> str:
        if self.is_share:
            return f"{self.figure} +{100 * self.amount:g} %"
        return f"{self.figure} +{f'{self.amount:g} ms' if self.figure == LATENCY else short(self.amount)}"

    def of(self, whole: float) -> float:
        """Compute the limit as a number, for a network with this total."""
        return self.amount * whole if self.is_share else self.amount


@dataclass(frozen=True)
class Choice:
    """Blocks in some stages with one ratio, and what they add.

    Args:
        stages: their numbers.
        reduction: r; None for a block without one.
        blocks: how many.
        added: what they cost together.
        over: the share by which the tightest limit is exceeded: 0.1 for a tenth more than allowed; negative if all hold.
        latency: if it was measured.
    """

    stages: tuple[int, ...]
    reduction: float | None
    blocks: int
    added: Cost
    over: float
    latency: Latency | None = None

    @property
    def label(self) -> str:
        """``stages 3, 4, r = 16``."""
        names = ", ".join(str(stage) if stage else "none" for stage in self.stages)
        where = f"stage{'s' * (len(self.stages) != 1)} {names}"
        return where if self.reduction is None else f"{where}, r = {self.reduction:g}"


def parsed_budget(budget: Mapping[str, Any] | Iterable[str]) -> tuple[Limit, ...]:
    """Parse limits from ``{"params": 0.05}``, or from texts such as ``params=5%`` and ``bytes=200k``.

    A number below 1 is a share and one from 1 on an amount; in a text, a share has its sign: ``5%``. An amount of latency
    is in milliseconds.

    Raises:
        OptionError: no such figure, no such number, or one figure twice.
    """
    pairs: list[tuple[str, Any]] = []
    if isinstance(budget, Mapping):
        pairs = list(budget.items())
    else:
        for text in [budget] if isinstance(budget, str) else budget:
            figure, equals, amount = str(text).partition("=")
            if not equals:
                raise OptionError(f"`{text}` is not a budget", hint=_form())
            pairs.append((figure.strip(), amount))
    if not pairs:
        raise OptionError("an empty budget", hint=_form())
    limits = [_limit(figure, amount) for figure, amount in pairs]
    if len({limit.figure for limit in limits}) < len(limits):
        raise OptionError("one figure has two budgets", seen=", ".join(map(str, limits)))
    return tuple(limits)


def _form() -> str:
    """Say how a budget is written."""
    command = "write it as params=5%, bytes=3%, macs=20M or latency=2%"
    return either(command, 'write it as {"params": 0.05, "bytes": "3%", "macs": 20e6, "latency": "2%"}')


def _limit(figure: str, amount: Any) -> Limit:
    known = (*FIGURES, LATENCY)
    figure = {"parameters": "params", "mac": "macs"}.get(figure.lower(), figure.lower())
    if figure not in known:
        raise OptionError(f"no budget of `{figure}`", seen=", ".join(known), hint=did_you_mean(figure, known))
    if isinstance(amount, str):
        found = re.fullmatch(r"\+?([0-9.]+(?:e[+-]?[0-9]+)?)\s*(%|[kmgt]?b?|ms)", amount.strip(), re.IGNORECASE)
        try:
            number = float(found[1]) if found else math.nan
        except ValueError:
            number = math.nan
        unit = found[2].lower() if found else ""
        is_share = unit == "%" or (unit == "" and 0 < number < 1)
        factor = 0.01 if unit == "%" else 1.0 if unit == "ms" else _UNITS[unit.removesuffix("b")]
    else:
        number = float(amount) if isinstance(amount, int | float) and not isinstance(amount, bool) else math.nan
        is_share, factor = 0 < number < 1, 1.0
    if not 0 < number < math.inf:
        raise OptionError(
            f"`{amount}` is not a budget of {figure}", hint="a number above 0, or a share such as 5% (0.05)"
        )
    return Limit(figure, number * factor, is_share)


class Search:
    """Every choice of stages and ratio of one plan, in the order of preference: the most blocks, then the smallest r.

    Args:
        base: a plan for all stages that may be chosen.
        ratios: the reduction ratios to try; None alone for a block without one.
        limits: all of them hold.
    """

    def __init__(self, base: Plan, ratios: Sequence[float | None], limits: Sequence[Limit]) -> None:
        assert base.trace is not None
        self.base, self.limits, self.ratios = base, limits, ratios
        step = base.steps[0]
        self.steps = {
            ratio: steps_with(base, step.block, step.options | ({} if ratio is None else {"reduction": ratio}))
            for ratio in ratios
        }
        pairs = [(ratio, step) for ratio, steps in self.steps.items() for step in steps]
        report = cost_of_steps(base.trace.model, base.trace, [step for _, step in pairs])
        self.before = report.before
        self.parts: dict[tuple[int, float | None], tuple[int, Cost]] = {}
        for (ratio, step), row in zip(pairs, report.rows, strict=True):
            count, cost = self.parts.get((step.stage or 0, ratio), (0, Cost()))
            self.parts[step.stage or 0, ratio] = count + 1, cost + row.cost
        self.stages = sorted({stage for stage, _ in self.parts})
        self.counted = [limit for limit in limits if limit.figure != LATENCY]

    def choices(self) -> list[Choice]:
        """List all choices, the most wanted first."""
        found = []
        for ratio in self.ratios:
            for stages in self._subsets(ratio):
                parts = [self.parts[stage, ratio] for stage in stages]
                added = sum((cost for _, cost in parts), Cost())
                found.append(Choice(stages, ratio, sum(count for count, _ in parts), added, self._over(added)))
        return sorted(found, key=lambda each: (-each.blocks, each.reduction or 0, each.over))

    def _subsets(self, ratio: float | None) -> list[tuple[int, ...]]:
        """List all subsets of the stages; of very many stages, those that no other one beats in blocks and every figure."""
        if len(self.stages) <= _EXHAUSTIVE:
            sizes = range(1, len(self.stages) + 1)
            return [subset for size in sizes for subset in itertools.combinations(self.stages, size)]
        figures = [limit.figure for limit in self.counted] or ["bytes"]
        front: list[tuple[tuple[int, ...], int, tuple[float, ...]]] = [((), 0, (0.0,) * len(figures))]
        for stage in self.stages:
            count, cost = self.parts[stage, ratio]
            own = [getattr(cost, figure) for figure in figures]
            front += [
                ((*stages, stage), blocks + count, tuple(a + b for a, b in zip(costs, own, strict=True)))
                for stages, blocks, costs in front
            ]
            front = _unbeaten(front)
        return [stages for stages, _, _ in front if stages]

    def _over(self, added: Cost) -> float:
        """Compute by how much the tightest limit is exceeded."""
        shares = [
            getattr(added, limit.figure) / allowed - 1
            if (allowed := limit.of(getattr(self.before, limit.figure)))
            else math.inf
            for limit in self.counted
        ]
        return max(shares, default=-1.0)

    def plan_of(self, choice: Choice, notes: Iterable[str] = ()) -> Plan:
        """Make the plan for a choice."""
        steps = tuple(step for step in self.steps[choice.reduction] if (step.stage or 0) in choice.stages)
        base = self.base
        return Plan(steps, base.model, base.inputs, (*base.notes, *notes), base.trace)

    def described(self, choice: Choice) -> str:
        """Describe the cost of a choice, in the figures that have a limit."""
        parts = []
        for limit in self.limits:
            if limit.figure != LATENCY:
                part, whole = getattr(choice.added, limit.figure), getattr(self.before, limit.figure)
                parts.append(f"{limit.figure} {percent(part, whole)}")
            elif choice.latency is not None:
                time = choice.latency
                parts.append(
                    f"latency {100 * (time.ratio - 1):+.1f} % (quartiles {100 * (time.low - 1):+.1f} to "
                    f"{100 * (time.high - 1):+.1f} %)"
                )
        return f"{choice.label}: {counted(choice.blocks, 'block')}, {', '.join(parts)}"


_EXHAUSTIVE = 10
"""So many stages have few enough subsets to look at all."""
_Front = tuple[tuple[int, ...], int, tuple[float, ...]]


def _unbeaten(front: list[_Front]) -> list[_Front]:
    """Keep the choices with more blocks than any other of no higher cost, at most a few thousand."""
    kept: list[_Front] = []
    for item in sorted(front, key=lambda each: (-each[1], sum(each[2]))):
        if not any(
            other[1] >= item[1] and all(a <= b for a, b in zip(other[2], item[2], strict=True)) for other in kept
        ):
            kept.append(item)
    return kept[:: max(1, len(kept) // 512)]


def plan_within(search: Search, *, seconds: float = 2.0) -> Plan:
    """Make the plan with the most blocks, and of those with the smallest ratio, whose cost is within all limits.

    Latency is measured, in turns with the network as it is, on the device that it is on: from the most wanted plan on,
    those that its bytes let expect to fit, four plans at most.

    Args:
        search: the choices.
        seconds: time to measure each of them.

    Raises:
        NoSites: no choice is within the limits; the message has the least.
    """
    ordered = search.choices()
    fitting = [choice for choice in ordered if choice.over <= 0]
    if not fitting:
        raise _impossible(search, min(ordered, key=lambda each: each.over))
    limit = next((limit for limit in search.limits if limit.figure == LATENCY), None)
    missed: list[Choice] = []
    chosen = fitting[0]
    if limit is not None:
        chosen, missed = _measured(search, fitting, limit, seconds)
    better = [choice for choice in ordered[: ordered.index(_unmeasured(chosen, ordered))] if choice.over > 0]
    missed += sorted(better, key=lambda each: each.over)
    notes = [f"chosen for the budget {', '.join(map(str, search.limits))}: {search.described(chosen)}"]
    notes += [f"did not fit: {search.described(choice)}" for choice in missed[:2]]
    if limit is not None and chosen.latency is not None and _excess(chosen.latency, limit, upper=True) > 0:
        notes.append("uncertain: the quartiles of the measured latency reach over the budget")
    return search.plan_of(chosen, notes)


def _unmeasured(chosen: Choice, ordered: Sequence[Choice]) -> Choice:
    return next(each for each in ordered if (each.stages, each.reduction) == (chosen.stages, chosen.reduction))


def _measured(search: Search, fitting: Sequence[Choice], limit: Limit, seconds: float) -> tuple[Choice, list[Choice]]:
    """Find the first choice whose measured latency is within the limit, and those that were measured and are not."""
    missed: list[Choice] = []
    rate = 0.0  # of overhead for each byte that is read and written
    left = list(fitting)
    for number in range(_MEASURED):
        last = number == _MEASURED - 1
        choice = min(left, key=lambda each: each.added.bytes) if last else left[0]
        latency = measure_plan(search.plan_of(choice), seconds)
        choice = replace(choice, latency=latency)
        excess = _excess(latency, limit)
        if excess <= 0:
            return choice, missed[::-1]
        missed.append(replace(choice, over=excess))
        rate = max(rate, (latency.ratio - 1) / max(1, choice.added.bytes))
        allowed = limit.amount if limit.is_share else limit.amount / latency.before_ms
        left = [each for each in left if each.added.bytes < choice.added.bytes]
        left = [each for each in left if rate * each.added.bytes <= allowed] or left[-1:]
        if not left:
            break
    raise _impossible(search, min(missed, key=lambda each: each.over))


def _excess(latency: Latency, limit: Limit, *, upper: bool = False) -> float:
    """Compute by how much a measured latency exceeds the limit, as a share of it; by the upper quartile if asked for."""
    more = (latency.high if upper else latency.ratio) - 1
    return (more if limit.is_share else more * latency.before_ms) / limit.amount - 1


def _impossible(search: Search, least: Choice) -> NoSites:
    return NoSites(
        f"no blocks fit the budget {', '.join(map(str, search.limits))}",
        seen=f"the least is {search.described(least)}",
        hint=f"a larger budget, a larger ratio with {either('`--r`', '`reduction=`')}, or a smaller block with "
        f"{either('`--block`', '`block=`')} (eca has k weights a site)",
    )


def measure_plan(plan: Plan, seconds: float) -> Latency:
    """Time a network with a plan's blocks against it as it is, in eval mode on its own device, for one example."""
    assert plan.trace is not None
    network = plan.trace.model
    injected = plan.apply(network)
    parameter = next((p for p in network.parameters() if p.is_floating_point()), torch.zeros(()))
    with preserved(network), preserved(injected):
        for module in (*network.modules(), *injected.modules()):
            module.training = False
        for batch in (1, None):
            args, kwargs = real_inputs(plan.trace.inputs, batch=batch, device=parameter.device, dtype=parameter.dtype)
            try:
                with torch.no_grad():
                    network(*args, **kwargs)
                break
            except Exception:  # its batch is fixed
                if batch is None:
                    raise
        measured: Latency = measure_latency(network, injected, args, kwargs, seconds)
        return measured
