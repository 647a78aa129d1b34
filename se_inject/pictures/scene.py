"""Turn a trace, its sites and the steps of a plan into boxes, in the order in which data reaches them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor, fx, nn

from se_inject.forwards import original_class
from se_inject.pictures.boxes import Box, Group, Kind, Mark, Scene
from se_inject.sites import HeldBack, Site, Sites, Stage, labels, parts_of
from se_inject.surgery import Step
from se_inject.tracing import CONVOLUTIONS, Trace, function_name_of, is_leaf


def scene(trace: Trace, sites: Sites, steps: Sequence[Step], figures: Mapping[str, float], figure: str) -> Scene:
    """Arrange a network.

    Args:
        trace: an observed call.
        sites: its sites.
        steps: the blocks to be drawn.
        figures: for blocks by path, a figure that colours them.
        figure: what that is called.
    """
    colours = {name: number for number, name in enumerate(dict.fromkeys(step.block for step in steps))}
    top = max(figures.values(), default=0.0) or 1.0
    marks: dict[str, list[Mark]] = {}
    for step in steps:
        value = figures.get(step.path)
        level = None if not figures else 0.0 if value is None else value / top
        tooltip = "" if value is None else f"{figure} {value:.3g}"
        marks.setdefault(step.site, []).append(Mark(step, colours[step.block], level, tooltip))
    boxes = [
        _unit(trace, site, tuple(marks.get(site.address, ()))) for site in sites.all_sites if _is_drawn(site, marks)
    ]
    refused = _refused(trace, sites)
    plain = _plain(trace, sites, {box.site.unit for box in boxes if box.site and box.site.unit})
    ordered = sorted([*boxes, *(box for box in refused if box.time < math.inf), *plain], key=lambda box: box.time)
    kinds = _kinds(trace, [box for box in ordered if box.site is not None], frozenset(step.path for step in steps))
    letters = {address: kind.letter for kind in kinds for address in kind.addresses}
    ordered = [replace(box, letter=letters.get(box.address, "")) for box in ordered]
    counts = {name: sum(step.block == name for step in steps) for name in colours}
    return Scene(
        original_class(trace.model).__name__,
        _groups(sites, ordered),
        kinds,
        colours,
        [box for box in refused if box.time == math.inf],
        counts,
        figure if figures else "",
    )


def _is_drawn(site: Site, marks: Mapping[str, object]) -> bool:
    return site.stage is not None or site.address in marks


def _unit(trace: Trace, site: Site, marks: tuple[Mark, ...]) -> Box:
    size = "×".join(map(str, site.size))
    tooltip = f"{site.address}: {site.kind} site, {site.channels} channels, {size}"
    tooltip += "".join(f"; {mark.step.path}: {mark.name} {mark.tooltip}".rstrip() for mark in marks)
    if site.held_back and not marks:
        tooltip += f"; left out: {site.held_back.reason}"
    return Box("unit", site.order, site.address, site.channels, site.size, site, marks, tooltip)


def _refused(trace: Trace, sites: Sites) -> list[Box]:
    """Return the refused places, in data-flow order if that is known."""
    wanted = {item.address: item.reason for item in sites.refused}
    found: dict[str, Box] = {}
    for owner in trace.graphs.values() if wanted else ():
        names = labels(owner.graph)
        for node in owner.graph.nodes:
            path = trace.child(owner.path, node.target) if node.op == "call_module" else ""
            for address in (path, ".".join(part for part in (owner.path, names.get(node, "")) if part)):
                if address in wanted and address not in found:
                    channels, size = _shape(node.meta.get("val"))
                    time = float(node.meta.get("time", math.inf))
                    tooltip = f"{address}: no place for a block: {wanted[address]}"
                    found[address] = Box("refused", time, address, channels, size, tooltip=tooltip)
    for address, reason in wanted.items():
        found.setdefault(
            address, Box("refused", math.inf, address, 0, (), tooltip=f"{address}: no place for a block: {reason}")
        )
    return list(found.values())


def _shape(value: object) -> tuple[int, tuple[int, ...]]:
    if not isinstance(value, Tensor) or value.dim() < 2:
        return 0, ()
    return int(value.shape[1]), tuple(map(int, value.shape[2:]))


def _plain(trace: Trace, sites: Sites, units: set[str]) -> list[Box]:
    """Collect the convolutions, poolings and linear layers outside of all units, as boxes of one operation each."""
    graphs = {site.graph for site in sites.all_sites if site.stage is not None}
    found = []
    for owner in trace.graphs.values():
        if (owner.path in graphs and owner.path) or _within(owner.path, units):
            continue
        for node in owner.graph.nodes:
            word, path = _word(trace, owner.path, node)
            if word and not _within(path, units) and "time" in node.meta:
                channels, size = _shape(node.meta.get("val"))
                time = float(node.meta["time"])
                found.append(Box("plain", time, path or owner.path, channels, size, tooltip=path, words=(word,)))
    return found


def _word(trace: Trace, owner: str, node: fx.Node) -> tuple[str, str]:
    if node.op == "call_module":
        path = trace.child(owner, node.target)
        module = trace.model.get_submodule(path)
        name = type(module).__name__
        if isinstance(module, nn.modules.conv._ConvNd):
            size, stride = "×".join(map(str, module.kernel_size)), max(module.stride)
            arrow = "↑" if module.transposed else "/"
            return f"{size} conv" + (f" {arrow}{stride}" if stride > 1 else ""), path
        if isinstance(module, nn.Linear):
            return f"linear → {module.out_features}", path
        if is_leaf(module) and "Pool" in name:
            return ("mean" if name.startswith("AdaptiveAvg") else "max pool" if "Max" in name else "avg pool"), path
        return "", path
    name = function_name_of(node) if node.op in ("call_function", "call_method") else ""
    if name in CONVOLUTIONS:
        return "conv", ""
    return ("pool" if "pool" in name else "upsample" if name in ("interpolate", "upsample") else ""), ""


def _within(path: str, units: set[str]) -> bool:
    parts = path.split(".")
    return any(".".join(parts[:end]) in units for end in range(1, len(parts) + 1))


def _kinds(trace: Trace, boxes: Iterable[Box], blocks: frozenset[str]) -> list[Kind]:
    """Group units made alike: of the same class and blocks one is looked at, and equal parts count as one kind."""
    known: dict[object, Kind] = {}
    kinds: dict[object, Kind] = {}
    for box in boxes:
        site = box.site
        assert site is not None
        unit = trace.model.get_submodule(site.unit)
        marks = tuple((mark.step.block, mark.step.position, _relative(mark.step, site)) for mark in box.marks)
        children = (
            tuple(type(child).__name__ for _, child in unit.named_children())
            if site.unit == site.owner
            else site.address
        )
        rough = (original_class(unit), site.kind, _relative_label(site), children, _stride(trace, unit), marks)
        if rough not in known:
            parts = parts_of(trace, site, blocks)
            texts = tuple(
                tuple((op.kind, op.text) for op in lane if op.kind not in ("end", "block")) for lane in parts.lanes
            )
            exact = (texts, parts.join, tuple(op.text for op in parts.after), tuple(mark[:2] for mark in marks))
            if exact not in kinds:
                plain = site.kind == "conv" and (is_leaf(unit) or isinstance(unit, nn.Sequential))
                title = "convolution" if plain else original_class(unit).__name__
                kinds[exact] = Kind(_letter(len(kinds)), parts, box, title)
            known[rough] = kinds[exact]
        known[rough].addresses.append(site.address)
        if site.stage is not None:
            known[rough].stages.add(site.stage)
    return list(kinds.values())


def _relative(step: Step, site: Site) -> tuple[str, str | None]:
    owner = step.owner.removeprefix(site.unit).lstrip(".")
    return owner, step.value


def _relative_label(site: Site) -> tuple[str, str | None]:
    return site.graph.removeprefix(site.unit), site.join if site.unit == site.graph else site.kind


def _stride(trace: Trace, unit: nn.Module) -> tuple[object, ...]:
    return tuple(
        (max(module.stride), module.kernel_size, min(module.groups, 2))
        for module in unit.modules()
        if isinstance(module, nn.modules.conv._ConvNd)
    )


def _letter(number: int) -> str:
    return chr(65 + number) if number < 26 else f"{chr(64 + number // 26)}{chr(65 + number % 26)}"


def _groups(sites: Sites, boxes: Sequence[Box]) -> list[Group]:
    """Put the stages in order, with other modules between them; refused places are where data reaches them."""
    stages = {stage.number: stage for stage in sites.table}
    groups: list[Group] = []
    for box in boxes:
        number = box.site.stage if box.site is not None else None
        last = groups[-1] if groups else None
        if number is None:
            if last is None or last.stage is not None:
                groups.append(last := Group("", [], []))
            _append(last, box)
        elif last is not None and last.stage == number:
            last.boxes.append(box)
        elif earlier := next((group for group in groups if group.stage == number), None):
            earlier.boxes.append(box)  # two stages at once, as parallel branches are
        else:
            stage = stages[number]
            groups.append(_stage_group(stage, box))
    for group in groups:
        if group.stage is None and len(group.boxes) > 4:
            group.boxes = [
                _one(group.boxes, kind) for kind in ("plain", "refused") if any(b.kind == kind for b in group.boxes)
            ]
    return [group for group in groups if group.boxes]


def _one(boxes: Sequence[Box], kind: str) -> Box:
    """Merge all boxes of a kind to one."""
    found = [box for box in boxes if box.kind == kind]
    words = tuple(word for box in found for word in box.words)
    tooltip = "\n".join(dict.fromkeys(box.tooltip for box in found))
    return replace(found[-1], words=words, tooltip=tooltip, count=len(found))


def _append(group: Group, box: Box) -> None:
    """Put a box into a group; plain ones of one group become one."""
    last = group.boxes[-1] if group.boxes else None
    if box.kind == "plain" and last is not None and last.kind == "plain":
        group.boxes[-1] = replace(
            last,
            channels=box.channels or last.channels,
            size=box.size or last.size,
            words=(*last.words, *box.words),
            tooltip=f"{last.tooltip}, {box.tooltip}".strip(", "),
        )
    elif box.kind == "plain" and group.stage is not None:
        return
    else:
        group.boxes.append(box)


def _stage_group(stage: Stage, box: Box) -> Group:
    sizes = list(dict.fromkeys(site.size for site in stage.sites))
    size = "×".join(map(str, sizes[0])) if len(sizes) == 1 else f"{_size(sizes[0])} … {_size(sizes[-1])}"
    few, many = min(stage.channels), max(stage.channels)
    channels = f"{few} ch" if few == many else f"{few} … {many} ch"
    strides = [stride for stride in stage.strides if stride]
    stride = "" if not strides else f"stride {strides[0][0]:g}" + (f" … {strides[-1][0]:g}" if len(strides) > 1 else "")
    alias = ", ".join(stage.aliases)
    return Group(
        f"Stage {stage.number}",
        [stage.path or "(the network)", f"{size} · {channels}", " · ".join(part for part in (stride, alias) if part)],
        [box],
        stage.number,
        box.site is not None and box.site.held_back is HeldBack.NECK,
    )


def _size(size: Sequence[int]) -> str:
    return "×".join(map(str, size))
