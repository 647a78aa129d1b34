"""Commands that change nothing: ``sites``, ``cost``, ``blocks``."""

from __future__ import annotations

from inspect import getdoc
from pathlib import Path
from typing import Any

import click
from torch import nn

from se_inject.blocks import block_names, build_block, find_block, has_identity_start
from se_inject.cli.arguments import block_options, example, read_network
from se_inject.cli.block_texts import parsed_blocks
from se_inject.cli.talk import note, print_json
from se_inject.cost import module_costs
from se_inject.errors import InjectError, OptionError
from se_inject.forwards import original_class
from se_inject.isolation import protections
from se_inject.loading import describe, inspect_file, load
from se_inject.plans import (
    EACH,
    block_costs,
    block_costs_data,
    block_costs_text,
    check_plot,
    cost_grid,
    grid_data,
    grid_text,
    plan,
    plot_grid,
)
from se_inject.progress import step
from se_inject.sites import HeldBack, sites_data, sites_in, sites_text, stages_text
from se_inject.surgery import steps_of
from se_inject.tables import counted, table
from se_inject.tracing import observe_model


def sites(
    *, model: str, weights: Path | None, arch: str | None, entry: str | None, trust: tuple[str, ...], inputs: tuple[str, ...], style: str,
    as_json: bool, verbose: bool,
) -> None:  # fmt: skip
    """List the stages of a network, and all its sites and refusals."""
    step(f"reading {model}")
    read: list[str] = []
    network = load(model, arch=arch, weights=weights, entry=entry, trust=trust, mmap=True, notes=read)
    step("finding sites")
    if line := describe(model, network, arch):
        note(line)
    trace = observe_model(network, example(inputs, network))
    found = sites_in(trace)
    if as_json:
        print_json({"model": original_class(network).__name__, "notes": [*read, *trace.notes], **sites_data(found)})
    else:
        for line in read:
            note(f"note: {line}")
        for line in trace.notes:
            note(line)
        click.echo(stages_text(found, style))
        if verbose:
            click.echo("\n" + sites_text(found, style))
        attended = sum(site.held_back is HeldBack.ATTENTION for site in found.all_sites)
        if attended:
            have = "site already has" if attended == 1 else "sites already have"
            note(f"{attended} {have} attention, left out unless --attended is given")
        if found.missed:
            note(found.shortfall())
        if found.refused and not verbose:
            note(f"{counted(len(found.refused), 'place')} refused: -v says why")
    found.everything(attended=True)


def cost(
    *, model: str, weights: Path | None, arch: str | None, entry: str | None, trust: tuple[str, ...], inputs: tuple[str, ...],
    reductions: tuple[float, ...] | None, stages: tuple[str, ...], plot: Path | None, force: bool, style: str,
    as_json: bool, **options: Any,
) -> None:  # fmt: skip
    """Print, and draw, what blocks would add for every ratio and choice of stages; or what each module costs."""
    if options["by"] is None and options["depth"] is not None:
        raise OptionError("`--depth` is for the table of modules", hint="add --by module")
    if options["by"] is not None and plot is not None:
        raise OptionError("`--plot` draws the grid, and `--by module` is a table", hint="leave one of them out")
    if plot is not None:
        check_plot(plot, force=force)
    step(f"reading {model}")
    network = read_network(model, arch=arch, weights=weights, entry=entry, trust=trust, mmap=True)
    step("counting the cost")
    if options["by"] is not None:
        _cost_by_module(network, example(inputs, network), reductions or (), stages, style, as_json, options)
        return
    grid = cost_grid(
        network,
        example(inputs, network),
        reductions=reductions,
        stages=stages or EACH,
        attended=options["attended"],
        block=options["block"],
        position=options["position"],
        init=options["init"],
        **parsed_blocks([options["block"]], options["settings"], block_options(options))[0].options,
    )
    for line in grid.notes:
        note(f"note: {line}")
    if as_json:
        print_json(grid_data(grid))
    else:
        click.echo(grid_text(grid, style))
    if plot is not None:
        plot_grid(grid, plot, force=force)
        note(f"wrote {plot}")


def _cost_by_module(
    network: nn.Module, inputs: Any, reductions: tuple[float, ...], stages: tuple[str, ...], style: str, as_json: bool,
    options: dict[str, Any],
) -> None:  # fmt: skip
    """List the network's modules with its blocks; into one without, the blocks that the options describe are put first."""
    if len(reductions) > 1 or len(stages) > 1:
        raise OptionError("the table of modules is of one network", hint="give one --r and one --stages")
    if not steps_of(network):
        given = {**block_options(options), **({"reduction": reductions[0]} if reductions else {})}
        (block,) = parsed_blocks([options["block"]], options["settings"], given)
        planned = plan(
            network, inputs, stages=stages[0] if stages else None, attended=options["attended"], block=block.name,
            position=options["position"], init=options["init"], **block.options,
        )  # fmt: skip
        note(f"with the {counted(len(planned), 'block')} that would be put in; nothing is written")
        network = planned.apply(network)
    found = module_costs(network, observe_model(network, inputs))
    shown = found.within(2 if options["depth"] is None else options["depth"])
    if as_json:
        print_json({"modules": shown.data(), "uncounted": list(found.uncounted)})
    else:
        click.echo(shown.text(style))
    if found.uncounted:
        note(f"not counted: {', '.join(found.uncounted)}")


def inspect(*, file: Path, trust: tuple[str, ...], as_json: bool) -> None:
    """Say what a file is and everything that it names, and what reading it is confined to on this system."""
    step(f"looking through {file}")
    found = inspect_file(file, trust=trust)
    if as_json:
        print_json({**found.data(), "confinement": protections()})
    else:
        click.echo(str(found))
        note("\nthe command reads files in a process of its own, on this system confined so:")
        for line in protections():
            note(f"  {line}")
    if found.refused or found.damaged:
        raise click.exceptions.Exit(1)


def blocks(
    *, name: str | None, model: str | None, trust: tuple[str, ...], inputs: tuple[str, ...], style: str, as_json: bool
) -> None:
    """Print the card of a block; or list the blocks, with what they cost at 256 channels or on a network."""
    if name is not None:
        card = getdoc(find_block(name)) or f"block `{name}` has no card"
    if model is not None:
        step(f"reading {model}")
        network = read_network(model, trust=trust, mmap=True)
        step("counting the cost of every block")
        found = block_costs(network, example(inputs, network), None if name is None else [name])
        print_json(block_costs_data(found)) if as_json else click.echo(block_costs_text(found, style))
    elif name is not None:
        click.echo(card)
    else:
        rows = [_known(known, origin) for known, origin in sorted(block_names().items())]
        if as_json:
            keys = ("block", "params", "identity_start", "about", "from")
            print_json([dict(zip(keys, row, strict=True)) for row in rows])
        else:
            click.echo(table(("block", "params at C = 256", "identity start", "what it is", "from"), rows, style))


def _known(name: str, origin: str) -> list[Any]:
    try:
        block = build_block(name, 256, (14, 14), {}, "paper")
        about = (getdoc(find_block(name)) or "").split("\n")[0]
    except InjectError as error:
        return [name, None, None, f"broken: {error.message}", origin]
    return [name, sum(p.numel() for p in block.parameters()), has_identity_start(block), about, origin]
