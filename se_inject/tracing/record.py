"""Collect what the observer writes down while a call is observed, until it becomes a trace."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from se_inject.tracing.outlines import Outlines
from se_inject.tracing.trace import OwnerGraph, Trace
from se_inject.tracing.watching import Watch


@dataclass
class Record:
    """The fields of a ``Trace`` while they grow.

    Attributes:
        watch: the twin that is called.
        doors: path of a module → the method by which it was called first.
        shut: paths of modules that are called by several, or by one that returns no tensor.
    """

    watch: Watch
    how: str
    graphs: dict[str, OwnerGraph] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    kinds: dict[str, set[Any]] = field(default_factory=dict)
    without_grad: set[str] = field(default_factory=set)
    doors: dict[str, str] = field(default_factory=dict)
    shut: set[str] = field(default_factory=set)
    size: tuple[int, ...] = ()
    outlines: Outlines = field(default_factory=Outlines)

    def kept(self, value: Any) -> Any:
        """Return what a trace keeps of a value: itself, or tensors without numbers if it has some, which take memory."""
        return self.outlines.of(value) if self.how == "real" else value

    def frozen(self, inputs: tuple[tuple[Any, ...], dict[str, Any]], outputs: Any, macs: int) -> Trace:
        """Return the finished trace."""
        aliases, originals = self.watch.aliases, self.watch.originals
        return Trace(
            model=self.watch.model,
            inputs=inputs,
            how=self.how,
            graphs=MappingProxyType(self.graphs),
            failures=MappingProxyType(self.failures),
            calls=MappingProxyType(self.calls),
            kinds=MappingProxyType({path: frozenset(kinds) for path, kinds in self.kinds.items()}),
            canonical=MappingProxyType({other: path for path, others in aliases.items() for other in others}),
            without_grad=frozenset(self.without_grad),
            hooked=frozenset(path for path, module in originals.items() if module._forward_hooks),
            outputs=self.kept(outputs),
            macs=macs,
            size=self.size,
            doors=MappingProxyType(self.doors),
            known={"": self.watch} if self.how != "fake" else {},
        )
