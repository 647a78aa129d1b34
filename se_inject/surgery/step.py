"""One block at one site, as plans list it and as an injected network remembers it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from se_inject.errors import LoadError
from se_inject.forwards import is_possible
from se_inject.surgery.schema import first_problem, with_integers


@dataclass(frozen=True)
class Step:
    """One block at one site, as plain data; plans are lists of such steps.

    Args:
        site: the site's address.
        owner: path of the module whose forward is edited.
        value: label of the gated value in its graph; None: what it returns.
        channels: C at the site.
        rank: number of spatial dimensions at the site.
        block: name of the block.
        options: the block's options.
        init: how the block starts: ``identity`` or ``paper``.
        block_name: the attribute that the block becomes on the owner.
        stage: number of the site's stage.
        size: spatial size of the value in the observed call.
        position: where the block sits relative to its unit.
        readers: labels of the nodes that read the gated value; None: all that read the value.
    """

    site: str
    owner: str
    value: str | None
    channels: int
    rank: int
    block: str
    options: dict[str, Any] = field(default_factory=dict)
    init: str = "identity"
    block_name: str = "se"
    stage: int | None = None
    size: tuple[int, ...] = ()
    position: str = "standard"
    readers: tuple[str, ...] | None = None

    @property
    def path(self) -> str:
        """Where the block is in the injected model."""
        return f"{self.owner}.{self.block_name}" if self.owner else self.block_name

    def to_data(self) -> dict[str, Any]:
        """Convert the step to a dict that JSON can hold."""
        readers = None if self.readers is None else list(self.readers)
        return {**asdict(self), "size": list(self.size), "readers": readers}

    @classmethod
    def from_data(cls, data: Any) -> Step:
        """Rebuild the step from the dict of ``to_data``.

        Raises:
            LoadError: the data has another form.
        """
        problem = first_problem(data, "step")
        if problem is not None:
            place, wrong = problem
            raise LoadError(
                f"a step of a plan can't be read: `{_dotted(place)}` {wrong}" if place else f"a step {wrong}",
                hint="`se_inject/surgery/plan.schema.json` says what a plan is",
            )
        data = with_integers(data)
        if len(data["size"]) != data["rank"]:
            raise LoadError(f"a step of rank {data['rank']} has {len(data['size'])} numbers for its `size`")
        if not is_possible(data["channels"], data["size"]):
            raise LoadError("a step gates a value that no memory holds", seen=f"{data['channels']} × {data['size']}")
        readers = None if data.get("readers") is None else tuple(data["readers"])
        return cls(**{**data, "size": tuple(data["size"]), "readers": readers})


def _dotted(place: tuple[str | int, ...]) -> str:
    return ".".join(map(str, place))
