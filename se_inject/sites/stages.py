"""Group sites into stages.

The tree of modules is cut into parts: a part is the largest module whose sites are all at one resolution, or whose children are
parallel branches, each at its own (HRNet's). Sites in a unit that is made of units count at that unit's
resolution. A stage is a part, or a run of parts side by side at one resolution if each of them is a unit itself (MobileNetV2's
flat list). What lies behind a backbone, a neck or a head, has stages as well, and is left out unless it is asked for.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from se_inject.sites.operations import any_prefix, convolves, parent, path_of, prefixes
from se_inject.sites.site import HeldBack, Site
from se_inject.tracing import Trace, ancestors, holds_tensor


def staged(trace: Trace, sites: list[Site]) -> tuple[Site, ...]:
    """Assign stage numbers to the sites; those outside of the stages get none."""
    inside = [site for site in sites if not _is_stageless(site)]
    parts = _Parts(trace, inside, [site for site in sites if site.held_back is HeldBack.NESTED])
    necks = _necks(trace, inside, parts.parallel)
    result, number = [], 0
    previous: object = None
    for site in sites:
        if _is_stageless(site):
            result.append(site)
            continue
        part = parts.of[site.address]
        neck = site.address in necks
        alone = part not in parts.units
        key = (part, neck) if alone else (parent(part), parts.sizes[site.address], neck)
        if key != previous:
            number, previous = number + 1, key
        held = site.held_back or (HeldBack.NECK if neck else None)
        place = {"container": part} if alone else {"container": parent(part), "unit": part}
        result.append(replace(site, stage=number, held_back=held, **place))  # type: ignore[arg-type]
    return tuple(result)


class _Parts:
    """The parts of a network.

    Args:
        trace: an observed call of it.
        sites: those that belong to stages.
        nested: those of units that are made of units.
    """

    def __init__(self, trace: Trace, sites: list[Site], nested: list[Site]) -> None:
        self.of: dict[str, str] = {}
        """Of each site the path of its part."""
        self.units = {site.unit for site in (*sites, *nested)} | {site.graph for site in (*sites, *nested)}
        """Paths of modules, and addresses, that are units themselves."""
        alone = Counter(path for site in sites for path in prefixes(site.unit))
        self.units |= {
            path for site in sites if site.kind == "conv" for path in prefixes(site.unit) if alone[path] == 1
        }
        self.sizes = {site.address: site.size for site in sites}
        """Of each site the resolution it counts at."""
        self._below: dict[str, list[Site]] = {}
        for site in sites:
            for path in prefixes(site.unit):
                self._below.setdefault(path, []).append(site)
        for unit in sorted(nested, key=lambda site: site.unit.count("."), reverse=True):
            below = self._below.get(unit.unit, []) if unit.unit else []
            sizes = {site.size for site in below}
            if len(sizes) == 2 and below[-1].size == unit.size:
                self.sizes |= {site.address: unit.size for site in below}
        self.parallel = _parallel(trace, {path: {s.size for s in below} for path, below in self._below.items()})
        if sites:
            self._cut(self._trunk())

    def _trunk(self) -> str:
        """Find the smallest module that holds all sites."""
        path = ""
        while len(children := self._children(path)) == 1 and children[0] not in self.units:
            (path,) = children
        return path

    def _children(self, path: str) -> list[str]:
        depth = len(prefixes(path))
        return list(dict.fromkeys(prefixes(site.unit)[depth] for site in self._below[path] if site.unit != path))

    def _cut(self, path: str, *, whole: bool = False) -> None:
        """Divide a module into parts; ``whole``: it may be one itself."""
        below = self._below[path]
        children = self._children(path)
        one_size = len({self.sizes[site.address] for site in below}) == 1
        one_width = len({frozenset(s.channels for s in self._below[child]) for child in children}) == 1
        if not children or (one_size and (whole or one_width)) or self._is_parallel(path, children):
            self.of |= {site.address: path for site in below}
            return
        self.of |= {site.address: path for site in below if site.unit == path}
        for child in children:
            self._cut(child, whole=True)

    def _is_parallel(self, path: str, children: list[str]) -> bool:
        """Return whether a module holds parallel branches, or is made of such modules with the same resolutions."""
        if path in self.parallel:
            return True
        sizes = {frozenset(site.size for site in self._below[child]) for child in children}
        return len(sizes) == 1 and all(self._is_parallel(child, self._children(child)) for child in children)


def _parallel(trace: Trace, sizes: dict[str, set[tuple[int, ...]]]) -> set[str]:
    """Find the containers of modules that are called side by side, none on another's output, each at its own resolution."""
    found = set()
    for owner in trace.graphs.values():
        groups: dict[str, list[fx.Node]] = {}
        for node in owner.graph.nodes:
            if node.op == "call_module":
                path = path_of(node)
                if parent(path) and parent(path) != owner.path and len(sizes.get(path, ())) == 1:
                    groups.setdefault(parent(path), []).append(node)
        for path, nodes in groups.items():
            if len(nodes) > 1 and len(sizes[path]) > 1 and not any(ancestors(node) & set(nodes) for node in nodes):
                found.add(path)
    return found


def _necks(trace: Trace, sites: list[Site], parallel: set[str]) -> set[str]:
    """Find the addresses of the sites behind the backbone.

    A backbone is a module that reads the network's input and returns several values, with sites of several
    resolutions in it. Without one, in a network that returns values of several resolutions, the neck begins where the
    resolution grows again.
    """
    backbones = [path for path in _backbones(trace) if len({s.size for s in sites if _within(s, path)}) > 1]
    if backbones:
        inner = max(backbones, key=len)
        start = max(site.order for site in sites if _within(site, inner))
        return {
            site.address
            for site in sites
            if site.order > start and not _within(site, inner) and _reads(trace, site.owner, inner)
        }
    rank = max((site.rank for site in sites), default=2)
    outputs = [leaf for leaf in tree_leaves(trace.outputs) if isinstance(leaf, Tensor) and leaf.dim() == rank + 2]
    if len({tuple(leaf.shape[2:]) for leaf in outputs}) < 2:
        return set()
    found: set[str] = set()
    before: list[Site] = []
    for site in sites:
        if any_prefix(site.owner, parallel):
            continue
        grown = any(_is_larger(site.size, other.size) and _reads(trace, site.owner, other.owner) for other in before)
        if grown or any(_reads(trace, site.owner, other.owner) for other in before if other.address in found):
            found.add(site.address)
        before.append(site)
    return found


def _backbones(trace: Trace) -> list[str]:
    """Find the modules that run before any other convolution and return more than one tensor."""
    several: list[str] = []
    late: set[str] = set()
    for owner in trace.graphs.values():
        for node in owner.graph.nodes:
            if node.op == "call_module" and convolves(node):
                path, value = path_of(node), node.meta.get("val")
                if any(map(convolves, ancestors(node))):
                    late.add(path)
                elif isinstance(value, tuple | list | dict) and holds_tensor(value):
                    several.append(path)
    return [path for path in several if not any_prefix(path, late)]


def _is_stageless(site: Site) -> bool:
    return site.held_back is not None and site.held_back.is_stageless


def _within(site: Site, path: str) -> bool:
    return any_prefix(site.owner, {path})


def _is_larger(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    return len(one) == len(other) and all(a > b for a, b in zip(one, other, strict=True))


def _reads(trace: Trace, later: str, earlier: str) -> bool:
    """Return whether one module's input was made from another's output, as far as a graph that calls both tells."""
    for path in reversed(prefixes(later)):
        owner = trace.graphs.get(path)
        if owner is None or not any_prefix(earlier, {path}):
            continue
        nodes: dict[bool, set[fx.Node]] = {True: set(), False: set()}
        for node in owner.graph.nodes:
            if node.op == "call_module":
                called = {path_of(node)}
                for kind, place in ((True, later), (False, earlier)):
                    if any_prefix(place, called):
                        nodes[kind].add(node)
        if not nodes[True] or not nodes[False] or nodes[True] & nodes[False]:
            return True
        return any(ancestors(node) & nodes[False] for node in nodes[True])
    return True
