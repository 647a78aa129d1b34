"""Trace → sites: the values a block could gate, the places refused with their reasons, and the stages.

What is looked for is structure. A residual site is the branch of an addition with the convolutions in it, whose
other operand leads back to a value that the branch started from. A plain site is what follows a run of
convolutions: its normalisation and activation.
"""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, fx, nn

from se_inject.errors import NoSites, OptionError, SiteNotFound
from se_inject.operations import (
    child_path,
    convolutions,
    is_data,
    labels,
    operation,
    passed_through,
    returned,
)
from se_inject.tracing import OwnerGraph, Trace, is_gating, sources

ATTENDED = "already has attention"
INJECTED = "holds a block of ours"
OUTSIDE = "a plain convolution outside of the residual units"
HEAD = "its value is the network's output"


@dataclass(frozen=True)
class Site:
    """One value in an owner's graph that a block can gate.

    Args:
        address: dotted path for people, the value's name last: ``layer3.0.bn3``.
        owner: path of the module whose forward is edited.
        value: label of the value in the owner's graph; None: what the owner returns.
        kind: ``residual`` or ``conv``.
        channels: C of the value, from the observed call.
        size: its spatial size, one number for each dimension.
        order: when the value came to be in the observed call.
        container: path of the module that holds the unit and its siblings.
        unit: path of the module that makes up the unit (a block).
        stage: 1, 2, …; None if the site lies outside of the stages.
        held_back: why the site is left out unless it is asked for; None if it is not.
        block_name: the attribute its block gets on the owner.
        blocks: paths of blocks of ours that gate this value already.
    """

    address: str
    owner: str
    value: str | None
    kind: str
    channels: int
    size: tuple[int, ...]
    order: int
    container: str
    unit: str
    stage: int | None = None
    held_back: str | None = None
    block_name: str = "se"
    blocks: tuple[str, ...] = ()

    @property
    def rank(self) -> int:
        """Number of spatial dimensions: 1, 2 or 3."""
        return len(self.size)


@dataclass(frozen=True)
class Refusal:
    """A place that can take no block, and why."""

    address: str
    reason: str


@dataclass(frozen=True)
class Stage:
    """A run of sites under one container at one resolution."""

    number: int
    path: str
    stride: tuple[float, ...]
    channels: tuple[int, ...]
    size: tuple[int, ...]
    sites: tuple[Site, ...]
    aliases: tuple[str, ...]


@dataclass(frozen=True)
class Sites(Sequence[Site]):
    """The sites of a network, or some of them. Selecting returns a new value and changes nothing.

    Args:
        chosen: the sites, in the order in which data reaches them.
        refused: the places that can take no block.
        all_sites: every site of the network, for messages and for widening a selection.
        input_size: spatial size of the observed input.
    """

    chosen: tuple[Site, ...]
    refused: tuple[Refusal, ...]
    all_sites: tuple[Site, ...]
    input_size: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.chosen)

    def __iter__(self) -> Iterator[Site]:
        return iter(self.chosen)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        return self.chosen[index]

    def stages(self, *names: int | str, attended: bool = False) -> Sites:
        """Only the sites in these stages: numbers, ranges (``"2-4"``), or path prefixes (``"layer3"``).

        Raises:
            SiteNotFound: a name that matches no site.
        """
        matched: list[Site] = []
        for name in names:
            found = [site for site in self.all_sites if site.stage is not None and _in_stage(site, name)]
            if not found:
                raise SiteNotFound(
                    f"no stage matches `{name}`",
                    seen=self._seen(),
                    hint="list the stages with `se-inject sites MODEL`",
                )
            matched += found
        return self._only(matched, attended, ", ".join(map(str, names)))

    def at(self, *patterns: str, attended: bool = False) -> Sites:
        """Only the sites whose address matches a glob (``layer3.*``) or, after ``re:``, a regular expression.

        Raises:
            SiteNotFound: a pattern that matches no site.
            OptionError: not a regular expression.
        """
        matched: list[Site] = []
        for pattern in patterns:
            found = [site for site in self.all_sites if _matches(site, pattern)]
            if not found:
                refused = [item for item in self.refused if _glob(pattern, item.address)]
                raise SiteNotFound(
                    f"no site matches `{pattern}`",
                    seen=f"refused there: {refused[0].address}: {refused[0].reason}" if refused else self._seen(),
                    hint=self._similar(pattern) + "list them with `se-inject sites MODEL -v`",
                )
            matched += found
        return self._only(matched, attended, ", ".join(patterns))

    def expect(self, count: int) -> Sites:
        """These sites, if there are so many of them: a script's guard against a model that changed.

        Raises:
            SiteNotFound: there are more or fewer.
        """
        if len(self) != count:
            raise SiteNotFound(f"expected {count} sites", seen=f"{len(self)} sites: {self._seen()}")
        return self

    def everything(self, *, attended: bool = False) -> Sites:
        """The sites of all stages.

        Raises:
            NoSites: there are none.
        """
        return self._only([site for site in self.all_sites if site.stage is not None], attended, "the network")

    def _only(self, matched: Iterable[Site], attended: bool, asked: str) -> Sites:
        unique = sorted(set(matched), key=lambda site: site.order)
        kept = tuple(site for site in unique if attended or site.held_back != ATTENDED)
        if not kept and unique:
            raise NoSites(
                f"every site of {asked} already has attention",
                seen=f"{len(unique)} sites with a gate of their own, {unique[0].address} the first",
                hint="to add a second gate all the same: `attended=True` in Python, `--attended` on the command line",
            )
        if not kept:
            raise NoSites("no convolutional stage was found", seen=self._seen(), hint="see `se-inject sites MODEL -v`")
        return replace(self, chosen=kept)

    def _seen(self) -> str:
        if not self.all_sites:
            return f"no site, {len(self.refused)} refused places"
        numbers = [site.stage for site in self.all_sites if site.stage is not None]
        text = f"{len(self.all_sites)} sites, `{self.all_sites[0].address}` … `{self.all_sites[-1].address}`"
        return text + (f", stages 1 to {max(numbers)}" if numbers else "")

    def _similar(self, pattern: str) -> str:
        import difflib

        names = {site.address for site in self.all_sites} | {
            f"{name}.*" for site in self.all_sites for name in (site.container, site.unit) if name
        }
        close = difflib.get_close_matches(pattern, sorted(names), n=1)
        return f"did you mean `{close[0]}`? " if close else ""

    @property
    def table(self) -> tuple[Stage, ...]:
        """The stages, numbered from 1, in the order in which data reaches them."""
        groups: dict[int, list[Site]] = {}
        for site in self.all_sites:
            if site.stage is not None:
                groups.setdefault(site.stage, []).append(site)
        containers = [group[0].container for group in groups.values()]
        strides = {number: _stride(self.input_size, group[0].size) for number, group in groups.items()}
        rows = []
        for number, group in groups.items():
            path = group[0].container
            if not path or containers.count(path) > 1:
                path = group[0].unit if group[0].unit == group[-1].unit else f"{group[0].unit} … {group[-1].unit}"
            last = max(other for other, stride in strides.items() if stride == strides[number])
            level = _power_of_two(strides[number])
            aliases = (f"C{level}",) if level is not None and last == number else ()
            channels = tuple(dict.fromkeys(site.channels for site in group))
            rows.append(Stage(number, path, strides[number], channels, group[0].size, tuple(group), aliases))
        return tuple(rows)


def _in_stage(site: Site, name: int | str) -> bool:
    text = str(name).strip()
    if text.isdigit():
        return site.stage == int(text)
    if found := re.fullmatch(r"(\d+)\s*-\s*(\d+)", text):
        return site.stage is not None and int(found[1]) <= site.stage <= int(found[2])
    return site.address == text or site.address.startswith(text + ".")


def _matches(site: Site, pattern: str) -> bool:
    return _glob(pattern, site.address) or (not pattern.startswith("re:") and site.owner == pattern)


def _glob(pattern: str, address: str) -> bool:
    if pattern.startswith("re:"):
        try:
            return re.fullmatch(pattern[3:], address) is not None
        except re.error as error:
            raise OptionError(f"`{pattern[3:]}` is not a regular expression", seen=str(error)) from error
    return fnmatch.fnmatchcase(address, pattern)


def _stride(input_size: tuple[int, ...], size: tuple[int, ...]) -> tuple[float, ...]:
    if len(input_size) != len(size):
        return ()
    return tuple(whole / part for whole, part in zip(input_size, size, strict=True))


def _power_of_two(stride: tuple[float, ...]) -> int | None:
    level = round(stride[0]).bit_length() - 1 if stride and round(stride[0]) > 0 else -1
    return level if level >= 0 and all(round(value) == 2**level for value in stride) else None


def find_sites(trace: Trace) -> Sites:
    """Every site of an observed network, grouped into stages. Nothing is changed.

    Returns:
        the sites that nothing holds back chosen, the others in ``all_sites``.
    """
    finder = _Finder(trace)
    sites = _staged(finder.sites())
    refused = (*(Refusal(path or "(the network)", reason) for path, reason in trace.failures.items()), *finder.refused)
    chosen = tuple(site for site in sites if site.stage is not None and site.held_back is None)
    first = next((value for value in _tensors(trace.inputs) if value.dim() > 2), None)
    return Sites(chosen, refused, sites, tuple(first.shape[2:]) if first is not None else ())


def _tensors(inputs: object) -> list[Tensor]:
    from torch.utils._pytree import tree_leaves

    return [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]


class _Finder:
    """One pass over the one-level graphs, children before their parents."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.refused: list[Refusal] = []
        self.residual: list[Site] = []
        self.plain: list[Site] = []
        self.open: set[str] = set()
        """Modules that return a convolution nobody has activated yet: their caller goes on with it."""

    def sites(self) -> list[Site]:
        for owner in self.trace.graphs.values():
            if len(self.trace.kinds.get(owner.path, ())) > 1:
                self._refuse(owner.path, "it is called with different kinds of arguments")
                continue
            self._residuals(owner)
        units = {site.unit for site in self.residual}
        for owner in self.trace.graphs.values():
            if owner.path not in units:
                self._unit_without_shortcut(owner, units)
        units = {site.unit for site in self.residual}
        for owner in self.trace.graphs.values():
            if not _inside(owner.path, units):
                self._chains(owner)
        if self.residual:
            self.plain = [replace(site, held_back=site.held_back or OUTSIDE) for site in self.plain]
        return self._named(sorted((*self.residual, *self.plain), key=lambda site: site.order))

    # -- residual units ------------------------------------------------------------------------------------

    def _residuals(self, owner: OwnerGraph) -> None:
        """The branches of the additions in one graph; an addition around others is left to those."""
        gated: set[fx.Node] = set()
        for node in owner.graph.nodes:
            if self._operation(owner, node) != "add" or _is_summand(self, owner, node):
                continue
            operands = _summands(self, owner, node)
            if len(operands) < 2:
                continue
            branch, reason = self._branch(operands)
            where = child_path(owner.path, labels(owner.graph)[node])
            if branch is None:
                if any(map(convolutions, (set().union(*map(_behind, operands))))):
                    self._refuse(where, reason)
                continue
            shortcut = set().union(*(_behind(operand) for operand in operands if operand is not branch))
            inside = _behind(branch) - shortcut
            if inside & gated or any(self._holds_unit(owner, inner) for inner in inside):
                self._refuse(where, "it skips over other residual units, which have sites of their own")
                continue
            value = self._unscaled(owner, branch)
            site = self._site(owner, value, "residual")
            if site is not None:
                gated.add(node)
                attended = any(is_gating(inner) or inner.meta.get("counts", (0, 0, 0))[2] for inner in inside)
                self.residual.append(replace(site, held_back=ATTENDED if attended else None))

    def _branch(self, operands: list[fx.Node]) -> tuple[fx.Node | None, str]:
        """The operand with the convolutions, if the others are its shortcut; else why there is none."""
        work = {operand: _work(operand, operands) for operand in operands}
        branch = max(operands, key=lambda operand: work[operand])
        others = [operand for operand in operands if operand is not branch]
        if work[branch][0] == 0:
            return None, "no operand of this sum has a convolution of its own"
        for other in others:
            if not _starts_in(other, branch):
                return None, "the operands of this sum do not start from one value: it joins, it does not skip"
        if sum(1 for operand in operands if work[operand][0] > 0 and work[operand] >= work[branch]) > 1:
            return None, "several branches of equal weight are summed"
        return branch, ""

    def _holds_unit(self, owner: OwnerGraph, node: fx.Node) -> bool:
        if node.op != "call_module":
            return False
        path = child_path(owner.path, str(node.target))
        return any(_inside(site.unit, {path}) for site in self.residual)

    def _unit_without_shortcut(self, owner: OwnerGraph, units: set[str]) -> None:
        """A block of the same class as a residual unit, beside one, that has no addition: gate what it returns."""
        siblings = [
            path
            for path in units
            if _parent(path) == _parent(owner.path) or _parent(_parent(path)) == _parent(_parent(owner.path))
        ]
        kin = {original_class(self.trace.model.get_submodule(path)) for path in siblings}
        if original_class(owner.module) not in kin or any(_inside(path, {owner.path}) for path in units):
            return
        value = returned(owner.graph)
        if value is None:
            return
        value = self._unscaled(owner, value)
        site = self._site(owner, value, "residual")
        if site is not None and any(map(convolutions, _behind(value))):
            attended = any(is_gating(inner) or inner.meta.get("counts", (0, 0, 0))[2] for inner in _behind(value))
            self.residual.append(replace(site, held_back=ATTENDED if attended else None))

    # -- plain convolutions --------------------------------------------------------------------------------

    def _chains(self, owner: OwnerGraph) -> None:
        """The values after each run of convolutions in one graph: after its normalisation and activation."""
        running: set[fx.Node] = set()
        for node in owner.graph.nodes:
            kind = self._operation(owner, node)
            continues = any(source in running for source in node.all_input_nodes)
            if kind == "module" and child_path(owner.path, str(node.target)) in self.open:
                kind = "conv"
            elif kind == "module" and continues and self._activates(child_path(owner.path, str(node.target))):
                kind = "act"
            elif continues and self._past_our_blocks(owner, node) is not node:
                continue
            if kind == "conv":
                running.add(node)
            elif continues and kind in ("norm", "pass", "pool"):
                running.add(node)
            elif continues and kind == "act":
                self._plain(owner, node)
            elif continues and node.op == "output" and owner.path:
                if returned(owner.graph) in running:
                    self.open.add(owner.path)
            elif continues:
                for source in node.all_input_nodes:
                    if source in running and not _goes_on(self, owner, source):
                        self._plain(owner, source, head=node.op == "output")
                        running.discard(source)

    def _plain(self, owner: OwnerGraph, value: fx.Node, *, head: bool = False) -> None:
        site = self._site(owner, value, "conv")
        if site is None or any(known.address == site.address for known in self.plain):
            return
        attended = any(is_gating(user) or user.meta.get("counts", (0, 0, 0))[2] for user in value.users)
        self.plain.append(replace(site, held_back=HEAD if head else ATTENDED if attended else None))

    def _activates(self, path: str) -> bool:
        """Whether a module with a graph of its own is nothing but normalisation and activation."""
        inner = self.trace.graphs.get(path)
        if inner is None:
            return False
        kinds = {self._operation(inner, node) for node in inner.graph.nodes if node.op.startswith("call")}
        value = returned(inner.graph)
        return "act" in kinds and "conv" not in kinds and value is not None and not any(map(convolutions, _behind(value)))

    # -- common --------------------------------------------------------------------------------------------

    def _operation(self, owner: OwnerGraph, node: fx.Node) -> str:
        return operation(self.trace, owner.path, node)

    def _site(self, owner: OwnerGraph, value: fx.Node, kind: str) -> Site | None:
        """The site of a value, written back where its forward can be edited; None if it is refused."""
        tensor = value.meta["val"]
        label = labels(owner.graph).get(value, value.name)
        address = child_path(owner.path, label)
        if not isinstance(tensor, Tensor) or not 3 <= tensor.dim() <= 5:
            return self._refuse(address, f"its value is not of the form (N, C, …): {tuple(tensor.shape)}")
        if all(extent == 1 for extent in tensor.shape[2:]):
            return None
        path, inside = owner.path, label
        if value.op == "placeholder":
            return self._refuse(address, "its value is an input of the module")
        written: str | None = inside
        module: nn.Module = owner.module
        while isinstance(module, nn.Sequential) or written == "":
            path = child_path(path, str(value.target))
            module = self.trace.model.get_submodule(path)
            inner = self.trace.graphs.get(path)
            if not isinstance(module, nn.Sequential) or inner is None or (last := returned(inner.graph)) is None:
                written = None
                break
            value = last
        if written is None and self.trace.calls.get(path, 0) > 1 and module is not owner.module:
            return self._refuse(address, f"`{path}` is called {self.trace.calls[path]} times: its output is not one value")
        result = returned(owner.graph)
        if written is not None and result is not None and value is self._past_our_blocks(owner, result):
            written = None
        if written is None and "#" in address:
            return self._refuse(address, "its module is called several times")
        unit = owner.path if kind == "residual" else path if written is None else address
        if kind == "residual":
            container = _parent(owner.path)
        else:
            container = _parent(path) if written is None else owner.path
        return Site(
            address=address,
            owner=path,
            value=written,
            kind=kind,
            channels=tensor.shape[1],
            size=tuple(tensor.shape[2:]),
            order=value.meta["time"],
            container=container,
            unit=unit,
        )

    def _refuse(self, address: str, reason: str) -> None:
        self.refused.append(Refusal(address or "(the network)", reason))

    def _named(self, sites: list[Site]) -> list[Site]:
        """The sites with a block name each that depends on the network alone, not on what is selected."""
        result = []
        for site in sites:
            alone = sum(other.owner == site.owner for other in sites) == 1
            label = re.sub(r"\W+", "_", site.value or "out")
            blocks = tuple(
                child_path(site.owner, step["block_name"]) for step in self._steps(site.owner) if step["value"] == site.value
            )
            held_back = INJECTED if blocks else site.held_back
            name = "se" if alone else f"se_{label}"
            result.append(replace(site, block_name=name, blocks=blocks, held_back=held_back))
        return result

    def _steps(self, path: str) -> list[dict[str, Any]]:
        """The steps of ours that an owner's forward was edited by."""
        body = getattr(type(self.trace.model.get_submodule(path)), "_se_inject_body", None)
        return json.loads(body)["steps"] if body else []

    def _past_our_blocks(self, owner: OwnerGraph, value: fx.Node) -> fx.Node:
        """A value before the blocks of ours that gate it."""
        names = {step["block_name"] for step in self._steps(owner.path)}
        while value.op == "call_module" and value.target in names and isinstance(value.args[0], fx.Node):
            value = value.args[0]
        return value

    def _unscaled(self, owner: OwnerGraph, value: fx.Node) -> fx.Node:
        """A value before dropout, stochastic depth, layer scale and our own blocks, as far as its shape lasts."""
        while True:
            source = self._past_our_blocks(owner, value)
            if source is value:
                source = passed_through(self.trace, owner.path, value) or value
            if source is value or source.op == "placeholder":
                return value
            value = source


def original_class(module: nn.Module) -> type:
    """The class the author wrote: a generated one knows the class it was made from."""
    return getattr(type(module), "_se_inject_original", type(module))


def _staged(sites: list[Site]) -> tuple[Site, ...]:
    """Number the stages: a new one where the container or the resolution changes."""
    result, number = [], 0
    previous: tuple[str, tuple[int, ...]] | None = None
    for site in sites:
        if site.held_back in (OUTSIDE, HEAD):
            result.append(site)
            continue
        key = (site.container, site.size)
        if key != previous:
            number, previous = number + 1, key
        result.append(replace(site, stage=number))
    return tuple(result)


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _inside(path: str, roots: Iterable[str]) -> bool:
    return any(path == root or not root or path.startswith(root + ".") for root in roots)


def _behind(node: fx.Node) -> set[fx.Node]:
    return sources(node) | {node}


def _work(operand: fx.Node, operands: list[fx.Node]) -> tuple[int, int]:
    """Convolutions that only this operand has behind it: how many, and their MACs."""
    others = set().union(*(_behind(other) for other in operands if other is not operand))
    own = [node.meta.get("counts", (0, 0, 0)) for node in _behind(operand) - others]
    return sum(count[0] for count in own), sum(count[1] for count in own)


def _starts_in(shortcut: fx.Node, branch: fx.Node) -> bool:
    """Whether a shortcut leads back, one value at a time, to a value that the branch was computed from."""
    behind = sources(branch)
    while shortcut not in behind:
        data = [source for source in shortcut.all_input_nodes if is_data(source)]
        if len(data) != 1 or getattr(shortcut.target, "__name__", "") == "getitem":
            return False
        shortcut = data[0]
    return True


def _is_sum(finder: _Finder, owner: OwnerGraph, node: fx.Node) -> bool:
    operands = [argument for argument in node.args[:2] if is_data(argument)]
    shapes = {tuple(operand.meta["val"].shape) for operand in operands if isinstance(operand, fx.Node)}
    return finder._operation(owner, node) == "add" and len(operands) == 2 and len(shapes) == 1


def _is_summand(finder: _Finder, owner: OwnerGraph, node: fx.Node) -> bool:
    """Whether this sum is only a part of a longer one."""
    users = list(node.users)
    return len(users) == 1 and _is_sum(finder, owner, users[0])


def _summands(finder: _Finder, owner: OwnerGraph, node: fx.Node) -> list[fx.Node]:
    if not _is_sum(finder, owner, node):
        return []
    result: list[fx.Node] = []
    for operand in node.args[:2]:
        assert isinstance(operand, fx.Node)
        if _is_sum(finder, owner, operand) and len(operand.users) == 1:
            result += _summands(finder, owner, operand)
        else:
            result.append(operand)
    return result


def _goes_on(finder: _Finder, owner: OwnerGraph, node: fx.Node) -> bool:
    """Whether the run of convolutions continues behind this value."""
    kinds = {finder._operation(owner, user) for user in node.users}
    return bool(kinds & {"norm", "act", "conv", "pass", "pool"})
