"""Select some of a network's sites: by stage, by address, by number."""

from __future__ import annotations

import fnmatch
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from se_inject.errors import NoSites, OptionError, SiteNotFound, either
from se_inject.sites.site import ATTENTION, HeldBack, Refusal, Site, Stage
from se_inject.tables import Printed, counted


@dataclass(frozen=True, repr=False)
class Sites(Printed, Sequence[Site]):
    """The sites of a network, or some of them. Selecting returns a new value and changes nothing.

    Args:
        chosen: the sites, in the order in which data reaches them.
        refused: the places that can take no block.
        all_sites: every site of the network, for messages and for widening a selection.
        missed: of those refused the units: joins of branches that were seen, and small modules that can't be traced.
    """

    chosen: tuple[Site, ...]
    refused: tuple[Refusal, ...]
    all_sites: tuple[Site, ...]
    missed: tuple[Refusal, ...] = ()

    def text(self) -> str:
        """Format the table of stages; all sites of the network, chosen or not, are in it."""
        from se_inject.sites.text import stages_text

        refused = f"\n{counted(len(self.refused), 'place')} refused" if self.refused else ""
        shortfall = f"\n{self.shortfall()}" if self.missed else ""
        return f"{stages_text(self)}\n{self.summary()}{shortfall}{refused}"

    def summary(self) -> str:
        """Say how many sites are chosen."""
        stages = len({site.stage for site in self.chosen if site.stage is not None})
        return f"{len(self.chosen)} of {counted(len(self.all_sites), 'site')} chosen, in {counted(stages, 'stage')}"

    def __len__(self) -> int:
        return len(self.chosen)

    def __iter__(self) -> Iterator[Site]:
        return iter(self.chosen)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        return self.chosen[index]

    def stages(self, *names: int | str, attended: bool = False) -> Sites:
        """Select only the sites in these stages.

        Args:
            *names: numbers, ranges (``"2-4"``), path prefixes (``"layer3"``), levels (``"C4"``: the stage that the table
                calls so), ``"last"``: the backbone's last, ``"all"``, or ``"all-but-last"``: the paper's advice
                (section 4) where parameters are dear.
            attended: also sites that have attention of their own already.

        Raises:
            SiteNotFound: a name that matches no site.
        """
        matched: list[Site] = []
        for name in names:
            found = [site for site in self.all_sites if site.stage is not None and self._in_stage(site, name)]
            limits = _RANGE.fullmatch(str(name).strip())
            if not found or (limits and int(limits[2]) > max(site.stage or 0 for site in self.all_sites)):
                raise SiteNotFound(
                    f"no stage matches `{name}`",
                    seen=self._refused_at(str(name)) or self._seen(),
                    hint=f"list the stages with `{either('se-inject sites MODEL -v', 'print(si.find_sites(model))')}`",
                )
            matched += found
        return self._only(matched, attended, f"`{', '.join(map(str, names))}`")

    @property
    def last_stage(self) -> int:
        """The number of the backbone's last stage; 0 if there is none."""
        return max((site.stage or 0 for site in self.all_sites if site.held_back is not HeldBack.NECK), default=0)

    def _in_stage(self, site: Site, name: int | str) -> bool:
        text = str(name).strip()
        if text == LAST:
            return site.stage == self.last_stage
        if _LEVEL.fullmatch(text):
            return any(text in stage.aliases and site in stage.sites for stage in self.table)
        if text in (ALL, ALL_BUT_LAST):
            return site.held_back is not HeldBack.NECK and (text == ALL or site.stage != self.last_stage)
        if text.isdigit():
            return site.stage == int(text)
        if found := _RANGE.fullmatch(text):
            return site.stage is not None and int(found[1]) <= site.stage <= int(found[2])
        return site.address == text or site.address.startswith(text + ".")

    def where(self, predicate: Callable[[Site], bool]) -> Sites:
        """Keep of these sites those for which a predicate is true: ``sites.where(lambda site: site.channels >= 256)``.

        Unlike ``stages`` and ``at`` it adds none that are held back.

        Args:
            predicate: called with each ``Site``.

        Raises:
            SiteNotFound: it is true for none.
        """
        kept = tuple(site for site in self.chosen if predicate(site))
        if not kept:
            seen = self._with_shortfall(f"{counted(len(self), 'site')} were asked")
            raise SiteNotFound("the predicate is true for no site", seen=seen)
        return replace(self, chosen=kept)

    def at(self, *patterns: str | Callable[[Site], bool], attended: bool = False) -> Sites:
        """Select the sites whose address matches a glob (``layer3.*``) or, after ``re:``, a regular expression.

        Args:
            *patterns: globs, expressions, or predicates, which are asked about every site that no stage leaves out.
            attended: also sites that have attention of their own already.

        Raises:
            SiteNotFound: a pattern that matches no site.
            OptionError: not a regular expression.
        """
        matched: list[Site] = []
        for pattern in patterns:
            if not isinstance(pattern, str):
                matched += [site for site in self.everything(attended=attended) if pattern(site)]
                if not matched:
                    raise SiteNotFound("the predicate is true for no site", seen=self._seen())
                continue
            found = [site for site in self.all_sites if _matches(site, pattern)]
            if not found:
                raise SiteNotFound(
                    f"no site matches `{pattern}`",
                    seen=self._refused_at(pattern) or self._seen(),
                    hint=self._similar(pattern)
                    + f"list them with `{either('se-inject sites MODEL -v', 'si.find_sites(model).all_sites')}`",
                )
            matched += found
        return self._only(matched, attended, f"`{', '.join(map(str, patterns))}`")

    def expect(self, count: int) -> Sites:
        """Check the number of sites, and return them: a script's guard against a model that changed.

        Raises:
            SiteNotFound: there are more or fewer.
        """
        if len(self) != count:
            raise SiteNotFound(
                f"expected {counted(count, 'site')}", seen=f"{counted(len(self), 'site')}: {self._seen()}"
            )
        return self

    def everything(self, *, attended: bool = False) -> Sites:
        """Select the sites of all stages but those of necks and heads, if there are others.

        Raises:
            NoSites: there are none.
        """
        inside = [site for site in self.all_sites if site.stage is not None]
        return self._only(
            [site for site in inside if site.held_back is not HeldBack.NECK] or inside, attended, "the network"
        )

    def _only(self, matched: Iterable[Site], attended: bool, asked: str) -> Sites:
        unique = sorted(set(matched), key=lambda site: site.order)
        kept = tuple(site for site in unique if attended or site.held_back is not HeldBack.ATTENTION)
        if not kept and unique:
            raise NoSites(
                f"every site of {asked} already has attention",
                seen=self._with_shortfall(
                    f"{counted(len(unique), 'site')} with a gate of their own, `{unique[0].address}` the first"
                    + self.attention(before="; ")
                ),
                hint=f"to add a second gate all the same: `{either('--attended', 'attended=True')}`",
            )
        if not kept and self.missed:
            raise NoSites(
                f"{asked} has {counted(len(self.missed), 'unit')}, and none can take a block",
                seen=f"most often: {self.commonest_reason()}{self.attention(before='; ')}",
                hint=f"see `{either('se-inject sites MODEL -v', 'si.find_sites(model).missed')}`; "
                "places outside of the units are chosen by address",
            )
        if not kept:
            look = either("se-inject sites MODEL -v", "si.find_sites(model).refused")
            hint = f"see `{look}`; places outside of the units are chosen by address"
            raise NoSites("no convolutional stage was found", seen=self.attention(after="; ") + self._seen(), hint=hint)
        return replace(self, chosen=kept)

    def commonest_reason(self) -> str:
        """Return the commonest reason why a unit can take no block; empty if all can."""
        return commonest(self.missed)

    def shortfall(self) -> str:
        """Say how many of the network's units can take no block, and most often why; empty if all can."""
        if not self.missed:
            return ""
        units = len(self.missed) + sum(site.stage is not None and site.kind != "conv" for site in self.all_sites)
        return (
            f"{len(self.missed)} of {counted(units, 'unit')} can take no block, most often: {self.commonest_reason()}"
        )

    def _with_shortfall(self, text: str) -> str:
        return "; ".join(filter(None, (text, self.shortfall())))

    def attention(self, *, before: str = "", after: str = "") -> str:
        """Say how many units were left alone because they are attention between positions; empty if none is.

        Args:
            before: put in front of the text if there is one.
            after: put behind it.
        """
        number = sum(item.reason == ATTENTION for item in self.refused)
        return f"{before}left alone: {counted(number, 'unit')} of attention between positions{after}" if number else ""

    def _refused_at(self, pattern: str) -> str:
        """Say which places are refused under an address or glob, and most often why; empty if none is."""
        found = [item for item in self.refused if _is_at(pattern, item.address)]
        if not found:
            return ""
        number = counted(len(found), "place")
        return f"refused there: {number}, `{found[0].address}` the first; most often: {commonest(found)}"

    def _seen(self) -> str:
        if not self.all_sites:
            return self._with_shortfall(f"no site, {counted(len(self.refused), 'refused place')}")
        numbers = [site.stage for site in self.all_sites if site.stage is not None]
        text = f"{counted(len(self.all_sites), 'site')}, `{self.all_sites[0].address}` … `{self.all_sites[-1].address}`"
        return self._with_shortfall(text + (f", stages 1 to {max(numbers)}" if numbers else ""))

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
        strides = {number: tuple(dict.fromkeys(site.stride for site in group)) for number, group in groups.items()}
        last: dict[tuple[float, ...], int] = {}
        for number, group in groups.items():
            if group[0].held_back is not HeldBack.NECK:
                last |= dict.fromkeys(strides[number], number)
        rows = []
        for number, group in groups.items():
            path = group[0].container
            inside = [site for site in self.all_sites if site.stage is not None and _is_within(site.unit, path)]
            if not path or len(inside) > len(group):
                path = group[0].unit if group[0].unit == group[-1].unit else f"{group[0].unit} … {group[-1].unit}"
            levels = [_power_of_two(stride) for stride in strides[number] if last.get(stride) == number]
            aliases = tuple(f"C{level}" for level in levels if level is not None)
            channels = tuple(dict.fromkeys(site.channels for site in group))
            rows.append(Stage(number, path, strides[number], channels, tuple(group), aliases))
        return tuple(rows)


def commonest(refused: Sequence[Refusal]) -> str:
    """Return the commonest reason of refused places, the names and numbers in it left aside; empty if there are none."""
    reasons = Counter(_without_names(item.reason) for item in refused)
    common = max(reasons, key=reasons.__getitem__, default="")
    return next((item.reason for item in refused if _without_names(item.reason) == common), "")


def _is_at(pattern: str, address: str) -> bool:
    """Return whether a refused place is what a stage's path or an address's pattern names, or within it."""
    return (
        address == pattern
        or address.startswith(pattern + ".")
        or _glob(pattern, address)
        or _glob(pattern, address + ".")
    )


def _without_names(reason: str) -> str:
    """Return a reason without the names and numbers in it, so that equal ones are counted as such."""
    return re.sub(r"`[^`]*`|\d+", "…", reason)


def _is_within(path: str, container: str) -> bool:
    return not container or path == container or path.startswith(container + ".")


ALL, ALL_BUT_LAST, LAST = "all", "all-but-last", "last"
_LEVEL = re.compile(r"C\d+")
_RANGE = re.compile(r"(\d+)\s*-\s*(\d+)")


def _matches(site: Site, pattern: str) -> bool:
    return _glob(pattern, site.address) or (not pattern.startswith("re:") and site.owner == pattern)


def _glob(pattern: str, address: str) -> bool:
    if pattern.startswith("re:"):
        try:
            return re.fullmatch(pattern[3:], address) is not None
        except re.error as error:
            raise OptionError(f"`{pattern[3:]}` is not a regular expression", seen=str(error)) from error
    return fnmatch.fnmatchcase(address, pattern)


def _power_of_two(stride: tuple[float, ...]) -> int | None:
    level = round(stride[0]).bit_length() - 1 if stride and round(stride[0]) > 0 else -1
    return level if level >= 0 and all(round(value) == 2**level for value in stride) else None
